"""Two subjects in one picture (C16, C17, C19): writes data/results/pairs.json.

    python measurements/pairs.py                  everything; a killed run goes on with the missing rows

First the untouched model draws every ordered pair of subjects' nouns: "nouns" has the share of its pictures, and of
the renderer's, with both. The pairs of the claims are those with the largest shares, whatever the methods do
(`chosen`). Each is learnt by every way of teaching two subjects, once for each training seed, and drawn for the same
prompts from the same noises. The scores are those of `Pair.score`, one number a prompt.
    joint            Custom Diffusion on all pictures together
    joint, pairs     the same, with a third term: pictures of both nouns side by side, of other individuals
    merged           two trained concepts merged by the closed form;  averaged: their weights averaged instead
    dreambooth       DreamBooth on all pictures together, with a rare word and class pictures for each
"""

import argparse
import itertools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import records
import torch
from experiments import rounded, train
from methods import PRIOR, SEEDS, Sampler, add_sampling, pictures_of
from PIL import Image
from torch import Tensor

from course_lib.evaluation import rules_methods
from course_lib.evaluation.personalized import by_prompt, pixels
from course_lib.latent.stable_diffusion import StableDiffusion
from course_lib.personalization import custom_diffusion, dreambooth
from course_lib.personalization.concept import Concept, applied, concept_of, only_tokens
from course_lib.personalization.examples import Examples, encode, subject_examples
from course_lib.personalization.merge import caption_features, merge_concepts, word_features
from course_lib.personalization.recipe import Recipe, Term
from course_lib.personalization.regularisation import toybox_regularisation
from course_lib.plots import montage
from course_lib.toybox import subjects
from course_lib.toybox.captions import caption, corpus
from course_lib.toybox.scenes import SCENES
from course_lib.toybox.world import Spec, sample_spec

ABLE = [name for name, one in subjects.SUBJECTS.items() if one.look and name not in ("tofu", "tockle")]
PAIRS, READABLE = 6, 0.6  # at most this many pairs; the judge has to find both nouns in this share of the truth
TOKENS = ("<v1>", "<v2>")


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


def both_nouns(sampler: Sampler, names: tuple[str, str]) -> dict:
    """The share with both nouns in the untouched model's pictures and in the ground truth, named in this order."""
    pair = Pair(sampler, names)
    drawn = {"untouched": pair.draw(*pair.nouns), "truth": pair.ground_truth()}
    return {key: round(sampler.scorer.both_nouns(x, pair.nouns).mean().item(), 4) for key, x in drawn.items()}


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


def known(sampler: Sampler, names: tuple[str, str]) -> dict:
    """Scores of the untouched model, by the plain nouns, and of the renderer."""
    pair = Pair(sampler, names)
    x = pair.draw(*pair.nouns)
    save(sampler, x, names, "untouched model")
    return {"untouched model": rounded(pair.score(x, sampler.args.images)),
            "ground truth": rounded(pair.score(pair.ground_truth(), 1))}  # fmt: skip


def two_subjects(sampler: Sampler, names: tuple[str, str], seed: int) -> dict:
    """Every way of teaching two subjects, on the same pictures, prompts and noises: "scores" by label, and "merge"."""
    sd, pair, scores = sampler.sd, Pair(sampler, names), {}
    words = [f"{token} {noun}" for token, noun in zip(TOKENS, pair.nouns, strict=True)]

    def look(label: str, *prompts: str) -> None:
        x = pair.draw(*prompts)
        scores[label] = rounded(pair.score(x, sampler.args.images))
        save(sampler, x, names, f"{label} {seed}")

    learnt = [custom_diffusion.SubjectPictures(pictures_of(name), token, noun)
              for name, token, noun in zip(names, TOKENS, pair.nouns, strict=True)]  # fmt: skip
    of_class = [toybox_regularisation(sd, noun, 200) for noun in pair.nouns]
    settings = replace(custom_diffusion.joint_settings(sd, 2), seed=seed)
    for label, others in {"joint": [], "joint, pairs": [side_by_side(sd, pair.nouns)]}.items():
        with custom_diffusion.joint_recipe(sd, learnt, regularisation=of_class + others, settings=settings) as recipe:
            train(sampler, recipe)
            look(label, *words)
    alone = [_learn_one(sampler, *one, seed) for one in zip(learnt, of_class, strict=True)]
    start = time.perf_counter()
    merged = merge_concepts(sd, alone, corpus(500))
    seconds = time.perf_counter() - start
    for label, concept in {"merged": merged, "averaged": averaged(alone, merged)}.items():
        with applied(sd, concept):
            look(label, *words)
    with two_dreambooths(sampler, pair, seed) as recipe:
        train(sampler, recipe)
        look("dreambooth", *(f"{token} {noun}" for token, noun in zip(("sks", "zwx"), pair.nouns, strict=True)))
    return dict(scores=scores, merge=constraint(sampler, alone, merged) | {"seconds": round(seconds, 2)})


def side_by_side(sd: StableDiffusion, nouns: tuple[str, str], count: int = 100) -> Examples:
    """Renderings of two nouns next to each other, everything else at random, with captions that name both."""
    rng, specs = np.random.default_rng(15), []
    for _ in range(count):
        spec = sample_spec(rng, nouns[0], relation="next to", style="plain")
        specs.append(replace(spec, other=replace(spec.other, noun=nouns[1])))
    return encode(sd, pixels(specs), [(caption(spec, rng, name_relation=True),) for spec in specs])


def save(sampler: Sampler, x: Tensor, names: tuple[str, str], label: str) -> None:
    """The first sample of each prompt, in a row."""
    sampler.args.samples.mkdir(parents=True, exist_ok=True)
    name = "_".join((*names, *label.replace(",", "").split()))
    Image.fromarray(montage(x[:: sampler.args.images], len(SCENES), gap=0)).save(sampler.args.samples / f"{name}.png")


def _learn_one(sampler: Sampler, subject: custom_diffusion.SubjectPictures, regularisation, seed: int) -> Concept:
    settings = replace(custom_diffusion.joint_settings(sampler.sd, 1), seed=seed)
    with custom_diffusion.joint_recipe(
        sampler.sd, [subject], regularisation=[regularisation], settings=settings
    ) as recipe:
        train(sampler, recipe)
        return concept_of(recipe)


def averaged(concepts: list[Concept], like: Concept) -> Concept:
    """The mean of the weights, with the words of all, to compare merging with."""
    mean = {n: torch.stack([c.tensors[n] for c in concepts]).mean(0) for n in concepts[0].tensors if n != "tokens"}
    return replace(like, tensors=mean | {"tokens": like.tensors["tokens"]})


@contextmanager
def two_dreambooths(sampler: Sampler, pair: Pair, seed: int) -> Iterator[Recipe]:
    """DreamBooth on both sets of pictures at once, each with a rare word and with pictures of its class."""
    sd, (one, other) = sampler.sd, pair.nouns
    prior = dreambooth.prior_examples(sd, one, PRIOR)
    longer = custom_diffusion.joint_settings(sd, 2).steps / custom_diffusion.joint_settings(sd, 1).steps
    settings = dreambooth.SETTINGS[sd.defaults.settings]
    settings = replace(settings, steps=round(longer * settings.steps), seed=seed)
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_sampling(parser, "pairs.json", images=4)
    parser.add_argument("--samples", type=Path, default=Path("runs/pairs"), help="folder for first samples")
    args = parser.parse_args()
    sampler = Sampler(args)
    setting = sampler.setting() | dict(made_by="measurements/pairs.py")
    records.start(args.out, setting, fresh=args.fresh)

    def fill(*keys: str, measure, **options) -> dict:
        return records.fill(args.out, setting, keys, measure, sampler, **options)

    nouns = {" ".join(names): fill("nouns", " ".join(names), measure=both_nouns, names=names)
             for names in itertools.permutations(ABLE, 2)}  # fmt: skip
    for names in chosen(nouns):
        print(*names, nouns[" ".join(names)], flush=True)
        fill("rows", " ".join(names), "known", measure=known, names=names)
        for seed in SEEDS:
            row = fill("rows", " ".join(names), str(seed), measure=two_subjects, names=names, seed=seed)
            print(*names, seed, {label: {key: round(sum(v) / len(v), 3) for key, v in found.items()}
                                 for label, found in row["scores"].items()}, flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
