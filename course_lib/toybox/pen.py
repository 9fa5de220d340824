"""The pen of the Toybox world: colours, shapes, patterns, and the pen that draws shapes with a dark outline.

A shape is an array of corner points, (n, 2), in the unit coordinates of the object's own square box (x to the right,
y down): y = 1 is the ground, and the object looks to the right.
To add a colour, put it in COLOURS; to add a pattern, write its drawing function and put it in PATTERNS.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageChops, ImageDraw

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


# ---- shapes and small helpers ----

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


@dataclass(frozen=True)
class Look:
    """The details that make a subject one of a kind: no caption has words for them.

    first, second: the two tones (RGB), laid out as one of LAYOUTS says; seed fixes shape, pose and face.  emblem: one
    of EMBLEMS, worn as a badge, or None.  accessory: what the subject always wears, in a colour of its own, or None.
    """

    seed: int
    first: tuple[int, int, int]
    second: tuple[int, int, int]
    layout: str
    emblem: str | None = None
    emblem_colour: tuple[int, int, int] = WHITE
    accessory: str | None = None
    accessory_colour: tuple[int, int, int] = WHITE


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
        self.second = deepen(deepen(self.colour)) if spec.colour in PALE else mix(self.colour, WHITE, 0.65)
        painter = PATTERNS[spec.pattern]
        if spec.look:
            self.colour, self.second, painter = spec.look.first, spec.look.second, LAYOUTS[spec.look.layout]
        self.shade = deepen(self.colour)
        self.anchors = {}
        self.paint = self.colour
        if painter and not halo:
            self.paint = Image.new("RGB", image.size, self.colour)
            seed = spec.look.seed if spec.look else spec.seed
            painter(self, ImageDraw.Draw(self.paint), np.random.default_rng([seed, 3]))

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

    def wear(self, **anchors):
        """Say where things can be worn, in box coordinates: head=(x, y, width) is the middle of the top of the head,
        eyes=(x, y, distance of the eyes), neck=(x, y, width), badge=(x, y, radius) a free spot on the body."""
        self.anchors = anchors

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


# ---- patterns: painted on the object's own coloured parts ----


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


def checked(pen, draw, rng):
    """A board of squares, upright or standing on a corner."""
    angle, gap = pick(rng, 0, 0, 0.785) + rng.uniform(-0.1, 0.1), rng.uniform(0.15, 0.175)
    start = rng.uniform(-0.5, 0.5, 2)
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]]) * gap
    rows, columns = np.mgrid[-5:6, -5:6]
    corners = pen.place(0.5 + (np.stack([columns, rows], -1) + start) @ turn).tolist()
    for i in range(10):
        for j in range(i % 2, 10, 2):
            points = corners[i][j], corners[i][j + 1], corners[i + 1][j + 1], corners[i + 1][j]
            draw.polygon([v for point in points for v in point], fill=pen.second)


def starry(pen, draw, rng):
    """A few big five-pointed stars on a shaken grid."""
    r, gap, points = rng.uniform(0.09, 0.105), rng.uniform(0.24, 0.26), 2 * np.pi * np.arange(10) / 10
    star = np.stack([np.sin(points), -np.cos(points)], -1) * np.where(np.arange(10) % 2, 0.43, 1)[:, None] * r
    rows, columns = np.mgrid[0:6, 0:6]
    grid = np.stack([columns + rows % 2 / 2 - 0.4, rows * 0.9], -1).reshape(-1, 1, 2) * gap
    for shape in pen.place(star + grid + rng.uniform(-0.02, 0.02, grid.shape)).reshape(-1, 20).tolist():
        draw.polygon(shape, fill=pen.second)


PATTERNS = {"plain": None, "striped": striped, "spotted": spotted, "checked": checked, "starry": starry}
FIRST_PATTERNS = ("plain", "striped", "spotted")


# ---- layouts: where the second tone of a subject goes; they have no words in any caption ----


def _side(pen, draw, rng):
    """One half of the object, left or right of a slanted line."""
    x, lean = rng.uniform(0.44, 0.56), rng.uniform(-0.15, 0.15)
    edge = pick(rng, -1.0, 2.0)
    corners = poly((x - lean, -1), (x + lean, 2), (edge, 2), (edge, -1))
    draw.polygon(pen.place(corners).ravel().tolist(), fill=pen.second)


def _below(pen, draw, rng):
    """Everything below a wavy line, as if dipped into paint."""
    x = np.linspace(-0.5, 1.5, 25)
    y = rng.uniform(0.52, 0.66) + 0.04 * np.sin(2 * np.pi * (2.5 * x + rng.random()))
    line = np.stack([x, y], 1)
    draw.polygon(pen.place(np.concatenate([line, [(1.5, 2), (-0.5, 2)]])).ravel().tolist(), fill=pen.second)


def _patches(pen, draw, rng):
    """A few large round patches, as on a cow."""
    for x, y in ((0.3, 0.3), (0.75, 0.42), (0.38, 0.72), (0.72, 0.86)):
        x, y, r = x + rng.uniform(-0.07, 0.07), y + rng.uniform(-0.07, 0.07), rng.uniform(0.11, 0.16)
        draw.polygon(pen.place(oval(x, y, r, 0.8 * r)).ravel().tolist(), fill=pen.second)


def _sash(pen, draw, rng):
    """One broad slanted band."""
    y, w, lean = rng.uniform(0.5, 0.65), rng.uniform(0.1, 0.14), pick(rng, -0.45, 0.45)
    corners = poly((-0.5, y - lean - w), (1.5, y + lean - w), (1.5, y + lean + w), (-0.5, y - lean + w))
    draw.polygon(pen.place(corners).ravel().tolist(), fill=pen.second)


def _rings(pen, draw, rng):
    """Rings around one point of the body, as on a target."""
    x, y = rng.uniform(0.35, 0.65), rng.uniform(0.5, 0.7)
    for k, r in enumerate((0.62, 0.49, 0.36, 0.23, 0.1)):
        paint = pen.second if k % 2 == 0 else pen.colour
        draw.polygon(pen.place(oval(x, y, r)).ravel().tolist(), fill=paint)


LAYOUTS = {"side": _side, "below": _below, "patches": _patches, "sash": _sash, "rings": _rings}
