"""An entropy regulariser: a loss on where a model looks, by differentiable summaries.

Two models learn the same task from the same start; to the loss of one is added the mean entropy of its
attention. It learns the task as well, with heads that look at few tokens: easier to read, and to prune.

python examples/inspect/entropy_regulariser.py [FOLDER]
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from toy import Labeller, accuracy, path_for, sum_with, train

from fastattn.inspect import Record, attention_map, record

STRENGTH = 0.3


def with_entropy(model: Labeller, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Logits, and the mean entropy of all heads times a strength, with gradients to the model."""
    with record(model, keep_graph=True, weights_up_to=0, top_k=0, pool=None) as rec:
        logits = model(tokens)
    return logits, STRENGTH * torch.stack([rec.entropy(path) for path in rec.paths]).mean()


def main() -> None:
    batch = sum_with(1)
    records = {}
    for name in ("without the regulariser", "with it"):
        torch.manual_seed(0)
        model = Labeller(8, 8)
        penalty = None if name.startswith("without") else partial(with_entropy, model)
        train(model, partial(sum_with, 1, size=64), 400, penalty)
        with torch.no_grad(), record(model) as records[name]:
            model(batch[0])
        entropies = torch.stack([records[name].entropy(path) for path in records[name].paths])
        largest = torch.stack([call.summary.max_weight.mean() for call in records[name]]).mean()
        print(
            f"{name}: accuracy {accuracy(model, batch):.2f}, mean entropy {entropies.mean():.2f} nats, "
            f"largest weight of a query on average {largest:.2f}"
        )
    draw(records)


def draw(records: dict[str, Record]) -> None:
    """The first layer of both, the mean over its heads."""
    from matplotlib import pyplot

    pyplot.switch_backend("Agg")
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4.6), layout="constrained")
    for ax, (name, rec) in zip(axes, records.items(), strict=True):
        attention_map(rec, "encoder.layers.0.self_attn", ax=ax, title=f"first layer, {name}")
        figure.colorbar(ax.images[0], ax=ax, label="weight")
    figure.savefig(path_for("entropy_regulariser.png"), dpi=80)


if __name__ == "__main__":
    main()
