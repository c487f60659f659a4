"""The calls that a case compares: ours, and every way in which PyTorch computes the same."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastattn
from fastattn.bench.flex import flex
from fastattn.bench.work import dense_mask
from fastattn.biases import Bias
from fastattn.masks import Mask, MaskShape
from fastattn.testing.bench_cases import BenchCase
from fastattn.testing.inputs import Inputs

OURS = "fastattn"

Forward = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Contender:
    """One way to compute a case.

    Args:
        name: "fastattn", or PyTorch's path: "sdpa" (its own choice), "sdpa-flash", "sdpa-math", ...
        call: does the timed work once and returns its results, out, or the gradients of q, k and v.
        kernel: PyTorch's kernel that is forced while it is called, or None.
    """

    name: str
    call: Callable[[], Any]
    kernel: SDPBackend | None = None

    def forced(self) -> contextlib.AbstractContextManager[Any]:
        """The context to call in; entered outside the timed part."""
        return contextlib.nullcontext() if self.kernel is None else sdpa_kernel(self.kernel)


def contenders(bench: BenchCase, inputs: Inputs, with_flex: bool = False) -> list[Contender]:
    """Ours first, then PyTorch's paths; which of them take the case is found out by calling them."""
    torch_call = sdpa(inputs)
    ways: list[tuple[str, Forward, SDPBackend | None]] = [
        (OURS, ours(inputs), None),
        ("sdpa", torch_call, None),
        ("sdpa-flash", torch_call, SDPBackend.FLASH_ATTENTION),
        ("sdpa-math", torch_call, SDPBackend.MATH),
    ]
    case = inputs.case
    if case.op == "decode" and case.heads > case.num_heads_kv and inputs.mask is None:
        ways.append(("sdpa-folded", sdpa_folded, None))
    if with_flex and (compiled := flex(bench, inputs)) is not None:
        ways.append(("flex", compiled, None))
    return [Contender(name, timed(bench.timed, call, inputs, kernel), kernel) for name, call, kernel in ways]


def ours(inputs: Inputs) -> Forward:
    """The public call; dropout draws its seed, as it does for users."""
    case = inputs.case
    positional, options = inputs.arguments()
    options.pop("dropout_seed", None)
    if case.op == "decode":
        function, more = fastattn.decode_attention, positional[3:]
        return lambda q, k, v: function(q, k, v, *more, **options)
    # No empty dict of keywords where there is nothing to say: tiny calls are measured too.
    if not options:
        return fastattn.attention
    return lambda q, k, v: fastattn.attention(q, k, v, **options)


def sdpa(inputs: Inputs) -> Forward:
    """PyTorch's call with the case's mask and bias as it wants them, made beforehand."""
    case = inputs.case
    options: dict[str, Any] = {}
    if case.num_heads_kv != case.heads:
        options["enable_gqa"] = True
    if case.dropout_p:
        options["dropout_p"] = case.dropout_p
    if is_plain_causal(inputs):
        options["is_causal"] = True
    elif inputs.mask is not None or case.bias is not None:
        options["attn_mask"] = additive(inputs) if case.bias is not None else dense_mask(inputs)
    if not options:
        return F.scaled_dot_product_attention
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, **options)


def is_plain_causal(inputs: Inputs) -> bool:
    """Whether PyTorch's is_causal says all that the mask says."""
    case = inputs.case
    if not isinstance(inputs.mask, Mask) or case.bias is not None or case.queries != case.keys:
        return False
    mask = inputs.mask.to_dense(MaskShape(case.batch, case.heads, case.queries, case.keys))
    triangle = torch.ones(case.queries, case.keys, dtype=torch.bool).tril()
    return bool((mask == triangle).all())


def additive(inputs: Inputs) -> Tensor:
    """The case's bias as a tensor, -inf where its mask hides."""
    case = inputs.case
    bias = inputs.arguments()[1]["bias"]
    if isinstance(bias, Bias):
        shape = MaskShape(case.batch, case.heads, case.queries, case.keys)
        bias = bias.to_dense(shape, "cpu", case.dtype).contiguous()
    mask = dense_mask(inputs)
    return bias if mask is None else bias.masked_fill(~mask, -math.inf)


def sdpa_folded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One query a head: the heads that share keys become the rows of one head, so that PyTorch reads the
    cache once for all of them."""
    batch, heads, _, dim = q.shape
    rows = q.view(batch, k.shape[1], heads // k.shape[1], dim)
    return F.scaled_dot_product_attention(rows, k, v).view(batch, heads, 1, v.shape[3])


def timed(kind: str, function: Forward, inputs: Inputs, kernel: SDPBackend | None) -> Callable[[], Any]:
    """The timed work: `forward` -> out; `backward` -> (dq, dk, dv); `step` -> (dq, dk, dv), both passes."""
    q, k, v = (inputs.leaves[name] for name in ("q", "k", "v"))
    if kind == "forward":
        return lambda: function(q, k, v)
    leaves = tuple(tensor.detach().requires_grad_() for tensor in (q, k, v))
    dout = inputs.dout
    if kind == "step":
        return lambda: torch.autograd.grad(function(*leaves), leaves, dout)
    graph: list[Tensor] = []

    def backward() -> Any:
        if not graph:  # the first call, which is not timed, runs the forward pass
            graph.append(function(*leaves))
        return torch.autograd.grad(graph[0], leaves, dout, retain_graph=True)

    return backward


def usable(contender: Contender) -> Any:
    """The results of a first call, or None where PyTorch's forced kernel refuses the case."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch says at length why a kernel was not taken
        try:
            with contender.forced():
                return contender.call()
        except RuntimeError as error:
            if contender.kernel is None or "kernel" not in str(error).lower():
                raise
            return None
