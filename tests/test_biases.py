"""Biases against their definitions written out position by position, in both forms, with their gradients."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils import _pytree as pytree

from fastattn.biases import ALiBi, Bias, RelativePosition, alibi_slopes
from fastattn.masks import MaskShape

CPU = torch.device("cpu")


def t5_bucket(relative: int, bidirectional: bool, num_buckets: int, max_distance: int) -> int:
    """The bucket of memory position - query position, transcribed from T5's description for one number."""
    bucket = 0
    distance = -relative
    if bidirectional:
        num_buckets //= 2
        if distance < 0:
            bucket += num_buckets
            distance = -distance
    elif distance < 0:
        distance = 0
    max_exact = num_buckets // 2
    if distance < max_exact:
        return bucket + distance
    one = np.float32
    scaled = one(np.log(one(distance) / one(max_exact))) / one(math.log(max_distance / max_exact))
    large = max_exact + int(scaled * one(num_buckets - max_exact))
    return bucket + min(large, num_buckets - 1)


def small_biases(heads: int, batch: int = 1) -> dict[str, Bias]:
    generator = torch.Generator().manual_seed(0)

    def floats(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator, dtype=torch.float64, requires_grad=True)

    return {
        "alibi": ALiBi(floats(heads)),
        "alibi top left": ALiBi(floats(heads), align="top_left"),
        "alibi by batch": ALiBi(floats(batch, heads)),
        "t5": RelativePosition(floats(8, heads), max_distance=20),
        "t5 causal": RelativePosition(
            floats(6, heads), bidirectional=False, max_distance=9, align="top_left"
        ),
    }


NAMES = sorted(small_biases(1))


def by_definition(bias: Bias, shape: MaskShape) -> Tensor:
    """Dense [B, H, Lq, Lk], one Python number a pair."""
    lens_q = [shape.seqlen_q] * shape.batch if shape.seqlens_q is None else shape.seqlens_q.tolist()
    lens_k = [shape.seqlen_k] * shape.batch if shape.seqlens_k is None else shape.seqlens_k.tolist()
    result = torch.zeros(shape.batch, shape.heads, shape.seqlen_q, shape.seqlen_k, dtype=torch.float64)
    for b, h, i, j in np.ndindex(*result.shape):
        offset = lens_k[b] - lens_q[b] if bias.align == "bottom_right" else 0
        if isinstance(bias, ALiBi):
            slopes = bias.slopes.detach().expand(shape.batch, shape.heads)
            result[b, h, i, j] = -float(slopes[b, h]) * abs(i + offset - j)
        elif isinstance(bias, RelativePosition):
            bucket = t5_bucket(j - i - offset, bias.bidirectional, bias.table.shape[0], bias.max_distance)
            result[b, h, i, j] = float(bias.table.detach()[bucket, h])
    return result


SHAPES = [
    MaskShape(2, 3, 5, 7),
    MaskShape(2, 3, 7, 5),
    MaskShape(2, 3, 1, 40),
    MaskShape(2, 3, 6, 30, None, torch.tensor([4, 30])),
    MaskShape(2, 3, 6, 9, torch.tensor([6, 1]), torch.tensor([2, 9], dtype=torch.int32)),
]


@pytest.mark.parametrize("shape", SHAPES, ids=["5x7", "7x5", "1x40", "caches", "varlen"])
@pytest.mark.parametrize("name", NAMES)
def test_forms_agree(name: str, shape: MaskShape) -> None:
    bias = small_biases(3, batch=2)[name]
    want = by_definition(bias, shape)
    got = bias.to_dense(shape, CPU, torch.float64)
    torch.testing.assert_close(got.expand_as(want), want, rtol=1e-15, atol=0)
    reach = shape.seqlen_q + shape.seqlen_k
    diagonals = bias.diagonals(3, -reach, reach)
    assert diagonals.shape == (bias.batch, 3, 2 * reach + 1) and diagonals.dtype == torch.float64
    for b in range(shape.batch):
        offset = int(shape.offset(bias.align, torch.tensor(b)))
        i, j = torch.arange(shape.seqlen_q)[:, None], torch.arange(shape.seqlen_k)
        read = diagonals[b if bias.batch > 1 else 0][:, j - i - offset + reach]
        torch.testing.assert_close(read, want[b], rtol=1e-15, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_gradients(name: str) -> None:
    bias = small_biases(2, batch=2)[name]
    leaves, spec = pytree.tree_flatten(bias)
    shape = MaskShape(2, 2, 4, 6)

    def diagonals(*parameters: Tensor) -> Tensor:
        return pytree.tree_unflatten(parameters, spec).diagonals(2, -7, 9)

    def dense(*parameters: Tensor) -> Tensor:
        return pytree.tree_unflatten(parameters, spec).to_dense(shape, CPU, torch.float64)

    for form in (diagonals, dense):
        assert torch.autograd.gradcheck(form, leaves)
        assert torch.autograd.gradgradcheck(form, leaves)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("heads", [1, 3])
def test_gradients_do_not_depend_on_threads(name: str, heads: int) -> None:
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            bias = pytree.tree_map_only(
                Tensor, lambda x: x.detach().float().requires_grad_(), small_biases(heads)[name]
            )
            values = bias.diagonals(heads, -70000, 70000)
            grad = torch.randn(values.shape, generator=torch.Generator().manual_seed(1))
            found.append(torch.autograd.grad(values, bias.parameter, grad)[0])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize(("lo", "hi"), [(0, 0), (-3, -1), (-4096, 4095), (-4095, 4097), (5, 4)])
def test_ranges_of_diagonals(lo: int, hi: int) -> None:
    for bias in small_biases(2).values():
        whole = bias.diagonals(2, -5000, 5000)
        assert torch.equal(bias.diagonals(2, lo, hi), whole[..., lo + 5000 : hi + 5001])


def test_precision() -> None:
    for dtype, want in ((torch.float64,) * 2, (torch.float32,) * 2, (torch.bfloat16, torch.float32)):
        for bias in (ALiBi(torch.ones(2, dtype=dtype)), RelativePosition(torch.ones(32, 2, dtype=dtype))):
            assert bias.diagonals(2, -3, 3).dtype == want
            assert bias.to_dense(MaskShape(1, 2, 3, 3), CPU, torch.float16).dtype == torch.float16


def test_empty() -> None:
    for bias in small_biases(2).values():
        assert bias.to_dense(MaskShape(1, 2, 0, 3), CPU, torch.float32).shape == (1, 2, 0, 3)
        assert bias.to_dense(MaskShape(1, 2, 3, 0), CPU, torch.float32).shape == (1, 2, 3, 0)


# --- ALiBi --------------------------------------------------------------------------------------------------


def test_alibi_worked_example() -> None:
    bias = ALiBi(torch.tensor([0.5]))
    got = bias.to_dense(MaskShape(1, 1, 2, 3), CPU, torch.float32)[0, 0]
    assert got.tolist() == [[-0.5, 0.0, -0.5], [-1.0, -0.5, 0.0]]
    assert bias.diagonals(1, -2, 1)[0, 0].tolist() == [-1.0, -0.5, 0.0, -0.5]


@pytest.mark.parametrize(
    ("heads", "powers"),
    [
        (1, [8]),
        (2, [4, 8]),
        (3, [4, 8, 2]),
        (8, [1, 2, 3, 4, 5, 6, 7, 8]),
        (12, [1, 2, 3, 4, 5, 6, 7, 8, 0.5, 1.5, 2.5, 3.5]),
    ],
)
def test_alibi_slopes(heads: int, powers: list[float]) -> None:
    want = torch.tensor([2.0**-power for power in powers], dtype=torch.float64)
    torch.testing.assert_close(alibi_slopes(heads, dtype=torch.float64), want, rtol=1e-15, atol=0)
    assert alibi_slopes(heads).dtype == torch.float32


# --- T5 -----------------------------------------------------------------------------------------------------


def test_t5_known_buckets() -> None:
    """Values of T5's defaults: 32 buckets up to distance 128."""
    both = RelativePosition(torch.zeros(32, 1))
    known = {0: 0, -1: 1, -7: 7, -8: 8, -11: 8, -12: 9, -16: 10, -23: 11, -32: 12, -64: 14, -91: 15, -128: 15}
    known |= {-1000: 15, 1: 17, 3: 19, 8: 24, 12: 25, 128: 31, 5000: 31}
    assert both.buckets(torch.tensor(list(known))).tolist() == list(known.values())
    past = RelativePosition(torch.zeros(32, 1), bidirectional=False)
    known = {
        5: 0,
        0: 0,
        -1: 1,
        -15: 15,
        -16: 16,
        -18: 16,
        -19: 17,
        -32: 21,
        -64: 26,
        -127: 31,
        -128: 31,
        -9999: 31,
    }
    assert past.buckets(torch.tensor(list(known))).tolist() == list(known.values())


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("max_distance", [33, 64, 100, 128, 256, 1000])
@pytest.mark.parametrize("num_buckets", [4, 8, 10, 32, 33, 64])
def test_t5_buckets(num_buckets: int, max_distance: int, bidirectional: bool) -> None:
    bias = RelativePosition(
        torch.zeros(num_buckets, 1), bidirectional=bidirectional, max_distance=max_distance
    )
    relative = list(range(-1100, 1101))
    want = [t5_bucket(r, bidirectional, num_buckets, max_distance) for r in relative]
    assert bias.buckets(torch.tensor(relative)).tolist() == want


@settings(deadline=None, max_examples=50)
@given(st.integers(-(2**40), 2**40))
def test_t5_far_positions(relative: int) -> None:
    bias = RelativePosition(torch.zeros(32, 1))
    assert bias.buckets(torch.tensor([relative])).tolist() == [t5_bucket(relative, True, 32, 128)]


# --- as objects ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_pytree_and_copies(name: str) -> None:
    bias = small_biases(2)[name]
    leaves, spec = pytree.tree_flatten(bias)
    assert len(leaves) == 1 and leaves[0] is bias.parameter
    again = pytree.tree_unflatten(leaves, spec)
    assert type(again) is type(bias) and repr(again) == repr(bias)
    shape = MaskShape(1, 2, 3, 4)
    for other in (again, copy.deepcopy(bias), pickle.loads(pickle.dumps(bias))):
        assert torch.equal(
            other.to_dense(shape, CPU, torch.float32), bias.to_dense(shape, CPU, torch.float32)
        )
    assert pytree.tree_map(lambda leaf: None, bias).align == bias.align


def test_repr() -> None:
    assert repr(ALiBi(torch.ones(4))) == "ALiBi(slopes=float32[4], align='bottom_right')"
    table = RelativePosition(torch.ones(32, 4), bidirectional=False, align="top_left")
    want = "RelativePosition(table=float32[32, 4], bidirectional=False, max_distance=128, align='top_left')"
    assert repr(table) == want


def test_compile_traces_for_any_length() -> None:
    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def total(q: Tensor, slopes: Tensor, table: Tensor) -> Tensor:
        heads, length = q.shape[1], q.shape[2]
        alibi = ALiBi(slopes).diagonals(heads, 1 - length, length - 1)
        return alibi.sum() + RelativePosition(table).diagonals(heads, 1 - length, length - 1).sum()

    slopes, table = torch.ones(3, requires_grad=True), torch.ones(32, 3, requires_grad=True)
    for length in (3, 4, 9):
        result = total(torch.zeros(1, 3, length, 2), slopes, table)
        assert result.item() == 3 * (2 * length - 1) - 3 * length * (length - 1)
        result.backward()
    assert table.grad.sum() == 3 * (5 + 7 + 17)


# --- errors -------------------------------------------------------------------------------------------------

ONES = torch.ones(32, 2)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: ALiBi([1.0]), TypeError, "ALiBi slopes must be a floating-point tensor, got list"),
        (
            lambda: ALiBi(torch.ones(2).int()),
            TypeError,
            "ALiBi slopes must be a floating-point tensor, got int32",
        ),
        (
            lambda: ALiBi(ONES[None]),
            ValueError,
            r"ALiBi slopes must have 1 or 2 dim.*, got shape \[1, 32, 2\]",
        ),
        (lambda: ALiBi(ONES, align="x"), ValueError, "align must be one of"),
        (lambda: alibi_slopes(0), ValueError, "num_heads must be >= 1, got 0"),
        (
            lambda: RelativePosition(ONES[0]),
            ValueError,
            r"RelativePosition table must have 2 dim.*got shape \[2\]",
        ),
        (
            lambda: RelativePosition(ONES.int()),
            TypeError,
            "RelativePosition table must be a floating-point tensor",
        ),
        (lambda: RelativePosition(ONES[:3]), ValueError, "table must have at least 4 buckets, got 3"),
        (lambda: RelativePosition(ONES[:1], bidirectional=False), ValueError, "at least 2 buckets, got 1"),
        (
            lambda: RelativePosition(ONES, max_distance=8),
            ValueError,
            "must exceed the 8 exact distances, got 8",
        ),
        (lambda: RelativePosition(ONES, max_distance="x"), TypeError, "max_distance must be an int, got str"),
        (
            lambda: RelativePosition(ONES, max_distance=8.5),
            TypeError,
            "max_distance must be an int, got float",
        ),
        (
            lambda: RelativePosition(ONES, max_distance=float("nan")),
            TypeError,
            "max_distance must be an int, got float",
        ),
        (
            lambda: RelativePosition(ONES, bidirectional="no"),
            TypeError,
            "RelativePosition bidirectional must be a bool, got str",
        ),
        (lambda: alibi_slopes(2.5), TypeError, "num_heads must be an int, got float"),
        (lambda: alibi_slopes("4"), TypeError, "num_heads must be an int, got str"),
        (lambda: RelativePosition(ONES, align="y"), ValueError, "align must be one of"),
        (lambda: ALiBi(ONES[0]).diagonals(3, 0, 1), ValueError, "bias ALiBi must be for 3 heads, got 2"),
    ],
)
def test_errors_of_constructors(make: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("bias", "message"),
    [
        (ALiBi(torch.ones(4)), "bias ALiBi must be for 3 heads, got 4"),
        (ALiBi(torch.ones(4, 3)), r"bias ALiBi must have batch size 2 \(or 1\), got 4"),
        (ALiBi(torch.ones(3, device="meta")), "bias ALiBi must be on the call's device cpu, got meta"),
        (RelativePosition(torch.ones(32, 4)), "bias RelativePosition must be for 3 heads, got 4"),
    ],
    ids=repr,
)
def test_errors_in_use(bias: Bias, message: str) -> None:
    for use in (bias.to_dense, lambda shape, device, dtype: bias.check(shape, device)):
        with pytest.raises(ValueError, match=message):
            use(MaskShape(2, 3, 4, 4), CPU, torch.float32)
