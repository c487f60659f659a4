"""Graphs that others record and run later, at other sizes: torch.jit.trace, make_fx and torch.fx."""

from __future__ import annotations

import io
import warnings
from typing import Any

import pytest
import torch
from call_support import EXACT, NATIVE, qkv, randn
from torch import Tensor, nn
from torch.func import linearize
from torch.fx.experimental.proxy_tensor import make_fx

import fastattn
from fastattn.biases import ALiBi, RelativePosition
from fastattn.integrations.torch import replace_modules
from fastattn.masks import causal, documents, global_tokens, padding, prefix, window

pytestmark = pytest.mark.skipif(not NATIVE, reason="the native core is not built")


def traced(function: Any, *inputs: Tensor) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of every size that a check looks at
        return torch.jit.trace(function, inputs, check_trace=False)


def saved_and_loaded(script: Any) -> Any:
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(script, file)
        file.seek(0)
        return torch.jit.load(file)


def ids(*lengths: int) -> Tensor:
    return torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))[None]


# Of each option: how it is made of a tensor, the tensor of the trace, for 8 keys, and another, for 70.
OPTIONS = {
    "causal": (lambda _: {"mask": causal()}, torch.ones(1), torch.ones(1)),
    "padding": (lambda n: {"mask": padding(n)}, torch.tensor([3]), torch.tensor([65])),
    "not padding": (lambda n: {"mask": ~padding(n)}, torch.tensor([3]), torch.tensor([65])),
    "documents": (lambda n: {"mask": documents(n)}, ids(3, 5), ids(30, 30, 10)),
    "prefix": (lambda n: {"mask": causal() | prefix(n)}, torch.tensor([3]), torch.tensor([66])),
    "global": (lambda n: {"mask": global_tokens(n) | window(2, 0)}, torch.tensor([3]), torch.tensor([1, 60])),
    "alibi": (lambda n: {"bias": ALiBi(n)}, randn(2), randn(2, seed=3)),
    "relative": (lambda n: {"bias": RelativePosition(n)}, randn(32, 2), randn(32, 2, seed=3)),
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
def test_traced_options_hold_at_other_sizes(name: str):
    make, first, other = OPTIONS[name]

    def attend(q: Tensor, k: Tensor, v: Tensor, n: Tensor) -> Tensor:
        return fastattn.attention(q, k, v, **make(n))

    script = saved_and_loaded(traced(attend, *qkv(1, 2, 2, 8), first))
    inputs = qkv(3, 2, 2, 70)
    torch.testing.assert_close(script(*inputs, other), attend(*inputs, other), **EXACT)


def test_a_mask_built_before_the_trace_holds_at_other_sizes():
    built = (causal() | prefix(torch.tensor([3]))).build(8, 8)
    script = traced(lambda q, k, v: fastattn.attention(q, k, v, mask=built), *qkv(1, 2, 2, 8))
    inputs = qkv(1, 2, 2, 200)
    want = fastattn.attention(*inputs, mask=built.source)
    torch.testing.assert_close(script(*inputs), want, **EXACT)


def test_traced_calls_of_pytorchs_own_kernels(monkeypatch: pytest.MonkeyPatch):
    """What exporters that know PyTorch's operators alone are given."""
    layer = fastattn.nn.MultiheadAttention(8, 2, batch_first=True, dtype=torch.float64)
    want = layer(randn(3, 9, 8))
    monkeypatch.setenv("FASTATTN_BACKEND", "torch")
    script = traced(layer, randn(2, 5, 8))
    assert "fastattn::" not in str(script.inlined_graph)
    for got, each in zip(script(randn(3, 9, 8)), want, strict=True):
        torch.testing.assert_close(got, each, **EXACT)


@pytest.mark.parametrize("training", [True, False])
def test_traced_module_with_weights(training: bool):
    layer = fastattn.nn.MultiheadAttention(8, 2, batch_first=True, dtype=torch.float64).train(training)
    script = saved_and_loaded(traced(layer, randn(2, 5, 8)))
    x = randn(3, 9, 8, grad=True)
    for got, want in zip(script(x), layer(x), strict=True):
        torch.testing.assert_close(got, want, **EXACT)
        gradients = (torch.autograd.grad(y.square().sum(), x, retain_graph=True)[0] for y in (got, want))
        torch.testing.assert_close(*gradients, **EXACT)


Q, K, V = qkv(2, 4, 2, 8)
BLOCKS = causal() | prefix(torch.tensor([3]))
# What a graph is recorded of, and what it cannot be run with.
MISFITS: dict[str, tuple[dict[str, Any], tuple[Any, ...], str]] = {
    "batch of k": ({}, (Q, randn(3, 2, 8, 8), randn(3, 2, 8, 8)), "k must have q's batch size 2, got 3"),
    "length of v": ({}, (Q, K, V[:, :, :7]), r"v must have shape \[2, 2, 8, head_dim_v\] like k"),
    "head_dim": ({}, (Q, K[..., :4], V), "k must have q's head_dim 8, got 4"),
    "heads": ({}, (Q, randn(2, 3, 8, 8), randn(2, 3, 8, 8)), "q's heads must be a multiple of k's 3, got 4"),
    "dtype": ({}, (Q, K.float(), V), "k must have q's dtype float64, got float32"),
    "dims": ({}, (Q[0], K[0], V[0]), r"q must be 4-D"),
    "mask": ({"mask": randn(8, 8) > 0}, (Q, K, V, randn(7, 7) > 0), r"mask must broadcast to \[2, 4, 8, 8\]"),
    "mask's dtype": ({"mask": randn(8, 8) > 0}, (Q, K, V, randn(8, 8)), "mask must be bool"),
    "bias": ({"bias": randn(8, 8)}, (Q, K, V, randn(4, 1)), r"bias must broadcast to \[2, 4, 8, 8\]"),
    "sinks": ({"sinks": randn(4)}, (Q, K, V, randn(3)), r"sinks must have shape \[4\]"),
    "slopes": ({"bias": ALiBi(randn(4))}, (*qkv(2, 4, 2, 9), ALiBi(randn(4))),
               "bias must be for positions -8 to 8, got -7 to 7"),
    "key ranges": ({"mask": padding([3, 4])}, (*qkv(3, 4, 2, 8), padding([3, 4, 5])),
                   r"mask's key ranges must broadcast to \[3, 8\]"),
    "blocks": ({"mask": BLOCKS.build(8, 8)}, (*qkv(2, 4, 2, 65), BLOCKS.build(65, 65)),
               "mask must be built for 2 tiles of 64, which length 65 has, got lists of 1"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISFITS)
def test_a_graph_without_guards_checks_what_it_is_given(name: str):
    """make_fx keeps neither our checks nor guards; kernels would read beyond the memory of the tensors."""
    options, inputs, message = MISFITS[name]
    constants = any(not isinstance(value, Tensor) for value in options.values())

    def attend(q: Tensor, k: Tensor, v: Tensor, *values: Tensor) -> Tensor:
        given = options if constants else dict(zip(options, values, strict=True))
        return fastattn.attention(q, k, v, **given)

    graph = make_fx(attend)(Q, K, V, *(() if constants else options.values()))
    with pytest.raises((ValueError, TypeError), match=message):
        graph(*inputs[:3] if constants else inputs)


def test_recorded_summaries_check_what_they_are_given():
    graph = make_fx(lambda q, k: fastattn.inspect.summarize(q, k).entropy)(Q, K)
    torch.testing.assert_close(graph(Q, K), fastattn.inspect.summarize(Q, K).entropy, **EXACT)
    with pytest.raises(ValueError, match="k must have q's batch size 2, got 3"):
        graph(Q, randn(3, 2, 8, 8))

    with_lse = make_fx(lambda q, k, lse: fastattn.inspect.summarize(q, k, lse=lse).entropy)
    lse = fastattn.attention(Q, K, V, return_lse=True)[1]
    with pytest.raises(ValueError, match=r"lse must be float64 \[2, 4, 8\] on cpu, got float64 \[2, 4, 7\]"):
        with_lse(Q, K, lse)(Q, K, lse[:, :, :7])


def test_recorded_gradients_check_what_they_are_given():
    leaves = [t.clone().requires_grad_() for t in (Q, K, V)]

    def gradients(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, dlse: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(fastattn.attention(q, k, v, return_lse=True), (q, k, v), (dout, dlse))

    def losses(q: Tensor, k: Tensor, entropy: Tensor, received: Tensor) -> tuple[Tensor, ...]:
        found = fastattn.inspect.summarize(q, k)
        return torch.autograd.grad((found.entropy, found.received), (q, k), (entropy, received))

    dout, dlse, received = torch.ones_like(Q), torch.ones(2, 4, 8).double(), torch.ones(2, 4, 8).double()
    graph, summary = make_fx(gradients)(*leaves, dout, dlse), make_fx(losses)(*leaves[:2], dlse, received)
    torch.testing.assert_close(graph(*leaves, dout, dlse), gradients(*leaves, dout, dlse), **EXACT)
    longer = [t.detach().requires_grad_() for t in qkv(2, 4, 2, 9)]
    with pytest.raises(ValueError, match=r"dlse must be float64 \[2, 4, 9\] on cpu, got float64 \[2, 4, 8\]"):
        graph(*longer, torch.ones(2, 4, 9, 8).double(), dlse)
    with pytest.raises(ValueError, match=r"dout must be float64 \[2, 4, 9, 8\] on cpu, got"):
        graph(*longer, dout, torch.ones(2, 4, 9).double())
    with pytest.raises(ValueError, match=r"the gradient of received must be float64 \[2, 4, 9\] on cpu, got"):
        summary(*longer[:2], torch.ones(2, 4, 9).double(), received)


def test_a_trace_of_packed_sequences_refuses_lists_of_tiles():
    offsets = torch.tensor([0, 3, 8], dtype=torch.int32)
    packed = [t[0].transpose(0, 1) for t in (Q, K, V)]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = causal() | prefix(2)
        return fastattn.varlen_attention(q, k, v, offsets, offsets, max_seqlen_q=5, max_seqlen_k=5, mask=mask)

    with pytest.raises(NotImplementedError, match=r"torch\.jit\.trace cannot record the lists of tiles"):
        traced(attend, *packed)


class Block(nn.Module):
    """A model of a library that attends by PyTorch's module."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor, padded: Tensor) -> Tensor:
        y, _ = self.attention(self.norm(x), x, x, key_padding_mask=padded, need_weights=False)
        return x + y


def test_symbolic_tracing_does_not_enter_a_replaced_module():
    block = Block()
    replace_modules(block)
    graph = torch.fx.symbolic_trace(block)
    nodes = [node.target for node in graph.graph.nodes if node.op == "call_module"]
    assert nodes == ["norm", "attention"]
    x, padded = torch.randn(2, 5, 8), torch.arange(5) >= torch.tensor([[5], [3]])
    torch.testing.assert_close(graph(x, padded), block(x, padded), rtol=0, atol=0)
    block.attention.register_forward_hook(lambda module, given, got: None)
    with pytest.raises(NotImplementedError, match="remove them to trace"):
        torch.fx.symbolic_trace(block)


def test_forward_mode_within_a_graph_says_what_to_do():
    with pytest.raises(
        NotImplementedError, match="no forward-mode derivative: call with backend='reference'"
    ):
        linearize(lambda q: fastattn.attention(q, K, V), Q)
