"""kernel_attention and nn.KernelRegression."""

from __future__ import annotations

import copy
import math
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from call_support import EXACT, NATIVE, grads, randn

import fastattn
from fastattn import masks
from fastattn.kernel_regression import KERNELS
from fastattn.nn import Attention, KernelRegression

needs_native = pytest.mark.skipif(not NATIVE, reason="the native core is not built")

VALUES = {
    "gaussian": lambda u: torch.exp(-(u**2) / 2),
    "boxcar": lambda u: (u <= 1).double(),
    "epanechnikov": lambda u: (1 - u**2).clamp(min=0),
    "triangular": lambda u: (1 - u).clamp(min=0),
    "constant": torch.ones_like,
}


def distance(q, k, width):
    """sqrt whose slope at 0 is 0, as the kernels define it."""
    squared = ((q[..., :, None, :] - k[..., None, :, :]) / width).square().sum(-1)
    at_zero = squared == 0
    return squared.masked_fill(at_zero, 1.0).sqrt().masked_fill(at_zero, 0.0)


def dense(q, k, v, kernel, width, visible=None):
    """The quotient of sums, with the whole matrix; empty rows 0."""
    weights = VALUES[kernel](distance(q, k, width))
    weights = weights if visible is None else weights * visible
    total = weights.sum(-1, keepdim=True)
    return torch.where(total > 0, weights / total.clamp(min=1e-300), 0.0) @ v


def inputs(*lead, seqlen_q=9, seqlen_k=14, dim=2, grad=False, dtype=torch.float64):
    q, k = randn(*lead, seqlen_q, dim), randn(*lead, seqlen_k, dim, seed=2)
    v = randn(*lead, seqlen_k, 3, seed=3)
    return [t.to(dtype).requires_grad_(grad) for t in (q, k, v)]


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_equals_the_quotient_and_its_gradients(kernel, backend):
    width = torch.tensor(0.9, dtype=torch.float64, requires_grad=True)
    tensors = [*inputs(2, grad=True), width]
    visible = torch.rand(2, 9, 14, generator=torch.Generator().manual_seed(5)) < 0.8

    def call(q, k, v, width):
        return fastattn.kernel_attention(q, k, v, kernel=kernel, width=width, mask=visible, backend=backend)

    def definition(q, k, v, width):
        return dense(q, k, v, kernel, width, visible)

    if kernel == "constant":  # which depends on no width
        got, got_grads = grads(lambda q, k, v: call(q, k, v, width), tensors[:3])
        want = dense(*tensors[:3], kernel, width, visible)
        torch.testing.assert_close(got[0], want, **EXACT)
        assert got_grads[0].count_nonzero() == got_grads[1].count_nonzero() == 0
        return
    got, got_grads = grads(call, tensors)
    if kernel == "boxcar":
        torch.testing.assert_close(got[0], definition(*tensors), **EXACT)
        assert all(got_grads[n].count_nonzero() == 0 for n in (0, 1, 3))
        return
    want, want_grads = grads(definition, tensors)
    for a, b in zip(got + got_grads, want + want_grads, strict=True):
        torch.testing.assert_close(a, b, **EXACT)


@pytest.mark.parametrize("kernel", ["gaussian", "epanechnikov", "triangular"])
def test_a_width_per_feature(kernel):
    width = torch.tensor([0.5, 2.0], dtype=torch.float64, requires_grad=True)
    q, k, v = inputs(2)
    got, got_grads = grads(lambda w: fastattn.kernel_attention(q, k, v, kernel=kernel, width=w), [width])
    want, want_grads = grads(lambda w: dense(q, k, v, kernel, w), [width])
    for a, b in zip(got + got_grads, want + want_grads, strict=True):
        torch.testing.assert_close(a, b, **EXACT)


@pytest.mark.parametrize("kernel", KERNELS)
def test_data_far_from_zero_are_as_good_as_data_near_it(kernel):
    """In float32 at 4096 the coordinates are multiples of 2^-11; whole such steps lose nothing."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randint(0, 2048, (n, 1), generator=generator) / 2048 for n in (50, 200))
    v = torch.randn(200, 1, generator=generator)
    near = fastattn.kernel_attention(q, k, v, kernel=kernel, width=0.0303)
    far = fastattn.kernel_attention(q + 4096, k + 4096, v, kernel=kernel, width=0.0303)
    torch.testing.assert_close(far, near, rtol=0, atol=1e-5)


def test_the_gaussian_is_a_dot_product_with_a_bias_for_each_key():
    """As the tour writes it, where the data are few widths wide."""
    q, k, v = (torch.randn(2, n, d, dtype=torch.float64) for n, d in ((5, 3), (7, 3), (7, 2)))
    want, want_lse = fastattn.kernel_attention(q, k, v, width=0.7, return_lse=True)
    a, b = q / 0.7, k / 0.7
    key_bias = -0.5 * b.square().sum(-1)
    heads = (t[:, None] for t in (a, b, v))
    out, lse = fastattn.attention(*heads, bias=key_bias[:, None, None], scale=1.0, return_lse=True)
    torch.testing.assert_close(out[:, 0], want, rtol=0, atol=1e-13)
    torch.testing.assert_close(lse[:, 0] - 0.5 * a.square().sum(-1), want_lse, rtol=0, atol=1e-13)
    a, b = torch.cat([a, torch.ones_like(a[..., :1])], -1), torch.cat([b, key_bias[..., None]], -1)
    torch.testing.assert_close(Attention("dot")(a, b, v), want, rtol=0, atol=1e-13)


def test_the_gaussian_of_a_narrow_width_keeps_its_digits():
    """A thousand widths of data: through q . k - |k|^2 / 2 in float32 the error would be some 1e-2."""
    x = torch.linspace(0, 1000, 4001)[:, None]
    y = torch.sin(x)
    got = fastattn.kernel_attention(x, x, y, width=1.0)
    exact = dense(x.double(), x.double(), y.double(), "gaussian", 1.0)
    assert (got - exact).abs().max() < 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
def test_half_precision_is_computed_in_float32(kernel, dtype):
    q, k, v = inputs(2, dtype=dtype)
    out, lse = fastattn.kernel_attention(q, k, v, kernel=kernel, return_lse=True)
    want, want_lse = fastattn.kernel_attention(
        q.float(), k.float(), v.float(), kernel=kernel, return_lse=True
    )
    assert out.dtype == dtype and torch.equal(out, want.to(dtype)) and torch.equal(lse, want_lse)


@pytest.mark.parametrize("kernel", KERNELS)
def test_autocast_leaves_coordinates_alone(kernel):
    q, k, v = inputs(2, dtype=torch.float32)
    want = fastattn.kernel_attention(q, k, v, kernel=kernel, width=0.5)
    layer = KernelRegression(kernel, width=0.5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(fastattn.kernel_attention(q, k, v, kernel=kernel, width=0.5), want)
        torch.testing.assert_close(layer(q, k, v), want)
        torch.testing.assert_close(
            layer.attention_weights.double() @ v.double(), want.double(), rtol=0, atol=1e-5
        )


@pytest.mark.parametrize("kernel", ["boxcar", "epanechnikov", "triangular"])
def test_an_empty_support_gives_zero(kernel):
    q = torch.tensor([[0.0], [50.0], [1.0]], requires_grad=True)
    k, v = torch.zeros(4, 1, requires_grad=True), torch.ones(4, 2, requires_grad=True)
    out, lse = fastattn.kernel_attention(q, k, v, kernel=kernel, width=2.0, return_lse=True)
    assert out[1].tolist() == [0, 0] and lse[1] == -math.inf
    assert (out[[0, 2]] == 1).all()
    for gradient in torch.autograd.grad(out.sum(), (q, k, v)):
        assert gradient.isfinite().all()


def test_lse_is_a_density():
    """The mean of Gaussian kernels over the data integrates to 1."""
    data = randn(300, 1)
    grid = torch.linspace(-8, 8, 4001, dtype=torch.float64)[:, None]
    lse = fastattn.kernel_attention(grid, data, data, width=0.3, return_lse=True)[1]
    density = lse.exp() / (300 * 0.3 * math.sqrt(2 * math.pi))
    assert torch.trapezoid(density, grid[:, 0]).item() == pytest.approx(1, abs=1e-9)


def test_masked_keys_may_hold_anything():
    q, k, v = inputs(2)
    mask = masks.padding([10, 14])
    want = fastattn.kernel_attention(q, k, v, mask=mask)
    k[0, 10:], v[0, 10:] = math.nan, math.inf
    torch.testing.assert_close(fastattn.kernel_attention(q, k, v, mask=mask), want, **EXACT)


def test_leading_dimensions_and_compile():
    q, k, v = inputs(2, 3)
    want = dense(q, k[0], v[0], "gaussian", 0.7)
    torch.testing.assert_close(fastattn.kernel_attention(q, k[0], v[0], width=0.7), want, **EXACT)
    width = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)

    def call(q, k, v, width):
        return fastattn.kernel_attention(q, k, v, kernel="epanechnikov", width=width)

    got, got_grads = grads(
        torch.compile(call, fullgraph=True, backend="aot_eager"), [*inputs(2, grad=True), width]
    )
    want, want_grads = grads(call, [*inputs(2, grad=True), width])
    for a, b in zip(got + got_grads, want + want_grads, strict=True):
        torch.testing.assert_close(a, b, **EXACT)


@pytest.mark.parametrize(
    ("keywords", "kind", "message"),
    [
        (
            {"kernel": "box"},
            ValueError,
            "kernel must be one of gaussian, boxcar, epanechnikov, triangular, constant, got 'box'",
        ),
        ({"width": 0.0}, ValueError, "width must be positive, got 0.0"),
        ({"width": "wide"}, TypeError, "width must be a real number, got str"),
        (
            {"width": torch.ones(3)},
            ValueError,
            "width must have one element or shape [2], one per feature, got [3]",
        ),
        ({"width": torch.tensor([1.0, -2.0])}, ValueError, "width must be positive and finite, got -2"),
        ({"width": torch.tensor(torch.nan)}, ValueError, "width must be positive and finite, got nan"),
        ({"width": torch.tensor(1)}, TypeError, "width must be floating point, got int64"),
        (
            {"mask": torch.ones(8, 14, dtype=torch.bool)},
            ValueError,
            "mask must broadcast to [2, 9, 14], got [8, 14]",
        ),
    ],
    ids=["kernel", "zero", "text", "shape", "negative", "nan", "int", "mask"],
)
def test_errors(keywords, kind, message):
    with pytest.raises(kind, match=re.escape(message)):
        fastattn.kernel_attention(*inputs(2), **keywords)
    q, k, v = inputs(2)
    with pytest.raises(ValueError, match="k must have q's 2 features, got 1"):
        fastattn.kernel_attention(q, k[..., :1], v)
    with pytest.raises(ValueError, match=re.escape("q must be [..., length, features], got shape [2]")):
        fastattn.kernel_attention(q[0, 0], k, v)
    with pytest.raises(ValueError, match="k's leading dimensions must broadcast"):
        fastattn.kernel_attention(q, k[:1].expand(3, 14, 2), v)
    with pytest.raises(TypeError, match="q must be one of"):
        fastattn.kernel_attention(q.long(), k, v)


MEMORY = """
    import torch, fastattn

    def resident(what):
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) for line in status if line.startswith(what)) / 1024

    def call(points):
        x, y = torch.rand(points, 1), torch.rand(points, 1)
        model = fastattn.nn.KernelRegression("{kernel}", 0.01).fit(x, y)
        with open("/proc/self/clear_refs", "w") as refs:
            refs.write("5")
        before = resident("VmRSS")
        model.predict(torch.rand(500, 1))
        return resident("VmHWM") - before

    call(100)
    print(call(100_000))
"""


@needs_native
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("kernel", ["gaussian", "epanechnikov"])
def test_a_hundred_thousand_points_take_linear_memory(kernel):
    """The matrix of weights alone would be 200 MB."""
    command = [sys.executable, "-c", textwrap.dedent(MEMORY).format(kernel=kernel)]
    done = subprocess.run(command, timeout=200, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 20


# The layer


def test_layer_is_the_function_and_tells_its_weights():
    layer = KernelRegression("triangular", width=1.5)
    q, k, v = (t.float() for t in inputs(2))
    out = layer(q, k, v, valid_lens=[14, 6])
    want = fastattn.kernel_attention(q, k, v, kernel="triangular", width=1.5, mask=masks.padding([14, 6]))
    torch.testing.assert_close(out, want)
    weights = layer.attention_weights
    torch.testing.assert_close(weights @ v, out)
    assert weights.shape == (2, 9, 14) and (weights[1, :, 6:] == 0).all()
    assert not list(layer.parameters())


def test_a_learned_width_gets_gradients_from_any_loss():
    layer = KernelRegression(learn_width=True, dtype=torch.float64)
    q, k, v = inputs(2)
    layer(q, k, v).square().sum().backward()
    width = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    dense(q, k, v, "gaussian", width).square().sum().backward()
    torch.testing.assert_close(layer.log_width.grad, width.grad * width.detach(), **EXACT)


@pytest.mark.parametrize("kernel", KERNELS)
def test_leave_one_out_leaves_each_point_out(kernel):
    x, y = randn(30, 2), randn(30, seed=4)
    model = KernelRegression(kernel, width=1.3, dtype=torch.float64).fit(x, y)
    got = model.leave_one_out()[:, 0]
    for i in (0, 13, 29):
        rest = torch.arange(30) != i
        want = dense(x[i : i + 1], x[rest], (y[rest] - y.mean())[:, None], kernel, 1.3)[0, 0] + y.mean()
        torch.testing.assert_close(got[i], want, **EXACT)
    torch.testing.assert_close(model.leave_one_out(torch.tensor([13]))[0, 0], got[13], **EXACT)


@pytest.mark.parametrize("kernel", ["gaussian", "epanechnikov", "triangular"])
def test_fit_finds_a_width_that_a_search_finds_too(kernel):
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(200, generator=generator) * 6
    y = torch.sin(2 * x) + 0.2 * torch.randn(200, generator=generator)
    model = KernelRegression(kernel, width=1.0, learn_width=True).fit(x, y)

    def loss(width):
        left_out = KernelRegression(kernel, width=width).fit(x, y).leave_one_out()[:, 0]
        return (left_out - y).square().mean().item()

    best = min(loss(1.2**n) for n in range(-16, 4))
    assert loss(model.width.item()) < 1.02 * best
    truth = torch.sin(2 * x)
    assert (model.predict(x) - truth).square().mean() < 0.3 * (y - truth).square().mean()


def test_fit_remembers_and_predict_answers_in_kind():
    x, y = torch.linspace(0, 1, 50), torch.linspace(3, 5, 50)
    model = KernelRegression("boxcar", width=0.05).fit(x, y)
    assert model.predict([0.5]).shape == (1,)
    assert model.predict([0.5]).item() == pytest.approx(4, abs=0.05)
    assert model.predict([9.0]).item() == pytest.approx(4, abs=1e-5)  # out of reach: the mean
    model = KernelRegression(width=None).fit(torch.randn(40, 3), torch.randn(40, 2))
    assert model.predict(torch.randn(7, 3)).shape == (7, 2)
    assert 0.2 < model.width.item() < 1.5  # s N^(-1/7) with s near 1
    import numpy

    model = KernelRegression().fit(numpy.arange(5), numpy.arange(5))
    assert model.predict(numpy.array([2])).item() == pytest.approx(2, abs=1e-5)


def test_state_survives_saving(tmp_path):
    model = KernelRegression(width=0.3).fit(torch.randn(20), torch.randn(20))
    model.predict(torch.zeros(1))
    torch.save(model.state_dict(), tmp_path / "model.pt")
    twin = KernelRegression()
    twin.load_state_dict(torch.load(tmp_path / "model.pt"))
    at = torch.linspace(-1, 1, 5)
    assert torch.equal(twin.predict(at), model.predict(at))
    assert torch.equal(copy.deepcopy(model).predict(at), model.predict(at))


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: KernelRegression("cosine"), ValueError, "kernel must be one of"),
        (lambda: KernelRegression(width=-1), ValueError, "width must be positive or None, got -1"),
        (
            lambda: KernelRegression("boxcar", learn_width=True),
            ValueError,
            "learn_width needs one of the kernels gaussian, epanechnikov, triangular, got 'boxcar'",
        ),
        (lambda: KernelRegression().predict(torch.zeros(3)), RuntimeError, "call fit(x, y) first"),
        (
            lambda: KernelRegression().fit(torch.zeros(3), torch.zeros(4)),
            ValueError,
            "y must be [3] or [3, C], got shape [4]",
        ),
        (
            lambda: KernelRegression().fit(torch.zeros(3), torch.zeros(3)).predict(torch.zeros(2, 2)),
            ValueError,
            "x must have 1 features, got 2",
        ),
        (
            lambda: KernelRegression().fit([1.0, 2.0], [1.0, torch.nan]),
            ValueError,
            "y must be finite, got 1 numbers that are not",
        ),
        (
            lambda: KernelRegression().fit(torch.zeros(3, 1, 1), torch.zeros(3)),
            ValueError,
            "x must be [N] or [N, D]",
        ),
    ],
    ids=["kernel", "width", "flat", "early", "lengths", "features", "nan", "dimensions"],
)
def test_errors_of_the_layer(call, kind, message):
    with pytest.raises(kind, match=re.escape(message)):
        call()


@pytest.mark.parametrize("kernel", ["gaussian", "boxcar", "epanechnikov"])
@pytest.mark.parametrize(
    "mask", [masks.padding([3]), torch.tensor([[True, True, True, False]])], ids=["padding", "bool"]
)
def test_a_masked_key_far_away_moves_nothing(kernel, mask):
    k = torch.tensor([[0.0], [1.0], [2.0], [1e30]])
    got = fastattn.kernel_attention(k[:3], k, k, kernel=kernel, width=0.3, mask=mask)
    want = fastattn.kernel_attention(k[:3], k[:3], k[:3], kernel=kernel, width=0.3)
    torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.parametrize("kernel", ["gaussian", "triangular"])
def test_an_outlier_costs_the_others_no_digits(kernel):
    x = torch.rand(200, 1, generator=torch.Generator().manual_seed(1)) + 1e4
    k = torch.cat([x, torch.zeros(1, 1)])
    got = fastattn.kernel_attention(x, k, k - 1e4, kernel=kernel, width=0.05)
    want = dense(x.double(), k.double(), k.double() - 1e4, kernel, 0.05)
    torch.testing.assert_close(got.double(), want, rtol=0, atol=2e-6)


def test_padding_far_away_costs_no_digits():
    x = torch.rand(2, 100, 1, generator=torch.Generator().manual_seed(1)) + 1e4
    k = torch.cat([x, torch.zeros(2, 300, 1)], 1)
    got = fastattn.kernel_attention(x, k, k - 1e4, width=0.05, mask=masks.padding([100, 50]))
    for b, n in enumerate((100, 50)):
        want = dense(x[b].double(), x[b, :n].double(), x[b, :n].double() - 1e4, "gaussian", 0.05)
        torch.testing.assert_close(got[b].double(), want, rtol=0, atol=2e-6)


def test_an_estimator_across_dtypes_and_modes():
    x = torch.linspace(0, 6, 50)
    with torch.no_grad():
        model = KernelRegression(learn_width=True).fit(x, x.sin())
    assert model.width < 0.9, "it has learned"
    want = model.predict([0.5, 2.0])
    got = copy.deepcopy(model).double().predict(torch.tensor([0.5, 2.0]))
    torch.testing.assert_close(got, want.double(), rtol=0, atol=1e-5)
    assert "width=?" in repr(KernelRegression(device="meta"))
    with pytest.raises(ValueError, match="x must be finite, got 1 numbers that are not"):
        KernelRegression().fit([1.0, math.nan], [1.0, 2.0])


def test_fitting_within_inference_mode():
    """It learns there too, from tensors made there; what it cannot change it refuses."""
    x = torch.linspace(0, 6, 50)
    torch.manual_seed(0)
    want = KernelRegression(learn_width=True).fit(x, x.sin())
    with torch.inference_mode():
        made_there = torch.linspace(0, 6, 50)
        torch.manual_seed(0)
        model = KernelRegression(width=None)
        with pytest.raises(RuntimeError, match="make it outside inference_mode"):
            model.fit(x, x.sin())
        assert KernelRegression(width=0.2).fit(made_there, made_there.sin()).predict(x).shape == (50,)
    for points in (x, made_there):
        model = KernelRegression(learn_width=True)
        with torch.inference_mode():
            model.fit(points, points.sin())
            inside = model.predict(x)
        assert torch.equal(model.width, want.width) and model.width < 0.9
        assert torch.equal(inside, want.predict(x))
        assert torch.equal(model.fit(points, points.sin(), steps=0).predict(x), inside)
    with pytest.raises(ValueError, match="lr must be positive, got 0"):
        model.fit(x, x.sin(), lr=0)
