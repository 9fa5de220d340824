"""Picture styles of the Toybox world: each turns a finished drawing into the same picture made in another way.

Each style takes the drawing as an RGB image `finer` times larger than the picture, that factor, and a random generator
for the paper and the hand, and returns the picture. Lengths are parts of the picture's side, so that a style looks the
same at 64 and at 512 pixels. To add a style, write its function and put it in STYLES.
"""

from functools import lru_cache

import numpy as np
from PIL import Image, ImageFilter

PAPER, CORAL, NAVY, SLATE = (250, 243, 226), (255, 100, 84), (44, 60, 128), (46, 58, 60)
CELLS = 32


def _picture(values):
    """Values rounded and clipped to an RGB image."""
    return Image.fromarray(np.clip(values + 0.5, 0, 255).astype(np.uint8))


def _values(image):
    """float32 pixels; a grey image gets a last axis of one, to go with colours."""
    values = np.asarray(image, np.float32)
    return values if values.ndim == 3 else values[..., None]


def _noise(rng, cells, side):
    """A random field (side, side, 1) from -1 to 1, with `cells` bumps across."""
    cells = min(cells, side)
    grid = Image.fromarray(rng.integers(0, 256, (cells, cells), dtype=np.uint8))
    return _values(grid.resize((side, side), Image.Resampling.BILINEAR)) / 127.5 - 1


def _contours(grey):
    """How much darker each pixel is than its surroundings, from 0 to 1: it finds the drawing's outlines."""
    around = _values(grey.filter(ImageFilter.BoxBlur(grey.width / 40)))
    return np.clip(1.25 - 1.25 * _values(grey) / (around + 1), 0, 1)


def plain(image, finer, rng):
    """The drawing itself."""
    return image.reduce(finer)


def pencil_sketch(image, finer, rng):
    """Dark contours, hatched shadows and a thin coat of coloured pencil on white paper."""
    image = image.reduce(finer)
    side, grey = image.width, image.convert("L")
    x = np.arange(side, dtype=np.float32) / side
    wave = 16 * (x + x[:, None])[..., None] + 0.35 * _noise(rng, 6, side)
    hatch = 2 * np.abs(wave - np.floor(wave) - 0.5)  # 0 in the middle of a stroke, 1 between two strokes
    stroke = np.clip(1.4 - 1.4 / 255 * _values(grey) - hatch, 0, 0.26)
    grain = 1 + 0.12 * _noise(rng, 160, side)
    colour = 251 - (251 - _values(image)) * (0.56 - 0.18 * hatch)
    return _picture(colour * (1 - stroke * grain) * (1 - 0.9 * grain * _contours(grey)))


def pixel_art(image, finer, rng):
    """Square pixels, CELLS across, in few colours: six levels each of red, green and blue."""
    side = image.width // finer
    parts = _values(image.resize((CELLS * 2, CELLS * 2), Image.Resampling.BOX)).reshape(CELLS, 2, CELLS, 2, 3)
    small = 0.8 * parts.mean((1, 3)) + 0.2 * parts.min((1, 3))  # so that the dark outlines stay whole
    return _picture(51 * np.floor(small / 51 + 0.5)).resize((side, side), Image.Resampling.NEAREST)


def watercolour(image, finer, rng):
    """Clear washes with a wavering edge, darker where the paint dried, on paper left white around the picture."""
    image = image.reduce(finer)
    side = image.width
    y, x = np.mgrid[0:side, 0:side]
    run = [np.rint(_noise(rng, 9, side)[..., 0] * (side / 64)).astype(np.int64) for _ in "yx"]
    image = Image.fromarray(np.asarray(image)[(y + run[0]).clip(0, side - 1), (x + run[1]).clip(0, side - 1)])
    sharp, wide = _values(image), _values(image.filter(ImageFilter.BoxBlur(side / 20)))
    pool = np.abs(wide - sharp).max(-1, keepdims=True) / 255
    thick = 0.66 + 0.2 * _noise(rng, 7, side) + 0.06 * _noise(rng, 160, side) + 0.6 * pool
    rim = np.minimum(np.minimum(x, side - 1 - x), np.minimum(y, side - 1 - y))[..., None] / side
    thick *= np.clip((rim - 0.03 - 0.025 * _noise(rng, 14, side)) * 40, 0, 1)
    return _picture(253 - (253 - 0.8 * sharp - 0.2 * wide) * thick)


@lru_cache
def _screen(period):
    """Thresholds (period, period), uint8, whose dark pixels grow from two dots: the halftone screen at 45 degrees."""
    k = np.arange(period)
    near, far = np.minimum(k, period - k) ** 2, (k - period // 2) ** 2
    distance = np.minimum(near + near[:, None], far + far[:, None]).ravel()
    rank = np.argsort(np.argsort(distance, kind="stable"), kind="stable")
    return (rank * 80 // period**2).astype(np.uint8).reshape(period, period)


def riso(image, finer, rng):
    """A print of two inks, coral and navy, each in halftone dots, a little out of register."""
    side = image.width
    period = finer * max(5, side // finer // 24)
    screen = np.tile(_screen(period), (-(-side // period),) * 2)[:side, :side]
    red, green, blue = image.split()
    page = np.float32(PAPER)
    for light, ink, least, shift in ((Image.blend(green, blue, 0.5), CORAL, 75, 0), (red, NAVY, 105, side // 90)):
        dots = np.roll(255 - least - np.asarray(light, np.int16) > screen, (shift, shift), (0, 1))
        share = _values(Image.fromarray(dots.astype(np.uint8) * 255).reduce(finer)) / 255
        page = page * (1 - share * (1 - np.float32(ink) / 255))
    return _picture(page)


def chalk(image, finer, rng):
    """Chalk on a slate board: light contours and dusty fills."""
    image = image.reduce(finer)
    side = image.width
    grain = 1 + 0.18 * _noise(rng, 160, side)
    board = np.float32(SLATE) * (1 + 0.1 * _noise(rng, 8, side))
    around = _values(image.filter(ImageFilter.BoxBlur(side / 40)))
    fill = board + (_values(image) - 60) * (0.38 * grain)
    line = np.clip(1.8 * _contours(image.convert("L")) * grain, 0, 1)
    return _picture(fill + (130 + 0.55 * around - fill) * line)


STYLES = {"plain": plain, "pencil sketch": pencil_sketch, "pixel art": pixel_art, "watercolour": watercolour}
SUBJECT_STYLES = {"riso": riso, "chalk": chalk}  # no caption ever names them
