"""`patch`: each attention of a model runs on ours, by the route that its library has for it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType, TracebackType

from torch import nn

from fastattn.integrations.handwritten.swap import is_swapped, notes_of, stock_of
from fastattn.integrations.routes import ROUTES, WRITTEN_OUT, Work, lock

NO_PRODUCT = "it called no product of queries and keys that is known as one"


@dataclass(frozen=True)
class Patch:
    """What `patch` did; as a context manager it undoes it at the end of the block.

    Attributes:
        replaced: name of each module whose attention is ours now, "" for the model itself, and how.
        left: name of each module that is as it was, and why.
    """

    replaced: Mapping[str, str]
    left: Mapping[str, str]
    _modules: Mapping[str, nn.Module] = field(repr=False, compare=False)
    _undo: list[Callable[[], bool]] = field(repr=False, compare=False)

    def undo(self) -> None:
        """Make the modules what they were, with the weights they have now; a second time nothing happens.

        Patches of one model may be undone in any order: each gives back what it took. Copies made in between
        stay as they are. A module that got another class since (by a parametrization, say) is left, with a
        warning.
        """
        with lock:
            rest = []
            while self._undo:
                undo = self._undo.pop()
                if not undo():
                    rest.append(undo)
            self._undo.extend(reversed(rest))

    def __enter__(self) -> Patch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()

    def __str__(self) -> str:
        """A table: kinds of modules with their routes; once the model has run, what did not fuse in fact."""
        lines = [f"replaced {len(self.replaced)}, left {len(self.left)} as they were"]
        for title, entries in (("", self._as_run()), ("left, ", self.left)):
            groups: dict[tuple[str, str], list[str]] = defaultdict(list)
            for name, text in entries.items():
                kind = stock_of(self._modules[name]).__name__
                groups[kind, text].append(name or "(the model itself)")
            for (kind, text), names in groups.items():
                lines.append(f"  {len(names)} {kind}: {title}{text}")
                lines.append(f"    {names[0]}" + (f" ... {names[-1]}" if len(names) > 1 else ""))
        return "\n".join(lines)

    def _as_run(self) -> dict[str, str]:
        """`replaced`, with what the calls so far have shown of attention that is written out."""
        found = dict(self.replaced)
        for name, how in self.replaced.items():
            module = self._modules[name]
            if how != WRITTEN_OUT or not is_swapped(module):
                continue
            notes = notes_of(module)
            if notes.fused or not notes.runs:
                continue
            # The products of other things are scores as well, for all that is known of them.
            functions = notes.weights or notes.scores
            what = "weights" if notes.weights else "scores"
            why = f"its {what} went into {', '.join(sorted(functions))}" if functions else NO_PRODUCT
            found[name] = f"computed as written so far, for {why}"
        return found


def patch(model: nn.Module, *, skip: Iterable[str] = ()) -> Patch:
    """Run each attention of `model` on fastattn, in place, by the route that fits its module.

    >>> encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2)
    >>> print(patch(encoder))
    replaced 2, left 0 as they were
      2 MultiheadAttention: became fastattn.nn.MultiheadAttention
        layers.0.self_attn ... layers.1.self_attn

    Routes: transformers' attention interface; diffusers' attention processors; `replace_modules` for
    nn.MultiheadAttention; `override_sdpa` around the forward of a module that calls
    F.scaled_dot_product_attention; and modules that write attention out, as a product, a softmax and a
    product, in timm, transformers or code of your own, are read as they run and those three become one call.
    Objects, parameters, state dicts, hooks and class names stay what they were.

    Args:
        model: changed in place, for all threads.
        skip: names of modules to leave with all that is in them, as in model.named_modules(); * and ? as in a
            shell.
    Returns:
        The report, to be printed, and undone by undo(); `with fastattn.patch(model):` does so by itself.
    Raises:
        TypeError: `model` is not a module, or `skip` is not a collection of strings.
        ValueError: `skip` has a name that no module has.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if isinstance(skip, str):
        raise TypeError(f"skip must be a collection of names, got the one string {skip!r}")
    if not isinstance(skip, Iterable):
        raise TypeError(f"skip must be a collection of names, got a {type(skip).__name__}")
    names = tuple(skip)
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"skip must hold names, got {name!r}")
    with lock:
        work = Work(model, names)
        for route in ROUTES:
            route(work)
    replaced, left = (
        MappingProxyType({name: found[name] for name in work.modules if name in found})
        for found in (work.replaced, work.left)
    )
    return Patch(replaced, left, work.modules, work.undo)
