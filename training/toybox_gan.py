"""Train a small GAN of the Toybox's cats, and then an encoder that guesses the latent of a picture.

    python training/toybox_gan.py gan --minutes 90
    python training/toybox_gan.py encoder --generator data/checkpoints/toybox-gan/generator --minutes 15

gan: the non-saturating loss (Goodfellow et al. 2014, section 3), R1 (Mescheder et al. 2018, Eq. 9), averaged weights of
the generator, and differentiable augmentation (Zhao et al. 2020). Both networks step at the same time.
encoder: learns from drawn pictures, whose latents are known.
It can be stopped at any time (Ctrl-C, kill -9): the same command goes on from the last save.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from command import command, common_arguments, new_accelerator
from PIL import Image
from run import Run, digest
from torch import Tensor, nn
from toybox_stage import kept

from course_lib.diffusion import checkpoint
from course_lib.editing.gan import Critic, Generator, augment, nearness
from course_lib.environment import from_uint8
from course_lib.plots import montage
from course_lib.toybox import sets
from course_lib.toybox.world import RENDERER_VERSION, render, sample_spec

FAMILY = "cat"
ALONE = dict(relation=None, style="plain", pattern="plain", accessory=None, accessory_colour=None)
R1, R1_EVERY = 2.0, 8  # its weight, and how often it is computed


class GanRun(Run):
    """No momentum, as usual for GANs, and no clipping to speak of."""

    adamw = dict(betas=(0.0, 0.99), weight_decay=0.0)
    clip = 100.0


def cat(index: int) -> np.ndarray:
    """Picture number `index` of the family: one cat in any colour, scene, pose, size and place, without a pattern."""
    rng = np.random.default_rng([105, index])
    return render(sample_spec(rng, FAMILY, **ALONE))


def some_cats(indices: range) -> np.ndarray:
    """(len(indices), 64, 64, 3) uint8; runs in worker processes."""
    return np.stack([cat(k) for k in indices])


def cats(count: int) -> Tensor:
    """(count, 3, 64, 64) uint8."""
    jobs = [range(k, min(k + sets.CHUNK, count)) for k in range(0, count, sets.CHUNK)]
    drawn = np.concatenate(sets.draw_all(some_cats, jobs, None, count))
    return torch.from_numpy(drawn).permute(0, 3, 1, 2).contiguous()


def frozen(critic: Critic, x: Tensor) -> Tensor:
    """The critic's answers, without a gradient to its weights."""
    weights = {name: value.detach() for name, value in critic.named_parameters()}
    return torch.func.functional_call(critic, weights, (x,))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["gan", "encoder"], help="what is trained")
    common_arguments(parser, out="runs/toybox_gan", batch_size=16, lr=1e-3, steps=20_000)
    parser.add_argument("--images", type=int, default=20_000, help="pictures to draw and use (default 20,000)")
    parser.add_argument("--generator", type=Path, help="of the encoder: the folder of the generator that it is for")
    args = parser.parse_args()
    if args.part == "gan" and args.start_from:
        raise ValueError("--start-from: expected none for the GAN, whose discriminator is not shipped")
    args.out = args.out / args.part
    accelerator = new_accelerator(args)
    about = {"data": f"Toybox version {RENDERER_VERSION}, {args.images} pictures of a {FAMILY}"}
    if args.part == "encoder":
        train_encoder(args, accelerator, about)
        return
    net = nn.ModuleDict({"generator": Generator(), "critic": Critic()})
    run = GanRun(args, net, accelerator, "training/toybox_gan.py", about | net["generator"].config)
    latent = net["generator"].config["latent"]
    with accelerator.main_process_first():
        path = args.out / f"cats-v{RENDERER_VERSION}-{args.images}.pt"
        images = kept(path, lambda: cats(args.images)).to(run.device)

    def batch_loss(generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(images), (args.batch_size,), generator=generator, device=run.device)
        real = from_uint8(images[rows])
        real = torch.where(
            torch.rand(len(real), 1, 1, 1, generator=generator, device=run.device) < 0.5, real.flip(-1), real
        )
        z = torch.randn(len(real), latent, generator=generator, device=run.device)
        drawn, critic = run.net["generator"](z).float(), run.net["critic"]
        of_real, of_drawn = (critic(augment(x, generator)).float() for x in (real, drawn.detach()))
        loss = F.softplus(-of_real).mean() + F.softplus(of_drawn).mean()
        loss = loss + F.softplus(-frozen(critic, augment(drawn, generator)).float()).mean()
        if run.step % R1_EVERY == 0:
            with torch.autocast(run.device.type, enabled=False):
                real = real.requires_grad_(True)
                answers = critic(augment(real, generator))
                slope = torch.autograd.grad(answers.sum(), real, create_graph=True)[0]
            loss = loss + R1_EVERY * R1 / 2 * slope.square().sum((1, 2, 3)).mean()
        return loss

    @torch.no_grad()
    def on_save(step: int) -> dict:
        z = torch.randn(40, latent, generator=torch.Generator().manual_seed(1)).to(run.device)
        path = args.out / f"samples_{step:06d}.png"
        picture = Image.fromarray(montage(run.ema.model["generator"](z).cpu(), columns=10))
        picture.resize((picture.width * 2, picture.height * 2), Image.Resampling.NEAREST).save(path)
        return dict(samples=path.name)

    run.train(batch_loss, on_save)
    if args.ship and accelerator.is_main_process:
        facts = dict(made_by="training/toybox_gan.py", **about, **run.facts(), last_rows=run.rows()[-3:])
        checkpoint.save(run.ema.model["generator"], args.ship / "generator", facts)


def train_encoder(args, accelerator, about) -> None:
    if not args.generator:
        raise ValueError("--generator: expected the folder of the generator that the encoder is for")
    generator = checkpoint.load(args.generator, accelerator.device, Generator)
    latent, encoder = generator.config["latent"], Critic(out=generator.config["latent"])
    if args.start_from:
        encoder = checkpoint.load(args.start_from, model_class=Critic).requires_grad_(True)
    args.generator = None  # in the settings its weights stand for it
    about["generator"] = digest(generator.parameters())
    run = Run(args, encoder, accelerator, "training/toybox_gan.py", about)

    def error(net: nn.Module, random: torch.Generator) -> Tensor:
        z = torch.randn(args.batch_size, latent, generator=random, device=run.device)
        with torch.no_grad():
            w = generator.latents(z)
            images = generator.draw(w)
        found = net(images).float()
        return (found - w).square().mean() + nearness(generator.draw(found), images).mean()

    @torch.no_grad()
    def on_save(step: int) -> dict:
        return dict(test_loss=round(error(run.ema.model, torch.Generator(run.device).manual_seed(0)).item(), 5))

    run.train(lambda random: error(run.net, random), on_save)
    if args.ship and accelerator.is_main_process:
        facts = dict(made_by="training/toybox_gan.py", data="drawn by the generator, whose latents are known",
                     **run.facts(), measured=on_save(run.step))  # fmt: skip
        checkpoint.save(run.ema.model, args.ship / "encoder", facts)


if __name__ == "__main__":
    command(main)
