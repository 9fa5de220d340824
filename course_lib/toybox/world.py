"""The Toybox world: small captioned cartoon pictures, drawn by a program.

A picture shows an object (a noun with a colour, a pattern, perhaps an accessory) in a scene, in a picture style, alone
or with a second object in a relation: "a cat on a chair". A `Spec` holds all that is needed to draw it; `sample_spec`
draws one at random and `render` turns it into pixels at any size. Words are made in captions.py, data sets in
sets.py, subjects that no caption can describe in subjects.py. The drawing is in pen.py (colours,
shapes, patterns), one file for each family of nouns, and accessories.py, scenes.py and styles.py.

Used by: notebooks/05_latent_diffusion.ipynb.
"""

from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageChops

from course_lib.toybox.accessories import ACCESSORIES, EMBLEMS, put_on
from course_lib.toybox.animals import ANIMALS
from course_lib.toybox.first_ten import NOUNS as FIRST_NOUNS
from course_lib.toybox.pen import COLOURS, INK, PATTERNS, Look, Pen, pick
from course_lib.toybox.people import PEOPLE
from course_lib.toybox.scenes import DARK_SCENES, SCENES, Scenery
from course_lib.toybox.styles import STYLES, SUBJECT_STYLES
from course_lib.toybox.things import THINGS

RENDERER_VERSION = 1  # part of every cache file's name: raise it whenever a picture changes
NOUNS = FIRST_NOUNS | ANIMALS | THINGS | PEOPLE
CREATURES = ("cat", "dog", "robot", *ANIMALS, *PEOPLE)  # they have eyes and a neck: they can wear everything
SITTERS = ("cat", "dog", "robot", *ANIMALS, "mushroom", "teapot", "mug", "clock")  # small enough to be on or in things
# Where the second object holds the first: the height of its seat, roof or rim in its own box.
SUPPORTS = {"chair": 0.6, "car": 0.36, "bus": 0.24, "boat": 0.68}
CONTAINERS = {"mug": 0.3, "backpack": 0.2}
RELATIONS = ("next to", "on", "in")


@dataclass(frozen=True)
class Spec:
    """All that is needed to draw one picture.

    x, y (centre of the object's box) and size (its side) are fractions of the picture's side; flip makes the object
    look to the left; seed sets the small free details.  accessory: one of ACCESSORIES or None, in accessory_colour.
    style: one of STYLES.  relation: one of RELATIONS, to `other`: a Spec whose own scene and style are not used.
    look: the details of a subject, which replace the colour and the pattern.
    """

    noun: str
    colour: str
    pattern: str
    scene: str
    x: float
    y: float
    size: float
    flip: bool
    seed: int
    accessory: str | None = None
    accessory_colour: str | None = None
    style: str = "plain"
    relation: str | None = None
    other: "Spec | None" = None
    look: Look | None = None


def wearable(noun: str) -> tuple[str, ...]:
    """Which accessories a noun can wear: creatures all of them, things a hat or a bow."""
    if noun in CREATURES:
        return tuple(ACCESSORIES)
    return ("hat", "bow")


# ---- specs ----


def sample_spec(rng: np.random.Generator, noun: str | None = None, **fixed) -> Spec:
    """Draw what a picture shows: everything at random, with the object standing on the ground.

    Args:
        rng: np.random.Generator, the only source of chance.
        noun: one of NOUNS; None draws one.
        fixed: fields of the Spec to use instead of drawn ones, for instance scene="at night", relation=None.

    Returns: a Spec.
    Raises: ValueError for an unknown noun.
    """
    if noun is not None:
        _check("noun", noun, NOUNS)
    relation = pick(rng, *RELATIONS) if rng.random() < 0.14 else None
    if relation in ("on", "in") and noun is not None and noun not in SITTERS:
        relation = "next to"  # a house is not on or in anything
    if "relation" in fixed:
        relation = fixed["relation"]
    if relation is None:
        size = float(rng.uniform(0.5, 0.88))
        x = rng.uniform(size / 2 + 0.01, 0.99 - size / 2)
        spec = _object(rng, noun or pick(rng, *NOUNS), x, rng.uniform(max(0.84, size + 0.04), 0.97), size)
    else:
        spec = _pair(rng, relation, noun)
    style = "plain" if rng.random() < 0.8 else pick(rng, *[style for style in STYLES if style != "plain"])
    return replace(spec, **{"scene": pick(rng, *SCENES), "style": style} | fixed)


def _object(rng, noun, x, ground, size, plain=False):
    """One object whose box is `size` wide and stands on `ground`; a plain one wears nothing."""
    accessory = None if plain or rng.random() < 0.6 else pick(rng, *wearable(noun))
    if accessory == "hat":
        size *= 0.82  # a hat needs room above the head
    return Spec(
        noun=noun,
        colour=pick(rng, *COLOURS),
        pattern=pick(rng, *PATTERNS),
        scene="",
        x=float(x),
        y=float(ground) - size / 2,
        size=size,
        flip=bool(rng.random() < 0.5),
        seed=int(rng.integers(2**31)),
        accessory=accessory,
        accessory_colour=accessory and pick(rng, *COLOURS),
    )


def _pair(rng, relation, noun):
    """Two objects in a relation; the first is the one that the sentence is about."""
    ground = rng.uniform(0.9, 0.97)
    if relation == "next to":
        size, size2 = (float(v) for v in rng.uniform(0.44, 0.52, 2))
        left = rng.random() < 0.5
        first = _object(rng, noun or pick(rng, *NOUNS), 0.26 if left else 0.74, ground, size, plain=True)
        names = [name for name in NOUNS if name != first.noun]
        other = _object(rng, pick(rng, *names), 0.74 if left else 0.26, ground, size2, plain=True)
    else:
        holders = SUPPORTS if relation == "on" else CONTAINERS
        first_noun = noun or pick(rng, *SITTERS)
        holder = pick(rng, *[name for name in holders if name != first_noun])
        size2 = float(rng.uniform(0.58, 0.66))
        x = rng.uniform(0.4, 0.6)
        other = _object(rng, holder, x, ground, size2, plain=True)
        top = ground - size2 * (1 - holders[holder])  # where the seat, roof or rim is in the picture
        size = float(min(rng.uniform(0.4, 0.48), top - 0.02)) if relation == "on" else float(rng.uniform(0.42, 0.5))
        sink = 0.02 if relation == "on" else 0.28 * size
        size = min(size, top + sink - 0.01)
        first = _object(rng, first_noun, x, top + sink, size, plain=True)
    return replace(first, relation=relation, other=other)


# ---- pictures ----

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
    Raises: ValueError for an unknown noun, colour, pattern, scene, style, accessory or relation, or a size below 16.
    """
    _check_spec(spec)
    check_count("size", size, 16)
    finer = 4 if size <= 256 else 2
    image = Image.new("RGB", (size * finer, size * finer))
    rng = np.random.default_rng([spec.seed, 1])
    SCENES[spec.scene](Scenery(image, rng), rng.uniform)
    light = tuple(rng.integers(234, 256, 3).tolist())
    halo = (150, 160, 206) if spec.scene in DARK_SCENES else None
    if spec.relation == "next to":
        _shadow(image, spec)
    _shadow(image, spec.other or spec)
    behind, front = (spec.other, spec) if spec.relation in ("next to", "on") else (spec, spec.other)
    for one in filter(None, (behind, front)):
        _draw(image, one, halo)
    if spec.style == "plain":
        image = image.reduce(finer)
    else:
        image = (STYLES | SUBJECT_STYLES)[spec.style](image, finer, np.random.default_rng([spec.seed, 4]))
    return np.array(ImageChops.multiply(image, Image.new("RGB", image.size, light)))  # the light varies a little


def coverage(spec: Spec, size: int = 64) -> np.ndarray:
    """(size, size) in [0, 1]: the share of each pixel that the object covers, with what it wears, without its shadow.

    Drawn on black and on white, it looks the same where it hides the ground. A second object is left out.
    """
    _check_spec(spec)
    grounds = [Image.new("RGB", (4 * size, 4 * size), ground) for ground in ("black", "white")]
    for image in grounds:
        _draw(image, spec, None)
    on_black, on_white = (np.asarray(image.reduce(4), dtype=float).mean(axis=2) for image in grounds)
    return 1 - (on_white - on_black) / 255


def _shadow(image, spec):
    w, h = round(spec.size * image.width * 1.1), round(spec.size * image.width * 0.2)
    x, y = spec.x * image.width, (spec.y + 0.46 * spec.size) * image.width
    image.paste(INK, (round(x - w / 2), round(y - h / 2)), _SHADOW.resize((w, h), Image.Resampling.BILINEAR))


def _draw(image, spec, halo):
    """The object, what it wears, and a subject's emblem; at night first as a pale silhouette."""
    look = spec.look
    for rim in (halo, None) if halo else (None,):
        rng = np.random.default_rng([spec.seed, 2])
        pen = Pen(image, spec, rng, rim)
        NOUNS[spec.noun](pen, np.random.default_rng([look.seed, 2]) if look else rng)
        if look and look.emblem and not rim:
            EMBLEMS[look.emblem](pen, pen.anchors["badge"], look.emblem_colour)
        accessory, colour = spec.accessory, COLOURS.get(spec.accessory_colour)
        if look and look.accessory and not accessory:
            accessory, colour = look.accessory, look.accessory_colour
        if accessory:
            put_on(pen, accessory, colour, np.random.default_rng([look.seed if look else spec.seed, 5]))


# ---- checks ----


def _check(argument, value, table):
    if value not in table:
        raise ValueError(f"{argument}={value!r}: expected one of {', '.join(table)}")


def check_count(argument: str, value: int, least: int) -> None:
    """Raise a ValueError unless value is a whole number of at least `least`."""
    if not isinstance(value, (int, np.integer)) or value < least:
        raise ValueError(f"{argument}={value!r}: expected a whole number of at least {least}")


def _check_spec(spec):
    _check("scene", spec.scene, SCENES)
    _check("style", spec.style, STYLES | SUBJECT_STYLES)
    if (spec.relation is None) != (spec.other is None):
        raise ValueError(f"relation={spec.relation!r}, other={spec.other!r}: expected both or neither")
    if spec.relation is not None:
        _check("relation", spec.relation, RELATIONS)
    for one in filter(None, (spec, spec.other)):
        for argument, table in (("noun", NOUNS), ("colour", COLOURS), ("pattern", PATTERNS)):
            _check(argument, getattr(one, argument), table)
        if one.accessory:
            _check("accessory", one.accessory, wearable(one.noun))
            _check("accessory_colour", one.accessory_colour, COLOURS)
