"""A small variational autoencoder for 64x64 pictures, and the measures that go with it.

Derived in: notebooks/04_autoencoder.ipynb.

It compresses a picture to 16x16 latents of a few channels. Stable Diffusion's large autoencoder is built of the same
pieces, with attention and two more losses.
The Toybox model does not use this one: its encoder is a fixed linear map, and only its decoder was trained, see
training/toybox_vae.py.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Residual(nn.Module):
    """Two 3x3 convolutions that add to their input.

    Derived in: notebooks/04_autoencoder.ipynb, section "A small VAE".
    """

    def __init__(self, channels: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.GroupNorm(8, channels), nn.SiLU(), nn.Conv2d(channels, channels, 3, padding=1),
            nn.GroupNorm(8, channels), nn.SiLU(), nn.Conv2d(channels, channels, 3, padding=1),
        )  # fmt: skip
        nn.init.zeros_(self.body[-1].weight)  # a new block starts as the identity
        nn.init.zeros_(self.body[-1].bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class VAE(nn.Module):
    """Encoder: a picture to mean and log-variance of its latents. Decoder: latents to a picture.

    z = mean(x) + std(x) * eps,  eps ~ N(0, I).  Source: Kingma & Welling 2014, section 2.4.
    First, 2x2 pixels are folded into the channels of one, so that no layer works at full resolution, where it would be
    slow.  latent_channels: C of the (B, C, H/4, W/4) latents.  width: channels at half resolution;
    three times as many at a quarter.
    Derived in: notebooks/04_autoencoder.ipynb, section "A small VAE".
    """

    def __init__(self, latent_channels: int = 4, width: int = 32):
        super().__init__()
        wide = 3 * width
        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(2), nn.Conv2d(12, width, 3, padding=1), nn.SiLU(),
            nn.Conv2d(width, wide, 3, stride=2, padding=1), Residual(wide),
            nn.GroupNorm(8, wide), nn.SiLU(), nn.Conv2d(wide, 2 * latent_channels, 1),
        )  # fmt: skip
        self.decoder = nn.Sequential(
            nn.Conv2d(latent_channels, wide, 3, padding=1), Residual(wide),
            nn.Conv2d(wide, 4 * width, 1), nn.PixelShuffle(2), Residual(width),
            nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, 12, 3, padding=1), nn.PixelShuffle(2),
        )  # fmt: skip
        nn.init.constant_(self.encoder[-1].bias[latent_channels:], -4)  # at std 1 the first steps learn little

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """images: (B, 3, H, W) in [-1, 1], H and W multiples of 4.  Returns mean and log-variance, (B, C, H/4, W/4)."""
        if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] % 4 or images.shape[3] % 4:
            raise ValueError(f"images: expected (B, 3, H, W), H and W multiples of 4, got {tuple(images.shape)}")
        mean, logvar = self.encoder(images).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)

    def decode(self, z: Tensor) -> Tensor:
        """z: (B, C, h, w).  Returns pictures (B, 3, 4h, 4w), roughly in [-1, 1]."""
        return self.decoder(z)

    def forward(self, images: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor, Tensor]:
        mean, logvar = self.encode(images)
        return self.decode(reparameterise(mean, logvar, generator)), mean, logvar


def reparameterise(mean: Tensor, logvar: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """A draw from N(mean, exp(logvar)) through which gradients flow: z = mean + exp(logvar / 2) eps.

    Source: Kingma & Welling 2014, section 2.4.  generator: on mean's device.
    Derived in: notebooks/04_autoencoder.ipynb, section "A small VAE".
    """
    eps = torch.randn(mean.shape, device=mean.device, dtype=mean.dtype, generator=generator)
    return mean + (logvar / 2).exp() * eps


def kl_divergence(mean: Tensor, logvar: Tensor) -> Tensor:
    """The KL divergence of N(mean, exp(logvar)) from N(0, 1), in nats per latent number.

    KL = (mean^2 + exp(logvar) - 1 - logvar) / 2, averaged.  Source: Kingma & Welling 2014, Eq. 10.
    Derived in: notebooks/04_autoencoder.ipynb, section "A small VAE".
    """
    return (mean.square() + logvar.exp() - 1 - logvar).mean() / 2


def loss(vae: VAE, images: Tensor, kl_weight: float = 1e-4, generator: torch.Generator | None = None) -> Tensor:
    """L = |x - x_hat| + |x - x_hat|^2 + kl_weight * KL, each a mean.

    A tiny kl_weight, as in Rombach et al. 2022, section 3.1: just enough to keep the latents from drifting apart.
    images: (B, 3, H, W) in [-1, 1].  Returns a scalar.
    Differs from the paper, which adds a perceptual and an adversarial loss; they need networks of their own.
    Derived in: notebooks/04_autoencoder.ipynb, section "A small VAE".
    """
    reconstruction, mean, logvar = vae(images, generator)
    error = reconstruction - images
    return error.abs().mean() + error.square().mean() + kl_weight * kl_divergence(mean, logvar)


def scaling_factor(latents: Tensor) -> float:
    """1 / std of all latents: the number to multiply them by, so that the noise schedule fits them (std 1).

    latents: (N, C, h, w) of many pictures.  Source: Rombach et al. 2022, appendix G; 0.18215 in Stable Diffusion 1.
    Derived in: notebooks/04_autoencoder.ipynb, section "The scaling factor".
    """
    return 1 / latents.float().std().item()


def psnr(a: Tensor, b: Tensor) -> float:
    """Peak signal-to-noise ratio of two batches of pictures in [-1, 1], in dB: 10 log10(2^2 / mean (a - b)^2).

    The mean is over all pictures. Equal batches have infinite dB; above about 32 dB, edges look clean at this size.
    Raises ValueError if the shapes differ.
    Derived in: notebooks/04_autoencoder.ipynb, section "A small VAE".
    """
    if a.shape != b.shape:
        raise ValueError(f"b: expected the shape of a, {tuple(a.shape)}, got {tuple(b.shape)}")
    return (10 * torch.log10(4 / F.mse_loss(a.double(), b.double()))).item()
