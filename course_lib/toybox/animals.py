"""Five more animals of the Toybox world, one drawing function each, written like those of first_ten.py.

Each function takes a Pen and a random generator, draws in the object's own square box from back to front, and ends by
telling the pen where the animal can wear things. Heads that occur twice are drawn in units of their radius r.
To add an animal, write its function and put it in ANIMALS.
"""

from course_lib.toybox.pen import (
    COLOURS,
    CREAM,
    INK,
    ROSE,
    WHITE,
    blob,
    box,
    mix,
    oval,
    poly,
    smooth,
    tube,
    twin,
)

ORANGE = COLOURS["orange"]
SIDES = (-1, 1)


def _pair(apart, y, rx, ry=None):
    """Two ovals, left and right of the box's middle."""
    return [oval(0.5 + s * apart, y, rx, ry) for s in SIDES]


def _mark(pen):
    """The tone of an animal's own marks: dark, but pale on a black one."""
    return mix(pen.shade, INK, 0.7) if sum(pen.colour) > 300 else mix(pen.colour, WHITE, 0.5)


def _banded_tail(pen, *points):
    pen.body(tube(points, 0.11, 0.1))
    path = smooth(points, closed=False)
    for k in range(3, len(path) - 1, 4):
        along = path[k + 1] - path[k - 1]
        across = along[::-1] * (-1, 1) / (along @ along) ** 0.5 * 0.03
        pen.line([path[k] - across, path[k] + across], 0.045, _mark(pen))


def _tiger_head(pen, rng, x, y, r):
    out, marks, at = rng.uniform(1.38, 1.5), [poly((-0.15, -0.94), (0.15, -0.94), (0, -0.34))], (x, y)
    ruff = poly((1.05, -0.1), (out, 0.28), (1.22, 0.38), (out - 0.15, 0.72), (0.6, 0.85))
    for s in SIDES:
        pen.body(oval(s * 0.86, -0.74, 0.4) * r + at)
        pen.flat(CREAM, oval(s * 0.86, -0.7, 0.22) * r + at)
        marks.append(poly((0.32, -0.92), (0.6, -0.8), (0.26, -0.48)) * (s, 1))
        marks.append(poly((1.14, -0.2), (1.2, 0.06), (0.8, 0.02)) * (s, 1))
        marks.append(poly((1.32, 0.24), (1.14, 0.44), (0.78, 0.28)) * (s, 1))
    pen.body(oval(x, y, 1.2 * r, r), *[ruff * (s * r, r) + at for s in SIDES])
    pen.flat(_mark(pen), *[mark * r + at for mark in marks])
    pen.part(CREAM, *[oval(s * 0.22, 0.5, 0.34, 0.27) * r + at for s in SIDES])
    pen.flat(CREAM, oval(0, 0.66, 0.22, 0.25) * r + at)
    pen.flat(ROSE, poly((-0.22, 0.2), (0.22, 0.2), (0, 0.44)) * r + at)
    pen.smile(x, y + 0.56 * r, 0.2 * r)
    pen.eyes(y - 0.12 * r, x - 0.46 * r, x + 0.46 * r, r=0.21 * r)


def tiger(pen, rng):
    """Round ears, dark marks of its own, a broad muzzle, a banded tail; sits or walks."""
    up, marks = rng.uniform(0, 0.12), []
    if rng.random() < 0.5:
        _banded_tail(pen, (0.64, 0.89), (0.88, 0.87), (0.93, 0.7), (0.86, 0.6 - up))
        w, r = rng.uniform(0.29, 0.33), rng.uniform(0.24, 0.26)
        pen.body(twin(0.5, (0, 0.42), (0.8 * w, 0.6), (w + 0.03, 0.94)))
        for y, edge in ((0.7, 0.85 * w), (0.79, 0.94 * w), (0.88, w)):
            mark = poly((edge, y - 0.035), (edge, y + 0.025), (edge - 0.13, y + 0.02))
            marks += [mark * (s, 1) + (0.5, 0) for s in SIDES]
        pen.flat(_mark(pen), *marks)
        pen.part(CREAM, *_pair(0.13, 0.93, 0.085, 0.055))
        x, y, badge = 0.5, 0.36, (0.5, 0.76, 0.085)
    else:
        _banded_tail(pen, (0.2, 0.56), (0.08, 0.46), (0.09, 0.3), (0.03, 0.24 - up))
        step, r = rng.uniform(-0.03, 0.03), rng.uniform(0.21, 0.23)
        pen.part(pen.shade, *[box(x, 0.6, x + 0.13, 0.93, 0.04) for x in (0.27 - step, 0.56 + step)])
        legs = [box(x, 0.6, x + 0.16, 0.97, 0.05) for x in (0.1 + step, 0.7 - step)]
        trunk = blob((0.08, 0.58), (0.2, 0.43), (0.5, 0.46), (0.82, 0.42), (0.9, 0.62), (0.7, 0.8), (0.3, 0.78))
        pen.body(trunk, *legs)
        for x, low in ((0.17, 0.64), (0.28, 0.6), (0.39, 0.57)):
            marks.append(poly((x - 0.03, 0.47), (x + 0.03, 0.46), (x + 0.02, low)))
        for x in (0.11 + step, 0.71 - step):
            marks.append(poly((x, 0.8), (x, 0.86), (x + 0.1, 0.84)))
        pen.flat(_mark(pen), *marks)
        x, y, badge = 0.68, 0.36, (0.45, 0.67, 0.08)
    _tiger_head(pen, rng, x, y, r)
    pen.wear(head=(x, y - 0.8 * r, 1.5 * r), eyes=(x, y - 0.12 * r, 0.92 * r), neck=(x, y + r, 1.3 * r), badge=badge)


def _rabbit_head(pen, rng, x, y, r):
    at, tip = (x, y), 0.5 + rng.uniform(0.0, 0.3)
    ears = [[(s * 0.42, -0.5), (s * 0.5, -1.35), (s * tip, -1.85)] for s in SIDES]
    if rng.random() < 0.4:
        ears[1] = [(0.42, -0.5), (0.48, -1.4), (0.85, -1.7), (1.18, -1.1)]
    for ear in ears:
        pen.body(tube(ear, 0.5, 0.56) * r + at, oval(*ear[-1], 0.28) * r + at)
        pen.flat(ROSE, tube(ear, 0.22, 0.24) * r + at, oval(*ear[-1], 0.12) * r + at)
    pen.body(oval(x, y, 1.1 * r, 0.95 * r))
    for s in SIDES:
        for low in (0.2, 0.65):
            pen.line(poly((s * 0.5, 0.4), (s * 1.35, low)) * r + at, 0.02)
    pen.part(WHITE, box(-0.16, 0.5, 0.16, 0.85) * r + at)
    pen.part(CREAM, *[oval(s * 0.22, 0.42, 0.28, 0.22) * r + at for s in SIDES])
    pen.flat(ROSE, oval(0, 0.26, 0.16, 0.12) * r + at)
    pen.eyes(y - 0.15 * r, x - 0.5 * r, x + 0.5 * r, r=0.22 * r)


def rabbit(pen, rng):
    """Long ears, one of which may fold, big front teeth, a cotton tail; sits up or crouches."""
    if rng.random() < 0.5:
        w, r, x, y, badge = rng.uniform(0.25, 0.3), rng.uniform(0.215, 0.23), 0.5, 0.47, (0.5, 0.8, 0.075)
        pen.part(WHITE, oval(0.48 - w, 0.83, 0.11))
        pen.body(twin(0.5, (0, 0.5), (0.7 * w, 0.62), (w, 0.84), (0, 0.97)))
        pen.part(CREAM, *_pair(0.14, 0.94, 0.12, 0.05))
        pen.body(*_pair(0.6 * w, 0.74, 0.055, 0.075))
    else:
        r, high, x, y, badge = rng.uniform(0.205, 0.22), rng.uniform(0.46, 0.52), 0.7, 0.47, (0.62, 0.79, 0.075)
        pen.part(WHITE, oval(0.12, 0.76, 0.11))
        back = [(0.08, 0.8), (0.16, high + 0.08), (0.4, high), (0.7, 0.54)]
        pen.body(box(0.66, 0.7, 0.79, 0.97, 0.05), blob(*back, (0.82, 0.74), (0.66, 0.92), (0.2, 0.95)))
        pen.body(oval(0.33, 0.92, 0.19, 0.055))
        pen.line([(0.5, 0.84), (0.47, 0.7), (0.36, 0.64), (0.25, 0.68)])
    _rabbit_head(pen, rng, x, y, r)
    pen.wear(head=(x, y - 0.75 * r, 1.4 * r), eyes=(x, y - 0.15 * r, r), neck=(x, y + r, 1.2 * r), badge=badge)


def bear(pen, rng):
    """Small round ears, a heavy body, a long snout; sits with its pale belly towards us or walks in profile."""
    if rng.random() < 0.5:
        w, wave = rng.uniform(0.25, 0.29), rng.random() < 0.5
        for s in SIDES:
            hand = (0.92, 0.44) if wave and s > 0 else (0.5 + s * (w + 0.08), 0.76)
            pen.body(tube([(0.5 + s * 0.17, 0.6), (0.5 + s * (w + 0.06), 0.62), hand], 0.15), oval(*hand, 0.09))
        pen.body(twin(0.5, (0, 0.42), (0.8 * w, 0.56), (w, 0.8), (0, 0.96)))
        pen.part(CREAM, oval(0.5, 0.73, 0.15, 0.14))
        pen.body(*_pair(0.25, 0.88, 0.12, 0.1))
        pen.flat(CREAM, *_pair(0.26, 0.89, 0.06, 0.05))
        pen.body(*_pair(0.21, 0.14, 0.09))
        pen.flat(CREAM, *_pair(0.21, 0.145, 0.045))
        pen.body(oval(0.5, 0.33, 0.28, 0.23))
        pen.part(CREAM, oval(0.5, 0.42, 0.14, 0.11))
        pen.flat(INK, oval(0.5, 0.365, 0.075, 0.05))
        pen.smile(0.5, 0.45, 0.055)
        pen.eyes(0.29, 0.37, 0.63, r=0.048)
        pen.wear(head=(0.5, 0.14, 0.3), eyes=(0.5, 0.29, 0.26), neck=(0.5, 0.55, 0.36), badge=(0.5, 0.73, 0.09))
    else:
        step, hump = rng.uniform(-0.03, 0.03), rng.uniform(0.24, 0.3)
        pen.body(oval(0.06, 0.5, 0.055))
        pen.part(pen.shade, *[box(x, 0.6, x + 0.14, 0.93, 0.04) for x in (0.26 - step, 0.52 + step)])
        legs = [box(x, 0.6, x + 0.19, 0.97, 0.05) for x in (0.07 + step, 0.61 - step)]
        back = [(0.05, 0.55), (0.15, 0.34), (0.4, hump + 0.03), (0.62, hump)]
        pen.body(blob(*back, (0.84, 0.5), (0.74, 0.78), (0.4, 0.84), (0.1, 0.78)), *legs)
        pen.body(oval(0.61, 0.19, 0.085), oval(0.83, 0.19, 0.085))
        pen.flat(CREAM, oval(0.61, 0.19, 0.042), oval(0.83, 0.19, 0.042))
        pen.body(oval(0.73, 0.37, 0.19, 0.185))
        pen.part(CREAM, box(0.74, 0.37, 0.99, 0.54, 0.08))
        pen.flat(INK, oval(0.96, 0.395, 0.055, 0.05))
        pen.line([(0.97, 0.47), (0.89, 0.49), (0.81, 0.45)])
        pen.eyes(0.31, 0.67, 0.84, r=0.05)
        pen.wear(head=(0.72, 0.22, 0.26), eyes=(0.755, 0.31, 0.17), neck=(0.66, 0.56, 0.26), badge=(0.36, 0.55, 0.09))


def owl(pen, rng):
    """Large eye discs, ear tufts, an orange beak; wings spread or folded."""
    w, tuft, spread = rng.uniform(0.26, 0.31), rng.uniform(0.02, 0.08), rng.random() < 0.5
    pen.part(ORANGE, *_pair(0.15, 0.94, 0.04, 0.045), *_pair(0.08, 0.94, 0.04, 0.045))
    if spread:
        w -= 0.04
        wing = blob((0.12, 0.55), (0.3, 0.36), (0.46, 0.26), (0.48, 0.46), (0.42, 0.62), (0.32, 0.74), (0.16, 0.78))
        for s in SIDES:
            pen.part(pen.shade, wing * (s, 1) + (0.5, 0))
            for y in (0.5, 0.64):
                pen.line([(0.5 + s * 0.46, y - 0.06), (0.5 + s * 0.33, y)], 0.025)
    tufts = [poly((0.27, 0.34), (0.27, tuft), (0.06, 0.16)) * (s, 1) + (0.5, 0) for s in SIDES]
    pen.body(twin(0.5, (0, 0.12), (0.24, 0.2), (w, 0.48), (0.9 * w, 0.8), (0, 0.94)), *tufts)
    if not spread:
        wing = blob((0.02, 0.46), (0.06, 0.6), (0.02, 0.84), (-0.07, 0.72), (-0.09, 0.56)) + (w, 0)
        for s in SIDES:
            pen.part(pen.shade, wing * (s, 1) + (0.5, 0))
            for y in (0.62, 0.72):
                feather = poly((w - 0.06, y - 0.02), (w - 0.01, y + 0.03), (w + 0.04, y - 0.01))
                pen.line(feather * (s, 1) + (0.5, 0), 0.025)
    for x, y in ((0.39, 0.8), (0.61, 0.8), (0.5, 0.86)):
        pen.line([(x - 0.045, y - 0.02), (x, y + 0.02), (x + 0.045, y - 0.02)], 0.03, _mark(pen))
    pen.part(CREAM, *_pair(0.13, 0.33, 0.145))
    pen.eyes(0.33, 0.38, 0.62, r=0.078)
    pen.part(ORANGE, poly((0.44, 0.4), (0.56, 0.4), (0.5, 0.53)))
    pen.wear(head=(0.5, 0.17, 0.4), eyes=(0.5, 0.33, 0.24), neck=(0.5, 0.53, 1.7 * w), badge=(0.5, 0.68, 0.085))


def penguin(pen, rng):
    """A white belly and face, flippers, an orange beak and feet; faces us or waddles in profile."""
    w, up = rng.uniform(0.25, 0.3), rng.uniform(-0.12, 0.12)
    if rng.random() < 0.5:
        pen.part(ORANGE, *_pair(0.15, 0.94, 0.14, 0.055))
        for s in SIDES:
            flipper = blob((0.16, 0.4), (w + 0.12, 0.56 + s * up), (w + 0.14, 0.7 + s * up), (0.2, 0.62))
            pen.body(flipper * (s, 1) + (0.5, 0))
        pen.body(twin(0.5, (0, 0.03), (0.21, 0.11), (0.23, 0.3), (w, 0.6), (0.9 * w, 0.85), (0, 0.95)))
        pen.part(WHITE, twin(0.5, (0, 0.53), (0.62 * w, 0.6), (0.66 * w, 0.8), (0, 0.9)))
        pen.part(WHITE, *_pair(0.09, 0.27, 0.12, 0.13))
        pen.eyes(0.25, 0.4, 0.6, r=0.05)
        pen.part(ORANGE, poly((0.42, 0.31), (0.58, 0.31), (0.5, 0.41)))
        pen.wear(head=(0.5, 0.1, 0.36), eyes=(0.5, 0.25, 0.2), neck=(0.5, 0.46, 0.46), badge=(0.5, 0.71, 0.09))
    else:
        pen.part(ORANGE, oval(0.44, 0.94, 0.14, 0.055), oval(0.7, 0.93, 0.14, 0.055))
        pen.body(blob((0.32, 0.78), (0.1, 0.93), (0.32, 0.94)))
        front = [(0.52, 0.04), (0.72, 0.12), (0.72, 0.34), (0.5 + w, 0.66), (0.7, 0.92)]
        pen.body(blob(*front, (0.3, 0.93), (0.5 - w, 0.66), (0.31, 0.3), (0.34, 0.12)))
        pen.part(WHITE, blob((0.62, 0.47), (0.71, 0.5), (0.48 + w, 0.66), (0.68, 0.87), (0.52, 0.9), (0.44, 0.7)))
        pen.part(WHITE, oval(0.6, 0.27, 0.13))
        pen.part(ORANGE, blob((0.68, 0.25), (0.75, 0.25), (0.86, 0.33), (0.75, 0.36), (0.68, 0.35)))
        pen.eyes(0.24, 0.61, r=0.06)
        pen.body(blob((0.32, 0.45), (0.45, 0.5), (0.38, 0.68), (0.13 - 0.3 * up, 0.76 - abs(up)), (0.22, 0.58)))
        pen.wear(head=(0.52, 0.1, 0.36), eyes=(0.61, 0.24, 0.1), neck=(0.51, 0.44, 0.44), badge=(0.59, 0.71, 0.09))


ANIMALS = {f.__name__: f for f in (tiger, rabbit, bear, owl, penguin)}
