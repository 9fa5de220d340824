"""Draw the figure at the top of README.md from the recorded samples.

    python tools/readme_figure.py        writes data/results/readme_figure.png

The samples are the strips of measurements/methods.py, if runs/personalize/ has them. Otherwise they are cut out of
data/results/personalization_samples.png, on which that script shows the same strips, a little enlarged and in 256
colours. Subjects and scenes were chosen by hand. Of each prompt the first sample is shown.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from course_lib.environment import REPOSITORY, RESULTS
from course_lib.toybox import subjects
from course_lib.toybox.world import render

SHOWN = {"biscuit": "Biscuit, a dog", "tilly": "Tilly, a teapot"}
SCENES = ("in the desert", "under water", "on the moon", "on a stage")
METHODS = {"textual_inversion": "Textual Inversion", "dreambooth": "DreamBooth", "custom_diffusion": "Custom Diffusion"}
TILE, GAP, LEFT, FONT = 3 * 64, 6, 300, 30  # pixels: three for each one of a sample
BLOCK = len(SCENES) * (TILE + GAP) - GAP  # the width of one subject


def bands(white: np.ndarray) -> list[tuple[int, int]]:
    """Where rows or columns of tiles begin and end, from the share of white pixels in each line of the sheet."""
    edges = np.flatnonzero(np.diff(np.concatenate([[True], white > 0.4, [True]]).astype(int)))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


def sheet_strips(path: Path, names: list[str]) -> dict[str, np.ndarray]:
    """Each row of tiles of a sheet as (64, 64 * scenes, 3) uint8, under the names given from top to bottom.

    Raises ValueError if the sheet has another number of rows or columns.
    """
    pixels = np.array(Image.open(path).convert("RGB"))
    white = pixels.min(axis=2) > 250
    columns = bands(white.mean(axis=0))[-len(subjects.NEW_SCENES) :]  # the ones before are words
    rows = bands(white[:, columns[0][0] :].mean(axis=1))
    rows = [(top, end) for top, end in rows if end - top > 64]  # a word above the tiles is lower
    if len(rows) != len(names) or len(columns) != len(subjects.NEW_SCENES):
        raise ValueError(f"{path}: expected {len(names)} rows of {len(subjects.NEW_SCENES)} tiles, "
                         f"found {len(rows)} of {len(columns)}")  # fmt: skip

    def inside(start: int, end: int) -> np.ndarray:  # the middle of each of the 64 pixels that a tile shows
        return start + ((np.arange(64) + 0.5) * (end - start) / 64).astype(int)

    across = np.concatenate([inside(*column) for column in columns])
    return {name: pixels[np.ix_(inside(*row), across)] for name, row in zip(names, rows, strict=True)}


def recorded_strips(folder: Path, sheet: Path) -> dict[str, np.ndarray]:
    """ "subject_method" -> its strip of first samples, (64, 64 * scenes, 3) uint8."""
    wanted = [f"{name}_{method}" for name in SHOWN for method in METHODS]
    files = {name: folder / f"{name}.png" for name in wanted}
    if all(path.is_file() for path in files.values()):
        return {name: np.array(Image.open(path).convert("RGB")) for name, path in files.items()}
    sys.path.append(str(REPOSITORY / "measurements"))
    from methods import ON_SHEET, SUBJECTS

    return sheet_strips(sheet, [f"{name}_{row}" for name in SUBJECTS for row in (*ON_SHEET, "truth")])


def figure(strips: dict[str, np.ndarray]) -> Image.Image:
    """Two subjects beside each other: the pictures learnt from, a row for each method, and the ground truth."""
    five = (BLOCK - 4 * GAP) // 5
    top = 2 * FONT + five + 2 * FONT  # of the rows of samples
    size = (LEFT + len(SHOWN) * (BLOCK + 4 * GAP), top + (len(METHODS) + 1) * (TILE + GAP))
    canvas, font = Image.new("RGB", size, "white"), ImageFont.load_default(FONT)
    write = ImageDraw.Draw(canvas).text
    for k, label in enumerate([*METHODS.values(), "ground truth"]):
        write((LEFT - 3 * GAP, top + k * (TILE + GAP) + TILE // 2), label, "black", font, anchor="rm")
    write((LEFT - 3 * GAP, 1.5 * FONT + five // 2), "learnt from", "black", font, anchor="rm")
    for k, (name, title) in enumerate(SHOWN.items()):
        left, subject = LEFT + k * (BLOCK + 4 * GAP), subjects.SUBJECTS[name]
        write((left, FONT // 2), title, "black", font, anchor="lm")
        for view in range(5):
            path = REPOSITORY / "data" / "subjects" / name / f"view_{view + 1}.png"
            canvas.paste(Image.open(path).resize((five, five)), (left + view * (five + GAP), round(1.5 * FONT)))
        truth = [render(subject.spec(seed=0, scene=scene)) for scene in subjects.NEW_SCENES]
        rows = [strips[f"{name}_{method}"] for method in METHODS] + [np.concatenate(truth, axis=1)]
        for column, scene in enumerate(SCENES):
            x, place = left + column * (TILE + GAP), 64 * subjects.NEW_SCENES.index(scene)
            write((x + TILE // 2, top - FONT), scene, "black", font, anchor="mm")
            for row, strip in enumerate(rows):
                tile = Image.fromarray(strip[:, place : place + 64]).resize((TILE, TILE), Image.Resampling.NEAREST)
                canvas.paste(tile, (x, top + row * (TILE + GAP)))
    return canvas


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=Path, default=REPOSITORY / "runs" / "personalize", help="the strips' folder")
    parser.add_argument("--sheet", type=Path, default=RESULTS / "personalization_samples.png")
    parser.add_argument("--out", type=Path, default=RESULTS / "readme_figure.png")
    args = parser.parse_args()
    figure(recorded_strips(args.samples, args.sheet)).save(args.out, optimize=True)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
