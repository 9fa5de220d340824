"""CIFAR-10 in one function, from wherever it is, and Toybox-10 where it is not.

Used by: notebooks/01_ddpm_training.ipynb and every notebook of Part 1.
Krizhevsky 2009, "Learning Multiple Layers of Features from Tiny Images": 60,000 colour pictures, 32 by 32, ten classes.
"""

import hashlib
import os
import pickle
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from course_lib.environment import cache_dir, pick
from course_lib.toybox import sets

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

# The official batches are pickles, and a pickle can run code. Only these exact files are ever opened.
MD5 = {
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "test_batch": "40351d587109b95175f43aff81a1287e",
}
FOLDER = "cifar-10-batches-py"
ARRAYS = ("train_images", "train_labels", "test_images", "test_labels")


@dataclass(frozen=True)
class Dataset:
    """Small pictures with labels. Images are uint8 (N, 3, 32, 32); labels are int64 (N,) in 0..9."""

    name: str
    source: str
    classes: tuple[str, ...]
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def load(path: str | Path | None = None, download: bool = False, verbose: bool = True) -> Dataset:
    """Find CIFAR-10 and say where it came from; draw Toybox-10 if there is none.

    In this order: `path` or the variable COURSE_CIFAR10 (the official cifar-10-batches-py folder, or a plain .npz with
    train_images (50000, 32, 32, 3) uint8, train_labels, test_images, test_labels; one of another length is not called
    CIFAR-10); an earlier download; the official download, only if `download` is True; Toybox-10, ten classes of
    drawings made on this machine (and called so).
    Raises ValueError if the named file is not CIFAR-10 or is damaged; ConnectionError if the download fails.
    """
    path = path or os.environ.get("COURSE_CIFAR10")
    downloaded = cache_dir() / FOLDER
    if path:
        data = _from_path(Path(path).expanduser())
    elif downloaded.is_dir():
        data = _from_official(downloaded)
    elif download:
        data = _from_official(_download(cache_dir()))
    else:
        data = toybox10()
    if verbose:
        print(f"{data.name} from {data.source}: {len(data.train_images):,} + {len(data.test_images):,} images")
    return data


def toybox10() -> Dataset:
    """Toybox-10: ten kinds of drawn things, same sizes and API as CIFAR-10. Rendered once, then cached.

    In the profile smoke only 1,500 + 400 of them are drawn.
    """
    train, test = pick(smoke=(1_500, 400), cpu=(50_000, 10_000), gpu=(50_000, 10_000))
    arrays = sets.toybox10(train, test, cache_dir=cache_dir())
    return _dataset("Toybox-10", "the renderer of this course (no CIFAR-10 found)", sets.CLASSES, arrays)


def _from_path(path: Path) -> Dataset:
    if path.is_dir():
        folder = path / FOLDER if (path / FOLDER).is_dir() else path
        return _from_official(folder)
    if not path.is_file():
        raise ValueError(f"path: expected a {FOLDER} folder or an .npz file, but {path} does not exist")
    return _from_npz(path)


def _from_npz(path: Path) -> Dataset:
    try:
        with np.load(path, allow_pickle=False) as file:
            missing = [name for name in ARRAYS if name not in file]
            if missing:
                raise ValueError(f"path: expected an .npz with the arrays {', '.join(ARRAYS)}; {path} lacks {missing}")
            arrays = {name: file[name] for name in ARRAYS}
    except ValueError as error:
        if str(error).startswith("path:"):
            raise
        raise ValueError(
            f"path: {path} is not a plain .npz of number arrays ({error}); pickles are not opened"
        ) from error
    except Exception as error:  # a cut-off zip fails in many ways: BadZipFile, EOFError, zlib.error, OSError
        raise ValueError(f"path: {path} is damaged or not an .npz file ({error}); copy or download it again") from error
    whole = (len(arrays["train_labels"]), len(arrays["test_labels"])) == (50_000, 10_000)
    return _dataset("CIFAR-10" if whole else f"Pictures of {path.name}", path.name, CLASSES, arrays)


def _from_official(folder: Path) -> Dataset:
    batches = {}
    for name, expected in MD5.items():
        file = folder / name
        if not file.is_file():
            raise ValueError(f"path: expected the official batch {name} in {folder}, but it is not there")
        content = file.read_bytes()
        if hashlib.md5(content, usedforsecurity=False).hexdigest() != expected:
            raise ValueError(f"path: {file} is not the official file (its MD5 differs), so its pickle is not opened; "
                             "download CIFAR-10 again")  # fmt: skip
        batches[name] = pickle.loads(content, encoding="bytes")
    train = [batches[name] for name in MD5 if name != "test_batch"]
    test = batches["test_batch"]

    def images(rows: np.ndarray) -> np.ndarray:
        return rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)

    arrays = dict(
        train_images=np.concatenate([images(b[b"data"]) for b in train]),
        train_labels=np.concatenate([np.array(b[b"labels"]) for b in train]),
        test_images=images(test[b"data"]),
        test_labels=np.array(test[b"labels"]),
    )
    return _dataset("CIFAR-10", f"the official files in {folder.name}", CLASSES, arrays)


def _download(root: Path) -> Path:
    from torchvision.datasets import CIFAR10  # imported here: nothing else needs it, and it takes seconds

    try:
        CIFAR10(str(root), download=True)
    except Exception as error:
        raise ConnectionError(
            "CIFAR-10 could not be downloaded (no network?). Set COURSE_CIFAR10 to a copy, or leave download off "
            f"to work on Toybox-10. Reason: {error}"
        ) from None
    return root / FOLDER


def _dataset(name: str, source: str, classes: tuple[str, ...], arrays: dict[str, np.ndarray]) -> Dataset:
    """Check the four arrays and turn them into tensors; raises ValueError in one sentence."""
    for split in ("train", "test"):
        images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != (32, 32, 3) or len(images) == 0:
            raise ValueError(f"path: expected {split}_images uint8 (N, 32, 32, 3), got {images.dtype} {images.shape}")
        if labels.shape != (len(images),) or labels.dtype.kind not in "ui":
            raise ValueError(f"path: expected {split}_labels ints ({len(images)},), got {labels.dtype} {labels.shape}")
        if labels.min() < 0 or labels.max() > 9:
            raise ValueError(f"path: expected {split}_labels in 0..9, got {labels.min()}..{labels.max()}")
    tensors = {
        key: torch.from_numpy(np.ascontiguousarray(value.transpose(0, 3, 1, 2))) if key.endswith("images")
        else torch.from_numpy(value.astype(np.int64))
        for key, value in arrays.items()
    }  # fmt: skip
    return Dataset(name, source, classes, **tensors)
