"""Heads that attend to the previous token, found by their weights and tested by cutting their links.

A model of two layers sees a row of tokens that repeats itself and must go on with it. It has to find where
the present token stood before and read what followed, for which each token must know the one before it: that
is the first layer's work, as Olsson et al. 2022 found in language models ("In-context Learning and Induction
Heads"). Links that matter are told from others by removing them.

python examples/inspect/previous_token.py [FOLDER]
"""

from __future__ import annotations

import torch
from toy import Batch, Labeller, accuracy, looks_back, path_for, train

from fastattn.inspect import knockout, record

VOCAB, LENGTH = 24, 30


def repeating(size: int = 64) -> Batch:
    """Rows of 6 to 13 different tokens over and over; labels are the next token, from the first repeat on."""
    period = torch.randint(6, 14, (size, 1))
    place = torch.arange(LENGTH + 1)
    rows = torch.rand(size, VOCAB).argsort(1).gather(1, place % period)
    labels = rows[:, 1:].masked_fill(place[:-1] < period, -100)
    return rows[:, :-1], labels


def main() -> None:
    torch.manual_seed(0)
    model = Labeller(VOCAB, VOCAB)
    train(model, repeating, 300)
    batch = repeating(256)
    with torch.no_grad(), record(model) as rec:
        model(batch[0])

    offsets = range(1, 9)
    curves = {}  # [heads, offsets] by layer
    for path in rec.paths:
        weights = rec[path][0].weights
        curves[path] = torch.stack([looks_back(weights, back).mean(0) for back in offsets], 1)
        scores = " ".join(f"{score:.2f}" for score in curves[path][:, 0].tolist())
        print(f"{path}: mean weight on the previous token, by head: {scores}")

    print(f"accuracy {accuracy(model, batch):.2f}")
    for layer in range(2):
        for back in (1, 2):
            cut = {f"encoder.layers.{layer}": [(n, n - back) for n in range(back, LENGTH)]}
            with knockout(model, edges=cut):
                print(f"layer {layer} without links {back} back: accuracy {accuracy(model, batch):.2f}")
    draw(curves, list(offsets))


def draw(curves: dict[str, torch.Tensor], offsets: list[int]) -> None:
    """Mean weight by distance, a line for each head."""
    from matplotlib import pyplot

    pyplot.switch_backend("Agg")
    figure, ax = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for (path, heads), color, mark in zip(curves.items(), ("#0072B2", "#E69F00"), "os", strict=True):
        for head, curve in enumerate(heads):
            label = path.removesuffix(".self_attn") if head == 0 else None
            ax.plot(offsets, curve.tolist(), color=color, marker=mark, markersize=4, lw=1, label=label)
    ax.set_xlabel("tokens back")
    ax.set_ylabel("mean weight, a line for each head")
    ax.legend(frameon=False)
    figure.savefig(path_for("previous_token.png"), dpi=80)


if __name__ == "__main__":
    main()
