"""Eight more nouns of the Toybox world: things of the house, vehicles and buildings, one drawing function each.

Each function takes a Pen and a random generator and draws in the object's own square box, from back to front, in one
of two or three builds. At its end it says with `pen.wear` where a hat, a bow or a badge fits.
To add a noun, write its function and put it in THINGS.
"""

import numpy as np

from course_lib.toybox.pen import (
    COLOURS,
    CREAM,
    GLASS,
    INK,
    SMOKE,
    STEEL,
    WHITE,
    WOOD,
    blob,
    box,
    mix,
    oval,
    pick,
    poly,
    tube,
    twin,
)

TYRE, HUB, LAMP, BRASS = (74, 70, 84), (216, 218, 226), (255, 236, 150), (236, 186, 74)


def _steam(pen, x, y, *steps):
    """Wisps that rise from (x + step, y)."""
    for s in steps:
        pen.line(
            [(x + s, y), (x + s - 0.05, y - 0.08), (x + s + 0.03, y - 0.16), (x + s - 0.03, y - 0.25)], 0.045, SMOKE
        )


def mug(pen, rng):
    """A straight, bellied or tapering mug with a big handle, its rim seen from above; steam or a face."""
    kind, top, w = rng.integers(3), rng.uniform(0.3, 0.36), rng.uniform(0.29, 0.32)
    x, foot, drink = 0.38, w * (1, 0.8, 0.74)[kind], pick(rng, (124, 78, 50), (206, 150, 96), (190, 84, 60))
    _steam(pen, x, top - 0.06, *((-0.1, 0.1), (0,), (-0.14, 0, 0.14))[rng.integers(3)])
    right = x + w - 0.05
    pen.body(tube([(right, 0.44), (0.84, 0.42), (0.93, 0.58), (0.85, 0.75), (right - 0.05, 0.78)], 0.11))
    if kind == 1:
        side = twin(x, (w, top), (w * 1.08, 0.58), (foot, 0.9), (0, 0.96))
    else:
        side = poly((x - w, top), (x + w, top), (x + foot, 0.89), (x - foot, 0.89))
    pen.body(side, oval(x, top, w, 0.09), oval(x, 0.89, foot, 0.075))
    pen.part(CREAM, oval(x, top, w - 0.01, 0.085))
    pen.flat(drink, oval(x, top + 0.015, w - 0.06, 0.055))
    face = rng.random() < 0.4
    if face:
        pen.eyes(0.55, x - 0.1, x + 0.1, r=0.05)
        pen.smile(x, 0.63, 0.055)
    badge = (x, 0.82, 0.08) if face else (x, 0.7, 0.13)
    pen.wear(head=(x, top - 0.04, 2 * w), neck=(x, 0.79 if face else top + 0.16, 1.8 * w), badge=badge)


def backpack(pen, rng):
    """A school bag with a zip, a rucksack with a flap and buckles, or a hiking pack with a rolled mat on top."""
    kind, w, leather = rng.integers(3), rng.uniform(0.31, 0.35), mix(WOOD, pen.colour, 0.15)
    top = (0.14, 0.14, 0.2)[kind]
    for s in (-1, 1):  # the straps, seen from the front, show at both sides
        pen.part(leather, tube([(0.5 + s * 0.2, 0.24), (0.5 + s * (w + 0.1), 0.5), (0.5 + s * 0.3, 0.86)], 0.075))
    pen.part(leather, tube([(0.4, top + 0.04), (0.41, 0.05), (0.59, 0.05), (0.6, top + 0.04)], 0.05))
    pen.body(twin(0.5, (0, top), (0.2, top + 0.03), (w - 0.02, 0.4), (w, 0.8), (0.85 * w, 0.95), (0, 0.97)))
    if kind == 2:
        mat = COLOURS[pick(rng, "green", "yellow", "blue", "orange")]
        pen.part(mat, box(0.16, 0.1, 0.84, 0.28, 0.085))
        pen.flat(mix(mat, INK, 0.35), oval(0.24, 0.19, 0.045, 0.06), oval(0.76, 0.19, 0.045, 0.06))
        pen.part(leather, box(0.34, 0.08, 0.39, 0.42, 0.02), box(0.61, 0.08, 0.66, 0.42, 0.02))
    pocket = 0.62 if kind else 0.58
    pen.body(box(0.5 - 0.74 * w, pocket, 0.5 + 0.74 * w, 0.91, 0.07))
    if kind == 0:
        pen.line([(0.5 + w * u, y) for u, y in ((-0.8, 0.46), (-0.62, 0.27), (0, 0.22), (0.62, 0.27), (0.8, 0.46))])
        pen.line([(0.5 - 0.55 * w, 0.67), (0.5 + 0.55 * w, 0.67)])
        pen.part(BRASS, box(0.5 + 0.3 * w, 0.66, 0.5 + 0.3 * w + 0.05, 0.76, 0.02))
    elif kind == 1:
        pen.body(twin(0.5, (0, top - 0.01), (0.24, top + 0.03), (w + 0.01, 0.36), (w - 0.04, 0.52), (0, 0.57)))
        for s in (-1, 1):
            x = 0.5 + s * 0.15
            pen.part(leather, box(x - 0.03, 0.4, x + 0.03, 0.72, 0.02))
            pen.part(BRASS, box(x - 0.045, 0.62, x + 0.045, 0.69))
    badge = ((0.5, 0.41, 0.11), (0.5, 0.34, 0.1), (0.5, 0.77, 0.1))[kind]
    pen.wear(head=(0.5, (top, top, 0.1)[kind] - 0.01, 0.5), neck=(0.5, (0.57, 0.57, 0.5)[kind], 1.6 * w), badge=badge)


def clock(pen, rng):
    """A white dial in a wide case: an alarm clock with two bells, a square clock, or an arched mantel clock."""
    kind, r, y = pick(rng, 0, 0, 1, 2), rng.uniform(0.2, 0.23), 0.57
    feet = mix(pen.shade, INK, 0.2)
    if kind == 0:
        metal = pick(rng, BRASS, STEEL)
        pen.part(feet, *[tube([(0.5 + s * 0.2, 0.8), (0.5 + s * 0.29, 0.95)], 0.09) for s in (-1, 1)])
        pen.part(STEEL, box(0.48, 0.08, 0.52, 0.24), box(0.43, 0.05, 0.57, 0.1, 0.02))
        for s in (-1, 1):
            turn = np.linspace(0, np.pi, 12) - 0.65 * s
            pen.part(metal, np.stack([0.5 + 0.23 * s + 0.17 * np.cos(turn), 0.25 - 0.17 * np.sin(turn)], 1))
        pen.body(oval(0.5, y, 0.39))
    elif kind == 1:
        pen.part(feet, box(0.2, 0.88, 0.34, 0.97, 0.03), box(0.66, 0.88, 0.8, 0.97, 0.03))
        pen.part(pick(rng, BRASS, STEEL), box(0.4, 0.1, 0.6, 0.22, 0.04))
        pen.body(box(0.11, 0.18, 0.89, 0.92, rng.uniform(0.06, 0.2)))
    else:
        y = 0.5
        pen.body(oval(0.5, 0.48, 0.39), box(0.11, 0.48, 0.89, 0.9))
        pen.part(feet, box(0.05, 0.88, 0.95, 0.97, 0.03))
    pen.part(WHITE, oval(0.5, y, r))
    for k in range(4):
        angle = k * np.pi / 2
        pen.dot(INK, 0.5 + 0.78 * r * np.sin(angle), y - 0.78 * r * np.cos(angle), 0.02)
    hour = rng.uniform(0, 12)
    for turn, length, width in ((hour / 12, 0.48, 0.045), (hour % 1, 0.72, 0.03)):
        angle = 2 * np.pi * turn
        pen.line([(0.5, y), (0.5 + length * r * np.sin(angle), y - length * r * np.cos(angle))], width)
    pen.dot(COLOURS["red"], 0.5, y, 0.03)
    badge = ((0.5, 0.87, 0.08), (0.75, 0.79, 0.08), (0.5, 0.81, 0.08))[kind]
    pen.wear(head=(0.5, (0.14, 0.16, 0.1)[kind], 0.4), neck=(0.5, y - 0.31, 0.36), badge=badge)


def pot(pen, rng):
    """A cooking pot with two side handles and a lid with a knob: low, tall or round."""
    kind, w = rng.integers(3), rng.uniform(0.31, 0.35)
    top = (0.5, 0.38, 0.46)[kind] + rng.uniform(-0.02, 0.02)
    grip, metal = pick(rng, pen.shade, WOOD, TYRE), pick(rng, STEEL, pen.shade)
    _steam(pen, 0.5, top - 0.22, *((), (-0.22,), (0.22,), (-0.22, 0.22))[rng.integers(4)])
    low = top + 0.1
    for s in (-1, 1):
        x = 0.5 + s * (w - 0.04)
        pen.part(grip, tube([(x, low), (x + s * 0.15, low - 0.02), (x + s * 0.15, low + 0.17), (x, low + 0.17)], 0.065))
    if kind == 2:
        for s in (-1, 1):
            pen.part(pen.shade, box(0.46 + s * 0.2, 0.84, 0.54 + s * 0.2, 0.97, 0.03))
        pen.body(twin(0.5, (0.85 * w, top), (1.1 * w, 0.68), (0.6 * w, 0.9), (0, 0.94)))
    else:
        pen.body(box(0.5 - w, top - 0.06, 0.5 + w, 0.96, 0.1))
    pen.part(grip, box(0.47, top - 0.25, 0.53, top - 0.14), oval(0.5, top - 0.25, 0.075, 0.055))
    lid = w + 0.01
    pen.body(twin(0.5, (0, top - 0.17), (0.7 * lid, top - 0.12), (lid, top), (0, top + 0.02)))
    pen.part(metal, box(0.5 - lid - 0.02, top - 0.02, 0.5 + lid + 0.02, top + 0.05, 0.03))
    pen.wear(head=(0.5, top - 0.15, 0.5), neck=(0.5, top + 0.13, 1.6 * w), badge=(0.5, (top + 1.02) / 2, 0.13))


def bus(pen, rng):
    """A double-decker seen from the side: square, with a slanting front, or with an old bonnet."""
    kind, top = rng.integers(3), rng.uniform(0.08, 0.14)
    front = (0.98, 0.98, 0.84)[kind]
    if kind == 0:
        pen.body(box(0.02, top, 0.98, 0.88, rng.uniform(0.05, 0.1)))
    elif kind == 1:
        slant = poly((0.3, top), (0.82, top), (0.9, top + 0.06), (0.98, 0.6), (0.98, 0.88), (0.3, 0.88))
        pen.body(box(0.02, top, 0.5, 0.88, 0.08), slant)
    else:
        pen.body(box(0.02, top, front, 0.88, 0.07), box(0.5, 0.58, 0.99, 0.88, 0.07))
    right = front - 0.06 - 0.04 * (kind == 1)
    for y, end in ((top + 0.09, right), (top + 0.34, right - 0.2)):
        pen.part(GLASS, box(0.08, y, end, y + 0.13, 0.02))
        for k in range(1, panes := round((end - 0.08) / 0.2)):
            x = 0.08 + (end - 0.08) * k / panes
            pen.line([(x, y), (x, y + 0.13)], 0.035)
    pen.part(GLASS, box(right - 0.12, top + 0.34, right, top + 0.53, 0.02))  # the driver's
    pen.part(LAMP, oval(0.95, 0.72, 0.04))
    pen.part(COLOURS["red"], box(0.02, 0.66, 0.06, 0.74))
    for x in (0.24, 0.77):
        pen.part(TYRE, oval(x, 0.87, 0.105))
        pen.part(HUB, oval(x, 0.87, 0.04))
    pen.wear(head=(0.46, top + 0.02, 0.5), neck=(0.46, top + 0.29, 0.5), badge=(0.5, 0.73, 0.09))


def rocket(pen, rng):
    """Stands upright: a nose cone, fins, a round window, a flame; fat, slim or with two boosters."""
    kind, w, fire = rng.integers(3), rng.uniform(0.22, 0.25), rng.uniform(0.17, 0.22)
    trim = mix(COLOURS[pick(rng, "red", "orange", "yellow", "blue", "purple")], pen.shade, 0.4)
    for x, half in ((0.5, 0.13), (0.2, 0.075), (0.8, 0.075))[: 3 if kind == 2 else 1]:
        flame = poly((-1, 0), (1, 0), (0.7, 0.5), (0, 1), (-0.7, 0.5)) * (half, fire) + (x, 0.78)
        pen.part(COLOURS["orange"], flame)
        pen.flat(LAMP, (flame - (x, 0.78)) * 0.55 + (x, 0.78))
    for s in (-1, 1):
        if kind == 2:
            x = 0.5 + s * 0.3
            pen.body(box(x - 0.09, 0.46, x + 0.09, 0.8, 0.03))
            pen.part(trim, poly((x - 0.1, 0.48), (x, 0.31), (x + 0.1, 0.48)))
        else:
            fin = [(0.6 * w, 0.48), (w + 0.14, 0.64), (w + 0.17, 0.92), (w + 0.05, 0.84), (0.6 * w, 0.78)]
            pen.part(trim, blob(*[(0.5 + s * d, y) for d, y in fin]))
    pen.part(TYRE, box(0.37, 0.74, 0.63, 0.82, 0.02))
    wide = w * (1.15, 0.9, 0.95)[kind]
    pen.body(twin(0.5, (0, 0.03), (0.62 * wide, 0.18), (wide, 0.46), (0.75 * wide, 0.76), (0, 0.78)))
    pen.part(trim, twin(0.5, (0, 0.02), (0.4 * wide, 0.1), (0.74 * wide, 0.22), (0, 0.24)))
    pen.part(STEEL, oval(0.5, 0.4, 0.1))
    pen.part(GLASS, oval(0.5, 0.4, 0.065))
    pen.wear(head=(0.5, 0.12, 0.26), neck=(0.5, 0.53, 2 * wide), badge=(0.5, 0.63, 0.1))


def castle(pen, rng):
    """A wall with a gate between two towers, with battlements or pointed roofs, and flags."""
    cones, w, top = rng.random() < 0.5, rng.uniform(0.13, 0.15), rng.uniform(0.26, 0.32)
    roof = mix(pick(rng, (186, 74, 60), (110, 84, 110), (96, 110, 160)), pen.colour, 0.1)
    flag, keep = COLOURS[pick(rng, "red", "yellow", "blue")], rng.random() < 0.5
    if keep:  # a third tower behind the wall
        pen.part(WOOD, box(0.488, 0.02, 0.512, 0.2))
        pen.part(flag, poly((0.51, 0.03), (0.67, 0.08), (0.51, 0.13)))
        pen.body(box(0.37, 0.22, 0.63, 0.7), *[box(x, 0.16, x + 0.06, 0.26) for x in (0.37, 0.47, 0.57)])
        pen.part(INK, box(0.47, 0.3, 0.53, 0.42, 0.03))
    towers = (0.17, 0.83)
    if not keep or cones:
        for x in towers:
            high = top - 0.2 if cones else top - 0.16
            pen.part(WOOD, box(x - 0.012, high - 0.06, x + 0.012, top))
            pen.part(flag, poly((x + 0.01, high - 0.06), (x + 0.13, high - 0.015), (x + 0.01, high + 0.03)))
    pen.body(box(0.17, 0.56, 0.83, 0.97), *[box(x, 0.49, x + 0.07, 0.6) for x in (0.345, 0.465, 0.585)])
    for x in towers:
        spots = () if cones else (x - w + 0.015, x, x + w - 0.015)
        teeth = [box(u - 0.035, top - 0.06, u + 0.035, top + 0.06) for u in spots]
        pen.body(box(x - w, top + 0.06, x + w, top + 0.17), box(x - w + 0.025, top + 0.1, x + w - 0.025, 0.97), *teeth)
        if cones:
            pen.part(roof, poly((x - w - 0.03, top + 0.1), (x, top - 0.18), (x + w + 0.03, top + 0.1)))
        pen.part(INK, box(x - 0.03, 0.5, x + 0.03, 0.62, 0.03))
    pen.part(WOOD, oval(0.5, 0.8, 0.12), box(0.38, 0.8, 0.62, 0.97))
    pen.line([(0.5, 0.7), (0.5, 0.96)], 0.025)
    pen.dot(BRASS, 0.55, 0.85, 0.02)
    head = (0.5, 0.17, 0.26) if keep else (0.17, top - 0.03, 2 * w)
    pen.wear(head=head, neck=(0.5, 0.66, 0.3), badge=(0.83, 0.76, 0.085))


def lighthouse(pen, rng):
    """A tower that tapers up to a gallery and a shining lantern, on rocks or beside a cottage."""
    kind, foot, neck = rng.integers(2), rng.uniform(0.24, 0.29), rng.uniform(0.16, 0.19)
    roof = mix(pick(rng, (186, 74, 60), (70, 84, 120), (80, 76, 90)), pen.colour, 0.1)
    if rng.random() < 0.6:
        beam = poly((0.1, 0.195), (0.46, 0.09), (0.46, 0.32), (0.1, 0.225))
        pen.flat((255, 244, 190), beam * (-1, 1) + (0.5, 0), beam + (0.5, 0))
    if kind:
        pen.body(box(0.62, 0.74, 0.94, 0.97))
        pen.part(roof, poly((0.56, 0.76), (0.66, 0.6), (0.9, 0.6), (0.99, 0.76)))
        pen.part(GLASS, box(0.8, 0.8, 0.88, 0.89))
    pen.body(poly((0.5 - neck, 0.3), (0.5 + neck, 0.3), (0.5 + foot, 0.96), (0.5 - foot, 0.96)))
    pen.part(LAMP, box(0.38, 0.13, 0.62, 0.3))
    pen.flat(WHITE, oval(0.5, 0.215, 0.05, 0.065))
    if rng.random() < 0.5:
        pen.part(roof, poly((0.34, 0.15), (0.5, 0.01), (0.66, 0.15)))
    else:
        pen.part(roof, oval(0.5, 0.03, 0.03), twin(0.5, (0, 0.04), (0.11, 0.08), (0.15, 0.15), (0, 0.16)))
    pen.part(TYRE, box(0.5 - neck - 0.06, 0.28, 0.5 + neck + 0.06, 0.34, 0.02))
    pen.part(GLASS, box(0.46, 0.4, 0.54, 0.51, 0.035))
    pen.part(WOOD, oval(0.5, 0.84, 0.075), box(0.425, 0.84, 0.575, 0.96))
    if not kind:
        left = blob((0.1, 0.98), (0.14, 0.88), (0.28, 0.86), (0.4, 0.98))
        right = blob((0.62, 0.98), (0.72, 0.85), (0.87, 0.88), (0.92, 0.98))
        pen.part((132, 130, 142), left, right)
    pen.wear(head=(0.5, 0.13, 0.32), neck=(0.5, 0.39, 2 * neck + 0.02), badge=(0.5, 0.64, 0.1))


THINGS = {f.__name__: f for f in (mug, backpack, clock, pot, bus, rocket, castle, lighthouse)}
