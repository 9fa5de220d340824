"""Train the judge that scores the Toybox pictures: attributes from the specs, individuals from pairs of views.

    python training/toybox_judge.py --minutes 20 --ship data/checkpoints/toybox-judge

It is trained on pictures of its own (split "judge"), which no generator is trained on. For the identity head, random
individuals (two tones, layout, emblem, accessory: never those of the twelve subjects) are drawn in two views each; the
loss is the cross-entropy of finding the second view of an individual among all in the batch.
It can be stopped at any time (Ctrl-C, kill -9): the same command goes on from the last save.
"""

import argparse
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context

import numpy as np
import torch
import torch.nn.functional as F
from command import command, common_arguments, new_accelerator
from run import Run
from torch import Tensor
from toybox_stage import data_name, kept, picture_arguments, pictures
from tqdm import tqdm

from course_lib.diffusion import checkpoint
from course_lib.environment import from_uint8, usable_cores
from course_lib.evaluation.judge import ATTRIBUTES, IGNORE_INDEX, Judge, answers, correct, labels
from course_lib.toybox import sets, world
from course_lib.toybox.accessories import ACCESSORIES, EMBLEMS
from course_lib.toybox.pen import LAYOUTS, Look, pick
from course_lib.toybox.subjects import SUBJECTS

HELD_OUT = 200  # individuals that are not trained on
TAKEN = {subject.look.seed for subject in SUBJECTS.values() if subject.look}


def random_look(rng: np.random.Generator) -> Look:
    """An individual that is none of the twelve subjects: the seeds of their looks are below 1000."""
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


def views(count: int) -> Tensor:
    """(count, 2, 3, 64, 64) uint8 views of random individuals, drawn on all cores."""
    with ProcessPoolExecutor(usable_cores(), mp_context=get_context("spawn")) as pool:  # safe next to a loaded torch
        drawn = list(tqdm(pool.map(two_views, range(count), chunksize=50), desc="views", total=count))
    return torch.from_numpy(np.stack(drawn)).permute(0, 1, 4, 2, 3).contiguous()


def shaken(images: Tensor, generator: torch.Generator) -> Tensor:
    """(B, 3, H, W) uint8 to [-1, 1], a third of them blurred, all with a little noise: as generated pictures are."""
    x = from_uint8(images)
    soft = F.interpolate(F.avg_pool2d(x, 2), scale_factor=2, mode="bilinear")
    blurred = torch.rand(len(x), 1, 1, 1, generator=generator, device=x.device) < 0.33
    x = torch.where(blurred, 0.3 * x + 0.7 * soft, x)
    noise = 0.15 * torch.rand(len(x), 1, 1, 1, generator=generator, device=x.device)
    x = x + noise * torch.randn(x.shape, generator=generator, device=x.device)
    return x.contiguous(memory_format=torch.channels_last)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common_arguments(parser, out="runs/toybox_judge", batch_size=96, lr=2e-3, steps=4000)
    picture_arguments(parser, images=20_000)
    parser.add_argument("--individuals", type=int, default=4000, help="individuals to draw, two views each; the last "
                        f"{HELD_OUT} are held out (default 4,000)")  # fmt: skip
    args = parser.parse_args()
    if args.individuals <= HELD_OUT:
        raise ValueError(f"--individuals: expected more than {HELD_OUT}, which are held out, got {args.individuals}")
    accelerator = new_accelerator(args)
    judge = checkpoint.load(args.start_from, model_class=Judge).requires_grad_(True) if args.start_from else Judge()
    about = {"data": data_name(args.images, "judge"), **judge.config}
    run = Run(args, judge, accelerator, "training/toybox_judge.py", about)
    device = run.device
    with accelerator.main_process_first():
        path = args.out / f"views-v{world.RENDERER_VERSION}-{args.individuals}.pt"
        individuals = kept(path, lambda: views(args.individuals)).to(device)
        images = pictures(args.images, device, split="judge")
    said = labels([sets.pair_spec(k, split="judge")[0] for k in range(args.images)])
    said = {name: value.to(device) for name, value in said.items()}
    test = sets.pairs(1000, split="test")

    def batch_loss(generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(images), (args.batch_size,), generator=generator, device=device)
        logits = run.net(shaken(images[rows], generator))
        loss = F.binary_cross_entropy_with_logits(logits["presence"], said["presence"][rows]) * 5
        for name in ATTRIBUTES:
            loss = loss + F.cross_entropy(logits[name], said[name][rows], ignore_index=IGNORE_INDEX)
        count = len(individuals) - HELD_OUT
        who = torch.randint(count, (args.batch_size // 3,), generator=generator, device=device)
        x = shaken(individuals[who].flatten(0, 1), generator)
        a, b = run.net.individual(x).unflatten(0, (-1, 2)).unbind(1)
        return loss + F.cross_entropy(a @ b.T / 0.1, torch.arange(len(a), device=device))

    def measured() -> dict:
        judge = run.ema.model
        logits, _ = answers(judge, test.images)
        right = {name: round(row.float().mean().item(), 4) for name, row in correct(logits, test.specs).items()}
        with torch.no_grad():  # of the individuals that were held out: how often the other view is the nearest
            x = from_uint8(individuals[-HELD_OUT:].flatten(0, 1))
            a, b = judge.individual(x).unflatten(0, (-1, 2)).unbind(1)
        found = ((a @ b.T).argmax(1) == torch.arange(HELD_OUT, device=device)).float().mean().item()
        return dict(right, partner_among_200=round(found, 4))

    run.train(batch_loss, lambda step: measured())
    if args.ship and accelerator.is_main_process:
        checkpoint.save(run.ema.model, args.ship, dict(
            made_by="training/toybox_judge.py", data="Toybox pictures of its own", images=args.images,
            individuals=args.individuals, measured_on_1000_real=measured(), **run.facts(),
        ))  # fmt: skip


if __name__ == "__main__":
    command(main)
