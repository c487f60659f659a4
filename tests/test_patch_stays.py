"""fastattn.patch: what a patched model goes on doing: copies, threads, checkpoints, compilation."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from patch_models import (
    Calls,
    WritesOut,
    X,
    assert_same,
    new_model,
    outcome,
)
from patch_support import compile_and_watch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastattn
import fastattn.nn
from fastattn.integrations.handwritten.swap import is_swapped, notes_of
from fastattn.integrations.torch import override_sdpa

pytestmark = pytest.mark.usefixtures("native", "one_thread")


def test_objects_stay():
    """Parameters, names, hooks, class names and isinstance."""
    model, seen = new_model(), []
    model[1].register_forward_hook(lambda *args: seen.append("forward"))
    model[3].register_full_backward_hook(lambda *args: seen.append("backward"))
    parameters, names = dict(model.named_parameters()), [type(m).__name__ for m in model.modules()]
    text = str(model[1:])
    fastattn.patch(model)
    assert list(model.named_parameters()) == list(parameters.items())
    assert [type(m).__name__ for m in model.modules()] == names
    assert str(model[1:]) == text
    assert isinstance(model[1], Calls)
    outcome(model, X)
    assert seen == ["forward", "backward"]


def test_state_dicts_both_ways():
    ours, theirs = new_model(), new_model()
    fastattn.patch(ours)
    for parameter in ours.parameters():
        nn.init.normal_(parameter, std=0.3)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    assert_same([ours(X)], [theirs(X)])
    ours.load_state_dict(theirs.state_dict(), strict=True)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_stay_patched(how):
    """And are their own: undoing the original leaves them."""
    model = new_model()
    want = model(X)
    report = fastattn.patch(model)
    if how == "deepcopy":
        other = copy.deepcopy(model)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    report.undo()
    assert [is_swapped(module) for module in other] == [False, True, True, True, True]
    assert type(other[0].self_attn) is fastattn.nn.MultiheadAttention
    assert_same([other(X)], [want])
    assert notes_of(other[3]).fused == 1
    assert fastattn.patch(other).left["1"] == "it is fastattn's already"


def test_in_other_threads():
    model, found = new_model(), []
    want = model(X)
    fastattn.patch(model)
    threads = [threading.Thread(target=lambda: found.append(model(X).detach())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert_same(found, [want] * 4)


def test_checkpointing_runs_ours_again(calls):
    """In backward, outside of every block of ours, the forward is run once more by the same kernels."""
    model = new_model()
    want = outcome(model, X)

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.model, x, use_reentrant=False)

    fastattn.patch(model)
    assert_same(outcome(Checkpointed(), X), want)
    assert len(calls) == 4


def test_dropout_and_autocast():
    class Drops(WritesOut):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.heads(x)
            weights = F.dropout(self.attend(q @ k.mT), 0.5, self.training)
            return self.merge(weights @ v)

    model = Drops()
    fastattn.patch(model)
    torch.manual_seed(1)
    first = model(X)
    assert not torch.equal(model(X), first)
    torch.manual_seed(1)
    assert torch.equal(model(X), first)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(X)
    assert out.dtype == torch.bfloat16
    assert notes_of(model).fused == 4


def test_compiled():
    """Calls are ours in the graph; what is written out is left to the compiler; undoing is noticed."""
    model = nn.Sequential(Calls(), WritesOut())
    compiled, graphs = compile_and_watch(model, fullgraph=True)
    want = model(X)
    with fastattn.patch(model):
        assert_same([compiled(X)], [want])
    assert_same([compiled(X)], [want])
    assert ["fastattn" in graph for graph in graphs] == [True, False]
    torch._dynamo.reset()


def test_under_torch_func():
    model = WritesOut()
    parameters = dict(model.named_parameters())

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(model, parameters, (x,)).square().sum()

    want = torch.func.grad(loss)(parameters, X)
    fastattn.patch(model)
    assert_same(list(torch.func.grad(loss)(parameters, X).values()), list(want.values()))


def test_under_override_sdpa(calls):
    model = new_model()
    want = outcome(model, X)
    with fastattn.patch(model), override_sdpa():
        assert_same(outcome(model, X), want)
    assert len(calls) == 2


def test_import_stays_quick():
    """Neither fastattn nor patch bring a library in that the program does not use."""
    code = (
        "import sys, torch, fastattn; fastattn.patch(torch.nn.Linear(1, 1)); "
        "print({'transformers', 'diffusers', 'timm', 'triton', 'matplotlib'} & set(sys.modules))"
    )
    root = Path(fastattn.__file__).parent.parent
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=root)
    assert out.stdout.strip() == "set()"
