"""Attention that is written out, read as it runs: one call where it is attention, as written where not."""

from __future__ import annotations

import math
from collections.abc import Callable

import patch_support
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.integrations.handwritten import AttentionMode, Notes, without_lazy

pytestmark = pytest.mark.usefixtures("native", "one_thread")

B, H, L, S, D = 2, 3, 5, 7, 4


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return patch_support.rand(*shape, seed=seed, dtype=dtype)


def visible(*shape: int) -> Tensor:
    """Some pairs, every query with one key at least."""
    mask = rand(*shape, seed=9) > -0.3
    mask[..., 0] = True
    return mask


Q, K, V = rand(B, H, L, D), rand(B, H, S, D, seed=1), rand(B, H, S, D, seed=2)
BIAS, MASK = rand(H, L, S, seed=3), visible(B, 1, L, S)
LOWEST = torch.finfo(torch.float64).min


def baddbmm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """bloom: heads in the batch, a bias that is the product's start, a mask added in between."""
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    slopes = rand(B * H, 1, S, seed=4)
    scores = torch.baddbmm(slopes, q, k.transpose(1, 2), beta=0.5, alpha=0.3).view(B, H, L, S)
    scores = scores + torch.zeros(MASK.shape, dtype=q.dtype).masked_fill(~MASK, LOWEST)
    weights = F.softmax(scores, dim=-1, dtype=torch.float64).to(q.dtype)
    return torch.bmm(weights.view(B * H, L, S), v).view(B, H, L, D)


def baddbmm_without_bias(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """diffusers: the start is memory that is never read."""
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    start = torch.empty(B * H, L, S, dtype=q.dtype)
    scores = torch.baddbmm(start, q, k.transpose(-1, -2), beta=0, alpha=0.3)
    return torch.bmm(scores.softmax(dim=-1), v).unflatten(0, (B, H))


def windows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Swin: windows leave the batch for their mask and come back; cosine scores with a scale per head."""
    q, k, v = (x.repeat(3, 1, 1, 1) for x in (q, k, v))
    scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
    scores = scores * rand(H, 1, 1, seed=5).exp() + BIAS
    scores = scores.view(-1, 2, H, L, S) + torch.where(visible(2, L, S), 0.0, -100.0)[None, :, None]
    weights = scores.view(-1, H, L, S).softmax(-1)
    return (weights @ v).transpose(1, 2).reshape(6, L, H * D)


def einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """XLNet: lengths first, letters in any order, biases that are themselves einsums."""
    q, k, v = (x.permute(2, 0, 1, 3) for x in (q, k, v))
    scores = torch.einsum("ibnd,jbnd->bnij", q, k)
    scores = (scores + torch.einsum("ibnd,snd->bnis", q, rand(S, H, D, seed=6))) * 0.4
    weights = F.softmax(scores, dim=3)
    return torch.einsum("bnij,jbnd->ibnd", weights, v)


def einsum_of_lists(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """CvT: the operands in a list."""
    weights = (torch.einsum("bhid,bhjd->bhij", [q, k]) * 0.4).softmax(-1)
    return torch.einsum("bhij,bhjd->bhid", (weights, v))


def einsum_of_the_rest(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """LongT5: an ellipsis for the batch and the blocks."""
    q, k, v = (x.transpose(1, 2).unsqueeze(1).repeat(1, 2, 1, 1, 1) for x in (q, k, v))
    scores = torch.einsum("...qhd,...khd->...hqk", q, k) + rand(1, 2, 1, L, S, seed=8)
    return torch.einsum("...hqk,...khd->...qhd", scores.softmax(-1), v)


def in_place(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.matmul(q, k.mT)
    scores /= math.sqrt(D)
    scores += BIAS
    scores.mul_(0.5).masked_fill_(~MASK, -math.inf)
    return torch.matmul(scores.softmax(-1), v)


def filled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """gpt_neo and many others: the lowest number in the place of -inf, and rows that see nothing."""
    mask = MASK.clone()
    mask[0, :, 1] = False
    scores = q @ k.mT / torch.tensor(2.0)
    scores = torch.where(mask, scores + BIAS, torch.full([], LOWEST, dtype=q.dtype))
    return scores.softmax(-1) @ v


def one_value_head(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Keys and values that all heads share, and a batch that the keys share."""
    return (q @ k[:1, :1].mT).softmax(-1) @ v[:, :1]


def transposed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """efficientvit: channels first, values to the left of the weights."""
    q, k, v = q.mT.contiguous(), k.mT.contiguous(), v.mT.contiguous()
    weights = ((q.transpose(-2, -1) @ k) * 0.5).softmax(dim=-1)
    return v @ weights.transpose(-2, -1)


def channels_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention blocks of diffusion's autoencoders."""
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    weights = torch.bmm(q, k.permute(0, 2, 1)).softmax(2).permute(0, 2, 1)
    return torch.bmm(v.permute(0, 2, 1), weights).unflatten(0, (B, H)).mT


def without_the_maximum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """CogView: the largest score of a row comes off before the softmax."""
    scores = (q @ k.mT + BIAS) / 32
    scores = (scores - scores.amax(dim=(-1)).unsqueeze(-1)) * 32
    scores = scores - torch.amax(scores, -1, keepdim=True).detach()
    return scores.softmax(-1) @ v


def five_dimensions(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.unsqueeze(1).expand(-1, 2, -1, -1, -1) for x in (q, k, v))
    return torch.softmax(q @ k.transpose(3, 4) + rand(2, 1, L, S, seed=7), -1) @ v


FUSED = [
    baddbmm,
    baddbmm_without_bias,
    windows,
    einsum,
    einsum_of_lists,
    einsum_of_the_rest,
    in_place,
    filled,
    one_value_head,
    transposed,
    channels_first,
    without_the_maximum,
    five_dimensions,
]


def outcome(function: Callable[..., Tensor], notes: Notes | None, **changes: Tensor) -> list[Tensor]:
    """The output and the gradients of q, k and v; in the mode where there are notes."""
    q, k, v = (changes.get(name, x).clone().requires_grad_() for name, x in (("q", Q), ("k", K), ("v", V)))
    if notes is None:
        out = function(q, k, v)
    else:
        with AttentionMode(notes):
            out = without_lazy(function(q, k, v))
    return [out.detach(), *torch.autograd.grad((out * rand(*out.shape, seed=8)).sum(), (q, k, v))]


@pytest.mark.parametrize("function", FUSED, ids=lambda f: f.__name__)
def test_written_out_attention_is_one_call(function):
    """In float64 to the last few bits, which no approximation would meet."""
    notes = Notes()
    got, want = outcome(function, notes), outcome(function, None)
    assert notes.fused == 1
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def gated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (q @ k.mT).softmax(-1)
    weights = 0.3 * weights + 0.7 * rand(H, L, S, seed=3).softmax(-1)
    return weights @ v


def mixed_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (q @ k.mT).softmax(-1)
    return torch.einsum("bhij,hg->bgij", weights, rand(H, H, seed=3)) @ v


def over_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).softmax(-2) @ v


def part_changed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    scores[:, :, 1:] += 2.0
    scores[..., 0] = 1.0
    return scores.softmax(-1) @ v


def small_fill(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).masked_fill(~MASK, -1.0).softmax(-1) @ v


def seen_through_a_view(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A change through one name is a change through the other."""
    scores = q @ k.mT
    flat, before = scores.view(B * H, L, S), scores * 2
    flat.mul_(3.0)
    return (scores.softmax(-1) + before.softmax(-1)) @ v


def operand_changed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The product reads what q was."""
    memory = q.detach().clone()
    scores = memory @ k.detach().mT
    memory.mul_(0.0).add_(1.0)
    return scores.softmax(-1) @ v + (q.sum() + k.sum()) * memory.sum()


def maxima_alone(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Of another dimension, and for something else."""
    scores = q @ k.mT
    of_keys = (q[:, :, 0] @ k[:, 0, :L].mT - scores.amax(-1)).softmax(-1)  # each key has one, of other scores
    out = (scores - scores.amax(-2, True)).softmax(-1) @ v
    return out + scores.amax(-1, True).exp() + of_keys.square().sum()


def by_other_names(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Arguments by names and of kinds that no rule has."""
    scores = torch.bmm(q.flatten(0, 1), mat2=k.flatten(0, 1).mT).unflatten(0, (B, H))
    scores = scores + torch.div(q @ k.mT, other=3.0, rounding_mode=None)
    turned = (q @ k.mT).softmax(-1).transpose(dim0=-1, dim1=-2)
    return (scores.softmax(-1) + turned.mT) @ v


def scores_alone(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).sum(-1, keepdim=True) + v.sum()


def sigmoid(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.sigmoid(q @ k.mT / 2) @ v


WRITTEN = [
    gated,
    mixed_heads,
    over_queries,
    part_changed,
    small_fill,
    seen_through_a_view,
    operand_changed,
    maxima_alone,
    by_other_names,
    scores_alone,
    sigmoid,
]


@pytest.mark.parametrize("function", WRITTEN, ids=lambda f: f.__name__)
def test_anything_else_is_computed_as_written(function):
    """To the last bit: the same calls in the same order."""
    notes = Notes()
    got, want = outcome(function, notes), outcome(function, None)
    assert notes.fused == 0
    if function is not operand_changed:  # whose product was computed as soon as its operand changed
        assert notes.scores or notes.weights
    for ours, theirs in zip(got, want, strict=True):
        assert torch.equal(ours, theirs)


def test_rows_that_see_nothing_are_zero_behind_inf():
    """Where PyTorch's softmax has NaN: fastattn's meaning of a row without keys."""
    mask = MASK.clone()
    mask[:, :, 2] = False

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT).masked_fill(~mask, -math.inf).softmax(-1) @ v

    (got, *gradients), (want, *_) = outcome(attend, Notes()), outcome(attend, None)
    others = [0, 1, 3, 4]
    torch.testing.assert_close(got[:, :, others], want[:, :, others])
    assert want[:, :, 2].isnan().all()
    assert not got[:, :, 2].any()
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_less_exact_than_written_out(dtype):
    """Scores that a model casts up for its softmax are float32 throughout for us."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = torch.matmul(q, k.mT) / math.sqrt(D) + BIAS.to(q.dtype)
        return F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype) @ v

    tensors = {"q": Q.to(dtype), "k": K.to(dtype), "v": V.to(dtype)}
    notes = Notes()
    got, stock = outcome(attend, notes, **tensors)[0], outcome(attend, None, **tensors)[0]
    wide = {name: x.double() for name, x in tensors.items()}
    bias = BIAS.to(dtype).double()
    scores = wide["q"] @ wide["k"].mT / math.sqrt(D) + bias
    exact = scores.softmax(-1) @ wide["v"]
    assert notes.fused == 1
    assert got.dtype == dtype
    bound = 2 * (stock - exact).abs().max() + 4 * torch.finfo(dtype).eps * exact.abs().max()
    assert (got - exact).abs().max() <= bound


def test_weights_are_those_of_the_call():
    """Weights that leave the module after dropout have the elements that the output was made with."""
    v = torch.eye(S, dtype=torch.float64).expand(B, H, S, S)  # the output then is the weights
    torch.manual_seed(0)
    with AttentionMode(Notes()) as mode:
        weights = F.dropout((Q @ K.mT).softmax(-1), 0.5)
        out = weights @ v
    dropped = without_lazy(weights)
    assert mode.notes.fused == 1
    torch.testing.assert_close(out, dropped)
    zeros = (dropped == 0).double().mean().item()
    assert 0.3 < zeros < 0.7
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], (Q @ K.mT).softmax(-1)[kept] * 2)


def test_dropout_repeats_with_the_seed():
    def attend() -> Tensor:
        torch.manual_seed(3)
        with AttentionMode(Notes()):
            return F.dropout((Q @ K.mT).softmax(-1), 0.4) @ V

    first = attend()
    assert torch.equal(attend(), first)
    with AttentionMode(Notes()):
        assert not torch.equal(F.dropout((Q @ K.mT).softmax(-1), 0.4) @ V, first)
        no_dropout = F.dropout((Q @ K.mT).softmax(-1), 0.4, training=False) @ V
    torch.testing.assert_close(no_dropout, (Q @ K.mT).softmax(-1) @ V)


def test_autocast():
    q, k, v = (x.float() for x in (Q, K, V))

    def attend() -> Tensor:
        return (q @ k.mT / 2).softmax(-1).to(q.dtype) @ v

    notes = Notes()
    with torch.autocast("cpu", torch.bfloat16):
        want = attend()
        with AttentionMode(notes):
            got = attend()
    assert notes.fused == 1
    assert got.dtype == want.dtype == torch.bfloat16
    torch.testing.assert_close(got, want, rtol=0.02, atol=0.02)


def test_gradients_follow_the_mode_at_the_product():
    """What is put off is computed with the gradients of its own place, not of where somebody looks."""
    q = Q.clone().requires_grad_()
    with AttentionMode(Notes()):
        scores = q @ K.mT
        with torch.no_grad():
            largest = scores.max()
        weights = scores.softmax(-1)
    assert not largest.requires_grad
    assert without_lazy(weights).requires_grad


def test_a_change_that_no_mode_sees_is_an_error():
    """As when C++ writes: better no result than another one."""
    q = Q.clone()
    with AttentionMode(Notes()):
        scores = q @ K.mT
        with torch._C.DisableTorchFunction():
            q.mul_(2.0)
        with pytest.raises(RuntimeError, match=r"changed in place .* fastattn.patch\(model, skip="):
            scores.softmax(-1) @ V


def test_what_goes_to_cpp_unseen_is_an_error():
    """An autograd function would lose the gradient of weights that are not computed."""

    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            with torch._C.DisableTorchFunctionSubclass():
                return x * 2

        @staticmethod
        def backward(ctx, grad):
            return grad * 2

    with AttentionMode(Notes()):
        scores = Q.clone().requires_grad_() @ K.mT
        with pytest.raises(RuntimeError, match=r"called from C\+\+ .* fastattn.patch\(model, skip="):
            Double.apply(scores)


def test_shapes_are_known_before_values():
    with AttentionMode(Notes()) as mode:
        scores = Q @ K.mT
        assert scores.shape == (B, H, L, S)
        assert (scores.dim(), scores.size(-1), scores.dtype) == (4, S, torch.float64)
        assert len(scores) == B
    assert mode.notes.scores == set()
    assert repr(scores) == repr(Q @ K.mT)


def test_empty_batches_and_wrong_shapes_are_torchs():
    with AttentionMode(Notes()):
        assert without_lazy((Q[:0] @ K[:0].mT).softmax(-1) @ V[:0]).shape == (0, H, L, D)
        with pytest.raises(RuntimeError, match="size"):
            Q @ K
