"""The state of a training on disk: all that the next step needs, so that a killed run continues bit for bit.

Used by: notebooks/11_textual_inversion.ipynb, section "The loop".

A state also records its training: settings, precision, base model, and a hash of pictures, prompts and class images.
It is refused for any other training.
"""

import hashlib
import json
import warnings
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate import Accelerator

from course_lib.environment import write_whole
from course_lib.latent.registry import same_model
from course_lib.personalization.recipe import Recipe

ANEW = "go on with the same, or begin anew with another file"


def data_hashes(recipe: Recipe) -> list[str]:
    """A hash of each term's pictures, prompts and weight."""
    parts = ([term.examples.digest, term.examples.prompts, term.weight] for term in recipe.terms)
    return [hashlib.sha256(json.dumps(part).encode()).hexdigest() for part in parts]


def save_state(path: Path, recipe: Recipe, optimizer, accelerator: Accelerator, step: int) -> None:
    """Write the state whole or not at all.  Raises OSError if that fails."""
    state = dict(
        step=step, method=recipe.method, settings=asdict(recipe.settings), about=recipe.about, dtype=recipe.dtype,
        processes=accelerator.num_processes, fingerprint=recipe.fingerprint, data=data_hashes(recipe),
        params={name: param.detach() for name, param in recipe.params.items()}, optimizer=optimizer.state_dict(),
        scaler=accelerator.scaler.state_dict() if accelerator.scaler else None,
    )  # fmt: skip
    try:
        with write_whole(path) as temporary:
            torch.save(state, temporary)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        raise OSError(f"{path} cannot be written: {error}") from error


def keep_state(path: Path, recipe: Recipe, optimizer, accelerator: Accelerator, step: int) -> None:
    """Save the state, in the main process only; if that fails (a full disk), warn and go on."""
    try:
        if accelerator.is_main_process:
            save_state(path, recipe, optimizer, accelerator, step)
    except OSError as error:
        rest = ", and the state saved before is whole" if path.is_file() else ""
        warnings.warn(f"{path}: the state of step {step} was not saved ({error}); training goes on{rest}", stacklevel=3)


def read_state(path: str | Path, mmap: bool = False) -> dict:
    """The content of a state file; mmap: without reading its tensors.

    Raises ValueError if it is damaged, or was written without hashes of its data.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        complete = {"step", "method", "settings", "about", "dtype", "fingerprint", "params", "optimizer"} <= set(state)
        hashes = "data" in state.keys()
    except Exception as error:  # torch raises many kinds for a damaged file
        raise ValueError(f"checkpoint: expected the state of an earlier training, but {path} is damaged "
                         f"({type(error).__name__}); begin anew with another file") from error  # fmt: skip
    if not hashes:
        raise ValueError(f"checkpoint: {path} has no record of the pictures it was trained on (an older version "
                         "wrote it), so it cannot be checked; begin anew with another file")  # fmt: skip
    if not complete:
        raise ValueError(f"checkpoint: expected the state of an earlier training, but {path} is incomplete; begin anew "
                         "with another file")  # fmt: skip
    return state


def load_state(path: Path, recipe: Recipe, optimizer, accelerator: Accelerator) -> int:
    """Continue from a saved state; returns its step.  Raises ValueError if it is damaged or of another training."""
    state = read_state(path)
    _check_same_training(state, path, recipe)
    if state.get("processes", 1) != accelerator.num_processes:
        raise ValueError(
            f"processes: {path} was written by {state['processes']}, got {accelerator.num_processes}; {ANEW}"
        )
    try:
        for name, param in recipe.params.items():
            param.data.copy_(state["params"][name])
        optimizer.load_state_dict(state["optimizer"])
        if accelerator.scaler and state.get("scaler"):
            accelerator.scaler.load_state_dict(state["scaler"])
    except (KeyError, RuntimeError, ValueError) as error:
        raise ValueError(f"checkpoint: {path} is damaged ({error}); begin anew with another file") from error
    return state["step"]


def _check_same_training(state: dict, path: Path, recipe: Recipe) -> None:
    if not same_model(recipe.fingerprint, state["fingerprint"]):
        raise ValueError(f"sd: {path} was written on another base model; load that one, or begin with another file")
    ours = asdict(recipe.settings) | {"method": recipe.method, "dtype": recipe.dtype} | recipe.about
    theirs = state["settings"] | {"method": state["method"], "dtype": state["dtype"]} | state["about"]
    for name in ours:
        if name != "steps" and theirs.get(name) != ours[name]:  # a longer training may go on
            raise ValueError(f"{name}: {path} was written with {theirs.get(name)!r}, got {ours[name]!r}; {ANEW}")
    hashes = data_hashes(recipe)
    if len(hashes) != len(state["data"]):
        raise ValueError(f"terms: {path} was written with {len(state['data'])} sets of pictures (subjects, class "
                         f"pictures), got {len(hashes)}; {ANEW}")  # fmt: skip
    for k, (one, other) in enumerate(zip(hashes, state["data"], strict=True)):
        if one != other:
            which = "subject's" if k == 0 else "class or second subject's"
            raise ValueError(f"images: {path} was written with other pictures, captions or weights (the {which}); "
                             f"{ANEW}")  # fmt: skip
    if state["step"] > recipe.settings.steps:
        raise ValueError(f"steps: expected at least the {state['step']} that {path} has done, got "
                         f"{recipe.settings.steps}; ask for more steps, or begin anew with another file")  # fmt: skip
