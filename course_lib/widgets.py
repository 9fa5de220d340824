"""Controls in a notebook: a picture that is drawn again when a slider is moved or a text is entered.

Used by: notebooks/01_ddpm_training.ipynb and later ones. A page without a kernel shows the first picture instead.
"""

import base64
import html
import inspect
from collections.abc import Callable, Sequence

from matplotlib.figure import Figure

from course_lib.plots import png, show_words


def explore(draw: Callable[..., tuple[Figure, str]], **choices: Sequence) -> None:
    """Display controls for the arguments of `draw`, and under them the figure that it returns.

    draw: takes the values by name and returns (figure, alt text). Each argument has a default, the first value shown.
    choices: for an argument, the values of its slider, or of its list where all are texts. An argument without choices
        must be a text: Enter draws it.
    While a picture is being drawn, the controls are locked and a line says so. A ValueError becomes a line too.
    Raises ValueError if an argument has no default, if its default is not among its choices, or if a name is unknown.
    """
    import ipywidgets as widgets

    controls = controls_for(draw, choices)
    picture, state = widgets.HTML(), widgets.HTML()

    def draw_now() -> tuple[bytes, str]:
        fig, alt = draw(**{name: control.value for name, control in controls.items()})
        data = png(fig)
        picture.value = image(data, alt)
        return data, alt

    def draw_again(_) -> None:
        state.value = "drawing …"
        for control in controls.values():
            control.disabled = True
        try:
            draw_now()
            state.value = ""
        except ValueError as error:
            state.value = html.escape(str(error))
        finally:
            for control in controls.values():
                control.disabled = False

    data, alt = draw_now()
    for control in controls.values():
        control.observe(draw_again, "value")
    show_controls(widgets.VBox([*controls.values(), state, picture]), data, alt)


def image(data: bytes, alt: str) -> str:
    """A PNG file as HTML."""
    return f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{base64.b64encode(data).decode()}">'


def show_controls(box, data: bytes, alt: str) -> None:
    """Display controls, with a PNG file and its words for pages without a kernel."""
    from IPython.display import display

    view = {"model_id": box.model_id, "version_major": 2, "version_minor": 0}
    both = {"application/vnd.jupyter.widget-view+json": view, "image/png": base64.b64encode(data).decode()}
    display({**both, "text/plain": alt}, metadata={"image/png": {"alt": alt}}, raw=True)
    show_words(alt)


def controls_for(draw: Callable, choices: dict[str, Sequence]) -> dict:
    """A slider, a list or a text field of ipywidgets for each argument of `draw`; see `explore`."""
    import ipywidgets as widgets

    values = {name: argument.default for name, argument in inspect.signature(draw).parameters.items()}
    if unknown := set(choices) - set(values):
        raise ValueError(f"choices: expected arguments of draw ({', '.join(values)}), got {sorted(unknown)}")
    for name, value in values.items():
        if value not in choices.get(name, [value]) or (name not in choices and not isinstance(value, str)):
            raise ValueError(f"{name}: expected a default of draw that is among its choices, or a text, got {value!r}")
    lazy = {"continuous_update": False, "style": {"description_width": "initial"}}

    def control(name: str, value: object):
        if name not in choices:
            return widgets.Text(value=value, description=name, layout={"width": "40em"}, **lazy)
        options = list(choices[name])
        if all(isinstance(option, str) for option in options):
            return widgets.Dropdown(options=options, value=value, description=name, layout={"width": "max-content"})
        return widgets.SelectionSlider(options=options, value=value, description=name, **lazy)

    return {name: control(name, value) for name, value in values.items()}
