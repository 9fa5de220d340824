"""Train the autoencoder of the Toybox Stable Diffusion: 64 x 64 pictures to 16 x 16 latents, and back.

    python training/toybox_vae.py --minutes 60
    python training/toybox_vae.py --decoder-only --minutes 30      # sharpen; the latents stay what they are

The network is diffusers' AutoencoderKL. The loss is that of notebook 04: reconstruction (absolute error of the pixels
and of their differences to the neighbours) plus a little KL divergence (Rombach et al. 2022, section 3.1).
It can be stopped at any time (Ctrl-C, kill -9): the same command goes on from the last save.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor
from toybox_run import Run, common_arguments, ship

from course_lib.data import toybox_sets
from course_lib.plots import montage

CONFIG = dict(
    in_channels=3, out_channels=3, block_out_channels=(16, 32, 96), layers_per_block=1,
    norm_num_groups=16, sample_size=64,
    down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
)  # fmt: skip


def pixels(images) -> Tensor:
    """(N, H, W, 3) uint8 to (N, 3, H, W) in [-1, 1]."""
    return torch.as_tensor(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def reconstruction_error(x_hat: Tensor, x: Tensor) -> Tensor:
    """Absolute error of the pixels and of the steps between neighbours, so that edges count as much as areas."""
    right = F.l1_loss(x_hat.diff(dim=-1), x.diff(dim=-1))
    down = F.l1_loss(x_hat.diff(dim=-2), x.diff(dim=-2))
    return F.l1_loss(x_hat, x) + 2 * F.mse_loss(x_hat, x) + right + down


def psnr(x_hat: Tensor, x: Tensor) -> float:
    """10 log10(peak^2 / mean squared error) in dB; the peak of pixels in [-1, 1] is 2."""
    return (10 * torch.log10(4 / F.mse_loss(x_hat.clamp(-1, 1), x))).item()


def loss_of(vae: AutoencoderKL, x: Tensor, kl_weight: float, generator: torch.Generator) -> Tensor:
    """Reconstruction, a mean over pixels, plus kl_weight KL(q(z | x) || N(0, I)), a mean over latent numbers."""
    posterior = vae.encode(x).latent_dist
    z = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=generator).to(x.device)
    kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
    return reconstruction_error(vae.decode(z).sample, x) + kl_weight * kl


@torch.no_grad()
def look(vae: AutoencoderKL, x: Tensor, path: Path) -> float:
    """Write originals above reconstructions, enlarged three times; return the PSNR in dB."""
    x_hat = torch.cat([vae.decode(vae.encode(part).latent_dist.mean).sample for part in x.split(32)])
    rows = torch.cat([torch.cat([x[k : k + 12], x_hat[k : k + 12]]) for k in (0, 12)])
    picture = Image.fromarray(montage(rows.cpu(), columns=12))
    picture.resize((picture.width * 2, picture.height * 2), Image.Resampling.NEAREST).save(path)
    return psnr(x_hat, x)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common_arguments(parser, out="runs/toybox_vae", batch_size=16, lr=1.5e-3, steps=20_000)
    parser.add_argument("--latent-channels", type=int, default=8, help="more: sharper pictures, harder to generate")
    parser.add_argument("--kl-weight", type=float, default=2e-4, help="of the mean over latent numbers")
    parser.add_argument("--decoder-only", action="store_true", help="freeze the encoder: latents stay the same")
    args = parser.parse_args()
    accelerator = Accelerator(mixed_precision=args.precision)
    torch.manual_seed(args.seed)
    vae = AutoencoderKL(**CONFIG, latent_channels=args.latent_channels)
    # the log-variances start at -4: with full noise on the latents, the first steps would learn little
    torch.nn.init.constant_(vae.quant_conv.bias[args.latent_channels :], -4)
    if args.start_from:
        vae = AutoencoderKL.from_pretrained(args.start_from, torch_dtype=torch.float32)
    run = Run(args, vae, accelerator)
    if args.decoder_only:
        run.freeze(vae.encoder, vae.quant_conv)
    images = toybox_sets.pairs(args.images).images
    held_out = pixels(toybox_sets.pairs(256, split="test").images).to(accelerator.device)

    def batch_loss(generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(images), (args.batch_size,), generator=generator)
        return loss_of(run.model, pixels(images[rows.numpy()]).to(accelerator.device), args.kl_weight, generator)

    def on_save(step: int) -> dict:
        return dict(psnr=round(look(run.ema.model, held_out, args.out / f"samples_{step:06d}.png"), 2))

    run.train(batch_loss, on_save)
    if args.ship and accelerator.is_main_process:
        vae = run.ema.model
        with torch.no_grad():
            z = torch.cat([vae.encode(pixels(images[k : k + 64])).latent_dist.mean for k in range(0, 2048, 64)])
        vae.register_to_config(scaling_factor=round(1 / z.std().item(), 5))
        ship(vae, args.ship, run, made_by="training/toybox_vae.py", kl_weight=args.kl_weight)


if __name__ == "__main__":
    main()
