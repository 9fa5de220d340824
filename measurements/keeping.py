"""What does each way to hold a subject keep? Writes data/results/keeping.json, for C7 and for the GAN's part of C9.

    python measurements/keeping.py

"subjects": six subjects, four pictures of each, the first four new scenes. Prompt-to-Prompt and Plug-and-Play edit
each picture to each scene, and the inverted latent is drawn again with it. A LoRA and the word of Textual Inversion
learn the subject from all pictures and draw the same scenes from four noises; so does the plain noun. Scored by scene:
structure shared with the picture ("keeps"), structure that pictures of two scenes share ("between scenes"), structure
that two pictures of one scene share ("within a scene"), subject fidelity, whether the judge reads the scene, and the
product of these two ("told"). Also the error of the inverted latent's own picture. C7 compares edits with the LoRA, C9
the inverted latent with the word.
"gan" (C9): 20 held-out cats and 20 renderings of other nouns, inverted by the GAN and by the diffusion model without
guidance: PSNR to the picture, and to the next one; whether the judge reads the right noun.
"""

import argparse
from itertools import combinations
from pathlib import Path

import numpy as np
import records
import torch
from methods import SUBJECTS, VARIANTS
from torch import Tensor

from course_lib.editing.gan import gan_inversion, load_gan
from course_lib.editing.inversion import Inverted, invert, redraw
from course_lib.editing.plug_and_play import plug_and_play
from course_lib.editing.prompt_to_prompt import edit
from course_lib.environment import CHECKPOINTS, RESULTS, from_uint8
from course_lib.evaluation import edits, judge
from course_lib.evaluation.personalized import Scorer, pixels
from course_lib.latent import stable_diffusion
from course_lib.personalization.finetune import finetune
from course_lib.toybox import subjects
from course_lib.toybox.world import NOUNS, render, sample_spec

W, STEPS = 5.0, 25
PICTURES, SCENES = 4, 4
GAN_PICTURES, GAN_STEPS = 20, 300


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=CHECKPOINTS / "toybox-sd")
    parser.add_argument("--out", type=Path, default=RESULTS / "keeping.json")
    records.add_options(parser)
    return parser.parse_args()


def of_subject(sd, scorer: Scorer, name: str) -> dict:
    """Scores of each way, scene by scene."""
    noun, specs = subjects.SUBJECTS[name].noun, subjects.references(name)[:PICTURES]
    prompts = subjects.prompts(name)[:SCENES]
    targets = [template.format(noun) for template, _ in prompts]
    x = pixels(specs)
    starts = [invert(sd, x[k : k + 1], f"a photo of a {noun} {spec.scene}", steps=STEPS, fixed_point=1)
              for k, spec in enumerate(specs)]  # fmt: skip

    def edited(start: Inverted, target: str) -> Tensor:
        return edit(sd, start.prompts[0], target, start, w=W)[1]

    noise = sd.noise(PICTURES, seed=2)

    def drawn(words: str) -> Tensor:
        lines = [template.format(words) for template, _ in prompts]
        return torch.stack([sd.sample(line, x_T=noise, w=W, steps=STEPS) for line in lines])  # (scenes, pictures, ...)

    def by_scene(method) -> Tensor:
        return torch.stack([torch.cat([method(start, target) for start in starts]) for target in targets])

    found = {
        "Prompt-to-Prompt": by_scene(edited),
        "Plug-and-Play": by_scene(lambda start, target: plug_and_play(sd, start, target, w=W)),
        "inverted latent": by_scene(lambda start, target: redraw(sd, start, target, W)),
        "noun": drawn(noun),
    }
    for method in ("lora", "textual_inversion"):
        with VARIANTS[method].recipe(sd, name) as recipe:
            for _ in finetune(sd, recipe):
                pass
            found[method] = drawn(VARIANTS[method].name(noun))
    again = torch.cat([redraw(sd, start) for start in starts]).cpu()
    errors = {"again": (again - x).abs().mean().item() / 2, "other": (again - x.roll(1, 0)).abs().mean().item() / 2}
    fields = [field for _, field in prompts]
    found["picture"] = x[None].expand(len(targets), *x.shape)
    rows = {way: scored(scorer, images.cpu().float(), x, name, fields) for way, images in found.items()}
    return rows | {"errors": {key: round(value, 4) for key, value in errors.items()}}


def scored(scorer: Scorer, images: Tensor, x: Tensor, name: str, fields: list[dict]) -> dict:
    """images: (scenes, pictures, 3, 64, 64); the k-th of a scene belongs to the k-th picture x, or noise."""
    everywhere = torch.ones(len(x), 1, 64, 64)
    keeps = torch.stack([edits.structure(of_scene, x, everywhere).mean() for of_scene in images])
    between = torch.stack([edits.structure(a, b, everywhere).mean() for a, b in combinations(images, 2)])
    pairs = list(combinations(range(len(x)), 2))
    within = torch.stack([torch.stack([edits.structure(one[a : a + 1], one[b : b + 1], everywhere[:1])[0]
                                       for a, b in pairs]).mean() for one in images])  # fmt: skip
    flat = images.flatten(0, 1)
    fidelity = scorer.subject_fidelity(flat, scorer.references(name))
    read = scorer.prompt_fidelity(flat, fields, len(x))
    told = fidelity.clamp(min=0) * read
    by_picture = {"subject_fidelity": fidelity, "scene": read, "told": told}
    rows = {"keeps": keeps, "between scenes": between, "within a scene": within}
    rows |= {key: values.view(len(images), -1).mean(1) for key, values in by_picture.items()}
    return {key: [round(v, 4) for v in row.tolist()] for key, row in rows.items()}


def of_gan(sd) -> dict:
    """PSNR of both inversions, picture by picture, at home (cats) and away (other nouns)."""
    alone = dict(edits.ALONE, pattern="plain")  # as the GAN's family
    generator, encoder = load_gan(sd.device)
    network = judge.load_judge(sd.device)
    rng, found = np.random.default_rng(106), {}
    nouns = [noun for noun in NOUNS if noun != "cat"][:GAN_PICTURES]
    for place, shown in (("cats", ["cat"] * GAN_PICTURES), ("others", nouns)):
        x = torch.stack([from_uint8(render(sample_spec(rng, noun, **alone))) for noun in shown]).to(sd.device)
        with torch.no_grad():
            guess = encoder(x)
        starts = {"from the mean": generator.mean_latent(), "from the encoder": guess,
                  "a latent for each block": guess[:, None].expand(-1, len(generator.blocks), -1)}  # fmt: skip
        drawn = {name: gan_inversion(generator, x, w, steps=GAN_STEPS)[1] for name, w in starts.items()}
        prompts = [f"a photo of a {noun}" for noun in shown]
        drawn["diffusion"] = redraw(sd, invert(sd, x, prompts, steps=STEPS, fixed_point=1))
        for name, images in drawn.items():
            named = judge.answers(network, images)[0]["noun"].argmax(1).cpu()
            right = torch.tensor([judge.ATTRIBUTES["noun"][k] == noun for k, noun in zip(named, shown, strict=True)])
            rows = {"own": edits.psnr(images, x), "next": edits.psnr(images, x.roll(1, 0)), "noun": right.float()}
            found.setdefault(name, {})[place] = {k: [round(v, 3) for v in row.tolist()] for k, row in rows.items()}
    return found


def main() -> None:
    args = arguments()
    args.dtype = args.dtype or "float32"  # an inversion in bfloat16 does not come back
    sd = stable_diffusion.load(args.model, dtype=records.prepare(args))
    setting = dict(w=W, steps=STEPS, seed=0, made_by="measurements/keeping.py") | records.setting_of_model(sd)
    records.start(args.out, setting, "subjects", fresh=args.fresh)
    scorer = Scorer(sd)
    for name in SUBJECTS:
        row = records.fill(args.out, setting, ("subjects", name), of_subject, sd, scorer, name)
        print(name, {way: scores["keeps"] for way, scores in row.items() if way != "errors"}, flush=True)
    records.fill(args.out, setting, ("gan",), of_gan, sd)


if __name__ == "__main__":
    main()
