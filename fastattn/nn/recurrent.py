"""Recurrent networks over padded sequences."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence


def read_padded(encoder: nn.GRU, x: Tensor, lens: Tensor) -> Tensor:
    """States of a GRU that sees no padding, [N, L, directions * hidden]; 0 in the padding.

    Args:
        encoder: with batch_first, of one layer.
        x: [N, L, input_size], padded on the right.
        lens: int [N], from 0 to L.
    """
    directions = 2 if encoder.bidirectional else 1
    out = x.new_zeros(*x.shape[:2], directions * encoder.hidden_size)
    filled = lens.nonzero().squeeze(1)  # torch packs no sequence of length 0
    if not filled.numel():
        return out
    packed = pack_padded_sequence(x[filled], lens[filled].cpu(), batch_first=True, enforce_sorted=False)
    states, _ = pad_packed_sequence(encoder(packed)[0], batch_first=True, total_length=x.shape[1])
    return out.to(states.dtype).index_copy(0, filled, states)
