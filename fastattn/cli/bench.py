"""`python -m fastattn bench`: measure attention against PyTorch's on this machine."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import time
from importlib import import_module
from pathlib import Path
from typing import Any

from fastattn import bench
from fastattn.bench.machine import describe
from fastattn.bench.report import SCHEMA
from fastattn.bench.table import (
    HEADER,
    ceiling_lines,
    compare_lines,
    goal_lines,
    machine_lines,
    result_line,
    summary_lines,
)
from fastattn.cli.options import positive_int, positive_seconds
from fastattn.cli.status import status_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the subcommand's options."""
    add = parser.add_argument
    add("--quick", action="store_true", help="fewer cases and less time: about a minute")
    add(
        "--threads",
        type=positive_int,
        nargs="+",
        metavar="N",
        help="numbers of threads (default: 1 2, one core: 1)",
    )
    add("--filter", default="", metavar="REGEX", help="only cases whose group or name contains a match")
    add("--seconds", type=positive_seconds, metavar="S", help="time for a case and a number of threads")
    add(
        "--flex",
        action="store_true",
        help="also against compiled FlexAttention on causal and window masks; with --gpu, where it always "
        "takes part at some lengths: at all",
    )
    add("--out", type=Path, default=Path("fastattn-bench"), metavar="DIR", help="default: %(default)s")
    add("--baseline", type=Path, metavar="JSON", help="compare with an earlier run's bench.json")
    add("--modules", action="store_true", help="nn.MultiheadAttention instead, against PyTorch's module")
    add("--summaries", action="store_true", help="inspect.summarize instead, against the forward pass")
    add("--transformers", action="store_true", help="models of Hugging Face transformers instead, small ones")
    add(
        "--gpu",
        nargs="?",
        const="all",
        choices=("all", "check", "speed"),
        help="on a CUDA device instead: check every case of the tests there, then time against SDPA's cuDNN, "
        "flash and efficient kernels and FlexAttention, about 9 minutes; or one of the two parts",
    )
    add("--backend", choices=("triton", "cuda"), default="triton", help="with --gpu: ours (default: triton)")
    add(
        "--minutes",
        type=positive_seconds,
        metavar="M",
        help="with --gpu: begin no case after that (default: 9)",
    )
    add("--list", action="store_true", help="list the chosen cases and stop")


def options_of(args: argparse.Namespace) -> bench.Options:
    """The run that the arguments ask for."""
    threads = args.threads or ([1, 2] if (os.cpu_count() or 1) > 1 else [1])
    return bench.Options(tuple(threads), args.quick, args.filter, args.seconds, args.flex)


def read_baseline(path: Path) -> dict[str, Any]:
    """An earlier run's bench.json.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no such file.
    """
    try:
        baseline = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"baseline must be a bench.json, got {path}: {error}") from None
    if not isinstance(baseline, dict) or baseline.get("schema") != SCHEMA:
        raise ValueError(f"baseline must be a bench.json of schema {SCHEMA}, got {path}")
    return baseline


def measure(args: argparse.Namespace) -> bench.Report:
    """Measure, print each row as it comes, then the summary; write bench.json.

    Raises:
        ValueError: a bad option or baseline.
        RuntimeError: contenders disagree about a result.
    """
    options = options_of(args)
    options.cases()  # raises where the filter is wrong
    baseline = None if args.baseline is None else read_baseline(args.baseline)
    args.out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    machine = describe()
    print("\n".join([*machine_lines(machine), "", HEADER]), flush=True)
    results, ceilings = bench.run(options, lambda result: print(result_line(result), flush=True))
    report = bench.Report(machine, results, ceilings, dataclasses.asdict(options))
    sections = [ceiling_lines(ceilings), summary_lines(report), goal_lines(report)]
    if baseline is not None:
        sections.append(compare_lines(report, baseline))
    for lines in sections:
        print("\n".join(["", *lines]))
    report.write_json(args.out / "bench.json")
    print(f"\nin {time.perf_counter() - start:.0f} s; wrote {args.out / 'bench.json'}")
    return report


def picture(report: bench.Report, path: Path) -> None:
    """Draw the report, or say how to get a picture."""
    try:
        from fastattn.bench.plot import draw

        draw(report.to_dict(), path)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
        print("no picture: matplotlib is not installed; run: pip install 'fastattn[bench]'")
    else:
        print(f"wrote {path}")


def measure_others(args: argparse.Namespace, kind: str) -> None:
    """Time the modules or the summaries; print each row as it comes, then the summary; write <kind>.json."""
    benchmark = import_module(f"fastattn.bench.{kind}")
    options = options_of(args)
    args.out.mkdir(parents=True, exist_ok=True)
    machine = describe()
    print("\n".join([*machine_lines(machine), "", benchmark.HEADER]), flush=True)
    results = benchmark.run(options.threads, options.budget, lambda result: print(result.line(), flush=True))
    print("\n".join(["", *benchmark.summary(results)]))
    path = args.out / f"{kind}.json"
    path.write_text(
        json.dumps({"machine": machine, "rows": [result.row() for result in results]}, indent=1) + "\n"
    )
    print(f"\nwrote {path}")


def measure_transformers(args: argparse.Namespace) -> None:
    """Time models of transformers; print each row as it comes, then the goals; write transformers.json.

    Raises:
        ValueError: transformers is not installed, or too old.
    """
    try:
        import fastattn.integrations.transformers  # noqa: F401
    except ImportError as error:
        raise ValueError(str(error)) from error
    import transformers as library

    from fastattn.bench import transformers
    from fastattn.bench.runner import thread_count

    options = options_of(args)
    args.out.mkdir(parents=True, exist_ok=True)
    machine = {**describe(), "transformers": library.__version__}
    print("\n".join([*machine_lines(machine), f"transformers {library.__version__}"]))
    start, threads = time.perf_counter(), options.threads[-1]
    print("\n".join(["", f"{threads} threads", transformers.HEADER]), flush=True)
    with thread_count(threads):
        rows = transformers.run(options.quick, lambda row: print(row.line(), flush=True))
    goals = list(transformers.summary(rows))
    print("\n".join(["", *goals]))
    path = args.out / "transformers.json"
    report = {"machine": machine, "threads": threads, "goals": goals, "rows": [row.row() for row in rows]}
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(f"\nin {time.perf_counter() - start:.0f} s; wrote {path}")


def run(args: argparse.Namespace) -> int:
    """Status 1 where an option is wrong or contenders disagree or a result on a GPU is wrong, 130 where
    Ctrl-C ended it."""
    return status_of(_run, args, (OSError, RuntimeError, ValueError))


def _run(args: argparse.Namespace) -> int:
    if args.gpu is not None:
        return import_module("fastattn.cli.bench_gpu").main(args)
    if args.list:
        for case in options_of(args).cases():
            print(f"{case.group:<30}{case.name:<40}{case.timed:<10}{case.shape}")
    elif args.modules:
        measure_others(args, "modules")
    elif args.summaries:
        measure_others(args, "summaries")
    elif args.transformers:
        measure_transformers(args)
    else:
        picture(measure(args), args.out / "bench.png")
    return 0
