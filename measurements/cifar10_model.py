"""Measure a model of Part 1: Fréchet distance, class accuracy, diversity, over guidance scales and steps.

    python measurements/cifar10_model.py --data /path/to/cifar10.npz
    python measurements/cifar10_model.py --toybox          (the Toybox-10 model, with its own classifier)
    python measurements/cifar10_model.py --sheet data/results/ddpm_cifar10_samples.png --steps 50 --w 3
                                                            (pictures only; with --shuffled: to be named by a person)
    python measurements/cifar10_model.py --main-only --w 2.5 --model OLD --out old.json
                                                            (other weights the same way; then --earlier old.json)
    torchrun --nproc_per_node 2 measurements/cifar10_model.py ...      (several processes, the same samples)

Writes data/results/ddpm_cifar10.json or ddpm_toybox10.json, which notebooks 02 and 03 and the slides read. Each row is
written as it comes: a killed run goes on with the rows that are missing.
"""

import argparse
import json
import time
from pathlib import Path

import records
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from course_lib import plots
from course_lib.data import cifar10
from course_lib.diffusion import checkpoint, guidance, samplers, schedule
from course_lib.environment import CHECKPOINTS, PRECISIONS, RESULTS, on_cpu
from course_lib.evaluation.metrics import (
    accuracy,
    diversity,
    features_and_logits,
    frechet_distance,
    frechet_left_out,
    gaussian,
    load_classifier,
)
from course_lib.evaluation.statistics import share

GUIDANCE = (0.0, 1.0, 1.5, 2.0, 2.5, 3.0, 5.0)
SOLVERS = [("ddim", n, eta, "leading") for eta in (0.0, 1.0) for n in (5, 10, 25, 50)] + [
    ("heun", n, 0.0, spacing) for spacing in ("leading", "karras") for n in (3, 6, 13)
]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="CIFAR-10: an .npz or the official folder (default: COURSE_CIFAR10)")
    parser.add_argument("--toybox", action="store_true", help="Toybox-10 in place of CIFAR-10")
    parser.add_argument("--model", type=Path, help="default: data/checkpoints/ddpm-cifar10, or ddpm-toybox10")
    parser.add_argument("--out", type=Path, help="default: data/results/ddpm_cifar10.json, or ddpm_toybox10.json")
    parser.add_argument("--n", type=int, default=10_000, help="samples of the main figure")
    parser.add_argument(
        "--n-sweep", type=int, default=500, help="samples of each point of the curves (> 256; intervals from 285)"
    )
    parser.add_argument("--w", type=float, help="guidance scale of the main figure (default: the one of the curve with "
                        "the smallest distance), or of the sheet (default 2)")  # fmt: skip
    parser.add_argument("--steps", type=int, default=20, help="DDIM steps of the guidance curve")
    parser.add_argument("--main-steps", type=int, default=20, help="DDIM steps of the main figure")
    parser.add_argument("--main-only", action="store_true", help="the main figure alone, at --w: for --earlier")
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sheet", type=Path, help="measure nothing: write 80 samples of --model to this PNG")
    parser.add_argument("--shuffled", action="store_true", help="with --sheet: in random order, the labels in a .json "
                        "beside it, so that a person can name the samples before reading them")  # fmt: skip
    parser.add_argument("--earlier", type=Path, help="a record of earlier weights; its main row is kept beside the new")
    records.add_options(parser)
    args = parser.parse_args()
    if args.main_only and args.w is None:
        parser.error("--main-only: expected --w beside it, since no curve is measured that tells the best one")
    args.name, args.other = ("toybox10", "cifar10") if args.toybox else ("cifar10", "toybox10")
    args.model = args.model or CHECKPOINTS / f"ddpm-{args.name}"
    args.out = args.out or RESULTS / f"ddpm_{args.name}.json"
    return args


class Cifar10Sampler:
    """The model, the classifier that scores its samples, and the noises that they are drawn from."""

    def __init__(self, args: argparse.Namespace):
        self.dtype = str(records.prepare(args)).removeprefix("torch.")
        self.args, self.accelerator = args, Accelerator(mixed_precision=PRECISIONS[self.dtype], cpu=on_cpu())
        self.device = self.accelerator.device
        self.model = checkpoint.load(args.model, self.device)
        self.classifier, self.real = load_classifier(self.device, f"classifier-{args.name}")
        self.schedules = {name: schedule.linear(spacing=name) for name in schedule.SPACINGS}

    def samples(
        self, n: int, w: float, solver: str, steps: int, eta: float = 0.0, spacing: str = "leading"
    ) -> tuple[Tensor, Tensor]:
        """n pictures with balanced labels; picture i gets the same start noise in every row of the tables."""
        images, labels, times = [], torch.arange(n) % 10, self.schedules[spacing]
        batches = list(enumerate(labels.split(self.args.batch_size)))
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        title = f"{solver} {steps} eta={eta} w={w}"
        for i, label in tqdm(batches[rank::processes], desc=title, leave=False, disable=rank > 0):
            generator = torch.Generator().manual_seed(1_000_000 * self.args.seed + i)
            x_T = torch.randn(len(label), 3, 32, 32, generator=generator).to(self.device)
            eps_model = guidance.guided(self.model, label.to(self.device), w)
            if solver == "heun":
                run = samplers.heun(eps_model, x_T, times, steps)
            else:
                noise = torch.Generator(device=self.device).manual_seed(1_000_000 * self.args.seed + i)
                run = samplers.ddim(eps_model, x_T, times, steps, eta=eta, generator=noise)
            with self.accelerator.autocast():
                images.append((i, samplers.last(run).float().cpu()))
        images = sorted(gather_object(images), key=lambda item: item[0])
        return torch.cat([image for _, image in images]), labels

    def measure(self, n: int, w: float, solver: str, steps: int, eta: float = 0.0, spacing: str = "leading") -> dict:
        start = time.time()
        images, labels = self.samples(n, w, solver, steps, eta, spacing)
        seconds = time.time() - start
        features, logits = features_and_logits(self.classifier, images)
        right = share(logits.argmax(1) == labels)
        return dict(
            w=w, solver=solver, steps=steps, eta=eta, spacing=spacing, n=n,
            evaluations=evaluations(solver, self.schedules[spacing].times(steps)),
            frechet=round(frechet_distance(gaussian(features), self.real), 3),
            frechet_left_out=frechet_left_out(features, self.real),
            accuracy=round(right.value, 4), accuracy_ci95=round(right.half, 4),
            diversity=round(diversity(features, labels), 3),
            diversity_by_class=[round(diversity(features[labels == c], labels[labels == c]), 3) for c in range(10)],
            seconds=round(seconds, 1),
        )  # fmt: skip

    def real_rows(self, data: cifar10.Dataset, n: int) -> dict:
        """What real pictures reach: the floor of the distance (at both sample sizes), accuracy, diversity."""
        order = torch.randperm(len(data.train_images), generator=torch.Generator().manual_seed(self.args.seed))
        features, _ = features_and_logits(self.classifier, data.train_images[order])
        half = len(features) // 2
        test_features, logits = features_and_logits(self.classifier, data.test_images)
        return dict(
            floor_two_halves=round(frechet_distance(gaussian(features[:half]), gaussian(features[half:])), 3),
            test_images_to_train=round(frechet_distance(gaussian(test_features), self.real), 3),
            test_images_n_main_to_train=round(frechet_distance(gaussian(test_features[: self.args.n]), self.real), 3),
            test_images_n_sweep_to_train=round(frechet_distance(gaussian(test_features[:n]), self.real), 3),
            accuracy=round(accuracy(logits, data.test_labels), 4),
            diversity=round(diversity(test_features, data.test_labels), 3),
        )


def history(provenance: dict) -> list[dict]:
    """A training and those that it started from, the first one first."""
    earlier = provenance.get("started_from")
    return [*(history(earlier) if earlier else []), provenance]


def evaluations(solver: str, times: list[int]) -> int:
    """How often a sampler asks the network: Heun twice in each step that ends above t = 1."""
    return len(times) + (sum(s > 1 for s in times[1:]) if solver == "heun" else 0)


def save_sheet(images: Tensor, labels: Tensor, path: Path, shuffled: bool = False) -> None:
    """80 samples, one column per class or in random order, twice as large: the first ones, not the best ones."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if shuffled:
        order = torch.randperm(len(images))
        images = images[order]
        path.with_suffix(".json").write_text(json.dumps(labels[order].tolist()) + "\n")
    sheet = Image.fromarray(plots.montage(images, columns=10))
    sheet.resize((sheet.width * 2, sheet.height * 2), Image.Resampling.NEAREST).save(path, optimize=True)


def main() -> None:
    args = arguments()
    sampler = Cifar10Sampler(args)
    if args.sheet:
        w = 2.0 if args.w is None else args.w
        save_sheet(*sampler.samples(80, w, "ddim", args.steps), args.sheet, args.shuffled)
        return
    provenance = json.loads((args.model / "provenance.json").read_text())
    names = ("n", "n_sweep", "w", "steps", "main_steps", "batch_size")
    setting = dict(
        weights_sha256=provenance["files"][checkpoint.WEIGHTS]["sha256"], seed=args.seed, dtype=sampler.dtype,
        arguments={name: getattr(args, name) for name in names}, made_by="measurements/cifar10_model.py",
    )  # fmt: skip
    is_main = sampler.accelerator.is_main_process
    record = records.start(args.out, setting, fresh=args.fresh and is_main)
    guidance_rows, solver_rows = record.setdefault("guidance", []), record.setdefault("solvers", [])
    keys = ("data", "steps", "batch_size", "minutes", "device", "threads", "date")
    *before, training = [{key: run[key] for key in keys} for run in history(provenance)]
    record["training"] = training | dict(before=before)

    if args.earlier:
        old = json.loads(args.earlier.read_text())
        record["earlier"] = {key: old[key] for key in ("main", "training", "weights_sha256", "date")}
        if is_main:
            records.write(args.out, record, measured=False)

    def write() -> None:
        if is_main:
            processes, threads = sampler.accelerator.num_processes, torch.get_num_threads()
            records.write(args.out, record | dict(processes=processes, threads=threads))

    if args.main_only:
        record["main"] = sampler.measure(args.n, args.w, "ddim", args.main_steps)
        write()
        return
    if "real" not in record:
        data = cifar10.toybox10() if args.toybox else cifar10.load(args.data)
        if not args.toybox and data.name != "CIFAR-10":
            raise SystemExit("error: --data: expected CIFAR-10, none was found; name it, or measure --toybox")
        record["real"] = sampler.real_rows(data, args.n_sweep)
        write()
    for w in GUIDANCE:
        if w not in [row["w"] for row in guidance_rows]:
            guidance_rows.append(sampler.measure(args.n_sweep, w, "ddim", args.steps))
            write()
    names = ("solver", "steps", "eta", "spacing")
    for one in SOLVERS:
        if one not in [tuple(row.get(name, "leading") for name in names) for row in solver_rows]:
            solver_rows.append(sampler.measure(args.n_sweep, 1.0, *one))
            write()
    if "other" not in record:  # C2: the model of the other data set, scored as if it had been trained on these pictures
        sampler.model = checkpoint.load(CHECKPOINTS / f"ddpm-{args.other}", sampler.device)
        record["other"] = sampler.measure(args.n_sweep, 1.0, "ddim", args.steps)
        sampler.model = checkpoint.load(args.model, sampler.device)
        write()
    if "main" not in record:
        best = min(guidance_rows, key=lambda row: row["frechet"])["w"] if args.w is None else args.w
        record["main"] = sampler.measure(args.n, best, "ddim", args.main_steps)
        write()
    if is_main:
        print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
