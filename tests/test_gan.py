"""The GAN of cats: its parts, its augmentation, and its inversion on a generator whose latents are known."""

import pytest
import torch
from torch import nn

from course_lib.editing.gan import SIDES, Critic, Generator, augment, gan_inversion, load_gan, nearness

close = torch.testing.assert_close


@pytest.fixture
def generator():
    torch.manual_seed(0)
    return Generator(latent=8, width=8).eval().requires_grad_(False)


def test_one_latent_is_the_same_latent_for_each_block(generator):
    z = torch.randn(2, 8)
    w = generator.latents(z)
    images = generator(z)
    assert images.shape == (2, 3, 64, 64) and images.abs().max() <= 1
    close(generator.draw(w[:, None].expand(-1, len(SIDES), -1)), images)
    close(generator.latents(3 * z), w)  # the length of z says nothing
    assert generator.mean_latent(50).shape == (1, 8)


def test_the_critic_answers_once_a_picture_and_the_encoder_with_a_latent():
    x = torch.randn(4, 3, 64, 64)
    assert Critic(width=8)(x).shape == (4,) and Critic(out=8, width=8)(x).shape == (4, 8)


def test_the_critic_sees_how_much_a_batch_differs():
    torch.manual_seed(1)
    critic, x = Critic(width=8), torch.randn(1, 3, 64, 64)
    alone, among = critic(x), critic(torch.cat([x, torch.randn(3, 3, 64, 64)]))[0]
    assert (alone[0] - among).abs() > 1e-6


def test_augmentation_lets_gradients_through_and_leaves_pixels_out():
    x = torch.ones(6, 3, 64, 64, requires_grad=True)
    found = augment(x, torch.Generator().manual_seed(0))
    assert found.shape == x.shape
    found.sum().backward()
    assert x.grad.isfinite().all() and x.grad.abs().sum() > 0
    left_out = (found == 0).all(1).float().mean((1, 2))  # the square, and the edge that a shift brings in
    assert ((left_out > 0.05) & (left_out < 0.5)).all()
    assert not torch.equal(found, augment(x, torch.Generator().manual_seed(1)))


def test_nearness_is_zero_for_the_picture_itself():
    x = torch.rand(3, 3, 64, 64)
    close(nearness(x, x), torch.zeros(3))
    close(nearness(x, x + 0.5), torch.full((3,), 3 * 0.25))  # a constant shift is the same at all sizes


class Linear(nn.Module):
    """A generator whose picture is its latent, so the right latent is the picture's own numbers."""

    def draw(self, w):
        return w[:, :3, None, None].expand(-1, -1, 64, 64)


def test_inversion_finds_the_latent_of_a_linear_generator():
    x = torch.tensor([[0.3, -0.2, 0.5], [0.0, 0.7, -0.6]])[:, :, None, None].expand(-1, -1, 64, 64)
    said = []
    w, images = gan_inversion(Linear(), x, torch.zeros(1, 3), steps=200, progress=lambda k, loss: said.append(loss))
    close(w, x[:, :, 0, 0], rtol=0, atol=1e-2)
    close(images, x, rtol=0, atol=1e-2)
    assert len(said) == 200 and said[-1] < 1e-3 < said[0]


def test_inversion_changes_no_weight_and_refuses_other_sizes(generator):
    before = {name: value.clone() for name, value in generator.named_parameters()}
    x = generator(torch.randn(2, 8))
    start = generator.mean_latent(20)
    images = gan_inversion(generator, x, start, steps=20)[1]
    assert (nearness(images, x) < nearness(generator.draw(start.expand(2, -1)), x)).all()
    assert all(torch.equal(value, before[name]) for name, value in generator.named_parameters())
    with pytest.raises(ValueError, match=r"images: expected \(B, 3, 64, 64\), got \(2, 3, 32, 32\)"):
        gan_inversion(generator, x[..., :32, :32], start)


def test_the_shipped_gan_draws_cats():
    from course_lib.evaluation.judge import ATTRIBUTES, answers, load_judge

    generator, encoder = load_gan()
    z = torch.randn(60, generator.config["latent"], generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        images, w = generator(z), generator.latents(z)
        guess = generator.draw(encoder(images))
    named = answers(load_judge(), images)[0]["noun"].argmax(1) == ATTRIBUTES["noun"].index("cat")
    assert named.float().mean() > 0.5
    assert nearness(guess, images).mean() < nearness(images.roll(1, 0), images).mean() / 2
    assert w.shape == guess.shape[:1] + (generator.config["latent"],)
