"""The base models: one table of names, with pinned revisions, hashes, licences, mirrors and default settings.

Used by: notebooks/06_stable_diffusion.ipynb, section "The parts".

Ids on the hub can vanish: Stable Diffusion 1.5 lost its first one in 2024. So all ids are in this file. Only an entry
with a `repo` is looked up on the network, and a model that was downloaded before is used as it is.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path

import torch
from huggingface_hub import model_info, snapshot_download
from huggingface_hub.errors import DisabledRepoError, RepositoryNotFoundError, RevisionNotFoundError
from torch import Tensor

from course_lib.environment import CHECKPOINTS, sha256

WEIGHTS = ("text_encoder", "unet", "vae")
TIMEOUT = 5  # seconds to wait for the hub's first answer


class ModelUnavailable(ConnectionError):
    """A model is not on this machine and cannot be downloaded; the message says what to do."""


@dataclass(frozen=True)
class Defaults:
    """Settings that suit a base model; the values below are for Stable Diffusion 1.

    settings: the key in the SETTINGS of each method.  guidance: w (guidance_scale).  prior_steps: DDIM steps for each
    of DreamBooth's class images.  augment: whether Custom Diffusion also trains on a subject small and zoomed in.
    half_training: train in the device's fastest precision.  toybox_world: the model was trained on the Toybox world:
    the renderer draws more of its training pictures, and its tokenizer has every word of their captions.
    """

    settings: str = "sd15"
    guidance: float = 7.5
    prior_steps: int = 25
    augment: bool = True
    half_training: bool = False
    toybox_world: bool = False


# guidance: at 5 the judge recognises most nouns, with least colour error.  prior_steps: training should take a minute.
# augment: at 64 pixels a small picture shows too little of a subject.
TOYBOX = Defaults("toybox", guidance=5.0, prior_steps=12, augment=False, half_training=True, toybox_world=True)


@dataclass(frozen=True)
class Entry:
    """One model: a folder on this machine, or a hub id with its details.

    sha256: path -> digest of the files to check after a download.  size: of the download, in words.
    resolution: the side of its pictures in pixels.  defaults: the settings that suit it.
    """

    name: str
    folder: Path | None = None
    repo: str | None = None
    revision: str | None = None
    mirrors: tuple[str, ...] = ()
    sha256: dict[str, str] = field(default_factory=dict)
    licence: str = "see its model card"
    size: str = "several GB"
    resolution: int | None = None
    defaults: Defaults = Defaults()


# Revision, hashes and mirrors of sd15 agree among several public repositories that use them; they have not been
# compared with the hub itself.
MODELS = {
    "toybox": Entry(
        name="toybox",
        folder=CHECKPOINTS / "toybox-sd",
        licence="Apache-2.0",
        size="part of the course",
        resolution=64,
        defaults=TOYBOX,
    ),
    "sd15": Entry(
        name="sd15",
        repo="stable-diffusion-v1-5/stable-diffusion-v1-5",
        revision="451f4fe16113bff5a5d2269ed5ad43b0592e9a14",
        mirrors=("benjamin-paine/stable-diffusion-v1-5", "sd-legacy/stable-diffusion-v1-5"),
        sha256={
            "text_encoder/model.safetensors": "d008943c017f0092921106440254dbbe00b6a285f7883ec8ba160c3faad88334",
            "text_encoder/model.fp16.safetensors": "77795e2023adcf39bc29a884661950380bd093cf0750a966d473d1718dc9ef4e",
            "unet/diffusion_pytorch_model.safetensors": (
                "19da7aaa4b880e59d56843f1fcb4dd9b599c28a1d9d9af7c1143057c8ffae9f1"
            ),
            "unet/diffusion_pytorch_model.fp16.safetensors": (
                "c83908253f9a64d08c25fc90874c9c8aef9a329ce1ca5fb909d73b0c83d1ea21"
            ),
            "vae/diffusion_pytorch_model.safetensors": (
                "a2b5134f4dbc140d9c11f11cba3233099e00af40f262f136c691fb7d38d2194c"
            ),
            "vae/diffusion_pytorch_model.fp16.safetensors": (
                "4fbcf0ebe55a0984f5a5e00d8c4521d52359af7229bb4d81890039d2aa16dd7c"
            ),
        },
        licence="CreativeML Open RAIL-M",
        size="4.3 GB, or 2.1 GB in half precision",
        resolution=512,
    ),
}


def resolve(name: str | Path) -> Entry:
    """Find the model of a name: an entry of MODELS, a folder on this machine, or a hub id such as "owner/model".

    Raises ValueError if it is none of these.
    """
    if name in MODELS:
        return MODELS[name]
    if name and Path(name).is_dir():
        known = [entry for entry in MODELS.values() if entry.folder and Path(name).resolve() == entry.folder.resolve()]
        if known:  # the shipped folder, given by its path, gets the same defaults
            return known[0]
        return Entry(name=str(name), folder=Path(name))
    if str(name).lower().endswith((".safetensors", ".ckpt")):
        raise ValueError(
            f"name: expected a folder in diffusers' format, but {name} is a single file; convert it once, while "
            f'online: StableDiffusionPipeline.from_single_file("{name}").save_pretrained("FOLDER")'
            if Path(name).is_file() else f"name: expected a model, but there is no file {name}"
        )  # fmt: skip
    if isinstance(name, str) and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        return Entry(name=name, repo=name)
    raise ValueError(f"name: expected one of {', '.join(MODELS)}, a model folder, or a hub id owner/model, got {name}")


def fetch(entry: Entry, half: bool = False) -> Path:
    """The folder of a model on this machine; a hub model is downloaded once (safetensors, json and txt files only).

    half: take the fp16 files if a repository has them: half the download.  If the id is gone from the hub, the mirrors
    are tried.  Raises ModelUnavailable without a network or if all ids are gone, FileNotFoundError if the Toybox
    weights are missing, ValueError for an incomplete folder or a file whose SHA-256 is not the registry's.
    """
    if entry.folder is not None:
        return _complete(entry)
    sources = [(entry.repo, entry.revision), *((mirror, None) for mirror in entry.mirrors)]
    for repo, revision in sources:
        try:
            folder = Path(snapshot_download(repo, revision=revision, local_files_only=True, **_files(half)))
        except FileNotFoundError:  # not in the cache, or only in part
            continue
        if all(_weights(folder / part, half) for part in WEIGHTS):
            return folder
    for repo, revision in sources:
        try:
            model_info(repo, revision=revision, timeout=TIMEOUT)  # one request first: a download makes six
            folder = Path(snapshot_download(repo, revision=revision, etag_timeout=TIMEOUT, **_files(half)))
        except (RepositoryNotFoundError, RevisionNotFoundError, DisabledRepoError):
            continue
        except Exception as error:  # no name server, no route, a proxy, a time-out: HTTP libraries raise many kinds
            missing = "not on this machine" if entry.name in MODELS else "no folder here, nor a model downloaded before"
            raise ModelUnavailable(
                f"{repo} ({entry.size}) is {missing}, and the hub did not answer "
                f'({type(error).__name__}); connect to the network and unset HF_HUB_OFFLINE, or use "toybox"'
            ) from None
        if all(_weights(folder / part, half) for part in WEIGHTS):
            _check(entry, folder)
            return folder
        if half:  # a repository without fp16 files
            return fetch(entry)
        raise ValueError(f"name: expected a repository with safetensors in {', '.join(WEIGHTS)}, {repo} lacks some")
    if entry.name not in MODELS:
        raise ModelUnavailable(
            f"{entry.name} is neither a folder here nor a model on the hub, or the hub needs a login for it; check how "
            'it is written, or use "toybox"'
        )
    tried = ", ".join(repo for repo, _ in sources)
    raise ModelUnavailable(
        f"{entry.name} is gone from the hub, or needs a login there (tried {tried}); find where it has moved, and put "
        'the new id into course_lib/latent/registry.py or give it as the name, or use "toybox"'
    )


def check_pointer(path: str | Path) -> None:
    """Raise a ValueError if a file is only the pointer that Git LFS leaves in place of a large file."""
    with open(path, "rb") as file:
        if file.read(64).startswith(b"version https://git-lfs"):
            raise ValueError(f"path: {path} is a pointer of Git LFS, not the file itself; run `git lfs pull` in its "
                             "repository, or download the file")  # fmt: skip


def variant(folder: Path, half: bool = False) -> str | None:
    """The `variant` that from_pretrained needs: "fp16" if such files are there and wanted, or are the only ones."""
    return "fp16" if _weights(folder / "unet", True) and (half or not _weights(folder / "unet", False)) else None


def fingerprint(sd) -> Tensor:
    """The first number of each tensor of the UNet and the text encoder, (n,) float32: cheap, and it tells models apart.

    Loaded in half precision, the same model has nearly the same numbers: compare with a tolerance.
    """
    parts = (*sd.unet.parameters(), *sd.text_encoder.parameters())
    return torch.stack([p.detach().flatten()[0].float().cpu() for p in parts])


def same_model(ours: Tensor, theirs: Tensor) -> bool:
    """Whether two fingerprints are of one model: nearly all numbers agree, as half precision rounds them."""
    return (
        ours.shape == theirs.shape and torch.isclose(ours, theirs.float(), rtol=0.02, atol=1e-3).float().mean() > 0.95
    )


def _files(half: bool) -> dict[str, list[str]]:
    """The files to download: the three networks' weights, the tokenizer, and all settings; no pickles."""
    settings = ["model_index.json", "scheduler/*.json", "tokenizer/*.json", "tokenizer/*.txt"]
    ends = ["*.json", "*.fp16*.safetensors" if half else "*.safetensors"]
    unwanted = ["*.non_ema*"] if half else ["*.non_ema*", "*.fp16*"]
    return {
        "allow_patterns": settings + [f"{part}/{end}" for part in WEIGHTS for end in ends],
        "ignore_patterns": unwanted,
    }


def _weights(folder: Path, half: bool) -> list[Path]:
    return [path for path in folder.glob("*.safetensors") if (".fp16" in path.name) == half]


def _complete(entry: Entry) -> Path:
    if entry is MODELS["toybox"] and not entry.folder.is_dir():
        raise FileNotFoundError(
            f"{entry.folder} is missing: run `make train-toybox`, or restore it from the repository"
        )
    missing = [part for part in WEIGHTS if not any((entry.folder / part).glob("*.safetensors"))]
    missing += [part for part in ("tokenizer", "scheduler") if not (entry.folder / part).is_dir()]
    if missing:
        raise ValueError(
            f"name: expected a model folder in diffusers' format with safetensors, but {entry.folder} has no "
            f"{', '.join(missing)}"
        )
    for part in WEIGHTS:
        for path in (entry.folder / part).glob("*.safetensors"):
            check_pointer(path)
    return entry.folder


def _check(entry: Entry, folder: Path) -> None:
    for path, expected in entry.sha256.items():
        file = folder / path
        if file.is_file() and sha256(file) != expected:
            file.resolve().unlink()  # the file behind the link in the hub's cache
            file.unlink(missing_ok=True)
            raise ValueError(
                f"name: {path} of {entry.name} has another SHA-256 than the registry: the download is damaged, or the "
                "source has changed; the file has been deleted, so try again"
            )
