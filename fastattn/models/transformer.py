"""Transformer: the encoder-decoder of "Attention Is All You Need", from tokens to logits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from fastattn.masks import Mask, causal, documents, padding
from fastattn.models.cache import DecoderCache
from fastattn.models.layers import LayerOptions
from fastattn.models.stacks import Decoder, Encoder
from fastattn.nn.embedding import TokenEmbedding
from fastattn.nn.positions import SinusoidalPositionalEncoding, document_positions

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Transformer(nn.Module):
    """Logits of each next target token, given the source and the target's tokens before it.

    Embeddings times sqrt(d_model) plus sinusoidal positions, `Encoder`, causal `Decoder`, and a projection
    without bias to the target's vocabulary. Weights are Xavier-uniform, embeddings N(0, 1 / d_model).

    >>> model = Transformer(10, 12, d_model=16, num_layers=2, num_heads=2, d_ff=32)
    >>> src, tgt = torch.zeros(3, 5, dtype=torch.int64), torch.zeros(3, 4, dtype=torch.int64)
    >>> model(src, tgt).shape
    torch.Size([3, 4, 12])

    Args:
        src_vocab_size, tgt_vocab_size: number of tokens.
        d_model: width.
        num_layers: of the encoder, and of the decoder.
        dropout: probability, on the sums of embeddings and positions and on each sublayer's output.
        padding_idx: token that fills up short rows, in both vocabularies; source rows then end before it
            unless lengths are given. None for none.
        share_embeddings: True for one matrix as source embedding, target embedding and output projection (one
            vocabulary), "target" for target embedding and output projection, False for three matrices.
        max_len: the longest source or target.
        device, dtype: of the weights; torch's defaults where None.
        options: num_heads=8, d_ff=2048, attention_dropout=0.0, norm_first=False, num_kv_heads=None,
            attention="fastattn", as for `EncoderLayer`. attention="torch" is the same model on PyTorch's own
            attention: the same seed gives the same weights, and state dicts load both ways.
    Raises:
        TypeError, ValueError: naming the argument, the rule and the value got.
    Source: Vaswani et al. 2017, "Attention Is All You Need".
    """

    def __init__(
        self,
        src_vocab_size: int,
        tgt_vocab_size: int,
        d_model: int = 512,
        num_layers: int = 6,
        dropout: float = 0.1,
        *,
        padding_idx: int | None = None,
        share_embeddings: bool | Literal["target"] = False,
        max_len: int = 5000,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Unpack[LayerOptions],
    ) -> None:
        super().__init__()
        if not (isinstance(share_embeddings, bool) or share_embeddings == "target"):
            raise ValueError(f'share_embeddings must be True, False or "target", got {share_embeddings!r}')
        if share_embeddings is True and src_vocab_size != tgt_vocab_size:
            raise ValueError(
                'share_embeddings must be False or "target" where vocabularies differ, got True with '
                f"src_vocab_size={src_vocab_size} and tgt_vocab_size={tgt_vocab_size}"
            )
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.padding_idx = padding_idx
        self.src_embedding = TokenEmbedding(src_vocab_size, d_model, padding_idx, **factory)
        if share_embeddings is True:
            self.tgt_embedding = self.src_embedding
        else:
            self.tgt_embedding = TokenEmbedding(tgt_vocab_size, d_model, padding_idx, **factory)
        self.positions = SinusoidalPositionalEncoding(d_model, max_len, dropout, **factory)
        self.encoder = Encoder(d_model, num_layers, dropout, **factory, **options)
        self.decoder = Decoder(d_model, num_layers, dropout, **factory, **options)
        self.output = nn.Linear(d_model, tgt_vocab_size, bias=False, **factory)
        if share_embeddings:
            self.output.weight = self.tgt_embedding.weight
        else:
            nn.init.xavier_uniform_(self.output.weight)

    def forward(
        self,
        src: Tensor,
        tgt: Tensor,
        *,
        src_lengths: Tensor | None = None,
        src_documents: Tensor | None = None,
        tgt_documents: Tensor | None = None,
        src_positions: Tensor | None = None,
        tgt_positions: Tensor | None = None,
        need_weights: bool = False,
    ) -> Any:
        """Logits for every target position: those at i are of the token after tgt[:, i].

        Rows are padded on the right. A target's padding needs no lengths, since no token looks ahead; what
        comes out there means nothing.

        Args:
            src: int [B, Ls]; tgt: int [B, Lt], from 0 to their vocabulary's size - 1.
            src_lengths: int [B], tokens before the padding; None to find them by padding_idx, if that is set.
            src_documents, tgt_documents: int [B, Ls] and [B, Lt]: several sentence pairs packed into a row.
                Tokens see those of equal id alone, in their own row and in the other language's, so a pair
                has one id in both, and padding one of its own. src_lengths must be None then.
            src_positions, tgt_positions: int [B, Ls] and [B, Lt]; None to count from the start of each row,
                or of each packed sentence.
            need_weights: whether to return the attention of target to source too.
        Returns:
            logits [B, Lt, tgt_vocab_size]; with need_weights (logits, weights), a list of [B, H, Lt, Ls], one
            per layer.
        Raises:
            TypeError, ValueError: naming the argument, the rule and the value got.
        """
        if (src_documents is None) != (tgt_documents is None):
            raise ValueError("src_documents and tgt_documents must be given together")
        if src_lengths is None and src_documents is None:
            src_lengths = self.source_lengths(src)
        memory = self.encode(
            src, src_lengths=src_lengths, src_documents=src_documents, src_positions=src_positions
        )
        return self.decode(
            tgt,
            memory,
            src_lengths=src_lengths,
            src_documents=src_documents,
            tgt_documents=tgt_documents,
            tgt_positions=tgt_positions,
            need_weights=need_weights,
        )

    def source_lengths(self, src: Tensor) -> Tensor | None:
        """int64 [B], the tokens up to the last that is not padding; None without padding_idx."""
        if self.padding_idx is None:
            return None
        index = torch.arange(1, src.shape[1] + 1, device=src.device)
        return torch.where(src != self.padding_idx, index, 0).amax(1)

    def encode(
        self,
        src: Tensor,
        *,
        src_lengths: Tensor | None = None,
        src_documents: Tensor | None = None,
        src_positions: Tensor | None = None,
    ) -> Tensor:
        """The encoder's output [B, Ls, d_model]; arguments as in `forward`, but padding is not looked for."""
        if src_positions is None and src_documents is not None:
            src_positions = document_positions(src_documents)
        mask = _key_mask(src_lengths, src_documents, src_documents)
        return self.encoder(self.positions(self.src_embedding(src), positions=src_positions), mask=mask)

    def decode(
        self,
        tgt: Tensor,
        memory: Tensor | None = None,
        *,
        src_lengths: Tensor | None = None,
        src_documents: Tensor | None = None,
        tgt_documents: Tensor | None = None,
        tgt_positions: Tensor | None = None,
        cache: DecoderCache | None = None,
        need_weights: bool = False,
    ) -> Any:
        """Logits from the encoder's output.

        Args:
            tgt: int [B, Lt]; with a cache, the new tokens alone.
            memory: [B, Ls, d_model], of `encode`; may be None where the cache holds it.
            cache: of `new_cache`: positions go on from its length. Documents cannot go with it.
            src_lengths, src_documents, tgt_documents, tgt_positions, need_weights: as in `forward`.
        Returns:
            As `forward`.
        """
        offset = 0
        if cache is not None:
            if tgt_documents is not None:
                raise ValueError("tgt_documents must be None where a cache is given")
            offset = 0 if tgt_positions is not None else cache.length
        if tgt_positions is None and tgt_documents is not None:
            tgt_positions = document_positions(tgt_documents)
        mask = causal() if tgt_documents is None else causal() & documents(tgt_documents)
        result = self.decoder(
            self.positions(self.tgt_embedding(tgt), offset, tgt_positions),
            memory,
            mask=mask,
            memory_mask=_key_mask(src_lengths, tgt_documents, src_documents),
            cache=cache,
            need_weights=need_weights,
        )
        return (self.output(result[0]), result[1]) if need_weights else self.output(result)

    def new_cache(self) -> DecoderCache:
        """An empty cache for `decode`."""
        return self.decoder.new_cache()


def _key_mask(lengths: Tensor | None, q_ids: Tensor | None, k_ids: Tensor | None) -> Mask | None:
    """The source tokens that are visible: those within lengths, or those of the query's own document."""
    if k_ids is None or q_ids is None:
        if q_ids is not None or k_ids is not None:
            raise ValueError("src_documents and tgt_documents must be given together")
        return None if lengths is None else padding(lengths)
    if lengths is not None:
        raise ValueError("src_lengths must be None where documents are given: padding has an id of its own")
    return documents(q_ids, k_ids)
