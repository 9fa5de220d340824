"""Read files of other tools as a concept: diffusers, the authors' Custom Diffusion, peft, the common web interfaces.

Derived in: notebooks/14_multiple_concepts.ipynb, section "Which file opens where".

It reads the kinds of files that `export` writes; the authors' delta.bin, compressed or not; embeddings of web
interfaces and of the first Textual Inversion (.pt, .safetensors); and the LoRA files of `lora_files`. A pickle is
opened only if it holds tensors and no code.
"""

import pickle
import re
import warnings
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from course_lib.latent.registry import check_pointer, fingerprint
from course_lib.latent.stable_diffusion import StableDiffusion, load
from course_lib.personalization.concept import FORMAT, Concept, check_finite
from course_lib.personalization.custom_diffusion import key_value_layers
from course_lib.personalization.interchange import formats, lora_files
from course_lib.personalization.interchange.formats import CUSTOM, DELTA, KOHYA, LORA, PEFT, WORDS, few, together
from course_lib.personalization.textual_inversion import rows_of

# ---- reading ----


@torch.no_grad()
def load_foreign(path: str | Path, sd: StableDiffusion, words: dict[str, str] | None = None) -> Concept:
    """Read another tool's file, or its folder, as a concept of this model; the format is detected from the contents.

    words: {"<v>": "cat"}: a new name and the class noun for each word in the file, in the file's order.  By default the
    file's names, in lower case and brackets, and no noun.
    Raises ValueError if the file is of no kind above, is a pickle that holds more than tensors, fits another model, or
    holds NaN or infinity.
    """
    path = Path(path).expanduser()
    if (path / "model_index.json").is_file():
        rows, weights = _difference(path, sd)
        return _concept(sd, rows, weights, words, path, relative=True)
    path = _main_file(path)
    content, note = _read(path)
    if note.get("format") == FORMAT:
        raise ValueError(f"path: expected another tool's file, got one of this course: load_concept reads {path}")
    lora_files.refuse_other_adapters(content, path)
    if "emb_params" in content or isinstance(content.get("string_to_param"), dict):
        named = content["string_to_param"] if "string_to_param" in content else {"*": content["emb_params"]}
        name = str(content.get("name") or path.stem)  # such files call any word "*"
        return _concept(sd, {name if key == "*" else key: rows for key, rows in named.items()}, {}, words, path)
    if isinstance(content.get("unet"), dict):
        weights, relative = _delta(content, sd)
        return _concept(sd, content.get("modifier_token") or {}, weights, words, path, relative=relative)
    if any("custom_diffusion" in key for key in content):
        weights = {f"unet.{key.replace('.processor.', '.').replace('_custom_diffusion', '')}": value
                   for key, value in content.items() if torch.is_tensor(value) and value.numel()}  # fmt: skip
        return _concept(sd, _words_beside(path), weights, words, path)
    if any(lora_files.LORA_KEY.fullmatch(key) for key in content):
        tensors, rank = lora_files.read(content, note, sd, path)
        return _concept(sd, {}, tensors, words, path, relative=rank is None, rank=rank)
    if content and all(torch.is_tensor(v) and v.ndim in (1, 2) and "." not in key for key, v in content.items()):
        return _concept(sd, content, {}, words, path)
    raise ValueError(f"path: expected {WORDS}, {CUSTOM}, {LORA}, {DELTA}, an embedding or a pipeline folder, got "
                     f"{path} with {few(map(repr, content)) or 'nothing in it'}")  # fmt: skip


def _main_file(path: Path) -> Path:
    if path.is_file():
        return path
    for known in (CUSTOM, LORA, KOHYA, PEFT, WORDS, DELTA):
        for name in (known, known.replace("safetensors", "bin")):
            if (path / name).is_file():
                return path / name
    raise ValueError(f"path: expected a file, or a folder with one of {CUSTOM}, {LORA}, {PEFT}, {WORDS} (or .bin), "
                     f"{DELTA} or model_index.json, got {path}")  # fmt: skip


def _read(path: Path) -> tuple[dict, dict]:
    """The contents of a file, and its metadata."""
    check_pointer(path)
    try:
        with open(path, "rb") as file:
            safe = path.suffix.lower() == ".safetensors" or file.read(9)[8:] == b"{"
        if safe:
            with safe_open(path, "pt") as file:
                return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}
        with torch.serialization.safe_globals([nn.ParameterDict]):  # of tensors, in the first Textual Inversion
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"path: expected tensors only, but {path} is damaged or holds code that would run on opening; "
                         "ask its maker for a safetensors file") from error  # fmt: skip
    except Exception as error:  # torch raises many kinds for files that are none of its own
        raise ValueError(f"path: expected a safetensors or torch file, but {path} cannot be read ({error})") from error
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ValueError(f"path: expected named tensors, got {type(content).__name__} in {path}")
    return {key: vars(value).get("_parameters") if isinstance(value, nn.ParameterDict) else value
            for key, value in content.items()}, {}  # fmt: skip


def _words_beside(path: Path) -> dict[str, Tensor]:
    """{"<new1>": (D,), ...} of the files beside Custom Diffusion's weights that are named after a word."""
    named = re.compile(r"[<_].+[>_]\.(safetensors|bin)")
    files = [file for file in sorted(path.parent.iterdir()) if named.fullmatch(file.name)]
    found = {token: row for file in files for token, row in _read(file)[0].items()}
    if not found:
        warnings.warn(f"{path.parent}: no file of a word, such as <new1>.safetensors; weights only", stacklevel=4)
    return found


def _concept(sd: StableDiffusion, rows: dict, weights: dict, words: dict[str, str] | None, path: Path, *,
             relative: bool = False, rank: int | None = None) -> Concept:  # fmt: skip
    """Words and weights of a file, checked against the model.  relative: weights were computed from the model's own."""
    width = sd.text_encoder.get_input_embeddings().weight.shape[1]
    shapes = {token: tuple(getattr(row, "shape", ())) for token, row in rows.items()}
    wrong = {token: s for token, s in shapes.items() if len(s) not in (1, 2) or s[-1] != width or 0 in s}
    if wrong:
        raise ValueError(f"path: expected words of {width} numbers for {sd.name!r}, got "
                         f"{few(f'{token} {shape}' for token, shape in wrong.items())} in {path}")  # fmt: skip
    if rank is None:
        _check(weights, sd, path)
    words = words or dict.fromkeys((_token(token) for token in rows) if rows else [""], "")
    if len(words) != max(len(rows), 1):
        raise ValueError(f"words: expected a name and a noun for each of {few(map(repr, rows)) or 'one subject'}, got "
                         f"{few(words.items())}")  # fmt: skip
    stacks = [row.detach().float().reshape(-1, width) for row in rows.values()]
    tensors = {"tokens": torch.cat(stacks)} if rows else {}
    tensors |= {name: value.detach().float() for name, value in weights.items()}
    check_finite(tensors, path)
    tokens, nouns = list(words), list(words.values())
    about = {"token": tokens[0], "noun": nouns[0], "tokens": tokens[: len(rows)], "nouns": nouns[: len(rows)],
             "rows": [name for token, stack in zip(tokens, stacks) for name in rows_of(token, len(stack))]}  # fmt: skip
    about |= {"rank": rank} if rank else {}
    method = "lora" if rank else _method(weights, sd)
    return Concept(method, tensors, sd.name, about, {"source": path.name}, fingerprint(sd) if relative else None)


def _token(name: str) -> str:
    """A word's name in a file -> a name that tokenizers and pipelines handle: lower case, in brackets."""
    return "<" + re.sub(r"[\s<>]+", "-", name.lower().strip(" <>")) + ">"


def _method(weights: dict, sd: StableDiffusion) -> str:
    if not weights:
        return "textual_inversion"
    keys_values = {f"unet.{name}.weight" for name in key_value_layers(sd.unet)}
    return "custom_diffusion" if keys_values.issuperset(weights) else "dreambooth"


def _check(weights: dict[str, Tensor], sd: StableDiffusion, path: Path) -> None:
    have = formats.parameters(sd)
    shapes = {name: tuple(getattr(value, "shape", ())) for name, value in weights.items()}
    wrong = [name for name, shape in shapes.items() if name not in have or have[name].shape != shape]
    if wrong:
        raise ValueError(f"path: expected weights of this model {sd.name!r}, got {len(wrong)} others in {path}, such "
                         f"as {wrong[0]} {shapes[wrong[0]]}; load the model they were trained on")  # fmt: skip


# ---- the authors' Custom Diffusion, and whole models ----


def _delta(content: dict, sd: StableDiffusion) -> tuple[dict[str, Tensor], bool]:
    """Weights of a delta.bin, and whether it is compressed: an entry {"u", "v"} is a change u v of the model's own."""
    have = formats.parameters(sd)
    names = {lora_files.flat(name): name for name in have}
    weights = {f"unet.{name}": value for name, value in content["unet"].items()}
    for name, value in content.get("text_encoder", {}).items():
        name = names.get(lora_files.flat(f"text_encoder.{name}"))
        if name is not None:  # the rows of new words are under modifier_token
            value = value[: len(have[name])] if name.endswith("token_embedding.weight") else value
            weights |= {} if _same(value.float(), have[name]) else {name: value}
    thin = {name.removesuffix(".weight"): (value["v"].float(), value["u"].float())
            for name, value in weights.items() if isinstance(value, dict) and value.keys() == {"u", "v"}}  # fmt: skip
    return weights | formats.folded(thin, sd), bool(thin)


def _difference(folder: Path, sd: StableDiffusion) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """New words, and the weights in which a model differs from the base by more than the rounding to half precision."""
    other, base = load(folder, "cpu", torch.float32), formats.parameters(sd)
    weights, rows = formats.parameters(other), {}
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
