"""timm: attention blocks and whole models under fastattn.patch, equal to stock in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from importlib import import_module
from typing import Any

import docs_tables
import patch_support
import pytest
import torch
from patch_support import assert_same_outcome, gradients, trainable
from timm_support import import_timm
from torch import Tensor, nn

import fastattn
from fastattn.integrations.routes import CALL, NOT_FOUND, WRITTEN_OUT
from fastattn.integrations.timm import LEFT

timm = import_timm()
pytestmark = pytest.mark.usefixtures("native", "one_thread")

HEADS, IMAGE, TOKENS = {"dim": 16, "num_heads": 2}, (2, 16, 4, 4), (2, 9, 16)
KEYS = {**HEADS, "key_dim": 8}

# block -> (its arguments, shape of its input, further inputs)
BLOCKS: dict[str, tuple[dict[str, Any], tuple[int, ...], tuple[Any, ...]]] = {
    "layers.attention.Attention": ({**HEADS, "qk_norm": True, "norm_layer": nn.LayerNorm}, TOKENS, ()),
    "layers.attention.AttentionRope": (HEADS, TOKENS, ()),
    "layers.attention2d.Attention2d": (HEADS, IMAGE, ()),
    "layers.attention2d.MultiQueryAttention2d": ({**KEYS, "dim_out": 16}, IMAGE, ()),
    "layers.attention2d.MultiQueryAttentionV2": ({**KEYS, "dim_out": 16, "value_dim": 8}, IMAGE, ()),
    "layers.attention_pool.AttentionPoolLatent": ({"in_features": 16, "num_heads": 2}, TOKENS, ()),
    "layers.attention_pool.AttentionPoolPrr": (HEADS, TOKENS, ()),
    "layers.attention_pool2d.AttentionPool2d": (
        {"in_features": 16, "feat_size": 4, "num_heads": 2},
        IMAGE,
        (),
    ),
    "layers.attention_pool2d.RotAttentionPool2d": (
        {"in_features": 16, "ref_feat_size": 4, "num_heads": 2},
        IMAGE,
        (),
    ),
    "layers.bottleneck_attn.BottleneckAttn": ({**HEADS, "dim_out": 16, "feat_size": (4, 4)}, IMAGE, ()),
    "layers.diff_attention.DiffAttention": (HEADS, TOKENS, ()),
    "layers.halo_attn.HaloAttn": (
        {**HEADS, "dim_out": 16, "block_size": 2, "halo_size": 1, "feat_size": (4, 4)},
        IMAGE,
        (),
    ),
    "layers.lambda_layer.LambdaLayer": ({"dim": 16, "num_heads": 2, "dim_head": 8, "r": 3}, IMAGE, ()),
    "layers.non_local_attn.NonLocalAttn": ({"in_channels": 16}, IMAGE, ()),
    "layers.other_pool.SimPool1d": ({"dim": 16}, TOKENS, ()),
    "layers.other_pool.SimPool2d": ({"dim": 16}, IMAGE, ()),
    "models.beit.Attention": ({**HEADS, "window_size": (2, 4)}, TOKENS, ()),
    "models.cait.ClassAttn": (HEADS, TOKENS, ()),
    "models.cait.TalkingHeadAttn": (HEADS, TOKENS, ()),
    "models.coat.FactorAttnConvRelPosEnc": (
        {**HEADS, "shared_crpe": lambda q, v, size: q * 0.5},
        TOKENS,
        ((3, 3),),
    ),
    "models.convit.GPSA": (HEADS, TOKENS, ()),
    "models.convit.MHSA": (HEADS, TOKENS, ()),
    "models.crossvit.CrossAttention": (HEADS, TOKENS, ()),
    "models.davit.ChannelAttention": (HEADS, TOKENS, ()),
    "models.davit.WindowAttention": ({**HEADS, "window_size": (3, 3)}, TOKENS, ()),
    "models.edgenext.CrossCovarianceAttn": (HEADS, TOKENS, ()),
    "models.efficientformer.Attention": ({**KEYS, "attn_ratio": 1, "resolution": 3}, TOKENS, ()),
    "models.efficientformer_v2.Attention2d": ({**KEYS, "attn_ratio": 1, "resolution": 4}, IMAGE, ()),
    "models.efficientvit_msra.CascadedGroupAttention": (
        {"dim": 16, "key_dim": 4, "num_heads": 2, "attn_ratio": 2, "resolution": 4, "kernels": (3, 3)},
        IMAGE,
        (),
    ),
    "models.eva.EvaAttention": ({**HEADS, "qkv_fused": False, "norm_layer": nn.LayerNorm}, TOKENS, ()),
    "models.fastvit.Attention": ({"dim": 16, "head_dim": 8}, IMAGE, ()),
    "models.gcvit.WindowAttentionGlobal": (
        {**HEADS, "window_size": (3, 3), "use_global": False},
        TOKENS,
        (),
    ),
    "models.hiera.MaskUnitAttention": (
        {"dim": 16, "dim_out": 16, "heads": 2, "window_size": 4, "use_mask_unit_attn": True},
        (2, 16, 16),
        (),
    ),
    "models.hieradet_sam2.MultiScaleAttention": ({**HEADS, "dim_out": 16}, (2, 4, 4, 16), ()),
    "models.levit.Attention": ({**KEYS, "resolution": (3, 3)}, TOKENS, ()),
    "models.levit.AttentionDownsample": (
        {"in_dim": 16, "out_dim": 16, "key_dim": 8, "num_heads": 2, "resolution": (4, 4)},
        (2, 16, 16),
        (),
    ),
    "models.maxxvit.Attention2d": ({"dim": 16, "dim_head": 8}, IMAGE, ()),
    "models.maxxvit.AttentionCl": ({"dim": 16, "dim_head": 8}, (2, 4, 4, 16), ()),
    "models.metaformer.Attention": ({"dim": 16, "head_dim": 8}, TOKENS, ()),
    "models.mobilevit.LinearSelfAttention": ({"embed_dim": 16}, IMAGE, ()),
    "models.mvitv2.MultiScaleAttention": (
        {**HEADS, "dim_out": 16, "feat_size": (3, 3), "has_cls_token": False},
        TOKENS,
        ((3, 3),),
    ),
    "models.nest.Attention": (HEADS, (2, 4, 9, 16), ()),
    "models.nextvit.EfficientAttention": ({"dim": 16, "head_dim": 8, "sr_ratio": 2}, (2, 16, 16), ()),
    "models.pvt_v2.Attention": ({**HEADS, "sr_ratio": 2}, (2, 16, 16), ((4, 4),)),
    "models.shvit.SHSA": ({"dim": 16, "qk_dim": 8, "pdim": 8, "norm_layer": nn.BatchNorm2d}, IMAGE, ()),
    "models.swin_transformer.WindowAttention": ({**HEADS, "window_size": (3, 3)}, TOKENS, ()),
    "models.swin_transformer_v2.WindowAttention": ({**HEADS, "window_size": (3, 3)}, TOKENS, ()),
    "models.swin_transformer_v2_cr.WindowMultiHeadAttention": (
        {**HEADS, "window_size": (3, 3)},
        TOKENS,
        (),
    ),
    "models.tiny_vit.Attention": ({**KEYS, "resolution": (3, 3)}, TOKENS, ()),
    "models.tnt.Attention": ({**HEADS, "hidden_dim": 16}, TOKENS, ()),
    "models.twins.GlobalSubSampleAttn": ({**HEADS, "sr_ratio": 2}, (2, 16, 16), ((4, 4),)),
    "models.twins.LocallyGroupedAttn": ({**HEADS, "ws": 2}, (2, 16, 16), ((4, 4),)),
    "models.visformer.Attention": (HEADS, IMAGE, ()),
    "models.vision_transformer.DiffParallelScalingBlock": (HEADS, TOKENS, ()),
    "models.vision_transformer.ParallelScalingBlock": (HEADS, TOKENS, ()),
    "models.vision_transformer_relpos.RelPosAttention": (HEADS, TOKENS, ()),
    "models.vision_transformer_sam.Attention": (
        {**HEADS, "use_rel_pos": True, "input_size": (4, 4)},
        (2, 4, 4, 16),
        (),
    ),
    "models.volo.Attention": (HEADS, (2, 3, 3, 16), ()),
    "models.volo.ClassAttention": (HEADS, TOKENS, ()),
    "models.volo.OutlookAttention": (HEADS, (2, 4, 4, 16), ()),
    "models.xcit.XCA": (HEADS, TOKENS, ()),
}

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
SWIN = {"img_size": 32, "window_size": 4, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 2)}
STAGES = {"depths": (2, 1, 1, 1), "embed_dims": (16, 16, 32, 32), "num_heads": (1, 2, 2, 2)}

# model -> its arguments and the size of its images
MODELS: dict[str, tuple[dict[str, Any], int]] = {
    "vit_tiny_patch16_224": (VIT, 32),
    "vit_base_patch16_siglip_224": (VIT, 32),
    "vit_base_patch16_rope_224": (VIT, 32),
    "vit_relpos_small_patch16_224": (VIT, 32),
    "naflexvit_base_patch16_gap": ({"embed_dim": 32, "depth": 2, "num_heads": 2}, 32),
    "deit3_small_patch16_224": (VIT, 32),
    "eva02_tiny_patch14_224": (VIT, 32),
    "beit_base_patch16_224": (VIT, 32),
    "samvit_base_patch16": ({**VIT, "global_attn_indexes": (1,), "window_size": 2}, 32),
    "cait_xxs24_224": (VIT, 32),
    "convit_tiny": ({**VIT, "local_up_to_layer": 1, "num_heads": 4}, 32),
    "xcit_nano_12_p16_224": ({"img_size": 32, "embed_dim": 32, "depth": 2, "num_heads": 2, "eta": 1.0}, 32),
    "swin_tiny_patch4_window7_224": ({**SWIN, "window_size": 2}, 32),
    "swinv2_tiny_window8_256": ({**SWIN, "window_size": 2}, 32),
    "swinv2_cr_tiny_224": ({**SWIN, "window_size": 2}, 32),
    "twins_svt_small": (STAGES, 64),
    "pvt_v2_b0": (STAGES, 64),
    "hiera_tiny_224": ({"img_size": (64, 64), "stages": (1, 1, 1, 1), "embed_dim": 16, "num_heads": 1}, 64),
    "levit_128s": (
        {"img_size": 64, "embed_dim": (16, 32, 32), "key_dim": 8, "num_heads": (2, 2, 2), "depth": (1, 1, 1)},
        64,
    ),
    "edgenext_xx_small": ({"depths": (1, 1, 1, 1)}, 64),
}


def prepared(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return patch_support.prepared(make().double())


def outcome(module: nn.Module, x: Tensor, *inputs: Any) -> list[Tensor]:
    """The output, and the gradients of the input and the parameters."""
    x = x.clone().requires_grad_()
    out = module(x, *inputs)
    out = out[0] if isinstance(out, tuple) else out
    return [out, *gradients(out.square().mean(), [x, *trainable(module)])]


def assert_same(got: list[Tensor], want: list[Tensor]) -> None:
    """To a few bits of float64."""
    assert_same_outcome(got, want, 1e-11)


@pytest.mark.parametrize("name", BLOCKS)
def test_block(name):
    """Replaced wherever its table does not say why not, and what is written out does fuse."""
    module, _, kind = f"timm.{name}".rpartition(".")
    options, shape, inputs = BLOCKS[name]
    block = prepared(lambda: getattr(import_module(module), kind)(**options))
    x = torch.randn(shape, dtype=torch.float64)
    want = outcome(copy.deepcopy(block), x, *inputs)  # some blocks keep what one backward pass may use
    report = fastattn.patch(block)
    assert_same(outcome(block, x, *inputs), want)
    if f"timm.{name}" in LEFT:
        assert report.left == {"": LEFT[f"timm.{name}"]}
        docs_tables.tried("timm", "timm", f"`{name}`", f"left: {LEFT[f'timm.{name}']}")
        return
    assert report.replaced[""] in (CALL, WRITTEN_OUT)
    assert "computed as written" not in str(report)
    how = "calls the function" if report.replaced[""] == CALL else "written out"
    docs_tables.tried("timm", "timm", f"`{name}`", how)
    report.undo()
    again = block(x, *inputs)
    assert torch.equal(again[0] if isinstance(again, tuple) else again, want[0])


@pytest.mark.parametrize("name", MODELS)
def test_model(name):
    """A whole model: masks of shifted windows, positions, class tokens."""
    options, size = MODELS[name]
    model = prepared(lambda: timm.create_model(name, num_classes=3, **options))
    x = torch.randn(2, 3, size, size, dtype=torch.float64)
    want = outcome(copy.deepcopy(model), x)
    report = fastattn.patch(model)
    assert report.replaced
    assert NOT_FOUND not in report.left.values()
    assert_same(outcome(model, x), want)
    assert "computed as written" not in str(report)
