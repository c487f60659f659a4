"""hard_attention: each query attends to one key."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastattn import autograd, dispatch, execution, leading, ops, reference, watch
from fastattn.backends import cpu
from fastattn.call import Call
from fastattn.lowering import lower
from fastattn.masks import Mask
from fastattn.spec import accumulate_dtype
from fastattn.validation import check_seed, validate

MODES = ("argmax", "sample")
GRADIENTS = ("straight_through", "reinforce")


def hard_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mode: str = "argmax",
    gradient: str = "straight_through",
    mask: Mask | Tensor | None = None,
    scale: float | None = None,
    seed: Tensor | None = None,
    return_index: bool = False,
    backend: str | None = None,
) -> Any:
    """out_i = v_{j(i)}, with j(i) the visible key of the largest scale q_i . k_j, or drawn from its softmax.

    The CPU kernels choose in one pass that keeps no scores; on other devices the definition chooses, which
    makes them all. Of equal scores the first key wins; a NaN wins over all. A draw takes the largest score
    plus Gumbel noise, made from the words of Philox that dropout reads: the same seed gives the same keys.

    >>> q, k, v = torch.eye(3)[[2, 0]], torch.eye(3), torch.arange(3.0)[:, None]
    >>> hard_attention(q, k, v).flatten().tolist()
    [2.0, 0.0]

    Args:
        q: [..., Lq, D]; k: [..., Lk, D]; v: [..., Lk, Dv]; one dtype, float32, bfloat16, float16 or float64.
            The leading dimensions broadcast.
        mode: "argmax" or "sample".
        gradient: "straight_through": backward is that of soft attention, softmax_j(scale q_i . k_j) v_j, as
            if the choice had been made softly. "reinforce": of out only the chosen values get a gradient, and
            log_prob is returned, to be part of the loss: (reward - baseline) * log_prob is the score-function
            estimator.
        mask: a fastattn.masks.Mask (the first leading dimension is its batch, a second its heads), or bool
            broadcastable to [..., Lq, Lk], True = attend.
        scale: 1 / sqrt(D) where None.
        seed: int64, one element, on q's device; drawn from the default generator where mode is "sample" and
            it is None.
        return_index: whether to return j(i) too.
        backend: as in `attention`.
    Returns:
        out [..., Lq, Dv] in q's dtype; with gradient="reinforce" (out, log_prob), log_prob [..., Lq] the
        logarithm of the chosen key's probability, float32 (float64 for float64), differentiable in q and k;
        with return_index also index [..., Lq], int64, last. A query that sees no key has out 0, log_prob 0
        and index -1.
    Raises:
        TypeError, ValueError, NotImplementedError: naming the argument, the rule and the value got.
    Source: Xu et al., "Show, Attend and Tell", ICML 2015, section 4.1; straight-through: Bengio, Léonard and
    Courville, 2013; REINFORCE: Williams, 1992; Gumbel-max: Gumbel, 1954.
    """
    check_choices(mode, gradient)
    if seed is not None and mode == "argmax":
        raise ValueError('seed must be None with mode="argmax", which draws nothing')
    call = Call("attention", q, k, v, mask=mask, scale=scale, backend=backend)
    *results, index = attend_hard(call, mode, gradient, seed)
    results += [index] if return_index else []
    return results[0] if len(results) == 1 else tuple(results)


def check_choices(mode: str, gradient: str) -> None:
    """Raise unless both are names that there are."""
    for name, value, names in (("mode", mode, MODES), ("gradient", gradient, GRADIENTS)):
        if value not in names:
            raise ValueError(f"{name} must be one of {', '.join(names)}, got {value!r}")


def attend_hard(call: Call, mode: str, gradient: str, seed: Tensor | None = None) -> list[Tensor]:
    """[out, index], with gradient="reinforce" [out, log_prob, index]: `hard_attention` of a call."""
    lead = leading.fold(call)
    execution.autocast(call)
    validate(call)
    if seed is not None:
        check_seed("seed", seed, call.q.device)
    elif mode == "sample":
        seed = torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device=call.q.device)
    if watch.is_watched():
        call = watch.changed(call)
        with watch.unwatched():  # of the soft call within, which only gradients want
            out, log_prob, index = _attend(call, seed, gradient)
        watch.tell(call)
    else:
        out, log_prob, index = _attend(call, seed, gradient)
    rows = [t.reshape(*lead, t.shape[-1]) for t in (log_prob, index) if t is not None]
    return [leading.unfold(out, lead), *rows]


def _attend(call: Call, seed: Tensor | None, gradient: str) -> tuple[Tensor, Tensor | None, Tensor]:
    """out, log_prob where the gradient is REINFORCE's, and the chosen keys of a validated call."""
    index = choose_keys(call, seed)
    out = _values_at(call.v, index)
    if gradient == "reinforce":
        return out, _log_probability(call, index), index
    if torch.is_grad_enabled() and (
        any(t.requires_grad for t in (call.q, call.k, call.v))
        # A map's tensors do not tell whether a gradient is taken around it.
        or torch._C._are_functorch_transforms_active()
    ):
        out = _StraightThrough.apply(execution.run(call), out.detach())
    return out, None, index


def choose_keys(call: Call, seed: Tensor | None) -> Tensor:
    """The key of each row of a validated call, int64 [B, Hq, Lq]; -1 where a row sees none.

    Args:
        seed: draw with it; None: take the largest score.
    """
    call = replace(call, q=call.q.detach(), k=call.k.detach(), v=call.k.detach()[..., :1])
    shape = (*call.q.shape[:3],)
    if 0 in shape or call.k.shape[2] == 0:
        return call.q.new_full(shape, -1, dtype=torch.int64)
    if dispatch.choose(call) is not cpu:
        return reference.hard_index(call.q, call.k, mask=call.mask, scale=call.scale_value(), seed=seed)
    operands, params = lower(call)
    operands = operands._replace(seed=seed)
    if torch._C._are_functorch_transforms_active() and not torch.compiler.is_compiling():
        from fastattn import functorch

        return functorch.hard_index(cpu, call.q, call.k, operands, params)
    if torch.compiler.is_compiling() or autograd.is_traced(call.q, call.k):
        return ops.hard_index(cpu.name, call.q, call.k, operands, params)
    return cpu.hard_index(call.q, call.k, operands, params)


def _values_at(v: Tensor, index: Tensor) -> Tensor:
    """v [B, H, Lk, n] at index [B, H, Lq], 0 where that is -1."""
    if v.shape[2] == 0:
        return v.new_zeros(*index.shape, v.shape[3])
    at = index.clamp(min=0).unsqueeze(-1)
    return v.gather(2, at.expand(*index.shape, v.shape[3])).masked_fill(index.unsqueeze(-1) < 0, 0)


def _log_probability(call: Call, index: Tensor) -> Tensor:
    """scale q_i . k_j(i) - lse_i, 0 where no key was chosen."""
    dtype = accumulate_dtype(call.q.dtype)
    scored = replace(call, v=torch.zeros_like(call.v[..., :1]), return_lse=True)
    _, lse = execution.run(scored)
    keys = _values_at(call.k, index).to(dtype)
    score = call.scale_value() * (call.q.to(dtype) * keys).sum(-1)
    return torch.where(index < 0, 0.0, score - lse.to(dtype))


class _StraightThrough(torch.autograd.Function):
    """The hard value, with the soft one's gradient."""

    generate_vmap_rule = True

    @staticmethod
    def forward(soft: Tensor, hard: Tensor) -> Tensor:
        return hard.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None
