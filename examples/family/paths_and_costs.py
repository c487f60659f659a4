"""What a layer costs, and how far it carries: convolution, recurrence and self-attention.

Prints the table of "Attention Is All You Need" (table 1) beside what is measured here: exponents fitted to
times, the length of the longest chain of operations, and how many layers (or steps) the last output needs to
see the first input.

python examples/family/paths_and_costs.py [FOLDER]
"""

import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from matplotlib import pyplot
from picture import picture_path
from torch import Tensor, nn

import fastattn

KERNEL = 5
Layer = Callable[[Tensor], Tensor]


def convolution(width: int, kernel: int = KERNEL) -> Layer:
    """Each output sees the `kernel` inputs up to its own."""
    conv = nn.Conv1d(width, width, kernel)
    return lambda x: conv(nn.functional.pad(x.mT, (kernel - 1, 0))).mT


def recurrence(width: int) -> Layer:
    """Each state is made of the input and the state before."""
    net = nn.RNN(width, width, batch_first=True)
    return lambda x: net(x)[0]


def attention(width: int) -> Layer:
    """Each output is a weighted sum of all inputs."""
    return lambda x: fastattn.attention(x[None], x[None], x[None])[0]


LAYERS = {"convolution": convolution, "recurrence": recurrence, "self-attention": attention}
PAPER = {
    "convolution": ("O(k n d²)", "1", "n / k"),
    "recurrence": ("O(n d²)", "n", "n"),
    "self-attention": ("O(n² d)", "1", "1"),
}
LENGTHS = [512, 1024, 2048, 4096]
WIDTHS = [128, 256, 512, 1024]


@torch.no_grad()
def milliseconds(layer: Layer, length: int, width: int, batch: int = 1) -> float:
    """The best time of several on one thread, in which other programs' turns do not count."""
    x = torch.randn(batch, length, width)
    layer(x)
    best, end = math.inf, time.thread_time() + 0.2
    while time.thread_time() < end:
        begin = time.thread_time()
        layer(x)
        best = min(best, time.thread_time() - begin)
    return 1000 * best


def exponent(sizes: list[int], times: list[float]) -> float:
    """The slope of log time over log size, by least squares."""
    x, y = (torch.tensor(values, dtype=torch.float64).log() for values in (sizes, times))
    x, y = x - x.mean(), y - y.mean()
    return ((x * y).sum() / (x * x).sum()).item()


def chain(name: str, length: int) -> int:
    """Operations that must follow one another, as autograd recorded them."""
    x = torch.randn(1, length, 4, requires_grad=True)
    if name == "recurrence":  # step by step, as nn.RNN records all steps as one
        cell, state = nn.RNNCell(4, 4), torch.zeros(1, 4)
        for part in x.unbind(1):
            state = cell(part, state)
        out = state
    else:
        out = LAYERS[name](4)(x)
    depth: dict[object, int] = {}
    stack = [(out.grad_fn, False)]
    while stack:
        node, done = stack.pop()
        parents = [parent for parent, _ in node.next_functions if parent is not None]
        if done:
            depth[node] = 1 + max((depth[parent] for parent in parents), default=0)
        elif node not in depth:
            stack.append((node, True))
            stack += [(parent, False) for parent in parents]
    return depth[out.grad_fn]


def path_length(name: str, length: int) -> int:
    """Layers, or recurrent steps, until the last output depends on the first input."""
    x = torch.randn(1, length, 4, requires_grad=True)
    out, count = x, 0
    while True:
        count += 1
        if name == "recurrence":
            out = recurrence(4)(x[:, length - count :])
        else:
            out = LAYERS[name](4)(out)
        (gradient,) = torch.autograd.grad(out[0, -1].sum(), x, retain_graph=True)
        if gradient[0, 0].any():
            return count


def main(path: Path) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    figure, panels = pyplot.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
    print(
        f"{'':<16}{'cost':<11}{'measured':<20}{'steps':<7}{'measured':<16}{'path':<7}measured, k = {KERNEL}"
    )
    for name, build in LAYERS.items():
        by_length = [milliseconds(build(64), n, 64) for n in LENGTHS]
        by_width = [milliseconds(build(d), 256, d, batch=16) for d in WIDTHS]  # wide work, few calls
        label = f"{name}, k = {KERNEL}" if name == "convolution" else name
        panels[0].loglog(LENGTHS, by_length, marker="o", label=label)
        panels[1].loglog(WIDTHS, by_width, marker="o", label=name)
        cost, steps, carries = PAPER[name]
        fitted = f"n^{exponent(LENGTHS, by_length):.2f} d^{exponent(WIDTHS, by_width):.2f}"
        chains = f"{chain(name, 32)}, {chain(name, 64)}"
        paths = f"{path_length(name, 33)}, {path_length(name, 65)}"
        print(f"{name:<16}{cost:<11}{fitted:<20}{steps:<7}{chains:<16}{carries:<7}{paths}", flush=True)
    print("steps: operations in a chain at n = 32, 64; path: layers or recurrent steps at n = 33, 65")

    kernels = [4, 8, 16, 32]
    by_kernel = [milliseconds(convolution(128, k), 1024, 128) for k in kernels]
    print(f"convolution by its kernel: k^{exponent(kernels, by_kernel):.2f}")
    panels[0].set(title="one sequence, d = 64", xlabel="n, tokens", ylabel="ms on one thread")
    panels[1].set(title="16 sequences, n = 256", xlabel="d, features", ylabel="ms on one thread")
    for panel, sizes in zip(panels, (LENGTHS, WIDTHS), strict=True):
        panel.minorticks_off()
        panel.set_xticks(sizes, sizes)
    panels[0].legend()
    figure.savefig(path, dpi=70)
    print(f"drawn: {path.name}")


if __name__ == "__main__":
    main(picture_path("paths_and_costs.png", __doc__))
