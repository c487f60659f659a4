"""Attention sinks: where a head puts its attention when it has nothing to do, and what a sink logit changes.

Each token follows from the one before it by a fixed table, but after one of three triggers comes the token
before the trigger again. So the one layer has work to do at triggers alone. It must look somewhere at all
other tokens too, and learns to look at the first one, which says nothing. With a learned sink, one more logit
in each softmax, it need not: what a row has to spare goes nowhere.

python examples/inspect/attention_sinks.py [FOLDER]
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from toy import Batch, accuracy, path_for, train

import fastattn
from fastattn.inspect import heatmap, record
from fastattn.masks import causal
from fastattn.nn import LearnedPositionalEncoding, TokenEmbedding

VOCAB, TRIGGERS, START, LENGTH, WIDTH = 20, 3, 20, 32, 64


def sentences(size: int = 64) -> Batch:
    """A start token, then tokens by the rule; the label of each is the next, where the rule tells it."""
    follows = torch.arange(VOCAB).roll(7)
    tokens = torch.full((size, LENGTH + 1), START)
    tokens[:, 1] = torch.randint(VOCAB, (size,))
    for n in range(2, LENGTH + 1):
        last, before = tokens[:, n - 1], tokens[:, n - 2]
        is_copied = (last < TRIGGERS) & (before != START)
        noise = torch.rand(size) < 0.3
        usual = torch.where(noise, torch.randint(VOCAB, (size,)), follows[last.clamp(max=VOCAB - 1)])
        tokens[:, n] = torch.where(is_copied, before, usual)
    return tokens[:, :-1], tokens[:, 1:]


class OneLayer(nn.Module):
    """Attention of one head by a plain call, with or without a sink, then a feed-forward network."""

    def __init__(self, has_sink: bool):
        super().__init__()
        self.embedding = TokenEmbedding(VOCAB + 1, WIDTH)
        self.positions = LearnedPositionalEncoding(WIDTH, LENGTH)
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.join = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.sinks = nn.Parameter(torch.full((1,), 4.0)) if has_sink else None
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))
        self.output = nn.Linear(WIDTH, VOCAB)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.positions(self.embedding(tokens))
        q, k, v = self.qkv(self.norm1(x)).unsqueeze(1).chunk(3, -1)
        x = x + self.join(fastattn.attention(q, k, v, mask=causal(), sinks=self.sinks).squeeze(1))
        return self.output(x + self.mlp(self.norm2(x)))


def main() -> None:
    from matplotlib import pyplot

    pyplot.switch_backend("Agg")
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 5.5), layout="constrained")
    for ax, has_sink in zip(axes, (False, True), strict=True):
        torch.manual_seed(0)
        model = OneLayer(has_sink)
        train(model, sentences, 400)
        tokens, labels = sentences(256)
        with torch.no_grad(), record(model) as rec:
            model(tokens)
        weights = rec.calls[0].weights[:, 0]  # [B, L, L] of the one head
        works = (tokens < TRIGGERS)[:, 8:]  # later rows, which have many keys to choose from
        to_first, before = weights[:, 8:, 0], weights.diagonal(-1, 1, 2)[:, 7:]
        left = (1 - weights[:, 8:].sum(2)).clamp(min=0)
        name = "with a sink" if has_sink else "without a sink"
        print(
            f"{name}: at triggers {before[works].mean():.2f} of the weight is on the token before; elsewhere "
            f"{to_first[~works].mean():.2f} on the first token, {left[~works].mean():.2f} on the sink; "
            f"accuracy {accuracy(model, (tokens, labels)):.2f}"
        )
        texts = ["!" if token < TRIGGERS else "^" if token == START else "." for token in tokens[0].tolist()]
        heatmap(weights[0], texts, texts, ax, title=f"{name}: ^ start, ! trigger", cmap="Blues")
    figure.colorbar(axes[-1].images[0], ax=axes, label="weight")
    figure.savefig(path_for("attention_sinks.png"), dpi=80)


if __name__ == "__main__":
    main()
