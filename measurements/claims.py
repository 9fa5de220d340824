"""Judge the claims by what was measured: writes data/results/claims.json.

    make claims                        all steps; rows that were measured with these weights and this dtype stay
    python measurements/methods.py     step 1: every method on every subject, data/results/personalization.json
    python measurements/pairs.py       step 2: two subjects in one picture, pairs.json
    python measurements/styles.py      step 3: faces and styles, styles.json
    python measurements/claims.py      step 4: this file; --fresh does its own experiments again

C10 to C13 and C15 follow from step 1; C8, C14 and C18 have experiments in experiments.py, C21a and C21b in
mixtures.py; C16, C17 and C19 follow from step 2, C20 from step 3, C4 from spaces.json (spaces.py), and C1 to C3 from
the records of Part 1.
The rules are in course_lib/evaluation/, the same for this record and for the notebooks.
"""

import argparse
import json
from pathlib import Path

import experiments
import mixtures
import part1
import part3
import records
from methods import SUBJECTS, Sampler

from course_lib.environment import RESULTS
from course_lib.evaluation import rules_methods, rules_models
from course_lib.evaluation.claims import CLAIMS, Finding, not_yet

EXPERIMENTS = experiments.EXPERIMENTS | {("mixtures",): mixtures.mixtures}


def from_methods(table: dict) -> list[Finding]:
    """C10 to C13 and C15, from the rows of step 1: subject -> method -> seed -> row."""
    table = {name: table[name] for name in SUBJECTS if name in table}
    rows, one = rules_methods.over_seeds(table), next(iter(table.values()))
    parameters = {key: one[key]["0"]["parameters"] for key in ("custom_diffusion", "dreambooth")}
    return [rules_methods.compare(name, rows) for name in rules_methods.COMPARISONS] + [
        rules_methods.c15(rows, parameters)
    ]


def from_experiments(done: dict, images: int) -> list[Finding]:
    """C8, C14, C18, C21a and C21b, of the experiments that are done."""
    found = [Finding("C8", **done["c8"])] if "c8" in done else []
    if "changes" in done:
        found += [
            rules_methods.c14(
                *({name: one[key] for name, one in done["changes"].items()} for key in ("excess", "fidelity"))
            )
        ]
    found += [rules_methods.c18(done["compound"], images)] if "compound" in done else []
    found += mixtures.from_mixtures(done["mixtures"]) if "mixtures" in done else []
    return found


def from_pairs(path: Path = RESULTS / "pairs.json") -> list[Finding]:
    """C16, C17 and C19, from the record of measurements/pairs.py."""
    if not path.is_file():
        return []
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    scores = rules_methods.of_pairs(rows)
    merges = [row["merge"] for names in scores for seed, row in rows[names].items() if seed.isdigit()]
    return [rules_methods.c16(scores), rules_methods.c17(merges), rules_methods.c19(scores)] if scores else []


def from_spaces(path: Path = RESULTS / "spaces.json") -> list[Finding]:
    """C4, from the record of measurements/spaces.py."""
    if not path.is_file():
        return []
    record = json.loads(path.read_text(encoding="utf-8"))
    return [rules_models.c4(list(record["runs"].values()), record["scale"]["real"])]


def from_styles(path: Path = RESULTS / "styles.json") -> list[Finding]:
    """C20 by DreamBooth, which trains most, from the record of measurements/styles.py."""
    if not path.is_file():
        return []
    record, key, learnt = json.loads(path.read_text(encoding="utf-8")), "subject_fidelity", {}
    for face, rows in record["faces"].items():
        learnt[face] = dict(untouched=rows["base"]["0"]["by_prompt"][key], truth=record["known"][face]["truth"],
                            learnt=[row["by_prompt"][key] for row in rows["dreambooth"].values()])  # fmt: skip
    for style, rows in record["styles"].items():
        known = {name: record["known"][style][name]["style_fidelity"] for name in ("untouched", "truth")}
        learnt[style] = known | dict(learnt=[row["style_fidelity"] for row in rows["dreambooth"].values()])
    return [rules_methods.c20(learnt)]


def judged(done: dict, table: dict, sampler: Sampler) -> dict:
    """The entries of all claims, C1 to C21b, as the record keeps them."""
    found = [*part1.findings(), *part3.findings(), *from_spaces(), *from_styles(), *from_pairs(), *from_methods(table)]
    found += from_experiments(done, sampler.args.images)
    known = {one.name: one for one in found}
    return {name: known.get(name, not_yet(name)).as_dict() for name in CLAIMS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="toybox", help="as for step 1")
    parser.add_argument("--rows", type=Path, default=RESULTS / "personalization.json", help="what step 1 wrote")
    parser.add_argument("--out", type=Path, default=RESULTS / "claims.json")
    records.add_options(parser)
    args = parser.parse_args()
    table = json.loads(args.rows.read_text(encoding="utf-8"))
    args.images, args.steps, args.w = table["images"], table["steps"], table["w"]
    sampler = Sampler(args)
    setting = sampler.setting()
    records.read(args.rows, setting)
    setting |= dict(made_by="measurements/claims.py")
    records.start(args.out, setting, fresh=args.fresh)
    for keys, measure in EXPERIMENTS.items():
        records.fill(args.out, setting, ("experiments", *keys), measure, sampler)
    result = records.read(args.out, setting)
    result["claims"] = judged(result["experiments"], table["rows"], sampler)
    records.write(args.out, result, measured=False)
    for name, claim in result["claims"].items():
        print(f"{name}: {claim['verdict'].upper()}: {claim['measured']}")


if __name__ == "__main__":
    main()
