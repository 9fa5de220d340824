"""How sure a measured number is: 95 % intervals for means, shares and differences, also of few values.

Used by: notebooks/03_classifier_free_guidance.ipynb, section "Measured", and every notebook that prints an interval.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.stats
import torch
from torch import Tensor

LEVEL = 0.95  # of every interval


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval.

    value, low, high: the estimate and the ends of the interval; low = -inf and high = inf where one value alone says
    nothing about the spread. n: how many independent values it rests on.
    `f"{estimate:+.3f}"` prints "+0.152 ± 0.020", or "0.90 (0.60 to 0.98)" where the interval is not symmetric; never
    "1.00 ± 0.00", but "1.00 (all 8 equal)".
    """

    value: float
    low: float
    high: float
    n: int

    @property
    def half(self) -> float:
        """Half the width of the interval."""
        return (self.high - self.low) / 2

    @property
    def errors(self) -> tuple[float, float]:
        """(down, up): the distances to both ends, for matplotlib's error bars; 0 where there is no interval."""
        down, up = self.value - self.low, self.high - self.value
        return (down, up) if math.isfinite(down + up) else (0.0, 0.0)

    def __add__(self, shift: float) -> Estimate:
        """The estimate and its interval, moved by a constant."""
        return Estimate(self.value + shift, self.low + shift, self.high + shift, self.n)

    def __format__(self, spec: str) -> str:
        spec = spec or ".3f"
        plain = spec.replace("+", "")
        if not math.isfinite(self.half):
            return f"{self.value:{spec}} (one value, no interval)"
        if self.low == self.high:
            return f"{self.value:{spec}} (all {self.n} equal)"
        if math.isclose(self.value - self.low, self.high - self.value, abs_tol=2e-4):  # records are rounded
            return f"{self.value:{spec}} ± {self.half:{plain}}"
        return f"{self.value:{spec}} ({self.low:{plain}} to {self.high:{plain}})"

    def __str__(self) -> str:
        return format(self)

    def as_dict(self) -> dict:
        """For a JSON record: rounded to 4 decimals, None for an end that is infinite."""
        ends = {name: getattr(self, name) for name in ("value", "low", "high")}
        return {k: round(v, 4) if math.isfinite(v) else None for k, v in ends.items()} | {"n": self.n}


def mean(values: Tensor | Sequence[float]) -> Estimate:
    """The mean of independent values with Student's interval.  values: (N,), N >= 1.

    For 0 and 1 use `share`: where all values are equal this interval has no width.
    """
    values = torch.as_tensor(values).double().flatten()
    n, value = len(values), values.mean().item()
    if n == 0:
        raise ValueError("values: expected at least one, got none")
    if n == 1:
        return Estimate(value, -math.inf, math.inf, 1)
    return _student(value, values.std().item() / math.sqrt(n), n)


def share(hits: Tensor | Sequence[bool] | int, n: int | None = None) -> Estimate:
    """A share with Wilson's interval, which stays inside [0, 1] and never has width 0.  Source: Wilson 1927.

    hits: (N,) of 0 and 1; or their number, with n: of how many.
    """
    if n is None:
        values = torch.as_tensor(hits).double().flatten()
        if not ((values == 0) | (values == 1)).all():
            raise ValueError("hits: expected 0 and 1 only; use mean() for other numbers")
        hits, n = int(values.sum()), len(values)
    if n < 1 or not 0 <= hits <= n:
        raise ValueError(f"hits, n: expected 0 <= hits <= n and n >= 1, got {hits} of {n}")
    ends = scipy.stats.binomtest(hits, n).proportion_ci(LEVEL, method="wilson")
    return Estimate(hits / n, min(hits / n, ends.low), max(hits / n, ends.high), n)


def paired(one: Tensor | Sequence[float], other: Tensor | Sequence[float]) -> Estimate:
    """The mean of one - other, value by value: for two methods on the same prompts and noises.  Both (N,)."""
    one, other = torch.as_tensor(one).double(), torch.as_tensor(other).double()
    if one.shape != other.shape:
        raise ValueError(f"one, other: expected the same shape, got {tuple(one.shape)} and {tuple(other.shape)}")
    return mean(one - other)


def paired_shares(one: Tensor | Sequence[bool], other: Tensor | Sequence[bool]) -> Estimate:
    """The share of `one` minus that of `other`, hit by hit; the interval never has width 0.  Both (N,) of 0 and 1.

    Source: Newcombe 1998 (paired shares), method 10: Wilson's limits of both shares, joined with their correlation.
    """
    a, b = (torch.as_tensor(values).double().flatten() for values in (one, other))
    if a.shape != b.shape:
        raise ValueError(f"one, other: expected the same shape, got {tuple(a.shape)} and {tuple(b.shape)}")
    first, second, n = share(a), share(b), len(a)
    both, neither = (a * b).sum().item(), ((1 - a) * (1 - b)).sum().item()
    only_a, only_b = n * first.value - both, n * second.value - both
    product = both * neither - only_a * only_b
    if product > 0:
        product = max(0.0, product - n / 2)  # Newcombe's correction for continuity
    margins = (both + only_a) * (only_b + neither) * (both + only_b) * (only_a + neither)
    phi = product / math.sqrt(margins) if margins else 0.0

    def reach(x: float, y: float) -> float:
        return math.sqrt(max(0.0, x * x - 2 * phi * x * y + y * y))

    value = first.value - second.value
    low = value - reach(first.value - first.low, second.high - second.value)
    high = value + reach(first.high - first.value, second.value - second.low)
    return Estimate(value, low, high, n)


def difference(one: Estimate, other: Estimate) -> Estimate:
    """one - other of two independent estimates.  Source: Newcombe 1998, method 10 (for shares).

    The distance to each end is the root of the sum of two squared distances; for symmetric intervals this is the
    usual square root of half_1^2 + half_2^2.
    """
    value = one.value - other.value
    low = value - math.hypot(one.value - one.low, other.high - other.value)
    high = value + math.hypot(one.high - one.value, other.value - other.low)
    return Estimate(value, low, high, min(one.n, other.n))


def jackknife(value: float, left_out: Tensor | Sequence[float]) -> Estimate:
    """The interval of a number that is no mean, such as a Fréchet distance.  Source: Tukey 1958.

    value: of all data.  left_out: (N,), N >= 2, the number computed N times, each time without one part.
    """
    left_out = torch.as_tensor(left_out).double()
    n = len(left_out)
    error = math.sqrt((n - 1) / n * (left_out - left_out.mean()).square().sum().item())
    return _student(value, error, n)


def over_subjects(groups: Sequence[Tensor | Sequence[float]]) -> Estimate:
    """The mean over subjects with an interval for new subjects: Student's t of the subjects' own means.

    Prompts of one subject go up and down together, so pooling them makes intervals too narrow.
    groups: for each subject its values over prompts (and training seeds); subjects may differ in their number of
    values. One subject alone: the interval covers its own values only, and says nothing about other subjects.
    """
    if len(groups) == 1:
        return mean(groups[0])
    return mean([torch.as_tensor(values).double().mean().item() for values in groups])


def bootstrap(groups: Sequence[Sequence[Tensor | Sequence[float]]], draws: int = 4000, seed: int = 0) -> Estimate:
    """The mean over subjects by the hierarchical bootstrap: subjects, then training seeds, then prompts are redrawn.

    The interval holds the middle 95 % of the redrawn means.  Source: Efron & Tibshirani 1993, chapters 8 and 13.
    With fewer than about 10 subjects it comes out too narrow: `over_subjects` is the one that decides claims.
    groups: subject -> training seed -> values over prompts.  n of the result: the number of subjects.
    """
    rng, tree = np.random.default_rng(seed), [[np.asarray(v, dtype=float) for v in seeds] for seeds in groups]

    def redrawn_mean() -> float:
        subjects = []
        for s in rng.integers(len(tree), size=len(tree)):
            seeds = [tree[s][k] for k in rng.integers(len(tree[s]), size=len(tree[s]))]
            subjects.append(np.mean([values[rng.integers(len(values), size=len(values))].mean() for values in seeds]))
        return float(np.mean(subjects))

    value = float(np.mean([np.mean([values.mean() for values in seeds]) for seeds in tree]))
    low, high = np.quantile([redrawn_mean() for _ in range(draws)], [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(value, float(low), float(high), len(tree))


def _student(value: float, error: float, n: int) -> Estimate:
    """Student's interval around a value with this standard error, from n values."""
    half = scipy.stats.t.ppf((1 + LEVEL) / 2, n - 1).item() * error
    return Estimate(value, value - half, value + half, n)
