"""One vocabulary for English and Chinese: pieces of words, and single Chinese characters."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SPECIAL = ("[PAD]", "[BOS]", "[EOS]", "[UNK]")
PAD, BOS, EOS, UNKNOWN = range(len(SPECIAL))

_START = "\u2581"  # stands before the first piece of a word of letters or digits
_WORD_BEGINS = r"(?<![A-Za-z0-9])(?=[A-Za-z0-9])"
# Merges happen inside such a stretch: a word, or any other single character.
_STRETCH = rf"{_START}[A-Za-z0-9]+|[^\s{_START}A-Za-z0-9]"
_CAPITALISED = re.compile(r"\b[A-Z](?=[a-z]+\b)")


class Subwords:
    """Texts to numbers and back, by a byte-pair vocabulary learnt from texts.

    Chinese characters are tokens of their own; words in Latin letters, which Chinese borrows from English,
    have the same tokens in both languages. Capitals at the beginning of words are not kept.

    Example, of a vocabulary that has "image" as one piece and "WBMP" as two:
        "WBMP Image" -> WB ##MP image;    "WBMP 图像" -> WB ##MP 图 像

    Source: Sennrich, Haddow and Birch 2016, "Neural Machine Translation of Rare Words with Subword Units".
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer

    @staticmethod
    def learn(texts: Iterable[str], vocab_size: int = 6000) -> Subwords:
        """A vocabulary of at most that many tokens, the first of them SPECIAL; the same for the same texts.

        Raises:
            ModuleNotFoundError: tokenizers is not installed.
        """
        from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

        # Not WordPiece, whose trainer breaks ties as the process's hashes fall.
        tokenizer = Tokenizer(models.BPE(unk_token=SPECIAL[UNKNOWN]))
        tokenizer.normalizer = normalizers.Replace(Regex(_WORD_BEGINS), _START)
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(_STRETCH), behavior="removed", invert=True)
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=list(SPECIAL), show_progress=False
        )
        tokenizer.train_from_iterator(map(_without_capitals, texts), trainer)
        return Subwords(tokenizer)

    @staticmethod
    def from_json(text: str) -> Subwords:
        """The vocabulary that `to_json` wrote."""
        from tokenizers import Tokenizer

        return Subwords(Tokenizer.from_str(text))

    def to_json(self) -> str:
        return self._tokenizer.to_str()

    def __len__(self) -> int:
        """Size of the vocabulary, special tokens included."""
        return self._tokenizer.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        """Tokens of a text, without BOS and EOS."""
        return self._tokenizer.encode(_without_capitals(text), add_special_tokens=False).ids

    def pieces(self, tokens: Iterable[int]) -> list[str]:
        """Each token as a label; "##" stands before one that goes on with a word."""
        return [
            f"##{piece}" if _is_word(piece[:1]) else piece.removeprefix(_START) for piece in self._raw(tokens)
        ]

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens up to the first EOS; PAD and BOS are left out.

        Blanks stand between words of letters or digits, and nowhere else.
        """
        tokens = list(tokens)
        if EOS in tokens:
            tokens = tokens[: tokens.index(EOS)]
        text = ""
        for piece in self._raw(token for token in tokens if token not in (PAD, BOS)):
            blank = " " if piece.startswith(_START) and _is_word(text[-1:]) else ""
            text += blank + piece.removeprefix(_START)
        return text

    def _raw(self, tokens: Iterable[int]) -> list[str]:
        return [self._tokenizer.id_to_token(token) or SPECIAL[UNKNOWN] for token in tokens]


def _is_word(character: str) -> bool:
    return character.isascii() and character.isalnum()


def _without_capitals(text: str) -> str:
    """Makes "Unable to read HEAD" "unable to read HEAD": a first capital tells only where it stands."""
    return _CAPITALISED.sub(lambda found: found.group().lower(), text)
