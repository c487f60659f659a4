"""PyTorch's compiled FlexAttention as a contender for band masks: `--flex`.

It skips hidden blocks as we do, but must be compiled for each shape by a C++ compiler at run time (some
ten seconds), and on CPU has no backward pass: so it runs only where it is asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastattn.masks import Mask, MaskShape
from fastattn.testing.bench_case import BenchCase
from fastattn.testing.inputs import Inputs


def band(inputs: Inputs) -> tuple[int | None, int | None] | None:
    """(lo, hi) where the mask says i + lo <= j <= i + hi and nothing else, None for other masks."""
    case = inputs.case
    if not isinstance(inputs.mask, Mask) or case.queries != case.keys or inputs.mask.needs_blocks:
        return None
    lowered = inputs.mask.lower(MaskShape(case.batch, case.heads, case.queries, case.keys))
    if any(part is not None for part in (lowered.key_starts, lowered.key_ends, lowered.dense, lowered.block)):
        return None
    lows = [value for value in (lowered.lo_top, lowered.lo_bottom) if value is not None]
    highs = [value for value in (lowered.hi_top, lowered.hi_bottom) if value is not None]
    return max(lows, default=None), min(highs, default=None)


def flex(bench: BenchCase, inputs: Inputs) -> Callable[[Tensor, Tensor, Tensor], Any] | None:
    """The compiled call, or None where it does not take the case."""
    case, bounds = inputs.case, band(inputs)
    if bounds is None or bench.timed != "forward" or case.dropout_p or case.bias is not None:
        return None
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    lo = -case.keys if bounds[0] is None else bounds[0]
    hi = case.keys if bounds[1] is None else bounds[1]

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j >= i + lo) & (j <= i + hi)

    torch.compiler.reset()  # compiled code remembers the number of threads
    compiled = torch.compile(flex_attention)
    blocks = create_block_mask(visible, None, None, case.queries, case.keys, device="cpu")
    options: dict[str, Any] = {"block_mask": blocks}
    if case.num_heads_kv != case.heads:
        options["enable_gqa"] = True

    def call(q: Tensor, k: Tensor, v: Tensor) -> Any:
        with torch.no_grad():
            return compiled(q, k, v, **options)

    return call
