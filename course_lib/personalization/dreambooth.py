"""DreamBooth: train the whole UNet to bind a rare word to a subject, with class images for prior preservation.

Derived in: notebooks/12_dreambooth.ipynb.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from course_lib.data.pictures import captions_with
from course_lib.latent.stable_diffusion import StableDiffusion
from course_lib.latent.text import check_noun
from course_lib.personalization.examples import Examples, generated_examples, subject_examples
from course_lib.personalization.recipe import Recipe, Settings, Term, new_recipe, unfreeze

SETTINGS = {"toybox": Settings(steps=80, lr=2e-4), "sd15": Settings(steps=800, lr=5e-6, batch_size=1)}


@contextmanager
def recipe(sd: StableDiffusion, images, *, noun: str, token: str = "sks", prior: Examples | None = None,
           prior_weight: float = 1.0, text: bool = False, captions: Sequence[str] | None = None, flip: bool = False,
           settings: Settings | None = None) -> Iterator[Recipe]:  # fmt: skip
    """Train all of the UNet on "a sks dog", and on "a dog" with class images that the model drew before.

    L = E || eps - eps_theta(z_t, t, c("a sks dog")) ||^2 + lambda E || eps' - eps_theta(z'_t', t', c("a dog")) ||^2
    Source: Ruiz et al. 2023, Eq. 2.
    token: a rare word, which the tokenizer may split.  prior: class images, see `prior_examples`; None: no prior
    preservation.  prior_weight: lambda (prior_loss_weight).  text: train the text encoder too.
    Derived in: notebooks/12_dreambooth.ipynb, section "The loss".
    """
    terms, about = terms_of(sd, images, noun, token, prior, prior_weight, captions, flip)
    settings = settings or SETTINGS[sd.defaults.settings]
    recipe = new_recipe(sd, "dreambooth", terms, settings, **about, rank=None, text=text)
    recipe.trains_text = text
    with unfreeze({f"{part}.{name}": param for part, network in trained_networks(sd, text).items()
                   for name, param in network.named_parameters()}) as recipe.params:  # fmt: skip
        yield recipe


def terms_of(sd: StableDiffusion, images, noun: str, token: str, prior: Examples | None, prior_weight: float,
             captions: Sequence[str] | None, flip: bool) -> tuple[list[Term], dict]:  # fmt: skip
    """The loss of DreamBooth and LoRA as terms (the subject, and the class if there is a prior), and notes to save."""
    if prior_weight < 0:
        raise ValueError(f"prior_weight: expected a number of at least 0, got {prior_weight}")
    check_noun(sd.tokenizer, noun)
    name, captions = f"{token} {noun}", captions_with(token, images, captions)
    terms = [Term(subject_examples(sd, images, name, templates=("a photo of a {}",), captions=captions, flip=flip))]
    if prior is not None and prior_weight > 0:
        terms.append(Term(prior, prior_weight))
    return terms, dict(token=token, noun=noun, prior_weight=prior_weight if prior else 0.0)


def trained_networks(sd: StableDiffusion, text: bool) -> dict:
    """The networks that are trained, by their names in a concept."""
    return {"unet": sd.unet, "text_encoder": sd.text_encoder} if text else {"unet": sd.unet}


def prior_examples(sd: StableDiffusion, noun: str, count: int = 100, **options) -> Examples:
    """`count` class images, drawn by the model before it is trained; options as in `generated_examples`."""
    options = {"steps": sd.defaults.prior_steps} | options
    return generated_examples(sd, f"a photo of a {noun}", count, **options)
