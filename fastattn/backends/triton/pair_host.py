"""The kernels for scores that are no product, on tensors; what fastattn.backends.triton.host is for q·k."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastattn.backends.common import device_of
from fastattn.backends.triton import host
from fastattn.backends.triton.arguments import per_row, rows
from fastattn.backends.triton.configs import TileConfig
from fastattn.backends.triton.launch import constants_of
from fastattn.backends.triton.pair_bwd_dkdv import pair_bwd_dkdv
from fastattn.backends.triton.pair_bwd_dq import pair_bwd_dq
from fastattn.backends.triton.pair_bwd_rows import pair_bwd_rows
from fastattn.backends.triton.pair_fwd import pair_fwd
from fastattn.backends.triton.plans import Launched
from fastattn.lowering import Operands, Params
from fastattn.strides import dense_last, resolved

# What a program of four warps holds of a tile [rows, keys, features] in registers: 32 numbers a thread.
FEATURES = 4096
ROWS = 16
# Features that a forward program adds up at a time, over tiles of 16 x 16 pairs.
FORWARD = TileConfig(16, 16, 4, 1)
FORWARD_FEATURES = 16


def backward_config(dim: int) -> TileConfig:
    """Of pair_bwd_dq, for which block_m rows stay and block_n keys come, and of pair_bwd_dkdv, the other way
    round; `dim` is the widest tile's width."""
    return TileConfig(ROWS, max(1, FEATURES // (ROWS * dim)), 4, 1)


class PairLaunch(host.Launch):
    """What the launches of one call share."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, operands: Operands, params: Params) -> None:
        super().__init__(q, k, v, operands, params)
        self.inputs = (rows(q), rows(k), rows(v), operands.score_weights)
        self.constants = {**self.constants, "SCORE": params.score}

    def run_pairs(self, kernel: Any, programs: int, config: TileConfig, *args: Any, **more: Any) -> None:
        """Launch a kernel with those of the constants that it has."""
        constants = constants_of(kernel, self.constants)
        args = *self.inputs, *args, self.lengths, self.rules
        host.launch(kernel, programs, config, *args, **constants, **more)


def forward(
    q: Tensor, k: Tensor, v: Tensor, operands: Operands, params: Params, out: Tensor, lse: Tensor | None
) -> tuple[list[Launched], list[Tensor]]:
    """Fill out and lse, of q and keys that are not empty; nothing that could be launched again as it was."""
    q, k, v = dense_last(q), dense_last(k), dense_last(v)
    with device_of(q):
        call = PairLaunch(q, k, v, operands, params)
        call.run_pairs(
            pair_fwd,
            call.tiles(FORWARD, q.shape[1]),
            FORWARD,
            rows(out),
            None if lse is None else per_row(lse),
            operands.sinks,
            BLOCK_H=FORWARD_FEATURES,
        )
    return [], []


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
    """See `host.backward`; the gradients returned are (None, None, dsinks, dscore_weights)."""
    q, k, v, out, dout = (dense_last(t) for t in (q, k, v, out, dout))
    lse = resolved(lse)
    dq, dk, dv, delta, residual = made
    with device_of(q):
        call = PairLaunch(q, k, v, operands, params)
        call.run_pairs(
            pair_bwd_rows,
            call.tiles(FORWARD, q.shape[1]),
            FORWARD,
            rows(out),
            per_row(lse),
            rows(dout),
            None if dlse is None else per_row(resolved(dlse)),
            per_row(delta),
            per_row(residual),
            operands.sinks,
            BLOCK_H=FORWARD_FEATURES,
        )
        config = backward_config(call.widest)
        tile = per_row(lse), rows(dout), per_row(delta), per_row(residual)
        programs = call.tiles(config, q.shape[1])
        partial = q.new_zeros(programs, q.shape[-1], dtype=torch.float32) if needs[3] else None
        call.run_pairs(pair_bwd_dq, programs, config, *tile, rows(dq), partial)
        # Keys stay and rows come.
        config = config._replace(block_m=config.block_n, block_n=config.block_m)
        call.run_pairs(pair_bwd_dkdv, call.key_tiles(config), config, *tile, rows(dk), rows(dv))
        dsinks = None
        if operands.sinks is not None and needs[2]:
            dsinks = host._sink_gradient(operands.sinks, lse, residual, delta).to(lse.dtype)
    dweights = None if partial is None else partial.double().sum(0).to(lse.dtype)
    return [None, None, dsinks, dweights], []
