"""The command in tests: a folder with a tiny model and pictures, and quick trainings on them."""

import numpy as np
import torch
from PIL import Image
from tiny import FULL_SIZE, TINY

from course_lib import personalize
from course_lib.personalization.concept import load_concept

QUICK = ["--steps", "3", "--lr", "0.01", "--batch-size", "2", "--grid", "0"]


def make_world(root):
    """A model folder, and two folders of pictures; tests add their own files elsewhere."""
    FULL_SIZE.build(**TINY | {"unet": TINY["unet"] | {"sample_size": 8}}).save(root / "model", torch.float32)
    for folder, seed in (("cat", 0), ("tiger", 1)):
        (root / folder).mkdir()
        for k in range(3):
            pixels = np.random.default_rng([seed, k]).integers(0, 256, (40, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / folder / f"{k}.png")
    return root


def train_options(world, out, method="textual-inversion", *more, noun="cat"):
    own = ["--prior", "2"] if method == "dreambooth" else []
    return ["train", "--method", method, "--base", str(world / "model"), "--images", str(world / noun),
            "--class-noun", noun, "--out", str(out), *QUICK, *own, *map(str, more)]  # fmt: skip


def run(*args):
    return personalize.main([str(arg) for arg in args])


def trained(world, out, method="textual-inversion", *more, noun="cat"):
    assert run(*train_options(world, out, method, *more, noun=noun)) == 0
    return load_concept(out)
