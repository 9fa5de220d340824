"""Train the class-conditional DDPM of Part 1, with dropped labels: one for unconditional and guided sampling.

    python training/ddpm_cifar10.py --data /path/to/cifar10.npz --minutes 90
    torchrun --nproc_per_node 2 training/ddpm_cifar10.py ...

The loss is Algorithm 1 as in notebook 01, weighted so that it is the loss on v. Runs on any device.
It can be stopped at any time (Ctrl-C, kill -9): the same command goes on from the last save.
"""

import argparse
import functools

import torch
from command import command, common_arguments, new_accelerator
from PIL import Image
from run import Run, digest
from torch import Tensor

from course_lib import plots
from course_lib.data import cifar10
from course_lib.diffusion import checkpoint, guidance, samplers, schedule
from course_lib.diffusion.ddpm import simple_loss
from course_lib.diffusion.train import random_batch
from course_lib.diffusion.unet import UNet
from course_lib.environment import from_uint8
from course_lib.evaluation import metrics

LINEAR = schedule.linear()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common_arguments(parser, out="runs/ddpm_cifar10", batch_size=64, lr=6e-4, steps=100_000)
    parser.set_defaults(ema=0.999, save_every=3, log_every=100)
    add = parser.add_argument
    add("--data", help="CIFAR-10: an .npz or the official folder (default: COURSE_CIFAR10)")
    add("--toybox", action="store_true", help="train on Toybox-10 instead")
    add("--channels", type=int, nargs="+", default=[64, 128], help="channels of each level (default 64 128)")
    add("--patch", type=int, default=2, help="side of a patch of pixels that the network takes as one (default 2)")
    add("--compile", action="store_true", help="torch.compile the network: faster on a GPU")
    add("--score", type=int, default=0, help="samples to measure at a save, 300 or more: held-out loss, class accuracy "
        "and Fréchet distance go into the log and into provenance.json (default 0: none)")  # fmt: skip
    add("--draw-steps", type=int, default=25, help="DDIM steps of the samples at a save (default 25; 0: no samples)")
    return parser.parse_args()


class DDPMRun(Run):
    """Takes the same steps as `Training` in course_lib/diffusion/train.py."""

    adamw = dict(weight_decay=0.0)
    warmup = 200


def main() -> None:
    args = arguments()
    accelerator = new_accelerator(args)
    data = cifar10.toybox10() if args.toybox else cifar10.load(args.data, verbose=accelerator.is_main_process)
    attention = tuple(level == 1 for level in range(len(args.channels)))
    model = UNet(
        channels=tuple(args.channels), attention=attention, patch=args.patch, num_classes=10, schedule="linear"
    )
    if args.start_from:
        model = checkpoint.load(args.start_from).requires_grad_(True)
    about = {"data": f"{data.name} {digest([data.train_images, data.train_labels])}", **model.config}
    run = DDPMRun(args, model, accelerator, "training/ddpm_cifar10.py", about)
    images, labels = data.train_images.to(run.device), data.train_labels.to(run.device)
    network = torch.compile(run.net) if args.compile else run.net

    def batch_loss(generator: torch.Generator) -> Tensor:
        x0, label = random_batch(images, labels, args.batch_size, generator, num_classes=10)
        return simple_loss(lambda xt, t: network(xt, t, label), x0, LINEAR, generator, weighting="v")

    def on_save(step: int) -> dict:
        row = {}
        if args.draw_steps:
            row["samples"] = f"samples_{step:06d}.png"
            draw(run, args.draw_steps).save(args.out / row["samples"])
        return row | (scores(run, data, args.score) if args.score else {})

    run.train(batch_loss, on_save if args.draw_steps or args.score else None)
    if args.ship and accelerator.is_main_process:
        losses = [row["loss"] for row in run.rows() if "loss" in row]
        curve = [row for row in run.rows() if "held_out_loss" in row]
        checkpoint.save(run.ema.model, args.ship, dict(
            made_by="training/ddpm_cifar10.py", data=f"{data.name} ({data.source})", schedule="linear", T=LINEAR.T,
            **run.facts(), weighting="v", last_losses=losses[-5:], curve=curve,
        ))  # fmt: skip


@torch.no_grad()
def scores(run: Run, data: cifar10.Dataset, n: int, parts: int = 10) -> dict:
    """The loss on held-out pictures (in 10 parts), and the class accuracy and Fréchet distance of n samples (w = 1)."""
    model, losses, label = run.ema.model, [], torch.arange(n, device=run.device) % 10
    x_T = torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(2)).to(run.device)
    with run.accelerator.autocast():
        held = zip(
            data.test_images[:2000].tensor_split(parts), data.test_labels[:2000].tensor_split(parts), strict=True
        )
        for k, (pictures, labels) in enumerate(held):
            eps_model = functools.partial(model, label=labels.to(run.device))
            generator = torch.Generator(run.device).manual_seed(k)
            x = from_uint8(pictures).to(run.device)
            losses.append(round(simple_loss(eps_model, x, LINEAR, generator, weighting="v").item(), 5))
        x0 = torch.cat([
            samplers.last(samplers.ddim(guidance.guided(model, label[k : k + 100], w=1), x_T[k : k + 100], LINEAR, 20))
            for k in range(0, n, 100)
        ]).float()  # fmt: skip
    name = "classifier-toybox10" if data.name == "Toybox-10" else "classifier-cifar10"
    classifier, real = metrics.load_classifier(run.device, name)
    features, logits = metrics.features_and_logits(classifier, x0)
    return dict(
        held_out_loss=losses, accuracy=metrics.accuracy(logits, label.cpu()),
        frechet=round(metrics.frechet_distance(metrics.gaussian(features), real), 3),
        frechet_left_out=metrics.frechet_left_out(features, real, parts), samples_scored=n,
    )  # fmt: skip


def draw(run: Run, steps: int) -> Image.Image:
    """Four samples of each class (w = 2, DDIM), from the same noise each time."""
    label = torch.arange(40, device=run.device) % 10
    x_T = torch.randn(40, 3, 32, 32, generator=torch.Generator().manual_seed(1)).to(run.device)
    with run.accelerator.autocast():
        x0 = samplers.last(samplers.ddim(guidance.guided(run.ema.model, label, w=2), x_T, LINEAR, steps))
    return Image.fromarray(plots.montage(x0.float(), columns=10))


if __name__ == "__main__":
    command(main)
