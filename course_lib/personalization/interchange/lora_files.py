"""LoRA files of diffusers, peft, kohya's scripts, A1111 and ComfyUI: each has its own names for the layers.

Derived in: notebooks/14_multiple_concepts.ipynb, section "Which file opens where".
"""

import json
import re
from pathlib import Path

import torch
from torch import Tensor, nn

from course_lib.latent.stable_diffusion import StableDiffusion
from course_lib.personalization import lora
from course_lib.personalization.interchange.formats import KOHYA, LORA, PEFT, folded, lora_pairs, parameters

LORA_KEY = re.compile(r"(.+?)[._]lora(?:_linear_layer)?[._](down|up|A|B)(?:\.default)?\.weight")
OTHERS = {"dora_scale": "DoRA", "lora_magnitude_vector": "DoRA", "hada_w1_a": "LoHa", "lokr_w": "LoKr"}
SPELLINGS = {
    "base_model_model_": "", "text_encoders_clip_l_transformer_": "text_encoder_",  # peft, ComfyUI
    "lora_unet_": "unet_", "diffusion_model_": "unet_", "lora_te_": "text_encoder_",  # kohya, ComfyUI
    "_processor_": "_", "_text_model_": "_",  # diffusers' older processors, CLIP's older layout
    "middle_block_0_": "mid_block_resnets_0_", "middle_block_1_": "mid_block_attentions_0_",  # the first Stable
    "middle_block_2_": "mid_block_resnets_1_", "in_layers_2": "conv1", "out_layers_3": "conv2",  # Diffusion, whose
    "emb_layers_1": "time_emb_proj", "skip_connection": "conv_shortcut",  # names ComfyUI keeps
}  # fmt: skip


def written(tensors: dict[str, Tensor], layout: str) -> dict[str, dict[str, Tensor]]:
    """{file: its tensors} of our LoRA tensors in the layout "diffusers", "peft" or "kohya".

    kohya: the one that A1111, ComfyUI and kohya's scripts read, and diffusers too.  peft: a folder for each network.
    """
    if layout == "diffusers":
        return {LORA: {_diffusers_key(name): value for name, value in tensors.items()}}
    files = {}
    for layer, (down, up) in lora_pairs(tensors).items():
        part, _, name = layer.partition(".")
        if layout == "peft":
            content, key, halves = files.setdefault(f"{part}/{PEFT}", {}), f"base_model.model.{name}", ("A", "B")
        else:  # a layer is scaled by alpha / rank, here 1
            content, halves = files.setdefault(KOHYA, {}), ("down", "up")
            name = name if part == "unet" else f"text_model.{name.removeprefix('text_model.')}"
            key = f"lora_{'unet' if part == 'unet' else 'te'}_{name}".replace(".", "_")
            content[f"{key}.alpha"] = torch.tensor(float(len(down)))
        content |= {f"{key}.lora_{half}.weight": value for half, value in zip(halves, (down, up))}
    return files


def _diffusers_key(name: str) -> str:
    """Our name of a thin matrix -> the one in diffusers' files, which keep CLIP's older layout."""
    if name.startswith("unet."):
        return f"{name}.weight"
    name = name.removeprefix("text_encoder.").removeprefix("text_model.")
    return f"text_encoder.text_model.{name}.weight".replace(".lora.", ".lora_linear_layer.")


def refuse_other_adapters(content: dict, path: Path) -> None:
    """Raise a ValueError for adapters other than LoRA, which come in the same kind of file."""
    for mark, kind in OTHERS.items():
        if any(mark in key for key in content):
            raise ValueError(f"path: expected LoRA, but {path} is {kind}, whose change of a weight is not one product "
                             "of two matrices; fold it into its model with the tool that made it")  # fmt: skip


def read(content: dict, note: dict, sd: StableDiffusion, path: Path) -> tuple[dict[str, Tensor], int | None]:
    """(A and B by our names, their rank); if the file has layers that our LoRA does not train: (whole weights, None).

    The scale is multiplied into B; zeros fill up to one rank.  Raises ValueError for a tensor that fits no layer.
    """
    pairs = _scaled_pairs(content, _settings(note, path), sd, path)
    ours = [layer.endswith(lora.LAYERS[layer.partition(".")[0]]) and A.ndim == 2 for layer, (A, _) in pairs.items()]
    if not all(ours):
        return folded(pairs, sd), None
    rank, tensors = max(len(down) for down, _ in pairs.values()), {}
    for layer, (down, up) in pairs.items():
        tensors[f"{layer}.lora.down"] = nn.functional.pad(down, (0, 0, 0, rank - len(down)))
        tensors[f"{layer}.lora.up"] = nn.functional.pad(up, (0, rank - len(down)))
    return tensors, rank


def _scaled_pairs(content: dict, settings: dict, sd: StableDiffusion, path: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """{"unet.<layer>": (A, scale B)}."""
    have, per_block = parameters(sd), sd.unet.config.layers_per_block
    layers = {flat(name.removesuffix(".weight")): name.removesuffix(".weight") for name in have}
    halves, alphas, unknown = {}, {}, []
    for key, value in content.items():
        match = LORA_KEY.fullmatch(key)
        layer = layers.get(flat(match[1] if match else key.removesuffix(".alpha"), per_block))
        if match and layer and value.ndim == have[f"{layer}.weight"].ndim:
            halves.setdefault(layer, {})[match[2].replace("A", "down").replace("B", "up")] = value.float()
        elif layer and key.endswith(".alpha"):
            alphas[layer] = float(value)
        else:
            unknown.append(key)
    for layer, half in halves.items():
        shape, (down, up) = have[f"{layer}.weight"].shape, (half.get("down"), half.get("up"))
        if down is None or up is None or down.shape[1:] != shape[1:] or up.shape[:2] != (shape[0], len(down)):
            unknown.append(layer)
    if unknown:
        raise ValueError(f"path: expected LoRA of this model {sd.name!r}, got {len(unknown)} tensors in {path} that "
                         f"fit none of its layers, such as {unknown[0]}; load the model it was trained on")  # fmt: skip
    return {layer: (half["down"], half["up"] * _scale(layer, len(half["down"]), alphas, settings))
            for layer, half in halves.items()}  # fmt: skip


def _settings(note: dict, path: Path) -> dict:
    """{"unet.lora_alpha": ...}: diffusers writes them to the file's metadata, peft to a file beside it."""
    beside = path.with_name("adapter_config.json")
    if not path.name.startswith("adapter_model") or not beside.is_file():
        return json.loads(note.get("lora_adapter_metadata") or "{}")
    given = json.loads(beside.read_text(encoding="utf-8"))
    return {f"{part}.{key}": value for part in lora.LAYERS for key, value in given.items()}


def _scale(layer: str, rank: int, alphas: dict[str, float], settings: dict) -> float:
    """alpha / r: alpha is beside the matrices (kohya) or in the settings (peft); without one it is r."""
    part, _, name = layer.partition(".")
    patterns = settings.get(f"{part}.alpha_pattern") or {}
    matching = [value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", name)]
    alpha = alphas.get(layer) or next(iter(matching), settings.get(f"{part}.lora_alpha", rank))
    return alpha / (rank**0.5 if settings.get(f"{part}.use_rslora") else rank)


def flat(name: str, per_block: int = 2) -> str:
    """One spelling for a layer's name in any file.  per_block: layers of a block, for names with one count."""

    def block(match: re.Match) -> str:  # "output_blocks_5_1_" -> "up_blocks_1_attentions_2_"
        which, layer = divmod(int(match[2]) - (match[1] == "input"), per_block + 1)
        kind = ("resnets", "attentions")[int(match[3])]
        return f"{'down' if match[1] == 'input' else 'up'}_blocks_{which}_{kind}_{layer}_"

    name = name.replace(".", "_")
    for old, new in SPELLINGS.items():
        name = name.replace(old, new)
    name = re.sub(r"(input|output)_blocks_(\d+)_([01])_", block, name)
    name = re.sub("to_out$", "to_out_0", name)
    name = re.sub("^(text_model_)?(encoder_layers_)", r"text_encoder_\2", name)  # peft writes a file for each network
    return name if name.startswith(("unet_", "text_encoder_")) else f"unet_{name}"
