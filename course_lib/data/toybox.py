"""The Toybox world: small captioned cartoon pictures, drawn by a program.

A picture is one object (a noun with a colour and a pattern) in one scene. A `Spec` says all that is needed to draw
it; `render` turns a spec into pixels at any size, `caption` into words, and `toybox10` makes a labelled data set.
The drawing is in toybox_pen.py (colours, shapes, patterns), toybox_nouns.py (objects) and toybox_scenes.py (scenes).

Used by: notebooks/02_ddpm_sampling.ipynb (two data sets, same code).
"""

import os
import tempfile
import zipfile
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops
from tqdm import tqdm

from course_lib.data.toybox_nouns import NOUNS
from course_lib.data.toybox_pen import COLOURS, INK, PATTERNS, Pen, pick
from course_lib.data.toybox_scenes import DARK_SCENES, SCENES, Scenery

RENDERER_VERSION = 1  # part of the cache file's name: raise it whenever a picture changes
SMALL = 2000  # below this many pictures, starting worker processes costs more than it saves
CHUNK = 500  # pictures in one worker's job
CLASSES = tuple(NOUNS)  # in label order


@dataclass(frozen=True)
class Spec:
    """All that is needed to draw one picture; x, y (centre of the object's box) and size (its side) are fractions of
    the picture's side, flip makes the object look to the left, and seed sets the small free details."""

    noun: str
    colour: str
    pattern: str
    scene: str
    x: float
    y: float
    size: float
    flip: bool
    seed: int


# ---- specs, pictures and captions ----


def _check(argument, value, table):
    if value not in table:
        raise ValueError(f"{argument} should be one of {', '.join(table)}, but {argument}={value!r} came")


def _check_count(argument, value, least):
    if not isinstance(value, (int, np.integer)) or value < least:
        raise ValueError(f"{argument} should be a whole number of at least {least}, but {argument}={value!r} came")


def sample_spec(rng: np.random.Generator, noun: str | None = None) -> Spec:
    """Draw what a picture shows: everything at random, with the object standing on the ground.

    Args:
        rng: np.random.Generator, the only source of chance.
        noun: one of NOUNS; None draws one.

    Returns: a Spec.
    Raises: ValueError for an unknown noun.
    """
    if noun is not None:
        _check("noun", noun, NOUNS)
    size = float(rng.uniform(0.62, 0.86))
    return Spec(
        noun=noun or pick(rng, *CLASSES),
        colour=pick(rng, *COLOURS),
        pattern=pick(rng, *PATTERNS),
        scene=pick(rng, *SCENES),
        x=float(rng.uniform(size / 2 + 0.01, 0.99 - size / 2)),
        y=float(rng.uniform(max(0.8, size + 0.03), 0.96)) - size / 2,
        size=size,
        flip=bool(rng.random() < 0.5),
        seed=int(rng.integers(2**31)),
    )


_ROW = np.linspace(-1.3, 1.3, 24)
_BUMP = np.clip(1.2 - np.hypot(_ROW[None], _ROW[:, None]), 0, 0.7) / 0.7 * 110
_SHADOW = Image.fromarray(_BUMP.astype(np.uint8))  # a soft dark spot, stretched under every object


def render(spec: Spec, size: int = 64) -> np.ndarray:
    """Draw a picture.

    The picture is drawn two to four times larger and averaged down, which softens the edges. The same spec gives the
    same picture at every size, up to this softening.

    Args:
        spec: the Spec to draw.
        size: side in pixels, at least 16.

    Returns: np.ndarray (size, size, 3), uint8, RGB.
    Raises: ValueError for an unknown noun, colour, pattern or scene, or a size below 16.
    """
    for argument, table in (("noun", NOUNS), ("colour", COLOURS), ("pattern", PATTERNS), ("scene", SCENES)):
        _check(argument, getattr(spec, argument), table)
    _check_count("size", size, 16)
    finer = 4 if size <= 256 else 2
    image = Image.new("RGB", (size * finer, size * finer))
    rng = np.random.default_rng([spec.seed, 1])
    SCENES[spec.scene](Scenery(image, rng), rng.uniform)
    light = tuple(rng.integers(234, 256, 3).tolist())
    w, h = round(spec.size * image.width * 1.1), round(spec.size * image.width * 0.2)
    x, y = spec.x * image.width, (spec.y + 0.46 * spec.size) * image.width
    image.paste(INK, (round(x - w / 2), round(y - h / 2)), _SHADOW.resize((w, h), Image.Resampling.BILINEAR))
    halo = (150, 160, 206) if spec.scene in DARK_SCENES else None
    for rim in (halo, None) if halo else (None,):
        rng = np.random.default_rng([spec.seed, 2])
        NOUNS[spec.noun](Pen(image, spec, rng, rim), rng)
    image = image.reduce(finer)
    return np.array(ImageChops.multiply(image, Image.new("RGB", image.size, light)))  # the light varies a little


def caption(spec: Spec, rng: np.random.Generator) -> str:
    """Say in words what a picture shows, leaving out colour, pattern, scene or opening at random.

    Args:
        spec: the Spec of the picture.
        rng: np.random.Generator, the only source of chance.

    Returns: for instance "a photo of a teal spotted cat on the beach" or "an orange cat". The noun is always named.
    """
    colour, pattern, scene = (rng.random(3) < (0.7, 0.7, 0.6)).tolist()
    pattern = pattern and spec.pattern != "plain"  # nobody says that a thing is plain
    words = [spec.colour] * colour + [spec.pattern] * pattern + [spec.noun]
    article = "an" if words[0][0] in "aeiou" else "a"
    opening = pick(rng, "a photo of", "a picture of", "")
    return " ".join(filter(None, [opening, article, *words, spec.scene * scene]))


# ---- the data set of ten classes ----


def _labels(seed, split, count):
    """Balanced class labels in shuffled order."""
    return np.random.default_rng([seed, 2 + split]).permutation(np.arange(count) % len(CLASSES)).astype(np.uint8)


def _render_chunk(job):
    """Draw the pictures start, start + 1, ... of a split; runs in the worker processes."""
    seed, split, start, labels, size = job
    images = np.empty((len(labels), size, size, 3), np.uint8)
    for k, label in enumerate(labels):
        rng = np.random.default_rng([seed, split, start + k])
        images[k] = render(sample_spec(rng, CLASSES[label]), size)
    return images


def _usable_cores():
    """How many cores this process may run on: fewer than the machine has where it is pinned to some of them."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _render_jobs(jobs, workers, total):
    """The jobs' pictures in order, from worker processes if there are many."""
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
                    collect(pool.map(_render_chunk, jobs))
            except BrokenProcessPool:
                print("The worker processes did not start, so the pictures are drawn in this one process.")
        collect(map(_render_chunk, jobs[len(done) :]))
    return done


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
    """Write a file whole or not at all: under another name first, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
        try:
            np.savez(file, **data)
        except BaseException:
            file.close()
            os.unlink(file.name)
            raise
    os.replace(file.name, path)


def toybox10(train=50_000, test=10_000, seed=0, cache_dir=None, workers=None, size=32) -> dict[str, np.ndarray]:
    """The ten-class data set: drawn on all cores the first time, then read from a cache file.

    In a script on any system, call it under `if __name__ == "__main__":`, as worker processes import the script.

    Args:
        train, test: number of pictures in each split.
        seed: whole number of at least 0; picture i of a split depends on seed, split and i alone.
        cache_dir: folder of the cache file; None means $COURSE_CACHE, else ~/.cache/personalization-course.
        workers: number of processes; None means one per usable core. The pictures do not depend on it.
        size: side in pixels, at least 16.

    Returns: a dict of uint8 arrays, train_images (train, size, size, 3), train_labels (train,) with values 0 to 9 that
        index CLASSES, test_images and test_labels. Classes are balanced and shuffled.
    Raises: ValueError for a count, seed, number of workers or size that is out of range.
    """
    workers = workers if workers is not None else _usable_cores()
    limits = {"train": (train, 0), "test": (test, 0), "seed": (seed, 0), "workers": (workers, 1), "size": (size, 16)}
    for argument, (value, least) in limits.items():
        _check_count(argument, value, least)
    home = os.environ.get("COURSE_CACHE") or Path.home() / ".cache" / "personalization-course"
    path = Path(cache_dir or home) / f"toybox10-v{RENDERER_VERSION}-seed{seed}-size{size}-{train}+{test}.npz"
    shapes = {}
    for split, count in (("train", train), ("test", test)):
        shapes |= {f"{split}_images": (count, size, size, 3), f"{split}_labels": (count,)}
    data = _load(path, shapes)
    if data is None:
        labels = [_labels(seed, split, count) for split, count in enumerate((train, test))]
        starts = [(split, k) for split in (0, 1) for k in range(0, len(labels[split]), CHUNK)]
        jobs = [(seed, split, k, labels[split][k : k + CHUNK], size) for split, k in starts]
        images = np.concatenate([np.empty((0, size, size, 3), np.uint8), *_render_jobs(jobs, workers, train + test)])
        data = dict(zip(shapes, (images[:train], labels[0], images[train:], labels[1]), strict=True))
        _save(path, data)
    return data
