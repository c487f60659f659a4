"""Greedy and beam search, against searches by hand that use no cache."""

from __future__ import annotations

import itertools

import pytest
import torch

from fastattn.models import Transformer, beam_search, greedy

PAD, BOS, EOS = 0, 1, 2
MARKS = {"bos_index": BOS, "eos_index": EOS}


@pytest.fixture(autouse=True)
def one_thread(use_threads):
    """Models so small are slower on more, and much slower where other programs want the cores too."""
    use_threads(1)


def new(attention: str = "fastattn", vocab: int = 9, seed: int = 1, **options) -> Transformer:
    """A model with opinions: its logits are far apart."""
    torch.manual_seed(seed)
    options = {"d_model": 16, "num_layers": 2, "num_heads": 2, "d_ff": 32, "max_len": 20, **options}
    model = Transformer(11, vocab, padding_idx=PAD, attention=attention, dtype=torch.float64, **options)
    with torch.no_grad():
        model.output.weight *= 2
    return model


def sources() -> torch.Tensor:
    src = torch.randint(3, 11, (5, 7), generator=torch.Generator().manual_seed(3))
    src[1, 4:] = src[3, 1:] = PAD
    return src


@torch.no_grad()
def log_probs(model: Transformer, src: torch.Tensor, sentences: list[list[int]]) -> torch.Tensor:
    """log P(next token) [N, L + 1, V] after each prefix of sentences of one source, without a cache."""
    tgt = torch.tensor([[BOS, *tokens] for tokens in sentences])
    result = model.eval()(src.expand(len(sentences), -1), tgt).log_softmax(-1)
    result[..., PAD] = -torch.inf
    return result


def penalty(length: int, alpha: float) -> float:
    return ((5 + length) / 6) ** alpha


def beam_by_hand(model: Transformer, src: torch.Tensor, size: int, alpha: float, max_len: int):
    """(tokens, score) of one sentence, with lists: until `size` sentences ended, or max_len."""
    live, ended = [(0.0, [])], []
    for length in range(1, max_len + 1):
        following = log_probs(model, src, [tokens for _, tokens in live])[:, -1].tolist()
        grown = [
            (score + p, [*tokens, t])
            for (score, tokens), row in zip(live, following, strict=True)
            for t, p in enumerate(row)
        ]
        grown.sort(key=lambda item: -item[0])
        for score, tokens in grown[:size]:
            if tokens[-1] == EOS:
                ended.append((score / penalty(length, alpha), tokens))
        live = [item for item in grown if item[1][-1] != EOS][:size]
        if length == max_len:
            ended += [(score / penalty(length, alpha), tokens) for score, tokens in live]
        if len(ended) >= size:
            break
    score, tokens = max(ended, key=lambda item: item[0])
    return tokens, score


def rows(found) -> list[list[int]]:
    return [tokens[:n].tolist() for tokens, n in zip(found.tokens, found.lengths, strict=True)]


@pytest.mark.parametrize("attention", ["fastattn", "torch"])
def test_greedy_is_the_search_without_a_cache(attention):
    model, src = new(attention), sources()
    found = greedy(model, src, max_len=9, **MARKS)
    for n, tokens in enumerate(rows(found)):
        prefix, total = [], 0.0
        while len(prefix) < 9 and (not prefix or prefix[-1] != EOS):
            following = log_probs(model, src[n], [prefix])[0, -1]
            total += following.max().item()
            prefix.append(int(following.argmax()))
        assert tokens == prefix
        assert found.scores[n].item() == pytest.approx(total, abs=1e-10)
        assert (found.tokens[n, len(prefix) :] == PAD).all()
    assert len(set(found.lengths.tolist())) > 1
    assert (found.lengths < 9).any()


def test_both_kinds_of_attention_generate_the_same():
    src = sources()
    for search, options in ((greedy, {}), (beam_search, {"beam_size": 3})):
        ours = search(new("fastattn"), src, max_len=9, **MARKS, **options)
        stock = search(new("torch"), src, max_len=9, **MARKS, **options)
        assert torch.equal(ours.tokens, stock.tokens)
        torch.testing.assert_close(ours.scores, stock.scores, rtol=0, atol=1e-10)


@pytest.mark.parametrize("alpha", [0.0, 0.6, 2.0])
@pytest.mark.parametrize("seed", [1, 3, 5])
def test_a_beam_of_one_is_greedy(seed, alpha):
    model, src = new(seed=seed), sources()
    one = beam_search(model, src, beam_size=1, length_penalty=alpha, max_len=9, **MARKS)
    want = greedy(model, src, max_len=9, **MARKS)
    assert rows(one) == rows(want)
    assert torch.equal(one.tokens, want.tokens)
    scale = torch.tensor([penalty(n, alpha) for n in want.lengths.tolist()], dtype=torch.float64)
    torch.testing.assert_close(one.scores, want.scores / scale, rtol=0, atol=1e-10)


@pytest.mark.parametrize("size, alpha", [(2, 0.0), (2, 1.0), (3, 0.6), (4, 3.0), (5, -0.5), (30, 0.6)])
@pytest.mark.parametrize("options", [
    {},
    {"num_kv_heads": 1, "norm_first": True, "seed": 4},
    {"seed": 5},  # where a sentence that looks worse for long wins by its length in the end
], ids=["", "gqa", "late"])  # fmt: skip
def test_beam_search_by_hand(size, alpha, options):
    model, src = new(**options), sources()
    found = beam_search(model, src, beam_size=size, length_penalty=alpha, max_len=6, **MARKS)
    for n, tokens in enumerate(rows(found)):
        want, score = beam_by_hand(model, src[n], size, alpha, 6)
        assert tokens == want
        assert found.scores[n].item() == pytest.approx(score, abs=1e-10)


@pytest.mark.parametrize("alpha", [0.0, 0.6, 2.0])
@pytest.mark.parametrize("seed", range(3))
def test_a_wide_beam_finds_the_best_of_all_sentences(seed, alpha):
    model, src = new(vocab=5, seed=seed), sources()[:2]
    max_len = 3
    # Words 1, 3 and 4 (PAD is never generated), so 27 open sentences at most.
    found = beam_search(model, src, beam_size=81, length_penalty=alpha, max_len=max_len, **MARKS)
    sentences = [
        [*words, *end]
        for length in range(max_len + 1)
        for words in itertools.product((1, 3, 4), repeat=length)
        for end in ([[EOS]] if length < max_len else [[]])
    ]
    assert len(sentences) == 1 + 3 + 9 + 27
    padded = [tokens + [PAD] * (max_len - len(tokens)) for tokens in sentences]
    for n in range(2):
        scores = []
        for tokens, row in zip(sentences, log_probs(model, src[n], padded), strict=True):
            total = sum(row[i, t].item() for i, t in enumerate(tokens))
            scores.append(total / penalty(len(tokens), alpha))
        best = max(range(len(sentences)), key=scores.__getitem__)
        assert rows(found)[n] == sentences[best]
        assert found.scores[n].item() == pytest.approx(scores[best], abs=1e-10)


def test_a_longer_sentence_wins_under_a_penalty():
    model, src = new(), sources()
    short, long = (
        beam_search(model, src, beam_size=6, length_penalty=alpha, max_len=9, **MARKS).lengths
        for alpha in (0.0, 4.0)
    )
    assert (long >= short).all()
    assert (long > short).any()


def test_the_batch_and_padding_change_nothing():
    model, src = new(), sources()
    for search in (greedy, beam_search):
        together = search(model, src, max_len=9, **MARKS)
        for n, length in enumerate([7, 4, 7, 1, 7]):
            alone = search(model, src[n : n + 1, :length], max_len=9, **MARKS)
            assert rows(alone) == rows(together)[n : n + 1]
            torch.testing.assert_close(alone.scores, together.scores[n : n + 1], rtol=0, atol=1e-10)
        told = search(model, src, max_len=9, src_lengths=torch.tensor([7, 4, 7, 1, 7]), **MARKS)
        assert torch.equal(told.tokens, together.tokens)


def test_modes_gradients_and_limits():
    model, src = new(dropout=0.5), sources()
    model.encoder.eval()
    first = greedy(model, src, max_len=9, **MARKS)
    assert torch.equal(first.tokens, greedy(model, src, max_len=9, **MARKS).tokens)
    assert model.training
    assert not model.encoder.training
    assert not first.scores.requires_grad
    assert not first.tokens.is_inference()
    unending = new(seed=2)
    with torch.no_grad():
        unending.output.weight[EOS] = 0
        unending.output.weight[3] *= 50
    for search in (greedy, beam_search):
        assert search(unending, src, **MARKS).tokens.shape[1] <= 20
        assert search(unending, src, max_len=2, **MARKS).lengths.max() <= 2


def test_without_padding_index_rows_end_in_end_tokens():
    model = new()
    model.padding_idx = None
    found = greedy(model, sources(), max_len=9, **MARKS)
    assert found.lengths.min() < found.tokens.shape[1]
    for tokens, length in zip(found.tokens, found.lengths.tolist(), strict=True):
        assert (tokens[length:] == EOS).all()


@pytest.mark.parametrize("options, error, message", [
    ({"beam_size": 0}, ValueError, "beam_size must be >= 1, got 0"),
    ({"beam_size": 2.0}, TypeError, "beam_size must be an int, got float"),
    ({"max_len": 21}, ValueError, "max_len must be at most the model's 20, got 21"),
    ({"max_len": 0}, ValueError, "max_len must be >= 1, got 0"),
    ({"bos_index": 9}, ValueError, "bos_index must be from 0 to 8, got 9"),
    ({"eos_index": -1}, ValueError, "eos_index must be from 0 to 8, got -1"),
    ({"src": torch.zeros(3, dtype=torch.int64)}, ValueError, r"src must be \[B, Ls\], got shape \[3\]"),
])  # fmt: skip
def test_errors(options, error, message):
    with pytest.raises(error, match=message):
        beam_search(new(), **{"src": sources(), **MARKS, **options})
