"""A finished run on a GPU: the goals, all of it as plain values, and as lines of text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fastattn.bench.contenders import OURS
from fastattn.bench.gpu.check import FAILED, Outcome
from fastattn.bench.gpu.goals import GOALS
from fastattn.bench.gpu.runner import Result
from fastattn.bench.report import geometric_mean
from fastattn.testing.gpu_bench_cases import HOST

SCHEMA = 1
HEADER = f"{'case':<42}{'path':<18}{'ms':>9}{'quartiles':>17}{'TFLOP/s':>9}   time / ours [95%]"


@dataclass(frozen=True)
class Report:
    """A run.

    Args:
        machine: see `fastattn.bench.gpu.device.describe`.
        ceilings: see `fastattn.bench.gpu.device.ceilings`; empty where nothing was timed.
        outcomes: of the checked cases.
        results: of the timed ones, in order.
        left_out: names of the cases for which there was no time.
        options: what was asked for, as plain values.
    """

    machine: dict[str, Any]
    ceilings: dict[str, float]
    outcomes: Sequence[Outcome]
    results: Sequence[Result]
    left_out: Sequence[str]
    options: dict[str, Any]

    def failures(self) -> list[str]:
        """What is wrong: checked cases, and timed ones with other results than PyTorch's paths."""
        wrong = [f"{each.name}: {each.reason}" for each in self.outcomes if each.state == FAILED]
        return wrong + [
            f"{each.bench.name}: {each.failure}" for each in self.results if each.failure is not None
        ]

    def goals(self) -> list[dict[str, Any]]:
        """One entry for each goal that the run has cases for."""
        entries = [entry for goal in GOALS if (entry := goal.judge(self.results)) is not None]
        if self.outcomes:
            wrong = sum(each.state == FAILED for each in self.outcomes)
            entries.insert(0, _none_wrong(wrong, len(self.outcomes)))
        return entries

    def means(self) -> dict[str, dict[str, float]]:
        """Geometric means of each path's time over ours: group -> path -> mean."""
        found: dict[str, dict[str, list[float]]] = {}
        for result in self.results:
            for name in result.timings:
                ratio = result.ratio_to(name)
                if name != OURS and ratio is not None:
                    found.setdefault(result.bench.group, {}).setdefault(name, []).append(ratio.value)
        return {
            group: {name: geometric_mean(values) for name, values in paths.items()}
            for group, paths in found.items()
        }

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values, for JSON."""
        return {
            "schema": SCHEMA,
            "machine": self.machine,
            "ceilings": self.ceilings,
            "options": self.options,
            "goals": self.goals(),
            "failures": self.failures(),
            "checked": [asdict(each) for each in self.outcomes],
            "means": self.means(),
            "rows": [row for result in self.results for row in result.rows()],
            "refused": {each.bench.name: each.refused for each in self.results if each.refused},
            "seconds": {each.bench.name: each.seconds for each in self.results},
            "left_out": list(self.left_out),
        }

    def write_json(self, path: Path) -> None:
        path.write_text(json.dumps(self.to_dict(), indent=1) + "\n")


def _none_wrong(wrong: int, cases: int) -> dict[str, Any]:
    return {
        "goal": "results that differ from the reference", "want": 0, "unit": "cases", "at_most": True,
        "got": wrong, "lowest": wrong, "highest": wrong, "cases": cases, "met": wrong == 0,
    }  # fmt: skip


def machine_lines(machine: dict[str, Any], ceilings: dict[str, float]) -> list[str]:
    """What is measured on, and with what."""
    facts = [f"machine   {machine['gpu']}"]
    if "driver" in machine:
        facts[0] += (
            f", compute capability {machine['capability']}, {machine['multiprocessors']} multiprocessors, "
            f"{machine['memory_gib']} GiB, cache {machine['cache_mib']} MiB, driver {machine['driver']}, "
            f"power limit {machine['power_limit']}"
        )
    facts.append(
        f"software  fastattn {machine['fastattn']}, torch {machine['torch']}, triton {machine['triton']}, "
        f"CUDA {machine['cuda']}, cuDNN {machine['cudnn']}, Python {machine['python']}"
    )
    if ceilings:
        facts.append(
            f"ceilings  bfloat16 product of 8192³ {ceilings['product_tflops']:.0f} TFLOP/s, "
            f"copy {ceilings['copy_tbs']:.2f} TB/s"
        )
    return facts


def result_lines(result: Result) -> list[str]:
    """One case: a line for ours and each of PyTorch's paths, the fastest marked; why others did not run."""
    lines = [_path_line(result, row) for row in result.rows()]
    lines += [f"{name:<18}{reason[:110]}" for name, reason in result.refused.items()]
    if result.failure is not None:
        lines.append(f"FAILED: {result.failure}")
    names = [result.bench.name, *[""] * len(lines)]
    return [f"{name:<42}{line}" for name, line in zip(names, lines, strict=False)]


def _path_line(result: Result, row: dict[str, Any]) -> str:
    quartiles = "{:.3g}-{:.3g}".format(*row["ms_quartiles"])
    rate = "" if row["tflops"] is None else f"{row['tflops']:.0f}"
    ratio = "" if row["path"] == OURS else str(result.ratio_to(row["path"]) or "")
    mark = "  best of PyTorch" if row["is_best"] else ""
    return f"{row['path']:<18}{row['ms']:>9.4g}{quartiles:>17}{rate:>9}   {ratio}{mark}".rstrip()


def summary_lines(report: Report) -> list[str]:
    """Means by group, the goals, what failed and what was left out."""
    lines: list[str] = []
    if means := report.means():
        lines.append("time / ours, geometric mean over the cases of a group:")
        for group, paths in means.items():
            cells = ", ".join(f"{name} {mean:.2f}x" for name, mean in paths.items())
            lines.append(f"  {group:<24}{cells}")
    if goals := report.goals():
        lines += ["", f"{'goal':<52}{'want':>15}{'got':>9}   range", *map(_goal_line, goals)]
        lines.append(f"{sum(goal['met'] for goal in goals)} of {len(goals)} goals met")
    if failures := report.failures():
        lines += ["", f"{len(failures)} FAILED", *(f"  {each}" for each in failures)]
    if report.left_out:
        lines += ["", f"no time was left for {len(report.left_out)} cases: {', '.join(report.left_out)}"]
    return lines


def _goal_line(goal: dict[str, Any]) -> str:
    def text(value: float) -> str:
        return f"{value:.2f}" if goal["unit"] == "x" else f"{value:.0f}"

    want = f"{'<=' if goal['at_most'] else '>='} {text(goal['want'])} {goal['unit']}"
    spread = f"{text(goal['lowest'])}-{text(goal['highest'])} of {goal['cases']}"
    word = "met" if goal["met"] else "MISSED"
    return f"{goal['goal']:<52}{want:>15}{text(goal['got']):>9}   {spread:<18} {word}"


def host_lines(results: Sequence[Result]) -> list[str]:
    """The host's time of a call, in microseconds, of every path."""
    rows = [row for result in results if result.bench.group == HOST for row in result.rows()]
    if not rows:
        return []
    return ["host time of a call (us), the device not waited for:"] + [
        f"  {row['case']:<40}{row['path']:<18}{row['ms'] * 1e3:>8.1f}" for row in rows
    ]
