"""timm for the tests, with or without a torchvision that fits this torch."""

from __future__ import annotations

import importlib.util
import sys
import types

import pytest


class _Name(type):
    """Stands for a class or an enumeration, whose members are their names."""

    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return name


class _Module(types.ModuleType):
    """Has whatever class is asked of it."""

    __path__ = ()

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Name(name, (), {"__init__": lambda self, *args, **kwargs: None})


_MODULES = (
    "torchvision",
    "torchvision.datasets",
    "torchvision.models",
    "torchvision.models.feature_extraction",
    "torchvision.ops",
    "torchvision.ops.misc",
    "torchvision.transforms",
    "torchvision.transforms.functional",
    "torchvision.utils",
)


def import_timm() -> types.ModuleType:
    """timm; without torchvision, with empty stand-ins for it while timm is imported.

    timm wants torchvision for its data pipelines, which models do not touch, and torchvision only works as a
    build for the very torch that is installed, which pip cannot know.
    """
    if importlib.util.find_spec("timm") is None:
        pytest.skip("timm is not installed", allow_module_level=True)
    if "timm" not in sys.modules and importlib.util.find_spec("torchvision") is None:
        stand_ins = {name: _Module(name) for name in _MODULES}
        for name, module in stand_ins.items():
            parent, _, child = name.rpartition(".")
            if parent:
                setattr(stand_ins[parent], child, module)
        sys.modules.update(stand_ins)
        try:
            import timm
        finally:
            for name in stand_ins:
                del sys.modules[name]
    import timm

    return timm
