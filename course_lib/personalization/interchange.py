"""A concept in the files of other tools: diffusers, the authors' Custom Diffusion, peft, and the common web interfaces.

Derived in: notebooks/14_multiple_concepts.ipynb.

    method             file                                          opened in diffusers by
    textual_inversion  learned_embeds.safetensors                    pipe.load_textual_inversion(file)
    custom_diffusion   pytorch_custom_diffusion_weights.safetensors  pipe.unet.load_attn_procs(folder, weight_name=...,
                                                                     _pipeline=pipe), without which nothing is loaded
                       <new1>.safetensors beside it                  pipe.load_textual_inversion(file)
    lora               pytorch_lora_weights.safetensors              pipe.load_lora_weights(folder)
    dreambooth, all    a pipeline folder                             StableDiffusionPipeline.from_pretrained(folder)

Read are these, whoever wrote them, and: the authors' delta.bin, compressed or not, embeddings of web interfaces (.pt,
.safetensors), and LoRA files of kohya's scripts. A pickle is opened only if it holds tensors and nothing that runs.
"""

import contextlib
import copy
import json
import os
import pickle
import re
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from course_lib.latent.stable_diffusion import StableDiffusion, load
from course_lib.personalization.concept import fingerprint
from course_lib.personalization.custom_diffusion import key_value_layers
from course_lib.personalization.dreambooth import LORA_LAYERS
from course_lib.personalization.saving import FORMAT, Concept, applied, check_base, uncompressed
from course_lib.personalization.textual_inversion import rows_of

WORDS, CUSTOM = "learned_embeds.safetensors", "pytorch_custom_diffusion_weights.safetensors"
LORA, DELTA = "pytorch_lora_weights.safetensors", "delta.bin"
LORA_KEY = re.compile(r"(.+?)[._]lora(?:_linear_layer)?[._](down|up|A|B)(?:\.default)?\.weight")
SPELLINGS = {"lora_unet_": "unet_", "lora_te_": "text_encoder_", "_processor_": "_", "_text_model_": "_"}
TEXT_LORA_LAYERS = ("q_proj", "k_proj", "v_proj", "out_proj")


# ---- writing ----


@torch.no_grad()
def export(concept: Concept, folder: str | Path, sd: StableDiffusion, *, pipeline: bool = False,
           dtype: torch.dtype = torch.float32) -> Path:  # fmt: skip
    """Write a concept as the files that other tools expect of its method; returns the folder.

    folder: made if it is not there.  sd: the base model.  dtype: of the numbers in the file.
    pipeline: write the whole model instead, with the weights folded in and the words in its tokenizer. That is large,
    needs neither processors nor peft, and is what DreamBooth has anyway.
    Raises ValueError if the concept is of another base model.
    """
    check_base(sd, concept)
    concept = uncompressed(sd, concept)
    folder = Path(folder).expanduser()
    tensors = {name: value.to(dtype) for name, value in concept.tensors.items()}
    if pipeline or concept.method == "dreambooth":
        return _write_pipeline(concept, folder, sd, dtype)
    if concept.method not in ("textual_inversion", "custom_diffusion", "lora"):
        raise ValueError(f"concept: expected a method of this course, got {concept.method!r}; use pipeline=True")
    words = _together(concept.about.get("rows", ()), tensors.pop("tokens", ()))
    if concept.method == "textual_inversion" and len(words) == 1:
        files = {WORDS: words}
    else:  # a file for each word: diffusers reads one from each
        files = {_file_name(token): {token: rows.squeeze(0)} for token, rows in words.items()}
    if concept.method == "custom_diffusion":
        files[CUSTOM] = _processors(tensors, sd, dtype)
    if concept.method == "lora":
        files[LORA] = {_lora_key(name): value for name, value in tensors.items()}
    for name, content in files.items():
        _write(folder / name, content)
    return folder


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise OSError(f"folder: {path} can not be written ({error}); make room, or choose another folder") from error


def _write(path: Path, tensors: dict[str, Tensor]) -> None:
    """A file appears whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    with _writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            save_file({key: value.cpu().contiguous() for key, value in tensors.items()}, temporary, {"format": "pt"})
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def _together(names, rows) -> dict[str, Tensor]:
    """["<v>", "<v>_1"] and a row for each -> {"<v>": (2, D)}: the rows of each word."""
    words = {}
    for name, row in zip(names, rows, strict=True):
        token = re.sub(r"_\d+$", "", name)
        words.setdefault(token if token in words else name, []).append(row)
    return {token: torch.stack(stack) for token, stack in words.items()}


def _file_name(token: str) -> str:
    return re.sub(r'[<>:"/\\|?*]' if os.name == "nt" else "/", "_", token) + ".safetensors"


def _processors(tensors: dict[str, Tensor], sd: StableDiffusion, dtype: torch.dtype) -> dict[str, Tensor]:
    """Keys and values as the weights of diffusers' attention processors.

    Its loader wants an entry for every attention; an empty one stands for "as it was".
    """
    files = {name: torch.empty(0, dtype=dtype) for name in sd.unet.attn_processors if ".attn2." not in name}
    for name, layer in key_value_layers(sd.unet).items():
        parent, _, child = name.rpartition(".")
        weight = tensors.get(f"unet.{name}.weight", layer.weight)
        files[f"{parent}.processor.{child}_custom_diffusion.weight"] = weight.to(dtype)
    return files


def _lora_key(name: str) -> str:
    """Our name of a thin matrix -> the one in diffusers' files, which keep CLIP's older layout."""
    if name.startswith("unet."):
        return f"{name}.weight"
    name = name.removeprefix("text_encoder.").removeprefix("text_model.")
    return f"text_encoder.text_model.{name}.weight".replace(".lora.", ".lora_linear_layer.")


def _write_pipeline(concept: Concept, folder: Path, sd: StableDiffusion, dtype: torch.dtype) -> Path:
    weights = {name: value for name, value in concept.tensors.items() if name != "tokens"}
    if concept.method == "lora":
        weights = _folded(_pairs(weights), sd)
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


# ---- reading ----


@torch.no_grad()
def load_foreign(path: str | Path, sd: StableDiffusion, words: dict[str, str] | None = None) -> Concept:
    """Read another tool's file, or the folder that it is in, as a concept of this model; what it is, the file tells.

    words: {"<v>": "cat"}: a new name, and the class noun, for each word in the file, in its order.  By default the
    file's names, in lower case and brackets, and "object".
    Raises ValueError if it is none of the kinds above, a pickle that holds more than tensors, or of another model.
    """
    path = Path(path).expanduser()
    if (path / "model_index.json").is_file():
        rows, weights = _difference(path, sd)
        return _concept(sd, rows, weights, words, path, relative=True)
    path = _main_file(path)
    content, note = _read(path)
    if note.get("format") == FORMAT:
        raise ValueError(f"path: expected another tool's file, got one of this course: load_concept reads {path}")
    if "emb_params" in content or isinstance(content.get("string_to_param"), dict):
        embedding = content["emb_params"] if "emb_params" in content else content["string_to_param"].get("*")
        return _concept(sd, {content.get("name") or path.stem: embedding}, {}, words, path)
    if isinstance(content.get("unet"), dict):
        weights, relative = _delta(content, sd)
        return _concept(sd, content.get("modifier_token") or {}, weights, words, path, relative)
    if any("custom_diffusion" in key for key in content):
        weights = {f"unet.{key.replace('.processor.', '.').replace('_custom_diffusion', '')}": value
                   for key, value in content.items() if torch.is_tensor(value) and value.numel()}  # fmt: skip
        return _concept(sd, _words_beside(path), weights, words, path)
    if any(LORA_KEY.fullmatch(key) for key in content):
        return _lora(content, note, sd, words, path)
    if content and all(torch.is_tensor(v) and v.ndim in (1, 2) and "." not in key for key, v in content.items()):
        return _concept(sd, content, {}, words, path)
    raise ValueError(f"path: expected {WORDS}, {CUSTOM}, {LORA}, {DELTA}, an embedding or a pipeline folder, got "
                     f"{path} with {', '.join(map(repr, list(content)[:3])) or 'nothing in it'}")  # fmt: skip


def _main_file(path: Path) -> Path:
    if path.is_file():
        return path
    names = [name for known in (CUSTOM, LORA, WORDS) for name in (known, known.replace("safetensors", "bin"))]
    for name in (*names, DELTA):
        if (path / name).is_file():
            return path / name
    raise ValueError(f"path: expected a file, or a folder with one of {', '.join((*names, DELTA))} or a "
                     f"model_index.json, got {path}")  # fmt: skip


def _read(path: Path) -> tuple[dict, dict]:
    """What is in a file, and its metadata."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"path: expected tensors only, but {path} is damaged or holds code that would run on opening; "
                         "ask its maker for a safetensors file") from error  # fmt: skip
    except Exception as error:  # what torch raises for a file of some other kind is not fixed
        raise ValueError(f"path: expected a safetensors or torch file, but {path} can not be read ({error})") from error
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ValueError(f"path: expected named tensors, got {type(content).__name__} in {path}")
    return content, {}


def _words_beside(path: Path) -> dict[str, Tensor]:
    """{"<new1>": (D,), ...} of the files beside Custom Diffusion's weights that are named after a word."""
    named = re.compile(r"[<_].+[>_]\.(safetensors|bin)")
    files = [file for file in sorted(path.parent.iterdir()) if named.fullmatch(file.name)]
    found = {token: row for file in files for token, row in _read(file)[0].items()}
    if not found:
        warnings.warn(f"{path.parent}: no file of a word, such as <new1>.safetensors: only weights", stacklevel=4)
    return found


def _concept(sd: StableDiffusion, rows: dict, weights: dict, words: dict[str, str] | None, path: Path,
             relative: bool = False, rank: int | None = None) -> Concept:  # fmt: skip
    """Words and weights of a file, checked against the model.  relative: weights were computed from the model's own."""
    width = sd.text_encoder.get_input_embeddings().weight.shape[1]
    shapes = {token: tuple(getattr(row, "shape", ())) for token, row in rows.items()}
    if any(len(shape) not in (1, 2) or shape[-1] != width or 0 in shape for shape in shapes.values()):
        raise ValueError(f"path: expected words of {width} numbers for {sd.name!r}, got {shapes} in {path}")
    if rank is None:
        _check(weights, sd, path)
    words = words or dict.fromkeys((_token(token) for token in rows) if rows else [""], "object")
    if len(words) != max(len(rows), 1):
        raise ValueError(f"words: expected a name and a noun for each of {list(rows) or 'one subject'}, got {words}")
    stacks = [row.detach().float().reshape(-1, width) for row in rows.values()]
    tensors = {"tokens": torch.cat(stacks)} if rows else {}
    tensors |= {name: value.detach().float() for name, value in weights.items()}
    tokens, nouns = list(words), list(words.values())
    about = {"token": tokens[0], "noun": nouns[0], "tokens": tokens[: len(rows)], "nouns": nouns[: len(rows)],
             "rows": [name for token, stack in zip(tokens, stacks) for name in rows_of(token, len(stack))]}  # fmt: skip
    about |= {"rank": rank} if rank else {}
    method = "lora" if rank else _method(weights, sd)
    return Concept(method, tensors, sd.name, about, {"source": path.name}, fingerprint(sd) if relative else None)


def _token(name: str) -> str:
    """A word's name in a file -> in the form that both tokenizers and pipelines treat well."""
    return "<" + re.sub(r"[\s<>]+", "-", name.lower().strip(" <>")) + ">"


def _method(weights: dict, sd: StableDiffusion) -> str:
    if not weights:
        return "textual_inversion"
    keys_values = {f"unet.{name}.weight" for name in key_value_layers(sd.unet)}
    return "custom_diffusion" if keys_values.issuperset(weights) else "dreambooth"


def _parameters(sd: StableDiffusion) -> dict[str, Tensor]:
    parts = {"unet": sd.unet, "text_encoder": sd.text_encoder}
    return {f"{part}.{name}": p.detach() for part, network in parts.items() for name, p in network.named_parameters()}


def _check(weights: dict[str, Tensor], sd: StableDiffusion, path: Path) -> None:
    have = _parameters(sd)
    shapes = {name: tuple(getattr(value, "shape", ())) for name, value in weights.items()}
    wrong = [name for name, shape in shapes.items() if name not in have or have[name].shape != shape]
    if wrong:
        raise ValueError(f"path: expected weights of this model {sd.name!r}, got {len(wrong)} others in {path}, such "
                         f"as {wrong[0]} {shapes[wrong[0]]}; load the model they were trained on")  # fmt: skip


# ---- the authors' Custom Diffusion, and whole models ----


def _delta(content: dict, sd: StableDiffusion) -> tuple[dict[str, Tensor], bool]:
    """Weights of a delta.bin, and whether it is compressed: an entry {"u", "v"} is a change u v of the model's own."""
    have = _parameters(sd)
    names = {_flat(name): name for name in have}
    weights = {f"unet.{name}": value for name, value in content["unet"].items()}
    for name, value in content.get("text_encoder", {}).items():
        name = names.get(_flat(f"text_encoder.{name}"))
        if name is not None:  # the rows of new words stand under modifier_token
            value = value[: len(have[name])] if name.endswith("token_embedding.weight") else value
            weights |= {} if _same(value.float(), have[name]) else {name: value}
    thin = {name.removesuffix(".weight"): (value["v"].float(), value["u"].float())
            for name, value in weights.items() if isinstance(value, dict) and value.keys() == {"u", "v"}}  # fmt: skip
    return weights | _folded(thin, sd), bool(thin)


def _difference(folder: Path, sd: StableDiffusion) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """New words, and the weights in which a model differs from the base by more than the rounding to half precision."""
    other, base = load(folder, "cpu", torch.float32), _parameters(sd)
    weights, rows = _parameters(other), {}
    table, known = other.text_encoder.get_input_embeddings().weight, len(sd.tokenizer)
    if len(table) > known:
        name = next(name for name, value in weights.items() if value.data_ptr() == table.data_ptr())
        added = other.tokenizer.convert_ids_to_tokens(list(range(known, len(other.tokenizer))))
        rows = _together(added, table[known : len(other.tokenizer)])
        weights[name] = weights[name][:known]
    weights = {name: value for name, value in weights.items() if name not in base or not _same(value, base[name])}
    if not weights and not rows:
        raise ValueError(f"path: expected a model that was trained further, but {folder} is the base model itself")
    own = dict(sd.vae.named_parameters())
    same = all(name in own and _same(value, own[name]) for name, value in other.vae.named_parameters())
    if not same or other.noise_settings != sd.noise_settings:
        warnings.warn(f"{folder}: its autoencoder or noise schedule is another one, and is left out", stacklevel=4)
    return rows, weights


def _same(value: Tensor, base: Tensor) -> bool:
    """Whether a float32 tensor from a file is the base's, perhaps rounded to half precision there or here."""
    base = base.cpu()
    if value.shape != base.shape:
        return False
    return torch.equal(value.to(base.dtype), base) or torch.equal(value, base.half().float())


# ---- LoRA ----


def _lora(content: dict, note: dict, sd: StableDiffusion, words: dict | None, path: Path) -> Concept:
    """Thin matrices with their scale multiplied in; for layers that ours leaves alone, the weights they amount to."""
    pairs = _scaled_pairs(content, json.loads(note.get("lora_adapter_metadata") or "{}"), sd, path)
    if not all(_ours(layer, down) for layer, (down, _) in pairs.items()):
        return _concept(sd, {}, _folded(pairs, sd), words, path, relative=True)
    rank, tensors = max(len(down) for down, _ in pairs.values()), {}
    for layer, (down, up) in pairs.items():  # zeros fill up to one rank
        tensors[f"{layer}.lora.down"] = nn.functional.pad(down, (0, 0, 0, rank - len(down)))
        tensors[f"{layer}.lora.up"] = nn.functional.pad(up, (0, rank - len(down)))
    return _concept(sd, {}, tensors, words, path, rank=rank)


def _scaled_pairs(content: dict, settings: dict, sd: StableDiffusion, path: Path) -> dict:
    """{"unet.<layer>": (A, scale B)}.  Raises ValueError for a tensor that fits no layer."""
    have = _parameters(sd)
    layers = {_flat(name.removesuffix(".weight")): name.removesuffix(".weight") for name in have}
    halves, alphas, unknown = {}, {}, []
    for key, value in content.items():
        match = LORA_KEY.fullmatch(key)
        layer = layers.get(_flat(match[1] if match else key.removesuffix(".alpha")))
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


def _scale(layer: str, rank: int, alphas: dict[str, float], settings: dict) -> float:
    """alpha / r, where alpha stands beside the matrices (kohya), in the metadata (peft), or is r as none is given."""
    part, _, name = layer.partition(".")
    patterns = settings.get(f"{part}.alpha_pattern") or {}
    matching = [value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", name)]
    alpha = alphas.get(layer) or next(iter(matching), settings.get(f"{part}.lora_alpha", rank))
    return alpha / (rank**0.5 if settings.get(f"{part}.use_rslora") else rank)


def _flat(name: str) -> str:
    """One spelling for a layer: files have dots or underscores, CLIP's older layout, and older names of processors."""
    name = name.replace(".", "_")
    for old, new in SPELLINGS.items():
        name = name.replace(old, new)
    name = re.sub("to_out$", "to_out_0", name)
    return name if name.startswith(("unet_", "text_encoder_")) else f"unet_{name}"


def _ours(layer: str, down: Tensor) -> bool:
    """Whether the LoRA of this course has this layer too."""
    return down.ndim == 2 and layer.endswith(LORA_LAYERS if layer.startswith("unet.") else TEXT_LORA_LAYERS)


def _pairs(tensors: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Our LoRA tensors as {"unet.<layer>": (A, B)}."""
    layers = [name.removesuffix(".lora.down") for name in tensors if name.endswith(".lora.down")]
    return {layer: (tensors[f"{layer}.lora.down"], tensors[f"{layer}.lora.up"]) for layer in layers}


def _folded(pairs: dict[str, tuple[Tensor, Tensor]], sd: StableDiffusion) -> dict[str, Tensor]:
    """W + B A for each layer, in float32; where it does not fit, B A alone, for `_check` to name."""
    have, weights = _parameters(sd), {}
    for layer, (down, up) in pairs.items():
        change, base = up.flatten(1) @ down.flatten(1), have.get(f"{layer}.weight")
        fits = base is not None and change.shape == base.flatten(1).shape
        weights[f"{layer}.weight"] = base.cpu().float() + change.view_as(base) if fits else change
    return weights
