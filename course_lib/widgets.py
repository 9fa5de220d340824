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
    choices: for an argument, the values of its slider. An argument without choices must be a text: Enter draws it.
    While a picture is being drawn, the controls are locked and a line says so. A ValueError becomes a line too.
    Raises ValueError if an argument has no default, if its default is not among its choices, or if a name is unknown.
    """
    import ipywidgets as widgets
    from IPython.display import display

    controls = controls_for(draw, choices)
    picture, state = widgets.HTML(), widgets.HTML()

    def draw_now() -> tuple[bytes, str]:
        fig, alt = draw(**{name: control.value for name, control in controls.items()})
        data = png(fig)
        encoded = base64.b64encode(data).decode()
        picture.value = f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{encoded}">'
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
    box = widgets.VBox([*controls.values(), state, picture])
    view = {"model_id": box.model_id, "version_major": 2, "version_minor": 0}
    both = {"application/vnd.jupyter.widget-view+json": view, "image/png": base64.b64encode(data).decode()}
    display({**both, "text/plain": alt}, metadata={"image/png": {"alt": alt}}, raw=True)
    show_words(alt)


def controls_for(draw: Callable, choices: dict[str, Sequence]) -> dict:
    """A slider or a text field of ipywidgets for each argument of `draw`; see `explore`."""
    import ipywidgets as widgets

    values = {name: argument.default for name, argument in inspect.signature(draw).parameters.items()}
    if unknown := set(choices) - set(values):
        raise ValueError(f"choices: expected arguments of draw ({', '.join(values)}), got {sorted(unknown)}")
    for name, value in values.items():
        if value not in choices.get(name, [value]) or (name not in choices and not isinstance(value, str)):
            raise ValueError(f"{name}: expected a default of draw that is among its choices, or a text, got {value!r}")
    lazy = {"continuous_update": False, "style": {"description_width": "initial"}}
    return {
        name: widgets.SelectionSlider(options=list(choices[name]), value=value, description=name, **lazy)
        if name in choices
        else widgets.Text(value=value, description=name, layout={"width": "40em"}, **lazy)
        for name, value in values.items()
    }
