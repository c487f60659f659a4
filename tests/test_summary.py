"""summarize: what its statistics mean, what it refuses, and how it behaves at the edges."""

from __future__ import annotations

import math
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import pytest
import torch
from call_support import EXACT, NATIVE, randn
from summary_support import BACKENDS, qk

import fastattn
from fastattn import reference
from fastattn.backends import cpu
from fastattn.biases import ALiBi
from fastattn.inspect import AttentionSummary, summarize
from fastattn.inspect import summary as summary_module
from fastattn.masks import causal, padding, prefix


@pytest.fixture(params=BACKENDS)
def backend(request) -> str:
    return request.param


def test_a_worked_example(backend):
    """Two queries with equal scores, the first of which sees one key."""
    q = torch.zeros(1, 1, 2, 4)
    summary = summarize(q, q, mask=causal(), top_k=3, pool=1, backend=backend)
    torch.testing.assert_close(summary.entropy, torch.tensor([[[0.0, math.log(2)]]]))
    torch.testing.assert_close(summary.lse, torch.tensor([[[0.0, math.log(2)]]]))
    torch.testing.assert_close(summary.received, torch.tensor([[[1.5, 0.5]]]))
    torch.testing.assert_close(summary.distance, torch.tensor([[[0.0, 0.5]]]))
    torch.testing.assert_close(summary.max_weight, torch.tensor([[[1.0, 0.5]]]))
    assert summary.max_index.tolist() == [[[0, 0]]]  # the first of equal weights
    torch.testing.assert_close(summary.topk_weights, torch.tensor([[[[1.0, 0, 0], [0.5, 0.5, 0]]]]))
    assert summary.topk_indices.tolist() == [[[[0, -1, -1], [0, 1, -1]]]]
    assert summary.pooled.tolist() == [[[[0.5]]]]


@pytest.mark.parametrize("mode", ["mean", "sum", "max"])
@pytest.mark.parametrize("pool", [(1, 1), (2, 3), (5, 7), (3, 7), (64, 2), 4])
def test_cells_of_the_grid(backend, pool, mode):
    q, k = qk(2, 4, 2, 5, 7)
    got = summarize(q, k, mask=causal(), pool=pool, pool_mode=mode, backend=backend).pooled
    weights = reference.attention_weights(q, k, mask=causal())
    rows, cols = (pool, pool) if isinstance(pool, int) else pool
    rows, cols = min(rows, 5), min(cols, 7)
    assert got.shape == (2, 4, rows, cols)
    for r in range(rows):
        for c in range(cols):
            i = [n for n in range(5) if n * rows // 5 == r]
            j = [n for n in range(7) if n * cols // 7 == c]
            cell = weights[:, :, i][:, :, :, j].flatten(2)
            want = {"mean": cell.mean(-1), "sum": cell.sum(-1), "max": cell.amax(-1)}[mode]
            torch.testing.assert_close(got[:, :, r, c], want, **EXACT)


def test_distance_counts_from_the_end(backend):
    """The last of two queries stands at the last of four keys."""
    q, k = torch.zeros(1, 1, 2, 1), torch.zeros(1, 1, 4, 1)
    only = torch.tensor([[True, False, False, False], [False, False, False, True]])
    assert summarize(q, k, mask=only, backend=backend).distance.tolist() == [[[2.0, 0.0]]]


def test_sinks_take_their_share(backend):
    q = torch.zeros(1, 1, 1, 4, dtype=torch.float64)
    k = torch.zeros(1, 1, 3, 4, dtype=torch.float64)
    summary = summarize(q, k, sinks=torch.zeros(1), top_k=1, backend=backend)
    assert summary.received.sum().item() == pytest.approx(0.75)
    assert summary.entropy.item() == pytest.approx(-3 * 0.25 * math.log(0.25))
    assert summary.topk_weights.item() == pytest.approx(0.25)
    assert summary.lse.item() == pytest.approx(math.log(4))


@pytest.mark.parametrize("sinks", [None, torch.tensor([0.5, -1.0])], ids=["plain", "sinks"])
def test_rows_that_see_nothing(backend, sinks):
    q, k = qk(1, 2, 2, 3, 4, dtype=torch.float32, grad=True)
    mask = torch.tensor([True, False, True])[:, None].expand(3, 4)
    summary = summarize(q, k, mask=mask, sinks=sinks, top_k=2, pool=2, backend=backend)
    for name in ("entropy", "max_weight", "distance"):
        assert (getattr(summary, name)[:, :, 1] == 0).all()
    assert (summary.max_index[:, :, 1] == -1).all()
    assert (summary.topk_weights[:, :, 1] == 0).all()
    assert (summary.topk_indices[:, :, 1] == -1).all()
    want = torch.full((1, 2), -math.inf) if sinks is None else sinks[None]
    torch.testing.assert_close(summary.lse[:, :, 1], want)
    loss = (
        summary.entropy.sum()
        + summary.received.square().sum()
        + summary.distance.sum()
        + summary.pooled.sum()
    )
    gradient = torch.autograd.grad(loss, q)[0]
    assert (gradient[:, :, 1] == 0).all()
    assert gradient.isfinite().all()


@pytest.mark.parametrize(
    "shape", [(0, 2, 2, 3, 4), (2, 0, 0, 3, 4), (2, 2, 1, 0, 4), (2, 2, 1, 3, 0), (1, 2, 1, 3, 4, 0)]
)
def test_empty_dimensions(backend, shape):
    q, k = qk(*shape, grad=True)
    summary = summarize(q, k, top_k=2, pool=2, backend=backend)
    batch, heads, _, seqlen_q, seqlen_k = shape[:5]
    assert summary.topk_indices.shape == (batch, heads, seqlen_q, 2)
    assert summary.pooled.shape == (batch, heads, min(2, seqlen_q), min(2, seqlen_k))
    assert summary.received.shape == (batch, heads, seqlen_k)
    for gradient in torch.autograd.grad(summary.entropy.sum() + summary.received.sum(), [q, k]):
        assert (gradient == 0).all()


def test_weights_of_chosen_queries_and_keys():
    q, k = qk(2, 4, 2, 5, 7)
    options = {"mask": causal() | prefix(2), "bias": ALiBi(randn(4)), "softcap": 2.0}
    got = summarize(q, k, **options).weights(rows=[1, -1], cols=slice(2))
    torch.testing.assert_close(got, reference.attention_weights(q, k, **options)[:, :, [1, 4], :2], **EXACT)


def test_detach_frees_q_and_k():
    q, k = qk(1, 2, 2, 3, 4, grad=True)
    summary = summarize(q, k, top_k=1)
    assert summary.entropy.requires_grad
    assert not any(
        t.requires_grad for name, t in summary.tensors().items() if "max" in name or "topk" in name
    )
    cut = summary.detach()
    assert isinstance(cut, AttentionSummary)
    assert not any(t.requires_grad for t in cut.tensors().values())
    assert torch.equal(cut.topk_weights, summary.topk_weights)
    with pytest.raises(RuntimeError, match="weights needs q and k"):
        cut.weights()


def test_repr():
    q = torch.zeros(2, 3, 4, 8)
    text = repr(summarize(q, q, top_k=2, pool=(2, 4), pool_mode="max"))
    want = "batch 2, 3 heads, 4 queries, 4 keys, mean entropy 1.386 nats, top_k=2, pooled 2x4 by max"
    assert text == f"AttentionSummary({want})"


def test_without_options_nothing_extra_is_there():
    q = torch.zeros(1, 1, 2, 4)
    summary = summarize(q, q)
    assert summary.topk_weights is None and summary.topk_indices is None and summary.pooled is None
    assert list(summary.tensors()) == ["entropy", "max_weight", "max_index", "received", "distance", "lse"]


Q, K = torch.zeros(2, 4, 5, 8), torch.zeros(2, 2, 7, 8)
LSE = torch.zeros(2, 4, 5)
WRONG = [
    ({"q": Q[0]}, ValueError, r"q must be 4-D \[batch, heads, length, head_dim\], got shape \[4, 5, 8\]"),
    ({"k": [1.0]}, TypeError, "k must be a torch.Tensor, got list"),
    ({"k": torch.zeros(2, 3, 7, 8)}, ValueError, "q's heads must be a multiple of k's 3, got 4"),
    ({"top_k": 257}, ValueError, "top_k must be at most 256, got 257"),
    ({"top_k": -1}, ValueError, "top_k must be >= 0, got -1"),
    ({"top_k": 2.5}, TypeError, "top_k must be an int, got float"),
    ({"pool": (1, 2, 3)}, ValueError, r"pool must be \(rows, cols\) or one int, got \(1, 2, 3\)"),
    ({"pool": (4, 0)}, ValueError, "pool's cols must be >= 1, got 0"),
    ({"pool": "ab"}, TypeError, "pool's rows must be an int, got str"),
    ({"pool_mode": "median"}, ValueError, "pool_mode must be one of mean, sum, max, got 'median'"),
    ({"lse": LSE[:, :, :4]}, ValueError, r"lse must have shape \[2, 4, 5\], got \[2, 4, 4\]"),
    ({"lse": LSE.double()}, TypeError, "lse must be float32, got float64"),
    ({"lse": 0.0}, TypeError, "lse must be a torch.Tensor, got float"),
    ({"mask": torch.ones(5, 6) > 0}, ValueError, r"mask must broadcast to \[2, 4, 5, 7\], got \[5, 6\]"),
    ({"backend": "fast"}, ValueError, "backend must be one of .*, got 'fast'"),
    ({"backend": "torch"}, NotImplementedError, "backend 'torch' cannot summarize .*: it has no summary"),
]


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: wrong[2][:20])
def test_errors(wrong):
    options, kind, message = wrong
    with pytest.raises(kind, match=message):
        summarize(**{"q": Q, "k": K, **options})


def test_ties_go_by_score_and_then_by_key(backend):
    """A weight cannot tell 1e-9 from 0, a score can; of equal scores the lower key is first."""
    q, k = torch.ones(1, 1, 1, 1), torch.tensor([0.0, 1e-9, 0.0, 1e-9, -1.0]).view(1, 1, 5, 1)
    got = summarize(q, k, top_k=4, backend=backend)
    assert got.topk_weights.unique().numel() == 1
    assert got.topk_indices.flatten().tolist() == [1, 3, 0, 2]
    assert got.max_index.item() == 1
    many = torch.zeros(1, 1, 700, 1)
    assert summarize(q, many, top_k=9, backend=backend).topk_indices.flatten().tolist() == list(range(9))


def test_the_environment_forces_a_backend(monkeypatch):
    monkeypatch.setenv("FASTATTN_BACKEND", "torch")
    with pytest.raises(NotImplementedError, match="torch"):
        summarize(Q, K)
    monkeypatch.setenv("FASTATTN_BACKEND", "reference")
    assert summarize(Q, K).entropy.shape == (2, 4, 5)


def test_a_fall_to_the_reference_warns_once(monkeypatch):
    monkeypatch.setattr(cpu, "available", lambda: False)
    monkeypatch.setattr(cpu, "supports", lambda spec: "it is switched off")
    monkeypatch.setattr(summary_module, "_warned", set())
    with pytest.warns(UserWarning, match="whole matrix of weights .cpu: it is switched off"):
        summarize(Q, K)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        summarize(Q, K)


def poisoned(position: str, value: float):
    """q and k with one bad value, and a mask under which key 3 is hidden from the first two queries."""
    q, k = qk(1, 2, 2, 6, 9, dtype=torch.float32)
    if position == "q":
        q[0, 0, 4, 1] = value
    else:
        k[0, 0, 3, 1] = value
    mask = torch.ones(6, 9, dtype=torch.bool)
    mask[:2, 3] = False
    return q, k, mask


@pytest.mark.parametrize("hides", ["mask", "bias"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("position", ["q", "k"])
def test_non_finite_values_stay_where_they_are_used(backend, position, value, hides):
    q, k, mask = poisoned(position, value)
    bias = torch.zeros(6, 9).masked_fill(~mask, -math.inf)
    options = {"mask": mask} if hides == "mask" else {"bias": bias}
    q.requires_grad_()
    summary = summarize(q, k, top_k=2, pool=(6, 9), backend=backend, **options)
    clean = summarize(q.detach().nan_to_num(0, 0, 0), k.nan_to_num(0, 0, 0), top_k=2, pool=(6, 9), **options)
    bad_rows = [4] if position == "q" else [2, 3, 4, 5]
    good_rows = [i for i in range(6) if i not in bad_rows]
    for name in ("entropy", "max_weight", "max_index", "distance", "topk_weights", "topk_indices", "lse"):
        got, want = getattr(summary, name).detach(), getattr(clean, name)
        torch.testing.assert_close(got[0, 0, good_rows], want[0, 0, good_rows])
        torch.testing.assert_close(got[0, 1], want[0, 1])
        if math.isnan(value):  # an infinite score may be -inf, whose weight is 0
            bad = got[0, 0, bad_rows]
            assert (bad == -1).all() if name.endswith(("index", "indices")) else bad.isnan().all()
    is_bad = mask & torch.tensor([i in bad_rows for i in range(6)])[:, None]
    cells = summary.pooled[0, 0].detach()
    torch.testing.assert_close(cells[~is_bad], clean.pooled[0, 0][~is_bad])
    assert not math.isnan(value) or cells[is_bad].isnan().all()
    assert summary.received[0, 1].isfinite().all()
    gradient = torch.autograd.grad(summary.entropy[0, :, :2].sum() + summary.distance[0, :, :2].sum(), q)[0]
    assert gradient[0, :, :2].isfinite().all()


@pytest.mark.skipif(not NATIVE, reason="the native core is not built")
@pytest.mark.parametrize(
    "name", ["dense", "causal", "padding", "block", "pooled to the full grid", "float64"]
)
def test_the_same_bits_for_any_number_of_threads(use_threads, name):
    dtype = torch.float64 if name == "float64" else torch.float32
    q, k = qk(2, 4, 2, 700, 530, dtype=dtype, grad=True)
    masks = {"causal": causal(), "padding": padding([300, 530]), "block": causal() | prefix([40, 90])}
    pool = (700, 530) if name.startswith("pooled") else (7, 33)

    def run():
        summary = summarize(q, k, mask=masks.get(name), top_k=4, pool=pool)
        losses = [getattr(summary, n).square().sum() for n in ("entropy", "received", "distance", "pooled")]
        return [*summary.detach().tensors().values(), *torch.autograd.grad(sum(losses), [q, k])]

    use_threads(1)
    expected = run()
    for threads in (2, 3, 7):
        use_threads(threads)
        for a, b in zip(run(), expected, strict=True):
            assert torch.equal(a, b)


@pytest.mark.skipif(not NATIVE, reason="the native core is not built")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("pool_mode", ["mean", "max"])
@pytest.mark.parametrize("seqlen_q", [255, 256, 257, 320, 511, 700])
def test_heads_of_two_chunks(use_threads, seqlen_q, pool_mode, dtype):
    """Rows that are cut in two, cells across the cut too: right, and the same bits whoever adds them up."""
    q, k = qk(1, 3, 1, seqlen_q, 70, dtype=dtype)
    options = {"mask": causal(align="top_left"), "top_k": 2, "pool": (7, 9), "pool_mode": pool_mode}
    use_threads(1)
    expected = summarize(q, k, **options).tensors()
    want = summarize(q.double(), k.double(), **options, backend="reference").tensors()
    for name in ("entropy", "received", "distance", "lse", "pooled", "max_weight", "topk_weights"):
        close = EXACT if dtype is torch.float64 else {"rtol": 1e-5, "atol": 1e-5}
        torch.testing.assert_close(expected[name].double(), want[name], **close)
    for threads in (2, 3, 7):
        use_threads(threads)
        for name, tensor in summarize(q, k, **options).tensors().items():
            assert torch.equal(tensor, expected[name]), name


@pytest.mark.skipif(not NATIVE, reason="the native core is not built")
def test_the_same_bits_alone_as_in_a_batch():
    q, k = qk(2, 4, 2, 700, 530, dtype=torch.float32)
    options = {"mask": causal(), "top_k": 4, "pool": (7, 33)}
    together = summarize(q, k, **options).tensors()
    alone = summarize(q[1:, 2:3], k[1:, 1:], **options).tensors()
    for name, tensor in alone.items():
        assert torch.equal(tensor[0, 0], together[name][1, 2]), name


MEMORY = """
    import torch
    from fastattn.inspect import summarize

    def resident(what):
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) for line in status if line.startswith(what)) / 1024

    def call(heads, length, dim):
        q, k = torch.randn(1, heads, length, dim), torch.randn(1, heads, length, dim)
        with open("/proc/self/clear_refs", "w") as refs:
            refs.write("5")
        before = resident("VmRSS")
        summary = summarize(q, k, top_k=8, pool=(256, 256), backend="cpu")
        outputs = sum(t.numel() * t.element_size() for t in summary.tensors().values()) / 2**20
        return resident("VmHWM") - before - outputs

    call({heads}, 256, {dim})  # what is loaded and allocated once
    print(call({heads}, {length}, {dim}))
"""


@pytest.mark.skipif(not NATIVE or not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize(
    ("heads", "length", "dim", "limit"),
    [(2, 4096, 16, 20), pytest.param(8, 32768, 128, 100, marks=pytest.mark.slow)],
    ids=["4096", "32768"],
)
def test_memory_beside_inputs_and_outputs(heads, length, dim, limit):
    """The weights of one head alone would be 64 MB at 4096, and 4096 MB at 32768."""
    script = textwrap.dedent(MEMORY).format(heads=heads, length=length, dim=dim)
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, timeout=900, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < limit


def test_autocast():
    q, k = qk(1, 2, 2, 5, 7, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        summary = summarize(q, k)
    plain = summarize(q.bfloat16(), k.bfloat16())
    assert torch.equal(summary.entropy, plain.entropy)
    assert summary.entropy.dtype == torch.float32


def test_an_entropy_loss_trains():
    """A few steps of descent on the entropy alone make attention sharper."""
    q, k = qk(1, 2, 2, 16, 16, dtype=torch.float32, grad=True)
    optimiser = torch.optim.SGD([q, k], lr=2.0)
    entropies = []
    for _ in range(20):
        loss = summarize(q, k, mask=fastattn.masks.causal()).entropy.mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        entropies.append(loss.item())
    assert entropies[-1] < 0.8 * entropies[0]
