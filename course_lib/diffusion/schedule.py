"""The noise schedule: how much of the image is left at each time t.

Derived in: notebooks/01_ddpm_training.ipynb, section "From a picture to noise".

The whole schedule is one row of numbers, alpha_bar[0..T]. Nothing else is stored; alpha, beta and sigma are computed
from it. `alpha_bar` always has DDPM's meaning (the DDIM paper writes it alpha).
"""

import math

import numpy as np
import torch
from torch import Tensor

SPACINGS = ("leading", "trailing", "linspace", "karras")


class Schedule:
    """alpha_bar[t] for t = 0..T, where alpha_bar[0] = 1 is the clean image.

    x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps.  Source: Ho et al. 2020, Eq. 4.
    Times run from 1 to T as in the papers. The numbers stay on the CPU in float64: reading one of them as a Python
    float never waits for an accelerator, and the samplers need nothing else.

    alpha_bar: (T + 1,) numbers, 1 first, falling, all in (0, 1].  spacing: which times a sampler visits, see `times`.
    Raises ValueError if the numbers do not start at 1 or do not fall, or for an unknown spacing.
    """

    def __init__(self, alpha_bar: Tensor, spacing: str = "leading"):
        alpha_bar = torch.as_tensor(alpha_bar, dtype=torch.float64, device="cpu")
        if alpha_bar.ndim != 1 or len(alpha_bar) < 2 or alpha_bar[0] != 1:
            raise ValueError(f"alpha_bar: expected a row of T + 1 numbers that starts with 1, got {alpha_bar}")
        if not ((alpha_bar.diff() < 0).all() and (alpha_bar > 0).all()):  # in this form, NaN is refused too
            raise ValueError("alpha_bar: expected numbers that fall with t and stay above 0, got some that do not")
        if spacing not in SPACINGS:
            raise ValueError(f"spacing: expected one of {', '.join(SPACINGS)}, got {spacing!r}")
        self.alpha_bar, self.spacing = alpha_bar, spacing
        self._copies: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    @property
    def T(self) -> int:
        """The number of times; t = T is (almost) pure noise."""
        return len(self.alpha_bar) - 1

    @property
    def alpha(self) -> Tensor:
        """alpha[t] = alpha_bar[t] / alpha_bar[t-1]: the share kept in step t.  (T + 1,), with alpha[0] = 1."""
        return torch.cat([self.alpha_bar[:1], self.alpha_bar[1:] / self.alpha_bar[:-1]])

    @property
    def beta(self) -> Tensor:
        """beta[t] = 1 - alpha[t]: the variance added in step t.  (T + 1,), with beta[0] = 0."""
        return 1 - self.alpha

    @property
    def sigma(self) -> Tensor:
        """sigma[t] = sqrt((1 - alpha_bar) / alpha_bar): noise per unit of signal, the time of the ODE samplers."""
        return ((1 - self.alpha_bar) / self.alpha_bar).sqrt()

    def _on(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        if (device, dtype) not in self._copies:
            self._copies[device, dtype] = self.alpha_bar.to(dtype).to(device)
        return self._copies[device, dtype]

    def at(self, t: Tensor | int, like: Tensor) -> Tensor:
        """alpha_bar[t], shaped so that it multiplies a batch.

        t: an int or (B,) ints in 0..T.  like: (B, ...) the batch.  Returns (B, 1, 1, ...) in its dtype and device.
        Raises ValueError for an int outside 0..T (a tensor is not checked: that would wait for the device).
        """
        if not torch.is_tensor(t):
            if not 0 <= t <= self.T:
                raise ValueError(f"t: expected a time in 0..{self.T}, got {t}")
            t = torch.full((len(like),), t, device=like.device)
        dtype = like.dtype if like.is_floating_point() else torch.float32
        return self._on(like.device, dtype)[t].reshape(-1, *[1] * (like.ndim - 1))

    def times(self, steps: int) -> list[int]:
        """The times that a sampler visits: `steps` of 1..T, falling. From the last, it steps to 0.

        spacing, in the words of diffusers (its times plus 1):
        "leading", DDIM's choice:  t_i = 1 + floor(T / steps) * i, i = steps - 1 ... 0: ends at t = 1, starts below T.
        "trailing":  t_i = round(T - i T / steps): starts at t = T, at pure noise, and ends above 1.
        "linspace":  evenly spaced from T to 1.  Source of these three: Lin et al. 2024, Table 2.
        "karras":  from T to 1, sigma^(1/7) evenly spaced: short steps where there is little noise.  Source: Karras et
        al. 2022, Eq. 5 with rho = 7.  Differs from the paper: each sigma is moved to the nearest time, none used twice.
        Raises ValueError unless 1 <= steps <= T.
        """
        if not 1 <= steps <= self.T:
            raise ValueError(f"steps: expected 1..{self.T} (the schedule has T = {self.T}), got {steps}")
        if self.spacing == "leading":
            return [1 + (self.T // steps) * i for i in reversed(range(steps))]
        if self.spacing == "trailing":
            times = np.arange(self.T, 0, -self.T / steps)[:steps]
        elif self.spacing == "linspace":
            times = 1 + np.linspace(0, self.T - 1, steps)[::-1].round()
        else:
            times = self._karras(steps)
        return times.round().astype(int).tolist()

    def _karras(self, steps: int, rho: int = 7) -> np.ndarray:
        sigma = self.sigma[1:].numpy()
        wanted = np.linspace(sigma[-1] ** (1 / rho), sigma[0] ** (1 / rho), steps) ** rho
        times = np.interp(np.log(wanted), np.log(sigma), np.arange(1, self.T + 1)).round()
        order = np.arange(steps)  # times + order may not rise: then each time is at least one below the one before
        return np.maximum.accumulate(np.minimum(times + order, self.T)[::-1])[::-1] - order


def _from_beta(beta: Tensor, spacing: str) -> Schedule:
    return Schedule(torch.cat([torch.ones(1, dtype=torch.float64), (1 - beta).cumprod(0)]), spacing)


def linear(T: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02, spacing: str = "leading") -> Schedule:
    """beta rises in a straight line.  Source: Ho et al. 2020, section 4 (the default numbers are theirs)."""
    return _from_beta(torch.linspace(beta_start, beta_end, T, dtype=torch.float64), spacing)


def scaled_linear(
    T: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012, spacing: str = "leading"
) -> Schedule:
    """sqrt(beta) rises in a straight line.  Source: Rombach et al. 2022; the defaults are Stable Diffusion 1's."""
    return _from_beta(torch.linspace(beta_start**0.5, beta_end**0.5, T, dtype=torch.float64) ** 2, spacing)


def cosine(T: int = 1000, s: float = 0.008, beta_max: float = 0.999, spacing: str = "leading") -> Schedule:
    """alpha_bar falls like cos^2.  Source: Nichol & Dhariwal 2021, Eq. 17; the paper also clips beta at 0.999."""
    f = torch.cos((torch.linspace(0, 1, T + 1, dtype=torch.float64) + s) / (1 + s) * math.pi / 2) ** 2
    return _from_beta((1 - f[1:] / f[:-1]).clamp(max=beta_max), spacing)


def by_name(name: str) -> Schedule:
    """The schedule "linear", "scaled_linear" or "cosine" with its default numbers.  Raises ValueError for another."""
    kinds = {"linear": linear, "scaled_linear": scaled_linear, "cosine": cosine}
    if name not in kinds:
        raise ValueError(f"schedule: expected one of {', '.join(kinds)}, got {name!r}")
    return kinds[name]()
