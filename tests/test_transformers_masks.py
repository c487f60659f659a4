"""Masks of transformers as fastattn's: the same pairs as their bool tensors, in linear memory."""

from __future__ import annotations

import copy

import pytest
import torch

transformers = pytest.importorskip("transformers")

from transformers import masking_utils as theirs  # noqa: E402

import fastattn  # noqa: E402
from fastattn.integrations.transformers import register  # noqa: E402
from fastattn.integrations.transformers.attention import fastattn_attention  # noqa: E402
from fastattn.integrations.transformers.mask_function import fastattn_mask  # noqa: E402
from fastattn.integrations.transformers.mask_tensor import MaskTensor  # noqa: E402
from fastattn.masks import Mask  # noqa: E402
from fastattn.masks.band import Band  # noqa: E402
from fastattn.masks.built import BuiltMask  # noqa: E402

register()

BATCH, LENGTH = 2, 150
IDS = torch.arange(LENGTH).expand(BATCH, -1) // torch.tensor([[40], [64]])
POSITIONS = torch.arange(LENGTH).expand(BATCH, -1) % torch.tensor([[40], [64]])
BLOCKS = torch.where(torch.arange(LENGTH) % 50 < 20, torch.arange(LENGTH) // 50, -1).expand(BATCH, -1)


def prefix_lm(b, h, q, k):
    return k < 30


def every_third(b, h, q, k):
    return (q - k) % 3 == 0


def by_entry(b, h, q, k):
    return k >= torch.tensor([5, 70])[b]


def far_apart(b, h, q, k):
    return (q - k > 100) | (k - q >= 120)


# Each with whether it is read, rather than called with all pairs of indices.
FUNCTIONS = {
    "causal": (theirs.causal_mask_function, True),
    "bidirectional": (theirs.bidirectional_mask_function, True),
    "sliding window": (theirs.sliding_window_causal_mask_function(20), True),
    "window to both sides": (theirs.sliding_window_bidirectional_mask_function(9), True),
    "chunks": (theirs.chunked_causal_mask_function(32, torch.tensor([0, 7])), True),
    "packed": (
        theirs.packed_sequence_compatibility_function(theirs.causal_mask_function, POSITIONS, IDS),
        True,
    ),
    "packed with a window": (
        theirs.packed_sequence_compatibility_function(
            theirs.sliding_window_causal_mask_function(8), POSITIONS, IDS
        ),
        True,
    ),
    "blocks of pictures": (
        theirs.or_masks(theirs.causal_mask_function, theirs.blockwise_overlay(BLOCKS)),
        True,
    ),
    "prefix": (theirs.or_masks(theirs.causal_mask_function, prefix_lm), True),
    "by entry": (theirs.and_masks(theirs.causal_mask_function, by_entry), True),
    "far apart": (theirs.and_masks(theirs.causal_mask_function, far_apart), True),
    "dilated": (theirs.and_masks(theirs.causal_mask_function, every_third), False),
}


def padding(side: str) -> torch.Tensor | None:
    if side == "none":
        return None
    mask = torch.ones(BATCH, LENGTH, dtype=torch.bool)
    if side == "left":
        mask[0, :70] = False
    elif side == "right":
        mask[1, -33:] = False
    else:
        mask[:, 40:60] = False
    return mask


@pytest.mark.parametrize("side", ["none", "left", "right", "hole"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_same_pairs(name, side):
    function, is_read = FUNCTIONS[name]
    arguments = {
        "batch_size": BATCH,
        "q_length": LENGTH,
        "kv_length": LENGTH,
        "mask_function": function,
        "attention_mask": padding(side),
        "use_vmap": not is_read,
    }
    want = theirs.sdpa_mask(**arguments, allow_is_causal_skip=False)
    mask = fastattn_mask(**arguments)
    assert isinstance(mask, MaskTensor) and mask.shape == want.shape
    assert torch.equal(mask.to_dense(), want)
    assert isinstance(mask.mask, BuiltMask) == (not is_read)


@pytest.mark.parametrize("kv_offset, kv_length", [(0, 96), (32, 64)])
@pytest.mark.parametrize("q_length", [1, 6])
@pytest.mark.parametrize("window", [None, 12])
@pytest.mark.parametrize("offset", [int, torch.tensor])
def test_caches(q_length, window, offset, kv_offset, kv_length):
    """Queries that come late, keys of which the first are gone, places yet to be filled (static caches)."""
    function = (
        theirs.causal_mask_function if window is None else theirs.sliding_window_causal_mask_function(window)
    )
    padded = torch.ones(BATCH, 80 + q_length, dtype=torch.bool)
    padded[0, :37] = False
    for attention_mask in (None, padded):
        arguments = {
            "batch_size": BATCH,
            "q_length": q_length,
            "kv_length": kv_length,
            "q_offset": offset(80),
            "kv_offset": kv_offset,
            "mask_function": function,
            "attention_mask": attention_mask,
        }
        want = theirs.sdpa_mask(**arguments, allow_is_causal_skip=False)
        got = fastattn_mask(**arguments)
        assert torch.equal(want if got is None else got.to_dense(), want)
        assert got is not None or (want.all() and q_length == 1)


def test_a_mask_that_hides_nothing_is_none():
    ones = torch.ones(BATCH, LENGTH, dtype=torch.bool)
    sizes = {"batch_size": BATCH, "kv_length": LENGTH, "attention_mask": ones}
    both_ways = {"mask_function": theirs.bidirectional_mask_function, "allow_is_causal_skip": False}
    assert fastattn_mask(q_length=LENGTH, allow_is_bidirectional_skip=True, **both_ways, **sizes) is None
    assert fastattn_mask(q_length=LENGTH, **both_ways, **sizes) is not None
    assert fastattn_mask(q_length=1, q_offset=LENGTH - 1, **sizes) is None
    # A causal mask of several queries is never None: models may drop queries that they need no more.
    assert fastattn_mask(q_length=LENGTH, **sizes).mask == Band(None, 0, "bottom_right")


def test_masks_of_long_texts_are_small():
    length = 1 << 20  # as bool tensors 1 TB each
    mask = fastattn_mask(1, length, length, attention_mask=torch.arange(length)[None] >= 1000)
    assert mask.shape == (1, 1, length, length)
    leaves = torch.utils._pytree.tree_leaves(mask.mask)
    assert sum(leaf.numel() for leaf in leaves if isinstance(leaf, torch.Tensor)) == 2
    last = mask[:, :, -2:, :]
    assert type(last) is torch.Tensor and last.shape == (1, 1, 2, length)
    assert last.sum(-1).flatten().tolist() == [length - 1001, length - 1000]


def test_mask_tensors_pass_for_bool_tensors():
    function, _ = FUNCTIONS["packed"]
    mask = fastattn_mask(BATCH, LENGTH, LENGTH, mask_function=function)
    dense = mask.to_dense()
    assert mask.dtype == torch.bool and mask.dim() == 4 and mask.device == dense.device
    for same in (mask.contiguous(), mask.to("cpu"), mask.detach(), mask[:, :, :, :LENGTH]):
        assert isinstance(same, MaskTensor) and isinstance(same.mask, Mask)
    for reads in (
        lambda m: m[:, :, 3:7],
        lambda m: m[:, :, :, ::2],
        lambda m: m[:1],
        lambda m: m[:, 0],
        lambda m: ~m,
        lambda m: m & (torch.arange(LENGTH) > 9),
        lambda m: torch.where(m, 0.0, -1.0),
        lambda m: m.sum(-1),
    ):
        got = reads(mask)
        assert type(got) is torch.Tensor and torch.equal(got, reads(dense))
    assert "documents" in repr(mask)


@pytest.mark.parametrize(
    "write",
    [
        lambda m: m.logical_and_(torch.zeros(m.shape, dtype=torch.bool)),
        lambda m: m.fill_(False),
        lambda m: m.__setitem__((0,), False),
        lambda m: m.__iand__(torch.zeros(m.shape, dtype=torch.bool)),
        lambda m: torch.logical_not(torch.ones(m.shape, dtype=torch.bool), out=m),
    ],
)
def test_writes_into_a_mask_are_refused(write):
    """They would go to a tensor that nothing reads."""
    mask = fastattn_mask(BATCH, 6, 6)
    with pytest.raises(NotImplementedError, match=r"cannot be written in place.*to_dense"):
        write(mask)
    read = torch.ones(mask.shape, dtype=torch.bool).logical_and_(mask)  # reading one is another matter
    assert torch.equal(read, mask.to_dense())


def test_mask_tensors_leave_torch():
    attention_mask = torch.tensor([[False, True, True], [True, True, True]])
    mask = fastattn_mask(2, 3, 3, attention_mask=attention_mask)
    dense, copied = mask.to_dense(), copy.deepcopy(mask)
    attention_mask.fill_(False)
    assert isinstance(copied, MaskTensor) and torch.equal(copied.to_dense(), dense)
    mask = copied
    assert mask.tolist() == dense.tolist() and (mask.numpy() == dense.numpy()).all()
    assert not mask.numpy().flags.writeable
    with pytest.raises(NotImplementedError, match=r"to_dense\(\)\.share_memory_"):
        mask.share_memory_()


def test_a_layer_that_adds_its_mask_is_refused():
    """Layers off transformers' interface take the mask for numbers, and would compute something else."""
    mask = fastattn_mask(BATCH, LENGTH, LENGTH)
    with pytest.raises(NotImplementedError, match="attn_implementation must be 'eager'"):
        torch.zeros(BATCH, 4, LENGTH, LENGTH) + mask
    git = transformers.GitForCausalLM(
        transformers.GitConfig(
            vocab_size=50,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            vision_config={"hidden_size": 12, "intermediate_size": 16, "num_hidden_layers": 1},
        )
    )
    git.set_attn_implementation("fastattn")
    with pytest.raises(NotImplementedError, match="interface"):
        git(torch.ones(1, 4, dtype=torch.int64))


def test_a_layer_that_extends_its_mask_is_refused():
    """DeepSeek-V4 appends 0 and -inf to its mask, which as bools mean the opposite of what they meant."""
    mask = fastattn_mask(BATCH, LENGTH, LENGTH)
    for extend in (lambda: torch.cat([mask, mask], -1), lambda: torch.nn.functional.pad(mask, (0, 2))):
        with pytest.raises(NotImplementedError, match="attn_implementation must be 'eager'"):
            extend()
    model = transformers.DeepseekV4ForCausalLM(
        transformers.DeepseekV4Config(
            vocab_size=50,
            hidden_size=16,
            num_hidden_layers=2,
            layer_types=["sliding_attention", "compressed_sparse_attention"],
            num_attention_heads=2,
            head_dim=16,
            q_lora_rank=8,
            o_lora_rank=8,
            o_groups=1,
            moe_intermediate_size=16,
            n_routed_experts=2,
            num_experts_per_tok=1,
        )
    )
    report = fastattn.patch(model)
    assert not report.replaced and len(report.left) == 2
    model.set_attn_implementation("fastattn")
    with pytest.raises(NotImplementedError, match="DeepseekV4Attention: it extends its mask"):
        model(torch.ones(1, 9, dtype=torch.int64))


def test_masks_of_tensors_without_data():
    """A model on the meta device, where nothing can be read back."""
    padded = torch.ones(BATCH, LENGTH, dtype=torch.bool, device="meta")
    mask = fastattn_mask(BATCH, LENGTH, LENGTH, attention_mask=padded, device="meta")
    assert mask.shape == (BATCH, 1, LENGTH, LENGTH) and mask.is_meta


def test_block_lists_are_built_once_for_all_layers(monkeypatch):
    from fastattn.masks import base

    built = []
    build = base.build_block_mask
    monkeypatch.setattr(base, "build_block_mask", lambda *a: built.append(1) or build(*a))
    q = torch.randn(BATCH, 2, LENGTH, 8)
    for name in ("packed", "dilated"):
        function, is_read = FUNCTIONS[name]
        mask = fastattn_mask(BATCH, LENGTH, LENGTH, mask_function=function, use_vmap=not is_read)
        built.clear()
        for _ in range(3):
            fastattn_attention(torch.nn.Identity(), q, q, q, mask)
        assert len(built) == (1 if is_read else 0)


def test_functions_that_only_vmap_understands():
    """Such a function sees one pair at a time."""

    def visible(b, h, q, k):
        return torch.stack([q >= k, (q + k) % 7 != b]).all(0)

    arguments = {
        "batch_size": BATCH,
        "q_length": 70,
        "kv_length": 70,
        "mask_function": visible,
        "use_vmap": True,
    }
    want = theirs.sdpa_mask(**arguments, allow_is_causal_skip=False)
    assert torch.equal(fastattn_mask(**arguments).to_dense(), want)


def test_errors_of_a_mask_function_are_its_own():
    def broken(b, h, q, k):
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        fastattn_mask(1, 4, 4, mask_function=broken)


def test_packed_positions_become_documents():
    model = transformers.LlamaModel(
        transformers.LlamaConfig(
            vocab_size=50,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            attn_implementation="fastattn",
        )
    )
    ids = torch.arange(12)[None]
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 2, 3]])
    packed = model(ids, position_ids=positions, use_cache=False).last_hidden_state
    parts = [model(part, use_cache=False).last_hidden_state for part in ids.split([5, 3, 4], 1)]
    torch.testing.assert_close(packed, torch.cat(parts, 1))
    starts = torch.tensor([0, 5, 8, 12], dtype=torch.int32)
    told = model(ids, position_ids=positions, cu_seq_lens_q=starts, cu_seq_lens_k=starts, use_cache=False)
    torch.testing.assert_close(told.last_hidden_state, packed)


OFF_INTERFACE = {
    "Bloom": {"n_layer": 1, "n_head": 2},
    "Falcon": {"num_hidden_layers": 1, "num_attention_heads": 2},
    "Mpt": {"d_model": 16, "n_heads": 2, "n_layers": 1},
    "GPTJ": {"n_embd": 16, "n_layer": 1, "n_head": 2, "rotary_dim": 4},
    "GPTNeo": {"num_layers": 1, "num_heads": 2, "attention_types": [[["global"], 1]]},
    "MPNet": {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16},
    "BigBird": {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16},
    "DebertaV2": {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16},
    "CTRL": {"n_embd": 16, "n_layer": 1, "n_head": 2, "dff": 16},
}


@pytest.mark.parametrize("name", OFF_INTERFACE)
def test_models_off_the_interface_never_compute_something_else(name):
    """Told to use fastattn all the same, they stay as they are, or say that they cannot."""
    config = getattr(transformers, f"{name}Config")(vocab_size=50, hidden_size=16, **OFF_INTERFACE[name])
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}Model")(config).eval()
    mask = torch.tensor([[1, 1, 1, 1, 1, 1, 0, 0]])
    inputs = {"input_ids": torch.arange(8).view(1, 8) + 3, "attention_mask": mask}
    want = model(**inputs).last_hidden_state[:, :-2]
    try:
        model.set_attn_implementation("fastattn")
        model.config._attn_implementation_internal = "fastattn"
        got = model(**inputs).last_hidden_state[:, :-2]
    except NotImplementedError as error:
        assert "interface" in str(error)
    else:
        torch.testing.assert_close(got, want)
