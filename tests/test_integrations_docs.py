"""docs/integrations: what a newcomer pastes into a fresh file runs, and prints what the page says."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from timm_support import import_timm

DOCS = Path(__file__).parent.parent / "docs" / "integrations"


def paste(page: str, **names: object) -> dict[str, object]:
    """Run the one snippet of docs/integrations/<page>.md, where `names` are there already.

    Args:
        names: "name" stands for what the snippet calls so itself: a model to be loaded.
    """
    (snippet,) = re.findall(r"^```python\n(.*?)^```", (DOCS / f"{page}.md").read_text(), re.M | re.S)
    if "name" in names:
        snippet = re.sub(r'^name = ".*?"', f"name = {str(names.pop('name'))!r}", snippet, flags=re.M)
    exec(compile(snippet, f"{page}.md", "exec"), names)
    return names


def test_transformers(tmp_path, capsys):
    pytest.importorskip("transformers")
    from ready_made import tokenizer
    from transformers_texts import TEXTS

    TEXTS[0].build().save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    names = paste("transformers", name=tmp_path)
    assert names["model"].config._attn_implementation == "fastattn"
    assert names["tokens"].shape[1] > names["inputs"]["input_ids"].shape[1]
    assert capsys.readouterr().out.strip()


def test_patch(capsys):
    import_timm()
    paste("patch")
    (printed,) = re.findall(r"^prints\n\n```\n(.*?)^```", (DOCS / "patch.md").read_text(), re.M | re.S)
    assert capsys.readouterr().out == printed


def test_timm():
    import_timm()
    assert len(paste("timm")["report"].replaced) == 12


def test_diffusers():
    diffusers = pytest.importorskip("diffusers")
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=8,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    names = paste("diffusers", pipe=SimpleNamespace(unet=unet))
    assert set(names["report"].left.values()) == {"it is fastattn's already"}
    kinds = {type(processor).__name__ for processor in unet.attn_processors.values()}
    assert kinds == {"FastAttnProcessor"}
    with torch.no_grad():
        assert unet(torch.randn(1, 4, 8, 8), 1, torch.randn(1, 5, 8)).sample.isfinite().all()
