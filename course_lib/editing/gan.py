"""A small GAN of one family of pictures, and its inversion: find the latent whose picture is nearest to a given one.

Derived in: notebooks/08_inversion.ipynb, section "An older way: the latent of a GAN".

The generator turns a vector w into a picture in one evaluation, so an inversion is an ordinary optimisation over w. It
draws its family alone (cats, at 64x64) and reads no text.
"""

import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from course_lib.diffusion import checkpoint
from course_lib.environment import CHECKPOINTS

SIDES = (4, 8, 16, 32, 64)
CHANNELS = (8, 8, 6, 2, 1)  # times the width, at these sides


class Block(nn.Module):
    """Double the side, then two convolutions; w sets scale and shift of each channel.

    Source: Karras et al. 2019, Figure 1b (adaptive instance normalisation), without its noise inputs.
    """

    def __init__(self, in_channels: int, channels: int, latent: int, up: bool):
        super().__init__()
        self.up = up
        self.convs = nn.ModuleList(nn.Conv2d(i, channels, 3, 1, 1) for i in (in_channels, channels))
        self.styles = nn.ModuleList(nn.Linear(latent, 2 * channels) for _ in self.convs)

    def forward(self, h: Tensor, w: Tensor) -> Tensor:
        h = F.interpolate(h, scale_factor=2, mode="nearest") if self.up else h
        for conv, style in zip(self.convs, self.styles, strict=True):
            scale, shift = style(w)[:, :, None, None].chunk(2, dim=1)
            h = F.leaky_relu(F.instance_norm(conv(h)) * (1 + scale) + shift, 0.2)
        return h


class Generator(nn.Module):
    """z ~ N(0, I) -> w by a small network, w -> picture.

    latent: numbers of z and of w.  width: of the channels, see CHANNELS.
    """

    def __init__(self, latent: int = 96, width: int = 16):
        super().__init__()
        self.config = dict(latent=latent, width=width)
        self.mapping = nn.Sequential(
            *[part for _ in range(3) for part in (nn.Linear(latent, latent), nn.LeakyReLU(0.2))]
        )
        widths = [width * c for c in CHANNELS]
        self.start = nn.Parameter(torch.randn(1, widths[0], SIDES[0], SIDES[0]))
        self.blocks = nn.ModuleList(
            Block(i, o, latent, up=k > 0) for k, (i, o) in enumerate(zip([widths[0], *widths], widths))
        )
        self.to_rgb = nn.Conv2d(widths[-1], 3, 1)

    def latents(self, z: Tensor) -> Tensor:
        """w (B, D) of z (B, D)."""
        return self.mapping(F.normalize(z, dim=-1) * z.shape[-1] ** 0.5)

    def draw(self, w: Tensor) -> Tensor:
        """Pictures (B, 3, 64, 64) in [-1, 1].  w: (B, D), or (B, 5, D) with a latent for each block."""
        w = w[:, None].expand(-1, len(self.blocks), -1) if w.ndim == 2 else w
        h = self.start.expand(len(w), -1, -1, -1)
        for block, latent in zip(self.blocks, w.unbind(1), strict=True):
            h = block(h, latent)
        return self.to_rgb(h).tanh()

    def forward(self, z: Tensor) -> Tensor:
        """z: (B, D) ~ N(0, I).  Returns pictures (B, 3, 64, 64)."""
        return self.draw(self.latents(z))

    @torch.no_grad()
    def mean_latent(self, count: int = 2000, seed: int = 0) -> Tensor:
        """(1, D): the mean w, whose picture is an average cat."""
        z = torch.randn(count, self.config["latent"], generator=torch.Generator().manual_seed(seed))
        return self.latents(z.to(self.start.device)).mean(0, keepdim=True)


class Critic(nn.Module):
    """A residual network with one number (B,) as its output, or D of them: the discriminator, and the encoder.

    out: 1 for the discriminator, which also sees how much the pictures of a batch differ (Karras et al. 2018,
    section 3); real and generated pictures come in batches of their own.
    """

    def __init__(self, out: int = 1, width: int = 16):
        super().__init__()
        self.config = dict(out=out, width=width)
        widths = [width * c for c in reversed(CHANNELS)]
        self.from_rgb = nn.Conv2d(3, widths[0], 3, 1, 1)
        self.convs = nn.ModuleList(nn.Conv2d(i, o, 3, 1, 1) for i, o in itertools.pairwise(widths))
        self.skips = nn.ModuleList(nn.Conv2d(i, o, 1, bias=False) for i, o in itertools.pairwise(widths))
        extra = 1 if out == 1 else 0
        self.last = nn.Conv2d(widths[-1] + extra, widths[-1], 3, 1, 1)
        self.head = nn.Linear(widths[-1] * SIDES[0] ** 2, out)

    def forward(self, x: Tensor) -> Tensor:
        h = F.leaky_relu(self.from_rgb(x), 0.2)
        for conv, skip in zip(self.convs, self.skips, strict=True):
            new = F.avg_pool2d(F.leaky_relu(conv(h), 0.2), 2)
            h = (new + skip(F.avg_pool2d(h, 2))) / 2**0.5
        if self.config["out"] == 1:
            spread = h.std(0, correction=0).mean().expand(len(h), 1, *h.shape[-2:])
            h = torch.cat([h, spread], dim=1)
        found = self.head(F.leaky_relu(self.last(h), 0.2).flatten(1))
        return found[:, 0] if self.config["out"] == 1 else found


def augment(x: Tensor, generator: torch.Generator) -> Tensor:
    """Random brightness, saturation, contrast, a shift, and a cut-out square; gradients pass through all of it.

    The discriminator sees real and generated pictures through this alone, so it cannot learn the data by heart, and the
    generator does not copy it.  x: (B, 3, H, W).  Source: Zhao et al. 2020 (DiffAugment), Eqs. 2 and 3.
    """
    count, side, device = len(x), x.shape[-1], x.device

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, 1, 1, 1, generator=generator, device=device)

    x = x + uniform(-0.5, 0.5)
    grey = x.mean(1, keepdim=True)
    x = grey + (x - grey) * uniform(0, 2)
    mean = x.mean((1, 2, 3), keepdim=True)
    x = mean + (x - mean) * uniform(0.5, 1.5)
    reach, at = side // 8, torch.arange(side, device=device)
    moved = torch.randint(2 * reach + 1, (2, count, 1), generator=generator, device=device) + at
    padded, rows = F.pad(x, [reach] * 4), torch.arange(count, device=device)[:, None, None]
    x = padded[rows, :, moved[0][:, :, None], moved[1][:, None, :]].permute(0, 3, 1, 2)
    centre = torch.randint(side, (2, count, 1), generator=generator, device=device)
    near = (at - centre).abs() < side // 4
    return x * ~(near[0][:, :, None] & near[1][:, None, :])[:, None]


def nearness(x: Tensor, y: Tensor) -> Tensor:
    """(B,): the mean square error of pictures (B, 3, H, W) at full, half and a quarter of the side, summed."""
    return sum((F.avg_pool2d(x, s) - F.avg_pool2d(y, s)).square().flatten(1).mean(1) for s in (1, 2, 4))


def gan_inversion(generator: Generator, images: Tensor, start: Tensor, *, steps: int = 300, rate: float = 0.05,
                  progress: Callable[[int, float], None] | None = None) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The latents whose pictures are nearest to the given ones: Adam on w, from `start`.

    min over w of || G(w) - x ||^2, summed over three sizes of the picture, so that coarse errors count too.
    Source: Zhu et al. 2016, Eq. 3; Abdal et al. 2019 for a latent per block.
    images: (B, 3, 64, 64) in [-1, 1].  start: (1 or B, D), or (1 or B, 5, D) for a latent per block.
    Returns the latents and their pictures (B, 3, 64, 64).  Raises ValueError for pictures of another size.
    Derived in: notebooks/08_inversion.ipynb, section "An older way: the latent of a GAN".
    """
    if images.ndim != 4 or tuple(images.shape[1:]) != (3, SIDES[-1], SIDES[-1]):
        raise ValueError(f"images: expected (B, 3, {SIDES[-1]}, {SIDES[-1]}), got {tuple(images.shape)}")
    w = start.expand(len(images), *start.shape[1:]).clone().requires_grad_(True)
    optimizer = torch.optim.Adam([w], lr=rate)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * min(1.0, 2 * (1 - step / steps))
        loss = nearness(generator.draw(w), images).sum()
        (w.grad,) = torch.autograd.grad(loss, [w])
        optimizer.step()
        if progress:
            progress(step + 1, loss.item() / len(images))
    with torch.no_grad():
        return w.detach(), generator.draw(w)


def load_gan(device: torch.device | str = "cpu", name: str = "toybox-gan") -> tuple[Generator, Critic]:
    """The shipped generator of cats and its encoder, in evaluation mode."""
    folder = CHECKPOINTS / name
    parts = (("generator", Generator), ("encoder", Critic))
    return tuple(checkpoint.load(folder / part, device, kind) for part, kind in parts)
