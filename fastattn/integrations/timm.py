"""timm: which of its attention blocks stay as they are, and why. `fastattn.patch` runs all others on ours.

A block either calls F.scaled_dot_product_attention (where its `fused_attn` is set) or writes attention out;
its code tells which. Those below have weights that no attention call has.
"""

from __future__ import annotations

from collections.abc import Mapping

_MIXED_HEADS = "it mixes the heads' weights before they meet the values"
_LINEAR = "it is linear attention: no product of queries and keys"

LEFT: Mapping[str, str] = {
    "timm.models.cait.TalkingHeadAttn": _MIXED_HEADS,
    "timm.models.efficientformer_v2.Attention2d": _MIXED_HEADS,
    "timm.models.convit.GPSA": "it mixes the weights with those of positions",
    "timm.models.mvitv2.MultiScaleAttention": "it adds its biases to a part of the scores",
    "timm.models.mvitv2.MultiScaleAttentionPoolFirst": "it adds its biases to a part of the scores",
    "timm.models.coat.FactorAttnConvRelPosEnc": _LINEAR,
    "timm.models.mobilevit.LinearSelfAttention": _LINEAR,
    "timm.layers.mobilevit.LinearSelfAttention": _LINEAR,
    "timm.layers.lambda_layer.LambdaLayer": _LINEAR,
    "timm.models.volo.OutlookAttention": "its weights are projected from the queries alone",
    "timm.layers.global_context.GlobalContext": "it pools, with one score for each position",
}
