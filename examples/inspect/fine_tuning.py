"""A head before and after fine-tuning: the same sentence, the same head, two sets of weights.

A model learns to add to each digit the one before it, and is then fine-tuned to add the one two before it.

python examples/inspect/fine_tuning.py [FOLDER]
"""

from __future__ import annotations

from functools import partial

import torch
from toy import Labeller, accuracy, looks_back, path_for, sum_with, train

from fastattn.inspect import Record, heatmap, record

LAYER = "encoder.layers.0.self_attn"


def look(model: Labeller, tokens: torch.Tensor) -> Record:
    """A record of one pass."""
    texts = [[str(digit) for digit in row] for row in tokens.tolist()]
    with torch.no_grad(), record(model, tokens=texts) as rec:
        model(tokens)
    return rec


def main() -> None:
    torch.manual_seed(0)
    model = Labeller(8, 8, num_layers=1)
    tokens = sum_with(1)[0]
    records = {}
    for name, back in (("before", 1), ("after", 2)):
        train(model, partial(sum_with, back, size=64), 300 * back)
        records[name] = look(model, tokens)
        print(f"{name} fine-tuning: accuracy {accuracy(model, sum_with(back)):.2f}")
        for distance in (1, 2):
            weights = looks_back(records[name][LAYER][0].weights, distance).mean(0)
            scores = " ".join(f"{score:.2f}" for score in weights.tolist())
            print(f"  mean weight {distance} back, by head: {scores}")
        entropies = " ".join(f"{value:.2f}" for value in records[name].entropy(LAYER).tolist())
        print(f"  entropy by head: {entropies} nats")

    moved = looks_back(records["after"][LAYER][0].weights, 2).mean(0)
    draw(records, int(moved.argmax()))


def draw(records: dict[str, Record], head: int) -> None:
    """The head that moved the most, of one row of digits."""
    from matplotlib import pyplot

    pyplot.switch_backend("Agg")
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 5), layout="constrained")
    for ax, (name, rec) in zip(axes, records.items(), strict=True):
        heatmap(rec.weights(LAYER)[head], *rec.texts(LAYER), ax, title=f"head {head}, {name}", cmap="Blues")
    figure.colorbar(axes[-1].images[0], ax=axes, label="weight")
    figure.savefig(path_for("fine_tuning.png"), dpi=80)


if __name__ == "__main__":
    main()
