"""Training: what a step is, and the averaged weights."""

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from course_lib.diffusion.ddpm import simple_loss
from course_lib.diffusion.schedule import linear
from course_lib.diffusion.train import EMA, Training, random_batch

IMAGES = torch.randint(0, 256, (12, 3, 8, 8), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
LABELS = torch.arange(12) % 10


def training(net, images=IMAGES, labels=LABELS, **options):
    return Training(net, linear(), images, labels, accelerator=Accelerator(cpu=True), **{"batch_size": 4, **options})


def weights(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=0, msg=lambda m, n=name: f"{n}: {m}")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# ---- a step ----


def test_the_loss_falls(tiny_unet):
    run = training(tiny_unet(), IMAGES[:1], None, batch_size=16, lr=2e-3, warmup=0, flip=False)
    losses = [loss.item() for _, loss in run.steps(40)]
    assert np.mean(losses[-10:]) < 0.7 * np.mean(losses[:3])


def test_a_step_is_algorithm_1(tiny_unet):
    """Two steps written out by hand: same draws, same loss, clipped gradient, AdamW, averaging."""
    run = training(tiny_unet(num_classes=10), lr=1e-3, warmup=4, clip=0.1, weighting="v")
    losses = [loss for _, loss in run.steps(2)]

    net = tiny_unet(num_classes=10).train()
    shadow = {name: value.detach().clone() for name, value in net.named_parameters()}
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=0.0)
    for step in (1, 2):
        g = seeded(int(np.random.SeedSequence([0, 0, step]).generate_state(1)[0]))
        x0, label = random_batch(IMAGES, LABELS, 4, g, num_classes=10)
        loss = simple_loss(lambda xt, t: net(xt, t, label), x0, linear(), g, "v")  # noqa: B023
        torch.testing.assert_close(loss, losses[step - 1], rtol=1e-4, atol=1e-5)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 0.1)
        optimizer.param_groups[0]["lr"] = 1e-3 * step / 4
        optimizer.step()
        decay = min(0.999, (1 + step) / (10 + step))
        for name, value in net.named_parameters():
            shadow[name] = decay * shadow[name] + (1 - decay) * value.detach()
    for name, value in run.net.named_parameters():
        torch.testing.assert_close(value, net.get_parameter(name), rtol=1e-3, atol=2e-5)
        torch.testing.assert_close(run.ema.model.get_parameter(name), shadow[name], rtol=1e-3, atol=2e-5)


def test_a_batch_is_images_in_range_and_their_labels():
    x0, label = random_batch(IMAGES, LABELS, 500, seeded(), num_classes=10, p_drop=0.2)
    assert x0.shape == (500, 3, 8, 8) and x0.dtype == torch.float32 and x0.min() >= -1 and x0.max() <= 1
    assert x0.is_contiguous(memory_format=torch.channels_last)
    pixels = ((x0 + 1) * 127.5).round().to(torch.uint8)
    plain = (pixels[:, None] == IMAGES).flatten(2).all(2)  # (500, 12): which image is it?
    mirrored = (pixels[:, None] == IMAGES.flip(-1)).flatten(2).all(2)
    assert (plain | mirrored).sum(1).eq(1).all()
    assert abs(mirrored.any(1).double().mean() - 0.5) < 4 * 0.5 / 500**0.5
    kept = label != 10
    rows = (plain | mirrored).double().argmax(1)
    torch.testing.assert_close(label[kept], LABELS[rows[kept]], rtol=0, atol=0)
    assert abs(kept.double().mean() - 0.8) < 4 * (0.2 * 0.8 / 500) ** 0.5
    assert set(rows.tolist()) == set(range(12))


def test_without_flips_and_labels_a_batch_is_just_images():
    x0, label = random_batch(IMAGES, None, 50, seeded(), flip=False)
    pixels = ((x0 + 1) * 127.5).round().to(torch.uint8)
    assert label is None and (pixels[:, None] == IMAGES).flatten(2).all(2).any(1).all()


def test_the_learning_rate_rises_stays_and_falls(tiny_unet):
    run = training(tiny_unet(num_classes=10), lr=1.0, warmup=10, total_steps=100, cooldown=0.3)
    curve = [run.learning_rate(step) for step in range(101)]
    assert curve[1] == pytest.approx(0.1) and curve[5] == pytest.approx(0.5)
    assert curve[10:71] == [1.0] * 61
    assert curve[85] == pytest.approx(0.5) and curve[100] == 0
    assert run.learning_rate(150) == 0  # never below 0
    forever = training(tiny_unet(num_classes=10), lr=2.0, warmup=0, total_steps=None)
    assert [forever.learning_rate(step) for step in (1, 10**6)] == [2.0, 2.0]


def test_the_curve_reaches_the_optimizer(tiny_unet):
    run = training(tiny_unet(num_classes=10), lr=1.0, warmup=10)
    for step, _ in run.steps(3):
        assert run.optimizer.param_groups[0]["lr"] == pytest.approx(step / 10)


def test_runs_with_one_seed_agree_and_with_two_differ(tiny_unet):
    state = torch.get_rng_state()
    losses = [
        [loss.item() for _, loss in training(tiny_unet(num_classes=10), seed=s).steps(3)] for s in (0, 0, 1, 2**32)
    ]
    assert losses[0] == losses[1] and losses[0] != losses[2]
    assert losses[0] != losses[3]  # torch's CPU generator alone would take 2^32 for 0
    assert torch.equal(torch.get_rng_state(), state)  # the global generator plays no part


def test_ema_is_the_average_written_as_a_loop(tiny_unet):
    net = tiny_unet()
    ema = EMA(net, decay=0.5)
    by_hand = weights(net)
    for n in range(1, 12):
        with torch.no_grad():
            for i, value in enumerate(net.parameters()):
                value.add_(torch.randn(value.shape, generator=seeded(100 * n + i)))
        ema.update(net)
        d = min(0.5, (1 + n) / (10 + n))
        by_hand = {name: d * by_hand[name] + (1 - d) * value for name, value in weights(net).items()}
    for name, value in ema.model.state_dict().items():
        torch.testing.assert_close(value, by_hand[name], rtol=1e-5, atol=1e-5)


def test_the_average_is_a_frozen_copy(tiny_unet):
    net = tiny_unet().train()
    ema = EMA(net)
    assert net.training and not ema.model.training
    assert not any(weight.requires_grad for weight in ema.model.parameters())
    before = weights(ema.model)
    with torch.no_grad():
        net.conv_in.weight.zero_()
    assert_same(weights(ema.model), before)


@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_the_average_has_the_latest_buffers(decay):
    net = torch.nn.BatchNorm1d(3).train()
    ema = EMA(net, decay=decay)
    for _ in range(3):
        net(torch.randn(8, 3, generator=seeded(1)) + 5)
        with torch.no_grad():
            net.weight.add_(1)
        ema.update(net)
    assert net.num_batches_tracked == 3 and net.running_mean.min() > 1
    assert_same(dict(ema.model.named_buffers()), dict(net.named_buffers()))
    assert torch.equal(ema.model.weight, net.weight) == (decay == 0)  # 0: no average


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (IMAGES.float(), LABELS, r"^images: expected uint8 \(N, C, H, W\), got torch.float32"),
        (IMAGES[0], LABELS, r"^images: expected uint8 \(N, C, H, W\), got torch.uint8 \(3, 8, 8\)"),
        (IMAGES, LABELS[:5], r"^labels: expected one per image \(12\), got 5"),
    ],
)
def test_data_of_another_kind_is_refused(tiny_unet, images, labels, message):
    with pytest.raises(ValueError, match=message):
        training(tiny_unet(num_classes=10), images, labels)


def test_labels_need_a_network_that_takes_them(tiny_unet):
    with pytest.raises(ValueError, match=r"^model: expected a network with num_classes set"):
        training(tiny_unet())
