"""Record: what a model attended to, call by call."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from fastattn.inspect.summary import AttentionSummary
from fastattn.inspect.tokens import Labels, Tokens

TENSOR_BYTES = 600  # of a recorded tensor beside its numbers: objects, headers, what malloc rounds up


@dataclass(frozen=True, eq=False, repr=False)
class RecordedCall:
    """One attention call.

    Attributes:
        path: of the module that made it, as in `model.named_modules()`; "" is the model itself.
        summary: the statistics, [B, Hq, ...]; without q and k unless the graph was kept.
        weights: [B, Hq, Lq, Lk], those before dropout; None where a length is above `weights_up_to`.
        first_query: position in the sequence of the call's first query: in decoding with a cache the number
            of tokens before this step, else 0.
        sequence: which sequence of a packed batch, or entry of a cache, B being 1 then; None: all of them.
    """

    path: str
    summary: AttentionSummary
    weights: Tensor | None = None
    first_query: int = 0
    sequence: int | None = None

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, Hq, Lq, Lk)."""
        batch, heads, seqlen_q = self.summary.entropy.shape
        return batch, heads, seqlen_q, self.summary.received.shape[2]

    @property
    def nbytes(self) -> int:
        """Memory that it takes: numbers, and about half a kilobyte for each tensor that holds them."""
        tensors = [*self.summary.tensors().values(), *([] if self.weights is None else [self.weights])]
        return sum(TENSOR_BYTES + tensor.numel() * tensor.element_size() for tensor in tensors)

    def __repr__(self) -> str:
        batch, heads, seqlen_q, seqlen_k = self.shape
        parts = [f"{batch} x {heads} heads", f"queries {self.first_query}..{self.first_query + seqlen_q - 1}"]
        parts += [f"{seqlen_k} keys", "with weights" if self.weights is not None else "summary only"]
        if self.sequence is not None:
            parts.append(f"sequence {self.sequence}")
        return f"RecordedCall({self.path!r}, {', '.join(parts)})"


@dataclass(repr=False)
class Record:
    """The attention calls of a model in the order they were made.

    A path's calls make up runs: one for each forward pass, and one for all steps of a decoding with caches,
    whose queries go on where those of the step before ended. Of layers that share one path (a module that
    stands in several places; all modules of a record without a model) each has runs of its own, told apart
    by the order of their calls. Print it for a table.

    Attributes:
        calls: all of them.
        missed: how many calls were not recorded, by reason.
        labels: the tokens, see `attach`.
    """

    calls: list[RecordedCall] = field(default_factory=list)
    missed: Counter[str] = field(default_factory=Counter)
    labels: Labels = field(default_factory=Labels)

    def __len__(self) -> int:
        return len(self.calls)

    def __iter__(self) -> Iterator[RecordedCall]:
        return iter(self.calls)

    def __getitem__(self, path: str) -> list[RecordedCall]:
        """The calls of one module.

        Raises:
            KeyError: it made none; the message has the paths that did.
        """
        found = [call for call in self.calls if call.path == path]
        if not found:
            raise KeyError(f"no call of {path!r} was recorded, only of {', '.join(map(repr, self.paths))}")
        return found

    @property
    def paths(self) -> list[str]:
        """The modules that made calls, in the order of their first."""
        return list(dict.fromkeys(call.path for call in self.calls))

    @property
    def nbytes(self) -> int:
        """Memory of all calls."""
        return sum(call.nbytes for call in self.calls)

    def runs(self, path: str) -> list[list[RecordedCall]]:
        """The calls of one module, those of one pass or decoding together; in the order of their first."""
        runs = [run for mine in self._runs_by_sequence(path).values() for run in mine]
        return [[call for _, call in run] for run in sorted(runs, key=lambda run: run[0][0])]

    def _runs_by_sequence(self, path: str) -> dict[int | None, list[list[Numbered]]]:
        sequences: dict[int | None, list[Numbered]] = {}
        for place, call in enumerate(self[path]):
            sequences.setdefault(call.sequence, []).append((place, call))
        return {number: _runs(calls) for number, calls in sequences.items()}

    def weights(self, path: str, *, run: int = 0, batch: int = 0) -> Tensor:
        """The weights of one run as one matrix for each head.

        Args:
            path: a module.
            run: which of its runs.
            batch: which entry of the batch.
        Returns:
            [Hq, queries, keys]; keys that a step had not seen yet have weight 0.
        Raises:
            ValueError: calls too long to have their weights recorded; a batch whose size changes between
                steps.
            KeyError, IndexError: no such path, run or entry.
        """
        parts = []
        for call in self.calls_of(path, run, batch):
            if call.weights is None:
                raise ValueError(
                    f"weights of {path!r} are not in the record, since its calls are longer than "
                    "weights_up_to or the record was full: use the summaries, or record again with more"
                )
            parts.append(call.weights[batch])
        width = max(part.shape[2] for part in parts)
        return torch.cat([torch.nn.functional.pad(part, (0, width - part.shape[2])) for part in parts], 1)

    def received(self, path: str, *, run: int = 0, batch: int = 0) -> Tensor:
        """[Hq, keys]: the weight that each key gets from all queries of a run; arguments as of `weights`."""
        parts = [call.summary.received[batch] for call in self.calls_of(path, run, batch)]
        width = max(part.shape[1] for part in parts)
        padded = [torch.nn.functional.pad(part, (0, width - part.shape[1])) for part in parts]
        return torch.stack(padded).sum(0)

    def entropy(self, path: str) -> Tensor:
        """[Hq]: the mean entropy of a module's rows in nats, over all its calls; rows without a visible key
        do not count. Differentiable where the graph was kept."""
        calls = self[path]
        # [Hq, rows of all calls and batch entries]
        entropies = torch.cat([call.summary.entropy.transpose(0, 1).flatten(1) for call in calls], 1)
        seen = torch.cat([(call.summary.max_index >= 0).transpose(0, 1).flatten(1) for call in calls], 1)
        return (entropies * seen).sum(1) / seen.sum(1).clamp(min=1)

    def attach(self, tokens: Tokens, target_tokens: Tokens | None = None) -> None:
        """Give the tokens their texts, as `record` does with the same arguments.

        Raises:
            TypeError: tokens that are no strings.
        """
        self.labels = Labels.of(tokens, target_tokens)

    def texts(self, path: str, *, run: int = 0, batch: int = 0) -> tuple[list[str], list[str]]:
        """The texts of a run's queries and keys; positions where no tokens are attached.

        Of packed or cached sequences one list may hold the texts of all of them, one after the other, each as
        long as its run is in the end.

        Raises:
            ValueError: fewer tokens are attached than the run has; one list for packed sequences that is
                longer than each of them and not as long as all together.
        """
        calls = self.calls_of(path, run, batch)
        first = calls[0]
        if first.sequence is None:
            return self.labels.texts(path, batch, first.first_query, {batch: _lengths(calls)})
        return self.labels.texts(path, first.sequence, first.first_query, self._packed_lengths(path, first))

    def _packed_lengths(self, path: str, first: RecordedCall) -> dict[int, tuple[int, int]]:
        """Queries and keys of each sequence in the pass or decoding of which `first` begins one's."""
        by_sequence = self._runs_by_sequence(path)
        turn = [run[0][1] is first for run in by_sequence[first.sequence]].index(True)
        return {
            number: _lengths([call for _, call in runs[turn]])
            for number, runs in by_sequence.items()
            if number is not None and turn < len(runs)
        }

    def save(self, path: str | Path) -> None:
        """Write the record to one file: tensors as safetensors, everything else as JSON in its header.

        Raises:
            OSError: its folder does not exist, or it cannot be written; nothing is left behind.
            ModuleNotFoundError: safetensors is not installed.
        """
        from fastattn.inspect.files import save

        save(self, Path(path))

    @staticmethod
    def load(path: str | Path) -> Record:
        """The record that `save` wrote.

        Raises:
            ValueError: the file is damaged or no record; the message has its name and what is wrong.
            OSError: it cannot be read.
            ModuleNotFoundError: safetensors is not installed.
        """
        from fastattn.inspect.files import load

        return load(Path(path))

    def __repr__(self) -> str:
        return f"Record({len(self.calls)} calls of {len(self.paths)} modules, {self.nbytes / 2**20:.1f} MiB)"

    def __str__(self) -> str:
        """A line for each module: its calls, lengths, and mean entropy by head."""
        lines = [repr(self)]
        width = max((len(path or "(model)") for path in self.paths), default=0)
        for path in self.paths:
            calls = self[path]
            queries, keys = sum(call.shape[2] for call in calls), max(call.shape[3] for call in calls)
            entropies = " ".join(f"{value:.2f}" for value in self.entropy(path).tolist())
            counts = f"{len(calls)} call{'s' if len(calls) > 1 else ''}, {queries} queries, up to {keys} keys"
            lines.append(f"  {path or '(model)':<{width}}  {counts}; entropy by head: {entropies} nats")
        lines += [f"  not recorded: {count} calls, {reason}" for reason, count in self.missed.items()]
        return "\n".join(lines)

    def calls_of(self, path: str, run: int = 0, batch: int = 0) -> Sequence[RecordedCall]:
        """The calls of one run, in each of which that batch entry is the same sentence.

        Raises: as `weights`.
        """
        runs = self.runs(path)
        if not -len(runs) <= run < len(runs):
            raise IndexError(f"run must be less than the {len(runs)} runs of {path!r}, got {run}")
        calls = runs[run]
        sizes = sorted({call.shape[0] for call in calls})
        if len(sizes) > 1:
            raise ValueError(
                f"calls of {path!r} must have one batch size to be put together, got {sizes}: sentences that "
                "are finished leave a batch, so record the decoding of one at a time"
            )
        if not 0 <= batch < sizes[0]:
            hint = ""
            if calls[0].sequence is not None:
                hint = ": of packed or cached batches each sequence is a run of its own, chosen by run"
            raise IndexError(f"batch must be from 0 to {sizes[0] - 1}, got {batch}{hint}")
        return calls


Numbered = tuple[int, RecordedCall]  # with its place in the record


def _runs(calls: list[Numbered]) -> list[list[Numbered]]:
    """The runs of one sequence.

    Calls at the same positions one after another are those of layers that share a path. The n-th of them goes
    on with the n-th of those whose positions end where theirs begin; where they are fewer than those, which
    had a pass of their own among them then, with the last ones.
    """
    found: list[list[Numbered]] = []
    before: list[list[Numbered]] = []
    for (first, _), group in itertools.groupby(calls, lambda each: _queries(each[1])):
        layers = list(group)
        goes_on = first > 0 and bool(before) and sum(_queries(before[0][-1][1])) == first
        kept = before[max(0, len(before) - len(layers)) :] if goes_on else []
        new: list[list[Numbered]] = [[] for _ in layers[len(kept) :]]
        found += new
        before = kept + new
        for run, each in zip(before, layers, strict=True):
            run.append(each)
    return found


def _lengths(calls: Sequence[RecordedCall]) -> tuple[int, int]:
    """The position behind a run's last query, and how many keys it has seen."""
    return sum(_queries(calls[-1])), max(call.shape[3] for call in calls)


def _queries(call: RecordedCall) -> tuple[int, int]:
    """Position of the first query, and how many there are."""
    return call.first_query, call.shape[2]
