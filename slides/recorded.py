"""What several files of figures read: records, recorded samples, the shipped model."""

import json
from functools import lru_cache

import numpy as np
import torch

from course_lib.environment import RESULTS
from course_lib.evaluation import rules_methods, statistics
from course_lib.latent import stable_diffusion
from course_lib.latent.stable_diffusion import StableDiffusion

SUBJECTS = ("biscuit", "tilly", "mochi", "rollo", "bruno", "beppo")


@lru_cache
def record(name: str) -> dict:
    """A record of data/results, by its name without .json."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def measured_on(name: str) -> str:
    """Device and date of a record, for small print."""
    return f"measured on {record(name)['device']}, {record(name)['date']}"


@lru_cache
def rows() -> dict:
    """subject -> method -> score -> (training seeds, prompts), of the record of all methods."""
    return rules_methods.over_seeds({name: record("personalization")["rows"][name] for name in SUBJECTS})


def mean_score(method: str, score: str) -> statistics.Estimate:
    """The mean of a method's score, with its interval over subjects."""
    return statistics.over_subjects([rows()[name][method][score] for name in SUBJECTS])


@lru_cache
def toybox(dtype: torch.dtype = torch.float32) -> StableDiffusion:
    """The shipped latent diffusion model."""
    return stable_diffusion.load("toybox", dtype=dtype)


def runs(filled: np.ndarray, least: int) -> list[tuple[int, int]]:
    """Start and end of each run of True that is at least so long: tiles between the white gaps of a sheet."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], filled.astype(int), [0]])))
    return [(start, end) for start, end in zip(edges[::2].tolist(), edges[1::2].tolist()) if end - start >= least]
