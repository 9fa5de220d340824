"""Two objects in one picture: are both there, each in its own colour? Rows of toybox_sd.json, see toybox_model.py."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from course_lib.environment import from_uint8
from course_lib.evaluation import judge, statistics
from course_lib.toybox.captions import describe
from course_lib.toybox.world import Spec, render, sample_spec

PROMPTS = {"next to": 300, "on": 200}  # a relation and the number of its prompts


def pair_specs(relation: str, count: int, seed: int) -> list[Spec]:
    """Two plain objects of different colours in the plain style, everything else at random."""
    rng, found = np.random.default_rng([seed, 14]), []
    while len(found) < count:
        spec = sample_spec(rng, relation=relation, style="plain", pattern="plain")
        if spec.colour != spec.other.colour:
            found.append(replace(spec, other=replace(spec.other, pattern="plain")))
    return found


def named(logits: dict[str, Tensor], specs: list[Spec], attribute: str) -> tuple[Tensor, Tensor]:
    """Whether the judge names the first object's value, and the other one's: (N,) and (N,) of True and False."""
    values, found = judge.ATTRIBUTES[attribute], logits[attribute].argmax(1)
    return tuple(found == torch.tensor([values.index(getattr(one, attribute)) for one in ones])
                 for ones in (specs, [spec.other for spec in specs]))  # fmt: skip


def halves(reader: judge.Judge, images: Tensor, specs: list[Spec]) -> dict[str, Tensor]:
    """What the judge names in the left and the right half, each enlarged to a picture: (N,) of True and False.

    Both nouns, one in each half, whichever is left; and of these, both colours right, exchanged, or one of them twice.
    Or one noun twice.
    images: (N, 3, 64, 64) in [-1, 1], of objects next to each other.
    """
    sides = []
    for half in images[:, :, 24:].split(32, dim=3):  # the sky is left out
        logits, _ = judge.answers(reader, F.interpolate(half, (64, 64), mode="bilinear", antialias=True))
        sides.append((named(logits, specs, "noun"), named(logits, specs, "colour")))
    (noun_left, colour_left), (noun_right, colour_right) = sides
    there = [noun_left[k] & noun_right[1 - k] for k in (0, 1)]  # k = 0: the first object is the left one
    own = [there[k] & colour_left[k] & colour_right[1 - k] for k in (0, 1)]
    exchanged = [there[k] & colour_left[1 - k] & colour_right[k] for k in (0, 1)]
    colour_twice = (colour_left[0] & colour_right[0]) | (colour_left[1] & colour_right[1])
    return {
        "noun in each half": there[0] | there[1],
        "own colours": own[0] | own[1],
        "colours exchanged": exchanged[0] | exchanged[1],
        "one colour twice": (there[0] | there[1]) & colour_twice,
        "one noun twice": (noun_left[0] & noun_right[0]) | (noun_left[1] & noun_right[1]),
    }


def scores(reader: judge.Judge, images: Tensor, specs: list[Spec]) -> dict[str, dict]:
    """Shares of all pictures. With "on" the judge names the colour of the upper object: own, exchanged, a third."""
    images = images.cpu()
    logits, _ = judge.answers(reader, images)
    row = {"both nouns": judge.correct(logits, specs)["both nouns"]}
    if specs[0].relation == "next to":
        row |= halves(reader, images, specs)
    else:
        own, other = named(logits, specs, "colour")
        row |= {"own colour": own, "colours exchanged": other, "a third colour": ~own & ~other}
    return {name: statistics.share(right).as_dict() for name, right in row.items()}


def measure(reader: judge.Judge, draw: Callable[[list[str]], Tensor], relation: str, seed: int) -> dict:
    """The row of a relation: pictures of the model, and real renderings of the same specs.  draw: prompts to images."""
    specs = pair_specs(relation, PROMPTS[relation], seed)
    real = from_uint8(torch.from_numpy(np.stack([render(spec) for spec in specs])).permute(0, 3, 1, 2).float())
    drawn = draw([describe(spec) for spec in specs])
    return {"drawn": scores(reader, drawn, specs), "real": scores(reader, real, specs)}
