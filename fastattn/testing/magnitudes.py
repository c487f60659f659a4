"""Bounds on the terms that results are sums of, for problems that nobody chose.

A random search finds the problems in which eager code happens to be exact (one key, whose weight is 1; a
sum that cancels), and there the bound of the listed cases is zero. So the few units in the last place
that it allows are counted not of the result but of the terms that were added up to make it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastattn.spec import DISTANCE_SCORES
from fastattn.testing.inputs import Inputs
from fastattn.testing.running import Results


def magnitudes(inputs: Inputs, exact: Results) -> dict[str, float]:
    """For each result, the size of the terms that it sums up, times the relative error of a weight.

    A weight exp(s - lse) inherits the absolute error of s and lse: units of 1 + |s| + |lse|. Weights of a
    row add up to 1 at most; those of a column to as many as there are rows.

    Args:
        exact: the results in float64; of them only lse is read.
    """
    case, leaves = inputs.case, inputs.leaves
    v, dout = largest(leaves["v"], norm=True), largest(inputs.dout, norm=True)
    distance = max(case.queries, case.keys)
    bias: float = {"slopes": distance, "bias": 1, "table": 1}[case.bias.leaf] if case.bias else 0
    bias *= largest(leaves[case.bias.leaf]) if case.bias else 0
    s, by_q, by_k, unit = _score(inputs, exact)
    s = s if case.softcap is None else min(s, case.softcap)
    sink = largest(leaves.get("sinks", torch.zeros(1)))
    weight = unit * (1 + 2 * (s + bias) + math.log(max(case.keys, 1)) + sink)
    kept = weight / (1 - case.dropout_p) if case.dropout_p < 1 else 0.0
    dp = kept * dout * v + weight * largest(inputs.dlse)
    rows = case.queries * case.heads // max(case.num_heads_kv, 1)
    every_row = 2 * case.batch * case.queries * dp  # of one head
    found = {"out": kept * largest(leaves["v"]), "lse": weight, "dv": kept * rows * largest(inputs.dout)}
    found |= {"dq": 2 * dp * by_q, "dk": 2 * dp * rows * by_k, "dw": every_row * case.heads}
    found |= {"dbias": every_row * case.heads, "dslopes": every_row * distance, "dtable": every_row}
    return found | {"dsinks": every_row}


def _score(inputs: Inputs, exact: Results) -> tuple[float, float, float, float]:
    """Bounds on |s|, on what a gradient of s is multiplied by for dq and dk, and the unit of a weight."""
    case, leaves = inputs.case, inputs.leaves
    if case.score == "additive":
        w = leaves["w"].detach().double().abs()
        return float(w.sum()), largest(w), largest(w), 1.0
    q, k = (largest(leaves[name], norm=True) for name in "qk")
    if case.score in DISTANCE_SCORES:
        reach = q + k
        if case.score == "gaussian":
            return reach**2 / 2, reach, reach, 1.0
        # Weights are K / sum K, with the error of 1 - r^2: it counts in units of the smallest sum of a row,
        # as does K times the slope of its logarithm.
        lse = exact["lse"]
        lowest = 0.0 if lse is None else min([0.0, *lse[lse.isfinite()].tolist()])
        return 1.0, 2.0, 2.0, math.exp(-lowest) * case.head_dim
    scale = 1 / max(case.head_dim, 1) ** 0.5 if case.scale is None else abs(case.scale)
    return scale * q * k, scale * largest(leaves["k"]), scale * largest(leaves["q"]), 1.0


def largest(x: Tensor, norm: bool = False) -> float:
    """max |x|, or the longest row, over what is finite."""
    x = x.detach().double()
    x = x.norm(dim=-1) if norm else x.abs()
    x = x[x.isfinite()]
    return x.max().item() if x.numel() else 0.0
