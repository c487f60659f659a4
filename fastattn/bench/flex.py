"""PyTorch's compiled FlexAttention as a contender: its own mask and score functions for a case's options.

It skips hidden blocks as we do, but must be compiled for each shape at run time (some ten seconds).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastattn.biases import ALiBi
from fastattn.masks import Mask, MaskShape
from fastattn.masks.band import Band
from fastattn.masks.compose import AndMask
from fastattn.masks.documents import Documents
from fastattn.testing.bench_case import BenchCase
from fastattn.testing.inputs import Inputs

# (batch entry, head, row, column) -> bool, and (score, the same four) -> score.
MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
ScoreMod = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


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


def mask_mod(mask: Any) -> MaskMod | None:
    """The mask of a call with as many queries as keys; None where it is of another kind than those here."""
    if isinstance(mask, Band):
        return band_mod(mask.lo, mask.hi)
    if isinstance(mask, Documents) and mask.k_ids is None and mask.q_ids.dim() == 1:
        ids = mask.q_ids
        return lambda b, h, i, j: ids[i] == ids[j]
    if isinstance(mask, AndMask) and len(mask.masks) == 2:
        first, second = map(mask_mod, mask.masks)
        if first is not None and second is not None:
            return lambda b, h, i, j: first(b, h, i, j) & second(b, h, i, j)
    return None


def band_mod(lo: int | None, hi: int | None) -> MaskMod:
    """i + lo <= j <= i + hi; None is no bound."""
    if lo is None:
        return lambda b, h, i, j: (j <= i + hi) if hi is not None else j >= 0
    if hi is None:
        return lambda b, h, i, j: j >= i + lo
    return lambda b, h, i, j: (j >= i + lo) & (j <= i + hi)


def score_mod(inputs: Inputs) -> ScoreMod | None:
    """The case's softcap, tensor bias or ALiBi, or None where it has none of them.

    Raises:
        ValueError: it has several, or another bias.
    """
    bias, softcap = inputs.arguments()[1].get("bias"), inputs.case.softcap
    if bias is not None and softcap is not None:
        raise ValueError(f"case must have a bias or a softcap, not both, got {inputs.case.name}")
    if softcap is not None:
        return lambda score, b, h, i, j: softcap * torch.tanh(score / softcap)
    if isinstance(bias, ALiBi):
        slopes = bias.slopes
        return lambda score, b, h, i, j: score - slopes[h] * (i - j).abs()
    if isinstance(bias, Tensor):
        one_batch, one_head = bias.shape[0] == 1, bias.shape[1] == 1
        return lambda score, b, h, i, j: (
            score + bias[b * 0 if one_batch else b, h * 0 if one_head else h, i, j]
        )
    if bias is not None:
        raise ValueError(f"case must have a tensor bias or ALiBi, got {inputs.case.name}")
    return None


def flex_call(
    inputs: Inputs, visible: MaskMod | None, scored: ScoreMod | None = None, compiled: bool = True
) -> Callable[[Tensor, Tensor, Tensor], Any]:
    """FlexAttention with a mask and a score function."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    case = inputs.case
    torch.compiler.reset()  # compiled code remembers the number of threads, and a few shapes only
    function: Any = torch.compile(flex_attention, dynamic=False) if compiled else flex_attention
    options: dict[str, Any] = {"scale": case.scale, "score_mod": scored}
    if visible is not None:
        device = str(inputs.leaves["q"].device)
        options["block_mask"] = create_block_mask(visible, None, None, case.queries, case.keys, device=device)
    if case.num_heads_kv != case.heads:
        options["enable_gqa"] = True
    return lambda q, k, v: function(q, k, v, **options)


def flex(bench: BenchCase, inputs: Inputs) -> Callable[[Tensor, Tensor, Tensor], Any] | None:
    """The compiled call on CPU, where it has no backward pass, of a case with a band mask; None of others."""
    case, bounds = inputs.case, band(inputs)
    if bounds is None or bench.timed != "forward" or case.dropout_p or case.bias is not None:
        return None
    call = flex_call(inputs, band_mod(*bounds))

    def without_gradient(q: Tensor, k: Tensor, v: Tensor) -> Any:
        with torch.no_grad():
            return call(q, k, v)

    return without_gradient
