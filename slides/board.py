"""What all figures of the slides share: a sheet to draw on, small print, and the record of what a figure shows.

    python slides/board.py                        # draws all figures of slides/figures_*.py into slides/img/
    python slides/board.py --only steps_quality guidance_sweep
    python slides/board.py --smoke --out /tmp/x   # tiny sizes, to see that it runs

A figure is a function without arguments in one of the files figures_*.py, marked with `@shows(...)`. img/figures.json
keeps the SHA-256 of the weights and records that each one was drawn from; tests/test_slides.py compares them.
"""

import argparse
import hashlib
import importlib
import json
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from filelock import FileLock
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from torch import Tensor

from course_lib import plots
from course_lib.environment import CHECKPOINTS, RESULTS, sha256, write_whole
from course_lib.plots import BLACK, BLUE

GREY = "#59626c"
W = 12.4  # inches: the width of every figure, 1168 pixels of a slide that is 1280 wide
DPI = 190  # about two pixels for each of a slide
STYLE = {**plots.STYLE, "font.size": 17, "axes.titlesize": 19, "lines.linewidth": 3.5, "axes.labelsize": 17}
SMOKE = False
IMAGES = Path(__file__).with_name("img")
FIGURES: dict[str, tuple[Callable, list[str], list[str]]] = {}  # name -> its function, weights, records


def shows(*, weights: tuple[str, ...] = (), records: tuple[str, ...] = ()) -> Callable:
    """Mark a function as a figure.

    weights: folders of data/checkpoints.  records: of data/results, by name without .json, or a picture there.
    """

    def mark(function: Callable) -> Callable:
        FIGURES[function.__name__] = (function, list(weights), list(records))
        return function

    return mark


def sources(name: str) -> dict[str, str]:
    """file -> SHA-256 of all that a figure is drawn from."""
    _, weights, records = FIGURES[name]
    files = [path for folder in weights for path in sorted((CHECKPOINTS / folder).rglob("*.safetensors"))]
    files += [RESULTS / (name if name.endswith(".png") else f"{name}.json") for name in records]
    root = CHECKPOINTS.parent
    return {path.relative_to(root).as_posix(): sha256(path)[:16] for path in files}


def size(full: int, smoke: int) -> int:
    return smoke if SMOKE else full


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Board:
    """A sheet measured in inches, y downwards, to put pictures, words and arrows on."""

    def __init__(self, height: float, width: float = W):
        self.fig = plt.figure(figsize=(width, height))
        self.ax = self.fig.add_axes((0, 0, 1, 1))
        self.ax.set(xlim=(0, width), ylim=(height, 0))
        self.ax.axis("off")
        self.width, self.height = width, height

    def tile(self, x: float, y: float, side: float, image: Tensor | np.ndarray, frame: str | None = None) -> None:
        """A square picture with its upper left corner at (x, y)."""
        pixels = plots.to_uint8(image)[0] if torch.is_tensor(image) else image
        self.ax.imshow(pixels, extent=(x, x + side, y + side, y), interpolation="nearest", aspect="auto")
        if frame:
            self.ax.add_patch(plt.Rectangle((x, y), side, side, fill=False, edgecolor=frame, linewidth=5))

    def text(self, x: float, y: float, words: str, points: float = 17, colour: str = BLACK, ha="center", va="center"):
        self.ax.text(x, y, words, fontsize=points, color=colour, ha=ha, va=va)

    def arrow(self, a: tuple[float, float], b: tuple[float, float], colour=GREY, width: float = 3, bend: float = 0):
        style = f"arc3,rad={bend}"
        self.ax.add_patch(FancyArrowPatch(a, b, arrowstyle="-|>", mutation_scale=24, linewidth=width, color=colour,
                                          connectionstyle=style, shrinkA=0, shrinkB=0))  # fmt: skip

    def box(self, x: float, y: float, w: float, h: float, words: str, colour: str = BLUE, points: float = 17) -> None:
        self.ax.add_patch(FancyBboxPatch((x, y), w, h, boxstyle="round,pad=0,rounding_size=0.12", linewidth=3,
                                         edgecolor=colour, facecolor=colour + "22"))  # fmt: skip
        self.text(x + w / 2, y + h / 2, words, points)

    def small(self, words: str) -> None:
        """The small print: what was measured, on what."""
        self.text(self.width, self.height - 0.02, wrapped(words), 11, GREY, ha="right", va="bottom")


def wrapped(words: str) -> str:
    """Small print in lines that fit the width of a figure."""
    return "\n".join(textwrap.wrap(words, 160, break_on_hyphens=False))


def small_print(fig, words: str) -> None:
    """The small print of a figure with a layout engine, which then leaves room for it."""
    fig.get_layout_engine().set(rect=(0, 0.08, 1, 0.92))
    fig.text(0.998, 0.004, wrapped(words), fontsize=11, color=GREY, ha="right", va="bottom")


def rows_of(board: Board, images: Tensor, columns: int, x: float, y: float, side: float, gap: float = 0.06) -> None:
    for i, image in enumerate(images):
        board.tile(x + i % columns * (side + gap), y + i // columns * (side + gap), side, image)


def load_figures() -> None:
    """Import all files of figures, so that FIGURES holds them."""
    sys.path.insert(0, str(Path(__file__).parent))
    sys.modules.setdefault("board", sys.modules[__name__])  # when this file is run as a script
    for path in sorted(Path(__file__).parent.glob("figures_*.py")):
        importlib.import_module(path.stem)


def save(name: str, out: Path) -> None:
    """Draw a figure, write its PNG, and note what it was drawn from."""
    with plt.rc_context(STYLE):
        fig = FIGURES[name][0]()
        fig.savefig(out / f"{name}.png", dpi=size(DPI, 40), facecolor="white", metadata={"Software": None})
    plt.close(fig)
    path = out / "figures.json"
    with FileLock(out / ".figures.lock"):
        known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        drawn = hashlib.sha256((out / f"{name}.png").read_bytes()).hexdigest()[:16]
        known[name] = {"png": drawn, "sources": sources(name)}
        with write_whole(path) as temporary:
            temporary.write_text(json.dumps(dict(sorted(known.items())), indent=1) + "\n", encoding="utf-8")


def main() -> None:
    global SMOKE
    load_figures()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=FIGURES, metavar="NAME", help="draw these: " + ", ".join(FIGURES))
    parser.add_argument("--out", type=Path, default=IMAGES)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: only proves that it runs")
    parser.add_argument("--threads", type=int, help="CPU threads (default: all)")
    args = parser.parse_args()
    SMOKE = args.smoke
    if args.smoke and args.out == IMAGES:
        parser.error("--smoke needs --out: the real figures are not to be replaced by tiny ones")
    if args.threads:
        torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.only or FIGURES:
        start = time.time()
        save(name, args.out)
        print(f"{name}: {time.time() - start:.1f} s", flush=True)


if __name__ == "__main__":
    main()
