"""Tiles by descriptors: the bits of loads by pointer where the copy engine's rules hold; none elsewhere."""

from __future__ import annotations

import pytest
import torch
from test_cases import BY_NAME
from triton_support import needs_triton

import fastattn
from fastattn import masks
from fastattn.backends import triton as backend
from fastattn.backends.triton import descriptors
from fastattn.testing import CASES, Case, make_inputs, run
from fastattn.testing.checking import refusal

pytestmark = [needs_triton, pytest.mark.skipif(not backend.is_interpreted(), reason="needs the interpreter")]


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list:
    """Descriptors on, for the tiles that the interpreter takes and every dtype; collects what is made."""
    from fastattn.backends.triton.launch import INTERPRETED

    found: list = []
    make = descriptors.tiles_of

    def tiles_of(*args):
        found.append(make(*args))
        return found[-1]

    monkeypatch.setattr(descriptors, "tiles_of", tiles_of)
    monkeypatch.setattr(descriptors, "ASKED", True)
    monkeypatch.setattr(descriptors, "ARCHITECTURES", (INTERPRETED,))
    monkeypatch.setattr(descriptors, "ITEM_SIZES", (2, 4))
    return found


def check(case: Case, made: list, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs(case)
    if (reason := refusal("triton", inputs)) is not None:
        pytest.skip(f"triton: {reason}")
    got = run(fastattn, inputs, grads=False, backend="triton")
    monkeypatch.setattr(descriptors, "ASKED", False)
    want = run(fastattn, inputs, grads=False, backend="triton")
    for name in want:
        assert torch.equal(got[name].nan_to_num(7.0), want[name].nan_to_num(7.0)), name


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_case(case: Case, made: list, monkeypatch: pytest.MonkeyPatch):
    check(case, made, monkeypatch)


@pytest.mark.parametrize("name", ["many-tiles-bfloat16", "layout-blhd", "gqa"])
def test_case(name: str, made: list, monkeypatch: pytest.MonkeyPatch):
    check(BY_NAME[name], made, monkeypatch)
    assert made and None not in made


def tensors(*shape: int, dtype: torch.dtype = torch.bfloat16) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(len(shape))
    return [torch.randn(shape, generator=generator).to(dtype) for _ in range(3)]


@pytest.mark.parametrize("head_dim", [8, 24, 64])
@pytest.mark.parametrize("mask", [None, masks.causal()], ids=str)
def test_whole_tiles_and_padded_columns(mask, head_dim: int, made: list):
    """200 keys are three whole tiles and a part; columns beyond head_dim are the copy engine's zeros."""
    q, k, v = tensors(2, 2, 200, head_dim)
    k, v = k[:, :1], v[:, :1]
    got = fastattn.attention(q[:, :, -5:], k, v, mask=mask, backend="triton")
    want = fastattn.attention(q[:, :, -5:], k, v, mask=mask, backend="reference")
    torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)
    assert len(made) == 2 and None not in made


def test_packed_sequences(made: list):
    """A tile begins where its sequence does, and ends before the next one."""
    q, k, v = tensors(210, 2, 16)
    k[140:] = float("nan")  # of the second sequence, which the first must not see
    offsets_q, offsets_k = torch.tensor([0, 4, 8]), torch.tensor([0, 140, 210])
    options = {"max_seqlen_q": 4, "max_seqlen_k": 140}
    results = [
        fastattn.varlen_attention(q[:8], k, v, offsets_q.int(), offsets_k.int(), **options, backend=name)
        for name in ("triton", "reference")
    ]
    torch.testing.assert_close(*results, rtol=2e-2, atol=2e-2, equal_nan=True)
    assert results[0][:4].isfinite().all() and results[0][4:].isnan().all()
    assert len(made) == 2 and None not in made


def test_paged_caches_have_pages_and_no_tiles(made: list):
    q, k, v = tensors(1, 1, 128, 16)
    pages = [t.view(2, 1, 64, 16) for t in (k, v)]
    fastattn.decode_attention(
        q[:, :, :1], *pages, torch.tensor([100]), block_table=torch.tensor([[0, 1]]).int(), backend="triton"
    )
    assert not made


@pytest.mark.parametrize(
    "view",
    [
        lambda t: t[..., :12],  # rows that begin at multiples of 32 bytes
        lambda t: t.transpose(1, 2),
        lambda t: t[:1],
        lambda t: t[:, :1].expand(-1, 1, -1, -1),
        lambda t: t[0],
    ],
)
def test_what_the_copy_engine_takes(view):
    tensor = view(torch.zeros(2, 3, 64, 16, dtype=torch.bfloat16))
    found = descriptors.tiles_of(tensor, 32, 16)
    rows = tensor.transpose(0, 1)[None] if tensor.dim() == 3 else tensor
    assert found.shape == list(rows.shape) and found.block_shape == [1, 1, 32, 16]
    assert found.strides[2:] == [rows.stride(2), 1] and found.base.data_ptr() == tensor.data_ptr()


@pytest.mark.parametrize(
    "view",
    [
        lambda t: t[..., 1:],  # begins at 2 bytes
        lambda t: t.reshape(-1)[: 2 * 3 * 64 * 15].view(2, 3, 64, 15),  # rows of 30 bytes
        lambda t: t[:, :1].expand(-1, 3, -1, -1),  # heads without a stride
    ],
)
def test_what_it_does_not_take(view):
    assert descriptors.tiles_of(view(torch.zeros(2, 3, 64, 16, dtype=torch.bfloat16)), 32, 16) is None


def test_a_plan_moves_descriptors(made: list, stand_in):
    """What the second call gives is in other memory, and its descriptors point there."""
    for seed in (1.0, 0.5):
        q, k, v = (t * seed for t in tensors(1, 1, 128, 16))
        got = fastattn.attention(q, k, v, backend="triton")
        torch.testing.assert_close(
            got, fastattn.attention(q, k, v, backend="reference"), rtol=2e-2, atol=2e-2
        )
    assert stand_in.runs == 1 and len(made) == 2
