"""Measure the Toybox Stable Diffusion: does it draw what held-out prompts say? Writes data/results/toybox_sd.json.

    python measurements/toybox_model.py
    torchrun --nproc_per_node 2 measurements/toybox_model.py       (several processes, the same pictures)

For 1,000 held-out specs (split "test") the full description is the prompt. The judge reads the pictures drawn at
w = 1, 3, 5, 7.5, and real renderings of the same specs; Fréchet distances are in its feature space, against 4,000 other
renderings. Also written: the contact sheet of the README (64 prompts, one sample each, none chosen) and the time that a
picture takes. Rows are kept as they come: a killed run goes on with the missing ones (--fresh forgets them).
"""

import argparse
import datetime
import json
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import gather_object
from PIL import Image
from torch import Tensor
from tqdm import tqdm
from transformers import CLIPModel

from course_lib.environment import CHECKPOINTS, RESULTS, device_name, on_cpu, quick_dtype, sha256
from course_lib.evaluation import judge
from course_lib.evaluation.metrics import frechet_distance, gaussian, interval
from course_lib.latent import stable_diffusion
from course_lib.plots import montage
from course_lib.toybox import captions, sets

GUIDANCE = (1.0, 3.0, 5.0, 7.5)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=CHECKPOINTS / "toybox-sd")
    parser.add_argument("--out", type=Path, default=RESULTS / "toybox_sd.json")
    parser.add_argument("--prompts", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=15, help="DDIM steps")
    parser.add_argument("--sheet-w", type=float, default=5.0, help="guidance of the contact sheet")
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--threads", type=int, help="CPU threads (default: all)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fresh", action="store_true", help="measure everything again")
    return parser.parse_args()


def clip_scores(clip: CLIPModel, tokenizer, x: Tensor, prompts: list[str]) -> Tensor:
    """CLIP-T: cosine of each picture (B, 3, 64, 64) with its own prompt, by the miniature CLIP."""
    ids = tokenizer(prompts, padding="longest", truncation=True, return_tensors="pt").input_ids.to(x.device)
    image = clip.visual_projection(clip.vision_model(pixel_values=x).pooler_output)
    text = clip.text_projection(clip.text_model(input_ids=ids).pooler_output)
    return F.cosine_similarity(image, text)


def scores(logits: dict[str, Tensor], specs) -> dict[str, float]:
    """Accuracy of each attribute with half the width of its 95 % interval."""
    row = {}
    for name, right in judge.correct(logits, specs).items():
        row[name] = round(right.float().mean().item(), 4)
        row[f"{name}_ci"] = round(interval(right.float()), 4)
    return row


class Bench:
    """The model, those who score it, and the prompts."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.accelerator = args, Accelerator(cpu=on_cpu())
        device = self.accelerator.device
        self.sd = stable_diffusion.load(args.model, device, quick_dtype(device))
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
        return logits, features, clip_scores(self.clip, self.sd.tokenizer, images.to(self.sd.device), prompts).cpu()

    def row(self, logits: dict, features: Tensor, clip_t: Tensor) -> dict:
        """Figures of one set of pictures, one for each prompt."""
        return scores(logits, self.test.specs) | dict(
            frechet=round(frechet_distance(gaussian(features.double()), self.others), 3),
            clip_t=round(clip_t.mean().item(), 4), clip_t_ci=round(interval(clip_t), 4),
        )  # fmt: skip

    def real(self) -> dict:
        x = torch.from_numpy(self.test.images).permute(0, 3, 1, 2).float() / 127.5 - 1
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
    if args.threads:
        torch.set_num_threads(args.threads)
    bench = Bench(args)
    is_main = bench.accelerator.is_main_process
    weights = {str(p.relative_to(args.model)): sha256(p)[:16] for p in sorted(args.model.rglob("*.safetensors"))}
    setting = dict(prompts=args.prompts, steps=args.steps, seed=args.seed, weights=weights)
    setting["dtype"] = str(bench.sd.dtype).removeprefix("torch.")
    result = dict(setting, made_by="measurements/toybox_model.py", w={})
    if args.out.is_file() and not args.fresh:
        earlier = json.loads(args.out.read_text())
        if {key: earlier.get(key) for key in setting} == setting:
            result = earlier

    def keep() -> None:
        result.update(device=device_name(), date=datetime.date.today().isoformat(), torch=torch.__version__)
        if is_main:
            args.out.write_text(json.dumps(result, indent=1) + "\n")

    if "real" not in result:
        result["real"] = bench.real()
        keep()
    for w in GUIDANCE:
        if str(w) not in result["w"]:
            result["w"][str(w)] = bench.generated(w)
            keep()
            if is_main:
                print(w, result["w"][str(w)], flush=True)
    if is_main:
        bench.sheet(args.out.with_name("toybox_sd_samples.png"))
        result["seconds"] = bench.seconds()
        keep()


if __name__ == "__main__":
    main()
