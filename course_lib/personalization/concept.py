"""A concept as a file, and applied to a model: only trained tensors are saved, and the model can be restored exactly.

Derived in: notebooks/11_textual_inversion.ipynb, section "A concept is a file".

Files of other tools are read and written in interchange/.
"""

import contextlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from course_lib.environment import write_whole
from course_lib.latent.registry import check_pointer, fingerprint, same_model
from course_lib.latent.stable_diffusion import StableDiffusion
from course_lib.latent.text import NewTokens
from course_lib.personalization import lora
from course_lib.personalization.recipe import Recipe

FORMAT = "personalization-course concept 1"
LICENCE = "The licence of the base model applies, and the rights to the pictures that it learnt from."


@dataclass
class Concept:
    """The tensors that a recipe trained, by name, and the information needed to use them.

    tensors: "tokens" (n, D), "unet.<name>", "text_encoder.<name>", in LoRA "....lora.down" and ".up", compressed
    "....u" and ".v" (see `merge.uncompressed`); on the CPU.
    method, base (name of the model), about (token, noun, rows ...): as in the recipe; settings: how it was trained.
    fingerprint: of the base model, see `registry.fingerprint`; None if the file has none.
    """

    method: str
    tensors: dict[str, Tensor]
    base: str
    about: dict
    settings: dict
    fingerprint: Tensor | None = None

    @property
    def bytes(self) -> int:
        """Size of the tensors."""
        return sum(value.numel() * value.element_size() for value in self.tensors.values())


def only_tokens(concept: Concept) -> Concept:
    """The words of a concept without its weights."""
    return replace(concept, tensors={name: value for name, value in concept.tensors.items() if name == "tokens"})


def check_finite(tensors: dict[str, Tensor], path: str | Path) -> None:
    """Raise a ValueError if a number of a file is NaN or infinite, which would make every picture black."""
    broken = [name for name, value in tensors.items() if not value.isfinite().all()]
    if broken:
        raise ValueError(f"path: expected finite numbers, but {len(broken)} tensors of {path} hold NaN or infinity, "
                         f"such as {broken[0]}; train it anew, with a smaller lr")  # fmt: skip


def check_tokens(concepts: Sequence[Concept]) -> None:
    """Raise a ValueError if two tokens are equal, or one is the name of another's row, such as <v>_1 of <v>."""
    words = [word for c in concepts if "tokens" in c.tensors for word in c.about.get("tokens") or c.about["rows"][:1]]
    for word in words:
        if words.count(word) > 1:
            raise ValueError(f"concepts: expected a token of its own for each, got {word!r} twice")
        if (row := re.sub(r"_\d+$", "", word)) != word and row in words:
            raise ValueError(f"concepts: expected tokens that differ in more than a number, since {word} is also the "
                             f"name of a row of {row}; train one of them with another token")  # fmt: skip


def concept_of(recipe: Recipe) -> Concept:
    """A copy of the tensors that a recipe has trained so far."""
    tensors = {name: param.detach().to("cpu", copy=True) for name, param in recipe.params.items()}
    return Concept(recipe.method, tensors, recipe.base, dict(recipe.about), asdict(recipe.settings), recipe.fingerprint)


def save_concept(path: str | Path, concept: Concept | Recipe, dtype: torch.dtype | None = None) -> Concept:
    """Write a concept, or the one of a recipe, as one safetensors file with method, base and settings as metadata.

    dtype: float16 halves the file; default: as trained.  The file is written whole or not at all.
    Raises OSError if it cannot be written: the concept is still in memory, save it elsewhere; ValueError if a number is
    not finite, perhaps too large for float16.
    """
    path = Path(path)
    concept = concept_of(concept) if isinstance(concept, Recipe) else concept
    tensors = {name: value.to(dtype or value.dtype).contiguous() for name, value in concept.tensors.items()}
    check_finite(tensors, path)
    if concept.fingerprint is not None:
        tensors["base.fingerprint"] = concept.fingerprint
    note = {"format": FORMAT, "method": concept.method, "base": concept.base, "licence": LICENCE,
            "about": json.dumps(concept.about), "settings": json.dumps(concept.settings)}  # fmt: skip
    try:
        with write_whole(path) as temporary:
            save_file(tensors, temporary, metadata=note)
    except (OSError, SafetensorError) as error:
        raise OSError(f"path: {path} cannot be written ({error}); the concept is still in memory: save it elsewhere, "
                      "or make room and save again") from error  # fmt: skip
    return concept


def load_concept(path: str | Path) -> Concept:
    """Read what `save_concept` wrote.  Raises ValueError if it is something else, damaged, or holds NaN or infinity."""
    path = Path(path)
    try:
        check_pointer(path)
        with safe_open(path, "pt") as file:
            note = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError) as error:
        raise ValueError(f"path: expected a concept file, but {path} cannot be read ({error})") from error
    if note.get("format") != FORMAT:
        raise ValueError(f"path: expected a file that save_concept wrote, but {path} is none; other tools' files are "
                         "read by course_lib.personalization.interchange")  # fmt: skip
    check_finite(tensors, path)
    base = tensors.pop("base.fingerprint", None)
    try:
        about, settings = json.loads(note["about"]), json.loads(note["settings"])
        return Concept(note["method"], tensors, note["base"], about, settings, base)
    except (KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"path: expected a concept file, but the notes in {path} are damaged ({error})") from error


def check_base(sd: StableDiffusion, concept: Concept) -> None:
    """Raise a ValueError if a concept was trained on another model: its numbers would mean nothing here."""
    if concept.fingerprint is None:
        return
    if not same_model(fingerprint(sd), concept.fingerprint):
        raise ValueError(f"concept: expected one that was trained on this model, {sd.name!r}, got one of "
                         f"{concept.base!r} with other weights; load that model, or train it anew. If a "
                         "concept is applied to this model already, give all of them to one call")  # fmt: skip


@contextlib.contextmanager
def applied(sd: StableDiffusion, *concepts: Concept) -> Iterator[StableDiffusion]:
    """Apply the words and weights of concepts to a model in a `with` block; afterwards it is as before, bit for bit.

        with applied(sd, load_concept("rex.safetensors")):
            sd.sample("a photo of a <v> dog on the moon")

    Several LoRAs are added.  Raises ValueError if a concept is of another base model, has a token that exists, or two
    change the same weights (see `merge.merge_concepts`).
    """
    from course_lib.personalization.merge import mix_loras, uncompressed  # here, since merging applies concepts

    for concept in concepts:
        check_base(sd, concept)
    check_tokens(concepts)
    loras = [concept for concept in concepts if concept.method == "lora"]
    others = [uncompressed(sd, concept) for concept in concepts if concept.method != "lora"]
    names = [name for concept in others for name in concept.tensors if name != "tokens"]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        merge = all(concept.method == "custom_diffusion" for concept in others)
        todo = "merge the concepts first" if merge else "only custom_diffusion and lora can be joined, so use one"
        raise ValueError(f"concepts: expected each to change other weights, but {len(twice)} are changed twice, such "
                         f"as {min(twice)}; {todo}")  # fmt: skip
    with contextlib.ExitStack() as undo:
        # Weights first: attaching tokens renames the table, LoRA renames its layers.
        for concept in [*others, *([mix_loras(loras)] if len(loras) > 1 else loras)]:
            undo.enter_context(_weights(sd, concept))
        undo.enter_context(_tokens(sd, concepts))
        yield sd


@contextlib.contextmanager
def _tokens(sd: StableDiffusion, concepts: list[Concept]) -> Iterator[None]:
    rows = {token: row for c in concepts if "tokens" in c.tensors
            for token, row in zip(c.about["rows"], c.tensors["tokens"], strict=True)}  # fmt: skip
    width = sd.text_encoder.get_input_embeddings().weight.shape[1]
    if wrong := {len(row) for row in rows.values()} - {width}:
        raise ValueError(f"concepts: expected rows of {width} numbers, got {sorted(wrong)}")
    if not rows:
        yield
        return
    with NewTokens.attach(sd, dict.fromkeys(rows, "a")) as tokens:
        tokens.rows.data.copy_(torch.stack(list(rows.values())))
        tokens.rows.requires_grad_(False)
        yield


@contextlib.contextmanager
def _weights(sd: StableDiffusion, concept: Concept) -> Iterator[None]:
    weights = {name: value for name, value in concept.tensors.items() if name != "tokens"}
    networks = {"unet": sd.unet, "text_encoder": sd.text_encoder}
    networks = {part: network for part, network in networks.items() if any(n.startswith(f"{part}.") for n in weights)}
    with contextlib.ExitStack() as undo:
        if concept.method == "lora":
            params = undo.enter_context(lora.attach(networks, concept.about["rank"]))
        else:
            params = {
                f"{part}.{name}": p for part, network in networks.items() for name, p in network.named_parameters()
            }
        unknown = [name for name in weights if name not in params or params[name].shape != weights[name].shape]
        if unknown:
            raise ValueError(
                f"concept: expected tensors of this model, got {len(unknown)} others, such as {unknown[0]}"
            )
        for name, value in weights.items():
            param, before = params[name], params[name].data
            undo.callback(setattr, param, "data", before)
            param.data = value.to(before.device, before.dtype, copy=True)
            param.requires_grad_(False)
        yield
