"""Whole trainings beside the training scripts of diffusers, in turns; then how alike and how obedient each result is.

    python benchmarks/official.py --scripts DIR              # all methods, 2 rounds: about 25 minutes on two free cores
    python benchmarks/official.py --scripts DIR --methods lora
    python benchmarks/official.py --scripts DIR --quick      # two steps of each, to see that it runs

DIR is a clone of github.com/huggingface/diffusers, or a folder with its four scripts. Three sides learn Mochi's five
pictures on the model `toybox`, each as a process of its own with an empty cache, timed from its start to its end:

    official   diffusers' script: steps and rate as in official_commands.py, batch 4, 100 class pictures for DreamBooth
               and Custom Diffusion, which it draws first in the pipeline's 50 steps
    equal      the course's command with the same steps, rate, batch and number of class pictures
    default    the course's command without any of these options

What each has saved is then applied to one float32 model, and drawn for the evaluation prompts from the same noises. The
course's command reads the captions beside the pictures, as always; the scripts get the pictures alone.

Writes data/results/official_scripts.json; a killed run goes on with the methods that are missing. Seconds are medians
over the rounds, and a ratio is the official time by ours. Let nothing else run on the machine.
"""

import argparse
import os
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

import torch
from common import NOUN, REPO, SUBJECT
from official_commands import BATCH, PLANS, SAVED, our_command, scripts_in, steps_of, their_command, version
from personalization import watched

from course_lib.cli.methods import METHODS
from course_lib.environment import RESULTS, quick_dtype
from course_lib.evaluation.personalized import by_prompt
from course_lib.evaluation.statistics import mean
from course_lib.personalization.concept import Concept, applied, load_concept
from course_lib.personalization.interchange.load import load_foreign
from course_lib.toybox import subjects

sys.path.append(str(REPO / "measurements"))
import records
from methods import Sampler, add_sampling

SIDES = ("official", "equal", "default")
OUT = RESULTS / "official_scripts.json"
# All that the trainings import: read from the disk once before anything is timed.
IMPORTS = "import course_lib.cli.train, peft; from diffusers import StableDiffusionPipeline"


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_sampling(parser, OUT.name, images=2)
    parser.set_defaults(dtype="float32")  # of the model that draws the samples
    parser.add_argument("--scripts", type=Path, metavar="DIR", help="clone of diffusers, or a folder with its scripts")
    parser.add_argument("--note", default="", help="a sentence for the record, such as what was changed in the scripts")
    parser.add_argument("--methods", nargs="+", choices=list(PLANS), default=list(PLANS))
    parser.add_argument("--rounds", type=int, default=2, help="trainings of each side (default 2)")
    parser.add_argument("--seed", type=int, default=0, help="of the trainings")
    parser.add_argument("--quick", action="store_true", help="two steps, two class pictures, one round, one sample")
    args = parser.parse_args(argv)
    args.prior = 100
    if args.quick:
        args.rounds, args.images, args.steps, args.prior, args.fresh = 1, 1, 2, 2, True
        args.out = REPO / "runs" / "official_quick.json" if args.out == OUT else args.out
    args.found = scripts_in(args.scripts)
    return args


def trained(args: argparse.Namespace, method: str, place: Path) -> tuple[dict, dict]:
    """({side: seconds of each round}, {side: bytes}) of whole processes; the last ones leave their files in place."""
    seconds, peaks = {side: [] for side in SIDES}, dict.fromkeys(SIDES, 0)
    pictures = place / "pictures"
    pictures.mkdir()
    for picture in SUBJECT.glob("*.png"):
        shutil.copy(picture, pictures)
    for n in range(args.rounds):
        for side in SIDES if n % 2 == 0 else reversed(SIDES):
            shutil.rmtree(place / side, ignore_errors=True)
            out = place / side / "out"
            if side == "official":
                command = their_command(args, method, pictures, out)
            else:
                command = our_command(args, method, side, out)
            time, peak = watched(args, command, place / side / "cache")
            seconds[side].append(round(time, 2))
            peaks[side] = max(peaks[side], peak or 0)
    return seconds, peaks


def scores(sampler: Sampler, concept: Concept, method: str) -> dict:
    """Subject fidelity, prompt fidelity and CLIP-T over the evaluation prompts, each with Student's interval."""
    count, score = sampler.args.images, sampler.scorer
    templates, fields = zip(*subjects.prompts(SUBJECT.name), strict=True)
    with applied(sampler.sd, concept):
        name = METHODS[method].name(METHODS[method].token, NOUN)
        x = sampler.draw_subject(subjects.SUBJECTS[SUBJECT.name], name)
    plain = [template.format(NOUN) for template in templates for _ in range(count)]
    values = {"subject_fidelity": sampler.subject_fidelity(x, score.references(SUBJECT.name)),
              "prompt_fidelity": by_prompt(score.prompt_fidelity(x, fields, count), count),
              "clip_t": by_prompt(score.clip_t(x, plain), count)}  # fmt: skip
    return {key: mean(value).as_dict() for key, value in values.items()}


def row(args: argparse.Namespace, sampler: Sampler, method: str) -> dict:
    """A method's three sides: their times in turn, then the scores of what they have saved last."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        seconds, peaks = trained(args, method, place)
        for side in SIDES:
            if side == "official":
                concept = load_foreign(place / side / "out", sampler.sd, {METHODS[method].token: NOUN})
                settings = dict(steps=steps_of(args, method), lr=PLANS[method].lr, batch_size=BATCH)
            else:
                concept = load_concept(place / side / "out" / SAVED)
                settings = {key: concept.settings[key] for key in ("steps", "lr", "batch_size")}
            found[side] = dict(seconds=statistics.median(seconds[side]), rounds=seconds[side],
                               peak_gib=round(peaks[side] / 2**30, 2), **settings,
                               **scores(sampler, concept, method))  # fmt: skip
    return dict(what=METHODS[method].title, **found, **judged(method, found))


def judged(method: str, found: dict) -> dict:
    """How many times as fast we are, and which targets our default training reaches."""
    ratios = {}
    for side in SIDES[1:]:
        pairs = zip(found["official"]["rounds"], found[side]["rounds"], strict=True)
        ratios[side] = round(statistics.median(theirs / ours for theirs, ours in pairs), 3)
    default, theirs, limit = found["default"], found["official"]["subject_fidelity"], PLANS[method].target
    targets = {"half the time": ratios["default"] >= 2, f"<= {limit} s": default["seconds"] <= limit,
               "as alike": default["subject_fidelity"]["value"] >= theirs["low"]}  # fmt: skip
    return dict(times_as_fast=ratios, targets=targets)


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    os.environ["ACCELERATE_USE_CPU"] = "true"  # for the scripts, on a machine that has a GPU
    sampler = Sampler(args)
    ours = quick_dtype(torch.device("cpu")) if sampler.sd.defaults.half_training else torch.float32
    setting = sampler.setting() | dict(
        made_by="benchmarks/official.py", subject=SUBJECT.name, training_seed=args.seed, rounds=args.rounds,
        class_pictures=args.prior, quick=args.quick, threads=torch.get_num_threads(), note=args.note,
        training_dtypes={"official": "float32", "course_lib": str(ours).removeprefix("torch.")},
        scripts=[version(script) for script in args.found.values()],
    )  # fmt: skip
    args.out.parent.mkdir(parents=True, exist_ok=True)
    records.start(args.out, setting, fresh=args.fresh)
    with tempfile.TemporaryDirectory() as empty:
        watched(args, ["-c", IMPORTS], Path(empty))
    for method in args.methods:
        found = records.fill(args.out, setting, ("rows", method), row, args, sampler, method)
        print(found["what"], {side: found[side]["seconds"] for side in SIDES}, found["targets"], flush=True)
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
