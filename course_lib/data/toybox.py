"""The Toybox world: small captioned cartoon pictures, drawn by a program.

A picture is one object (a noun with a colour and a pattern) in one scene. A `Spec` says all that is needed to draw
it; `render` turns a spec into pixels at any size, `caption` into words, and `toybox10` makes a labelled data set.
Geometry is in unit coordinates (x to the right, y down): those of the picture in the scenes, those of the object's
own square box in the nouns, where y = 1 is the ground and the object looks to the right.
To add a noun, a colour, a pattern or a scene, write its drawing function and put it in the table.
"""

import os
import tempfile
import zipfile
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageDraw
from tqdm import tqdm

RENDERER_VERSION = 1  # part of the cache file's name: raise it whenever a picture changes
DARK_SCENES = ("at night",)  # here a pale rim goes around the dark outline
SMALL = 2000  # below this many pictures, starting worker processes costs more than it saves
CHUNK = 500  # pictures in one worker's job

COLOURS = {
    "red": (222, 58, 52),
    "orange": (246, 144, 40),
    "yellow": (252, 214, 62),
    "green": (84, 178, 70),
    "teal": (30, 166, 160),
    "blue": (58, 108, 222),
    "purple": (142, 82, 200),
    "pink": (250, 150, 192),
    "brown": (146, 92, 54),
    "grey": (150, 152, 160),
    "white": (248, 246, 240),
    "black": (58, 56, 66),
}
PALE = ("yellow", "pink", "white")  # their stripes and spots are darker; those of the other colours are lighter
INK, CREAM, WHITE, ROSE = (44, 34, 48), (255, 240, 214), (255, 255, 255), (240, 128, 140)
WOOD, GLASS, STEEL, SMOKE = (164, 112, 68), (178, 226, 246), (168, 176, 190), (246, 246, 250)


@dataclass(frozen=True)
class Spec:
    """All that is needed to draw one picture; x, y (centre of the object's box) and size (its side) are fractions of
    the picture's side, flip makes the object look to the left, and seed sets the small free details."""

    noun: str
    colour: str
    pattern: str
    scene: str
    x: float
    y: float
    size: float
    flip: bool
    seed: int


# ---- shapes: arrays of corner points, (n, 2), in unit coordinates ----

_ANGLES = np.linspace(0, 2 * np.pi, 40, endpoint=False)
_CIRCLE = np.stack([np.cos(_ANGLES), np.sin(_ANGLES)], 1)
_T = np.linspace(0, 1, 7, endpoint=False)[:, None]
_SPLINE = _T ** [0, 1, 2, 3] @ np.array([[0, 2, 0, 0], [-1, 0, 1, 0], [2, -5, 4, -1], [-1, 3, -3, 1]]) / 2


def mix(a, b, share):
    """Colour a with the given share (0 to 1) of colour b."""
    return tuple(round(p + (q - p) * share) for p, q in zip(a, b, strict=True))


def deepen(colour):
    """A darker and more saturated shade of a colour."""
    return tuple(round(c * (0.4 + 0.45 * c / 255)) for c in colour)


def pick(rng, *options):
    return options[rng.integers(len(options))]


def disc(draw, x, y, r, colour):
    """A circle in canvas pixels; Pillow paints both end pixels, so the radius is half a pixel less."""
    r = max(r - 0.5, 0)
    draw.ellipse((x - r, y - r, x + r, y + r), fill=colour)


def poly(*points):
    return np.array(points, dtype=float)


def oval(x, y, rx, ry=None):
    return _CIRCLE * (rx, ry or rx) + (x, y)


def box(x0, y0, x1, y1, r=0.0):
    """A rectangle whose corners are quarter circles of radius r."""
    if not r:
        return poly((x0, y0), (x1, y0), (x1, y1), (x0, y1))
    return _CIRCLE * r + np.where(_CIRCLE > 0, (x1 - r, y1 - r), (x0 + r, y0 + r))


def smooth(points, closed=True):
    """The Catmull-Rom curve through the points."""
    p = np.array(points, dtype=float)
    p = np.concatenate([p[-1:], p, p[:2]] if closed else [p[:1], p, p[-1:]])
    count = len(p) - 3
    quads = np.stack([p[k : k + count] for k in range(4)], 1)
    curve = (_SPLINE @ quads).reshape(-1, 2)
    return curve if closed else np.concatenate([curve, p[-1:]])


def blob(*points):
    return smooth(points)


def twin(x, *points):
    """A smooth shape symmetric about x, from the points (distance from x, y) down its right side."""
    return smooth([(x + d, y) for d, y in points] + [(x - d, y) for d, y in points[::-1] if d])


def tube(points, start, end=None):
    """A thick curve through the points, whose width goes from start to end."""
    p = smooth(points, closed=False)
    q = np.concatenate([p[:1], p, p[-1:]])
    along = q[2:] - q[:-2]
    along /= np.sqrt((along**2).sum(1, keepdims=True)) + 1e-9
    half = (start + ((end or start) - start) * np.arange(len(p))[:, None] / len(p)) / 2
    side = along[:, ::-1] * (-1, 1) * half
    tip = p[-1:] + along[-1:] * half[-1]
    return np.concatenate([p + side, tip, (p - side)[::-1], p[:1] - along[:1] * half[0]])


# ---- the pen: draws one object in its box ----


class Pen:
    """Draws shapes given in the object's box onto the picture, each group with one dark outline around it.

    With a halo colour it draws only the silhouette, a little larger: a rim that keeps dark objects visible at night.
    """

    LINE = 0.03  # width of the outline in object units

    def __init__(self, image, spec, rng, halo=None):
        self.image, self.draw, self.halo = image, ImageDraw.Draw(image), halo
        self.unit = spec.size * image.width
        self.centre = np.array([spec.x, spec.y]) * image.width
        lean, mirror = rng.uniform(-0.05, 0.05), -1 if spec.flip else 1
        self.matrix = np.array([[mirror * np.cos(lean), np.sin(lean)], [-mirror * np.sin(lean), np.cos(lean)]])
        self.matrix *= self.unit
        self.light = round(rng.uniform(0.05, 0.07) * self.unit)  # width of the rims in canvas pixels
        self.side = pick(rng, -1, 1)  # where the light comes from: 1 is the left
        self.colour = mix(COLOURS[spec.colour], pick(rng, INK, WHITE), rng.uniform(0, 0.08))
        self.shade = deepen(self.colour)
        self.second = deepen(self.shade) if spec.colour in PALE else mix(self.colour, WHITE, 0.65)
        self.paint = self.colour
        if spec.pattern != "plain" and not halo:
            self.paint = Image.new("RGB", image.size, self.colour)
            PATTERNS[spec.pattern](self, ImageDraw.Draw(self.paint), np.random.default_rng([spec.seed, 3]))

    def place(self, shape):
        """Box coordinates to canvas pixels."""
        return (shape - 0.5) @ self.matrix + self.centre

    def _stroke(self, xy, width, colour):
        """A thick line through canvas points, with round joins where a bare line would show gaps."""
        flat, width = xy.astype(int).ravel().tolist(), max(1, round(width))
        self.draw.line(flat, fill=colour, width=width)
        if width > 9 or len(xy) < 14:
            r = (width - 1) // 2
            for x, y in zip(flat[::2], flat[1::2], strict=True):
                self.draw.ellipse((x - r, y - r, x + r, y + r), fill=colour)

    def part(self, paint, *shapes):
        """Fill the union of the shapes with a colour (or a painted image): outline, rim light, rim shadow."""
        placed = [self.place(shape) for shape in shapes]
        # Pillow also paints the pixels under a polygon's edge: one more pixel of line makes up for it
        width = self.LINE * 2 * self.unit + 1 + (0.03 * self.image.width if self.halo else 0)
        for xy in placed:
            self._stroke(np.concatenate([xy, xy[:2]]), width, self.halo or INK)
        xs, ys = zip(*[point for xy in placed for point in xy.tolist()], strict=True)
        tiny = max(max(xs) - min(xs), max(ys) - min(ys)) < 0.22 * self.unit
        if self.halo or (tiny and paint is not self.paint):  # on small parts the rims would not be seen
            for xy in placed:
                self.draw.polygon(xy.ravel().tolist(), fill=self.halo or paint)
            return
        # from here on, to save time, only the rectangle around the shapes is worked on
        rim = self.light
        x, y, right, low = int(min(xs)) - rim, int(min(ys)) - rim, int(max(xs)) + rim + 2, int(max(ys)) + rim + 2
        mask = Image.new("L", (right - x, low - y))
        draw = ImageDraw.Draw(mask)
        for xy in placed:
            draw.polygon((xy - (x, y)).ravel().tolist(), fill=255)
        if isinstance(paint, Image.Image):
            paint = paint.crop((x, y, right, low))
        self.image.paste(paint, (x, y, right, low), mask)
        for colour, step in ((WHITE, rim), (INK, -rim)):
            moved = ImageChops.offset(mask, self.side * step, step)
            self.image.paste(colour, (x, y, right, low), ImageChops.subtract(mask, moved, scale=4))  # a quarter opaque

    def body(self, *shapes):
        """The part that carries the object's colour and pattern."""
        self.part(self.paint, *shapes)

    def flat(self, colour, *shapes):
        """Fill shapes with a colour, without an outline."""
        for shape in () if self.halo else shapes:
            self.draw.polygon(self.place(shape).ravel().tolist(), fill=colour)

    def dot(self, colour, x, y, r):
        """Fill a circle with a colour, without an outline."""
        if not self.halo:
            disc(self.draw, *self.place(np.array([x, y])).tolist(), r * self.unit, colour)

    def line(self, points, width=0.03, colour=INK):
        if not self.halo:
            self._stroke(self.place(smooth(points, closed=False)), width * self.unit, colour)

    def eyes(self, y, *xs, r=0.06):
        for x in xs:
            self.dot(INK, x, y, r * 1.35)
            self.dot(WHITE, x, y, r * 1.05)
            self.dot(INK, x + 0.15 * r, y + 0.1 * r, r * 0.8)
            self.dot(WHITE, x - 0.15 * r, y - 0.3 * r, r * 0.28)

    def smile(self, x, y, w):
        self.line([(x + w * u, y + 0.7 * w * (1 - u * u)) for u in (-1, -0.5, 0, 0.5, 1)])


def striped(pen, draw, rng):
    """Parallel bands, across, along or slanted."""
    angle, gap = pick(rng, 0, 0.8, 1.57) + rng.uniform(-0.1, 0.1), rng.uniform(0.17, 0.22)
    along, across = np.array([np.cos(angle), np.sin(angle)]), np.array([-np.sin(angle), np.cos(angle)])
    for k in np.arange(-0.9, 0.9, gap):
        ends = pen.place(0.5 + across * k + np.outer([-1, 1], along))
        draw.line(ends.ravel().tolist(), fill=pen.second, width=round(gap * 0.48 * pen.unit))


def spotted(pen, draw, rng):
    """Dots on a shaken grid, every other row moved by half a step."""
    r, gap = rng.uniform(0.05, 0.065) * pen.unit, rng.uniform(0.18, 0.21)
    rows, columns = np.mgrid[0:7, 0:7]
    grid = np.stack([columns + rows % 2 / 2 - 0.2, rows * 0.85], -1).reshape(-1, 2) * gap
    for x, y in pen.place(grid + rng.uniform(-0.02, 0.02, grid.shape)).tolist():
        disc(draw, x, y, r, pen.second)


PATTERNS = {"plain": None, "striped": striped, "spotted": spotted}


# ---- the ten nouns ----


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
        _cat_head(pen, rng, 0.5, 0.36, rng.uniform(0.22, 0.25))
    else:
        pen.body(tube([(0.2, 0.55), (0.08, 0.45), (0.1, 0.25), (0.02 + up / 2, 0.05 + up / 3)], 0.1, 0.07))
        _walking(pen, rng)
        _cat_head(pen, rng, 0.72, 0.38, rng.uniform(0.2, 0.23))


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
    if rng.random() < 0.5:
        pen.eyes(0.66, 0.43, 0.6, r=0.045)
        pen.smile(0.515, 0.73, 0.05)


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


def boat(pen, rng):
    """A coloured hull, with sails or with a cabin and a funnel."""
    deck, flag = rng.uniform(0.64, 0.7), COLOURS[pick(rng, "red", "yellow", "blue")]
    if rng.random() < 0.6:
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


NOUNS = {f.__name__: f for f in (cat, dog, fish, robot, teapot, car, chair, house, boat, mushroom)}
CLASSES = tuple(NOUNS)


# ---- the eight scenes ----


_ACROSS = np.linspace(0, 1, 33)


class Scenery:
    """Draws the background in picture coordinates."""

    def __init__(self, image, rng):
        self.image, self.draw, self.rng, self.side = image, ImageDraw.Draw(image), rng, image.width

    def sky(self, *colours):
        """A vertical run of colours over the whole picture, by stretching a column of a few pixels."""
        column = Image.new("RGB", (1, len(colours)))
        column.putdata(colours)
        column = column.resize((1, self.side), Image.Resampling.BILINEAR)
        self.image.paste(column.resize(self.image.size, Image.Resampling.NEAREST))

    def disc(self, x, y, r, colour):
        disc(self.draw, x * self.side, y * self.side, r * self.side, colour)

    def shape(self, colour, *points):
        self.draw.polygon([v * self.side for point in points for v in point], fill=colour)

    def hills(self, level, colour, height=0.04, waves=1.0):
        """Everything below a wavy line."""
        y = level + height * np.sin(2 * np.pi * (waves * _ACROSS + self.rng.random()))
        self.shape(colour, (0, 1.01), *zip(_ACROSS.tolist(), y.tolist(), strict=True), (1, 1.01))

    def dots(self, count, top, bottom, r, *colours):
        for x, y, size, k in self.rng.random((count, 4)).tolist():
            self.disc(x, top + (bottom - top) * y, r * (0.6 + 0.8 * size), colours[int(k * len(colours))])

    def pine(self, x, foot, h, colour):
        self.shape(WOOD, (x - 0.015, foot), (x + 0.015, foot), (x + 0.015, foot - 0.3 * h), (x - 0.015, foot - 0.3 * h))
        for low, w in ((0.15, 0.28), (0.4, 0.22), (0.65, 0.15)):
            y = foot - low * h
            self.shape(colour, (x - w * h, y), (x + w * h, y), (x, y - 0.4 * h))

    def cloud(self, colour=WHITE):
        x, y = self.rng.uniform(0.05, 0.95), self.rng.uniform(0.08, 0.28)
        for dx, r in ((-0.07, 0.035), (0, 0.055), (0.07, 0.04)):
            self.disc(x + dx, y - r / 2, r, colour)


def beach(s, u):
    s.sky((128, 200, 246), (196, 232, 250), (214, 240, 250))
    s.disc(u(0.1, 0.9), u(0.1, 0.25), u(0.06, 0.09), (255, 238, 150))
    s.cloud()
    sea = u(0.4, 0.52)
    s.hills(sea, (72, 164, 212), 0)
    s.hills(sea + 0.07, (110, 196, 222), 0.008, 4)
    s.hills(sea + u(0.15, 0.2), (240, 248, 246), 0.02)
    s.hills(sea + 0.21, (244, 220, 164), 0.02)
    s.dots(9, 0.75, 1, 0.012, (222, 190, 130), (252, 240, 214), (236, 160, 140))


def snow(s, u):
    s.sky((176, 202, 230), (222, 232, 244))
    s.hills(u(0.45, 0.55), (206, 220, 238), 0.06, 0.8)
    for _ in range(s.rng.integers(2, 5)):
        s.pine(u(0, 1), u(0.56, 0.64), u(0.2, 0.36), (104, 146, 144))
    s.hills(u(0.6, 0.66), (240, 245, 252), 0.03, 0.7)
    s.dots(26, 0, 1, 0.013, WHITE)


def forest(s, u):
    s.sky((190, 220, 160), (140, 186, 120))
    for x in np.linspace(0.02, 0.98, 7) + s.rng.uniform(-0.06, 0.06, 7):
        w = u(0.02, 0.04)
        s.shape((122, 96, 70), (x - w, 0.72), (x - 0.7 * w, 0), (x + 0.7 * w, 0), (x + w, 0.72))
    s.dots(16, -0.05, 0.16, 0.13, (76, 136, 70), (94, 154, 80), (62, 120, 70))
    s.hills(u(0.58, 0.68), (106, 150, 76), 0.03, 1.5)
    s.dots(6, 0.64, 0.7, 0.05, (88, 138, 68))
    s.hills(u(0.74, 0.78), (134, 164, 88), 0.02)


def room(s, u):
    wall = ((240, 216, 190), (204, 222, 214), (222, 210, 234), (244, 226, 170), (206, 220, 238))[s.rng.integers(5)]
    s.sky(mix(wall, WHITE, 0.2), wall)
    if s.rng.random() < 0.5:
        for k in range(9):
            s.shape(mix(wall, WHITE, 0.25), (k / 8 - 0.03, 0), (k / 8 + 0.03, 0), (k / 8 + 0.03, 1), (k / 8 - 0.03, 1))
    x, floor = u(0.08, 0.6), u(0.64, 0.72)
    glass, frame = ((150, 206, 240), WHITE) if s.rng.random() < 0.6 else ((250, 190, 150), (150, 104, 70))
    s.shape(frame, (x, 0.07), (x + 0.34, 0.07), (x + 0.34, 0.43), (x, 0.43))
    s.shape(glass, (x + 0.03, 0.1), (x + 0.31, 0.1), (x + 0.31, 0.4), (x + 0.03, 0.4))
    s.shape(frame, (x + 0.155, 0.1), (x + 0.185, 0.1), (x + 0.185, 0.4), (x + 0.155, 0.4))
    s.hills(floor - 0.03, WHITE, 0)
    s.hills(floor, (204, 160, 116), 0)
    for y in (floor + 0.07, floor + 0.18):
        s.shape((186, 142, 100), (0, y), (1, y), (1, y + 0.012), (0, y + 0.012))


def meadow(s, u):
    s.sky((130, 196, 246), (206, 234, 250))
    s.disc(u(0.1, 0.9), u(0.1, 0.2), 0.07, (255, 240, 160))
    s.cloud()
    s.cloud()
    s.hills(u(0.48, 0.56), (150, 206, 120), 0.06, 0.9)
    s.hills(u(0.62, 0.68), (126, 192, 92), 0.03, 0.7)
    s.dots(14, 0.7, 1, 0.018, (255, 250, 240), (255, 214, 90), (246, 150, 180))


def desert(s, u):
    s.sky((246, 190, 130), (252, 226, 170))
    s.disc(u(0.1, 0.9), u(0.12, 0.3), u(0.08, 0.11), (255, 246, 206))
    s.hills(u(0.5, 0.56), (234, 176, 112), 0.06, 0.8)
    for x in (u(0.03, 0.3), u(0.7, 0.97))[: s.rng.integers(1, 3)]:
        y, w, green = u(0.6, 0.66), 0.025, (112, 156, 96)
        s.shape(green, (x - w, y), (x - w, y - 0.28), (x + w, y - 0.28), (x + w, y))
        s.disc(x, y - 0.28, w, green)
        for a, b in ((x - 0.07, x - 0.04), (x + 0.07, x + 0.04)):
            s.shape(green, (x, y - 0.1), (a, y - 0.1), (a, y - 0.22), (b, y - 0.22), (b, y - 0.14), (x, y - 0.14))
    s.hills(u(0.64, 0.7), (240, 198, 136), 0.03, 1.2)


def under_water(s, u):
    s.sky((120, 214, 226), (60, 160, 200), (40, 120, 176))
    for x in s.rng.uniform(0, 1, 3):
        s.shape((124, 206, 222), (x, 0), (x + 0.08, 0), (x + 0.02, 0.75), (x - 0.2, 0.75))
    s.hills(u(0.76, 0.82), (200, 196, 150), 0.025, 1.3)
    for x in s.rng.uniform(0, 1, 5):
        y, h = u(0.84, 0.92), u(0.2, 0.4)
        bend = [(0.02 * np.sin(9 * t + 20 * x), y - h * t) for t in np.linspace(0, 1, 9)]
        s.shape((60, 150, 110), *[(x + b - 0.015, t) for b, t in bend], *[(x + b + 0.015, t) for b, t in bend[::-1]])
    s.dots(10, 0.05, 0.7, 0.018, (196, 236, 244))


def night(s, u):
    s.sky((34, 40, 92), (58, 68, 134), (92, 100, 164))
    s.dots(22, 0, 0.5, 0.009, (255, 250, 210), WHITE)
    x, y, r = u(0.12, 0.88), u(0.1, 0.22), u(0.07, 0.09)
    s.disc(x, y, r, (250, 240, 190))
    if s.rng.random() < 0.5:
        s.disc(x + 0.5 * r, y - 0.2 * r, 0.85 * r, (40, 46, 100))
    s.hills(u(0.52, 0.58), (62, 78, 122), 0.05, 0.9)
    s.hills(u(0.66, 0.72), (78, 100, 130), 0.03, 0.7)


SCENES = {
    "on the beach": beach,
    "in the snow": snow,
    "in the forest": forest,
    "in a room": room,
    "in a meadow": meadow,
    "in the desert": desert,
    "under water": under_water,
    "at night": night,
}


# ---- specs, pictures and captions ----


def _check(argument, value, table):
    if value not in table:
        raise ValueError(f"{argument} should be one of {', '.join(table)}, but {argument}={value!r} came")


def _check_count(argument, value, least):
    if not isinstance(value, (int, np.integer)) or value < least:
        raise ValueError(f"{argument} should be a whole number of at least {least}, but {argument}={value!r} came")


def sample_spec(rng: np.random.Generator, noun: str | None = None) -> Spec:
    """Draw what a picture shows: everything at random, with the object standing on the ground.

    Args:
        rng: np.random.Generator, the only source of chance.
        noun: one of NOUNS; None draws one.

    Returns: a Spec.
    Raises: ValueError for an unknown noun.
    """
    if noun is not None:
        _check("noun", noun, NOUNS)
    size = float(rng.uniform(0.62, 0.86))
    return Spec(
        noun=noun or pick(rng, *CLASSES),
        colour=pick(rng, *COLOURS),
        pattern=pick(rng, *PATTERNS),
        scene=pick(rng, *SCENES),
        x=float(rng.uniform(size / 2 + 0.01, 0.99 - size / 2)),
        y=float(rng.uniform(max(0.8, size + 0.03), 0.96)) - size / 2,
        size=size,
        flip=bool(rng.random() < 0.5),
        seed=int(rng.integers(2**31)),
    )


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
    Raises: ValueError for an unknown noun, colour, pattern or scene, or a size below 16.
    """
    for argument, table in (("noun", NOUNS), ("colour", COLOURS), ("pattern", PATTERNS), ("scene", SCENES)):
        _check(argument, getattr(spec, argument), table)
    _check_count("size", size, 16)
    finer = 4 if size <= 256 else 2
    image = Image.new("RGB", (size * finer, size * finer))
    rng = np.random.default_rng([spec.seed, 1])
    SCENES[spec.scene](Scenery(image, rng), rng.uniform)
    light = tuple(rng.integers(234, 256, 3).tolist())
    w, h = round(spec.size * image.width * 1.1), round(spec.size * image.width * 0.2)
    x, y = spec.x * image.width, (spec.y + 0.46 * spec.size) * image.width
    image.paste(INK, (round(x - w / 2), round(y - h / 2)), _SHADOW.resize((w, h), Image.Resampling.BILINEAR))
    halo = (150, 160, 206) if spec.scene in DARK_SCENES else None
    for rim in (halo, None) if halo else (None,):
        rng = np.random.default_rng([spec.seed, 2])
        NOUNS[spec.noun](Pen(image, spec, rng, rim), rng)
    image = image.reduce(finer)
    return np.array(ImageChops.multiply(image, Image.new("RGB", image.size, light)))  # the light varies a little


def caption(spec: Spec, rng: np.random.Generator) -> str:
    """Say in words what a picture shows, leaving out colour, pattern, scene or opening at random.

    Args:
        spec: the Spec of the picture.
        rng: np.random.Generator, the only source of chance.

    Returns: for instance "a photo of a teal spotted cat on the beach" or "an orange cat". The noun is always named.
    """
    colour, pattern, scene = (rng.random(3) < (0.7, 0.7, 0.6)).tolist()
    pattern = pattern and spec.pattern != "plain"  # nobody says that a thing is plain
    words = [spec.colour] * colour + [spec.pattern] * pattern + [spec.noun]
    article = "an" if words[0][0] in "aeiou" else "a"
    opening = pick(rng, "a photo of", "a picture of", "")
    return " ".join(filter(None, [opening, article, *words, spec.scene * scene]))


# ---- the data set of ten classes ----


def _labels(seed, split, count):
    """Balanced class labels in shuffled order."""
    return np.random.default_rng([seed, 2 + split]).permutation(np.arange(count) % len(CLASSES)).astype(np.uint8)


def _render_chunk(job):
    """Draw the pictures start, start + 1, ... of a split; runs in the worker processes."""
    seed, split, start, labels, size = job
    images = np.empty((len(labels), size, size, 3), np.uint8)
    for k, label in enumerate(labels):
        rng = np.random.default_rng([seed, split, start + k])
        images[k] = render(sample_spec(rng, CLASSES[label]), size)
    return images


def _render_jobs(jobs, workers, total):
    """The jobs' pictures in order, from worker processes if there are many."""
    bar = tqdm(total=total, desc="toybox", unit="img", disable=total < SMALL)
    done = []

    def collect(results):
        for images in results:
            done.append(images)
            bar.update(len(images))

    with bar:
        if total >= SMALL and workers > 1:
            try:  # spawn: works on every system, in notebooks, and next to a loaded torch
                with ProcessPoolExecutor(min(workers, len(jobs)), mp_context=get_context("spawn")) as pool:
                    collect(pool.map(_render_chunk, jobs))
            except BrokenProcessPool:
                print("The worker processes did not start, so the pictures are drawn in this one process.")
        collect(map(_render_chunk, jobs[len(done) :]))
    return done


def _load(path, shapes):
    """The arrays of a cached file, or None if it is missing or damaged."""
    if not path.exists():
        return None
    try:
        with np.load(path, allow_pickle=False) as file:
            data = {name: file[name] for name in shapes}
        if all(data[name].shape == shape and data[name].dtype == np.uint8 for name, shape in shapes.items()):
            return data
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        pass
    print(f"The cached file {path} cannot be read, so its pictures are drawn again.")
    return None


def _save(path, data):
    """Write a file whole or not at all: under another name first, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
        try:
            np.savez(file, **data)
        except BaseException:
            file.close()
            os.unlink(file.name)
            raise
    os.replace(file.name, path)


def toybox10(train=50_000, test=10_000, seed=0, cache_dir=None, workers=None, size=32) -> dict[str, np.ndarray]:
    """The ten-class data set: drawn on all cores the first time, then read from a cache file.

    In a script on any system, call it under `if __name__ == "__main__":`, as worker processes import the script.

    Args:
        train, test: number of pictures in each split.
        seed: whole number of at least 0; picture i of a split depends on seed, split and i alone.
        cache_dir: folder of the cache file; None means $COURSE_CACHE, else ~/.cache/personalization-course.
        workers: number of processes; None means one per core. The pictures do not depend on it.
        size: side in pixels, at least 16.

    Returns: a dict of uint8 arrays, train_images (train, size, size, 3), train_labels (train,) with values 0 to 9 that
        index CLASSES, test_images and test_labels. Classes are balanced and shuffled.
    Raises: ValueError for a count, seed, number of workers or size that is out of range.
    """
    workers = workers if workers is not None else os.cpu_count() or 1
    limits = {"train": (train, 0), "test": (test, 0), "seed": (seed, 0), "workers": (workers, 1), "size": (size, 16)}
    for argument, (value, least) in limits.items():
        _check_count(argument, value, least)
    home = os.environ.get("COURSE_CACHE", Path.home() / ".cache" / "personalization-course")
    path = Path(cache_dir or home) / f"toybox10-v{RENDERER_VERSION}-seed{seed}-size{size}-{train}+{test}.npz"
    shapes = {}
    for split, count in (("train", train), ("test", test)):
        shapes |= {f"{split}_images": (count, size, size, 3), f"{split}_labels": (count,)}
    data = _load(path, shapes)
    if data is None:
        labels = [_labels(seed, split, count) for split, count in enumerate((train, test))]
        starts = [(split, k) for split in (0, 1) for k in range(0, len(labels[split]), CHUNK)]
        jobs = [(seed, split, k, labels[split][k : k + CHUNK], size) for split, k in starts]
        images = np.concatenate([np.empty((0, size, size, 3), np.uint8), *_render_jobs(jobs, workers, train + test)])
        data = dict(zip(shapes, (images[:train], labels[0], images[train:], labels[1]), strict=True))
        _save(path, data)
    return data
