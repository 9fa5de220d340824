"""The rules of the claims about image embeddings and editing: C5, C6 and C7.

Used by: notebooks/07_image_embeddings.ipynb, notebooks/09_prompt_to_prompt.ipynb and
notebooks/10_plug_and_play.ipynb, and measurements/claims.py.

Each function takes what was measured and returns a Finding. Its docstring says what decides.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from course_lib.evaluation import statistics
from course_lib.evaluation.claims import Finding, verdict_of
from course_lib.evaluation.statistics import Estimate, difference

MARGIN = 0.05  # a share of obeyed edits that is lower by less than this counts as equal
AGAIN = "prompt again"  # the inverted noise, the new prompt, nothing else
METHODS = ("null-text + Prompt-to-Prompt", "Plug-and-Play")  # C6: the two that the seminar names for real pictures
HALF = 0.5  # C5: of the way to another picture, and of the share that text alone obeys

Scores = Mapping[str, Sequence[float] | Tensor]  # "obeyed", "kept", "structure": one number for each edit


def gains(one: Scores, other: Scores) -> dict[str, Estimate]:
    """Mean of `one` minus `other` edit by edit, for each score; edits where a score is not a number are left out.

    If one of them has fewer edits, they are the first ones of the other.
    """
    found, count = {}, min(len(one["obeyed"]), len(other["obeyed"]))
    for name in ("obeyed", "kept", "structure"):
        a, b = (torch.as_tensor(scores[name], dtype=torch.float64)[:count] for scores in (one, other))
        both = a.isfinite() & b.isfinite()
        found[name] = statistics.paired(a[both], b[both])
    return found


def c6(rows: Mapping[str, Scores], errors: tuple[Sequence[float], Sequence[float]]) -> Finding:
    """C6 holds if, for both METHODS, edits keep more than by prompting again (PSNR outside of what may change, and the
    object's structure), obey as often (not more than MARGIN below), and keep more (PSNR) than SDEdit at the strength
    that obeys most nearly as often; and if null-text inversion gives the picture back with a smaller error than
    DDIM inversion.

    Each of these beyond its interval. It does not hold if one is reversed.
    rows: method -> scores of the same edits: AGAIN, the METHODS, and "SDEdit ..." at several strengths.
    errors: of the pictures drawn back with guidance, by DDIM and by null-text inversion, picture by picture.
    """
    decide, words = {}, []
    for method in METHODS:
        gain = gains(rows[method], rows[AGAIN])
        decide |= {f"{method}, kept": gain["kept"], f"{method}, structure": gain["structure"],
                   f"{method}, obeyed": gain["obeyed"] + MARGIN}  # fmt: skip
        near = {name: gains(rows[method], rows[name]) for name in rows if name.startswith("SDEdit")}
        nearest = min(near, key=lambda name: abs(near[name]["obeyed"].value))
        decide[f"{method}, kept above {nearest}"] = near[nearest]["kept"]
        words.append(f"{method} minus prompting again: obeyed {gain['obeyed']:+.2f}, kept {gain['kept']:+.1f} dB, "
                     f"structure {gain['structure']:+.2f}")  # fmt: skip
    ddim, null_text = (torch.as_tensor(values, dtype=torch.float64) for values in errors)
    ratio = statistics.paired(ddim.log10(), null_text.log10())
    decide["null-text, error smaller by (powers of ten)"] = ratio
    words.append(f"null-text inversion comes back with an error smaller by {ratio:.2f} powers of ten")
    return Finding("C6", verdict_of(*decide.values()), "; ".join(words), decide)


def c5(kept: Estimate, alike: Estimate, apart: Estimate, by_prior: Estimate, by_text: Estimate) -> Finding:
    """C5 holds if variations keep most of what the judge reads, differ in layout, and pictures by way of the prior obey
    their prompt at least half as often as pictures of the text itself, beyond the intervals.

    kept: share of the source's attributes that the judge reads off its variations; it has to be above HALF.
    alike, apart: structure shared by two variations of one embedding, and by two pictures of one prompt; variations
    have to be nearer to "apart" than to 1.  by_prior, by_text: shares of attributes obeyed.
    """
    most = kept + -HALF
    middle = Estimate(*(HALF * (1 + v) for v in (apart.value, apart.low, apart.high)), apart.n)
    free, obeys = difference(middle, alike), difference(by_prior, _scaled(by_text, HALF))
    text = (f"variations keep {kept:.2f} of what the judge reads; their layouts agree {alike:.2f}, those of two "
            f"pictures of one prompt {apart:.2f}; by way of the prior {by_prior:.2f} is obeyed, by text alone "
            f"{by_text:.2f}")  # fmt: skip
    return Finding("C5", verdict_of(most, free, obeys), text,
                   dict(kept=kept, alike=alike, apart=apart, by_prior=by_prior, by_text=by_text))  # fmt: skip


def c7(keeps: Estimate, moves: Estimate, carries: Estimate) -> Finding:
    """C7 holds if, on the same prompts, editing shares more structure with its picture than personalization does, the
    edits of one picture share more structure with each other, prompt by prompt, than personalization's pictures do, and
    personalization is more like the subject than the plain noun is, beyond the intervals over subjects.

    keeps: structure shared with the source, editing minus personalization.  moves: structure that pictures of two
    prompts share, editing minus personalization.  carries: subject fidelity, personalization minus the plain noun.
    """
    text = (f"editing shares {keeps:+.2f} more structure with the picture than personalization; pictures of two "
            f"prompts share {moves:+.2f} more by editing; personalization is {carries:+.2f} more like the subject "
            "than the noun")  # fmt: skip
    return Finding("C7", verdict_of(keeps, moves, carries), text, dict(keeps=keeps, moves=moves, carries=carries))


def _scaled(estimate: Estimate, factor: float) -> Estimate:
    return Estimate(*(factor * v for v in (estimate.value, estimate.low, estimate.high)), estimate.n)
