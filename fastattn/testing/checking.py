"""Checking one case on one backend: within the derived bound, or the backend's own reason not to run it."""

from __future__ import annotations

import torch

import fastattn
from fastattn.spec import accumulate_dtype
from fastattn.testing.inputs import Inputs, poisoned_memory
from fastattn.testing.running import Oracle, run
from fastattn.testing.tolerances import check_all

_MORE = {"attention": (), "varlen": ("cu_seqlens_q", "cu_seqlens_k"), "decode": ("lengths",)}


def refusal(backend: str, inputs: Inputs, lse: bool = True) -> str | None:
    """The backend's own reason not to run the case, or None."""
    inputs = inputs.requiring_grad() if inputs.case.grads else inputs
    (q, k, v, *fixed), options = inputs.arguments()
    options |= dict(zip(_MORE[inputs.case.op], fixed, strict=True))
    return fastattn.explain(q, k, v, **options, return_lse=lse).reasons[backend]


def check_case(backend: str, inputs: Inputs, expected: Oracle, lse: bool = True) -> None:
    """Run a case on a backend and compare every result and gradient, their dtypes too.

    Args:
        expected: of `oracle(inputs, lse=lse)`.
        lse: whether lse is asked for and compared.
    Raises:
        AssertionError: where they differ.
    """
    case = inputs.case
    with poisoned_memory():
        got = run(fastattn, inputs, lse=lse, backend=backend)
    check_all(got, expected.ref64, expected.native, case.dtype)
    wanted: dict[str, torch.dtype] = {"out": case.dtype, "lse": accumulate_dtype(case.dtype)}
    wanted |= {f"d{name}": leaf.dtype for name, leaf in inputs.leaves.items()}
    for name, result in got.items():
        if result is not None and result.dtype != wanted[name]:
            raise AssertionError(f"{name}: dtype {result.dtype}, expected {wanted[name]}")
