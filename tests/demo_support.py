"""What the tests of the demo share: a small text, a small model, an interrupt."""

from __future__ import annotations

import dataclasses
import itertools
import os
import signal
from pathlib import Path

from catalogue_support import write_mo

from fastattn.data import EnglishChinese, load_english_chinese
from fastattn.demo.measure import Case
from fastattn.demo.recipe import Recipe
from fastattn.demo.text import Batch
from fastattn.demo.train import Trainer

NUMBERS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
HAN = "一二三四五六七八九十廿卅"
SMALL = Recipe(
    steps=8, batch=8, vocab_size=200, d_model=16, num_heads=2, num_layers=1, d_ff=32, warmup=2, dropout=0.2
)
TINY_CASE = Case(32, 0.1)


def numbered_files(folder: Path) -> EnglishChinese:
    """A catalogue of a hundred and forty-four sentences of one form."""
    sentences = {
        f"file {a} has {b} lines": f"文件{x}有{y}行"
        for (a, x), (b, y) in itertools.product(zip(NUMBERS, HAN, strict=True), repeat=2)
    }
    write_mo(folder / "zh_CN/LC_MESSAGES/x.mo", sentences)
    return load_english_chinese(folders=[folder], dictionary=False, held_out=10)


def divided(data: EnglishChinese) -> EnglishChinese:
    """With ten sentences held out by hand: all are near-duplicates of one another, so that none would be."""
    return dataclasses.replace(data, train=data.train[10:], held_out=data.train[:10])


def interrupt_at(monkeypatch, number: int) -> None:
    """Ctrl-C during that step, counted from 1 over all trainers."""
    step, count = Trainer.step, itertools.count(1)

    def interrupted(self, batch: Batch, rate: float | None = None) -> float:
        if next(count) == number:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, batch, rate)

    monkeypatch.setattr(Trainer, "step", interrupted)
