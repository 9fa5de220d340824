"""Custom Diffusion: train only the keys and values of the cross-attention, and a word.

Derived in: notebooks/13_custom_diffusion.ipynb.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from course_lib.data.pictures import captions_with
from course_lib.latent import text
from course_lib.latent.stable_diffusion import StableDiffusion
from course_lib.latent.text import check_noun
from course_lib.personalization.examples import Examples, resized_examples, subject_examples
from course_lib.personalization.recipe import Recipe, Settings, Term, new_recipe, unfreeze
from course_lib.personalization.textual_inversion import new_tokens

SETTINGS = {"toybox": Settings(steps=80, lr=1e-3), "sd15": Settings(steps=250, lr=8e-5, batch_size=8)}

LONGER = {"toybox": 0, "sd15": 1}  # chosen by measurements/tuning.py; the paper: 250 steps for one subject, 500 for two


@dataclass
class SubjectPictures:
    """One of several subjects that are trained together: its pictures, new word and class noun."""

    images: object
    token: str
    noun: str
    captions: Sequence[str] | None = None


@contextmanager
def recipe(sd: StableDiffusion, images, *, noun: str, token: str = "<v>", captions: Sequence[str] | None = None,
           **options) -> Iterator[Recipe]:  # fmt: skip
    """Train W^K and W^V of every cross-attention, and one row for a new word; options as in `joint_recipe`.

    Prompts hold "<v> cat": the new word (modifier token) and its noun.  Source: Kumari et al. 2023, section 3.1.
    Derived in: notebooks/13_custom_diffusion.ipynb, section "Keys and values".
    """
    with joint_recipe(sd, [SubjectPictures(images, token, noun, captions)], **options) as recipe:
        yield recipe


@contextmanager
def joint_recipe(sd: StableDiffusion, subjects: Sequence[SubjectPictures], *, regularisation: Sequence[Examples] = (),
                 regularisation_weight: float = 1.0, augment: bool | None = None, rare: str | None = None,
                 settings: Settings | None = None) -> Iterator[Recipe]:  # fmt: skip
    """Train W^K and W^V of every cross-attention, and one row for each new word, on several subjects together.

    Their pictures are mixed, and by default the steps grow with their number, see `joint_settings`.
    Source: Kumari et al. 2023, sections 3.1 and 3.2.
    regularisation: real or generated class images, as `toybox_regularisation` returns them, one set for each subject.
    augment: show pictures without captions also small and zoomed in, see `resized_examples`; None: as suits the base
        model.  rare: the word that the tokens start from (initializer token); default the class noun of each.
    Differs from the paper: its tokens start from a rare word ("ktn"); a tokenizer with a small vocabulary has none.
    Derived in: notebooks/14_multiple_concepts.ipynb, section "All data together".
    """
    tokens = [subject.token for subject in subjects]
    if not subjects or len(set(tokens)) < len(subjects):
        raise ValueError(f"subjects: expected each with a token of its own, got {tokens}")
    settings = settings or joint_settings(sd, len(subjects))
    augment = sd.defaults.augment if augment is None else augment
    terms = [Term(_examples(sd, subject, augment, settings.seed), 1 / len(subjects)) for subject in subjects]
    terms += [Term(examples, regularisation_weight / len(regularisation)) for examples in regularisation]
    recipe = new_recipe(sd, "custom_diffusion", terms, settings, tokens=tokens, nouns=[s.noun for s in subjects],
                        token=tokens[0], noun=subjects[0].noun)  # fmt: skip
    layers = key_value_layers(sd.unet)
    with ExitStack() as undo:
        undo.enter_context(new_tokens(sd, recipe, {s.token: rare or s.noun for s in subjects}))
        weights = {f"unet.{name}.weight": layer.weight for name, layer in layers.items()}
        recipe.params |= undo.enter_context(unfreeze(weights))
        for layer in layers.values():
            undo.callback(layer.register_forward_hook(_detach_start).remove)
        yield recipe


def joint_settings(sd: StableDiffusion, subjects: int) -> Settings:
    """The settings for a number of subjects: each further one adds LONGER times the steps of one."""
    settings, longer = SETTINGS[sd.defaults.settings], LONGER[sd.defaults.settings]
    return replace(settings, steps=settings.steps * (1 + longer * (subjects - 1)))


def _examples(sd: StableDiffusion, subject: SubjectPictures, augment: bool, seed: int) -> Examples:
    check_noun(sd.tokenizer, subject.noun)
    name = f"{subject.token} {subject.noun}"
    captions = captions_with(subject.token, subject.images, subject.captions)
    if augment and not captions:
        return resized_examples(sd, subject.images, name, seed=seed)
    return subject_examples(sd, subject.images, name, captions=captions)


def key_value_layers(unet: nn.Module) -> dict[str, nn.Linear]:
    """The layers for text features: to_k and to_v of every cross-attention, 2.2 % of Stable Diffusion 1's UNet."""
    return {
        name: layer
        for name, layer in unet.named_modules()
        if name.endswith(("attn2.to_k", "attn2.to_v")) and isinstance(layer, nn.Linear)
    }


def _detach_start(layer: nn.Linear, args: tuple, output: Tensor) -> Tensor:
    """The start token's features are the same in every prompt: no gradient for them (as in the authors' code)."""
    return torch.cat([output[:, :1].detach(), output[:, 1:]], dim=1)


# ---- regularisation pictures (class images) ----


@torch.no_grad()
def similarity(sd: StableDiffusion, captions: Sequence[str], target: str) -> Tensor:
    """The similarity of each caption's nearest word to the target's last word, its noun: (N,) in [-1, 1].

    max_j cos(e(w_j), e(w*)), e(w): the mean of a word's rows in the embedding table.  1: the caption holds the noun.
    Raises ValueError for a target without words.
    Differs from the paper, which compares whole captions by CLIP's end-token feature. It reflects form, colour and
    scene more than the noun: few of the captions nearest to "a photo of a cat" name a cat.
    Derived in: notebooks/13_custom_diffusion.ipynb, section "Pictures that hold the class".
    """

    def words(prompt: str) -> list[str]:
        return [word for word, _ in text.words(sd.tokenizer, prompt)]

    said, noun = [words(caption) for caption in captions], words(target)[-1:]
    if not noun:
        raise ValueError(f"target: expected words, such as 'a photo of a cat', got {target!r}")
    rows, near = sd.text_encoder.get_input_embeddings(), {}

    def row(word: str) -> Tensor:
        ids = sd.tokenizer(word, add_special_tokens=False, return_tensors="pt").input_ids
        return rows(ids.to(sd.device))[0].float().mean(dim=0)

    for word in {word for caption in said for word in caption}:
        near[word] = 1.0 if word == noun[0] else torch.cosine_similarity(row(word), row(noun[0]), dim=0).item()
    return torch.tensor([max((near[word] for word in caption), default=-1.0) for caption in said])


def retrieve(sd: StableDiffusion, captions: Sequence[str], target: str, count: int = 200,
             threshold: float = 0.85) -> list[int]:  # fmt: skip
    """The captions nearest to the target: at most `count`, with a `similarity` above the threshold, ties in order.

    Source: Kumari et al. 2023, section 3.2 (200 pictures of LAION with a similarity above 0.85, by another measure; in
    ours 0.85 means the noun itself, or a word that is nearly a synonym).
    Returns indices, nearest first.  Raises ValueError if no caption is near enough.
    Derived in: notebooks/13_custom_diffusion.ipynb, section "Pictures that hold the class".
    """
    near = similarity(sd, captions, target)
    order = near.argsort(descending=True, stable=True)[:count]
    found = [int(k) for k in order if near[k] > threshold]
    if not found:
        raise ValueError(f"threshold: expected one below the best of {len(captions)} captions for {target!r}, "
                         f"{near.max():.2f}, got {threshold}; lower it, name the class as the captions do, or do "
                         "without such pictures")  # fmt: skip
    return found
