"""The summaries' kernels on tensors: allocate, describe, launch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastattn.backends.common import device_of
from fastattn.backends.triton import host
from fastattn.backends.triton.arguments import per_row, rows
from fastattn.backends.triton.configs import TileConfig
from fastattn.backends.triton.launch import constants_of
from fastattn.backends.triton.summary_bwd import summary_bwd_dk, summary_bwd_dq, summary_bwd_rows
from fastattn.backends.triton.summary_cells import summary_cells
from fastattn.backends.triton.summary_fwd import summary_fwd
from fastattn.lowering import Operands, Params
from fastattn.strides import dense_last, resolved
from fastattn.weight_statistics import Results, Wanted, pairs_per_cell

# The rows of a cell are dealt out to so many programs, whose sums are then added up in order.
MAX_PARTS = 16


class Losses(NamedTuple):
    """Gradients of statistics, dense float32, or None; that of pooled means divided by a cell's pairs."""

    entropy: Any  # [B, Hq, Lq]
    received: Any  # [B, Hq, Lk]
    distance: Any  # [B, Hq, Lq]
    pooled: Any  # [B, Hq, grid_rows, grid_cols]
    grid_rows: int
    grid_cols: int


class SummaryLaunch(host.Launch):
    """What the launches of one summary share."""

    def __init__(self, q: Tensor, k: Tensor, operands: Operands, params: Params) -> None:
        super().__init__(q, k, k, operands, params)
        self.inputs = rows(q), rows(k)
        self.config = tile_config(self.widest, self.itemsize)

    def run_summary(self, kernel: Any, programs: int, config: TileConfig, *args: Any, **more: Any) -> None:
        """Launch a kernel with those of the constants that it has."""
        constants = {**constants_of(kernel, self.constants), **more}
        host.launch(kernel, programs, config, *self.inputs, *args, **constants)


def forward(
    q: Tensor, k: Tensor, operands: Operands, params: Params, wanted: Wanted, results: Results
) -> None:
    """Fill the results, of q and keys that are not empty."""
    q, k = dense_last(q), dense_last(k)
    with device_of(q):
        call = SummaryLaunch(q, k, operands, params)
        shift, factor = torch.empty_like(results.lse), torch.empty_like(results.lse)
        config = links_config(call.config, wanted.top_k)
        call.run_summary(
            summary_fwd,
            call.tiles(config, q.shape[1]),
            config,
            results.entropy,
            results.distance,
            results.lse,
            results.max_weight,
            results.max_index,
            results.topk_weights if wanted.top_k else None,
            results.topk_indices if wanted.top_k else None,
            shift,
            factor,
            operands.sinks,
            call.lengths,
            call.rules,
            TOP_K=wanted.top_k,
            BLOCK_K=max(1, 1 << (wanted.top_k - 1).bit_length()),
        )
        received = _cells(call, q, shift, factor, (1, k.shape[2]), "sum")
        results.received.copy_(received[:, :, 0])
        if 0 not in wanted.pool:
            results.pooled.copy_(_cells(call, q, shift, factor, wanted.pool, wanted.pool_mode))


def tile_config(dim: int, itemsize: int) -> TileConfig:
    """Of all kernels here; no larger than the tiles of a block mask. At full precision products take
    registers, and rows of 256 features the memory of small devices."""
    if itemsize == 4 and dim > 64:
        return TileConfig(32, 32, 4, 1)
    return TileConfig(64, 64, 4 if dim <= 64 else 8, 1)


def links_config(config: TileConfig, top_k: int) -> TileConfig:
    """Of summary_fwd: fewer rows where their lists would not fit into registers."""
    block_m = config.block_m if top_k <= 16 else 32 if top_k <= 64 else 16
    return config._replace(block_m=min(block_m, config.block_m))


def _cells(
    call: SummaryLaunch, q: Tensor, shift: Tensor, factor: Tensor, grid: tuple[int, int], mode: str
) -> Tensor:
    """[B, Hq, *grid], in double but for maxima."""
    batch, heads, seqlen_q = q.shape[:3]
    parts = max(1, min(MAX_PARTS, seqlen_q // grid[0] // call.config.block_m))
    cells = torch.zeros(batch, heads, grid[0], parts, grid[1], dtype=torch.float32, device=q.device)
    call.run_summary(
        summary_cells,
        batch * heads * grid[0] * parts,
        call.config,
        shift,
        factor,
        cells,
        call.lengths,
        call.rules,
        *grid,
        parts,
        MAXIMUM=mode == "max",
    )
    if mode == "max":
        return cells.amax(3)
    sums = cells.double().sum(3)
    return sums if mode == "sum" else sums / pairs_per_cell(seqlen_q, call.lengths.seqlen_k, sums)


def backward(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    grads: Sequence[Tensor | None],
    operands: Operands,
    params: Params,
    pool_mode: str,
    needs_sinks: bool,
    dq: Tensor,
    dk: Tensor,
) -> Tensor | None:
    """Fill dq and dk; the sinks' gradient, where needed."""
    q, k, lse = dense_last(q), dense_last(k), resolved(lse)
    entropy, received, distance, dlse, pooled = (
        resolved(grad).contiguous() if grad is not None and grad.numel() else None for grad in grads
    )
    if pooled is not None and pool_mode == "mean":
        pooled = pooled / pairs_per_cell(q.shape[2], k.shape[2], pooled)
    losses = Losses(entropy, received, distance, pooled, *((1, 1) if pooled is None else pooled.shape[2:]))
    with device_of(q):
        call = SummaryLaunch(q, k, operands, params)
        config = call.config
        mean, residual = torch.empty_like(lse), torch.empty_like(lse)
        dlse = torch.zeros_like(lse) if dlse is None else dlse
        call.run_summary(
            summary_bwd_rows,
            call.tiles(config, q.shape[1]),
            config,
            per_row(lse),
            losses,
            per_row(mean),
            per_row(residual),
            operands.sinks,
            call.lengths,
            call.rules,
        )
        shared = per_row(lse), losses, per_row(mean), per_row(dlse), per_row(residual)
        last = call.lengths, call.rules, params.scale
        programs = call.tiles(config, q.shape[1])
        call.run_summary(summary_bwd_dq, programs, config, *shared, rows(dq), *last)
        call.run_summary(summary_bwd_dk, call.key_tiles(config), config, *shared, rows(dk), *last)
        if operands.sinks is None or not needs_sinks:
            return None
        return host._sink_gradient(operands.sinks, lse, residual, mean - dlse).to(lse.dtype)
