"""Pictures in a notebook: the layout of a grid, the limits of a pixel, labels, alt text."""

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
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


def test_curves_come_in_the_courses_colours():
    fig, axes = plots.curves(columns=2)
    assert len(axes) == 2 and len(fig.axes) == 2
    lines = [axes[0].plot([0, 1])[0] for _ in range(2)]
    assert [line.get_color() for line in lines] == [plots.BLUE, plots.ORANGE]


def test_a_picture_is_shown_with_its_alt_text_and_closed(monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.display.display", shown.append)
    fig, _ = plots.curves()
    plots.show(fig, alt="A line that falls.")
    (image,) = shown
    assert image.alt == "A line that falls." and image.data.startswith(b"\x89PNG")
    assert not plt.fignum_exists(fig.number)


def test_a_picture_without_alt_text_is_refused():
    with pytest.raises(ValueError, match=r"^alt: expected a sentence"):
        plots.show(plots.curves()[0], alt="")
