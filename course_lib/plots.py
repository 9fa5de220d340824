"""Pictures in a notebook: grids of images, curves in colours that all readers can tell apart, alt text.

Used by: notebooks/00_start_here.ipynb and every notebook after it.
"""

import html
import io
from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import PIL.Image
import torch
from matplotlib.figure import Figure
from torch import Tensor

# The hues of Okabe & Ito 2008, which colour-blind readers can tell apart. Some are darker than in the paper:
# a line needs a contrast of 3:1 on white (WCAG 2.1, 1.4.11). The first three are used most.
BLUE, ORANGE, GREEN, PINK = "#005A9C", "#CC8000", "#00875F", "#CC79A7"
SKY, RED, BLACK = "#3D9BD3", "#B83A00", "#000000"
PALETTE = (BLUE, ORANGE, GREEN, PINK, SKY, RED, BLACK)

STYLE = {
    "axes.prop_cycle": plt.cycler(color=PALETTE),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "font.size": 10,
    "figure.dpi": 100,
    "legend.frameon": False,
}


def use_style() -> None:
    """Draw every later figure of this process in the course's style. A notebook calls it once, in its first cell."""
    plt.rcParams.update(STYLE)


def to_uint8(images: Tensor) -> np.ndarray:
    """(N, C, H, W) in [-1, 1], or uint8, to (N, H, W, 3) uint8. Numbers outside [-1, 1] are clipped."""
    images = images.detach().cpu()
    if images.ndim == 3:
        images = images[None]
    if images.dtype != torch.uint8:
        images = ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    if images.shape[1] == 1:
        images = images.expand(-1, 3, -1, -1)
    return images.permute(0, 2, 3, 1).numpy()


def montage(images: Tensor, columns: int, gap: int = 2) -> np.ndarray:
    """Join images into one: `columns` in a row, `gap` white pixels between. (N, C, H, W) to (H', W', 3) uint8."""
    tiles = to_uint8(images)
    N, H, W, _ = tiles.shape
    rows = -(-N // columns)
    canvas = np.full((rows * (H + gap) - gap, columns * (W + gap) - gap, 3), 255, np.uint8)
    for i, tile in enumerate(tiles):
        y, x = i // columns * (H + gap), i % columns * (W + gap)
        canvas[y : y + H, x : x + W] = tile
    return canvas


def grid(
    images: Tensor,
    columns: int = 8,
    title: str = "",
    row_labels: Sequence[str] = (),
    column_labels: Sequence[str] = (),
    tile: float = 0.8,
) -> Figure:
    """A labelled grid of images.

    images: (N, C, H, W) in [-1, 1] or uint8, row by row.  columns: images in a row.  tile: inches per image.
    row_labels, column_labels: one text per row or column, or none.  Returns the figure; `show` displays it.
    Raises ValueError if the number of labels is not that of the rows or columns.
    """
    rows = -(-len(images) // columns)
    for name, labels, count in (("row_labels", row_labels, rows), ("column_labels", column_labels, columns)):
        if labels and len(labels) != count:
            raise ValueError(f"{name}: expected {count} texts, got {len(labels)}")
    H, W = images.shape[-2:]
    gap = max(1, W // 16)
    lines = 2 * bool(title) + (max(text.count("\n") + 1 for text in column_labels) if column_labels else 0)
    words = 0.1 + 0.08 * max(map(len, row_labels)) if row_labels else 0  # inches beside and above the images
    size = (columns * tile + words, rows * tile * H / W + 0.18 * lines)
    fig, ax = plt.subplots(figsize=size, layout="constrained")
    ax.grid(False)
    ax.imshow(montage(images, columns, gap), interpolation="nearest")
    ax.set_xticks([W / 2 + i * (W + gap) for i in range(columns)] if column_labels else [], column_labels or [])
    ax.set_yticks([H / 2 + i * (H + gap) for i in range(rows)] if row_labels else [], row_labels or [])
    ax.xaxis.tick_top()
    ax.tick_params(length=0, labelsize=9)
    for spine in ax.spines.values():
        spine.set_visible(False)
    if title:
        fig.suptitle(title, x=0.01, ha="left", fontsize=11)
    return fig


def curves(columns: int = 1, width: float = 5.0, height: float = 3.2):
    """A figure with `columns` axes side by side, each `width` by `height` inches. Returns (fig, axes)."""
    return plt.subplots(1, columns, figsize=(width * columns, height), layout="constrained")


def png(fig: Figure, dpi: int = 100) -> bytes:
    """The figure as a PNG file with the whole of its labels, nothing transparent. Closes the figure."""
    buffer, smaller = io.BytesIO(), io.BytesIO()
    fig.savefig(buffer, format="png", dpi=dpi, bbox_inches="tight", pad_inches=0.08)
    plt.close(fig)
    PIL.Image.open(buffer).convert("RGB").save(smaller, "png", optimize=True)
    return smaller.getvalue()


def show(fig: Figure, alt: str, dpi: int = 100) -> None:
    """Display a figure with its alt text, a sentence for readers who cannot see it. Closes the figure.

    The HTML pages of the course take the alt text from the picture's metadata. JupyterLab and GitHub do not, so the
    same sentence also follows the picture, folded up. Raises ValueError if it is empty.
    """
    from IPython.display import Image, display

    if not alt:
        raise ValueError("alt: expected a sentence that says what the picture shows, got an empty text")
    display(Image(data=png(fig, dpi), format="png", alt=alt))
    show_words(alt)


def show_words(alt: str) -> None:
    """Display the alt text of the picture above, folded up."""
    from IPython.display import display

    words = f"<details><summary>The picture in words</summary>{html.escape(alt)}</details>"
    display({"text/html": words, "text/plain": alt}, raw=True)
