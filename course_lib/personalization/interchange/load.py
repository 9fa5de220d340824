"""Files of other tools read as a concept: diffusers, the authors' Custom Diffusion, peft, the common web interfaces.

Derived in: notebooks/14_multiple_concepts.ipynb, section "Which file opens where".

Read are the files that `export` writes, whoever wrote them, and: the authors' delta.bin, compressed or not, embeddings
of web interfaces (.pt, .safetensors), and LoRA files of kohya's scripts. A pickle is opened only if it holds tensors
and nothing that runs.
"""

import json
import pickle
import re
import warnings
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from course_lib.latent.registry import fingerprint
from course_lib.latent.stable_diffusion import StableDiffusion, load
from course_lib.personalization import lora
from course_lib.personalization.concept import FORMAT, Concept
from course_lib.personalization.custom_diffusion import key_value_layers
from course_lib.personalization.interchange.formats import CUSTOM, DELTA, LORA, WORDS, folded, parameters, together
from course_lib.personalization.textual_inversion import rows_of

LORA_KEY = re.compile(r"(.+?)[._]lora(?:_linear_layer)?[._](down|up|A|B)(?:\.default)?\.weight")
SPELLINGS = {"lora_unet_": "unet_", "lora_te_": "text_encoder_", "_processor_": "_", "_text_model_": "_"}


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
        raise ValueError(f"path: expected a safetensors or torch file, but {path} cannot be read ({error})") from error
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


def _check(weights: dict[str, Tensor], sd: StableDiffusion, path: Path) -> None:
    have = parameters(sd)
    shapes = {name: tuple(getattr(value, "shape", ())) for name, value in weights.items()}
    wrong = [name for name, shape in shapes.items() if name not in have or have[name].shape != shape]
    if wrong:
        raise ValueError(f"path: expected weights of this model {sd.name!r}, got {len(wrong)} others in {path}, such "
                         f"as {wrong[0]} {shapes[wrong[0]]}; load the model they were trained on")  # fmt: skip


# ---- the authors' Custom Diffusion, and whole models ----


def _delta(content: dict, sd: StableDiffusion) -> tuple[dict[str, Tensor], bool]:
    """Weights of a delta.bin, and whether it is compressed: an entry {"u", "v"} is a change u v of the model's own."""
    have = parameters(sd)
    names = {_flat(name): name for name in have}
    weights = {f"unet.{name}": value for name, value in content["unet"].items()}
    for name, value in content.get("text_encoder", {}).items():
        name = names.get(_flat(f"text_encoder.{name}"))
        if name is not None:  # the rows of new words stand under modifier_token
            value = value[: len(have[name])] if name.endswith("token_embedding.weight") else value
            weights |= {} if _same(value.float(), have[name]) else {name: value}
    thin = {name.removesuffix(".weight"): (value["v"].float(), value["u"].float())
            for name, value in weights.items() if isinstance(value, dict) and value.keys() == {"u", "v"}}  # fmt: skip
    return weights | folded(thin, sd), bool(thin)


def _difference(folder: Path, sd: StableDiffusion) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """New words, and the weights in which a model differs from the base by more than the rounding to half precision."""
    other, base = load(folder, "cpu", torch.float32), parameters(sd)
    weights, rows = parameters(other), {}
    table, known = other.text_encoder.get_input_embeddings().weight, len(sd.tokenizer)
    if len(table) > known:
        name = next(name for name, value in weights.items() if value.data_ptr() == table.data_ptr())
        added = other.tokenizer.convert_ids_to_tokens(list(range(known, len(other.tokenizer))))
        rows = together(added, table[known : len(other.tokenizer)])
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
        return _concept(sd, {}, folded(pairs, sd), words, path, relative=True)
    rank, tensors = max(len(down) for down, _ in pairs.values()), {}
    for layer, (down, up) in pairs.items():  # zeros fill up to one rank
        tensors[f"{layer}.lora.down"] = nn.functional.pad(down, (0, 0, 0, rank - len(down)))
        tensors[f"{layer}.lora.up"] = nn.functional.pad(up, (0, rank - len(down)))
    return _concept(sd, {}, tensors, words, path, rank=rank)


def _scaled_pairs(content: dict, settings: dict, sd: StableDiffusion, path: Path) -> dict:
    """{"unet.<layer>": (A, scale B)}.  Raises ValueError for a tensor that fits no layer."""
    have = parameters(sd)
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
    return down.ndim == 2 and layer.endswith(lora.LAYERS[layer.partition(".")[0]])
