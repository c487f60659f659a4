"""The Triton kernels for scores and summaries compile for devices that are not here."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from triton_support import needs_triton

pytestmark = needs_triton


def compiled(*arguments: str) -> str:
    """What the command line prints; it fails where a kernel does not compile or wants too much memory."""
    command = [sys.executable, "-m", "fastattn.backends.triton.compile", *arguments]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    return done.stdout


def test_a_sample_for_hopper():
    shown = compiled(
        "--arch", "90", "--variant", "additive", "summary", "--dtype", "bfloat16", "--head-dim", "64"
    )
    kernels = {line.split()[1]: line for line in shown.splitlines()}
    assert {"pair_fwd", "pair_bwd_rows", "pair_bwd_dq", "pair_bwd_dkdv"} <= set(kernels)
    for name in ("summary_fwd", "summary_cells", "summary_bwd_rows", "summary_bwd_dq", "summary_bwd_dk"):
        assert "wgmma.mma_async" in kernels[name]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("arch", ["80", "90", "120"])
def test_every_kernel_for_every_architecture(arch, dtype):
    variants = ("additive", "triangular", "summary", "summary, blocks")
    shown = compiled(
        "--arch", arch, "--dtype", dtype, "--head-dim", "32", "128", "256", "--variant", *variants
    )
    assert len(shown.splitlines()) == 3 * (4 + 4 + 6 + 6)
