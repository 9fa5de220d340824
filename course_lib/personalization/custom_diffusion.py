"""Custom Diffusion: only the keys and values of the cross-attention learn, and a word.

Derived in: notebooks/13_custom_diffusion.ipynb.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from course_lib.latent import text
from course_lib.latent.stable_diffusion import StableDiffusion
from course_lib.personalization import concept
from course_lib.personalization.concept import OBJECT, Examples
from course_lib.personalization.dreambooth import check_noun
from course_lib.personalization.finetune import Recipe, Settings, Term, begin, learn
from course_lib.personalization.textual_inversion import add_tokens

TOYBOX = Settings(steps=300, lr=5e-4)
SD15 = Settings(steps=250, lr=8e-5, batch_size=8)


@dataclass
class Subject:
    """One of the concepts that are learnt together: pictures, the new word and the class noun."""

    images: object
    token: str
    noun: str
    captions: Sequence[str] | None = None


def recipe(sd: StableDiffusion, subjects: Subject | Sequence[Subject], *, regularisation: Sequence[Examples] = (),
           regularisation_weight: float = 1.0, augment: bool | None = None, rare: str | None = None,
           settings: Settings | None = None) -> Recipe:  # fmt: skip
    """W^K and W^V of every cross-attention learn, and one row for each new word.

    Source: Kumari et al. 2023, sections 3.1 and 3.2.  The prompt says "<v> cat": the word modifies its class noun.
    subjects: one, or several to learn together (their pictures are mixed, the steps grow with their number).
    regularisation: real or generated pictures of the classes, as `toybox_regularisation` gives, one for each subject.
    augment: pictures without captions also small and zoomed in, with words that say so, see `resized_examples`; None:
        unless the model is the miniature, in whose 64 pixels a small picture keeps too little of a subject.
    rare: the word that the tokens start from; default the class noun of each.
    Differs from the paper: its tokens start from a rare word ("ktn"); a tokenizer of small vocabulary has none.
    Derived in: notebooks/13_custom_diffusion.ipynb, section "Keys and values".
    """
    subjects = [subjects] if isinstance(subjects, Subject) else list(subjects)
    if not subjects or len({subject.token for subject in subjects}) < len(subjects):
        raise ValueError(f"subjects: expected each with a token of its own, got {[s.token for s in subjects]}")
    if settings is None:
        settings = TOYBOX if sd.name == "toybox" else SD15
        settings = replace(settings, steps=settings.steps * (1 + len(subjects)) // 2)
    terms = []
    for subject in subjects:
        check_noun(sd, subject.noun)
        name = f"{subject.token} {subject.noun}"
        captions = concept.captions_with(subject.token, subject.images, subject.captions)
        if (sd.name != "toybox" if augment is None else augment) and not captions:
            examples = concept.resized_examples(sd, subject.images, name, seed=settings.seed)
        else:
            examples = concept.examples(sd, subject.images, name, templates=OBJECT, captions=captions)
        terms.append(Term(examples, 1 / len(subjects)))
    terms += [Term(examples, regularisation_weight / len(regularisation)) for examples in regularisation]
    words = {subject.token: rare or subject.noun for subject in subjects}
    made = begin(sd, "custom_diffusion", terms, settings, tokens=list(words), nouns=[s.noun for s in subjects],
                 token=subjects[0].token, noun=subjects[0].noun)  # fmt: skip
    try:
        add_tokens(made, sd, words)
        layers = key_value_layers(sd.unet)
        made.params |= learn(made.undo, {f"unet.{name}.weight": layer.weight for name, layer in layers.items()})
        for layer in layers.values():
            made.undo.callback(layer.register_forward_hook(_detach_start).remove)
    except BaseException:
        made.close()
        raise
    return made


def key_value_layers(unet: nn.Module) -> dict[str, nn.Linear]:
    """The layers that text goes through: to_k and to_v of every cross-attention, 2.2 % of Stable Diffusion 1's UNet."""
    return {
        name: layer
        for name, layer in unet.named_modules()
        if name.endswith(("attn2.to_k", "attn2.to_v")) and isinstance(layer, nn.Linear)
    }


def _detach_start(layer: nn.Linear, args: tuple, output: Tensor) -> Tensor:
    """The start token means the same in every prompt, so nothing is learnt from it (the authors' code does this)."""
    return torch.cat([output[:, :1].detach(), output[:, 1:]], dim=1)


# ---- regularisation pictures ----


@torch.no_grad()
def similarity(sd: StableDiffusion, captions: Sequence[str], target: str) -> Tensor:
    """How near the nearest word of each caption comes to the target's last word, its noun: (N,) in [-1, 1].

    max_j cos(e(w_j), e(w*)), e(w): the mean of a word's rows in the embedding table.  1: the caption holds the noun.
    Raises ValueError for a target without words.
    Differs from the paper, which compares whole captions, at CLIP's end token: that feature tells the form of a
    sentence, its colours and its scene before its noun, and of the captions nearest to "a photo of a cat" few name one.
    Derived in: notebooks/13_custom_diffusion.ipynb, section "Pictures that hold the class".
    """
    words = lambda prompt: [word for word, _ in text.words(sd.tokenizer, prompt)]  # noqa: E731
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
    """Which captions speak of the target: the `count` nearest above a `similarity`, equally near ones in their order.

    Source: Kumari et al. 2023, section 3.2 (200 pictures of LAION with a similarity above 0.85; theirs is another
    measure, so the number means another thing here: the noun itself, or a word that is nearly a synonym).
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
