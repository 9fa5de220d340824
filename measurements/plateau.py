"""How subject fidelity rises over a training, and whether a method's own number of steps lies on the plateau.

    python measurements/plateau.py                       writes data/results/plateau.json
    python measurements/plateau.py --subjects tilly --methods lora --threads 1      several of these share the file

A training takes half as many steps again as the method's settings say. At quarters of the method's steps the
subject is drawn for its evaluation prompts, from the same noises each time. A step depends on the seed and its number
alone, so step n shows what a training of n steps gives.
    subject_fidelity    as in course_lib/evaluation/personalized.py, one number a prompt
    seconds             of training until there, without drawing
    later               subject fidelity at the last step minus that at the method's own steps, with its interval over
                        subjects (of one subject: over its prompts)
    rises               "holds" if later is above 0 beyond its interval, "does not hold" if below it, else "cannot tell"
"""

import argparse
import time
from dataclasses import replace
from functools import partial

import records
import torch
from methods import SUBJECTS, VARIANTS, Sampler, add_sampling, measure_missing

from course_lib.evaluation.claims import verdict_of
from course_lib.evaluation.statistics import over_subjects
from course_lib.personalization.finetune import finetune
from course_lib.toybox import subjects

CURVES = ("textual_inversion", "dreambooth", "lora", "custom_diffusion")
QUARTERS = (0, 1, 2, 3, 4, 6)  # of the method's own steps


def curve(sampler: Sampler, subject: subjects.Subject, method: str) -> list[dict]:
    """Rows of step, seconds and subject fidelity, before the first step and at each of QUARTERS."""
    variant = VARIANTS[method]
    references, rows = sampler.scorer.references(subject.name), []

    def look(step: int, seconds: float) -> None:
        values = sampler.subject_fidelity(sampler.draw_subject(subject, variant.name(subject.noun)), references)
        found = [round(v, 3) for v in values.tolist()]
        rows.append(dict(step=step, seconds=round(seconds, 1), subject_fidelity=found))

    with variant.recipe(sampler.sd, subject.name) as recipe:
        own, seconds = recipe.settings.steps, 0.0
        stops = [own * quarter // 4 for quarter in QUARTERS]
        recipe.settings = replace(recipe.settings, steps=stops[-1])
        look(0, 0.0)
        start = time.perf_counter()
        for step, _ in finetune(sampler.sd, recipe):
            if step in stops:
                seconds += time.perf_counter() - start
                look(step, seconds)
                start = time.perf_counter()
    return rows


def summary(curves: dict[str, dict[str, list]]) -> dict:
    """For each method: mean subject fidelity and seconds at each stop over its subjects, and the gain of more steps."""
    return {method: _summary_of([rows[method] for rows in curves.values() if method in rows])
            for method in CURVES if any(method in rows for rows in curves.values())}  # fmt: skip


def _summary_of(rows: list[list[dict]]) -> dict:
    values = [torch.tensor([stop["subject_fidelity"] for stop in row]) for row in rows]  # each (stops, prompts)
    later = over_subjects([value[-1] - value[QUARTERS.index(4)] for value in values])
    verdict, count = verdict_of(later), len(rows)
    return dict(
        steps=[stop["step"] for stop in rows[0]],
        seconds=[round(sum(row[k]["seconds"] for row in rows) / count, 1) for k in range(len(QUARTERS))],
        subject_fidelity=[round(sum(v[k].mean().item() for v in values) / count, 3) for k in range(len(QUARTERS))],
        later=later.as_dict(), rises=verdict, plateau=verdict != "holds",
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_sampling(parser, "plateau.json", images=2)
    parser.add_argument("--subjects", nargs="+", default=["mochi"], choices=SUBJECTS)
    parser.add_argument("--methods", nargs="+", default=list(CURVES), choices=CURVES)
    args = parser.parse_args()
    sampler = Sampler(args)
    setting = sampler.setting() | dict(made_by="measurements/plateau.py")
    new = [(name, method) for name, method, _ in measure_missing(args, setting, "curves", partial(curve, sampler))]
    record = records.read(args.out, setting, "curves")
    record["methods"] = summary(record["curves"])
    if new:
        record["threads"] = torch.get_num_threads()
    records.write(args.out, record, measured=bool(new))
    for method, found in record["methods"].items():
        print(method, dict(zip(found["steps"], found["subject_fidelity"], strict=True)), found["later"])


if __name__ == "__main__":
    main()
