"""KernelRegression: Nadaraya-Watson regression as a layer, and as an estimator with fit and predict."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from fastattn import leading
from fastattn.call import Call
from fastattn.checks import check_bool, check_int
from fastattn.combine import merge
from fastattn.kernel_regression import KERNELS, kernel_attention, set_kernel
from fastattn.masks import Mask, padding
from fastattn.nn.layer import QueryLayer, as_tensor
from fastattn.validation import check_number

SMOOTH = ("gaussian", "epanechnikov", "triangular")  # whose loss has a slope along the width


class KernelRegression(QueryLayer):
    """y(x) = sum_j K(|x - x_j| / width) y_j / sum_j K(|x - x_j| / width) over the training points j.

    `fit` and `predict` make it an estimator of its own; as a layer it takes queries, keys and values. Without
    `learn_width` nothing is learned: fitting is remembering.

    >>> x = torch.linspace(0, 6, 200)
    >>> model = KernelRegression(learn_width=True).fit(x, torch.sin(x))
    >>> bool((model.predict(x) - torch.sin(x)).abs().max() < 0.15)
    True

    Args:
        kernel: one of "gaussian", "boxcar", "epanechnikov", "triangular", "constant"; see `kernel_attention`.
        width: positive number; None: the rule of thumb s N^(-1 / (D + 4)) of the data given to `fit`, s their
            standard deviation and N their number.
        learn_width: whether the width is a parameter, its logarithm `log_width` being what is learned.
        device, dtype: of `log_width`.
    Raises:
        TypeError, ValueError: naming the argument, the rule and the value got.
    Source: Nadaraya, "On Estimating Regression", 1964; Watson, "Smooth Regression Analysis", 1964.
    """

    x: Tensor | None
    y: Tensor | None
    log_width: Tensor

    def __init__(
        self,
        kernel: str = "gaussian",
        width: float | None = 1.0,
        learn_width: bool = False,
        *,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if kernel not in KERNELS:
            raise ValueError(f"kernel must be one of {', '.join(KERNELS)}, got {kernel!r}")
        if check_bool("learn_width", learn_width) and kernel not in SMOOTH:
            raise ValueError(f"learn_width needs one of the kernels {', '.join(SMOOTH)}, got {kernel!r}")
        if width is not None and check_number("width", width) <= 0:
            raise ValueError(f"width must be positive or None, got {width}")
        self.kernel, self.learn_width, self.needs_width = kernel, learn_width, width is None
        log_width = torch.tensor(math.log(1.0 if width is None else width), device=device, dtype=dtype)
        if learn_width:
            self.log_width = nn.Parameter(log_width)
        else:
            self.register_buffer("log_width", log_width)
        # Beside the state dict, which has no room for what may be absent: see get_extra_state.
        self.register_buffer("x", None, persistent=False)
        self.register_buffer("y", None, persistent=False)

    @property
    def width(self) -> Tensor:
        """The width in force, differentiable where it is learned."""
        return self.log_width.exp()

    def _attend(self, call: Call, lens: Tensor | None, mask: Mask | Tensor | None) -> Tensor:
        dtype = call.q.dtype
        set_kernel(call, self.kernel, self.width)
        return leading.run(self._remember(call)).to(dtype)

    def fit(self, x: Any, y: Any, *, steps: int = 50, lr: float = 0.1, rows: int = 2048) -> KernelRegression:
        """Remember the training points; with learn_width choose the width by the leave-one-out error.

        That is the mean square of y_i - y(x_i) with point i left out, minimised by Adam on log(width).

        Args:
            x: [N] or [N, D], tensor or anything that becomes one.
            y: [N] or [N, C], likewise.
            steps: of Adam; lr: its learning rate.
            rows: how many points are left out in each step, drawn from torch's default generator.
        Returns:
            self.
        Raises:
            TypeError, ValueError: naming the argument, the rule and the value got.
        """
        check_int("steps", steps, 0)
        check_int("rows", rows, 1)
        if check_number("lr", lr) <= 0:
            raise ValueError(f"lr must be positive, got {lr}")
        if (self.learn_width or self.needs_width) and self.log_width.is_inference():
            raise RuntimeError("fit needs a layer whose width may change: make it outside inference_mode")
        # Fitting is learning, whatever it is called within.
        with torch.inference_mode(False), torch.enable_grad():
            self.x, self.y = self._training_points(x, y)
            if self.needs_width:
                with torch.no_grad():
                    self.log_width.copy_(self._rule_of_thumb().log())
            if self.learn_width and len(self.x) > 1:
                optimizer = torch.optim.Adam([self.log_width], lr=lr)
                for _ in range(steps):
                    optimizer.zero_grad()
                    self._loss(rows).backward()
                    optimizer.step()
        return self

    def _training_points(self, x: Any, y: Any) -> tuple[Tensor, Tensor]:
        """x [N, D] and y [N] or [N, C], checked, of one dtype."""
        x, y = self._points("x", x), as_tensor("y", y, self.log_width.device).detach()
        for name, given in (("x", x), ("y", y)):
            if not given.is_meta and not given.isfinite().all():
                bad = int((~given.isfinite()).sum())
                raise ValueError(f"{name} must be finite, got {bad} numbers that are not")
        if len(x) == 0:
            raise ValueError(f"x must have at least one point, got shape {list(x.shape)}")
        if y.dim() not in (1, 2) or len(y) != len(x):
            raise ValueError(f"y must be [{len(x)}] or [{len(x)}, C], got shape {list(y.shape)}")
        y = y.to(x)
        # Autograd keeps no tensor that was made in inference mode.
        return x.clone() if x.is_inference() else x, y.clone() if y.is_inference() else y

    def predict(self, x: Any) -> Tensor:
        """y(x), [M] or [M, C] as the training values are.

        A point that no training point's kernel reaches gets the mean of the training values.

        Args:
            x: [M] or [M, D]; taken in the training points' dtype.
        Raises:
            RuntimeError: before `fit`.
        """
        if self.x is None or self.y is None:
            raise RuntimeError("predict needs training points: call fit(x, y) first")
        points, mean = self._points("x", x).to(self.x.dtype), self.y.mean(0)
        if points.shape[1] != self.x.shape[1]:
            raise ValueError(f"x must have {self.x.shape[1]} features, got {points.shape[1]}")
        values = self.y - mean  # so that 0, the answer of an empty support, stands for the mean
        found = self(points, self.x, values if values.dim() == 2 else values[:, None]).detach()
        return (found if values.dim() == 2 else found[:, 0]) + mean

    def leave_one_out(self, index: Tensor | None = None) -> Tensor:
        """y(x_i) from all training points but i, for the points in `index` [M] (all by default): [M, C].

        Keys before and after i are two ranges, whose results are merged: nothing of size N x N is made.
        Differentiable in the width.
        """
        if self.x is None or self.y is None:
            raise RuntimeError("leave_one_out needs training points: call fit(x, y) first")
        index = torch.arange(len(self.x), device=self.x.device) if index is None else index
        values = self.y - self.y.mean(0)
        values = values if values.dim() == 2 else values[:, None]
        others = (padding(index[None]), padding([len(self.x)], key_starts=index[None] + 1))
        points = (self.x[index][None, None], self.x[None, None], values[None, None])
        outs, lses = zip(
            *(
                kernel_attention(*points, kernel=self.kernel, width=self.width, mask=mask, return_lse=True)
                for mask in others
            ),
            strict=True,
        )
        return merge(outs, lses)[0][0, 0] + self.y.mean(0)

    def _loss(self, rows: int) -> Tensor:
        if self.x is None or self.y is None:
            raise RuntimeError("fit comes first")
        index = None
        if rows < len(self.x):
            index = torch.randperm(len(self.x), device=self.x.device)[:rows].sort().values
        y = self.y if index is None else self.y[index]
        return (self.leave_one_out(index) - y.view(len(y), -1)).square().mean()

    def _rule_of_thumb(self) -> Tensor:
        if self.x is None:
            raise RuntimeError("fit comes first")
        count, features = self.x.shape
        spread = self.x.std(0).square().mean().sqrt() if count > 1 else self.x.new_tensor(0.0)
        width = spread * count ** (-1 / (features + 4))
        return torch.where(width > 0, width, torch.ones_like(width))

    def _points(self, name: str, x: Any) -> Tensor:
        """x as [N, D], floating point, where log_width lies."""
        x = as_tensor(name, x, self.log_width.device)
        x = x if x.is_floating_point() else x.to(self.log_width.dtype)
        if x.dim() not in (1, 2):
            raise ValueError(f"{name} must be [N] or [N, D], got shape {list(x.shape)}")
        return (x if x.dim() == 2 else x[:, None]).detach()

    def get_extra_state(self) -> dict[str, Tensor | None]:
        return {"x": self.x, "y": self.y}

    def set_extra_state(self, state: dict[str, Tensor | None]) -> None:
        device = self.log_width.device
        self.x, self.y = (None if t is None else t.to(device) for t in (state["x"], state["y"]))

    def extra_repr(self) -> str:
        width = "?" if self.log_width.is_meta else f"{self.width.item():.4g}"
        return f"kernel={self.kernel!r}, width={width}, learn_width={self.learn_width}"
