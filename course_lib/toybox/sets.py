"""Data sets of the Toybox world, drawn on all cores the first time and read from a cache file afterwards.

`pairs` gives pictures with captions, the training data of the Toybox model. `toybox10` gives the labelled
pictures of ten nouns that Part 1 uses beside CIFAR-10.

Used by: notebooks/02_ddpm_sampling.ipynb and notebooks/05_latent_diffusion.ipynb.
"""

import zipfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from tqdm import tqdm

from course_lib import environment
from course_lib.environment import usable_cores, write_whole
from course_lib.toybox.captions import caption
from course_lib.toybox.first_ten import NOUNS as FIRST_NOUNS
from course_lib.toybox.pen import COLOURS, FIRST_PATTERNS, pick
from course_lib.toybox.scenes import FIRST_SCENES
from course_lib.toybox.world import RELATIONS, RENDERER_VERSION, Spec, check_count, render, sample_spec

SMALL = 2000  # below this many pictures, starting worker processes costs more than it saves
CHUNK = 500  # pictures in one worker's job
CLASSES = tuple(FIRST_NOUNS)  # of toybox10, in label order
# The first number of each picture's seed: splits share no picture.
SPLITS = {"train": 100, "test": 101, "judge": 102, "rich": 103}
PAIR_SHARE = 0.4  # of the split "rich"


# ---- pictures with captions ----


@dataclass
class Pairs:
    """images: (N, size, size, 3) uint8.  captions: N strings.  specs: what each picture shows, N Specs."""

    images: np.ndarray
    captions: list[str]
    specs: list[Spec]


def pair_spec(index: int, split: str = "train", seed: int = 0) -> tuple[Spec, str]:
    """Spec and caption of the picture with this number; they depend on split, seed and number alone."""
    rng = np.random.default_rng([seed, SPLITS[split], index])
    spec = rich_spec(rng) if split == "rich" else sample_spec(rng)
    return spec, pair_caption(spec, rng, split)


def pair_caption(spec: Spec, rng: np.random.Generator, split: str = "train") -> str:
    """A caption of a picture of this split. In the split "rich" it names both objects of a pair."""
    return caption(spec, rng, name_relation=split == "rich")


def rich_spec(rng: np.random.Generator) -> Spec:
    """As `sample_spec`, with more of what a model learns last: pairs of objects, patterns, accessories.

    Two objects in 40 % of the pictures; of two drawn Specs it keeps the one with more patterns and accessories.
    """
    relation = pick(rng, *RELATIONS) if rng.random() < PAIR_SHARE else None
    drawn = [sample_spec(rng, relation=relation) for _ in range(2)]
    return max(drawn, key=lambda spec: (spec.pattern != "plain") + (spec.accessory is not None))


def _render_pairs(job):
    """Draw the pictures start, start + 1, ... of a split; runs in the worker processes."""
    seed, split, start, count, size = job
    return np.stack([render(pair_spec(start + k, split, seed)[0], size) for k in range(count)])


def pairs(count: int, split: str = "train", seed: int = 0, size: int = 64, cache_dir=None, workers=None) -> Pairs:
    """Pictures with captions: everything that the world has, drawn at random.

    In a script on any system, call it under `if __name__ == "__main__":`, as worker processes import the script.

    Args:
        count: number of pictures; a longer set begins with the pictures of a shorter one.
        split: "train", "rich" (for training too: more pairs, patterns and accessories), "test" (held out), or "judge"
            (for the networks that score: the generator is not trained on these).
        seed: whole number of at least 0.
        size: side in pixels, at least 16.
        cache_dir: folder of the cache file; None means $COURSE_CACHE, else ~/.cache/personalization-course.
        workers: number of processes; None means one per usable core. The pictures do not depend on it.

    Returns: Pairs.
    Raises: ValueError for an unknown split, or a number that is out of range.
    """
    images = pair_images(count, split, seed, size, cache_dir, workers)
    specs, captions = zip(*[pair_spec(k, split, seed) for k in range(count)], strict=True)
    return Pairs(images, list(captions), list(specs))


def pair_images(
    count: int, split: str = "train", seed: int = 0, size: int = 64, cache_dir=None, workers=None
) -> np.ndarray:
    """The pictures of `pairs` alone, (count, size, size, 3) uint8; `pair_spec` says what number k shows."""
    if split not in SPLITS:
        raise ValueError(f"split={split!r}: expected one of {', '.join(SPLITS)}")
    limits = {"count": (count, 1), "seed": (seed, 0), "size": (size, 16)}
    for argument, (value, least) in limits.items():
        check_count(argument, value, least)
    jobs = [(seed, split, k, min(CHUNK, count - k), size) for k in range(0, count, CHUNK)]
    name = f"toybox-v{RENDERER_VERSION}-{split}-seed{seed}-size{size}-{count}.npz"
    return _cached(
        Path(cache_dir or environment.cache_dir()) / name, {"images": (count, size, size, 3)},
        lambda: {"images": np.concatenate(draw_all(_render_pairs, jobs, workers, count))},
    )["images"]  # fmt: skip


# ---- the data set of ten classes ----


def sample_ten(rng: np.random.Generator, noun: str | None = None) -> Spec:
    """Draw what a picture of Toybox-10 shows: one of ten nouns, alone, without accessories, in the plain style.

    noun: one of CLASSES; None draws one.  Raises ValueError for another noun.
    """
    if noun is not None and noun not in CLASSES:
        raise ValueError(f"noun={noun!r}: expected one of {', '.join(CLASSES)}")
    size = float(rng.uniform(0.62, 0.86))
    return Spec(
        noun=noun or pick(rng, *CLASSES),
        colour=pick(rng, *COLOURS),
        pattern=pick(rng, *FIRST_PATTERNS),
        scene=pick(rng, *FIRST_SCENES),
        x=float(rng.uniform(size / 2 + 0.01, 0.99 - size / 2)),
        y=float(rng.uniform(max(0.8, size + 0.03), 0.96)) - size / 2,
        size=size,
        flip=bool(rng.random() < 0.5),
        seed=int(rng.integers(2**31)),
    )


def _labels(seed, split, count):
    """Balanced class labels in shuffled order."""
    return np.random.default_rng([seed, 2 + split]).permutation(np.arange(count) % len(CLASSES)).astype(np.uint8)


def _render_ten(job):
    """Draw the pictures start, start + 1, ... of a split; runs in the worker processes."""
    seed, split, start, labels, size = job
    rngs = (np.random.default_rng([seed, split, start + k]) for k in range(len(labels)))
    return np.stack([render(sample_ten(rng, CLASSES[label]), size) for rng, label in zip(rngs, labels, strict=True)])


def toybox10(train=50_000, test=10_000, seed=0, cache_dir=None, workers=None, size=32) -> dict[str, np.ndarray]:
    """The ten-class data set: drawn on all cores the first time, then read from a cache file.

    In a script on any system, call it under `if __name__ == "__main__":`, as worker processes import the script.

    Args:
        train, test: number of pictures in each split.
        seed: whole number of at least 0; picture i of a split depends on seed, split and i alone.
        cache_dir, workers, size: as in `pairs`.

    Returns: a dict of uint8 arrays, train_images (train, size, size, 3), train_labels (train,) with values 0 to 9 that
        index CLASSES, test_images and test_labels. Classes are balanced and shuffled.
    Raises: ValueError for a count, seed, number of workers or size that is out of range.
    """
    limits = {"train": (train, 0), "test": (test, 0), "seed": (seed, 0), "size": (size, 16)}
    for argument, (value, least) in limits.items():
        check_count(argument, value, least)
    shapes = {}
    for split, count in (("train", train), ("test", test)):
        shapes |= {f"{split}_images": (count, size, size, 3), f"{split}_labels": (count,)}

    def draw():
        labels = [_labels(seed, split, count) for split, count in enumerate((train, test))]
        starts = [(split, k) for split in (0, 1) for k in range(0, len(labels[split]), CHUNK)]
        jobs = [(seed, split, k, labels[split][k : k + CHUNK], size) for split, k in starts]
        drawn = draw_all(_render_ten, jobs, workers, train + test)
        images = np.concatenate([np.empty((0, size, size, 3), np.uint8), *drawn])
        return dict(zip(shapes, (images[:train], labels[0], images[train:], labels[1]), strict=True))

    # version 1 of the ten nouns: later changes of the world leave them as they are
    return _cached(
        Path(cache_dir or environment.cache_dir()) / f"toybox10-v1-seed{seed}-size{size}-{train}+{test}.npz",
        shapes,
        draw,
    )


# ---- worker processes and cache files ----


def draw_all(draw: Callable, jobs: list, workers: int | None, total: int) -> list[np.ndarray]:
    """The jobs' pictures in order, from worker processes if there are many.

    draw: a function of a module, job -> pictures.  workers: None: one per usable core.  total: pictures of all jobs.
    """
    workers = workers if workers is not None else usable_cores()
    check_count("workers", workers, 1)
    bar = tqdm(total=total, desc="toybox", unit="img", disable=total < SMALL)
    done = []

    def collect(results):
        for images in results:
            done.append(images)
            bar.update(len(images))

    with bar:
        if total >= SMALL and workers > 1:
            try:  # spawn: works on every system, in notebooks, and next to a loaded torch
                with ProcessPoolExecutor(min(workers, len(jobs)), mp_context=get_context("spawn")) as pool:
                    collect(pool.map(draw, jobs))
            except BrokenProcessPool:
                print("The worker processes did not start, so the pictures are drawn in this one process.")
        collect(map(draw, jobs[len(done) :]))
    return done


def _cached(path: Path, shapes: dict, draw: Callable[[], dict]) -> dict[str, np.ndarray]:
    """The arrays of the cache file, drawn and written first if it is missing or damaged."""
    data = _load(path, shapes)
    if data is None:
        data = draw()
        _save(path, data)
    return data


def _load(path, shapes):
    """The arrays of a cached file, or None if it is missing or damaged."""
    if not path.exists():
        return None
    try:
        with np.load(path, allow_pickle=False) as file:
            data = {name: file[name] for name in shapes}
        if all(data[name].shape == shape and data[name].dtype == np.uint8 for name, shape in shapes.items()):
            return data
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        pass
    print(f"The cached file {path} cannot be read, so its pictures are drawn again.")
    return None


def _save(path, data):
    """Write with NumPy to an open file, since it would add .npz to a file name."""
    with write_whole(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **data)
