"""The experiment of C21a and C21b: pictures drawn from mixtures of two words' features, as the judge sees them.

measurements/claims.py runs it if its record lacks it. The rules are in course_lib/evaluation/rules_models.py, and
notebooks/06_stable_diffusion.ipynb does the same with fewer pictures.
"""

from dataclasses import replace

import numpy as np
import torch
from methods import Sampler
from torch import Tensor

from course_lib.evaluation import rules_models
from course_lib.evaluation.claims import Finding
from course_lib.evaluation.judge import ATTRIBUTES, answers
from course_lib.toybox.world import render, sample_spec

WORDS = ("cat", "tiger")
SHARES, PICTURES, REAL = 7, 64, 500  # mixtures from all tiger to all cat, pictures of each, renderings of each noun


def logits(sampler: Sampler, images: Tensor | np.ndarray) -> Tensor:
    """(2, N): the judge's log-probabilities of WORDS."""
    found = answers(sampler.scorer.judge, images)[0]["noun"].log_softmax(1).T
    return found[[ATTRIBUTES["noun"].index(word) for word in WORDS]].cpu()


def mixtures(sampler: Sampler) -> dict:
    """Of the mixtures both log-probabilities, (K, 2, N); of real cats, tigers and their fades the log odds, (3, M)."""
    sd, args = sampler.sd, sampler.args
    cat, tiger = (sd.encode_prompt(f"a photo of a {word}") for word in WORDS)
    noise, rows = sd.noise(PICTURES, seed=8), []
    for a in torch.linspace(0, 1, SHARES).tolist():
        images = sd.sample(a * cat + (1 - a) * tiger, x_T=noise, w=args.w, steps=args.steps, batch=16)
        rows.append(logits(sampler, images.float()))
    rng = np.random.default_rng(8)
    specs = [sample_spec(rng, WORDS[0], relation=None, style="plain") for _ in range(REAL)]
    real = [np.stack([render(replace(spec, noun=word), 64) for spec in specs]) for word in WORDS]
    real.append((real[0] / 2 + real[1] / 2).astype(np.uint8))
    odds = [one - other for one, other in (logits(sampler, images) for images in real)]
    found = {"mixtures": torch.stack(rows), "real": torch.stack(odds)}
    return {key: values.double().mul(1000).round().div(1000).tolist() for key, values in found.items()}


def from_mixtures(done: dict) -> list[Finding]:
    """C21a and C21b, from what `mixtures` returned."""
    rows, real = torch.tensor(done["mixtures"]), torch.tensor(done["real"])
    cats, tigers, fades = real
    between = [rules_models.in_between(odds, cats, tigers) for odds in (*(rows[:, 0] - rows[:, 1]), fades)]
    ends = torch.cat([between[0], between[-2]])
    c21b = rules_models.c21b(between[len(rows) // 2], ends, between[-1])
    return [rules_models.c21a(rows[:, 0].exp(), rows[:, 1].exp()), c21b]
