"""KVCache, and multi-head attention that decodes with one."""

from __future__ import annotations

import pytest
import torch
from call_support import EXACT, randn

from fastattn import masks
from fastattn.nn import KVCache, MultiheadAttention

BATCH, SEQLEN_K, WIDTH, HEADS = 2, 7, 16, 4
PADDED = torch.arange(SEQLEN_K) >= torch.tensor([[SEQLEN_K], [6]])


@pytest.mark.parametrize(
    "extra", [{}, {"add_bias_kv": True, "add_zero_attn": True}], ids=["plain", "extra keys"]
)
def test_cache(extra: dict[str, bool]) -> None:
    """Token by token with a cache gives the rows of the whole sequence."""
    torch.manual_seed(0)
    ours = MultiheadAttention(WIDTH, HEADS, batch_first=True, dtype=torch.float64, **extra)
    with torch.no_grad():
        for n, parameter in enumerate(ours.parameters()):  # biases are zero otherwise
            parameter += 0.3 * randn(*parameter.shape, seed=n)
    x, memory = randn(BATCH, 9, WIDTH), randn(BATCH, SEQLEN_K, WIDTH, seed=2)
    want, want_weights = ours(x, mask=masks.causal())
    cache, static = KVCache(), KVCache(static=True)
    with torch.no_grad():
        for begin, end in ((0, 4), (4, 5), (5, 9)):
            y, weights = ours(x[:, begin:end], mask=masks.causal(), cache=cache)
            torch.testing.assert_close(y, want[:, begin:end], **EXACT)
            if not extra:
                torch.testing.assert_close(weights, want_weights[:, begin:end, :end], **EXACT)
    assert cache.length == 9
    crossed, _ = ours(x, memory)
    for key in (memory, None):
        y, _ = ours(x[:, 2:3], key, cache=static)
        torch.testing.assert_close(y, crossed[:, 2:3], **EXACT)
    padded, _ = ours(x, memory, key_padding_mask=PADDED)
    y, _ = ours(x, cache=static, key_padding_mask=PADDED)
    torch.testing.assert_close(y, padded, **EXACT)


def test_kv_cache() -> None:
    cache = KVCache()
    with pytest.raises(ValueError, match="the cache is empty"):
        _ = cache.keys
    parts = [randn(2, 1, n, 3, seed=n) for n in (1, 2, 5)]
    for part in parts:
        keys, values = cache.append(part, 2 * part)
    assert torch.equal(keys, torch.cat(parts, 2)) and torch.equal(values, 2 * keys)
    cache.reorder(torch.tensor([1, 1, 0]))
    assert torch.equal(cache.keys, torch.cat(parts, 2)[[1, 1, 0]])
    cache.truncate(3)
    assert cache.keys.shape == (3, 1, 3, 3) and repr(cache) == "KVCache(length=3)"
    with pytest.raises(ValueError, match=r"keys must be \[3, 1, n, 3\] as before, got \[2, 1, 1, 3\]"):
        cache.append(parts[0], parts[0])
    with pytest.raises(ValueError, match="at most the 3 tokens held, got 4"):
        cache.truncate(4)
    static = KVCache(static=True)
    static.append(parts[0], parts[0])
    with pytest.raises(ValueError, match="a static cache is filled once"):
        static.append(parts[0], parts[0])
    grown = KVCache()
    grown.append(parts[0].requires_grad_(), parts[0])
    keys, _ = grown.append(parts[1], parts[1])
    keys.sum().backward()
    assert parts[0].grad is not None


def test_static_cache_of_other_widths_and_failed_calls() -> None:
    ours = MultiheadAttention(WIDTH, HEADS, kdim=6, vdim=10, batch_first=True)
    static = KVCache(static=True)
    query, key, value = torch.randn(2, 1, WIDTH), torch.randn(2, 4, 6), torch.randn(2, 4, 10)
    want = ours(query, key, value)[0]
    for inputs in ((query, key, value), (query, key, value), (query,)):
        torch.testing.assert_close(ours(*inputs, cache=static)[0], want)
    cache, layer = KVCache(), MultiheadAttention(WIDTH, HEADS, batch_first=True)
    with pytest.raises(ValueError, match="mask must broadcast"):
        layer(query, cache=cache, mask=torch.ones(3, 3, dtype=torch.bool))
    assert cache.length == 0 and not cache.is_filled
    with pytest.raises(TypeError, match=r"cache must be a fastattn\.nn\.KVCache, got int"):
        layer(query, cache=3)
