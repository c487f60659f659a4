"""What the demo measures, judges, says and draws."""

from __future__ import annotations

import dataclasses
import functools
import math

import pytest
import torch
from torch import nn

pytest.importorskip("tokenizers")
pytest.importorskip("safetensors")

from demo_support import SMALL, TINY_CASE, divided, numbered_files

from fastattn.bench.machine import describe
from fastattn.data import EnglishChinese, Pair
from fastattn.demo import judge, measure, plot, results
from fastattn.demo.free import FreeAttention, free_attention
from fastattn.demo.measure import CASES, SIDES, Case, Timing
from fastattn.demo.results import Results
from fastattn.demo.text import Text


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> EnglishChinese:
    return numbered_files(tmp_path_factory.mktemp("locale"))


@pytest.fixture(scope="module")
def text(data) -> Text:
    return Text.of(divided(data), SMALL.vocab_size)


# Measuring


def test_free_attention_is_the_projections_alone():
    attention = nn.MultiheadAttention(6, 2, batch_first=True)
    free = FreeAttention(attention)
    x, y = torch.randn(2, 2, 5, 6, requires_grad=True)
    for query, key in ((x, x), (x, y)):
        out, weights = free(query, key, key, mask=object(), need_weights=False)
        value = key @ attention.in_proj_weight[12:].T + attention.in_proj_bias[12:]
        torch.testing.assert_close(out, attention.out_proj(value))
        assert weights is None
        [grad] = torch.autograd.grad(out.sum(), attention.in_proj_weight)
        assert all(part.abs().sum() > 0 for part in grad.chunk(3))  # no projection's backward is left out


def test_free_attention_takes_every_place(text):
    model = SMALL.model(len(text.subwords))
    free_attention(model)
    kinds = [type(module) for module in model.modules()]
    assert kinds.count(FreeAttention) == 3
    assert not any(issubclass(kind, nn.MultiheadAttention) for kind in kinds)
    before = sum(parameter.numel() for parameter in SMALL.model(len(text.subwords)).parameters())
    assert sum(parameter.numel() for parameter in model.parameters()) == before


def test_sides_take_turns():
    order = []
    work = {side: functools.partial(order.append, side) for side in "abc"}
    timing = measure.in_turns(work, 0, fewest=3)
    assert "".join(order) == "cab" + "abc" + "bca" + "cab"
    assert all(len(times) == 3 for times in timing.times.values())


def test_timing_statistics():
    times = {
        "PyTorch": [3.0, 1.0, 2.0, 5.0, 4.0],
        "fastattn": [1.5, 0.5, 1.0, 2.5, 2.0],
        "free": [1.0, 0.0, 0.5, 2, 1],
    }
    timing = Timing(times)
    assert timing.median("PyTorch") == 3.0
    assert timing.quartiles("PyTorch") == (2.0, 4.0)
    assert timing.ratio == 2.0
    assert timing.ceiling == 3.0
    assert timing.share == 1.5 / 2.0  # medians of (1.5, 0.5, 1, 2.5, 2) and of (2, 1, 1.5, 3, 3)
    noisy = Timing(times | {"free": [3.5, 0.0, 1.5, 2, 5]})  # quartiles of the differences: -0.5 and 1
    assert noisy.share is None
    assert results.share_text(noisy) == "noise"
    (_, row) = results.time_table({Case(256, 0.1): timing})
    assert row.split() == [
        *("L", "=", "256,", "dropout", "0.1", "3000", "(2000-4000)", "1500", "(1000-2000)"),
        *("1000", "(500-1000)", "2.00x", "3.00x", "75%"),
    ]


def test_each_case_has_its_rows(text):
    many = dataclasses.replace(text, train=text.train * 10)
    for case in CASES:
        batch = case.batch(many)
        shape = (measure.TOKENS // case.seqlen, case.seqlen)
        assert batch.src.shape == batch.tgt.shape == batch.want.shape == shape
        assert (batch.src_documents is None) == (case.seqlen == 20)


def test_step_times_of_all_sides(text):
    state = torch.get_rng_state()
    timing = measure.step_times(SMALL, text, TINY_CASE, 0.0)
    assert list(timing.times) == list(SIDES)
    assert all(time > 0 for times in timing.times.values() for time in times)
    assert torch.equal(torch.get_rng_state(), state)


# Judging


def test_translations_and_attention(text):
    model = SMALL.model(len(text.subwords))
    sentences = [pair.english for pair in text.held_out[:3]]
    found = judge.translate(model, text.subwords, sentences)
    assert len(found) == 3
    assert found == judge.translate(model, text.subwords, sentences)
    attention = judge.attention_of(model, text.subwords, text.held_out[0], "文件一")
    assert attention.target == ["文", "件", "一", judge.END_MARK]
    assert attention.source[-1] == judge.END_MARK
    assert attention.weights.shape == (1, 4, len(attention.source))
    torch.testing.assert_close(attention.weights.sum(-1), torch.ones(1, 4))
    assert model.training


def test_the_longest_right_translation_is_drawn():
    pairs = [
        Pair(english, chinese, "")
        for english, chinese in (("a b", "甲"), ("c d e", "乙 X"), ("f g h i", "丙"))
    ]
    assert judge.telling(pairs, ["甲", "乙X", "错"]) == 1
    assert judge.telling(pairs, ["错", "错", "错"]) == 0
    assert judge.telling([], []) == 0


def test_bleu_needs_enough_sentences(data):
    pytest.importorskip("sacrebleu")
    held_out = data.train[:20]
    few = dataclasses.replace(data, held_out=held_out)
    right = [pair.chinese for pair in held_out]
    assert judge.bleu(few, right) == (
        None,
        "no BLEU: it takes at least 5,000 pairs of sentences to learn from and judge by, and this machine's "
        "catalogues have 144",
    )
    many = dataclasses.replace(few, num_sentences=5000)
    score, signature = judge.bleu(many, right)
    assert score == pytest.approx(100)
    assert "tok:zh" in signature
    assert judge.bleu(many, ["完全不同的另一句话"] * 20)[0] < 5


# What it says


def found_results(text: Text) -> Results:
    ours = [8.0 - 0.1 * n for n in range(60)]
    found = Results(describe(), 2, ours=ours, stock=[loss + 1e-5 for loss in ours[:50]])
    for case in CASES:
        found.steps[case] = Timing({"PyTorch": [3.0, 3.1], "fastattn": [1.5, 1.6], "free": [1.0, 1.1]})
    weights = torch.rand(3, 4, 5).softmax(-1)
    found.attention = judge.Attention(
        ["open", "the", "file", "now", "<end>"], ["打", "开", "文", "<end>"], weights
    )
    return found


@pytest.mark.parametrize("wrong", [2e-3, math.nan, math.inf])
def test_losses_that_differ_are_told_from_those_that_agree(text, wrong):
    found = found_results(text)
    assert found.agrees()
    said = "\n".join(results.loss_table(found))
    assert "within 0.001" in said
    assert "NOT WITHIN" not in said
    found.ours[3] += wrong
    assert not found.agrees()
    assert "at step 4: NOT WITHIN 0.001" in "\n".join(results.loss_table(found))


def test_translations_are_shown_beside_their_references():
    pairs = [Pair(f"sentence {n}", f"句子{n}", "") for n in range(10)]
    said = list(results.translation_lines(pairs, ["句子0"] * 10, count=5))
    assert said[0] == "    sentence 0\n        句子0"
    assert said[1] == "    sentence 2\n        句子0\n        (句子2)"
    assert len(said) == 5


def test_pictures(text, tmp_path):
    pytest.importorskip("matplotlib")
    found = found_results(text)
    plot.draw_loss(found, tmp_path / "loss.png")
    plot.draw_speed(found, tmp_path / "speed.png")
    plot.draw_attention(found, found.attention, tmp_path / "attention.png")
    for name in ("loss.png", "speed.png", "attention.png"):
        content = (tmp_path / name).read_bytes()
        assert content.startswith(b"\x89PNG")
        assert len(content) > 10_000
