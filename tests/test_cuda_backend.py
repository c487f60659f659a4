"""The backend "cuda" beside its kernels: what it takes and says, and that it runs where it is asked for."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch
from cuda_support import emulated, on_emulated_device
from torch.fx.experimental.proxy_tensor import make_fx
from triton_support import needs_triton

import fastattn
from fastattn import dispatch, masks
from fastattn.backends import cuda
from fastattn.cli import main
from fastattn.joined import CUDA
from fastattn.spec import AttentionSpec

SPEC = AttentionSpec("attention", 1, 4, 2, 128, 128, 64, 64, "bfloat16", "cuda", 0.125)


class Library:
    """fastattn._cuda of a machine that is not here."""

    def __init__(self, problem: str = "", capability: int = 90, device_type: str = "cuda") -> None:
        self.found = problem, capability, device_type

    def problem(self) -> str:
        return self.found[0]

    def capability(self, device: int) -> int:
        return self.found[1]

    def device_type(self) -> str:
        return self.found[2]


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> Library:
    library = Library()
    monkeypatch.setattr(cuda, "library", lambda: library)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    return library


def qkv(dim: int = 64, dtype: torch.dtype = torch.bfloat16) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, heads, 40, dim, generator=generator).to(dtype) for heads in (4, 2, 2)]


def test_what_it_takes(hopper: Library):
    assert cuda.supports(SPEC) is None
    assert (
        cuda.supports(replace(SPEC, dtype="float16", head_dim=200, head_dim_v=8, softcap=3.0, sinks=True))
        is None
    )


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dtype": "float32"}, "it has bfloat16 and float16, not float32"),
        ({"head_dim": 37}, "head_dim and head_dim_v must be multiples of 8 up to 256, got 37 and 64"),
        ({"head_dim_v": 264}, "head_dim and head_dim_v must be multiples of 8 up to 256, got 64 and 264"),
        ({"score": "gaussian"}, "it has no gaussian score"),
        ({"paged": True}, "it has no paged caches"),
        ({"seqlen_k": 2**30}, f"lengths go up to {2**30 - 1}, not {2**30}"),
        ({"device": "cpu"}, "it runs on cuda tensors, not cpu"),
    ],
)
def test_what_it_refuses_it_says(changes: dict, reason: str, hopper: Library):
    assert cuda.supports(replace(SPEC, **changes)) == reason


def test_every_reason_at_once(hopper: Library):
    reasons = cuda.supports(replace(SPEC, dtype="float64", head_dim=300, paged=True))
    assert reasons is not None and reasons.count(";") == 2


def test_the_machine_is_asked_last(monkeypatch: pytest.MonkeyPatch):
    """Starting the driver for a call on CPU tensors would keep the process from forking."""

    class Untouchable(Library):
        def problem(self) -> str:
            raise AssertionError("the driver was asked")

    library = Untouchable()
    monkeypatch.setattr(cuda, "library", lambda: library)
    assert cuda.supports(replace(SPEC, device="cpu")) == "it runs on cuda tensors, not cpu"


@pytest.mark.parametrize(
    ("library", "reason"),
    [
        (Library(capability=80), "its kernels are for compute capability 9.0, not 8.0"),
        (
            Library("the driver is one for CUDA 12.2, and fastattn._cuda was built with CUDA 13.0"),
            "CUDA 12.2",
        ),
    ],
)
def test_another_machine(library: Library, reason: str, hopper: Library, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cuda, "library", lambda: library)
    assert reason in str(cuda.supports(SPEC))


def test_a_pytorch_that_finds_no_device(hopper: Library, monkeypatch: pytest.MonkeyPatch):
    """Such as one for CPUs beside a driver: asked for the device, it would raise an AssertionError."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cuda.supports(SPEC) == cuda.state() == "this PyTorch finds no CUDA device"


def test_info_says_what_speaks_against_the_kernels(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(cuda, "library", lambda: Library("there is no CUDA driver"))
    assert main(["info"]) == 0
    assert "cuda kernels there is no CUDA driver" in capsys.readouterr().out


def test_a_forced_call_that_cannot_run_is_explained():
    q, k, v = qkv()
    text = str(fastattn.explain(q, k, v, backend="cuda"))
    assert "cuda       cannot (forced: the call raises): " in text and "cpu        could run" in text


def test_without_the_extension(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "fastattn._cuda", None)
    monkeypatch.delattr(fastattn, "_cuda", raising=False)
    missing = cuda.library.__wrapped__()
    assert "the extension fastattn._cuda is not built: install with FASTATTN_CUDA=1" in missing
    monkeypatch.setattr(cuda, "library", lambda: missing)
    assert cuda.supports(SPEC) == missing


def test_it_runs_only_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch):
    q, k, v = qkv()
    with on_emulated_device(monkeypatch):
        choice = fastattn.explain(q, k, v)
        asked = fastattn.explain(q, k, v, backend="cuda")
        monkeypatch.setenv("FASTATTN_BACKEND", "cuda")
        by_environment = fastattn.explain(q, k, v)
    assert choice.backend != "cuda" and choice.reasons["cuda"] is None
    assert "could run (not yet proven on a device: ask for it with backend='cuda')" in str(choice)
    assert asked.backend == by_environment.backend == "cuda"
    assert "cuda       runs (forced)" in str(asked)


def test_a_forced_call_that_it_cannot_run_raises():
    q, k, v = qkv(dtype=torch.float32)
    with pytest.raises(NotImplementedError, match="it has bfloat16 and float16, not float32"):
        fastattn.attention(q, k, v, backend="cuda")


@needs_triton
def test_gradients_come_from_the_other_backend(monkeypatch: pytest.MonkeyPatch):
    if torch.cuda.is_available():
        pytest.skip("Triton's kernels are compiled here, and take no CPU tensors")
    leaves = [x.requires_grad_() for x in qkv(16)]
    grads = {}
    for backend in ("cuda", "reference"):
        with on_emulated_device(monkeypatch):
            out = fastattn.attention(*leaves, mask=masks.causal(), backend=backend)
        grads[backend] = torch.autograd.grad(out.float().square().sum(), leaves)
    for got, want in zip(grads["cuda"], grads["reference"], strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0.1)


def test_a_call_whose_gradients_nobody_has_is_refused(hopper: Library, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(CUDA.back, "supports", lambda spec: "it is not there")
    assert CUDA.supports(SPEC) is None
    reason = CUDA.supports(replace(SPEC, needs_grad=True))
    assert reason == "its gradients come from the triton backend: it is not there"


def test_a_failed_launch_names_the_call(monkeypatch: pytest.MonkeyPatch):
    q, k, v = qkv()

    class Failing(Library):
        def attention_fwd(self, *args: object) -> None:
            raise RuntimeError("sm90_attention_fwd could not be launched: out of memory")

    library = Failing(device_type="cpu")
    monkeypatch.setattr(cuda, "library", lambda: library)
    with pytest.raises(
        RuntimeError, match=r"out of memory \(backend 'cuda', q \[1, 4, 40, 64\].*softcap=2.0"
    ):
        fastattn.attention(q, k, v, softcap=2.0, backend="cuda")


def test_through_the_library_op(monkeypatch: pytest.MonkeyPatch):
    """What torch.compile records names the backend, and finds it again."""
    q, k, v = qkv()
    with on_emulated_device(monkeypatch):
        direct = fastattn.attention(q, k, v, mask=masks.causal(), backend="cuda")
        compiled = torch.compile(
            lambda *x: fastattn.attention(*x, mask=masks.causal(), backend="cuda"),
            backend="eager",
            fullgraph=True,
        )
        assert torch.equal(compiled(q, k, v), direct)


def test_a_graph_that_runs_in_another_dtype_is_refused(monkeypatch):
    q = torch.randn(1, 2, 8, 64)
    with on_emulated_device(monkeypatch):
        graph = make_fx(lambda q: fastattn.attention(q, q, q, backend="cuda"))(q.half())
        assert torch.equal(graph(q.half()), fastattn.attention(*[q.half()] * 3, backend="cuda"))
        with pytest.raises(ValueError, match="dtype must be bfloat16 or float16"):
            graph(q)


def test_the_registers_of_a_block_fit():
    for config in emulated().configs():
        producer, consumer = config["registers"]
        assert 128 * producer + (config["threads"] - 128) * consumer <= 65536, config
        assert producer % 8 == consumer % 8 == 0 and producer >= 24 and consumer <= 240, config
        assert config["shared_bytes"] <= 232448, config


def test_it_comes_first_among_backends():
    assert next(iter(dispatch.BACKENDS)) == "cuda"
