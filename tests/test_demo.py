"""The demo in small: what it reads, that both sides take the same steps, what it says and writes."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import math
import mmap
import sys

import pytest
import torch

from fastattn.bench.machine import describe
from fastattn.cli import demo
from fastattn.data import StdlibDocs, load_stdlib_docs
from fastattn.demo import measure, memory, plot, results, train
from fastattn.demo.measure import SIDES, Case, Timing, side
from fastattn.demo.model import LanguageModel, ModelConfig, new_model
from fastattn.demo.results import Results
from fastattn.demo.text import Tokens, batches
from fastattn.integrations.torch import stand_ins

TEXT = "Return the number of items. Raise KeyError if there are none.\n" * 40
SMALL = ModelConfig(vocab_size=30, num_layers=2, num_heads=2, width=16)
RECIPE = train.Recipe(steps=8, batch=2, seqlen=24, learning_rate=1e-2, warmup=2)


@pytest.fixture
def ours(monkeypatch) -> list[dict]:
    """The keyword arguments of each attention call that reaches fastattn through the override."""
    seen: list[dict] = []
    function = stand_ins.scaled_dot_product_attention

    def spy(*args, **kwargs):
        seen.append(kwargs)
        return function(*args, **kwargs)

    monkeypatch.setattr(stand_ins, "scaled_dot_product_attention", spy)
    return seen


def runs(recipe: train.Recipe = RECIPE, config: ModelConfig = SMALL) -> dict[str, train.Run]:
    tokens = Tokens.of(TEXT)
    found = {}
    for name in SIDES:
        with side(name):
            found[name] = train.train(config, tokens, recipe, name)
    return found


def results_of(found: dict[str, train.Run]) -> Results:
    return Results(describe(), 2, runs=found, held_out=dict.fromkeys(SIDES, 1.0))


@pytest.fixture(scope="module")
def docs() -> StdlibDocs:
    return load_stdlib_docs()


# Text


def test_the_standard_library_is_found_and_the_same_twice(docs):
    assert len(docs.text) > 1_000_000
    assert docs.num_docstrings > 3000
    assert docs.text.isascii()
    assert "iterable" in docs.text
    assert docs.text == load_stdlib_docs().text
    assert f"{len(docs.text):,} characters" in docs.describe()


def test_docstrings_are_read_but_tests_and_packages_are_not(tmp_path):
    source = '"""A module with a docstring long enough."""\ndef f():\n    """{}."""\n'
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "pydoc_data").mkdir()
    (tmp_path / "a.py").write_text(source.format("Text of the function, “quoted”,\n\n      indented   "))
    (tmp_path / "b.py").write_text(source.format("Too short"))
    (tmp_path / "broken.py").write_text("def f(:")
    (tmp_path / "site-packages" / "c.py").write_text(source.format("Not of the standard library: not read"))
    (tmp_path / "pydoc_data" / "topics.py").write_text("topics = {'b': 'Second topic.', 'a': 'First topic.'}")
    docs = load_stdlib_docs(tmp_path)
    assert docs.text == (
        "First topic.\n\nSecond topic.\n\nA module with a docstring long enough.\n\n"
        "Text of the function, quoted,\n\nindented   .\n\n"
    )
    assert (docs.num_topics, docs.num_docstrings, docs.num_modules) == (2, 2, 2)


def test_no_text_says_what_to_install(tmp_path, monkeypatch, capsys):
    with pytest.raises(FileNotFoundError, match="Install the full standard library"):
        load_stdlib_docs(tmp_path)
    monkeypatch.setattr(demo, "load_stdlib_docs", lambda: load_stdlib_docs(tmp_path))
    assert demo.run(argparse.Namespace(seconds=1, seed=0, out=tmp_path)) == 1
    assert "error: no documentation found" in capsys.readouterr().err


def test_tokens_and_batches():
    tokens = Tokens.of(TEXT)
    assert tokens.decode(torch.cat((tokens.train, tokens.held_out))) == TEXT
    assert tokens.decode(tokens.encode("Raise")) == "Raise"
    first, second = (list(itertools.islice(batches(tokens.train, 3, 10, seed=5), 4)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0], first[1])
    assert all(batch.shape == (3, 11) and tokens.decode(batch[0]) in TEXT for batch in first)
    with pytest.raises(ValueError, match="tokens must be more than 10, got 10"):
        next(batches(tokens.train[:10], 3, 10, seed=0))


# Training


def test_the_model_looks_only_back():
    model = new_model(SMALL, 0)
    for block in model.blocks:
        torch.nn.init.normal_(block.proj.weight)
    tokens = torch.randint(30, (2, 12), generator=torch.Generator().manual_seed(0))
    changed = tokens.clone()
    changed[:, 7] = (changed[:, 7] + 1) % 30
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :7], after[:, :7])
    assert (before[:, 7:] != after[:, 7:]).any(-1).all()


def test_both_sides_take_the_same_steps(ours):
    found = runs()
    assert len(ours) == RECIPE.steps * SMALL.num_layers
    assert all(call["backend"] is None for call in ours)
    assert [len(run.losses) for run in found.values()] == [RECIPE.steps] * 2
    assert results_of(found).agrees()
    assert max(results_of(found).differences()) < 1e-3
    stock = found["PyTorch"].losses
    assert stock[-1] < stock[0] - 0.05
    assert runs()["PyTorch"].losses == stock
    assert runs(dataclasses.replace(RECIPE, seed=1))["PyTorch"].losses != stock


def test_dropout_reaches_the_attention_call(ours):
    runs(config=dataclasses.replace(SMALL, dropout=0.25))
    with side("fastattn"), torch.no_grad():
        new_model(SMALL, 0).eval()(torch.zeros(1, 4, dtype=torch.int64))
    assert ours  # arguments are positional there, so look at what dropout does
    config = dataclasses.replace(SMALL, dropout=0.25)
    model = new_model(config, 0)
    torch.nn.init.normal_(model.blocks[0].proj.weight)
    tokens = torch.arange(12)[None]
    assert not torch.equal(model(tokens), model(tokens))
    model.eval()
    assert torch.equal(model(tokens), model(tokens))


@pytest.mark.parametrize("wrong", [2e-3, math.nan, math.inf])
def test_losses_that_differ_are_told_from_those_that_agree(wrong):
    found = results_of(runs())
    text = "\n".join(results.loss_table(found))
    assert "within 0.001" in text
    assert "NOT WITHIN" not in text
    found.runs["fastattn"].losses[3] += wrong
    assert not found.agrees()
    assert "at step 4: NOT WITHIN 0.001" in "\n".join(results.loss_table(found))


def test_generation_follows_the_seed():
    tokens = Tokens.of(TEXT)
    model = new_model(ModelConfig(len(tokens.alphabet), num_layers=1, num_heads=1, width=8), 0)
    first, again, other = (train.generate(model, tokens, "Return", 20, seed) for seed in (0, 0, 1))
    assert first == again != other
    assert first.startswith("Return")
    assert len(first) == 26
    assert model.training


def test_progress_without_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
    losses = [1.5]
    assert list(train.progress(range(30), 30, "label", losses)) == list(range(30))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 10
    assert lines[-1].startswith("label [##########] step 30/30, loss 1.500")


# Measuring


def test_sides_take_turns():
    order = []
    timing = measure.in_turns(lambda: order.append(torch.overrides._get_current_function_mode()), 0, fewest=4)
    names = ["PyTorch" if mode is None else "fastattn" for mode in order]
    assert names == ["PyTorch", "fastattn", "fastattn", "PyTorch"] * 2 + ["PyTorch", "fastattn"]
    assert all(len(times) == 4 for times in timing.times.values())


def test_timing_statistics():
    timing = Timing({"PyTorch": [3.0, 1.0, 2.0, 5.0, 4.0], "fastattn": [1.0, 1.5, 2.0, 1.4, 1.6]})
    assert timing.median("PyTorch") == 3.0
    assert timing.quartiles("PyTorch") == (2.0, 4.0)
    assert timing.ratio == 2.0
    (_, row) = results.time_table({Case(256, 0.1, 8): timing})
    assert row.split() == ["L", "=", "256,", "dropout", "0.1", "3000.00", "(2000.00-4000.00)", "1500.00",
                           "(1400.00-1600.00)", "2.00x"]  # fmt: skip


def test_resident_memory_grows_with_what_is_kept():
    now, peak = memory.resident()
    assert 0 < now <= peak
    size = 64 * 2**20
    with mmap.mmap(-1, size) as pages:  # not from malloc, which may still hold pages it had before
        for start in range(0, size, mmap.PAGESIZE):
            pages[start] = 1
        assert memory.resident()[0] - now > 0.9 * size


# All of it


@pytest.fixture
def tiny(monkeypatch, docs) -> None:
    """The demo with a small model, few steps and one short case."""
    monkeypatch.setattr(demo, "load_stdlib_docs", lambda: docs)
    monkeypatch.setattr(demo, "ModelConfig", functools.partial(ModelConfig, num_layers=1, width=16))
    monkeypatch.setattr(train, "steps_for", lambda *_: 6)
    monkeypatch.setattr(demo, "CASES", (Case(32, 0.1, 2),))
    monkeypatch.setattr(demo, "SAMPLE_LENGTH", 12)


def test_demo(tiny, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    out = tmp_path / "demo"
    assert demo.run(argparse.Namespace(seconds=0.1, seed=0, out=out)) == 0
    text = capsys.readouterr().out
    for line in (
        describe()["cpu"],
        "characters: ",
        "6 steps of 4 x 256 characters",
        "held out",
        "within 0.001",
        "from 'Return '",
        "L = 32, dropout 0.1",
        "Memory: peak resident memory",
        "speed.png",
    ):
        assert line in text
    for name in ("speed.png", "loss.png"):
        data = (out / name).read_bytes()
        assert data.startswith(b"\x89PNG")
        assert len(data) > 10_000


def test_demo_fails_where_losses_differ(tiny, tmp_path, capsys, monkeypatch):
    loss = LanguageModel.loss

    def off_by_a_little(self, tokens):
        mode = torch.overrides._get_current_function_mode()
        return loss(self, tokens) + (0.0 if mode is None else 5e-3)

    monkeypatch.setattr(LanguageModel, "loss", off_by_a_little)
    monkeypatch.setattr(memory, "grown", lambda *_: 1)
    assert demo.run(argparse.Namespace(seconds=0.1, seed=0, out=tmp_path)) == 1
    captured = capsys.readouterr()
    assert "NOT WITHIN 0.001" in captured.out
    assert "error: the losses differ by up to 5.0e-03" in captured.err


def test_demo_without_matplotlib_and_without_memory(tiny, tmp_path, capsys, monkeypatch):
    def missing(*_):
        raise ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib")

    def unknown(*_):
        raise RuntimeError("this system tells no process how much memory it had")

    monkeypatch.setattr(plot, "draw_speed", missing)
    monkeypatch.setattr(memory, "grown", unknown)
    assert demo.run(argparse.Namespace(seconds=0.1, seed=0, out=tmp_path)) == 0
    text = capsys.readouterr().out
    assert "Peak memory was not measured: this system tells no process" in text
    assert "No pictures: matplotlib is not installed; run: pip install 'fastattn[viz]'" in text


def test_the_folder_is_made_before_anything_is_trained(tmp_path, capsys):
    (tmp_path / "taken").write_text("")
    assert demo.run(argparse.Namespace(seconds=0.1, seed=0, out=tmp_path / "taken")) == 1
    printed = capsys.readouterr()
    assert printed.err.startswith("error:") and not printed.out
