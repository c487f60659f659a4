"""replace_modules: the report, and undoing in any order, from any thread, of copies and files."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
import threading
from dataclasses import FrozenInstanceError

import pytest
import torch
from patch_support import rand
from replace_modules_support import NAMES, OURS, TORCHS, B, Doubled, E, L, S, new_model, padding, types
from torch import nn
from torch.nn.utils import parametrize

import fastattn.nn
from fastattn.integrations.torch import replace_modules

pytestmark = [
    pytest.mark.usefixtures("native", "one_thread"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors"),
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True"),
]


def test_report_is_frozen():
    report = replace_modules(new_model())
    assert report.replaced == NAMES
    with pytest.raises(FrozenInstanceError):
        report.replaced = ()
    with pytest.raises(TypeError):
        report.left["x"] = "y"
    assert str(report).splitlines() == ["replaced 3, left 0 as they were", *(f"  {name}" for name in NAMES)]


def test_undo_twice_and_after_another():
    model = new_model()
    first = replace_modules(model)
    first.undo()
    second = replace_modules(model)
    first.undo()
    assert types(model) == OURS
    second.undo()
    assert types(model) == TORCHS


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_nested_reports_undone_in_any_order(order):
    """Each gives back what it took, however they overlap."""
    model = new_model()
    reports = [replace_modules(model.encoder), replace_modules(model), replace_modules(model)]
    assert [len(report.replaced) for report in reports] == [1, 2, 0]
    assert [len(report.left) for report in reports] == [0, 1, 3]
    taken = [{NAMES[0]}, {NAMES[1], NAMES[2]}, set()]
    left = set(NAMES)
    for index in order:
        reports[index].undo()
        left -= taken[index]
        want = [fastattn.nn.MultiheadAttention if n in left else nn.MultiheadAttention for n in NAMES]
        assert types(model) == want
        model.eval()(rand(B, L, E), rand(B, S, E), src_key_padding_mask=padding(B, L, 2))


def test_block_ends_with_an_exception():
    model = new_model()
    with pytest.raises(KeyError), replace_modules(model):
        assert types(model) == OURS
        raise KeyError
    assert types(model) == TORCHS


def test_undo_after_another_change_of_class():
    model = new_model()
    report = replace_modules(model)
    attention = model.encoder.layers[0].self_attn
    parametrize.register_parametrization(attention, "in_proj_weight", Doubled())
    with pytest.warns(UserWarning, match="has become a ParametrizedMultiheadAttention since"):
        report.undo()
    assert types(model)[1:] == TORCHS[1:]
    parametrize.remove_parametrizations(attention, "in_proj_weight")
    report.undo()
    assert types(model) == TORCHS


def test_copies_pickles_and_files(tmp_path):
    """They are ours and work; undoing the original leaves them so."""
    model = new_model()
    report = replace_modules(model)
    torch.save(model, tmp_path / "model.pt")
    copies = [
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(tmp_path / "model.pt", weights_only=False),
    ]
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    model.load_state_dict(torch.load(buffer, weights_only=True))
    x, y = rand(B, L, E), rand(B, S, E)
    want = model(x, y)
    report.undo()
    assert types(model) == TORCHS
    for copied in copies:
        assert types(copied) == OURS
        assert torch.equal(copied(x, y), want)


def test_threads_with_models_of_their_own_and_one_shared():
    shared, failures = new_model(), []
    barrier = threading.Barrier(4, timeout=60)

    def work() -> None:
        try:
            model, x, y = new_model(), rand(B, L, E), rand(B, S, E)
            barrier.wait()
            for _ in range(20):
                with replace_modules(model):
                    assert types(model) == OURS
                    model(x, y)
                assert types(model) == TORCHS
                with replace_modules(shared):
                    pass
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert types(shared) == TORCHS
