"""override_sdpa as a plain function, a block and a decorator: when each begins and ends."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
import torch.nn.functional as F
from patch_support import compile_and_watch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fastattn.integrations.torch import override_sdpa, stand_ins

pytestmark = pytest.mark.usefixtures("native")


@pytest.fixture(autouse=True)
def leaves_nothing():
    yield
    left = torch._C._len_torch_function_stack()
    while torch._C._len_torch_function_stack():
        torch.overrides._pop_mode()
    assert left == 0


@pytest.fixture(autouse=True)
def backends(monkeypatch) -> list[str | None]:
    """The backend asked for by each call that reaches our function."""
    seen: list[str | None] = []
    ours = stand_ins.scaled_dot_product_attention

    def spy(*args, **kwargs):
        seen.append(kwargs["backend"])
        return ours(*args, **kwargs)

    monkeypatch.setattr(stand_ins, "scaled_dot_product_attention", spy)
    return seen


@pytest.fixture
def active(backends):
    """A function that returns the backend of the override that holds here: "none" where none does."""

    def active() -> str | None:
        backends.clear()
        q = torch.ones(1, 1, 2, 4)
        F.scaled_dot_product_attention(q, q, q)
        return backends[0] if backends else "none"

    return active


def test_plain_call_and_undo(active):
    override = override_sdpa("cpu")
    assert active() == "cpu"
    override.undo()
    assert active() == "none"
    override.undo()
    assert active() == "none"


def test_the_last_to_begin_counts_and_each_ends_alone(active):
    first, second, third = override_sdpa("cpu"), override_sdpa("reference"), override_sdpa("torch")
    assert active() == "torch"
    second.undo()
    assert active() == "torch"
    third.undo()
    assert active() == "cpu"
    first.undo()
    assert active() == "none"


def test_a_block_takes_the_call_over(active):
    override = override_sdpa("cpu")
    with override as entered:
        assert entered is override
        assert active() == "cpu"
    assert active() == "none"
    with override:
        assert active() == "cpu"
    assert active() == "none"


def test_entering_makes_an_earlier_one_the_innermost(active):
    first, second = override_sdpa("cpu"), override_sdpa("reference")
    with first:
        assert active() == "cpu"
    assert active() == "reference"
    second.undo()
    assert active() == "none"


def test_plain_call_inside_a_block_outlasts_it(active):
    with override_sdpa("cpu"):
        override = override_sdpa("reference")
        assert active() == "reference"
    assert active() == "reference"
    override.undo()
    assert active() == "none"


def test_undo_inside_blocks_ends_them_early(active):
    override = override_sdpa("cpu")
    with override, override:
        override.undo()
        assert active() == "none"
        with override:
            assert active() == "cpu"
    assert active() == "none"


def test_blocks_that_end_out_of_order(active):
    first, second = override_sdpa("cpu"), override_sdpa("reference")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert active() == "reference"
    second.__exit__(None, None, None)
    assert active() == "none"
    second.__exit__(None, None, None)
    assert active() == "none"


def test_plain_call_inside_another_modes_block(active):
    """Leaving that block pops the top of the stack, which must be the other mode."""

    class Other(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    with Other():
        override = override_sdpa("cpu")
        assert active() == "cpu"
    assert [type(mode) for mode in torch.overrides._get_current_function_mode_stack()] != [Other]
    assert active() == "cpu"
    override.undo()


@pytest.mark.parametrize("device_first", [True, False])
def test_plain_call_and_default_device(active, device_first):
    try:
        if device_first:
            torch.set_default_device("cpu")
        override = override_sdpa("cpu")
        torch.set_default_device("meta")
        assert torch.empty(1).is_meta
        torch.set_default_device(None)
        assert active() == "cpu"
        assert not torch.empty(1).is_meta
        override.undo()
        assert active() == "none"
    finally:
        torch.set_default_device(None)


def test_decorator(active):
    @override_sdpa("cpu")
    def decorated(depth: int = 0) -> list[str | None]:
        """Doc."""
        return [active()] + (decorated(depth - 1) if depth else [])

    assert active() == "none"
    assert decorated(2) == ["cpu"] * 3
    assert active() == "none"
    assert (decorated.__name__, decorated.__doc__) == ("decorated", "Doc.")
    found = []
    thread = threading.Thread(target=lambda: found.append((decorated(), active())))
    thread.start()
    thread.join()
    assert found == [(["cpu"], "none")]


def test_threads_have_their_own(active, monkeypatch):
    """A plain call holds in its thread only, and undo ends the calling thread's effect only."""
    override, found = override_sdpa("cpu"), []

    def work() -> None:
        found.append(torch._C._len_torch_function_stack())
        override.undo()
        with override:
            found.append(torch._C._len_torch_function_stack())
        own = override_sdpa("reference")
        found.append(torch._C._len_torch_function_stack())
        own.undo()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [0, 1, 1]
    assert active() == "cpu"
    override.undo()


def test_copies_are_objects_of_their_own(active):
    override = override_sdpa("cpu")
    copied = copy.deepcopy(override)
    copied.undo()
    assert active() == "cpu"
    override.undo()
    assert active() == "none"


def test_a_wrong_backend_changes_nothing(active):
    with pytest.raises(ValueError, match="backend must be one of"):
        override_sdpa("fast")
    with pytest.raises(TypeError, match="backend must be a string or None, got function"):
        override_sdpa(lambda: None)
    assert active() == "none"


def attend(q: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, q, q)


def test_plain_call_before_compiled_code():
    q = torch.randn(1, 2, 3, 4)
    want = attend(q)
    function, found = compile_and_watch(attend, fullgraph=True)
    override = override_sdpa()
    torch.testing.assert_close(function(q), want)
    override.undo()
    torch.testing.assert_close(function(q), want)
    assert ["fastattn" in code for code in found] == [True, False]


def test_block_and_pair_of_calls_inside_compiled_code():
    def block(q: Tensor) -> Tensor:
        with override_sdpa():
            return attend(q)

    def pair(q: Tensor) -> Tensor:
        override = override_sdpa()
        out = attend(q)
        override.undo()
        return out

    @override_sdpa()
    def decorated(q: Tensor) -> Tensor:
        return attend(q)

    q = torch.randn(1, 2, 3, 4)
    want = attend(q)
    for function in (block, pair, decorated):
        run, found = compile_and_watch(function, fullgraph=True)
        torch.testing.assert_close(run(q), want)
        assert len(found) == 1
        assert "fastattn" in found[0]
        assert torch._C._len_torch_function_stack() == 0
