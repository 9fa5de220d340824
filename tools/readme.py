"""Fill the tables of README.md from data/results/ and data/checkpoints/: no figure in it is typed by hand.

python tools/readme.py            write them
python tools/readme.py --check    say whether they are up to date (exit status 1 if not)
"""

import json
import re
import statistics
import sys
from pathlib import Path

import nbformat

from course_lib.evaluation.personalized import SCORES
from course_lib.evaluation.statistics import Estimate, over_subjects

REPO = Path(__file__).resolve().parents[1]
RESULTS, CHECKPOINTS = REPO / "data" / "results", REPO / "data" / "checkpoints"


def read(name: str) -> dict:
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def table(*rows: tuple) -> str:
    head, *body = [[str(cell) for cell in row] for row in rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *body])


def notebooks() -> str:
    """Title, time and memory of each notebook, from the run that wrote its outputs (`make notebooks`)."""
    run = read("course_cpu.json")
    rows = []
    for row in run["notebooks"]:
        top = nbformat.read(REPO / "notebooks" / row["notebook"], as_version=4).cells[0].source
        title = re.search(r"^# (.+)$", top, re.M).group(1)
        minutes, memory = f"{row['seconds'] / 60:.1f}", f"{row['peak_mib'] / 1024:.1f} GiB"
        rows.append((f"[{row['notebook'][:-6]}](notebooks/{row['notebook']})", title, minutes, memory))
    days = sorted({row["date"] for row in run["notebooks"]})
    note = f"Measured by `make notebooks PROFILE=cpu`: {run['device']}, torch {run['torch']}, {' and '.join(days)}."
    return table(("notebook", "what it is about", "minutes", "memory"), *rows) + f"\n\n{note}"


def checkpoints() -> str:
    """What is in data/checkpoints, from the provenance beside each."""
    rows = []
    for path in sorted(CHECKPOINTS.rglob("provenance.json")):
        note = json.loads(path.read_text(encoding="utf-8"))
        size = sum(file.stat().st_size for file in path.parent.glob("*.safetensors")) / 1e6
        batch = note.get("batch_size", 0) * note.get("processes", 1)  # of all processes
        trained = f"{note['steps']:,} steps of {batch}" if "steps" in note else f"{note['epochs']} epochs"
        rows.append((
            f"`{path.parent.relative_to(CHECKPOINTS).as_posix()}`", note["data"].split(" (")[0], trained,
            f"{note['minutes']:.0f} min, {note['device']}, {note['threads']} thread{'s' * (note['threads'] > 1)}"
            + (f" in each of {note['processes']} processes" if note.get("processes", 1) > 1 else ""),
            f"{size:.1f} MB", f"`{note['made_by']}`", note["date"],
        ))  # fmt: skip
    return table(("checkpoint", "data", "training", "time", "size", "made by", "date"), *rows)


def quality() -> str:
    """The measured quality of the CIFAR-10 model, with what real pictures reach beside it."""
    result = read("ddpm_cifar10.json")
    main, real, training = result["main"], result["real"], result["training"]
    plain = next(row for row in result["guidance"] if row["w"] == 1)
    judge = json.loads((CHECKPOINTS / "classifier-cifar10" / "provenance.json").read_text(encoding="utf-8"))["quality"]
    rows = [
        ("pictures", "Fréchet distance", "class accuracy"),
        (f"{main['n']:,} samples, w = {main['w']:g}, {main['steps']} DDIM steps", f"{main['frechet']:.1f}",
         f"{main['accuracy']:.1%} ± {main['accuracy_ci95']:.1%}"),
        (f"{plain['n']:,} samples, no guidance (w = 1)", f"{plain['frechet']:.1f}",
         f"{plain['accuracy']:.1%} ± {plain['accuracy_ci95']:.1%}"),
        ("10,000 real test pictures", f"{real['test_images_to_train']:.1f}", f"{real['accuracy']:.1%}"),
        (f"{plain['n']:,} of them", f"{real['test_images_n_sweep_to_train']:.1f}", ""),
        ("two halves of the real training pictures: the floor", f"{real['floor_two_halves']:.2f}", ""),
    ]  # fmt: skip
    exact = f"{judge['exact_test_accuracy']:.1%} on {judge['exact_test_images']:,} pixel-exact test pictures"
    note = (
        f"Measured by `measurements/cifar10_model.py`: seed {result['seed']}, {result['device']}, {result['date']}; "
        f"the model had trained {training['minutes']:.0f} minutes on {training['device']}. The classifier: {exact}."
    )
    return table(*rows) + f"\n\n{note}"


def toybox() -> str:
    """Whether the Toybox Stable Diffusion draws what the prompts say, beside what the judge reads off real pictures."""
    result, names = read("toybox_sd.json"), ("noun", "colour", "pattern", "scene", "accessory", "relation")
    rows = [("pictures", *names, "both nouns", "Fréchet distance", "CLIP-T")]
    sets = {f"w = {float(w):g}": row for w, row in result["w"].items()} | {"real renderings": result["real"]}
    for label, row in sets.items():
        shares = [f"{Estimate(**row[name]):.1%}" for name in (*names, "both nouns")]
        rows.append((label, *shares, f"{row['frechet']:.2f}", f"{row['clip_t']['value']:.3f}"))
    targets = {"noun": 0.95, "colour": 0.90, "scene": 0.95, "pattern": 0.85}
    best = max(result["w"], key=lambda w: sum(result["w"][w][name]["value"] for name in targets))
    shares = {name: result["w"][best][name]["value"] / result["real"][name]["value"] for name in targets}
    verdicts = ", ".join(
        f"{name} {shares[name]:.1%} (target {goal:.0%}, {'reached' if shares[name] >= goal else 'missed'})"
        for name, goal in targets.items()
    )
    note = (
        f"Share of what the judge reaches on real renderings, at w = {float(best):g}: {verdicts}. A 25-step guided "
        f"picture takes {result['seconds']['1']:.1f} s alone, eight take {result['seconds']['8']:.1f} s. Measured by "
        f"`measurements/toybox_model.py --prompts {result['prompts']}`: held-out prompts, {result['steps']} DDIM "
        f"steps, seed {result['seed']}, {result['device']}, {result['date']}."
    )
    return table(*rows) + f"\n\n{note}"


def speed() -> str:
    """Ratios measured in one run of benchmarks/part1.py."""
    run = read("benchmark_part1.json")
    rows = []
    for row in run["rows"]:
        value = f"{row['ratio']:.2f}" if "ratio" in row else f"{row['seconds']:.1f} s"
        verdict = {True: " (reached)", False: " (missed)", None: ""}[row.get("reached")]
        rows.append((row["what"], value, row.get("target", "") + verdict))
    note = f"Measured by `python benchmarks/part1.py`: {run['device']}, torch {run['torch']}, {run['date']}. "
    note += "A ratio is the median over interleaved rounds; below 1 the first variant is faster."
    return table(("what", "measured", "target"), *rows) + f"\n\n{note}"


def methods() -> str:
    """Every method of Part 4: the mean of each score with its interval over subjects."""
    run = read("personalization.json")
    rows, subjects = [("method", *(name for name, _ in SCORES.values()), "seconds", "bytes")], run["rows"]
    for method in next(iter(subjects.values())):
        found = [subjects[name][method] for name in subjects]
        cells = [f"{over_subjects([row['by_prompt'][key] for row in found]):.3f}" for key in SCORES]
        seconds = [row["seconds_to_prepare"] + row["seconds_to_train"] for row in found if "bytes" in row]
        size = f"{found[0]['bytes']:,}" if seconds else ""
        rows.append((method.replace("_", " "), *cells, f"{statistics.mean(seconds):.0f}" if seconds else "", size))
    note = (
        f"Measured by `measurements/methods.py` (`make claims`) on {', '.join(subjects)}: at least 20 prompts "
        f"of {run['images']} samples each, {run['steps']} DDIM steps, w = {run['w']:g}, seed {run['seed']}, "
        f"{run['dtype']}, {run['device']}, {run['date']}. Intervals are Student's, over {len(subjects)} subjects, with "
        "one training seed. "
        + "; ".join(f"{name}: {what}" for name, what in SCORES.values())
        + ". Seconds are those of preparing and training, without drawing the class's pictures a second time; bytes as "
        "trained, in float32."
    )
    return table(*rows) + f"\n\n{note}"


def claims() -> str:
    """All claims of the seminar with their verdicts."""
    run = read("claims.json")
    rows = [("claim", "what it says", "verdict", "measured", "notebook")]
    for name, claim in run["claims"].items():
        link = f"[{claim['notebook'][:2]}](notebooks/{claim['notebook']}.ipynb)" if claim["notebook"] else ""
        why = f". Why: {claim['why']}" if claim["why"] else ""
        measured = (claim["measured"] + why).replace("|", "\\|")
        rows.append((name, claim["claim"], f"**{claim['verdict']}**", measured, link))
    note = f"Measured by `make claims`: seed {run['seed']}, {run['dtype']}, {run['device']}, {run['date']}."
    return table(*rows) + f"\n\n{note}"


def plateau() -> str:
    """Subject fidelity over a training, at quarters of each method's own number of steps."""
    run = read("plateau.json")
    rows = [("method", "before", "1/4", "1/2", "3/4", "its own steps", "half as many again", "later", "it still rises")]
    for method, found in run["methods"].items():
        first, *others = zip(found["subject_fidelity"], found["seconds"], strict=True)
        cells = [f"{first[0]:.2f}", *(f"{value:.2f} ({seconds:.0f} s)" for value, seconds in others)]
        later = f"{Estimate(**found['later']):+.3f}"
        rows.append((method.replace("_", " "), *cells, later, found["rises"]))
    note = (
        f"Measured by `measurements/plateau.py --threads {run['threads']}` on {', '.join(run['curves'])}: subject "
        f"fidelity as above, and seconds of training until there; {run['images']} samples of each prompt, "
        f"{run['steps']} steps, w = {run['w']:g}, seed {run['seed']}, {run['dtype']}, {run['device']}, "
        f"{run['date']}. Later: what half as "
        "many steps again bring beyond the method's own, with its 95 % interval (one subject: over its prompts)."
    )
    return table(*rows) + f"\n\n{note}"


def personalization_speed() -> str:
    """Ours beside the plain way, from benchmarks/personalization.py: a table for each base and device measured."""
    return "\n\n".join(_ours_and_plain(path.name) for path in sorted(RESULTS.glob("benchmark_personalization*.json")))


def _ours_and_plain(name: str) -> str:
    run, rows = read(name), []
    for row in run["rows"]:
        unit = "ms" if "ms" in row else "s"
        times = row["ms"] if "ms" in row else row["seconds"]
        memory = row.get("peak_gib") or row.get("gpu_gib")
        words = [f"{key} ({'reached' if ok else 'missed'})" for key, ok in row.get("targets", {}).items()]
        pair = [f"{times[side]:.{0 if unit == 'ms' else 1}f} {unit}" for side in ("course_lib", "plain way")]
        memory = "{course_lib:.2f} / {plain way:.2f} GiB".format(**memory) if memory else ""
        rows.append((row["what"], *pair, f"{row['ratio']:.2f}", memory, "; ".join(words)))
    head = ("what", "course_lib", "the plain way", "times as fast", "peak memory, ours / plain", "target")
    rounds = " or ".join(str(count) for count in sorted({row["rounds"] for row in run["rows"]}))
    note = (
        f"Measured by `python benchmarks/personalization.py` with the base `{run['base']}`: {run['device']}, torch "
        f"{run['torch']}, seed {run['seed']}, {run['date']}. How many times as fast we are is the median over "
        f"interleaved rounds ({rounds}); the plain way opens and encodes every picture and every prompt in each step."
    )
    return table(head, *rows) + "\n\n" + " ".join([note, *run.get("notes", [])])


def memory() -> str:
    """DreamBooth of Stable Diffusion 1.5's whole UNet on a GPU, with and without a cap of its memory."""
    run = read("benchmark_memory_sd15-random_cuda.json")
    rows = [("cap", "switched on", "memory held by torch", "the whole process", "a step")]
    for row in run["rows"]:
        cap, saver = row["cap_gib"], "gradient checkpointing" if row["gradient_checkpointing"] else ""
        rows.append((f"{cap:g} GiB" if cap else "none", saver, f"{row['peak_reserved_gib']:.2f} GiB",
                     f"{row['whole_process_gib']:.2f} GiB", f"{row['ms']['course_lib']:.0f} ms"))  # fmt: skip
    note = (
        f"Measured by `python benchmarks/personalization.py --base {run['base']} --device cuda --only memory`: "
        f"{run['device']}, torch {run['torch']}, seed {run['seed']}, {run['date']}; {run['rows'][0]['pictures']} "
        "pictures of 512 px a step. The cap is on what torch may hold, the process has CUDA's own part besides."
    )
    return table(*rows) + f"\n\n{note}"


PARTS = (notebooks, checkpoints, quality, toybox, methods, plateau, claims, speed, personalization_speed, memory)
LATER = (methods, plateau, claims, personalization_speed, memory)  # they get a place in README with their first record


def filled(text: str) -> str:
    """README's text with each table between its marks written anew."""
    for part in PARTS:
        if part in LATER and f"<!-- table: {part.__name__} -->" not in text:
            continue
        pattern = rf"(<!-- table: {part.__name__} -->\n).*?(<!-- end -->)"
        text, count = re.subn(pattern, lambda m: m.group(1) + part() + "\n" + m.group(2), text, flags=re.S)  # noqa: B023
        if count != 1:
            raise SystemExit(f"README.md: expected one place marked `table: {part.__name__}`, found {count}")
    return text


def main() -> None:
    path = REPO / "README.md"
    before = path.read_text(encoding="utf-8")
    after = filled(before)
    if "--check" in sys.argv:
        raise SystemExit(0 if after == before else "README.md: its tables are old; run `make readme`")
    path.write_text(after, encoding="utf-8")


if __name__ == "__main__":
    main()
