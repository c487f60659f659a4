"""Attention modules of transformers that are not on its attention interface: which stay as they are, and why.

Of the others, `fastattn.patch` tells by their code that they write their attention out, and runs it on ours.
"""

from __future__ import annotations

from collections.abc import Mapping

_CHUNKS = (
    "its sliding window is computed in chunks; fastattn.masks.window with fastattn.attention does the same"
)
_APPROXIMATE = "it approximates attention: no product of all queries and keys"
_SPLIT = "it adds its biases to scores whose last two dimensions it splits into rows and columns of the image"
_BLOCKS = "its blocks are computed one by one; fastattn.masks.blocks with fastattn.attention does the same"
_EXTENDS = "it extends its mask for keys of its own, in numbers that only eager attention reads"

LEFT: Mapping[str, str] = {
    "LongformerSelfAttention": _CHUNKS,
    "LEDEncoderSelfAttention": _CHUNKS,
    "BigBirdBlockSparseAttention": _BLOCKS,
    "BigBirdPegasusBlockSparseAttention": _BLOCKS,
    "LSHSelfAttention": "its keys are found by hashing",
    "LocalSelfAttention": "its window is computed in chunks, with a logarithm in the place of a softmax",
    "NystromformerSelfAttention": _APPROXIMATE,
    "YosoSelfAttention": _APPROXIMATE,
    "MraSelfAttention": _APPROXIMATE,
    "FunnelAttentionStructure": "it makes masks and positions; FunnelRelMultiheadAttention attends",
    "AutoformerAttention": "its weights are correlations in time, found by a Fourier transform",
    "InformerProbSparseAttention": "it chooses the queries that attend",
    "VitDetAttention": _SPLIT,
    "SamVisionAttention": _SPLIT,
    "SamHQVisionAttention": _SPLIT,
    "SegGptAttention": _SPLIT,
    "GotOcr2VisionAttention": _SPLIT,
    "DeepseekOcr2SamVisionAttention": _SPLIT,
    "UnlimitedOcrSamVisionAttention": _SPLIT,
    "SLANeXtVisionAttention": _SPLIT,
    "PPFormulaNetVisionAttention": _SPLIT,
    "DeepseekV4Attention": _EXTENDS,
    "PegasusXGlobalLocalAttention": _BLOCKS,
    "GroupViTAssignAttention": "its weights are a hard choice of one group for each token",
    "CpmAntAttention": "it sets weights to zero after the softmax",
    "SwiftFormerEfficientAdditiveAttention": "it is additive attention: no product of queries and keys",
}

# Their products are in modules of their own, where their code does not show them.
WRITTEN_OUT = ("SqueezeBertSelfAttention",)
