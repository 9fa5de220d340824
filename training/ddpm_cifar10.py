"""Train the class-conditional DDPM of Part 1, with dropped labels: one model for unconditional, conditional, guided.

    python training/ddpm_cifar10.py --data /path/to/cifar10.npz --minutes 90
    torchrun --nproc_per_node 2 training/ddpm_cifar10.py ...

Runs on any device. It can be stopped at any time (Ctrl-C, kill -9): the same command goes on from the last save.
"""

import argparse
import datetime
import json
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from PIL import Image

from course_lib import plots
from course_lib.data import cifar10
from course_lib.diffusion import checkpoint, guidance, samplers, schedule
from course_lib.diffusion.train import Training
from course_lib.diffusion.unet import UNet
from course_lib.environment import device_name, on_cpu


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="CIFAR-10: an .npz or the official folder (default: COURSE_CIFAR10)")
    parser.add_argument("--toybox", action="store_true", help="train on Toybox-10 instead")
    parser.add_argument("--out", type=Path, default=Path("runs/ddpm_cifar10"), help="where state and samples go")
    parser.add_argument("--start-from", type=Path, help="a shipped model to go on from, with a fresh optimiser")
    parser.add_argument("--ship", type=Path, help="where the averaged weights go at the end (data/checkpoints/...)")
    parser.add_argument("--minutes", type=float, default=60, help="stop after this long (default 60)")
    parser.add_argument(
        "--steps", type=int, default=100_000, help="all steps; the learning rate falls over the last 30%%"
    )
    parser.add_argument("--batch-size", type=int, default=64, help="images a step and process")
    parser.add_argument("--lr", type=float, default=6e-4)
    parser.add_argument("--channels", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--patch", type=int, default=2)
    parser.add_argument("--ema", type=float, default=0.999)
    parser.add_argument("--precision", choices=["no", "bf16", "fp16"], default="bf16")
    parser.add_argument("--threads", type=int, help="CPU threads (default: all)")
    parser.add_argument("--save-every", type=float, default=3, help="minutes between saves")
    parser.add_argument("--log-every", type=int, default=100, help="steps between rows of log.jsonl")
    parser.add_argument("--draw-steps", type=int, default=25, help="DDIM steps of the samples at a save; 0: none")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    data = cifar10.toybox10() if args.toybox else cifar10.load(args.data)
    attention = tuple(level == 1 for level in range(len(args.channels)))
    model = UNet(
        channels=tuple(args.channels), attention=attention, patch=args.patch, num_classes=10, schedule="linear"
    )
    if args.start_from:
        model = checkpoint.load(args.start_from).requires_grad_(True)
    accelerator = Accelerator(mixed_precision=args.precision, cpu=on_cpu())
    training = Training(
        model, schedule.linear(), data.train_images, data.train_labels, batch_size=args.batch_size, lr=args.lr,
        total_steps=args.steps, weighting="v", ema_decay=args.ema, seed=args.seed, accelerator=accelerator,
    )  # fmt: skip
    state, log = args.out / "state.pt", args.out / "log.jsonl"
    args.out.mkdir(parents=True, exist_ok=True)
    main_process = accelerator.is_main_process
    minutes_before = 0.0
    total = torch.zeros((), device=training.images.device)  # of the losses since the last row of the log
    if state.is_file():
        extra = training.load(state)
        minutes_before = extra["minutes"]
        total += extra.get("total", 0.0)
        if main_process:
            print(f"going on from step {training.step:,} ({minutes_before:.0f} minutes so far)", flush=True)
    if main_process:
        forget_rows_after(training.step, log)

    start = saved = time.time()
    for step, loss in training.steps(args.steps - training.step):
        total += loss
        minutes = minutes_before + (time.time() - start) / 60
        if step % args.log_every == 0:
            if main_process:
                row = dict(step=step, loss=total.item() / args.log_every, minutes=round(minutes, 2))
                print(f"step {step:,}: loss {row['loss']:.5f}, {minutes:.1f} minutes", flush=True)
                with log.open("a") as file:
                    file.write(json.dumps(row) + "\n")
            total.zero_()
        stop = time_is_up(time.time() - start > 60 * args.minutes, step, accelerator)
        if main_process and (time.time() - saved > 60 * args.save_every or stop or step == args.steps):
            training.save(state, minutes=minutes, total=total.item())
            if args.draw_steps:
                draw(training, args.out / f"samples_{step:06d}.png", args.draw_steps)
            saved = time.time()
        if stop:
            break
    if args.ship and main_process:
        ship(training, data, args)
    accelerator.end_training()  # closes the connection between processes


def forget_rows_after(step: int, log: Path) -> None:
    """Drop the rows that a killed run logged after its last save: their steps are done, and logged, again."""
    rows = []
    for line in log.read_text().splitlines() if log.is_file() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:  # cut off by the kill
            break
    kept = "".join(json.dumps(row) + "\n" for row in rows if row["step"] <= step)
    log.with_suffix(".tmp").write_text(kept)
    log.with_suffix(".tmp").replace(log)


def time_is_up(up: bool, step: int, accelerator: Accelerator) -> bool:
    """Whether to stop now. Several processes ask the first one's clock, now and then: all have to stop at one step."""
    if accelerator.num_processes == 1:
        return up
    if step % 10:
        return False
    return bool(broadcast(torch.tensor(float(up), device=accelerator.device)).item())


def draw(training: Training, path: Path, steps: int) -> None:
    """Four samples of each class (w = 2, DDIM), the same noise each time: the run in pictures."""
    device = training.images.device
    label = torch.arange(40, device=device) % 10
    x_T = torch.randn(40, 3, 32, 32, generator=torch.Generator().manual_seed(1)).to(device)
    with training.accelerator.autocast():
        eps_model = guidance.guided(training.ema.model, label, w=2)
        x0 = samplers.last(samplers.ddim(eps_model, x_T, training.schedule, steps))
    Image.fromarray(plots.montage(x0.float(), columns=10)).save(path)


def ship(training: Training, data: cifar10.Dataset, args: argparse.Namespace) -> None:
    """Write the averaged weights with all that is needed to know where they come from."""
    rows = [json.loads(line) for line in (args.out / "log.jsonl").read_text().splitlines()]
    before = json.loads((args.start_from / "provenance.json").read_text()) if args.start_from else None
    checkpoint.save(training.ema.model, args.ship, dict(
        made_by="training/ddpm_cifar10.py", data=f"{data.name} ({data.source})", schedule="linear", T=1000,
        steps=training.step, batch_size=args.batch_size, lr=args.lr, ema=args.ema, seed=args.seed,
        precision=args.precision, minutes=round(rows[-1]["minutes"], 1) if rows else 0.0, device=device_name(),
        threads=torch.get_num_threads(), torch=torch.__version__, date=datetime.date.today().isoformat(),
        weighting="v", started_from=before, last_losses=[round(row["loss"], 5) for row in rows[-5:]],
    ))  # fmt: skip


if __name__ == "__main__":
    main()
