"""`python -m fastattn view` with a model of a few steps on sentences of one form."""

from __future__ import annotations

import importlib
import io
import itertools

import pytest
import torch
from catalogue_support import write_mo

from fastattn.cli import main
from fastattn.data import load_english_chinese
from fastattn.demo import checkpoint, small, view
from fastattn.demo.recipe import Recipe
from fastattn.inspect import Record

for package in ("tokenizers", "safetensors", "tqdm", "matplotlib"):
    pytest.importorskip(package)

NUMBERS = dict(zip(["one", "two", "three", "four", "five", "six"], "一二三四五六", strict=True))
TINY = Recipe(steps=3, batch=4, vocab_size=200, d_model=16, num_heads=2, num_layers=2, d_ff=32, warmup=2)
PICTURES = ["alignment.png", "encoder.png", "entropy.png", "heads.png", "received.png"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache folder, and a small text to learn from."""
    sentences = {
        f"file {a} has {b} lines": f"文件{x}有{y}行"
        for (a, x), (b, y) in itertools.product(NUMBERS.items(), repeat=2)
    }
    write_mo(tmp_path / "locale/zh_CN/LC_MESSAGES/x.mo", sentences)
    data = load_english_chinese(folders=[tmp_path / "locale"], dictionary=False)
    monkeypatch.setattr(small, "load_english_chinese", lambda: data)
    monkeypatch.setattr(small, "RECIPE", TINY)
    monkeypatch.setattr(small.learn, "__defaults__", (TINY,))
    monkeypatch.setattr(small, "cached_path", lambda: tmp_path / "cache" / "view.safetensors")
    yield tmp_path / "cache" / "view.safetensors"
    from matplotlib import pyplot

    pyplot.close("all")


def test_first_use_learns_and_later_uses_do_not(cache, tmp_path, capsys):
    command = ["view", "--text", "file two has three lines", "--png", str(tmp_path / "out")]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert f"Learning a small model, once; it is kept as {cache}" in printed and "learning [" in printed
    assert "Translation: " in printed and "decoder.layers.1.cross_attn" in printed
    assert sorted(file.name for file in (tmp_path / "out").glob("*.png")) == PICTURES
    record = Record.load(tmp_path / "out/record.safetensors")
    queries, keys = record.texts("decoder.layers.0.cross_attn")
    assert keys == ["file", "two", "has", "three", "lines", "<end>"] and queries[-1] == "<end>"
    assert record.texts("decoder.layers.0.self_attn")[1] == ["<start>", *queries[:-1]]
    state = torch.get_rng_state()
    assert main(command) == 0
    assert "learning" not in capsys.readouterr().out.lower()
    assert torch.equal(torch.get_rng_state(), state)


def test_long_texts_have_a_progress_bar_and_pooled_pictures(cache, tmp_path, capsys, monkeypatch):
    small.learn(cache)
    capsys.readouterr()
    monkeypatch.setattr("sys.stdin", io.StringIO("file two has\nthree lines " * 120))
    assert main(["view", "--text", "-", "--model", str(cache), "--png", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "translating (at most) [#" in printed and "loss" not in printed
    assert all((tmp_path / name).exists() for name in PICTURES)
    seen = Record.load(tmp_path / "record.safetensors")
    assert seen["encoder.layers.0.self_attn"][0].shape[2] == 601
    assert seen["encoder.layers.0.self_attn"][0].weights is None


def test_the_hook_that_counts_changes_nothing(cache):
    small.learn(cache)
    model, subwords = checkpoint.load_model(cache)
    text = "file two has three lines"
    want = view.look(model, subwords, text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(view, "LONG", 1)
        got = view.look(model, subwords, text)
    assert got.translation == want.translation and str(got.record) == str(want.record)
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "error: text must have from 1 to 4999 tokens for this model, got 0"),
        (" \n", "error: text must have from 1 to 4999 tokens for this model, got 0"),
        ("file " * 5000, "error: text must have from 1 to 4999 tokens for this model, got 5000"),
    ],
)
def test_texts_that_do_not_fit(cache, text, message, capsys):
    small.learn(cache)
    assert main(["view", "--text", text]) == 1
    assert message in capsys.readouterr().err


def test_models_that_are_none(cache, tmp_path, capsys):
    assert main(["view", "--text", "a", "--model", str(tmp_path / "none")]) == 1
    assert "none" in capsys.readouterr().err
    (tmp_path / "other").write_bytes(b"something else" * 9)
    assert main(["view", "--text", "a", "--model", str(tmp_path / "other")]) == 1
    assert "other must be a checkpoint of the demo" in capsys.readouterr().err
    cache.parent.mkdir()
    cache.write_bytes(b"cut off")
    assert main(["view", "--text", "a"]) == 1
    assert "(delete it, and the next call learns it anew)" in capsys.readouterr().err


def test_interrupted_learning_leaves_nothing(cache, capsys, monkeypatch):
    monkeypatch.setattr(small, "train", lambda *_: False)
    assert main(["view", "--text", "a"]) == 130
    assert not cache.exists()


@pytest.mark.parametrize("missing", ["tokenizers", "safetensors", "tqdm", "matplotlib"])
def test_a_missing_extra_is_said_at_once(missing, capsys, monkeypatch):
    found = importlib.import_module

    def without(name, *rest):
        if name == missing:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return found(name, *rest)

    monkeypatch.setattr("fastattn.cli.view.importlib.import_module", without)
    assert main(["view", "--text", "a"]) == 2
    extra = "viz" if missing == "matplotlib" else "train"
    assert (
        f"error: {missing} is not installed; run: pip install 'fastattn[{extra}]'" in capsys.readouterr().err
    )


def test_text_is_required(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["view"])
    assert stopped.value.code == 2 and "--text" in capsys.readouterr().err


def test_the_cache_folder_is_the_systems(monkeypatch):
    monkeypatch.undo()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.platform", "linux")
        patch.setenv("XDG_CACHE_HOME", "/somewhere")
        assert str(small.cached_path()) == "/somewhere/fastattn/view-1.safetensors"
        patch.delenv("XDG_CACHE_HOME")
        assert small.cached_path().parts[-3:] == (".cache", "fastattn", "view-1.safetensors")
