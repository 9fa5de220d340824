"""Choose the settings of every method on two subjects that are not measured: writes data/results/tuning.json.

    python measurements/tuning.py                        everything; a killed run goes on with the missing rows
    python measurements/tuning.py --methods lora --threads 1       several of these share the file

Every method gets the same budget: three learning rates by two batch sizes, each trained once per subject until it has
seen SEEN[-1] pictures. At each of SEEN the subject is drawn for its evaluation prompts, from the same noises each time.
A step depends on the seed and its number alone, so step n shows what a training of n steps gives.
    subject_fidelity, prompt_fidelity, clip_t    as in course_lib/evaluation/personalized.py, means over the prompts
    score      the mean over prompts of subject fidelity (0 if below) times prompt fidelity: 1 needs both
    seconds    of training until there, without drawing
Chosen is the setting that costs least, counted in pictures seen, among those whose mean score over both subjects is
within CLOSE of the method's best; of two at the same cost, the one with the better score. Beside it, one more option of
a method is varied at the chosen setting (EXTRA); of LoRA's ranks the lowest within CLOSE of the best is chosen.
Of both subjects together: the ridge of a merge (RIDGES), chosen is the largest within CLOSE of the best that moves new
captions at most a tenth more than the ridge that moves them least; and joint training on the pictures with captions, or
without them in several sizes and places, for as many or twice as many steps as one subject takes, at half or the whole
of its rate (JOINT): chosen is the highest of the lower subject fidelities.
"""

import argparse
import itertools
import time
from dataclasses import replace
from functools import partial

import records
import torch
from methods import TUNED_ON, VARIANTS, Sampler, add_sampling, pictures_of
from pairs import Pair

from course_lib.data.pictures import picture_files
from course_lib.evaluation.personalized import by_prompt
from course_lib.personalization import custom_diffusion
from course_lib.personalization.concept import Concept, applied, concept_of
from course_lib.personalization.custom_diffusion import SubjectPictures
from course_lib.personalization.finetune import finetune
from course_lib.personalization.merge import caption_features, merge_concepts
from course_lib.personalization.regularisation import toybox_regularisation
from course_lib.toybox.captions import corpus
from course_lib.toybox.subjects import SUBJECTS, prompts

RATES = {
    "textual_inversion": (5e-3, 1e-2, 2e-2), "dreambooth": (1e-4, 2e-4, 4e-4), "lora": (1e-3, 2e-3, 4e-3),
    "custom_diffusion": (2.5e-4, 5e-4, 1e-3),
}  # fmt: skip
BATCHES = (4, 8)
SEEN = (160, 320, 480, 800)  # pictures of the subject: steps times batch size
EXTRA = {"lora": ("rank", (2, 8, 16)), "dreambooth": ("prior_weight", (0.3, 3.0))}
RIDGES = (1e-6, 1e-4, 1e-2, 1e-1)
JOINT = tuple(itertools.product((False, True), (1, 2), (0.5, 1.0)))  # augment, times the steps, times the rate
CLOSE = 0.02  # a gain in score that is not worth more steps


def scores(sampler: Sampler, name: str, words: str) -> dict:
    """Of the model as it is now; `words` stand for the subject in prompts."""
    each, scorer = sampler.args.images, sampler.scorer
    templates, fields = zip(*prompts(name), strict=True)
    x, plain = sampler.draw_subject(SUBJECTS[name], words), [t.format(SUBJECTS[name].noun) for t in templates]
    fidelity = sampler.subject_fidelity(x, scorer.references(name))
    obeyed = by_prompt(scorer.prompt_fidelity(x, fields, each), each)
    clip_t = scorer.clip_t(x, [prompt for prompt in plain for _ in range(each)])
    found = dict(subject_fidelity=fidelity, prompt_fidelity=obeyed, clip_t=clip_t,
                 score=fidelity.clamp(min=0) * obeyed)  # fmt: skip
    return {key: round(value.mean().item(), 4) for key, value in found.items()}


def curve(sampler: Sampler, name: str, method: str, lr: float, batch: int, seen: tuple[int, ...] = SEEN,
          **options) -> list[dict]:  # fmt: skip
    """Train a method on a subject, and return its scores after each of `seen` pictures.  options: of its recipe."""
    variant, rows, seconds = VARIANTS[method], [], 0.0
    with variant.recipe(sampler.sd, name, **options) as recipe:
        recipe.settings = replace(recipe.settings, lr=lr, batch_size=batch, steps=seen[-1] // batch)
        start = time.perf_counter()
        for step, _ in finetune(sampler.sd, recipe):
            if step * batch in seen:
                seconds += time.perf_counter() - start
                row = dict(seen=step * batch, steps=step, seconds=round(seconds, 1))
                rows.append(row | scores(sampler, name, variant.name(SUBJECTS[name].noun)))
                start = time.perf_counter()
    return rows


def chosen(rows: dict[str, dict[str, list]]) -> dict:
    """The setting to use.  rows: all of one method, "lr 0.01, batch 4" -> subject -> what `curve` returned."""
    settings = []
    for label, by_subject in rows.items():
        lr, batch = label.removeprefix("lr ").split(", batch ")
        for stops in zip(*by_subject.values(), strict=True):
            means = {key: round(sum(stop[key] for stop in stops) / len(stops), 4) for key in ("score", "seconds")}
            settings.append(dict(lr=float(lr), batch_size=int(batch), steps=stops[0]["steps"]) | means)
    best = max(setting["score"] for setting in settings)
    close = [setting for setting in settings if setting["score"] >= best - CLOSE]
    return min(close, key=lambda s: (s["steps"] * s["batch_size"], -s["score"])) | dict(best=best)


def chosen_rank(four: float, others: dict[str, dict[str, list]]) -> int:
    """The rank of LoRA to use.  four: the score of rank 4.  others: "rank 8" -> subject -> rows of `curve`."""
    found = {4: four} | {int(label.removeprefix("rank ")): sum(rows[-1]["score"] for rows in by_subject.values()) /
                         len(by_subject) for label, by_subject in others.items()}  # fmt: skip
    return min(rank for rank, score in found.items() if score >= max(found.values()) - CLOSE)


def chosen_together(record: dict) -> dict:
    """The ridge of a merge, and the row of JOINT, to use: see above."""
    scores = {ridge: sum(one["score"] for one in row.values() if isinstance(one, dict)) / 2
              for ridge, row in record["ridge"].items()}  # fmt: skip
    moved = {ridge: row["moved"] for ridge, row in record["ridge"].items()}
    close = [float(ridge) for ridge, score in scores.items()
             if score >= max(scores.values()) - CLOSE and moved[ridge] <= 1.1 * min(moved.values())]  # fmt: skip
    joint = max(record["joint"], key=lambda label: record["joint"][label]["lower_subject_fidelity"])
    return dict(ridge=max(close), joint=joint)


def learnt(sampler: Sampler, name: str, token: str, setting: dict) -> Concept:
    """A concept of Custom Diffusion, with the chosen setting."""
    with VARIANTS["custom_diffusion"].recipe(sampler.sd, name, token=token) as recipe:
        recipe.settings = replace(recipe.settings, **{key: setting[key] for key in ("lr", "batch_size", "steps")})
        for _ in finetune(sampler.sd, recipe):
            pass
        return concept_of(recipe)


def merged(sampler: Sampler, concepts: list[Concept], ridge: float) -> dict:
    """Scores of each subject with the merged weights; change: the largest relative change of a weight; moved: that of
    the keys and values of captions that the merge did not see, a mean over layers."""
    concept = merge_concepts(sampler.sd, concepts, corpus(500), ridge)
    base = {f"unet.{name}": W.float().cpu() for name, W in sampler.weights.items() if f"unet.{name}" in concept.tensors}
    change = max(((concept.tensors[name] - W).norm() / W.norm()).item() for name, W in base.items())
    C = torch.cat([caption_features(sampler.sd, text)[0] for text in corpus(200, seed=1)]).float().cpu()
    moved = [((C @ (concept.tensors[name] - W).T).norm() / (C @ W.T).norm()).item() for name, W in base.items()]
    with applied(sampler.sd, concept):
        found = {one.about["noun"]: scores(sampler, name, f"{one.about['token']} {one.about['noun']}")
                 for name, one in zip(TUNED_ON, concepts, strict=True)}  # fmt: skip
    return found | dict(change=round(change, 3), moved=round(sum(moved) / len(moved), 4))


def together(sampler: Sampler, setting: dict, augment: bool, times: int, rate: float) -> dict:
    """Both subjects by joint training: the scores of pairs.Pair, means over prompts."""
    pair, one = Pair(sampler, *map(SUBJECTS.get, TUNED_ON)), custom_diffusion.SETTINGS[sampler.sd.defaults.settings]
    # a list of files has no captions, a folder has
    pictures = [picture_files(pictures_of(name)) if augment else pictures_of(name) for name in TUNED_ON]
    learnt = [SubjectPictures(images, f"<v{k}>", SUBJECTS[name].noun)
              for k, (name, images) in enumerate(zip(TUNED_ON, pictures, strict=True), 1)]  # fmt: skip
    settings = replace(one, lr=rate * setting["lr"], batch_size=setting["batch_size"], steps=times * setting["steps"])
    of_class = [toybox_regularisation(sampler.sd, noun, 200) for noun in pair.nouns]
    with custom_diffusion.joint_recipe(
        sampler.sd, learnt, regularisation=of_class, augment=augment, settings=settings
    ) as recipe:
        for _ in finetune(sampler.sd, recipe):
            pass
        x = pair.draw(*(f"{one.token} {one.noun}" for one in learnt))
    return {key: round(value.mean().item(), 4) for key, value in pair.score(x, sampler.args.images).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_sampling(parser, "tuning.json", images=2)
    parser.add_argument("--methods", nargs="+", default=list(RATES), choices=list(RATES))
    args = parser.parse_args()
    sampler = Sampler(args)
    setting = sampler.setting() | dict(made_by="measurements/tuning.py")
    records.start(args.out, setting, fresh=args.fresh)
    fill = partial(records.fill, args.out, setting)
    for method in args.methods:
        for lr, batch, name in itertools.product(RATES[method], BATCHES, TUNED_ON):
            keys = ("rows", method, f"lr {lr:g}, batch {batch}", name)
            print(*keys, fill(keys, curve, sampler, name, method, lr, batch)[-1], flush=True)
        best = fill(("chosen", method), chosen, records.read(args.out, setting)["rows"][method])
        print(method, best, flush=True)
        option, values = EXTRA.get(method, ("", ()))
        seen = (best["steps"] * best["batch_size"],)
        for value, name in itertools.product(values, TUNED_ON):
            keys, how = ("extra", method, f"{option} {value:g}", name), (best["lr"], best["batch_size"], seen)
            print(*keys, fill(keys, curve, sampler, name, method, *how, **{option: value})[-1], flush=True)
    record = records.read(args.out, setting)
    if lora := record["chosen"].get("lora"):
        print("rank", fill(("chosen", "rank"), chosen_rank, lora["score"], record["extra"]["lora"]), flush=True)
    best = record["chosen"].get("custom_diffusion")
    if best and len(record.get("ridge", {})) < len(RIDGES):
        concepts = [learnt(sampler, name, f"<v{k}>", best) for k, name in enumerate(TUNED_ON, 1)]
        for ridge in RIDGES:
            keys = ("ridge", f"{ridge:g}")
            print(*keys, fill(keys, merged, sampler, concepts, ridge), flush=True)
    for augment, times, rate in JOINT if best else ():
        keys = ("joint", f"{'several sizes' if augment else 'captions'}, {times} x the steps, {rate:g} x the rate")
        print(*keys, fill(keys, together, sampler, best, augment, times, rate), flush=True)
    print(fill(("chosen", "together"), chosen_together, records.read(args.out, setting)), flush=True)


if __name__ == "__main__":
    main()
