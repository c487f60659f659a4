"""Records in the form that BertViz's viewers read."""

from __future__ import annotations

from typing import Any

from fastattn.inspect.recorded import Record
from fastattn.inspect.tokens import kind_of


def to_bertviz(record: Record, *, run: int = 0, batch: int = 0) -> list[dict[str, Any]]:
    """The weights as nested lists attn[layer][head][query][key], with the texts of queries and keys.

    It is what BertViz's `head_view` and `model_view` hand to their pages, ready for `json.dumps`. Their
    arguments are tensors of one layer each, [1, heads, queries, keys]:

        from bertviz import head_view
        (data,) = to_bertviz(record)
        head_view([torch.tensor([layer]) for layer in data["attn"]], data["left_text"])

    Args:
        record: with weights (see `record`'s weights_up_to), of one model.
        run, batch: as in `Record.weights`.
    Returns:
        A dict with "name", "attn", "left_text" (queries) and "right_text" (keys) for each kind of attention:
        one named None of a model with self-attention only; of an encoder-decoder those that there are of
        "Encoder", "Decoder" and "Cross".
    Raises:
        ValueError: no calls, no weights, or layers of one kind that differ in heads or lengths.
        IndexError: no such run or entry.
    Source: Vig 2019, "A Multiscale Visualization of Attention in the Transformer Model".
    """
    kinds: dict[str | None, list[str]] = {}
    paths = record.paths
    is_single = not any(kind_of(path) == "Cross" for path in paths)
    for path in paths:
        kinds.setdefault(None if is_single else kind_of(path), []).append(path)
    if not kinds:
        raise ValueError("record must hold calls, got none")
    order = [None, "Encoder", "Decoder", "Cross"]
    return [_kind(record, kind, kinds[kind], run, batch) for kind in order if kind in kinds]


def _kind(record: Record, name: str | None, paths: list[str], run: int, batch: int) -> dict[str, Any]:
    layers = [record.weights(path, run=run, batch=batch) for path in paths]
    shapes = {path: list(layer.shape) for path, layer in zip(paths, layers, strict=True)}
    if len({tuple(shape) for shape in shapes.values()}) > 1:
        raise ValueError(f"layers must have the same heads, queries and keys for BertViz, got {shapes}")
    queries, keys = record.texts(paths[0], run=run, batch=batch)
    attn = [layer.detach().tolist() for layer in layers]
    return {"name": name, "attn": attn, "left_text": queries, "right_text": keys}
