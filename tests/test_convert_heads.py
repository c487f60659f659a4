"""convert_heads: the mean of each group's keys and values, and nothing else changed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastattn.models import Transformer
from fastattn.nn import KVCache, MultiheadAttention, convert_heads


def by_hand(rows: torch.Tensor, heads: int, groups: int) -> torch.Tensor:
    """Rows [heads * D, ...] of which each group of neighbouring heads becomes its mean."""
    per_head = rows.chunk(heads)
    size = heads // groups
    means = [sum(per_head[g * size : (g + 1) * size]) / size for g in range(groups)]
    return torch.cat(means)


@pytest.mark.parametrize("heads_kv", [1, 2, 4, 8])
@pytest.mark.parametrize(
    "options", [{}, {"bias": False}, {"kdim": 5, "vdim": 7}, {"add_bias_kv": True}], ids=str
)
def test_heads_are_means(heads_kv, options):
    full = MultiheadAttention(16, 8, batch_first=True, **options)
    for parameter in full.parameters():
        nn.init.normal_(parameter)
    state = {name: value.clone() for name, value in full.state_dict().items()}
    grouped = convert_heads(full, heads_kv)
    assert grouped.num_kv_heads == heads_kv and full.num_kv_heads == 8
    assert all(torch.equal(value, state[name]) for name, value in full.state_dict().items()), "left as it is"
    for name, value in grouped.state_dict().items():
        before = state[name]
        if name.startswith("in_proj"):
            q, k, v = before.split(16)
            want = torch.cat([q, by_hand(k, 8, heads_kv), by_hand(v, 8, heads_kv)])
        elif name in ("k_proj_weight", "v_proj_weight"):
            want = by_hand(before, 8, heads_kv)
        elif name in ("bias_k", "bias_v"):
            want = by_hand(before.flatten(), 8, heads_kv).view(1, 1, -1)
        else:
            want = before
        torch.testing.assert_close(value, want)
    x = torch.randn(2, 5, 16)
    key, value = torch.randn(2, 6, options.get("kdim", 16)), torch.randn(2, 6, options.get("vdim", 16))
    y, _ = grouped(x, key, value)
    assert y.shape == (2, 5, 16)
    if heads_kv == 8:
        torch.testing.assert_close(y, full(x, key, value)[0])
    fresh = MultiheadAttention(16, 8, batch_first=True, num_kv_heads=heads_kv, **options)
    fresh.load_state_dict(grouped.state_dict())
    torch.testing.assert_close(fresh(x, key, value)[0], y)


def test_equal_heads_lose_nothing():
    """Where the heads of a group agree, their mean is each of them, and the output stays."""
    full = MultiheadAttention(16, 4, batch_first=True)
    with torch.no_grad():
        for rows in (full.in_proj_weight[16:32], full.in_proj_weight[32:]):
            rows.copy_(rows[:8].unflatten(0, (2, 4)).repeat_interleave(2, 0).flatten(0, 1))
    x = torch.randn(2, 5, 16)
    torch.testing.assert_close(convert_heads(full, 2)(x), full(x))


def test_groups_of_groups():
    full = MultiheadAttention(16, 8)
    nn.init.normal_(full.in_proj_bias)
    twice, once = convert_heads(convert_heads(full, 4), 2), convert_heads(full, 2)
    for a, b in zip(twice.parameters(), once.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_a_whole_transformer():
    torch.manual_seed(0)
    model = Transformer(10, 10, d_model=16, num_layers=2, num_heads=4, d_ff=32, share_embeddings=True).eval()
    model.encoder.requires_grad_(False)
    grouped = convert_heads(model, 1)
    attentions = [part for part in grouped.modules() if isinstance(part, MultiheadAttention)]
    assert len(attentions) == 6 and {part.num_kv_heads for part in attentions} == {1}
    assert grouped.output.weight is grouped.src_embedding.weight, "shared weights stay shared"
    assert not any(parameter.requires_grad for parameter in grouped.encoder.parameters())
    src, tgt = torch.randint(10, (2, 7)), torch.randint(10, (2, 5))
    grouped(src, tgt).sum().backward()
    assert attentions[-1].in_proj_weight.grad.shape == (24, 16)
    fresh = Transformer(
        10, 10, d_model=16, num_layers=2, num_heads=4, d_ff=32, share_embeddings=True, num_kv_heads=1
    ).eval()
    fresh.load_state_dict(grouped.state_dict())
    torch.testing.assert_close(fresh(src, tgt), grouped(src, tgt))


def test_caches_shrink():
    cache = KVCache()
    layer = convert_heads(MultiheadAttention(16, 8, batch_first=True), 2)
    with torch.no_grad():
        layer(torch.randn(1, 3, 16), cache=cache, need_weights=False)
    assert cache.keys.shape[1] == 2


@pytest.mark.parametrize("module, heads, kind, message", [
    (MultiheadAttention(16, 8), 3, ValueError, "must divide the 8 heads that there are, got 3"),
    (MultiheadAttention(16, 8), 16, ValueError, "must divide the 8 heads that there are, got 16"),
    (MultiheadAttention(16, 8), 0, ValueError, "num_kv_heads must be >= 1, got 0"),
    (nn.MultiheadAttention(16, 8), 2, TypeError, r"got torch\..*MultiheadAttention: .*replace_modules makes"),
    ("layer", 2, TypeError, r"a fastattn.nn.MultiheadAttention, got builtins\.str"),
    (nn.Linear(2, 2), 2, TypeError, r"a fastattn.nn.MultiheadAttention, got .*\.Linear"),
])  # fmt: skip
def test_errors(module, heads, kind, message):
    with pytest.raises(kind, match=message):
        convert_heads(module, heads)
