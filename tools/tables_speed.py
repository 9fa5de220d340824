"""The tables of training/README.md, benchmarks/README.md and data/README.md, as Markdown.

Each public function is one table; tools/readme.py puts it where a page says `table: <its name>`.
"""

import json

from tables import read, table

from course_lib.environment import CHECKPOINTS, RESULTS
from course_lib.evaluation.statistics import Estimate


def provenances() -> dict[str, dict]:
    """ "toybox-sd/unet" -> what provenance.json says, for each folder of data/checkpoints/."""
    paths = sorted(CHECKPOINTS.rglob("provenance.json"))
    texts = {path.parent.relative_to(CHECKPOINTS).as_posix(): path.read_text(encoding="utf-8") for path in paths}
    return {name: json.loads(text) for name, text in texts.items()}


# ---- training ----


def checkpoints() -> str:
    """How each checkpoint was made: the runs that led to it, the first one first."""
    head = ("checkpoint", "made by", "data", "training", "learning rate", "minutes", "device", "date", "quality")
    rows = [head]
    for name, note in provenances().items():
        for run in history(note):
            batch = run.get("batch_size", 0) * run.get("processes", 1)  # of all processes
            trained = f"{run['steps']:,} steps of {batch:,}" if "steps" in run else f"{run['epochs']} epochs"
            device = f"{run['device']}, {run['threads']} thread{'s' * (run['threads'] > 1)}"
            if run.get("processes", 1) > 1:
                device += f" in each of {run['processes']} processes"
            rows.append((
                f"`{name}`", f"`{run['made_by']}`", run["data"].split(" (")[0].split(", drawn by")[0],
                trained, f"{run['lr']:g}" if "lr" in run else "", f"{run['minutes']:.1f}", device, run["date"],
                quality_of(run) if run is note else "start of the next row",
            ))  # fmt: skip
    return table(*rows)


def history(note: dict) -> list[dict]:
    """A run and those that it started from, the first one first."""
    earlier = note.get("started_from")
    return [*(history(earlier) if isinstance(earlier, dict) else []), note]


def quality_of(note: dict) -> str:
    """What a provenance says of the quality reached, in words; the last loss where it says nothing else."""
    if "samples" in note:
        row = next(row for row in note["samples"]["rows"] if row["w"] == 2)
        return (
            f"{row['n']} samples at w = 2: Fréchet distance {row['frechet']:.1f}, class accuracy {row['accuracy']:.0%}"
        )
    if "quality" in note:
        accuracy, exact = note["quality"]["test_accuracy"], note["quality"].get("exact_test_accuracy")
        more = f"; on {note['quality']['exact_test_images']:,} pixel-exact pictures {exact:.1%}" if exact else ""
        return f"accuracy {accuracy:.2%}{more}"
    shares = note.get("measured_on_1000_real") or note.get("retrieval")
    if shares:
        return ", ".join(f"{key.replace('_', ' ')} {value:.1%}" for key, value in shares.items())
    if "test_loss" in note.get("measured", {}):
        return f"loss on held-out pictures {note['measured']['test_loss']:.3f}"
    last = [row for row in note.get("last_rows", []) if {"psnr", "loss", "caption_of_picture"} & set(row)]
    if last and "psnr" in last[-1]:
        return f"PSNR {last[-1]['psnr']:.1f} dB"
    loss = last[-1].get("loss") if last else note["last_losses"][-1] if "last_losses" in note else None
    return f"loss {loss:.3f}" if loss else ""


# ---- data ----


def sizes() -> str:
    """What each checkpoint folder holds, and how large its weights are."""
    rows = [("folder", "megabytes", "parameters")]
    for name, note in provenances().items():
        size = sum(file.stat().st_size for file in (CHECKPOINTS / name).glob("*.safetensors")) / 1e6
        count = f"{note['parameters']:,}" if "parameters" in note else ""
        rows.append((f"`checkpoints/{name}`", f"{size:.1f}", count))
    return table(*rows)


# ---- benchmarks ----


def speed() -> str:
    """Ratios measured in one run of benchmarks/part1.py."""
    run = read("benchmark_part1.json")
    rows = [("what", "measured", "target")]
    for row in run["rows"]:
        value = f"{row['ratio']:.2f}" if "ratio" in row else f"{row['seconds']:.1f} s"
        verdict = {True: " (reached)", False: " (missed)", None: ""}[row.get("reached")]
        rows.append((row["what"], value, row.get("target", "") + verdict))
    note = f"Measured by `python benchmarks/part1.py`: {run['device']}, torch {run['torch']}, {run['date']}."
    return table(*rows) + f"\n\n{note} A ratio is the median over interleaved rounds; below 1 the first is faster."


def personalization_speed() -> str:
    """Ours beside the plain way, from benchmarks/personalization.py: a table for each base and device measured."""
    return "\n\n".join(_ours_and_plain(path.name) for path in sorted(RESULTS.glob("benchmark_personalization*.json")))


def _ours_and_plain(name: str) -> str:
    run = read(name)
    rows = [("what", "course_lib", "the plain way", "times as fast", "peak memory, ours / plain", "target")]
    for row in run["rows"]:
        times, unit, digits = (row["ms"], "ms", 0) if "ms" in row else (row["seconds"], "s", 1)
        memory = row.get("peak_gib") or row.get("gpu_gib")
        words = [f"{key} ({'reached' if ok else 'missed'})" for key, ok in row.get("targets", {}).items()]
        pair = [f"{times[side]:.{digits}f} {unit}" for side in ("course_lib", "plain way")]
        memory = "{course_lib:.2f} / {plain way:.2f} GiB".format(**memory) if memory else ""
        rows.append((row["what"], *pair, f"{row['ratio']:.2f}", memory, "; ".join(words)))
    rounds = " or ".join(str(count) for count in sorted({row["rounds"] for row in run["rows"]}))
    note = (
        f"Measured by `python benchmarks/personalization.py` with the base `{run['base']}`: {run['device']}, torch "
        f"{run['torch']}, seed {run['seed']}, {run['date']}. The ratio is the median over interleaved rounds "
        f"({rounds})."
    )
    return table(*rows) + "\n\n" + " ".join([note, *run.get("notes", [])])


def memory() -> str:
    """DreamBooth of Stable Diffusion 1.5's whole UNet on a GPU, with and without a cap of its memory."""
    run = read("benchmark_memory_sd15-random_cuda.json")
    rows = [("cap", "switched on", "memory held by torch", "the whole process", "a step")]
    for row in run["rows"]:
        cap, saver = row["cap_gib"], "gradient checkpointing" if row["gradient_checkpointing"] else ""
        held, process = f"{row['peak_reserved_gib']:.2f} GiB", f"{row['whole_process_gib']:.2f} GiB"
        rows.append((f"{cap:g} GiB" if cap else "none", saver, held, process, f"{row['ms']['course_lib']:.0f} ms"))
    note = (
        f"Measured by `python benchmarks/personalization.py --base {run['base']} --device cuda --only memory`: "
        f"{run['device']}, torch {run['torch']}, seed {run['seed']}, {run['date']}; {run['rows'][0]['pictures']} "
        "pictures of 512 pixels a step. The cap is on the memory that torch may hold; CUDA's own part comes on top."
    )
    return table(*rows) + f"\n\n{note}"


def official() -> str:
    """Whole trainings beside the official scripts of diffusers: their times, then the scores of their results."""
    if not (RESULTS / "official_scripts.json").is_file():
        return "Not measured yet: `python benchmarks/official.py --scripts DIR` does it."
    run, three = read("official_scripts.json"), ("official", "equal", "default")
    times = [("training", "official script", "ours, equal settings", "ours, default settings", "times as fast",
              "peak memory, official / equal / default", "target of the default")]  # fmt: skip
    likeness = [("training", "subject fidelity, official / equal / default", "prompt fidelity", "CLIP-T")]
    for row in run["rows"].values():
        seconds = [f"{row[side]['seconds']:.1f} s ({row[side]['steps']} steps)" for side in three]
        fast = " and ".join(f"{ratio:.1f}" for ratio in row["times_as_fast"].values())
        memory = " / ".join(f"{row[side]['peak_gib']:.2f}" for side in three) + " GiB"
        goals = "; ".join(f"{key} ({'reached' if ok else 'missed'})" for key, ok in row["targets"].items())
        times.append((row["what"], *seconds, fast, memory, goals))
        scores = [[f"{Estimate(**row[side][key])}" for side in three]
                  for key in ("subject_fidelity", "prompt_fidelity", "clip_t")]  # fmt: skip
        likeness.append((row["what"], *map(" / ".join, scores)))
    return "\n\n".join((table(*times), table(*likeness), _official_note(run)))


def _official_note(run: dict) -> str:
    dtypes, scripts = run["training_dtypes"], [f"`{one['script']}` {one['commit'][:7]}" for one in run["scripts"]]
    sentences = [
        f"Whole processes on the pictures of {run['subject']} with the model `toybox`, medians over {run['rounds']} "
        f"rounds; {run['class_pictures']} class pictures with DreamBooth and Custom Diffusion at equal settings",
        "Times as fast: at equal settings and by default",
        f"Scores: means over the evaluation prompts, {run['images']} samples of each, w = {run['w']:g}, "
        f"{run['steps']} steps, with 95 % intervals; as alike: not below the official script's interval",
        f"Trained in {dtypes['official']} there and in {dtypes['course_lib']} here, seed {run['training_seed']}",
        f"Scripts of diffusers by commit: {', '.join(scripts)}",
        *([run["note"].rstrip(".")] if run["note"] else []),
        f"Measured by `python benchmarks/official.py`: {run['device']}, torch {run['torch']}, {run['date']}",
    ]
    return ". ".join(sentences) + "."


def full_size() -> str:
    """Stable Diffusion 1.5 with random weights: counts, and pictures equal to the stock pipeline's."""
    run = read("sd15_random.json")
    rows = [("part", "parameters here", "published")]
    rows += [(part, f"{count:,}", f"{run['published'][part]:,}") for part, count in run["parameters"].items()]
    note = (
        f"A picture of {run['size']} pixels in {run['steps']} steps: {run['seconds_ours']:.0f} s here, "
        f"{run['seconds_diffusers']:.0f} s with `StableDiffusionPipeline`, largest difference "
        f"{run['max_abs_difference']:g}, peak memory {run['peak_memory_gb']:.1f} GB. Measured by "
        f"`python benchmarks/sd15_random.py`: {run['device']}, {run['date']}."
    )
    return table(*rows) + f"\n\n{note}"


def drawing() -> str:
    """How many Toybox pictures are drawn in a second."""
    run = read("toybox_speed.json")
    return (
        f"The renderer draws {run['images_per_second']:.0f} Toybox pictures of {run['size']} pixels a second with "
        f"{run['workers']} worker processes. Measured by `python benchmarks/toybox_speed.py`: {run['device']}, "
        f"{run['date']}."
    )
