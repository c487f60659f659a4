"""The one list of cases that correctness, gradients, opcheck and benchmarks share."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastattn import masks
from fastattn.biases import ALiBi, RelativePosition
from fastattn.spec import accumulate_dtype
from fastattn.testing.case import BiasCase, Case

MaskFactory = Callable[[Case, torch.Generator], Any]
HALF = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *HALF, torch.float64)


def always(mask: Any) -> MaskFactory:
    """A factory of a mask that depends on nothing."""
    return lambda case, generator: mask


def random_mask(*dims: str, p: float = 0.7, **view: Any) -> MaskFactory:
    """A bool mask that varies along the named dimensions of "bhqk" and is broadcast along the others.

    `rank` drops leading dimensions, `transposed` stores q innermost, `step` takes every n-th element of
    a longer k dimension, `expanded` expands to the whole shape with strides of 0.
    """
    return partial(_random_mask, dims, p, **view)


def _random_mask(
    dims: tuple[str, ...], p: float, case: Case, generator: torch.Generator,
    rank: int = 4, transposed: bool = False, step: int = 1, expanded: bool = False,
) -> Tensor:  # fmt: skip
    full = {"b": case.batch, "h": case.heads, "q": case.queries, "k": case.keys}
    sizes = [full[d] if d in dims else 1 for d in "bhqk"]
    sizes[3] *= step
    mask = torch.rand(sizes, generator=generator) < p
    if transposed:
        mask = mask.mT.contiguous().mT
    mask = mask[..., ::step].reshape(-1) if rank == 1 else mask[..., ::step]
    while mask.dim() > rank:
        mask = mask[0]
    return mask.expand(list(full.values())) if expanded else mask


def masked_rows(case: Case, generator: torch.Generator) -> Tensor:
    """Every third row sees nothing, and one whole head sees nothing."""
    mask = torch.rand(case.batch, case.heads, case.queries, case.keys, generator=generator) < 0.6
    mask[:, :, ::3] = False
    mask[0, -1] = False
    return mask


def ids(case: Case, length: int, generator: torch.Generator, count: int = 4) -> Tensor:
    return torch.randint(count, (case.batch, length), generator=generator).sort(-1).values


def document_mask(case: Case, generator: torch.Generator) -> Any:
    return masks.documents(ids(case, case.queries, generator), ids(case, case.keys, generator))


def block_layout(case: Case, generator: torch.Generator, size: int = 16) -> Any:
    rows, cols = math.ceil(case.queries / size), math.ceil(case.keys / size)
    return masks.blocks(torch.rand(1, case.heads, rows, cols, generator=generator) < 0.5, size)


def lengths(case: Case, generator: torch.Generator, *more: int) -> Tensor:
    return torch.randint(case.keys + 1, (case.batch, *more), generator=generator)


def padding_per_query(case: Case, generator: torch.Generator) -> Any:
    start = lengths(case, generator, case.queries) // 2
    return masks.padding(lengths(case, generator, case.queries), start)


def tensor_bias(
    *sizes: str, dtype: torch.dtype | None = None, holes: float = 0.0, floor: bool = False
) -> BiasCase:
    """A tensor bias that varies along the named dimensions of "bhqk".

    `dtype` None means q's. `holes` is the share of -inf. `floor` fills every other row with finfo.min,
    the "mask" of older code, which is arithmetic: a row of it is uniform, not empty.
    """

    def make(case: Case, generator: torch.Generator) -> Tensor:
        full = {"b": case.batch, "h": case.heads, "q": case.queries, "k": case.keys}
        bias = torch.randn([full[d] if d in sizes else 1 for d in "bhqk"], generator=generator)
        hole = torch.rand(bias.shape, generator=generator) < holes
        bias = bias.to(dtype or case.dtype).masked_fill(hole, -math.inf)
        if floor:
            bias[..., ::2, :] = torch.finfo(bias.dtype).min
        return bias

    return BiasCase("bias", make, lambda leaf: leaf, requires_grad=not floor)


def alibi(per_batch: bool = False, **options: Any) -> BiasCase:
    def make(case: Case, generator: torch.Generator) -> Tensor:
        sizes = [case.batch, case.heads] if per_batch else [case.heads]
        return torch.rand(sizes, generator=generator, dtype=accumulate_dtype(case.dtype)) * 0.3

    return BiasCase("slopes", make, lambda leaf: ALiBi(leaf, **options))


def relative(buckets: int = 8, **options: Any) -> BiasCase:
    def make(case: Case, generator: torch.Generator) -> Tensor:
        return torch.randn(buckets, case.heads, generator=generator, dtype=accumulate_dtype(case.dtype))

    return BiasCase("table", make, lambda leaf: RelativePosition(leaf, **options))


def in_dtypes(case: Case, *dtypes: torch.dtype) -> list[Case]:
    return [case.with_dtype(dtype) for dtype in dtypes or DTYPES]


def shape_cases() -> list[Case]:
    # Many heads where a result has few elements: the bound compares two maxima, which must be typical.
    cases = [
        Case("one", batch=1, heads=1, seqlen_q=1, head_dim=1),
        Case("one-query", batch=3, heads=8, seqlen_q=1, seqlen_k=65),
        Case("one-key", heads=8, seqlen_q=37, seqlen_k=1),
        Case("primes", batch=1, heads=3, seqlen_q=101, seqlen_k=131, head_dim=37),
        Case("longer-q", seqlen_q=130, seqlen_k=29),
        Case("gqa", heads=6, heads_kv=2, seqlen_k=70, head_dim=24),
        Case("mqa", heads=4, heads_kv=1, seqlen_q=19, head_dim=32),
        Case("dv-smaller", head_dim=24, head_dim_v=8),
        Case("dv-larger", head_dim=8, head_dim_v=40, heads=4, heads_kv=2),
        Case("dv-one", head_dim=5, head_dim_v=1),
        Case("many-tiles", batch=1, heads=1, seqlen_q=515, seqlen_k=643, head_dim=64),
        Case("few-rows-long-k", batch=1, heads=1, seqlen_q=40, seqlen_k=1100, head_dim=64),
        Case("empty-batch", batch=0),
        Case("empty-q", seqlen_q=0, seqlen_k=5),
        Case("empty-k", seqlen_k=0),
        Case("empty-k-sinks", seqlen_k=0, sinks=True),
        Case("empty-both", seqlen_q=0),
    ]
    dims = (3, 4, 8, 17, 32, 64, 80, 96, 100, 128, 160, 256)
    cases += [Case(f"dim-{d}", batch=1, heads=1, seqlen_q=39, seqlen_k=71, head_dim=d) for d in dims]
    layouts = ("blhd", "sliced", "padded_rows", "expanded_kv", "expanded_batch", "side_by_side")
    cases += [Case(f"layout-{layout}", heads=4, heads_kv=2, seqlen_k=45, layout=layout) for layout in layouts]
    return cases


def option_cases() -> list[Case]:
    cases = [Case(f"scale-{scale:g}", seqlen_k=70, scale=scale) for scale in (-0.5, 0.0, 1e-4, 8.0)]
    cases += [Case(f"softcap-{cap:g}", seqlen_k=70, softcap=cap, scale=1.0) for cap in (0.5, 30.0)]
    causal = always(masks.causal())
    cases += [
        Case("scale-negative-causal", seqlen_q=70, scale=-0.3, mask=causal),
        Case("sinks", seqlen_k=70, sinks=True, heads=4, heads_kv=2),
        Case("sinks-causal-softcap", seqlen_q=70, sinks=True, softcap=2.0, mask=causal),
        Case("sinks-masked-rows", sinks=True, mask=masked_rows),
        Case("dropout-0.1", seqlen_q=70, dropout_p=0.1),
        Case("dropout-0.5", batch=1, seqlen_q=130, seqlen_k=200, dropout_p=0.5, heads=4, heads_kv=2),
        Case("dropout-one", heads=8, dropout_p=1.0, sinks=True),
        Case("dropout-causal-gqa", heads=4, heads_kv=2, seqlen_q=70, dropout_p=0.2, mask=causal),
        Case("dropout-masked-rows", dropout_p=0.3, mask=masked_rows, sinks=True),
    ]
    return cases


def mask_cases() -> list[Case]:
    causal, window = masks.causal, masks.window
    analytic = {
        "causal": causal(),
        "causal-top-left": causal(align="top_left"),
        "window": window(5, 3),
        "window-left": window(7, None),
        "window-right": window(None, 2),
        "window-top-left": window(20, 0, align="top_left"),
        "causal-and-window": causal() & window(9, None),
        "both-aligns": causal() & window(30, 40, align="top_left"),
        "not-window": ~window(3, 3),
        "causal-or-window": causal() | window(0, 4),
    }
    shapes = {"long-k": (70, 150), "long-q": (150, 70)}
    cases = [
        Case(f"{name}-{shape}", batch=1, seqlen_q=lq, seqlen_k=lk, mask=always(mask))
        for name, mask in analytic.items()
        for shape, (lq, lk) in shapes.items()
    ]
    special: dict[str, MaskFactory] = {
        "padding": lambda c, g: masks.padding(lengths(c, g)),
        "padding-left": lambda c, g: masks.padding(torch.full((c.batch,), c.keys), lengths(c, g)),
        "padding-per-query": padding_per_query,
        "padding-causal": lambda c, g: causal() & masks.padding(lengths(c, g)),
        "documents": document_mask,
        "documents-causal": lambda c, g: causal() & document_mask(c, g),
        "prefix-lm": lambda c, g: causal() | masks.prefix(lengths(c, g)),
        "global": lambda c, g: masks.window(6, 6) | masks.global_tokens(torch.tensor([0, 17])),
        "global-causal": lambda c, g: causal() & (window(6, 0) | masks.global_tokens(torch.tensor([0, 3]))),
        "links": always(causal() & ~masks.links([(0, 0), (30, 7), (99, 1), (109, 64)])),
        "only-links": always(masks.links([(20, 0), (21, 100), (85, 3), (85, 70)])),
        "blocks": block_layout,
        "blocks-or-window": lambda c, g: block_layout(c, g) | window(2, 2),
        "predicate": always(masks.predicate(lambda b, h, i, j: (i + 2 * j + b + h) % 3 != 0)),
        "predicate-causal": always(causal() & masks.predicate(lambda b, h, i, j: (i ^ j) % 4 != h)),
        "dense": lambda c, g: masks.dense(random_mask("b", "q", "k")(c, g)),
        "dense-causal": lambda c, g: causal() & masks.dense(random_mask("b", "q", "k")(c, g)),
        "dense-or-causal": lambda c, g: causal() | masks.dense(random_mask("h", "q", "k", p=0.2)(c, g)),
        "not-dense": lambda c, g: ~masks.dense(random_mask("q", "k")(c, g)),
    }
    cases += [Case(f"mask-{name}", seqlen_q=90, seqlen_k=110, mask=mask) for name, mask in special.items()]
    return cases + tensor_mask_cases()


def tensor_mask_cases() -> list[Case]:
    tensors = {
        "full": random_mask("b", "h", "q", "k"),
        "rank-2": random_mask("q", "k", rank=2),
        "rank-1": random_mask("k", rank=1),
        "scalar-batch": random_mask("h", "q", "k"),
        "key-padding": random_mask("b", "k"),
        "query-only": random_mask("b", "q"),
        "head-only": random_mask("h"),
        "transposed": random_mask("b", "q", "k", transposed=True),
        "strided": random_mask("q", "k", step=3),
        "expanded": random_mask("b", "k", expanded=True),
        "rows": masked_rows,
        "nothing": random_mask("b", "q", "k", p=0.0),
        "sparse": random_mask("b", "h", "q", "k", p=0.02),
    }
    return [Case(f"bool-{name}", seqlen_q=70, seqlen_k=90, mask=mask) for name, mask in tensors.items()]


def bias_cases() -> list[Case]:
    biases = {
        "full": tensor_bias("b", "h", "q", "k"),
        "head": tensor_bias("h", "q", "k"),
        "batch": tensor_bias("b", "q", "k"),
        "matrix": tensor_bias("q", "k"),
        "keys": tensor_bias("b", "k"),
        "queries": tensor_bias("h", "q"),
        "scalar": tensor_bias(),
        "holes": tensor_bias("b", "h", "q", "k", holes=0.4),
        "all-holes": tensor_bias("b", "q", "k", holes=1.0),
        "floor": tensor_bias("b", "q", "k", floor=True),
        "alibi": alibi(),
        "alibi-batch": alibi(per_batch=True),
        "alibi-top-left": alibi(align="top_left"),
        "relative": relative(max_distance=20),
        "relative-causal": relative(bidirectional=False, max_distance=20),
    }
    causal, band = always(masks.causal()), always(masks.window(20, 5))
    return [Case(f"bias-{name}", seqlen_q=70, seqlen_k=90, bias=bias) for name, bias in biases.items()] + [
        Case("bias-gqa-causal", heads=4, heads_kv=2, bias=tensor_bias("h", "q", "k"), mask=causal),
        Case("alibi-gqa-causal", heads=4, heads_kv=2, seqlen_q=150, bias=alibi(), mask=causal),
        Case("alibi-rows", seqlen_q=70, bias=alibi(), mask=masked_rows),
        Case("relative-window", seqlen_q=150, bias=relative(max_distance=30), mask=band),
    ]


def everything_cases() -> list[Case]:
    """Many features in one call: what no single-feature case can catch."""
    common: dict[str, Any] = {"heads": 4, "heads_kv": 2, "softcap": 3.0, "sinks": True, "dropout_p": 0.25}
    common |= {"seqlen_q": 75, "seqlen_k": 140, "head_dim": 20, "head_dim_v": 12, "layout": "blhd"}
    return [
        Case("all-band", mask=always(masks.causal()), bias=alibi(), **common),
        Case("all-dense", mask=masked_rows, bias=tensor_bias("b", "k", holes=0.2), **common),
        Case("all-block", mask=document_mask, bias=relative(), **common),
        Case("all-padding", mask=padding_per_query, bias=tensor_bias("h", "q", "k"), **common),
    ]


def varlen_cases() -> list[Case]:
    base: dict[str, Any] = {"op": "varlen", "batch": 4}
    base |= {"lengths_q": (5, 70, 1, 33), "lengths_k": (9, 70, 130, 20)}
    causal = always(masks.causal())
    return [
        Case("varlen", **base),
        Case("varlen-causal-gqa", heads=4, heads_kv=2, mask=causal, **base),
        Case("varlen-top-left", mask=always(masks.causal(align="top_left")), **base),
        Case("varlen-window-softcap-sinks", mask=always(masks.window(9, 2)), softcap=2.0, sinks=True, **base),
        Case("varlen-dropout", dropout_p=0.3, mask=causal, **base),
        Case("varlen-alibi", bias=alibi(), mask=causal, **base),
        Case("varlen-relative", bias=relative(), **base),
        Case("varlen-padding", mask=lambda c, g: masks.padding(lengths(c, g)), **base),
        Case("varlen-block", mask=lambda c, g: causal(c, g) | masks.prefix(lengths(c, g)), **base),
        Case("varlen-empty", op="varlen", batch=4, lengths_q=(3, 0, 7, 0), lengths_k=(0, 5, 66, 0)),
        Case("varlen-blhd", layout="sliced", heads=4, heads_kv=2, head_dim_v=24, **base),
    ]


def decode_cases() -> list[Case]:
    base: dict[str, Any] = {"op": "decode", "batch": 3, "grads": False, "heads": 4, "heads_kv": 2}
    base |= {"seqlen_k": 200, "lengths_k": (200, 77, 1)}
    one, few = base | {"seqlen_q": 1}, base | {"seqlen_q": 5, "lengths_k": (200, 77, 5)}
    causal = always(masks.causal())
    cases = [
        Case("decode", **one),
        Case("decode-causal", mask=causal, **few),
        Case("decode-window", mask=always(masks.causal() & masks.window(30, None)), **few),
        Case("decode-empty-cache", **(one | {"lengths_k": (0, 77, 1)})),
        Case("decode-softcap-sinks", softcap=2.0, sinks=True, **one),
        Case("decode-alibi", bias=alibi(), mask=causal, **few),
        Case("decode-relative", bias=relative(), **few),
        Case("decode-padding", mask=lambda c, g: masks.padding(lengths(c, g)), **one),
        Case("decode-mqa", **(one | {"heads": 8, "heads_kv": 1, "head_dim": 64})),
        Case("decode-long", **(one | {"seqlen_k": 1500, "lengths_k": (1500, 1025, 511)})),
    ]
    paged = [
        Case("paged", page_size=16, **one),
        Case("paged-causal", page_size=16, mask=causal, **few),
        Case("paged-page-1", page_size=1, **one),
        Case("paged-odd", page_size=23, mask=causal, softcap=2.0, sinks=True, **few),
    ]
    return cases + paged


def dtype_cases(cases: list[Case]) -> list[Case]:
    """The representative cases that also run in the other dtypes."""
    chosen = {
        "one", "primes", "gqa", "dv-larger", "dim-3", "dim-64", "dim-100", "layout-blhd", "many-tiles",
        "empty-k", "scale--0.5", "softcap-0.5", "sinks-causal-softcap", "sinks-masked-rows", "dropout-0.5",
        "causal-long-k", "window-long-q", "mask-padding-per-query", "mask-documents-causal", "bool-rows",
        "bool-strided", "bias-full", "bias-keys", "bias-holes", "bias-floor", "bias-alibi", "bias-relative",
        "all-band", "all-dense", "all-block", "all-padding", "varlen-causal-gqa", "varlen-alibi", "decode",
        "decode-causal", "paged-causal",
    }  # fmt: skip
    single: dict[str, Any] = {"dtype": torch.float32}
    mixed = Case("bias-float32", seqlen_q=70, seqlen_k=90, bias=tensor_bias("h", "q", "k", **single))
    floor = Case("bias-float32-floor", seqlen_k=90, bias=tensor_bias("q", "k", floor=True, **single))
    others = [case.with_dtype(d) for case in cases if case.name in chosen for d in DTYPES[1:]]
    return others + in_dtypes(mixed, *HALF) + in_dtypes(floor, *HALF)


def all_cases() -> list[Case]:
    groups = (shape_cases, option_cases, mask_cases, bias_cases, everything_cases, varlen_cases, decode_cases)
    cases = [case for group in groups for case in group()]
    return cases + dtype_cases(cases)


CASES: tuple[Case, ...] = tuple(all_cases())
