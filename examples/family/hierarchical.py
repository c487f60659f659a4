"""Hierarchical attention on real text: which package of Python's library does a passage come from, and why?

Words are pooled to sentences and sentences to the passage, each by learned attention; the weights show which
of them the decision rests on. The text is the documentation inside the installed standard library.

python examples/family/hierarchical.py [FOLDER]
"""

import re
import sysconfig
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib import pyplot
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap
from picture import picture_path
from torch import Tensor, nn

from fastattn.data import load_stdlib_docs
from fastattn.nn import HierarchicalAttention, pad_documents

PACKAGES = ("asyncio", "email", "http", "tkinter", "unittest")
SENTENCES, WORDS = 8, 30  # at most, in a passage and in a sentence
KNOWN = 2  # how often a word must occur to be known by itself

Document = list[list[str]]


def load_documents() -> list[tuple[Document, int]]:
    """Passages of up to 8 sentences, as words, each with the number of its package."""
    library = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for label, package in enumerate(PACKAGES):
        text = load_stdlib_docs(library / package).text
        sentences = [re.findall(r"[a-z]{2,}", part.lower()) for part in re.split(r"[.:;]\s|\n\n", text)]
        sentences = [words[:WORDS] for words in sentences if len(words) >= 3]
        passages = [sentences[n : n + SENTENCES] for n in range(0, len(sentences), SENTENCES)]
        found += [(passage, label) for passage in passages]
    return found


class Classifier(nn.Module):
    """Word vectors, hierarchical attention, and a linear layer to the packages."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, 32)
        self.attention = HierarchicalAttention(32, hidden_size=16)
        self.output = nn.Linear(32, len(PACKAGES))
        self.dropout = nn.Dropout(0.3)

    def forward(self, x: Tensor, word_lens: Tensor) -> Tensor:
        passages = self.attention(self.dropout(self.embedding(x)), word_lens)
        return self.output(self.dropout(passages))


def train(model: Classifier, documents: list[Document], labels: Tensor, index: dict[str, int]) -> None:
    """Eight passes over the documents."""
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(8):
        for batch in torch.randperm(len(documents)).split(32):
            x, word_lens = encode([documents[n] for n in batch], index)
            loss = F.cross_entropy(model(x, word_lens), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def encode(documents: list[Document], index: dict[str, int]) -> tuple[Tensor, Tensor]:
    """Indices [B, S, W] and the words of each sentence [B, S]; 0 is an unknown word."""
    return pad_documents([[torch.tensor([index.get(w, 0) for w in s]) for s in d] for d in documents])


def draw(document: Document, words: Tensor, sentences: Tensor, title: str, path: Path) -> None:
    """A passage, its words darker the more they weigh in their sentence, the bars its sentences' weights."""
    figure, axes = pyplot.subplots(figsize=(11, 0.38 * len(document) + 0.6), layout="constrained")
    axes.set(xlim=(-9, 100), ylim=(len(document) - 0.4, -0.8), title=title)
    axes.set_axis_off()
    axes.text(-9, -0.75, "sentence weighs", fontsize=8, va="center")
    scale = ScalarMappable(cmap=LinearSegmentedColormap.from_list("pale", ["white", "tomato"]))  # to read on
    scale.set_clim(0, 1)
    figure.colorbar(scale, ax=axes, label="weight of a word\nin its sentence", aspect=10)
    for row, sentence in enumerate(document):
        weight = sentences[row].item()
        axes.barh(row, 8 * weight, left=-9, height=0.6, color="tab:red")
        axes.text(8 * weight - 8.6, row, f"{weight:.0%}", va="center", fontsize=8)
        column = 0.0
        for word, weight in zip(sentence, words[row].tolist(), strict=False):
            if column + len(word) > 100:
                break
            box = {"facecolor": scale.to_rgba(weight), "edgecolor": "none", "pad": 1.5}
            axes.text(column, row, word, va="center", fontsize=9, family="monospace", bbox=box)
            column += len(word) + 1.2
    figure.savefig(path, dpi=70)


def main(path: Path) -> None:
    torch.manual_seed(0)
    pairs = load_documents()
    order = torch.randperm(len(pairs)).tolist()
    documents, labels = [pairs[n][0] for n in order], torch.tensor([pairs[n][1] for n in order])
    held_out = len(pairs) // 4
    counts = Counter(word for document in documents[held_out:] for sentence in document for word in sentence)
    known = [word for word, count in counts.items() if count >= KNOWN]
    index = {word: n for n, word in enumerate(known, 1)}
    print(
        f"{len(pairs)} passages of {len(PACKAGES)} packages, {len(index)} words, {held_out} passages held out"
    )

    model = Classifier(len(index) + 1)
    train(model, documents[held_out:], labels[held_out:], index)
    model.eval()
    with torch.no_grad():
        x, word_lens = encode(documents[:held_out], index)
        probabilities = model(x, word_lens).softmax(-1)
    commonest = labels[:held_out].bincount().max().item() / held_out
    right = probabilities.argmax(-1) == labels[:held_out]
    print(f"right: {right.float().mean():.0%} (always the commonest package: {commonest:.0%})")

    words, sentences = model.attention.attention_weights
    print("words that weigh most, on average, in the passages of each package:")
    share = words * sentences[..., None]
    for label, package in enumerate(PACKAGES):
        weight: Counter[str] = Counter()
        seen: Counter[str] = Counter()
        for n in (labels[:held_out] == label).nonzero()[:, 0].tolist():
            for sentence, row in zip(documents[n], share[n].tolist(), strict=False):
                weight.update(dict(zip(sentence, row, strict=False)))
                seen.update(set(sentence))
        mean = {word: weight[word] / count for word, count in seen.items() if count >= 3 and word in index}
        print(f"  {package:<9}" + ", ".join(sorted(mean, key=lambda word: -mean[word])[:8]))

    sure = probabilities.amax(-1).masked_fill(~right, 0) + 0.001 * (word_lens > 0).sum(1)
    shown = int(sure.argmax())
    title = f"from {PACKAGES[labels[shown]]}, by the model {probabilities[shown].max():.0%}"
    draw(documents[shown], words[shown], sentences[shown], title, path)
    print(f"drawn: {path.name}")


if __name__ == "__main__":
    main(picture_path("hierarchical.png", __doc__))
