"""Textual Inversion: find a word for a subject in a model that stays exactly as it is.

Derived in: notebooks/11_textual_inversion.ipynb.
"""

from collections.abc import Sequence

from course_lib.latent.stable_diffusion import StableDiffusion
from course_lib.latent.text import NewTokens, token_trouble
from course_lib.personalization import concept
from course_lib.personalization.concept import OBJECT
from course_lib.personalization.dreambooth import check_noun
from course_lib.personalization.finetune import Recipe, Settings, Term, begin

TOYBOX = Settings(steps=200, lr=2e-2)
SD15 = Settings(steps=3000, lr=2e-3, batch_size=4)  # diffusers' example: 5e-4 times its batch of 4


def recipe(sd: StableDiffusion, images, *, token: str = "<v>", noun: str = "object", vectors: int = 1,
           templates: Sequence[str] = OBJECT, captions: Sequence[str] | None = None, flip: bool = False,
           settings: Settings | None = None) -> Recipe:  # fmt: skip
    """One new row v* of the embedding table is all that learns.

    v* = argmin_v E || eps - eps_theta(z_t, t, c(prompt with v)) ||^2.  Source: Gal et al. 2023, Eq. 2.
    images: see `concept.open_images`.  token: the new word, in lower case and brackets.  noun: the word or words whose
    meaning it starts from (the mean of their sub-words).  vectors: rows for one word; "<v>" in a prompt then stands
    for all of them.  templates: OBJECT or STYLE, or your own; captions: a sentence for each picture instead.
    Raises ValueError for a token that exists or is not of that form, an unknown noun, or unreadable pictures.
    Derived in: notebooks/11_textual_inversion.ipynb, section "One row".
    """
    if not isinstance(vectors, int) or vectors < 1:
        raise ValueError(f"vectors: expected a whole number of at least 1, got {vectors!r}")
    check_noun(sd, noun)
    captions = concept.captions_with(token, images, captions)
    examples = concept.examples(sd, images, token, templates=templates, captions=captions, flip=flip)
    made = begin(sd, "textual_inversion", [Term(examples)], settings or default(sd), token=token, noun=noun)
    return add_tokens(made, sd, {token: noun}, vectors)


def default(sd: StableDiffusion) -> Settings:
    """The settings that suit a model: short and steep for the miniature, the published ones otherwise."""
    return TOYBOX if sd.name == "toybox" else SD15


def add_tokens(made: Recipe, sd: StableDiffusion, words: dict[str, str], vectors: int = 1) -> Recipe:
    """Let rows for new words learn; {"<v>": "cat"} says what each starts from."""
    names = {name: noun for token, noun in words.items() for name in rows_of(token, vectors)}
    for token in names:
        if trouble := token_trouble(sd.tokenizer, token):
            raise ValueError(f"token: {trouble}")
    made.tokens = NewTokens.attach(sd.text_encoder, sd.tokenizer, names)
    made.undo.callback(made.tokens.detach)
    made.params["tokens"] = made.tokens.rows
    made.about["rows"] = list(names)
    return made


def rows_of(token: str, vectors: int) -> list[str]:
    """["<v>", "<v>_1", ...]: the names of a word's rows, as diffusers has them."""
    return [token, *[f"{token}_{k}" for k in range(1, vectors)]]
