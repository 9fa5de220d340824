"""Train the judge that scores the Toybox pictures: attributes from captions' specs, individuals from pairs of views.

    python training/toybox_judge.py --minutes 20 --ship data/checkpoints/toybox-judge

It learns from pictures of its own (split "judge"), which no generator is trained on. For the identity head, random
individuals (two tones, layout, emblem, accessory: never those of the twelve subjects) are drawn in two views each; a
view should find its partner among all others of the batch.
It can be stopped at any time (Ctrl-C, kill -9): the same command goes on from the last save.
"""

import argparse
import datetime
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from run import Run, common_arguments
from torch import Tensor
from tqdm import tqdm

from course_lib.diffusion import checkpoint
from course_lib.environment import device_name, on_cpu
from course_lib.evaluation.judge import ATTRIBUTES, IGNORE_INDEX, Judge, answers, correct, labels
from course_lib.toybox import sets, world
from course_lib.toybox.accessories import ACCESSORIES, EMBLEMS
from course_lib.toybox.pen import LAYOUTS, Look, pick
from course_lib.toybox.subjects import SUBJECTS

TAKEN = {subject.look.seed for subject in SUBJECTS.values() if subject.look}


def random_look(rng: np.random.Generator) -> Look:
    """An individual that is none of the twelve subjects: the looks of those have small seeds of their own."""
    tones = rng.integers(20, 256, (3, 3)).tolist()
    seed = int(rng.integers(1000, 2**31))
    assert seed not in TAKEN
    accessory = pick(rng, None, None, *ACCESSORIES)
    return Look(
        seed, tuple(tones[0]), tuple(tones[1]), pick(rng, *LAYOUTS), emblem=pick(rng, None, *EMBLEMS),
        emblem_colour=tuple(tones[2]), accessory=accessory, accessory_colour=tuple(tones[2]),
    )  # fmt: skip


def two_views(index: int) -> list[np.ndarray]:
    """Two pictures of one individual: other scenes, places and sizes."""
    rng = np.random.default_rng([104, index])
    look, noun = random_look(rng), pick(rng, *world.CREATURES, *world.NOUNS)
    if look.accessory and look.accessory not in world.wearable(noun):
        look = replace(look, accessory=None)
    views = [world.sample_spec(rng, noun, relation=None, style="plain", accessory=None) for _ in range(2)]
    return [world.render(replace(view, look=look)) for view in views]


def views(count: int, path: Path) -> Tensor:
    """(count, 2, 64, 64, 3) uint8 views of random individuals, drawn once and kept in a file."""
    if path.is_file():
        return torch.load(path, weights_only=True)
    with ProcessPoolExecutor() as pool:
        drawn = torch.from_numpy(np.stack(list(tqdm(pool.map(two_views, range(count), chunksize=50), desc="views"))))
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(drawn, path)
    return drawn


def shaken(images: Tensor, generator: torch.Generator) -> Tensor:
    """(B, H, W, 3) uint8 to (B, 3, H, W) in [-1, 1], a third of them blurred, all with a little noise.

    Generated pictures are never as clean as drawn ones; the judge should not stumble over that.
    """
    x = images.permute(0, 3, 1, 2).float() / 127.5 - 1
    soft = F.interpolate(F.avg_pool2d(x, 2), scale_factor=2, mode="bilinear")
    blurred = torch.rand(len(x), 1, 1, 1, generator=generator, device=x.device) < 0.33
    x = torch.where(blurred, 0.3 * x + 0.7 * soft, x)
    noise = 0.15 * torch.rand(len(x), 1, 1, 1, generator=generator, device=x.device)
    x = x + noise * torch.randn(x.shape, generator=generator, device=x.device)
    return x.contiguous(memory_format=torch.channels_last)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common_arguments(parser, out="runs/toybox_judge", batch_size=96, lr=2e-3, steps=4000)
    parser.set_defaults(images=20_000)
    parser.add_argument("--individuals", type=int, default=4000)
    args = parser.parse_args()
    individuals = views(args.individuals, args.out / f"views-{args.individuals}.pt")
    accelerator = Accelerator(mixed_precision=args.precision, cpu=on_cpu())
    torch.manual_seed(args.seed)
    judge = checkpoint.load(args.start_from, model_class=Judge).requires_grad_(True) if args.start_from else Judge()
    run = Run(args, judge, accelerator)
    device = accelerator.device
    individuals = individuals.to(device)
    images = torch.from_numpy(sets.pair_images(args.images, split="judge")).to(device)
    said = labels([sets.pair_spec(k, split="judge")[0] for k in range(args.images)])
    said = {name: value.to(device) for name, value in said.items()}
    test = sets.pairs(1000, split="test")

    def batch_loss(generator: torch.Generator) -> Tensor:
        draws = torch.Generator(device).manual_seed(generator.initial_seed())
        rows = torch.randint(len(images), (args.batch_size,), generator=draws, device=device)
        logits = run.net(shaken(images[rows], draws))
        loss = F.binary_cross_entropy_with_logits(logits["presence"], said["presence"][rows]) * 5
        for name in ATTRIBUTES:
            loss = loss + F.cross_entropy(logits[name], said[name][rows], ignore_index=IGNORE_INDEX)
        who = torch.randint(len(individuals) - 200, (args.batch_size // 3,), generator=draws, device=device)
        x = shaken(individuals[who].flatten(0, 1), draws)
        a, b = run.net.individual(x).unflatten(0, (-1, 2)).unbind(1)
        return loss + F.cross_entropy(a @ b.T / 0.1, torch.arange(len(a), device=device))

    def measured() -> dict:
        judge = run.ema.model
        logits, _ = answers(judge, test.images)
        right = {name: round(row.float().mean().item(), 4) for name, row in correct(logits, test.specs).items()}
        with torch.no_grad():  # of 200 individuals that were held out: does a view find its partner?
            x = individuals[-200:].flatten(0, 1).permute(0, 3, 1, 2).float() / 127.5 - 1
            a, b = judge.individual(x).unflatten(0, (-1, 2)).unbind(1)
        found = ((a @ b.T).argmax(1) == torch.arange(200, device=device)).float().mean().item()
        return dict(right, partner_among_200=round(found, 4))

    run.train(batch_loss, lambda step: measured())
    if args.ship and accelerator.is_main_process:
        checkpoint.save(run.ema.model, args.ship, dict(
            made_by="training/toybox_judge.py", data="Toybox pictures of its own", measured_on_1000_real=measured(),
            steps=run.step, minutes=round(run.minutes, 1), batch_size=args.batch_size, lr=args.lr, seed=args.seed,
            threads=torch.get_num_threads(), started_from=run.started_from, device=device_name(),
            torch=torch.__version__, date=datetime.date.today().isoformat(),
        ))  # fmt: skip


if __name__ == "__main__":
    main()
