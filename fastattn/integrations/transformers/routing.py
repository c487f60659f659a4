"""How `fastattn.patch` moves a model of transformers onto the attention interface, and back."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from fastattn.integrations.handwritten.scan import style
from fastattn.integrations.transformers.registration import NAME, register


def is_model(module: nn.Module) -> bool:
    return isinstance(module, PreTrainedModel)


def is_on_interface(module: nn.Module) -> bool:
    """Whether a module looks its attention function up in transformers' table, by its config."""
    is_part = not is_model(module) and style(module) == "interface"
    return is_part and hasattr(getattr(module, "config", None), "_attn_implementation")


def is_ours(module: Any) -> bool:
    return module.config._attn_implementation == NAME


def shares_mask(module: nn.Module) -> bool:
    """Whether a module off the interface takes a mask, which its model makes as the interface wants it."""
    is_off = not is_model(module) and style(module) in ("written out", "call", "opaque", "scripted")
    return is_off and any("mask" in name for name in inspect.signature(module.forward).parameters)


def set_implementation(model: Any, wanted: set[int]) -> tuple[Callable[[], None], str]:
    """Set attn_implementation="fastattn" on a model and the models in it.

    Args:
        wanted: ids of the configs to set it on; masks that are made by other configs stay what they are.
    Returns:
        What undoes it, and why modules that do not read "fastattn" after it do not.
    """
    register()
    before = [(config, config._attn_implementation) for config in _configs(model)]
    reason = f"{type(model).__name__} does not let the attention implementation of this part be set"
    try:
        model.set_attn_implementation(NAME)
    except (ValueError, ImportError) as error:
        reason = str(error)
    # Outermost first, here and below: setting a config's implementation sets those of its parts too.
    after = [(config, config._attn_implementation) for config, _ in before]
    for (config, ours), (_, theirs) in zip(after, before, strict=True):
        config._attn_implementation = ours if id(config) in wanted else theirs
    model._fastattn = Registered()

    def undo() -> None:
        # What was set since is not ours to take back.
        present = [config._attn_implementation for config, _ in before]
        for (config, theirs), now in zip(before, present, strict=True):
            config._attn_implementation = theirs if now == NAME else now
        vars(model).pop("_fastattn", None)

    return undo, reason


class Registered:
    """Left on a model, so that one which torch.save wrote finds its attention where torch.load reads it."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _registered, ()


def _registered() -> Registered:
    register()
    return Registered()


def _configs(model: Any) -> Iterator[Any]:
    """The configs of a model, of its parts and of the models in it, each once, outermost first."""
    seen: set[int] = set()
    found = [module.config for module in model.modules() if isinstance(module, PreTrainedModel)]
    while found:
        config = found.pop(0)
        if id(config) in seen:
            continue
        seen.add(id(config))
        yield config
        found += [part for key in config.sub_configs if (part := getattr(config, key, None)) is not None]
