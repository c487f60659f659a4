"""What tests and benchmarks share: the list of cases, their inputs, and the bound on the error."""

from fastattn.philox import dropout_mask, dropout_words
from fastattn.testing.cases import CASES, Case
from fastattn.testing.inputs import Inputs, make_inputs
from fastattn.testing.running import Results, oracle, run
from fastattn.testing.tolerances import check, check_all

__all__ = [
    "CASES",
    "Case",
    "Inputs",
    "Results",
    "check",
    "check_all",
    "dropout_mask",
    "dropout_words",
    "make_inputs",
    "oracle",
    "run",
]
