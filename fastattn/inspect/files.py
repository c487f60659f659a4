"""Records in files: one safetensors file, with JSON in its header and checksums of it and of every tensor."""

from __future__ import annotations

import importlib.util
import json
import zlib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastattn.inspect.recorded import Record, RecordedCall
from fastattn.inspect.summary import AttentionSummary
from fastattn.inspect.tokens import Labels
from fastattn.weight_statistics import POOL_MODES

_KEY, _VERSION = "fastattn.inspect.Record", 2
_REQUIRED = ("entropy", "max_weight", "max_index", "received", "distance", "lse")


def save(record: Record, path: Path) -> None:
    """See `Record.save`."""
    _need_safetensors()
    if path.is_dir():
        raise IsADirectoryError(f"{path} must be the name of a file, got a folder")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path} must be in a folder that exists, got none named {path.parent}")
    tensors: dict[str, Tensor] = {}
    calls = []
    for n, call in enumerate(record.calls):
        named = call.summary.tensors()
        if call.weights is not None:
            named["weights"] = call.weights
        # Copies, for safetensors takes no views of one memory.
        mine = {f"{n}.{name}": tensor.detach().cpu().clone().contiguous() for name, tensor in named.items()}
        tensors |= mine
        calls.append(
            {
                "path": call.path,
                "first_query": call.first_query,
                "sequence": call.sequence,
                "pool_mode": call.summary.pool_mode,
                "checksums": {name.partition(".")[2]: _checksum(tensor) for name, tensor in mine.items()},
            }
        )
    facts = {
        "version": _VERSION,
        "calls": calls,
        "missed": dict(record.missed),
        "labels": record.labels.by_pattern,
    }
    facts["checksum"] = _header_checksum(facts, tensors)
    _write(path, tensors, json.dumps(facts, ensure_ascii=False))


def _write(path: Path, tensors: dict[str, Tensor], facts: str) -> None:
    """The file at once, or none of it."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    partial = path.with_name(path.name + ".partial")
    try:
        partial.touch()
        mode = partial.stat().st_mode  # as the umask wants it, which safetensors does not ask
        save_file(tensors, partial, {_KEY: facts})
        partial.chmod(mode)
        partial.replace(path)
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}") from None
    finally:
        partial.unlink(missing_ok=True)


def load(path: Path) -> Record:
    """See `Record.load`."""
    _need_safetensors()
    from safetensors import SafetensorError, safe_open

    if not path.is_file():  # safetensors says of a folder that it has no such device
        raise FileNotFoundError(f"{path} must be a file that Record.save wrote, got none")
    try:
        with safe_open(path, "pt") as file:
            facts = _facts(path, file.metadata())
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged, or no record: {error}") from None
    if facts.pop("checksum", None) != _header_checksum(facts, tensors):
        raise ValueError(f"{path} is damaged: its header is not the one saved")
    record = Record(missed=Counter(_missed(path, facts)))
    for n, about in enumerate(_field(path, facts, "calls", list)):
        record.calls.append(_call(path, n, about, tensors))
    record.labels = _labels(path, facts)
    return record


def _missed(path: Path, facts: dict[str, Any]) -> dict[str, int]:
    missed: dict[str, int] = _field(path, facts, "missed", dict)
    if not all(type(count) is int and count >= 0 for count in missed.values()):
        raise ValueError(f"{path} is damaged: 'missed' must hold numbers of calls, got {missed!r}"[:300])
    return missed


def _labels(path: Path, facts: dict[str, Any]) -> Labels:
    found: list[tuple[str, list[list[str]], list[list[str]]]] = []
    for item in _field(path, facts, "labels", list):
        if not (isinstance(item, list) and len(item) == 3 and isinstance(item[0], str)):
            break
        if not all(_is_texts(lists) for lists in item[1:]):
            break
        found.append((item[0], item[1], item[2]))
    else:
        return Labels(tuple(found))
    raise ValueError(f"{path} is damaged: its labels are not as Record.save writes them")


def _is_texts(lists: Any) -> bool:
    """Whether these are lists of texts, one at least."""
    return (
        isinstance(lists, list)
        and len(lists) > 0
        and all(isinstance(row, list) and all(isinstance(text, str) for text in row) for row in lists)
    )


def _need_safetensors() -> None:
    if importlib.util.find_spec("safetensors") is None:
        raise ModuleNotFoundError(
            "records in files need safetensors: pip install 'fastattn[viz]'", name="safetensors"
        )


def _facts(path: Path, metadata: Mapping[str, str] | None) -> dict[str, Any]:
    """The JSON of the header."""
    if not metadata or _KEY not in metadata:
        raise ValueError(f"{path} must be a file that Record.save wrote, got other tensors")
    try:
        facts = json.loads(metadata[_KEY])
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is damaged: its JSON does not parse ({error})") from None
    version = facts.get("version") if isinstance(facts, dict) else None
    if version != _VERSION:
        raise ValueError(f"{path} must be of version {_VERSION}, got {version!r}: another fastattn wrote it")
    return facts


def _field(path: Path, facts: Any, name: str, kind: type) -> Any:
    """A field of the JSON, of its kind."""
    value = facts.get(name) if isinstance(facts, dict) else None
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ValueError(f"{path} is damaged: {name!r} must be of type {kind.__name__}, got {value!r}"[:300])
    return value


def _call(path: Path, n: int, about: Any, tensors: dict[str, Tensor]) -> RecordedCall:
    """Call number n, checked."""
    checksums = _field(path, about, "checksums", dict)
    found: dict[str, Any] = {}
    for name in dict.fromkeys((*_REQUIRED, *checksums)):
        if name not in checksums or f"{n}.{name}" not in tensors:
            raise ValueError(f"{path} is damaged: call {n} lacks its {name}")
        found[name] = tensors[f"{n}.{name}"]
        if _checksum(found[name]) != checksums[name]:
            raise ValueError(f"{path} is damaged: the numbers of call {n}'s {name} are not those saved")
    _check_shapes(path, n, found)
    weights = found.pop("weights", None)
    try:
        summary = AttentionSummary(**found, pool_mode=_field(path, about, "pool_mode", str))
    except TypeError:
        raise ValueError(f"{path} is damaged: call {n} has unknown tensors {sorted(found)}") from None
    sequence = None if about.get("sequence") is None else _field(path, about, "sequence", int)
    first_query = _field(path, about, "first_query", int)
    if first_query < 0 or (sequence is not None and sequence < 0):
        raise ValueError(
            f"{path} is damaged: call {n}'s positions must be >= 0, got {first_query} and {sequence}"
        )
    if summary.pool_mode not in POOL_MODES:
        raise ValueError(f"{path} is damaged: call {n} has the unknown pool_mode {summary.pool_mode!r}")
    return RecordedCall(_field(path, about, "path", str), summary, weights, first_query, sequence)


def _check_shapes(path: Path, n: int, found: dict[str, Tensor]) -> None:
    shape, keys = list(found["entropy"].shape), list(found["received"].shape[2:])
    for name, tensor in found.items():
        want = shape[:2] if name in ("received", "pooled") else shape
        if len(shape) != 3 or len(keys) != 1 or list(tensor.shape[: len(want)]) != want:
            raise ValueError(f"{path} is damaged: call {n}'s {name} has shape {list(tensor.shape)}")


def _header_checksum(facts: dict[str, Any], tensors: dict[str, Tensor]) -> int:
    """CRC-32 of the JSON, and of what safetensors says of each tensor beside its numbers."""
    kinds = {name: [str(tensor.dtype), list(tensor.shape)] for name, tensor in tensors.items()}
    return zlib.crc32(json.dumps([facts, kinds], sort_keys=True).encode())


def _checksum(tensor: Tensor) -> int:
    """CRC-32 of the numbers as they lie in memory."""
    numbers: Any = tensor.contiguous().flatten().view(torch.uint8).numpy()
    return zlib.crc32(numbers)
