"""The twelve scenes of the Toybox world, one drawing function each.

Each function takes a Scenery `s` and its generator's `uniform` as `u`, and draws in picture coordinates, from 0 to 1
(x to the right, y down), from back to front. To add a scene, write its function and put it in SCENES.
"""

import numpy as np
from PIL import Image, ImageDraw

from course_lib.toybox.pen import WHITE, WOOD, disc, mix

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

    def oval(self, x, y, rx, ry, colour):
        self.draw.ellipse([v * self.side for v in (x - rx, y - ry, x + rx, y + ry)], fill=colour)

    def block(self, x0, y0, x1, y1, colour):
        self.shape(colour, (x0, y0), (x1, y0), (x1, y1), (x0, y1))

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


def city(s, u):
    noon, dusk, dawn = (
        ((134, 190, 240), (226, 236, 240)),
        ((250, 176, 140), (255, 226, 180)),
        ((150, 150, 214), (240, 196, 210)),
    )
    s.sky(*(noon, dusk, dawn)[s.rng.integers(3)])
    walls = ((196, 110, 92), (110, 132, 166), (150, 120, 150), (96, 140, 140), (206, 160, 110))
    x = -0.05
    while x < 1:  # the skyline far away
        w = u(0.08, 0.14)
        s.block(x, u(0.05, 0.3), x + w, 0.7, (152, 164, 196))
        x += w + u(0, 0.05)
    x, k = u(-0.15, -0.02), s.rng.integers(5)
    while x < 1:  # the houses of the street, with their windows
        w, top, k = u(0.17, 0.25), u(0.12, 0.42), k + s.rng.integers(1, 5)
        wall = walls[k % 5]
        s.block(x, top, x + w, 0.7, wall)
        s.block(x - 0.008, top, x + w + 0.008, top + 0.03, mix(wall, WHITE, 0.3))
        for y in np.arange(top + 0.07, 0.61, 0.11).tolist():
            for left, lit in zip((x + 0.14 * w, x + 0.58 * w), s.rng.random(2) < 0.75, strict=True):
                glass = (255, 230, 120) if lit else mix(wall, (40, 40, 70), 0.6)
                s.block(left, y, left + 0.28 * w, y + 0.06, glass)
        x += w + u(0, 0.03)
    kerb = u(0.76, 0.79)
    s.block(0, 0.69, 1, kerb, (206, 204, 204))
    s.block(0, kerb, 1, kerb + 0.02, (236, 234, 230))
    s.block(0, kerb + 0.02, 1, 1, (92, 94, 106))
    for x in np.arange(u(-0.2, 0), 1, 0.26).tolist():
        s.block(x, kerb + 0.12, x + 0.14, kerb + 0.15, (246, 240, 214))


def moon(s, u):
    s.sky((10, 10, 26), (18, 18, 40), (30, 30, 56))
    s.dots(26, 0, 0.62, 0.009, WHITE, (190, 210, 255))
    x, y, r = u(0.14, 0.86), u(0.13, 0.24), u(0.1, 0.14)
    s.disc(x, y, r, (60, 130, 230))
    r, land = (-r, r)[s.rng.integers(2)], (90, 190, 110)  # the Earth, from one side or from the other
    for dx, dy, size in ((-0.4, -0.35, 0.42), (-0.15, -0.1, 0.3), (0.4, 0.3, 0.4), (0.1, 0.6, 0.25)):
        s.disc(x + dx * r, y + dy * abs(r), size * abs(r), land)
    for dx, dy, size in ((0.35, -0.5, 0.22), (0.6, -0.42, 0.18), (-0.55, 0.35, 0.2), (-0.3, 0.42, 0.16)):
        s.disc(x + dx * r, y + dy * abs(r), size * abs(r), WHITE)
    s.hills(u(0.56, 0.62), (150, 152, 164), 0.05, 0.9)
    s.hills(u(0.66, 0.7), (198, 200, 208), 0.02, 0.7)
    for left, right, y in ((0, 0.3, u(0.73, 0.78)), (0.7, 1, u(0.73, 0.8)), (0.2, 0.8, u(0.82, 0.88)), (0, 0.9, 0.94)):
        x, w = u(left, right), u(0.06, 0.1) * (y + 0.3)
        s.oval(x, y - 0.008, 1.15 * w, 0.46 * w, (228, 230, 236))
        s.oval(x, y, w, 0.36 * w, (140, 142, 156))
        s.oval(x, y + 0.1 * w, 0.85 * w, 0.24 * w, (164, 166, 178))


def mountains(s, u):
    s.sky((96, 172, 240), (206, 232, 250))
    rock = ((126, 132, 158), (140, 126, 138), (112, 134, 150))[s.rng.integers(3)]
    cap = ((-0.4, 0.4), (-0.2, 0.34), (-0.08, 0.46), (0.08, 0.33), (0.22, 0.44), (0.36, 0.36))
    for x, top, far in (
        (u(-0.05, 0.15), u(0.16, 0.26), 0.25),
        (u(0.85, 1.05), u(0.16, 0.26), 0.25),
        (u(0.25, 0.75), 0.1, 0),
    ):
        colour, h = mix(rock, (200, 220, 244), far), 0.74 - top
        w = u(0.55, 0.7) * h
        s.shape(colour, (x - w, 0.74), (x, top), (x + w, 0.74))
        s.shape(
            mix(colour, (60, 60, 96), 0.28),
            (x, top),
            (x + w, 0.74),
            (x + 0.1 * w, 0.74),
            (x - 0.08 * w, 0.37 + top / 2),
        )
        snow = [(x + a * w, top + b * h) for a, b in cap]
        s.shape(WHITE, (x, top), *snow)
        s.shape((214, 226, 244), (x, top), *snow[3:])
    s.hills(u(0.64, 0.68), (84, 138, 92), 0.03, 1.1)
    for x in (u(0, 0.25), u(0.75, 1), u(0, 1))[: s.rng.integers(4)]:
        s.pine(x, u(0.7, 0.74), u(0.14, 0.2), (52, 104, 80))
    s.hills(u(0.72, 0.76), (112, 164, 92), 0.02, 0.8)
    for x in (u(0, 0.3), u(0.7, 1), u(0, 1)):
        y, r = u(0.8, 0.97), u(0.03, 0.05)
        s.shape(rock, (x - r, y), (x - 0.6 * r, y - 0.8 * r), (x + 0.2 * r, y - r), (x + r, y - 0.3 * r), (x + r, y))


def stage(s, u):
    wall = ((84, 62, 110), (52, 78, 110), (104, 66, 84), (66, 90, 92))[s.rng.integers(4)]
    red = ((206, 34, 46), (190, 24, 60), (214, 50, 36))[s.rng.integers(3)]
    dark, floor, x, w = mix(red, (60, 0, 20), 0.4), u(0.66, 0.72), u(0.3, 0.7), u(0.18, 0.22)
    s.sky(mix(wall, (20, 16, 40), 0.35), wall)
    s.shape(mix(wall, (255, 244, 200), 0.5), (x - 0.06, 0), (x + 0.06, 0), (x + 0.38, floor), (x - 0.38, floor))
    s.block(0, floor, 1, 1, (184, 122, 74))
    for k in range(-6, 7):  # boards that run to the back
        a, b = 0.5 + 0.12 * k, 0.5 + 0.2 * k
        s.shape((150, 94, 56), (a, floor), (a + 0.008, floor), (b + 0.014, 1), (b, 1))
    s.oval(x, 0.87, 0.4, 0.11, (248, 214, 150))
    for side in (0, 1):  # the curtains, tied to the sides, with three folds each
        for share, colour in ((1, red), (0.8, dark), (0.62, red), (0.42, dark), (0.25, red)):
            top, tied, low = (abs(side - v * share * w) for v in (1.15, 0.7, 1))
            s.shape(colour, (side, 0), (top, 0), (tied, 0.5), (low, 0.84), (side, 0.84))
        left, right = (0, 0.7 * w) if side == 0 else (1 - 0.7 * w, 1)
        s.block(left, 0.485, right, 0.52, (240, 196, 80))
    for k in range(6):
        s.oval((k + 0.5) / 6, 0.03, 0.095, 0.085, (red, dark)[k % 2])
    s.block(0, 0, 1, 0.03, (240, 196, 80))


SCENES = {
    "on the beach": beach,
    "in the snow": snow,
    "in the forest": forest,
    "in a room": room,
    "in a meadow": meadow,
    "in the desert": desert,
    "under water": under_water,
    "at night": night,
    "in the city": city,
    "on the moon": moon,
    "in the mountains": mountains,
    "on a stage": stage,
}
FIRST_SCENES = tuple(SCENES)[:8]
DARK_SCENES = ("at night", "on the moon")  # here a pale rim goes around the dark outline
