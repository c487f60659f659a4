"""fastattn.patch: undone in any order, and after other changes."""

from __future__ import annotations

import pytest
import torch
from patch_models import (
    HEADS,
    Calls,
    E,
    new_model,
)
from torch import nn
from torch.nn.utils import parametrize

import fastattn
import fastattn.nn
from fastattn.integrations.handwritten.swap import is_swapped
from fastattn.integrations.torch import replace_modules

pytestmark = pytest.mark.usefixtures("native", "one_thread")


def test_twice_and_out_of_order():
    model = new_model()
    first = fastattn.patch(model)
    second = fastattn.patch(model)
    assert set(second.left.values()) == {"it is fastattn's already"}
    assert (list(second.replaced), list(second.left)) == ([], list(first.replaced))
    second.undo()
    assert is_swapped(model[1])
    first.undo()
    third = fastattn.patch(model)
    assert third.replaced == first.replaced
    first.undo()
    second.undo()
    assert is_swapped(model[1])
    assert type(model[0].self_attn) is fastattn.nn.MultiheadAttention
    third.undo()
    assert not is_swapped(model[1])
    assert type(model[0].self_attn) is nn.MultiheadAttention


def test_parts_first():
    """A patch of a part keeps what it took from one of the whole, in either order of undoing."""
    model = new_model()
    part = fastattn.patch(model[1])
    whole = fastattn.patch(model)
    assert list(part.replaced) == [""]
    assert whole.left == {"1": "it is fastattn's already"}
    whole.undo()
    assert [is_swapped(module) for module in model] == [False, True, False, False, False]
    part.undo()
    assert not is_swapped(model[1])


def test_undone_where_the_block_ends():
    model = new_model()
    with pytest.raises(KeyError), fastattn.patch(model) as report:
        assert is_swapped(model[1])
        assert report.replaced
        raise KeyError
    assert not is_swapped(model[1])
    report.undo()


def test_after_another_change_of_class():
    model = nn.Sequential(Calls(), nn.MultiheadAttention(E, HEADS))
    report = fastattn.patch(model)
    for module, name in ((model[0].qkv, "weight"), (model[0], "note"), (model[1], "in_proj_weight")):
        if name == "note":
            module.note = nn.Parameter(torch.ones(1))
        parametrize.register_parametrization(module, name, nn.Identity())
    with pytest.warns(UserWarning, match="has become a Parametrized.* since and is left so"):
        report.undo()
    for module, name in ((model[0], "note"), (model[1], "in_proj_weight")):
        parametrize.remove_parametrizations(module, name)
    report.undo()
    assert [type(module) for module in model] == [Calls, nn.MultiheadAttention]


def test_after_replace_modules():
    """Each gives back its own."""
    model = new_model()
    inner = replace_modules(model)
    report = fastattn.patch(model)
    assert report.left == {"0.self_attn": "it is fastattn's already"}
    inner.undo()
    report.undo()
    assert type(model[0].self_attn) is nn.MultiheadAttention
    assert not is_swapped(model[1])


def test_modules_with_two_names():
    shared = Calls()
    model = nn.ModuleDict({"a": shared, "b": shared})
    report = fastattn.patch(model)
    assert list(report.replaced) == ["a", "b"]
    report.undo()
    assert not is_swapped(shared)
