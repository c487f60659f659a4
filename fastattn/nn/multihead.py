"""MultiheadAttention: torch.nn.MultiheadAttention on fastattn's kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.init import constant_, xavier_normal_, xavier_uniform_
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from fastattn.autocast import autocast_dtype, cast
from fastattn.biases import Bias
from fastattn.call import Call
from fastattn.checks import check_bool, check_int
from fastattn.dispatch import seed
from fastattn.masks import Mask
from fastattn.multi_head import multi_head_attention
from fastattn.nn.cache import KVCache
from fastattn.nn.extra_keys import attend_with_extra_keys
from fastattn.nn.layer import check_lens
from fastattn.nn.nested import attend_to_nested, is_nested_self_attention
from fastattn.nn.visibility import merge_masks
from fastattn.projections import Projections, check_projections
from fastattn.validation import check_number, validate


class MultiheadAttention(nn.MultiheadAttention):
    """torch.nn.MultiheadAttention, a drop-in: the same constructor, forward, parameters and state dict.

    It differs where torch's answer is no use: a row that sees no key has zero attention, then the output
    projection, in every mode (torch: NaN or not, depending on the mode); non-finite values in hidden keys
    stay hidden; `is_causal=True` needs no mask beside it. It adds `num_kv_heads`, `mask`, `valid_lens`,
    `bias`, `cache`, masks of four dimensions, and self-attention of one argument.

    >>> layer = MultiheadAttention(8, 2, batch_first=True)
    >>> y, weights = layer(torch.randn(3, 5, 8), mask=fastattn.masks.causal())
    >>> list(y.shape), list(weights.shape)
    ([3, 5, 8], [3, 5, 5])

    Args:
        embed_dim: features of the query and of the output.
        num_heads: Hq; each has head_dim = embed_dim / num_heads.
        dropout: probability of dropping an attention weight in training.
        bias: whether the projections have biases.
        add_bias_kv: whether there is one more key and value, learned, that every query sees.
        add_zero_attn: whether there is one more key and value, of zeros, that every query sees.
        kdim, vdim: features of key and value; embed_dim where None.
        batch_first: inputs and output are [B, L, E], not [L, B, E].
        device, dtype: of the parameters.
        num_kv_heads: Hkv, which must divide num_heads; fewer than num_heads is grouped-query attention, whose
            in_proj_weight has (num_heads + 2 num_kv_heads) head_dim rows.
    Raises:
        ValueError, TypeError: naming the argument, the rule and the value got.
    Source: Vaswani et al., "Attention Is All You Need", NIPS 2017, section 3.2.2; grouped queries: Ainslie et
    al., "GQA", EMNLP 2023.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        num_kv_heads: int | None = None,
    ) -> None:
        check_int("embed_dim", embed_dim, 1)
        check_int("num_heads", num_heads, 1)
        if embed_dim % num_heads != 0:
            raise ValueError(f"embed_dim must be a multiple of num_heads {num_heads}, got {embed_dim}")
        heads_kv = num_heads if num_kv_heads is None else check_int("num_kv_heads", num_kv_heads, 1)
        if num_heads % heads_kv != 0:
            raise ValueError(f"num_kv_heads must divide num_heads {num_heads}, got {heads_kv}")
        if not 0 <= check_number("dropout", dropout) <= 1:
            raise ValueError(f"dropout must be between 0 and 1, got {dropout}")
        nn.Module.__init__(self)  # the class in between would make parameters of other shapes
        self.embed_dim, self.num_heads, self.num_kv_heads = embed_dim, num_heads, heads_kv
        self.kdim = embed_dim if kdim is None else check_int("kdim", kdim, 1)
        self.vdim = embed_dim if vdim is None else check_int("vdim", vdim, 1)
        self.head_dim = embed_dim // num_heads
        self.dropout, self.batch_first, self.add_zero_attn = dropout, batch_first, add_zero_attn
        self._add_parameters(bias, add_bias_kv, {"device": device, "dtype": dtype})
        self._reset_parameters()

    def _add_parameters(self, bias: bool, add_bias_kv: bool, factory: dict[str, Any]) -> None:
        """torch's parameters in torch's order, so that one seed gives both classes the same values."""
        rows, rows_kv = self.embed_dim, self.num_kv_heads * self.head_dim

        def empty(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, **factory))

        packed = self.kdim == self.vdim == self.embed_dim
        self.register_parameter("in_proj_weight", empty(rows + 2 * rows_kv, rows) if packed else None)
        self.register_parameter("q_proj_weight", None if packed else empty(rows, self.embed_dim))
        self.register_parameter("k_proj_weight", None if packed else empty(rows_kv, self.kdim))
        self.register_parameter("v_proj_weight", None if packed else empty(rows_kv, self.vdim))
        self.register_parameter("in_proj_bias", empty(rows + 2 * rows_kv) if bias else None)
        self.out_proj = NonDynamicallyQuantizableLinear(rows, self.embed_dim, bias=bias, **factory)
        self.bias_k = empty(1, 1, rows_kv) if add_bias_kv else None
        self.bias_v = empty(1, 1, rows_kv) if add_bias_kv else None

    def _reset_parameters(self) -> None:
        for name in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"):
            if getattr(self, name) is not None:
                xavier_uniform_(getattr(self, name))
        if self.in_proj_bias is not None:
            constant_(self.in_proj_bias, 0.0)
            constant_(self.out_proj.bias, 0.0)
        for vector in (self.bias_k, self.bias_v):
            if vector is not None:
                xavier_normal_(vector)

    @property
    def _qkv_same_embed_dim(self) -> bool:
        """False: where it is True, torch's encoder layers may run kernels of their own on our weights."""
        return False

    def extra_repr(self) -> str:
        parts = [f"embed_dim={self.embed_dim}", f"num_heads={self.num_heads}"]
        if self.num_kv_heads != self.num_heads:
            parts.append(f"num_kv_heads={self.num_kv_heads}")
        if self.dropout:
            parts.append(f"dropout={self.dropout}")
        return ", ".join([*parts, f"batch_first={self.batch_first}"])

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | Mask | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        *,
        mask: Mask | Tensor | None = None,
        valid_lens: Tensor | Sequence[int] | None = None,
        cache: KVCache | None = None,
        bias: Bias | Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """(output, weights); weights is None without need_weights.

        Args:
            query: [L, B, E], [B, L, E] with batch_first, or [L, E] unbatched (masks then have no B either).
                Nested, as nn.TransformerEncoder makes it in eval: self-attention with batch_first, unmasked.
            key: [S, B, kdim] and so on; None: the query.
            value: [S, B, vdim] and so on; None: the key.
            key_padding_mask: [B, S], bool (True = blocked) or float (added to the scores).
            need_weights: also return the weights after dropout. The output is computed the same way with and
                without; only the matrix of weights costs time and memory.
            attn_mask: [L, S], [B Hq, L, S] or broadcastable to [B, Hq, L, S]: bool (True = blocked) or float
                (added). Or a fastattn.masks.Mask, which says what is visible.
            average_attn_weights: return the mean over the heads, [B, L, S], not [B, Hq, L, S].
            is_causal: a query sees no later key. As in torch it stands for attn_mask, which may be None, and
                is aligned top-left (bottom-right with a cache).
            mask: a fastattn.masks.Mask, or bool broadcastable to [B, Hq, L, S]; True = attend.
            valid_lens: int [B] or [B, L] ([] or [L] unbatched): how many of the first keys are visible.
            cache: key and value are projected and appended to it, and the query sees all that it holds; S
                counts these. One that is static and filled is read instead of key and value.
            bias: added to the scores, as by `nn.RelativePositionBias` and `nn.ALiBiBias`: a
                fastattn.biases.Bias, or a tensor broadcastable to [B, Hq, L, S].
        Returns:
            The output in the query's layout. The weights of add_bias_kv and add_zero_attn come last in S.
        Raises:
            TypeError, ValueError: naming the argument, the rule and the value got.
        """
        is_recorded = isinstance(query, fx.Proxy)
        if not is_recorded:
            check_bool("average_attn_weights", average_attn_weights)
        key = query if key is None else key
        value = key if value is None else value
        masks = (key_padding_mask, attn_mask, mask, valid_lens, cache, bias)
        if is_nested_self_attention(query, key, value, masks, is_causal) and self.batch_first:
            return attend_to_nested(self, query, need_weights, average_attn_weights)
        if is_recorded or (isinstance(query, Tensor) and query.dim() == 2):
            run = self._fx_node if is_recorded else self._unbatched
            return run(
                query,
                key,
                value,
                key_padding_mask,
                need_weights=need_weights,
                attn_mask=attn_mask,
                average_attn_weights=average_attn_weights,
                is_causal=is_causal,
                mask=mask,
                valid_lens=valid_lens,
                cache=cache,
                bias=bias,
            )
        _check_3d(query, key, value, self.batch_first)
        batch, seqlen_q, seqlen_k = _sizes(query, key, self.batch_first)
        if cache is not None:
            if not isinstance(cache, KVCache):
                raise TypeError(f"cache must be a fastattn.nn.KVCache, got {type(cache).__name__}")
            seqlen_k = cache.length + (0 if cache.is_complete else seqlen_k)
        if valid_lens is not None:
            valid_lens = check_lens(valid_lens, batch, seqlen_q, seqlen_k, query.device)
        # torch takes the hint for the mask only where it returns no weights and there is no key padding.
        hint = is_causal and (attn_mask is None or (not need_weights and key_padding_mask is None))
        merged, scored = merge_masks(
            (batch, self.num_heads, seqlen_q, seqlen_k),
            query.dtype,
            key_padding_mask=key_padding_mask,
            attn_mask=attn_mask,
            is_causal=hint,
            causal_align="top_left" if cache is None else "bottom_right",
            mask=mask,
            valid_lens=valid_lens,
            bias=bias,
        )
        dropout_p = float(self.dropout) if self.training else 0.0
        if cache is None and self.bias_k is None and not self.add_zero_attn:
            found = multi_head_attention(
                query,
                key,
                value,
                in_proj_weight=self._in_proj_weight(),
                out_proj_weight=self.out_proj.weight,
                num_heads=self.num_heads,
                num_kv_heads=self.num_kv_heads,
                in_proj_bias=self.in_proj_bias,
                out_proj_bias=self.out_proj.bias,
                batch_first=self.batch_first,
                mask=merged,
                bias=scored,
                dropout_p=dropout_p,
                need_weights=need_weights,
                average_weights=average_attn_weights,
            )
            return found if need_weights else (found, None)
        return self._step_by_step(
            query,
            key,
            value,
            merged,
            scored,
            dropout_p,
            average_attn_weights if need_weights else None,
            cache,
        )

    def _in_proj_weight(self) -> Any:
        if self.in_proj_weight is not None:
            return self.in_proj_weight
        return self.q_proj_weight, self.k_proj_weight, self.v_proj_weight

    def _unbatched(
        self, query: Tensor, key: Tensor, value: Tensor, padded: Tensor | None, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        """The same with a batch of one."""
        for name, x in (("key", key), ("value", value)):
            if not isinstance(x, Tensor) or x.dim() != 2:
                got = f"shape {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
                raise ValueError(f"{name} must be 2-D like the query, which has no batch, got {got}")
        at = 0 if self.batch_first else 1
        batched = {id(x): x.unsqueeze(at) for x in (query, key, value)}  # one tensor stays one tensor
        if padded is not None:
            if not isinstance(padded, Tensor):
                raise TypeError(f"key_padding_mask must be a tensor, got {type(padded).__name__}")
            padded = padded.unsqueeze(0)
        if options["valid_lens"] is not None:
            options["valid_lens"] = torch.as_tensor(options["valid_lens"])[None]
        query, key, value = (batched[id(x)] for x in (query, key, value))
        out, weights = self.forward(query, key, value, padded, **options)
        return out.squeeze(at), None if weights is None else weights.squeeze(0)

    def _fx_node(self, query: Any, *inputs: Any, **options: Any) -> Any:
        """The call as one node of a torch.fx graph, whose tracers do not enter torch's own modules either."""
        if self._forward_pre_hooks or self._forward_hooks:
            raise NotImplementedError(
                "torch.fx would record what the hooks of a fastattn MultiheadAttention do, and its node "
                "would do it again: remove them to trace"
            )
        given = {name: value for name, value in options.items() if value is not None}
        name = query.tracer.path_of_module(self)
        return query.tracer.create_proxy("call_module", name, (query, *inputs), given)

    def _step_by_step(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Mask | Tensor | None,
        bias: Bias | Tensor | None,
        dropout_p: float,
        average: bool | None,
        cache: KVCache | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Projections, attention and output projection as calls of their own."""
        weight, bias_in = self._in_proj_weight(), self.in_proj_bias
        w_out, b_out, bias_k, bias_v = self.out_proj.weight, self.out_proj.bias, self.bias_k, self.bias_v
        dtype = autocast_dtype(query)
        if dtype is not None:
            query, key, value, weight, bias_in, w_out, b_out, bias_k, bias_v = cast(
                (query, key, value, weight, bias_in, w_out, b_out, bias_k, bias_v), dtype
            )
        is_complete = cache is not None and cache.is_complete
        if is_complete:  # nothing is projected again: any keys and values of the right widths will do
            nothing = query.new_empty(())
            key, value = (nothing.expand(*query.shape[:2], dim) for dim in (self.kdim, self.vdim))
        heads, heads_kv = self.num_heads, self.num_kv_heads
        check_projections(query, key, value, weight, bias_in, w_out, b_out, heads, heads_kv, self.batch_first)
        projections = Projections.of(
            query, key, value, weight, bias_in, heads, heads_kv, self.head_dim, self.batch_first
        )
        layout = projections.layout
        if cache is not None and is_complete:
            (q,) = projections.without(1, 2).split()
            k, v = cache.keys, cache.values
        else:
            q, k, v = projections.split()
        # Checked before the cache takes anything in, with stand-ins of the length that it will have.
        seqlen_k = k.shape[2] + (0 if cache is None or is_complete else cache.length)
        nothing = k.new_empty(()).expand(*k.shape[:2], seqlen_k, self.head_dim)
        call = Call("attention", q, nothing, nothing, mask=mask, bias=bias, dropout_p=dropout_p)
        validate(call)
        if cache is not None and not is_complete:
            k, v = cache.append(k, v)
        call.k, call.v = k, v
        seed(call)
        out, weights = attend_with_extra_keys(call, bias_k, bias_v, self.add_zero_attn, average)
        return F.linear(layout.from_heads(out), w_out, b_out), weights


def _check_3d(query: Any, key: Any, value: Any, batch_first: bool) -> None:
    layout = "[B, L, E]" if batch_first else "[L, B, E]"
    for name, x in (("query", query), ("key", key), ("value", value)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
        if x.is_nested:
            raise NotImplementedError(
                f"{name} must be a dense tensor (or nested in self-attention with batch_first and no mask), "
                "got a nested one: pad it and pass valid_lens, or call fastattn.varlen_attention"
            )
        if x.dim() != 3:
            raise ValueError(
                f"{name} must be {layout}, or 2-D like the query where there is no batch, got shape "
                f"{list(x.shape)}"
            )


def _sizes(query: Tensor, key: Tensor, batch_first: bool) -> tuple[int, int, int]:
    """B, L and S."""
    at = 1 if batch_first else 0
    return query.shape[1 - at], query.shape[at], key.shape[at]
