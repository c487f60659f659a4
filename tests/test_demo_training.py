"""Training in small: its batches, that both sides take the same steps, stopping and going on."""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import signal

import pytest
import torch

pytest.importorskip("tokenizers")
pytest.importorskip("safetensors")

from demo_support import SMALL, divided, interrupt_at, numbered_files

from fastattn.data import EnglishChinese
from fastattn.data.subwords import BOS, EOS, PAD
from fastattn.demo import checkpoint
from fastattn.demo.progress import progress
from fastattn.demo.recipe import Recipe
from fastattn.demo.text import PAD_DOCUMENT, Text, batches, packed, padded
from fastattn.demo.train import Run, Trainer, train


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> EnglishChinese:
    return numbered_files(tmp_path_factory.mktemp("locale"))


@pytest.fixture(scope="module")
def text(data) -> Text:
    return Text.of(divided(data), SMALL.vocab_size)


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
