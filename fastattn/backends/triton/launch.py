"""Starting a kernel, and what it would be compiled for."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch

from fastattn.backends.triton.configs import AMD, TileConfig

# Under Triton's interpreter, which knows no architecture: the tiles of this one.
INTERPRETED = 80
INTERPRETED_PROCESSORS = 108  # that one's

Programs = int | tuple[int, int]  # along one axis, or along two


@cache
def architecture(device: torch.device) -> int:
    """The compute capability of a CUDA device, 90 for 9.0; AMD for one of theirs, whose numbers mean another
    thing."""
    if device.type != "cuda":
        return INTERPRETED
    if torch.version.hip is not None:
        return AMD
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@cache
def multiprocessors(device: torch.device) -> int:
    """Of a CUDA device."""
    if device.type != "cuda":
        return INTERPRETED_PROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def tf32_allowed() -> bool:
    """Whether PyTorch may multiply float32 matrices in TF32, by its present switch or by the former one.

    The former, which PyTorch before 2.9 has alone, must not be read once the present one was set.
    """
    matmul = torch.backends.cuda.matmul
    precision = getattr(matmul, "fp32_precision", None)
    return bool(matmul.allow_tf32) if precision is None else precision == "tf32"


def launch(kernel: Any, programs: Programs, config: TileConfig, *args: Any, **constants: Any) -> Any:
    """Run `programs` programs of a kernel; what it was compiled to, None where it was interpreted."""
    return kernel[grid_of(programs)](
        *args,
        **constants,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def grid_of(programs: Programs) -> tuple[int, ...]:
    """A grid as Triton takes it."""
    return programs if isinstance(programs, tuple) else (programs,)


def parameters_of(
    kernel: Any, config: TileConfig, args: Sequence[Any], constants: dict[str, Any]
) -> list[Any]:
    """What each parameter of a kernel is in a launch, in their order."""
    sizes = {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n}
    return [*args, *(sizes.get(name, constants.get(name)) for name in kernel.arg_names[len(args) :])]


def constants_of(kernel: Any, constants: dict[str, Any]) -> dict[str, Any]:
    """Those constants of a call that a kernel takes."""
    return {name: value for name, value in constants.items() if name in kernel.arg_names}
