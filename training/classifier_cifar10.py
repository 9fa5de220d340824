"""Train the small classifier whose features measure the samples of Part 1: of CIFAR-10, or of Toybox-10.

    python training/classifier_cifar10.py --data /path/to/cifar10.npz --ship data/checkpoints/classifier-cifar10
    python training/classifier_cifar10.py --toybox --epochs 3 --ship data/checkpoints/classifier-toybox10

--exact names an .npz with the pixel-exact test images (arrays images, labels), for a copy of the data whose pictures
went through JPEG.
It can be stopped at any time (Ctrl-C, kill -9): the same command goes on from the last save.
"""

import argparse
import functools
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from command import command, common_arguments, new_accelerator
from run import Run, digest
from safetensors.torch import save_file
from torch import Tensor

from course_lib.data import cifar10
from course_lib.diffusion import checkpoint
from course_lib.diffusion.ddpm import step_generator
from course_lib.environment import from_uint8
from course_lib.evaluation.metrics import SmallClassifier, accuracy, features_and_logits, gaussian


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common_arguments(parser, out="runs/classifier_cifar10", batch_size=250, lr=4e-3, steps=None)
    parser.set_defaults(ema=0.0)
    add = parser.add_argument
    add("--data", help="CIFAR-10: an .npz or the official folder (default: COURSE_CIFAR10)")
    add("--toybox", action="store_true", help="train on Toybox-10 instead")
    add("--exact", type=Path, help="an .npz with images and labels of exact test pictures")
    add("--epochs", type=int, default=10, help="how often each picture is seen (default 10)")
    add("--width", type=int, default=64, help="channels of the first stage (default 64)")
    return parser.parse_args()


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Shift by up to 4 pixels (reflected border), mirror half.  (B, 3, 32, 32) uint8 -> [-1, 1]."""
    B, device = len(images), images.device
    x = F.pad(from_uint8(images), (4, 4, 4, 4), mode="reflect")
    dy, dx = torch.randint(0, 9, (2, B), generator=generator, device=device)
    side = torch.arange(32, device=device)
    rows, columns = dy[:, None] + side, dx[:, None] + side
    x = x[torch.arange(B, device=device)[:, None, None], :, rows[:, :, None], columns[:, None, :]]  # (B, 32, 32, 3)
    x = x.permute(0, 3, 1, 2)
    x = torch.where(torch.rand(B, 1, 1, 1, generator=generator, device=device) < 0.5, x.flip(-1), x)
    return x.contiguous(memory_format=torch.channels_last)


class OneCycle(Run):
    """The learning rate rises over a fifth of the steps and falls to almost 0, while beta_1 falls and rises.

    Source: Smith & Topin 2018; the same values as torch's OneCycleLR, but as a function of the step.
    """

    adamw = dict(weight_decay=0.05)
    clip = math.inf

    def hyperparameters(self, step: int) -> dict:
        top, last = 0.2 * self.args.steps - 1, self.args.steps - 1
        rising = step - 1 <= top
        share = (step - 1) / top if rising else (step - 1 - top) / (last - top)
        high = (1 - math.cos(math.pi * share)) / 2 if rising else (1 + math.cos(math.pi * share)) / 2  # 0..1
        low = self.args.lr / 25 if rising else self.args.lr / 25 / 1e4
        return dict(lr=low + (self.args.lr - low) * high, betas=(0.95 - 0.1 * high, 0.999))


@functools.lru_cache(maxsize=1)
def order(seed: int, epoch: int, count: int) -> Tensor:
    """The order of the pictures in an epoch."""
    return torch.randperm(count, generator=step_generator(seed, epoch))


def main() -> None:
    args = arguments()
    accelerator = new_accelerator(args)
    data = cifar10.toybox10() if args.toybox else cifar10.load(args.data, verbose=accelerator.is_main_process)
    together = args.batch_size * accelerator.num_processes  # pictures of a step
    steps = len(data.train_images) // together
    if steps == 0:
        raise ValueError(f"--batch-size: expected at most {len(data.train_images)} in all processes, got {together}")
    args.steps = args.epochs * steps
    model = SmallClassifier(args.width)
    if args.start_from:
        model = checkpoint.load(args.start_from, model_class=SmallClassifier).requires_grad_(True)
    about = {"data": f"{data.name} {digest([data.train_images, data.train_labels])}", **model.config}
    run = OneCycle(args, model, accelerator, "training/classifier_cifar10.py", about)
    images, labels = data.train_images.to(run.device), data.train_labels.to(run.device)

    def batch_loss(generator: torch.Generator) -> Tensor:
        epoch, k = divmod(run.step - 1, steps)
        first = k * together + accelerator.process_index * args.batch_size
        rows = order(args.seed, epoch, len(images))[first : first + args.batch_size].to(run.device)
        return F.cross_entropy(run.net(augment(images[rows], generator)), labels[rows], label_smoothing=0.1)

    def on_save(step: int) -> dict:
        _, logits = features_and_logits(run.ema.model, data.test_images[:2000])
        return dict(epochs=round(step / steps, 2), test_accuracy=accuracy(logits, data.test_labels[:2000]))

    run.train(batch_loss, on_save)
    if args.ship and accelerator.is_main_process:
        ship(run, data, run.step / steps)


def ship(run: Run, data: cifar10.Dataset, epochs: float) -> None:
    """Write the weights, their accuracy, and the Gaussian of the training images' features for the metrics."""
    args, model = run.args, run.ema.model
    quality = {"test_accuracy": accuracy(features_and_logits(model, data.test_images)[1], data.test_labels)}
    if args.exact:
        with np.load(args.exact, allow_pickle=False) as file:
            images, labels = (torch.from_numpy(file[name]) for name in ("images", "labels"))
        images, labels = images.permute(0, 3, 1, 2), labels.long()
        quality["exact_test_accuracy"] = accuracy(features_and_logits(model, images)[1], labels)
        quality["exact_test_images"] = len(labels)
    mean, cov = gaussian(features_and_logits(model, data.train_images)[0])
    checkpoint.save(model, args.ship, dict(
        made_by="training/classifier_cifar10.py", data=f"{data.name} ({data.source})", epochs=round(epochs, 2),
        **run.facts(), quality=quality,
    ))  # fmt: skip
    save_file({"mean": mean, "cov": cov}, args.ship / "real_features.safetensors")
    print(quality)


if __name__ == "__main__":
    command(main)
