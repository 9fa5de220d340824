"""A method of personalization as data: which tensors are trained, and on what.

Derived in: notebooks/11_textual_inversion.ipynb, section "The loop".

All methods minimise, over a set S of tensors,
    sum_k lambda_k E || eps - eps_theta(z_t, t, c(prompt)) ||^2,   (z_0, prompt) ~ D_k.
A method is only S (`Recipe.params`) and the pairs (lambda_k, D_k) (`Recipe.terms`). Prior preservation is a term.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from course_lib.latent.registry import fingerprint
from course_lib.latent.stable_diffusion import StableDiffusion
from course_lib.latent.text import NewTokens
from course_lib.personalization.examples import Examples


@dataclass
class Settings:
    """How to train; each method has its own defaults, SETTINGS.

    batch_size: pictures of each term, per step and process, in `accumulate` parts (gradient_accumulation_steps).
    weighting: see `loss_per_picture`; None: the one that the model was trained with, "v" for one that predicts v.
    optimizer: "adamw", or "adamw8bit" (CUDA, needs bitsandbytes).  warmup: steps over which the learning rate rises.
    gradient_checkpointing: compute activations twice instead of storing them.
    """

    steps: int
    lr: float
    batch_size: int = 4
    accumulate: int = 1
    weighting: str | None = None
    optimizer: str = "adamw"
    weight_decay: float = 1e-2
    clip: float = 1.0
    warmup: int = 0
    gradient_checkpointing: bool = False
    seed: int = 0

    def __post_init__(self):
        for name in ("steps", "batch_size", "accumulate"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: expected a whole number of at least 1, got {value!r}")
        if not 0 < self.lr < 1:
            raise ValueError(f"lr: expected a number between 0 and 1, such as 1e-4, got {self.lr}")
        if self.batch_size % self.accumulate:
            raise ValueError(f"accumulate: expected a divisor of batch_size {self.batch_size}, got {self.accumulate}")
        if self.optimizer not in ("adamw", "adamw8bit"):
            raise ValueError(f"optimizer: expected 'adamw' or 'adamw8bit', got {self.optimizer!r}")
        if not isinstance(self.seed, int) or not 0 <= self.seed < 2**63:
            raise ValueError(f"seed: expected a whole number from 0 to 2^63 - 1, got {self.seed!r}")


@dataclass
class Term:
    """lambda E || eps - eps_theta ||^2 over these examples."""

    examples: Examples
    weight: float = 1.0


@dataclass
class Recipe:
    """A method: which tensors of `sd` are trained, and on what. Each method's module has a `recipe` that makes one.

        with dreambooth.recipe(sd, images, noun="dog") as recipe:
            for step, loss in finetune(sd, recipe): ...
            save_concept("rex.safetensors", recipe)
        # here sd is what it was before, bit for bit

    method: its name.  params: name -> Parameter, the tensors that are trained.  terms: the data.  settings: how.
    about: notes for writing prompts (tokens, class noun ...), saved with the concept.  base, fingerprint, dtype: of
    the model.
    tokens: rows for new words, if there are any.  trains_text: whether weights of the text encoder are in params.
    """

    method: str
    params: dict[str, nn.Parameter]
    terms: list[Term]
    settings: Settings
    about: dict
    base: str
    fingerprint: Tensor
    dtype: str
    tokens: NewTokens | None = None
    trains_text: bool = False


def new_recipe(sd: StableDiffusion, method: str, terms: list[Term], settings: Settings, **about) -> Recipe:
    """A recipe without trainable tensors yet, with the model's present fingerprint."""
    if sd.dtype == torch.float16 and sd.device.type == "cpu":
        raise ValueError("sd: expected float32 on a CPU, got float16; load it with dtype=torch.float32")
    settings = replace(settings, weighting=settings.weighting or sd.weighting)
    return Recipe(method, {}, terms, settings, about, sd.name, fingerprint(sd), str(sd.dtype).removeprefix("torch."))


@contextmanager
def unfreeze(params: dict[str, nn.Parameter]) -> Iterator[dict[str, nn.Parameter]]:
    """Make parameters of a frozen model trainable, in float32; afterwards their old numbers are restored.

    On a GPU the original numbers are kept in CPU memory.
    """
    originals = {}
    try:
        for name, param in params.items():
            device, original = param.device, param.data
            originals[name] = (device, original.cpu() if device.type == "cuda" else original)
            param.data = original.to(torch.float32, copy=True)
            param.requires_grad_(True)
        yield params
    finally:
        for name, (device, original) in originals.items():
            params[name].requires_grad_(False)
            params[name].grad = None
            params[name].data = original.to(device)
