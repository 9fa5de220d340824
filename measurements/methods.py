"""Measure the methods of personalization on the Toybox model: writes data/results/personalization.json.

    python measurements/methods.py                       everything; a killed run goes on with the missing rows
    python measurements/methods.py --subjects mochi --methods dreambooth
    python measurements/methods.py --subjects tilly rollo --threads 1  several of these share the file

Each subject is learnt from its five pictures by each method, and then drawn for its evaluation prompts, from the same
noises for all methods. The scores are those of course_lib/evaluation/personalized.py, one number for each prompt.
Beside them: the subject fidelity of the method's own prompt before training, and the seconds, steps, tensors and bytes
of a concept. personalization_samples.png has the first sample of each new scene. The methods' settings for the Toybox
model were chosen beforehand, on tofu and tockle, which are not measured; with --lr this can be done again:
    python measurements/methods.py --subjects tofu tockle --methods custom_diffusion --lr 1e-3 --out runs/lr.json
"""

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import records
import torch
from PIL import Image
from torch import Tensor

from course_lib.cli.methods import METHODS
from course_lib.environment import REPOSITORY, RESULTS
from course_lib.evaluation.personalized import Scorer, by_prompt
from course_lib.latent import stable_diffusion
from course_lib.latent.stable_diffusion import StableDiffusion
from course_lib.personalization import dreambooth
from course_lib.personalization.concept import Concept, concept_of
from course_lib.personalization.finetune import finetune
from course_lib.personalization.regularisation import toybox_regularisation
from course_lib.plots import grid, montage
from course_lib.toybox import subjects
from course_lib.toybox.world import render

SUBJECTS = ("mochi", "biscuit", "tilly", "rollo")  # two pets, two things
PRIOR = 100  # pictures of the class
NEW = len(subjects.NEW_SCENES)  # a subject's first prompts
ON_SHEET = {"base": "untouched model", "textual_inversion": "Textual Inversion", "dreambooth": "DreamBooth",
            "lora": "LoRA", "custom_diffusion": "Custom Diffusion"}  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """A row of the measurement: a method of cli/methods.py with options of its own; no method: the untouched model.

    prior_weight: lambda; 0 trains without pictures of the class.  regularised: whether Custom Diffusion gets them.
    """

    method: str | None = None
    prior_weight: float = 0.0
    regularised: bool = False

    def options(self, sd: StableDiffusion, noun: str) -> dict:
        if self.regularised:
            return dict(regularisation=[toybox_regularisation(sd, noun, 200)])
        if self.prior_weight:
            return dict(prior=dreambooth.prior_examples(sd, noun, PRIOR), prior_weight=self.prior_weight)
        return {}

    def recipe(self, sd: StableDiffusion, name: str, **options):
        """The recipe, a context manager, for a subject such as "mochi".  options: beside those of the variant."""
        noun = subjects.SUBJECTS[name].noun
        return METHODS[self.method].recipe(sd, pictures_of(name), noun=noun, **(self.options(sd, noun) | options))

    def name(self, noun: str) -> str:
        """The words for the subject in a prompt."""
        method = METHODS.get(self.method)
        return method.name(method.token, noun) if method else noun


VARIANTS = {
    "base": Variant(),
    "textual_inversion": Variant("textual_inversion"),
    "dreambooth": Variant("dreambooth", prior_weight=1.0),
    "dreambooth_no_prior": Variant("dreambooth"),
    "dreambooth_prior_0.3": Variant("dreambooth", prior_weight=0.3),
    "dreambooth_prior_3": Variant("dreambooth", prior_weight=3.0),
    "lora": Variant("lora"),
    "custom_diffusion": Variant("custom_diffusion", regularised=True),
    "custom_diffusion_no_regularisation": Variant("custom_diffusion"),
}


def pictures_of(name: str) -> Path:
    """The folder with a subject's five pictures."""
    return REPOSITORY / "data" / "subjects" / name


def kind_of(name: str) -> str:
    """The kind of layer that a weight of the UNet belongs to."""
    return "cross-attention" if ".attn2." in name else "self-attention" if ".attn1." in name else "rest"


class Sampler:
    """The base model with the options of a measurement, its scorer, and samples drawn from fixed noises."""

    def __init__(self, args: argparse.Namespace):
        dtype = records.prepare(args)
        self.args, self.sd = args, stable_diffusion.load(args.model, dtype=dtype)
        self.weights = {name: param.detach().clone() for name, param in self.sd.unet.named_parameters()}
        self.scorer = Scorer(self.sd)
        self.class_before: dict[str, Tensor] = {}  # noun -> samples of the untouched model

    def setting(self) -> dict:
        """The settings that the figures depend on, beside the code."""
        args = self.args
        return dict(images=args.images, steps=args.steps, w=args.w, seed=0) | records.setting_of_model(self.sd)

    def draw(self, prompts: list[str], seed: int) -> Tensor:
        """(len(prompts) * images, 3, 64, 64): `images` of each prompt, from noises that depend on the seed alone."""
        noise = self.sd.noise(len(prompts) * self.args.images, seed=seed)
        return self.sd.sample(prompts, w=self.args.w, steps=self.args.steps, x_T=noise, batch=16)

    def draw_subject(self, subject: subjects.Subject, name: str) -> Tensor:
        """The evaluation prompts of a subject; `name` stands for it in them."""
        return self.draw([template.format(name) for template, _ in subjects.prompts(subject.name)], seed=3)

    def draw_class(self, noun: str) -> Tensor:
        """Eight groups of samples of "a photo of a <noun>"."""
        return self.draw([f"a photo of a {noun}"] * 8, seed=7)

    def subject_fidelity(self, x: Tensor, references: Tensor) -> Tensor:
        return by_prompt(self.scorer.subject_fidelity(x, references), self.args.images)


def measure(sampler: Sampler, subject: subjects.Subject, method: str, name: str) -> dict:
    """All scores of the model as it is now; `name` stands for the subject in prompts."""
    args, score, noun = sampler.args, sampler.scorer, subject.noun
    templates, fields = zip(*subjects.prompts(subject.name), strict=True)
    references, count = score.references(subject.name), args.images
    x, of_class = sampler.draw_subject(subject, name), sampler.draw_class(noun)
    args.samples.mkdir(parents=True, exist_ok=True)
    strip = montage(x[: NEW * count : count], NEW, gap=0)
    Image.fromarray(strip).save(args.samples / f"{subject.name}_{method}.png")
    plain = [template.format(noun) for template in templates for _ in range(count)]
    scores = {
        "subject_fidelity": sampler.subject_fidelity(x, references),
        "prompt_fidelity": by_prompt(score.prompt_fidelity(x, fields, count), count),
        "clip_t": by_prompt(score.clip_t(x, plain), count),
        "diversity": score.diversity(x, count),
        "class_drift": sampler.subject_fidelity(of_class, references),
        "class_diversity": score.diversity(of_class, count),
        "class_shift": by_prompt(score.class_shift(of_class, sampler.class_before[noun]), count),
    }
    means = {key: round(value.mean().item(), 4) for key, value in scores.items()}
    return means | {"by_prompt": {key: [round(v, 3) for v in value.tolist()] for key, value in scores.items()}}


def change(sampler: Sampler, concept: Concept) -> dict:
    """||W - W_0|| / ||W_0|| of the weights of each kind of layer, and their share of the numbers."""
    found, sizes = {}, {}
    for name, base in sampler.weights.items():
        kind = kind_of(name)
        if f"unet.{name}" in concept.tensors and base.ndim > 1:  # no biases, no normalisations
            moved = (concept.tensors[f"unet.{name}"].float() - base.float().cpu()).norm() / base.float().norm()
            found.setdefault(kind, []).append(round(moved.item(), 5))
            sizes[kind] = sizes.get(kind, 0) + base.numel()
    return {kind: dict(by_weight=rows, share=sizes[kind] / sum(sizes.values())) for kind, rows in found.items()}


def row(sampler: Sampler, subject: subjects.Subject, method: str) -> dict:
    """Train a method on a subject, and measure the result."""
    variant = VARIANTS[method]
    if subject.noun not in sampler.class_before:
        sampler.class_before[subject.noun] = sampler.draw_class(subject.noun)
    name = variant.name(subject.noun)
    if not variant.method:
        return measure(sampler, subject, method, name)
    start = time.perf_counter()
    with variant.recipe(sampler.sd, subject.name) as recipe:
        if sampler.args.lr:
            recipe.settings = replace(recipe.settings, lr=sampler.args.lr)
        to_prepare = time.perf_counter() - start
        references = sampler.scorer.references(subject.name)
        untouched = sampler.subject_fidelity(sampler.draw_subject(subject, name), references)
        start = time.perf_counter()
        for _ in finetune(sampler.sd, recipe):
            pass
        to_train, concept = time.perf_counter() - start, concept_of(recipe)
        found = measure(sampler, subject, method, name)
    found["by_prompt"]["untouched_subject_fidelity"] = [round(v, 3) for v in untouched.tolist()]
    if method == "dreambooth_no_prior":
        found["change"] = change(sampler, concept)
    return found | dict(
        seconds_to_prepare=round(to_prepare, 1), seconds_to_train=round(to_train, 1),
        steps=recipe.settings.steps, lr=recipe.settings.lr, batch_size=recipe.settings.batch_size,
        tensors=len(concept.tensors), parameters=sum(v.numel() for v in concept.tensors.values()), bytes=concept.bytes,
    )  # fmt: skip


def measure_missing(args: argparse.Namespace, setting: dict, table: str, measure_row: Callable) -> Iterator[tuple]:
    """Call measure_row(subject, method) where the record's table has no row yet; yields names and row once written.

    The record is read again before each row, since several processes may share it.
    """
    records.start(args.out, setting, table, fresh=args.fresh)
    for name in args.subjects:
        for method in args.methods:
            if method in records.read(args.out, setting, table)[table].get(name, {}):
                continue
            measured = measure_row(subjects.SUBJECTS[name], method)
            record = records.read(args.out, setting, table)
            rows = record[table]
            rows.setdefault(name, {})[method] = measured
            record[table] = {one: rows[one] for one in subjects.SUBJECTS if one in rows}
            records.write(args.out, record)
            yield name, method, measured


def sheet(args: argparse.Namespace, out: Path) -> None:
    """All subjects in all new scenes, by the methods of ON_SHEET and by the renderer, if the samples are all there."""
    tiles, labels = [], []
    for name in SUBJECTS:
        for method, label in ON_SHEET.items():
            path = args.samples / f"{name}_{method}.png"
            if not path.is_file():
                print(f"{out}: not written, since {path} is missing")
                return
            strip = torch.from_numpy(np.array(Image.open(path)))  # (64, NEW * 64, 3)
            tiles += strip.split(strip.shape[0], dim=1)
            labels.append(f"{name}, {label}")
        subject, prompts = subjects.SUBJECTS[name], subjects.prompts(name)[:NEW]
        tiles += [torch.from_numpy(render(subject.spec(seed=0, **field))) for _, field in prompts]
        labels.append(f"{name}, ground truth")
    scenes = [scene.split()[-1] for scene in subjects.NEW_SCENES]
    fig = grid(torch.stack(tiles).permute(0, 3, 1, 2), NEW, "", labels, scenes, tile=0.7)
    fig.savefig(out, dpi=110, bbox_inches="tight")


def add_sampling(parser: argparse.ArgumentParser, out: str, images: int) -> None:
    """The options of a measurement of methods on subjects."""
    add = parser.add_argument
    add("--model", default="toybox", help="as in load(); its name chooses the methods' settings")
    add("--out", type=Path, default=RESULTS / out)
    add("--images", type=int, default=images, help="samples of each prompt")
    add("--steps", type=int, default=12, help="DDIM steps")
    add("--w", type=float, default=5.0, help="guidance")
    records.add_options(parser)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_sampling(parser, "personalization.json", images=4)
    parser.add_argument("--subjects", nargs="+", default=list(SUBJECTS), choices=list(subjects.SUBJECTS))
    parser.add_argument("--methods", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--lr", type=float, help="a learning rate in place of the methods' own, to choose one")
    parser.add_argument("--samples", type=Path, default=Path("runs/personalize"), help="folder for first samples")
    args = parser.parse_args()
    sampler = Sampler(args)
    setting = sampler.setting() | dict(lr=args.lr, made_by="measurements/methods.py")
    for name, method, found in measure_missing(args, setting, "rows", lambda *one: row(sampler, *one)):
        print(name, method, {k: v for k, v in found.items() if isinstance(v, (int, float))}, flush=True)
    sheet(args, args.out.with_name("personalization_samples.png"))


if __name__ == "__main__":
    main()
