"""How well do editing methods work? Writes data/results/editing.json, the record of C6.

    python measurements/editing.py --tune      # the tables that the settings below were read from
    python measurements/editing.py

200 edits of renderings whose right answer the renderer draws too (course_lib/evaluation/edits.py). Scored: obeyed, kept
(PSNR outside of what may change), structure of the object, distance to the true target. All methods begin with the
same rendering; those that need noise get it from DDIM inversion with one fixed-point evaluation. Null-text inversion
takes 25 seconds an edit on one core, and is measured on the first --null-text of them.
"reconstruction": the error of an inverted picture that is drawn back with guidance scale w, and the seconds.
Settings were chosen on 28 other edits (--tune). Rows are kept: a run that was stopped goes on.
"""

import argparse
import itertools
import time
from pathlib import Path

import numpy as np
import records
import torch
from PIL import Image
from torch import Tensor

from course_lib import plots
from course_lib.editing import inversion
from course_lib.editing.inversion import Inverted, invert, redraw
from course_lib.editing.plug_and_play import Layers, plug_and_play
from course_lib.editing.prompt_to_prompt import Edit, edit
from course_lib.editing.sdedit import sdedit
from course_lib.environment import CHECKPOINTS, RESULTS
from course_lib.evaluation import edits, judge
from course_lib.evaluation.edits import TUNING_SEED, TrueEdit, true_edits
from course_lib.latent import stable_diffusion
from course_lib.plots import montage

PART = 10  # edits measured and written together
W = 5.0
SCALES = (1.0, 2.0, 3.0, 5.0, 7.5)
ON_SHEET = ("prompt again, new noise", "prompt again", "SDEdit 0.6", "pinned DDIM + Prompt-to-Prompt",
            "null-text + Prompt-to-Prompt", "Plug-and-Play")  # fmt: skip


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=CHECKPOINTS / "toybox-sd")
    parser.add_argument("--out", type=Path, default=RESULTS / "editing.json")
    parser.add_argument("--edits", type=int, default=200)
    parser.add_argument("--null-text", type=int, default=200, help="edits for null-text inversion (default 200)")
    parser.add_argument("--steps", type=int, default=25, help="DDIM steps")
    parser.add_argument("--samples", type=Path, default=Path("runs/editing"), help="folder for the pictures")
    parser.add_argument("--tune", action="store_true", help="measure settings on other edits, and stop")
    records.add_options(parser)
    return parser.parse_args()


class Bench:
    """The model, the judge, and every method as a function of (edit, its rendering, its inversion)."""

    def __init__(self, args: argparse.Namespace):
        if args.dtype is None:
            args.dtype = "float32"  # an inversion in bfloat16 does not come back
        self.args, self.sd = args, stable_diffusion.load(args.model, dtype=records.prepare(args))
        self.judge = judge.load_judge(self.sd.device)
        self.at, self.starts = -1, []

    def inverted(self, images: Tensor, batch: list[TrueEdit], fixed_point: int = 1) -> list[Inverted]:
        """One inversion for each edit, computed as a batch."""
        found = invert(self.sd, images, [one.prompts[0] for one in batch], steps=self.args.steps,
                       fixed_point=fixed_point)  # fmt: skip
        return [found[k : k + 1] for k in range(len(batch))]

    def prompt_to_prompt(self, one: TrueEdit, start: Inverted, change: Edit | None = None, **options) -> Tensor:
        return edit(self.sd, *one.prompts, start, change, w=W, **options)[1]

    def methods(self) -> dict:
        sd, steps = self.sd, self.args.steps
        table = {
            "autoencoder alone": lambda one, x, start: sd.decode(start.path[0]),
            "prompt again, new noise": lambda one, x, start: sd.sample(
                one.prompts[1], w=W, steps=steps, seed=seed_of(one)
            ),
            "prompt again": lambda one, x, start: redraw(sd, start, one.prompts[1], W),
        }
        for strength in (0.4, 0.6, 0.8):
            table[f"SDEdit {strength}"] = lambda one, x, start, strength=strength: sdedit(
                sd, x, one.prompts[1], strength, w=W, steps=steps, seed=seed_of(one))  # fmt: skip
        table |= {
            "DDIM + Prompt-to-Prompt": lambda one, x, start: self.prompt_to_prompt(one, start, pinned=False),
            "pinned DDIM + Prompt-to-Prompt": lambda one, x, start: self.prompt_to_prompt(one, start),
            "negative-prompt + Prompt-to-Prompt": lambda one, x, start: self.prompt_to_prompt(
                one, inversion.negative_prompt_inversion(sd, start, W), pinned=False),
            "Plug-and-Play": lambda one, x, start: plug_and_play(sd, start, one.prompts[1], w=W),
        }  # fmt: skip
        return table

    def null_text(self, one: TrueEdit, x: Tensor, start: Inverted) -> Tensor:
        return self.prompt_to_prompt(one, inversion.null_text_inversion(self.sd, start, W), pinned=False)

    def scored(self, batch: list[TrueEdit], images: Tensor) -> dict:
        found = edits.scores(self.judge, batch, images.cpu().float())
        return {name: [None if v != v else round(v, 4) for v in row.tolist()] for name, row in found.items()}

    def part(self, batch: list[TrueEdit], method, name: str, at: int) -> dict:
        """Scores of one method on some edits; the pictures are saved as a strip of source, edit and truth."""
        source, target, _ = edits.pictures(batch)
        if self.at != at:  # all methods of a part share its inversions
            self.at, self.starts = at, self.inverted(source, batch)
        starts = self.starts
        begin = time.perf_counter()
        images = torch.cat([method(one, source[k : k + 1], starts[k]).cpu() for k, one in enumerate(batch)])
        seconds = (time.perf_counter() - begin) / len(batch)
        folder = self.args.samples / name.replace(" ", "_")
        folder.mkdir(parents=True, exist_ok=True)
        strip = montage(torch.cat([source, images, target]), len(batch))
        Image.fromarray(strip).save(folder / f"{at:03d}.png")
        return self.scored(batch, images) | {"seconds": round(seconds, 2)}


def seed_of(one: TrueEdit) -> int:
    """Of the noise of an edit that is not inverted: each has its own."""
    return one.source.seed % 2**31


def tune(bench: Bench, args: argparse.Namespace, setting: dict) -> None:
    """Prompt-to-Prompt's shares and Plug-and-Play's layers and shares, on edits that are not measured."""
    batch = true_edits(28, TUNING_SEED)
    source = edits.pictures(batch)[0]
    starts = bench.inverted(source, batch)

    def row(method) -> dict:
        found = bench.scored(batch, torch.cat([method(one, start) for one, start in zip(batch, starts, strict=True)]))
        means = {name: [v for v in values if v is not None] for name, values in found.items()}
        return {name: round(sum(values) / len(values), 3) for name, values in means.items()}

    plain = lambda one, start: redraw(bench.sd, start, one.prompts[1], W)  # noqa: E731
    print("prompt again", records.fill(args.out, setting, ("tuning", "prompt again"), row, plain), flush=True)
    for cross, own in itertools.product((0.4, 0.8), (0.2, 0.4, 0.6)):
        shares = Edit(cross, own)
        method = lambda one, start, shares=shares: bench.prompt_to_prompt(one, start, shares)  # noqa: E731
        name = f"cross {cross}, self {own}"
        print(name, records.fill(args.out, setting, ("tuning", "Prompt-to-Prompt", name), row, method), flush=True)
    names = ("0.resnets.1", "1.resnets.0", "1.resnets.1", "2.resnets.0")
    blocks = {f"{name}, features": f"up_blocks.{name}" for name in names}
    for (name, layer), (features, own) in itertools.product(blocks.items(), ((0.8, 0.5), (0.5, 0.5))):
        layers = Layers((layer,), ("up_blocks",))
        method = lambda one, start, layers=layers, shares=(features, own): plug_and_play(  # noqa: E731
            bench.sd, start, one.prompts[1], w=W, layers=layers, features=shares[0], own=shares[1])  # fmt: skip
        name = f"{name} {features}, self {own}"
        print(name, records.fill(args.out, setting, ("tuning", "Plug-and-Play", name), row, method), flush=True)


def reconstruction(bench: Bench, count: int = 8) -> dict:
    """For each way to invert and each w: the root mean square error of each picture that is drawn back, and seconds."""
    batch = true_edits(count)
    source, sd, found = edits.pictures(batch)[0], bench.sd, {}
    truth = sd.decode(sd.encode_image(source))

    def add(name: str, w: float, start: Inverted, seconds: float) -> None:
        error = (redraw(sd, start, w=w) - truth).square().flatten(1).mean(1).sqrt()
        row = dict(errors=[round(v, 4) for v in error.tolist()], seconds_a_picture=round(seconds / count, 2))
        found.setdefault(name, {})[str(w)] = row

    def timed(fn, *args):
        begin = time.perf_counter()
        return fn(*args), time.perf_counter() - begin

    for more in (0, 1, 3):
        prompts = [one.prompts[0] for one in batch]
        start, seconds = timed(lambda more=more, p=prompts: invert(sd, source, p, steps=bench.args.steps,
                                                                   fixed_point=more))  # fmt: skip
        for w in SCALES:
            name = "DDIM" if not more else f"DDIM, {more} fixed-point evaluation{'s' * (more > 1)}"
            add(name, w, start, seconds)
            if more == 1 and w != 1:
                add("negative prompt", w, inversion.negative_prompt_inversion(sd, start, w), seconds)
                learnt, more_seconds = timed(inversion.null_text_inversion, sd, start, w)
                add("null-text", w, learnt, seconds + more_seconds)
    return found


def sheet(args: argparse.Namespace, batch: list[TrueEdit]) -> None:
    """Write the first edits by the methods of ON_SHEET beside the records, from the strips that `Bench.part` saved."""
    tiles = []
    for row, name in [(0, ON_SHEET[0]), *[(1, name) for name in ON_SHEET], (2, ON_SHEET[0])]:
        strip = np.array(Image.open(args.samples / name.replace(" ", "_") / "000.png"))
        tiles += [strip[66 * row : 66 * row + 64, 66 * k : 66 * k + 64] for k in range(PART)]
    images = torch.from_numpy(np.stack(tiles)).permute(0, 3, 1, 2)
    kinds = [one.kind.replace("accessory ", "accessory\n") for one in batch[:PART]]
    fig = plots.grid(images, PART, "", ["given", *ON_SHEET, "right answer"], kinds, tile=1.0)
    (args.out.parent / "editing_samples.png").write_bytes(plots.png(fig))


def main() -> None:
    args = arguments()
    bench = Bench(args)
    setting = dict(edits=args.edits, steps=args.steps, w=W, seed=0, made_by="measurements/editing.py")
    setting |= records.setting_of_model(bench.sd)
    records.start(args.out, setting, "tuning", "methods", fresh=args.fresh)
    if args.tune:
        tune(bench, args, setting)
        return
    batch = true_edits(args.edits)
    for at in range(0, args.edits, PART):
        for name, method in bench.methods().items():
            part = batch[at : at + PART]
            row = records.fill(args.out, setting, ("methods", name, str(at)), bench.part, part, method, name, at)
            print(at, name, row["seconds"], flush=True)
    few, name = batch[: args.null_text], "null-text + Prompt-to-Prompt"
    for at in range(0, len(few), PART):
        part = few[at : at + PART]
        records.fill(args.out, setting, ("methods", name, str(at)), bench.part, part, bench.null_text, name, at)
    records.fill(args.out, setting, ("reconstruction",), reconstruction, bench)
    sheet(args, batch)


if __name__ == "__main__":
    main()
