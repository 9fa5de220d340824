"""The tables of Part 3: editing, inversion, image embeddings, what is kept of a subject, and speed."""

import torch
from tables import read, table

from course_lib.evaluation import statistics
from course_lib.evaluation.statistics import Estimate


def editing() -> str:
    """Every editing method on the edits whose right answer is known."""
    run, rows = read("editing.json"), [("method", "edits", "obeyed", "kept, dB", "structure", "to the right answer, dB",
                                        "seconds")]  # fmt: skip
    for name, parts in run["methods"].items():
        scores = {score: [v for part in parts.values() for v in part[score] if v is not None]
                  for score in ("obeyed", "kept", "structure", "truth")}  # fmt: skip
        seconds = torch.tensor([part["seconds"] for part in parts.values()]).median()
        means = [statistics.mean(scores[score]) for score in ("kept", "structure", "truth")]
        rows.append((name, len(scores["obeyed"]), f"{statistics.share(scores['obeyed']):.2f}", f"{means[0]:.1f}",
                     f"{means[1]:.2f}", f"{means[2]:.1f}", f"{seconds:.1f}"))  # fmt: skip
    note = (f"Obeyed: the judge reads the new value. Kept: PSNR to the given picture over the pixels that need not "
            f"change, where there are any. Structure: correlation of edges in the object's area with the given "
            f"picture or the right answer, whichever is larger. Intervals over edits (Wilson, Student's t). "
            f"Seconds leave out the inversion that the methods share. Measured by `python measurements/editing.py`: "
            f"{run['steps']} DDIM steps, w = {run['w']:g}, {run['dtype']}, {run['device']}, "
            f"{run['date']}.")  # fmt: skip
    return table(*rows) + f"\n\n{note}"


def inversions() -> str:
    """The error of a picture that is drawn back from its noise, by guidance scale."""
    run = read("editing.json")
    found = run["reconstruction"]
    scales = list(next(iter(found.values())))
    rows = [("inversion", *(f"w = {float(w):g}" for w in scales), "seconds a picture")]
    for name, by_w in found.items():
        cells = [f"{statistics.mean(by_w[w]['errors']):.4f}" if w in by_w else "" for w in scales]
        rows.append((name, *cells, f"{max(row['seconds_a_picture'] for row in by_w.values()):.1f}"))
    count = len(next(iter(next(iter(found.values())).values()))["errors"])
    note = (f"Root mean square error to what the autoencoder makes of the picture (the range is 2), {count} pictures. "
            f"Measured by `python measurements/editing.py`: {run['device']}, {run['date']}.")  # fmt: skip
    return table(*rows) + f"\n\n{note}"


def unclip() -> str:
    """Image embeddings: what variations keep, and whether prompts are obeyed three ways."""
    run = read("unclip.json")

    def column(name: str, score: str) -> Estimate:
        return statistics.mean([v for part in run["parts"][name].values() for v in part[score]])

    rows = [("pictures by way of", "attributes obeyed", "distance of two pictures of a prompt")]
    rows += [(name, f"{column(name, 'obeyed'):.2f}", f"{column(name, 'diversity'):.2f}")
             for name in ("prior", "regression", "text alone")]  # fmt: skip
    note = (f"Variations of {run['pictures']} held-out pictures keep {column('variations', 'kept'):.2f} of the "
            f"attributes (of another picture's: {column('variations', 'shuffled').value:.2f}). Correlation of edges: "
            f"two variations {column('variations', 'alike'):.2f}, two pictures of one prompt "
            f"{column('variations', 'apart'):.2f}. Measured by `python measurements/unclip.py`: {run['steps']} DDIM "
            f"steps, w = {run['w']:g} (text alone {run['w_text']:g}), {run['dtype']}, {run['device']}, "
            f"{run['date']}.")  # fmt: skip
    return table(*rows) + f"\n\n{note}"


def keeping() -> str:
    """What each way to hold a subject keeps, over six subjects; and the GAN's inversion."""
    run = read("keeping.json")
    names = {"keeps": "structure of the picture", "between scenes": "of two scenes, one source or noise",
             "subject_fidelity": "subject fidelity", "scene": "scene read"}  # fmt: skip
    subjects = run["subjects"].values()
    rows = [("way", *names.values())]
    for way in [way for way in next(iter(subjects)) if way != "errors"]:
        means = [statistics.mean([sum(row[way][key]) / len(row[way][key]) for row in subjects]) for key in names]
        rows.append((way.replace("_", " "), *(f"{one:.2f}" for one in means)))
    text = table(*rows)
    if "gan" in run:
        gan = [("inversion", "cats, dB", "other nouns, dB", "noun read, cats", "noun read, others")]
        places = ("cats", "others")
        for name, found in run["gan"].items():
            read_off = (statistics.share([v > 0.5 for v in found[place]["noun"]]) for place in places)
            gan.append((name, *(f"{statistics.mean(found[place]['own']):.1f}" for place in places),
                        *(f"{one:.2f}" for one in read_off)))  # fmt: skip
        text += "\n\n" + table(*gan)
    return text + (f"\n\nIntervals over subjects, and over pictures. Measured by `python measurements/keeping.py`: "
                   f"{run['steps']} DDIM steps, w = {run['w']:g}, {run['dtype']}, {run['device']}, "
                   f"{run['date']}.")  # fmt: skip


def editing_speed() -> str:
    """Seconds for one edit, beside the plain way."""
    run = read("benchmark_editing.json")
    rows = [("one picture of 64×64", "course_lib", "the plain way", "times as fast", "target")]
    for row in run["rows"]:
        ours, plain = row["seconds"]["course_lib"], row["seconds"]["plain way"]
        reached = "reached" if ours <= row["target_seconds"] else "missed"
        rows.append((row["what"], f"{ours:.1f} s", f"{plain:.1f} s", f"{row['times_as_fast']:.1f}",
                     f"<= {row['target_seconds']} s ({reached})"))  # fmt: skip
    note = (f"Measured by `python benchmarks/editing.py`: {run['steps']} DDIM steps, w = {run['w']:g}, "
            f"{run['device']}, torch {run['torch']}, {run['date']}. The ratio is the median over {run['rounds']} "
            "rounds.")  # fmt: skip
    return table(*rows) + f"\n\n{note}"
