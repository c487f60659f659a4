"""The demo in small: its batches, that both sides take the same steps, resuming, what it says and draws."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import math
import os
import signal

import pytest
import torch
from catalogue_support import write_mo
from torch import nn

pytest.importorskip("tokenizers")
pytest.importorskip("safetensors")

from fastattn.bench.machine import describe
from fastattn.cli import demo, main
from fastattn.data import EnglishChinese, Pair, load_english_chinese
from fastattn.data.subwords import BOS, EOS, PAD
from fastattn.demo import checkpoint, judge, measure, plot, results
from fastattn.demo.free import FreeAttention, free_attention
from fastattn.demo.measure import CASES, SIDES, Case, Timing
from fastattn.demo.progress import progress
from fastattn.demo.recipe import Recipe
from fastattn.demo.results import Results
from fastattn.demo.text import PAD_DOCUMENT, Batch, Text, batches, packed, padded
from fastattn.demo.train import Run, Trainer, train

NUMBERS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
HAN = "一二三四五六七八九十廿卅"
SMALL = Recipe(
    steps=8, batch=8, vocab_size=200, d_model=16, num_heads=2, num_layers=1, d_ff=32, warmup=2, dropout=0.2
)
TINY_CASE = Case(32, 0.1)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> EnglishChinese:
    """A catalogue of a hundred and forty-four sentences of one form."""
    folder = tmp_path_factory.mktemp("locale")
    sentences = {
        f"file {a} has {b} lines": f"文件{x}有{y}行"
        for (a, x), (b, y) in itertools.product(zip(NUMBERS, HAN, strict=True), repeat=2)
    }
    write_mo(folder / "zh_CN/LC_MESSAGES/x.mo", sentences)
    return load_english_chinese(folders=[folder], dictionary=False, held_out=10)


@pytest.fixture(scope="module")
def text(data) -> Text:
    # All sentences are near-duplicates of one another, so that none can be held out: take some by hand.
    divided = dataclasses.replace(data, train=data.train[10:], held_out=data.train[:10])
    return Text.of(divided, SMALL.vocab_size)


# Batches


def test_every_pair_is_in_an_epoch_once(text):
    an_epoch = len(text.train) // 8
    order = batches(text.train, 8, seed=3)
    for _ in range(2):
        rows = [tuple(row) for batch in itertools.islice(order, an_epoch) for row in batch.tgt.tolist()]
        sentences = {tuple(token for token in row if token != PAD) for row in rows}
        assert len(rows) == len(sentences) == an_epoch * 8


def test_batches_depend_on_the_seed_and_go_on_from_any(text):
    def tokens(seed: int, start: int, count: int) -> list[list[list[int]]]:
        return [batch.src.tolist() for batch in itertools.islice(batches(text.train, 8, seed, start), count)]

    whole = tokens(3, 0, 40)  # more than two epochs
    assert whole == tokens(3, 0, 40)
    assert whole != tokens(4, 0, 40)
    assert whole[:16] != whole[16:32]
    for start in (1, 16, 17, 33):
        assert tokens(3, start, 40 - start) == whole[start:]
    with pytest.raises(ValueError, match="pairs must be at least size=500, got 134"):
        next(batches(text.train, 500, 0))


def test_one_pair_a_row():
    batch = padded([([5, 6], [7]), ([8], [9, 10, 11])])
    assert batch.src.tolist() == [[5, 6, EOS], [8, EOS, PAD]]
    assert batch.tgt.tolist() == [[BOS, 7, PAD, PAD], [BOS, 9, 10, 11]]
    assert batch.want.tolist() == [[7, EOS, PAD, PAD], [9, 10, 11, EOS]]
    assert padded([([5], [7])], 4).src.tolist() == [[5, EOS, PAD, PAD]]


def test_packed_rows():
    pairs = [([5], [6, 7]), ([8, 9], [10]), ([11] * 9, [12]), ([13], [14])]
    batch = packed(pairs, 1, 6)
    assert batch.src.tolist() == [[5, EOS, 8, 9, EOS, PAD]]
    assert batch.tgt.tolist() == [[BOS, 6, 7, BOS, 10, PAD]]
    assert batch.want.tolist() == [[6, 7, EOS, 10, EOS, PAD]]
    assert batch.src_documents.tolist() == [[0, 0, 1, 1, 1, PAD_DOCUMENT]]
    assert batch.tgt_documents.tolist() == [[0, 0, 0, 1, 1, PAD_DOCUMENT]]
    with pytest.raises(ValueError, match="pairs must fill 2 rows of 20 tokens, got 4 pairs"):
        packed(pairs, 2, 20)


@pytest.mark.parametrize("attention", ["fastattn", "torch"])
def test_packing_leaves_the_loss_of_every_pair_as_it_is(text, attention):
    recipe = dataclasses.replace(SMALL, dropout=0.0, smoothing=0.0)
    trainer = Trainer(recipe.model(len(text.subwords), attention), recipe)
    together = packed(text.train, 2, 40)
    count = int((together.src == EOS).sum())
    apart = padded(text.train[:count])
    assert count > 6
    torch.testing.assert_close(trainer.loss(together), trainer.loss(apart))


# Training


def test_both_sides_take_the_same_steps(text):
    runs = {attention: Run.new(SMALL, text, attention) for attention in ("torch", "fastattn")}
    for attention, run in runs.items():
        # The runs begin with the same weights; each seeds the generator when its model is made.
        torch.manual_seed(1)
        assert train(run, text, SMALL.steps, attention)
    stock, ours = (run.losses for run in runs.values())
    assert len(stock) == len(ours) == SMALL.steps
    assert max(abs(a - b) for a, b in zip(stock, ours, strict=True)) < 1e-5
    assert stock[-1] < stock[0]
    kinds = [type(run.model.decoder.layers[0].cross_attn).__module__ for run in runs.values()]
    assert kinds == ["fastattn.models.stock", "fastattn.nn.multihead"]


def test_a_run_follows_from_its_seed(text):
    def losses(seed: int) -> list[float]:
        run = Run.new(dataclasses.replace(SMALL, seed=seed), text, "fastattn")
        train(run, text, 3, "x")
        return run.losses

    assert losses(0) == losses(0) != losses(1)


def test_the_rate_rises_and_falls():
    recipe = Recipe(steps=100, warmup=10, learning_rate=1.0)
    rates = [recipe.rate(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(range(100), key=rates.__getitem__) == 9
    assert rates[55] == pytest.approx(0.5 * (1 + math.cos(math.pi * 0.55)))
    assert 0 < rates[99] < 1e-3


def test_progress_without_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: False, raising=False)
    assert list(progress(range(15, 30), 30, "label", [1.5])) == list(range(15, 30))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5
    assert lines[0].startswith("label [######....] step 18/30, loss 1.500")
    assert lines[-1].startswith("label [##########] step 30/30")


def interrupt_at(monkeypatch, number: int) -> None:
    """Ctrl-C during that step, counted from 1 over all trainers."""
    step, count = Trainer.step, itertools.count(1)

    def interrupted(self, batch: Batch, rate: float | None = None) -> float:
        if next(count) == number:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, batch, rate)

    monkeypatch.setattr(Trainer, "step", interrupted)


def test_an_interrupted_run_goes_on_to_the_same_bits(text, tmp_path, monkeypatch):
    handler = signal.getsignal(signal.SIGINT)  # a shell's background jobs ignore it
    whole = Run.new(SMALL, text, "fastattn")
    assert train(whole, text, SMALL.steps, "whole")

    first = Run.new(SMALL, text, "fastattn")
    with monkeypatch.context() as patch:
        interrupt_at(patch, 5)
        assert not train(first, text, SMALL.steps, "first")
    assert len(first.losses) == 5  # the step at hand is finished
    path = tmp_path / "run.safetensors"
    checkpoint.save(first, text, path)
    assert list(tmp_path.iterdir()) == [path]

    torch.manual_seed(99)  # whatever happens to the generator in between
    second = checkpoint.load(path, text)
    assert second.losses == first.losses
    assert second.trainer.recipe == SMALL
    assert train(second, text, SMALL.steps, "second")
    assert second.losses == whole.losses
    for a, b in zip(whole.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert signal.getsignal(signal.SIGINT) is handler


def test_a_second_interrupt_does_not_wait(text, monkeypatch):
    step = Trainer.step

    def interrupted(self, batch, rate=None):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        return step(self, batch, rate)

    monkeypatch.setattr(Trainer, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(Run.new(SMALL, text, "fastattn"), text, SMALL.steps, "x")


def test_what_is_no_checkpoint_of_this_text_is_refused(text, tmp_path):
    path = tmp_path / "x.safetensors"
    run = Run.new(SMALL, text, "fastattn")
    checkpoint.save(run, text, path)
    other = dataclasses.replace(text, train=text.train[1:])
    with pytest.raises(ValueError, match="must be of the text found on this machine"):
        checkpoint.load(path, other)
    path.write_bytes(b"something else")
    with pytest.raises(ValueError, match="must be a checkpoint of the demo"):
        checkpoint.load(path, text)
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="must be a checkpoint of the demo, got other tensors"):
        checkpoint.read_recipe(path)
    with pytest.raises(FileNotFoundError):
        checkpoint.read_recipe(tmp_path / "nothing")


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


# All of it


@pytest.fixture
def tiny(monkeypatch, data) -> None:
    """The demo with a small model, few steps, one short case, and the catalogue of these tests."""
    divided = dataclasses.replace(data, train=data.train[10:], held_out=data.train[:10])
    monkeypatch.setattr(demo, "load_english_chinese", lambda: divided)
    monkeypatch.setattr(demo, "Recipe", lambda: SMALL)
    monkeypatch.setattr(demo, "CASES", (TINY_CASE,))
    monkeypatch.setattr(demo, "SECONDS_PER_CASE", 0.0)


def arguments(out, **given) -> argparse.Namespace:
    return argparse.Namespace(**{"steps": None, "seed": None, "resume": False, "out": out} | given)


def test_demo(tiny, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    pytest.importorskip("sacrebleu")
    out = tmp_path / "demo"
    assert demo.run(arguments(out)) == 0
    said = capsys.readouterr().out
    for line in (
        describe()["cpu"],
        "Text: 144 pairs of 1 programs' message catalogues",
        "Training: 8 steps of 8 pairs, float32, seed 0; the first 8 with PyTorch's attention",
        "within 0.001",
        "L = 32, dropout 0.1",
        "file eight has",
        "no BLEU: it takes at least 5,000 pairs",
        "attention.png",
    ):
        assert line in said
    assert {path.name for path in out.iterdir()} == {
        "checkpoint.safetensors",
        "loss.png",
        "speed.png",
        "attention.png",
    }


def test_demo_stops_and_goes_on(tiny, tmp_path, capsys, monkeypatch):
    assert demo.run(arguments(tmp_path / "whole", seed=7)) == 0
    whole = demo.checkpoint.load(tmp_path / "whole/checkpoint.safetensors", the_text())
    with monkeypatch.context() as patch:
        interrupt_at(patch, SMALL.steps + 3)  # after the steps with PyTorch's attention
        assert demo.run(arguments(tmp_path, seed=7)) == 130
    said = capsys.readouterr().out
    assert f"Stopped after 3 of 8 steps; to go on: python -m fastattn demo --resume --out {tmp_path}" in said

    assert demo.run(arguments(tmp_path, seed=8, resume=True)) == 1
    assert "error: --seed must be the checkpoint's 7 with --resume, got 8" in capsys.readouterr().err
    assert demo.run(arguments(tmp_path, resume=True)) == 0
    again = demo.checkpoint.load(tmp_path / "checkpoint.safetensors", the_text())
    assert again.losses == whole.losses
    assert len(again.losses) == SMALL.steps


def the_text() -> Text:
    return Text.of(demo.load_english_chinese(), SMALL.vocab_size)


def test_demo_fails_where_losses_differ(tiny, tmp_path, capsys, monkeypatch):
    loss = Trainer.loss

    def off_by_a_little(self, batch):
        stock = type(self.model.decoder.layers[0].cross_attn).__module__ == "fastattn.models.stock"
        return loss(self, batch) + (5e-3 if stock else 0.0)

    monkeypatch.setattr(Trainer, "loss", off_by_a_little)
    assert demo.run(arguments(tmp_path)) == 1
    captured = capsys.readouterr()
    assert "NOT WITHIN 0.001" in captured.out
    assert "error: the losses differ by up to 5.0e-03" in captured.err


def test_what_is_missing_is_said_before_anything_is_trained(tiny, tmp_path, capsys, monkeypatch):
    (tmp_path / "taken").write_text("")
    assert demo.run(arguments(tmp_path / "taken")) == 1
    assert demo.run(arguments(tmp_path / "new", resume=True)) == 1
    printed = capsys.readouterr()
    assert printed.err.count("error:") == 2
    assert not printed.out

    def nothing():
        raise FileNotFoundError("no English-Chinese text found")

    monkeypatch.setattr(demo, "load_english_chinese", nothing)
    assert demo.run(arguments(tmp_path)) == 1
    assert "error: no English-Chinese text found" in capsys.readouterr().err

    def missing(*_):
        raise ModuleNotFoundError("No module named 'tokenizers'", name="tokenizers")

    monkeypatch.setattr(demo, "_run", missing)
    assert main(["demo", "--out", str(tmp_path)]) == 2
    assert "pip install 'fastattn[train]'" in capsys.readouterr().err
