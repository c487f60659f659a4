"""Libraries that are missing or older than our integrations know: what is said, and what goes on."""

from __future__ import annotations

import importlib
import sys
from types import SimpleNamespace

import pytest
from torch import Tensor, nn

import fastattn
import fastattn.integrations

NEEDS = {"transformers": ("5.16", "hf"), "diffusers": ("0.32", "diffusers")}
ALL_ATTENTION_FUNCTIONS: dict[str, object] = {}  # the name by which code of transformers is known


@pytest.fixture
def found(monkeypatch):
    """Lets a library be found in another version, None = missing, and our part for it not be loaded yet."""

    def find(library: str, version: str | None, **parts: object) -> None:
        for name in list(sys.modules):
            if f"{name}.".startswith((f"fastattn.integrations.{library}.", f"{library}.")):
                monkeypatch.delitem(sys.modules, name)
        monkeypatch.delattr(fastattn.integrations, library, raising=False)
        is_there = version is not None
        monkeypatch.setitem(sys.modules, library, SimpleNamespace(__version__=version) if is_there else None)
        for name, part in parts.items():
            monkeypatch.setitem(sys.modules, f"{library}.{name}", part)

    return find


@pytest.mark.parametrize("version", [None, "0.31.9", "0.9", "0.31rc1"])
@pytest.mark.parametrize("library", NEEDS)
def test_what_to_install(found, library, version):
    least, extra = NEEDS[library]
    found(library, version)
    got = r" \(.*None in sys.modules\)" if version is None else f", got {version}"
    said = rf"^fastattn\.integrations\.{library} needs {library} {least} or newer{got}; run: pip install "
    with pytest.raises(ImportError, match=rf"{said}'fastattn\[{extra}\]'$"):
        importlib.import_module(f"fastattn.integrations.{library}")


def test_a_bare_folder_is_no_library(found, tmp_path, monkeypatch):
    found("transformers", None)
    monkeypatch.delitem(sys.modules, "transformers")
    (tmp_path / "transformers").mkdir()
    monkeypatch.setattr(
        sys, "path", [str(tmp_path), *(p for p in sys.path if not p.endswith("site-packages"))]
    )
    with pytest.raises(
        ImportError, match=r"needs transformers 5\.16 or newer, got a module without a version"
    ):
        importlib.import_module("fastattn.integrations.transformers")


class Model(nn.Module):
    """Of an old transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.rest = Attention(), nn.Linear(2, 2)


class Attention(nn.Module):
    def forward(self, x: Tensor) -> object:
        return ALL_ATTENTION_FUNCTIONS["eager"]


def test_other_models_are_patched_beside_an_old_transformers(found):
    found("transformers", "4.57.1", modeling_utils=SimpleNamespace(PreTrainedModel=Model))
    other = nn.TransformerEncoderLayer(4, 2, 4)
    assert len(fastattn.patch(other).replaced) == 1
    report = fastattn.patch(nn.ModuleDict({"old": Model(), "other": nn.TransformerEncoderLayer(4, 2, 4)}))
    assert list(report.replaced) == ["other.self_attn"]
    assert list(report.left) == ["old.attention"]
    assert "needs transformers 5.16 or newer, got 4.57.1; run" in report.left["old.attention"]


def test_other_models_are_patched_beside_an_old_diffusers(found):
    processor = type("AttnProcessor2_0", (), {"__module__": "diffusers.models", "__call__": None})()
    found("diffusers", "0.31.0", **{"models.attention_processor": SimpleNamespace()})
    model = nn.ModuleDict({"old": nn.Module(), "other": nn.TransformerEncoderLayer(4, 2, 4)})
    model["old"].processor = processor
    report = fastattn.patch(model)
    assert list(report.replaced) == ["other.self_attn"]
    assert "needs diffusers 0.32 or newer, got 0.31.0; run" in report.left["old"]
