"""Why attention was invented: a fixed vector forgets, a look back does not.

Three recurrent encoder-decoders, the same but for what the decoder knows of the source, learn on sources of
up to 20 tokens and are tried on longer ones: to write the source backwards, and to find one marked token in
noise.

python examples/family/seq2seq.py [FOLDER]
"""

import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib import pyplot
from picture import picture_path
from torch import Tensor

from fastattn.models import RecurrentSeq2Seq

KINDS = ("simple", "contextualised", "soft_align")
LONGEST = 20  # in training
START = 0
BATCH = 64

Pairs = tuple[Tensor, Tensor]


def backwards(batch: int, length: int, generator: torch.Generator) -> Pairs:
    """Random digits, and the same backwards."""
    source = torch.randint(1, 10, (batch, length), generator=generator)
    return source, source.flip(1)


def marked(batch: int, length: int, generator: torch.Generator) -> Pairs:
    """Tokens 1 to 49, of which one is marked (50 to 98 stand for these); and that one."""
    source = torch.randint(1, 50, (batch, length), generator=generator)
    at = torch.randint(length, (batch, 1), generator=generator)
    target = source.gather(1, at)
    return source.scatter(1, at, target + 49), target


TASKS: dict[str, tuple[Callable[..., Pairs], int, int, int, list[int]]] = {
    "the source backwards": (backwards, 10, 48, 280, [5, 10, 15, 20, 25, 30]),
    "one marked token in noise": (marked, 99, 32, 150, [20, 50, 100, 200, 400]),
}  # how to draw pairs, tokens, hidden size, training steps, lengths to try


def train(task: str, kind: str) -> tuple[RecurrentSeq2Seq, list[float]]:
    """A trained model and its accuracy, by token, at each length."""
    draw, vocab, hidden, steps, lengths = TASKS[task]
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model = RecurrentSeq2Seq(vocab, vocab, hidden, kind=kind)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, fused=True)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, steps)
    for _ in range(steps):
        length = int(torch.randint(1, LONGEST + 1, (), generator=generator))
        source, target = draw(BATCH, length, generator)
        before = F.pad(target, (1, 0), value=START)[:, :-1]
        loss = F.cross_entropy(model(source, before).flatten(0, 1), target.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    accuracies = []
    for length in lengths:
        source, target = draw(200, length, generator)
        found = model.generate(source, target.shape[1], START)
        accuracies.append((found == target).float().mean().item())
    return model, accuracies


def main(path: Path) -> None:
    torch.set_num_threads(1)  # steps of so small a network are too short to share
    figure, panels = pyplot.subplots(1, 3, figsize=(12, 3.4), layout="constrained")
    for panel, task in zip(panels, TASKS, strict=False):
        lengths = TASKS[task][-1]
        print(f"{task}: accuracy by length, trained up to {LONGEST}")
        print(" " * 16 + "".join(f"{length:7}" for length in lengths))
        for kind in KINDS:
            begin = time.perf_counter()
            model, accuracies = train(task, kind)
            row = "".join(f"{accuracy:7.0%}" for accuracy in accuracies)
            print(f"{kind:<16}{row}   in {time.perf_counter() - begin:.1f} s", flush=True)
            panel.plot(lengths, accuracies, marker="o", label=kind)
            if kind == "soft_align" and task == "the source backwards":
                reader = model
        panel.axvline(LONGEST, color="gray", linestyle=":", label="longest in training")
        panel.set(title=task, xlabel="tokens in the source", ylabel="accuracy", ylim=(-0.03, 1.05))
        panel.legend(fontsize=8)

    source, target = backwards(1, 12, torch.Generator().manual_seed(1))
    reader(source, F.pad(target, (1, 0), value=START)[:, :-1])
    image = panels[2].imshow(reader.attention_weights[0], cmap="Reds", vmin=0, vmax=1)
    figure.colorbar(image, ax=panels[2], label="weight")
    panels[2].set(title="where soft_align looks", xlabel="source", ylabel="target")
    panels[2].set_xticks(range(12), source[0].tolist())
    panels[2].set_yticks(range(12), target[0].tolist())
    figure.savefig(path, dpi=70)
    print(f"drawn: {path.name}")


if __name__ == "__main__":
    main(picture_path("seq2seq.png", __doc__))
