"""Judge the claims C8 and C10 to C19 by what was measured: writes data/results/claims.json.

    make claims                           both steps: what is measured already with these weights is not measured again
    python measurements/methods.py     step 1: every method on every subject, data/results/personalization.json
    python measurements/claims.py          step 2: this file; --fresh forgets its own experiments

C10 to C15 follow from step 1; C8 and C16 to C19 have experiments here. A difference is taken prompt by prompt (the same
noises on both sides), with its 95 % interval: a claim holds if the difference has the claimed sign beyond the interval,
does not hold if it has the other one, and else it can not be told. The rules were fixed before looking; which two
subjects C16 and C19 are tried on was changed once. At first it was mochi and tilly alone: a cat and a teapot, of which
the untouched model draws two cats, so no method could show two subjects. Now it is the pairs whose two classes the
untouched model draws together most often (`pairs`, `chosen`): a rule that does not look at any method.
"""

import argparse
import datetime
import itertools
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from methods import PRIOR, SUBJECTS, Bench, keep, kind_of, pixels, record_of, setting_of
from PIL import Image
from torch import Tensor

from course_lib.environment import REPOSITORY, RESULTS
from course_lib.evaluation import judge
from course_lib.evaluation.metrics import interval
from course_lib.personalization import custom_diffusion, dreambooth, textual_inversion
from course_lib.personalization.concept import Concept, applied, concept_of, only_tokens
from course_lib.personalization.examples import subject_examples
from course_lib.personalization.finetune import finetune
from course_lib.personalization.merge import caption_features, merge_concepts, word_features
from course_lib.personalization.recipe import Recipe, Term
from course_lib.personalization.regularisation import toybox_regularisation
from course_lib.plots import montage
from course_lib.toybox import subjects
from course_lib.toybox.captions import corpus
from course_lib.toybox.scenes import SCENES
from course_lib.toybox.world import Spec

ABLE = [name for name, one in subjects.SUBJECTS.items() if one.look and name not in ("tofu", "tockle")]
PAIRS, READABLE = 3, 0.6  # so many pairs, of which the judge reads both nouns off so much of the ground truth
TOKENS = ("<v1>", "<v2>")
COMPOUND = "castle"  # "<v> castle cat": a name that contains a word with a meaning of its own


def folder(name: str) -> Path:
    return REPOSITORY / "data" / "subjects" / name


def train(bench: Bench, recipe: Recipe) -> None:
    for _ in finetune(bench.sd, recipe):
        pass


# ---- differences and verdicts ----


def difference(values: Tensor) -> dict:
    return dict(mean=round(values.mean().item(), 4), interval=round(interval(values), 4), count=len(values))


def told(*differences: dict) -> str:
    """All of the claimed (positive) sign, one of the other sign, or not to tell."""
    if all(d["mean"] > d["interval"] for d in differences):
        return "holds"
    return "does not hold" if any(d["mean"] < -d["interval"] for d in differences) else "cannot tell"


def words(d: dict) -> str:
    return f"{d['mean']:+.3f} ± {d['interval']:.3f}"


class Rows:
    """What step 1 measured: `rows("fidelity", method)` joins all subjects, one number a prompt."""

    def __init__(self, record: dict):
        self.rows = record["rows"]
        self.subjects = [name for name in SUBJECTS if name in self.rows]

    def __call__(self, quantity: str, method: str, subjects: list[str] | None = None) -> Tensor:
        rows = [self.rows[name][method]["by_prompt"][quantity] for name in subjects or self.subjects]
        return torch.cat([torch.tensor(row) for row in rows])

    def compare(self, quantity: str, one: str, other: str) -> dict:
        return difference(self(quantity, one) - self(quantity, other))

    def mean(self, quantity: str, method: str, subjects: list[str] | None = None) -> float:
        return round(self(quantity, method, subjects).mean().item(), 3)

    def sum(self, key: str, method: str) -> float:
        return sum(self.rows[name][method][key] for name in self.subjects) / len(self.subjects)


# ---- claims that follow from step 1 ----


def c10(rows: Rows) -> dict:
    d = rows.compare("fidelity", "dreambooth", "textual_inversion")
    each = {m: rows.mean("fidelity", m) for m in ("base", "textual_inversion", "dreambooth", "dreambooth_no_prior")}
    return dict(
        claim="subject fidelity: DreamBooth > Textual Inversion", verdict=told(d), values=dict(difference=d, mean=each),
        measured=f"fidelity DreamBooth - Textual Inversion: {words(d)} over {d['count']} prompts of "
        f"{len(rows.subjects)} subjects (untouched model {each['base']}, Textual Inversion "
        f"{each['textual_inversion']}, DreamBooth {each['dreambooth']}, without prior {each['dreambooth_no_prior']})",
    )  # fmt: skip


def c11(rows: Rows) -> dict:
    d = rows.compare("drift", "dreambooth_no_prior", "base")
    moved = rows.mean("others", "dreambooth_no_prior")
    return dict(
        claim="tuning everything makes the class word drift", verdict=told(d), values=dict(difference=d, moved=moved),
        measured=f'likeness of "a photo of a <class>" to the subject, DreamBooth without prior - untouched: {words(d)} '
        f"over {d['count']} groups of samples; these samples moved by {moved} in the judge's features",
    )  # fmt: skip


def c12(rows: Rows) -> dict:
    d = rows.compare("spread", "base", "dreambooth_no_prior")
    own = rows.compare("diversity", "base", "dreambooth_no_prior")
    return dict(
        claim="tuning everything loses diversity", verdict=told(d), values=dict(loss=d, loss_own_prompts=own),
        measured=f"mean pairwise distance of class samples, untouched - DreamBooth without prior: {words(d)} "
        f"(untouched {rows.mean('spread', 'base')}); of samples of one prompt about the subject: {words(own)}",
    )  # fmt: skip


def c13(rows: Rows) -> dict:
    drift = rows.compare("drift", "dreambooth_no_prior", "dreambooth")
    spread = rows.compare("spread", "dreambooth", "dreambooth_no_prior")
    price = rows.compare("fidelity", "dreambooth_no_prior", "dreambooth")
    names = {0: "dreambooth_no_prior", 0.3: "dreambooth_prior_0.3", 1: "dreambooth", 3: "dreambooth_prior_3"}
    all_weights = [name for name in rows.subjects if all(method in rows.rows[name] for method in names.values())]
    curve = {
        str(weight): {key: rows.mean(key, method, all_weights) for key in ("fidelity", "drift", "spread", "others")}
        for weight, method in names.items()
    }
    return dict(
        claim="prior preservation makes drift and loss of diversity smaller, at a price in fidelity",
        verdict=told(drift, spread), values=dict(drift=drift, spread=spread, price=price, by_lambda=curve),
        measured=f"lambda = 1 against none: drift {words(drift | dict(mean=-drift['mean']))}, diversity "
        f"{words(spread)}, price in fidelity {words(price)}; over lambda = 0, 0.3, 1, 3 "
        f"({', '.join(all_weights)}): drift "
        + ", ".join(str(v["drift"]) for v in curve.values()) + "; diversity "
        + ", ".join(str(v["spread"]) for v in curve.values()) + "; fidelity "
        + ", ".join(str(v["fidelity"]) for v in curve.values()),
    )  # fmt: skip


def c14(rows: Rows) -> dict:
    kinds = ("cross-attention", "self-attention", "rest")
    found = {k: [rows.rows[s]["dreambooth_no_prior"]["change"][k] for s in rows.subjects] for k in kinds}
    mean = {k: torch.tensor([row["by_weight"] for row in rows_]).mean(0) for k, rows_ in found.items()}
    share = {k: found[k][0]["share"] for k in kinds}
    gaps = {}
    for other in kinds[1:]:
        a, b = mean[kinds[0]], mean[other]
        half = 1.96 * (a.var() / len(a) + b.var() / len(b)).sqrt().item()
        gaps[other] = dict(mean=round((a.mean() - b.mean()).item(), 5), interval=round(half, 5), count=len(a) + len(b))
    return dict(
        claim="cross-attention changes most when all weights are tuned", verdict=told(*gaps.values()),
        values=dict(change={k: [round(v, 5) for v in m.tolist()] for k, m in mean.items()}, share=share, gaps=gaps),
        measured="mean |dW|/|W| "
        + ", ".join(f"{k} {mean[k].mean():.4f} ({share[k]:.1%} of the numbers)" for k in kinds)
        + "; cross-attention - " + ", - ".join(f"{k}: {d['mean']:+.4f} ± {d['interval']:.4f}" for k, d in gaps.items()),
    )  # fmt: skip


def moved_alike(rows: Rows, weights: dict[str, Tensor]) -> dict:
    """Is a large relative change a large change, or a change of small weights?

    step: root mean square of a weight's change, a mean over the weights of a kind; size: that of the weights
    themselves; correlation: of the relative change with 1 / size, over all weights.
    """
    size = {}
    for name, weight in weights.items():
        if weight.ndim > 1:
            size.setdefault(kind_of(name), []).append(weight.float().square().mean().sqrt().item())
    size, relative = {kind: torch.tensor(values) for kind, values in size.items()}, {}
    for kind in size:
        found = [rows.rows[s]["dreambooth_no_prior"]["change"][kind]["by_weight"] for s in rows.subjects]
        relative[kind] = torch.tensor(found).mean(0)
    both = torch.stack([torch.cat([relative[k] for k in size]), 1 / torch.cat([size[k] for k in size])])
    return dict(step={k: round((relative[k] * size[k]).mean().item(), 5) for k in size},
                size={k: round(v.mean().item(), 4) for k, v in size.items()},
                correlation=round(torch.corrcoef(both)[0, 1].item(), 3))  # fmt: skip


def c15(rows: Rows) -> dict:
    base = rows("fidelity", "base")
    gain = {m: rows("fidelity", m) - base for m in ("custom_diffusion", "dreambooth", "textual_inversion", "lora")}
    near = difference(gain["custom_diffusion"] - 0.8 * gain["dreambooth"])
    size = {m: rows.sum("bytes", m) for m in gain}
    numbers = {m: rows.sum("parameters", m) for m in gain}
    share = numbers["custom_diffusion"] / numbers["dreambooth"]
    gains = {m: round(v.mean().item(), 4) for m, v in gain.items()}
    return dict(
        claim="Custom Diffusion is near DreamBooth (at least 80 % of its gain) with a few per cent of the parameters",
        verdict=told(near), values=dict(near=near, gain=gains, bytes=size, parameters=numbers, share=share),
        measured=f"gain in fidelity over the untouched model: Custom Diffusion {gains['custom_diffusion']:+.3f}, "
        f"DreamBooth {gains['dreambooth']:+.3f}; first - 0.8 x second: {words(near)}; {share:.1%} of the parameters; "
        "on disk " + ", ".join(f"{m.replace('_', ' ')} {v / 1e3:,.1f} kB" for m, v in size.items()),
    )  # fmt: skip


# ---- C8: what moves ----


def c8(bench: Bench) -> dict:
    sd = bench.sd
    parts = {"vae": sd.vae, "unet": sd.unet, "text_encoder": sd.text_encoder}

    def state() -> dict[str, Tensor]:
        return {f"{part}.{n.replace('.table', '')}": p.detach().clone() for part, net in parts.items()
                for n, p in net.named_parameters() if not n.endswith("rows")}  # fmt: skip

    before = state()
    settings = replace(textual_inversion.SETTINGS[sd.defaults.settings], steps=20, weight_decay=0.1)
    with textual_inversion.recipe(sd, folder("mochi"), token="<v>", noun="cat", settings=settings) as recipe:
        first = recipe.tokens.rows.detach().clone()
        train(bench, recipe)
        after, row = state(), recipe.tokens.rows.detach()
        moved = [name for name, value in before.items() if not torch.equal(value, after[name])]
        row_moved = not torch.equal(first, row)
    good = set(before) == set(after) and not moved and row_moved
    return dict(
        claim="one new row is all that moves; every other tensor is bit-identical",
        verdict="holds" if good else "does not hold", values=dict(others=len(before), moved=moved, numbers=row.numel()),
        measured=f"20 steps with weight decay 0.1: {len(before)} tensors of the three networks, {len(moved)} of them "
        f"moved; the new row of {row.numel()} numbers {'moved' if row_moved else 'did not move'}",
    )  # fmt: skip


# ---- C16, C17, C19: two subjects ----


def pair_fields(scene: str) -> dict:
    other = Spec("teapot", "red", "plain", "", x=0.75, y=0.71, size=0.46, flip=True, seed=1)
    return {"relation": "next to", "other": other, "x": 0.27, "y": 0.7, "size": 0.48, "scene": scene}


class TwoSubjects:
    """Prompts about both, the pictures that the systems draw for them, and how well each subject is met."""

    def __init__(self, bench: Bench, names: tuple[str, str]):
        self.bench, self.names = bench, names
        self.subjects = [subjects.SUBJECTS[name] for name in names]
        self.nouns = [subject.noun for subject in self.subjects]
        self.references = [bench.individual(pixels(subjects.references(name))) for name in names]

    def prompts(self, first: str, second: str) -> list[str]:
        return [f"a photo of a {first} next to a {second} {scene}" for scene in SCENES]

    def draw(self, first: str, second: str) -> Tensor:
        return self.bench.draw(self.prompts(first, second), seed=11)

    def truth(self) -> Tensor:
        one, two = self.subjects
        specs = []
        for scene in SCENES:
            spec = one.spec(seed=0, **pair_fields(scene))
            specs.append(replace(spec, other=replace(spec.other, noun=two.noun, look=two.look)))
        return pixels(specs)

    def score(self, x: Tensor, each: int) -> dict[str, Tensor]:
        """How well a picture shows both: its two lower halves, enlarged, are looked at in the better order.

        fidelity: mean likeness to the two subjects; worse: that of the subject that is met less; nouns: whether the
        judge reads off both nouns.  One number a prompt.
        """
        halves = [F.interpolate(x[:, :, 28:64, a : a + 36], 64, mode="bilinear") for a in (0, 28)]
        like = [[(self.bench.individual(half) @ ref.T).mean(1) for ref in self.references] for half in halves]
        orders = [torch.stack([like[0][0], like[1][1]]), torch.stack([like[0][1], like[1][0]])]
        best = torch.where(orders[0].mean(0) > orders[1].mean(0), orders[0], orders[1])  # (2, N)
        left, right = (judge.answers(self.bench.judge, half)[0]["noun"].argmax(1) for half in halves)
        one, two = (judge.ATTRIBUTES["noun"].index(noun) for noun in self.nouns)
        nouns = (((left == one) & (right == two)) | ((left == two) & (right == one))).float()
        values = dict(fidelity=best.mean(0), worse=best.amin(0), nouns=nouns)
        return {key: value.view(-1, each).mean(1) for key, value in values.items()}


def pairs(bench: Bench) -> dict:
    """ "one two" -> how often the judge reads both nouns off the untouched model's pictures and off the ground truth.

    Of all subjects but those that the methods' settings were chosen on; the order is that of the prompt.
    """
    rows = {}
    for names in itertools.permutations(ABLE, 2):
        two = TwoSubjects(bench, names)
        untouched, truth = two.score(two.draw(*two.nouns), bench.args.images), two.score(two.truth(), 1)
        rows[" ".join(names)] = {
            key: round(score["nouns"].mean().item(), 4) for key, score in (("untouched", untouched), ("truth", truth))
        }
    return rows


def chosen(rows: dict) -> list[tuple[str, str]]:
    """The pairs, each in its better order, that the untouched model draws most often and the judge can read."""
    found = {}
    for names in sorted((n for n in rows if rows[n]["truth"] >= READABLE), key=lambda n: -rows[n]["untouched"]):
        one, two = names.split()
        found.setdefault(frozenset((one, two)), (one, two))
    return list(found.values())[:PAIRS]


def two_subjects(bench: Bench, names: tuple[str, str]) -> dict:
    """Joint training, merging, averaging and DreamBooth on the same two subjects, prompts and noises."""
    sd, two, scores, each = bench.sd, TwoSubjects(bench, names), {}, bench.args.images
    named = [f"{token} {noun}" for token, noun in zip(TOKENS, two.nouns, strict=True)]

    def look(label: str, *prompts: str) -> None:
        x = two.draw(*prompts)
        scores[label] = two.score(x, each)
        Image.fromarray(montage(x[::each], len(SCENES), gap=0)).save(
            bench.args.samples / f"{'_'.join(names)}_{label}.png"
        )

    bench.args.samples.mkdir(parents=True, exist_ok=True)
    look("untouched model", *two.nouns)
    scores["ground truth"] = two.score(two.truth(), 1)
    learnt = [
        custom_diffusion.SubjectPictures(folder(name), token, noun)
        for name, token, noun in zip(names, TOKENS, two.nouns, strict=True)
    ]
    regularisation = [toybox_regularisation(sd, noun, 200) for noun in two.nouns]
    with custom_diffusion.joint_recipe(sd, learnt, regularisation=regularisation) as recipe:
        train(bench, recipe)
        look("joint", *named)
    alone = []
    for subject, examples in zip(learnt, regularisation, strict=True):
        with custom_diffusion.joint_recipe(sd, [subject], regularisation=[examples]) as recipe:
            train(bench, recipe)
            alone.append(concept_of(recipe))
    start = datetime.datetime.now()
    merged = merge_concepts(sd, alone, corpus(500))
    seconds = (datetime.datetime.now() - start).total_seconds()
    for label, concept in {"merged": merged, "averaged": averaged(alone, merged)}.items():
        with applied(sd, concept):
            look(label, *named)
    with two_dreambooths(bench, two) as recipe:
        train(bench, recipe)
        look("dreambooth", *(f"{token} {noun}" for token, noun in zip(("sks", "zwx"), two.nouns, strict=True)))
    solved = constraint(bench, alone, merged)
    return dict(scores={name: {k: [round(x, 4) for x in v.tolist()] for k, v in row.items()}
                        for name, row in scores.items()}, merge=solved | {"seconds": round(seconds, 2)})  # fmt: skip


def averaged(concepts: list[Concept], like: Concept) -> Concept:
    """What merging should not be: the mean of the weights, with the words of all."""
    mean = {n: torch.stack([c.tensors[n] for c in concepts]).mean(0) for n in concepts[0].tensors if n != "tokens"}
    return replace(like, tensors=mean | {"tokens": like.tensors["tokens"]})


@contextmanager
def two_dreambooths(bench: Bench, two: TwoSubjects) -> Iterator[Recipe]:
    """DreamBooth on both sets of pictures at once, each with a rare word and with the pictures of its class."""
    sd, (one, other) = bench.sd, two.nouns
    prior = dreambooth.prior_examples(sd, one, PRIOR)
    settings = dreambooth.SETTINGS[sd.defaults.settings]
    settings = replace(settings, steps=settings.steps * 3 // 2)  # as many more as joint training has
    examples = subject_examples(sd, folder(two.names[1]), f"zwx {other}", templates=("a photo of a {}",))
    others = [Term(examples), Term(dreambooth.prior_examples(sd, other, PRIOR))]
    with dreambooth.recipe(sd, folder(two.names[0]), noun=one, prior=prior, settings=settings) as recipe:
        recipe.terms += others
        for term in recipe.terms:
            term.weight /= 2
        yield recipe


@torch.no_grad()
def constraint(bench: Bench, alone: list[Concept], merged: Concept) -> dict:
    """How far the merged weights are from what each concept demands, and from those of an independent solver.

    The solver takes the conditions of the optimum as one linear system,  [A C^T; C 0] [dW^T; m] = [0; V^T - C W_0^T].
    """
    with applied(bench.sd, *[only_tokens(concept) for concept in alone]):
        targets = [word_features(bench.sd, concept.about).double().cpu() for concept in alone]
        C_reg = torch.cat([caption_features(bench.sd, caption)[0] for caption in dict.fromkeys(corpus(500))])
    C, C_reg = torch.cat(targets), C_reg.double().cpu()
    A = C_reg.T @ C_reg
    A += merged.settings["ridge"] * A.diagonal().mean() * torch.eye(len(A), dtype=A.dtype)
    K = torch.cat([torch.cat([A, C.T], 1), torch.cat([C, torch.zeros(len(C), len(C), dtype=A.dtype)], 1)])
    residual, mean_residual, gap = [], [], []
    for name in (name for name in merged.tensors if name != "tokens"):
        own = [concept.tensors[name].double() for concept in alone]
        V = torch.cat([W @ target.T for W, target in zip(own, targets, strict=True)], dim=1)
        W, W_0 = merged.tensors[name].double(), bench.weights[name.removeprefix("unet.")].double().cpu()
        residual.append(((W @ C.T - V).norm() / V.norm()).item())
        mean_residual.append(((sum(own) / len(own) @ C.T - V).norm() / V.norm()).item())
        right = torch.cat([torch.zeros(len(A), len(W), dtype=A.dtype), (V - W_0 @ C.T).T])
        change = torch.linalg.lstsq(K, right, driver="gelsd").solution[: len(A)].T
        gap.append(((W - W_0 - change).norm() / change.norm()).item())
    return dict(residual=max(residual), residual_of_average=max(mean_residual), gap_to_solver=max(gap),
                layers=len(gap), condition=torch.linalg.cond(C_reg.T @ C_reg).item())  # fmt: skip


def scores_of(found: dict) -> tuple[dict, dict]:
    """label -> quantity -> one number for each prompt of all pairs, and the means of these."""
    labels = next(iter(found.values()))["scores"]
    scores = {label: {key: torch.tensor([x for pair in found.values() for x in pair["scores"][label][key]])
                      for key in row} for label, row in labels.items()}  # fmt: skip
    return scores, {label: {k: round(v.mean().item(), 3) for k, v in row.items()} for label, row in scores.items()}


def by_pair(found: dict, one: str, other: str) -> dict:
    """The difference in the likeness of the subject that is met less, for each pair alone."""
    worse = lambda pair, label: torch.tensor(pair["scores"][label]["worse"])  # noqa: E731
    return {names: difference(worse(pair, one) - worse(pair, other)) for names, pair in found.items()}


def c16(found: dict) -> dict:
    scores, mean = scores_of(found)
    d = difference(scores["joint"]["worse"] - scores["untouched model"]["worse"])
    each = by_pair(found, "joint", "untouched model")
    return dict(
        claim="two subjects, learnt together, in one image", verdict=told(d),
        values=dict(difference=d, by_pair=each, mean=mean),
        measured=f"likeness of the subject that is met less, joint - untouched: {words(d)} over {d['count']} prompts "
        f"of {len(found)} pairs (" + ", ".join(f"{names.replace(' ', ' and ')} {words(p)}" for names, p in each.items())
        + f"); {mean['joint']['worse']} where the ground truth has {mean['ground truth']['worse']}; both nouns read "
        f"off {mean['joint']['nouns']:.0%} of the pictures (untouched {mean['untouched model']['nouns']:.0%}, ground "
        f"truth {mean['ground truth']['nouns']:.0%})",
    )  # fmt: skip


def c17(found: dict) -> dict:
    merges = [pair["merge"] for pair in found.values()]
    m = {key: max(merge[key] for merge in merges) for key in merges[0]}
    m["residual_of_average"] = min(merge["residual_of_average"] for merge in merges)
    good = m["residual"] < 1e-5 and m["gap_to_solver"] < 1e-3
    return dict(
        claim="merging in closed form: the constraint holds to rounding, equals an independent solver, takes seconds",
        verdict="holds" if good and m["seconds"] < 60 else "does not hold", values=m,
        measured=f"largest relative residual of {m['layers']} layers and {len(found)} pairs {m['residual']:.1e} "
        f"(weights averaged instead: at least {m['residual_of_average']:.2f} in the worst layer); distance to the "
        f"solver {m['gap_to_solver']:.1e}; {m['seconds']:.1f} s; condition of C_reg^T C_reg {m['condition']:.1e}",
    )  # fmt: skip


def c19(found: dict) -> dict:
    scores, mean = scores_of(found)
    against = {name: difference(scores[name]["worse"] - scores["dreambooth"]["worse"]) for name in ("joint", "merged")}
    each = {name: by_pair(found, name, "dreambooth") for name in against}
    return dict(
        claim="on two concepts, joint training and merging are ahead of DreamBooth", verdict=told(*against.values()),
        values=dict(against=against, by_pair=each, mean=mean),
        measured="likeness of the subject that is met less: " + ", ".join(f"{n} {r['worse']}" for n, r in mean.items())
        + "; against DreamBooth: " + ", ".join(f"{name} {words(d)}" for name, d in against.items())
        + "; both nouns read off " + ", ".join(f"{r['nouns']:.0%} {n}" for n, r in mean.items()),
    )  # fmt: skip


# ---- C18: a word inside a name ----


def compound(bench: Bench) -> dict:
    """Teach mochi as "<v> castle cat", with and without regularisation, and look at "a photo of a castle"."""
    sd, rows = bench.sd, {}
    references = bench.references("mochi")
    before = bench.class_samples(COMPOUND)

    def look(x: Tensor) -> dict:
        logits, features = judge.answers(bench.judge, x)
        right = logits["noun"].argmax(1) == judge.ATTRIBUTES["noun"].index(COMPOUND)
        moved = (features - judge.answers(bench.judge, before)[1]).norm(dim=1)
        values = dict(drift=(bench.individual(x) @ references.T).mean(1), right=right.float(), moved=moved)
        return {k: [round(n, 4) for n in v.view(-1, bench.args.images).mean(1).tolist()] for k, v in values.items()}

    rows["untouched"] = look(before)
    noun = f"{COMPOUND} cat"
    both = [toybox_regularisation(sd, noun, 200) for noun in (COMPOUND, "cat")]
    for name, regularisation in {"without": [], "with": both}.items():
        with custom_diffusion.recipe(sd, folder("mochi"), noun=noun, regularisation=regularisation) as recipe:
            train(bench, recipe)
            rows[name] = look(bench.class_samples(COMPOUND))
    return rows


def c18(rows: dict) -> dict:
    values = {name: {k: torch.tensor(v) for k, v in row.items()} for name, row in rows.items()}
    drift = difference(values["without"]["drift"] - values["untouched"]["drift"])
    held = difference(values["without"]["moved"] - values["with"]["moved"])
    mean = {name: {k: round(v.mean().item(), 3) for k, v in row.items()} for name, row in values.items()}
    return dict(
        claim="a word inside the subject's name drifts, and retrieved regularisation pictures prevent it",
        verdict=told(drift, held), values=dict(drift=drift, held=held, mean=mean),
        measured=f'"a photo of a {COMPOUND}" after teaching "<v> {COMPOUND} cat": likeness to the subject, without '
        f"regularisation - untouched {words(drift)}; its pictures moved by {mean['without']['moved']} without and "
        f"{mean['with']['moved']} with regularisation, difference {words(held)}; {COMPOUND} read off "
        + ", ".join(f"{row['right']:.0%} {name}" for name, row in mean.items()),
    )  # fmt: skip


PLACES = {
    "C8": ("11_textual_inversion", "One tensor moved"), "C10": ("12_dreambooth", "More like the subject?"),
    "C11": ("12_dreambooth", "What happens to the class"), "C12": ("12_dreambooth", "What happens to the class"),
    "C13": ("12_dreambooth", "What happens to the class"), "C14": ("13_custom_diffusion", "Which weights change most?"),
    "C15": ("13_custom_diffusion", "Pictures that hold the class"), "C16": ("14_multiple_concepts", "Side by side"),
    "C17": ("14_multiple_concepts", "The closed form"), "C18": ("13_custom_diffusion", "A word inside a name"),
    "C19": ("14_multiple_concepts", "Side by side"),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="toybox", help="as for step 1")
    parser.add_argument("--rows", type=Path, default=RESULTS / "personalization.json", help="what step 1 wrote")
    parser.add_argument("--out", type=Path, default=RESULTS / "claims.json")
    parser.add_argument("--samples", type=Path, default=Path("runs/claims"), help="where samples of pairs are kept")
    parser.add_argument("--fresh", action="store_true", help="do the experiments again")
    args = parser.parse_args()
    record = json.loads(args.rows.read_text())
    args.images, args.steps, args.w = record["images"], record["steps"], record["w"]
    bench = Bench(args)
    setting = setting_of(args, bench)
    if {key: record.get(key) for key in setting} != setting:
        raise SystemExit(f"--rows: {args.rows} was measured on other weights; run measurements/methods.py first")
    result = record_of(args.out, setting | dict(made_by="measurements/claims.py"), "experiments", "claims")
    if args.fresh:
        result["experiments"] = {}
    done, rows = result["experiments"], Rows(record)

    def experiment(table: dict, name: str, measure: Callable, *more) -> dict:
        if name not in table:
            table[name] = measure(bench, *more)
        result["claims"] = judged(done, rows, bench)
        keep(args.out, result)
        return table[name]

    experiment(done, "c8", c8)
    experiment(done, "compound", compound)
    names, both = chosen(experiment(done, "pairs", pairs)), done.setdefault("two_subjects", {})
    for two in names:
        experiment(both, " ".join(two), two_subjects, two)
    for name, claim in result["claims"].items():
        print(f"{name}: {claim['verdict'].upper()}: {claim['measured']}")


def judged(done: dict, rows: Rows, bench: Bench) -> dict:
    """The verdicts on the claims whose experiments are done, with what explains them and where they are shown."""
    claims = {"C10": c10(rows), "C11": c11(rows), "C12": c12(rows), "C13": c13(rows), "C14": c14(rows),
              "C15": c15(rows)}  # fmt: skip
    if "c8" in done:
        claims["C8"] = done["c8"]
    if done.get("two_subjects"):
        claims |= {name: rule(done["two_subjects"]) for name, rule in {"C16": c16, "C17": c17, "C19": c19}.items()}
    if "compound" in done:
        claims["C18"] = c18(done["compound"])
    alike = moved_alike(rows, bench.weights)
    claims["C14"]["values"]["moved_alike"] = alike
    why = {  # how a claim came out, and the explanation that a further measurement supports
        ("C14", "does not hold"): "all kinds of layers moved by about the same amount (root mean square "
        + ", ".join(f"{kind} {value:.4f}" for kind, value in alike["step"].items())
        + "), as Adam divides each gradient by its size; so the relative change is large where weights are small "
        f"(its correlation with 1 / size of a weight is {alike['correlation']:.2f})."
    }  # fmt: skip
    for name, claim in claims.items():
        if (name, claim["verdict"]) in why:
            claim["why"] = why[name, claim["verdict"]]
    return {name: claims[name] | dict(notebook=place, section=section)
            for name, (place, section) in PLACES.items() if name in claims}  # fmt: skip


if __name__ == "__main__":
    main()
