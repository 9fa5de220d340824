"""Where does a word's attention lie? Maps of renderings, scored against the true masks of what the words name.

True masks exist for renderings only, so these are encoded, noised to a time t, and read by the UNet once.

Used by: notebooks/05_latent_diffusion.ipynb, section "Cross-attention by hand", and
notebooks/06_stable_diffusion.ipynb, section "Where each word's attention lies".
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import scipy.stats
import torch
import torch.nn.functional as F
from torch import Tensor

from course_lib.editing.attention import AttentionMaps, attention_hook, by_word, relative_maps
from course_lib.environment import from_uint8
from course_lib.latent import text
from course_lib.latent.stable_diffusion import StableDiffusion
from course_lib.toybox.captions import describe
from course_lib.toybox.world import Spec, coverage, render

KINDS = ("colour", "pattern", "noun", "accessory_colour", "accessory", "scene")  # in the order of a caption


def masks(spec: Spec, size: int = 64) -> dict[str, Tensor]:
    """For each of KINDS the pixels that its word is about: (size, size) of True and False.

    The accessory is where the picture differs from the same one without it, the scene is all that the object leaves
    free, the noun is the rest. Colour and pattern count for the noun.  Without an accessory, its masks are empty.
    A pixel differs if a channel does by more than 8 of 255: the accessory's edge is blended with what is behind it.
    """
    whole = torch.from_numpy(coverage(spec, size)) > 0.5
    bare = render(replace(spec, accessory=None), size).astype(int)
    worn = whole & torch.from_numpy(np.abs(render(spec, size) - bare).max(axis=2) > 8)
    body = whole & ~worn
    return dict(colour=body, pattern=body, noun=body, accessory_colour=worn, accessory=worn, scene=~whole)


def places(tokenizer, spec: Spec) -> dict[str, list[int]]:
    """The token positions of each kind of word in `describe(spec)`; of the scene, those of its last word."""
    words = text.words(tokenizer, describe(spec))
    first, last = dict(reversed(words)), dict(words)  # "a red cat wearing a red hat"
    said = {kind: getattr(spec, kind) for kind in KINDS[:-1]}
    found = {kind: (last if kind.startswith("accessory") else first).get(word) for kind, word in said.items()}
    return {kind: positions for kind, positions in found.items() if positions} | {"scene": words[-1][1]}


@torch.no_grad()
def noised_maps(sd: StableDiffusion, specs: Sequence[Spec], t: int, sides: Sequence[int] = (4, 8, 16),
                seed: int = 0) -> dict[int, Tensor]:  # fmt: skip
    """Render, encode and noise each spec to t, and let the UNet read it once with its full caption.

    Returns {side: (B, L, side, side)}: the attention to each token, averaged over the heads and layers of that size.
    """
    seen = {side: AttentionMaps(side) for side in sides}

    def look(probs: Tensor, layer: str, is_cross: bool) -> Tensor:
        for maps in seen.values():
            maps(probs, layer, is_cross)
        return probs

    z0 = sd.encode_image(from_uint8(torch.from_numpy(np.stack([render(spec) for spec in specs])).permute(0, 3, 1, 2)))
    alpha_bar = sd.schedule.at(t, z0)
    zt = alpha_bar.sqrt() * z0 + (1 - alpha_bar).sqrt() * sd.noise(len(specs), seed=seed)
    with attention_hook(sd.unet, look):
        sd.eps_model([describe(spec) for spec in specs])(zt, t)
    return {side: maps.mean() for side, maps in seen.items()}


def kind_maps(maps: Tensor, tokenizer, spec: Spec, relative: bool = True) -> dict[str, Tensor]:
    """The map of each kind of word, from those of all tokens, (L, h, w).  Returns {kind: (h, w)}.

    relative: to the words of the prompt, see `relative_maps`; else the plain shares of attention.
    """
    found = _maps_by_place(maps, tokenizer, spec, relative)
    return {kind: found[tuple(positions)] for kind, positions in places(tokenizer, spec).items()}


def other_areas(maps: Tensor, tokenizer, spec: Spec) -> dict[str, list[float]]:
    """For each kind of word the areas of the *other* words' relative maps against its mask: does its word stand out?

    Other are all words of the prompt but the kinds with the same mask.  maps: of all tokens, (L, h, w).
    """
    at, of_kind, found = places(tokenizer, spec), masks(spec), _maps_by_place(maps, tokenizer, spec, True)
    areas = {}
    for group in (KINDS[:3], KINDS[3:5], KINDS[5:]):  # one mask each
        named = [tuple(at[kind]) for kind in group if kind in at]
        others = [area(of_word, of_kind[group[0]]) for place, of_word in found.items() if place not in named]
        areas |= {kind: others for kind in group if kind in at}
    return areas


def _maps_by_place(maps: Tensor, tokenizer, spec: Spec, relative: bool) -> dict[tuple[int, ...], Tensor]:
    """The map of each word of the full caption, by its token positions."""
    words = text.words(tokenizer, describe(spec))
    found = by_word(maps, words)
    found = relative_maps(found) if relative else found
    return {tuple(positions): of_word for (_, positions), of_word in zip(words, found.values(), strict=True)}


def area(scores: Tensor, mask: Tensor) -> float:
    """Area under the ROC curve: how often a pixel in the mask has a larger score than one outside; ties count half.

    scores: (h, w), enlarged to the mask's size.  mask: (H, W) of True and False.  0.5 is chance, 1 is perfect.
    It is the rank sum of the pixels in the mask (Hanley & McNeil 1982).
    Raises ValueError if the mask is empty or full.
    """
    inside, mask = int(mask.sum()), mask.flatten()
    if not 0 < inside < len(mask):
        raise ValueError(f"mask: expected pixels inside and outside, got {inside} of {len(mask)} inside")
    H = round(len(mask) ** 0.5)
    scores = F.interpolate(scores[None, None].float(), (H, H), mode="bilinear").flatten()
    ranks = scipy.stats.rankdata(scores.cpu())[mask.numpy()]
    return float((ranks.sum() - inside * (inside + 1) / 2) / (inside * (len(mask) - inside)))
