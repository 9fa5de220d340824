"""The people of the Toybox world: portraits of a man and a woman, whose shirt carries the colour and the pattern.

All that makes a face (skin, hair, brows, nose, mouth, beard, ...) comes from the random generator that is passed in, so
the same generator state draws the same person in every shirt.
"""

import numpy as np

from course_lib.toybox.pen import COLOURS, CREAM, INK, ROSE, WHITE, blob, deepen, mix, oval, pick, poly, smooth

SKINS = ((255, 226, 200), (246, 200, 160), (224, 168, 120), (172, 116, 76), (122, 78, 56))
HAIRS = ((48, 40, 50), (92, 56, 40), (150, 92, 48), (238, 196, 96), (208, 96, 44), (190, 190, 198))
LIPS, MOUTH = (206, 66, 84), (122, 40, 50)
X, Y, RX, RY = 0.5, 0.43, 0.215, 0.235  # the face's centre and half axes
EYE = 0.112  # from the face's middle to an eye
PARTINGS = {  # hairlines: points relative to the face's centre, from the right ear to the left
    "swept": ((0.2, -0.05), (0.16, -0.13), (0.0, -0.15), (-0.12, -0.185), (-0.17, -0.12), (-0.2, -0.05)),
    "middle": ((0.21, -0.03), (0.17, -0.12), (0.0, -0.21), (-0.17, -0.12), (-0.21, -0.03)),
    "fringe": ((0.2, -0.04), (0.17, -0.13), (0.0, -0.145), (-0.17, -0.13), (-0.2, -0.04)),
    "high": ((0.2, -0.06), (0.16, -0.16), (0.0, -0.165), (-0.16, -0.16), (-0.2, -0.06)),
}


def _face(points):
    """Points relative to the face's centre, as box coordinates."""
    return np.array(points) + (X, Y)


def _ball(x, y, rx, ry=None):
    """A small oval relative to the face's centre, with half the points: quick to draw."""
    return oval(X + x, Y + y, rx, ry)[::2]


def _curls(away, radius, *angles):
    """A row of discs around the head, at angles in degrees (0 to the right, 90 above)."""
    return [_ball(away * np.cos(t), -0.02 - away * np.sin(t), radius) for t in np.radians(angles)]


def _scalp(parting, rise):
    """The hair on top: from the hairline to an arc that rises over the head."""
    turns = np.linspace(np.pi, 0, 22)
    arc = np.stack([(RX + 0.025) * np.cos(turns), PARTINGS[parting][0][1] - (RY + rise) * np.sin(turns)], 1)
    return np.concatenate([_face(arc), smooth(_face(PARTINGS[parting]), closed=False)])


def _shirt(pen, width, slope):
    """Shoulders from the neck down to the ground."""
    right = [(0.1, 0.645), (0.24, 0.66 + slope / 2), (width - 0.05, 0.7 + slope), (width, 0.98)]
    pen.body(smooth([(X - d, y) for d, y in right[::-1]] + [(X + d, y) for d, y in right], closed=False))
    for s in (-1, 1):  # the arms
        pen.line([(X + s * (width - 0.12), 0.85), (X + s * (width - 0.13), 0.97)], 0.025)


def _features(pen, skin, brow, nose, mouth, lips, freckles):
    """The face without its hair: cheeks, eyes, brows, nose and mouth."""
    warm = mix(skin, ROSE, 0.5)
    for s in (-1, 1):
        pen.flat(warm, _ball(s * 0.145, 0.1, 0.05, 0.04))
        if freckles:
            for dx, dy in ((0.1, 0.085), (0.14, 0.075), (0.12, 0.115)):
                pen.dot(mix(skin, HAIRS[2], 0.6), X + s * dx, Y + dy, 0.013)
    if nose == "round":
        pen.flat(mix(skin, MOUTH, 0.3), _ball(0, 0.08, 0.035, 0.028))
    else:
        pen.line(_face([(0.0, 0.03), (0.03, 0.08), (-0.01, 0.085)]), 0.022, mix(skin, MOUTH, 0.5))
    if mouth == "open":
        turns = np.linspace(0, np.pi, 12)
        pen.flat(lips, _ball(0, 0.15, 0.09, 0.022))
        pen.flat(MOUTH, _face(np.stack([0.08 * np.cos(turns), 0.135 + 0.065 * np.sin(turns)], 1)))
        pen.flat(WHITE, poly((0.43, Y + 0.135), (0.57, Y + 0.135), (0.55, Y + 0.16), (0.45, Y + 0.16)))
    else:
        pen.line(_face([(-0.08, 0.13), (-0.04, 0.16), (0.0, 0.17), (0.04, 0.16), (0.08, 0.13)]), 0.03, lips)
    lift, thick, colour = brow
    for s in (-1, 1):
        x = X + s * EYE
        for paint, dx, dy, r in ((mix(skin, INK, 0.7), 0, 0, 0.067), (WHITE, 0, 0, 0.056), (INK, 0.005, 0.003, 0.043)):
            pen.dot(paint, x + dx, Y + dy, r)
        pen.dot(WHITE, x - 0.01, Y - 0.017, 0.016)
        pen.line(_face([(s * 0.06, -0.105), (s * 0.11, -0.11 - lift), (s * 0.165, -0.085)]), thick, colour)


def _wear(pen):
    pen.wear(head=(X, Y - 0.17, 0.5), eyes=(X, Y, 2 * EYE), neck=(X, 0.71, 0.34), badge=(0.66, 0.84, 0.085))


def man(pen, rng):
    """Broad shoulders, short hair or none, often a beard or a moustache."""
    skin, hair = SKINS[rng.integers(5)], HAIRS[rng.integers(6)]
    style = pick(rng, "swept", "high", "curly", "bald", "quiff", "fringe")
    beard = pick(rng, "none", "beard", "beard", "moustache", "goatee")
    nose, mouth, lift = pick(rng, "round", "line"), pick(rng, "open", "line"), rng.uniform(0, 0.02)
    freckles = rng.random() < 0.2
    width, slope, collar = rng.uniform(0.42, 0.45), rng.uniform(0, 0.03), pick(rng, "round", "shirt")
    pen.part(mix(skin, MOUTH, 0.2), oval(X, 0.64, 0.1, 0.08))
    _shirt(pen, width, slope)
    if collar == "shirt":
        for s in (-1, 1):
            pen.part(WHITE, poly((X, 0.74), (X + s * 0.13, 0.64), (X + s * 0.17, 0.7), (X + s * 0.09, 0.79)))
    else:
        pen.part(pen.shade, oval(X, 0.66, 0.14, 0.06))
    pen.part(skin, oval(X, Y, RX, RY), *(_ball(s * RX, 0.03, 0.045, 0.055) for s in (-1, 1)))
    whiskers = mix(hair, deepen(hair), 0.6)
    if beard == "beard":
        turns = np.linspace(0, np.pi, 16)
        chin = np.stack([RX * np.cos(turns), RY * np.sin(turns)], 1)
        cheek = [(-0.2, 0.04), (-0.15, 0.11), (-0.06, 0.1), (0.0, 0.115), (0.06, 0.1), (0.15, 0.11), (0.2, 0.04)]
        pen.flat(whiskers, np.concatenate([_face(chin), smooth(_face(cheek), closed=False)]))
    elif beard == "goatee":
        pen.part(
            whiskers, blob(*_face([(-0.1, 0.18), (0.0, 0.2), (0.1, 0.18), (0.08, 0.24), (0.0, 0.28), (-0.08, 0.24)]))
        )
    lips = mix(skin, CREAM, 0.3) if beard == "beard" else MOUTH
    _features(pen, skin, (lift, 0.035, deepen(hair)), nose, mouth, lips, freckles)
    if beard == "moustache":
        half = [(0.0, 0.1), (0.07, 0.085), (0.14, 0.13), (0.06, 0.14)]
        pen.part(whiskers, *(blob(*_face(np.array(half) * (s, 1))) for s in (-1, 1)))
    if style == "curly":
        pen.part(hair, *_curls(0.22, 0.08, 20, 48, 76, 104, 132, 160))
    elif style == "quiff":
        top = [(-0.2, -0.1), (-0.19, -0.24), (0.0, -0.3), (0.2, -0.33), (0.22, -0.2), (0.17, -0.13), (0.0, -0.14)]
        pen.part(hair, _scalp("high", 0.0), blob(*_face(top)))
    elif style == "bald":
        pen.line(_face([(-0.1, -0.17), (-0.06, -0.19)]), 0.03, mix(skin, WHITE, 0.6))
    else:
        pen.part(hair, _scalp(style, 0.0))
    _wear(pen)


def woman(pen, rng):
    """Long hair, a bob, a bun, a ponytail or curls; long lashes, red lips, at times earrings."""
    skin, hair = SKINS[rng.integers(5)], HAIRS[rng.integers(6)]
    style, parting = pick(rng, "long", "bun", "bob", "ponytail", "curly"), pick(rng, "swept", "middle", "fringe")
    jewel = pick(rng, None, None, None, "yellow", "teal", "red", "white")
    nose, mouth, lift = pick(rng, "round", "line"), pick(rng, "open", "line"), rng.uniform(0, 0.02)
    freckles = rng.random() < 0.3
    width, slope, side = rng.uniform(0.36, 0.4), rng.uniform(0.03, 0.06), pick(rng, -1, 1)
    if style == "ponytail":
        tail = [(0.1, -0.2), (0.27, -0.25), (0.36, -0.1), (0.35, 0.14), (0.27, 0.26), (0.23, 0.1), (0.2, -0.05)]
        pen.part(hair, blob(*_face(np.array(tail) * (side, 1))))
    elif style == "bun":
        pen.part(hair, oval(X, Y - 0.3, 0.1, 0.09))
    pen.part(mix(skin, MOUTH, 0.2), oval(X, 0.64, 0.09, 0.08))
    _shirt(pen, width, slope)
    pen.part(skin, blob((X - 0.13, 0.65), (X + 0.13, 0.65), (X + 0.09, 0.73), (X, 0.755), (X - 0.09, 0.73)))
    if style in ("long", "bob"):
        low, out = (0.35, 0.27) if style == "long" else (0.2, 0.29)
        half = [(0.0, -0.27), (0.17, -0.23), (0.26, -0.06), (out, low - 0.08), (out - 0.04, low), (0.13, low - 0.01)]
        half += [(0.1, 0.1)]
        pen.part(hair, blob(*_face(half), *_face(np.array(half[:0:-1]) * (-1, 1))))
    elif style == "curly":
        pen.part(hair, *_curls(0.2, 0.12, -48, -14, 20, 90, 160, 194, 228))
    pen.part(skin, oval(X, Y, RX - 0.01, RY), *(_ball(s * RX, 0.03, 0.035, 0.045) for s in (-1, 1)))
    for s in (-1, 1):
        if jewel and style != "long":
            pen.part(COLOURS[jewel], _ball(s * (RX + 0.015), 0.12, 0.035))
    _features(pen, skin, (lift, 0.025, deepen(hair)), nose, mouth, LIPS, freckles)
    for s in (-1, 1):  # the lashes
        lid = [(-0.06, -0.03), (-0.03, -0.06), (0.02, -0.066), (0.06, -0.045), (0.085, -0.075)]
        pen.line(_face(np.array(lid) * (s, 1) + (s * EYE, 0)), 0.028)
    if style == "curly":
        pen.part(hair, *_curls(0.22, 0.08, 28, 58, 90, 122, 152))
    else:
        pen.part(hair, _scalp(parting, 0.02))
    _wear(pen)


PEOPLE = {f.__name__: f for f in (man, woman)}
