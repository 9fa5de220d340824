"""A training with buttons: a notebook's reader starts, watches and stops it, while the notebook stays usable.

Used by: notebooks/16_comparison.ipynb, section "The bench".
"""

import html
import io
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import closing

import PIL.Image
import torch
from torch import Tensor

from course_lib.latent.stable_diffusion import StableDiffusion
from course_lib.personalization.finetune import finetune
from course_lib.plots import montage
from course_lib.widgets import controls_for, image, show_controls

EVERY = 0.25  # seconds between two updates of the line and the bar
_busy = threading.Lock()  # one training at a time, also after the cell was run again


class Bench:
    """Controls, the buttons Train and Stop, a progress bar, a line about the training, and a picture.

    sd: the model; nothing else should use it during a training.  recipe: takes the controls' values by name and returns
    a context manager of a Recipe on `sd`, see `recipe.Recipe`.  draw: takes the same and returns pictures
    (N, 3, H, W) in [-1, 1] and their words; called with the trained model when the training is done or stopped, and
    once at first, untrained.  choices: of the controls, as in `widgets.explore`.
    The training runs in a thread, and Stop acts between two steps. Afterwards the model is as before, bit for bit. An
    error becomes the line.  Raises what `widgets.explore` raises.
    """

    def __init__(self, sd: StableDiffusion, recipe: Callable, draw: Callable, **choices: Sequence):
        import ipywidgets as widgets

        self.sd, self.recipe, self.draw = sd, recipe, draw
        self.controls = controls_for(recipe, choices)
        self.train = widgets.Button(description="Train")
        self.stop = widgets.Button(description="Stop", disabled=True)
        self.bar = widgets.IntProgress(value=0, min=0, max=1)
        self.line, self.picture = widgets.HTML("nothing is trained yet"), widgets.HTML()
        self.stopping, self.thread = threading.Event(), None
        self.train.on_click(lambda _: self.start())
        self.stop.on_click(lambda _: self.stopping.set())
        buttons = widgets.HBox([self.train, self.stop, self.bar])
        box = widgets.VBox([*self.controls.values(), buttons, self.line, self.picture])
        show_controls(box, *self._show(*draw(**self.values)))

    @property
    def values(self) -> dict:
        """What the controls say now."""
        return {name: control.value for name, control in self.controls.items()}

    def start(self) -> None:
        """Train with the controls' values, in a thread: what the button Train does."""
        if not _busy.acquire(blocking=False):
            self.line.value = "another training is running: stop it first"
            return
        self.stopping.clear()
        self._lock(True)
        self.thread = threading.Thread(target=self._run, kwargs=self.values, daemon=True)
        self.thread.start()

    def _run(self, **values) -> None:
        try:
            self._train(values)
        except Exception as error:  # nobody would see the traceback of a thread
            self.line.value = html.escape(f"{type(error).__name__}: {error}")
        finally:
            _busy.release()
            self._lock(False)

    def _train(self, values: dict) -> None:
        self.bar.value, self.line.value = 0, "preparing …"
        with self.recipe(**values) as recipe:
            self.bar.max = steps = recipe.settings.steps
            losses, start, told = deque(maxlen=20), time.perf_counter(), 0.0
            with closing(finetune(self.sd, recipe)) as loop:
                for step, loss in loop:
                    losses.append(loss)
                    seconds, end = time.perf_counter() - start, step == steps or self.stopping.is_set()
                    if end or seconds - told > EVERY:
                        told, self.bar.value = seconds, step
                        text = f"step {step} of {steps}, loss {torch.stack(list(losses)).mean():.3f}"
                        self.line.value = f"{text}, about {seconds / step * (steps - step):.0f} s left"
                    if end:
                        break
            self.line.value = f"{text}: drawing …"
            self._show(*self.draw(**values))
        state = "trained" if step == steps else "stopped"
        self.line.value = f"{state}, {text}, {seconds:.0f} s; the model is as before again"

    def _show(self, images: Tensor, alt: str) -> tuple[bytes, str]:
        """Put pictures below the controls, small ones enlarged; without pyplot, which is not made for threads."""
        row, file = PIL.Image.fromarray(montage(images, min(8, len(images)))), io.BytesIO()
        scale = 2 if images.shape[-1] <= 128 else 1
        row.resize((scale * row.width, scale * row.height), PIL.Image.Resampling.NEAREST).save(file, "png")
        self.picture.value = image(file.getvalue(), alt)
        return file.getvalue(), alt

    def _lock(self, training: bool) -> None:
        for control in (self.train, *self.controls.values()):
            control.disabled = training
        self.stop.disabled = not training
