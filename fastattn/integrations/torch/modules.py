"""`replace_modules`: every nn.MultiheadAttention of a model becomes fastattn's, in place."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType, TracebackType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fastattn.integrations.torch.stand_ins import has_own_behaviour, missing_kernels
from fastattn.nn import MultiheadAttention
from fastattn.spec import FLOAT_DTYPES, AttentionSpec, dtype_name

_lock = threading.Lock()  # two threads may be given one model, or two that share modules
_replaced_by: WeakKeyDictionary[nn.Module, object] = WeakKeyDictionary()  # the key of its Replacement


@dataclass(frozen=True)
class Replacement:
    """What `replace_modules` did; as a context manager it undoes it at the end of the block.

    Attributes:
        replaced: names of the modules that are fastattn's now, in the model's order; "" is the model itself.
            A module that has two names is there with both.
        left: names of the modules that are as they were, each with the reason.
    """

    replaced: tuple[str, ...]
    left: Mapping[str, str]
    _modules: tuple[nn.Module, ...] = field(repr=False, compare=False)
    _key: object = field(repr=False, compare=False)

    def undo(self) -> None:
        """Make the modules torch's again, with the weights they have now; a second time nothing happens.

        Reports of one model may be undone in any order. Copies made in between stay as they are.
        """
        with _lock:
            for module in self._modules:
                if _replaced_by.get(module) is not self._key:
                    continue
                if type(module) is not MultiheadAttention:
                    warnings.warn(
                        f"a module that fastattn replaced has become a {type(module).__qualname__} since and "
                        "is left so: undo that change first, then call undo() again",
                        stacklevel=2,
                    )
                    continue
                module.__class__ = nn.MultiheadAttention  # type: ignore[assignment]
                del module.num_kv_heads, _replaced_by[module]

    def __enter__(self) -> Replacement:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()

    def __str__(self) -> str:
        lines = [f"replaced {len(self.replaced)}, left {len(self.left)} as they were"]
        lines += [f"  {name or '(the model itself)'}" for name in self.replaced]
        lines += [f"  {name or '(the model itself)'}: left, {reason}" for name, reason in self.left.items()]
        return "\n".join(lines)


def replace_modules(model: nn.Module) -> Replacement:
    """Make every nn.MultiheadAttention in `model`, itself included, a fastattn.nn.MultiheadAttention.

    >>> encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2)
    >>> print(replace_modules(encoder))
    replaced 2, left 0 as they were
      layers.0.self_attn
      layers.1.self_attn

    The objects stay, only their class changes: parameters (optimizers go on), hooks, training flags, device
    and dtype, names in the state dict, and every reference to a module are what they were. The layers of
    nn.Transformer then run our kernels in training and in eval, where they would otherwise take fast paths
    of PyTorch's own. Results differ as said in fastattn.nn.MultiheadAttention.

    Args:
        model: changed in place, for all threads.
    Returns:
        The report, whose undo() makes it torch's again; `with replace_modules(model):` does so by itself.
    Raises:
        TypeError: `model` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    replaced, left, modules, key = [], {}, [], object()
    with _lock:
        found = list(_candidates(model))
        reasons = {id(module): _why_not(module) for _, module in found}
        for name, module in found:
            reason = reasons[id(module)]
            if reason is not None:
                left[name] = reason
                continue
            replaced.append(name)
            if type(module) is nn.MultiheadAttention:  # not yet met by another name
                module.num_kv_heads = module.num_heads
                module.__class__ = MultiheadAttention
                _replaced_by[module] = key
                modules.append(module)
    return Replacement(tuple(replaced), MappingProxyType(left), tuple(modules), key)


def _candidates(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Each attention module by each of its names."""
    if _is_attention(model):
        yield "", model
    for prefix, parent in model.named_modules():
        for name, child in parent._modules.items():
            if child is not None and _is_attention(child):
                yield (f"{prefix}.{name}" if prefix else name), child


def _is_attention(module: nn.Module) -> bool:
    if isinstance(module, torch.jit.ScriptModule):
        return getattr(module, "original_name", None) == nn.MultiheadAttention.__name__
    return isinstance(module, nn.MultiheadAttention)


def _why_not(module: Any) -> str | None:
    """Why a module keeps its class; None where ours does all that it does."""
    kind = type(module)
    if isinstance(module, torch.jit.ScriptModule):
        return "it is compiled by TorchScript"
    if kind is MultiheadAttention:
        return "it is fastattn's already"
    if parametrize.is_parametrized(module):
        return f"its {' and '.join(module.parametrizations)} is parametrized"
    if kind is not nn.MultiheadAttention:
        return f"it is a {kind.__module__}.{kind.__qualname__}, which may do more than its base class"
    if "forward" in vars(module):
        return "its forward was replaced"
    # As PyTorch's module does, ours reads what its output layer holds, an adapter's too, and never calls it.
    if not isinstance(getattr(module.out_proj, "weight", None), Tensor):
        return f"its out_proj is a {type(module.out_proj).__qualname__}, which has no weight to read"
    for name, parameter in module.named_parameters():
        if has_own_behaviour(type(parameter)):
            return f"its {name} is a {type(parameter).__qualname__}, which has a behaviour of its own"
        if parameter.dtype not in FLOAT_DTYPES:
            return f"its {name} has dtype {dtype_name(parameter.dtype)}"
    return _missing_kernels(module)


def _missing_kernels(module: nn.MultiheadAttention) -> str | None:
    """None where a backend has kernels for the module; on the meta device that is not yet known."""
    weight = module.out_proj.weight
    if weight.is_meta:
        return None
    spec = AttentionSpec(
        op="attention",
        batch=1,
        num_heads=module.num_heads,
        num_heads_kv=module.num_heads,
        seqlen_q=1,
        seqlen_k=1,
        head_dim=module.head_dim,
        head_dim_v=module.head_dim,
        dtype=dtype_name(weight.dtype),
        device=weight.device.type,
        scale=1.0,
        dropout_p=module.dropout,
        needs_grad=True,
    )
    return missing_kernels(spec)
