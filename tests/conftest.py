"""Fixtures and helpers that the tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from triton_support import interpret_without_gpu

import fastattn
from fastattn.backends import cpu

interpret_without_gpu()


def pytest_report_header() -> str:
    if not cpu.available():
        return "fastattn: no native core"
    from fastattn import _C

    machine = f"{_C.info()}, {torch.get_num_threads()} threads"
    return f"fastattn {fastattn.__version__}: {machine}, torch {torch.__version__}"


@pytest.fixture
def native():
    """The native core; skips where it is not built."""
    if not cpu.available():
        pytest.skip("the native core fastattn._C is not built")
    from fastattn import _C

    return _C


@pytest.fixture
def use_isa(native) -> Iterator:
    """A function that switches the CPU kernels to an instruction set, or skips; undone afterwards."""
    before, here = native.info()["isa"], native.info()["isas"]

    def switch(isa: str) -> None:
        if isa not in here:
            pytest.skip(f"cpu: this machine and build have {here}, not {isa}")
        native.set_isa(isa)

    yield switch
    native.set_isa(before)


@pytest.fixture
def use_threads() -> Iterator:
    """torch.set_num_threads, undone afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def one_thread(use_threads) -> None:
    """For models and tensors so small that threads only wait for one another."""
    use_threads(1)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator:
    """Kernels count as compiled, and no plan is left from before."""
    from stand_in_support import StandIn

    from fastattn import repeated
    from fastattn.backends.triton import host, plans
    from fastattn.backends.triton.launch import launch, parameters_of

    def launched(kernel, programs: int, config, *args, **constants):
        launch(kernel, programs, config, *args, **constants)
        return StandIn(kernel, parameters_of(kernel, config, args, constants))

    monkeypatch.setattr(host, "launch", launched)
    monkeypatch.setattr(plans.FORWARD, "_plans", {})
    monkeypatch.setattr(plans.BACKWARD, "_plans", {})
    monkeypatch.setattr(repeated, "_known", {})
    monkeypatch.setattr(StandIn, "runs", 0)
    yield StandIn


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """The keyword arguments of each call that reaches our function through the override."""
    from fastattn.integrations.torch import stand_ins

    seen: list[dict] = []
    ours = stand_ins.scaled_dot_product_attention

    def spy(*args, **kwargs):
        seen.append(kwargs)
        return ours(*args, **kwargs)

    monkeypatch.setattr(stand_ins, "scaled_dot_product_attention", spy)
    monkeypatch.setattr(stand_ins, "_warned", set())
    return seen
