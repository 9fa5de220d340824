"""What do image embeddings keep, and does the prior obey? Writes data/results/unclip.json, the record of C5.

    python measurements/unclip.py

"variations": of 200 held-out pictures of one object, two variations each: the share of noun, colour, pattern, scene,
accessory and style that the judge reads as in the picture ("kept"), the same against another picture ("shuffled"), and
how far the layouts of the two agree ("alike"), beside two pictures of one prompt ("apart").
"prompts": the sentences of these pictures, two pictures each, by way of the prior, of the regression, and by the text
alone (the shipped model), from the same noises: share of attributes obeyed, and the distance of the two in the judge's
features. Rows are kept: a run that was stopped goes on.
"""

import argparse
from pathlib import Path

import records
import torch
from torch import Tensor

from course_lib.environment import RESULTS, from_uint8
from course_lib.evaluation import edits, judge
from course_lib.latent.stable_diffusion import load
from course_lib.latent.unclip import FOLDER, load_unclip
from course_lib.toybox import sets
from course_lib.toybox.captions import describe
from course_lib.toybox.world import Spec, render

ATTRIBUTES = ("noun", "colour", "pattern", "scene", "accessory", "style")
PART = 20  # pictures measured and written together
W = 3.0  # of the decoder
W_TEXT = 5.0  # of the shipped model


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=FOLDER)
    parser.add_argument("--out", type=Path, default=RESULTS / "unclip.json")
    parser.add_argument("--pictures", type=int, default=200)
    parser.add_argument("--steps", type=int, default=25, help="DDIM steps")
    records.add_options(parser)
    return parser.parse_args()


def alone(count: int) -> list[Spec]:
    """The first held-out specs of one object."""
    found = (sets.pair_spec(k, "test")[0] for k in range(10 * count))
    return [spec for spec in found if spec.relation is None][:count]


class Bench:
    """unCLIP, the shipped model, the judge, and pictures of all."""

    def __init__(self, args: argparse.Namespace):
        dtype = records.prepare(args)
        self.args, self.judge = args, judge.load_judge()
        self.unclip, self.sd = load_unclip(dtype=dtype, folder=args.model), load("toybox", dtype=dtype)

    def noise(self, count: int, at: int) -> Tensor:
        """Two noises for each picture, (2 * count, C, h, w)."""
        return self.sd.noise(2 * count, seed=1000 + at)

    def read(self, images: Tensor, specs: list[Spec]) -> Tensor:
        """For each picture the share of attributes that the judge reads as in its spec: (N,)."""
        logits, wanted = judge.answers(self.judge, images)[0], judge.labels(specs)
        right = torch.stack([(logits[name].argmax(1) == wanted[name]).float() for name in ATTRIBUTES])
        counts = torch.stack([wanted[name] != judge.IGNORE_INDEX for name in ATTRIBUTES])
        return (right * counts).sum(0) / counts.sum(0)

    def variations(self, specs: list[Spec], at: int) -> dict:
        x = torch.stack([from_uint8(render(spec)) for spec in specs])
        count, steps, noise = len(specs), self.args.steps, self.noise(len(specs), at)
        drawn = self.unclip.draw(self.unclip.of_images(x), w=W, steps=steps, x_T=noise).cpu()
        plain = self.sd.sample([describe(spec) for spec in specs], w=W_TEXT, steps=steps, x_T=noise).cpu()
        everywhere = torch.ones(count, 1, 64, 64)
        others = specs[1:] + specs[:1]
        return rounded(
            kept=pairs(self.read(drawn, twice(specs))), shuffled=pairs(self.read(drawn, twice(others))),
            alike=edits.structure(drawn[::2], drawn[1::2], everywhere),
            apart=edits.structure(plain[::2], plain[1::2], everywhere),
        )  # fmt: skip

    def prompts(self, specs: list[Spec], way: str, at: int) -> dict:
        lines, noise, steps = [describe(spec) for spec in specs], self.noise(len(specs), at), self.args.steps
        if way == "text alone":
            drawn = self.sd.sample(lines, w=W_TEXT, steps=steps, x_T=noise)
        elif way == "prior":  # an embedding for each picture
            drawn = self.unclip.draw(self.unclip.imagine(twice(lines), seed=at), w=W, steps=steps, x_T=noise)
        else:
            drawn = self.unclip.draw(self.unclip.regress(lines), w=W, steps=steps, x_T=noise)
        drawn = drawn.cpu()
        features = judge.answers(self.judge, drawn)[1]
        return rounded(obeyed=pairs(self.read(drawn, twice(specs))),
                       diversity=(features[::2] - features[1::2]).norm(dim=1))  # fmt: skip


def pairs(values: Tensor) -> Tensor:
    """The mean of two values in a row."""
    return values.view(-1, 2).mean(1)


def twice(items: list) -> list:
    """Each of them two times in a row."""
    return [item for item in items for _ in range(2)]


def rounded(**rows: Tensor) -> dict:
    return {name: [round(v, 4) for v in row.tolist()] for name, row in rows.items()}


def main() -> None:
    args = arguments()
    bench, specs = Bench(args), alone(args.pictures)
    setting = dict(pictures=args.pictures, steps=args.steps, w=W, w_text=W_TEXT, seed=0)
    setting["made_by"] = "measurements/unclip.py"
    setting |= records.setting_of_model(bench.unclip.sd) | {"text alone": records.setting_of_model(bench.sd)["weights"]}
    records.start(args.out, setting, "parts", fresh=args.fresh)
    for at in range(0, args.pictures, PART):
        part = specs[at : at + PART]
        records.fill(args.out, setting, ("parts", "variations", str(at)), bench.variations, part, at)
        for way in ("prior", "regression", "text alone"):
            records.fill(args.out, setting, ("parts", way, str(at)), bench.prompts, part, way, at)
        print(f"{at + len(part)} of {args.pictures}", flush=True)


if __name__ == "__main__":
    main()
