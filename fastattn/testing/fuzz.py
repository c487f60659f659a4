"""Random calls of the CPU kernels against the reference, for as long as asked.

    python -m fastattn.testing.fuzz --seconds 60 --seed 1
    python -m fastattn.testing.fuzz --example 1000042      # one problem again, with its traceback

Each problem (see random_cases.py) runs forward and backward on every instruction set of this machine, must be
within the bound of tolerances.py, and give the same bits with another number of threads. The problems run in
a process of their own: one that crashes or hangs is a failure like any other.
"""

from __future__ import annotations

import argparse
import faulthandler
import multiprocessing
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from random import Random
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

import fastattn
from fastattn import execution, reference
from fastattn.backends import cpu
from fastattn.call import Call
from fastattn.lowering import lower
from fastattn.philox import dropout_mask
from fastattn.spec import accumulate_dtype
from fastattn.testing.case import LAYOUTS
from fastattn.testing.inputs import Inputs, lay_out, make_inputs, poisoned_memory
from fastattn.testing.magnitudes import largest, magnitudes
from fastattn.testing.random_cases import random_case
from fastattn.testing.running import Results, oracle, run
from fastattn.testing.tolerances import bound, check, check_all

HANG_SECONDS = 600.0  # after which a problem, a second's work, counts as hung; the machine may be busy
EXAMPLES_PER_SEED = 1_000_000
THREADS = (1, 2, 3, 5, 8, 16)  # more, too, than there are tiles


def _with_score(op: str, public: Callable[..., Any]) -> Callable[..., Any]:
    """A public function that also takes the scores of additive and of kernel attention."""

    def call(q: Tensor, k: Tensor, v: Tensor, *fixed: Tensor, **options: Any) -> Any:
        if "score" not in options:
            return public(q, k, v, *fixed, **options)
        if op == "varlen":
            longest = [max([0, *cu.diff().tolist()]) for cu in fixed]
            options |= {"cu_seqlens_q": fixed[0], "cu_seqlens_k": fixed[1]}
            options |= {"max_seqlen_q": longest[0], "max_seqlen_k": longest[1]}
        elif op == "decode":
            options["lengths"] = fixed[0]
        return execution.run(Call(op, q, k, v, scale=1.0, **options))

    return call


KERNELS = SimpleNamespace(
    attention=_with_score("attention", fastattn.attention),
    varlen_attention=_with_score("varlen", fastattn.varlen_attention),
    decode_attention=_with_score("decode", fastattn.decode_attention),
)


def random_inputs(example: int) -> Inputs:
    """The problem of one integer, with its numbers.

    One in eight has NaNs, and as many an upstream gradient with other strides. Heads side by side mostly get
    one that is so too, as from a model.
    """
    inputs, rng = make_inputs(random_case(example)), Random(~example)
    if inputs.case.layout == "side_by_side" and rng.random() < 0.6:
        inputs = replace(inputs, dout=lay_out(inputs.dout, "side_by_side"))
    elif rng.random() < 0.125 and inputs.case.op == "attention":
        dout = lay_out(inputs.dout, rng.choice(LAYOUTS))
        inputs = replace(inputs, dout=dout if rng.random() < 0.5 else dout.new_ones(()).expand(dout.shape))
    if rng.random() < 0.125 and inputs.case.dropout_p < 1:  # which gives zeros, whatever was dropped
        inputs = _with_nans(inputs, rng)
    return inputs


def _with_nans(inputs: Inputs, rng: Random) -> Inputs:
    """NaN in some elements and rows of q, k, v or dout."""
    tensors = {**inputs.leaves, "dout": inputs.dout}
    for name in rng.sample(("q", "k", "v", "dout"), rng.randint(1, 2)):
        x = tensors[name].clone()
        for whole_row in (False, False, True):
            if x.numel():
                index = tuple(rng.randrange(n) for n in x.shape)
                x[index[:-1] if whole_row else index] = torch.nan
        tensors[name] = x
    dout = tensors.pop("dout")
    return replace(inputs, leaves=tensors, dout=dout)


def check_example(example: int, functions: Any = KERNELS) -> None:
    """Run one problem on every instruction set of this machine.

    Args:
        functions: with the names of the public functions; they take `backend` and `score`.
    Raises:
        AssertionError: where kernels and reference disagree, or two numbers of threads.
    """
    rng = Random(example + 1)
    inputs = random_inputs(example)
    if rng.random() < 0.1 and inputs.case.op == "attention" and inputs.case.score == "dot":
        check_hard(inputs, rng)
        return
    expected = oracle(inputs)
    scale = magnitudes(inputs, expected.ref64)
    for isa in _each_isa():
        torch.set_num_threads(rng.choice(THREADS))
        with poisoned_memory():
            got = run(functions, inputs, backend="cpu")
        try:
            check_all(got, expected.ref64, expected.native, inputs.case.dtype, scale)
            torch.set_num_threads(rng.choice(THREADS))
            if rng.random() < 0.5:
                _check_same_bits(run(functions, inputs, backend="cpu"), got)
            if rng.random() < 0.2 and inputs.case.op == "attention" and inputs.leaves["k"].numel():
                check_weights(inputs, scale["out"] / max(largest(inputs.leaves["v"]), 1e-30), rng)
        except AssertionError as error:
            raise AssertionError(f"{isa}: {error}\n{describe(inputs)}") from error


def check_weights(inputs: Inputs, unit: float, rng: Random) -> None:
    """The weights beside the output, by head or averaged.

    Args:
        unit: the relative error of a weight, in units in the last place of the dtype that kernels add up in.
    """
    average, dtype = rng.random() < 0.5, accumulate_dtype(inputs.case.dtype)
    exact, native = (_dropped_weights(inputs.to(d)).double() for d in (torch.float64, dtype))
    if average:
        exact, native = (weights.mean(1, keepdim=True) for weights in (exact, native))
    (q, k, v), options = inputs.arguments()
    if "score" in options:
        options["scale"] = 1.0
    call = Call("attention", q, k, v, **options)
    found: list[Results] = []
    for threads in rng.sample(THREADS, 2):
        torch.set_num_threads(threads)
        with torch.no_grad():
            weights = cpu.weights_like(q, k, average).fill_(torch.nan)
            cpu.forward(q, k, v, *lower(call), need_lse=False, weights=weights)
        found.append({"weights": weights})
    check("weights", weights, exact, native, magnitude=unit)
    _check_same_bits(*found)


def _dropped_weights(inputs: Inputs) -> Tensor:
    """By the definition, [B, Hq, Lq, Lk], in the dtype of inputs."""
    (q, k, _), options = inputs.arguments()
    p, seed = options.pop("dropout_p", 0.0), options.pop("dropout_seed", None)
    weights = reference.attention_weights(q, k, **options)
    if p == 1 or seed is None:
        return weights * (1 - p)
    batch, heads, rows, keys = weights.shape
    return weights * dropout_mask(seed, batch, heads, rows, keys, p) / (1 - p)


def check_hard(inputs: Inputs, rng: Random) -> None:
    """Hard attention chooses a visible key whose score is the largest, but for rounding."""
    case, group = inputs.case, inputs.case.heads // inputs.case.num_heads_kv
    q, k, v = inputs.leaves["q"], *(inputs.leaves[name].repeat_interleave(group, 1) for name in "kv")
    seed = torch.tensor([rng.getrandbits(62)]) if rng.random() < 0.5 else None
    options: dict[str, Any] = {"mask": inputs.mask, "scale": case.scale}
    dtype = torch.promote_types(case.dtype, torch.float32)
    scale = case.head_dim**-0.5 if case.scale is None else case.scale
    exact, native = (scale * (q.to(d) @ k.to(d).mT) for d in (torch.float64, dtype))
    limit = 2 * bound(exact, native.double(), dtype, 2)
    visible = reference.attention_weights(torch.zeros_like(q), torch.zeros_like(k), mask=inputs.mask) > 0
    noise = torch.zeros_like(exact)
    if seed is not None:
        words = fastattn.philox.dropout_words(seed, case.batch, case.heads, case.queries, case.keys).double()
        noise = -torch.log(-torch.log1p(-(words + 0.5) / 2**32))
    total = torch.where(visible, exact + noise, -torch.inf)
    for isa in _each_isa():
        torch.set_num_threads(rng.choice(THREADS))
        mode = "argmax" if seed is None else "sample"
        out, index = fastattn.hard_attention(
            q, k, v, mode=mode, seed=seed, return_index=True, backend="cpu", **options
        )
        where = f"{isa}, hard attention: {describe(inputs)}"
        if not torch.equal(index >= 0, visible.any(-1)):
            raise AssertionError(f"index is -1 in the wrong rows; {where}")
        if case.keys == 0 or q.isnan().any() or k.isnan().any():
            continue
        at = index.clamp(min=0)[..., None]
        short = total.amax(-1) - total.gather(-1, at)[..., 0]
        if (short[index >= 0] > limit).any():
            raise AssertionError(f"a key falls short of the best by {short[index >= 0].max()}; {where}")
        want = v.gather(2, at.expand(*index.shape, case.dim_v)).masked_fill(index[..., None] < 0, 0)
        _check_same_bits({"out": out}, {"out": want})


def _each_isa() -> Any:
    """Switches to one instruction set after the other, and back at the end."""
    from fastattn import _C  # type: ignore[attr-defined]

    before, threads = _C.info()["isa"], torch.get_num_threads()
    try:
        for isa in _C.info()["isas"]:
            _C.set_isa(isa)
            yield isa
    finally:
        _C.set_isa(before)
        torch.set_num_threads(threads)


def _check_same_bits(one: Results, other: Results) -> None:
    for name, x in one.items():
        y = other[name]
        if x is None or y is None:
            continue
        if not ((x == y) | (x.isnan() & y.isnan())).all():
            raise AssertionError(f"{name}: not the same bits with {torch.get_num_threads()} threads")


def describe(inputs: Inputs) -> str:
    """A failing problem in words."""
    settings = {name: value for name, value in vars(inputs.case).items() if name not in ("mask", "bias")}
    _, options = inputs.arguments()
    shown = {name: options.get(name) for name in ("mask", "bias")}
    shown = {name: tuple(x.shape) if isinstance(x, Tensor) else x for name, x in shown.items()}
    nans = [name for name, x in {**inputs.leaves, "dout": inputs.dout}.items() if x.isnan().any()]
    return f"{settings}, {shown}, NaN in {nans}"


@dataclass
class Report:
    """What a run tried, and what failed: messages by example."""

    tried: int = 0
    failures: dict[int, str] = field(default_factory=dict)


def fuzz(
    seconds: float,
    seed: int = 0,
    check: Callable[[int], None] = check_example,
    most_failures: int = 10,
    hang_seconds: float = HANG_SECONDS,
) -> Report:
    """Try the examples of a seed one after the other until the time is up or too many have failed.

    Args:
        check: raises where an example fails; must be importable by the processes that call it.
        hang_seconds: an example that takes longer has failed.
    """
    report, example = Report(), seed * EXAMPLES_PER_SEED
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and len(report.failures) < most_failures:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe(duplex=False)
        worker = context.Process(target=_work, args=(theirs, check, example, deadline - time.monotonic()))
        worker.start()
        theirs.close()
        try:
            example = _listen(ours, worker, report, example, most_failures, hang_seconds)
        finally:
            worker.kill()
            worker.join()
    return report


def _work(answers: Connection, check: Callable[[int], None], example: int, seconds: float) -> None:
    """Try examples in this process, and send (example, what went wrong or None) after each."""
    faulthandler.enable()
    answers.send((None, None))  # the imports are done
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        message = None
        try:
            check(example)
        except Exception as error:
            message = "".join(traceback.format_exception(error)[-3:])
        answers.send((example, message))
        example += 1


def _listen(
    answers: Connection, worker: Any, report: Report, example: int, most_failures: int, hang_seconds: float
) -> int:
    """Gather a worker's answers until it ends; returns the next example to try."""
    patience = HANG_SECONDS  # the imports take as long as they take
    while len(report.failures) < most_failures:
        try:
            if not answers.poll(patience):
                report.failures[example] = f"no answer within {patience:g} s"
                return example + 1
            done, message = answers.recv()
        except EOFError:
            worker.join()
            if worker.exitcode != 0:
                report.failures[example] = f"the process died, exit code {worker.exitcode}"
                return example + 1
            return example
        patience = hang_seconds
        if done is None:
            continue
        report.tried += 1
        example = done + 1
        if message is not None:
            report.failures[done] = message
    return example


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns 1 where an example failed."""
    parser = argparse.ArgumentParser(
        prog="python -m fastattn.testing.fuzz", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--seconds", type=float, default=60.0, help="how long to search (60)")
    parser.add_argument("--seed", type=int, default=0, help="which sequence of problems (0)")
    parser.add_argument("--example", type=int, help="try this one problem, in this process")
    given = parser.parse_args(arguments)
    if not cpu.available():
        parser.exit(2, "error: the native core fastattn._C is not built\n")
    if given.example is not None:
        print(describe(random_inputs(given.example)), flush=True)
        check_example(given.example)
        print("passed")
        return 0
    report = fuzz(given.seconds, given.seed)
    for example, message in report.failures.items():
        print(f"FAILED: python -m fastattn.testing.fuzz --example {example}\n{message}")
    print(f"{report.tried} problems tried, {len(report.failures)} failed")
    return 1 if report.failures or not report.tried else 0


if __name__ == "__main__":
    sys.exit(main())
