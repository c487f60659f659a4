"""Encodings of position, token embeddings and the feed-forward network."""

from __future__ import annotations

import copy
import math

import mpmath
import pytest
import torch

from fastattn.nn import (
    LearnedPositionalEncoding,
    PositionwiseFeedForward,
    SinusoidalPositionalEncoding,
    TokenEmbedding,
    document_positions,
)

BOTH = pytest.mark.parametrize("kind", [SinusoidalPositionalEncoding, LearnedPositionalEncoding])


def nearest_float32(position: int, column: int, d_model: int) -> float:
    """The float32 nearest to the formula, by 150 bits."""
    with mpmath.workprec(150):
        angle = position / mpmath.mpf(10000) ** (mpmath.mpf(2 * (column // 2)) / d_model)
        value = mpmath.cos(angle) if column % 2 else mpmath.sin(angle)
        with mpmath.workprec(24):
            return float(+value)


@pytest.mark.parametrize("d_model", [1, 6, 7, 64, 512])
def test_sinusoids_are_the_formula_to_the_bit(d_model):
    table = SinusoidalPositionalEncoding(d_model, max_len=20_000).table
    assert table.dtype == torch.float32
    generator = torch.Generator().manual_seed(d_model)
    for position in [0, 1, 2, 19_999, *torch.randint(20_000, (40,), generator=generator).tolist()]:
        for column in torch.randint(d_model, (8,), generator=generator).tolist():
            assert table[position, column].item() == nearest_float32(position, column, d_model)


@pytest.mark.parametrize("position, column", [(3902, 69), (4527, 44), (4637, 20)])
def test_sinusoids_where_float64_rounds_the_wrong_way(position, column):
    angle = position / 10000 ** (2 * (column // 2) / 512)
    naive = torch.tensor(math.cos(angle) if column % 2 else math.sin(angle), dtype=torch.float64).float()
    want = nearest_float32(position, column, 512)
    assert naive.item() != want
    assert SinusoidalPositionalEncoding(512).table[position, column].item() == want


def test_sinusoids_by_hand():
    encode = SinusoidalPositionalEncoding(3, max_len=4, dtype=torch.float64)
    x = torch.zeros(1, 2, 3, dtype=torch.float64)
    slow = 10000 ** (-2 / 3)
    want = torch.tensor(
        [[math.sin(2), math.cos(2), math.sin(2 * slow)], [math.sin(3), math.cos(3), math.sin(3 * slow)]],
        dtype=torch.float64,
    )
    torch.testing.assert_close(encode(x, offset=2)[0], want, rtol=0, atol=1e-15)


def test_a_table_of_another_dtype_is_rounded_once():
    exact = SinusoidalPositionalEncoding(16, max_len=50, dtype=torch.float64).table
    moved = SinusoidalPositionalEncoding(16, max_len=50).double()
    assert torch.equal(moved.table, exact)
    assert torch.equal(moved.bfloat16().table, exact.bfloat16())
    assert torch.equal(copy.deepcopy(moved).float().table, exact.float())


def test_sinusoids_are_no_state_and_survive_the_meta_device():
    encode = SinusoidalPositionalEncoding(6, max_len=9)
    assert not encode.state_dict()
    with torch.device("meta"):
        hollow = SinusoidalPositionalEncoding(6, max_len=9)
    filled = hollow.to_empty(device="cpu")
    assert torch.equal(filled.table, encode.table)
    filled.table.zero_()
    filled.reset_parameters()
    assert torch.equal(filled.table, encode.table)


@BOTH
def test_offset_positions_and_layout(kind):
    encode = kind(5, max_len=11)
    x = torch.randn(2, 4, 5)
    out = encode(x)
    torch.testing.assert_close(out, x + encode.table[:4], rtol=0, atol=0)
    torch.testing.assert_close(encode(x, offset=7), x + encode.table[7:], rtol=0, atol=0)
    at = torch.tensor([[3, 0, 10, 3], [1, 2, 3, 4]])
    torch.testing.assert_close(encode(x, positions=at), x + encode.table[at], rtol=0, atol=0)
    torch.testing.assert_close(encode(x, positions=at[1]), encode(x, offset=1), rtol=0, atol=0)
    length_first = kind(5, max_len=11, batch_first=False)
    length_first.table.data.copy_(encode.table.data)
    torch.testing.assert_close(length_first(x.transpose(0, 1)).transpose(0, 1), out, rtol=0, atol=0)
    torch.testing.assert_close(
        length_first(x.transpose(0, 1), positions=at).transpose(0, 1), encode(x, positions=at), rtol=0, atol=0
    )
    assert encode(x.bfloat16()).dtype == torch.bfloat16


def test_learned_positions_learn():
    encode = LearnedPositionalEncoding(3, max_len=5)
    encode(torch.zeros(2, 2, 3), positions=torch.tensor([[1, 1], [4, 0]])).sum().backward()
    assert torch.equal(encode.table.grad[:, 0], torch.tensor([1.0, 2.0, 0.0, 0.0, 1.0]))
    assert list(encode.state_dict()) == ["table"]


def test_dropout_is_on_the_sum_and_in_training_alone():
    encode = SinusoidalPositionalEncoding(8, max_len=100, dropout=0.5)
    x = torch.ones(10, 100, 8)
    torch.manual_seed(0)
    out, whole = encode(x), x + encode.table
    dropped = out == 0
    assert 0.4 < dropped.float().mean() < 0.6
    torch.testing.assert_close(out[~dropped], 2 * whole[~dropped], rtol=0, atol=0)
    assert torch.equal(encode.eval()(x), whole)


@BOTH
@pytest.mark.parametrize("arguments, error, message", [
    ({"x": torch.zeros(1, 6, 4)}, ValueError, r"positions must be below max_len=5, got 6 from offset 0"),
    ({"offset": 4}, ValueError, r"positions must be below max_len=5, got 2 from offset 4"),
    ({"offset": -1}, ValueError, r"offset must be >= 0, got -1"),
    ({"x": torch.zeros(6, 4)}, ValueError, r"x must be \[B, L, 4\], got shape \[6, 4\]"),
    ({"x": torch.zeros(1, 2, 3)}, ValueError, r"x must be \[B, L, 4\], got shape \[1, 2, 3\]"),
    ({"positions": torch.tensor([0, 5])}, ValueError, r"from 0 to max_len - 1 = 4, got 0 to 5"),
    ({"positions": torch.tensor([-1, 3])}, ValueError, r"max_len - 1 = 4, got -1 to 3"),
    ({"positions": torch.tensor([1])}, ValueError, r"positions must be \[2\] or \[1, 2\], got shape \[1\]"),
    ({"positions": torch.tensor([1.0, 2.0])}, TypeError, r"positions must be integers, got float32"),
    ({"positions": [0, 1]}, TypeError, "positions must be a torch.Tensor, got list"),
    ({"x": [1.0]}, TypeError, "x must be a torch.Tensor, got list"),
    ({"x": torch.zeros(1, 2, 4).long()}, TypeError, "x must be one of float32, .*, got int64"),
    ({"positions": torch.tensor([1, 2]), "offset": 1}, ValueError, r"offset must be 0 .* given, got 1"),
])  # fmt: skip
def test_position_errors(kind, arguments, error, message):
    with pytest.raises(error, match=message):
        kind(4, max_len=5)(**{"x": torch.zeros(1, 2, 4), **arguments})


@pytest.mark.parametrize("ids, want", [
    ([[4, 4, 4]], [[0, 1, 2]]),
    ([[1, 2, 2, 1, 1, 1]], [[0, 0, 1, 0, 1, 2]]),
    ([[0, 0, 1], [5, 6, 7]], [[0, 1, 0], [0, 0, 0]]),
    ([[]], [[]]),
])  # fmt: skip
def test_document_positions(ids, want):
    found = document_positions(torch.tensor(ids, dtype=torch.int32))
    assert found.dtype == torch.int64
    assert found.tolist() == want


@pytest.mark.parametrize("ids, error, message", [
    ([[1, 1]], TypeError, "ids must be a torch.Tensor, got list"),
    (torch.ones(1, 2), TypeError, "ids must be integers, got float32"),
    (torch.ones(2).long(), ValueError, r"ids must be \[B, L\], got shape \[2\]"),
])  # fmt: skip
def test_document_positions_errors(ids, error, message):
    with pytest.raises(error, match=message):
        document_positions(ids)


def test_embedding_scales_and_starts_with_unit_variance():
    torch.manual_seed(0)
    embedding = TokenEmbedding(2000, 64, padding_idx=3)
    tokens = torch.tensor([[5, 3], [0, 1999]])
    out = embedding(tokens)
    torch.testing.assert_close(out, embedding.weight[tokens] * 8, rtol=0, atol=0)
    assert not out[0, 1].any()
    assert abs(embedding(torch.arange(4, 2000)).std().item() - 1) < 0.02
    out.sum().backward()
    assert not embedding.weight.grad[3].any()
    assert torch.equal(embedding.weight.grad[5], torch.full((64,), 8.0))


@pytest.mark.parametrize("tokens, error, message", [
    (torch.tensor([0, 7]), ValueError, "tokens must be from 0 to 6, got 7"),
    (torch.tensor([-2, 1]), ValueError, "tokens must be from 0 to 6, got -2"),
    (torch.tensor([1.0]), TypeError, "tokens must be int64 or int32, got float32"),
    ([[1, 2]], TypeError, "tokens must be a torch.Tensor, got list"),
])  # fmt: skip
def test_embedding_errors(tokens, error, message):
    with pytest.raises(error, match=message):
        TokenEmbedding(7, 4)(tokens)
    with pytest.raises(ValueError, match="padding_idx must be from 0 to 6 or None, got 7"):
        TokenEmbedding(7, 4, padding_idx=7)


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])
def test_feed_forward_is_the_formula(activation):
    layer = PositionwiseFeedForward(4, 9, activation=activation)
    assert not layer.linear1.bias.any()
    torch.nn.init.normal_(layer.linear1.bias)
    torch.nn.init.normal_(layer.linear2.bias)
    x = torch.randn(2, 3, 4)
    inner = getattr(torch.nn.functional, activation)(x @ layer.linear1.weight.T + layer.linear1.bias)
    want = inner @ layer.linear2.weight.T + layer.linear2.bias
    torch.testing.assert_close(layer(x), want)


def test_feed_forward_errors_and_dropout():
    with pytest.raises(ValueError, match="activation must be one of relu, gelu, silu, got 'tanh'"):
        PositionwiseFeedForward(4, 9, activation="tanh")
    with pytest.raises(ValueError, match="d_ff must be >= 1, got 0"):
        PositionwiseFeedForward(4, 0)
    layer = PositionwiseFeedForward(4, 9, dropout=1.0)
    assert not layer(torch.randn(2, 4)).any()
    assert layer.eval()(torch.randn(2, 4)).any()
