"""Results as lines of text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastattn.bench.contenders import OURS
from fastattn.bench.machine import Ceilings
from fastattn.bench.measure import Ratio
from fastattn.bench.report import QUIET, SCHEMA, Report, geometric_mean
from fastattn.bench.runner import Result

HEADER = (
    f"{'case':<38}{'thr':>3}{'fastattn ms':>13}{'quartiles':>17}{'GFLOP/s':>9}{'peak':>6}{'GB/s':>6}"
    f"{'PyTorch ms':>12}{'GFLOP/s':>9}  {'path':<13}{'ratio [95%]':<22}other call / ours"
)
TITLES = {
    "torch": "goal: time of PyTorch's best path / ours",
    "own": "goal: against our own other call",
    "peak": "goal: share of the FMA peak measured next to it",
}
BUSY = 0.7  # one busy process is enough to disturb a run with as many threads as cores


def thread_word(threads: int) -> str:
    return "1 thread" if threads == 1 else f"{threads} threads"


def _columns(threads: Sequence[int]) -> str:
    return "".join(f"{thread_word(n):>12}" for n in threads)


def machine_lines(machine: dict[str, Any]) -> list[str]:
    """What is measured on, and with what."""
    lines = [
        f"machine   {machine['cpu']}, {machine['cores']} cores, {machine['platform']}",
        f"software  fastattn {machine['fastattn']} ({machine['isa']}), torch {machine['torch']} "
        f"({machine['torch_cpu_capability']}), Python {machine['python']}",
    ]
    if machine["isa"] == "avx2" and machine["torch_cpu_capability"].startswith("AVX512"):
        lines.append(
            "warning   PyTorch computes with wider vectors than ours; to hold both to AVX2: make bench-avx2"
        )
    if (machine["load_at_start"] or 0) > BUSY:
        lines.append(
            f"warning   load average {machine['load_at_start']}: other work is running, times mean little"
        )
    return lines


def ceiling_lines(ceilings: Sequence[Ceilings]) -> list[str]:
    """FMA peak and copy bandwidth for each number of threads."""

    def text(value: dict[str, float] | None, unit: str) -> str:
        if value is None:
            return "not measured"
        return f"{value['median']:.0f} {unit} ({value['low']:.0f}-{value['high']:.0f})"

    lines = ["ceilings measured between the cases, median (range):"]
    for each in ceilings:
        facts = each.summary()
        fma, copy = text(facts["fma_gflops"], "GFLOP/s"), text(facts["copy_gbs"], "GB/s")
        lines.append(f"  {thread_word(each.threads):<10} FMA peak {fma}, copy bandwidth {copy}")
    return lines


def result_line(result: Result) -> str:
    """One case and number of threads: ours, then PyTorch's best path, then the ratio of times."""
    rows = {row["backend"]: row for row in result.rows()}
    ours, best = rows[OURS], rows[result.best]
    share = "" if ours["of_fma_peak"] is None else f"{ours['of_fma_peak']:.0%}"
    gbs = "" if ours["gbs"] is None else f"{ours['gbs']:.1f}"
    quartiles = "{:.3g}-{:.3g}".format(*ours["ms_quartiles"])
    return (
        f"{result.bench.name:<38}{result.threads:>3}{_ms(ours['ms']):>13}{quartiles:>17}"
        f"{ours['gflops']:>9.1f}{share:>6}{gbs:>6}"
        f"{_ms(best['ms']):>12}{best['gflops']:>9.1f}  {result.best:<13}{result.ratio!s:<22}"
        f"{'' if result.own is None else f'{result.own.ratio} {result.own.label}'}"
        f"{'  slower' if result.is_slower else ''}"
    ).rstrip()


def _ms(value: float) -> str:
    """Milliseconds with four digits that count."""
    return f"{value:.4g}"


def summary_lines(report: Report) -> list[str]:
    """Geometric means by group, and the cases that are clearly slower."""
    threads = report.threads()
    lines = [f"{'PyTorch time / fastattn time, geometric mean':<46}" + _columns(threads)]
    for group, means in report.groups().items():
        lines.append(f"  {group:<44}" + "".join(f"{means[n]:>11.2f}x" for n in threads))
    lines += own_lines(report)
    slower = report.slower()
    lines += [
        "",
        f"clearly slower than PyTorch (whole interval below 1): {len(slower)} of {len(report.results)}",
    ]
    lines += [f"  {r.bench.name}, {thread_word(r.threads)}: {r.ratio}" for r in slower]
    if disturbed := len(report.disturbed()):
        lines += [
            "",
            f"warning: {disturbed} of {len(report.results)} measurements were disturbed: next to them the",
        ]
        lines += [
            f"machine gave less than {QUIET:.0%} of its best FMA rate. Repeat them when nothing else runs."
        ]
    return lines


def own_lines(report: Report) -> list[str]:
    """Geometric means by group of our other call's time over ours."""
    threads = report.threads()
    if not (groups := report.own_groups()):
        return []
    lines = ["", f"{'time of our other call / ours, geometric mean':<46}" + _columns(threads)]
    for (group, label), means in groups.items():
        cells = (f"{means[n]:>11.2f}x" if n in means else f"{'-':>12}" for n in threads)
        lines.append(f"  {f'{group}, against {label}':<44}" + "".join(cells))
    return lines


def goal_lines(report: Report) -> list[str]:
    """Each goal with its number: met or missed; "<=" where it bounds our time over the other's."""
    goals = report.goals()
    if not goals:
        return []
    lines: list[str] = []
    for measure, title in TITLES.items():
        chosen = [_goal_line(goal) for goal in goals if goal["measure"] == measure]
        if chosen:
            lines += [""] if lines else []
            lines += [f"{title:<50}{'threads':>8}{'want':>11}{'got':>9}   range", *chosen]
    missed = sum(not goal["met"] for goal in goals)
    return [*lines, "", f"{len(goals) - missed} of {len(goals)} goals met"]


def _goal_line(goal: dict[str, Any]) -> str:
    def text(value: float) -> str:
        return f"{value:.0%}" if goal["measure"] == "peak" else f"{value:.2f}x"

    want = f"{'<=' if goal['at_most'] else '>='} {text(goal['want'])}"
    spread = f"{text(goal['lowest'])}-{text(goal['highest'])} of {goal['cases']}"
    word = "met" if goal["met"] else "MISSED"
    return f"{goal['goal']:<50}{goal['threads']:>8}{want:>11}{text(goal['got']):>9}   {spread:<20} {word}"


def compare_lines(report: Report, baseline: dict[str, Any]) -> list[str]:
    """Ratios to PyTorch against those of another run: with PyTorch as the yardstick, the machine's mood
    cancels. Cases are listed whose intervals do not touch.

    Raises:
        ValueError: the baseline has another schema, or no case in common.
    """
    if baseline.get("schema") != SCHEMA:
        raise ValueError(f"baseline must have schema {SCHEMA}, got {baseline.get('schema')!r}")
    old = {
        (row["case"], row["threads"]): Ratio(row["ratio"], *row["ratio_interval"])
        for row in baseline["rows"]
        if row["backend"] == OURS
    }
    pairs = [(r, old[key]) for r in report.results if (key := (r.bench.name, r.threads)) in old]
    if not pairs:
        raise ValueError("baseline must have a case in common with this run, got none")
    change = geometric_mean(new.ratio.value / before.value for new, before in pairs)
    lines = [f"against the baseline: {change:.3f}x in geometric mean over {len(pairs)} cases"]
    for new, before in pairs:
        if new.ratio.low > before.high or new.ratio.high < before.low:
            word = "faster" if new.ratio.value > before.value else "slower"
            lines.append(f"  {word}  {new.bench.name}, {thread_word(new.threads)}: {before} -> {new.ratio}")
    return lines
