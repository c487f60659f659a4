"""`python -m fastattn demo`: a small language model trained with PyTorch's attention and with ours."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from fastattn.bench.machine import describe
from fastattn.cli.options import positive_seconds
from fastattn.data import load_stdlib_docs
from fastattn.demo import measure, memory, results, train
from fastattn.demo.measure import CASES, SIDES, side
from fastattn.demo.model import ModelConfig
from fastattn.demo.results import Results
from fastattn.demo.text import Tokens

PROMPT = "Return "
SAMPLE_LENGTH = 400


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the subcommand's options."""
    add = parser.add_argument
    add(
        "--seconds",
        type=positive_seconds,
        default=60.0,
        metavar="S",
        help="training time of each run (default: 60)",
    )
    add("--seed", type=int, default=0, metavar="N", help="of weights, batches and samples (default: 0)")
    add("--out", type=Path, default=Path("demo"), metavar="DIR", help="for the pictures (default: demo)")


def run(args: argparse.Namespace) -> int:
    """Runs the demo; status 1 where the two runs' losses differ, there is no text to learn, or no folder."""
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    say = _print_now
    found = Results(describe(), torch.get_num_threads())
    say(found.machine_line())
    try:
        docs = load_stdlib_docs()
    except FileNotFoundError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    say(f"Text: {docs.describe()}.")
    tokens = Tokens.of(docs.text)
    config = ModelConfig(len(tokens.alphabet))

    compare_training(found, config, tokens, args.seconds, args.seed, say)
    compare_speed(found, config, tokens, args.seconds, args.seed, say)
    compare_memory(found, config, args.seed, say)
    write_pictures(found, args.out, say)
    if not found.agrees():
        worst = max(found.differences())
        text = f"error: the losses differ by up to {worst:.1e}, more than {results.TOLERANCE:g}"
        print(text, file=sys.stderr)
        return 1
    return 0


def compare_training(
    found: Results, config: ModelConfig, tokens: Tokens, seconds: float, seed: int, say: Callable[[str], None]
) -> None:
    """Train with PyTorch's attention for about that long, then the same steps with ours."""
    recipe = train.Recipe(steps=1, seed=seed)
    steps = train.steps_for(config, tokens, recipe, seconds)
    recipe = train.Recipe(steps=steps, seed=seed)
    parameters = sum(p.numel() for p in train.new_model(config, seed).parameters())
    say(
        f"Model: {config.num_layers} layers, {config.num_heads} heads of {config.head_dim}, {parameters:,} "
        f"parameters, {config.vocab_size} characters; it calls F.scaled_dot_product_attention.\n"
        f"Training: {steps} steps of {recipe.batch} x {recipe.seqlen} characters, float32, no dropout, seed "
        f"{seed}; first with PyTorch's attention, then the same inside override_sdpa()."
    )
    for name in SIDES:
        with side(name):
            found.runs[name] = train.train(config, tokens, recipe, f"{name:>8}")
            found.held_out[name] = train.held_out_loss(found.runs[name].model, tokens, recipe)
    say(_lines("\nLosses (nats a character)", results.loss_table(found)))
    times = " and ".join(f"{found.runs[name].seconds:.1f} s with {name}" for name in SIDES)
    say(f"These {steps} steps took {times}, one after the other; measured in turns below.")
    with side("fastattn"):
        found.sample = train.generate(found.runs["fastattn"].model, tokens, PROMPT, SAMPLE_LENGTH, seed)
    say(f"\nWritten by the model trained with fastattn, from {PROMPT!r}:\n{results.indented(found.sample)}")


def compare_speed(
    found: Results, config: ModelConfig, tokens: Tokens, seconds: float, seed: int, say: Callable[[str], None]
) -> None:
    """Time whole steps and attention alone in turns, each case for a tenth of the training time."""
    for case in CASES:
        found.steps[case] = measure.step_times(config, tokens, case, seed, seconds / 10)
        found.attention[case] = measure.attention_times(config, case, seed, seconds / 30)
    say(_lines("\nTraining step, 2048 tokens, ms: median (quartiles)", results.time_table(found.steps)))
    heading = "\nAttention alone on the same shapes, forward and backward, ms: median (quartiles)"
    say(_lines(heading, results.time_table(found.attention)))


def compare_memory(found: Results, config: ModelConfig, seed: int, say: Callable[[str], None]) -> None:
    """Peak memory of training steps; where the system does not tell, say so and go on."""
    try:
        for case in CASES:
            found.memory[case] = {name: memory.grown(config.vocab_size, case, name, seed) for name in SIDES}
    except RuntimeError as error:
        found.memory.clear()
        say(f"\nPeak memory was not measured: {error}")
    else:
        say(_lines(f"\nMemory: {memory.METHOD}", results.memory_table(found.memory)))


def write_pictures(found: Results, folder: Path, say: Callable[[str], None]) -> None:
    """Write speed.png and loss.png; without matplotlib say how to get it."""
    from fastattn.demo import plot

    folder.mkdir(parents=True, exist_ok=True)
    try:
        plot.draw_speed(found, folder / "speed.png")
        plot.draw_loss(found, folder / "loss.png")
    except ModuleNotFoundError as error:
        say(f"\nNo pictures: {error.name} is not installed; run: pip install 'fastattn[viz]'")
    else:
        say(f"\nWrote {folder / 'speed.png'} and {folder / 'loss.png'}")


def _lines(heading: str, lines: Iterable[str]) -> str:
    return "\n".join((heading, *lines))


def _print_now(text: str) -> None:
    print(text, flush=True)
