"""Pictures in a notebook: the layout of a grid, the limits of a pixel, labels, alt text."""

import io
import itertools
import subprocess
import sys

import matplotlib
import matplotlib.colors
import matplotlib.pyplot as plt
import numpy as np
import PIL.Image
import pytest
import torch

from course_lib import plots


@pytest.fixture(autouse=True)
def no_window():
    matplotlib.use("agg")
    yield
    plt.close("all")


def test_to_uint8_maps_minus_one_to_one_on_0_to_255():
    values = torch.tensor([-9.0, -1, -0.5, 0, 1, 9]).reshape(6, 1, 1, 1)
    pixels = plots.to_uint8(values)
    assert pixels.dtype == np.uint8 and pixels.shape == (6, 1, 1, 3)  # grey becomes three equal channels
    assert pixels[:, 0, 0, 1].tolist() == [0, 0, 64, 128, 255, 255]
    assert (pixels == pixels[..., :1]).all()


def test_to_uint8_undoes_what_training_does_to_pixels():
    every = torch.arange(256, dtype=torch.uint8).reshape(256, 1, 1, 1)
    assert np.array_equal(plots.to_uint8(every.float() / 127.5 - 1), plots.to_uint8(every))


def test_to_uint8_takes_one_image_half_precision_and_gradients():
    image = torch.zeros(3, 4, 5, dtype=torch.bfloat16, requires_grad=True)
    assert plots.to_uint8(image).shape == (1, 4, 5, 3)


def test_montage_puts_images_row_by_row_with_white_between():
    images = torch.arange(5, dtype=torch.uint8).reshape(5, 1, 1, 1).expand(5, 3, 4, 6) * 10
    canvas = plots.montage(images, columns=3, gap=2)
    assert canvas.shape == (2 * 4 + 2, 3 * 6 + 2 * 2, 3)
    for i in range(5):
        y, x = i // 3 * 6, i % 3 * 8
        assert (canvas[y : y + 4, x : x + 6] == i * 10).all()
    assert (canvas[4:6] == 255).all() and (canvas[:, 6:8] == 255).all()
    assert (canvas[6:, 16:] == 255).all()  # no sixth image


def test_grid_shows_title_and_labels():
    fig = plots.grid(torch.zeros(6, 3, 8, 8), 3, "Six", ["a", "b"], ["x", "y", "z"])
    (ax,) = fig.axes
    assert fig._suptitle.get_text() == "Six"
    assert [t.get_text() for t in ax.get_yticklabels()] == ["a", "b"]
    assert [t.get_text() for t in ax.get_xticklabels()] == ["x", "y", "z"]
    (image,) = ax.images
    height, width = image.get_array().shape[:2]
    assert all(0 < x < width for x in ax.get_xticks()) and all(0 < y < height for y in ax.get_yticks())


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (dict(row_labels=["a"]), r"^row_labels: expected 2 texts, got 1$"),
        (dict(column_labels=list("wxyz")), r"^column_labels: expected 3 texts, got 4$"),
    ],
)
def test_a_wrong_number_of_labels_is_refused(labels, message):
    with pytest.raises(ValueError, match=message):
        plots.grid(torch.zeros(4, 3, 8, 8), 3, **labels)


def test_importing_plots_changes_nothing_outside_it():
    code = """
import matplotlib
before = dict(matplotlib.rcParams)
import course_lib.plots
changed = [key for key in before if matplotlib.rcParams[key] != before[key]]
assert not changed, changed
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_style_is_used_from_its_call_on():
    with plt.rc_context():
        plots.use_style()
        fig, axes = plots.curves(columns=2)
        lines = [axes[0].plot([0, 1])[0] for _ in range(2)]
        assert not axes[1].spines["top"].get_visible()
    assert len(axes) == 2 and len(fig.axes) == 2
    assert [line.get_color() for line in lines] == [plots.BLUE, plots.ORANGE]


def linear(colour):
    """Light of a colour "#RRGGBB": (red, green, blue) in [0, 1], without the screen's curve (IEC 61966-2-1)."""
    c = np.array(matplotlib.colors.to_rgb(colour))
    return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)


def contrast_on_white(colour):
    """WCAG 2.1: (1 + 0.05) / (luminance + 0.05)."""
    return 1.05 / (linear(colour) @ [0.2126, 0.7152, 0.0722] + 0.05)


def test_contrast_is_that_of_the_formula():
    assert contrast_on_white("#000000") == pytest.approx(21)
    assert contrast_on_white("#777777") == pytest.approx(4.48, abs=0.01)  # the well-known grey that just misses 4.5


@pytest.mark.parametrize("colour", plots.PALETTE)
def test_a_line_can_be_seen_on_white(colour):
    assert contrast_on_white(colour) >= 3


# Machado et al. 2009, severity 1: light as protanopes, deuteranopes and tritanopes see it.
VISION = {
    "usual": np.eye(3),
    "protan": [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]],
    "deutan": [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]],
    "tritan": [[1.256, -0.077, -0.179], [-0.078, 0.931, 0.148], [0.005, 0.691, 0.304]],
}


def lab(rgb):
    """Linear light to CIE L*a*b* (D65), where equal distances look about equally large."""
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    x, y, z = np.cbrt(to_xyz @ rgb.clip(1e-3, 1) / [0.9505, 1, 1.089])
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("seen", VISION)
def test_two_colours_are_never_taken_for_one(seen):
    points = {colour: lab(VISION[seen] @ linear(colour)) for colour in plots.PALETTE}
    near = {pair: np.linalg.norm(points[pair[0]] - points[pair[1]]) for pair in itertools.combinations(points, 2)}
    assert min(near.values()) >= 15, min(near, key=near.get)  # Okabe and Ito's own colours: 16


def test_a_picture_is_shown_with_its_words_and_closed(monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.display.display", lambda what, **_: shown.append(what))
    fig, _ = plots.curves()
    plots.show(fig, alt="A line with x < 3 that falls.")
    image, words = shown
    assert image.alt == "A line with x < 3 that falls." and image.data.startswith(b"\x89PNG")
    assert "x &lt; 3 that falls." in words["text/html"]  # what JupyterLab and GitHub show of it
    assert words["text/plain"] == image.alt
    assert not plt.fignum_exists(fig.number)


def test_a_picture_keeps_its_own_colours(monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.display.display", lambda what, **_: shown.append(what))
    colours = torch.arange(64 * 64).reshape(1, 1, 64, 64)  # 4,096 different ones
    image = torch.cat([colours % 256, colours // 256, colours % 7], dim=1).to(torch.uint8)
    plots.show(plots.grid(image, 1, tile=4), alt="Many colours.")
    pixels = np.asarray(PIL.Image.open(io.BytesIO(shown[0].data)).convert("RGB")).reshape(-1, 3)
    assert len(np.unique(pixels, axis=0)) >= 4096


def test_a_picture_without_alt_text_is_refused():
    with pytest.raises(ValueError, match=r"^alt: expected a sentence"):
        plots.show(plots.curves()[0], alt="")
