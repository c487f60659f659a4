"""`python -m fastattn demo`: English to Chinese with fastattn's attention, compared with PyTorch's."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Iterable
from pathlib import Path

import torch

from fastattn.bench.machine import describe
from fastattn.cli.options import positive_int
from fastattn.cli.status import status_of
from fastattn.data import EnglishChinese, load_english_chinese
from fastattn.demo import checkpoint, judge, measure, results
from fastattn.demo.measure import CASES, TOKENS
from fastattn.demo.recipe import Recipe
from fastattn.demo.results import COMPARED, Results
from fastattn.demo.text import Text
from fastattn.demo.train import Run, train

CHECKPOINT = "checkpoint.safetensors"
SECONDS_PER_CASE = 11.0
SPEED_HEADING = f"""
Training steps in turns, {TOKENS} tokens of each language, ms: median (quartiles). L = 20 has one pair a row,
longer rows are packed with document masks; dropout is of attention weights. Free attention passes the values
on and computes nothing: no kernel can do better. Share: (PyTorch - fastattn) / (PyTorch - free), or
"noise" where the steps' times scatter more than that."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the subcommand's options."""
    add = parser.add_argument
    recipe = Recipe()
    add("--steps", type=positive_int, metavar="N", help=f"training steps (default: {recipe.steps})")
    add("--seed", type=int, metavar="N", help=f"of weights, batches, dropout (default: {recipe.seed})")
    add(
        "--out",
        type=Path,
        default=Path("demo"),
        metavar="DIR",
        help="for pictures and the checkpoint (default: demo)",
    )
    add(
        "--resume",
        action="store_true",
        help="go on with the checkpoint that Ctrl-C, or a whole run, left in DIR",
    )


def run(args: argparse.Namespace) -> int:
    """Runs the demo.

    Returns:
        The exit status: 1 where the two runs' losses differ, there is no text to learn, or an option does not
        fit; 130 where Ctrl-C ended it.
    """
    return status_of(_run, args)


def _run(args: argparse.Namespace) -> int:
    args.out.mkdir(parents=True, exist_ok=True)
    recipe = recipe_of(args)
    found = Results(describe(), torch.get_num_threads())
    say(f"{found.machine_line()}; load at the start: {found.machine['load_at_start']}")
    data = load_english_chinese()
    say(f"Text: {data.describe()}.")
    text = Text.of(data, recipe.vocab_size)

    ours = compare_training(found, recipe, text, args)
    if len(ours.losses) < recipe.steps:
        steps = f"{len(ours.losses)} of {recipe.steps} steps"
        say(f"\nStopped after {steps}; to go on: python -m fastattn demo --resume --out {args.out}")
        return 130
    compare_speed(found, recipe, text)
    show_translations(found, ours, data, text)
    write_pictures(found, args.out)
    if not found.agrees():
        worst = max(found.differences())
        print(
            f"error: the losses differ by up to {worst:.1e}, more than {results.TOLERANCE:g}", file=sys.stderr
        )
        return 1
    return 0


def recipe_of(args: argparse.Namespace) -> Recipe:
    """The recipe that the options ask for; with --resume, the checkpoint's.

    Raises:
        ValueError: --resume together with another value than the checkpoint's.
        OSError: there is no checkpoint.
    """
    asked = {name: getattr(args, name) for name in ("steps", "seed") if getattr(args, name) is not None}
    if not args.resume:
        return dataclasses.replace(Recipe(), **asked)
    recipe = checkpoint.read_recipe(args.out / CHECKPOINT)
    for name, value in asked.items():
        if value != getattr(recipe, name):
            raise ValueError(
                f"--{name} must be the checkpoint's {getattr(recipe, name)} with --resume, got {value}"
            )
    return recipe


def compare_training(found: Results, recipe: Recipe, text: Text, args: argparse.Namespace) -> Run:
    """Train with fastattn, before that the first steps with PyTorch's attention; the run, whole or not."""
    path = args.out / CHECKPOINT
    stock = Run.new(recipe, text, "torch")
    compared = min(COMPARED, recipe.steps)
    parameters = sum(parameter.numel() for parameter in stock.model.parameters())
    say(
        f"Model: Transformer of {recipe.num_layers} + {recipe.num_layers} layers, width {recipe.d_model}, "
        f"{recipe.num_heads} heads; {parameters:,} parameters, {len(text.subwords):,} tokens.\n"
        f"Training: {recipe.steps} steps of {recipe.batch} pairs, float32, seed {recipe.seed}; the first "
        f"{compared} with PyTorch's attention, then all with fastattn's. Ctrl-C stops, --resume goes on."
    )
    if not train(stock, text, compared, " PyTorch"):
        raise KeyboardInterrupt
    ours = checkpoint.load(path, text) if args.resume else Run.new(recipe, text, "fastattn")
    train(ours, text, recipe.steps, "fastattn")
    checkpoint.save(ours, text, path)
    found.stock, found.ours = stock.losses, ours.losses
    say(
        lines(
            "\nLosses (nats a token, smoothed labels) of the steps that both took", results.loss_table(found)
        )
    )
    say(f"{len(ours.losses)} steps with fastattn took {ours.seconds:.0f} s. Wrote {path}")
    return ours


def compare_speed(found: Results, recipe: Recipe, text: Text) -> None:
    """Time training steps of every case in turns."""
    for case in CASES:
        found.steps[case] = measure.step_times(recipe, text, case, SECONDS_PER_CASE)
    say(lines(SPEED_HEADING, results.time_table(found.steps)))


def show_translations(found: Results, ours: Run, data: EnglishChinese, text: Text) -> None:
    """Translate what was held out, show some of it, and score it all."""
    sentences = [pair.english for pair in data.held_out]
    found.pairs = data.held_out
    found.translations = judge.translate(ours.model, text.subwords, sentences)
    heading = (
        "\nHeld-out sentences, evenly chosen: English, the model's Chinese, (the reference where it differs)"
    )
    say(lines(heading, results.translation_lines(found.pairs, found.translations)))
    found.bleu, how = judge.bleu(data, found.translations)
    of = f"of {len(sentences)} held-out sentences"
    say(f"\n{how}" if found.bleu is None else f"\nBLEU {found.bleu:.1f} {of} ({how})")
    if sentences:
        chosen = judge.telling(found.pairs, found.translations)
        found.attention = judge.attention_of(
            ours.model, text.subwords, found.pairs[chosen], found.translations[chosen]
        )


def write_pictures(found: Results, folder: Path) -> None:
    """Write loss.png, speed.png and attention.png."""
    from fastattn.demo import plot

    plot.draw_loss(found, folder / "loss.png")
    plot.draw_speed(found, folder / "speed.png")
    written = ["loss.png", "speed.png"]
    if found.attention is not None:
        plot.draw_attention(found, found.attention, folder / "attention.png")
        written.append("attention.png")
    say(f"\nWrote {', '.join(str(folder / name) for name in written)}")


def lines(heading: str, rest: Iterable[str]) -> str:
    return "\n".join((heading, *rest))


def say(text: str) -> None:
    print(text, flush=True)
