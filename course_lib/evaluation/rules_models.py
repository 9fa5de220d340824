"""The rules of the claims about the base models: C1 to C4, C21a and C21b.

Used by: notebooks/01_ddpm_training.ipynb to notebooks/04_autoencoder.ipynb and notebooks/06_stable_diffusion.ipynb.

Each function takes what was measured and returns a Finding. Its docstring says what decides.
"""

from collections.abc import Sequence

from torch import Tensor

from course_lib.evaluation import statistics
from course_lib.evaluation.claims import Finding, verdict_of
from course_lib.evaluation.statistics import Estimate, difference

NEAR = 3.0  # C4: samples count as pictures up to this many times the distance of real test pictures


def c1(first_losses: Tensor, last_losses: Tensor, before: Estimate, after: Estimate) -> Finding:
    """C1 holds if the loss fell and the samples' distance to the data fell, each by more than its interval.

    first_losses, last_losses: losses of the first and last steps.  before, after: the samples' distance to the data.
    """
    loss = difference(statistics.mean(first_losses), statistics.mean(last_losses))
    distance = difference(before, after)
    text = f"the loss falls by {loss:.3f}; the samples come {distance:.2f} closer to the data"
    return Finding("C1", verdict_of(loss, distance), text, dict(loss=loss, distance=distance))


def c2(gaps: Sequence[Estimate]) -> Finding:
    """C2 holds if in every comparison the model that was trained on a data set is nearer to it than the other model.

    gaps: distance of the other model minus that of the model trained on the data, for each data set and feature space.
    """
    text = f"the model trained on a data set is nearer to it in {sum(gap.low > 0 for gap in gaps)} of {len(gaps)} "
    return Finding("C2", verdict_of(*gaps), text + "comparisons, beyond the interval")


def c3(accuracy_gain: Estimate, diversity_loss: Estimate) -> Finding:
    """C3 holds if from w = 1 to w = 3 accuracy rises and diversity falls, each by more than its interval."""
    text = f"from w = 1 to w = 3 accuracy rises by {accuracy_gain:.3f}, and diversity falls by {diversity_loss:.3f}"
    values = {"accuracy gain": accuracy_gain, "diversity loss": diversity_loss}
    return Finding("C3", verdict_of(accuracy_gain, diversity_loss), text, values)


def c4(step: dict[str, float], distance: dict[str, Estimate], floor: float) -> Finding:
    """C4, after equal seconds of training: holds if a step on latents is cheaper and their samples are nearer to the
    data; does not hold if a step is not cheaper or the samples are farther away.

    Premise: the better of the two draws pictures, at most NEAR times as far from the data as real test pictures. The
    judge was not trained on noise, so it cannot rank two kinds of noise.
    step: seconds of a training step; distance: of the samples to the data; both for "pixels" and "latents".
    floor: the distance of as many real test pictures.
    """
    gain, times = difference(distance["pixels"], distance["latents"]), step["pixels"] / step["latents"]
    nearest = min(one.value for one in distance.values()) / floor
    text = (f"a step on pixels takes {times:.1f} times as long; after equal seconds pixels are {gain:+.2f} farther "
            f"from the data than latents; the better samples are {nearest:.1f} times as far away as real test pictures "
            f"({NEAR:g} times counts as pictures)")  # fmt: skip
    verdict = verdict_of(gain) if times > 1 else "does not hold"
    return Finding("C4", verdict if nearest <= NEAR else "not testable here", text, dict(gain=gain))


def c21a(p_one: Tensor, p_other: Tensor) -> Finding:
    """C21a, from one word to the other: holds if the ends show the two nouns and no step goes back beyond its interval.

    p_one, p_other: (K, N) the judge's probabilities of the two nouns, at K mixtures from all other to all one.
    """
    lead = (p_one - p_other).double()
    back = sum(statistics.mean(step).high < 0 for step in lead.diff(dim=0))
    first, last = statistics.mean(-lead[0]), statistics.mean(lead[-1])
    verdict = "does not hold" if back else verdict_of(first, last)
    right = [int((lead[0] < 0).sum()), int((lead[-1] > 0).sum())]
    text = (f"the right noun is ahead in {right[0]} and {right[1]} of {lead.shape[1]} pictures at the two ends; "
            f"{back or 'none'} of {len(lead) - 1} steps {'go' if back > 1 else 'goes'} back")  # fmt: skip
    return Finding("C21a", verdict, text, {"lead at a = 0": first, "lead at a = 1": last})


def in_between(odds: Tensor, ones: Tensor, others: Tensor, rest: float = 0.025) -> Tensor:
    """Which pictures are less like the one noun than its real pictures are, and less like the other than its own.

    odds: (N,) the judge's logit of the one noun minus that of the other.  ones, others: (M,) the same for real pictures
    of the two nouns.  Returns (N,) bool: odds above all but `rest` of `others` and below all but `rest` of `ones`.
    """
    low, high = others.double().quantile(1 - rest), ones.double().quantile(rest)
    return (odds.double() > low) & (odds.double() < high)


def c21b(half: Tensor, ends: Tensor, fades: Tensor) -> Finding:
    """C21b, something in between: holds if more than half of the pictures from half of each word's features are in
    between, and a larger share than of the pictures from one word alone, both beyond the interval.

    half: (N,) `in_between` of the pictures at a = 1/2.  ends: (2, M), M <= N, at a = 0 and 1 from the first M of the
    same noises, so these are compared noise by noise.  fades: of half-and-half fades of two real pictures; premise:
    more than half of these are in between, otherwise the judge cannot see it.
    """
    shares = [statistics.share(one) for one in (half, fades, *ends)]
    most, gain = shares[0] + -0.5, statistics.paired(half[: ends.shape[1]].double(), ends.double().mean(0))
    text = (f"in between are {shares[0]:.2f} of the pictures from half of each, {shares[2]:.2f} and {shares[3]:.2f} of "
            f"those from one word alone, {shares[1]:.2f} of real pictures faded into each other")  # fmt: skip
    verdict = verdict_of(most, gain) if shares[1].low > 0.5 else "not testable here"
    return Finding("C21b", verdict, text, {"share in between over 0.5": most, "over one word alone": gain})
