"""The samplers: equal to diffusers' schedulers under a fake model, right on Gaussian data, and without waiting."""

import itertools
from functools import partial

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, HeunDiscreteScheduler

from course_lib.diffusion import samplers
from course_lib.diffusion.guidance import guided
from course_lib.diffusion.schedule import cosine, linear

SCHEDULE = linear()


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=generator(seed), dtype=dtype)


def fake(xt, t):
    """An eps model that is not linear, depends on the time, and is the same everywhere."""
    return (0.7 * xt + t / 300).sin() + 0.2 * (2 * xt - t / 90).cos()


# ---- against diffusers ----


def peer(kind, schedule, **settings):
    """A scheduler of diffusers that computes in float64 as ours does; its own numbers are float32."""
    scheduler = kind(**settings)
    scheduler.betas, scheduler.alphas = schedule.beta[1:], schedule.alpha[1:]
    scheduler.alphas_cumprod = schedule.alpha_bar[1:]
    return scheduler


def follow(scheduler, x_T, steps, **options):
    """All x that diffusers passes through. Its times are one lower than ours."""
    scheduler.set_timesteps(steps)
    x = x_T
    for t in scheduler.timesteps.tolist():
        x = scheduler.step(fake(x, t + 1), t, x, **options).prev_sample
        yield x


def assert_same_path(ours, theirs, steps):
    paths = list(zip(ours, theirs, strict=True))
    assert len(paths) == steps
    for (_, xt, _), x in paths:
        torch.testing.assert_close(xt, x, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("steps", "clip", "schedule"),
    [(None, True, linear()), (None, False, linear()), (50, True, linear()), (7, False, linear()), (40, True, cosine())],
    ids=["all clip", "all", "50 clip", "7", "40 clip cosine"],
)
def test_ddpm_takes_the_steps_of_diffusers(steps, clip, schedule):
    x_T = randn(2, 3, 4, 4)
    ours = samplers.ddpm(fake, x_T, schedule, steps, clip=clip, generator=generator(1))
    scheduler = peer(DDPMScheduler, schedule, variance_type="fixed_small", clip_sample=clip)
    assert_same_path(ours, follow(scheduler, x_T, steps or 1000, generator=generator(1)), steps or 1000)


FEW = list(itertools.product((1, 7, 10, 50), (0.0, 0.5, 1.0), (True, False)))
MANY = [(steps, eta, eta != 0.5 if steps == 250 else eta == 0.5) for steps in (250, 1000) for eta in (0.0, 0.5, 1.0)]


@pytest.mark.parametrize(("steps", "eta", "clip"), FEW + MANY)
def test_ddim_takes_the_steps_of_diffusers(steps, eta, clip):
    x_T = randn(2, 3, 4, 4)
    ours = samplers.ddim(fake, x_T, SCHEDULE, steps, eta=eta, clip=clip, generator=generator(1))
    settings = dict(set_alpha_to_one=True, clip_sample=clip, steps_offset=0, timestep_spacing="leading")
    # With clip our eps_hat is made to agree with the clipped guess; diffusers calls this use_clipped_model_output.
    options = dict(eta=eta, use_clipped_model_output=clip, generator=generator(1))
    assert_same_path(ours, follow(peer(DDIMScheduler, SCHEDULE, **settings), x_T, steps, **options), steps)


@pytest.mark.parametrize("clip", [True, False])
def test_ddim_at_eta_1_is_ddpm(clip):
    """Two formulas for the same step: Eq. 12 of Song et al. with eta = 1, and the posterior of Ho et al."""
    x_T = randn(2, 3, 4, 4)
    a = samplers.ddim(fake, x_T, SCHEDULE, 50, eta=1, clip=clip, generator=generator(1))
    b = samplers.ddpm(fake, x_T, SCHEDULE, 50, clip=clip, generator=generator(1))
    torch.testing.assert_close(samplers.last(a), samplers.last(b), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("steps", [3, 7, 20])
def test_heun_takes_the_steps_of_diffusers(steps):
    """All but the step to t = 1, where diffusers looks ahead and we do not. Its own times are no whole numbers."""
    x_T, schedule = randn(2, 3, 4, 4), linear(spacing="linspace")
    times = schedule.times(steps)
    twice = [times[0], *[t for t in times[1:] for _ in (0, 1)]]
    scheduler = HeunDiscreteScheduler(timestep_spacing="linspace")
    scheduler.set_timesteps(steps)
    scheduler.sigmas = torch.cat([schedule.sigma[twice], torch.zeros(1)])
    x, theirs = x_T / schedule.alpha_bar[times[0]].sqrt(), []
    for t, their_t in zip(twice, scheduler.timesteps, strict=True):
        x = scheduler.step(fake(x * schedule.alpha_bar[t].sqrt(), t), their_t, x).prev_sample
        theirs.append(x)
    ours = samplers.heun(fake, x_T, schedule, steps, clip=False)
    for s, (_, xt, _), x in zip(times[1:-1], ours, theirs[1::2]):
        torch.testing.assert_close(xt, schedule.alpha_bar[s].sqrt() * x, rtol=1e-9, atol=1e-9)


# ---- against the exact solution ----

MEAN, STD = 0.3, 0.5  # the data: every pixel from N(MEAN, STD^2)


def exact_eps(xt, t, std=STD):
    """E[eps | x_t] for that data, a closed form because all is Gaussian."""
    alpha_bar = SCHEDULE.alpha_bar[t].item()
    return (1 - alpha_bar) ** 0.5 * (xt - alpha_bar**0.5 * MEAN) / (alpha_bar * std**2 + 1 - alpha_bar)


def exact_curve(xt, t, s=0, std=STD):
    """Where the probability flow ODE leads from x_t: it keeps the number of standard deviations from the mean."""
    now, after = SCHEDULE.alpha_bar[t].item(), SCHEDULE.alpha_bar[s].item()
    spread = ((after * std**2 + 1 - after) / (now * std**2 + 1 - now)) ** 0.5
    return after**0.5 * MEAN + spread * (xt - now**0.5 * MEAN)


N = 4_000
RUNS = {  # run, and the error that its finite number of steps may leave in the mean and the standard deviation
    "ddpm 1000": (lambda x: samplers.ddpm(exact_eps, x, SCHEDULE, clip=False, generator=generator(1)), 0.005),
    "ddim 250": (lambda x: samplers.ddim(exact_eps, x, SCHEDULE, 250, clip=False), 0.01),
    "ddim 250 eta .5": (
        lambda x: samplers.ddim(exact_eps, x, SCHEDULE, 250, eta=0.5, clip=False, generator=generator(1)),
        0.015,
    ),
    "ddim 250 eta 1": (
        lambda x: samplers.ddim(exact_eps, x, SCHEDULE, 250, eta=1, clip=False, generator=generator(1)),
        0.02,
    ),
    "heun 50": (lambda x: samplers.heun(exact_eps, x, SCHEDULE, 50, clip=False), 0.005),
}


@pytest.mark.parametrize(("run", "bias"), RUNS.values(), ids=RUNS)
def test_samples_of_gaussian_data_have_its_mean_and_spread(run, bias):
    """4,000 samples: four standard errors (0.03 for the mean, 0.02 for the spread), and the bias of the steps."""
    x0 = samplers.last(run(randn(N, 1, 1, 1)))
    assert abs(x0.mean().item() - MEAN) < 4 * STD / N**0.5 + bias
    assert abs(x0.std().item() - STD) < 4 * STD / (2 * N) ** 0.5 + bias


def path_error(sampler, steps, spacing="leading", s=0, std=STD):
    """The largest distance from the exact curve at time s."""
    x, schedule = torch.linspace(-2, 2, 9, dtype=torch.float64).reshape(9, 1, 1, 1), linear(spacing=spacing)
    times = [*schedule.times(steps), 0]
    run = sampler(partial(exact_eps, std=std), x, schedule, steps, clip=False)
    xs = next(xt for after, (_, xt, _) in zip(times[1:], run) if after == s)
    return (xs - exact_curve(x, times[0], s, std)).abs().max().item()


@pytest.mark.parametrize(("sampler", "ratio"), [(samplers.ddim, 2), (samplers.heun, 4)], ids=["ddim", "heun"])
def test_order_of_the_solvers(sampler, ratio):
    """Twice the steps: half the error of a first-order solver, a quarter of a second-order one. Heun's last steps,
    to t = 1 and 0, are Euler's; so this looks before them."""
    errors = [path_error(sampler, steps, s=101) for steps in (10, 20, 40)]
    for coarse, fine in itertools.pairwise(errors):
        assert coarse / fine == pytest.approx(ratio, rel=0.1)


def test_heun_beats_ddim_at_the_same_number_of_evaluations():
    assert path_error(samplers.heun, 20) < path_error(samplers.ddim, 38)


def test_karras_times_suit_narrow_data():
    """Where the data are narrow, the curve bends at small sigma, and there these times are close together."""
    assert path_error(samplers.heun, 10, "karras", std=0.05) < path_error(samplers.heun, 10, std=0.05) / 4
    assert path_error(samplers.ddim, 10, "karras", std=0.05) < path_error(samplers.ddim, 10, std=0.05)


@pytest.mark.parametrize("spacing", ["leading", "linspace", "karras"])
@pytest.mark.parametrize("steps", [3, 5, 13])
def test_heun_leaves_no_noise_where_the_network_sees_none_at_t_1(spacing, steps):
    """A trained network answers eps_hat = 0 at t = 1. The look-ahead to there would leave half of the last noise."""

    def trained(xt, t):
        return exact_eps(xt, t) if t > 1 else torch.zeros_like(xt)

    x = torch.linspace(-2, 2, 9, dtype=torch.float64).reshape(9, 1, 1, 1)
    schedule = linear(spacing=spacing)
    ends = [samplers.last(samplers.heun(model, x, schedule, steps, clip=False)) for model in (exact_eps, trained)]
    torch.testing.assert_close(*ends, rtol=0, atol=0.011)  # sigma_1 = 0.01 is all that the last step to 0 leaves


# ---- limits ----


def test_heun_is_ddim_where_the_direction_does_not_change():
    x_T, eps = randn(2, 3, 4, 4), randn(2, 3, 4, 4, seed=2)
    runs = [run(lambda xt, t: eps, x_T, SCHEDULE, 13, clip=False) for run in (samplers.heun, samplers.ddim)]
    for (_, a, _), (_, b, _) in zip(*runs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("clip", [True, False])
def test_one_step_is_the_clean_guess(clip):
    x_T = randn(2, 3, 4, 4)
    runs = [run(fake, x_T, SCHEDULE, 1, clip=clip) for run in (samplers.ddpm, samplers.ddim, samplers.heun)]
    for run in runs:
        ((t, x0, x0_hat),) = run
        assert t == 1
        torch.testing.assert_close(x0, x0_hat, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("run", [samplers.ddpm, samplers.ddim, samplers.heun])
def test_clip_keeps_the_clean_guess_in_range(run):
    x_T = 3 * randn(2, 3, 4, 4)
    assert all(x0_hat.abs().max() <= 1 for _, _, x0_hat in run(fake, x_T, SCHEDULE, 10, clip=True))
    assert any(x0_hat.abs().max() > 1 for _, _, x0_hat in run(fake, x_T, SCHEDULE, 10, clip=False))


def test_a_perfect_model_of_one_image_gets_it_back():
    """If eps_hat always points from one image x0, every sampler ends exactly there."""
    x0 = randn(2, 3, 4, 4).clamp(-1, 1)

    def knowing(xt, t):
        alpha_bar = SCHEDULE.at(t, xt)
        return (xt - alpha_bar.sqrt() * x0) / (1 - alpha_bar).sqrt()

    for run in (samplers.ddpm, samplers.ddim, samplers.heun):
        torch.testing.assert_close(samplers.last(run(knowing, randn(2, 3, 4, 4, seed=2), SCHEDULE, 10)), x0)


@pytest.mark.parametrize("run", [samplers.ddim, samplers.heun])
def test_ddim_and_heun_use_no_randomness(run):
    x_T = randn(2, 3, 4, 4)
    state = torch.get_rng_state()
    first = samplers.last(run(fake, x_T, SCHEDULE, 10))
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(samplers.last(run(fake, x_T, SCHEDULE, 10)), first, rtol=0, atol=0)


@pytest.mark.parametrize("options", [{}, {"eta": 1.0}], ids=["ddpm", "ddim eta 1"])
def test_the_last_step_adds_no_noise(options):
    run = samplers.ddim if options else samplers.ddpm
    g = generator(1)
    states = [g.get_state()]
    for _, xt, x0_hat in run(fake, randn(2, 3, 4, 4), SCHEDULE, 5, generator=g, **options):  # noqa: B007
        states.append(g.get_state())
    changed = [not torch.equal(a, b) for a, b in itertools.pairwise(states)]
    assert changed == [True, True, True, True, False]
    torch.testing.assert_close(xt, x0_hat, rtol=1e-9, atol=1e-9)


def test_noise_follows_the_generator():
    x_T = randn(2, 3, 4, 4)
    a, b, c = (samplers.last(samplers.ddpm(fake, x_T, SCHEDULE, 10, generator=generator(s))) for s in (1, 1, 2))
    torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert not torch.allclose(a, c)


@pytest.mark.parametrize("schedule", [linear(), cosine()], ids=["linear", "cosine"])
def test_the_variance_never_exceeds_what_there_is(schedule):
    """1 - alpha_bar_s - v of DDIM at eta = 1 stays >= 0 for all pairs s < t; a negative root would be complex."""
    alpha_bar = schedule.alpha_bar.tolist()
    for t, s in itertools.combinations(range(1000, -1, -7), 2):
        now, after = alpha_bar[t], alpha_bar[s]
        if t:
            assert 1 - after - (1 - after) / (1 - now) * (1 - now / after) >= 0


def test_every_step_is_yielded_with_the_time_just_left():
    assert [t for t, _, _ in samplers.ddim(fake, randn(1, 1, 2, 2), SCHEDULE, 4)] == [751, 501, 251, 1]
    assert sum(1 for _ in samplers.ddpm(fake, randn(1, 1, 2, 2), SCHEDULE)) == 1000


@pytest.mark.parametrize(
    ("run", "spacing", "expected"),
    [(samplers.ddpm, "leading", 10), (samplers.ddim, "leading", 10), (samplers.heun, "leading", 18),
     (samplers.heun, "karras", 18), (samplers.heun, "trailing", 19)],
)  # fmt: skip
def test_evaluations(run, spacing, expected):
    """DDPM and DDIM evaluate the network once a step; Heun twice, but once in a step that ends at t = 1 or 0."""
    calls = []
    samplers.last(run(lambda xt, t: (calls.append(t), fake(xt, t))[1], randn(1, 1, 2, 2), linear(spacing=spacing), 10))
    assert len(calls) == expected


def test_nothing_is_tracked_for_gradients():
    x_T = randn(1, 1, 2, 2).requires_grad_()
    for run in (samplers.ddpm, samplers.ddim, samplers.heun):
        assert not samplers.last(run(fake, x_T, SCHEDULE, 3)).requires_grad


# ---- errors ----


@pytest.mark.parametrize("run", [samplers.ddpm, samplers.ddim, samplers.heun])
@pytest.mark.parametrize("steps", [0, -3, 1001])
def test_a_wrong_number_of_steps_is_refused(run, steps):
    with pytest.raises(ValueError, match=f"^steps: .* got {steps}$"):
        samplers.last(run(fake, randn(1, 1, 2, 2), SCHEDULE, steps))


@pytest.mark.parametrize("eta", [2, -0.1])
def test_a_wrong_eta_is_refused(eta):
    with pytest.raises(ValueError, match=rf"^eta: expected a number in \[0, 1\].* got {eta}$"):
        samplers.last(samplers.ddim(fake, randn(1, 1, 2, 2), SCHEDULE, eta=eta))


# ---- no waiting ----


@pytest.mark.parametrize("run", ["ddpm", "ddim", "heun"])
@pytest.mark.parametrize("w", [1, 3.0])
def test_a_step_never_reads_a_number_back_from_the_device(tiny_unet, run, w):
    """Tensors on "meta" have no numbers: .item(), bool() or .cpu() on one raises. So a run on it has read none, and
    on a GPU the steps are queued without waiting."""
    net = tiny_unet(num_classes=10, schedule="linear").to("meta")
    eps_model = guided(net, torch.zeros(2, dtype=torch.long, device="meta"), w)
    options = {"eta": 0.5} if run == "ddim" else {}
    x_T = torch.empty(2, 3, 32, 32, device="meta")
    x0 = samplers.last(getattr(samplers, run)(eps_model, x_T, SCHEDULE, 3, **options))
    assert x0.device.type == "meta" and x0.shape == x_T.shape and x0.dtype == x_T.dtype
    with pytest.raises((RuntimeError, NotImplementedError)):
        x0.sum().item()
