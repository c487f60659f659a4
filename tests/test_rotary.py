"""Positions that enter the scores: rotary, T5's relative bias and ALiBi, against their formulas."""

from __future__ import annotations

import copy
import math

import pytest
import torch

import fastattn
from fastattn import masks
from fastattn.nn import ALiBiBias, KVCache, MultiheadAttention, RelativePositionBias, RotaryEmbedding

LAYOUTS = pytest.mark.parametrize("layout", ["half", "interleaved"])


def rotated(x: torch.Tensor, position: int, base: float, layout: str) -> torch.Tensor:
    """The definition on one float64 vector, as products of complex numbers."""
    r = x.shape[0]
    pairs = [(i, i + r // 2) if layout == "half" else (2 * i, 2 * i + 1) for i in range(r // 2)]
    out = x.clone()
    for i, (a, b) in enumerate(pairs):
        angle = position * base ** (-2 * i / r)
        z = complex(x[a], x[b]) * complex(math.cos(angle), math.sin(angle))
        out[a], out[b] = z.real, z.imag
    return out


@LAYOUTS
@pytest.mark.parametrize("rotary_dim", [None, 6])
@pytest.mark.parametrize("base", [10000.0, 500.0])
def test_rotary_is_the_formula(layout, rotary_dim, base):
    rotary = RotaryEmbedding(10, max_len=50, base=base, rotary_dim=rotary_dim, layout=layout).double()
    x = torch.randn(2, 3, 4, 10, dtype=torch.float64)
    at = torch.tensor([[0, 7, 49, 3], [1, 2, 3, 4]])
    out = rotary(x, positions=at)
    r = rotary_dim or 10
    for b, h, i in [(0, 0, 0), (0, 2, 1), (0, 1, 2), (1, 0, 3), (1, 2, 0)]:
        want = rotated(x[b, h, i, :r], int(at[b, i]), base, layout)
        torch.testing.assert_close(out[b, h, i, :r], want, rtol=0, atol=1e-13)
    assert torch.equal(out[..., r:], x[..., r:])


@LAYOUTS
def test_products_see_the_distance_alone(layout):
    rotary = RotaryEmbedding(8, layout=layout).double()
    q, k = torch.randn(2, 1, 1, 6, 8, dtype=torch.float64)
    scores = [rotary(q, offset) @ rotary(k, offset).mT for offset in (0, 11, 4994)]
    for other in scores[1:]:
        torch.testing.assert_close(other, scores[0], rtol=0, atol=1e-11)
    shifted = rotary(q, 3) @ rotary(k).mT
    assert not torch.allclose(shifted, scores[0])


@LAYOUTS
def test_rotary_offsets_decode_like_the_whole(layout):
    rotary = RotaryEmbedding(8, max_len=20, layout=layout)
    x = torch.randn(2, 3, 9, 8)
    whole = rotary(x)
    steps = torch.cat([rotary(x[:, :, n : n + 1], offset=n) for n in range(9)], 2)
    assert torch.equal(steps, whole)
    assert torch.equal(rotary(x, positions=torch.arange(9)), whole)


def test_the_two_layouts_are_one_but_for_the_order_of_features():
    x = torch.randn(1, 2, 5, 8)
    order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])  # pairs (2i, 2i + 1) moved to (i, i + 4)
    half, interleaved = (RotaryEmbedding(8, layout=layout) for layout in ("half", "interleaved"))
    torch.testing.assert_close(half(x[..., order]), interleaved(x)[..., order], rtol=0, atol=0)


@LAYOUTS
def test_rotary_gradient_and_dtypes(layout):
    rotary = RotaryEmbedding(6, rotary_dim=4, layout=layout)
    x = torch.randn(1, 2, 3, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(copy.deepcopy(rotary).double(), (x, 5))
    narrow = copy.deepcopy(rotary).bfloat16()
    assert narrow.table.dtype == torch.float32
    assert torch.equal(narrow.table, rotary.table)
    assert torch.equal(narrow(x.bfloat16(), 4000), rotary(x.bfloat16().float(), 4000).bfloat16())
    assert not rotary.state_dict()
    with torch.device("meta"):
        hollow = RotaryEmbedding(6, rotary_dim=4, layout=layout)
    filled = hollow.to_empty(device="cpu")
    assert torch.equal(filled.table, rotary.table)
    filled.table.zero_()
    filled.reset_parameters()
    assert torch.equal(filled.table, rotary.table)
    compiled = torch.compile(rotary, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x.float(), 2), rotary(x.float(), 2))


@pytest.mark.parametrize("arguments, error, message", [
    ((7,), ValueError, "head_dim must be even, got 7"),
    ((8, 10, "rotary_dim", 3), ValueError, "rotary_dim must be even, got 3"),
    ((8, 10, "rotary_dim", 10), ValueError, "rotary_dim must be at most head_dim=8, got 10"),
    ((8, 10, "base", 0), ValueError, "base must be positive, got 0"),
    ((8, 10, "layout", "llama"), ValueError, "layout must be one of half, interleaved, got 'llama'"),
    ((8, 0), ValueError, "max_len must be >= 1, got 0"),
])  # fmt: skip
def test_rotary_constructor_errors(arguments, error, message):
    *given, name, value = arguments if len(arguments) == 4 else (*arguments, None, None)
    with pytest.raises(error, match=message):
        RotaryEmbedding(*given, **({name: value} if name else {}))


@pytest.mark.parametrize("x, arguments, error, message", [
    (torch.zeros(2, 3, 4), {}, ValueError, r"x must be \[B, H, L, 4\], got shape \[2, 3, 4\]"),
    ([1.0], {}, TypeError, "x must be a torch.Tensor, got list"),
    (torch.zeros(2, 3, 1, 4).int(), {}, TypeError, "x must be one of float32, .*, got int32"),
    (torch.zeros(1, 1, 2, 4), {"positions": [0, 1]}, TypeError, "positions must be a torch.Tensor, got list"),
    (torch.zeros(1, 1, 6, 4), {}, ValueError, "positions must be below max_len=5, got 6 from offset 0"),
    (torch.zeros(1, 1, 2, 4), {"positions": torch.tensor([0, 5])}, ValueError, "max_len - 1 = 4, got 0 to 5"),
])  # fmt: skip
def test_rotary_call_errors(x, arguments, error, message):
    with pytest.raises(error, match=message):
        RotaryEmbedding(4, max_len=5)(x, **arguments)


def test_relative_bias_is_learned_through_the_kernels():
    bias = RelativePositionBias(2, num_buckets=8, max_distance=16)
    q, k, v = torch.randn(3, 1, 2, 7, 4)
    out = fastattn.attention(q, k, v, bias=bias())
    dense = bias.table[bias().buckets(torch.arange(7) - torch.arange(7)[:, None])].movedim(-1, 0)
    torch.testing.assert_close(out, fastattn.attention(q, k, v, bias=dense))
    out.square().sum().backward()
    assert bias.table.grad.abs().sum() > 0
    assert list(bias.state_dict()) == ["table"]
    with pytest.raises(ValueError, match="at least 4 buckets, got 3"):
        RelativePositionBias(2, num_buckets=3)


@pytest.mark.parametrize("learned", [False, True])
def test_alibi_bias(learned):
    bias = ALiBiBias(2, learned)
    q, k, v = torch.randn(3, 1, 2, 7, 4)
    distance = (torch.arange(7) - torch.arange(7)[:, None]).abs()
    dense = -torch.tensor([2.0**-4, 2.0**-8]).view(2, 1, 1) * distance
    out = fastattn.attention(q, k, v, mask=masks.causal(), bias=bias())
    torch.testing.assert_close(out, fastattn.attention(q, k, v, mask=masks.causal(), bias=dense))
    assert [name for name, _ in bias.named_parameters()] == ["slopes"] * learned
    if learned:
        out.square().sum().backward()
        assert bias.slopes.grad.abs().min() > 0


@pytest.mark.parametrize("make", [lambda: RelativePositionBias(4, 8, 16), lambda: ALiBiBias(4, learned=True)])
def test_biases_in_multi_head_attention(make):
    """As a bias of diagonals, as a tensor, beside other masks, with gradients; and decoded step by step."""
    torch.manual_seed(0)
    layer, positions = MultiheadAttention(16, 4, batch_first=True).double(), make().double()
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    bias = positions()
    dense = bias.to_dense(masks.MaskShape(2, 4, 9, 9), x.device, x.dtype)
    padded = torch.tensor([[False] * 9, [False] * 6 + [True] * 3])
    for options in ({}, {"mask": masks.causal()}, {"key_padding_mask": padded, "mask": masks.causal()}):
        found, want = layer(x, bias=positions(), **options), layer(x, bias=dense, **options)
        for a, b in zip(found, want, strict=True):
            torch.testing.assert_close(a, b)
    float_mask = torch.randn(9, 9, dtype=torch.float64)
    both = layer(x, attn_mask=float_mask, bias=positions())[0]
    torch.testing.assert_close(both, layer(x, attn_mask=(float_mask + dense[0]).expand(2, -1, -1, -1))[0])

    y, weights = layer(x, bias=positions())
    (parameter,) = positions.parameters()
    (gradient,) = torch.autograd.grad(y.square().sum() + weights.square().sum(), parameter)
    y, weights = layer(x, bias=dense)
    (want,) = torch.autograd.grad(y.square().sum() + weights.square().sum(), parameter)
    torch.testing.assert_close(gradient, want)

    cache = KVCache()
    with torch.no_grad():
        steps = [layer(x[:, n : n + 1], cache=cache, bias=positions())[0] for n in range(9)]
        torch.testing.assert_close(torch.cat(steps, 1), layer(x, mask=masks.causal(), bias=positions())[0])
    one = layer(x[0], bias=positions())[0]
    torch.testing.assert_close(one, layer(x[:1], bias=positions())[0][0])
    with pytest.raises(ValueError, match="must be for 4 heads, got 3"):
        layer(x, bias=ALiBiBias(3)())
    with pytest.raises(ValueError, match=r"bias must broadcast to \[2, 4, 9, 9\]"):
        layer(x, bias=dense[..., :8])
