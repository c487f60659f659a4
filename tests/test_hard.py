"""hard_attention and nn.HardAttention."""

from __future__ import annotations

import copy
import math
import re

import pytest
import torch
from call_support import EXACT, NATIVE, grads, randn

import fastattn
from fastattn import masks
from fastattn.nn import HardAttention

needs_native = pytest.mark.skipif(not NATIVE, reason="the native core is not built")
ISAS = ("baseline", "avx2", "avx512", "generic")
BACKENDS = [pytest.param("cpu", marks=needs_native), "reference"]
BOOL = torch.rand(70, 300, generator=torch.Generator().manual_seed(3)) < 0.3
BOOL[::7] = False
MASKS = {
    "none": None,
    "causal": masks.causal(),
    "padding": masks.padding([0, 77]),
    "bool": BOOL,
    "block": masks.window(3, 3) | masks.global_tokens([0]),
}


def inputs(*lead, seqlen_q=4, seqlen_k=6, dim=8, dim_v=3, dtype=torch.float64, grad=False):
    shapes = ((*lead, seqlen_q, dim), (*lead, seqlen_k, dim), (*lead, seqlen_k, dim_v))
    return [randn(*shape, seed=n, dtype=dtype).requires_grad_(grad) for n, shape in enumerate(shapes)]


def dense_mask(mask, batch, heads, seqlen_q, seqlen_k):
    if mask is None:
        return torch.ones(batch, heads, seqlen_q, seqlen_k, dtype=torch.bool)
    shape = masks.MaskShape(batch, heads, seqlen_q, seqlen_k)
    return masks.as_mask(mask).to_dense(shape).expand(batch, heads, seqlen_q, seqlen_k)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_argmax_is_the_dense_argmax(mask, backend):
    q, k, v = inputs(2, 3, seqlen_q=70, seqlen_k=300, dim=16)
    out, index = fastattn.hard_attention(q, k, v, mask=mask, return_index=True, backend=backend)
    visible = dense_mask(mask, 2, 3, 70, 300)
    scores = (q @ k.mT).masked_fill(~visible, -math.inf)
    want = torch.where(visible.any(-1), scores.argmax(-1), -1)
    assert torch.equal(index, want)
    for b, h, i in ((0, 0, 0), (1, 2, 69), (1, 1, 7)):
        j = want[b, h, i]
        assert torch.equal(out[b, h, i], v[b, h, j] if j >= 0 else torch.zeros(3, dtype=v.dtype))


@needs_native
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("scale", [0.0, 1e-3, 3.0, 1e4, -1e30])
def test_keys_that_cannot_win_are_told_exactly(scale, dtype, isa, native, use_isa):
    """Only keys that may win get noise: none may be missed, be scores flat, steep, hidden or infinite."""
    if isa not in native.info()["isas"]:
        pytest.skip(f"cpu: this machine and build have {native.info()['isas']}, not {isa}")
    use_isa(isa)
    q, k, v = inputs(1, 1, seqlen_q=40, seqlen_k=700, dim=2, dtype=dtype)
    k[:, :, 5] = math.inf
    k[:, :, 6] = math.nan
    mask = torch.rand(40, 700, generator=torch.Generator().manual_seed(2)) < 0.5
    mask[:, :5] = False
    mask[3:, 5:7] = False
    mask[9, :650] = False
    found = [
        fastattn.hard_attention(
            q,
            k,
            v,
            mode="sample",
            seed=torch.tensor([8]),
            mask=mask,
            scale=scale,
            return_index=True,
            backend=b,
        )[1]
        for b in ("cpu", "reference")
    ]
    assert torch.equal(*found)


@needs_native
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_draws_are_those_of_the_definition(mask):
    q, k, v = inputs(2, 3, seqlen_q=70, seqlen_k=300, dim=16)
    seed = torch.tensor([-123456789012345])
    keywords = {"mode": "sample", "seed": seed, "mask": mask, "return_index": True}
    index = fastattn.hard_attention(q, k, v, **keywords)[1]
    assert torch.equal(index, fastattn.hard_attention(q, k, v, backend="reference", **keywords)[1])


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("isa", ISAS)
def test_each_isa_and_dtype(isa, dtype, use_isa):
    use_isa(isa)
    q, k, v = inputs(1, 2, seqlen_q=37, seqlen_k=130, dim=19, dtype=dtype)
    exact = q.double() @ k.double().mT / 19**0.5
    for seed in (None, torch.tensor([9])):
        mode = "argmax" if seed is None else "sample"
        index = fastattn.hard_attention(q, k, v, mode=mode, seed=seed, return_index=True)[1]
        wide = [t.double() for t in (q, k, v)]
        want = fastattn.hard_attention(*wide, mode=mode, seed=seed, return_index=True, backend="reference")[1]
        if seed is None:  # rounding may exchange two keys of almost equal score, and no others
            gap = exact.gather(-1, want[..., None]) - exact.gather(-1, index[..., None])
            assert gap.max() < 1e-5
        assert (index == want).float().mean() > 0.99


@pytest.mark.parametrize("backend", BACKENDS)
def test_frequencies_are_the_probabilities(backend):
    """2000 draws for each of 5 keys: no frequency is 5 standard deviations off."""
    q, k, _ = inputs(1, 1, seqlen_q=1, seqlen_k=5)
    draws = 2000
    index = fastattn.hard_attention(
        q.expand(1, 1, draws, 8),
        k,
        k,
        mode="sample",
        seed=torch.tensor([4]),
        return_index=True,
        backend=backend,
    )[1]
    p = (q @ k.mT / 8**0.5).softmax(-1).flatten()
    share = torch.bincount(index.flatten(), minlength=5) / draws
    assert ((share - p).abs() < 5 * (p * (1 - p) / draws).sqrt()).all()


@needs_native
def test_many_keys_are_drawn_evenly():
    """Of 4096 equal keys the noise alone decides: its upper tail must not be coarse."""
    q, k = torch.zeros(1, 1, 20000, 4), torch.zeros(1, 1, 4096, 4)
    index = fastattn.hard_attention(q, k, k, mode="sample", seed=torch.tensor([1]), return_index=True)[1]
    counts = torch.bincount(index.flatten() // 256, minlength=16).double()
    assert ((counts - 1250).abs() < 5 * 1250**0.5).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_ties_nan_and_infinite_scores(backend):
    def choose(keys, mask=None):
        k = torch.tensor(keys).view(1, 1, -1, 1)
        q = torch.ones(1, 1, 1, 1)
        return fastattn.hard_attention(q, k, k, mask=mask, return_index=True, backend=backend)[1].item()

    assert choose([1.0, 3.0, 3.0, 2.0]) == 1
    assert choose([1.0] * 100) == 0
    assert choose([1.0, math.nan, 9.0, math.nan]) == 1
    assert choose([math.nan, 2.0, 9.0], torch.tensor([False, True, True])) == 2
    assert choose([5.0, -math.inf, -math.inf], torch.tensor([False, True, True])) == 1
    assert choose([1.0, math.inf, math.inf]) == 1
    assert choose([1.0, 2.0], torch.tensor([False, False])) == -1


@pytest.mark.parametrize("mode", ["argmax", "sample"])
def test_straight_through_is_the_gradient_of_soft_attention(mode):
    tensors = inputs(2, grad=True)
    mask = torch.rand(2, 4, 6, generator=torch.Generator().manual_seed(0)) < 0.7
    out, got = grads(lambda *t: fastattn.hard_attention(*t, mode=mode, mask=mask), tensors)

    def soft(q, k, v):
        return (q @ k.mT / 8**0.5).masked_fill(~mask, -math.inf).softmax(-1) @ v

    want = grads(soft, tensors)[1]
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, **EXACT)
    for row in out[0].flatten(0, 1):  # the value itself is one of the given ones
        assert (tensors[2].flatten(0, 1) == row).all(-1).any()


def test_reinforce_returns_log_probabilities():
    tensors = inputs(2, grad=True)
    out, log_prob, index = fastattn.hard_attention(
        *tensors, mode="sample", gradient="reinforce", seed=torch.tensor([3]), return_index=True
    )
    q, k, v = tensors
    want = (q @ k.mT / 8**0.5).log_softmax(-1).gather(-1, index[..., None])[..., 0]
    torch.testing.assert_close(log_prob, want, **EXACT)
    for got, exact in zip(
        torch.autograd.grad(log_prob.square().sum(), (q, k), retain_graph=True),
        torch.autograd.grad(want.square().sum(), (q, k)),
        strict=True,
    ):
        torch.testing.assert_close(got, exact, **EXACT)
    picked = torch.nn.functional.one_hot(index, 6).double()
    (dv,) = torch.autograd.grad(out.square().sum(), v)
    torch.testing.assert_close(dv, picked.mT @ (2 * out.detach()), **EXACT)
    assert torch.autograd.grad(out.sum(), q, allow_unused=True) == (None,)


def test_reinforce_estimates_the_gradient_of_the_expected_reward():
    """Averaged over many draws, reward * d log_prob is the gradient of sum_j p_j reward_j."""
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(1, 4, generator=generator), torch.randn(3, 4, generator=generator)
    reward = torch.tensor([[1.0], [-2.0], [0.5]])
    q.requires_grad_()
    many = q.expand(40000, 4)
    got_reward, log_prob = fastattn.hard_attention(
        many, k, reward, mode="sample", gradient="reinforce", seed=torch.tensor([2])
    )
    (estimate,) = torch.autograd.grad((got_reward[:, 0] * log_prob).mean(), q)
    (exact,) = torch.autograd.grad(((q @ k.mT / 2).softmax(-1) @ reward).sum(), q)
    torch.testing.assert_close(estimate, exact, rtol=0, atol=0.03)


@pytest.mark.parametrize("gradient", ["straight_through", "reinforce"])
def test_rows_that_see_nothing(gradient):
    tensors = inputs(2, grad=True)
    mask = torch.ones(4, 6, dtype=torch.bool)
    mask[1] = False
    found = fastattn.hard_attention(*tensors, gradient=gradient, mask=mask, return_index=True)
    assert (found[0][:, 1] == 0).all() and (found[-1][:, 1] == -1).all()
    loss = found[0].sum() + (found[1].sum() if gradient == "reinforce" else 0)
    for gradient_of in torch.autograd.grad(loss, tensors, allow_unused=True):
        assert gradient_of is None or gradient_of.isfinite().all()
    for seqlen_q, seqlen_k in ((0, 3), (3, 0)):
        empty = inputs(2, seqlen_q=seqlen_q, seqlen_k=seqlen_k)
        assert fastattn.hard_attention(*empty).shape == (2, seqlen_q, 3)


def test_hidden_keys_do_not_matter():
    q, k, v = inputs(2)
    mask = masks.padding([4, 4])
    want = fastattn.hard_attention(q, k, v, gradient="reinforce", mask=mask)
    k[:, 4:] = v[:, 4:] = math.nan
    for a, b in zip(fastattn.hard_attention(q, k, v, gradient="reinforce", mask=mask), want, strict=True):
        assert torch.equal(a, b)


@needs_native
def test_seeds_threads_and_batches(use_threads):
    q, k, v = inputs(3, 2, seqlen_q=130, seqlen_k=200, dtype=torch.float32)

    def draw(q, k, v, seed=7):
        return fastattn.hard_attention(q, k, v, mode="sample", seed=torch.tensor([seed]), return_index=True)[
            1
        ]

    use_threads(1)
    want = draw(q, k, v)
    use_threads(3)
    assert torch.equal(draw(q, k, v), want)
    assert torch.equal(draw(q[:1], k[:1], v[:1]), want[:1])
    assert not torch.equal(draw(q, k, v, seed=8), want)
    torch.manual_seed(0)
    first = fastattn.hard_attention(q, k, v, mode="sample")
    torch.manual_seed(0)
    assert torch.equal(fastattn.hard_attention(q, k, v, mode="sample"), first)


@needs_native
def test_compiled():
    tensors = inputs(2, grad=True)

    def call(q, k, v, seed):
        keywords = {"mask": masks.causal(), "return_index": True}
        hard = fastattn.hard_attention(q, k, v, **keywords)
        drawn = fastattn.hard_attention(q, k, v, mode="sample", seed=seed, gradient="reinforce", **keywords)
        return (*hard, *drawn)

    seed = torch.tensor([5])
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(*tensors, seed), call(*tensors, seed), strict=True):
        torch.testing.assert_close(a, b, **EXACT)
    loss = compiled(*tensors, seed)[0].square().sum()
    want = torch.autograd.grad(call(*tensors, seed)[0].square().sum(), tensors)
    for a, b in zip(torch.autograd.grad(loss, tensors), want, strict=True):
        torch.testing.assert_close(a, b, **EXACT)


def test_opcheck(native):
    from fastattn.call import Call
    from fastattn.lowering import lower
    from fastattn.ops import _flat

    q, k, v = (t[:, None].float() for t in inputs(2))
    operands, params = lower(Call("attention", q, k, v, mask=masks.padding([2, 5])))
    operands = operands._replace(seed=torch.tensor([4]))
    torch.library.opcheck(torch.ops.fastattn.hard_index, ("cpu", q, k, *operands, *_flat(params)))


@pytest.mark.parametrize(
    ("keywords", "kind", "message"),
    [
        ({"mode": "max"}, ValueError, "mode must be one of argmax, sample, got 'max'"),
        ({"gradient": "ste"}, ValueError, "gradient must be one of straight_through, reinforce, got 'ste'"),
        ({"seed": torch.tensor([1])}, ValueError, 'seed must be None with mode="argmax"'),
        ({"mode": "sample", "seed": 3}, TypeError, "seed must be a torch.Tensor, got int"),
        ({"mode": "sample", "seed": torch.ones(1)}, TypeError, "seed must be an int64 tensor of one element"),
        ({"scale": math.inf}, ValueError, "scale must be finite"),
        (
            {"mask": torch.ones(4, 7, dtype=torch.bool)},
            ValueError,
            "mask must broadcast to [2, 4, 6], got [4, 7]",
        ),
    ],
    ids=["mode", "gradient", "seed", "int", "dtype", "scale", "mask"],
)
def test_errors(keywords, kind, message):
    with pytest.raises(kind, match=re.escape(message)):
        fastattn.hard_attention(*inputs(2), **keywords)


# The layer


def test_layer_draws_in_training_and_takes_the_largest_in_eval():
    q, k, v = inputs(2, seqlen_q=50)
    layer = HardAttention()
    drawn = layer(q, k, v, valid_lens=[6, 2])
    weights = layer.attention_weights
    torch.testing.assert_close(weights @ v, drawn, **EXACT)
    assert (weights[1, :, 2:] == 0).all() and (weights.sum(-1) == 1).all()
    largest = layer.eval()(q, k, v, valid_lens=[6, 2])
    assert torch.equal(layer.attention_weights[0].argmax(-1), (q @ k.mT)[0].argmax(-1))
    assert not torch.equal(largest, drawn)
    assert copy.deepcopy(layer).attention_weights is None


def test_layer_masks_and_reinforce():
    q, k, v = inputs(2, grad=True)
    layer = HardAttention("argmax", "reinforce", scale=1.0)
    out, log_prob = layer(
        q, k, v, torch.tensor([[1, 2, 0, 4], [6, 5, 4, 3]]), masks.window(None, 1, align="top_left")
    )
    assert out.shape == (2, 4, 3) and log_prob.shape == (2, 4)
    assert (layer.attention_weights[0, 2] == 0).all()
    assert abs(log_prob[0, 0].item()) < 1e-15  # one visible key is certain
    with pytest.raises(ValueError, match="mode must be one of"):
        HardAttention("hard")


def gradient(call, x):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(call(x), x)[0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_under_transforms(backend):
    """torch.func: maps, gradients, and both around each other."""
    x = randn(3, 2, 5, 4)

    def call(x):
        return fastattn.hard_attention(x, x, x, backend=backend)

    def loss(x):
        return call(x).square().sum()

    assert torch.equal(torch.vmap(call)(x), call(x))
    want = gradient(loss, x)
    torch.testing.assert_close(torch.func.grad(loss)(x), want, **EXACT)
    torch.testing.assert_close(torch.vmap(torch.func.grad(loss))(x), want, **EXACT)
    around = torch.func.grad(lambda x: torch.vmap(call)(x).square().sum())
    torch.testing.assert_close(around(x), want, **EXACT)


@needs_native
def test_draws_under_a_map():
    q = torch.zeros(1, 400, 4)
    x = torch.zeros(2, 1, 400, 4)

    def draw(k):
        return fastattn.hard_attention(q, k, k, mode="sample", return_index=True)[1]

    same, different = (torch.vmap(draw, randomness=how)(x) for how in ("same", "different"))
    assert torch.equal(same[0], same[1]) and not torch.equal(different[0], different[1])
