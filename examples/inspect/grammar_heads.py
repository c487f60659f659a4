"""Heads of a toy grammar, scored: which are positional, which link verb to subject, adjective to noun?

Sentences such as "gatos muy viejo* con libro rojo* cae*": nouns show their number, adjectives and verbs (with
a star) hide it, and the model has to tell it. An adjective agrees with the noun before it, the verb with the
first noun. Words in between vary, so that no fixed distance tells where to look.

python examples/inspect/grammar_heads.py [FOLDER]
"""

from __future__ import annotations

import random

import torch
from torch import Tensor
from toy import Batch, Labeller, accuracy, looks_back, path_for, train

from fastattn.inspect import heatmap, knockout, record

NOUNS, ADJECTIVES, VERBS = (
    ["gato", "perro", "libro", "tren"],
    ["viejo*", "rojo*", "alto*"],
    ["cae*", "brilla*"],
)
OTHERS = ["<pad>", "muy", "con", "hoy"]
WORDS = [*OTHERS, *NOUNS, *[noun + "s" for noun in NOUNS], *ADJECTIVES, *VERBS]
NUMBER = {word: n for n, word in enumerate(WORDS)}
LENGTH = 12
Links = list[tuple[int, int, int]]  # sentence, query, key


def sentence(chance: random.Random) -> tuple[list[str], list[tuple[int, int]], tuple[int, int]]:
    """Words, the (adjective, noun) places, and the (verb, subject) places."""
    words: list[str] = []
    agree = []
    if chance.random() < 0.5:
        words.append("hoy")
    subject = len(words)
    for part in range(chance.choice((1, 2, 2))):
        if part:
            words.append("con")
        noun = len(words)
        words.append(chance.choice(NOUNS) + chance.choice(("", "s")))
        words.extend(["muy"] * chance.choice((0, 1, 2)))
        agree.append((len(words), noun))
        words.append(chance.choice(ADJECTIVES))
    verb = len(words)
    words.append(chance.choice(VERBS))
    return words, agree, (verb, subject)


def sentences(chance: random.Random, size: int = 64) -> tuple[Batch, Links, Links]:
    """A batch whose labels are 1 for plural at adjectives and verbs, and its links."""
    tokens, labels = torch.zeros(size, LENGTH, dtype=torch.int64), torch.full((size, LENGTH), -100)
    adjectives, verbs = [], []
    for row in range(size):
        words, agree, (verb, subject) = sentence(chance)
        tokens[row, : len(words)] = torch.tensor([NUMBER[word] for word in words])
        adjectives += [(row, *link) for link in agree]
        verbs.append((row, verb, subject))
        for query, key in [*agree, (verb, subject)]:
            labels[row, query] = words[key].endswith("s")
    return (tokens, labels), adjectives, verbs


def mean_weight(weights: Tensor, links: Links) -> Tensor:
    """[heads]: the weight of the links on average."""
    rows, queries, keys = torch.tensor(links).T
    return weights[rows, :, queries, keys].mean(0)


def main() -> None:
    torch.manual_seed(0)
    chance = random.Random(0)
    model = Labeller(len(WORDS), 2, is_causal=False)
    train(model, lambda: sentences(chance)[0], 400)
    batch, adjectives, verbs = sentences(chance, 256)
    with torch.no_grad(), record(model) as rec:
        model(batch[0])

    kinds = ("positional", "verb to subject", "adjective to noun")
    print(f"accuracy {accuracy(model, batch):.2f}; scores: {', '.join(kinds)}")
    scores, names = [], []
    for path in rec.paths:
        weights = rec[path][0].weights
        # A positional head gives one distance, whichever it is, much weight in every row.
        distances = torch.stack([looks_back(weights, back).mean(0) for back in (-3, -2, -1, 1, 2, 3)])
        of_path = torch.stack(
            (distances.amax(0), mean_weight(weights, verbs), mean_weight(weights, adjectives)), 1
        )
        for head, row in enumerate(of_path):
            names.append(f"layer {path.split('.')[2]}, head {head}")
            kind = kinds[int(row.argmax())] if row.max() > 0.4 else "no kind"
            print(f"  {names[-1]}: {' '.join(f'{score:.2f}' for score in row.tolist())}  {kind}")
        scores.append(of_path)
    test_links(model, chance, verbs, batch)
    draw(torch.cat(scores), names, kinds)


def test_links(model: Labeller, chance: random.Random, verbs: Links, batch: Batch) -> None:
    """Whether the verb's number is read by its link to the subject: cut it, and as many other links."""
    tokens, labels = batch
    right: dict[str, list[float]] = {"the subject": [], "another word": []}
    for row, verb, subject in verbs[:60]:
        other = chance.choice([n for n in range(verb) if n != subject])
        for name, key in (("the subject", subject), ("another word", other)):
            with torch.no_grad(), knockout(model, edges=[(verb, key)]):
                found = model(tokens[row : row + 1])[0, verb].argmax()
            right[name].append(float(found == labels[row, verb]))
    for name, each in right.items():
        print(f"verbs that do not see {name}: {sum(each) / len(each):.2f} of their numbers are right")


def draw(scores: Tensor, names: list[str], kinds: tuple[str, ...]) -> None:
    """All heads with their scores."""
    from matplotlib import pyplot

    pyplot.switch_backend("Agg")
    figure, ax = pyplot.subplots(figsize=(5, 4.5), layout="constrained")
    heatmap(scores, names, list(kinds), ax, title="which head links what", cmap="Blues")
    figure.colorbar(ax.images[0], ax=ax, label="mean weight")
    figure.savefig(path_for("grammar_heads.png"), dpi=80)


if __name__ == "__main__":
    main()
