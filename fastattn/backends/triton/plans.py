"""Calls like one before them, whose launches are known but for the addresses.

What a kernel is given follows from shapes, strides, dtypes and numbers. The first call of a kind goes the
long way and leaves a plan; those after it allocate, read addresses and launch: docs/decisions/0033.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastattn.backends.common import device_of
from fastattn.backends.triton import descriptors
from fastattn.backends.triton.launch import Programs, grid_of, tf32_allowed
from fastattn.lowering import NO_OPERANDS, Operands, Params

ALIGNMENT = 16  # bytes; Triton compiles another kernel for an address that is no multiple of it
LIMIT = 1024  # plans of a kind, after which all are forgotten: growing lengths leave one behind each

Addresses = list[int]
Filler = Callable[[Addresses], Any]


class Launched(NamedTuple):
    """A launch that was made."""

    programs: Programs
    compiled: Any  # triton's CompiledKernel
    args: list[Any]  # one for each of the kernel's parameters, constants included


class Asked(NamedTuple):
    """A call as plans see it.

    Args:
        key: what its launches depend on.
        tensors: q, all others that it is given, and its operands where it has any; None = absent.
        addresses: of those tensors.
    """

    key: Hashable
    tensors: Sequence[Any]
    addresses: Addresses

    def distinct(self) -> list[Any]:
        """The tensors, none of them twice: a plan tells them apart by identity. One call has k as v, and
        another of the same key may not."""
        seen: set[int] = set()
        result = []
        for t in self.tensors:
            result.append(t.detach() if t is not None and id(t) in seen else t)
            seen.add(id(t))
        return result


def describe(
    q: Tensor, others: Sequence[Tensor | None], operands: Operands, params: Params, *options: Hashable
) -> Asked:
    """What a call of the kernels asks for.

    Args:
        options: what its launches depend on beside tensors and params.
    """
    tensors = (q, *others) if operands is NO_OPERANDS else (q, *others, *operands)
    addresses: Addresses = []
    parts: list[Hashable] = []
    for t in tensors:
        if t is None:
            addresses.append(0)
            parts.append(None)
        else:
            address = t.data_ptr()
            addresses.append(address)
            # A lazy zero tensor has no address, a negated view not its values: both are copied, the long way.
            parts += (t.shape, t.stride(), t.dtype, address % ALIGNMENT, address == 0, t.is_neg())
    tf32 = q.dtype is torch.float32 and tf32_allowed()
    return Asked((params, q.device, tf32, descriptors.ASKED, *options, *parts), tensors, addresses)


class Plan:
    """The launches of a call, for tensors that are given by address.

    Args:
        launched: what the call launched.
        given: its tensors, in the order in which `run` will be given their addresses.
        made: those that it allocated, whose addresses follow.
    Raises:
        KeyError: a kernel was given a tensor that is neither given nor made.
    """

    def __init__(
        self, launched: Sequence[Launched], given: Sequence[Tensor | None], made: Sequence[Tensor | None]
    ) -> None:
        slots = {id(tensor): slot for slot, tensor in enumerate([*given, *made])}
        self._made = [None if t is None else (t.shape, t.stride(), t.dtype) for t in made]
        self._launches = []
        for programs, compiled, args in launched:
            fillers = [_filler(value, slots) for value in args]
            holes = [(at, filler) for at, filler in enumerate(fillers) if filler is not None]
            fixed = [value if filler is None else None for value, filler in zip(args, fillers, strict=True)]
            grid = (*grid_of(programs), 1, 1)[:3]
            self._launches.append((compiled[grid], fixed, holes))

    def run(self, like: Tensor, addresses: Addresses) -> list[Any] | None:
        """Allocate on the device of `like` what the call made, and launch; what was allocated.

        None where nothing was launched, because an allocation is not aligned as PyTorch's own always are.
        """
        made = [None if m is None else like.new_empty_strided(m[0], m[1], dtype=m[2]) for m in self._made]
        new = [0 if t is None else t.data_ptr() for t in made]
        if any(address % ALIGNMENT for address in new):
            return None
        addresses = addresses + new
        with device_of(like):
            for launch, fixed, holes in self._launches:
                args = fixed.copy()
                for at, filler in holes:
                    args[at] = filler(addresses)
                launch(*args)
        return made


def _filler(value: Any, slots: dict[int, int]) -> Filler | None:
    """From addresses to the value, with addresses for tensors; None where it holds no tensor."""
    if isinstance(value, Tensor):
        return itemgetter(slots[id(value)])
    if descriptors.is_descriptor(value):
        slot, form = slots[id(value.base)], descriptors.moved(value, 0)
        return lambda addresses: descriptors.moved(form, addresses[slot])
    if not isinstance(value, tuple):
        return None
    fillers = [_filler(item, slots) for item in value]
    if not any(fillers):
        return None
    if isinstance(value[0], Tensor) and not any(fillers[1:]):  # a tensor's Rows: nearly all that there is
        first, rest = slots[id(value[0])], tuple(value[1:])
        return lambda addresses: (addresses[first], *rest)
    parts = [(filler, None if filler else item) for filler, item in zip(fillers, value, strict=True)]
    return lambda addresses: tuple([filler(addresses) if filler else item for filler, item in parts])


class Plans:
    """Plans by what they depend on."""

    def __init__(self) -> None:
        self._plans: dict[Hashable, Plan | None] = {}

    def run(self, asked: Asked) -> list[Any] | None:
        """What a call like one before it allocates and its kernels fill; None where it goes the long way."""
        plan = self._plans.get(asked.key)
        return None if plan is None else plan.run(asked.tensors[0], asked.addresses)

    def learn(
        self,
        asked: Asked,
        given: Sequence[Tensor | None],
        made: Sequence[Tensor | None],
        launched: Sequence[Launched],
    ) -> None:
        """Keep the launches of a call; not where it copied a tensor first, as those after it would.

        Args:
            given: what the call read, in the order of `asked.tensors`.
        """
        if asked.key in self._plans or not launched:
            return
        if len(self._plans) >= LIMIT:
            self._plans.clear()
        try:
            self._plans[asked.key] = Plan(launched, given, made)
        except KeyError:
            self._plans[asked.key] = None


FORWARD = Plans()
BACKWARD = Plans()
