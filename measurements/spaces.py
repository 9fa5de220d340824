"""Claim C4: one small UNet trained on pixels, plain and folded, and on latents, for equal times. Writes spaces.json.

    OMP_NUM_THREADS=1 python measurements/spaces.py        writes data/results/spaces.json and spaces_samples.png

The pictures are Toybox-10 at 64x64, the condition is the class. Network, loss, batch, rate and sampler are the same in
all spaces, which are trained in turn, mark by mark. The clock is the CPU time of this process with one thread, so
that other programs disturb it little; only training counts. At each mark the averaged network draws the same classes
from the same noises, and the judge of the Toybox world reads the pictures:
    share       whose noun the judge names right, with Wilson's interval
    distance    Fréchet distance of its features to those of training pictures, along their main directions (a small
                sample cannot fill all of them), with the interval of a jackknife
`scale` holds both for pictures that are known: real test pictures, the same encoded and decoded, blurred, and noise.
A space that is in the record of a seed already is not trained again.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import records
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from course_lib.diffusion import ddpm, samplers
from course_lib.diffusion.guidance import drop_condition, guided
from course_lib.diffusion.train import EMA
from course_lib.diffusion.unet import UNet
from course_lib.environment import RESULTS, from_uint8
from course_lib.evaluation import judge, metrics, statistics
from course_lib.latent import stable_diffusion
from course_lib.plots import montage
from course_lib.toybox import sets

CLASSES = len(sets.CLASSES)
NET = dict(channels=(32, 64, 128), attention=(False, False, True), schedule="scaled_linear", num_classes=CLASSES)
LR, WARMUP = 1e-3, 20
SHARES = (1 / 8, 1 / 4, 1 / 2, 1)  # of the time: when samples are drawn
DIRECTIONS = 16  # of the judge's features


@dataclass
class Space:
    """Where a UNet works.

    data: (N, ...) what is kept of the training pictures.  to_x0: rows of it -> (B, channels, H, W), what diffusion is
    trained on.  to_image: samples of that -> (B, 3, 64, 64) in [-1, 1].  patch: side of the squares that the UNet folds
    into channels first.  clip: whether x0 lies in [-1, 1].
    """

    data: Tensor
    to_x0: Callable[[Tensor], Tensor]
    to_image: Callable[[Tensor], Tensor]
    channels: int
    patch: int = 1
    clip: bool = True


@torch.no_grad()
def spaces(sd: stable_diffusion.StableDiffusion, images: Tensor) -> dict[str, Space]:
    """The spaces of the same pictures, (N, 3, 64, 64) uint8. Latents are encoded here, once."""
    z0 = torch.cat([sd.encode_image(from_uint8(part)) for part in images.split(64)])
    pixels = partial(Space, images, from_uint8, lambda x: x.clamp(-1, 1), 3)
    return {"pixels": pixels(), "folded by 2": pixels(patch=2),
            "folded by 4": pixels(patch=sd.factor),  # as small a map as the latents
            "latents": Space(z0, lambda z: z, sd.decode, z0.shape[1], clip=False)}  # fmt: skip


def network(space: Space, seed: int = 0) -> UNet:
    torch.manual_seed(seed)
    return UNet(**NET, in_channels=space.channels, patch=space.patch).to(memory_format=torch.channels_last)


def train(space: Space, labels: Tensor, schedule, marks: list[float], batch_size: int, seed: int) -> Iterator[tuple]:
    """Algorithm 1 until each mark, in CPU seconds; the caller's work in between does not count.

    The rate stays constant after a short rise, so that no mark is favoured.  Yields (seconds, steps, averaged network).
    """
    net, seconds, steps = network(space, seed).train(), 0.0, 0
    ema, optimizer = EMA(net, decay=0.995), torch.optim.AdamW(net.parameters(), lr=LR, weight_decay=0.0)
    for mark in marks:
        while seconds < mark:
            start, steps = time.process_time(), steps + 1
            generator = ddpm.step_generator(seed, steps)
            rows = torch.randint(len(labels), (batch_size,), generator=generator)
            label = drop_condition(labels[rows], CLASSES, 0.1, generator)
            for group in optimizer.param_groups:
                group["lr"] = LR * min(1, steps / WARMUP)
            x0 = space.to_x0(space.data[rows]).contiguous(memory_format=torch.channels_last)
            ddpm.simple_loss(partial(net, label=label), x0, schedule, generator, weighting="v").backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            ema.update(net)
            seconds += time.process_time() - start
        yield seconds, steps, ema.model


@torch.no_grad()
def draw(space: Space, net: nn.Module, schedule, args: argparse.Namespace) -> Tensor:
    """args.count pictures (count, 3, 64, 64), classes in turn, always from the same noise."""
    shape, images = space.to_x0(space.data[:1]).shape[1:], []
    x_T = torch.randn(args.count, *shape, generator=torch.Generator().manual_seed(8))
    for x, label in zip(x_T.split(32), asked(args.count).split(32), strict=True):
        steps = samplers.ddim(guided(net, label, args.w), x, schedule, args.steps, clip=space.clip)
        images.append(space.to_image(samplers.last(steps)))
    return torch.cat(images)


def asked(count: int) -> Tensor:
    """The classes to be drawn: each in turn, (count,)."""
    return torch.arange(count) % CLASSES


class Scale:
    """Reads pictures by the judge.  real: (N, 3, 64, 64) in [-1, 1], the pictures to be near to."""

    def __init__(self, real: Tensor):
        self.judge = judge.load_judge()
        self.nouns = torch.tensor([judge.ATTRIBUTES["noun"].index(noun) for noun in sets.CLASSES])
        features = judge.answers(self.judge, real)[1].double()
        self.main = torch.linalg.eigh(features.T.cov())[1][:, -DIRECTIONS:]
        self.real = metrics.gaussian(features @ self.main)

    def __call__(self, images: Tensor, labels: Tensor) -> dict:
        """Share of right nouns and distance, each an Estimate as a dict."""
        logits, points = self.read(images)
        right = logits["noun"].argmax(1) == self.nouns[labels]
        found = statistics.jackknife(self.distance(points), self.left_out(points))
        return dict(share=statistics.share(right).as_dict(), distance=found.as_dict())

    def read(self, images: Tensor) -> tuple[dict, Tensor]:
        logits, features = judge.answers(self.judge, images)
        return logits, features.double() @ self.main

    def distance(self, points: Tensor) -> float:
        return metrics.frechet_distance(metrics.gaussian(points), self.real)

    def left_out(self, points: Tensor) -> Tensor:
        """The distance without each picture in turn."""
        return torch.tensor([self.distance(points[torch.arange(len(points)) != k]) for k in range(len(points))])


@torch.no_grad()
def known(scale: Scale, sd: stable_diffusion.StableDiffusion, images: Tensor, labels: Tensor, count: int) -> dict:
    """Both scores of `count` pictures of known quality; and by how much decoding all of `images` moves them away."""
    decoded = torch.cat([sd.decode(sd.encode_image(part)) for part in images.split(32)])
    generator = torch.Generator().manual_seed(7)
    z = torch.randn(count, *sd.encode_image(images[:1]).shape[1:], generator=generator)
    pictures = {
        "real": images,
        "real, decoded": decoded,
        "real, blurred": F.interpolate(F.avg_pool2d(images, 8), size=64, mode="bilinear"),
        "noise": torch.randn(count, *images.shape[1:], generator=generator).clamp(-1, 1),
        "noise, decoded": sd.decode(z),
    }
    found = {name: scale(x[:count], labels[:count]) for name, x in pictures.items()}
    one, other = scale.read(images)[1], scale.read(decoded)[1]
    loss = statistics.jackknife(scale.distance(other) - scale.distance(one),
                                scale.left_out(other) - scale.left_out(one))  # fmt: skip
    return found | {"lost by decoding": dict(distance=loss.as_dict())}


@torch.no_grad()
def sheet(sd: stable_diffusion.StableDiffusion, real: Tensor, drawn: list[Tensor], out: Path) -> None:
    """Rows of ten classes without gaps: real pictures, the same decoded, and the first samples of each space."""
    rows = [real, sd.decode(sd.encode_image(real)), *(images[:CLASSES] for images in drawn)]
    Image.fromarray(montage(torch.cat(rows), CLASSES, gap=0)).save(out, optimize=True)


def compare(where: dict[str, Space], labels: Tensor, scale: Scale, schedule, args, seed: int) -> dict[str, list]:
    """The rows of one seed, by space; the last samples are kept in args.samples."""
    marks, rows = [60 * args.minutes * share for share in SHARES], {name: [] for name in where}
    runs = [train(space, labels, schedule, marks, args.batch_size, seed) for space in where.values()]
    for at_mark in zip(*runs, strict=True):
        for (name, space), (seconds, steps, net) in zip(where.items(), at_mark, strict=True):
            drawn = draw(space, net, schedule, args)
            rows[name].append(dict(seconds=round(seconds, 1), steps=steps) | scale(drawn, asked(args.count)))
            print(name, rows[name][-1], flush=True)
            np.save(args.samples / f"{name}, seed {seed}.npy", drawn.numpy())
    return rows


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--minutes", type=float, default=10, help="of training for each space, CPU time")
    add("--seeds", type=int, nargs="+", default=[0, 1], help="of training")
    add("--pictures", type=int, default=8000, help="to train on")
    add("--test", type=int, default=800, help="real test pictures for the scale")
    add("--count", type=int, default=100, help="samples at each mark")
    add("--steps", type=int, default=20, help="DDIM steps")
    add("--w", type=float, default=2.0, help="guidance")
    add("--batch-size", type=int, default=16)
    add("--out", type=Path, default=RESULTS / "spaces.json")
    add("--samples", type=Path, default=Path("runs/spaces"), help="where the last samples of each run are kept")
    add("--fresh", action="store_true", help="drop the rows of --out and measure everything again")
    return parser.parse_args()


def setting_of(args: argparse.Namespace, sd: stable_diffusion.StableDiffusion) -> dict:
    """What the rows depend on, beside the code."""
    options = ("minutes", "pictures", "test", "count", "steps", "w", "batch_size")
    weights = records.setting_of_model(sd)["weights"]["vae/diffusion_pytorch_model.safetensors"]
    about = dict(threads=1, data="Toybox-10, 64x64", vae=weights, made_by="measurements/spaces.py")
    return {name: getattr(args, name) for name in options} | about


def main() -> None:
    args = arguments()
    torch.set_num_threads(1)
    sd = stable_diffusion.load("toybox", "cpu", torch.float32)
    record = records.start(args.out, setting_of(args, sd), "scale", "runs", fresh=args.fresh)
    data = sets.toybox10(args.pictures, args.test, size=64)
    images = torch.from_numpy(data["train_images"]).permute(0, 3, 1, 2).contiguous()
    test, test_labels = from_uint8(data["test_images"]), torch.from_numpy(data["test_labels"]).long()
    labels, scale = torch.from_numpy(data["train_labels"]).long(), Scale(from_uint8(images[:4000]))
    if not record["scale"]:
        record["scale"] = known(scale, sd, test, test_labels, args.count)
        records.write(args.out, record)
    start = time.process_time()
    where = spaces(sd, images)
    record.setdefault("encoding_seconds", round(time.process_time() - start, 1))
    args.samples.mkdir(parents=True, exist_ok=True)
    for seed in args.seeds:
        done = record["runs"].setdefault(str(seed), {})
        missing = {name: space for name, space in where.items() if name not in done}
        if missing:
            rows = done | compare(missing, labels, scale, sd.schedule, args, seed)
            record["runs"][str(seed)] = {name: rows[name] for name in where}
            records.write(args.out, record)
    first = [int((test_labels == k).nonzero()[0]) for k in range(CLASSES)]
    drawn = [torch.from_numpy(np.load(args.samples / f"{name}, seed {args.seeds[0]}.npy")) for name in where]
    sheet(sd, test[first], drawn, args.out.with_name("spaces_samples.png"))


if __name__ == "__main__":
    main()
