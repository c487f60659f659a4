"""The calls that a case compares on a GPU: ours, and every path of PyTorch that computes the same."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend

from fastattn.bench.contenders import OURS, Contender, Forward, ours, sdpa, timed
from fastattn.bench.flex import MaskMod, flex_call, mask_mod, score_mod
from fastattn.bench.padded import packed, padded, sdpa_loop
from fastattn.testing.bench_case import BenchCase
from fastattn.testing.inputs import Inputs

KERNELS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
FLEX = "flex"


class Calls:
    """Makes contenders of one case.

    Args:
        bench: the case.
        inputs: its numbers.
        copies: of q, k, v and dout, called in turn, so that none is found in a cache.
    """

    def __init__(self, bench: BenchCase, inputs: Inputs, copies: int = 1) -> None:
        self.bench, self.copies = bench, copies
        case = inputs.case
        self.more: tuple[Tensor, ...] = ()
        if bench.timed != "forward" and case.bias is not None and case.bias.requires_grad:
            leaf = inputs.leaves[case.bias.leaf].detach().requires_grad_()
            inputs = replace(inputs, leaves=inputs.leaves | {case.bias.leaf: leaf})
            self.more = (leaf,)
        self.inputs = inputs

    def way(
        self,
        name: str,
        function: Forward,
        kernel: SDPBackend | None = None,
        on: Inputs | None = None,
        compared: Callable[[Any], Any] = lambda results: results,
    ) -> Contender:
        """A contender that calls `function` with q, k and v of the case, or of `on`."""
        copies = cloned(self.inputs if on is None else on, self.copies)
        calls = [timed(self.bench.timed, function, copy, self.more) for copy in copies]
        return Contender(name, in_turn(calls), kernel, compared=compared)


def cloned(inputs: Inputs, copies: int) -> list[Inputs]:
    """The same q, k, v and dout in several places."""
    again = [inputs]
    for _ in range(copies - 1):
        leaves = {name: inputs.leaves[name].detach().clone() for name in ("q", "k", "v")}
        again.append(replace(inputs, leaves=inputs.leaves | leaves, dout=inputs.dout.clone()))
    return again


def in_turn(calls: Sequence[Callable[[], Any]]) -> Callable[[], Any]:
    """Each time the next one."""
    if len(calls) == 1:
        return calls[0]
    turn = itertools.cycle(calls)

    def call() -> Any:
        return next(turn)()

    return call


def contenders(
    bench: BenchCase,
    inputs: Inputs,
    copies: int = 1,
    with_flex: bool = True,
    compiled: bool = True,
    backend: str = "triton",
) -> list[Contender]:
    """Ours first, then PyTorch's paths; which of them take the case is found out by calling them.

    Args:
        with_flex: whether FlexAttention takes part.
        compiled: whether it is compiled, without which it is of no use but for tests.
        backend: of ours.
    """
    calls = Calls(bench, inputs, copies)
    inputs, case = calls.inputs, inputs.case
    ways = [calls.way(OURS, ours(inputs, backend=backend))]
    if case.op == "varlen":
        ways += varlen_ways(calls)
    elif case.softcap is None:  # for which PyTorch's call has no argument
        names = (
            {"sdpa": None}
            if bench.timed in ("recorded", "step")
            else {f"sdpa-{n}": k for n, k in KERNELS.items()}
        )
        ways += [calls.way(name, sdpa(inputs), kernel) for name, kernel in names.items()]
    if with_flex and (function := flex(inputs, compiled)) is not None:
        ways.append(calls.way(FLEX, function))
    return ways


def varlen_ways(calls: Calls) -> list[Contender]:
    """Packed sequences: PyTorch's own packed call, jagged tensors, padding with a mask, a call for each."""
    inputs = calls.inputs
    batch = padded(inputs)
    ways = [
        calls.way(f"padded-{name}", sdpa(batch), kernel, batch, partial(packed, inputs))
        for name, kernel in KERNELS.items()
    ]
    ways += [calls.way("loop", sdpa_loop(inputs)), calls.way("jagged", jagged(inputs))]
    if (function := torch_varlen(inputs)) is not None:
        ways.append(calls.way("varlen_attn", function))
    return ways


def jagged(inputs: Inputs) -> Forward:
    """PyTorch's call with nested tensors, made of the packed ones in each call, which copies nothing."""
    offsets, lengths = inputs.fixed[0].long(), inputs.case.lengths_q
    bounds: dict[str, Any] = {"min_seqlen": min(lengths), "max_seqlen": max(lengths)}

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        nested = (
            torch.nested.nested_tensor_from_jagged(x, offsets, **bounds).transpose(1, 2) for x in (q, k, v)
        )
        out: Any = F.scaled_dot_product_attention(*nested)  # type: ignore[arg-type]
        return out.transpose(1, 2).values()

    return call


def torch_varlen(inputs: Inputs) -> Forward | None:
    """torch.nn.attention.varlen, which not every version has."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    call: Any = varlen_attn  # its signature differs from version to version, but not in these
    starts, longest = inputs.fixed, (max(inputs.case.lengths_q), max(inputs.case.lengths_k))
    return lambda q, k, v: call(q, k, v, *starts, *longest)


def flex(inputs: Inputs, compiled: bool) -> Forward | None:
    """FlexAttention with the case's mask and score as its own functions, or None where it has none for it."""
    case = inputs.case
    if case.dropout_p or case.sinks:
        return None
    if compiled:  # a backward pass that is timed again and again keeps what it saved
        import torch._functorch.config as functorch_config

        functorch_config.donated_buffer = False
    if case.op == "varlen":
        return packed_flex(inputs, compiled)
    visible = None if inputs.mask is None else mask_mod(inputs.mask)
    if inputs.mask is not None and visible is None:
        return None
    return flex_call(inputs, visible, score_mod(inputs), compiled)


def packed_flex(inputs: Inputs, compiled: bool) -> Forward:
    """Packed sequences as documents of a single one."""
    case = inputs.case
    lengths = torch.tensor(case.lengths_q, device=inputs.dout.device)
    ids = torch.repeat_interleave(lengths)
    same: MaskMod = lambda b, h, i, j: ids[i] == ids[j]  # noqa: E731  # FlexAttention asks for a function
    total = sum(case.lengths_q)
    single = replace(case, op="attention", batch=1, seqlen_q=total, seqlen_k=total)
    function = flex_call(replace(inputs, case=single), same, None, compiled)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = function(*(x.transpose(0, 1)[None] for x in (q, k, v)))
        return out[0].transpose(0, 1)

    return call
