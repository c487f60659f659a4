"""The benchmark's cases, counting, statistics and contenders."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import pytest
import torch
from bench_support import TINY, named

from fastattn import bench
from fastattn.bench import contenders as contenders_module
from fastattn.bench import runner
from fastattn.bench.contenders import OURS, Contender, contenders, is_plain_causal, own_contender
from fastattn.bench.flex import band
from fastattn.bench.goals import GOALS, MEASURES
from fastattn.bench.measure import Timing, calls_for, interleave, ratio
from fastattn.bench.padded import padded
from fastattn.bench.report import geometric_mean
from fastattn.bench.work import work
from fastattn.testing.bench_case import TIMED
from fastattn.testing.bench_cases import BENCH_CASES, SENTENCES
from fastattn.testing.inputs import make_inputs


def test_the_cases_are_named_once_and_every_goal_has_some():
    names = [case.name for case in BENCH_CASES]
    assert len(set(names)) == len(names)
    assert {case.timed for case in BENCH_CASES} == set(TIMED)
    not_quick = set()
    for goal in GOALS:
        assert goal.measure in MEASURES and (goal.label is None) == (goal.measure != "own"), goal.text
        covered = [case for case in BENCH_CASES if goal.covers(case)]
        if goal.measure == "own":
            covered = [case for case in covered if case.own is not None and case.own.label == goal.label]
        assert set(goal.groups) <= {case.group for case in covered}, goal.text
        if not any(case.quick for case in covered):
            not_quick.add(goal.text)
    # Seconds a call, of PyTorch's: left to the full run.
    assert not_quick == {
        "causal window 256 at L=16384, forward",
        "causal window 256 at L=16384, backward",
        "block-sparse 10% against dense, backward",
    }


def test_the_grid_is_sampled():
    dense = [case.case for case in BENCH_CASES if case.group in ("forward", "short sequences")]
    square = [case for case in dense if case.queries == case.keys]
    lengths, dims, rows = (17, 64, 128, 512, 1024, 4096), (32, 64, 80, 128, 256), (1, 8, 64)
    assert {case.queries for case in square} == set(lengths)
    for length in lengths:
        here = [case for case in square if case.queries == length]
        assert {case.head_dim for case in here} >= set(dims) - {256}, length
        assert {case.batch * case.heads for case in here} >= (set(rows) if length < 4096 else {1, 8}), length
    assert all(case.queries <= 128 for case in dense if case.name.startswith("short"))


def test_our_other_call_differs_in_what_it_is_named_after():
    for case in BENCH_CASES:
        if case.own is None:
            continue
        ours, other = case.case, case.own.case
        assert other.name == ours.name  # and so the same numbers
        changed = {
            "dense": ours.mask is not None and other.mask is None,
            "no dropout": ours.dropout_p == 0.1 and other.dropout_p == 0,
            "float32": ours.dtype != torch.float32 and other.dtype == torch.float32,
            "plain": (other.softcap, other.sinks, other.bias) == (None, False, None),
            "1 thread": ours == other and case.own.threads == 1,
        }
        assert changed[case.own.label], case.name
    one_head = named("forward-1x512x64")
    assert own_contender(one_head, 1) is None
    assert own_contender(one_head, 2).threads == 1


def test_visible_pairs():
    def pairs(name):
        case = named(name)
        return work(make_inputs(case.case), case.timed).pairs

    assert pairs("forward-8x512x64") == 8 * 512 * 512
    assert pairs("causal-8x512x64") == 8 * 512 * 513 // 2
    assert pairs("window-128-2x4096x64") == 2 * sum(min(row + 1, 128) for row in range(4096))
    # Four lengths spread from a quarter to the whole, on eight batch entries with four heads.
    lengths = torch.linspace(128, 512, 8).long()
    assert pairs("padding-32x512x64") == 4 * 512 * int(lengths.sum())
    assert pairs("decode-bfloat16-gqa-32x1x128") == 32 * 8192
    assert pairs("sentences-512x61x64") == 8 * sum(length * length for length in SENTENCES)
    # A tenth of the blocks of each head.
    assert pairs("block-sparse-10%-8x2048x64") == 8 * round(0.1 * 32 * 32) * 64 * 64


def test_operations_and_bytes():
    case = named("forward-8x512x64")
    forward = work(make_inputs(case.case), "forward")
    assert forward.flops == 4 * 8 * 512 * 512 * 64
    assert forward.bytes == 4 * (4 * 8 * 512 * 64)
    assert not forward.is_memory_bound
    assert work(make_inputs(case.case), "backward").flops == 2.5 * forward.flops
    assert work(make_inputs(case.case), "step").flops == 3.5 * forward.flops
    decode = named("decode-bfloat16-8x1x128")
    amount = work(make_inputs(decode.case), "forward")
    assert amount.bytes == 2 * (2 * 8 * 8192 * 128 + 2 * 8 * 128)
    assert amount.is_memory_bound


def test_flex_takes_band_masks_alone():
    def bounds(name):
        return band(make_inputs(named(name).case))

    assert bounds("window-128-2x4096x64") == (-127, 0)
    assert bounds("window-128-both-2x4096x64") == (-64, 63)
    assert bounds("causal-8x512x64") == (None, 0)
    for name in ("forward-8x512x64", "padding-32x512x64", "documents-8x1024x64", "bool-mask-rows-8x512x64"):
        assert bounds(name) is None, name


def test_rounds_are_interleaved_and_turn_round():
    calls = []
    ways = [Contender(name, lambda name=name: calls.append(name)) for name in "ab"]
    timings = interleave(ways, [1, 2], 3)
    assert "".join(calls) == "abb" + "bba" + "abb"
    assert [len(timing.seconds) for timing in timings] == [3, 3]
    assert [timing.calls for timing in timings] == [1, 2]


def test_ratio_of_medians_and_its_interval():
    steady = ratio(Timing((2.0,) * 9, 1), Timing((0.5,) * 9, 1))
    assert (steady.value, steady.low, steady.high) == (4.0, 4.0, 4.0)
    noise = torch.rand(2, 41, generator=torch.Generator().manual_seed(1)) * 0.2
    noisy = ratio(Timing(tuple((3 + noise[0]).tolist()), 1), Timing(tuple((1.5 + noise[1]).tolist()), 1))
    assert noisy.low < noisy.value < noisy.high
    assert noisy.low > 1.8 and noisy.high < 2.1
    assert str(ratio(Timing((3.0,), 1), Timing((2.0,), 1))) == "1.50x [1.50, 1.50]"
    with pytest.raises(ValueError, match="must share rounds, got 1 and 2"):
        ratio(Timing((1.0,), 1), Timing((1.0, 1.0), 1))


def test_timing_quartiles_and_calls():
    timing = Timing((5.0, 1.0, 3.0, 2.0, 4.0), 1)
    assert timing.median == 3.0
    assert timing.quartiles == (2.0, 4.0)
    assert calls_for(0.001, 0.004) == 4
    assert calls_for(1.0, 0.004) == 1
    assert geometric_mean([1.0, 4.0]) == pytest.approx(2.0)


def test_pytorch_gets_each_mask_in_its_own_form():
    assert is_plain_causal(make_inputs(named("causal-8x512x64").case))
    for name in ("window-128-2x4096x64", "bool-mask-rows-8x512x64", "padding-64x128x64", "forward-8x512x64"):
        assert not is_plain_causal(make_inputs(named(name).case)), name


@pytest.mark.parametrize(
    "name", ["gqa-32x512x64", "decode-float32-gqa-32x1x128", "float-bias-rows-8x512x128", "alibi-8x512x64"]
)
def test_every_path_gives_the_same_results(name):
    case = named(name)
    ways = contenders(case, make_inputs(case.case))
    results = {way.name: result for way in ways if (result := contenders_module.usable(way)) is not None}
    assert {OURS, "sdpa", "sdpa-math"} <= set(results)
    assert ("sdpa-folded" in results) == (case.case.op == "decode")
    for way, result in results.items():
        assert runner.disagreement(result, results["sdpa-math"]) < 1e-5, way


@pytest.mark.parametrize("name", ["softcap-8x512x64", "sinks-8x512x64", "softcap-causal-8x1024x64"])
def test_what_pytorch_has_no_argument_for_is_compared_with_eager_code(name):
    case = named(name)
    ours, eager = contenders(case, make_inputs(case.case))
    assert (ours.name, eager.name) == (OURS, "eager")
    assert runner.disagreement(ours.call(), eager.call()) < 1e-5


@pytest.mark.parametrize("name", ["sentences-512x61x64", "sentences-forward+backward-512x61x64"])
def test_sentences_are_compared_with_padding_and_with_a_loop(name):
    case = named(name)
    ways = contenders(case, make_inputs(case.case))
    results = {way.name: contenders_module.usable(way) for way in ways}
    assert list(results) == [OURS, "padded", "padded-flash", "padded-math", "loop"]
    for way in ("padded", "padded-math", "loop"):
        assert runner.disagreement(results[OURS], results[way]) < 1e-5, way


def test_only_plain_self_attention_is_padded():
    with pytest.raises(ValueError, match="case must be varlen self-attention without a mask, got forward-"):
        padded(make_inputs(named("forward-8x512x64").case))


def test_module_shaped_calls_have_their_heads_side_by_side():
    case = named("multi-head-shaped-64x128x64")
    inputs = make_inputs(case.case)
    assert all(inputs.leaves[name].transpose(1, 2).is_contiguous() for name in "qkv")


def test_pytorch_need_not_store_huge_scores():
    names = [
        way.name
        for way in contenders(named("window-128-2x4096x64"), make_inputs(named("window-128-2x4096x64").case))
    ]
    assert "sdpa-math" in names
    case = replace(named("forward-8x4096x64"), timed="forward")
    assert [way.name for way in contenders(case, make_inputs(case.case))] == [OURS, "sdpa", "sdpa-flash"]


def test_a_slow_first_call_stands_for_itself():
    calls = []
    ways = [Contender(name, lambda name=name: calls.append(name)) for name in ("ours", "slow", "quick")]
    timings = runner.screen(ways, replace(TINY, screening_rounds=1), [0.0, 1.5, 0.0])
    assert "slow" not in calls and timings["slow"] == Timing((1.5,), 1)
    assert {"ours", "quick"} <= set(calls)


def test_the_backward_pass_is_compared_with_the_path_that_is_fastest_over_both(monkeypatch):
    case = named("backward-8x64x64")
    alone = {OURS: Timing((0.1,), 1), "sdpa-flash": Timing((2.0,), 1), "sdpa-math": Timing((1.0,), 1)}
    both = {OURS: Timing((0.2,), 1), "sdpa-flash": Timing((3.0,), 1), "sdpa-math": Timing((4.0,), 1)}
    screened = []

    def screen(ways, options, firsts):
        screened.extend(way.name for way in ways)
        return both

    monkeypatch.setattr(runner, "screen", screen)
    inputs = make_inputs(case.case)
    assert runner.fastest_path(case, inputs, alone, TINY) == "sdpa-flash"
    assert set(screened) == set(alone)
    assert runner.fastest_path(replace(case, timed="forward"), inputs, alone, TINY) == "sdpa-math"


def test_a_wrong_result_stops_the_run(monkeypatch):
    def wrong(*arguments):
        ways = contenders(*arguments)
        right = ways[0].call
        return [Contender(OURS, lambda: right() * 1.01), *ways[1:]]

    monkeypatch.setattr(runner, "contenders", wrong)
    with pytest.raises(RuntimeError, match=r"tiny-call-8x16x64: fastattn and sdpa\S* differ by 0\.0"):
        bench.run(TINY)


def test_a_kernel_that_refuses_is_left_out():
    def call():
        raise RuntimeError("No available kernel. Aborting execution.")

    forced = Contender("sdpa-flash", call, torch.nn.attention.SDPBackend.FLASH_ATTENTION)
    assert contenders_module.usable(forced) is None
    with pytest.raises(RuntimeError, match="No available kernel"):
        contenders_module.usable(Contender("sdpa", call))


def test_options_choose_cases():
    assert [case.name for case in TINY.cases()] == ["tiny-call-8x16x64"]
    assert all(case.quick for case in bench.Options(quick=True).cases())
    assert len(bench.Options().cases()) == len(BENCH_CASES)
    with pytest.raises(ValueError, match="filter must be a regular expression, got '\\('"):
        bench.Options(filter="(").cases()
    with pytest.raises(
        ValueError, match=r"filter must name a case of one of the groups forward, .*'nothing'"
    ):
        bench.Options(filter="nothing").cases()
    with pytest.raises(ValueError, match=r"threads must be positive numbers, got \(0,\)"):
        bench.run(bench.Options(threads=(0,)))


def test_the_number_of_threads_is_put_back():
    before = torch.get_num_threads()
    with contextlib.suppress(KeyError), runner.thread_count(before + 1):
        assert torch.get_num_threads() == before + 1
        raise KeyError
    assert torch.get_num_threads() == before
