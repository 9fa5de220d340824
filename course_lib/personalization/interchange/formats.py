"""File names of other tools, and conversions of tensors, for `export` and `load`.

Derived in: notebooks/14_multiple_concepts.ipynb, section "Which file opens where".
"""

import re

import torch
from torch import Tensor

from course_lib.latent.stable_diffusion import StableDiffusion

WORDS, CUSTOM = "learned_embeds.safetensors", "pytorch_custom_diffusion_weights.safetensors"
LORA, PEFT, DELTA = "pytorch_lora_weights.safetensors", "adapter_model.safetensors", "delta.bin"
KOHYA = "kohya_lora.safetensors"


def parameters(sd: StableDiffusion) -> dict[str, Tensor]:
    parts = {"unet": sd.unet, "text_encoder": sd.text_encoder}
    return {f"{part}.{name}": p.detach() for part, network in parts.items() for name, p in network.named_parameters()}


def few(names) -> str:
    """The first three names of a list, and how many more there are, for a message."""
    names = [str(name) for name in names]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def together(names, rows) -> dict[str, Tensor]:
    """["<v>", "<v>_1"] and a row for each -> {"<v>": (2, D)}: the rows of each word."""
    words = {}
    for name, row in zip(names, rows, strict=True):
        token = re.sub(r"_\d+$", "", name)
        words.setdefault(token if token in words else name, []).append(row)
    return {token: torch.stack(stack) for token, stack in words.items()}


def lora_pairs(tensors: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Our LoRA tensors as {"unet.<layer>": (A, B)}."""
    layers = [name.removesuffix(".lora.down") for name in tensors if name.endswith(".lora.down")]
    return {layer: (tensors[f"{layer}.lora.down"], tensors[f"{layer}.lora.up"]) for layer in layers}


def folded(pairs: dict[str, tuple[Tensor, Tensor]], sd: StableDiffusion) -> dict[str, Tensor]:
    """W + B A for each layer, in float32; where it does not fit, B A alone, so that `_check` names it."""
    have, weights = parameters(sd), {}
    for layer, (down, up) in pairs.items():
        change, base = up.flatten(1) @ down.flatten(1), have.get(f"{layer}.weight")
        fits = base is not None and change.shape == base.flatten(1).shape
        weights[f"{layer}.weight"] = base.cpu().float() + change.view_as(base) if fits else change
    return weights
