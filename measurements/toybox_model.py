"""Measure the Toybox Stable Diffusion: does it draw what held-out prompts say? Writes data/results/toybox_sd.json.

    python measurements/toybox_model.py
    torchrun --nproc_per_node 2 measurements/toybox_model.py       (several processes, the same pictures)

For 1,000 held-out specs (split "test") the full description is the prompt. The judge reads the pictures drawn at
w = 1, 3, 5, 7.5, and real renderings of the same specs; Fréchet distances are in its feature space, against 4,000 other
renderings. Then 300 prompts "next to" and 200 "on": are both objects there, each in its own colour (two_objects.py)?
Also written: the contact sheet of the README (64 prompts, one sample each, none chosen) and the time that a
picture takes. Each row is written as it comes: a killed run goes on with the missing ones.
"""

import argparse
import datetime
import time
from pathlib import Path

import records
import torch
import two_objects
from accelerate import Accelerator
from accelerate.utils import gather_object
from PIL import Image
from torch import Tensor
from tqdm import tqdm
from transformers import CLIPModel

from course_lib.environment import CHECKPOINTS, RESULTS, device_name, from_uint8, on_cpu
from course_lib.evaluation import judge, statistics
from course_lib.evaluation.metrics import clip_t, frechet_distance, gaussian
from course_lib.latent import stable_diffusion
from course_lib.plots import montage
from course_lib.toybox import captions, sets

GUIDANCE = (1.0, 3.0, 5.0, 7.5)
PAIRS_W = 3.0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=CHECKPOINTS / "toybox-sd")
    parser.add_argument("--out", type=Path, default=RESULTS / "toybox_sd.json")
    parser.add_argument("--prompts", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=15, help="DDIM steps")
    parser.add_argument("--sheet-w", type=float, default=5.0, help="guidance of the contact sheet")
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    records.add_options(parser)
    return parser.parse_args()


def scores(logits: dict[str, Tensor], specs) -> dict[str, dict]:
    """The share of right answers for each attribute, with Wilson's interval."""
    return {name: statistics.share(right).as_dict() for name, right in judge.correct(logits, specs).items()}


class PromptSampler:
    """The model, the judge and the CLIP that score it, and the held-out prompts."""

    def __init__(self, args: argparse.Namespace):
        dtype = records.prepare(args)
        self.args, self.accelerator = args, Accelerator(cpu=on_cpu())
        device = self.accelerator.device
        self.sd = stable_diffusion.load(args.model, device, dtype)
        self.judge = judge.load_judge(device)
        self.clip = CLIPModel.from_pretrained(args.model / "clip", dtype=torch.float32).eval().to(device)
        with self.accelerator.main_process_first():
            self.test = sets.pairs(args.prompts, split="test")
            others = sets.pairs(4000, split="judge", seed=1).images
        self.prompts = [captions.describe(spec) for spec in self.test.specs]
        self.others = gaussian(judge.answers(self.judge, others)[1].double())

    @torch.no_grad()
    def measure(self, images: Tensor, rows: list[int]) -> tuple[dict, Tensor, Tensor]:
        logits, features = judge.answers(self.judge, images)
        prompts = [self.prompts[row] for row in rows]
        return logits, features, clip_t(self.clip, self.sd.tokenizer, images.to(self.sd.device), prompts).cpu()

    def row(self, logits: dict, features: Tensor, alignment: Tensor) -> dict:
        """All figures of one set of pictures, one picture for each prompt.  alignment: CLIP-T of each."""
        return scores(logits, self.test.specs) | dict(
            frechet=round(frechet_distance(gaussian(features.double()), self.others), 3),
            clip_t=statistics.mean(alignment).as_dict(),
        )  # fmt: skip

    def real(self) -> dict:
        x = from_uint8(self.test.images)
        return self.row(*self.measure(x, list(range(len(x)))))

    def generated(self, w: float) -> dict:
        """Draw every prompt once, each process its share; picture k starts from noise k at every w."""
        seed, batch = self.args.seed, self.args.batch_size
        noise = self.sd.noise(len(self.prompts), seed=seed)
        mine = list(range(len(self.prompts)))[self.accelerator.process_index :: self.accelerator.num_processes]
        parts = []
        for k in tqdm(range(0, len(mine), batch), desc=f"w = {w}", disable=not self.accelerator.is_main_process):
            rows = mine[k : k + batch]
            x = self.sd.sample([self.prompts[row] for row in rows], w=w, steps=self.args.steps, x_T=noise[rows],
                               batch=batch)  # fmt: skip
            parts.append((rows, *self.measure(x, rows)))
        parts = gather_object(parts) if self.accelerator.num_processes > 1 else parts
        order = torch.tensor([row for part in parts for row in part[0]]).argsort()
        logits = {name: torch.cat([part[1][name] for part in parts])[order] for name in parts[0][1]}
        return self.row(logits, torch.cat([p[2] for p in parts])[order], torch.cat([p[3] for p in parts])[order])

    def pairs(self, relation: str) -> dict:
        """Prompts of two objects, all drawn by this process."""
        options = dict(w=PAIRS_W, steps=self.args.steps, seed=self.args.seed, batch=self.args.batch_size)
        row = two_objects.measure(
            self.judge, lambda prompts: self.sd.sample(prompts, **options), relation, self.args.seed
        )
        return row | dict(w=PAIRS_W, device=device_name(), date=datetime.date.today().isoformat())

    def sheet(self, path: Path) -> None:
        """The first 64 prompts, one sample each."""
        x = self.sd.sample(self.prompts[:64], w=self.args.sheet_w, steps=25, seed=self.args.seed, batch=32)
        picture = Image.fromarray(montage(x.cpu(), columns=16))
        picture.resize((picture.width, picture.height), Image.Resampling.NEAREST).save(path, optimize=True)
        path.with_suffix(".txt").write_text("".join(f"{k + 1}. {p}\n" for k, p in enumerate(self.prompts[:64])))

    def seconds(self) -> dict:
        """Median time of a 25-step guided picture, alone and eight at a time, in float32: what `load` gives."""
        self.sd.to(dtype=torch.float32)
        times = {}
        for count in (1, 8):
            runs = []
            for _ in range(3):
                start = time.perf_counter()
                self.sd.sample(self.prompts[:count], steps=25, batch=count).cpu()
                runs.append(time.perf_counter() - start)
            times[str(count)] = round(sorted(runs)[1], 2)
        return times


def main() -> None:
    args = arguments()
    sampler = PromptSampler(args)
    is_main = sampler.accelerator.is_main_process
    setting = dict(prompts=args.prompts, steps=args.steps, seed=args.seed, made_by="measurements/toybox_model.py")
    record = records.start(args.out, setting | records.setting_of_model(sampler.sd), "w", fresh=args.fresh and is_main)

    def write() -> None:
        if is_main:
            records.write(args.out, record)

    if "real" not in record:
        record["real"] = sampler.real()
        write()
    for w in GUIDANCE:
        if str(w) not in record["w"]:
            record["w"][str(w)] = sampler.generated(w)
            write()
            if is_main:
                print(w, record["w"][str(w)], flush=True)
    for relation in two_objects.PROMPTS if is_main else ():
        if relation not in record.setdefault("pairs", {}):
            record["pairs"][relation] = sampler.pairs(relation)
            records.write(args.out, record, measured=False)
            print(relation, record["pairs"][relation], flush=True)
    if is_main and "seconds" not in record:
        sampler.sheet(args.out.with_name("toybox_sd_samples.png"))
        record["seconds"] = sampler.seconds()
        write()


if __name__ == "__main__":
    main()
