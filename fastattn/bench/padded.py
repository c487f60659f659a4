"""What PyTorch has for sequences of different lengths: padding to the longest with a mask, or a loop."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from fastattn.testing.inputs import Inputs


def padded(inputs: Inputs) -> Inputs:
    """A varlen case's numbers as a padded batch: [S, H, L, D] views of [S, L, H, D], and a mask [S, 1, 1, L].

    Padding is no part of the timed call: who computes with padded batches has them so from the start.

    Raises:
        ValueError: the case is no self-attention without a mask, which is all that is needed here.
    """
    case = inputs.case
    if case.op != "varlen" or case.lengths_q != case.lengths_k or inputs.mask is not None:
        raise ValueError(f"case must be varlen self-attention without a mask, got {case.name}")
    lengths = torch.tensor(case.lengths_q, device=inputs.dout.device)
    longest = max(case.lengths_q)

    def pad(x: Tensor) -> Tensor:
        return pad_sequence(list(x.split(case.lengths_q)), batch_first=True).transpose(1, 2)

    return replace(
        inputs,
        case=replace(case, op="attention", batch=len(lengths), seqlen_q=longest, lengths_q=(), lengths_k=()),
        leaves={name: pad(leaf) for name, leaf in inputs.leaves.items()},
        fixed=(),
        mask=(torch.arange(longest, device=lengths.device) < lengths[:, None])[:, None, None],
        dout=pad(inputs.dout),
    )


def packed(inputs: Inputs, result: Any) -> Any:
    """A padded batch's results without the padding, [tokens, H, D]."""
    if not isinstance(result, Tensor):
        return tuple(packed(inputs, each) for each in result)
    rows = zip(result.transpose(1, 2), inputs.case.lengths_q, strict=True)
    return torch.cat([row[:length] for row, length in rows])


def sdpa_loop(inputs: Inputs) -> Any:
    """One call for each sequence."""
    lengths = inputs.case.lengths_q

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = (x.transpose(0, 1).unsqueeze(0).split(lengths, 2) for x in (q, k, v))
        outs = [F.scaled_dot_product_attention(*each) for each in zip(*parts, strict=True)]
        return torch.cat(outs, 2).squeeze(0).transpose(0, 1)

    return call
