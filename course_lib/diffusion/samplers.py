"""From noise to picture: Algorithm 2, DDIM, and a second-order solver, each one flat generator.

Derived in: notebooks/02_ddpm_sampling.ipynb.

Every sampler has one signature, (eps_model, x_T, schedule, steps, *, clip, generator), and yields (t, xt, x0_hat): the
time before the step, the image after it, and the network's estimate of the clean image. The last xt is the sample; the
ones before are its trajectory. All numbers taken from the schedule are Python floats on the CPU, so a step only queues
work for the device and never waits for it.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from course_lib.diffusion.ddpm import EpsModel, posterior, predict_x0
from course_lib.diffusion.schedule import Schedule

Steps = Iterator[tuple[int, Tensor, Tensor]]


@torch.no_grad()
def ddpm(eps_model: EpsModel, x_T: Tensor, schedule: Schedule, steps: int | None = None, *,
         clip: bool = True, generator: torch.Generator | None = None) -> Steps:  # fmt: skip
    """Algorithm 2: estimate the clean image, step to the posterior's mean, add noise of its variance; T times.

    x_{t-1} ~ N(mean(x0_hat, x_t), beta_t (1 - alpha_bar_{t-1}) / (1 - alpha_bar_t)).
    Source: Ho et al. 2020, Algorithm 2 with the smaller of its two variances; fewer steps as in DDIM at eta = 1.
    x_T: (B, C, H, W) from N(0, I).  steps: None for all T.  clip: keep x0_hat in [-1, 1], as the paper's code does;
    switch it off for latents.  generator: on x_T's device.
    Derived in: notebooks/02_ddpm_sampling.ipynb, section "Algorithm 2".
    """
    times = schedule.times(schedule.T if steps is None else steps)
    xt = x_T
    for t, s in zip(times, [*times[1:], 0]):
        x0_hat = predict_x0(xt, t, eps_model(xt, t), schedule)
        if clip:
            x0_hat = x0_hat.clamp(-1, 1)
        mean, variance = posterior(x0_hat, xt, t, schedule, s)
        xt = mean
        if s > 0:  # the last step adds no noise
            xt = mean + variance**0.5 * _noise_like(xt, generator)
        yield t, xt, x0_hat


@torch.no_grad()
def ddim(eps_model: EpsModel, x_T: Tensor, schedule: Schedule, steps: int = 50, *, eta: float = 0.0,
         clip: bool = True, generator: torch.Generator | None = None) -> Steps:  # fmt: skip
    """Jump from x_t to the clean estimate and back to an earlier time; eta is the share of fresh noise.

    x_s = sqrt(abar_s) x0_hat + sqrt(1 - abar_s - v) eps_hat + sqrt(v) z,
    v = eta^2 (1 - abar_s) / (1 - abar_t) (1 - abar_t / abar_s).  Source: Song et al. 2021, Eq. 12 and 16.
    eta: 0 is deterministic, 1 is Algorithm 2.  Other arguments as in `ddpm`; with clip, eps_hat is computed
    again from the clipped estimate.
    Derived in: notebooks/02_ddpm_sampling.ipynb, section "DDIM".
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta: expected a number in [0, 1] (0 deterministic, 1 DDPM), got {eta}")
    times = schedule.times(steps)
    xt = x_T
    for t, s in zip(times, [*times[1:], 0]):
        alpha_bar_t, alpha_bar_s = schedule.alpha_bar[t].item(), schedule.alpha_bar[s].item()
        eps_hat = eps_model(xt, t)
        x0_hat = (xt - (1 - alpha_bar_t) ** 0.5 * eps_hat) / alpha_bar_t**0.5
        if clip:
            x0_hat = x0_hat.clamp(-1, 1)
            eps_hat = (xt - alpha_bar_t**0.5 * x0_hat) / (1 - alpha_bar_t) ** 0.5
        variance = eta**2 * (1 - alpha_bar_s) / (1 - alpha_bar_t) * (1 - alpha_bar_t / alpha_bar_s)
        xt = alpha_bar_s**0.5 * x0_hat + (1 - alpha_bar_s - variance) ** 0.5 * eps_hat
        if variance > 0:
            xt = xt + variance**0.5 * _noise_like(xt, generator)
        yield t, xt, x0_hat


@torch.no_grad()
def heun(eps_model: EpsModel, x_T: Tensor, schedule: Schedule, steps: int = 25, *,
         clip: bool = True, generator: torch.Generator | None = None) -> Steps:  # fmt: skip
    """Follow the same curve as DDIM (eta = 0), but average the direction at both ends of each step.

    With x' = x_t / sqrt(alpha_bar_t) and sigma_t as time, DDIM is Euler's method on dx'/dsigma = eps_theta.
    Heun's method: x'_s = x'_t + (sigma_s - sigma_t) (eps_hat(t) + eps_hat(s)) / 2.
    Source: Karras et al. 2022, Algorithm 1 (without churn).  Two evaluations per step; one in a step to t = 0 or 1.
    Arguments as in `ddpm`; it is deterministic, so `generator` is not used.
    Differs from the paper: the times are the schedule's; with `spacing="karras"` they are the paper's, rounded. A step
    to t = 1 is Euler's as well as the one to 0: at t = 1 a network finds only a part c of the small noise again (the
    notebook measures c), and the average would remove only (1 + c) / 2 of the noise of that step.
    Derived in: notebooks/02_ddpm_sampling.ipynb, section "A better solver".
    """
    times = schedule.times(steps)

    def direction(xt: Tensor, t: int) -> tuple[Tensor, Tensor]:
        alpha_bar, eps_hat = schedule.alpha_bar[t].item(), eps_model(xt, t)
        x0_hat = (xt - (1 - alpha_bar) ** 0.5 * eps_hat) / alpha_bar**0.5
        if clip:
            x0_hat = x0_hat.clamp(-1, 1)
            eps_hat = (xt - alpha_bar**0.5 * x0_hat) / (1 - alpha_bar) ** 0.5
        return eps_hat, x0_hat

    xt, sigma = x_T, schedule.sigma
    for t, s in zip(times, [*times[1:], 0]):
        slope, x0_hat = direction(xt, t)
        scaled, step = xt / schedule.alpha_bar[t].item() ** 0.5, (sigma[s] - sigma[t]).item()
        back = schedule.alpha_bar[s].item() ** 0.5
        if s > 1:
            slope = (slope + direction(back * (scaled + step * slope), s)[0]) / 2
        xt = back * (scaled + step * slope) if s > 0 else x0_hat
        yield t, xt, x0_hat


def last(steps: Iterable[tuple[int, Tensor, Tensor]]) -> Tensor:
    """Run a sampler to its end and return the sample: `last(ddim(...))`."""
    sample = None
    for _, xt, _ in steps:
        sample = xt
    return sample


def _noise_like(x: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.randn(x.shape, device=x.device, dtype=x.dtype, generator=generator)
