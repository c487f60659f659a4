"""The same bits for any number of threads, run to run, whatever else is in the batch, after fork."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

import fastattn
from fastattn import masks
from fastattn.backends import cpu
from fastattn.biases import ALiBi
from fastattn.testing import CASES, Case, Results, make_inputs, run

pytestmark = pytest.mark.skipif(not cpu.available(), reason="the native core fastattn._C is not built")

BY_NAME = {case.name: case for case in CASES}
# Enough heads and rows for several threads to have work, and every kind of reduction.
NAMES = (
    "many-tiles", "many-tiles-bfloat16", "many-tiles-float64", "gqa", "mqa", "dropout-0.5", "causal-long-k",
    "mask-padding-per-query", "mask-documents-causal", "bool-full", "bias-full", "bias-head", "bias-keys",
    "bias-queries", "bias-scalar", "bias-alibi", "bias-relative", "alibi-gqa-causal", "sinks", "all-band",
    "all-dense", "all-block", "all-padding", "all-dense-bfloat16", "varlen-causal-gqa", "varlen-dropout",
    "varlen-alibi", "varlen-block", "decode", "decode-long", "decode-causal", "paged-causal",
    "decode-bfloat16",
)  # fmt: skip


def large(name: str) -> Case:
    """The case with more queries and keys, so that work is split, but the same inputs in every test."""
    case = BY_NAME[name]
    if case.op == "attention" and case.queries < 200:
        case = replace(case, seqlen_q=200, seqlen_k=330 if case.keys != case.queries else 200)
    return case


def results(case: Case, **keywords) -> Results:
    return run(fastattn, make_inputs(case), backend="cpu", **keywords)


def assert_same_bits(got: Results, expected: Results) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        if value is None:
            assert got[name] is None
        else:
            assert torch.equal(got[name].nan_to_num(), value.nan_to_num()), f"{name} differs"


@pytest.mark.parametrize("name", NAMES)
def test_any_number_of_threads(name: str, use_threads):
    case = large(name)
    use_threads(1)
    expected = results(case)
    for threads in (2, 3, 7):
        use_threads(threads)
        assert_same_bits(results(case), expected)


@pytest.mark.parametrize("mask", [None, masks.causal(), masks.window(3, 9)], ids=repr)
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(64, 64), (13, 700), (40, 2100), (100, 40), (192, 192)])
def test_one_head_on_several_threads(seqlen_q: int, seqlen_k: int, mask, use_threads):
    """Tiles are cut where they are fewer than threads, also of few rows, whose keys are split."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((1, 1, seqlen_q, 128), (1, 1, seqlen_k, 128), (1, 1, seqlen_k, 72))
    q, k, v = (torch.randn(shape, generator=generator) for shape in shapes)
    use_threads(1)
    expected = fastattn.attention(q, k, v, mask=mask, return_lse=True, backend="cpu")
    for threads in (2, 3, 5):
        use_threads(threads)
        out, lse = fastattn.attention(q, k, v, mask=mask, return_lse=True, backend="cpu")
        assert torch.equal(out, expected[0])
        assert torch.equal(lse, expected[1])


@pytest.mark.parametrize("name", NAMES)
def test_run_to_run(name: str):
    case = large(name)
    expected = results(case)
    for _ in range(3):
        assert_same_bits(results(case), expected)


def one_head(x: torch.Tensor, b: int, h: int, heads: int = 4) -> torch.Tensor:
    """Batch entry b and query head h (or the head of k and v that it reads) alone, copied."""
    group = heads // x.shape[1] if x.shape[1] in (heads, heads // 2) else 1
    return x[b : b + 1, h // group : h // group + 1].contiguous()


OPTIONS = {
    "dense": lambda b: {},
    "causal": lambda b: {"mask": masks.causal()},
    "causal-window": lambda b: {"mask": masks.causal() & masks.window(90, None)},
    "softcap": lambda b: {"softcap": 2.0, "scale": -0.4},
    "block": lambda b: {"mask": masks.window(50, 3) | masks.global_tokens(torch.tensor([0, 100]))},
    "alibi": lambda b: {"bias": ALiBi(torch.tensor([0.1, 0.1, 0.1, 0.1])[: 4 if b is None else 1])},
    "padding": lambda b: {"mask": masks.padding(LENGTHS if b is None else LENGTHS[b : b + 1])},
    "bool": lambda b: {"mask": MASK if b is None else MASK[b : b + 1]},
    "bias": lambda b: {"bias": BIAS if b is None else BIAS[b : b + 1]},
}
LENGTHS = torch.tensor([300, 17, 201])
MASK = torch.rand(3, 1, 260, 300, generator=torch.Generator().manual_seed(1)) < 0.6
BIAS = torch.randn(3, 1, 260, 300, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", OPTIONS)
def test_a_batch_equals_its_elements_alone(kind: str, dtype: torch.dtype):
    """Forward and backward; k and v have as many heads as q, so that each gradient is one head's."""
    generator = torch.Generator().manual_seed(0)
    sizes = {"q": 260, "k": 300, "v": 300, "dout": 260}
    whole = {n: torch.randn(3, 4, size, 40, generator=generator).to(dtype) for n, size in sizes.items()}

    def call(tensors: dict[str, torch.Tensor], b: int | None) -> list[torch.Tensor]:
        q, k, v = (tensors[n].detach().requires_grad_() for n in ("q", "k", "v"))
        options = OPTIONS[kind](b)
        if isinstance(bias := options.get("bias"), torch.Tensor):
            options["bias"] = bias.to(dtype)
        out, lse = fastattn.attention(q, k, v, **options, return_lse=True, backend="cpu")
        return [
            out,
            lse,
            *torch.autograd.grad((out, lse), (q, k, v), (tensors["dout"], torch.ones_like(lse))),
        ]

    together = call(whole, None)
    for b, h in ((0, 0), (1, 3), (2, 1)):
        alone = call({n: one_head(x, b, h) for n, x in whole.items()}, b)
        for name, x, y in zip(("out", "lse", "dq", "dk", "dv"), together, alone, strict=True):
            assert torch.equal(x[b, h], y[0, 0]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_grouped_batch_equals_its_elements_alone(dtype: torch.dtype):
    generator = torch.Generator().manual_seed(0)
    shapes = {"q": (3, 6, 150, 32), "k": (3, 2, 190, 32), "v": (3, 2, 190, 24), "dout": (3, 6, 150, 24)}
    whole = {n: torch.randn(shape, generator=generator).to(dtype) for n, shape in shapes.items()}

    def call(tensors: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        q, k, v = (tensors[n].detach().requires_grad_() for n in ("q", "k", "v"))
        out = fastattn.attention(q, k, v, mask=masks.causal(), backend="cpu")
        return [out, *torch.autograd.grad(out, (q, k, v), tensors["dout"])]

    together = call(whole)
    for b in range(3):
        for group in range(2):
            heads = {"q": slice(3 * group, 3 * group + 3), "k": slice(group, group + 1)}
            heads |= {"v": heads["k"], "dout": heads["q"]}
            alone = call({n: x[b : b + 1, heads[n]].contiguous() for n, x in whole.items()})
            for name, x, y in zip(("q", "q", "k", "v"), together, alone, strict=True):
                assert torch.equal(x[b : b + 1, heads[name]], y)


def test_dropout_of_the_first_element_alone():
    """Dropout depends on the batch index by definition, so only the first element can stand alone."""
    whole = make_inputs(replace(BY_NAME["dropout-causal-gqa"], seqlen_q=200))
    alone = replace(
        whole, leaves={n: x[:1] for n, x in whole.leaves.items()}, dout=whole.dout[:1], dlse=whole.dlse[:1]
    )
    together, single = run(fastattn, whole, backend="cpu"), run(fastattn, alone, backend="cpu")
    assert_same_bits({n: x[:1] for n, x in together.items()}, single)


@pytest.mark.parametrize("mask", [None, masks.causal(), masks.causal() | masks.window(0, 5)], ids=repr)
def test_a_packed_sequence_alone(mask):
    lens_q, lens_k, heads = (70, 5, 200), (90, 140, 200), 4
    cu_q, cu_k = (torch.tensor([0, *lens]).cumsum(0).int() for lens in (lens_q, lens_k))
    generator = torch.Generator().manual_seed(0)
    q, dout = (torch.randn(sum(lens_q), heads, 24, generator=generator) for _ in range(2))
    k, v = (torch.randn(sum(lens_k), 2, 24, generator=generator) for _ in range(2))

    def call(q, k, v, dout, cu_q, cu_k):
        q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
        out, lse = fastattn.varlen_attention(q, k, v, cu_q, cu_k, mask=mask, return_lse=True, backend="cpu")
        return [out, lse.mT, *torch.autograd.grad(out, (q, k, v), dout)]

    together = call(q, k, v, dout, cu_q, cu_k)
    for b, (lq, lk) in enumerate(zip(lens_q, lens_k, strict=True)):
        rows, keys = slice(int(cu_q[b]), int(cu_q[b]) + lq), slice(int(cu_k[b]), int(cu_k[b]) + lk)
        one_q, one_k = torch.tensor([0, lq]).int(), torch.tensor([0, lk]).int()
        alone = call(q[rows], k[keys], v[keys], dout[rows], one_q, one_k)
        for name, part, x, y in zip(
            ("out", "lse", "dq", "dk", "dv"), (rows, rows, rows, keys, keys), together, alone, strict=True
        ):
            assert torch.equal(x[part], y), f"{name} of sequence {b}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("seqlen_q", [1, 4])
def test_a_cache_alone_and_paged(seqlen_q: int, dtype: torch.dtype):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(3, 4, seqlen_q, 64, generator=generator).to(dtype)
    k, v = (torch.randn(3, 2, 1280, 64, generator=generator).to(dtype) for _ in range(2))
    lengths = torch.tensor([1280, 700, 65])
    options = {"mask": masks.causal(), "backend": "cpu"}
    together = fastattn.decode_attention(q, k, v, lengths, **options)
    for b in range(3):
        one = slice(b, b + 1)
        assert torch.equal(
            fastattn.decode_attention(q[one], k[one], v[one], lengths[one], **options), together[one]
        )
    pages = [x.unflatten(2, (20, 64)).transpose(1, 2).flatten(0, 1).contiguous() for x in (k, v)]
    table = torch.arange(60, dtype=torch.int32).view(3, 20)
    assert torch.equal(fastattn.decode_attention(q, *pages, lengths, block_table=table, **options), together)


def test_several_python_threads():
    """Calls of different shapes from eight threads at once give what they give one after the other."""
    cases = [large(name) for name in NAMES if "float" not in name] * 2
    expected = [results(case) for case in cases]
    with ThreadPoolExecutor(8) as pool:
        for got, want in zip(pool.map(results, cases), expected, strict=True):
            assert_same_bits(got, want)


FORK = """
    import os, sys, torch, fastattn
    torch.set_num_threads(2)
    # PyTorch's own operations hang in a child once they are large enough to use threads (32768 elements);
    # so this uses none that large.
    q, dout = torch.randn(2, 4, 250, 16, requires_grad=True), torch.randn(2, 4, 250, 16)

    def call():
        out = fastattn.attention(q, q, q, mask=fastattn.masks.causal(), backend="cpu")
        return out.detach(), torch.autograd.grad(out, q, dout)[0]

    def same(results):
        return all(torch.equal(x, y) for x, y in zip(results, before))

    before = call()
    for _ in range(3):
        child = os.fork()
        if child == 0:
            {in_child}
            os._exit(0 if same(call()) else 1)
        _, status = os.waitpid(child, 0)
        assert same(call()), "the parent's numbers changed"
        if status != 0:
            sys.exit(f"the child's status is {{status}}")
"""


@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="no fork on this platform")
@pytest.mark.parametrize("in_child", ["pass", "torch.set_num_threads(1)", "torch.set_num_threads(3)"])
def test_after_fork(in_child: str):
    """A forked child has no OpenMP workers: it must neither hang nor change its numbers."""
    script = textwrap.dedent(FORK).format(in_child=in_child)
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, timeout=60, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "mask",
    [
        None,
        ~masks.causal(),
        masks.window(None, 1),
        masks.window(0, 0),
        ~masks.window(1, 1),
        masks.prefix([2]),
    ],
    ids=repr,
)
def test_many_small_heads(mask, dtype: torch.dtype, use_threads):
    """Workspaces of neighbouring heads touch: a write beyond one's own is a race that shows rarely."""
    generator = torch.Generator().manual_seed(0)
    use_threads(2)
    shapes = ((8, 8, 4, 8), (8, 4, 5, 8), (8, 4, 5, 6), (8, 8, 4, 6))
    q, k, v, dout = (torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes)

    def call() -> list[torch.Tensor]:
        out = fastattn.attention(q, k, v, mask=mask, backend="cpu")
        return [out, *torch.autograd.grad(out, (q, k, v), dout)]

    use_threads(1)
    expected = call()
    use_threads(2)
    for _ in range(60):
        for name, x, y in zip(("out", "dq", "dk", "dv"), call(), expected, strict=True):
            assert torch.equal(x, y), name
