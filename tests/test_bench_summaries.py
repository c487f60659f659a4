"""`bench --summaries`: rows, summary and file of a short run."""

from __future__ import annotations

import json

import pytest

from fastattn.backends import cpu
from fastattn.bench import summaries
from fastattn.cli import main


@pytest.mark.skipif(not cpu.available(), reason="the native core fastattn._C is not built")
def test_a_short_run(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(summaries, "SHAPES", ((1, 1, 32, 8),))
    monkeypatch.setattr(summaries, "MIN_SAMPLE", 0.0)
    assert main(["bench", "--summaries", "--threads", "1", "--seconds", "0.001", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    rows = json.loads((tmp_path / "summaries.json").read_text())["rows"]
    assert [(row["what"], row["causal"]) for row in rows] == [
        (what, is_causal) for is_causal in (False, True) for what in summaries.WANTED
    ]
    for row in rows:
        low, high = row["ratio_interval"]
        assert row["ms"] > 0 and low <= row["ratio"] <= high
        assert row["ratio"] == pytest.approx(row["ms"] / row["forward_ms"])
    assert "(1, 1, 32, 8) causal no lse" in printed
    assert "goal at most 0.8" in printed
