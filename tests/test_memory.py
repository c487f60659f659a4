"""Peak memory stays linear in the length, measured in a fresh process."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from fastattn.backends import cpu

pytestmark = [
    pytest.mark.skipif(not cpu.available(), reason="the native core fastattn._C is not built"),
    pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc"),
]

# VmHWM is the peak of resident memory; writing 5 to clear_refs sets it to what is resident now.
SCRIPT = """
    import torch, fastattn
    from fastattn import masks
    from fastattn.biases import ALiBi

    def resident(what):
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) for line in status if line.startswith(what)) / 1024

    def call(length):
        q, k, v, dout = (torch.randn(1, 1, length, 64) for _ in range(4))
        for x in (q, k, v):
            x.requires_grad_()
        options = {options}
        with open("/proc/self/clear_refs", "w") as refs:
            refs.write("5")
        before = resident("VmRSS")
        out = fastattn.attention(q, k, v, backend="cpu", **options)
        torch.autograd.grad(out, (q, k, v), dout)
        return resident("VmHWM") - before

    call(256)  # what is loaded and allocated once
    print(call({length}))
"""


def added_megabytes(length: int, options: str = "{}") -> float:
    """Resident memory, in MB, that forward and backward add to their inputs: results and workspace."""
    return float(output_of(textwrap.dedent(SCRIPT).format(length=length, options=options)))


def output_of(script: str) -> str:
    """What a script prints in a process of its own."""
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, timeout=500, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_forward_and_backward_at_32768():
    """The N x N matrix alone would be 4096 MB."""
    assert added_megabytes(32768) < 200


@pytest.mark.parametrize(
    "options",
    [
        "dict(mask=masks.causal(), dropout_p=0.1)",
        "dict(mask=masks.causal() | masks.global_tokens(torch.tensor([0, 5])))",
        "dict(mask=masks.window(500, 0), bias=ALiBi(torch.full((1,), 0.1, requires_grad=True)))",
    ],
    ids=["dropout", "block", "alibi"],
)
def test_options_do_not_materialise_the_matrix(options: str):
    """The N x N matrix alone would be 256 MB in float32, and a mask of bytes 64 MB."""
    assert added_megabytes(8192, options) < 60


LARGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")

# "hg" among the flags of a mapping: large pages are advised there.
FLAGS = """
    import torch, fastattn

    def is_advised(tensor):
        inside, address = False, tensor.data_ptr() + tensor.nbytes // 2
        for line in open("/proc/self/smaps"):
            key, _, rest = line.partition(" ")
            if not key.endswith(":"):
                first, last = (int(end, 16) for end in key.split("-"))
                inside = first <= address < last
            elif inside and key == "VmFlags:":
                return "hg" in rest.split()

    for batch in (8, 300):  # results of 1 MB, and of 39
        inputs = [torch.randn(batch, 8, 128, 32, requires_grad=True) for _ in range(3)]
        viewed = torch.randn(batch, 128, 8, 32).transpose(1, 2)
        out = fastattn.attention(*inputs, backend="cpu")
        grads = torch.autograd.grad(out, inputs, torch.ones_like(out))
        print(*map(is_advised, (out, *grads, fastattn.attention(viewed, viewed, viewed, backend="cpu"))))
"""


@pytest.mark.skipif(
    not LARGE_PAGES.exists()
    or "[never]" in LARGE_PAGES.read_text()
    or "VmFlags:" not in Path("/proc/self/smaps").read_text(),
    reason="Linux gives no large pages, or does not tell where",
)
def test_large_results_ask_for_large_pages():
    no, yes = " ".join(["False"] * 5), " ".join(["True"] * 5)
    assert output_of(textwrap.dedent(FLAGS)) == f"{no}\n{yes}\n"
