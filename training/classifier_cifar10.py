"""Train the small CIFAR-10 classifier whose features measure the samples of Part 1, and ship it.

    python training/classifier_cifar10.py --data /path/to/cifar10.npz --epochs 10

It saves after every epoch; the same command goes on from the last save. --exact names an .npz with the pixel-exact
test images (arrays images, labels), for a data copy whose pictures went through JPEG.
"""

import argparse
import datetime
import os
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import Tensor

from course_lib.data import cifar10
from course_lib.diffusion import checkpoint
from course_lib.environment import CHECKPOINTS, device_name, on_cpu
from course_lib.evaluation.metrics import SmallClassifier, accuracy, features_and_logits, gaussian


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="CIFAR-10: an .npz or the official folder (default: COURSE_CIFAR10)")
    parser.add_argument("--exact", type=Path, help="an .npz with images and labels of exact test pictures")
    parser.add_argument("--out", type=Path, default=Path("runs/classifier_cifar10"))
    parser.add_argument("--ship", type=Path, default=CHECKPOINTS / "classifier-cifar10")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--minutes", type=float, default=60, help="stop after this long")
    parser.add_argument("--batch-size", type=int, default=250)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--precision", choices=["no", "bf16", "fp16"], default="bf16")
    parser.add_argument("--threads", type=int, help="CPU threads (default: all)")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Shift by up to 4 pixels (reflected border), mirror half.  (B, 3, 32, 32) uint8 -> [-1, 1]."""
    B = len(images)
    x = F.pad(images.float() / 127.5 - 1, (4, 4, 4, 4), mode="reflect")
    dy, dx = torch.randint(0, 9, (2, B), generator=generator)
    rows, columns = dy[:, None] + torch.arange(32), dx[:, None] + torch.arange(32)
    x = x[torch.arange(B)[:, None, None], :, rows[:, :, None], columns[:, None, :]]  # (B, 32, 32, 3)
    x = x.permute(0, 3, 1, 2)
    x = torch.where(torch.rand(B, 1, 1, 1, generator=generator) < 0.5, x.flip(-1), x)
    return x.contiguous(memory_format=torch.channels_last)


def main() -> None:
    args = arguments()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    data = cifar10.load(args.data)
    accelerator = Accelerator(mixed_precision=args.precision, cpu=on_cpu())
    model = SmallClassifier(args.width).to(accelerator.device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.05)
    steps = len(data.train_images) // args.batch_size
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, args.epochs * steps, pct_start=0.2)
    state, epoch, minutes = args.out / "state.pt", 0, 0.0
    if state.is_file():
        saved = torch.load(state, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        scheduler.load_state_dict(saved["scheduler"])
        epoch, minutes = saved["epoch"], saved["minutes"]
    net, optimizer = accelerator.prepare(model, optimizer)
    args.out.mkdir(parents=True, exist_ok=True)
    start = time.time()
    while epoch < args.epochs and time.time() - start < 60 * args.minutes:
        generator = torch.Generator().manual_seed(args.seed * 1000 + epoch)
        model.train()
        total = 0.0
        order = torch.randperm(len(data.train_images), generator=generator)[: steps * args.batch_size]
        for rows in order.split(args.batch_size):
            x = augment(data.train_images[rows], generator).to(accelerator.device)
            loss = F.cross_entropy(net(x), data.train_labels[rows].to(accelerator.device), label_smoothing=0.1)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            total += loss.item()
        epoch += 1
        model.eval()
        _, logits = features_and_logits(model, data.test_images[:2000])
        minutes += (time.time() - start) / 60
        start, args.minutes = time.time(), args.minutes - (time.time() - start) / 60
        share = accuracy(logits, data.test_labels[:2000])
        print(f"epoch {epoch}: loss {total / steps:.3f}, test {share:.3f}, {minutes:.1f} min", flush=True)
        torch.save(dict(model=model.state_dict(), optimizer=optimizer.state_dict(), scheduler=scheduler.state_dict(),
                        epoch=epoch, minutes=minutes), state.with_suffix(".tmp"))  # fmt: skip
        os.replace(state.with_suffix(".tmp"), state)
    ship(model, data, args, epoch, minutes)


def ship(model: SmallClassifier, data: cifar10.Dataset, args: argparse.Namespace, epoch: int, minutes: float) -> None:
    """Write the weights and what they reach."""
    model.eval()
    quality = {"test_accuracy": accuracy(features_and_logits(model, data.test_images)[1], data.test_labels)}
    if args.exact:
        with np.load(args.exact, allow_pickle=False) as file:
            images, labels = (torch.from_numpy(file[name]) for name in ("images", "labels"))
        images, labels = images.permute(0, 3, 1, 2), labels.long()
        quality["exact_test_accuracy"] = accuracy(features_and_logits(model, images)[1], labels)
        quality["exact_test_images"] = len(labels)
    checkpoint.save(model, args.ship, dict(
        made_by="training/classifier_cifar10.py", data=f"{data.name} ({data.source})", epochs=epoch, seed=args.seed,
        minutes=round(minutes, 1), device=device_name(), threads=torch.get_num_threads(), torch=torch.__version__,
        date=datetime.date.today().isoformat(), quality=quality,
    ))  # fmt: skip
    # What samples are compared with: the training images' features, as one Gaussian.
    features, _ = features_and_logits(model, data.train_images)
    mean, cov = gaussian(features)
    save_file({"mean": mean, "cov": cov}, args.ship / "real_features.safetensors")
    print(quality)


if __name__ == "__main__":
    main()
