"""A text under the eyes of a translation model: its translation, a record, and pictures of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastattn.data.subwords import BOS, EOS, Subwords
from fastattn.demo.judge import END_MARK
from fastattn.demo.progress import progress
from fastattn.inspect import pictures, received_map
from fastattn.inspect.recorded import Record
from fastattn.inspect.recorder import record
from fastattn.models import Transformer, greedy
from fastattn.models.generation import EXTRA_TOKENS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

START_MARK = "<start>"
LONG = 64  # tokens from which on decoding takes seconds


@dataclass(frozen=True)
class View:
    """What a model did with a text.

    Attributes:
        translation: its output.
        record: of one pass over the text and the translation, tokens attached.
    """

    translation: str
    record: Record


def look(model: Transformer, subwords: Subwords, text: str) -> View:
    """Translate the text, with a progress bar if it is long, and record what the model looks at meanwhile.

    Raises:
        ValueError: an empty text, or more tokens than the model has positions for.
    """
    source = subwords.encode(text)
    limit = model.positions.max_len
    if not 0 < len(source) < limit:
        raise ValueError(f"text must have from 1 to {limit - 1} tokens for this model, got {len(source)}")
    src = torch.tensor([[*source, EOS]])
    steps = min(src.shape[1] + EXTRA_TOKENS, limit - 1)
    with _counted(model, steps) if len(source) >= LONG else nullcontext():
        found = greedy(model, src, bos_index=BOS, eos_index=EOS, max_len=steps)
    written = [token for token in found.tokens[0, : int(found.lengths[0])].tolist() if token != EOS]
    read, new = [*subwords.pieces(source), END_MARK], subwords.pieces(written)
    # A row of the decoder is named by the token that it writes, a column by the one that it reads.
    names = {
        "encoder.*": read,
        "*.cross_attn": ([*new, END_MARK], read),
        "*": ([*new, END_MARK], [START_MARK, *new]),
    }
    with torch.no_grad(), record(model, tokens=names) as seen:
        model(src, torch.tensor([[BOS, *written]]))
    return View(subwords.decode(written), seen)


def draw(view: View, folder: Path) -> list[Path]:
    """Write the record and its pictures; the files written.

    Raises:
        OSError: the folder cannot be written.
        ModuleNotFoundError: matplotlib or safetensors is not installed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    seen = view.record
    encoder = [path for path in seen.paths if path.startswith("encoder")]
    cross = [path for path in seen.paths if path.endswith("cross_attn")]
    # The sharpest of the layers that read the source says the most of what was translated by what.
    aligned = min(cross, key=lambda path: seen.entropy(path).mean().item())
    received = torch.stack([seen.received(path).mean(0) for path in encoder]).mean(0)
    drawn = {
        "heads": pictures.head_grid(seen, title="every head: what (rows) looks at what (columns)"),
        "entropy": pictures.entropy_map(seen, title="how widely each head looks"),
        "encoder": pictures.attention_map(seen, encoder[-1]),
        "alignment": _alignment(seen, aligned),
        "received": received_map(
            received, seen.texts(encoder[0])[1], title="attention received in the encoder, mean over heads"
        ),
    }
    seen.save(folder / "record.safetensors")
    written = [folder / "record.safetensors"]
    for name, axes in drawn.items():
        written.append(folder / f"{name}.png")
        figure: Any = axes.figure
        figure.savefig(written[-1], dpi=120)
    return written


def _alignment(seen: Record, path: str) -> Axes:
    if any(call.weights is None for call in seen[path]):
        return pictures.attention_map(seen, path)
    target, source = seen.texts(path)
    return pictures.alignment_map(
        seen.weights(path).mean(0), target, source, title=f"{path}, mean over heads"
    )


@contextmanager
def _counted(model: Transformer, steps: int) -> Iterator[None]:
    """A progress bar that moves with each pass of the decoder."""
    bar = progress(range(steps), steps, "translating (at most)")

    def count(*_: object) -> None:
        next(bar, None)

    handle = model.decoder.register_forward_hook(count)
    try:
        yield
    finally:
        handle.remove()
        bar.close()
