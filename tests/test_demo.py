"""The demo in small, as the command runs it."""

from __future__ import annotations

import argparse

import pytest

pytest.importorskip("tokenizers")
pytest.importorskip("safetensors")

from demo_support import SMALL, TINY_CASE, divided, interrupt_at, numbered_files

from fastattn.bench.machine import describe
from fastattn.cli import demo, main
from fastattn.data import EnglishChinese
from fastattn.demo.text import Text
from fastattn.demo.train import Trainer


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> EnglishChinese:
    return numbered_files(tmp_path_factory.mktemp("locale"))


@pytest.fixture
def tiny(monkeypatch, data) -> None:
    """The demo with a small model, few steps, one short case, and the catalogue of these tests."""
    monkeypatch.setattr(demo, "load_english_chinese", lambda: divided(data))
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
