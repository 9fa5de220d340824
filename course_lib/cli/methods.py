"""The table of the methods, which the command, the measurements and the benchmarks share.

Used by: notebooks/11_textual_inversion.ipynb, section "Your own pictures".
"""

from collections.abc import Callable
from dataclasses import dataclass

from course_lib.latent.stable_diffusion import StableDiffusion
from course_lib.personalization import custom_diffusion, dreambooth, lora, textual_inversion
from course_lib.personalization.recipe import Settings


@dataclass(frozen=True)
class Method:
    """A method of personalization.

    title: its name in tables.  recipe: (sd, images, noun=, token=, settings=, **options) -> a context manager of a
    Recipe.  settings: for each kind of base model.  token: the usual word for the subject.  options: those that only
    some recipes take, by the names of the command's options.
    """

    title: str
    recipe: Callable
    settings: dict[str, Settings]
    token: str
    options: frozenset[str]

    def settings_for(self, sd: StableDiffusion) -> Settings:
        """The settings that suit a base model."""
        return self.settings[sd.defaults.settings]

    def name(self, token: str, noun: str) -> str:
        """How a prompt names the subject: by the new word alone in Textual Inversion, else by word and noun."""
        return token if self.recipe is textual_inversion.recipe else f"{token} {noun}"


METHODS = {
    "textual_inversion": Method(
        "Textual Inversion", textual_inversion.recipe, textual_inversion.SETTINGS, "<v>", frozenset({"vectors"})
    ),
    "dreambooth": Method(
        "DreamBooth", dreambooth.recipe, dreambooth.SETTINGS, "sks", frozenset({"prior", "prior_weight"})
    ),
    "lora": Method("LoRA", lora.recipe, lora.SETTINGS, "sks", frozenset({"rank", "prior", "prior_weight"})),
    "custom_diffusion": Method(
        "Custom Diffusion",
        custom_diffusion.recipe,
        custom_diffusion.SETTINGS,
        "<v>",
        frozenset({"regularisation", "similarity"}),
    ),
}
