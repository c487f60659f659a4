"""What layers share that can show the weights of their last call."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fastattn.masks import Mask, dense, padding
from fastattn.masks.space import as_ints


class Weighted(nn.Module):
    """A layer with `attention_weights`: computed when asked for, by the call that made the output.

    Training pays nothing for them. The arguments of the last call are kept until the next one; copies and
    pickles of the layer leave them out.
    """

    _last: tuple[Any, ...] | None = None

    def weights(self, *arguments: Any) -> Any:
        """The weights of a call with these arguments."""
        raise NotImplementedError

    @property
    def attention_weights(self) -> Any:
        """The weights of the last call, before dropout; differentiable as its inputs are.

        Raises:
            RuntimeError: there was no call yet.
        """
        if self._last is None:
            raise RuntimeError(
                f"attention_weights are those of the last call, and this {type(self).__name__} was not called"
            )
        return self.weights(*self._last)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_last"}


def merge_visible(mask: Any, valid_lens: Any) -> Mask | Tensor | None:
    """One mask of both: a key is visible where mask (True = attend) and valid_lens let it be.

    Args:
        mask: a Mask, or bool [B, Lq, Lk] or broadcastable to [B, H, Lq, Lk].
        valid_lens: int [B] or [B, Lq], how many of the first keys are visible.
    """
    if isinstance(mask, Tensor) and mask.dim() == 3:
        mask = mask.unsqueeze(1)  # [B, Lq, Lk], the same for all heads
    if valid_lens is None:
        return mask
    lengths = padding(as_ints("valid_lens", valid_lens, (1, 2)))
    if mask is None:
        return lengths
    return lengths & (dense(mask) if isinstance(mask, Tensor) else mask)


def check_ranks(ranks: tuple[int, ...], layout: str, **inputs: Any) -> None:
    """Raise unless all inputs are tensors of one rank, which is among `ranks`."""
    first = ""
    for name, x in inputs.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
        if x.dim() not in ranks:
            raise ValueError(f"{name} must be {layout}, got shape {list(x.shape)}")
        if first and x.dim() != inputs[first].dim():
            want, got = inputs[first].dim(), list(x.shape)
            raise ValueError(f"{name} must be {want}-D like {first}, got shape {got}")
        first = first or name
