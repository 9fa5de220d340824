"""Denoising diffusion: the forward process, its posterior, and the loss.

Derived in: notebooks/01_ddpm_training.ipynb, sections "From a picture to noise" and "Algorithm 1".

An eps model is any callable (xt, t) -> eps_hat: the small UNet here, Stable Diffusion with a prompt, a guided pair.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from course_lib.diffusion.schedule import Schedule

EpsModel = Callable[[Tensor, "Tensor | int"], Tensor]


def q_sample(x0: Tensor, t: Tensor | int, eps: Tensor, schedule: Schedule) -> Tensor:
    """Jump from the clean image straight to time t.

    x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps.  Source: Ho et al. 2020, Eq. 4.
    x0, eps: (B, C, H, W), the image in [-1, 1].  t: an int or (B,) ints in 0..T.  Returns (B, C, H, W).
    Derived in: notebooks/01_ddpm_training.ipynb, section "From a picture to noise".
    """
    alpha_bar = schedule.at(t, x0)
    return alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * eps


def predict_x0(xt: Tensor, t: Tensor | int, eps_hat: Tensor, schedule: Schedule) -> Tensor:
    """The clean image that x_t and a predicted noise imply: q_sample solved for x_0.

    x0_hat = (x_t - sqrt(1 - alpha_bar_t) eps_hat) / sqrt(alpha_bar_t).  Source: Ho et al. 2020, Eq. 15.
    Shapes as in q_sample; not clipped.
    Derived in: notebooks/01_ddpm_training.ipynb, section "Why predict the noise".
    """
    alpha_bar = schedule.at(t, xt)
    return (xt - (1 - alpha_bar).sqrt() * eps_hat) / alpha_bar.sqrt()


def eps_from_v(xt: Tensor, t: Tensor | int, v: Tensor, schedule: Schedule) -> Tensor:
    """The noise that follows from a prediction of v = sqrt(alpha_bar_t) eps - sqrt(1 - alpha_bar_t) x_0.

    eps = sqrt(1 - alpha_bar_t) x_t + sqrt(alpha_bar_t) v.  Source: Salimans & Ho 2022, appendix D.
    Shapes as in q_sample; computed in the precision of x_t, since half precision is too coarse.
    Derived in: notebooks/01_ddpm_training.ipynb, section "Predicting eps, or v".
    """
    alpha_bar = schedule.at(t, xt)
    return (1 - alpha_bar).sqrt() * xt + alpha_bar.sqrt() * v


def posterior(x0: Tensor, xt: Tensor, t: int, schedule: Schedule, s: int | None = None) -> tuple[Tensor, float]:
    """q(x_s | x_t, x_0), the Gaussian of the image one step earlier, given both ends.

    mean = sqrt(alpha_bar_{t-1}) beta_t / (1 - alpha_bar_t) x_0
         + sqrt(alpha_t) (1 - alpha_bar_{t-1}) / (1 - alpha_bar_t) x_t
    var  = beta_t (1 - alpha_bar_{t-1}) / (1 - alpha_bar_t).  Source: Ho et al. 2020, Eq. 6 and 7.
    x0, xt: (B, C, H, W).  t: one int in 1..T.  s: the earlier time, t - 1 unless steps are skipped (alpha_t is then
    alpha_bar_t / alpha_bar_s).  Returns the mean (B, C, H, W) and the variance, 0 at s = 0.
    Derived in: notebooks/02_ddpm_sampling.ipynb, section "One step back".
    """
    s = t - 1 if s is None else s
    if not 0 <= s < t <= schedule.T:
        raise ValueError(f"t: expected 0 <= s < t <= {schedule.T}, got s = {s}, t = {t}")
    alpha_bar_t, alpha_bar_s = schedule.alpha_bar[t].item(), schedule.alpha_bar[s].item()
    alpha = alpha_bar_t / alpha_bar_s
    from_x0 = alpha_bar_s**0.5 * (1 - alpha) / (1 - alpha_bar_t)
    from_xt = alpha**0.5 * (1 - alpha_bar_s) / (1 - alpha_bar_t)
    return from_x0 * x0 + from_xt * xt, (1 - alpha) * (1 - alpha_bar_s) / (1 - alpha_bar_t)


def loss_per_picture(
    eps_model: EpsModel,
    x0: Tensor,
    t: Tensor,
    eps: Tensor,
    schedule: Schedule,
    weighting: str = "eps",
    mask: Tensor | None = None,
) -> Tensor:
    """The error of the predicted noise, for each picture: the loss of Algorithm 1 before its mean.

    || eps - eps_theta(x_t, t) ||^2, a mean over a picture's numbers.  Source: Ho et al. 2020, Eq. 14.
    x0, eps: (B, C, H, W), pictures in [-1, 1] or latents.  t: (B,) ints in 1..T.  Returns (B,).
    weighting: "eps" is the paper's; "v" divides a picture's error by alpha_bar_t: an error in the clean image then
    weighs about the same at all times (it is the loss on v of Salimans & Ho 2022, appendix D); "min_snr" multiplies it
    by min(SNR, 5) / SNR, SNR = alpha_bar_t / (1 - alpha_bar_t) (Hang et al. 2023, section 3.4, gamma = 5).
    mask: (B, 1, H, W) of 0 and 1: only places with 1 count, and the mean is over them; a mask must not be all 0.
    Derived in: notebooks/01_ddpm_training.ipynb, section "Algorithm 1".
    """
    if weighting not in ("eps", "v", "min_snr"):
        raise ValueError(f"weighting: expected 'eps', 'v' or 'min_snr', got {weighting!r}")
    eps_hat = eps_model(q_sample(x0, t, eps, schedule), t)
    error = (eps_hat.to(eps.dtype) - eps).square()
    if mask is None:
        error = error.mean(dim=(1, 2, 3))
    else:
        error = (mask * error).sum(dim=(1, 2, 3)) / (mask.sum(dim=(1, 2, 3)) * x0.shape[1])
    alpha_bar = schedule.at(t, x0).flatten()
    if weighting == "v":
        return error / alpha_bar
    if weighting == "min_snr":
        return error * (5 * (1 - alpha_bar) / alpha_bar).clamp(max=1)
    return error


def simple_loss(
    eps_model: EpsModel,
    x0: Tensor,
    schedule: Schedule,
    generator: torch.Generator | None = None,
    weighting: str = "eps",
) -> Tensor:
    """The error of the predicted noise, at one random time for each image: the loss of Algorithm 1.

    L = E || eps - eps_theta(x_t, t) ||^2,  t ~ Uniform(1..T),  eps ~ N(0, I).  Source: Ho et al. 2020, Eq. 14.
    x0: (B, C, H, W) in [-1, 1].  generator: on x0's device.  weighting: see `loss_per_picture`, whose mean this is.
    Returns a scalar.
    Derived in: notebooks/01_ddpm_training.ipynb, section "Algorithm 1".
    """
    t = torch.randint(1, schedule.T + 1, (len(x0),), device=x0.device, generator=generator)
    eps = torch.randn(x0.shape, device=x0.device, dtype=x0.dtype, generator=generator)
    return loss_per_picture(eps_model, x0, t, eps, schedule, weighting).mean()


def step_generator(seed: int, *numbers: int, on: torch.device | str = "cpu") -> torch.Generator:
    """A generator for one training step, which depends only on a seed and on numbers such as process and step.

    The numbers are hashed, because torch's CPU generator uses only the low 32 bits of a seed.
    """
    key = np.random.SeedSequence([seed, *numbers]).generate_state(1)[0]
    return torch.Generator(device=on).manual_seed(int(key))
