"""The network: what goes in and comes out, what each input does, and that its parts are the known formulas."""

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.embeddings import get_timestep_embedding

from course_lib.diffusion import schedule as schedules
from course_lib.diffusion.ddpm import predict_x0
from course_lib.diffusion.unet import Attention, ResidualBlock, UNet, time_embedding


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


XT = randn(2, 3, 16, 16)


@pytest.mark.parametrize("dim", [32, 64, 320])
def test_time_embedding_is_diffusers(dim):
    t = torch.tensor([0, 1, 7, 500, 1000])
    peer = get_timestep_embedding(t, dim, flip_sin_to_cos=True, downscale_freq_shift=0)
    torch.testing.assert_close(time_embedding(t, dim), peer, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("context_dim", [None, 24])
def test_attention_is_torchs(context_dim):
    attention = Attention(64, context_dim)
    torch.nn.init.normal_(attention.to_out.weight, std=0.1, generator=torch.Generator().manual_seed(0))
    x, context = randn(2, 64, 4, 4), randn(2, 5, 24, seed=1) if context_dim else None
    with torch.no_grad():
        pixels = attention.norm(x).flatten(2).transpose(1, 2)  # (B, HW, C)
        source = pixels if context is None else context
        q, k, v = (
            layer(y).reshape(2, -1, 2, 32).transpose(1, 2)  # two heads of 32
            for layer, y in ((attention.to_q, pixels), (attention.to_k, source), (attention.to_v, source))
        )
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(2, 16, 64)
        expected = x + attention.to_out(out).transpose(1, 2).reshape(2, 64, 4, 4)
        torch.testing.assert_close(attention(x, context), expected, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(attention(x, context), x)


def test_new_parts_change_nothing():
    x, emb = randn(2, 32, 4, 4), randn(2, 128, seed=1)
    torch.testing.assert_close(ResidualBlock(32, 32, 128)(x, emb), x, rtol=0, atol=0)
    torch.testing.assert_close(Attention(32)(x), x, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("options", "shape"),
    [
        ({}, (2, 3, 16, 16)),
        ({"patch": 1}, (1, 3, 8, 8)),
        ({"in_channels": 4, "blocks": 2}, (2, 4, 16, 16)),
        ({"channels": (32, 32, 64), "attention": (False, True, False), "patch": 1}, (2, 3, 16, 8)),
        ({"channels": (32,), "attention": (True,), "patch": 1}, (2, 3, 5, 7)),
    ],
)
def test_the_noise_has_the_shape_of_the_image(tiny_unet, options, shape):
    assert tiny_unet(**options)(randn(*shape), 5).shape == shape


def test_a_new_network_predicts_no_noise():
    net = UNet(channels=(32, 64), attention=(False, True), patch=2, num_classes=10)
    assert net(XT, 5).eq(0).all()


@pytest.mark.parametrize("context_dim", [16, 64])  # 64 is also the image's width: pixels would pass for text
@torch.no_grad()
def test_without_text_the_cross_attention_is_skipped(tiny_unet, context_dim):
    net = tiny_unet(context_dim=context_dim)
    without = net(XT, 7)
    for name, module in net.named_modules():
        if name.endswith("cross_attention"):
            module.to_out.weight.zero_()
            module.to_out.bias.zero_()
    torch.testing.assert_close(net(XT, 7), without, rtol=0, atol=0)
    torch.testing.assert_close(net(XT, 7, context=randn(2, 5, context_dim)), without, rtol=0, atol=0)


def test_config_makes_the_same_network_again(tiny_unet):
    net = tiny_unet(num_classes=10, context_dim=16, dropout=0.1, schedule="cosine")
    again = UNet(**net.config).eval()
    again.load_state_dict(net.state_dict())
    torch.testing.assert_close(again(XT, 5), net(XT, 5), rtol=0, atol=0)


@torch.no_grad()
def test_one_time_for_all_or_one_for_each_image(tiny_unet):
    net = tiny_unet()
    torch.testing.assert_close(net(XT, 7), net(XT, torch.tensor([7, 7])), rtol=0, atol=0)
    both = net(XT, torch.tensor([7, 900]))
    torch.testing.assert_close(both[1:], net(XT[1:], 900), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(net(XT, 7), net(XT, 900), atol=1e-3)


@torch.no_grad()
def test_no_label_is_the_last_row_of_the_table(tiny_unet):
    net = tiny_unet(num_classes=10)
    assert net.label_embedding.weight.shape[0] == 11
    torch.testing.assert_close(net(XT, 7), net(XT, 7, torch.tensor([10, 10])), rtol=0, atol=0)
    outputs = [net(XT, 7, torch.full((2,), label)) for label in range(11)]
    assert all(not torch.allclose(outputs[0], other, atol=1e-4) for other in outputs[1:])


@torch.no_grad()
def test_text_changes_the_image_where_there_is_cross_attention(tiny_unet):
    net = tiny_unet(context_dim=16)
    text, other = randn(2, 5, 16), randn(2, 5, 16, seed=1)
    assert net(XT, 7, context=text).shape == XT.shape
    assert not torch.allclose(net(XT, 7, context=text), net(XT, 7, context=other), atol=1e-4)
    # The order of the tokens is not seen (positions are the text encoder's work), their number may be any.
    torch.testing.assert_close(net(XT, 7, context=text.flip(1)), net(XT, 7, context=text), rtol=1e-4, atol=1e-4)
    assert net(XT, 7, context=text[:, :1]).shape == XT.shape
    # A network made without text input ignores it.
    plain = tiny_unet()
    torch.testing.assert_close(plain(XT, 7, context=text), plain(XT, 7), rtol=0, atol=0)


def test_a_new_network_ignores_text_and_can_be_trained_to_use_it():
    attention = Attention(32, context_dim=16)
    x, text, other = randn(1, 32, 4, 4), randn(1, 5, 16), randn(1, 5, 16, seed=1)
    torch.testing.assert_close(attention(x, text), attention(x, other), rtol=0, atol=0)
    attention(x, text).square().sum().backward()
    assert attention.to_out.weight.grad.abs().sum() > 0
    torch.nn.init.ones_(attention.to_out.weight)
    assert not torch.allclose(attention(x, text), attention(x, other))


def test_every_weight_gets_a_gradient(tiny_unet):
    net = tiny_unet(num_classes=10, context_dim=16)
    net(XT, torch.tensor([3, 600]), torch.tensor([1, 10]), randn(2, 5, 16)).square().sum().backward()
    still = [name for name, p in net.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert still == []
    rows = net.label_embedding.weight.grad.abs().sum(1) > 0
    assert rows.nonzero().flatten().tolist() == [1, 10]  # the rows that were used, and no other


@pytest.mark.parametrize("name", ["linear", "cosine", "scaled_linear"])
@torch.no_grad()
def test_the_shortcut_turns_v_into_eps(tiny_unet, name):
    """With a schedule the layers predict v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x_0, whatever the layers are."""
    plain, net = tiny_unet(), tiny_unet(schedule=name)
    schedule = getattr(schedules, name)()
    t = torch.tensor([3, 900])
    v_hat, eps_hat = plain(XT, t), net(XT, t)
    x0_hat = predict_x0(XT, t, eps_hat, schedule)
    alpha_bar = schedule.at(t, XT)
    torch.testing.assert_close(
        alpha_bar.sqrt() * eps_hat - (1 - alpha_bar).sqrt() * x0_hat, v_hat, rtol=1e-3, atol=1e-3
    )
    new = UNet(channels=(32, 64), attention=(False, True), schedule=name)  # its layers predict 0
    torch.testing.assert_close(new(XT, t), (1 - alpha_bar).sqrt() * XT)


@torch.no_grad()
def test_memory_order_does_not_matter(tiny_unet):
    net = tiny_unet(num_classes=10)
    expected = net(XT, 7)
    net = net.to(memory_format=torch.channels_last)
    out = net(XT.contiguous(memory_format=torch.channels_last), 7)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_images_of_a_batch_do_not_see_each_other(tiny_unet):
    net = tiny_unet(num_classes=10)
    torch.testing.assert_close(net(XT, 7)[:1], net(XT[:1], 7), rtol=1e-4, atol=1e-5)


def test_dropout_is_off_when_it_should_be(tiny_unet):
    net = tiny_unet(dropout=0.5)
    with torch.no_grad():
        torch.testing.assert_close(net(XT, 7), net(XT, 7), rtol=0, atol=0)
        net.train()
        assert not torch.allclose(net(XT, 7), net(XT, 7))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"channels": (32, 64), "attention": (True,)}, r"^attention: expected one flag per entry of channels \(2\)"),
        ({"channels": (32, 48), "attention": (False, True)}, r"^channels: expected multiples of 32 .* got \(32, 48\)"),
        ({"schedule": "quadratic"}, r"^schedule: expected one of linear, scaled_linear, cosine, got 'quadratic'$"),
    ],
)
def test_a_shape_that_cannot_be_built_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        UNet(**options)
