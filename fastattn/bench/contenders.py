"""The calls that a case compares: ours, and every way in which PyTorch computes the same."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastattn
from fastattn.bench.eager import eager
from fastattn.bench.flex import band, flex
from fastattn.bench.machine import thread_count
from fastattn.bench.padded import packed, padded, sdpa_loop
from fastattn.bench.work import additive, dense_mask
from fastattn.testing.bench_case import BenchCase
from fastattn.testing.inputs import Inputs, lay_out, make_inputs

OURS = "fastattn"
# More scores than this in memory, several times over, cannot be PyTorch's fastest path: it is not tried.
MATH_SCORES = 2**26

Forward = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Contender:
    """One way to compute a case.

    Args:
        name: "fastattn", or PyTorch's path: "sdpa" (its own choice), "sdpa-flash", "sdpa-math", ...
        call: does the timed work once and returns its results, out, or the gradients of q, k and v.
        kernel: PyTorch's kernel that is forced while it is called, or None.
        threads: the number of threads that it is called with, or None for the run's.
        compared: turns results into the form that ours have.
    """

    name: str
    call: Callable[[], Any]
    kernel: SDPBackend | None = None
    threads: int | None = None
    compared: Callable[[Any], Any] = lambda results: results

    @contextlib.contextmanager
    def forced(self) -> Iterator[None]:
        """The context to call in; entered outside the timed part."""
        with contextlib.ExitStack() as stack:
            if self.kernel is not None:
                stack.enter_context(sdpa_kernel(self.kernel))
            if self.threads is not None:
                stack.enter_context(thread_count(self.threads))
            yield


def contenders(bench: BenchCase, inputs: Inputs, with_flex: bool = False) -> list[Contender]:
    """Ours first, then PyTorch's paths; which of them take the case is found out by calling them."""
    case = inputs.case
    first = Contender(OURS, timed(bench.timed, ours(inputs), inputs))
    if case.op == "varlen":
        return [first, *sentence_ways(bench, inputs)]
    if case.softcap is not None or case.sinks:  # PyTorch's call has no argument for these
        return [first, Contender("eager", timed(bench.timed, eager(inputs), inputs))]
    ways = fused_ways(bench.timed, inputs)
    if case.op == "decode" and case.heads > case.num_heads_kv and inputs.mask is None:
        ways.append(Contender("sdpa-folded", timed(bench.timed, sdpa_folded, inputs)))
    if with_flex and (compiled := flex(bench, inputs)) is not None:
        ways.append(Contender("flex", timed(bench.timed, compiled, inputs)))
    return [first, *ways]


def fused_ways(kind: str, inputs: Inputs) -> list[Contender]:
    """PyTorch's call, as it chooses and with each of its kernels."""
    call, case = sdpa(inputs), inputs.case
    kernels = {"sdpa": None, "sdpa-flash": SDPBackend.FLASH_ATTENTION, "sdpa-math": SDPBackend.MATH}
    if case.batch * case.heads * case.queries * case.keys > MATH_SCORES:
        del kernels["sdpa-math"]
    return [Contender(name, timed(kind, call, inputs), kernel) for name, kernel in kernels.items()]


def sentence_ways(bench: BenchCase, inputs: Inputs) -> list[Contender]:
    """PyTorch's ways to compute sequences of different lengths."""
    batch = padded(inputs)
    ways = [
        replace(way, name=way.name.replace("sdpa", "padded"), compared=partial(packed, inputs))
        for way in fused_ways(bench.timed, batch)
    ]
    return [*ways, Contender("loop", timed(bench.timed, sdpa_loop(inputs), inputs))]


def own_contender(bench: BenchCase, threads: int) -> Contender | None:
    """Our other call that the case is measured against with this number of threads, or None."""
    if bench.own is None or bench.own.threads == threads:
        return None
    inputs = make_inputs(bench.own.case)
    return Contender(bench.own.label, timed(bench.timed, ours(inputs), inputs), threads=bench.own.threads)


def ours(inputs: Inputs, **keywords: Any) -> Forward:
    """The public call, with further keywords; dropout draws its seed, as it does for users."""
    case = inputs.case
    positional, options = inputs.arguments()
    options.pop("dropout_seed", None)
    options |= keywords
    if case.op != "attention":
        function: Any = {"decode": fastattn.decode_attention, "varlen": fastattn.varlen_attention}[case.op]
        more = positional[3:]
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
        options["attn_mask"] = dense_mask(inputs) if case.bias is None else additive(inputs)
    if not options:
        return F.scaled_dot_product_attention
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, **options)


def is_plain_causal(inputs: Inputs) -> bool:
    """Whether PyTorch's is_causal says all that the mask says."""
    return inputs.case.bias is None and band(inputs) == (None, 0)


def sdpa_folded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One query a head: the heads that share keys become the rows of one head, so that PyTorch reads the
    cache once for all of them."""
    batch, heads, _, dim = q.shape
    rows = q.view(batch, k.shape[1], heads // k.shape[1], dim)
    return F.scaled_dot_product_attention(rows, k, v).view(batch, heads, 1, v.shape[3])


def timed(kind: str, function: Forward, inputs: Inputs, more: tuple[Tensor, ...] = ()) -> Callable[[], Any]:
    """The timed work: `forward` and `recorded` -> out; `backward` and `step`, both passes -> (dq, dk, dv).

    `more` are further leaves which `function` uses; their gradients follow.
    """
    q, k, v = (inputs.leaves[name] for name in ("q", "k", "v"))
    if kind == "forward":
        return lambda: function(q, k, v)
    leaves: tuple[Tensor, ...] = tuple(tensor.detach().requires_grad_() for tensor in (q, k, v))
    if kind == "recorded":
        return lambda: function(*leaves)
    dout = lay_out(inputs.dout, inputs.case.layout)
    if kind == "step":
        return lambda: torch.autograd.grad(function(*leaves), leaves + more, dout)
    graph: list[Tensor] = []

    def backward() -> Any:
        if not graph:  # the first call, which is not timed, runs the forward pass
            graph.append(function(*leaves))
        return torch.autograd.grad(graph[0], leaves + more, dout, retain_graph=True)

    return backward


def usable(contender: Contender) -> Any:
    """The results of a first call, or None where PyTorch's forced kernel refuses the case."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch says at length why a kernel was not taken
        try:
            with contender.forced():
                return contender.compared(contender.call())
        except RuntimeError as error:
            if contender.kernel is None or "kernel" not in str(error).lower():
                raise
            return None
