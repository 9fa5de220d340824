"""Draw the figure at the top of README.md from the recorded samples.

    python tools/readme_figure.py        writes data/results/readme_figure.png

The samples are rows of data/results/personalization_tiles.png. Subjects and scenes were chosen by hand. Of each prompt
the first sample of the first training is shown.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from course_lib.environment import REPOSITORY, RESULTS
from course_lib.toybox import subjects

SHOWN = {"biscuit": "Biscuit, a dog", "tilly": "Tilly, a teapot"}
SCENES = ("in the desert", "under water", "on the moon", "on a stage")
METHODS = {"textual_inversion": "Textual Inversion", "dreambooth": "DreamBooth", "lora": "LoRA",
           "custom_diffusion": "Custom Diffusion"}  # fmt: skip
TILE, GAP, LEFT, FONT = 3 * 64, 6, 300, 30  # pixels: three for each one of a sample
BLOCK = len(SCENES) * (TILE + GAP) - GAP  # the width of one subject


def recorded_strips() -> dict[str, np.ndarray]:
    """ "biscuit lora 0" -> first samples of the new scenes, (64, 64 * scenes, 3) uint8; 0 is the training seed."""
    rows = json.loads((RESULTS / "personalization.json").read_text(encoding="utf-8"))["tiles"]
    tiles = np.array(Image.open(RESULTS / "personalization_tiles.png").convert("RGB"))
    return {row: tiles[64 * k : 64 * (k + 1)] for k, row in enumerate(rows)}


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
        left = LEFT + k * (BLOCK + 4 * GAP)
        write((left, FONT // 2), title, "black", font, anchor="lm")
        for view in range(5):
            path = REPOSITORY / "data" / "subjects" / name / f"view_{view + 1}.png"
            canvas.paste(Image.open(path).resize((five, five)), (left + view * (five + GAP), round(1.5 * FONT)))
        rows = [strips[f"{name} {method} 0"] for method in (*METHODS, "truth")]
        for column, scene in enumerate(SCENES):
            x, place = left + column * (TILE + GAP), 64 * subjects.NEW_SCENES.index(scene)
            write((x + TILE // 2, top - FONT), scene, "black", font, anchor="mm")
            for row, strip in enumerate(rows):
                tile = Image.fromarray(strip[:, place : place + 64]).resize((TILE, TILE), Image.Resampling.NEAREST)
                canvas.paste(tile, (x, top + row * (TILE + GAP)))
    return canvas


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS / "readme_figure.png")
    args = parser.parse_args()
    figure(recorded_strips()).save(args.out, optimize=True)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
