"""How fidelity rises over a training, and whether a method's own number of steps lies on the plateau.

    python training/toybox_plateau.py                       writes data/results/plateau.json
    python training/toybox_plateau.py --subjects tilly --methods lora --threads 1      several of these share the file

A training of half as many steps again as the method's settings say is stopped at quarters of these steps, and the
subject is drawn for its evaluation prompts, from the same noises each time. A step depends on the seed and its number
alone, so what is seen at step n is what a training of n steps gives.
    fidelity    as in training/toybox_personalize.py, one number a prompt
    seconds     of training until there, without drawing
    later       fidelity at the last step - at the method's own steps, with its 95 % interval over prompts
The plateau is reached if later is not above 0 beyond its interval.
"""

import argparse
import datetime
import json
import time
from dataclasses import replace
from pathlib import Path

import torch
from toybox_personalize import METHODS, SUBJECTS, Bench, setting_of

from course_lib.data import toybox_subjects
from course_lib.data.toybox import render
from course_lib.metrics import interval
from course_lib.personalization.finetune import finetune
from course_lib.settings import REPOSITORY, RESULTS, device_name

CURVES = ("textual_inversion", "dreambooth", "lora", "custom_diffusion")
QUARTERS = (0, 1, 2, 3, 4, 6)  # of the method's own steps


def curve(bench: Bench, subject: toybox_subjects.Subject, method: str) -> list[dict]:
    """Rows of step, seconds and fidelity, before the first step and at each of QUARTERS."""
    make, name = METHODS[method]
    prompts = [template.format(name.format(noun=subject.noun)) for template, _ in toybox_subjects.prompts(subject.name)]
    views = [torch.from_numpy(render(spec)) for spec in toybox_subjects.references(subject.name)]
    references = bench.individual(torch.stack(views).permute(0, 3, 1, 2) / 127.5 - 1)
    rows = []

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
        later = at(len(QUARTERS) - 1) - at(QUARTERS.index(4))
        mean, half = round(later.mean().item(), 4), round(interval(later), 4)
        found[method] = dict(
            steps=[row["step"] for row in rows[0]],
            seconds=[round(sum(row[k]["seconds"] for row in rows) / len(rows), 1) for k in range(len(QUARTERS))],
            fidelity=[round(at(k).mean().item(), 3) for k in range(len(QUARTERS))],
            later=dict(mean=mean, interval=half, count=len(later)), plateau=mean <= half,
        )  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="toybox", help="as in load(); its name chooses the methods' settings")
    parser.add_argument("--out", type=Path, default=RESULTS / "plateau.json")
    parser.add_argument("--subjects", nargs="+", default=["mochi"], choices=SUBJECTS)
    parser.add_argument("--methods", nargs="+", default=list(CURVES), choices=CURVES)
    parser.add_argument("--images", type=int, default=2, help="samples of each prompt")
    parser.add_argument("--steps", type=int, default=12, help="DDIM steps")
    parser.add_argument("--w", type=float, default=5.0, help="guidance")
    parser.add_argument("--threads", type=int, help="CPU threads (default: all)")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    bench = Bench(args)
    setting = setting_of(args, bench)

    def read() -> dict:
        """What was measured in this setting, by an earlier run or by one beside this one."""
        earlier = json.loads(args.out.read_text()) if args.out.is_file() else {}
        same = {key: earlier.get(key) for key in setting} == setting
        return earlier if same else dict(setting, made_by="training/toybox_plateau.py", curves={})

    for name in args.subjects:
        for method in args.methods:
            if method in read()["curves"].get(name, {}):
                continue
            rows = curve(bench, toybox_subjects.SUBJECTS[name], method)
            result = read()
            result["curves"].setdefault(name, {})[method] = rows
            result["curves"] = {one: result["curves"][one] for one in SUBJECTS if one in result["curves"]}
            result.update(methods=summary(result["curves"]), threads=torch.get_num_threads(), device=device_name(),
                          date=datetime.date.today().isoformat(), torch=torch.__version__)  # fmt: skip
            args.out.write_text(json.dumps(result, indent=1) + "\n")
            means = [round(sum(row["fidelity"]) / len(row["fidelity"]), 3) for row in rows]
            print(name, method, dict(zip([row["step"] for row in rows], means, strict=True)), flush=True)


if __name__ == "__main__":
    main()
