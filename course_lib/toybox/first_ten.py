"""The ten nouns of the Toybox world, one drawing function each.

Each function takes a Pen and a random generator and draws in the object's own square box, from back to front.
To add a noun, write its function and put it in NOUNS.
"""

import numpy as np

from course_lib.toybox.pen import (
    COLOURS,
    CREAM,
    GLASS,
    INK,
    ROSE,
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


def _sitting(pen, rng):
    w = rng.uniform(0.2, 0.25)
    pen.body(twin(0.5, (0, 0.45), (0.8 * w, 0.6), (0.03 + w, 0.94)))
    pen.part(CREAM, oval(0.41, 0.93, 0.075, 0.05), oval(0.59, 0.93, 0.075, 0.05))


def _walking(pen, rng):
    step, low = rng.uniform(-0.04, 0.04), rng.uniform(0.7, 0.76)
    pen.part(pen.shade, box(0.24 - step, 0.6, 0.34 - step, 0.93, 0.04), box(0.6 + step, 0.6, 0.7 + step, 0.93, 0.04))
    legs = [box(x, 0.6, x + 0.11, 0.97, 0.045) for x in (0.13 + step, 0.69 - step)]
    pen.body(box(0.12, 0.46, 0.82, low, 0.12), *legs)


def _cat_head(pen, rng, x, y, r):
    tall, out = rng.uniform(1.35, 1.75) * r, rng.uniform(0.85, 1.1) * r
    ears = [poly((x + s * 0.25 * r, y - 0.8 * r), (x + s * out, y - tall), (x + s * 1.05 * r, y)) for s in (-1, 1)]
    pen.body(oval(x, y, 1.15 * r, r), *ears)
    for s, ear in zip((-1, 1), ears, strict=True):
        pen.flat(ROSE, ear * 0.5 + 0.5 * np.array([x + s * 0.75 * r, y - 0.85 * r]))
        for k in (-0.1, 0.18):
            pen.line([(x + s * 0.6 * r, y + 0.38 * r), (x + s * 1.55 * r, y + (0.35 + k * 1.8) * r)], 0.02)
    pen.flat(CREAM, oval(x, y + 0.5 * r, 0.42 * r, 0.3 * r))
    pen.flat(ROSE, poly((x - 0.15 * r, y + 0.28 * r), (x + 0.15 * r, y + 0.28 * r), (x, y + 0.46 * r)))
    pen.smile(x, y + 0.55 * r, 0.2 * r)
    pen.eyes(y - 0.08 * r, x - 0.48 * r, x + 0.48 * r, r=0.23 * r)


def cat(pen, rng):
    """Pointed ears, whiskers, a long tail; sits or walks."""
    up = rng.uniform(0.1, 0.35)
    if rng.random() < 0.5:
        pen.body(tube([(0.62, 0.9), (0.88, 0.88), (0.93, 0.7), (0.86 + up / 4, 0.4 + up)], 0.1, 0.07))
        _sitting(pen, rng)
        x, y, r, badge = 0.5, 0.36, rng.uniform(0.22, 0.25), (0.5, 0.76, 0.085)
    else:
        pen.body(tube([(0.2, 0.55), (0.08, 0.45), (0.1, 0.25), (0.02 + up / 2, 0.05 + up / 3)], 0.1, 0.07))
        _walking(pen, rng)
        x, y, r, badge = 0.72, 0.38, rng.uniform(0.2, 0.23), (0.34, 0.59, 0.085)
    _cat_head(pen, rng, x, y, r)
    pen.wear(head=(x, y - 0.78 * r, 1.4 * r), eyes=(x, y - 0.08 * r, 0.96 * r), neck=(x, y + r, 1.2 * r), badge=badge)


def dog(pen, rng):
    """Hanging ears, a long muzzle, a collar; sits facing us or stands in profile."""
    ear, tongue, collar = rng.uniform(0.26, 0.4), rng.random() < 0.6, COLOURS[pick(rng, "red", "blue", "yellow")]
    if rng.random() < 0.5:
        pen.body(tube([(0.65, 0.88), (0.82, 0.86), (0.93, 0.68)], 0.1, 0.06))
        _sitting(pen, rng)
        pen.part(collar, box(0.34, 0.54, 0.66, 0.61, 0.03))
        pen.body(twin(0.5, (0, 0.08), (0.2, 0.18), (0.22, 0.42), (0, 0.58)))
        for s in (-1, 1):
            x, tip = 0.5 + s * 0.2, 0.5 + s * 0.35
            pen.part(pen.shade, blob((x - s * 0.04, 0.1), (tip, 0.16), (tip, 0.14 + ear), (x + s * 0.02, 0.1 + ear)))
        pen.flat(ROSE, oval(0.5, 0.56, 0.055, 0.08 if tongue else 0.03))
        pen.part(CREAM, oval(0.5, 0.44, 0.14, 0.1))
        pen.flat(INK, oval(0.5, 0.385, 0.07, 0.05))
        pen.smile(0.5, 0.46, 0.05)
        pen.eyes(0.27, 0.4, 0.6, r=0.055)
        pen.wear(head=(0.5, 0.13, 0.34), eyes=(0.5, 0.27, 0.2), neck=(0.5, 0.58, 0.34), badge=(0.5, 0.75, 0.085))
    else:
        pen.body(tube([(0.2, 0.55), (0.06, 0.46), (0.04, 0.22)], 0.1, 0.06))
        _walking(pen, rng)
        pen.part(collar, poly((0.58, 0.5), (0.8, 0.56), (0.78, 0.64), (0.55, 0.58)))
        pen.flat(ROSE, oval(0.88, 0.53, 0.045, 0.09 if tongue else 0.03))
        pen.body(oval(0.69, 0.33, 0.18, 0.2), box(0.64, 0.32, 0.98, 0.51, 0.09))
        pen.flat(INK, oval(0.95, 0.34, 0.06, 0.05))
        pen.line([(0.97, 0.45), (0.88, 0.47), (0.8, 0.43)])
        pen.part(pen.shade, blob((0.6, 0.14), (0.68, 0.2), (0.62, 0.17 + ear), (0.46, 0.2 + ear), (0.46, 0.22)))
        pen.eyes(0.27, 0.77, r=0.06)
        pen.wear(head=(0.7, 0.16, 0.28), eyes=(0.77, 0.27, 0.1), neck=(0.67, 0.57, 0.26), badge=(0.34, 0.59, 0.085))


def fish(pen, rng):
    """Swims above the ground; slim or round, with a forked or a round tail."""
    h, fork = rng.uniform(0.2, 0.31), rng.uniform(0.04, 0.13)
    fin = mix(pen.colour, COLOURS[pick(rng, "orange", "yellow", "pink", "teal")], 0.6)
    tail = blob((0.3, 0.5), (0.12, 0.46 - h), (0.03, 0.5 - h), (0.03 + fork, 0.5), (0.03, 0.5 + h), (0.12, 0.54 + h))
    top = blob((0.38, 0.52 - h), (0.42, 0.36 - h), (0.6, 0.4 - h), (0.74, 0.54 - h))
    pen.part(fin, tail, top, blob((0.5, 0.48 + h), (0.42, 0.6 + h), (0.56, 0.6 + h), (0.68, 0.46 + h)))
    pen.body(blob((0.18, 0.5), (0.4, 0.52 - h), (0.68, 0.5 - h), (0.96, 0.5), (0.68, 0.5 + h), (0.4, 0.48 + h)))
    pen.part(fin, blob((0.56, 0.52), (0.4, 0.5), (0.38, 0.64), (0.5, 0.62)))
    pen.line([(0.69, 0.52 - 0.6 * h), (0.63, 0.5), (0.69, 0.48 + 0.6 * h)])
    pen.smile(0.88, 0.57, 0.05)
    pen.eyes(0.44, 0.79, r=0.075)
    high, low = 0.5 - h, 0.5 + h
    pen.wear(
        head=(0.7, high + 0.04, 0.28),
        eyes=(0.79, 0.44, 0.1),
        neck=(0.6, low - 0.07, 0.36),
        badge=(0.5, high + 0.45 * h, 0.33 * h),
    )


def robot(pen, rng):
    """A box with a head; legs or wheels, one or two antennas, arms up or down."""
    lamp = COLOURS[pick(rng, "red", "yellow", "green")]
    w, head, corner = rng.uniform(0.18, 0.24), rng.uniform(0.2, 0.26), pick(rng, 0.03, 0.09)
    for x in (0.5,) if rng.random() < 0.5 else (0.4, 0.6):
        pen.part(STEEL, box(x - 0.015, 0.06, x + 0.015, 0.2))
        pen.part(lamp, oval(x, 0.055, 0.045))
    for s in (-1, 1):
        hand = pick(rng, 0.42, 0.82)
        pen.part(STEEL, tube([(0.5 + s * w, 0.58), (0.56 + s * 0.36, 0.62), (0.5 + s * 0.4, hand)], 0.075))
        pen.part(lamp, oval(0.5 + s * 0.41, hand, 0.065))
    if rng.random() < 0.5:
        pen.part(STEEL, box(0.36, 0.8, 0.45, 0.95, 0.02), box(0.55, 0.8, 0.64, 0.95, 0.02))
        pen.part(pen.shade, box(0.27, 0.9, 0.46, 0.98, 0.03), box(0.54, 0.9, 0.73, 0.98, 0.03))
    else:
        pen.part(pen.shade, oval(0.36, 0.9, 0.085), oval(0.64, 0.9, 0.085))
        pen.flat(STEEL, oval(0.36, 0.9, 0.035), oval(0.64, 0.9, 0.035))
    pen.body(box(0.5 - w, 0.52, 0.5 + w, 0.86, 0.04))
    pen.part(CREAM, box(0.5 - 0.6 * w, 0.6, 0.5 + 0.6 * w, 0.74))
    pen.dot(lamp, 0.44, 0.67, 0.035)
    pen.dot(COLOURS["blue"], 0.55, 0.67, 0.035)
    pen.body(box(0.5 - head, 0.16, 0.5 + head, 0.48, corner))
    pen.eyes(0.29, 0.39, 0.61, r=0.075)
    pen.flat(INK, box(0.38, 0.4, 0.62, 0.44))
    pen.flat(WHITE, *[box(x, 0.41, x + 0.04, 0.43) for x in (0.4, 0.48, 0.56)])
    pen.wear(head=(0.5, 0.18, 1.7 * head), eyes=(0.5, 0.29, 0.22), neck=(0.5, 0.5, 1.6 * w), badge=(0.5, 0.67, 0.08))


def teapot(pen, rng):
    """A belly with spout, handle, lid and a little steam."""
    r, top = rng.uniform(0.25, 0.29), rng.uniform(0.36, 0.44)
    for x in (0.9, 0.97)[: rng.integers(1, 3)]:
        pen.line([(x, 0.3), (x - 0.05, 0.22), (x + 0.02, 0.14), (x - 0.03, 0.05)], 0.035, SMOKE)
    pen.body(tube([(0.3, 0.5), (0.1, 0.44), (0.03, 0.6), (0.12, 0.76), (0.3, 0.78)], 0.075))
    pen.body(tube([(0.62, 0.8), (0.79, 0.7), (0.84, 0.48), (0.94, 0.38)], 0.2, 0.07))
    pen.part(pen.shade, box(0.32, 0.88, 0.64, 0.97, 0.03))
    pen.body(twin(0.48, (0, top), (r, top + 0.14), (r, 0.78), (0, 0.94)))
    pen.part(pen.shade, oval(0.48, top - 0.11, 0.05))
    pen.body(twin(0.48, (0, top - 0.07), (0.14, top), (0.16, top + 0.06), (0, top + 0.08)))
    pen.flat(mix(pen.colour, WHITE, 0.75), tube([(0.31, 0.72), (0.31, 0.62), (0.36, 0.55)], 0.045))
    face = rng.random() < 0.5
    if face:
        pen.eyes(0.66, 0.43, 0.6, r=0.045)
        pen.smile(0.515, 0.73, 0.05)
    neck, badge = ((0.5, 0.83, 0.44), (0.34, 0.82, 0.07)) if face else ((0.48, top + 0.1, 0.42), (0.5, 0.69, 0.13))
    pen.wear(head=(0.48, top - 0.08, 0.26), neck=neck, badge=badge)


def car(pen, rng):
    """Seen from the side: a saloon, a van or a beetle."""
    kind, roof = rng.integers(3), rng.uniform(0.32, 0.38)
    rear, front, lamp = [(0.2, 0.74), (0.06, 0.8), (0.16, 0.84)][kind] + (0.66,)
    if kind == 2:
        cabin = blob((0.1, 0.66), (0.24, roof + 0.06), (0.48, roof - 0.03), (0.72, roof + 0.1), (0.86, 0.66))
    else:
        cabin = poly((rear, 0.62), (rear + 0.08, roof), (front - 0.16, roof), (front, 0.62))
    pen.body(cabin, box(0.02, 0.57, 0.98, 0.86, 0.1))
    left, right, high = rear + 0.13, front - 0.18, roof + 0.07
    middle = (left + right) / 2
    pen.part(GLASS, poly((left - 0.05, 0.57), (left, high), (middle - 0.02, high), (middle - 0.02, 0.57)))
    pen.part(GLASS, poly((middle + 0.04, 0.57), (middle + 0.04, high), (right, high), (right + 0.09, 0.57)))
    pen.line([(middle + 0.01, 0.62), (middle + 0.01, 0.82)], 0.02)
    pen.part((255, 236, 150), oval(0.94, lamp, 0.045))
    pen.part(COLOURS["red"], box(0.02, 0.63, 0.06, 0.7))
    for x in (0.25, 0.75):
        pen.part((74, 70, 84), oval(x, 0.85, rng.uniform(0.115, 0.13)))
        pen.part((216, 218, 226), oval(x, 0.85, 0.045))
    pen.wear(head=(middle, roof, 0.36), neck=(0.5, 0.61, 0.42), badge=(0.5, 0.73, 0.1))


def chair(pen, rng):
    """A kitchen chair seen from the front and a little from above; its back is a board, slats or a hoop."""
    wood, kind, top = mix(WOOD, pen.colour, 0.25), rng.integers(3), rng.uniform(0.02, 0.1)
    pen.part(mix(wood, INK, 0.3), box(0.29, 0.55, 0.36, 0.86), box(0.64, 0.55, 0.71, 0.86))
    if kind == 0:
        pen.part(wood, box(0.28, 0.35, 0.35, 0.55), box(0.65, 0.35, 0.72, 0.55))
        pen.body(box(0.22, top, 0.78, 0.42, 0.09))
    elif kind == 1:
        pen.part(wood, *[box(x, top + 0.08, x + 0.07, 0.55) for x in (0.25, 0.39, 0.54, 0.68)])
        pen.body(box(0.21, top, 0.79, top + 0.16, 0.06))
    else:
        pen.part(wood, box(0.46, top + 0.1, 0.54, 0.55))
        pen.body(tube([(0.28, 0.56), (0.22, top + 0.2), (0.5, top), (0.78, top + 0.2), (0.72, 0.56)], 0.1))
    pen.part(wood, box(0.17, 0.62, 0.26, 0.97, 0.02), box(0.74, 0.62, 0.83, 0.97, 0.02))
    if rng.random() < 0.5:
        pen.part(wood, box(0.26, 0.8, 0.74, 0.84))
    pen.body(box(0.14, 0.61, 0.86, 0.69, 0.03), poly((0.25, 0.5), (0.75, 0.5), (0.86, 0.64), (0.14, 0.64)))
    back, badge = ((0.4, (0.5, top / 2 + 0.21, 0.12)), (top + 0.2, (0.5, top + 0.08, 0.08)), (0.4, (0.5, 0.6, 0.08)))[
        kind
    ]
    pen.wear(head=(0.5, top, 0.4), neck=(0.5, back, 0.54), badge=badge)


def house(pen, rng):
    """Coloured walls, a roof of another colour, one to three windows, a chimney that smokes."""
    roof = mix([(186, 74, 60), (110, 84, 110), (96, 110, 130), (150, 96, 60)][rng.integers(4)], pen.colour, 0.1)
    wall, peak, side = rng.uniform(0.42, 0.5), rng.uniform(0.08, 0.16), pick(rng, 0.26, 0.7)
    for k in range(rng.integers(0, 4)):
        pen.flat(SMOKE, oval(side + 0.05 + 0.05 * k, 0.1 - 0.06 * k, 0.035 + 0.012 * k))
    pen.part((176, 100, 84), box(side, 0.16, side + 0.1, wall))
    pen.body(box(0.14, wall - 0.05, 0.86, 0.97))
    flat = pick(rng, 0.0, 0.16)
    pen.part(roof, poly((0.04, wall), (0.5 - flat, peak), (0.5 + flat, peak), (0.96, wall)))
    door = pick(rng, 0.2, 0.41, 0.6)
    pen.part(WOOD, box(door, 0.68, door + 0.19, 0.97))
    pen.dot(COLOURS["yellow"], door + 0.15, 0.83, 0.02)
    for x in (0.2, 0.43, 0.65):
        if abs(x - door) > 0.1 and (rng.random() < 0.8 or x == 0.43):
            pen.part(GLASS, box(x, wall + 0.1, x + 0.15, wall + 0.25))
            pen.line([(x + 0.075, wall + 0.1), (x + 0.075, wall + 0.25)], 0.02)
    if not flat:
        pen.part(GLASS, oval(0.5, (wall + peak) / 2 + 0.05, 0.06))
    badge = (0.37 if door > 0.5 else 0.72, 0.86, 0.08)
    pen.wear(head=(0.5, peak + 0.03, 0.32), neck=(0.5, wall + 0.05, 0.7), badge=badge)


def boat(pen, rng):
    """A coloured hull, with sails or with a cabin and a funnel."""
    deck, flag = rng.uniform(0.64, 0.7), COLOURS[pick(rng, "red", "yellow", "blue")]
    sails = rng.random() < 0.6
    if sails:
        pen.part(WOOD, box(0.47, 0.05, 0.51, deck + 0.03))
        pen.part(CREAM, blob((0.55, 0.1), (0.74, 0.32), (0.86, deck - 0.1), (0.7, deck - 0.07), (0.55, deck - 0.07)))
        pen.part(WHITE, poly((0.43, 0.16), (0.43, deck - 0.07), (0.14, deck - 0.07)))
        pen.part(flag, poly((0.49, 0.02), (0.49, 0.12), (0.33, 0.07)))
    else:
        pen.part(flag, box(0.42, 0.2, 0.56, 0.5))
        pen.flat(INK, box(0.42, 0.2, 0.56, 0.26))
        pen.flat(SMOKE, oval(0.42, 0.11, 0.07, 0.055), oval(0.3, 0.05, 0.055, 0.045))
        pen.part(WHITE, box(0.24, 0.42, 0.74, deck + 0.04, 0.03))
        pen.part(GLASS, *[box(x, 0.49, x + 0.1, 0.58) for x in (0.31, 0.45, 0.59)])
    bow = deck - 0.04
    pen.body(blob((0.03, deck), (0.3, deck + 0.04), (0.7, deck + 0.04), (0.98, bow), (0.82, 0.93), (0.18, 0.93)))
    if rng.random() < 0.6:
        for x in (0.3, 0.5, 0.7):
            pen.part(GLASS, oval(x, 0.81, 0.04))
    head = (0.49, 0.05, 0.2) if sails else (0.49, 0.2, 0.18)
    pen.wear(head=head, neck=(0.45, deck + 0.06, 0.45), badge=(0.7, 0.81, 0.085))  # the badge hides a porthole


def mushroom(pen, rng):
    """A coloured cap, round, pointed or flat, on a pale stem with a face."""
    top, w, low = rng.uniform(0.03, 0.22), rng.uniform(0.36, 0.46), rng.uniform(0.5, 0.58)
    if rng.random() < 0.4:
        x = pick(rng, 0.14, 0.86)
        pen.part(CREAM, box(x - 0.045, 0.8, x + 0.045, 0.97, 0.03))
        pen.body(blob((x, 0.66), (x + 0.12, 0.8), (x, 0.83), (x - 0.12, 0.8)))
    foot, neck = rng.uniform(0.17, 0.23), rng.uniform(0.13, 0.17)
    pen.part(CREAM, twin(0.5, (neck, low), (foot, 0.92), (0, 0.98)))
    pen.body(twin(0.5, (0, top), (0.75 * w, (top + low) / 2 - 0.07), (w, low), (0, low + 0.07)))
    pen.eyes(0.74, 0.42, 0.58, r=0.042)
    pen.smile(0.5, 0.82, 0.045)
    for x in (0.26, 0.32, 0.7, 0.76):
        pen.flat((96, 160, 76), poly((x - 0.03, 0.99), (x + 0.02, 0.99), (x - 0.01, 0.9)))
    middle = (0.5, (top + low) / 2 + 0.04, 0.09)
    pen.wear(head=(0.5, top + 0.05, 0.9 * w), eyes=(0.5, 0.74, 0.16), neck=(0.5, 0.88, 1.7 * foot), badge=middle)


NOUNS = {f.__name__: f for f in (cat, dog, fish, robot, teapot, car, chair, house, boat, mushroom)}
