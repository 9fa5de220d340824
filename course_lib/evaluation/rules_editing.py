"""The rules of the claims about image embeddings and editing: C5, C6 and C7.

Used by: notebooks/07_image_embeddings.ipynb, notebooks/09_prompt_to_prompt.ipynb and
notebooks/10_plug_and_play.ipynb, and measurements/claims.py.

Each function takes what was measured and returns a Finding. Its docstring says what decides.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from course_lib.evaluation import statistics
from course_lib.evaluation.claims import Finding, verdict_of
from course_lib.evaluation.statistics import Estimate

MARGIN = 0.1  # C6: obeyed as often means that of ten edits at most one fewer is obeyed
AGAIN = "prompt again"  # the inverted noise, the new prompt, nothing else
METHODS = ("null-text + Prompt-to-Prompt", "Plug-and-Play")  # C6: the two that the seminar names for real pictures
EDITORS = ("Prompt-to-Prompt", "Plug-and-Play")  # C7

Values = Sequence[float] | Tensor
Scores = Mapping[str, Values]  # "obeyed", "kept", "structure": one number for each edit


def gains(one: Scores, other: Scores) -> dict[str, Estimate]:
    """Mean of `one` minus `other` edit by edit, for each score; edits where a score is not a number are left out.

    If one of them has fewer edits, they are the first ones of the other.
    """
    count = min(len(one["obeyed"]), len(other["obeyed"]))
    found = {"obeyed": statistics.paired_shares(one["obeyed"][:count], other["obeyed"][:count])}
    for name in ("kept", "structure"):
        a, b = (torch.as_tensor(scores[name], dtype=torch.float64)[:count] for scores in (one, other))
        both = a.isfinite() & b.isfinite()
        found[name] = statistics.paired(a[both], b[both])
    return found


def sdedit_as_obedient(rows: Mapping[str, Scores], obeyed: float, count: int) -> Tensor:
    """What SDEdit keeps of the first `count` edits, (count,), at the strength that obeys as often as `obeyed`.

    Between two measured strengths it is their mixture: edits by one of them with the chance that gives this share.
    """
    curve = sorted((torch.as_tensor(row["obeyed"][:count]).mean().item(), name)
                   for name, row in rows.items() if name.startswith("SDEdit"))  # fmt: skip
    kept = {name: torch.as_tensor(rows[name]["kept"], dtype=torch.float64)[:count] for _, name in curve}
    for (less, a), (more, b) in pairwise(curve):
        if less <= obeyed <= more:
            mix = (obeyed - less) / max(more - less, 1e-9)
            return (1 - mix) * kept[a] + mix * kept[b]
    return kept[curve[0 if obeyed < curve[0][0] else -1][1]]


def c6(rows: Mapping[str, Scores], errors: tuple[Values, Values]) -> Finding:
    """C6 holds if, for both METHODS, edits keep more than by prompting again (PSNR outside of what may change, and the
    object's structure), obey as often (not MARGIN below), and keep more than SDEdit where it obeys as often; and if
    null-text inversion gives the picture back with a smaller error than DDIM inversion does from the same noise.

    Each of these beyond its interval. It does not hold if one is reversed.
    rows: method -> scores of the same edits: AGAIN, the METHODS, and "SDEdit ..." at several strengths.
    errors: of the pictures drawn back with guidance, by DDIM and by null-text inversion, picture by picture.
    """
    decide, words = {}, []
    for method in METHODS:
        gain, count = gains(rows[method], rows[AGAIN]), len(rows[method]["obeyed"])
        kept = torch.as_tensor(rows[method]["kept"], dtype=torch.float64)
        sdedit = sdedit_as_obedient(rows, torch.as_tensor(rows[method]["obeyed"]).double().mean().item(), count)
        both = kept.isfinite() & sdedit.isfinite()
        decide |= {f"{method}, kept": gain["kept"], f"{method}, structure": gain["structure"],
                   f"{method}, obeyed": gain["obeyed"] + MARGIN,
                   f"{method}, kept above SDEdit": statistics.paired(kept[both], sdedit[both])}  # fmt: skip
        words.append(f"{method} minus prompting again: obeyed {gain['obeyed']:+.2f}, kept {gain['kept']:+.1f} dB, "
                     f"structure {gain['structure']:+.2f}")  # fmt: skip
    ddim, null_text = (torch.as_tensor(values, dtype=torch.float64) for values in errors)
    ratio = statistics.paired(ddim.log10(), null_text.log10())
    decide["null-text, error smaller by (powers of ten)"] = ratio
    words.append(f"null-text inversion comes back with an error smaller by {ratio:.2f} powers of ten")
    return Finding("C6", verdict_of(*decide.values()), "; ".join(words), decide)


def c5(variations: Mapping[str, Values], by_prior: Mapping[str, Values], by_text: Mapping[str, Values]) -> Finding:
    """C5 holds if variations keep more than half of what can be kept beyond chance, differ in layout, and pictures by
    way of the prior obey their prompt at least half as often beyond chance as pictures of the text itself.

    Picture by picture, each beyond its interval. Chance is what the judge reads of another picture ("shuffled").
    variations: "kept", "shuffled": shares of attributes of the source and of another picture that the judge reads off
    its variations; "alike", "apart": structure shared by two variations, and by two pictures of one prompt. Variations
    have to be nearer to "apart" than to 1.  by_prior, by_text: "obeyed", shares of attributes.
    """
    of = {name: torch.as_tensor(values, dtype=torch.float64) for name, values in variations.items()}
    prior, alone = (torch.as_tensor(row["obeyed"], dtype=torch.float64) for row in (by_prior, by_text))
    chance = of["shuffled"].mean()
    kept = statistics.paired(of["kept"], (1 + of["shuffled"]) / 2)
    free = statistics.paired((1 + of["apart"]) / 2, of["alike"])
    obeys = statistics.paired(prior, (alone + chance) / 2)
    means = {name: statistics.mean(values) for name, values in of.items()}
    text = (f"variations keep {means['kept']:.2f} of what the judge reads (of another picture "
            f"{means['shuffled']:.2f}); their layouts agree {means['alike']:.2f}, those of two pictures of one prompt "
            f"{means['apart']:.2f}; by way of the prior {statistics.mean(prior):.2f} of a prompt is obeyed, by the "
            f"text alone {statistics.mean(alone):.2f}")  # fmt: skip
    return Finding("C5", verdict_of(kept, free, obeys), text, {"kept": kept, "free": free, "obeys": obeys})


def c7(rows: Mapping[str, Mapping[str, Values]]) -> Finding:
    """C7 holds if each of both EDITORS, on the same prompts, shows the new scene more often than the untouched picture
    does, shares more structure with the picture than personalization does, and shares more between its own pictures of
    two scenes; and if personalization shows the subject in the new scene more than the plain noun does.

    Each beyond its interval over subjects.
    rows: way -> "scene", "keeps", "between scenes" and "told" (subject fidelity times scene read, picture by picture),
    one number a subject. Ways: the EDITORS, "picture", "lora" and "noun".
    """
    decide, words = {}, []
    for editor in EDITORS:
        gain = {name: statistics.paired(rows[editor][name], rows[other][name])
                for name, other in (("scene", "picture"), ("keeps", "lora"), ("between scenes", "lora"))}  # fmt: skip
        decide |= {f"{editor}, {name}": value for name, value in gain.items()}
        words.append(f"{editor} shares {gain['keeps']:+.2f} more structure with the picture than personalization, and "
                     f"{gain['between scenes']:+.2f} more between scenes")  # fmt: skip
    decide["carries"] = statistics.paired(rows["lora"]["told"], rows["noun"]["told"])
    words.append(f"personalization shows the subject in the scene {decide['carries']:+.2f} more than the plain noun")
    return Finding("C7", verdict_of(*decide.values()), "; ".join(words), decide)
