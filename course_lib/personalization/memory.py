"""How much memory a training needs, and settings that fit if there is less.

Used by: notebooks/12_dreambooth.ipynb, section "Memory".
"""

import importlib.util
from dataclasses import replace

import psutil
import torch

from course_lib.latent.stable_diffusion import StableDiffusion
from course_lib.personalization.recipe import Recipe, Settings

GIB = 2**30
RUNTIME = GIB // 2  # of a process before anything is computed
# Bytes of a step per byte of the UNet's layer outputs. Measured: autograd keeps 0.8 to 1.1; 1.25 leaves room for the
# backward pass. With gradient checkpointing: the inputs of all blocks, and one block at a time.
KEPT, KEPT_CHECKPOINTED = 1.25, 0.3


def memory_plan(sd: StableDiffusion, recipe: Recipe, free: int, low_memory: bool = False) -> tuple[Settings, str]:
    """(settings, words): settings with which a training fits into `free` bytes, if any do, and its needs in words.

    Counted: all weights; for each trained number 4 bytes of gradient, 8 of Adam's two moments and, on a CPU, 4 of the
    original; the layer outputs of a step.  low_memory: also enable options that only cost speed, even if it fits.
    """
    trained = sum(param.numel() for param in recipe.params.values())
    parts = [param for part in (sd.vae, sd.unet, sd.text_encoder) for param in part.parameters()]
    weights = sum(param.numel() * param.element_size() for param in parts) + RUNTIME
    weights += 4 * trained if sd.device.type == "cpu" else 0
    picture = layer_outputs(sd)

    def activations(s: Settings) -> float:
        pictures = s.batch_size // s.accumulate * len(recipe.terms)
        return pictures * picture * (KEPT_CHECKPOINTED if s.gradient_checkpointing else KEPT)

    def adam(s: Settings) -> int:
        return (2 if s.optimizer == "adamw8bit" else 8) * trained

    def need(s: Settings) -> float:
        return weights + 4 * trained + adam(s) + activations(s)

    s, switched = recipe.settings, []
    for words, change, costs_time_only in (
        ("gradient checkpointing", {"gradient_checkpointing": True}, True),
        ("one picture at a time", {"accumulate": recipe.settings.batch_size}, True),
        ("8-bit Adam", {"optimizer": "adamw8bit"}, False),
    ):
        possible = costs_time_only or (sd.device.type == "cuda" and importlib.util.find_spec("bitsandbytes"))
        if possible and (need(s) > free or (low_memory and costs_time_only)) and replace(s, **change) != s:
            s, switched = replace(s, **change), [*switched, words]
    numbers = (weights, 4 * trained, adam(s), activations(s), need(s), free)
    words = ("memory: weights {:.2f} + gradients {:.2f} + optimiser {:.2f} + activations {:.2f} GiB: this needs about "
             "{:.1f} GiB; you have {:.1f}").format(*(number / GIB for number in numbers))  # fmt: skip
    words += f"; {', '.join(switched)} switched on" if switched else ""
    if need(s) > free:
        words += "; it may not fit: try --method lora or custom-diffusion, or --batch-size 1"
    return s, words


def layer_outputs(sd: StableDiffusion) -> int:
    """Bytes of the outputs of all layers of the UNet, for one picture."""
    total, config = 0, sd.unet.config

    def count(layer, inputs, output):
        nonlocal total
        total += output.numel() * output.element_size() if torch.is_tensor(output) else 0

    leaves = [layer for layer in sd.unet.modules() if not any(layer.children())]
    hooks = [layer.register_forward_hook(count) for layer in leaves]
    try:
        with torch.no_grad():
            features = torch.zeros(1, sd.tokenizer.model_max_length, config.cross_attention_dim, device=sd.device)
            sd.unet_eps(sd.noise(1, seed=0), 1, features)
    finally:
        for hook in hooks:
            hook.remove()
    return total


def device_memory(device: torch.device) -> int:
    """Bytes that this process may use: those that are free, and those that it has already."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    return psutil.virtual_memory().available + psutil.Process().memory_info().rss
