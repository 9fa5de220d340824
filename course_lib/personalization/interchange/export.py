"""Write a concept as files for other tools.

Derived in: notebooks/14_multiple_concepts.ipynb, section "Which file opens where".

    method             file                                          opened in diffusers by
    textual_inversion  learned_embeds.safetensors                    pipe.load_textual_inversion(file)
    custom_diffusion   pytorch_custom_diffusion_weights.safetensors  pipe.unet.load_attn_procs(folder, weight_name=...,
                                                                     _pipeline=pipe), without which nothing is loaded
                       <new1>.safetensors beside it                  pipe.load_textual_inversion(file)
    lora               pytorch_lora_weights.safetensors              pipe.load_lora_weights(folder)
    lora, "kohya"      kohya_lora.safetensors (A1111, ComfyUI too)   pipe.load_lora_weights(folder, weight_name=...)
    lora, "peft"       unet/adapter_model.safetensors, and settings  PeftModel.from_pretrained(pipe.unet, folder/unet)
    dreambooth, all    a pipeline folder                             StableDiffusionPipeline.from_pretrained(folder)
"""

import contextlib
import copy
import json
import os
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from course_lib.environment import write_whole
from course_lib.latent.stable_diffusion import StableDiffusion
from course_lib.personalization import lora
from course_lib.personalization.concept import Concept, applied, check_base, check_finite, check_tokens
from course_lib.personalization.custom_diffusion import key_value_layers
from course_lib.personalization.interchange import lora_files
from course_lib.personalization.interchange.formats import CUSTOM, WORDS, folded, lora_pairs, together
from course_lib.personalization.merge import uncompressed


@torch.no_grad()
def export(concept: Concept, folder: str | Path, sd: StableDiffusion, *, pipeline: bool = False,
           dtype: torch.dtype = torch.float32, layout: str = "diffusers") -> Path:  # fmt: skip
    """Write a concept as the files that other tools expect for its method; returns the folder.

    folder: made if it is missing.  sd: the base model.  dtype: of the numbers in the file.
    pipeline: write the whole model instead, with the weights folded in and the words in its tokenizer. That is large,
    but needs neither processors nor peft; DreamBooth is always written so.
    layout: "diffusers"; for LoRA also "kohya", which A1111 and ComfyUI read, and "peft".
    Raises ValueError if the concept is of another base model, has a token that is the name of another's row, or numbers
    that are not finite in this dtype, or if the layout is not one for its method.
    """
    check_base(sd, concept)
    check_tokens([concept])
    concept = uncompressed(sd, concept)
    if layout not in ("diffusers", *(("kohya", "peft") if concept.method == "lora" and not pipeline else ())):
        raise ValueError(f"layout: expected 'diffusers', or with lora 'kohya' or 'peft', got {layout!r} with "
                         f"{concept.method}; A1111 and ComfyUI read a word in the layout 'diffusers'")  # fmt: skip
    folder = Path(folder).expanduser()
    tensors = {name: value.to(dtype) for name, value in concept.tensors.items()}
    check_finite(tensors, folder)
    if pipeline or concept.method == "dreambooth":
        return _write_pipeline(concept, folder, sd, dtype)
    if concept.method not in ("textual_inversion", "custom_diffusion", "lora"):
        raise ValueError(f"concept: expected a method of this course, got {concept.method!r}; use pipeline=True")
    words = together(concept.about.get("rows", ()), tensors.pop("tokens", ()))
    if concept.method == "textual_inversion" and len(words) == 1:
        files = {WORDS: words}
    else:  # a file for each word, since diffusers reads one word from a file
        files = {_file_name(token): {token: rows.squeeze(0)} for token, rows in words.items()}
    if concept.method == "custom_diffusion":
        files[CUSTOM] = _processors(tensors, sd, dtype)
    if concept.method == "lora":
        files = lora_files.written(tensors, layout)
    for name, content in files.items():
        _write(folder / name, content)
        if layout == "peft":
            rank, layers = concept.about["rank"], lora.LAYERS[name.split("/")[0]]
            note = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": layers}
            (folder / name).with_name("adapter_config.json").write_text(json.dumps(note), encoding="utf-8")
    return folder


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise OSError(f"folder: {path} cannot be written ({error}); make room, or choose another folder") from error


def _write(path: Path, tensors: dict[str, Tensor]) -> None:
    with _writing(path), write_whole(path) as temporary:
        save_file({key: value.cpu().contiguous() for key, value in tensors.items()}, temporary, {"format": "pt"})


def _file_name(token: str) -> str:
    return re.sub(r'[<>:"/\\|?*]' if os.name == "nt" else "/", "_", token) + ".safetensors"


def _processors(tensors: dict[str, Tensor], sd: StableDiffusion, dtype: torch.dtype) -> dict[str, Tensor]:
    """Keys and values as the weights of diffusers' attention processors.

    Its loader expects an entry for every attention layer; an empty one means "unchanged".
    """
    files = {name: torch.empty(0, dtype=dtype) for name in sd.unet.attn_processors if ".attn2." not in name}
    for name, layer in key_value_layers(sd.unet).items():
        parent, _, child = name.rpartition(".")
        weight = tensors.get(f"unet.{name}.weight", layer.weight)
        files[f"{parent}.processor.{child}_custom_diffusion.weight"] = weight.to(dtype)
    return files


def _write_pipeline(concept: Concept, folder: Path, sd: StableDiffusion, dtype: torch.dtype) -> Path:
    weights = {name: value for name, value in concept.tensors.items() if name != "tokens"}
    if concept.method == "lora":
        weights = folded(lora_pairs(weights), sd)
    whole = copy.copy(sd)
    with applied(sd, replace(concept, method="dreambooth", tensors=weights)):
        whole.text_encoder, whole.tokenizer = copy.deepcopy(sd.text_encoder), copy.deepcopy(sd.tokenizer)
        if "tokens" in concept.tensors:
            whole.tokenizer.add_tokens(concept.about["rows"])
            whole.text_encoder.resize_token_embeddings(len(whole.tokenizer), mean_resizing=False)
            rows = concept.tensors["tokens"]
            whole.text_encoder.get_input_embeddings().weight[-len(rows) :] = rows.to(sd.device, sd.dtype)
        with _writing(folder):
            whole.save(folder, dtype)
    return folder
