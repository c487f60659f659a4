"""Nadaraya-Watson regression: every kernel on a curve, a learned width, digits, a hundred thousand points.

python examples/family/kernel_regression.py [FOLDER]
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from matplotlib import pyplot
from picture import picture_path
from sklearn.datasets import load_digits
from torch import Tensor

import fastattn
from fastattn.kernel_regression import KERNELS
from fastattn.nn import KernelRegression


def truth(x: Tensor) -> Tensor:
    return 2 * torch.sin(x) + x**0.8


def fit_curve(points: int = 200) -> dict[str, tuple[Tensor, Tensor, Tensor, KernelRegression]]:
    """By kernel: training points, their noisy values, the estimate on a grid, and the model."""
    x = torch.rand(points).sort().values * 5
    y = truth(x) + 0.5 * torch.randn(points)
    grid = torch.linspace(0, 5, 400)
    print(f"y = 2 sin(x) + x^0.8 + noise of 0.5, {points} points; root mean square error against the truth")
    found = {}
    for kernel in KERNELS:
        learns = kernel not in ("boxcar", "constant")  # whose loss is flat along the width
        model = KernelRegression(kernel, width=0.5, learn_width=learns).fit(x, y)
        estimate = model.predict(grid)
        error = (estimate - truth(grid)).square().mean().sqrt().item()
        how = f"learned width {model.width.item():.2f}" if learns else f"width {model.width.item():.2f}"
        print(f"  {kernel:<13}{error:6.3f}   {how}")
        found[kernel] = x, y, estimate, model
    return found


def draw(curves: dict[str, tuple[Tensor, Tensor, Tensor, KernelRegression]], path: Path) -> None:
    """Above, each estimate; below, the weights behind it, a row for every query."""
    figure, grid = pyplot.subplots(2, len(curves), figsize=(14, 5.2), layout="constrained")
    at = torch.linspace(0, 5, 400)
    for n, (kernel, (x, y, estimate, model)) in enumerate(curves.items()):
        axes = grid[0, n]
        axes.plot(x, y, ".", color="0.7", markersize=4, label="data")
        axes.plot(at, truth(at), "--", color="tab:blue", linewidth=1, label="truth")
        axes.plot(at, estimate, color="tab:red", label="estimate")
        axes.set_title(f"{kernel}, width {model.width.item():.2f}", fontsize=10)
        axes.set_xlabel("x")
        model.predict(x)
        weights = model.attention_weights
        image = grid[1, n].imshow(weights, cmap="Reds", aspect="auto", vmin=0, vmax=0.15)
        grid[1, n].set_xlabel("training point, in order of x")
    grid[0, 0].legend(fontsize=8)
    grid[0, 0].set_ylabel("y")
    grid[1, 0].set_ylabel("query, in order of x")
    figure.colorbar(image, ax=grid[1], label="weight", extend="max")
    figure.savefig(path, dpi=70)


def classify_digits() -> None:
    """Regression on one column for each of the ten digits; the largest is the answer."""
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32) / 16
    y = torch.tensor(labels)
    order = torch.randperm(len(x))
    train, test = order[:1437], order[1437:]
    model = KernelRegression(width=None, learn_width=True)
    started = time.perf_counter()
    model.fit(x[train], torch.nn.functional.one_hot(y[train], 10), steps=25, lr=0.2, rows=500)
    took = time.perf_counter() - started
    hits = (model.predict(x[test]).argmax(-1) == y[test]).float().mean().item()
    print(f"digits: {len(train)} images to learn from, {len(test)} to tell: {hits:.1%} right,", end=" ")
    print(f"width {model.width.item():.2f} learned in {took:.1f} s")


def dense(q: Tensor, k: Tensor, v: Tensor, width: float) -> Tensor:
    squared = ((q[:, None] - k[None]) / width).square().sum(-1)
    return torch.softmax(-squared / 2, -1) @ v


def best_time(function: Callable[..., Tensor], *arguments: Any, rounds: int = 3, **keywords: Any) -> float:
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        function(*arguments, **keywords)
        times.append(time.perf_counter() - started)
    return min(times) * 1e3


def compare_with_dense() -> None:
    """Error against float64 and time, beside eager code with the whole matrix."""
    print("against a dense computation, gaussian: error of ours and of eager float32, and times in ms")
    for points, features, width in ((2000, 1, 0.02), (1000, 64, 1.0)):
        k, v = torch.rand(points, features), torch.randn(points, 8)
        q = k + 0.1 * width * torch.randn_like(k)
        exact = dense(q.double(), k.double(), v.double(), width)
        ours, eager = fastattn.kernel_attention(q, k, v, width=width), dense(q, k, v, width)
        errors = [(got - exact).abs().max().item() for got in (ours, eager)]
        times = [
            best_time(fastattn.kernel_attention, q, k, v, width=width),
            best_time(dense, q, k, v, width),
        ]
        print(f"  {points} x {points} points of {features:>2} features:", end=" ")
        print(f"{errors[0]:.0e} and {errors[1]:.0e}, {times[0]:.0f} and {times[1]:.0f}")


def many_points(points: int = 100_000, queries: int = 1000) -> None:
    """The matrix of weights would have `points` columns; no more is kept of it than a strip."""
    x = torch.rand(points) * 5
    model = KernelRegression("epanechnikov", width=0.05).fit(x, truth(x) + 0.5 * torch.randn(points))
    grid = torch.linspace(0.1, 4.9, queries)
    started = time.perf_counter()
    estimate = model.predict(grid)
    took = time.perf_counter() - started
    error = (estimate - truth(grid)).square().mean().sqrt().item()
    print(f"{points} points, {queries} queries: {took:.2f} s, root mean square error {error:.3f}")


def main(path: Path) -> None:
    torch.manual_seed(0)
    curves = fit_curve()
    classify_digits()
    compare_with_dense()
    many_points()
    draw(curves, path)
    print(f"drawn: {path.name}")


if __name__ == "__main__":
    main(picture_path("kernel_regression.png", __doc__))
