"""The GPU benchmark without a GPU: its cases, calls and output, on CPU tensors under the interpreter."""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import types
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from triton_support import INSTALLED

from fastattn import masks
from fastattn.bench.contenders import OURS, Contender, ours, sdpa
from fastattn.bench.flex import band_mod, mask_mod, score_mod
from fastattn.bench.gpu import check, contenders, device, report, runner
from fastattn.bench.gpu.goals import GOALS
from fastattn.bench.gpu.runner import Options, Result, run, run_case
from fastattn.bench.measure import Ratio, Timing
from fastattn.bench.padded import padded
from fastattn.bench.work import Work, additive
from fastattn.cli import bench_gpu, main
from fastattn.testing.bench_case import BenchCase, bench_case
from fastattn.testing.cases import alibi, always, tensor_bias
from fastattn.testing.gpu_bench_cases import (
    CAUSAL_MASK,
    GPU_BENCH_CASES,
    HOST,
    TOKENS,
    causal_documents,
    is_compiled,
)
from fastattn.testing.inputs import make_inputs

# Where there is a GPU nothing is interpreted, and kernels do not take CPU tensors.
interpreted = pytest.mark.skipif(
    not INSTALLED or torch.cuda.is_available(),
    reason="needs Triton's interpreter, which a GPU makes superfluous",
)
CPU = torch.device("cpu")
QUICK = Options(quick=True, min_sample=1e-9, host_calls=1)
TINY = (1, 2, 16, 16)
PACKED = {"op": "varlen", "lengths_q": (3, 9, 4), "lengths_k": (3, 9, 4)}


class FakeClock:
    """Calls once, and says that it took as long as the contender's place in the list of names."""

    def __init__(self, *names: str) -> None:
        self.names = names

    def __call__(self, contender: Contender, calls: int) -> float:
        with contender.forced():
            contender.call()
        return 1e-3 * (
            1 + (self.names.index(contender.name) if contender.name in self.names else len(self.names))
        )


def tiny(group: str, timed: str = "forward", **options) -> BenchCase:
    return bench_case(group, TINY, timed, **options)


def result(bench: BenchCase, **seconds: float) -> Result:
    """A result with these medians, by path; "_" stands for "-"."""
    timings = {name.replace("_", "-"): Timing((each,) * 3, 1) for name, each in seconds.items()}
    case = bench.case
    pairs = case.batch * case.heads * case.queries * case.keys
    return Result(bench, timings, Work(pairs, 4.0 * pairs * case.head_dim, 1))


def named(pattern: str) -> BenchCase:
    [found] = [case for case in GPU_BENCH_CASES if case.name == pattern]
    return found


def test_cases_cover_what_is_promised():
    names = [case.name for case in GPU_BENCH_CASES]
    assert len(set(names)) == len(names)
    on_grid = [case for case in GPU_BENCH_CASES if case.group.split()[0] in ("full", "causal")]
    assert {case.case.head_dim for case in on_grid} == {64, 128, 256}
    assert {case.case.queries for case in on_grid} == {512, 1024, 2048, 4096, 8192, 16384, 32768}
    assert all(case.case.batch * case.case.queries == max(TOKENS, case.case.queries) for case in on_grid)
    groups = {case.group.rsplit(" ", 1)[0] for case in GPU_BENCH_CASES}
    wanted = {
        "full",
        "causal",
        "gqa",
        "window 1024",
        "documents",
        "varlen",
        "bias",
        "alibi",
        "softcap",
        "dropout 0.1",
    }
    assert groups == wanted | {"host"}
    for group in wanted:
        assert {case.timed for case in GPU_BENCH_CASES if case.group.startswith(group)} == {
            "forward",
            "backward",
        }
    assert all(case.case.dtype == torch.bfloat16 for case in GPU_BENCH_CASES)
    # What the goals are about comes first: a run that ends early has it.
    assert [case.group for case in GPU_BENCH_CASES[:4]] == [
        "full forward", "causal forward", "full backward", "causal backward",
    ]  # fmt: skip
    assert any(case.quick for case in GPU_BENCH_CASES)


def test_compiled_paths_take_part_at_some_lengths_of_the_grid_and_everywhere_else():
    compiled = {case.name for case in GPU_BENCH_CASES if is_compiled(case)}
    assert {
        "full-forward-16x16384x128",
        "causal-backward-64x4096x128",
        "full-forward-32x16384x64",
    } <= compiled
    assert not {"full-forward-512x512x128", "full-forward-128x4096x64"} & compiled
    assert {case.name for case in GPU_BENCH_CASES if case.group.startswith("gqa")} <= compiled


def test_documents_are_the_packed_sequences():
    """The same lengths as a mask and packed: as many visible pairs, without the causal half."""
    case = tiny("documents", mask=causal_documents).case
    mask = make_inputs(case).mask
    dense = mask.to_dense(masks.MaskShape(1, 2, 16, 16))
    assert dense.diagonal(dim1=-2, dim2=-1).all()
    assert 16 <= int(dense.sum()) < 16 * 17 // 2


def test_moved_inputs_keep_numbers_strides_and_surroundings():
    from fastattn.testing.cases import CASES

    for name in ("layout-sliced", "layout-expanded_kv", "bool-strided", "mask-padding-causal", "varlen-blhd"):
        [case] = [case for case in CASES if case.name == name]
        inputs = make_inputs(case)
        there = inputs.on("cpu")
        for leaf, moved in zip(inputs.leaves.values(), there.leaves.values(), strict=True):
            assert torch.equal(leaf, moved)
            assert (leaf.stride(), leaf.storage_offset()) == (moved.stride(), moved.storage_offset())
            assert moved.data_ptr() != leaf.data_ptr()
        assert len(there.fixed) == len(inputs.fixed)
    assert there.mask is None
    assert all(leaf.device.type == "meta" for leaf in inputs.on("meta").leaves.values())


@pytest.mark.parametrize(
    "mask",
    [masks.causal(), masks.window(3, None), masks.window(2, 1), masks.causal() & masks.window(4, 4),
     masks.causal() & masks.documents(torch.tensor([0, 0, 0, 1, 1, 2, 2, 2]))],
    ids=str,
)  # fmt: skip
def test_flex_masks_say_the_same(mask):
    i, j = torch.arange(8)[:, None], torch.arange(8)
    seen = mask_mod(mask)(torch.tensor(0), torch.tensor(0), i, j).expand(8, 8)
    assert torch.equal(seen, mask.to_dense(masks.MaskShape(1, 1, 8, 8))[0, 0].expand(8, 8))


def test_flex_says_which_masks_and_scores_it_has_no_function_for():
    assert mask_mod(masks.causal() | masks.window(1, 1)) is None
    assert mask_mod(masks.causal() & masks.prefix(torch.tensor([2]))) is None
    assert bool(band_mod(None, None)(*map(torch.tensor, (0, 0, 1, 5))))
    capped = tiny("softcap", softcap=2.0, bias=alibi())
    with pytest.raises(ValueError, match="a bias or a softcap, not both"):
        score_mod(make_inputs(capped.case))


@pytest.mark.parametrize(
    "options",
    [{}, {"mask": CAUSAL_MASK}, {"mask": causal_documents}, {"bias": tensor_bias("h", "q", "k")},
     {"bias": alibi(), "mask": CAUSAL_MASK}, {"softcap": 2.0}, {"heads_kv": 1}, PACKED],
    ids=["full", "causal", "documents", "bias", "alibi", "softcap", "gqa", "varlen"],
)  # fmt: skip
def test_flex_is_a_path_for_each_option(options):
    """Not compiled, which computes the same in PyTorch's plain operations."""
    bench = tiny("x", **options)
    inputs = make_inputs(bench.case)
    function = contenders.flex(inputs, compiled=False)
    q, k, v = (inputs.leaves[name] for name in "qkv")
    torch.testing.assert_close(function(q, k, v), ours(inputs)(q, k, v), atol=1e-5, rtol=1e-4)


def test_flex_has_no_dropout_and_not_every_mask():
    assert contenders.flex(make_inputs(tiny("x", dropout_p=0.1).case), True) is None
    other = always(masks.causal() | masks.window(1, 1))
    assert contenders.flex(make_inputs(tiny("x", mask=other).case), False) is None


@interpreted
@pytest.mark.parametrize(
    ("timed", "options", "paths"),
    [
        ("forward", {"mask": CAUSAL_MASK}, {"sdpa-flash", "flex"}),
        ("backward", {"bias": tensor_bias("h", "q", "k")}, set()),
        ("forward", PACKED, {"loop", "flex"}),
        ("forward", {"dropout_p": 0.1}, set()),
        ("forward", {"softcap": 2.0}, {"flex"}),
    ],
    ids=["causal", "bias-backward", "varlen", "dropout", "softcap"],
)
def test_a_case_runs_on_every_path_that_takes_it(timed, options, paths):
    """Under the interpreter, with a clock that invents times; what PyTorch refuses on CPU is told."""
    bench = tiny("x", timed, **options)
    found = run_case(bench, CPU, FakeClock(OURS), QUICK, with_flex=True, compiled=False)
    assert found.failure is None, found
    assert found.timings[OURS].median == 1e-3
    assert paths <= set(found.timings), found.refused
    assert all(found.ratio_to(name).value == 2.0 for name in paths)
    assert not bench.case.dropout_p or not found.differences
    if found.timings.keys() != {OURS}:
        assert found.best in found.timings
    assert all("\n" not in reason for reason in found.refused.values())
    assert found.tflops(OURS) == found.work.flops / 1e-3 / 1e12


@interpreted
def test_bias_gradients_are_part_of_a_backward_pass():
    inputs = make_inputs(tiny("x", bias=tensor_bias("h", "q", "k")).case)
    for timed, count in (("backward", 4), ("step", 4)):
        ours = contenders.contenders(
            tiny("x", timed, bias=tensor_bias("h", "q", "k")), inputs, with_flex=False
        )[0]
        assert len(ours.call()) == count


def test_copies_are_called_in_turn_and_fill_the_cache():
    calls = contenders.in_turn([lambda: "a", lambda: "b"])
    assert [calls() for _ in range(3)] == ["a", "b", "a"]
    inputs = make_inputs(tiny("x").case)
    copies = contenders.cloned(inputs, 3)
    assert len({copy.leaves["q"].data_ptr() for copy in copies}) == 3
    assert all(torch.equal(copy.dout, inputs.dout) for copy in copies)
    assert runner.copies_for(100, 0) == 1
    assert runner.copies_for(100, 50) == 1
    assert runner.copies_for(30, 50) == 4
    assert runner.copies_for(1, 10**6) == runner.MOST_COPIES


def test_a_failing_path_is_told_and_the_others_run():
    def fail():
        warnings.warn("too wide (Triggered internally at x.cpp:1.)", stacklevel=1)
        raise RuntimeError("no kernel\nfor this")

    ways = [
        Contender(OURS, lambda: torch.ones(2)),
        Contender("broken", fail),
        Contender("off", lambda: torch.full((2,), 5.0)),
    ]
    taken, differences, refused = runner.first_calls(ways, 1, tiny("x"), CPU)
    assert [way.name for way in taken] == [OURS, "off"]
    assert refused == {"broken": "RuntimeError: no kernel (too wide)"}
    assert differences["off"] == pytest.approx(0.8)
    assert "differs by" in runner.worst(differences, 0.1)
    assert runner.worst({"off": 3.0, "good": 0.01}, 0.1) is None
    assert runner.worst({}, 0.1) is None
    assert "differs by nan" in runner.worst({"good": float("nan")}, 0.1)


def test_a_hopeless_path_is_timed_once():
    ways = [Contender(name, lambda: None) for name in (OURS, "a", "b")]
    seconds = {OURS: 1e-3, "a": 1e-3, "b": 1.0}
    timings = runner.time_all(ways, lambda way, calls: seconds[way.name], QUICK, None)
    assert [len(timings[name].seconds) for name in (OURS, "a", "b")] == [3, 3, 1]
    slow = Result(tiny("x"), timings, Work(1, 1.0, 1))
    assert slow.ratio_to("b") == Ratio(1e3, 1e3, 1e3)
    assert runner.time_all([], lambda way, calls: 0.0, QUICK, None) == {}


@interpreted
def test_a_run_stops_when_the_time_is_up(monkeypatch):
    cases = (tiny("one"), replace(tiny(HOST, "step"), quick=True), tiny("three"))
    monkeypatch.setattr(runner, "GPU_BENCH_CASES", cases)
    options = replace(QUICK, quick=False)
    clock = FakeClock(OURS)
    found, left = run(options, CPU, clocks=(clock, clock), compiled=False)
    assert [each.bench.group for each in found] == ["one", HOST, "three"] and not left
    assert found[1].tflops(OURS) is None
    assert set(found[1].timings) == {OURS, "sdpa"}
    assert run(options, CPU, started=-1e9, clocks=(clock, clock)) == ([], [case.name for case in cases])


def test_the_filter_is_checked():
    with pytest.raises(ValueError, match="filter must be a regular expression"):
        Options(filter="(").cases()
    with pytest.raises(ValueError, match="one of the groups full forward, "):
        Options(filter="nothing").cases()
    assert {case.group for case in Options(filter="^gqa", quick=True).cases()} == {
        "gqa forward",
        "gqa backward",
    }


def test_goals_are_judged():
    full = named("full-forward-16x16384x128")
    flops = 4 * 16 * TOKENS * TOKENS * 128
    fast = flops / 500e12
    results = [
        replace(
            result(full, fastattn=fast, flex=1.1 * fast, sdpa_flash=1.5 * fast), work=Work(1, float(flops), 1)
        ),
        result(named("alibi-forward-64x4096x128"), fastattn=1.0, flex=2.0),
        result(named("host-time-forward-full-4x128x64"), fastattn=40e-6, sdpa=20e-6),
        result(named("softcap-forward-64x4096x128"), flex=2.0),
    ]
    judged = {goal.text: goal.judge(results) for goal in GOALS}
    forward = judged["forward, D=128, L=16384"]
    assert forward["got"] == pytest.approx(500) and forward["met"]
    assert judged["causal forward, D=128, L=16384"] is None
    flex = judged["FlexAttention's time / ours"]
    assert flex["got"] == pytest.approx((1.1 * 2) ** 0.5) and flex["cases"] == 2 and flex["met"]
    assert judged["time of PyTorch's flash kernel / ours"]["got"] == pytest.approx(1.5)
    host = judged["host time of a call without gradient"]
    assert host["got"] == pytest.approx(40) and not host["met"]


MACHINE = {
    "gpu": "NVIDIA H200", "capability": "9.0", "multiprocessors": 132, "memory_gib": 139.8, "cache_mib": 60.0,
    "driver": "580", "power_limit": "700 W", "fastattn": "0", "torch": "2", "triton": "3", "cuda": "13",
    "cudnn": 9, "python": "3.12", "device": "cuda:0", "platform": "Linux",
}  # fmt: skip
CEILINGS = {"product_tflops": 788.0, "copy_tbs": 4.3}


def whole_report() -> report.Report:
    """A report of every case, with invented times that depend on the case and the path."""
    paths = ("fastattn", "sdpa-cudnn", "sdpa-flash", "sdpa-efficient", "flex")
    results = []
    for number, bench in enumerate(GPU_BENCH_CASES):
        case = bench.case
        work = Work(1, 4.0 * case.batch * case.heads * case.queries**2 * case.head_dim, 1)
        timings = {
            name: Timing(
                tuple(work.flops / 1e12 / (300 + 60 * place + number + each) for each in range(3)), 1
            )
            for place, name in enumerate(reversed(paths))
        }
        results.append(Result(bench, timings, work, refused={"loop": "RuntimeError: no"}, seconds=1.0))
    outcomes = [
        check.Outcome("one", check.PASSED),
        check.Outcome("two", check.FAILED, "AssertionError: out: far"),
    ]
    outcomes.append(check.Outcome("three", check.SKIPPED, "it has no float64"))
    return report.Report(MACHINE, CEILINGS, outcomes, results, ["left"], {})


def test_the_report_and_its_lines(tmp_path: Path):
    found = whole_report()
    found.write_json(tmp_path / "gpu.json")
    back = json.loads((tmp_path / "gpu.json").read_text())
    assert back["schema"] == report.SCHEMA and back["left_out"] == ["left"]
    assert len(back["rows"]) == 5 * len(GPU_BENCH_CASES)
    assert back["failures"] == ["two: AssertionError: out: far"]
    assert back["goals"][0]["got"] == 1 and not back["goals"][0]["met"]
    text = "\n".join(report.summary_lines(found))
    for expected in (
        "1 FAILED",
        "no time was left for 1 cases: left",
        "MISSED",
        "  window 1024 forward",
        "sdpa-flash 1.",
    ):
        assert expected in text, expected
    [first, *more] = report.result_lines(replace(found.results[0], failure="differs"))
    assert first.startswith("full-forward-16x16384x128 ") and "best of PyTorch" in "".join([first, *more])
    assert more[-1].strip() == "FAILED: differs"
    assert len(report.host_lines(found.results)) == 1 + 5 * 6
    assert report.host_lines([]) == []
    machine = "\n".join(report.machine_lines(MACHINE, CEILINGS))
    assert "NVIDIA H200" in machine and "788 TFLOP/s" in machine
    assert report.summary_lines(report.Report(MACHINE, {}, [], [], [], {})) == []


def test_a_result_in_which_ours_failed_is_reported():
    failed = replace(result(tiny("x"), sdpa_flash=1.0), failure="OutOfMemoryError: no room", refused={})
    assert failed.ratio_to("sdpa-flash") is None and failed.best == "sdpa-flash"
    lines = report.result_lines(failed)
    assert lines[0].startswith("x-2x16x16") and "FAILED: OutOfMemoryError" in lines[-1]
    nothing = Result(tiny("x"), {}, Work(1, 1.0, 1), failure="RuntimeError: gone")
    assert report.result_lines(nothing)[0].startswith("x-2x16x16")


def test_the_picture(tmp_path: Path):
    pytest.importorskip("matplotlib")
    from fastattn.bench.gpu.plot import draw

    found = whole_report()
    assert draw(found.to_dict(), tmp_path / "all.png")
    only_bars = replace(found, results=[r for r in found.results if "varlen" in r.bench.group], ceilings={})
    assert draw(only_bars.to_dict(), tmp_path / "bars.png")
    assert not draw(replace(found, results=[]).to_dict(), tmp_path / "none.png")
    assert (tmp_path / "all.png").stat().st_size > 10_000 and not (tmp_path / "none.png").exists()


@interpreted
def test_cases_are_checked_and_failures_told(monkeypatch):
    assert check.check_one("one", CPU).state == check.PASSED
    skipped = check.check_one("primes-float64", CPU)
    assert (skipped.state, skipped.reason) == (check.SKIPPED, "it has no float64")
    monkeypatch.setattr(check, "check_case", lambda *args: pytest.fail("wrong"))

    def wrong(*args):
        raise AssertionError("out: far off")

    monkeypatch.setattr(check, "check_case", wrong)
    failed = check.check_one("one", CPU)
    assert (failed.state, failed.reason) == (check.FAILED, "AssertionError: out: far off")
    text = check.lines([skipped, failed])
    assert text[0].endswith("0 passed, 1 skipped, 1 failed")
    assert text[1:] == ["  skipped 1: it has no float64", "  FAILED one: AssertionError: out: far off"]
    assert len(check.chosen(quick=True)) == -(-len(check.BY_NAME) // check.QUICK_STEP)
    assert all("gqa" in name for name in check.chosen(False, "gqa"))


def test_cases_in_processes_outlive_one_that_dies(monkeypatch, tmp_path: Path):
    """A child that ends in the middle: its case has failed, the rest is checked by another."""
    child = tmp_path / "child.py"
    child.write_text(
        "import json, sys\n"
        "for name in sys.stdin.read().split('\\n'):\n"
        "    print('noise', flush=True)\n"
        "    if name == 'dies': sys.exit(7)\n"
        "    print(json.dumps({'name': name, 'state': 'passed'}), flush=True)\n"
        "    if name == 'loses': sys.exit(3)\n"
    )
    popen = check.subprocess.Popen
    monkeypatch.setattr(
        check.subprocess, "Popen", lambda command, **kw: popen([sys.executable, str(child)], **kw)
    )
    heard: list[str] = []
    names = ["a", "dies", "b", "loses", "c"]
    outcomes = check.check_in_processes(names, CPU, "triton", lambda o: heard.append(o.name), 1)
    assert [each.name for each in outcomes] == names == heard
    assert [each.state for each in outcomes] == ["passed", "failed", "passed", "passed", "passed"]
    assert outcomes[1].reason == "its process ended with status 7"
    assert {o.name for o in check.check_in_processes(names, CPU, "triton", lambda o: None, 3)} == set(names)


@interpreted
def test_the_child_prints_a_line_for_each_case(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(read=lambda: "one\nprimes-float64"))
    assert check.main(CPU, "triton") == 0
    states = [json.loads(line)["state"] for line in capsys.readouterr().out.splitlines()]
    assert states == ["passed", "skipped"]

    def lost(device):
        raise RuntimeError("CUDA error")

    monkeypatch.setattr(check, "synchronize", lost)
    assert check.main(CPU, "triton") == check.DEVICE_LOST


def test_clocks_with_a_device_that_is_not_there(monkeypatch):
    """CUDA's events and queue played by a list of what was called."""
    order: list[str] = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            order.append("record")

        def synchronize(self):
            order.append("wait")

        def elapsed_time(self, other):
            return 6.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda where: order.append("synchronize"))
    clock = device.DeviceClock(CPU, rest=0.0)
    way = Contender("x", partial(order.append, "call"))
    assert clock(way, 2) == pytest.approx(3e-3)
    assert order == ["synchronize", "call", "record", "call", "call", "record", "wait"]
    assert device.HostClock(CPU)(Contender("x", lambda: None), 3) < 1.0
    monkeypatch.setattr(device, "MATRIX", 8)
    monkeypatch.setattr(device, "COPY_BYTES", 64)
    assert set(device.ceilings(CPU, 0.0)) == {"product_tflops", "copy_tbs"}


def test_the_device_is_described_and_required(monkeypatch):
    facts = device.describe(CPU)
    assert {"gpu", "torch", "cuda", "cudnn", "triton", "fastattn"} <= set(facts)
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(RuntimeError, match="built without CUDA"):
        device.require(torch.device("cuda"))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="sees none"):
        device.require(torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(device.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match=r"fastattn\[triton\]"):
        device.require(torch.device("cuda"))
    assert device._triton_version() is None
    properties = types.SimpleNamespace(
        name="H", major=9, minor=0, multi_processor_count=132, total_memory=2**30, L2_cache_size=2**20
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda where: properties)
    monkeypatch.setattr(device, "_nvidia_smi", lambda query: "580")
    facts = device.describe(torch.device("cuda"))
    assert (facts["gpu"], facts["capability"], facts["cache_mib"], facts["driver"]) == (
        "H",
        "9.0",
        1.0,
        "580",
    )


def test_nvidia_smi_is_asked(monkeypatch):
    answer = types.SimpleNamespace(stdout="580.1\n580.1\n")
    monkeypatch.setattr(device.subprocess, "run", lambda *args, **keywords: answer)
    assert device._nvidia_smi("driver_version") == "580.1" == device.state()

    def missing(*args, **keywords):
        raise FileNotFoundError("nvidia-smi")

    monkeypatch.setattr(device.subprocess, "run", missing)
    assert device._nvidia_smi("driver_version") is None


@interpreted
def test_the_whole_command(monkeypatch, capsys, tmp_path: Path):
    """Every step of `bench --gpu` on CPU tensors, with a clock that invents times."""
    monkeypatch.setattr(runner, "GPU_BENCH_CASES", (replace(tiny("full forward"), quick=True),))
    monkeypatch.setattr(bench_gpu, "require", lambda where: None)
    monkeypatch.setattr(bench_gpu, "ceilings", lambda where, rest: CEILINGS)
    monkeypatch.setattr(
        bench_gpu, "run", partial(run, clocks=(FakeClock(OURS), FakeClock(OURS)), compiled=False)
    )
    monkeypatch.setattr(bench_gpu.torch, "device", lambda *names: CPU)
    outcomes = [check.Outcome("one", check.PASSED), check.Outcome("two", check.FAILED, "far")]

    def check_them(names, where, backend, on_outcome, workers):
        for outcome in outcomes:
            on_outcome(outcome)
        return outcomes

    monkeypatch.setattr(bench_gpu.check, "check_in_processes", check_them)
    args = argparse.Namespace(
        quick=True, filter="", flex=False, minutes=5.0, gpu="all", out=tmp_path / "out", list=False,
        backend="triton",
    )  # fmt: skip
    assert bench_gpu.main(args) == 1
    printed = capsys.readouterr().out
    for expected in ("FAILED two: far", "full-forward-2x16x16", "TFLOP/s", "gpu.json"):
        assert expected in printed, expected
    assert json.loads((tmp_path / "out" / "gpu.json").read_text())["options"]["minutes"] == 5.0
    args.gpu = "check"
    del outcomes[1]
    assert bench_gpu.main(args) == 0
    args.gpu, args.minutes = "speed", None
    assert bench_gpu.main(args) == 0


def test_without_matplotlib_it_says_how_to_get_a_picture(monkeypatch, capsys, tmp_path: Path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    bench_gpu.picture(whole_report(), tmp_path / "x.png")
    assert "pip install 'fastattn[bench]'" in capsys.readouterr().out


def test_the_command_line_without_a_device(capsys, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    assert main(["bench", "--gpu", "--quick"]) == 1
    assert "error: --gpu needs a CUDA device" in capsys.readouterr().err
    assert main(["bench", "--gpu", "speed", "--filter", "nothing"]) == 1
    assert "filter must name a case" in capsys.readouterr().err
    assert main(["bench", "--gpu", "--list", "--filter", "^bias"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["bias", "bias"]
    with pytest.raises(SystemExit):
        main(["bench", "--gpu", "fast"])


def test_samples_are_taken_after_a_first_one_that_sets_their_size():
    times = itertools.count(1)
    timings = runner.time_all(
        [Contender(OURS, lambda: None)], lambda way, calls: float(next(times)), QUICK, 1
    )
    assert timings[OURS].seconds == (2.0, 3.0, 4.0)


@pytest.mark.parametrize(
    "options",
    [{"mask": CAUSAL_MASK}, {"mask": causal_documents}, {"bias": tensor_bias("h", "q", "k")},
     {"bias": alibi(), "mask": CAUSAL_MASK}, PACKED],
    ids=["causal", "documents", "bias", "alibi", "varlen"],
)  # fmt: skip
def test_what_pytorch_is_given_lies_on_the_device(options):
    """A device without numbers plays the GPU: its tensors do not mix with one left on the CPU."""
    inputs = make_inputs(tiny("x", **options).case).on("meta")
    if inputs.case.op == "varlen":
        inputs = padded(inputs)
        assert inputs.mask.device.type == "meta"
    else:
        assert additive(inputs).device.type == "meta"
    q, k, v = (inputs.leaves[name] for name in "qkv")
    assert sdpa(inputs)(q, k, v).device.type == "meta"
