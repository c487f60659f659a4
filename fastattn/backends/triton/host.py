"""The Triton kernels on tensors: allocate, describe, launch. Nothing here waits for the device."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fastattn.backends.common import FEW_ROWS, device_of, parts_of
from fastattn.backends.triton import arguments, descriptors
from fastattn.backends.triton.arguments import pairs, per_row, rows
from fastattn.backends.triton.attention_bwd_bias import attention_bwd_bias, attention_bwd_diagonals
from fastattn.backends.triton.attention_bwd_dkdv import attention_bwd_dkdv
from fastattn.backends.triton.attention_bwd_dq import attention_bwd_dq
from fastattn.backends.triton.attention_bwd_rows import attention_bwd_rows
from fastattn.backends.triton.attention_combine import attention_combine
from fastattn.backends.triton.attention_fwd import attention_fwd
from fastattn.backends.triton.configs import (
    MOST_PARTS,
    PROGRAMS_EACH,
    TileConfig,
    backward_config,
    bias_config,
    block_dim,
    forward_config,
)
from fastattn.backends.triton.launch import (
    Programs,
    architecture,
    constants_of,
    launch,
    multiprocessors,
    parameters_of,
    tf32_allowed,
)
from fastattn.backends.triton.plans import Launched
from fastattn.lowering import Operands, Params
from fastattn.strides import dense_last, resolved

# Row tiles are dealt out to this many sums along diagonals, which are then added up: enough to fill a device
# with a few heads, and few enough for O(N) memory.
DIAGONAL_PARTS = 16


class Launch:
    """What the launches of one call share, and what was launched."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, operands: Operands, params: Params) -> None:
        natural = arguments.is_natural(q, operands)
        self.rules = arguments.rules(operands, params, natural)
        self.lengths = arguments.lengths(q, k, operands, params)
        self.blocks = operands.row_ptr is not None
        self.arch = architecture(q.device)
        self.widest = block_dim(max(q.shape[-1], v.shape[-1]))
        self.itemsize = q.element_size()
        tf32 = self.itemsize == 4 and tf32_allowed()
        self.constants = _constants(q.shape[-1], v.shape[-1], natural, tf32)
        self.pair_bytes = sum(
            t.element_size() for t in (operands.mask, operands.bias, operands.diag) if t is not None
        )
        # Whether a pair within the lengths, the band and the key ranges may be hidden.
        self.hides = operands.mask is not None or operands.bias is not None
        self.launched: list[Launched] = []

    def tiles(self, config: TileConfig, heads: int) -> int:
        """Programs, where each has one tile of rows."""
        return -(-self.lengths.seqlen_q // config.block_m) * self.lengths.batch * heads

    def key_tiles(self, config: TileConfig) -> int:
        return -(-self.lengths.seqlen_k // config.block_n) * self.lengths.batch * self.lengths.num_heads_kv

    def key_tiles_of(self, k: Tensor, v: Tensor, config: TileConfig) -> tuple[Any, Any]:
        """Descriptors of k and v for the forward pass, each None where there is none."""
        fits = self.arch in descriptors.ARCHITECTURES and self.itemsize in descriptors.ITEM_SIZES
        if not descriptors.ASKED or not fits or self.lengths.block_table is not None:
            return None, None
        widths = self.constants["BLOCK_D"], self.constants["BLOCK_DV"]
        k_tiles, v_tiles = (
            descriptors.tiles_of(t, config.block_n, n) for t, n in zip((k, v), widths, strict=True)
        )
        return k_tiles, v_tiles

    def workspace(self, programs: int, q: Tensor, out: Tensor) -> list[Tensor]:
        """Room for (out, m, l) of parts of the keys; empty where they are not divided."""
        if self.blocks or self.lengths.seqlen_q > FEW_ROWS:  # more rows are more programs
            return []
        slots = PROGRAMS_EACH * multiprocessors(q.device)
        count = min(parts_of(programs, self.lengths.seqlen_q, self.lengths.seqlen_k, slots), MOST_PARTS)
        if count == 1:
            return []
        by_row = (q.shape[1], q.shape[0]) if q.dim() == 3 else q.shape[:3]
        return [q.new_empty((count, *shape), dtype=torch.float32) for shape in (out.shape, by_row, by_row)]

    def combine(self, parts: arguments.Parts, out: Tensor, lse: Tensor | None) -> None:
        """Fill out and lse from what the parts of the keys gave."""
        lengths = self.lengths
        config = TileConfig(1, 1 << (parts.num_parts - 1).bit_length(), 4, 1)
        args = rows(out), None if lse is None else per_row(lse), parts, lengths, self.rules
        programs = lengths.batch * lengths.num_heads * lengths.seqlen_q
        self._launch(
            attention_combine, programs, config, args, constants_of(attention_combine, self.constants)
        )

    def run(self, kernel: Any, programs: Programs, config: TileConfig, *args: Any, **constants: Any) -> None:
        self._launch(kernel, programs, config, args, {**self.constants, **constants})

    def _launch(
        self, kernel: Any, programs: Programs, config: TileConfig, args: Any, constants: dict[str, Any]
    ) -> None:
        compiled = launch(kernel, programs, config, *args, **constants)
        if compiled is not None:
            self.launched.append(Launched(programs, compiled, parameters_of(kernel, config, args, constants)))


@cache
def _constants(dim: int, dim_v: int, natural: bool, tf32: bool) -> dict[str, Any]:
    return {
        "HEAD_DIM": dim,
        "HEAD_DIM_V": dim_v,
        "BLOCK_D": block_dim(dim),
        "BLOCK_DV": block_dim(dim_v),
        "NATURAL": natural,
        "PRECISION": "tf32" if tf32 else "ieee",
    }


def forward(
    q: Tensor, k: Tensor, v: Tensor, operands: Operands, params: Params, out: Tensor, lse: Tensor | None
) -> tuple[list[Launched], list[Tensor]]:
    """Fill out and lse, of q and keys that are not empty.

    Returns:
        What was launched, where kernels are compiled; tensors that only the kernels use.
    """
    q, k, v = dense_last(q), dense_last(k), dense_last(v)
    with device_of(q):
        call = Launch(q, k, v, operands, params)
        few = _few(call.lengths.seqlen_q)
        config = forward_config(call.arch, call.widest, call.itemsize, call.blocks, few, call.pair_bytes)
        programs = call.tiles(config, q.shape[1])
        workspace = call.workspace(programs, q, out)
        parts = arguments.parts(*workspace) if workspace else None
        call.run(
            attention_fwd,
            programs if parts is None else (programs, parts.num_parts),
            config,
            rows(q),
            rows(k),
            rows(v),
            rows(out),
            None if lse is None else per_row(lse),
            operands.sinks,
            call.lengths,
            call.rules,
            *call.key_tiles_of(k, v, config),
            parts,
        )
        if parts is not None:
            call.combine(parts, out, lse)
        return call.launched, workspace


def _few(seqlen_q: int) -> int:
    """A length's class for the choice of a tile, so that the table is asked few different questions."""
    return 16 if seqlen_q <= 16 else 64 if seqlen_q <= 64 else 65


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    operands: Operands,
    params: Params,
    needs: Sequence[bool],
    made: Sequence[Tensor],
) -> tuple[list[Tensor | None], list[Launched]]:
    """Fill `made`: dq, dk, dv and, like lse, delta and residual.

    Returns:
        (dbias, ddiag, dsinks, None), where needed, in the accumulate dtype; what was launched.
    """
    q, k, v, out, dout = (dense_last(t) for t in (q, k, v, out, dout))
    lse = resolved(lse)
    dlse = None if dlse is None else resolved(dlse)
    dq, dk, dv, delta, residual = made
    with device_of(q):
        call = Launch(q, k, v, operands, params)
        config = backward_config(call.arch, call.widest, call.itemsize, call.blocks, call.pair_bytes)
        tile = [per_row(lse), rows(dout), per_row(delta), per_row(residual)]
        call.run(
            attention_bwd_rows,
            call.tiles(config, q.shape[1]),
            config,
            rows(q),
            rows(k),
            rows(out),
            per_row(lse),
            rows(dout),
            None if dlse is None else per_row(dlse),
            per_row(delta),
            per_row(residual),
            operands.sinks,
            call.lengths,
            call.rules,
        )
        call.run(
            attention_bwd_dq,
            call.tiles(config, q.shape[1]),
            config,
            rows(q),
            rows(k),
            rows(v),
            *tile,
            rows(dq),
            call.lengths,
            call.rules,
            params.scale,
            HIDES=call.hides,
        )
        bias = operands.bias if needs[0] else None
        columns = None
        if bias is not None and bias.shape[2] == 1 and bias.shape[3] > 1:
            columns = lse.new_zeros(call.lengths.batch, q.shape[1], call.lengths.seqlen_k)
        call.run(
            attention_bwd_dkdv,
            call.key_tiles(config),
            config,
            rows(q),
            rows(k),
            rows(v),
            *tile,
            rows(dk),
            rows(dv),
            None if columns is None else per_row(columns),
            call.lengths,
            call.rules,
            params.scale,
            HIDES=call.hides,
        )
        dbias = ddiag = dsinks = None
        if bias is not None and columns is not None:
            dbias = columns.double()[:, :, None].sum_to_size(bias.shape)
        elif bias is not None:
            dbias = _bias_gradient(call, bias, q, k, v, tile)
        if operands.diag is not None and needs[1]:
            ddiag = _diagonal_gradient(call, operands.diag, q, k, v, tile)
        if operands.sinks is not None and needs[2]:
            dsinks = _sink_gradient(operands.sinks, lse, residual, delta)
    return [dbias, ddiag, dsinks, None], call.launched


def _bias_gradient(call: Launch, bias: Tensor, q: Tensor, k: Tensor, v: Tensor, tile: list[Any]) -> Tensor:
    """dS added up over what the bias is broadcast along; its rows, at last, here."""
    batches, heads, bias_rows, bias_keys = bias.shape
    dbias = q.new_zeros(batches, heads, call.lengths.seqlen_q, bias_keys, dtype=torch.float32)
    config = bias_config(call.arch, call.widest, call.itemsize, call.pair_bytes)
    programs = -(-call.lengths.seqlen_q // config.block_m) * batches * heads
    call.run(
        attention_bwd_bias,
        programs,
        config,
        rows(q),
        rows(k),
        rows(v),
        *tile,
        pairs(dbias),
        call.lengths,
        call.rules,
        batches,
        heads,
        VARIES_BY_KEY=bias_keys > 1,
    )
    return dbias if bias_rows > 1 else dbias.double().sum(2, keepdim=True)


def _diagonal_gradient(
    call: Launch, diag: Tensor, q: Tensor, k: Tensor, v: Tensor, tile: list[Any]
) -> Tensor:
    config = bias_config(call.arch, call.widest, call.itemsize, call.pair_bytes)
    parts = min(DIAGONAL_PARTS, max(1, -(-call.lengths.seqlen_q // config.block_m)))
    partial = q.new_zeros(
        call.lengths.batch, call.lengths.num_heads, parts, diag.shape[2], dtype=torch.float32
    )
    call.run(
        attention_bwd_diagonals,
        call.lengths.batch * call.lengths.num_heads * parts,
        config,
        rows(q),
        rows(k),
        rows(v),
        *tile,
        rows(partial),
        call.lengths,
        call.rules,
        parts,
        diag.shape[2],
    )
    return partial.double().sum(2).sum_to_size(diag.shape)


def _sink_gradient(sinks: Tensor, lse: Tensor, residual: Tensor, delta: Tensor) -> Tensor:
    """A sink's dS is -p delta, p its weight: it has no value, so nothing but delta comes back through it."""
    shape = (-1, 1) if lse.dim() == 2 else (1, -1, 1)
    weight = torch.exp((sinks.view(shape) - lse) - residual)
    each = torch.where(lse == -torch.inf, 0.0, weight * delta).double()
    return -(each.sum(1) if lse.dim() == 2 else each.sum((0, 2)))
