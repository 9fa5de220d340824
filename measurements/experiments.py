"""The experiments of single claims: what moves (C8, C14), a word inside a name (C18), two subjects (C16, C17, C19).

measurements/claims.py runs those that its record lacks. Each returns numbers for the record; the rules that judge them
are in course_lib/evaluation/rules_methods.py.
"""

import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from methods import PRIOR, SUBJECTS, VARIANTS, Sampler, pictures_of
from PIL import Image
from torch import Tensor

from course_lib.evaluation import rules_methods
from course_lib.evaluation.personalized import by_prompt, pixels
from course_lib.personalization import custom_diffusion, dreambooth, textual_inversion
from course_lib.personalization.concept import Concept, applied, concept_of, only_tokens
from course_lib.personalization.examples import subject_examples
from course_lib.personalization.finetune import finetune
from course_lib.personalization.merge import caption_features, merge_concepts, word_features
from course_lib.personalization.recipe import Recipe, Settings, Term
from course_lib.personalization.regularisation import toybox_regularisation
from course_lib.plots import montage
from course_lib.toybox import subjects
from course_lib.toybox.captions import corpus
from course_lib.toybox.scenes import SCENES
from course_lib.toybox.world import Spec

ABLE = [name for name, one in subjects.SUBJECTS.items() if one.look and name not in ("tofu", "tockle")]
PAIRS, READABLE = 6, 0.6  # at most this many pairs; the judge has to find both nouns in this share of the truth
TOKENS = ("<v1>", "<v2>")
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


def changes(sampler: Sampler) -> dict:
    """All weights trained on a subject, and as a control on the model's own pictures of its class: subject -> rows.

    excess: for each kind of layer, the log of each weight's relative change over that of the control, a mean over
    seeds.  subject, control: the mean relative change of the kinds.  fidelity: subject fidelity, one number a prompt,
    with all changes, with those of one kind alone, with "rest" scaled to the size of the change of cross-attention, and
    with none.  The batch is large and the rate low, so that the weights move more by the pictures than by chance.
    """
    found = {}
    for name in SUBJECTS[:4]:
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
        found[name] = {"fidelity": fidelity, "excess": {}, "subject": {}, "control": {}}
        for kind in dict.fromkeys(kinds):
            rows = [k for k, one in enumerate(kinds) if one == kind]
            found[name]["excess"][kind] = [round(logs[k], 3) for k in rows]
            for which in relative:
                found[name][which][kind] = round(moved[which][rows].mean().item(), 5)
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


# ---- C16, C17, C19: two subjects ----


class Pair:
    """Two subjects: prompts about both, the pictures that the renderer draws of both, and their scores."""

    def __init__(self, sampler: Sampler, names: tuple[str, str]):
        self.sampler, self.names = sampler, names
        self.subjects = [subjects.SUBJECTS[name] for name in names]
        self.nouns = tuple(subject.noun for subject in self.subjects)
        self.references = [sampler.scorer.references(name) for name in names]

    def prompts(self, first: str, second: str) -> list[str]:
        return [f"a photo of a {first} next to a {second} {scene}" for scene in SCENES]

    def draw(self, first: str, second: str) -> Tensor:
        return self.sampler.draw(self.prompts(first, second), seed=11)

    def ground_truth(self) -> Tensor:
        one, two = self.subjects
        other = Spec(two.noun, "red", "plain", "", look=two.look, x=0.75, y=0.71, size=0.46, flip=True, seed=1)
        place = dict(relation="next to", other=other, x=0.27, y=0.7, size=0.48)
        return pixels([one.spec(seed=0, scene=scene, **place) for scene in SCENES])

    def score(self, x: Tensor, each: int) -> dict[str, Tensor]:
        """The scores of both subjects and of both nouns, one number a prompt; `each` pictures of a prompt."""
        scorer = self.sampler.scorer
        prompts = [prompt for prompt in self.prompts(*self.nouns) for _ in range(each)]
        scores = scorer.two_subjects(x, self.references) | {
            "both_nouns": scorer.both_nouns(x, self.nouns), "clip_t": scorer.clip_t(x, prompts)}  # fmt: skip
        return {key: by_prompt(value, each) for key, value in scores.items()}


def pairs(sampler: Sampler) -> dict:
    """ "one two" -> the share with both nouns in the untouched model's pictures and in the ground truth.

    Of all subjects but those that the methods' settings were chosen on; the order is that of the prompt.
    """
    rows = {}
    for names in itertools.permutations(ABLE, 2):
        pair = Pair(sampler, names)
        drawn = {"untouched": pair.draw(*pair.nouns), "truth": pair.ground_truth()}
        shares = {key: sampler.scorer.both_nouns(x, pair.nouns).mean().item() for key, x in drawn.items()}
        rows[" ".join(names)] = {key: round(share, 4) for key, share in shares.items()}
    return rows


def chosen(rows: dict) -> list[tuple[str, str]]:
    """The pairs to measure, each in its better order: those that meet the premise of C16, the best drawn first.

    Where none does, the best drawn pair alone: C17, on merging, needs no picture with both.
    No method is looked at to choose them.
    """
    found = {}
    for names in sorted((n for n in rows if rows[n]["truth"] >= READABLE), key=lambda n: -rows[n]["untouched"]):
        found.setdefault(frozenset(names.split()), names)
    best = list(found.values())
    able = [names for names in best if rows[names]["untouched"] >= rules_methods.PREMISE]
    return [tuple(names.split()) for names in (able or best[:1])[:PAIRS]]


def two_subjects(sampler: Sampler, names: tuple[str, str]) -> dict:
    """Joint training, merging, averaging and DreamBooth on the same two subjects, prompts and noises."""
    sd, pair, scores, each = sampler.sd, Pair(sampler, names), {}, sampler.args.images
    words = [f"{token} {noun}" for token, noun in zip(TOKENS, pair.nouns, strict=True)]

    def look(label: str, *prompts: str) -> None:
        x = pair.draw(*prompts)
        scores[label] = rounded(pair.score(x, each))
        path: Path = sampler.args.samples / f"{'_'.join(names)}_{label}.png"
        Image.fromarray(montage(x[::each], len(SCENES), gap=0)).save(path)

    sampler.args.samples.mkdir(parents=True, exist_ok=True)
    look("untouched model", *pair.nouns)
    scores["ground truth"] = rounded(pair.score(pair.ground_truth(), 1))
    learnt = [custom_diffusion.SubjectPictures(pictures_of(name), token, noun)
              for name, token, noun in zip(names, TOKENS, pair.nouns, strict=True)]  # fmt: skip
    regularisation = [toybox_regularisation(sd, noun, 200) for noun in pair.nouns]
    with custom_diffusion.joint_recipe(sd, learnt, regularisation=regularisation) as recipe:
        train(sampler, recipe)
        look("joint", *words)
    alone = [_learn_one(sampler, *one) for one in zip(learnt, regularisation, strict=True)]
    start = time.perf_counter()
    merged = merge_concepts(sd, alone, corpus(500))
    seconds = time.perf_counter() - start
    for label, concept in {"merged": merged, "averaged": averaged(alone, merged)}.items():
        with applied(sd, concept):
            look(label, *words)
    with two_dreambooths(sampler, pair) as recipe:
        train(sampler, recipe)
        look("dreambooth", *(f"{token} {noun}" for token, noun in zip(("sks", "zwx"), pair.nouns, strict=True)))
    return dict(scores=scores, merge=constraint(sampler, alone, merged) | {"seconds": round(seconds, 2)})


def _learn_one(sampler: Sampler, subject: custom_diffusion.SubjectPictures, regularisation) -> Concept:
    with custom_diffusion.joint_recipe(sampler.sd, [subject], regularisation=[regularisation]) as recipe:
        train(sampler, recipe)
        return concept_of(recipe)


def averaged(concepts: list[Concept], like: Concept) -> Concept:
    """The mean of the weights, with the words of all, to compare merging with."""
    mean = {n: torch.stack([c.tensors[n] for c in concepts]).mean(0) for n in concepts[0].tensors if n != "tokens"}
    return replace(like, tensors=mean | {"tokens": like.tensors["tokens"]})


@contextmanager
def two_dreambooths(sampler: Sampler, pair: Pair) -> Iterator[Recipe]:
    """DreamBooth on both sets of pictures at once, each with a rare word and with pictures of its class."""
    sd, (one, other) = sampler.sd, pair.nouns
    prior = dreambooth.prior_examples(sd, one, PRIOR)
    settings = dreambooth.SETTINGS[sd.defaults.settings]
    settings = replace(settings, steps=settings.steps * 3 // 2)  # half as many again, as in joint training
    examples = subject_examples(sd, pictures_of(pair.names[1]), f"zwx {other}", templates=("a photo of a {}",))
    others = [Term(examples), Term(dreambooth.prior_examples(sd, other, PRIOR))]
    with dreambooth.recipe(sd, pictures_of(pair.names[0]), noun=one, prior=prior, settings=settings) as recipe:
        recipe.terms += others
        for term in recipe.terms:
            term.weight /= 2
        yield recipe


@torch.no_grad()
def constraint(sampler: Sampler, alone: list[Concept], merged: Concept) -> dict:
    """The merged weights' distance from each concept's constraint, and from an independent solver's weights.

    The solver takes the conditions of the optimum as one linear system,  [A C^T; C 0] [dW^T; m] = [0; V^T - C W_0^T].
    """
    with applied(sampler.sd, *[only_tokens(concept) for concept in alone]):
        targets = [word_features(sampler.sd, concept.about).double().cpu() for concept in alone]
        C_reg = torch.cat([caption_features(sampler.sd, caption)[0] for caption in dict.fromkeys(corpus(500))])
    C, C_reg = torch.cat(targets), C_reg.double().cpu()
    A = C_reg.T @ C_reg
    A += merged.settings["ridge"] * A.diagonal().mean() * torch.eye(len(A), dtype=A.dtype)
    K = torch.cat([torch.cat([A, C.T], 1), torch.cat([C, torch.zeros(len(C), len(C), dtype=A.dtype)], 1)])
    residual, mean_residual, gap = [], [], []
    for name in (name for name in merged.tensors if name != "tokens"):
        own = [concept.tensors[name].double() for concept in alone]
        V = torch.cat([W @ target.T for W, target in zip(own, targets, strict=True)], dim=1)
        W, W_0 = merged.tensors[name].double(), sampler.weights[name.removeprefix("unet.")].double().cpu()
        residual.append(((W @ C.T - V).norm() / V.norm()).item())
        mean_residual.append(((sum(own) / len(own) @ C.T - V).norm() / V.norm()).item())
        right = torch.cat([torch.zeros(len(A), len(W), dtype=A.dtype), (V - W_0 @ C.T).T])
        solved = torch.linalg.lstsq(K, right, driver="gelsd").solution[: len(A)].T
        gap.append(((W - W_0 - solved).norm() / solved.norm()).item())
    return dict(residual=max(residual), residual_of_average=max(mean_residual), gap_to_solver=max(gap),
                layers=len(gap), condition=torch.linalg.cond(C_reg.T @ C_reg).item())  # fmt: skip


# in the order in which they are run; "pairs" decides which two subjects are measured
SINGLE: dict[str, Callable[[Sampler], dict]] = {"c8": one_row, "changes": changes, "compound": compound, "pairs": pairs}
