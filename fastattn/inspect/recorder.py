"""record: a model's attention calls with their statistics, while it runs."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fastattn import watch
from fastattn.autograd import has_tangent, is_traced
from fastattn.call import Call
from fastattn.checks import check_bool, check_int
from fastattn.inspect.modules import NOT_SEEN, RunningModules, check_patterns, is_match
from fastattn.inspect.positions import Frame, Growth
from fastattn.inspect.recorded import TENSOR_BYTES, Record, RecordedCall
from fastattn.inspect.sequences import sequences
from fastattn.inspect.summary import AttentionSummary, summarize
from fastattn.inspect.tokens import Labels, Tokens
from fastattn.spec import accumulate_dtype
from fastattn.weights import attention_weights

_FULL = "for which max_bytes left no room"
_WATCHED = "made where a transform or a trace looked on"
_NO_PRODUCT = "whose scores are no products of q and k (their layers have attention_weights)"


@contextmanager
def record(
    model: nn.Module | None = None,
    *,
    tokens: Tokens | None = None,
    target_tokens: Tokens | None = None,
    layers: Sequence[str] | str | None = None,
    weights_up_to: int = 512,
    top_k: int = 8,
    pool: int | Sequence[int] | None = 64,
    max_bytes: int = 2**30,
    keep_graph: bool = False,
) -> Iterator[Record]:
    """While it holds, every attention call that runs in the model is summarised into the Record it gives.

    Reached are fastattn's modules and functions, modules that `replace_modules` replaced, and calls under
    `override_sdpa`; a compiled model runs uncompiled meanwhile. Outputs stay as they are but for rounding,
    and the model itself is not changed. It holds in the thread that entered it; blocks nest. Of checkpointed
    layers the forward pass counts, not its repetition in backward; of hard attention the softmax that its
    choice is made by.

    >>> layer = fastattn.nn.MultiheadAttention(8, 2, batch_first=True)
    >>> with record(layer, tokens=["a", "b", "c"]) as rec:
    ...     y, _ = layer(torch.randn(1, 3, 8), mask=fastattn.masks.causal())
    >>> list(rec.weights("").shape), rec.texts("")[1]
    ([2, 3, 3], ['a', 'b', 'c'])

    Args:
        model: whose calls are recorded; None for all calls of the block, under the path "". Then only the
            order of calls tells layers apart, and only the lengths of their keys how far a decoding is.
        tokens: a text for each token, or such a list for each entry of the batch; of packed sequences also
            one list with the texts of all; of the source where target_tokens are given too. Or a mapping of
            module names (globs) to such texts, or to a tuple of those of the queries and those of the keys.
            `Record.attach` takes them later, when they are known.
        target_tokens: of an encoder-decoder: the queries of its cross-attention and all its decoder's own.
        layers: names of modules, paths or globs, whose calls alone are recorded; None for all.
        weights_up_to: the greatest length of which the whole weights are kept; longer calls have summaries.
        top_k, pool: of the summaries, as for `summarize`.
        max_bytes: memory that the record may take, as `Record.nbytes` counts it. Where it is full, weights
            are left out first, then calls; a warning and `Record.missed` say how many.
        keep_graph: keep summaries and weights differentiable, on their device, to make losses of them;
            `max_bytes` does not count what autograd saves for them.
    Raises:
        TypeError, ValueError: naming the argument, the rule and the value got.
        NotImplementedError: keep_graph and a layer that is checkpointed, when it is called.
        RuntimeError: the block is within a function that torch.compile compiles.
    """
    check_int("weights_up_to", weights_up_to, 0)
    check_int("max_bytes", max_bytes, 0)
    check_bool("keep_graph", keep_graph)
    patterns = None if layers is None else [layers] if isinstance(layers, str) else list(layers)
    running = None if model is None else RunningModules(model)
    if patterns is not None:
        check_patterns("layers", patterns, [""] if running is None else running.all_names())
    found = Record(labels=Labels.of(tokens, target_tokens))
    options = {"top_k": top_k, "pool": pool}
    _check_summary_options(options)
    recorder = _Recorder(found, running, patterns, weights_up_to, options, max_bytes, keep_graph)
    with nullcontext() if running is None else running.followed(), watch.watching(recorder):
        yield found
    recorder.warn()


def _check_summary_options(options: dict[str, Any]) -> None:
    """Raise where `summarize` would, before a model has run."""
    nothing = torch.zeros(1, 1, 1, 1)
    summarize(nothing, nothing, **options)


class _Recorder:
    """The observer that fills a record."""

    def __init__(
        self,
        found: Record,
        running: RunningModules | None,
        patterns: list[str] | None,
        weights_up_to: int,
        options: dict[str, Any],
        max_bytes: int,
        keep_graph: bool,
    ) -> None:
        self.record, self.running, self.patterns = found, running, patterns
        self.weights_up_to, self.options = weights_up_to, options
        self.max_bytes, self.keep_graph = max_bytes, keep_graph
        self.growth = Growth()  # of the calls that are followed by no model
        self.nbytes = 0
        self.is_full = False
        self.without_weights = 0

    def change(self, call: Call) -> Call:
        """Records change nothing."""
        return call

    def note(self, call: Call, lse: Tensor | None) -> None:
        running = self.running
        path = "" if running is None else running.path()
        if path is None or not self._is_wanted(path):
            return
        if torch._C._current_graph_task_id() != -1:  # in backward: a checkpoint repeats what was recorded
            return
        transforms = torch._C._are_functorch_transforms_active()
        if transforms or is_traced(call.q, call.k) or has_tangent(call.q, call.k):
            self.record.missed[_WATCHED] += 1
            return
        if call.score != "dot":
            self.record.missed[_NO_PRODUCT] += 1
            return
        if self.keep_graph and torch.is_grad_enabled() and _is_checkpointed():
            raise NotImplementedError(
                f"keep_graph must be False where layers are checkpointed, got a call in {path!r}: their pass "
                "is repeated in backward, where summaries are not made again; switch checkpointing "
                "off, or leave them out by layers="
            )
        at = self.growth.position(Frame("", None), call) if running is None else running.position(call)
        with torch.set_grad_enabled(self.keep_graph and torch.is_grad_enabled()):
            for part in sequences(call, lse):
                first = at.first_query if part.first_query is None else part.first_query
                self._add(path, part.call, part.lse, first, part.number)

    def warn(self) -> None:
        """Say what is not in the record."""
        if not self.record.calls and not self.record.missed:
            warnings.warn(
                f"record found no attention call: none of fastattn's ran in the model ({NOT_SEEN})",
                stacklevel=4,
            )
        for reason, count in self.record.missed.items():
            warnings.warn(f"record lacks {count} attention calls, {reason}", stacklevel=4)
        if self.without_weights:
            warnings.warn(
                f"record has only summaries of {self.without_weights} calls, {_FULL} for their weights",
                stacklevel=4,
            )

    def _is_wanted(self, path: str) -> bool:
        if self.patterns is None:
            return True
        matches = is_match if self.running is None else self.running.is_match
        return any(matches(path, pattern) for pattern in self.patterns)

    def _add(self, path: str, call: Call, lse: Tensor | None, first_query: int, number: int | None) -> None:
        if self.is_full:
            self.record.missed[_FULL] += 1
            return
        arguments = {name: getattr(call, name) for name in ("mask", "bias", "scale", "softcap", "sinks")}
        summary = summarize(call.q, call.k, lse=lse, **arguments, **self.options)
        if not self.keep_graph:
            summary = _on_cpu(summary)
        added = RecordedCall(path, summary, None, first_query, number)
        if self.nbytes + added.nbytes > self.max_bytes:
            self.is_full = True  # also for later calls that are smaller: what there is has no holes
            self.record.missed[_FULL] += 1
            return
        self.nbytes += added.nbytes
        if max(call.seqlens()) <= self.weights_up_to:
            batch, heads, seqlen_q, seqlen_k = added.shape
            item = accumulate_dtype(call.q.dtype).itemsize
            size = TENSOR_BYTES + batch * heads * seqlen_q * seqlen_k * item
            if self.nbytes + size <= self.max_bytes:
                weights = attention_weights(call.q, call.k, **arguments)
                added = replace(added, weights=weights if self.keep_graph else weights.detach().cpu())
                self.nbytes += size
            else:
                self.without_weights += 1
        self.record.calls.append(added)


def _is_checkpointed() -> bool:
    """Whether torch.utils.checkpoint keeps what is saved for backward now, to compute it again."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks is not None and hooks[0].__module__ == "torch.utils.checkpoint"


def _on_cpu(summary: AttentionSummary) -> AttentionSummary:
    cut = summary.detach()
    tensors: dict[str, Any] = {name: tensor.cpu() for name, tensor in cut.tensors().items()}
    return replace(cut, **tensors)
