"""How fidelity rises over a training, and whether a method's own number of steps lies on the plateau.

    python measurements/plateau.py                       writes data/results/plateau.json
    python measurements/plateau.py --subjects tilly --methods lora --threads 1      several of these share the file

A training of half as many steps again as the method's settings say is stopped at quarters of these steps, and the
subject is drawn for its evaluation prompts, from the same noises each time. A step depends on the seed and its number
alone, so what is seen at step n is what a training of n steps gives.
    fidelity    as in measurements/methods.py, one number a prompt
    seconds     of training until there, without drawing
    later       fidelity at the last step - at the method's own steps, with its 95 % interval over prompts
    rises       "holds" if later is above 0 beyond its interval, "does not hold" if below it, else "cannot tell"
"""

import argparse
import time
from dataclasses import replace
from functools import partial

import torch
from claims import difference, told
from methods import (
    METHODS,
    SUBJECTS,
    Bench,
    arguments,
    keep,
    measure_missing,
    record_of,
    setting_of,
)

from course_lib.environment import REPOSITORY
from course_lib.personalization.finetune import finetune
from course_lib.toybox import subjects

CURVES = ("textual_inversion", "dreambooth", "lora", "custom_diffusion")
QUARTERS = (0, 1, 2, 3, 4, 6)  # of the method's own steps


def curve(bench: Bench, subject: subjects.Subject, method: str) -> list[dict]:
    """Rows of step, seconds and fidelity, before the first step and at each of QUARTERS."""
    make, name = METHODS[method]
    prompts = [template.format(name.format(noun=subject.noun)) for template, _ in subjects.prompts(subject.name)]
    references, rows = bench.references(subject.name), []

    def look(step: int, seconds: float) -> None:
        likeness = (bench.individual(bench.draw(prompts, seed=3)) @ references.T).mean(1)
        by_prompt = likeness.view(-1, bench.args.images).mean(1)
        rows.append(dict(step=step, seconds=round(seconds, 1), fidelity=[round(v, 3) for v in by_prompt.tolist()]))

    with make(bench.sd, REPOSITORY / "data" / "subjects" / subject.name, subject.noun) as recipe:
        own, seconds = recipe.settings.steps, 0.0
        stops = [own * quarter // 4 for quarter in QUARTERS]
        recipe.settings = replace(recipe.settings, steps=stops[-1])
        look(0, 0.0)
        start = time.perf_counter()
        for step, _ in finetune(bench.sd, recipe):
            if step in stops:
                seconds += time.perf_counter() - start
                look(step, seconds)
                start = time.perf_counter()
    return rows


def summary(curves: dict[str, dict[str, list]]) -> dict:
    """Per method, over its subjects: mean fidelity and seconds at each stop, and what more steps bring."""
    found = {}
    for method in CURVES:
        rows = [curves[name][method] for name in curves if method in curves[name]]
        if not rows:
            continue
        at = lambda k: torch.cat([torch.tensor(row[k]["fidelity"]) for row in rows])  # noqa: E731, B023
        later = difference(at(len(QUARTERS) - 1) - at(QUARTERS.index(4)))
        found[method] = dict(
            steps=[row["step"] for row in rows[0]],
            seconds=[round(sum(row[k]["seconds"] for row in rows) / len(rows), 1) for k in range(len(QUARTERS))],
            fidelity=[round(at(k).mean().item(), 3) for k in range(len(QUARTERS))],
            later=later, rises=told(later), plateau=told(later) != "holds",
        )  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments(parser, "plateau.json", images=2)
    parser.add_argument("--subjects", nargs="+", default=["mochi"], choices=SUBJECTS)
    parser.add_argument("--methods", nargs="+", default=list(CURVES), choices=CURVES)
    args = parser.parse_args()
    bench = Bench(args)
    setting = setting_of(args, bench) | dict(made_by="measurements/plateau.py")
    for name, method, _ in measure_missing(args, setting, "curves", partial(curve, bench)):
        print(name, method, flush=True)
    record = record_of(args.out, setting, "curves")
    record.update(methods=summary(record["curves"]), threads=torch.get_num_threads())
    keep(args.out, record)
    for method, found in record["methods"].items():
        print(method, dict(zip(found["steps"], found["fidelity"], strict=True)), found["later"])


if __name__ == "__main__":
    main()
