"""Kernels stay inside their tensors: guard pages after the inputs, sentinels around the outputs."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest
import torch

from fastattn.backends import cpu

pytestmark = pytest.mark.skipif(not cpu.available(), reason="the native core fastattn._C is not built")

ISAS = ("baseline", "avx2", "avx512", "generic")
# (batch, heads, heads_kv, seqlen_q, seqlen_k, head_dim, head_dim_v): ragged in every way a vector can be
SHAPES = (
    (1, 1, 1, 1, 1, 1, 1),
    (1, 2, 1, 3, 5, 3, 2),
    (1, 1, 1, 7, 9, 17, 5),
    (2, 2, 2, 33, 66, 20, 31),
    (1, 2, 1, 65, 129, 64, 64),
    (1, 1, 1, 130, 70, 100, 72),
)
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}

# Every tensor ends exactly where a page without access begins, so that reading one element too far crashes;
# with `before` it begins where such a page ends.
GUARDED = """
    import ctypes, mmap, sys, torch, fastattn
    from fastattn import _C, masks

    PAGE = mmap.PAGESIZE
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    mappings = []

    def guarded(tensor, before):
        tensor = tensor.contiguous()
        size = tensor.numel() * tensor.element_size()
        room = -(-size // PAGE) * PAGE
        memory = mmap.mmap(-1, room + 2 * PAGE)
        mappings.append(memory)
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        for page in (address, address + PAGE + room):
            if libc.mprotect(page, PAGE, 0) != 0:
                sys.exit("mprotect failed")
        offset = PAGE if before else PAGE + room - size
        copy = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=offset)
        return copy.view(tensor.shape).copy_(tensor)

    _C.set_isa("{isa}")
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        for b, h, h_kv, lq, lk, d, d_v in {shapes}:
            for before in (False, True):
                shapes = ((b, h, lq, d), (b, h_kv, lk, d), (b, h_kv, lk, d_v), (b, h, lq, d_v))
                q, k, v, dout = (guarded(torch.randn(s).to(dtype), before) for s in shapes)
                mask = guarded(torch.rand(b, 1, lq, lk) < 0.7, before)
                bias = guarded(torch.randn(1, h, lq, lk).to(dtype), before)
                lengths = guarded(torch.randint(lk + 1, (b,)), before)
                for options in (
                    dict(),
                    dict(mask=masks.causal(), dropout_p=0.2),
                    dict(mask=mask, bias=bias),
                    dict(mask=masks.padding(lengths) & masks.window(9, 9)),
                    dict(mask=masks.causal() | masks.window(0, 3), softcap=2.0),
                ):
                    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
                    out = fastattn.attention(*leaves, **options, backend="cpu")
                    torch.autograd.grad(out, leaves, dout)
                if h == h_kv:
                    w = guarded(torch.randn(d), before)
                    leaves = [x.detach().requires_grad_() for x in (q, k, v, w)]
                    out = fastattn.additive_attention(*leaves, mask=masks.causal(), backend="cpu")
                    torch.autograd.grad(out, leaves, dout)
                    seed = guarded(torch.tensor([3]), before)
                    fastattn.hard_attention(q, k, v, mode="sample", seed=seed, mask=mask, backend="cpu")
                lens = guarded(torch.full((b,), lk, dtype=torch.int32), before)
                fastattn.decode_attention(q[:, :, :1], k, v, lens, backend="cpu")
    print("done")
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="guard pages are set up as on Linux")
@pytest.mark.parametrize("isa", ISAS)
def test_inputs_are_not_read_beyond_their_ends(isa: str, native):
    if isa not in native.info()["isas"]:
        pytest.skip(f"cpu: this machine and build have {native.info()['isas']}, not {isa}")
    script = textwrap.dedent(GUARDED).format(isa=isa, shapes=SHAPES)
    command = [sys.executable, "-X", "faulthandler", "-c", script]
    done = subprocess.run(command, timeout=300, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "done" in done.stdout, done.stderr


def view(tensor: torch.Tensor) -> tuple[int, torch.Size, tuple[int, ...]]:
    return tensor.data_ptr(), tensor.shape, (*tensor.stride()[:-1], 1)


class Framed:
    """An output in the middle of a larger buffer of sentinels, in every dimension."""

    SENTINEL = 12345.0

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.whole = torch.full([n + 2 for n in shape[:-1]] + [shape[-1] + 32], self.SENTINEL, dtype=dtype)
        self.inner = self.whole[(slice(1, -1),) * (len(shape) - 1) + (slice(16, -16),)]

    def untouched(self) -> bool:
        frame = torch.ones_like(self.whole, dtype=torch.bool)
        frame[(slice(1, -1),) * (frame.dim() - 1) + (slice(16, -16),)] = False
        return bool((self.whole[frame] == torch.tensor(self.SENTINEL, dtype=self.whole.dtype)).all())

    def written(self) -> bool:
        return not (self.inner == torch.tensor(self.SENTINEL, dtype=self.whole.dtype)).any()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_outputs_are_written_whole_and_nothing_else(
    shape: tuple[int, ...], dtype: torch.dtype, isa: str, native, use_isa
):
    use_isa(isa)
    b, h, h_kv, lq, lk, d, d_v = shape
    generator = torch.Generator().manual_seed(0)
    sizes = ((b, h, lq, d), (b, h_kv, lk, d), (b, h_kv, lk, d_v), (b, h, lq, d_v))
    q, k, v, dout = (torch.randn(size, generator=generator).to(dtype) for size in sizes)
    accumulate = torch.float64 if dtype == torch.float64 else torch.float32
    out, dq, dk, dv = (Framed(size, dtype) for size in (sizes[3], *sizes[:3]))
    lse = torch.full((b + 2, h, lq + 2), Framed.SENTINEL, dtype=accumulate)
    rows = lse[1:-1, :, 1:-1]
    lse_view = (rows.data_ptr(), rows.shape, rows.stride())
    code, scale, options = DTYPES[dtype], d**-0.5, {"band": (None, None, None, 0)}
    inputs = [view(x) for x in (q, k, v)]
    native.attention_fwd(code, *inputs, view(out.inner), lse_view, scale, 2, options)
    gradients = [view(x.inner) for x in (dq, dk, dv)]
    native.attention_bwd(
        code, *inputs, view(out.inner), lse_view, view(dout), None, *gradients, scale, 2, options
    )
    for name, framed in {"out": out, "dq": dq, "dk": dk, "dv": dv}.items():
        assert framed.untouched(), f"{name}: written outside"
        assert framed.written(), f"{name}: not written whole"
    rows.fill_(Framed.SENTINEL)
    assert (lse == Framed.SENTINEL).all(), "lse: written outside"
