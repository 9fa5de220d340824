"""Measure the methods of personalization on the Toybox model: writes data/results/personalization.json.

    python measurements/methods.py                       everything; a killed run goes on with the missing rows
    python measurements/methods.py --subjects mochi --methods dreambooth
    python measurements/methods.py --subjects tilly rollo --threads 1  several of these share the file

Each subject is learnt from its five pictures by each method, and then drawn for its evaluation prompts, the same noises
for all. What is measured, with 95 % intervals over prompts:
    fidelity     dot product of the judge's individual vectors: samples with the reference views
    truth        the same with the ground truth that the renderer draws for the prompt
    prompt       share of what the prompt names (scene, accessory, style, relation) that the judge reads off the picture
    clip_t       the miniature CLIP's cosine of picture and prompt, the new word left out
    diversity    mean distance of two samples of one prompt, in the judge's features
    drift        fidelity of "a photo of a <noun>", without the new word, to the subject: what leaked into the class
    spread       mean distance of two samples of that class prompt
    others       mean distance of the class samples to those of the untouched model, same noises
and the seconds, steps, tensors and bytes of a concept. Beside the figures stands personalization_samples.png, with the
first sample of each new scene. The methods' settings for the miniature were chosen beforehand, on tofu and tockle, who
are not measured; with --lr this can be done again:
    python measurements/methods.py --subjects tofu tockle --methods custom_diffusion --lr 1e-3 --out runs/lr.json
"""

import argparse
import datetime
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import CLIPModel

from course_lib import environment
from course_lib.environment import REPOSITORY, RESULTS, device_name, sha256
from course_lib.evaluation import judge
from course_lib.evaluation.metrics import interval
from course_lib.latent import stable_diffusion
from course_lib.latent.stable_diffusion import StableDiffusion
from course_lib.personalization import custom_diffusion, dreambooth, lora, textual_inversion
from course_lib.personalization.concept import Concept, concept_of
from course_lib.personalization.finetune import finetune
from course_lib.personalization.recipe import Recipe
from course_lib.personalization.regularisation import toybox_regularisation
from course_lib.plots import grid, montage
from course_lib.toybox import subjects
from course_lib.toybox.world import Spec, render

SUBJECTS = ("mochi", "biscuit", "tilly", "rollo")  # two pets, two things
PRIOR = 100  # pictures of the class
NAMED = ("scene", "accessory", "style", "relation")
NEW = len(subjects.NEW_SCENES)  # a subject's first prompts
ON_SHEET = {"base": "untouched model", "textual_inversion": "Textual Inversion", "dreambooth": "DreamBooth",
            "lora": "LoRA", "custom_diffusion": "Custom Diffusion"}  # fmt: skip


def dreambooth_recipe(sd: StableDiffusion, folder: Path, noun: str, weight: float) -> Recipe:
    prior = dreambooth.prior_examples(sd, noun, PRIOR) if weight else None
    return dreambooth.recipe(sd, folder, noun=noun, prior=prior, prior_weight=weight)


def custom_recipe(sd: StableDiffusion, folder: Path, noun: str, regularised: bool) -> Recipe:
    pictures = [toybox_regularisation(sd, noun, 200)] if regularised else []
    return custom_diffusion.recipe(sd, folder, noun=noun, regularisation=pictures)


# method -> (recipe, what stands for the subject in a prompt)
METHODS: dict[str, tuple[Callable[[StableDiffusion, Path, str], Recipe] | None, str]] = {
    "base": (None, "{noun}"),  # the model as it is, which only knows the class
    "textual_inversion": (lambda sd, f, noun: textual_inversion.recipe(sd, f, token="<v>", noun=noun), "<v>"),
    "dreambooth": (lambda sd, f, noun: dreambooth_recipe(sd, f, noun, 1.0), "sks {noun}"),
    "dreambooth_no_prior": (lambda sd, f, noun: dreambooth_recipe(sd, f, noun, 0.0), "sks {noun}"),
    "dreambooth_prior_0.3": (lambda sd, f, noun: dreambooth_recipe(sd, f, noun, 0.3), "sks {noun}"),
    "dreambooth_prior_3": (lambda sd, f, noun: dreambooth_recipe(sd, f, noun, 3.0), "sks {noun}"),
    "lora": (lambda sd, f, noun: lora.recipe(sd, f, noun=noun), "sks {noun}"),
    "custom_diffusion": (lambda sd, f, noun: custom_recipe(sd, f, noun, True), "<v> {noun}"),
    "custom_diffusion_no_regularisation": (lambda sd, f, noun: custom_recipe(sd, f, noun, False), "<v> {noun}"),
}


def pixels(specs: list[Spec]) -> Tensor:
    """What the renderer draws: (N, 3, 64, 64) in [-1, 1]."""
    return torch.stack([torch.from_numpy(render(spec)) for spec in specs]).permute(0, 3, 1, 2) / 127.5 - 1


def kind_of(name: str) -> str:
    """Of which kind of layer a weight of the UNet is."""
    return "cross-attention" if ".attn2." in name else "self-attention" if ".attn1." in name else "rest"


class Bench:
    """The base model, those who score it, and what they saw of the base model."""

    def __init__(self, args: argparse.Namespace):
        if getattr(args, "threads", None):
            torch.set_num_threads(args.threads)
        self.args = args
        self.sd = stable_diffusion.load(args.model, dtype=environment.quick_dtype(environment.device()))
        self.weights = {name: param.detach().clone() for name, param in self.sd.unet.named_parameters()}
        self.judge = judge.load_judge(self.sd.device)
        self.clip = CLIPModel.from_pretrained(self.sd.source / "clip", dtype=torch.float32).eval().to(self.sd.device)
        self.class_before: dict[str, Tensor] = {}

    def draw(self, prompts: list[str], seed: int) -> Tensor:
        """(len(prompts) * images, 3, 64, 64): `images` of each prompt, from noises that depend on the seed alone."""
        count, args = self.args.images, self.args
        noise = self.sd.noise(len(prompts) * count, seed=seed)
        return self.sd.sample(prompts, w=args.w, steps=args.steps, x_T=noise, batch=16)

    @torch.no_grad()
    def individual(self, x: Tensor) -> Tensor:
        return torch.cat([self.judge.individual(part) for part in x.split(100)])

    @torch.no_grad()
    def clip_t(self, x: Tensor, prompts: list[str]) -> Tensor:
        ids = self.sd.tokenizer(prompts, padding="longest", truncation=True, return_tensors="pt").input_ids
        image = self.clip.visual_projection(self.clip.vision_model(pixel_values=x).pooler_output)
        text = self.clip.text_projection(self.clip.text_model(input_ids=ids.to(x.device)).pooler_output)
        return F.cosine_similarity(image, text)

    def spread(self, x: Tensor) -> Tensor:
        """For each prompt the mean distance of two of its samples, in the judge's features: (prompts,)."""
        features = judge.answers(self.judge, x)[1].view(-1, self.args.images, self.judge.identity.in_features)
        return torch.stack([torch.pdist(rows).mean() for rows in features])

    def references(self, name: str) -> Tensor:
        """The judge's individual vectors of a subject's five reference views: (5, D)."""
        return self.individual(pixels(subjects.references(name)))

    def class_samples(self, noun: str) -> Tensor:
        return self.draw([f"a photo of a {noun}"] * 8, seed=7)

    def measure(self, subject: subjects.Subject, method: str, name: str) -> dict:
        """All figures of one model and subject; `name` stands for the subject in prompts."""
        count, noun = self.args.images, subject.noun
        templates, fields = zip(*subjects.prompts(subject.name), strict=True)
        specs = [subject.spec(seed=0, **f) for f in fields]
        references = self.references(subject.name)
        truth = self.individual(pixels(specs)).repeat_interleave(count, dim=0)
        x = self.draw([template.format(name) for template in templates], seed=3)
        self.args.samples.mkdir(parents=True, exist_ok=True)
        strip = montage(x[: NEW * count : count], NEW, gap=0)
        Image.fromarray(strip).save(self.args.samples / f"{subject.name}_{method}.png")
        own = self.individual(x)
        by_prompt = {
            "fidelity": (own @ references.T).mean(1),
            "truth": (own * truth).sum(1),
            "prompt": self.named(x, specs, fields),
            "clip_t": self.clip_t(x, [t.format(noun) for t in templates for _ in range(count)]),
        }
        by_prompt = {key: value.view(-1, count).mean(1) for key, value in by_prompt.items()}
        of_class = self.class_samples(noun)
        by_prompt |= {"diversity": self.spread(x), "spread": self.spread(of_class)}
        by_prompt["drift"] = (self.individual(of_class) @ references.T).mean(1).view(-1, count).mean(1)
        before, after = (judge.answers(self.judge, images)[1] for images in (self.class_before[noun], of_class))
        by_prompt["others"] = (before - after).norm(dim=1).view(-1, count).mean(1)
        row = {}
        for key, value in by_prompt.items():
            row |= {key: round(value.mean().item(), 4), f"{key}_ci": round(interval(value), 4)}
        return row | {"by_prompt": {key: [round(v, 3) for v in rows.tolist()] for key, rows in by_prompt.items()}}

    def change(self, concept: Concept) -> dict:
        """Mean of ||W - W_0|| / ||W_0|| over the weights of each kind of layer, and their share of the numbers."""
        found, sizes = {}, {}
        for name, base in self.weights.items():
            kind = kind_of(name)
            if f"unet.{name}" in concept.tensors and base.ndim > 1:  # no biases, no normalisations
                change = (concept.tensors[f"unet.{name}"].float() - base.float().cpu()).norm() / base.float().norm()
                found.setdefault(kind, []).append(round(change.item(), 5))
                sizes[kind] = sizes.get(kind, 0) + base.numel()
        return {kind: dict(by_weight=rows, share=sizes[kind] / sum(sizes.values())) for kind, rows in found.items()}

    def named(self, x: Tensor, specs, fields) -> Tensor:
        """For each sample the share of the named attributes that the judge reads off it."""
        logits, said = judge.answers(self.judge, x)[0], judge.labels(specs)
        shares = []
        for k, field in enumerate(fields):
            rows = slice(k * self.args.images, (k + 1) * self.args.images)
            right = [logits[n][rows].argmax(1) == said[n][k] for n in NAMED if n in field]
            shares.append(torch.stack(right).float().mean(0))
        return torch.cat(shares)

    def row(self, subject: subjects.Subject, method: str) -> dict:
        """Learn a subject by a method, and measure."""
        make, name = METHODS[method]
        if subject.noun not in self.class_before:
            self.class_before[subject.noun] = self.class_samples(subject.noun)
        if make is None:
            return self.measure(subject, method, subject.noun)
        start = time.perf_counter()
        with make(self.sd, REPOSITORY / "data" / "subjects" / subject.name, subject.noun) as recipe:
            if getattr(self.args, "lr", None):
                recipe.settings = replace(recipe.settings, lr=self.args.lr)
            prepared = time.perf_counter()
            for _ in finetune(self.sd, recipe):
                pass
            done, concept = time.perf_counter(), concept_of(recipe)
            row = self.measure(subject, method, name.format(noun=subject.noun))
        if method == "dreambooth_no_prior":
            row["change"] = self.change(concept)
        return row | dict(
            seconds_to_prepare=round(prepared - start, 1), seconds_to_train=round(done - prepared, 1),
            steps=recipe.settings.steps, lr=recipe.settings.lr, batch_size=recipe.settings.batch_size,
            tensors=len(concept.tensors), parameters=sum(v.numel() for v in concept.tensors.values()),
            bytes=concept.bytes,
        )  # fmt: skip


def setting_of(args: argparse.Namespace, bench: Bench) -> dict:
    """What the figures depend on, beside the code: figures of another setting do not count."""
    files = sorted(bench.sd.source.rglob("*.safetensors"))
    weights = {str(p.relative_to(bench.sd.source)): sha256(p)[:16] for p in files}
    dtype = str(bench.sd.dtype).removeprefix("torch.")
    return dict(images=args.images, steps=args.steps, w=args.w, seed=0, dtype=dtype, weights=weights)


def record_of(path: Path, setting: dict, *tables: str) -> dict:
    """What `path` holds, by an earlier run or by one beside this one; of another setting, or none: empty tables."""
    earlier = json.loads(path.read_text()) if path.is_file() else {}
    same = all(earlier.get(key) == value for key, value in setting.items())
    return earlier if same else setting | {table: {} for table in tables}


def keep(path: Path, record: dict) -> None:
    record.update(device=device_name(), date=datetime.date.today().isoformat(), torch=torch.__version__)
    path.write_text(json.dumps(record, indent=1) + "\n")


def measure_missing(args: argparse.Namespace, setting: dict, table: str, row: Callable) -> Iterator[tuple]:
    """Measure row(subject, method) where the record's table has none; yields names and row once they are kept."""
    for name in args.subjects:
        for method in args.methods:
            if method in record_of(args.out, setting, table)[table].get(name, {}):
                continue
            measured = row(subjects.SUBJECTS[name], method)
            record = record_of(args.out, setting, table)
            rows = record[table]
            rows.setdefault(name, {})[method] = measured
            record[table] = {one: rows[one] for one in subjects.SUBJECTS if one in rows}
            keep(args.out, record)
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
    Image.open(out).convert("RGB").quantize(256).save(out, optimize=True)


def arguments(parser: argparse.ArgumentParser, out: str, images: int) -> argparse.ArgumentParser:
    """The options of a measurement of methods on subjects."""
    add = parser.add_argument
    add("--model", default="toybox", help="as in load(); its name chooses the methods' settings")
    add("--out", type=Path, default=RESULTS / out)
    add("--images", type=int, default=images, help="samples of each prompt")
    add("--steps", type=int, default=12, help="DDIM steps")
    add("--w", type=float, default=5.0, help="guidance")
    add("--threads", type=int, help="CPU threads (default: all)")
    return parser


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments(parser, "personalization.json", images=4)
    parser.add_argument("--subjects", nargs="+", default=list(SUBJECTS), choices=list(subjects.SUBJECTS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--lr", type=float, help="a learning rate in place of the methods' own, to choose one")
    parser.add_argument("--samples", type=Path, default=Path("runs/personalize"), help="where first samples are kept")
    args = parser.parse_args()
    bench = Bench(args)
    setting = setting_of(args, bench) | dict(made_by="measurements/methods.py")
    setting |= dict(lr=args.lr) if args.lr else {}
    for name, method, row in measure_missing(args, setting, "rows", bench.row):
        print(name, method, {k: v for k, v in row.items() if isinstance(v, (int, float))}, flush=True)
    sheet(args, args.out.with_name("personalization_samples.png"))


if __name__ == "__main__":
    main()
