"""The rules of the claims about the base models: C1 to C4, C21a and C21b.

Used by: notebooks/01_ddpm_training.ipynb to notebooks/04_autoencoder.ipynb and notebooks/06_stable_diffusion.ipynb.

Each function takes what was measured and returns a Finding. Its docstring says what decides.
"""

from collections.abc import Sequence

from torch import Tensor

from course_lib.evaluation import statistics
from course_lib.evaluation.claims import Finding, verdict_of
from course_lib.evaluation.statistics import Estimate, difference

DRAWN = 0.5  # C4: from this share of the right nouns of real pictures on, samples count as pictures


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


def c4(runs: Sequence[dict[str, Sequence[dict]]], real: dict) -> Finding:
    """C4, after equal times of training: holds if a step on latents takes less time than one on pixels, and in each run
    the samples from latents are better in both scores, beyond the interval; does not hold if one of this is reversed.

    Premise: in each run the judge names, of the better space's samples, at least DRAWN as many nouns right as of real
    pictures. Folded pixels do not decide: they show how much of the gain comes from the smaller map alone.
    runs: for each seed, space ("pixels", "latents", other ways to hold pixels) -> rows over time, as
    measurements/spaces.py writes them: seconds, steps, and the scores share (of right nouns) and distance.
    real: both scores of real pictures.
    """
    ends = [{name: rows[-1] for name, rows in run.items()} for run in runs]
    time_and_steps = {name: [sum(end[name][key] for end in ends) for key in ("seconds", "steps")] for name in ends[0]}
    step = {name: seconds / steps for name, (seconds, steps) in time_and_steps.items()}
    gains = {name: [gain for end in ends for gain in _gains(end, name)] for name in ends[0] if name != "latents"}
    drawn = min(max(end[name]["share"]["value"] for name in ("pixels", "latents")) for end in ends)
    verdict = verdict_of(*gains["pixels"]) if step["pixels"] > step["latents"] else "does not hold"
    texts = []
    for name, both in gains.items():
        better = "; ".join(f"{share:+.2f} of the nouns right, a distance smaller by {distance:.1f}"
                           for share, distance in zip(both[::2], both[1::2], strict=True))  # fmt: skip
        where, times = name if name == "pixels" else f"pixels {name}", step[name] / step["latents"]
        texts.append(f"a step on {where} takes {times:.1f} times as long as one on latents; after "
                     f"{ends[0][name]['seconds']:.0f} s of training each, latents have {better}")  # fmt: skip
    needed = DRAWN * real["share"]["value"]
    text = f"of the better space's samples {drawn:.0%} show the right noun in the weakest run, {needed:.0%} needed; "
    text += f"{texts[0]}. For comparison: {'; '.join(texts[1:])}"
    values = {"nouns right": gains["pixels"][0], "distance": gains["pixels"][1], "seconds_of_a_step": step}
    return Finding("C4", verdict if drawn >= needed else "not testable here", text, values)


def _gains(end: dict[str, dict], other: str) -> tuple[Estimate, Estimate]:
    """By how much the samples from latents are better than those of another space: share of right nouns, distance."""
    scores = {key: [Estimate(**end[name][key]) for name in ("latents", other)] for key in ("share", "distance")}
    return difference(*scores["share"]), difference(*reversed(scores["distance"]))


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
