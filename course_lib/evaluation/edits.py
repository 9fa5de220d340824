"""Edits whose right answer is known: the renderer draws the same scene once more with one thing changed.

Used by: notebooks/09_prompt_to_prompt.ipynb, notebooks/10_plug_and_play.ipynb and measurements/editing.py.

An edit is scored for what it changes (does the judge read the new value?) and for what it keeps (outside of the pixels
in which the two renderings differ, is the picture the source's?), since each alone is easy.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from course_lib.environment import from_uint8
from course_lib.evaluation import judge
from course_lib.toybox.captions import describe
from course_lib.toybox.world import COLOURS, PATTERNS, SCENES, STYLES, Spec, coverage, render, sample_spec, wearable

FAMILIES = (("cat", "dog", "rabbit", "bear", "tiger"), ("owl", "penguin"), ("car", "bus"), ("mug", "teapot", "pot"),
            ("house", "castle", "lighthouse"), ("man", "woman"))  # fmt: skip
ALONE = dict(relation=None, style="plain", accessory=None, accessory_colour=None)
SIZE = (0.55, 0.72)  # a hat needs room above
KINDS = ("colour", "pattern", "noun", "accessory added", "accessory removed", "scene", "style")
TUNING_SEED = 78


@dataclass(frozen=True)
class TrueEdit:
    """One edit: the Specs of both pictures, and the attribute of the judge that tells them apart."""

    kind: str
    attribute: str
    source: Spec
    target: Spec

    @property
    def prompts(self) -> tuple[str, str]:
        """Sentences for the source and for the target that differ in the edit alone."""
        return describe(self.source), describe(self.target)


def _other(rng: np.random.Generator, values: Sequence[str], than: str) -> str:
    return str(rng.choice([value for value in values if value != than]))


def _edit(rng: np.random.Generator, kind: str) -> TrueEdit:
    """An edit of this kind, everything else at random."""
    family = FAMILIES[rng.integers(len(FAMILIES))]
    noun = str(rng.choice(family)) if kind == "noun" else None
    source = sample_spec(rng, noun, **ALONE, size=float(rng.uniform(*SIZE)), x=float(rng.uniform(0.42, 0.58)))
    source = replace(source, y=0.95 - source.size / 2)
    if kind.startswith("accessory"):
        accessory, colour = str(rng.choice(wearable(source.noun))), _other(rng, tuple(COLOURS), source.colour)
        worn = replace(source, accessory=accessory, accessory_colour=colour)
        pair = (source, worn) if kind == "accessory added" else (worn, source)
        return TrueEdit(kind, "accessory", *pair)
    values = {"colour": tuple(COLOURS), "pattern": tuple(PATTERNS), "noun": family, "scene": tuple(SCENES),
              "style": tuple(STYLES)}[kind]  # fmt: skip
    return TrueEdit(kind, kind, source, replace(source, **{kind: _other(rng, values, getattr(source, kind))}))


def true_edits(count: int = 200, seed: int = 77, kinds: Sequence[str] = KINDS) -> list[TrueEdit]:
    """`count` edits, the kinds in turn. Their seeds are those of no training picture.

    Settings are chosen with another seed (TUNING_SEED), so that no measured edit has had a say in them.
    """
    return [_edit(np.random.default_rng([seed, k]), kinds[k % len(kinds)]) for k in range(count)]


def pictures(edits: Sequence[TrueEdit]) -> tuple[Tensor, Tensor, Tensor]:
    """Source pictures and true targets (N, 3, 64, 64) in [-1, 1], and masks (N, 1, 64, 64): 1 where pixels may change.

    A mask has the pixels in which the two renderings differ, and two more on all sides.
    """
    source, target = (torch.stack([from_uint8(render(spec)) for spec in specs])
                      for specs in zip(*((edit.source, edit.target) for edit in edits), strict=True))  # fmt: skip
    differ = ((source - target).abs().amax(1, keepdim=True) > 0.1).float()
    return source, target, F.max_pool2d(differ, 5, 1, 2)


def objects(edits: Sequence[TrueEdit]) -> Tensor:
    """Where the object is, in the source or in the true target, and two pixels around: (N, 1, 64, 64) of 0 and 1."""
    both = [np.maximum(coverage(edit.source), coverage(edit.target)) for edit in edits]
    return F.max_pool2d((torch.from_numpy(np.stack(both))[:, None] > 0.5).float(), 5, 1, 2)


def psnr(x: Tensor, y: Tensor, where: Tensor | None = None) -> Tensor:
    """Peak signal-to-noise ratio in dB, (N,), over the pixels where `where` is 1.  x, y: (N, 3, H, W) in [-1, 1].

    At most 80 dB. Where no pixel counts (a style may change everything), it is not a number.
    """
    error = (x - y).square().mean(1, keepdim=True)
    where = torch.ones_like(error) if where is None else where
    mean = (error * where).flatten(1).sum(1) / where.flatten(1).sum(1)
    return 10 * (4 / mean.clamp(min=4e-8)).log10()


def edges(x: Tensor) -> Tensor:
    """How strongly the grey picture changes at each pixel, smoothed: (N, 1, H, W)."""
    grey = F.pad(x.mean(1, keepdim=True), (1, 1, 1, 1), mode="replicate")
    across, down = grey[..., 1:-1, 2:] - grey[..., 1:-1, :-2], grey[..., 2:, 1:-1] - grey[..., :-2, 1:-1]
    return F.avg_pool2d((across.square() + down.square()).sqrt(), 3, 1, 1)


def structure(x: Tensor, y: Tensor, where: Tensor) -> Tensor:
    """Correlation of the edges of two pictures inside a mask, (N,) in [-1, 1]: near 1 if pose, size and place agree.

    x, y: (N, 3, H, W).  where: (N, 1, H, W) of 0 and 1.
    """

    def centred(image: Tensor) -> Tensor:
        found = edges(image)
        mean = (found * where).sum((1, 2, 3), keepdim=True) / where.sum((1, 2, 3), keepdim=True)
        return F.normalize(((found - mean) * where).flatten(1), dim=1)

    return (centred(x) * centred(y)).sum(1)


def scores(network: judge.Judge, edits: Sequence[TrueEdit], images: Tensor) -> dict[str, Tensor]:
    """The scores of edited pictures (N, 3, 64, 64), each (N,).

    obeyed: 1 if the judge reads the target's value off.  kept: PSNR to the source outside of what may change, in dB;
    not a number where all may change, as in a style.  structure: of the object, against the source or the true target,
    whichever is nearer: a new colour or pattern has other edges in the same pose.  truth: PSNR to the true target.
    """
    source, target, mask = pictures(edits)
    logits, _ = judge.answers(network, images)
    wanted = judge.labels([edit.target for edit in edits])
    right = [logits[e.attribute][k].argmax() == wanted[e.attribute][k] for k, e in enumerate(edits)]
    where = objects(edits)
    alike = torch.maximum(structure(images, source, where), structure(images, target, where))
    outside = (1 - mask) * ((1 - mask).mean((1, 2, 3), keepdim=True) > 0.05)  # a few stray pixels say nothing
    return {"obeyed": torch.tensor(right).float(), "kept": psnr(images, source, outside),
            "structure": alike, "truth": psnr(images, target)}  # fmt: skip
