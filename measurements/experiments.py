"""The experiments of single claims: what moves (C8), which weights change (C14), a word inside a name (C18).

measurements/claims.py runs those that its record lacks. Each returns numbers for the record; the rules that judge them
are in course_lib/evaluation/rules_methods.py.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from methods import SUBJECTS, VARIANTS, Sampler, pictures_of
from torch import Tensor

from course_lib.evaluation import rules_methods
from course_lib.evaluation.personalized import by_prompt
from course_lib.personalization import custom_diffusion, dreambooth, textual_inversion
from course_lib.personalization.finetune import finetune
from course_lib.personalization.recipe import Recipe, Settings, Term
from course_lib.personalization.regularisation import toybox_regularisation
from course_lib.toybox import subjects

COMPOUND = "castle"  # "<v> castle cat": a name that contains a word with a meaning of its own


def train(sampler: Sampler, recipe: Recipe) -> None:
    for _ in finetune(sampler.sd, recipe):
        pass


def rounded(scores: dict[str, Tensor]) -> dict[str, list[float]]:
    return {name: [round(x, 4) for x in values.tolist()] for name, values in scores.items()}


# ---- C8: what moves ----


def one_row(sampler: Sampler) -> dict:
    """A short Textual Inversion with weight decay; every tensor is compared with its old value."""
    sd = sampler.sd
    parts = {"vae": sd.vae, "unet": sd.unet, "text_encoder": sd.text_encoder}

    def state() -> dict[str, Tensor]:
        return {f"{part}.{n.replace('.table', '')}": p.detach().clone() for part, net in parts.items()
                for n, p in net.named_parameters() if not n.endswith("rows")}  # fmt: skip

    before = state()
    settings = replace(textual_inversion.SETTINGS[sd.defaults.settings], steps=20, weight_decay=0.1)
    with textual_inversion.recipe(sd, pictures_of("mochi"), token="<v>", noun="cat", settings=settings) as recipe:
        first = recipe.tokens.rows.detach().clone()
        train(sampler, recipe)
        found = rules_methods.c8(before, state(), first, recipe.tokens.rows.detach())
    return dict(verdict=found.verdict, measured=f"20 steps with weight decay 0.1: {found.measured}",
                values=found.values)  # fmt: skip


# ---- C14: which weights change, and which carry the subject ----


def kind_of(name: str) -> str:
    """The kind of layer that a weight of the UNet belongs to."""
    return "cross-attention" if ".attn2." in name else "self-attention" if ".attn1." in name else "rest"


def changes(sampler: Sampler, name: str) -> dict:
    """All weights trained on a subject, and as a control on the model's own pictures of its class.

    excess: for each kind of layer, the log of each weight's relative change over that of the control, a mean over
    seeds.  subject, control: the mean relative change of the kinds.  fidelity: subject fidelity, one number a prompt,
    with all changes, with those of one kind alone, with "rest" scaled to the size of the change of cross-attention, and
    with none.  The batch is large and the rate low, so that the weights move more by the pictures than by chance.
    """
    relative = {"subject": [], "control": []}
    for seed in range(3):
        tuned = {which: _tuned(sampler, name, which == "control", seed) for which in relative}
        for which, weights in tuned.items():
            relative[which].append([_relative(weights[n], sampler.weights[n]) for n in weights])
        if seed == 0:
            fidelity = {part: _transplanted(sampler, name, change)
                        for part, change in _parts(sampler, tuned["subject"]).items()}  # fmt: skip
    kinds = [kind_of(n) for n in tuned["subject"]]
    moved = {which: torch.tensor(rows).mean(0) for which, rows in relative.items()}
    logs = (torch.tensor(relative["subject"]).log() - torch.tensor(relative["control"]).log()).mean(0).tolist()
    found = {"fidelity": fidelity, "excess": {}, "subject": {}, "control": {}}
    for kind in dict.fromkeys(kinds):
        rows = [k for k, one in enumerate(kinds) if one == kind]
        found["excess"][kind] = [round(logs[k], 3) for k in rows]
        for which in relative:
            found[which][kind] = round(moved[which][rows].mean().item(), 5)
    return found


def _tuned(sampler: Sampler, name: str, control: bool, seed: int) -> dict[str, Tensor]:
    """The UNet's weights after a training of all of them, without biases and normalisations."""
    noun, settings = subjects.SUBJECTS[name].noun, Settings(steps=100, lr=5e-5, batch_size=32, seed=seed)
    with VARIANTS["dreambooth_no_prior"].recipe(sampler.sd, name, settings=settings) as recipe:
        if control:
            recipe.terms = [Term(dreambooth.prior_examples(sampler.sd, noun, 5))]  # as many as there are of the subject
        train(sampler, recipe)
        trained = {n.removeprefix("unet."): param for n, param in recipe.params.items() if param.ndim > 1}
        return {n: param.detach().float().cpu().clone() for n, param in trained.items()}


def _relative(W: Tensor, W_0: Tensor) -> float:
    return ((W - W_0.float().cpu()).norm() / W_0.float().norm().cpu()).item()


def _parts(sampler: Sampler, tuned: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Changes of weights to look at one by one: all, none, each kind alone, and "rest" as large as cross-attention."""
    change = {n: W - sampler.weights[n].float().cpu() for n, W in tuned.items()}
    parts = {"all": change, "none": {}}
    for kind in ("cross-attention", "self-attention", "rest"):
        parts[kind] = {n: dW for n, dW in change.items() if kind_of(n) == kind}
    size = {kind: torch.stack([dW.norm() for dW in part.values()]).norm() for kind, part in parts.items() if part}
    scale = size["cross-attention"] / size["rest"]
    return parts | {"rest, scaled": {n: scale * dW for n, dW in parts["rest"].items()}}


@torch.no_grad()
def _transplanted(sampler: Sampler, name: str, change: dict[str, Tensor]) -> list[float]:
    """Subject fidelity, one number a prompt, of the model with these changes of weights."""
    subject, weights = subjects.SUBJECTS[name], dict(sampler.sd.unet.named_parameters())
    words = VARIANTS["dreambooth_no_prior"].name(subject.noun)
    try:
        for n, dW in change.items():
            weights[n] += dW.to(weights[n])
        values = sampler.subject_fidelity(sampler.draw_subject(subject, words), sampler.scorer.references(name))
    finally:
        for n in change:
            weights[n].copy_(sampler.weights[n])
    return [round(v, 3) for v in values.tolist()]


# ---- C18: a word inside a name ----


def compound(sampler: Sampler) -> dict:
    """Teach mochi as "<v> castle cat", with and without regularisation, and look at "a photo of a castle"."""
    sd, score, each = sampler.sd, sampler.scorer, sampler.args.images
    references, before = score.references("mochi"), sampler.draw_class(COMPOUND)

    def scores(x: Tensor) -> dict:
        values = dict(class_drift=score.subject_fidelity(x, references), noun_share=score.noun_share(x, COMPOUND),
                      class_shift=score.class_shift(x, before))  # fmt: skip
        return rounded({key: by_prompt(value, each) for key, value in values.items()})

    rows = {"untouched": scores(before)}
    folder, name_with_word = pictures_of("mochi"), f"{COMPOUND} cat"
    both = [toybox_regularisation(sd, noun, 200) for noun in (COMPOUND, "cat")]
    for name, regularisation in {"without": [], "with": both}.items():
        with custom_diffusion.recipe(sd, folder, noun=name_with_word, regularisation=regularisation) as recipe:
            train(sampler, recipe)
            rows[name] = scores(sampler.draw_class(COMPOUND))
    return rows


# where the record keeps an experiment -> what measures it
EXPERIMENTS: dict[tuple[str, ...], Callable[[Sampler], dict]] = {
    ("c8",): one_row,
    ("compound",): compound,
    **{("changes", name): partial(changes, name=name) for name in SUBJECTS[:4]},
}
