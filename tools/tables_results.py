"""The tables of RESULTS.md, as Markdown, from data/results/. Each public function is one table."""

import itertools
import json
import statistics

from tables import estimate, read, table

from course_lib.environment import CHECKPOINTS
from course_lib.evaluation.personalized import SCORES
from course_lib.evaluation.rules_methods import over_seeds
from course_lib.evaluation.statistics import jackknife, mean, over_subjects, share


def quality() -> str:
    """The measured quality of the models of Part 1, with what real pictures reach beside it."""
    rows = [("data", "pictures", "Fréchet distance", "class accuracy")]
    notes = []
    for data in ("cifar10", "toybox10"):
        name, result = {"cifar10": "CIFAR-10", "toybox10": "Toybox-10"}[data], read(f"ddpm_{data}.json")
        real, training = result["real"], result["training"]
        plain = next(row for row in result["guidance"] if row["w"] == 1)
        best = max(result["guidance"], key=lambda row: row["accuracy"])
        found = [(result["main"], ""), (best, "the most accurate w"), (plain, "no guidance")]
        if "earlier" in result:
            found.insert(1, (result["earlier"]["main"], f"weights of {result['earlier']['training']['date']}"))
        for row, words in found:
            what = f"{row['n']:,} samples, w = {row['w']:g}, {row['steps']} DDIM steps" + f" ({words})" * bool(words)
            accuracy = f"{row['accuracy']:.1%} ± {row['accuracy_ci95']:.1%}"
            distance = jackknife(row["frechet"], row["frechet_left_out"])
            rows.append((name, what, f"{distance:.1f}", accuracy))
        tested = f"{real['test_images_to_train']:.1f}", f"{real['accuracy']:.1%}"
        rows += [
            (name, "10,000 real test pictures", *tested),
            *[(name, f"{result['main']['n']:,} of them", f"{real['test_images_n_main_to_train']:.1f}", "")]
            * (result["main"]["n"] < 10_000),
            (name, f"{plain['n']:,} of them", f"{real['test_images_n_sweep_to_train']:.1f}", ""),
            (name, "two halves of the real training pictures: the floor", f"{real['floor_two_halves']:.2f}", ""),
        ]
        runs = [*training.get("before", []), training]
        seen, devices = sum(run["steps"] * run["batch_size"] for run in runs), {run["device"]: 0 for run in runs}
        sizes = f"`--n {result['arguments']['n']} --n-sweep {result['arguments']['n_sweep']}`"
        notes.append(
            f"the {name} model saw {seen:,} pictures ({'; '.join(devices)}), measured {result['date']} with {sizes}"
        )
    result, sheet = read("ddpm_cifar10.json"), read("ddpm_cifar10_named.json")
    right = [one == other for one, other in zip(sheet["named"], sheet["labels"], strict=True)]
    judge = json.loads((CHECKPOINTS / "classifier-cifar10" / "provenance.json").read_text(encoding="utf-8"))["quality"]
    exact = f"{judge['exact_test_accuracy']:.1%} on {judge['exact_test_images']:,} pixel-exact test pictures"
    note = (
        f"Measured by `python measurements/cifar10_model.py`, for Toybox-10 with `--toybox`: seed {result['seed']}, "
        f"{result['device']}; {'; '.join(notes)}. Accuracy of the CIFAR-10 classifier: {exact}. "
        "An AI model that helped to write the course knew that each class comes eight times, saw no labels, and named "
        f"{share(right)} of 80 shuffled samples right (w = 3, 50 steps, data/results/ddpm_cifar10_named.png)."
    )
    return table(*rows) + f"\n\n{note}"


def toybox() -> str:
    """Whether the Toybox model draws what the prompts say, beside what the judge reads off real renderings."""
    result, names = read("toybox_sd.json"), ("noun", "colour", "pattern", "scene", "accessory", "relation")
    rows = [("pictures", *names, "both nouns", "Fréchet distance", "CLIP-T")]
    sets = {f"w = {float(w):g}": row for w, row in result["w"].items()} | {"real renderings": result["real"]}
    for label, row in sets.items():
        shares = ["{value:.1%} ({low:.0%} to {high:.0%})".format(**row[name]) for name in (*names, "both nouns")]
        rows.append((label, *shares, f"{row['frechet']:.2f}", f"{estimate(row['clip_t']):.3f}"))
    targets = {"noun": 0.95, "colour": 0.90, "scene": 0.95, "pattern": 0.85}
    best = max(result["w"], key=lambda w: sum(result["w"][w][name]["value"] for name in targets))
    of_real = {name: [result["w"][best][name][end] / result["real"][name]["value"] for end in ("value", "low", "high")]
               for name in targets}  # fmt: skip

    def verdict(share: float, low: float, high: float, goal: float) -> str:
        surely = low >= goal or high < goal
        return ("reached" if share >= goal else "missed") + ("" if surely else ", by less than the interval")

    reached = "; ".join(f"{name} {of_real[name][0]:.1%} (target {goal:.0%}, {verdict(*of_real[name], goal)})"
                        for name, goal in targets.items())  # fmt: skip
    note = (
        f"Share of what the judge reaches on real renderings, at w = {float(best):g}: {reached}. A guided picture of "
        f"25 steps takes {result['seconds']['1']:.1f} s alone; eight take {result['seconds']['8']:.1f} s. Measured by "
        f"`python measurements/toybox_model.py --prompts {result['prompts']}`: held-out prompts, {result['steps']} "
        f"DDIM steps, seed {result['seed']}, {result['device']}, {result['date']}."
    )
    return table(*rows) + f"\n\n{note}"


def pairs() -> str:
    """Two objects in one picture: drawn by the Toybox model, and real renderings of the same prompts."""
    result, rows = read("toybox_sd.json"), [("prompts", "pictures", "both nouns", "with their own colours")]
    for relation, found in result["pairs"].items():
        for label, row in (("drawn", found["drawn"]), ("real renderings", found["real"])):
            own = row["own colours" if "own colours" in row else "own colour"]
            cells = ["{value:.1%} ({low:.0%} to {high:.0%})".format(**one) for one in (row["both nouns"], own)]
            rows.append((f'{row["both nouns"]["n"]} × "{relation}"', label, *cells))
    note = (
        'Colours: for "next to" both nouns are found in their halves of the picture, each in its colour; for "on" the '
        "upper object has its own colour. Measured by `python measurements/toybox_model.py`: random pairs of nouns, "
        f"w = {found['w']:g}, {found['device']}, {found['date']}."
    )
    return table(*rows) + f"\n\n{note}"


def spaces() -> str:
    """One UNet trained for equal times on pixels and on latents: what its samples are worth at each mark."""
    result = read("spaces.json")
    run = next(iter(result["runs"].values()))
    marks = [f"after {row['seconds']:.0f} s" for row in next(iter(run.values()))]
    rows = [("space, training seed", "steps in all", *(f"nouns right {mark}" for mark in marks), "distance at the end")]
    for name, seed in itertools.product(run, result["runs"]):
        found = result["runs"][seed][name]
        shares = [f"{row['share']['value']:.2f}" for row in found]
        rows.append((f"{name}, {seed}", f"{found[-1]['steps']:,}", *shares, f"{estimate(found[-1]['distance']):.0f}"))
    real = result["scale"]["real"]
    rows.append(("real test pictures", "", *[""] * (len(marks) - 1), f"{real['share']['value']:.2f}",
                 f"{estimate(real['distance']):.0f}"))  # fmt: skip
    note = (f"Measured by `python measurements/spaces.py`: seconds of CPU time of the training, one thread, "
            f"{run['latents'][-1]['share']['n']} samples a mark, {result['device']}, {result['date']}.")  # fmt: skip
    return table(*rows) + f"\n\n{note}"


def pointing() -> str:
    """How well the attention of a word covers what it names, at each layer size."""
    result = read("pointing.json")
    sizes = result["t"]["300"]
    rows = [("word", *(f"{size}×{size} layers" for size in sizes))]
    for word in [name for name in next(iter(sizes.values())) if name != "attention"]:
        cells = [f"{estimate(one[word]['area']):.3f} (other mask: {one[word]['shuffled']['value']:.2f})"
                 for one in sizes.values()]  # fmt: skip
        rows.append((word.replace("_", " "), *cells))
    note = (
        f"Area under the curve at t = 300, over {result['renderings']} renderings whose masks are known; .5 is chance. "
        "In brackets: the same map against the mask of another rendering, whose object is near the middle too. "
        f"Measured by `python measurements/pointing.py`: seed {result['seed']}, {result['dtype']}, {result['device']}, "
        f"{result['date']}."
    )
    return table(*rows) + f"\n\n{note}"


def scores() -> str:
    """What each score measures."""
    rows = [(name, words.replace("<", "\\<")) for name, words in SCORES.values()]  # or it would be read as HTML
    return table(("score", "what it measures"), *rows)


def methods() -> str:
    """Every method of Part 4: means over subjects, with intervals over subjects."""
    run = read("personalization.json")
    subjects, rows, mean, size = run["rows"], [], {}, {}
    scores = over_seeds(subjects)
    for method in next(iter(subjects.values())):
        found = [row for methods in subjects.values() for row in methods[method].values()]
        values = {key: over_subjects([methods[method][key] for methods in scores.values()]) for key in SCORES}
        seconds = [row["seconds_to_prepare"] + row["seconds_to_train"] for row in found if "bytes" in row]
        cost = (f"{statistics.mean(seconds):.0f}", f"{found[0]['bytes']:,}") if seconds else ("", "")
        rows.append((method.replace("_", " "), *(f"{value:.3f}" for value in values.values()), *cost))
        mean[method], size[method] = values["subject_fidelity"].value, found[0].get("parameters", 0)
    gain = (mean["custom_diffusion"] - mean["base"]) / (mean["dreambooth"] - mean["base"])
    share = size["custom_diffusion"] / size["dreambooth"]
    seeds = len(next(iter(subjects.values()))["dreambooth"])
    note = (
        f"Custom Diffusion has {gain:.0%} of DreamBooth's gain in subject "
        f"fidelity over the untouched model, with {share:.1%} of its parameters. Measured by `python "
        f"measurements/methods.py` on {', '.join(subjects)}, {seeds} training seeds each: at least 20 prompts of "
        f"{run['images']} samples, "
        f"{run['steps']} DDIM steps, w = {run['w']:g}, seed {run['seed']}, {run['dtype']}, {run['device']}, "
        f"{run['date']}."
    )
    return table(("method", *(name for name, _ in SCORES.values()), "seconds", "bytes"), *rows) + f"\n\n{note}"


def claims() -> str:
    """The claims with a record, and everything that was measured for them."""
    run = read("claims.json")
    rows = [("claim", "what it says", "verdict", "measured")]
    for name, claim in run["claims"].items():
        label = f"[{name}](notebooks/{claim['notebook']}.ipynb)" if claim["notebook"] else name
        why = f". Why: {claim['why']}" if claim["why"] else ""
        rows.append((label, claim["claim"], f"**{claim['verdict']}**", claim["measured"] + why))
    note = f"Measured by `make claims`: seed {run['seed']}, {run['dtype']}, {run['device']}, {run['date']}."
    return table(*rows) + f"\n\n{note}"


def tuning() -> str:
    """The settings of each method, chosen on subjects that are not measured."""
    run = read("tuning.json")
    rows = [("method", "rate", "batch", "steps", "score", "best score of all")]
    for method in run["rows"]:
        one = run["chosen"][method]
        rows.append((method.replace("_", " "), f"{one['lr']:g}", one["batch_size"], one["steps"], f"{one['score']:.3f}",
                     f"{one['best']:.3f}"))  # fmt: skip
    note = (
        "The cheapest setting within .02 of each method's best score, of three rates, two batch sizes and four "
        "lengths. Score: subject fidelity times prompt fidelity. Measured by `python measurements/tuning.py` on tofu "
        f"and tockle: {run['images']} samples of each prompt, {run['steps']} steps, w = {run['w']:g}, seed "
        f"{run['seed']}, {run['dtype']}, {run['device']}, {run['date']}."
    )
    return table(*rows) + f"\n\n{note}"


def two_subjects() -> str:
    """Two subjects in one picture, by every way of teaching them: means over pairs, with intervals over pairs."""
    run, keys = read("pairs.json"), ("both_nouns", "subject_fidelity", "lower_subject_fidelity", "clip_t")
    rows = [("", "both nouns", "subject fidelity, mean of the two", "the lower of the two", "CLIP-T")]
    seeds = {nouns: [row for seed, row in one.items() if seed.isdigit()] for nouns, one in run["rows"].items()}
    known = [one["known"] | one["untrained"] for one in run["rows"].values()]
    rows += [(label, *(f"{over_subjects([one[label][key] for one in known])}" for key in keys)) for label in known[0]]
    for label in next(iter(seeds.values()))[0]["scores"]:
        values = {key: over_subjects([[row["scores"][label][key] for row in one] for one in seeds.values()])
                  for key in keys}  # fmt: skip
        rows.append((label, *(f"{value}" for value in values.values())))
    note = (
        f"Means over {len(seeds)} pairs ({', '.join(seeds)}) and {len(next(iter(seeds.values())))} training seeds, "
        "with 95 % intervals over pairs (Student's t). Measured by `python measurements/pairs.py`: 12 prompts of "
        f"{run['images']} samples, {run['steps']} DDIM steps, w = {run['w']:g}, {run['dtype']}, {run['device']}, "
        f"{run['date']}."
    )
    return table(*rows) + f"\n\n{note}"


def styles() -> str:
    """Faces and styles, by every method that learnt them; intervals over prompts."""
    run = read("styles.json")
    rows = [("learnt", "by", "fidelity", "noun kept", "scene kept")]

    def row(what: str, by: str, found: list[dict], key: str = "style_fidelity") -> tuple:
        score, *kept = (over_seeds_of(found, name) for name in (key, "noun", "scene"))
        return what, by.replace("_", " "), score, *kept

    def over_seeds_of(found: list[dict], key: str) -> str:
        if key not in found[0]:
            return ""
        return f"{mean([statistics.mean(values) for values in zip(*(one[key] for one in found), strict=True)]):.2f}"

    ends = {"untouched": "untouched model, without the style's words", "truth": "the renderer",
            "autoencoded": "the renderer, through the autoencoder"}  # fmt: skip
    for name, methods in run["styles"].items():
        rows += [row(name, label, [run["known"][name][key]]) for key, label in ends.items()]
        rows += [row(name, method, list(found.values())) for method, found in methods.items()]
    for name, methods in run["faces"].items():
        found = {method: [one["by_prompt"] for one in seeds.values()] for method, seeds in methods.items()}
        rows.append(row(name, "untouched model", found.pop("base"), "subject_fidelity"))
        rows += [row(name, method, ones, "subject_fidelity") for method, ones in found.items()]
        rows.append(row(name, ends["truth"], [{"subject_fidelity": run["known"][name]["truth"]}], "subject_fidelity"))
    note = (
        "Fidelity: of a style 0 for plain renderings and 1 for renderings in it, of a face subject fidelity; means "
        "over prompts and training seeds, with 95 % intervals over prompts (Student's t). Measured by `python "
        f"measurements/styles.py`: {run['images']} samples of each prompt, {run['steps']} DDIM steps, w = "
        f"{run['w']:g}, {run['dtype']}, {run['device']}, {run['date']}."
    )
    return table(*rows) + f"\n\n{note}"
