"""What tests of transformers' ready-made tools share: a tokenizer that needs no download."""

from __future__ import annotations

import transformers
from transformers_zoo import VOCABULARY


def tokenizer(**options: object) -> transformers.PreTrainedTokenizerFast:
    """Words w4, w5 ... as tokens 4, 5 ..., after <pad>, <s>, </s> and <unk>."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    special = ["<pad>", "<s>", "</s>", "<unk>"]
    words = [*special, *(f"w{at}" for at in range(len(special), VOCABULARY))]
    model = models.WordLevel({word: at for at, word in enumerate(words)}, unk_token="<unk>")
    of_words = Tokenizer(model)
    of_words.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=of_words,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        **options,
    )
