"""explore: a picture, its words, and controls that draw it again."""

import pytest

from course_lib import widgets
from course_lib.plots import curves


@pytest.fixture
def shown(monkeypatch):
    """What is displayed: (data, metadata) of each."""
    import IPython.display

    outputs = []
    monkeypatch.setattr(
        IPython.display, "display", lambda data, metadata=None, raw=False: outputs.append((data, metadata))
    )
    return outputs


def draw(t=2, prompt="a cat"):
    if prompt == "":
        raise ValueError("prompt: expected a text, got none")
    calls.append((t, prompt))
    return curves()[0], f"{prompt} at {t}"


calls = []


def test_picture_with_words_for_pages_without_a_kernel(shown):
    calls.clear()
    widgets.explore(draw, t=(1, 2, 3))
    (data, metadata), (words, _) = shown
    assert calls == [(2, "a cat")]
    assert data["image/png"].startswith("iVBOR")
    assert data["text/plain"] == metadata["image/png"]["alt"] == words["text/plain"] == "a cat at 2"


def test_a_control_draws_again_and_a_wrong_text_becomes_a_line(shown, monkeypatch):
    import ipywidgets

    boxes = []
    real = ipywidgets.VBox
    monkeypatch.setattr(ipywidgets, "VBox", lambda children: boxes.append(real(children)) or boxes[0])
    calls.clear()
    widgets.explore(draw, t=(1, 2, 3))
    slider, text, state, picture = boxes[0].children
    slider.value = 3
    text.value = "a <dog>"
    assert calls[1:] == [(3, "a cat"), (3, "a <dog>")]
    assert 'alt="a &lt;dog&gt; at 3"' in picture.value and state.value == "" and not slider.disabled
    text.value = ""
    assert state.value == "prompt: expected a text, got none" and not text.disabled


def test_texts_to_choose_from_make_a_list_and_others_a_slider():
    controls = widgets.controls_for(draw, {"t": (1, 2), "prompt": ("a cat", "a dog")})
    assert [type(control).__name__ for control in controls.values()] == ["SelectionSlider", "Dropdown"]
    assert controls["prompt"].options == ("a cat", "a dog") and controls["prompt"].value == "a cat"


@pytest.mark.parametrize(
    ("choices", "message"), [({"t": (1, 3)}, "t: expected"), ({}, "t: expected"), ({"t": (2,), "w": (1,)}, r"\['w'\]")]
)
def test_wrong_choices(choices, message):
    with pytest.raises(ValueError, match=message):
        widgets.explore(draw, **choices)
