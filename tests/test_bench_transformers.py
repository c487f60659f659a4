"""`bench --transformers`, on texts of a few tokens."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from fastattn.bench import transformers as bench
from fastattn.bench.transformers import rows, training, writing
from fastattn.bench.transformers.writing import Prompt, Writer
from fastattn.cli import main
from fastattn.integrations.transformers import FastCache, register

register()


@pytest.mark.parametrize("padded", [False, True])
def test_writing(monkeypatch, padded):
    """All implementations read the same; eager attention takes part once."""
    monkeypatch.setattr(writing, "peak", lambda *arguments: (12.0, 3.0))
    found = writing.write(Prompt(24, padded), 2, 2)
    names = rows.ATTENTIONS[:2] if padded else rows.ATTENTIONS
    assert [(row.kind, row.attention) for row in found] == [
        (k, n) for k in ("prefill", "decode") for n in names
    ]
    for row in found:
        assert row.timing.median > 0 and (row.ratio is None) == (row.attention == "fastattn")
        assert len(row.timing.seconds) == (1 if row.attention == "eager" else 2)
        assert row.megabytes == (12.0 if row.kind == "prefill" else 3.0)
        assert (row.interval is not None) == (row.attention == "sdpa")
        assert row.work in row.line() and row.row()["seconds"] == row.timing.median


def test_padding_changes_nothing():
    """The padded text is read as it is alone: positions count from its first token."""
    padded = Writer("fastattn", Prompt(16, True).inputs(), 2)
    ids = padded.inputs["input_ids"][:1, 8:]
    alone = Writer("sdpa", {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, 2)
    torch.testing.assert_close(padded.prefill()[:1], alone.prefill(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(padded.decode()[:1], alone.decode(), rtol=1e-4, atol=1e-4)
    assert isinstance(padded.cache, FastCache) and not isinstance(alone.cache, FastCache)


def test_training(monkeypatch):
    """Steps of padded texts, of which each implementation gives the same loss."""
    monkeypatch.setattr(training, "TOKENS", 32)
    step = training.Step("BERT", 16, 0.0, padded=True)
    found = training.train(step, 1)
    assert [row.attention for row in found] == [*rows.ATTENTIONS, rows.FREE]
    assert {row.kind for row in found} == {"train"} and found[0].work == str(step)
    _, inputs = training.made(step, "sdpa")
    assert inputs["attention_mask"].sum(1).tolist() == [4, 16]


def test_the_steps_cover_the_goals():
    kinds = {step.kind for step in training.STEPS}
    assert kinds == {kind for _, _, kind in rows.GOALS if kind.startswith("train")}
    assert all(step.seqlen >= 512 for step in training.STEPS if step.kind == "train, dropout 0.1")
    assert any(step.padded for step in training.STEPS) and {s.model for s in training.STEPS} == {
        "ViT",
        "BERT",
    }


def test_summary_names_the_goals():
    kinds = [kind for _, _, kind in rows.GOALS]
    found = [
        row
        for kind in kinds
        for row in rows.rows_of(kind, f"some {kind}", {"fastattn": [1.0], "sdpa": [2.0]})
    ]
    peaks = {"fastattn": 10.0, "sdpa": 30.0}
    found += rows.rows_of("prefill", "long text", {"fastattn": [1.0], "sdpa": [2.0]}, peaks)
    *lines, memory = bench.summary(found)
    assert len(lines) == 4 and all("2.00x" in line for line in lines)
    assert [line.split("goal: at least ")[1] for line in lines] == ["1.3x)", "1.0x)", "1.0x)", "1.5x)"]
    assert "long text: 10 MB, sdpa 30 MB" in memory


def test_free_attention_is_the_limit():
    """A step of 4 s with sdpa and 2 s with free attention can be twice as fast; 3 s saves half of that."""
    seconds = {"fastattn": [3.0], "sdpa": [4.0], "eager": [5.0], rows.FREE: [2.0]}
    _, line = bench.summary(list(rows.rows_of("train", "a step", seconds)))
    assert "free attention against sdpa: 2.00x, least 2.00x; fastattn saves 50% of that time" in line


def test_the_page_is_written_from_the_json(monkeypatch, tmp_path):
    """What `bench --transformers` writes, as a table between the marks of the docs' page."""
    scripts = Path(__file__).parent.parent / "scripts"
    monkeypatch.syspath_prepend(str(scripts))
    import transformers_measured as script

    found = [
        *rows.rows_of(
            "prefill",
            "long text",
            {"fastattn": [1.0, 1.0], "sdpa": [2.0, 2.0], "eager": [5.0]},
            {"sdpa": 7.0},
        )
    ]
    monkeypatch.setattr(bench, "run", lambda quick, on_row: found)
    assert main(["bench", "--transformers", "--threads", "1", "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "transformers.json").read_text())
    page = script.written(script.PAGE.read_text(), report)
    assert "| long text | 1 s | 2.00x [2.00, 2.00], 7 MB | 5.00x once |  |" in page
    assert "On 1 threads of" in page and "- prefill " in page
    assert script.written(page, report) == page
    with pytest.raises(ValueError, match="the page must have the lines"):
        script.written("nothing", report)


def test_disagreement_is_an_error():
    with pytest.raises(RuntimeError, match="work: the implementations' results differ"):
        rows.check("work", [torch.ones(3), torch.full((3,), 1.1)])


@pytest.mark.slow
def test_peak():
    """A process of its own: the N x N scores of eager attention show, and a cache that is copied to grow."""
    ours, eager = (writing.peak(name, Prompt(1536, False)) for name in ("fastattn", "eager"))
    assert eager[0] - ours[0] > 8 * 1536**2 * 4 / 2**20
    layer = 2 * 1536 * 64 * 4 / 2**20  # the keys of its two heads
    assert eager[1] - ours[1] > layer
    assert ours[1] > 4 * layer


def test_without_transformers():
    """The bench says what to install."""
    code = (
        "import sys; sys.modules['transformers'] = None\n"
        "from fastattn.cli import main\nsys.exit(main(['bench', '--transformers']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "needs transformers 5.16 or newer" in done.stderr and "pip install 'fastattn[hf]'" in done.stderr
