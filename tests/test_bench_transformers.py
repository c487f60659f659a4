"""`bench --transformers`, on texts of a few tokens."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

pytest.importorskip("transformers")

from fastattn.bench import transformers as bench
from fastattn.bench.measure import Timing
from fastattn.integrations.transformers import FastCache, register

register()


def test_writing(monkeypatch):
    """All implementations read the same; each text with and without padding gives a row for each."""
    monkeypatch.setattr(bench, "_peak", lambda *arguments: 12.0)
    rows = list(bench._write(24, 2, 1))
    assert [row.attention for row in rows] == [*bench.ATTENTIONS * 2, *bench.ATTENTIONS[:2] * 2]
    for row in rows:
        assert row.timing.median > 0 and (row.ratio is None) == (row.attention == "fastattn")
        assert (row.megabytes is not None) == ("prefill" in row.work)
        assert row.work in row.line() and row.row()["seconds"] == row.timing.median


def test_padding_changes_nothing():
    """The padded text is read as it is alone: positions count from its first token."""
    padded, alone = bench.Writer("fastattn", bench.texts(16, True), 2), bench.Writer("sdpa", None, 2)
    ids = padded.inputs["input_ids"][:1, 8:]
    alone.inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    torch.testing.assert_close(padded.prefill()[:1], alone.prefill(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(padded.decode()[:1], alone.decode(), rtol=1e-4, atol=1e-4)
    assert isinstance(padded.cache, FastCache) and not isinstance(alone.cache, FastCache)


def test_summary_names_the_goals():
    def row(work, attention, seconds):
        ours, theirs = Timing((1.0,), 1), Timing((seconds,), 1)
        versus = None if attention == "fastattn" else bench.ratio(theirs, ours)
        return bench.Row(work, attention, theirs, versus)

    works = "Llama prefill", "Llama 256 new tokens", "BERT, dropout 0, step", "BERT, dropout 0.1, step"
    rows = [row(work, name, seconds) for work in works for name, seconds in (("fastattn", 1), ("sdpa", 2))]
    lines = list(bench.summary(rows))
    assert len(lines) == 4 and all("2.00x" in line for line in lines)
    assert [line.split("goal: at least ")[1] for line in lines] == ["1.3x)", "1.0x)", "1.0x)", "1.5x)"]


def test_disagreement_is_an_error():
    with pytest.raises(RuntimeError, match="work: the implementations' results differ"):
        bench._check("work", [torch.ones(3), torch.full((3,), 1.1)])


def test_without_transformers():
    """The integration and the bench say what to install."""
    code = (
        "import sys; sys.modules['transformers'] = None\n"
        "try:\n    import fastattn.integrations.transformers\n"
        "except ImportError as error:\n    print(error)\n"
        "from fastattn.cli import main\nsys.exit(main(['bench', '--transformers']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "needs transformers 5.16 or newer" in done.stdout and "pip install 'fastattn[hf]'" in done.stdout
    assert done.returncode == 1 and "transformers is not installed" in done.stderr
