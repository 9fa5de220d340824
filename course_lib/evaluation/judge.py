"""The judge of the Toybox world: a classifier that names what a picture shows, and tells individuals apart.

One small network with two jobs. Its attribute heads name noun, colour, pattern, scene, accessory, relation and style,
which measures whether a picture follows its prompt. Its identity head puts two pictures of the same
individual near each other: it takes the place that DINO has in the DreamBooth paper (Ruiz et al. 2022, section 4.1).
It was trained on renderings alone, without a picture or a weight of the generator or of CLIP, so no method was trained
against it.

Used by: notebooks/05_latent_diffusion.ipynb, section "Measured".
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from course_lib.diffusion import checkpoint
from course_lib.environment import CHECKPOINTS, from_uint8
from course_lib.toybox.accessories import ACCESSORIES
from course_lib.toybox.pen import COLOURS, PATTERNS
from course_lib.toybox.scenes import SCENES
from course_lib.toybox.styles import STYLES
from course_lib.toybox.world import NOUNS, RELATIONS, Spec

ATTRIBUTES = {
    "noun": tuple(NOUNS),
    "colour": tuple(COLOURS),
    "pattern": tuple(PATTERNS),
    "scene": tuple(SCENES),
    "accessory": (None, *ACCESSORIES),
    "relation": (None, *RELATIONS),
    "style": tuple(STYLES),
}
IGNORE_INDEX = -100  # a label that does not count: F.cross_entropy skips it


class Judge(nn.Module):
    """A residual network for 64x64 pictures.

    width: channels at 32x32; up to six times as many at 4x4. Features have 6 * width numbers.
    `forward` returns logits (B, number of values) for each of ATTRIBUTES, and "presence" (B, 25), one for each noun.
    """

    def __init__(self, width: int = 32, identity: int = 64):
        super().__init__()
        self.config = dict(width=width, identity=identity)
        widths = (width, 2 * width, 4 * width, 6 * width)

        def conv(i: int, o: int, stride: int = 1) -> nn.Sequential:
            return nn.Sequential(nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.GroupNorm(8, o), nn.ReLU(inplace=True))

        self.stem = conv(3, width, 2)  # 32x32
        self.widen = nn.ModuleList(conv(i, o, 2) for i, o in pairwise(widths))  # 16, 8, 4
        self.blocks = nn.ModuleList(nn.Sequential(conv(o, o), conv(o, o)) for o in widths[1:])
        heads = {name: len(values) for name, values in ATTRIBUTES.items()} | {"presence": len(NOUNS)}
        self.heads = nn.ModuleDict({name: nn.Linear(6 * width, count) for name, count in heads.items()})
        self.identity = nn.Linear(6 * width, identity)

    def features(self, x: Tensor) -> Tensor:
        """x: (B, 3, 64, 64) in [-1, 1].  Returns (B, 6 * width): the space of the Fréchet distance."""
        h = self.stem(x)
        for widen, block in zip(self.widen, self.blocks, strict=True):
            h = widen(h)
            h = h + block(h)
        return (h.mean(dim=(2, 3)) + h.amax(dim=(2, 3))) / 2

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """x: (B, 3, 64, 64) in [-1, 1].  Returns the logits by attribute."""
        h = self.features(x)
        return {name: head(h) for name, head in self.heads.items()}

    def individual(self, x: Tensor) -> Tensor:
        """Unit vectors (B, identity): two pictures of one individual have a dot product near 1."""
        return F.normalize(self.identity(self.features(x)), dim=-1)


def load_judge(device: torch.device | str = "cpu") -> Judge:
    """The shipped judge."""
    return checkpoint.load(CHECKPOINTS / "toybox-judge", device, Judge)


def labels(specs: Sequence[Spec]) -> dict[str, Tensor]:
    """The right answers: (B,) indices into ATTRIBUTES, and "presence" (B, 25) zeros and ones.

    With the relation "next to", a picture does not show which object the sentence is about, so noun, colour, pattern
    and accessory do not count there; which two nouns are present does. In the style "pencil sketch" colours
    are too pale to count.
    """
    rows = {name: [] for name in ATTRIBUTES}
    presence = torch.zeros(len(specs), len(NOUNS))
    nouns = ATTRIBUTES["noun"]
    for k, spec in enumerate(specs):
        beside, pale = spec.relation == "next to", spec.style == "pencil sketch"
        for name, values in ATTRIBUTES.items():
            ignored = (beside and name in ("noun", "colour", "pattern", "accessory")) or (pale and name == "colour")
            rows[name].append(IGNORE_INDEX if ignored else values.index(getattr(spec, name)))
        for one in filter(None, (spec, spec.other)):
            presence[k, nouns.index(one.noun)] = 1
    return {name: torch.tensor(row) for name, row in rows.items()} | {"presence": presence}


@torch.no_grad()
def answers(judge: Judge, images: Tensor | np.ndarray, batch_size: int = 250) -> tuple[dict[str, Tensor], Tensor]:
    """The judge's logits by attribute, and its features, for a whole set.

    images: (N, 3, 64, 64) in [-1, 1], or (N, 64, 64, 3) uint8.  Returns a dict of (N, values), and (N, D).
    Raises ValueError for pictures of another shape.
    """
    images = torch.as_tensor(images)
    if images.dtype == torch.uint8 and images.ndim == 4:
        images = images.permute(0, 3, 1, 2)
    if images.ndim != 4 or tuple(images.shape[1:]) != (3, 64, 64):
        raise ValueError(f"images: expected (N, 3, 64, 64) in [-1, 1] or (N, 64, 64, 3) uint8, got "
                         f"{tuple(images.shape)} {images.dtype}")  # fmt: skip
    device, rows = next(judge.parameters()).device, []
    for part in images.split(batch_size):
        x = part.to(device).float()
        x = from_uint8(x) if images.dtype == torch.uint8 else x.clamp(-1, 1)
        rows.append(judge.features(x.contiguous(memory_format=torch.channels_last)))
    features = torch.cat(rows)
    return {name: head(features).cpu() for name, head in judge.heads.items()}, features.cpu()


def correct(logits: dict[str, Tensor], specs: Sequence[Spec]) -> dict[str, Tensor]:
    """Which answers are right: for each attribute a row of True and False, without pictures where it does not count.

    "plain" counts as a pattern. "accessory" and "relation" look only at pictures that have one; "both nouns" says, for
    pictures of two objects, whether the two most present nouns are the two of the prompt.
    """
    targets = labels(specs)
    right = {}
    for name in ATTRIBUTES:
        counts = targets[name] != IGNORE_INDEX
        if name in ("relation", "accessory"):
            counts &= targets[name] != 0  # pictures that have one
        right[name] = (logits[name].argmax(1) == targets[name])[counts]
    pairs = targets["presence"].sum(1) == 2
    top = torch.zeros_like(targets["presence"]).scatter_(1, logits["presence"].topk(2, dim=1).indices, 1.0)
    right["both nouns"] = (top == targets["presence"]).all(1)[pairs]
    return right
