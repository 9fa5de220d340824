"""Two subjects in one picture (C16, C17, C19): writes data/results/pairs.json, and pairs_samples.png beside it.

    python measurements/pairs.py                  everything; a killed run goes on with the missing rows

The pairs are chosen by the untouched model alone: it draws every ordered pair of nouns, 12 pictures each ("drawn"), and
those that it draws best again, 48 from other noises ("again"), beside the share that the judge finds in the renderer's
pictures of two individuals ("truth"). Measured are at most PAIRS of them (`chosen`).
The subjects are those of course_lib/toybox/subjects.py or, for a noun that none of them has, an individual drawn at
random. Each pair is learnt by every way of teaching two subjects, once for each training seed, and drawn for the same
prompts from the same noises. The scores are those of `Pair.score`, one number a prompt. The methods' own prompts are
drawn before any training, too ("untrained").
    joint            Custom Diffusion on all pictures together
    joint, pairs     the same, with a third term: pictures of both nouns side by side, of other individuals
    merged           two trained concepts merged by the closed form;  averaged: their weights averaged instead
    dreambooth       DreamBooth on all pictures together, with a rare word and class pictures for each
"""

import argparse
import itertools
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import records
import torch
from experiments import rounded, train
from methods import PRIOR, SEEDS, TUNED_ON, Sampler, add_sampling
from PIL import Image
from torch import Tensor

from course_lib.evaluation import rules_methods
from course_lib.evaluation.personalized import by_prompt, pixels
from course_lib.latent.text import NewTokens
from course_lib.personalization import custom_diffusion, dreambooth
from course_lib.personalization.concept import Concept, applied, concept_of, only_tokens
from course_lib.personalization.examples import subject_examples
from course_lib.personalization.merge import caption_features, merge_concepts, word_features
from course_lib.personalization.recipe import Recipe, Term
from course_lib.personalization.regularisation import toybox_pairs, toybox_regularisation
from course_lib.plots import montage
from course_lib.toybox import subjects
from course_lib.toybox.captions import corpus
from course_lib.toybox.scenes import SCENES
from course_lib.toybox.world import NOUNS, Spec, render

PAIRS, READABLE = 6, 0.6  # at most this many pairs; the judge has to find both nouns in this share of the truth
AGAIN = 40  # so many pairs are drawn again
TOKENS, RARE = ("<v1>", "<v2>"), ("sks", "zwx")  # of Custom Diffusion, and of DreamBooth
SHOWN, COLUMNS = ("ground truth", "untouched model", "joint 0", "joint, pairs 0", "merged 0", "dreambooth 0"), 6
PLACES = ((0.27, 0.48, 0.46), (0.73, 0.46, 0.48), (0.25, 0.44, 0.5), (0.75, 0.5, 0.44))  # place of one, sizes of both


def subject_of(noun: str) -> subjects.Subject:
    """The subject with this noun that no setting was chosen on, or an individual drawn at random."""
    known = {one.noun: one for name, one in subjects.SUBJECTS.items() if name not in TUNED_ON}
    return known.get(noun) or subjects.individual(noun, np.random.default_rng([list(NOUNS).index(noun), 16]))


def views_of(subject: subjects.Subject) -> list[Spec]:
    """The five pictures to learn it from."""
    if subject.name in subjects.SUBJECTS:
        return subjects.references(subject.name)
    return subjects.views(subject, 100 + list(NOUNS).index(subject.noun))


def learnt_from(subject: subjects.Subject) -> tuple[list[Image.Image], list[str]]:
    """Pictures of a subject and their captions, as in data/subjects."""
    views = views_of(subject)
    return [Image.fromarray(render(spec, 512)) for spec in views], [f"a photo of a {{}} {spec.scene}" for spec in views]


class Pair:
    """Two subjects: prompts about both, the pictures that the renderer draws of both, and their scores."""

    def __init__(self, sampler: Sampler, *pair: subjects.Subject):
        self.sampler, self.subjects, self.nouns = sampler, pair, tuple(one.noun for one in pair)

    def prompts(self, first: str, second: str) -> list[str]:
        return [f"a photo of a {first} next to a {second} {scene}" for scene in SCENES]

    def draw(self, first: str, second: str, seed: int = 11) -> Tensor:
        return self.sampler.draw(self.prompts(first, second), seed)

    def ground_truth(self) -> Tensor:
        """As many renderings of each prompt as there are PLACES."""
        one, two = self.subjects
        specs = []
        for scene, (x, size, size_two) in itertools.product(SCENES, PLACES):
            other = Spec(two.noun, "red", "plain", "", look=two.look, x=1 - x, y=0.95 - size_two / 2, size=size_two,
                         flip=x < 0.5, seed=1)  # fmt: skip
            place = dict(x=x, y=0.95 - size / 2, size=size)
            specs.append(one.spec(seed=0, scene=scene, relation="next to", other=other, **place))
        return pixels(specs)

    def score(self, x: Tensor, each: int) -> dict[str, Tensor]:
        """The scores of both subjects and of both nouns, one number a prompt; `each` pictures of a prompt."""
        scorer = self.sampler.scorer
        prompts = [prompt for prompt in self.prompts(*self.nouns) for _ in range(each)]
        references = [scorer.individual(pixels(views_of(one))) for one in self.subjects]
        scores = scorer.two_subjects(x, references) | {
            "both_nouns": scorer.both_nouns(x, self.nouns), "clip_t": scorer.clip_t(x, prompts)}  # fmt: skip
        return {key: by_prompt(value, each) for key, value in scores.items()}


def drawn(sampler: Sampler, nouns: tuple[str, str]) -> float:
    """The share with both nouns in twelve pictures of the untouched model."""
    noise = sampler.sd.noise(len(SCENES), seed=21)
    prompts = [f"a photo of a {nouns[0]} next to a {nouns[1]} {scene}" for scene in SCENES]
    x = sampler.sd.sample(prompts, w=sampler.args.w, steps=sampler.args.steps, x_T=noise, batch=16)
    return round(sampler.scorer.both_nouns(x, nouns).mean().item(), 4)


def again(sampler: Sampler, nouns: tuple[str, str]) -> dict:
    """The share with both nouns in the untouched model's pictures and in the renderer's of the two individuals."""
    pair = Pair(sampler, *map(subject_of, nouns))
    found = {"untouched": pair.draw(*nouns, seed=22), "truth": pair.ground_truth()}
    return {key: round(sampler.scorer.both_nouns(x, nouns).mean().item(), 4) for key, x in found.items()}


def chosen(rows: dict) -> list[tuple[str, str]]:
    """The pairs of nouns to measure, each in its better order: those that meet the premise of C16, best drawn first.

    A noun is in at most two of them. Where no pair meets it, the best drawn alone: C17, on merging, needs no picture
    with both. No method is looked at to choose them.  rows: "one two" -> what `again` returned.
    """
    found, used = {}, Counter()
    for names in sorted((n for n in rows if rows[n]["truth"] >= READABLE), key=lambda n: -rows[n]["untouched"]):
        nouns = tuple(names.split())
        if frozenset(nouns) not in found and all(used[noun] < 2 for noun in nouns):
            found[frozenset(nouns)] = names
            used.update(nouns)
    best = list(found.values())
    able = [names for names in best if rows[names]["untouched"] >= rules_methods.PREMISE]
    return [tuple(names.split()) for names in (able or best[:1])[:PAIRS]]


def known(sampler: Sampler, nouns: tuple[str, str]) -> dict:
    """Scores of the untouched model, by the plain nouns, and of the renderer."""
    pair, each = Pair(sampler, *map(subject_of, nouns)), sampler.args.images
    x, truth = pair.draw(*nouns), pair.ground_truth()
    save(x[::each], sampler, nouns, "untouched model")
    save(truth[:: len(PLACES)], sampler, nouns, "ground truth")
    return {"untouched model": rounded(pair.score(x, each)),
            "ground truth": rounded(pair.score(truth, len(PLACES)))}  # fmt: skip


def untrained(sampler: Sampler, nouns: tuple[str, str]) -> dict:
    """Scores of the untouched model by the methods' own prompts: new words that start as the nouns, and rare words."""
    pair, found = Pair(sampler, *map(subject_of, nouns)), {}
    for label, tokens in {rules_methods.UNTRAINED: TOKENS, "rare words, untrained": RARE}.items():
        new = NewTokens.attach(sampler.sd, dict(zip(tokens, nouns, strict=True))) if tokens == TOKENS else nullcontext()
        with new:
            x = pair.draw(*(f"{token} {noun}" for token, noun in zip(tokens, nouns, strict=True)))
        save(x[:: sampler.args.images], sampler, nouns, label)
        found[label] = rounded(pair.score(x, sampler.args.images))
    return found


def two_subjects(sampler: Sampler, nouns: tuple[str, str], seed: int) -> dict:
    """Every way of teaching two subjects, on the same pictures, prompts and noises: "scores" by label, and "merge"."""
    sd, pair, scores = sampler.sd, Pair(sampler, *map(subject_of, nouns)), {}
    words = [f"{token} {noun}" for token, noun in zip(TOKENS, nouns, strict=True)]

    def look(label: str, *prompts: str) -> None:
        x = pair.draw(*prompts)
        scores[label] = rounded(pair.score(x, sampler.args.images))
        save(x[:: sampler.args.images], sampler, nouns, f"{label} {seed}")

    learnt = [custom_diffusion.SubjectPictures(images, token, subject.noun, captions)
              for subject, token in zip(pair.subjects, TOKENS, strict=True)
              for images, captions in [learnt_from(subject)]]  # fmt: skip
    of_class = [toybox_regularisation(sd, noun, 200) for noun in nouns]
    settings = replace(custom_diffusion.joint_settings(sd, 2), seed=seed)
    for label, others in {"joint": [], "joint, pairs": [toybox_pairs(sd, nouns)]}.items():
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
        look("dreambooth", *(f"{token} {noun}" for token, noun in zip(RARE, nouns, strict=True)))
    return dict(scores=scores, merge=constraint(sampler, alone, merged) | {"seconds": round(seconds, 2)})


def save(x: Tensor, sampler: Sampler, nouns: tuple[str, str], label: str) -> None:
    """One picture of each prompt, in a row."""
    sampler.args.samples.mkdir(parents=True, exist_ok=True)
    Image.fromarray(montage(x, len(SCENES), gap=0)).save(row_file(sampler.args.samples, nouns, label))


def row_file(folder: Path, nouns: tuple[str, str], label: str) -> Path:
    return folder / ("_".join((*nouns, *label.replace(",", "").split())) + ".png")


def sheet(args: argparse.Namespace, pairs: list[tuple[str, str]]) -> list[str]:
    """Stack the rows of SHOWN of all pairs, in the first scenes, into one picture; returns what each row shows.

    Where rows were measured on another machine, their samples are not here: the sheet stays, and nothing is returned.
    """
    files = {f"{' '.join(nouns)} {label}": row_file(args.samples, nouns, label) for nouns in pairs for label in SHOWN}
    missing = [str(file) for file in files.values() if not file.is_file()]
    if missing:
        print(f"the sheet of samples stays as it was: {missing[0]} is not here; --fresh draws all again")
        return []
    rows = [np.array(Image.open(file))[:, : 64 * COLUMNS] for file in files.values()]
    Image.fromarray(np.concatenate(rows)).save(args.out.with_name(f"{args.out.stem}_samples.png"), optimize=True)
    return list(files)


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
    (images, captions), (more, sentences) = map(learnt_from, pair.subjects)
    examples = subject_examples(sd, more, f"zwx {other}", captions=sentences)
    others = [Term(examples), Term(dreambooth.prior_examples(sd, other, PRIOR))]
    with dreambooth.recipe(sd, images, noun=one, captions=captions, prior=prior, settings=settings) as recipe:
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

    def fill(*keys: str, measure, **options):
        return records.fill(args.out, setting, keys, measure, sampler, **options)

    def name(nouns: tuple[str, str]) -> str:
        return " ".join(nouns)

    shares = {
        nouns: fill("drawn", name(nouns), measure=drawn, nouns=nouns) for nouns in itertools.permutations(NOUNS, 2)
    }
    best = sorted(shares, key=lambda nouns: -shares[nouns])[:AGAIN]
    rows = {name(nouns): fill("again", name(nouns), measure=again, nouns=nouns) for nouns in best}
    print("drawn again:", rows, flush=True)
    pairs = chosen(rows)
    for nouns in pairs:
        fill("rows", name(nouns), "known", measure=known, nouns=nouns)
        fill("rows", name(nouns), "untrained", measure=untrained, nouns=nouns)
        for seed in SEEDS:
            row = fill("rows", name(nouns), str(seed), measure=two_subjects, nouns=nouns, seed=seed)
            print(*nouns, seed, {label: {key: round(sum(v) / len(v), 3) for key, v in found.items()}
                                 for label, found in row["scores"].items()}, flush=True)  # fmt: skip
    if labels := sheet(args, pairs):
        records.write(args.out, records.read(args.out, setting) | {"samples": labels}, measured=False)


if __name__ == "__main__":
    main()
