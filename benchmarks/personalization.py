"""The cost of personalization beside the same work done the plain way; variants take turns, so noise hits both alike.

    python benchmarks/personalization.py                       # toybox on the CPU: a step, then end to end
    python benchmarks/personalization.py --only step --methods lora --rounds 5
    python benchmarks/personalization.py --base sd15-random --device cuda --only step
    python benchmarks/personalization.py --base sd15-random --device cuda --only memory   # DreamBooth under a cap
    python benchmarks/personalization.py --plain dreambooth --out plain.safetensors    # one plain training, no timing

The plain way is that of the usual training scripts: in each step they open, resize and encode the pictures, send every
prompt through the text encoder, train the whole embedding matrix and put the other rows back, encode the prior pictures
(decoded, concatenated with the others) again, take AdamW without fused kernels, and on a CPU compute in float32. The
draws, the batches, the passes through the UNet and the tensors that come out are the same. Only our side also keeps a
state on disk from which a training can be resumed.

Writes data/results/benchmark_personalization.json (for another base or device: with their names; for --only memory:
benchmark_memory_...). A ratio is the plain way's time by ours, the median over rounds: 2 means twice as fast.
sd15-random is Stable Diffusion 1.5 in its published configuration with random weights; while steps are timed, both
ways' models are in memory at once.
"""

import argparse
import contextlib
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import torch
from common import (
    FASTER,
    FOREVER,
    METHODS,
    NOUN,
    REPO,
    SECONDS,
    SUBJECT,
    base_model,
    compared,
    defaults_of,
    draw_prior,
    draw_regularisation,
    own_settings,
    plain_dtype,
    prepared,
    print_row,
    recipe,
    release,
    take_turns,
)
from memory_cap import capped_rows
from plain import Plain, train_plain
from safetensors.torch import load_file

from course_lib.environment import RESULTS, device_name, quick_dtype, usable_cores
from course_lib.personalization.concept import load_concept
from course_lib.personalization.finetune import finetune


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="the JSON; with --plain the file of the trained tensors")
    parser.add_argument("--only", choices=["step", "end", "memory"], help="time of a step, end to end (default: both), "
                        "or the whole UNet's training under a cap of GPU memory")  # fmt: skip
    parser.add_argument("--cap", type=float, nargs="+", default=[14.5], help="GiB of --only memory (default 14.5)")
    parser.add_argument("--minutes", type=float, default=FOREVER, help="after these no other method is started")
    parser.add_argument("--keep-going", action="store_true", help="write failures into the JSON and go on")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--base", default="toybox", help="toybox, sd15-random, or any that the course's command takes")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or mps (default cpu)")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4], help="of the steps that are timed")
    parser.add_argument("--rounds", type=int, default=15, help="rounds of the steps (default 15)")
    parser.add_argument("--steps", type=int, default=3, help="steps of each variant in a round (default 3)")
    parser.add_argument("--end-rounds", type=int, default=2, help="rounds end to end (default 2)")
    parser.add_argument("--train-steps", type=int, help="steps end to end (default: the method's own)")
    parser.add_argument("--prior", type=int, default=100, help="prior or regularisation pictures end to end (default "
                        "100, as in the course's command)")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="CPU threads (default: all)")
    parser.add_argument("--quick", action="store_true", help="one tiny round, to see that it runs")
    parser.add_argument("--plain", choices=list(METHODS), help="train once the plain way and save to --out")
    parser.add_argument("--settings", type=json.loads, help="with --plain: JSON of a finetune.Settings")
    args = parser.parse_args(argv)
    if args.plain and not args.out:
        parser.error("--plain needs --out FILE")
    if args.quick:
        args.rounds = args.steps = args.end_rounds = 1
        args.train_steps, args.prior, args.batch_sizes = 2, 2, [1]
    return args


# ---- the time of a step ----


def step_rows(args: argparse.Namespace, method: str) -> Iterator[dict]:
    """Both variants on a model of their own, for each batch size."""
    ours, theirs = base_model(args, quick_dtype(torch.device(args.device))), base_model(args, plain_dtype(args))
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as undo:
        others, few = [], 2 if args.quick else 8  # what the pictures show does not matter here
        if method == "dreambooth":
            others = draw_prior(ours, Path(folder), few, args.seed, steps=2)
        elif method == "custom-diffusion":
            others = draw_regularisation(ours, Path(folder), few, search=False)
        settings = replace(own_settings(args, method), steps=FOREVER)
        course = undo.enter_context(recipe(ours, method, settings, others))
        plain = Plain(theirs, method, settings, others)
        for size in args.batch_sizes:
            row = dict(what=f"{METHODS[method].title}: a step, batch {size}", method=method, batch_size=size)
            course.settings = replace(settings, batch_size=size)
            with contextlib.closing(finetune(ours, course)) as training:
                plain.new_optimizer(course.settings)
                seen = {"course_lib": prepared(ours.device, lambda t=training: lambda: next(t)[1]),
                        "plain way": prepared(ours.device, lambda: plain)}  # fmt: skip
                times = take_turns(args, {name: advance for name, (advance, *_) in seen.items()}, ours.device)
                row |= compared(times, "ms", 1000 / args.steps)
                row["losses"] = {name: losses for name, (*_, losses) in seen.items()}
                if ours.device.type == "cuda":
                    row["gpu_gib"] = {name: gib for name, (_, gib, _) in seen.items()}
            print_row(row)
            yield row


# ---- end to end ----

# A small process between us and the one that is measured: it sees that one's largest memory and nothing of ours.
WATCH = """
import json, subprocess, sys, time
start = time.perf_counter()
code = subprocess.call(sys.argv[1:], stdout=sys.stderr)
seconds, peak = time.perf_counter() - start, None
try:
    import resource
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
except ImportError:
    pass  # Windows has no such module
print(json.dumps([code, seconds, peak]))
"""


def watched(args: argparse.Namespace, command: list[str], cache: Path) -> tuple[float, int | None]:
    """(seconds, bytes) of a Python process with an empty cache."""
    environment = os.environ | {"COURSE_CACHE": str(cache), "PYTHONPATH": str(REPO)}
    if args.threads:
        environment["OMP_NUM_THREADS"] = str(args.threads)
    line = [sys.executable, "-c", WATCH, sys.executable, *command]
    run = subprocess.run(line, cwd=REPO, env=environment, capture_output=True, text=True, encoding="utf-8")
    code, seconds, peak = json.loads(run.stdout) if run.stdout else (run.returncode, 0.0, None)
    if code:
        raise SystemExit(f"{' '.join(command)}\nended with exit code {code}:\n{run.stderr[-2000:]}")
    return seconds, peak


def command_of(args: argparse.Namespace, method: str, base: str, out: Path) -> list[str]:
    """The course's own command line."""
    command = ["-m", "course_lib.personalize", "train", "--method", method, "--images", str(SUBJECT), "--class-noun",
               NOUN, "--token", METHODS[method].token, "--base", base, "--device", args.device, "--out", str(out),
               "--seed", str(args.seed), "--grid", "0"]  # fmt: skip
    if args.train_steps:
        command += ["--steps", str(args.train_steps)]
    if method == "dreambooth":
        command += ["--prior", str(args.prior)]
    elif method == "custom-diffusion":
        command += ["--regularisation", str(args.prior if defaults_of(args.base).toybox_world else 0)]
    return command


def plain_command_of(args: argparse.Namespace, method: str, base: str, out: Path, settings: dict) -> list[str]:
    """This file, with the settings that the course's command has used."""
    options = {"--plain": method, "--out": out, "--base": base, "--device": args.device, "--seed": args.seed,
               "--prior": args.prior, "--settings": json.dumps(settings)}  # fmt: skip
    return [str(Path(__file__).resolve()), *(str(word) for option in options.items() for word in option)]


def end_row(args: argparse.Namespace, method: str, base: str, folder: Path) -> dict:
    """Process start to saved file, in turn; both have to leave the same tensors."""
    times, peaks, settings = {"course_lib": [], "plain way": []}, {"course_lib": [], "plain way": []}, None
    for n in range(args.end_rounds):
        for name in list(times) if n % 2 == 0 else list(reversed(times)):
            with tempfile.TemporaryDirectory(dir=folder) as empty:
                out = Path(empty) / f"{method}.safetensors"
                if name == "course_lib":
                    command = command_of(args, method, base, out)
                else:
                    command = plain_command_of(args, method, base, out, settings)
                seconds, peak = watched(args, command, Path(empty) / "cache")
                times[name].append(seconds)
                peaks[name].append(peak)
                if name == "course_lib":
                    concept = load_concept(out)
                    settings, shapes = concept.settings, {key: v.shape for key, v in concept.tensors.items()}
                else:
                    check_same(out, shapes)
    row = dict(what=f"{METHODS[method].title}: end to end, {settings['steps']} steps of {settings['batch_size']}",
               method=method, **compared(times, "seconds", 1))  # fmt: skip
    if None not in peaks["course_lib"]:
        row["peak_gib"] = {name: round(max(values) / 2**30, 3) for name, values in peaks.items()}
    if args.device == "cpu" and defaults_of(args.base).toybox_world and not args.train_steps:
        row["targets"] = {f">= {FASTER:g} times as fast": row["ratio"] >= FASTER}
        if method in SECONDS:
            seconds = row["seconds"]["course_lib"]
            row["targets"][f"<= {SECONDS[method]} s"] = seconds <= SECONDS[method]
    print_row(row)
    return row


def check_same(path: Path, shapes: dict) -> None:
    theirs = {name: value.shape for name, value in load_file(path).items()}
    if theirs != shapes:
        raise SystemExit(
            f"the plain way has saved other tensors: {sorted(set(theirs.items()) ^ set(shapes.items()))[:3]}"
        )


def end_rows(args: argparse.Namespace) -> Iterator[dict]:
    with tempfile.TemporaryDirectory() as folder:
        base = args.base
        if base == "sd15-random":  # both open it as files
            base = str(Path(folder) / "base")
            base_model(args, torch.float32).save(base)
        if not args.quick:  # the first process of all reads everything from a cold disk: not counted
            watched(args, plain_command_of(args, "textual-inversion", base, Path(folder) / "first.safetensors",
                                           asdict(own_settings(args, "textual-inversion")) | {"steps": 1}),
                    Path(folder))  # fmt: skip
        for method in args.methods:
            yield end_row(args, method, base, Path(folder))


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.plain:
        return train_plain(args)
    start, rows, errors = time.time(), [], []
    usual = defaults_of(args.base).toybox_world and args.device == "cpu"
    kind = "benchmark_memory" if args.only == "memory" else "benchmark_personalization"
    name = kind + ("" if usual else f"_{Path(args.base).name}_{args.device}")
    args.out = args.out or RESULTS / f"{name}.json"
    cores = usable_cores()
    keys = ("methods", "batch_sizes", "steps", "train_steps", "prior", "only", "quick")
    result = dict(
        made_by="benchmarks/personalization.py", date=datetime.date.today().isoformat(), base=args.base,
        device=f"CPU, {cores} core{'s' * (cores != 1)}" if args.device == "cpu" else device_name(), seed=args.seed,
        threads=torch.get_num_threads(), torch=torch.__version__, python=platform.python_version(),
        system=platform.system(), step_dtype={"course_lib": str(quick_dtype(torch.device(args.device))),
                                              "plain way": str(plain_dtype(args))},
        settings={key: getattr(args, key) for key in keys},
        minutes=0.0, rows=rows,
    )  # fmt: skip
    args.out.parent.mkdir(parents=True, exist_ok=True)
    tasks = [("memory", lambda: capped_rows(args))] if args.only == "memory" else []
    if args.only in (None, "step"):
        tasks += [(method, lambda m=method: step_rows(args, m)) for method in args.methods]
    if args.only in (None, "end"):
        tasks.append(("end", lambda: end_rows(args)))
    for name, task in tasks:
        if time.time() - start > 60 * args.minutes:
            errors.append(f"{name}: not begun, the minutes are over")
            continue
        try:
            for row in task():  # written at once: a kill loses no row
                rows.append(row)
                write(args.out, result, start, errors)
        except Exception as error:
            if not args.keep_going:
                raise
            errors.append(f"{name}: {type(error).__name__}: {error}"[:1000])
            traceback.print_exc()
        release()
    write(args.out, result, start, errors)
    print(f"{result['minutes']} minutes on {result['device']}; written to {args.out}", flush=True)
    if errors:
        raise SystemExit(f"failed: {errors}")


def write(out: Path, result: dict, start: float, errors: list[str]) -> None:
    result["minutes"] = round((time.time() - start) / 60, 1)
    out.write_text(json.dumps(result | ({"errors": errors} if errors else {}), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
