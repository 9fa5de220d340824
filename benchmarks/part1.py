"""The speed of Part 1 on this machine, as ratios: the variants of a row run in turn, so that noise hits all alike.

    python benchmarks/part1.py                # about 3 minutes
    python benchmarks/part1.py --seconds 30   # rougher

Writes data/results/benchmark_part1.json. A ratio is the median over rounds of one variant's time by the other's in the
same round; below 1 the first one is faster. The network has the shape of data/checkpoints/ddpm-cifar10 and random
weights: speed does not depend on their values.
"""

import argparse
import contextlib
import copy
import datetime
import io
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from course_lib.diffusion import guidance, samplers, schedule
from course_lib.diffusion.train import Training
from course_lib.diffusion.unet import UNet
from course_lib.environment import CHECKPOINTS, RESULTS, device_name, mixed_precision

SCHEDULE = schedule.linear()
MIN_ROUNDS = 3
WEIGHTS = {"loop": 0.3, "training": 0.3, "sampling": 0.15, "guidance": 0.2, "data": 0.05}  # shares of --seconds


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS / "benchmark_part1.json")
    parser.add_argument("--seconds", type=float, default=150, help="time for all rows (at least 3 rounds of each)")
    parser.add_argument("--batch-size", type=int, default=32, help="images of a training step")
    parser.add_argument("--images", type=int, default=16, help="images drawn together")
    parser.add_argument("--steps", type=int, default=50, help="DDIM steps of the last row")
    parser.add_argument(
        "--channels", type=int, nargs="+", help="widths of another network (default: the shipped one's)"
    )
    parser.add_argument("--threads", type=int, help="CPU threads (default: all)")
    parser.add_argument("--cpu", action="store_true", help="stay on the CPU")
    return parser.parse_args()


class Bench:
    """The network, the pictures, and a clock that waits for the device."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.rows = args, []
        self.shape = json.loads((CHECKPOINTS / "ddpm-cifar10" / "config.json").read_text())
        del self.shape["_class_name"]
        if args.channels:
            self.shape |= dict(channels=args.channels, attention=[i == 1 for i in range(len(args.channels))])
        self.device = PartialState(cpu=args.cpu).device
        self.half = mixed_precision(
            self.device
        )  # the faster one here; training never uses fp16, which needs a gradient scaler
        self.trained = "bf16" if self.half == "bf16" else "no"
        self.accelerator = Accelerator(cpu=args.cpu, mixed_precision=self.trained)
        generator = torch.Generator().manual_seed(0)
        self.pictures = torch.randint(0, 256, (2_000, 3, 32, 32), generator=generator).to(torch.uint8)
        self.labels = torch.randint(0, 10, (2_000,), generator=generator)
        self.x_T = torch.randn(args.images, 3, 32, 32, generator=generator).to(self.device)
        self.label = self.labels[: args.images].to(self.device)

    def network(self, memory_format: torch.memory_format = torch.channels_last) -> UNet:
        torch.manual_seed(0)
        return UNet(**self.shape).to(self.device, memory_format=memory_format)

    def autocast(self, precision: str) -> contextlib.AbstractContextManager:
        if precision == "no":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, torch.float16 if precision == "fp16" else torch.bfloat16)

    def seconds(self, work: Callable[[], object]) -> float:
        start = time.perf_counter()
        work()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        elif self.device.type == "mps":
            torch.mps.synchronize()
        return time.perf_counter() - start

    def compare(self, group: str, variants: dict[str, Callable], pairs: list[tuple], share: float = 1.0) -> None:
        """Run the variants in turn, in changing order, for their share of the time; add one row for each pair.

        pairs: (title, first variant, second variant, target or None), where the ratio is first / second.
        """
        for work in variants.values():  # the first run compiles and allocates
            self.seconds(work)
        budget = self.args.seconds * WEIGHTS[group] * share
        times, start = {name: [] for name in variants}, time.perf_counter()
        while len(next(iter(times.values()))) < MIN_ROUNDS or time.perf_counter() - start < budget:
            order = list(variants) if len(times[next(iter(variants))]) % 2 else list(reversed(variants))
            for name in order:
                times[name].append(self.seconds(variants[name]))
        for title, first, second, target in pairs:
            ratios = sorted(a / b for a, b in zip(times[first], times[second]))
            quarter = len(ratios) // 4
            row = dict(
                what=title, ratio=round(statistics.median(ratios), 3),
                middle_half=[round(ratios[quarter], 3), round(ratios[-1 - quarter], 3)], rounds=len(ratios),
                ms={name: round(1000 * statistics.median(times[name]), 2) for name in (first, second)},
            )  # fmt: skip
            if target is not None:
                row |= dict(target=f"<= {target}", reached=row["ratio"] <= target)
            self.add(row)

    def add(self, row: dict) -> None:
        self.rows.append(row)
        value = f"{row['ratio']:.3f}" if "ratio" in row else f"{row['seconds']:.1f} s"
        print(f"{value:>9}  {row['what']}  {row.get('target', '')} {row.get('reached', '')}", flush=True)


class BareLoop:
    """Algorithm 1 written down once more without the course's library: the same draws, the same sums."""

    def __init__(self, net: UNet, bench: Bench, precision: str, memory_format: torch.memory_format):
        self.net, self.bench, self.precision, self.memory_format = net.train(), bench, precision, memory_format
        self.shadow = [p.detach().clone() for p in net.parameters()]
        fused = bench.device.type != "mps"
        self.optimizer = torch.optim.AdamW(net.parameters(), lr=4e-4, weight_decay=0.0, fused=fused)
        self.generator = torch.Generator(device=bench.device)
        self.pictures, self.labels = bench.pictures.to(bench.device), bench.labels.to(bench.device)
        self.alpha_bar = SCHEDULE.alpha_bar.float().to(bench.device)
        self.n = 0

    def __call__(self) -> Tensor:
        self.n += 1
        g, device, B = self.generator.manual_seed(self.n), self.bench.device, self.bench.args.batch_size
        rows = torch.randint(len(self.pictures), (B,), device=device, generator=g)
        x0 = self.pictures[rows].float() / 127.5 - 1
        mirrored = torch.rand((B, 1, 1, 1), device=device, generator=g) < 0.5
        x0 = torch.where(mirrored, x0.flip(-1), x0).contiguous(memory_format=self.memory_format)
        label = self.labels[rows]
        dropped = torch.rand(B, device=device, generator=g) < 0.1
        label = torch.where(dropped, torch.full_like(label, 10), label)
        t = torch.randint(1, 1001, (B,), device=device, generator=g)
        eps = torch.randn(x0.shape, device=device, generator=g)
        alpha_bar = self.alpha_bar[t].reshape(-1, 1, 1, 1)
        with self.bench.autocast(self.precision):
            eps_hat = self.net(alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * eps, t, label)
        loss = ((eps_hat.float() - eps) / alpha_bar.sqrt()).square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = 4e-4 * min(1.0, self.n / 200)
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            decay = min(0.999, (1 + self.n) / (10 + self.n))
            torch._foreach_lerp_(self.shadow, list(self.net.parameters()), 1 - decay)
        return loss.detach()


class PngFiles(Dataset):
    """The usual way to feed images: one compressed file each, decoded whenever it is drawn."""

    def __init__(self, pictures: Tensor):
        self.files = []
        for picture in pictures.permute(0, 2, 3, 1).numpy():
            buffer = io.BytesIO()
            Image.fromarray(picture).save(buffer, format="png")
            self.files.append(buffer.getvalue())

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> Tensor:
        pixels = np.asarray(Image.open(io.BytesIO(self.files[i])))
        return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 127.5 - 1


def course_loop(bench: Bench) -> Callable:
    training = Training(bench.network(), SCHEDULE, bench.pictures, bench.labels, batch_size=bench.args.batch_size,
                        weighting="v", accelerator=bench.accelerator)  # fmt: skip
    steps = training.steps(10**9)
    return lambda: next(steps)


def training_rows(bench: Bench) -> None:
    def bare(precision: str, order: torch.memory_format = torch.channels_last) -> BareLoop:
        return BareLoop(bench.network(order), bench, precision, order)

    low = bench.trained
    bench.compare(
        "loop", {"course_lib Training": course_loop(bench), "bare PyTorch loop": bare(low)},
        [("training step: course_lib / a bare loop", "course_lib Training", "bare PyTorch loop", 1.05)],
    )  # fmt: skip
    variants = {"channels-last": bare(low), "contiguous": bare(low, torch.contiguous_format)}
    pairs = [("training step: channels-last / contiguous", "channels-last", "contiguous", None)]
    if low != "no":
        variants["float32"] = bare("no")
        pairs.append((f"training step: {low} autocast / float32", "channels-last", "float32", None))
    bench.compare("training", variants, pairs)


def sampling_rows(bench: Bench) -> None:
    last, low = bench.network().eval(), bench.half
    contiguous = copy.deepcopy(last).to(memory_format=torch.contiguous_format)
    x_T = bench.x_T.contiguous(memory_format=torch.channels_last)

    def draw(eps_model, x_T: Tensor = x_T, precision: str = low, steps: int = 2) -> Callable:
        def work() -> Tensor:
            with torch.no_grad(), bench.autocast(precision):
                return samplers.last(samplers.ddim(eps_model, x_T, SCHEDULE, steps))

        return work

    plain = guidance.guided(last, bench.label, w=1)
    variants = {"channels-last": draw(plain),
                "contiguous": draw(guidance.guided(contiguous, bench.label, w=1), bench.x_T)}  # fmt: skip
    pairs = [("sampling: channels-last / contiguous", "channels-last", "contiguous", None)]
    if low != "no":
        variants["float32"] = draw(plain, precision="no")
        pairs.append((f"sampling: {low} autocast / float32", "channels-last", "float32", None))
    bench.compare("sampling", variants, pairs)

    null = torch.full_like(bench.label, last.num_classes)

    def two_calls(xt: Tensor, t: int) -> Tensor:
        return guidance.combine(last(xt, t, null), last(xt, t, bench.label), 2.0)

    bench.compare(
        "guidance",
        {"one doubled batch": draw(guidance.guided(last, bench.label, w=2.0)), "two calls": draw(two_calls),
         "w = 1": draw(plain)},
        [("guided sampling: one doubled batch / two calls", "one doubled batch", "two calls", None),
         ("sampling at w = 1: the condition alone / the doubled batch", "w = 1", "one doubled batch", None)],
    )  # fmt: skip
    n, steps = bench.args.images, bench.args.steps
    for w, eps_model, target in ((1, plain, 30), (2, guidance.guided(last, bench.label, w=2.0), None)):
        seconds = bench.seconds(draw(eps_model, steps=steps))
        row = dict(what=f"{n} images, {steps} DDIM steps, w = {w}", seconds=round(seconds, 2))
        bench.add(row | (dict(target=f"<= {target} s", reached=seconds <= target) if target else {}))


def data_row(bench: Bench) -> None:
    B = bench.args.batch_size
    loader = DataLoader(PngFiles(bench.pictures), batch_size=B, shuffle=True)
    pictures = bench.pictures.to(bench.device)

    def forever():
        while True:
            yield from loader

    batches = forever()

    def cached() -> Tensor:
        rows = torch.randint(len(pictures), (B,), device=bench.device)
        return pictures[rows].float() / 127.5 - 1

    bench.compare(
        "data",
        {"uint8 tensor in memory": cached, "decoding each": lambda: next(batches).to(bench.device)},
        [("a batch: one uint8 tensor / a DataLoader that decodes", "uint8 tensor in memory", "decoding each", None)],
    )  # fmt: skip


def main() -> None:
    args = arguments()
    if args.threads:
        torch.set_num_threads(args.threads)
    start, bench = time.time(), Bench(args)
    training_rows(bench)
    sampling_rows(bench)
    data_row(bench)
    settings = {key: value for key, value in vars(args).items() if key not in ("out", "threads", "cpu", "channels")}
    result = dict(
        made_by="benchmarks/part1.py", date=datetime.date.today().isoformat(),
        device="CPU" if bench.device.type == "cpu" and torch.cuda.is_available() else device_name(),
        threads=torch.get_num_threads(), torch=torch.__version__, python=platform.python_version(),
        system=platform.system(), settings=settings | {"network": bench.shape},
        precision=bench.half,
        minutes=round((time.time() - start) / 60, 1), rows=bench.rows,
    )  # fmt: skip
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{result['minutes']} minutes on {result['device']}; written to {args.out}")


if __name__ == "__main__":
    main()
