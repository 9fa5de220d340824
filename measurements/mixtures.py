"""The experiment of C21a and C21b: pictures drawn from mixtures of two words' features, as the judge sees them.

measurements/claims.py runs it if its record lacks it. The rules are in course_lib/evaluation/rules_models.py.
notebooks/06_stable_diffusion.ipynb does the same with fewer pictures, from other noises (seed 8).
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
HALF, SEED = 200, 21  # pictures at a = 1/2, of which PICTURES have the noises of the other mixtures; of the noises


def logits(sampler: Sampler, images: Tensor | np.ndarray) -> Tensor:
    """(2, N): the judge's log-probabilities of WORDS."""
    found = answers(sampler.scorer.judge, images)[0]["noun"].log_softmax(1).T
    return found[[ATTRIBUTES["noun"].index(word) for word in WORDS]].cpu()


def mixtures(sampler: Sampler) -> dict:
    """Of the mixtures both log-probabilities, (K, 2, PICTURES), and at a = 1/2 (2, HALF); of real cats, tigers and
    their fades the log odds, (3, REAL)."""
    sd, args = sampler.sd, sampler.args
    cat, tiger = (sd.encode_prompt(f"a photo of a {word}") for word in WORDS)
    noise, rows = sd.noise(HALF, seed=SEED), []
    for k, a in enumerate(torch.linspace(0, 1, SHARES).tolist()):
        x_T = noise if k == SHARES // 2 else noise[:PICTURES]
        images = sd.sample(a * cat + (1 - a) * tiger, x_T=x_T, w=args.w, steps=args.steps, batch=16)
        rows.append(logits(sampler, images.float()))
    half = rows[SHARES // 2]
    rows[SHARES // 2] = half[:, :PICTURES]
    rng = np.random.default_rng(SEED)
    specs = [sample_spec(rng, WORDS[0], relation=None, style="plain") for _ in range(REAL)]
    real = [np.stack([render(replace(spec, noun=word), 64) for spec in specs]) for word in WORDS]
    real.append((real[0] / 2 + real[1] / 2).astype(np.uint8))
    odds = [one - other for one, other in (logits(sampler, images) for images in real)]
    found = {"mixtures": torch.stack(rows), "half": half, "real": torch.stack(odds)}
    return {key: values.double().mul(1000).round().div(1000).tolist() for key, values in found.items()}


def from_mixtures(done: dict) -> list[Finding]:
    """C21a and C21b, from what `mixtures` returned."""
    rows, half, real = (torch.tensor(done[key]) for key in ("mixtures", "half", "real"))
    cats, tigers, fades = real
    tiger, cat = rows[0, 0] - rows[0, 1], rows[-1, 0] - rows[-1, 1]
    between = [rules_models.in_between(odds, cats, tigers) for odds in (half[0] - half[1], tiger, cat, fades)]
    c21b = rules_models.c21b(between[0], torch.stack(between[1:3]), between[3])
    return [rules_models.c21a(rows[:, 0].exp(), rows[:, 1].exp()), c21b]
