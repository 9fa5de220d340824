"""Faces and styles (C20): learnt by every method, the style also together with a face. Writes data/results/styles.json.

    python measurements/styles.py                  everything; a killed run goes on with the missing rows

Faces are measured as the subjects of methods.py are. A style is learnt from pictures of five objects and asked for on
twenty others; of each picture
    style_fidelity    as in course_lib/evaluation/style.py: 0 for plain renderings, 1 for renderings in the style
    noun, scene       whether the judge still reads off what was asked for
each one number a prompt, for each training seed. "untouched" is drawn without the style's words. "truth" is rendered at
512 pixels and made smaller, as the pictures are that a style is learnt from, and "autoencoded" is the truth as the
autoencoder keeps it: no method draws more detail.
Both at once: a face and a style learnt together by Custom Diffusion, and the prompt names both.
"""

import argparse
import functools
import itertools
from dataclasses import replace

import methods
import numpy as np
import records
import torch
from methods import SEEDS, VARIANTS, Sampler, add_sampling, pictures_of
from PIL import Image
from torch import Tensor

from course_lib.cli.methods import METHODS
from course_lib.evaluation import judge
from course_lib.evaluation.personalized import by_prompt, pixels
from course_lib.evaluation.style import StyleScorer, drawings
from course_lib.personalization import custom_diffusion
from course_lib.personalization.custom_diffusion import SubjectPictures
from course_lib.personalization.finetune import finetune
from course_lib.plots import montage
from course_lib.toybox import subjects
from course_lib.toybox.scenes import SCENES
from course_lib.toybox.world import Spec, sample_spec

FACES, STYLES = ("matteo", "linnea"), ("chalk", "riso")
# The class has no pictures of its own: no prior and no regularisation.  method -> (variant, words for the style)
TAUGHT = {
    "textual_inversion": ("textual_inversion", "the style of <v>"),
    "dreambooth": ("dreambooth_no_prior", "sks style"),
    "lora": ("lora", "sks style"),
    "custom_diffusion": ("custom_diffusion_no_regularisation", "<v> style"),
}
CAPTIONS = ("a picture in {}", "a drawing in {}", "a photo in {}", "an image in {}", "a picture in {}")


@functools.cache
def style_scorer(sampler: Sampler, style: str) -> StyleScorer:
    """Made with 200 renderings of objects and scenes at random."""
    rng = np.random.default_rng(3)
    specs = [sample_spec(rng, relation=None, style="plain") for _ in range(200)]
    return StyleScorer(sampler.scorer.judge, drawings([replace(s, style=style) for s in specs]), drawings(specs))


def asked(style: str) -> tuple[list[str], list[Spec]]:
    """Templates, whose {} stands for the style, and a plain rendering's Spec for each."""
    templates, fields = zip(*subjects.prompts(style), strict=True)
    return list(templates), [sample_spec(np.random.default_rng([k, 9]), **field) for k, field in enumerate(fields)]


def scores(sampler: Sampler, scorer: StyleScorer, specs: list[Spec], x: Tensor, each: int) -> dict[str, list[float]]:
    """One number a prompt; `each` pictures of a prompt."""
    logits, _ = judge.answers(sampler.scorer.judge, x)
    found = {"style_fidelity": scorer(x)}
    for name in ("noun", "scene"):
        right = torch.tensor([judge.ATTRIBUTES[name].index(getattr(spec, name)) for spec in specs])
        found[name] = (logits[name].argmax(1) == right.repeat_interleave(each)).float()
    return {name: [round(v, 3) for v in by_prompt(value, each).tolist()] for name, value in found.items()}


@torch.no_grad()
def known(sampler: Sampler, style: str) -> dict:
    """The untouched model without the style's words, and renderings with and without the style."""
    scorer, (templates, specs), each = style_scorer(sampler, style), asked(style), sampler.args.images
    plain = sampler.draw([template.replace(" in {}", "") for template in templates], seed=3)
    true, sd = drawings([replace(spec, style=style) for spec in specs]), sampler.sd
    autoencoded = torch.cat([sd.decode(sd.encode_image(part)).float().cpu() for part in true.split(10)])
    return {"untouched": scores(sampler, scorer, specs, plain, each), "truth": scores(sampler, scorer, specs, true, 1),
            "autoencoded": scores(sampler, scorer, specs, autoencoded, 1),
            "plain": scores(sampler, scorer, specs, drawings(specs), 1)}  # fmt: skip


def known_face(sampler: Sampler, face: str) -> dict:
    """The renderer's pictures of a face for its evaluation prompts: what its subject fidelity can reach."""
    subject = subjects.SUBJECTS[face]
    x = pixels([subject.spec(seed=0, **field) for _, field in subjects.prompts(face)])
    values = sampler.scorer.subject_fidelity(x, sampler.scorer.references(face))
    return {"truth": [round(v, 3) for v in values.tolist()]}


def learnt(sampler: Sampler, style: str, method: str, seed: int) -> dict:
    """A style taught by a method, on twenty objects that its pictures do not show."""
    variant, words = TAUGHT[method]
    templates, specs = asked(style)
    settings = replace(METHODS[VARIANTS[variant].method].settings_for(sampler.sd), seed=seed)
    name = "the style of {}" if method == "textual_inversion" else "{}"  # {} in a caption: "<v>", "sks style", ...
    captions = [caption.format(name) for caption in CAPTIONS]
    with VARIANTS[variant].recipe(sampler.sd, style, settings=settings, captions=captions) as recipe:
        for _ in finetune(sampler.sd, recipe):
            pass
        x = sampler.draw([template.format(words) for template in templates], seed=3)
    save(sampler, x, f"{style}_{method}_{seed}")
    return scores(sampler, style_scorer(sampler, style), specs, x, sampler.args.images)


def together(sampler: Sampler, face: str, style: str, seed: int) -> dict:
    """A face and a style learnt at once by Custom Diffusion; also what the renderer reaches."""
    subject, each = subjects.SUBJECTS[face], sampler.args.images
    learnt = [SubjectPictures(pictures_of(face), "<v1>", subject.noun),
              SubjectPictures(pictures_of(style), "<v2>", "style", CAPTIONS)]  # fmt: skip
    settings = replace(custom_diffusion.joint_settings(sampler.sd, 2), seed=seed)
    with custom_diffusion.joint_recipe(sampler.sd, learnt, settings=settings) as recipe:
        for _ in finetune(sampler.sd, recipe):
            pass
        x = sampler.draw([f"a picture of a <v1> {subject.noun} {scene} in <v2> style" for scene in SCENES], seed=3)
    save(sampler, x, f"{face}_{style}_{seed}")
    specs = [subject.spec(seed=0, scene=scene) for scene in SCENES]
    true, scorer = drawings([replace(spec, style=style) for spec in specs]), style_scorer(sampler, style)
    references = sampler.scorer.references(face)
    return {name: scores(sampler, scorer, specs, images, count)
            | {"subject_fidelity": [round(v, 3) for v in
                                    by_prompt(sampler.scorer.subject_fidelity(images, references), count).tolist()]}
            for name, images, count in (("drawn", x, each), ("truth", true, 1))}  # fmt: skip


def save(sampler: Sampler, x: Tensor, name: str) -> None:
    sampler.args.samples.mkdir(parents=True, exist_ok=True)
    Image.fromarray(montage(x[:: sampler.args.images], 10, gap=0)).save(sampler.args.samples / f"{name}.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_sampling(parser, "styles.json", images=4)
    parser.add_argument("--samples", type=methods.Path, default=methods.Path("runs/styles"), help="for first samples")
    args = parser.parse_args()
    sampler = Sampler(args)
    setting = sampler.setting() | dict(made_by="measurements/styles.py")
    records.start(args.out, setting, fresh=args.fresh)

    def fill(*keys: object, measure) -> None:
        found = records.fill(args.out, setting, tuple(map(str, keys)), measure, sampler, *keys[1:])
        print(*keys, {k: sum(v) / len(v) for k, v in found.items() if isinstance(v, list)}, flush=True)

    for style in STYLES:
        fill("known", style, measure=known)
    for style, method, seed in itertools.product(STYLES, TAUGHT, SEEDS):
        fill("styles", style, method, seed, measure=learnt)
    for face in FACES:
        fill("known", face, measure=known_face)
        fill("faces", face, "base", SEEDS[0], measure=methods.row)
    for face, seed in itertools.product(FACES, SEEDS):
        for method in TAUGHT:
            fill("faces", face, method, seed, measure=methods.row)
    for face, style, seed in itertools.product(FACES, STYLES, SEEDS):
        fill("together", face, style, seed, measure=together)


if __name__ == "__main__":
    main()
