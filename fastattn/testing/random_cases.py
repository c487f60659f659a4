"""Random problems: every option, mask, layout and dtype in any combination, one problem for each integer."""

from __future__ import annotations

import math
from collections.abc import Callable
from random import Random
from typing import Any

import torch
from torch import Tensor

from fastattn import masks
from fastattn.spec import DISTANCE_SCORES
from fastattn.testing.case import LAYOUTS, BiasCase, Case
from fastattn.testing.cases import DTYPES, alibi, ids, lengths, random_mask, relative, tensor_bias

WORK = 3e6  # multiply-adds of a problem's scores: the definition in float64 takes well under a second
EDGES = (4, 12, 60, 64, 128, 256, 512, 1024, 2048)  # rows or keys of the CPU kernels' groups, tiles and tasks

MaskMaker = Callable[[Case, torch.Generator, Random], Any]


def random_case(example: int) -> Case:
    """The problem of one integer; the same on every machine."""
    rng = Random(example)
    op = rng.choices(("attention", "varlen", "decode"), (6, 2, 2))[0]
    dtype = rng.choice(DTYPES)
    score = "dot"
    if rng.random() < 0.2:
        score = rng.choice(("additive", *(DISTANCE_SCORES if dtype.itemsize > 2 else ())))
    case = _shaped(rng, f"fuzz-{example}", op, dtype, score)
    return Case(**{**vars(case), **_options(rng, case)})


def _shaped(rng: Random, name: str, op: str, dtype: torch.dtype, score: str) -> Case:
    """Sizes alone; drawn again until the work is small enough.

    A third have lengths beside edges, all of them: what kernels divide by both is divided there. Of these
    problems few heads leave room for long ones.
    """
    at_edges = rng.random() < 0.33
    length = _edge if at_edges else _length
    while True:
        heads_kv = 1 if at_edges else rng.randint(1, 3)
        sizes: dict[str, Any] = {"heads": heads_kv * rng.choice((1, 1, 2, 3, 4)), "heads_kv": heads_kv}
        sizes |= {"head_dim": _head_dim(rng), "head_dim_v": rng.choice((None, _head_dim(rng)))}
        if op == "varlen":
            count = rng.randint(1, 2 if at_edges else 5)
            drawn = [tuple(length(rng) for _ in range(count)) for _ in range(2)]
            sizes |= {"batch": count, "lengths_q": drawn[0], "lengths_k": rng.choice((drawn[0], drawn[1]))}
        elif op == "decode":
            capacity = rng.choice((length(rng), rng.randint(900, 3500))) + 1
            sizes |= {"batch": rng.randint(1, 3), "seqlen_k": capacity, "grads": False}
            sizes |= {"seqlen_q": rng.choice((1, 1, length(rng), rng.randint(1, 70)))}
            sizes |= {"lengths_k": tuple(rng.randint(0, capacity) for _ in range(sizes["batch"]))}
            page = rng.choice((None, rng.randint(1, 70)))
            # The definition reads a paged cache whole pages at a time, and so do masks.
            sizes |= {
                "page_size": page,
                "seqlen_k": capacity if page is None else -(-capacity // page) * page,
            }
        else:
            sizes |= {"batch": 1 if at_edges else rng.choice((0, 1, 1, 2, 3)), "seqlen_q": length(rng)}
            sizes |= {"seqlen_k": rng.choice((sizes["seqlen_q"], length(rng), length(rng)))}
        case = Case(name, op=op, dtype=dtype, score=score, **sizes)
        pairs = case.batch * case.heads * case.queries * case.keys
        if pairs * max(case.head_dim, case.dim_v) <= (WORK if score == "dot" else WORK / 4):
            return case


def _head_dim(rng: Random) -> int:
    return rng.choice((rng.randint(1, 16), rng.randint(1, 70), rng.choice((32, 64, 80, 96, 128, 256))))


def _length(rng: Random) -> int:
    return rng.choices((rng.randint(0, 3), rng.randint(1, 150), rng.randint(60, 1300)), (1, 6, 2))[0]


def _edge(rng: Random) -> int:
    """At or beside a size at which kernels divide their work."""
    return rng.choice(EDGES) + rng.choice((-1, 0, 1))


def _options(rng: Random, case: Case) -> dict[str, Any]:
    softcap = rng.choice((None, None, rng.uniform(0.3, 20)))
    drawn: dict[str, Any] = {
        "softcap": None if case.score in DISTANCE_SCORES else softcap,  # no public call has both
        "sinks": rng.random() < 0.3,
        "dropout_p": rng.choice((0.0, 0.0, 0.1, 0.5, 0.9, 1.0)),
        "mask": _mask(rng, case),
        "bias": _bias(rng, case),
        "layout": _layout(rng, case),
    }
    if case.score == "dot":
        drawn["scale"] = rng.choice((None, None, 0.0, rng.uniform(-1, 1)))
    return drawn


def _layout(rng: Random, case: Case) -> str:
    """Any; half of the rows that kernels might read where they lie are too far apart for it."""
    is_readable = case.dtype.itemsize > 2 and 0 in (case.head_dim % 16, case.dim_v % 16)
    return "side_by_side" if is_readable and rng.random() < 0.5 else rng.choice(LAYOUTS)


def _bias(rng: Random, case: Case) -> BiasCase | None:
    align = {"align": _align(rng)}
    kinds = [None, None, alibi(per_batch=rng.random() < 0.3, **align)]
    buckets, bidirectional = rng.choice((6, 8, 32)), rng.random() < 0.5
    kinds.append(relative(buckets, bidirectional=bidirectional, max_distance=rng.randint(20, 99), **align))
    if case.op != "varlen":
        sizes = [d for d in "bhqk" if rng.random() < 0.6]
        kinds.append(
            tensor_bias(*sizes, holes=rng.choice((0.0, 0.2, 1.0)), dtype=rng.choice((None, torch.float32)))
        )
    return rng.choice(kinds)


def _mask(rng: Random, case: Case) -> Callable[[Case, torch.Generator], Any] | None:
    kind = rng.random()
    if kind < 0.2:
        return None
    if kind < 0.35 and case.op != "varlen":
        sizes = [d for d in "bhqk" if rng.random() < 0.6]
        view: dict[str, Any] = rng.choice(({}, {"transposed": True}, {"step": 3}, {"expanded": True}))
        return random_mask(*sizes, p=rng.choice((0.0, 0.03, 0.5, 0.97)), **view)
    seed = rng.random()

    def make(case: Case, generator: torch.Generator) -> Any:
        structure = Random(seed)
        mask = tree(case, generator, structure)
        ragged = case.op != "attention"
        if not ragged and structure.random() < 0.1:
            return mask.build(case.queries, case.keys, batch=case.batch, heads=case.heads)
        return mask

    return make


def tree(case: Case, generator: torch.Generator, rng: Random) -> masks.Mask:
    """A mask of up to five leaves under &, | and ~."""
    leaves = [make for name, make in LEAVES.items() if case.op != "varlen" or name != "dense"]
    mask = rng.choice(leaves)(case, generator, rng)
    for _ in range(rng.choice((0, 0, 1, 1, 2, 4))):
        step = rng.choice("&|~")
        if step == "~":
            mask = ~mask
        else:
            other = rng.choice(leaves)(case, generator, rng)
            mask = mask & other if step == "&" else mask | other
    return mask


def _align(rng: Random) -> Any:
    return rng.choice(("bottom_right", "top_left"))


def _window(case: Case, generator: torch.Generator, rng: Random) -> masks.Mask:
    left, right = (rng.choice((None, rng.randint(0, 5), rng.randint(0, 200))) for _ in range(2))
    return masks.window(left, right, align=_align(rng))


def _padding(case: Case, generator: torch.Generator, rng: Random) -> masks.Mask:
    rows = [case.queries] if rng.random() < 0.5 else []
    starts = lengths(case, generator, *rows) // 2 if rng.random() < 0.5 else None
    return masks.padding(lengths(case, generator, *rows), starts)


def _documents(case: Case, generator: torch.Generator, rng: Random) -> masks.Mask:
    count = rng.randint(1, 6)
    q_ids, k_ids = (ids(case, n, generator, count) for n in (case.queries, case.keys))
    if rng.random() < 0.3:  # in no order
        q_ids = q_ids[:, torch.randperm(case.queries, generator=generator)]
    return masks.documents(q_ids, k_ids)


def _global_tokens(case: Case, generator: torch.Generator, rng: Random) -> masks.Mask:
    align = _align(rng)
    if rng.random() < 0.5:
        sizes = [case.batch, case.keys] if rng.random() < 0.5 else [case.keys]
        return masks.global_tokens(torch.rand(sizes, generator=generator) < 0.1, align=align)
    positions = [rng.randrange(max(case.keys, 1)) for _ in range(rng.randint(0, 3) if case.keys else 0)]
    return masks.global_tokens(torch.tensor(positions, dtype=torch.int64), align=align)


def _blocks(case: Case, generator: torch.Generator, rng: Random) -> masks.Mask:
    size = rng.choice((1, 16, 64, 128, rng.randint(1, 200)))
    rows, columns = math.ceil(case.queries / size), math.ceil(case.keys / size)
    sizes = [rng.choice((1, case.batch)), rng.choice((1, case.heads)), rows, columns]
    layout = torch.rand(sizes, generator=generator) < rng.choice((0.1, 0.5, 0.9))
    return masks.blocks(layout[0, 0] if rng.random() < 0.2 and case.batch else layout, size)


def _predicate(case: Case, generator: torch.Generator, rng: Random) -> masks.Mask:
    a, b, c, modulus = (rng.randint(1, 5) for _ in range(4))

    def fn(batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (a * i + b * j + c * head + batch) % (modulus + 1) != 0

    return masks.predicate(fn)


def _dense(case: Case, generator: torch.Generator, rng: Random) -> masks.Mask:
    sizes = [d for d in "bhqk" if rng.random() < 0.6]
    return masks.dense(random_mask(*sizes, p=rng.choice((0.05, 0.5, 0.95)))(case, generator))


LEAVES: dict[str, MaskMaker] = {
    "causal": lambda case, generator, rng: masks.causal(align=_align(rng)),
    "window": _window,
    "padding": _padding,
    "documents": _documents,
    "prefix": lambda case, generator, rng: masks.prefix(lengths(case, generator)),
    "global_tokens": _global_tokens,
    "blocks": _blocks,
    "predicate": _predicate,
    "dense": _dense,
}
