"""C1 to C3, from records: the curve of a Toybox-10 training, and what measurements/cifar10_model.py writes.

data/results/ddpm_toybox10_curve.json holds that curve: what a training with --score measured at its saves, as it stands
in the provenance.json that it wrote. The shipped Toybox-10 model is of another training, without --score.
"""

import json
from dataclasses import replace

import torch

from course_lib.environment import RESULTS
from course_lib.evaluation import rules_models, statistics
from course_lib.evaluation.claims import Finding
from course_lib.evaluation.statistics import Estimate


def distance(row: dict) -> Estimate:
    """The Fréchet distance of a row with its interval."""
    return statistics.jackknife(row["frechet"], row["frechet_left_out"])


def right(row: dict) -> Estimate:
    """The share of samples that the classifier names right."""
    return statistics.share(round(row["accuracy"] * row["n"]), row["n"])


def findings() -> list[Finding]:
    """C1 of the first and last save of that training, C2 of both data sets, C3 of w = 1 and w = 3 on CIFAR-10."""
    training = json.loads((RESULTS / "ddpm_toybox10_curve.json").read_text(encoding="utf-8"))
    curve = training["curve"]
    models = [
        json.loads((RESULTS / f"ddpm_{name}.json").read_text(encoding="utf-8")) for name in ("cifar10", "toybox10")
    ]
    losses = [torch.tensor(row["held_out_loss"]) for row in (curve[0], curve[-1])]
    gaps = []
    for model in models:
        own = next(row for row in model["guidance"] if row["w"] == 1)
        left_out = torch.tensor(model["other"]["frechet_left_out"]) - torch.tensor(own["frechet_left_out"])
        gaps.append(statistics.jackknife(model["other"]["frechet"] - own["frechet"], left_out))
    weak, strong = (next(row for row in models[0]["guidance"] if row["w"] == w) for w in (1, 3))
    spreads = [torch.tensor(row["diversity_by_class"]) for row in (weak, strong)]
    found = [
        rules_models.c1(*losses, distance(curve[0]), distance(curve[-1])),
        rules_models.c2(gaps),
        rules_models.c3(statistics.difference(right(strong), right(weak)), statistics.paired(*spreads)),
    ]
    devices = (record["device"] for record in (training, models[0], models[0]))
    return [replace(one, device=device) for one, device in zip(found, devices, strict=True)]
