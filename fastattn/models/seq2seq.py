"""Recurrent encoder-decoders: the two without attention, and Bahdanau's, which attention was invented for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from fastattn.additive import additive_attention
from fastattn.call import Call
from fastattn.checks import check_bool, check_int
from fastattn.masks import Mask, padding
from fastattn.masks.space import is_integer
from fastattn.nn.embedding import check_tokens
from fastattn.nn.layer import AttentionLayer
from fastattn.nn.recurrent import read_padded
from fastattn.spec import dtype_name
from fastattn.validation import check_tensor

Kind = Literal["simple", "contextualised", "soft_align"]


class Memory(NamedTuple):
    """What the decoder knows of a source.

    Attributes:
        states: [B, Ls, directions * hidden], the encoder's state at each token.
        context: [B, directions * hidden], its last states.
        keys: [B, Ls, hidden], the states projected for the score; [B, Ls, 0] without attention.
        mask: which keys are no padding; None for all.
    """

    states: Tensor
    context: Tensor
    keys: Tensor
    mask: Mask | None


class RecurrentSeq2Seq(AttentionLayer):
    """A GRU reads the source, another writes the target; `kind` says what the second knows of the source.

    - "simple": its first state is made of the encoder's last, s_0 = tanh(W h_n), and that is all.
    - "contextualised": beside, c = h_n is an input of every step, and of the output.
    - "soft_align": instead of one c a new one for each step, c_t = Σ_j α_tj h_j with
      α_t = softmax_j(wᵀ tanh(W_q s_(t-1) + W_k h_j)): the decoder looks up what it needs, when it needs it.

    >>> model = RecurrentSeq2Seq(10, 12, hidden_size=16, kind="soft_align")
    >>> src, tgt = torch.zeros(3, 5, dtype=torch.int64), torch.zeros(3, 4, dtype=torch.int64)
    >>> list(model(src, tgt).shape), list(model.attention_weights.shape)
    ([3, 4, 12], [3, 4, 5])

    Args:
        src_vocab_size, tgt_vocab_size: number of tokens.
        hidden_size: of the decoder, and of each direction of the encoder.
        embed_size: of tokens' vectors; hidden_size where None.
        kind: "simple", "contextualised" or "soft_align".
        bidirectional: whether the encoder also reads backwards.
        device, dtype: of the weights; torch's defaults where None.
    Raises:
        TypeError, ValueError: naming the argument, the rule and the value got.
    Source: Sutskever et al. 2014 (arXiv 1409.3215); Cho et al. 2014 (arXiv 1406.1078), section 2.2; Bahdanau
    et al. 2015 (arXiv 1409.0473), section 3 and appendix A.
    """

    def __init__(
        self,
        src_vocab_size: int,
        tgt_vocab_size: int,
        hidden_size: int = 64,
        embed_size: int | None = None,
        *,
        kind: Kind = "soft_align",
        bidirectional: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_int("src_vocab_size", src_vocab_size, 1)
        check_int("tgt_vocab_size", tgt_vocab_size, 1)
        hidden = check_int("hidden_size", hidden_size, 1)
        embed = hidden if embed_size is None else check_int("embed_size", embed_size, 1)
        if kind not in get_args(Kind):
            raise ValueError(f"kind must be one of {', '.join(get_args(Kind))}, got {kind!r}")
        self.kind, self.hidden_size = kind, hidden_size
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        both = hidden * (2 if check_bool("bidirectional", bidirectional) else 1)
        self.src_embedding = nn.Embedding(src_vocab_size, embed, **factory)
        self.tgt_embedding = nn.Embedding(tgt_vocab_size, embed, **factory)
        self.encoder = nn.GRU(embed, hidden, batch_first=True, bidirectional=bidirectional, **factory)
        self.bridge = nn.Linear(both, hidden, **factory)
        context = 0 if kind == "simple" else both
        self.decoder = nn.GRU(embed + context, hidden, batch_first=True, **factory)
        self.output = nn.Linear(hidden + context, tgt_vocab_size, **factory)
        if kind == "soft_align":
            self.W_q = nn.Linear(hidden, hidden, bias=False, **factory)
            self.W_k = nn.Linear(both, hidden, bias=False, **factory)
            self.w_v = nn.Linear(hidden, 1, bias=False, **factory)

    def extra_repr(self) -> str:
        return f"kind={self.kind!r}"

    def forward(self, src: Tensor, tgt: Tensor, src_lengths: Tensor | None = None) -> Tensor:
        """Logits for every target position: those at t are of the token after tgt[:, t].

        Args:
            src: int [B, Ls], padded on the right; tgt: int [B, Lt], the first token a start symbol.
            src_lengths: int [B], tokens before the padding, at least 1; None for all.
        Returns:
            [B, Lt, tgt_vocab_size].
        Raises:
            TypeError, ValueError: naming the argument, the rule and the value got.
        """
        memory, state = self.encode(src, src_lengths)
        return self.decode(tgt, memory, state)[0]

    def encode(self, src: Tensor, src_lengths: Tensor | None = None) -> tuple[Memory, Tensor]:
        """(memory, first state of the decoder [B, hidden]) of a source."""
        if check_tensor("src", src).dim() != 2 or 0 in src.shape:
            raise ValueError(f"src must be [B, Ls] with at least one token, got shape {list(src.shape)}")
        check_tokens("src", src, self.src_embedding.num_embeddings)
        x, hidden = self.src_embedding(src), self.hidden_size
        if src_lengths is None:
            states, mask = self.encoder(x)[0], None
            last = states[:, -1, :hidden]
        else:
            if not is_integer(check_tensor("src_lengths", src_lengths)):
                raise TypeError(f"src_lengths must be integers, got {dtype_name(src_lengths.dtype)}")
            src_lengths = src_lengths.long()
            if src_lengths.shape != src.shape[:1]:
                raise ValueError(f"src_lengths must be [{len(src)}], got shape {list(src_lengths.shape)}")
            low, high = src_lengths.aminmax()
            if low < 1 or high > src.shape[1]:
                raise ValueError(
                    f"src_lengths must be from 1 to {src.shape[1]}, got {int(low)} to {int(high)}"
                )
            states, mask = read_padded(self.encoder, x, src_lengths), padding(src_lengths)
            last = states[torch.arange(len(src), device=src.device), src_lengths - 1, :hidden]
        context = torch.cat([last, states[:, 0, hidden:]], -1)  # backwards, the first token is the last
        keys = self.W_k(states) if self.kind == "soft_align" else states[..., :0]
        return Memory(states, context, keys, mask), torch.tanh(self.bridge(context))

    def decode(self, tgt: Tensor, memory: Memory, state: Tensor) -> tuple[Tensor, Tensor]:
        """(logits [B, Lt, tgt_vocab_size], last state [B, hidden]) of some target tokens, from a state on."""
        if check_tensor("tgt", tgt).dim() != 2 or 0 in tgt.shape:
            raise ValueError(f"tgt must be [B, Lt] with at least one token, got shape {list(tgt.shape)}")
        check_tokens("tgt", tgt, self.tgt_embedding.num_embeddings)
        if len(tgt) != len(state):
            raise ValueError(f"tgt must have the source's batch size {len(state)}, got {len(tgt)}")
        x = self.tgt_embedding(tgt)
        if self.kind == "soft_align":
            return self._align(x, memory, state)
        context = memory.context[:, None].expand(-1, tgt.shape[1], -1)
        if self.kind == "contextualised":
            x = torch.cat([x, context], -1)
        states, _ = self.decoder(x, state[None].contiguous())
        read = torch.cat([states, context], -1) if self.kind == "contextualised" else states
        return self.output(read), states[:, -1]

    def _align(self, x: Tensor, memory: Memory, state: Tensor) -> tuple[Tensor, Tensor]:
        """`decode`, one step after the other, as each one's query is the state before it."""
        queries, read = [], []
        w = self.w_v.weight[0]
        for embedded in x.unbind(1):
            queries.append(self.W_q(state)[:, None])
            context = additive_attention(queries[-1], memory.keys, memory.states, w, mask=memory.mask)[:, 0]
            state = torch.gru_cell(torch.cat([embedded, context], -1), state, *self.decoder.all_weights[0])
            read.append(torch.cat([state, context], -1))
        looked = Call(
            "attention", torch.cat(queries, 1), memory.keys, memory.states, scale=1.0, mask=memory.mask
        )
        looked.score, looked.score_weights = "additive", w
        self._remember(looked)
        return self.output(torch.stack(read, 1)), state

    @torch.no_grad()
    def generate(self, src: Tensor, max_len: int, start: int, src_lengths: Tensor | None = None) -> Tensor:
        """The likeliest token after each, [B, max_len], beginning after the start symbol.

        Args:
            src, src_lengths: as for the call.
            max_len: number of tokens.
            start: the start symbol.
        """
        check_int("max_len", max_len, 1)
        if check_int("start", start, 0) >= self.tgt_embedding.num_embeddings:
            raise ValueError(f"start must be below {self.tgt_embedding.num_embeddings}, got {start}")
        memory, state = self.encode(src, src_lengths)
        tokens, steps = [src.new_full((len(src), 1), start)], []
        for _ in range(max_len):
            logits, state = self.decode(tokens[-1], memory, state)
            tokens.append(logits.argmax(-1))
            steps.append(self._last)
        if isinstance(self._last, Call):  # the whole alignment, not that of the last step
            queries = [step.q for step in steps if isinstance(step, Call)]
            self._remember(replace(self._last, q=torch.cat(queries, 1)))
        return torch.cat(tokens[1:], 1)
