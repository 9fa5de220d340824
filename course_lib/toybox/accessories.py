"""What the objects of the Toybox world can wear: hat, scarf, glasses, bow, and small emblems.

A noun's drawing function ends with `pen.wear(...)`, which sets where things can be worn. `put_on` draws an accessory
there. To add an accessory, write its function and put it in ACCESSORIES with the name of its anchor.
"""

import numpy as np
from PIL import Image, ImageDraw

from course_lib.toybox.pen import INK, WHITE, blob, box, deepen, mix, oval, pick, poly, smooth, tube

NIGHT = (52, 54, 96)  # behind pale emblems


def _contrast(colour):
    """A lighter companion of a dark colour, a darker one of a pale colour."""
    return deepen(colour) if sum(colour) > 560 else mix(colour, WHITE, 0.7)


def _dome(x, y, w, h):
    turns = np.linspace(0, np.pi, 20)
    return np.stack([x + w / 2 * np.cos(turns), y - h * np.sin(turns)], 1)


# ---- accessories: f(pen, anchor, colour, rng) ----


def hat(pen, at, colour, rng):
    """A party hat with a pompom, a top hat, a beanie or a cap."""
    x, y, w = at[0], at[1], max(1.1 * at[2], 0.4)
    kind, h, other = pick(rng, "party", "top", "beanie", "cap"), rng.uniform(0.21, 0.25), _contrast(colour)
    if kind == "party":
        tip = y - h - 0.05
        pen.part(colour, poly((x - 0.45 * w, y + 0.02), (x, tip), (x + 0.45 * w, y + 0.02)))
        pen.line([(x - 0.22 * w, y - 0.12), (x, y - 0.09), (x + 0.22 * w, y - 0.12)], 0.04, other)
        pen.part(other, oval(x, tip, 0.055))
        pen.part(colour, box(x - w / 2, y - 0.025, x + w / 2, y + 0.04, 0.03))
    elif kind == "top":
        pen.part(colour, poly((x - 0.33 * w, y), (x - 0.38 * w, y - h), (x + 0.38 * w, y - h), (x + 0.33 * w, y)))
        pen.flat(other, poly((x - 0.34 * w, y - 0.08), (x + 0.34 * w, y - 0.08), (x + 0.33 * w, y), (x - 0.33 * w, y)))
        pen.part(colour, oval(x, y, 0.58 * w, 0.045))
    elif kind == "beanie":
        pen.part(other, oval(x, y - h, 0.065))
        pen.part(colour, _dome(x, y, 0.96 * w, h))
        pen.part(deepen(colour), box(x - w / 2, y - 0.05, x + w / 2, y + 0.035, 0.04))
    else:
        pen.part(colour, _dome(x, y + 0.03, 0.96 * w, h))
        visor = blob((x + 0.05 * w, y), (x + 0.5 * w, y - 0.02), (x + 0.8 * w, y + 0.05), (x, y + 0.04))
        pen.part(deepen(colour), visor)
        pen.dot(other, x + 0.05 * w, y - 0.55 * h, 0.05)


def scarf(pen, at, colour, rng):
    """A thick band around the neck, with one hanging end."""
    x, y, w = at[0], at[1], max(at[2], 0.26) + 0.06
    side, long, other = pick(rng, -1, 1), min(rng.uniform(0.19, 0.24), max(1.02 - y, 0.13)), _contrast(colour)
    end = poly((0.02, 0.0), (0.15, 0.0), (0.17, long), (0.03, long)) * (side, 1) + (x, y)
    pen.part(colour, end)
    stripe = poly((0.03, 0.72 * long), (0.163, 0.72 * long), (0.167, 0.86 * long), (0.03, 0.86 * long))
    pen.flat(other, stripe * (side, 1) + (x, y))
    band = [(x - w / 2, y - 0.03), (x - w / 4, y + 0.02), (x + w / 4, y + 0.02), (x + w / 2, y - 0.03)]
    pen.part(colour, tube(band, 0.11))
    pen.part(colour, oval(x + side * 0.085, y + 0.02, 0.07, 0.06))


def glasses(pen, at, colour, rng):
    """Two thick round or angular rims with slightly tinted lenses; an eye seen from the side gets one rim."""
    x, y, gap = at
    r, angular = float(np.clip(0.44 * gap, 0.09, 0.12)), rng.random() < 0.4
    centres = (x - gap / 2, x + gap / 2) if gap > 0.12 else (x,)
    rims = [box(c - r, y - 0.9 * r, c + r, y + 0.9 * r, 0.04) if angular else oval(c, y, r) for c in centres]
    if pen.halo:
        pen.part(colour, *rims)
        return
    glass = Image.new("L", pen.image.size)
    for rim in rims:
        ImageDraw.Draw(glass).polygon(pen.place(rim).ravel().tolist(), fill=30)
    pen.image.paste(mix(colour, WHITE, 0.4), mask=glass)
    ends = (centres[0] + r, centres[-1] - r) if len(centres) > 1 else (x - r, x - r - 0.12)  # bridge, or side arm
    bridge = poly((ends[0], y), (ends[1], y))
    closed = [np.concatenate([rim, rim[:2]]) for rim in rims]
    for width, paint in ((0.066, INK), (0.04, colour)):
        for line in [bridge, *closed]:
            pen._stroke(pen.place(line), width * pen.unit, paint)


def bow(pen, at, colour, rng):
    """Two wide loops and a knot."""
    x, y, w = at[0], at[1] + 0.025, float(np.clip(at[2], 0.3, 0.4)) * rng.uniform(0.6, 0.68)
    for s in (-1, 1):
        pen.part(colour, blob((x, y), (x + s * 0.8 * w, y - 0.1), (x + s * w, y), (x + s * 0.8 * w, y + 0.1)))
        pen.line([(x + s * 0.35 * w, y - 0.01), (x + s * 0.6 * w, y)], 0.025, deepen(colour))
    pen.part(_contrast(colour), box(x - 0.045, y - 0.055, x + 0.045, y + 0.055, 0.035))


ACCESSORIES = {"hat": (hat, "head"), "scarf": (scarf, "neck"), "glasses": (glasses, "eyes"), "bow": (bow, "neck")}


def put_on(pen, accessory, colour, rng):
    """Draw an accessory where the object that was drawn last can wear it.

    Args:
        pen: the Pen that has just drawn the object; pen.anchors says where things can be worn.
        accessory: one of ACCESSORIES.
        colour: its RGB colour, three numbers from 0 to 255.
        rng: np.random.Generator, the only source of chance: kinds and small details.

    Raises: ValueError for an unknown accessory, or one that this object has no place for.
    """
    if accessory not in ACCESSORIES:
        raise ValueError(f"accessory={accessory!r}: expected one of {', '.join(ACCESSORIES)}")
    draw, anchor = ACCESSORIES[accessory]
    if anchor not in pen.anchors:
        places = ", ".join(pen.anchors) or "none"
        raise ValueError(
            f"accessory={accessory!r}: expected one that this object can wear; "
            f"this one is worn at the {anchor}, and the object's anchors are: {places}"
        )
    draw(pen, pen.anchors[anchor], colour, rng)


# ---- emblems: f(pen, badge anchor, colour), on a round badge ----


def _badge(pen, at, colour):
    """The badge itself, white or dark, whichever shows the colour; returns its centre and the emblem's radius."""
    x, y, r = at[0], at[1], max(at[2], 0.08)
    pen.part(NIGHT if sum(colour) > 480 else WHITE, oval(x, y, r))
    return np.array([x, y]), 0.8 * r


def _star_points(count, inner):
    turns = np.arange(2 * count) * np.pi / count
    radius = np.where(np.arange(2 * count) % 2, inner, 1.0)
    return np.stack([np.sin(turns), -np.cos(turns)], 1) * radius[:, None]


def star(pen, at, colour):
    """A star with five points."""
    centre, r = _badge(pen, at, colour)
    pen.flat(colour, centre + 1.1 * r * _star_points(5, 0.48))


def heart(pen, at, colour):
    """A heart."""
    centre, r = _badge(pen, at, colour)
    half = smooth([(0, -0.5), (0.45, -0.8), (0.9, -0.45), (0.7, 0.15), (0, 0.9)], closed=False)
    pen.flat(colour, centre + r * np.concatenate([half, half[::-1] * (-1, 1)]))


def moon(pen, at, colour):
    """A crescent."""
    centre, r = _badge(pen, at, colour)
    outer, inner = np.radians(np.linspace(50, 310, 24)), np.radians(np.linspace(290, 70, 16))
    back = np.stack([0.75 * np.cos(inner) + 0.35, 0.82 * np.sin(inner)], 1)
    pen.flat(colour, centre + r * np.concatenate([np.stack([np.cos(outer), np.sin(outer)], 1), back]))


def bolt(pen, at, colour):
    """A flash of lightning."""
    centre, r = _badge(pen, at, colour)
    shape = poly((0.2, -1.1), (-0.65, 0.15), (-0.05, 0.15), (-0.25, 1.1), (0.65, -0.25), (0.05, -0.25), (0.5, -1.1))
    pen.flat(colour, centre + r * shape)


def flower(pen, at, colour):
    """Five petals around a light middle."""
    centre, r = _badge(pen, at, colour)
    for x, y in centre + 0.58 * r * _star_points(5, 0.48)[::2]:
        pen.dot(colour, x, y, 0.45 * r)
    pen.dot(_contrast(colour), *centre, 0.32 * r)


def sun(pen, at, colour):
    """A disc with eight rays."""
    centre, r = _badge(pen, at, colour)
    pen.flat(colour, centre + 1.1 * r * _star_points(8, 0.5))
    pen.dot(colour, *centre, 0.62 * r)


EMBLEMS = {f.__name__: f for f in (star, heart, moon, bolt, flower, sun)}
