"""The Triton backend beside the case list: routes, determinism, bounds, and what it refuses.

Everything runs under Triton's interpreter where there is no GPU.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys

import pytest
import torch
from triton_support import needs_triton

import fastattn
from fastattn import masks
from fastattn.biases import ALiBi

pytestmark = needs_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def inputs(*lengths: int, heads: int = 2, dim: int = 16, dtype: torch.dtype = torch.float32) -> list:
    generator = torch.Generator().manual_seed(0)
    sizes = [lengths[0], lengths[-1], lengths[-1]]
    tensors = (torch.randn(1, heads, n, dim, generator=generator) for n in sizes)
    return [t.to(DEVICE, dtype).requires_grad_() for t in tensors]


def call(*tensors: torch.Tensor, **options) -> torch.Tensor:
    return fastattn.attention(*tensors, backend="triton", **options)


def test_torch_compile_without_a_graph_break():
    def function(q, k, v, backend):
        return fastattn.attention(q.sin(), k, v, mask=masks.causal(), backend=backend)

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    tensors = inputs(20, 33)
    results = []
    for out in (compiled(*tensors, "triton"), function(*tensors, "reference")):
        results.append((out, *torch.autograd.grad(out.square().sum(), tensors)))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_vmap_and_func_grad():
    q, k, v = (t.detach()[0].expand(3, -1, -1, -1).clone() for t in inputs(9, 20))

    def loss(q, k, v):
        return fastattn.attention(q[None], k[None], v[None], backend="triton").square().sum()

    got = torch.func.vmap(torch.func.grad(loss))(q, k, v)
    leaf = q.clone().requires_grad_()
    fastattn.attention(leaf, k, v, backend="reference").square().sum().backward()
    torch.testing.assert_close(got, leaf.grad, rtol=1e-4, atol=1e-4)


def test_a_double_backward_says_what_to_do():
    q, k, v = inputs(5)
    (dq,) = torch.autograd.grad(call(q, k, v).sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="backend='reference'"):
        dq.sum().backward()


@pytest.mark.parametrize("bias", [True, False])
def test_bits_do_not_depend_on_the_batch(bias: bool):
    """A head alone gives the bits that it gives among others."""
    q, k, v = (t.detach() for t in inputs(70, 90, heads=3))
    options = {"mask": masks.causal()}

    def results(chosen: slice) -> list[torch.Tensor]:
        leaves = [t[:, chosen].clone().requires_grad_() for t in (q, k, v)]
        slopes = torch.tensor([0.1, 0.2, 0.3], device=DEVICE)[chosen]
        out = call(*leaves, **options, bias=ALiBi(slopes) if bias else None)
        return [out, *torch.autograd.grad(out.sum(), leaves)]

    for whole, alone in zip(results(slice(None)), results(slice(1, 2)), strict=True):
        assert torch.equal(whole[:, 1:2], alone)


def test_strides_are_taken_as_they_are():
    """[B, L, H, D] views without a copy, and a last dimension that is not contiguous with one."""
    q, k, v = (t.detach() for t in inputs(40, 50))
    want = call(q, k, v)
    viewed = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]
    out = call(*viewed)
    torch.testing.assert_close(out, want)
    assert out.transpose(1, 2).is_contiguous()
    torch.testing.assert_close(call(*(t.mT.contiguous().mT for t in (q, k, v))), want)


def test_lengths_beyond_the_tensors_stay_within_them():
    """On a GPU nobody looks at the values of index tensors, so kernels clamp them."""
    from fastattn.backends import triton as backend
    from fastattn.lowering import Operands, Params

    q, k, v = (torch.randn(1, 2, n, 16, device=DEVICE) for n in (4, 64, 64))
    wrong = Operands(seqlens_k=torch.tensor([10_000], dtype=torch.int32, device=DEVICE))
    right = Operands(seqlens_k=torch.tensor([64], dtype=torch.int32, device=DEVICE))
    params = Params(0.25, checked=True)
    got, _ = backend.forward(q, k, v, wrong, params)
    want, _ = backend.forward(q, k, v, right, params)
    assert torch.equal(got, want)

    packed = [t[0].transpose(0, 1).contiguous() for t in (q, k, v)]
    offsets = torch.tensor([0, 3, 90], dtype=torch.int32, device=DEVICE)
    packing = Operands(cu_seqlens_q=offsets, cu_seqlens_k=offsets)
    out, _ = backend.forward(*packed, packing, params._replace(max_seqlen_q=64, max_seqlen_k=64))
    assert out.isfinite().all()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": torch.float64}, "it has no float64"),
        ({"dim": 264}, "head_dim and head_dim_v go up to 256, not 264"),
    ],
    ids=str,
)
def test_what_it_cannot_run_has_a_reason(change: dict, reason: str):
    q, k, v = (t.detach() for t in inputs(4, **change))
    assert fastattn.explain(q, k, v).reasons["triton"] == reason
    with pytest.raises(NotImplementedError, match=reason):
        call(q, k, v)


def test_the_interpreter_is_never_chosen():
    q, k, v = (torch.ones(1, 1, 2, 16) for _ in range(3))
    choice = fastattn.explain(q, k, v)
    assert choice.backend in ("cpu", "torch")


def test_without_the_interpreter_cpu_tensors_are_refused():
    code = (
        "import torch, fastattn; q = torch.ones(1, 1, 2, 16);"
        "print(fastattn.explain(q, q, q).reasons['triton']);"
        "import sys; print('triton' in sys.modules)"
    )
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True)
    assert done.stdout.splitlines() == ["it runs on cuda tensors, not cpu", "False"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_every_configuration_is_a_valid_tile(dtype: torch.dtype):
    """Powers of two that a product takes, and no more than 64 where a block mask's lists name the tiles."""
    from fastattn.backends.triton import configs

    for arch in (80, 86, 89, 90, 100, 120, 75):
        for dim in (16, 32, 64, 128, 256):
            for blocks in (False, True):
                chosen = [configs.forward_config(arch, dim, dtype.itemsize, blocks, n) for n in (1, 64, 4096)]
                chosen.append(configs.backward_config(arch, dim, dtype.itemsize, blocks))
                for config in chosen:
                    sizes = (config.block_m, config.block_n)
                    assert all(size >= 16 and size & (size - 1) == 0 for size in sizes)
                    assert not blocks or max(sizes) <= 64


def test_tiles_shrink_until_they_fit():
    """Whatever is read for each pair; a device of which nothing is known has what the smallest one has."""
    from fastattn.backends.triton import configs

    for arch, dim, itemsize, pair_bytes in itertools.product(
        (80, 86, 89, 90, 100, 120, 75), (64, 128, 256), (2, 4), (0, 1, 4, 9)
    ):
        room = configs.SHARED_MEMORY.get(arch, configs.SMALLEST)
        for blocks in (False, True):
            forward = configs.forward_config(arch, dim, itemsize, blocks, 4096, pair_bytes)
            backward = configs.backward_config(arch, dim, itemsize, blocks, pair_bytes)
            bias = configs.bias_config(arch, dim, itemsize, pair_bytes)
            assert bias.block_m == bias.block_n
            for config, tiles in (
                (forward, forward.block_m + 2 * forward.num_stages * forward.block_n),
                (backward, 2 * (backward.block_m + backward.num_stages * backward.block_n)),
                (bias, 4 * bias.block_m),
            ):
                assert itemsize * dim * tiles + pair_bytes * config.block_m * config.block_n <= room


@pytest.mark.parametrize("sizes", [(16, 32), (32, 16)], ids=str)
def test_a_block_mask_in_parts_of_its_tiles(sizes: tuple[int, int], monkeypatch: pytest.MonkeyPatch):
    """As where a tile of 64 x 64 does not fit: the same results, and what is not finite stays where it is."""
    from fastattn.backends.triton import host, plans
    from fastattn.backends.triton.configs import TileConfig

    def results(backend: str) -> list[torch.Tensor]:
        torch.manual_seed(0)
        leaves = [t.requires_grad_() for t in inputs(90, 100)]
        with torch.no_grad():
            leaves[2][0, 1, 80, 3] = leaves[0][0, 0, 89, 1] = torch.nan
        bias = torch.randn(1, 2, 90, 100, device=DEVICE).requires_grad_()
        out = fastattn.attention(*leaves, mask=mask, bias=bias, backend=backend)
        return [out, *torch.autograd.grad(out, [*leaves, bias], torch.randn_like(out))]

    mask = masks.causal() | masks.prefix(torch.tensor([40], device=DEVICE))
    want = results("reference")
    monkeypatch.setattr(plans.FORWARD, "_plans", {})
    monkeypatch.setattr(plans.BACKWARD, "_plans", {})
    for name in ("forward_config", "backward_config"):
        monkeypatch.setattr(host, name, lambda *_: TileConfig(*sizes, 4, 1))
    monkeypatch.setattr(host, "bias_config", lambda *_: TileConfig(32, 32, 4, 1))
    for got, wanted in zip(results("triton"), want, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize(
    ("switch", "on", "off"), [("allow_tf32", True, False), ("fp32_precision", "tf32", "none")]
)
def test_torch_s_switches_for_tf32(switch: str, on: object, off: object):
    """The former one, and the present one, after which PyTorch lets nobody read the former."""
    from fastattn.backends.triton.launch import tf32_allowed

    matmul = torch.backends.cuda.matmul
    if not hasattr(matmul, switch):
        pytest.skip(f"torch {torch.__version__} has no {switch}")
    q, k, v = (t.detach() for t in inputs(4))
    assert not tf32_allowed()
    setattr(matmul, switch, on)
    try:
        assert tf32_allowed()
        assert call(q, k, v).isfinite().all()
    finally:
        setattr(matmul, switch, off)
    assert not tf32_allowed()


def test_devices_of_amd_have_tiles_of_their_own(monkeypatch: pytest.MonkeyPatch):
    """Their 9.0 is not Hopper, and has less memory than any device of NVIDIA's."""
    from fastattn.backends.triton import configs, launch

    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert launch.architecture.__wrapped__(torch.device("cuda")) == configs.AMD
    for (itemsize, dim), pair_bytes in itertools.product(((2, 256), (4, 128)), (0, 4)):
        config = configs.backward_config(configs.AMD, dim, itemsize, False, pair_bytes)
        tiles = 2 * (config.block_m + config.num_stages * config.block_n)
        assert itemsize * dim * tiles + pair_bytes * config.block_m * config.block_n <= 65_536
