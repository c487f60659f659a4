"""register(): make fastattn an attention implementation of transformers."""

from __future__ import annotations

from transformers import AttentionInterface, AttentionMaskInterface

from fastattn.checks import check_int
from fastattn.integrations.transformers.attention import fastattn_attention
from fastattn.integrations.transformers.attentions import LIMIT
from fastattn.integrations.transformers.mask_function import fastattn_mask
from fastattn.integrations.transformers.position_bias import NAME, keep_tables


def register(*, max_attentions: int | None = None) -> None:
    """Make `attn_implementation="fastattn"` and `model.set_attn_implementation("fastattn")` work.

    May be called again, to change the limit.

    Args:
        max_attentions: the longest text of which `output_attentions=True` returns the weights, 2,048 until it
            is given; None: as it is.

    Raises:
        TypeError, ValueError: max_attentions is no int, or below 1.

    Example:
        from transformers import AutoModelForCausalLM
        from fastattn.integrations.transformers import register

        register()
        model = AutoModelForCausalLM.from_pretrained("...", attn_implementation="fastattn")
    """
    if max_attentions is not None:
        LIMIT.tokens = check_int("max_attentions", max_attentions, 1)
    AttentionInterface.register(NAME, fastattn_attention)
    # Without the second, transformers would drop every mask in silence.
    AttentionMaskInterface.register(NAME, fastattn_mask)
    keep_tables()
