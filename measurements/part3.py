"""From the records of Part 3 (unclip.json, editing.json, keeping.json) to the rules of C5, C6, C7 and C9."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from course_lib.environment import RESULTS
from course_lib.evaluation import rules_editing, rules_methods
from course_lib.evaluation.claims import Finding


def findings(folder: Path = RESULTS) -> list[Finding]:
    """C5, C6, C7 and C9, of the records that are whole."""
    paths = {name: folder / f"{name}.json" for name in ("unclip", "editing", "keeping")}
    there = {name: json.loads(path.read_text(encoding="utf-8")) for name, path in paths.items() if path.is_file()}
    found = []
    if whole(there.get("unclip", {}), "parts", ("variations", "prior", "text alone")):
        one = rules_editing.c5(*(by_picture(there["unclip"], name) for name in ("variations", "prior", "text alone")))
        found.append(replace(one, device=there["unclip"]["device"]))
    if whole(there.get("editing", {}), "methods", rules_editing.METHODS) and "reconstruction" in there["editing"]:
        rows = {name: by_picture(there["editing"], name, "methods") for name in there["editing"]["methods"]}
        found.append(replace(rules_editing.c6(rows, errors(there["editing"])), device=there["editing"]["device"]))
    if "keeping" in there and "gan" in there["keeping"]:
        both = rules_editing.c7(by_subject(there["keeping"])), rules_methods.c9(**for_c9(there["keeping"]))
        found += [replace(one, device=there["keeping"]["device"]) for one in both]
    return found


def whole(record: Mapping, table: str, names: tuple[str, ...]) -> bool:
    """Whether a record has these rows."""
    return all(name in record.get(table, {}) for name in names)


def by_picture(record: Mapping, name: str, table: str = "parts") -> dict[str, Tensor]:
    """score -> one number a picture, of a row that was measured in parts; not a number where a score does not apply."""
    parts = [record[table][name][at] for at in sorted(record[table][name], key=int)]
    scores = [score for score, values in parts[0].items() if isinstance(values, list)]
    return {score: torch.tensor([float("nan") if v is None else v for part in parts for v in part[score]])
            for score in scores}  # fmt: skip


def errors(record: Mapping) -> tuple[list[float], list[float]]:
    """For `c6`: errors at the guidance scale of the edits, of the inversion that null-text begins with and of it."""
    w, names = str(record["w"]), ("DDIM, 1 fixed-point evaluation", "null-text")
    return tuple(record["reconstruction"][name][w]["errors"] for name in names)


def by_subject(record: Mapping) -> dict[str, dict[str, Tensor]]:
    """way -> score -> one number a subject, of data/results/keeping.json."""
    subjects = list(record["subjects"].values())
    ways = [way for way in subjects[0] if way != "errors"]
    return {way: {score: torch.tensor([sum(row[way][score]) / len(row[way][score]) for row in subjects])
                  for score in subjects[0][way]} for way in ways}  # fmt: skip


def for_c9(record: Mapping) -> dict:
    """The arguments of `rules_methods.c9`, from data/results/keeping.json: one number a subject."""
    rows, subjects = by_subject(record), list(record["subjects"].values())
    again, other = (sum(row["errors"][key] for row in subjects) / len(subjects) for key in ("again", "other"))
    ways = {"any noise": "noun", "inverted latent": "inverted latent", "the word": "textual_inversion"}
    best = record["gan"]["a latent for each block"]
    return dict(again=again, other=other, scores={name: rows[way]["told"] for name, way in ways.items()},
                layouts={"inverted latent": rows["inverted latent"]["between scenes"],
                         "the word": rows["textual_inversion"]["within a scene"]},
                covers=f"intervals over {len(subjects)} subjects",
                gan=dict(own=best["cats"]["own"], next=best["cats"]["next"], others=best["others"]["own"]))  # fmt: skip
