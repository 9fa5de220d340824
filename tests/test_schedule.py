"""The noise schedule: the numbers are diffusers' numbers, its laws hold, and its errors name the argument."""

from itertools import pairwise

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler

from course_lib.diffusion.schedule import Schedule, cosine, linear, scaled_linear

SCHEDULES = {"linear": linear(), "scaled_linear": scaled_linear(), "cosine": cosine()}
each = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)


@each
def test_starts_at_one_and_falls(schedule):
    assert schedule.T == 1000 and schedule.alpha_bar.shape == (1001,) and schedule.alpha_bar.dtype == torch.float64
    assert schedule.alpha_bar[0] == 1
    assert (schedule.alpha_bar.diff() < 0).all() and (schedule.alpha_bar > 0).all()
    assert schedule.alpha_bar[-1] < 0.005  # almost no image is left


@pytest.mark.parametrize(
    ("ours", "settings"),
    [
        (linear(), dict(beta_schedule="linear", beta_start=1e-4, beta_end=0.02)),
        (scaled_linear(), dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)),
        (cosine(), dict(beta_schedule="squaredcos_cap_v2")),
        (linear(T=200, beta_start=1e-3, beta_end=0.1), dict(beta_start=1e-3, beta_end=0.1, num_train_timesteps=200)),
    ],
    ids=["linear", "scaled_linear", "cosine", "linear of 200"],
)
def test_betas_are_diffusers(ours, settings):
    peer = DDPMScheduler(**settings)
    torch.testing.assert_close(ours.beta[1:], peer.betas.double(), rtol=1e-6, atol=2e-7)
    torch.testing.assert_close(
        ours.alpha_bar[1:], peer.alphas_cumprod.double(), rtol=2e-4, atol=1e-6
    )  # theirs: float32


@each
def test_alpha_beta_and_sigma_are_differences_of_alpha_bar(schedule):
    assert schedule.alpha[0] == 1 and schedule.beta[0] == 0 and schedule.sigma[0] == 0
    torch.testing.assert_close((1 - schedule.beta).cumprod(0), schedule.alpha_bar)
    torch.testing.assert_close(1 / (1 + schedule.sigma**2), schedule.alpha_bar)


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 10, 50, 250, 999, 1000])
def test_times_are_diffusers_leading_timesteps_plus_one(steps):
    peer = DDIMScheduler(timestep_spacing="leading", steps_offset=0)
    peer.set_timesteps(steps)
    assert linear().times(steps) == [t + 1 for t in peer.timesteps.tolist()]


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7, 10, 16, 25, 48, 50, 96, 112, 333, 999, 1000])
def test_trailing_times_are_diffusers_plus_one(steps):
    peer = DDIMScheduler(timestep_spacing="trailing")
    peer.set_timesteps(steps)
    times = scaled_linear(spacing="trailing").times(steps)
    assert times == [t + 1 for t in peer.timesteps.tolist()]
    assert times[0] == 1000


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 10, 28, 50, 333, 999, 1000])
def test_linspace_times_are_diffusers_plus_one(steps):
    peer = DDPMScheduler(timestep_spacing="linspace")
    peer.set_timesteps(steps)
    times = linear(spacing="linspace").times(steps)
    assert times == [t + 1 for t in peer.timesteps.tolist()]
    assert times[-1] == 1 and times[0] == (1000 if steps > 1 else 1)


@pytest.mark.parametrize("steps", [2, 3, 5, 10, 18, 25])
@pytest.mark.parametrize("make", [linear, scaled_linear])
def test_karras_times_are_diffusers_rounded(make, steps):
    """Karras et al. 2022, Eq. 5. diffusers keeps fractions of a time; we take the nearest one."""
    ours = make(spacing="karras")
    peer = EulerDiscreteScheduler(trained_betas=ours.beta[1:].numpy(), use_karras_sigmas=True)
    peer.set_timesteps(steps)
    times = ours.times(steps)
    assert times[0] == 1000 and times[-1] == 1
    assert max(abs(t - 1 - u) for t, u in zip(times, peer.timesteps.tolist(), strict=True)) < 0.51


def test_karras_steps_are_evenly_spaced_in_the_root_of_sigma():
    schedule = linear(spacing="karras")
    roots = schedule.sigma[schedule.times(10)] ** (1 / 7)
    torch.testing.assert_close(roots.diff(), (roots[-1] - roots[0]).expand(9) / 9, rtol=0.06, atol=0)


@pytest.mark.parametrize("spacing", ["trailing", "karras"])
def test_times_are_as_many_as_asked_for(spacing):
    for T in (200, 1000):  # diffusers' floats give one too many at 61, 103, 121, ... of 1000 ("trailing")
        for schedule in (linear(T=T, spacing=spacing), cosine(T=T, spacing=spacing)):
            for steps in range(1, T + 1):
                times = schedule.times(steps)
                assert len(times) == steps and times[0] == T and times[-1] >= 1
                assert all(t > s for t, s in pairwise(times))


def test_an_unknown_spacing_is_refused():
    expected = r"^spacing: expected one of leading, trailing, linspace, karras, got 'even'$"
    with pytest.raises(ValueError, match=expected):
        cosine(spacing="even")


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_a_wrong_number_of_steps_is_refused(steps):
    with pytest.raises(ValueError, match=rf"^steps: expected 1\.\.1000 .* got {steps}$"):
        linear().times(steps)


def test_at_takes_an_int_or_one_time_per_image():
    schedule, like = linear(), torch.zeros(3, 2, 4, 4)
    assert schedule.at(7, like).shape == (3, 1, 1, 1)
    assert schedule.at(0, like).eq(1).all()
    t = torch.tensor([1, 7, 1000])
    torch.testing.assert_close(schedule.at(t, like).flatten(), schedule.alpha_bar[t].float(), rtol=0, atol=0)
    torch.testing.assert_close(schedule.at(7, like), schedule.at(torch.full((3,), 7), like), rtol=0, atol=0)
    assert schedule.at(t, like.double()).dtype == torch.float64
    assert schedule.at(t, torch.zeros(3, 5)).shape == (3, 1)


@pytest.mark.parametrize("t", [-1, 1001])
def test_a_time_outside_the_schedule_is_refused(t):
    with pytest.raises(ValueError, match=rf"^t: expected a time in 0\.\.1000, got {t}$"):
        linear().at(t, torch.zeros(1, 1, 1, 1))


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [
        ([0.9, 0.5], "starts with 1"),
        ([1.0], "starts with 1"),
        ([[1.0, 0.5]], "starts with 1"),
        ([1.0, 0.5, 0.5], "fall with t"),
        ([1.0, 0.5, 0.0], "stay above 0"),
        ([1.0, float("nan")], "fall with t"),
    ],
)
def test_a_row_that_is_no_schedule_is_refused(numbers, expected):
    with pytest.raises(ValueError, match=f"^alpha_bar: expected .*{expected}"):
        Schedule(numbers)
