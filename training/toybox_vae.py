"""Train the autoencoder of the Toybox Stable Diffusion: 64 x 64 pictures to 16 x 16 latents, and back.

    python training/toybox_vae.py --minutes 60
    python training/toybox_vae.py --start-from data/checkpoints/toybox-sd/vae --minutes 30      # sharpen the decoder

The network is diffusers' AutoencoderKL. Its encoder is not trained but set (`linear_encoder`): the principal
components of 4 x 4 blocks of pixels, with large variances for the large ones. A trained encoder, as in notebook 04,
gives all its channels about the same variance, so details weigh as much as shapes in the UNet's loss. (This is a
reason; the two were not compared by measurement.)
Only the decoder is trained. Its loss is the absolute error of the pixels and of their differences to the neighbours,
from latents with a little noise (the posterior's, as in Rombach et al. 2022, section 3.1).
It can be stopped at any time (Ctrl-C, kill -9): the same command goes on from the last save.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from command import command, common_arguments, new_accelerator
from diffusers import AutoencoderKL
from PIL import Image
from run import Run
from torch import Tensor
from toybox_stage import data_name, picture_arguments, pictures, ship

from course_lib.environment import from_uint8
from course_lib.latent.vae import psnr
from course_lib.plots import montage
from course_lib.toybox import sets

CONFIG = dict(
    in_channels=3, out_channels=3, block_out_channels=(16, 32, 96), layers_per_block=1,
    norm_num_groups=16, sample_size=64,
    down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
)  # fmt: skip


def reconstruction_error(x_hat: Tensor, x: Tensor) -> Tensor:
    """Absolute error of the pixels and of the steps between neighbours, so that edges count as much as areas."""
    right = F.l1_loss(x_hat.diff(dim=-1), x.diff(dim=-1))
    down = F.l1_loss(x_hat.diff(dim=-2), x.diff(dim=-2))
    return F.l1_loss(x_hat, x) + 2 * F.mse_loss(x_hat, x) + right + down


@torch.no_grad()
def principal_components(x: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The directions in which 4 x 4 blocks of pixels vary most, for pictures x (N, 3, H, W).

    Returns: a matrix A (count, 3, 4, 4) and an offset b (count,), so that z = A . block + b has mean 0. The standard
    deviation of z_k is the square root of that of its component (details shrink, but less than they do in pixels),
    and all z together have mean square 1.
    """
    N, C, H, W = x.shape
    blocks = x.view(N, C, H // 4, 4, W // 4, 4).permute(0, 2, 4, 1, 3, 5).reshape(-1, C * 16).double()
    mean = blocks.mean(0)
    variance, direction = torch.linalg.eigh(torch.cov((blocks - mean).T))
    variance, direction = variance.flip(0)[:count], direction.flip(1).T[:count]
    direction = direction * torch.sign(direction.sum(1, keepdim=True))  # eigenvectors come with any sign
    A = direction / variance[:, None] ** 0.25 / variance.sqrt().mean().sqrt()
    return A.view(count, C, 4, 4).float(), -(A @ mean).float()


@torch.no_grad()
def linear_encoder(vae: AutoencoderKL, x: Tensor, std: float = 0.08) -> None:
    """Set the encoder's weights so that it computes z = A . block + b exactly; x: pictures that A and b come from.

    Residual branches are switched off, the two strided convolutions gather the pixels of a block. The last group norm
    sees +z, -z and two large constants, so that its scale is constant too, and after it silu(z) - silu(-z) = z.
    std: standard deviation of the posterior, which is the noise in the latents that the decoder is trained on.
    """
    encoder, K, large = vae.encoder, vae.config.latent_channels, 64.0
    A, b = principal_components(x, K)
    for module in encoder.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.zeros_(module.weight)
            torch.nn.init.zeros_(module.bias)
    for attention in encoder.mid_block.attentions:
        torch.nn.init.zeros_(attention.to_out[0].weight)
        torch.nn.init.zeros_(attention.to_out[0].bias)
    first, second, third = encoder.down_blocks
    gather, project = first.downsamplers[0].conv, second.downsamplers[0].conv
    for c in range(3):
        encoder.conv_in.weight[c, c, 1, 1] = 1
        for dy, dx in ((0, 0), (0, 1), (1, 0), (1, 1)):  # 2 x 2 pixels become 4 channels, twice
            pixel = 4 * c + 2 * dy + dx
            gather.weight[pixel, c, dy, dx] = 1
            second.resnets[0].conv_shortcut.weight[pixel, pixel] = 1
            project.weight[:K, pixel, :2, :2] = A[:, c, dy::2, dx::2]
    project.bias[:K] = b
    norm, widen = encoder.conv_norm_out, third.resnets[0].conv_shortcut
    size = norm.num_channels // norm.num_groups  # channels of a group: +z, -z, large, -large, nothing
    torch.nn.init.ones_(norm.weight)
    torch.nn.init.zeros_(norm.bias)
    for k in range(K):
        plus, minus = k * size, k * size + 1
        widen.weight[plus, k], widen.weight[minus, k] = 1, -1
        widen.bias[k * size + 2], widen.bias[k * size + 3] = large, -large
        norm.weight[plus] = norm.weight[minus] = large * (2 / size) ** 0.5
        encoder.conv_out.weight[k, plus, 1, 1], encoder.conv_out.weight[k, minus, 1, 1] = 1, -1
    encoder.conv_out.bias[K:] = 2 * np.log(std)  # the log-variances
    vae.quant_conv.weight.copy_(torch.eye(2 * K)[:, :, None, None])
    torch.nn.init.zeros_(vae.quant_conv.bias)


def loss_of(vae: AutoencoderKL, x: Tensor, generator: torch.Generator) -> Tensor:
    """The error of pictures decoded from a draw of their posterior."""
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):  # the encoder that was set needs float32
        posterior = vae.encode(x).latent_dist
    z = posterior.sample(generator)
    return reconstruction_error(vae.decode(z).sample, x)


@torch.no_grad()
def look(vae: AutoencoderKL, x: Tensor, path: Path) -> float:
    """Write originals above reconstructions, enlarged twice; return the PSNR in dB."""
    x_hat = torch.cat([vae.decode(vae.encode(part).latent_dist.mean).sample for part in x.split(32)])
    rows = torch.cat([torch.cat([x[k : k + 12], x_hat[k : k + 12]]) for k in (0, 12)])
    picture = Image.fromarray(montage(rows.cpu(), columns=12))
    picture.resize((picture.width * 2, picture.height * 2), Image.Resampling.NEAREST).save(path)
    return psnr(x_hat.clamp(-1, 1).cpu(), x.cpu())  # in float64, which not every device has


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common_arguments(parser, out="runs/toybox_vae", batch_size=16, lr=1.5e-3, steps=20_000)
    picture_arguments(parser)
    parser.add_argument("--latent-channels", type=int, default=12, help="channels of the latents: more give sharper "
                        "pictures, which are harder to generate (default 12)")  # fmt: skip
    args = parser.parse_args()
    accelerator = new_accelerator(args)
    images = pictures(args.images, accelerator.device)
    vae = AutoencoderKL(**CONFIG, latent_channels=args.latent_channels)
    if args.start_from:
        vae = AutoencoderKL.from_pretrained(args.start_from, torch_dtype=torch.float32)
    linear_encoder(vae, from_uint8(images[:4096]).cpu())
    about = {"data": data_name(args.images), **{name: vae.config[name] for name in CONFIG}}
    run = Run(args, vae, accelerator, "training/toybox_vae.py", about)
    for part in (vae.encoder, vae.quant_conv):
        part.requires_grad_(False)
    held_out = from_uint8(sets.pair_images(256, split="test")).to(run.device)

    def batch_loss(generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(images), (args.batch_size,), generator=generator, device=run.device)
        return loss_of(run.net, from_uint8(images[rows]), generator)

    def on_save(step: int) -> dict:
        return dict(psnr=round(look(run.ema.model, held_out, args.out / f"samples_{step:06d}.png"), 2))

    run.train(batch_loss, on_save)
    if args.ship and accelerator.is_main_process:
        vae = run.ema.model
        with torch.no_grad():
            z = torch.cat([vae.encode(from_uint8(part)).latent_dist.mean for part in images[:2048].split(64)])
        vae.register_to_config(scaling_factor=round(1 / z.std().item(), 5))
        ship(vae, args.ship, run, made_by="training/toybox_vae.py")


if __name__ == "__main__":
    command(main)
