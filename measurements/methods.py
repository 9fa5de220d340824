"""Measure the methods of personalization on the Toybox model: writes data/results/personalization.json.

    python measurements/methods.py                       everything; a killed run goes on with the missing rows
    python measurements/methods.py --subjects mochi --methods dreambooth
    python measurements/methods.py --subjects tilly rollo --threads 1  several of these share the file

Each subject is learnt from its five pictures by each method, once for each training seed, and then drawn for its
evaluation prompts, from the same noises for all methods and seeds. The scores are those of
course_lib/evaluation/personalized.py, one number for each prompt. Beside them: the subject fidelity of the method's own
prompt before training, and the seconds, steps, tensors and bytes of a concept. personalization_samples.png has the
first sample of each new scene, personalization_tiles.png the same for each training seed and without labels: the
record's "tiles" names its rows. The methods' settings were chosen by measurements/tuning.py on other subjects.
"""

import argparse
import itertools
import time
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
from course_lib.personalization.concept import concept_of
from course_lib.personalization.finetune import finetune
from course_lib.personalization.regularisation import toybox_regularisation
from course_lib.plots import grid, montage
from course_lib.toybox import subjects
from course_lib.toybox.world import render

SUBJECTS = ("biscuit", "tilly", "mochi", "rollo", "bruno", "beppo")  # first two unlike any ordinary dog and teapot
TUNED_ON = ("tofu", "tockle")  # the methods' settings were chosen on these, which are not measured
SEEDS = (0, 1)  # of training; the untouched model has one row, of seed 0
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


class Sampler:
    """The base model with the options of a measurement, its scorer, and samples drawn from fixed noises."""

    def __init__(self, args: argparse.Namespace):
        dtype = records.prepare(args)
        self.args, self.sd = args, stable_diffusion.load(args.model, dtype=dtype)
        self.weights = {name: param.detach().clone() for name, param in self.sd.unet.named_parameters()}
        self.scorer = Scorer(self.sd)
        self.class_before: dict[str, Tensor] = {}  # noun -> samples of the untouched model
        self.fidelity_before: dict[tuple[str, str], Tensor] = {}  # subject, words for it -> before any training

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


def row(sampler: Sampler, name: str, method: str, seed: int) -> dict:
    """Train a method on a subject, and measure the result."""
    variant, subject = VARIANTS[method], subjects.SUBJECTS[name]
    if subject.noun not in sampler.class_before:
        sampler.class_before[subject.noun] = sampler.draw_class(subject.noun)
    words = variant.name(subject.noun)
    if not variant.method:
        return measure(sampler, subject, method, words)
    start = time.perf_counter()
    settings = METHODS[variant.method].settings_for(sampler.sd)
    with variant.recipe(sampler.sd, name, settings=replace(settings, seed=seed)) as recipe:
        to_prepare = time.perf_counter() - start
        if (name, words) not in sampler.fidelity_before:
            x, references = sampler.draw_subject(subject, words), sampler.scorer.references(name)
            sampler.fidelity_before[name, words] = sampler.subject_fidelity(x, references)
        start = time.perf_counter()
        for _ in finetune(sampler.sd, recipe):
            pass
        to_train, concept = time.perf_counter() - start, concept_of(recipe)
        found = measure(sampler, subject, sample_name(method, seed), words)
    found["by_prompt"]["untouched_subject_fidelity"] = [
        round(v, 3) for v in sampler.fidelity_before[name, words].tolist()
    ]
    return found | dict(
        seconds_to_prepare=round(to_prepare, 1), seconds_to_train=round(to_train, 1),
        steps=recipe.settings.steps, lr=recipe.settings.lr, batch_size=recipe.settings.batch_size,
        tensors=len(concept.tensors), parameters=sum(v.numel() for v in concept.tensors.values()), bytes=concept.bytes,
    )  # fmt: skip


def strip_of(args: argparse.Namespace, name: str, method: str, seed: int) -> np.ndarray:
    """(64, NEW * 64, 3): a subject in the new scenes by a method, as `measure` saved it, or "truth", as rendered."""
    if method == "truth":
        fields = [field for _, field in subjects.prompts(name)[:NEW]]
        return np.concatenate([render(subjects.SUBJECTS[name].spec(seed=0, **field)) for field in fields], axis=1)
    return np.array(Image.open(args.samples / f"{name}_{sample_name(method, seed)}.png"))


def sample_name(method: str, seed: int) -> str:
    return method if seed == SEEDS[0] else f"{method}_{seed}"


def sheets(args: argparse.Namespace) -> list[str]:
    """Write the sheet with labels and the one with tiles alone, whose rows are returned, if all samples are there."""
    shown = [*ON_SHEET, "truth"]
    rows = [(name, method, seed) for name, method, seed in itertools.product(SUBJECTS, shown, SEEDS)
            if seed == SEEDS[0] or method not in ("base", "truth")]  # fmt: skip
    try:
        strips = {row: strip_of(args, *row) for row in rows}
    except FileNotFoundError as error:
        print(f"personalization_samples.png: not written, since {error.filename} is missing")
        return []
    Image.fromarray(np.concatenate(list(strips.values()))).save(args.out.with_name("personalization_tiles.png"))
    first = {row: strip for row, strip in strips.items() if row[2] == SEEDS[0]}
    tiles = [tile for strip in first.values() for tile in torch.from_numpy(strip).split(strip.shape[0], dim=1)]
    labels = [f"{name}, {ON_SHEET.get(method, 'ground truth')}" for name, method, _ in first]
    scenes = [scene.split()[-1] for scene in subjects.NEW_SCENES]
    fig = grid(torch.stack(tiles).permute(0, 3, 1, 2), NEW, "", labels, scenes, tile=0.7)
    fig.savefig(args.out.with_name("personalization_samples.png"), dpi=110, bbox_inches="tight")
    return [f"{name} {method} {seed}" for name, method, seed in rows]


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
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS), help="of training")
    parser.add_argument("--samples", type=Path, default=Path("runs/personalize"), help="folder for first samples")
    args = parser.parse_args()
    sampler = Sampler(args)
    setting = sampler.setting() | dict(made_by="measurements/methods.py")
    records.start(args.out, setting, fresh=args.fresh)
    for name, method in itertools.product(args.subjects, args.methods):
        for seed in args.seeds if VARIANTS[method].method else SEEDS[:1]:
            keys = ("rows", name, method, str(seed))
            found = records.fill(args.out, setting, keys, row, sampler, name, method, seed)
            print(*keys, {k: v for k, v in found.items() if isinstance(v, (int, float))}, flush=True)
    if rows := sheets(args):
        records.write(args.out, records.read(args.out, setting) | dict(tiles=rows), measured=False)


if __name__ == "__main__":
    main()
