"""Regularisation pictures (class images for prior preservation), found by their captions.

Derived in: notebooks/13_custom_diffusion.ipynb, section "Pictures that hold the class".
"""

from dataclasses import replace
from pathlib import Path

import numpy as np

from course_lib.data.pictures import captions_beside, image_sources, open_image, picture_files
from course_lib.environment import from_uint8
from course_lib.latent.stable_diffusion import StableDiffusion
from course_lib.personalization.custom_diffusion import retrieve
from course_lib.personalization.examples import Examples, encode, subject_examples
from course_lib.toybox.captions import caption
from course_lib.toybox.sets import pair_spec
from course_lib.toybox.world import NOUNS, render, sample_spec

SEARCHED = 2000  # the least number of captions to search


def toybox_regularisation(sd: StableDiffusion, noun: str, count: int = 100, *, threshold: float = 0.85) -> Examples:
    """At most `count` training pictures of the Toybox model, those with the captions nearest to the class.

    Only these are rendered. Source: Kumari et al. 2023, section 3.2.
    Raises ValueError for a count below 1, or if no caption is near enough.
    """
    if not isinstance(count, int) or count < 1:
        raise ValueError(f"regularisation: expected a whole number of at least 1, got {count!r}")
    pairs = [pair_spec(k) for k in range(max(SEARCHED, 20 * count))]
    found = retrieve(sd, [caption for _, caption in pairs], f"a photo of a {noun}", count, threshold)
    size = sd.resolution
    images = from_uint8(np.stack([render(pairs[k][0], size) for k in found]))  # (V, 3, H, W)
    return encode(sd, images, [(pairs[k][1],) for k in found])


def toybox_pairs(sd: StableDiffusion, nouns: tuple[str, str], count: int = 100) -> Examples:
    """Pictures of two nouns of the Toybox world next to each other, all else at random; their captions name both.

    Raises ValueError for another noun.
    Derived in: notebooks/14_multiple_concepts.ipynb, section "With pictures of other pairs".
    """
    if unknown := [noun for noun in nouns if noun not in NOUNS]:
        raise ValueError(f"nouns: expected two of {', '.join(NOUNS)}, got {unknown[0]!r}")
    rng, specs = np.random.default_rng(15), []
    for _ in range(count):
        spec = sample_spec(rng, nouns[0], relation="next to", style="plain")
        specs.append(replace(spec, other=replace(spec.other, noun=nouns[1])))
    images = from_uint8(np.stack([render(spec, sd.resolution) for spec in specs]))  # (V, 3, H, W)
    return encode(sd, images, [(caption(spec, rng, name_relation=True),) for spec in specs])


def folder_regularisation(sd: StableDiffusion, folder: str | Path, noun: str, count: int = 200, *,
                          threshold: float = 0.85) -> Examples:  # fmt: skip
    """At most `count` of the pictures in a folder, those with the captions (<picture>.txt) nearest to the class.

    Raises ValueError if a caption is missing, a picture cannot be read, or no caption is near enough.
    """
    for file in image_sources(folder):
        open_image(file)  # its error names a file that cannot be read
    captions = captions_beside(folder)
    if captions is None:
        raise ValueError(f"regularisation: expected a caption beside each picture, such as 1.txt beside 1.png, but "
                         f"{folder} has none")  # fmt: skip
    files = picture_files(folder)
    found = retrieve(sd, captions, f"a photo of a {noun}", count, threshold)
    return subject_examples(sd, [files[k] for k in found], noun, captions=[captions[k] for k in found])
