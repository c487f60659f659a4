"""The ways by which `patch` brings a module's attention to ours; each takes what those before left open."""

from __future__ import annotations

import fnmatch
import re
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from fastattn.integrations.handwritten.scan import attends_in_script, style
from fastattn.integrations.handwritten.swap import is_ours, is_swapped, stock_of, swap, swap_back
from fastattn.integrations.off_interface import LEFT as LEFT_IN_TRANSFORMERS
from fastattn.integrations.off_interface import WRITTEN_OUT as WRITTEN_OUT_IN_TRANSFORMERS
from fastattn.integrations.timm import LEFT as LEFT_IN_TIMM
from fastattn.integrations.torch import replace_modules
from fastattn.nn import MultiheadAttention

MODULE = "became fastattn.nn.MultiheadAttention"
INTERFACE = 'attn_implementation="fastattn"'
PROCESSOR = "its attention processor is fastattn's"
CALL = "its scaled_dot_product_attention is fastattn's"
WRITTEN_OUT = "its product, softmax and product are one call of fastattn"
ALREADY = "it is fastattn's already"
SHARED_MASK = "its model hands the same mask to modules that are not on the attention interface"
OPAQUE = (
    "a function with a gradient of its own, or one that TorchScript has compiled, may stand between its "
    "product and its softmax"
)
SCRIPTED = "it is compiled by TorchScript"
OF_A_MODEL = (
    "it is on transformers' attention interface, one switch for a whole model: patch the model that it is in"
)
NOT_FOUND = (
    "no attention found in its code: neither a call of F.scaled_dot_product_attention nor a product, a "
    "softmax and a product"
)

lock = threading.RLock()
_owners: WeakKeyDictionary[nn.Module, object] = WeakKeyDictionary()  # the key of the Work that holds a module


class Work:
    """One call of `patch`: the modules of its model by all their names, and what became of them so far."""

    def __init__(self, model: nn.Module, skip: tuple[str, ...]) -> None:
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.replaced: dict[str, str] = {}
        self.left: dict[str, str] = {}
        self.undo: list[Callable[[], bool]] = []
        self._key = object()
        for pattern in skip:
            named = fnmatch.filter(self.modules, pattern) + fnmatch.filter(self.modules, f"{pattern}.*")
            if not named:
                raise ValueError(
                    f"skip must hold names of modules of the model, got {pattern!r}: it has none"
                )
            for name in named:
                module = self.modules[name]
                if isinstance(module, nn.MultiheadAttention) or style(module) is not None:
                    self.left[name] = f"skip has {pattern!r}"

    def open(self) -> Iterator[tuple[str, nn.Module]]:
        """The modules that no route has decided on."""
        for name, module in self.modules.items():
            if name not in self.replaced and name not in self.left:
                yield name, module

    def holds(self, module: nn.Module) -> bool:
        """Whether this patch has replaced the module, under another name then."""
        return _owners.get(module) is self._key

    def hold(self, module: nn.Module, give_back: Callable[[], None]) -> None:
        """Undo by `give_back`, if the module is then still held by this patch."""
        _owners[module] = key = self._key

        def undo() -> bool:
            """Whether there is nothing left to undo."""
            if _owners.get(module) is not key:
                return True
            if _is_derived(module):
                warnings.warn(
                    f"a module that fastattn patched has become a {type(module).__qualname__} since and is "
                    "left so: undo that change first, then call undo() again",
                    stacklevel=3,
                )
                return False
            del _owners[module]
            give_back()
            return True

        self.undo.append(undo)


def _is_derived(module: nn.Module) -> bool:
    """Whether the class that we gave a module is now a base of its class, as a parametrization leaves it."""
    return any(base is MultiheadAttention or is_ours(base) for base in type(module).__mro__[1:])


def _replace_modules(work: Work) -> None:
    """torch's own module."""
    for name, module in work.open():
        if work.holds(module):
            work.replaced[name] = MODULE
            continue
        report = replace_modules(module) if _is_multihead(module) else None
        if report is not None and "" in report.replaced:
            work.replaced[name] = MODULE
            work.hold(module, report.undo)
        elif report is not None and "" in report.left:
            work.left[name] = report.left[""]


def _is_multihead(module: nn.Module) -> bool:
    return isinstance(module, nn.MultiheadAttention | torch.jit.ScriptModule)


def _set_interface(work: Work) -> None:
    """The outermost models of transformers that are in the model."""
    # Asked without our part for transformers, which an older version than it knows does not let in.
    kind = getattr(sys.modules.get("transformers.modeling_utils"), "PreTrainedModel", None)
    if kind is None or not any(isinstance(module, kind) for module in work.modules.values()):
        return
    try:
        from fastattn.integrations.transformers import routing
    except ImportError as error:
        for name, module in work.open():
            if style(module) == "interface" and not isinstance(module, kind):
                work.left[name] = str(error)
        return

    done: list[str] = []
    for root, model in work.modules.items():
        if not routing.is_model(model) or any(_is_inside(root, other) for other in done):
            continue
        done.append(root)
        inside = [name for name in work.modules if _is_inside(name, root)]
        names = []
        for name in inside:
            if routing.is_on_interface(work.modules[name]):
                reason = _known_reason(work.modules[name])
                if reason is None:
                    names.append(name)
                else:
                    work.left[name] = reason
        if names:
            _leave_shared_masks(work, inside, names)
            _set_one_interface(work, model, names)


def _leave_shared_masks(work: Work, inside: list[str], names: list[str]) -> None:
    """Leave modules whose model makes one mask for them and for others, which could not read ours."""
    from fastattn.integrations.transformers import routing

    models = [name for name in inside if routing.is_model(work.modules[name])]
    shared = set()
    for name in inside:
        if routing.shares_mask(work.modules[name]):
            nearest: Any = work.modules[max((m for m in models if _is_inside(name, m)), key=len)]
            shared.add(id(nearest.config))
    for name in names:
        module: Any = work.modules[name]
        if id(module.config) in shared and not routing.is_ours(module):
            work.left[name] = SHARED_MASK


def _set_one_interface(work: Work, model: Any, names: list[str]) -> None:
    from fastattn.integrations.transformers import routing

    ours = [name for name in names if routing.is_ours(work.modules[name])]
    if work.holds(model):
        work.replaced.update((name, INTERFACE) for name in ours)
        return
    work.left.update((name, ALREADY) for name in ours)
    names = [name for name in names if name not in ours]
    names = [name for name in names if work.left.get(name) != SHARED_MASK]
    skipped = [name for name in names if name in work.left]
    if skipped:
        reason = f"attn_implementation is one for the whole model, and skip names {skipped[0]}"
        work.left.update((name, reason) for name in names if name not in skipped)
    elif names:
        wanted = {id(work.modules[name].config) for name in names}
        give_back, reason = routing.set_implementation(model, wanted)
        for name in names:
            if routing.is_ours(work.modules[name]):
                work.replaced[name] = INTERFACE
            else:
                work.left[name] = reason
        work.hold(model, give_back)


def _is_inside(name: str, root: str) -> bool:
    return not root or name == root or name.startswith(f"{root}.")


def _set_processors(work: Work) -> None:
    """Attention modules of diffusers whose processor has one of ours beside it."""
    if "diffusers.models.attention_processor" not in sys.modules:
        return
    try:
        from fastattn.integrations import diffusers
    except ImportError as error:  # an older version
        for name, module in work.open():
            if type(getattr(module, "processor", None)).__module__.startswith("diffusers."):
                work.left[name] = str(error)
        return
    for name, module in work.open():
        before: Any = getattr(module, "processor", None)
        ours = diffusers.processor_for(module)
        if isinstance(before, diffusers.Processor):
            if work.holds(module):
                work.replaced[name] = PROCESSOR
            else:
                work.left[name] = ALREADY
        elif ours is not None:
            module.processor = ours
            work.replaced[name] = PROCESSOR
            work.hold(module, _processor_undo(module, ours, before))


def _processor_undo(module: Any, ours: Any, before: Any) -> Callable[[], None]:
    def undo() -> None:
        if module.processor is ours:
            module.processor = before

    return undo


def _swap(work: Work) -> None:
    """Modules whose forward calls PyTorch's function, or writes attention out."""
    for name, module in work.open():
        how = _how(module)
        if how is None:
            continue
        reason = None if work.holds(module) else _why_not(module)
        if reason is not None:
            work.left[name] = reason
            continue
        work.replaced[name] = how
        if not work.holds(module):
            swap(module)
            work.hold(module, _swap_undo(module))


def _how(module: nn.Module) -> str | None:
    """What swapping a module would do, whether or not it can be swapped; None where it does not attend."""
    if _is_of_transformers(module) and stock_of(module).__name__ in WRITTEN_OUT_IN_TRANSFORMERS:
        return WRITTEN_OUT
    found = style(module)
    if found in ("written out", "opaque", "scripted"):
        return WRITTEN_OUT
    # An attention module of diffusers calls a processor, which calls the function.
    return CALL if found == "call" or callable(getattr(module, "processor", None)) else None


def _is_of_transformers(module: nn.Module) -> bool:
    return stock_of(module).__module__.startswith("transformers.")


def _why_not(module: nn.Module) -> str | None:
    if is_swapped(module) or stock_of(module).__module__.startswith("fastattn."):
        return ALREADY
    if (reason := _known_reason(module)) is not None:
        return reason
    if "forward" in vars(module):
        return "its forward was replaced"
    if style(module) == "opaque":
        return OPAQUE
    if style(module) == "scripted":
        return "it attends in a function that is compiled by TorchScript"
    return None


def _known_reason(module: nn.Module) -> str | None:
    """Why a module that a table of ours names stays as it is."""
    kind = stock_of(module)
    if _is_of_transformers(module):
        return LEFT_IN_TRANSFORMERS.get(kind.__name__)
    return LEFT_IN_TIMM.get(f"{kind.__module__}.{kind.__qualname__}")


def _swap_undo(module: nn.Module) -> Callable[[], None]:
    def undo() -> None:
        if is_swapped(module):
            swap_back(module)

    return undo


def _name_the_rest(work: Work) -> None:
    """Modules that call themselves attention, and neither hold nor are in one that a route decided on."""
    for name, module in list(work.open()):
        reason = _known_reason(module)
        if reason is not None:
            work.left[name] = reason
    # The innermost first: of a compiled module nothing but what all in it computes can be told.
    scripts = [(name, m) for name, m in work.open() if isinstance(m, torch.jit.ScriptModule)]
    for name, module in reversed(scripts):
        if attends_in_script(module) and not any(_is_inside(other, name) for other in work.left):
            work.left[name] = SCRIPTED
    decided = [*work.replaced, *work.left]
    for name, module in list(work.open()):
        kind = getattr(module, "original_name", stock_of(module).__name__)
        if not re.search(r"(Attention|Attn)(?!\w*Output)", kind) or any(
            _is_inside(name, other) or _is_inside(other, name) for other in decided
        ):
            continue
        work.left[name] = _why_unknown(module)


def _why_unknown(module: nn.Module) -> str:
    if isinstance(module, torch.jit.ScriptModule):
        return SCRIPTED
    return OF_A_MODEL if style(module) == "interface" else NOT_FOUND  # its model is not here


ROUTES = (_replace_modules, _set_interface, _set_processors, _swap, _name_the_rest)
