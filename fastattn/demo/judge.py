"""What the trained model is worth: translations of sentences it never saw, BLEU, and where it looked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastattn.data import EnglishChinese, Pair
from fastattn.data.subwords import BOS, EOS, Subwords
from fastattn.data.translation import ENOUGH
from fastattn.demo.text import padded
from fastattn.models import Transformer, beam_search

BEAM, LENGTH_PENALTY, LONGEST = 4, 1.0, 40


def translate(model: Transformer, subwords: Subwords, sentences: Sequence[str]) -> list[str]:
    """Chinese by beam search, a sentence each."""
    src = padded([(subwords.encode(sentence), []) for sentence in sentences]).src
    found = beam_search(
        model,
        src,
        bos_index=BOS,
        eos_index=EOS,
        beam_size=BEAM,
        length_penalty=LENGTH_PENALTY,
        max_len=LONGEST,
    )
    return [subwords.decode(row) for row in found.tokens.tolist()]


def bleu(data: EnglishChinese, translations: Sequence[str]) -> tuple[float | None, str]:
    """BLEU of translations of the held-out sentences, and a line that says how it was computed.

    Returns:
        (score, sacrebleu's signature), or (None, why there is none).

    Raises:
        ModuleNotFoundError: sacrebleu is not installed.
    """
    if data.num_sentences < ENOUGH:
        return None, (
            f"no BLEU: it takes at least {ENOUGH:,} pairs of sentences to learn from and judge by, and this "
            f"machine's catalogues have {data.num_sentences:,}"
        )
    from sacrebleu.metrics import BLEU

    metric = BLEU(tokenize="zh")
    score = metric.corpus_score(list(translations), [[pair.chinese for pair in data.held_out]]).score
    return score, str(metric.get_signature())


@dataclass(frozen=True)
class Attention:
    """Where the decoder looked, of one sentence.

    Attributes:
        source: English tokens, END_MARK last.
        target: the tokens written, END_MARK last.
        weights: float [layers, target tokens, source tokens], the mean over heads; rows add up to 1.
    """

    source: list[str]
    target: list[str]
    weights: Tensor


END_MARK = "<end>"


def attention_of(model: Transformer, subwords: Subwords, pair: Pair, translation: str) -> Attention:
    """Cross-attention while the model writes this translation of a pair's English."""
    source, target = subwords.encode(pair.english), subwords.encode(translation)
    batch = padded([(source, target)])
    model.eval()
    with torch.no_grad():
        _, weights = model(batch.src, batch.tgt, need_weights=True)
    model.train()
    return Attention(
        [*subwords.pieces(source), END_MARK],
        [*subwords.pieces(target), END_MARK],
        torch.stack(weights)[:, 0].mean(1),
    )


def telling(pairs: Sequence[Pair], translations: Sequence[str]) -> int:
    """Which sentence to draw: of those that came out as the reference the longest, else the first."""
    right = [
        n for n, pair in enumerate(pairs) if pair.chinese.replace(" ", "") == translations[n].replace(" ", "")
    ]
    return max(right, key=lambda n: (len(pairs[n].english.split()), -n), default=0)
