"""From the records of Part 3 (unclip.json, editing.json, keeping.json) to the rules of C5, C6, C7 and C9."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from course_lib.environment import RESULTS
from course_lib.evaluation import rules_editing, rules_methods, statistics
from course_lib.evaluation.claims import Finding
from course_lib.evaluation.statistics import Estimate


def findings(folder: Path = RESULTS) -> list[Finding]:
    """C5, C6, C7 and C9, of the records that are there."""
    paths = {name: folder / f"{name}.json" for name in ("unclip", "editing", "keeping")}
    there = {name: json.loads(path.read_text(encoding="utf-8")) for name, path in paths.items() if path.is_file()}
    found = [rules_editing.c5(*of_unclip(there["unclip"]))] if "unclip" in there else []
    if "editing" in there:
        found.append(rules_editing.c6(of_edits(there["editing"]), errors(there["editing"])))
    if "keeping" in there:
        found += [rules_editing.c7(*of_subjects(there["keeping"])), rules_methods.c9(**for_c9(there["keeping"]))]
    return found


def of_edits(record: Mapping) -> dict[str, dict[str, Tensor]]:
    """method -> score -> (edits,) of data/results/editing.json; not a number where a score does not apply."""
    found = {}
    for method, parts in record["methods"].items():
        ordered = [parts[at] for at in sorted(parts, key=int)]
        found[method] = {name: torch.tensor([float("nan") if v is None else v for part in ordered for v in part[name]])
                         for name in ("obeyed", "kept", "structure", "truth")}  # fmt: skip
    return found


def errors(record: Mapping) -> tuple[list[float], list[float]]:
    """For `c6`: errors of DDIM and of null-text inversion at the guidance scale of the edits."""
    w = str(record["w"])
    return tuple(record["reconstruction"][name][w]["errors"] for name in ("DDIM", "null-text"))


def of_unclip(record: Mapping) -> tuple[Estimate, ...]:
    """For `c5`, from data/results/unclip.json: kept, alike, apart, by the prior, by text alone."""

    def column(table: str, name: str) -> Estimate:
        return statistics.mean([value for part in record["parts"][table].values() for value in part[name]])

    return (*(column("variations", name) for name in ("kept", "alike", "apart")),
            column("prior", "obeyed"), column("text alone", "obeyed"))  # fmt: skip


def of_subjects(record: Mapping) -> tuple[Estimate, ...]:
    """For `c7`, from data/results/keeping.json; editing is the mean of both methods."""

    def column(way: str, name: str) -> Tensor:
        return torch.tensor([sum(row[way][name]) / len(row[way][name]) for row in record["subjects"].values()])

    def editing(name: str) -> Tensor:
        return (column("Prompt-to-Prompt", name) + column("Plug-and-Play", name)) / 2

    likeness = statistics.paired(column("lora", "subject_fidelity"), column("noun", "subject_fidelity"))
    gains = (statistics.paired(editing(name), column("lora", name)) for name in ("keeps", "between scenes"))
    return (*gains, likeness)


def for_c9(record: Mapping) -> dict:
    """The arguments of `rules_methods.c9`, from data/results/keeping.json: one number a subject."""
    rows = record["subjects"].values()

    def score(way: str) -> Tensor:
        return torch.tensor([sum(max(0, f) * p for f, p in zip(row[way]["subject_fidelity"], row[way]["scene"]))
                             / len(row[way]["scene"]) for row in rows])  # fmt: skip

    def layout(way: str, name: str) -> Tensor:
        return torch.tensor([sum(row[way][name]) / len(row[way][name]) for row in rows])

    again, other = (sum(row["errors"][key] for row in rows) / len(rows) for key in ("again", "other"))
    ways = {"any noise": "noun", "inverted latent": "inverted latent", "the word": "textual_inversion"}
    found = dict(again=again, other=other, scores={name: score(way) for name, way in ways.items()},
                 layouts={"inverted latent": layout("inverted latent", "between scenes"),
                          "the word": layout("textual_inversion", "within a scene")},
                 covers=f"intervals over {len(rows)} subjects")  # fmt: skip
    if "gan" in record:
        best = record["gan"]["a latent for each block"]
        found["gan"] = dict(own=best["cats"]["own"], next=best["cats"]["next"], others=best["others"]["own"])
    return found
