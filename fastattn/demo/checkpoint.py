"""A run in a file, whole: going on from it gives the same bits as never having stopped."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import torch

from fastattn.data.subwords import Subwords
from fastattn.demo.recipe import Recipe
from fastattn.demo.text import Text
from fastattn.demo.train import Run
from fastattn.models import Transformer

_MOMENTS = ("exp_avg", "exp_avg_sq")


def save(run: Run, text: Text, path: Path) -> None:
    """Write weights, the optimizer's state, losses, and the default generator's state, as safetensors.

    Raises:
        ModuleNotFoundError: safetensors is not installed.
    """
    from safetensors.torch import save_file

    tensors = {"generator": torch.get_rng_state(), "losses": torch.tensor(run.losses, dtype=torch.float64)}
    state = run.trainer.optimizer.state
    for name, parameter in run.model.named_parameters():
        tensors[f"weight.{name}"] = parameter.detach()
        for moment in _MOMENTS if parameter in state else ():
            tensors[f"{moment}.{name}"] = state[parameter][moment]
    facts = {
        "recipe": json.dumps(dataclasses.asdict(run.trainer.recipe)),
        "text": text.digest(),
        "subwords": text.subwords.to_json(),
        "seconds": repr(run.seconds),
    }
    partial = path.with_suffix(".partial")  # so that the file is never there in part
    save_file(tensors, partial, facts)
    partial.replace(path)


def read_recipe(path: Path) -> Recipe:
    """The recipe of the run that is in the file.

    Raises:
        ValueError: the file is no checkpoint of this demo.
        OSError: it cannot be read.
        ModuleNotFoundError: safetensors is not installed.
    """
    facts = _facts(path)
    return Recipe(**json.loads(facts["recipe"]))


def load(path: Path, text: Text) -> Run:
    """The run, ready to go on; the default generator is where it was.

    Args:
        path: of a file that `save` wrote.
        text: what the run learns from, made anew.

    Raises:
        ValueError: the file is no checkpoint of this demo, or is one of another text.
        OSError: it cannot be read.
        ModuleNotFoundError: safetensors is not installed.
    """
    from safetensors.torch import load_file

    facts = _facts(path)
    if facts["text"] != text.digest():
        raise ValueError(
            f"{path} must be of the text found on this machine ({text.digest()}), got one of another text "
            f"({facts['text']}): start afresh without --resume"
        )
    recipe = read_recipe(path)
    run = Run.new(recipe, text, "fastattn")
    tensors = load_file(path)
    run.losses, run.seconds = tensors["losses"].tolist(), float(facts["seconds"])
    steps = torch.tensor(float(len(run.losses)))
    with torch.no_grad():
        for name, parameter in run.model.named_parameters():
            parameter.copy_(tensors[f"weight.{name}"])
            if run.losses:
                moments = {moment: tensors[f"{moment}.{name}"] for moment in _MOMENTS}
                run.trainer.optimizer.state[parameter] = {"step": steps.clone(), **moments}
    torch.set_rng_state(tensors["generator"])
    return run


def load_model(path: Path) -> tuple[Transformer, Subwords]:
    """The model of the run that is in the file, in eval mode, and its vocabulary; the text is not needed.

    Raises:
        ValueError: the file is no checkpoint of this demo.
        OSError: it cannot be read.
        ModuleNotFoundError: safetensors or tokenizers is not installed.
    """
    from safetensors.torch import load_file

    facts = _facts(path)
    subwords = Subwords.from_json(facts["subwords"])
    tensors = load_file(path)
    with torch.random.fork_rng(devices=[]):  # a new model seeds the default generator
        model = read_recipe(path).model(len(subwords))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[f"weight.{name}"])
    return model.eval(), subwords


def _facts(path: Path) -> dict[str, str]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            facts = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path} must be a checkpoint of the demo: {error}") from None
    if not {"recipe", "text", "subwords", "seconds"} <= facts.keys():
        raise ValueError(f"{path} must be a checkpoint of the demo, got other tensors")
    return facts
