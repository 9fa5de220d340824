"""The rules of the claims about personalization: C8 to C20.

Used by: notebooks/11_textual_inversion.ipynb to notebooks/15_faces_and_styles.ipynb, and measurements/claims.py.

Each function takes scores and returns a Finding; its docstring says what decides. Scores come as
`rows[subject][method][score]`, one number for each prompt, or a row of them for each training seed, from the same
noises for all methods; personalized.py names them. An interval covers subjects (Student's t of the subjects' means over
prompts and seeds). With one subject it can only cover this subject's prompts, and the text says so.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from course_lib.evaluation import statistics
from course_lib.evaluation.claims import Finding, verdict_of
from course_lib.evaluation.statistics import difference, over_subjects

Scores = Mapping[str, Sequence[float] | Tensor]
Rows = Mapping[str, Mapping[str, Scores]]  # subject -> method -> score -> (prompts,) or (seeds, prompts)

# C15, C19: a loss of less than this counts as equal. It is half of .099, the gap in the table of Ruiz et al. 2022
# between DreamBooth and Textual Inversion (DINO .668 and .569): "near" has to be well below "another method".
MARGIN = 0.05
FEW = 0.05  # C15: "a few per cent" of the parameters
PREMISE = 0.6  # C16, C19: the untouched model has to draw both nouns in this share of its pictures
BOTH = 0.5  # C16: joint training has to show both nouns in this share of its pictures ...
FEWEST_PAIRS = 3  # C16: fewer pairs say nothing about others
SHARE_OF_TRUTH = 0.5  # ... and to reach this share of the lower subject fidelity of the renderer's pictures
LOW = "lower_subject_fidelity"
UNTRAINED = "new words, untrained"  # the prompts of "joint", drawn before any training


def over_seeds(table: Mapping) -> Rows:
    """The rows of data/results/personalization.json, subject -> method -> training seed -> row, as Rows."""
    return {
        subject: {method: {score: [row["by_prompt"][score] for row in seeds.values()]
                           for score in next(iter(seeds.values()))["by_prompt"]}
                  for method, seeds in methods.items()}
        for subject, methods in table.items()
    }  # fmt: skip


def of_pairs(table: Mapping) -> Rows:
    """The rows of data/results/pairs.json, pair -> "known", "untrained" or training seed -> row, as Rows: pair -> label
    -> score."""
    found = {}
    for names, row in table.items():
        seeds = [one["scores"] for seed, one in row.items() if seed.isdigit()]
        learnt = {label: {score: [one[label][score] for one in seeds] for score in seeds[0][label]}
                  for label in (seeds[0] if seeds else ())}  # fmt: skip
        found[names] = row["known"] | row.get("untrained", {}) | learnt
    return {names: one for names, one in found.items() if "joint" in one}


def gaps(rows: Rows, score: str, one: str, other: str) -> list[Tensor]:
    """For each subject method `one` minus method `other`, prompt by prompt (and seed by seed)."""
    return [_tensor(row[one][score]) - _tensor(row[other][score]) for row in rows.values()]


def scope(rows: Rows) -> str:
    """Which spread the interval covers, in words."""
    if len(rows) == 1:
        return f"({next(iter(rows))} alone: the interval covers its prompts, not other subjects)"
    scores = [_tensor(values) for methods in rows.values() for row in methods.values() for values in row.values()]
    seeds = max(len(values) if values.ndim == 2 else 1 for values in scores)
    return f"(over {len(rows)} subjects, {seeds} training seed{'s' * (seeds > 1)} each)"


def _tensor(values: Sequence[float] | Tensor) -> Tensor:
    return torch.as_tensor(values).double().cpu()


def c8(before: Mapping[str, Tensor], after: Mapping[str, Tensor], first: Tensor, last: Tensor) -> Finding:
    """C8 holds if all tensors from before are bit-identical after training, and the new row is not.

    before, after: all tensors of the three networks, without the new row.  first, last: the new row (1, D).
    """
    moved = [name for name in before if name not in after or not torch.equal(before[name], after[name])]
    added, learnt = sorted(set(after) - set(before)), not torch.equal(first, last)
    words = f"{len(before)} tensors of the three networks, {len(moved)} of them moved, {len(added)} new; the new row "
    words += f"of {last.numel()} numbers {'moved' if learnt else 'did not move'}"
    return Finding("C8", "does not hold" if moved or added or not learnt else "holds", words, dict(moved=moved))


def c9(again: float, other: float, scores: Mapping[str, Tensor], layouts: Mapping[str, Tensor],
       gan: Mapping[str, Tensor] | None = None,
       covers: str = "one subject: the intervals cover its prompts") -> Finding:  # fmt: skip
    """C9 holds if the picture is reproduced (its error is below half of that to another picture), the inverted latent
    keeps one layout under all prompts, and the learnt word scores above the latent under new prompts.

    One layout: two pictures of a latent under different prompts agree in layout more than two pictures of the word
    under one prompt. With `gan`, its inversion also has to be nearer to its picture than to another of the family, and
    nearer than to its picture where that is of another family. It does not hold if one of these is reversed.
    again, other: mean errors to the picture and to another one.  scores: for "any noise", "inverted latent" and "the
    word" subject fidelity (not below 0) times prompt fidelity, one number a prompt, or a subject.  layouts: mean
    correlation of the layouts of two pictures: "inverted latent", one number a latent, and "the word", one number a
    prompt; or both one a subject.  gan: PSNR in dB, one number a picture: "own", "next", and "others", of pictures of
    other families to their own.  covers: what the intervals cover.
    """
    latent, word = (statistics.mean(layouts[name]) for name in ("inverted latent", "the word"))
    frozen, gap = difference(latent, word), statistics.paired(scores["the word"], scores["inverted latent"])
    kept = statistics.paired(scores["inverted latent"], scores["any noise"])
    text = (f"the inverted latent's picture has error {again:.3f} (another picture {other:.3f}); layouts agree "
            f"{latent:.2f} across prompts for the latent, {word:.2f} across noises for the word; under new prompts the "
            f"word scores {gap:+.3f} above the latent, and the latent {kept:+.3f} above any noise "
            f"({covers})")  # fmt: skip
    decide, values = [frozen, gap], dict(kept=kept, gap=gap, frozen=frozen)
    if gan:
        values["gan own"] = statistics.paired(gan["own"], gan["next"])
        values["gan family"] = difference(statistics.mean(gan["own"]), statistics.mean(gan["others"]))
        decide += [values["gan own"], values["gan family"]]
        text += (f"; the GAN's latent is {values['gan own']:.1f} dB nearer to its picture than to another cat, and "
                 f"{values['gan family']:.1f} dB worse for pictures of other nouns")  # fmt: skip
    failed = again >= other / 2 or any(gain.high < 0 for gain in decide)
    return Finding("C9", "does not hold" if failed else verdict_of(*decide), text, values)


# C10 to C13: words -> (score, one, other), the difference of method one minus method other. A claim holds if all of
# "decides" are above 0; those of "beside" are only printed. "dreambooth" has lambda = 1.
NONE = "dreambooth_no_prior"
COMPARISONS = {
    "C10": dict(decides={"subject fidelity, DreamBooth minus Textual Inversion":
                         ("subject_fidelity", "dreambooth", "textual_inversion")},
                beside={"CLIP-T": ("clip_t", "dreambooth", "textual_inversion")}),
    "C11": dict(decides={"class drift, DreamBooth without prior minus untouched": ("class_drift", NONE, "base")}),
    "C12": dict(decides={"class diversity, untouched minus DreamBooth without prior":
                         ("class_diversity", "base", NONE)}),
    "C13": dict(decides={"with lambda = 1 class drift is lower by": ("class_drift", NONE, "dreambooth"),
                         "class diversity higher by": ("class_diversity", "dreambooth", NONE)},
                beside={"the price in subject fidelity is": ("subject_fidelity", NONE, "dreambooth")}),
}  # fmt: skip


def compare(name: str, rows: Rows) -> Finding:
    """C10 to C13: see COMPARISONS."""
    decides, beside = COMPARISONS[name]["decides"], COMPARISONS[name].get("beside", {})
    found = {words: over_subjects(gaps(rows, *what)) for words, what in (decides | beside).items()}
    resampled = {f"{words}, by bootstrap": statistics.bootstrap([list(torch.atleast_2d(g)) for g in gaps(rows, *what)])
                 for words, what in decides.items()}  # fmt: skip
    text = "; ".join(f"{words} {gain:+.3f}" for words, gain in found.items())
    return Finding(name, verdict_of(*(found[words] for words in decides)), f"{text} {scope(rows)}", found | resampled)


def c14(excess: Mapping[str, Mapping[str, Sequence[float]]], fidelity: Mapping[str, Scores] | None = None) -> Finding:
    """C14 holds if cross-attention's change, over a control training's, is larger than self-attention's and the rest's.

    The control takes the same steps on the model's own pictures of the class: what moves there is not the subject's.
    excess: subject -> kind of layer -> for each weight the log of its relative change over the control's. One subject
    alone: the interval covers its weights.  fidelity: subject -> what was changed in the untouched model ("all",
    "none", one kind alone) -> subject fidelity, one number a prompt; it is printed, and does not decide.
    """
    kinds, subjects = ("cross-attention", "self-attention", "rest"), list(excess.values())
    level = {kind: over_subjects([one[kind] for one in subjects]) for kind in kinds}
    if len(subjects) == 1:
        lead = {kind: difference(level[kinds[0]], level[kind]) for kind in kinds[1:]}
    else:
        means = {kind: [_tensor(one[kind]).mean() for one in subjects] for kind in kinds}
        lead = {kind: statistics.paired(means[kinds[0]], means[kind]) for kind in kinds[1:]}
    over = f"over {len(subjects)} subjects" if len(subjects) > 1 else f"{next(iter(excess))} alone, over weights"
    text = ", ".join(f"{kind} {math.exp(one.value):.2f}" for kind, one in level.items())
    text = f"change over the control's: {text}; cross-attention ahead in the log by "
    text += "; ".join(f"{gap:+.3f} of {kind}" for kind, gap in lead.items()) + f" ({over})"
    if fidelity:
        names, ones = next(iter(fidelity.values())), fidelity.values()
        with_change = {part: over_subjects([one[part] for one in ones]) for part in names}
        text += ". Subject fidelity with the change of "
        text += ", ".join(f"{part} {one.value:.2f}" for part, one in with_change.items())
    return Finding("C14", verdict_of(*lead.values()), text, lead)


def c15(rows: Rows, parameters: Mapping[str, float]) -> Finding:
    """C15, non-inferiority: holds if "custom_diffusion" loses less than MARGIN against "dreambooth", both in the gain
    of subject fidelity and in CLIP-T, beyond the intervals, with less than FEW of the parameters.

    A method's gain is over its own prompt drawn by the untouched model ("untouched_subject_fidelity") where both
    methods have it recorded; else both gains subtract the same untouched score, which cancels, and the text says so.
    parameters: how many numbers each of the two methods trains.
    """
    pair, key = ("custom_diffusion", "dreambooth"), "untouched_subject_fidelity"
    fidelity, clip = gaps(rows, "subject_fidelity", *pair), over_subjects(gaps(rows, "clip_t", *pair))
    own = all(key in row[method] for row in rows.values() for method in pair)
    if own:
        fidelity = [after - before for after, before in zip(fidelity, gaps(rows, key, *pair), strict=True)]
    gain, share = over_subjects(fidelity), parameters[pair[0]] / parameters[pair[1]]
    noted = "over each method's own prompt, untrained" if own else "each method's own prompt, untrained: not recorded"
    return Finding("C15", verdict_of(gain + MARGIN, clip + MARGIN) if share < FEW else "does not hold",
                   f"Custom Diffusion minus DreamBooth: gain in subject fidelity {gain:+.3f} ({noted}), CLIP-T "
                   f"{clip:+.3f}; margin {-MARGIN} {scope(rows)}; {share:.1%} of the parameters",
                   dict(gain=gain, clip_t=clip, share=round(share, 5)))  # fmt: skip


def c18(rows: Mapping[str, Scores], images: int) -> Finding:
    """C18 holds if the word drifts without regularisation and drifts less with it, both in noun and in looks.

    The noun: the share of pictures that show it. The looks: class drift, the fidelity of these pictures to the subject.
    One subject and one word: the intervals cover samples only.
    rows: "untouched", "without" and "with" -> "noun_share" and "class_drift", each a mean over `images` pictures.
    """
    noun = {name: statistics.share(round(float(_tensor(row["noun_share"]).sum()) * images),
                                   len(row["noun_share"]) * images) for name, row in rows.items()}  # fmt: skip
    looks = {name: _tensor(row["class_drift"]) for name, row in rows.items()}
    found = {
        "noun lost": difference(noun["untouched"], noun["without"]),
        "noun kept by regularisation": difference(noun["with"], noun["without"]),
        "class drift": statistics.paired(looks["without"], looks["untouched"]),
        "class drift prevented": statistics.paired(looks["without"], looks["with"]),
    }
    shares = ", ".join(f"{one.value:.0%} {name}" for name, one in noun.items())
    text = "; ".join(f"{words} {value:+.3f}" for words, value in found.items())
    return Finding("C18", verdict_of(*found.values()), f"the noun is read off {shares} regularisation; {text} (one "
                   "subject: the intervals cover samples)", found)  # fmt: skip


def nouns_key(pairs: Rows) -> str:
    """The name of the score for both nouns: see `premise`."""
    known = all("both_nouns" in row for pair in pairs.values() for row in pair.values())
    return "both_nouns" if known else "both_nouns_in_halves"


def premise(pairs: Rows) -> tuple[bool, str]:
    """Whether the untouched model draws both nouns in PREMISE of its pictures, and that in words.

    "both_nouns" is by the judge's presence head on whole pictures. Older rows have "both_nouns_in_halves", by the
    one-object head on enlarged halves, which misses more; it is used where nothing else is recorded.
    """
    key = nouns_key(pairs)
    drawn = over_subjects([pair["untouched model"][key] for pair in pairs.values()]).value
    how = "" if key == "both_nouns" else ", as read off enlarged halves"
    return (
        drawn >= PREMISE,
        f"the untouched model draws both nouns in {drawn:.0%} of its pictures{how} ({PREMISE:.0%} needed)",
    )


def c16(pairs: Rows) -> Finding:
    """C16 holds if "joint" shows both nouns in at least BOTH of its pictures and has at least SHARE_OF_TRUTH of the
    ground truth's lower subject fidelity, each beyond its interval over pairs.

    Premise: see `premise`; if it is not met, the verdict is "not testable here".
    pairs: "one two" -> "untouched model", "ground truth", "joint" -> scores.
    """
    (able, words), key = premise(pairs), nouns_key(pairs)
    shown = over_subjects([pair["joint"][key] for pair in pairs.values()])
    alike = over_subjects([_tensor(pair["joint"][LOW]) - SHARE_OF_TRUTH * _tensor(pair["ground truth"][LOW]).mean()
                           for pair in pairs.values()])  # fmt: skip
    own = [pair[UNTRAINED][key] for pair in pairs.values() if UNTRAINED in pair]
    own = f" ({over_subjects(own):.2f} for the same prompts before training)" if own else ""
    text = (f"{words}. Joint training: both nouns {shown:.2f}{own}, lower subject fidelity {alike:+.3f} above "
            f"{SHARE_OF_TRUTH:.0%} of the ground truth's ({', '.join(pairs)})")  # fmt: skip
    verdict = verdict_of(shown + -BOTH, alike) if len(pairs) >= FEWEST_PAIRS else "cannot tell"
    return Finding("C16", verdict if able else "not testable here", text,
                   dict(both_nouns=shown, fidelity=alike))  # fmt: skip


def c17(merges: Sequence[Mapping[str, float]]) -> Finding:
    """C17 holds if in every merge the relative residual of the constraint is below 1e-5 (float32 rounding over a few
    hundred terms), the weights are within 1e-3 of an independent solver's, and merging takes less than a minute.

    merges: "residual", "gap_to_solver", "seconds", and "residual_of_average" of the averaged weights.
    """
    worst = {key: max(merge[key] for merge in merges) for key in ("residual", "gap_to_solver", "seconds")}
    limits = {"residual": 1e-5, "gap_to_solver": 1e-3, "seconds": 60}
    good = all(merge[key] < limit for merge in merges for key, limit in limits.items())  # NaN is not below
    average = min(merge["residual_of_average"] for merge in merges)
    text = (f"largest relative residual {worst['residual']:.1e} (weights averaged instead: {average:.2f}); distance to "
            f"an independent solver {worst['gap_to_solver']:.1e}; {worst['seconds']:.1f} s")  # fmt: skip
    return Finding("C17", "holds" if good else "does not hold", text, worst | {"residual_of_average": average})


def c19(pairs: Rows) -> Finding:
    """C19 holds if "joint" and "merged" are each ahead of "dreambooth" in text alignment, beyond the interval, and
    lose less than MARGIN in image alignment (the paper's lead is in text alignment; images are nearly equal there).

    Text alignment is CLIP-T, or the share with both nouns where CLIP-T is not recorded; image alignment is the lower
    subject fidelity. Premise as for C16; if it is not met, the verdict is "not testable here".
    """
    able, words = premise(pairs)
    known = all("clip_t" in row for pair in pairs.values() for row in pair.values())
    score, methods = "clip_t" if known else nouns_key(pairs), ("joint", "merged")
    text, image = ({m: over_subjects(gaps(pairs, key, m, "dreambooth")) for m in methods} for key in (score, LOW))
    parts = "; ".join(f"{m} {text[m]:+.3f} in text, {image[m]:+.3f} in image alignment" for m in methods)
    name = "CLIP-T" if known else "share with both nouns (CLIP-T is not recorded)"
    verdict = verdict_of(*text.values(), *(one + MARGIN for one in image.values()))
    return Finding("C19", verdict if able else "not testable here", f"{words}. Against DreamBooth: {parts}. Text: "
                   f"{name}; image: lower subject fidelity ({', '.join(pairs)})",
                   {f"{m}, text": text[m] for m in methods} | {f"{m}, image": image[m] for m in methods})  # fmt: skip


def c20(learnt: Mapping[str, Mapping[str, Sequence]]) -> Finding:
    """C20 holds if each of these faces and styles comes at least half of the way from the untouched model to the truth.

    Styles are measured on objects that their pictures do not show. The intervals cover prompts: the claim is about
    these faces and styles.  learnt: name -> "untouched" and "truth", one number a prompt, and "learnt", a row of them
    for each training seed; style fidelity for a style, subject fidelity for a face.
    """
    found, texts = {}, []
    for name, one in learnt.items():
        low, high, values = _tensor(one["untouched"]), _tensor(one["truth"]), _tensor(one["learnt"]).mean(0)
        found[name] = statistics.mean(values - (low + high) / 2)
        texts.append(f"{name} {low.mean():.2f} untouched, {values.mean():.2f} learnt, {high.mean():.2f} true, "
                     f"{found[name]:+.3f} beyond the middle")  # fmt: skip
    return Finding("C20", verdict_of(*found.values()), f"{'; '.join(texts)} (intervals over prompts)", found)
