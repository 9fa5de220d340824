"""Textual Inversion: train a new word for a subject; the model itself is not changed.

Derived in: notebooks/11_textual_inversion.ipynb.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from course_lib.data.pictures import captions_with
from course_lib.latent.stable_diffusion import StableDiffusion
from course_lib.latent.text import NewTokens, check_noun, token_trouble
from course_lib.personalization.examples import OBJECT, subject_examples
from course_lib.personalization.recipe import Recipe, Settings, Term, new_recipe

SETTINGS = {
    "toybox": Settings(steps=80, lr=1e-2),
    "sd15": Settings(steps=3000, lr=2e-3, batch_size=4),  # diffusers' example: 5e-4 times its batch of 4
}


@contextmanager
def recipe(sd: StableDiffusion, images, *, noun: str = "object", token: str = "<v>", vectors: int = 1,
           templates: Sequence[str] = OBJECT, captions: Sequence[str] | None = None, flip: bool = False,
           settings: Settings | None = None) -> Iterator[Recipe]:  # fmt: skip
    """Train one new row v* of the embedding table, and nothing else.

    v* = argmin_v E || eps - eps_theta(z_t, t, c(prompt with v)) ||^2.  Source: Gal et al. 2023, Eq. 2.
    images: see `data.pictures.open_images`.  token: the new word (placeholder token), in lower case and brackets.
    noun: the words whose mean embedding it starts from (initializer token).  vectors (num_vectors): rows for the new
    word, all meant by "<v>".  templates: OBJECT, STYLE or your own; captions: a sentence for each picture instead.
    Raises ValueError for a token that exists or is not of that form, an unknown noun, or unreadable pictures.
    Derived in: notebooks/11_textual_inversion.ipynb, section "One row".
    """
    if not isinstance(vectors, int) or vectors < 1:
        raise ValueError(f"vectors: expected a whole number of at least 1, got {vectors!r}")
    check_noun(sd.tokenizer, noun)
    captions = captions_with(token, images, captions)
    examples = subject_examples(sd, images, token, templates=templates, captions=captions, flip=flip)
    recipe = new_recipe(sd, "textual_inversion", [Term(examples)], settings or SETTINGS[sd.defaults.settings],
                        token=token, noun=noun)  # fmt: skip
    with new_tokens(sd, recipe, {token: noun}, vectors):
        yield recipe


@contextmanager
def new_tokens(sd: StableDiffusion, recipe: Recipe, words: dict[str, str], vectors: int = 1) -> Iterator[None]:
    """Add trainable rows for new words to a recipe; words: {"<v>": "cat"}, each with the word it starts from."""
    rows = {name: noun for token, noun in words.items() for name in rows_of(token, vectors)}
    for token in rows:
        if trouble := token_trouble(sd.tokenizer, token):
            raise ValueError(f"token: {trouble}")
    with NewTokens.attach(sd, rows) as recipe.tokens:
        recipe.params["tokens"] = recipe.tokens.rows
        recipe.about["rows"] = list(rows)
        yield


def rows_of(token: str, vectors: int) -> list[str]:
    """["<v>", "<v>_1", ...]: the names of a word's rows, as in diffusers."""
    return [token, *[f"{token}_{k}" for k in range(1, vectors)]]
