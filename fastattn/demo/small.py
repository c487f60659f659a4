"""A small translation model to look at, learnt once on this machine and kept in the user's cache folder."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from fastattn.data import load_english_chinese
from fastattn.demo import checkpoint
from fastattn.demo.recipe import Recipe
from fastattn.demo.text import Text
from fastattn.demo.train import Run, train

RECIPE = Recipe(steps=400, batch=48, vocab_size=3000, d_model=128, num_layers=2, d_ff=512, warmup=60)


def cached_path() -> Path:
    """Where the model is kept: a file in the folder that the system has for such things."""
    if sys.platform == "win32":
        folder = os.environ.get("LOCALAPPDATA") or "~/AppData/Local"
    elif sys.platform == "darwin":
        folder = "~/Library/Caches"
    else:
        folder = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(folder).expanduser() / "fastattn" / "view-1.safetensors"


def learn(path: Path, recipe: Recipe = RECIPE) -> None:
    """Train the model, with a progress bar, and write its checkpoint.

    Raises:
        KeyboardInterrupt: Ctrl-C ended it; nothing is written.
        FileNotFoundError: there is no text to learn from; the message says what to install.
        OSError: the file cannot be written.
        ModuleNotFoundError: safetensors, tokenizers or tqdm is not installed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    text = Text.of(load_english_chinese(), recipe.vocab_size)
    run = Run.new(recipe, text, "fastattn")
    if not train(run, text, recipe.steps, "learning"):
        raise KeyboardInterrupt
    checkpoint.save(run, text, path)
