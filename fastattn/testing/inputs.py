"""Seeded inputs of a case, in any dtype and layout."""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fastattn.spec import DISTANCE_SCORES, accumulate_dtype
from fastattn.testing.case import LAYOUTS, Case

FAR = 2048  # bytes: rows further apart than this take paths of their own on CPU
GUARD = 16  # elements around a sliced tensor, and beyond the end of a padded row


@dataclass(frozen=True)
class Inputs:
    """A case's tensors.

    Args:
        leaves: q, k, v and whichever of bias, slopes, table, sinks, w the case has.
        fixed: positional integer arguments: cu_seqlens_q and cu_seqlens_k, or lengths.
        mask: the `mask=` argument, or None.
        options: further keyword arguments.
        dout, dlse: gradients of the results.
    """

    case: Case
    leaves: dict[str, Tensor]
    fixed: tuple[Tensor, ...]
    mask: Any
    options: dict[str, Any]
    dout: Tensor
    dlse: Tensor

    def arguments(self) -> tuple[list[Tensor], dict[str, Any]]:
        """Positional and keyword arguments of the public function."""
        keywords = dict(self.options)
        if self.mask is not None:
            keywords["mask"] = self.mask
        if "sinks" in self.leaves:
            keywords["sinks"] = self.leaves["sinks"]
        if self.case.score != "dot":
            keywords |= {"score": self.case.score, "score_weights": self.leaves.get("w")}
        if self.case.bias is not None:
            keywords["bias"] = self.case.bias.build(self.leaves[self.case.bias.leaf])
        return [*(self.leaves[name] for name in ("q", "k", "v")), *self.fixed], keywords

    def to(self, dtype: torch.dtype) -> Inputs:
        """The same numbers, contiguous, in another dtype."""
        leaves = {name: leaf.detach().to(dtype) for name, leaf in self.leaves.items()}
        return replace(self, leaves=leaves, dout=self.dout.to(dtype), dlse=self.dlse.to(dtype))

    def on(self, device: torch.device | str) -> Inputs:
        """The same numbers on a device, with the same strides, offsets and what lies between the elements."""
        moved = partial(_moved, device=torch.device(device))
        return replace(
            self,
            leaves={name: moved(leaf) for name, leaf in self.leaves.items()},
            fixed=tuple(map(moved, self.fixed)),
            mask=pytree.tree_map_only(Tensor, moved, self.mask),
            options=pytree.tree_map_only(Tensor, moved, self.options),
            dout=moved(self.dout),
            dlse=moved(self.dlse),
        )

    def requiring_grad(self) -> Inputs:
        """The same tensors as leaves of a new graph."""
        fixed = {self.case.bias.leaf} if self.case.bias and not self.case.bias.requires_grad else set()
        leaves = {name: leaf.detach().requires_grad_(name not in fixed) for name, leaf in self.leaves.items()}
        return replace(self, leaves=leaves)


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    """A view of a copy of all the memory that `tensor` is a view of."""
    tensor = tensor.detach()
    whole = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
    return whole.to(device, copy=True).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def lay_out(x: Tensor, layout: str, is_kv: bool = False) -> Tensor:
    """x [B, H, L, D], with other strides (its numbers too, where they are shared by expansion).

    "blhd": a transposed [B, L, H, D]. "sliced": the middle of a larger tensor in every dimension.
    "padded_rows": rows further apart than D. "expanded_kv": one head of k and v shared by all.
    "expanded_batch": one batch entry shared by all. "reversed": the first dimension innermost. "stepped":
    every second element of each outer dimension. "side_by_side": a few of many heads, whose rows lie side by
    side and so more than 2 KB apart, as in the packed q, k and v of a model.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {LAYOUTS}, got {layout!r}")
    if layout == "blhd":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "side_by_side":
        heads = x.shape[1] + 1 + FAR // max(x.shape[-1] * x.itemsize, 1)
        tokens = x.transpose(1, -2)  # [..., L, H, D]
        whole = x.new_full((*tokens.shape[:-2], heads, x.shape[-1]), torch.nan)
        return whole[..., 1 : 1 + x.shape[1], :].copy_(tokens).transpose(1, -2)
    if layout == "expanded_kv":
        return x[:, :1].expand_as(x) if is_kv else x
    if layout == "expanded_batch":
        return x[:1].expand_as(x)
    if layout == "reversed":
        order = list(range(x.dim()))[::-1]
        return x.permute(order).contiguous().permute(order)
    if layout == "stepped":
        outer = x.dim() - 1
        whole = x.new_full((*(2 * n for n in x.shape[:-1]), x.shape[-1]), torch.nan)
        stepped = whole[(slice(1, None, 2),) * outer]
        return stepped.copy_(x)
    if layout == "padded_rows":
        return torch.nn.functional.pad(x, [0, GUARD], value=torch.nan)[..., : x.shape[-1]]
    if layout == "sliced":
        outer = x.dim() - 1
        whole = torch.nn.functional.pad(x, [GUARD, GUARD] + [1, 1] * outer, value=torch.nan)
        return whole[(slice(1, -1),) * outer + (slice(GUARD, -GUARD),)]
    return x.contiguous()


def _lengths(case: Case) -> Tensor:
    return torch.tensor(case.lengths_k, dtype=torch.int32)


def _cumulative(sizes: tuple[int, ...]) -> Tensor:
    return torch.tensor([0, *sizes]).cumsum(0).to(torch.int32)


def _shapes(case: Case) -> dict[str, tuple[int, ...]]:
    heads, heads_kv, dim, dim_v = case.heads, case.num_heads_kv, case.head_dim, case.dim_v
    if case.op == "varlen":
        total_q, total_k = sum(case.lengths_q), sum(case.lengths_k)
        return {"q": (total_q, heads, dim), "k": (total_k, heads_kv, dim), "v": (total_k, heads_kv, dim_v)}
    rows = (case.batch, heads_kv, case.keys)
    if case.page_size is not None:
        pages = case.batch * -(-case.keys // case.page_size) + 2
        rows = (pages, heads_kv, case.page_size)
    return {"q": (case.batch, heads, case.seqlen_q, dim), "k": (*rows, dim), "v": (*rows, dim_v)}


def _table(case: Case, generator: torch.Generator) -> Tensor:
    """Every sequence's pages scattered over the pool; entries past its length point nowhere."""
    page = case.page_size or 1
    per_sequence = -(-case.keys // page)
    table = torch.randperm(case.batch * per_sequence + 2, generator=generator)[: case.batch * per_sequence]
    table = table.view(case.batch, per_sequence).to(torch.int32)
    used = -(-_lengths(case) // page)
    return torch.where(torch.arange(per_sequence) < used.view(-1, 1), table, 2**30)


def _coordinates(case: Case, x: Tensor, name: str) -> Tensor:
    """Of a distance score, q and k such that most distances are below 2, and exact: multiples of 1/64.

    Whether a key is within reach is then no question of rounding.
    """
    if case.score not in DISTANCE_SCORES or name == "v":
        return x
    return (x * (0.6 * 64 / (2 * case.head_dim) ** 0.5)).round() / 64


def make_inputs(case: Case, seed: int = 0, device: torch.device | str = "cpu") -> Inputs:
    """Fill a case with numbers that depend on its name, `seed` and the kind of device alone.

    They are drawn on the device, which is quick for large cases; `Inputs.on` takes the CPU's numbers there.
    """
    generator = torch.Generator(device).manual_seed(zlib.crc32(case.name.encode()) + seed)
    with torch.device(device):
        return _filled(case, generator)


def _filled(case: Case, generator: torch.Generator) -> Inputs:
    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(case.dtype)

    shapes = _shapes(case)
    numbers = {name: _coordinates(case, randn(*shape), name) for name, shape in shapes.items()}
    leaves = {name: lay_out(x, case.layout, name != "q") for name, x in numbers.items()}
    if case.score == "additive":
        leaves["w"] = randn(case.head_dim) * (4 / case.head_dim) ** 0.5
    if case.bias is not None:
        leaves[case.bias.leaf] = case.bias.make(case, generator)
    if case.sinks:
        leaves["sinks"] = torch.randn(case.heads, generator=generator, dtype=accumulate_dtype(case.dtype))
    options: dict[str, Any] = {}
    fixed: tuple[Tensor, ...] = ()
    if case.op == "varlen":
        fixed = (_cumulative(case.lengths_q), _cumulative(case.lengths_k))
    if case.op == "decode":
        fixed = (_lengths(case),)
        if case.page_size is not None:
            options["block_table"] = _table(case, generator)
    options |= {name: value for name in ("scale", "softcap") if (value := getattr(case, name)) is not None}
    if case.dropout_p:
        seed_value = int(torch.randint(-(2**62), 2**62, (), generator=generator))
        options |= {"dropout_p": case.dropout_p, "dropout_seed": torch.tensor([seed_value])}
    mask = None if case.mask is None else case.mask(case, generator)
    q = leaves["q"]
    lse_shape = (q.shape[1], q.shape[0]) if case.op == "varlen" else q.shape[:-1]
    return Inputs(case, leaves, fixed, mask, options, randn(*q.shape[:-1], case.dim_v), randn(*lse_shape))


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Inside, uninitialised floating tensors hold NaN, so that what a kernel forgets to write shows."""
    was = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was[0], warn_only=was[1])
