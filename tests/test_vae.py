"""The small VAE: shapes, the loss against torch's own distributions, and that it learns."""

import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from course_lib.latent import vae
from course_lib.latent.vae import VAE

close = torch.testing.assert_close


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def small():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return VAE(latent_channels=3, width=8)


@pytest.mark.parametrize("channels", [1, 4, 8])
def test_latents_are_a_quarter_of_the_side(channels):
    net, images = VAE(channels), torch.zeros(2, 3, 64, 32)
    reconstruction, mean, logvar = net(images, seeded())
    assert reconstruction.shape == images.shape and mean.shape == logvar.shape == (2, channels, 16, 8)
    assert sum(p.numel() for p in net.parameters()) < 500_000


@pytest.mark.parametrize("shape", [(3, 64, 64), (2, 1, 64, 64), (2, 3, 62, 64)])
def test_pictures_of_another_shape_are_refused(small, shape):
    with pytest.raises(ValueError, match=r"^images: expected \(B, 3, H, W\), H and W multiples of 4, got "):
        small.encode(torch.zeros(shape))


def test_a_draw_has_the_mean_and_the_variance():
    mean, logvar = torch.full((20_000,), 2.0), torch.full((20_000,), math.log(9.0))
    z = vae.reparameterise(mean, logvar, seeded())
    close(z.mean(), torch.tensor(2.0), rtol=0, atol=0.1)
    close(z.std(), torch.tensor(3.0), rtol=0, atol=0.1)
    close(vae.reparameterise(mean, torch.full_like(mean, -math.inf)), mean, rtol=0, atol=0)
    mean.requires_grad_(), logvar.requires_grad_()
    vae.reparameterise(mean, logvar, seeded()).sum().backward()
    close(mean.grad, torch.ones_like(mean))
    close(logvar.grad, (z - 2).detach() / 2)  # d std eps / d log std^2


def test_the_divergence_is_torchs():
    mean, logvar = torch.randn(2, 3, 4, generator=seeded()), torch.randn(2, 3, 4, generator=seeded(1))
    theirs = kl_divergence(Normal(mean, (logvar / 2).exp()), Normal(torch.tensor(0.0), torch.tensor(1.0)))
    close(vae.kl_divergence(mean, logvar), theirs.mean())
    assert vae.kl_divergence(torch.zeros(5), torch.zeros(5)) == 0


def test_the_loss_is_its_three_parts(small):
    images = torch.rand(4, 3, 16, 16, generator=seeded()) * 2 - 1
    reconstruction, mean, logvar = small(images, seeded(1))
    error = reconstruction - images
    rest = error.abs().mean() + error.square().mean()
    close(vae.loss(small, images, 0.0, seeded(1)), rest)
    close(vae.loss(small, images, 0.5, seeded(1)), rest + 0.5 * vae.kl_divergence(mean, logvar))


def test_a_strong_divergence_empties_the_latents_and_a_weak_one_lets_it_learn(small):
    y, x = torch.meshgrid(torch.linspace(-1, 1, 16), torch.linspace(-1, 1, 16), indexing="ij")
    slopes = torch.rand(8, 3, 2, 1, 1, generator=seeded()) * 2 - 1
    images = slopes[:, :, 0] * x + slopes[:, :, 1] * y  # smooth pictures, different ones

    def learn(net, kl_weight):
        optimizer = torch.optim.AdamW(net.parameters(), lr=5e-3)
        for step in range(60):
            optimizer.zero_grad()
            vae.loss(net, images, kl_weight, seeded(step)).backward()
            optimizer.step()
        with torch.no_grad():
            return vae.psnr(net.decode(net.encode(images)[0]), images)

    other = VAE(3, 8)
    other.load_state_dict(small.state_dict())
    assert learn(small, 1e-4) > 18 > 14 > learn(other, 100.0)


def test_the_scaling_factor_makes_the_spread_one():
    latents = 5.49 * torch.randn(50, 4, 16, 16, generator=seeded())
    factor = vae.scaling_factor(latents)
    close((factor * latents).std(), torch.tensor(1.0))
    assert abs(factor - 1 / 5.49) < 0.01


def test_psnr():
    a = torch.zeros(2, 3, 4, 4)
    assert vae.psnr(a, a) == math.inf
    assert vae.psnr(a, a + 2) == pytest.approx(0)  # the whole range from -1 to 1
    assert vae.psnr(a, a + 0.2) == pytest.approx(20)
    assert vae.psnr(a, torch.stack([a[0], a[1] + 0.2])) == pytest.approx(20 + 10 * math.log10(2))
    with pytest.raises(ValueError, match=r"^b: expected the shape of a, \(2, 3, 4, 4\), got \(3, 4, 4\)"):
        vae.psnr(a, a[0])
