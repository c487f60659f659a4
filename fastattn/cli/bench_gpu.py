"""`python -m fastattn bench --gpu`: check every case on a CUDA device, then time against PyTorch's paths."""

from __future__ import annotations

import argparse
import dataclasses
import os
import threading
import time
from pathlib import Path

import torch

from fastattn.bench.gpu import check, report
from fastattn.bench.gpu.check import FAILED, Outcome
from fastattn.bench.gpu.device import ceilings, describe, require, state
from fastattn.bench.gpu.runner import Options, Result, run

MOST_WORKERS = 14  # processes that compile; each holds some memory of the device


def options_of(args: argparse.Namespace) -> Options:
    """The run that the arguments ask for."""
    given = Options(quick=args.quick, filter=args.filter, flex=args.flex, backend=args.backend)
    return given if args.minutes is None else dataclasses.replace(given, minutes=args.minutes)


def measure(args: argparse.Namespace, device: torch.device) -> report.Report:
    """Check and time, printing as results come; gpu.json is rewritten after each, so that none is lost.

    Raises:
        ValueError: a bad filter.
        RuntimeError: no CUDA device can be used.
    """
    started = time.perf_counter()
    options = options_of(args)
    options.cases()  # raises where the filter is wrong
    require(device)
    args.out.mkdir(parents=True, exist_ok=True)
    machine = describe(device)
    say(*report.machine_lines(machine, {}))
    found = report.Report(machine, {}, [], [], [], dataclasses.asdict(options))
    if args.gpu != "speed":
        found = check_all(found, options, device, args.out)
    found.write_json(args.out / "gpu.json")
    if args.gpu != "check":
        found = time_all(found, options, device, args.out, started)
    say("", *report.summary_lines(found))
    found.write_json(args.out / "gpu.json")
    say("", f"in {time.perf_counter() - started:.0f} s; wrote {args.out / 'gpu.json'}")
    return found


def check_all(found: report.Report, options: Options, device: torch.device, out: Path) -> report.Report:
    """Check the cases in several processes, and print what failed as it comes."""
    names = check.chosen(options.quick, options.filter)
    workers = min(MOST_WORKERS, len(os.sched_getaffinity(0)), max(1, len(names)))
    say("", f"checking {len(names)} cases in {workers} processes")

    so_far: list[Outcome] = []
    lock = threading.Lock()

    def on_outcome(outcome: Outcome) -> None:
        with lock:
            so_far.append(outcome)
            dataclasses.replace(found, outcomes=so_far).write_json(out / "gpu.json")
            if outcome.state == FAILED:
                say(f"  FAILED {outcome.name}: {outcome.reason}")

    outcomes = check.check_in_processes(names, device, options.backend, on_outcome, workers)
    say(*check.lines(outcomes))
    return dataclasses.replace(found, outcomes=outcomes)


def time_all(
    found: report.Report, options: Options, device: torch.device, out: Path, started: float
) -> report.Report:
    """Time the cases; print each result as it comes."""
    found = dataclasses.replace(found, ceilings=ceilings(device, options.rest))
    say("", *report.machine_lines(found.machine, found.ceilings), f"now       {state()}", "", report.HEADER)
    results: list[Result] = []

    def on_result(result: Result) -> None:
        results.append(result)
        say(*report.result_lines(result))
        dataclasses.replace(found, results=results).write_json(out / "gpu.json")

    _, left_out = run(options, device, on_result, started)
    say("", f"now       {state()}", "", *report.host_lines(results))
    return dataclasses.replace(found, results=results, left_out=left_out)


def main(args: argparse.Namespace) -> int:
    """Status 1 where a result was wrong."""
    if args.list:
        for case in options_of(args).cases():
            say(f"{case.group:<24}{case.name:<46}{case.timed:<10}{case.shape}")
        return 0
    found = measure(
        args, torch.device("cuda", torch.cuda.current_device() if torch.cuda.is_available() else 0)
    )
    picture(found, args.out / "gpu.png")
    return 1 if found.failures() else 0


def picture(found: report.Report, path: Path) -> None:
    """Draw the report, or say how to get a picture."""
    try:
        from fastattn.bench.gpu.plot import draw

        if draw(found.to_dict(), path):
            say(f"wrote {path}")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
        say("no picture: matplotlib is not installed; run: pip install 'fastattn[bench]'")


def say(*lines: str) -> None:
    print("\n".join(lines), flush=True)
