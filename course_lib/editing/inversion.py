"""From a picture back to the noise that draws it: DDIM inversion, null-text inversion, negative-prompt inversion.

Derived in: notebooks/08_inversion.ipynb.

All work on latents (B, C, h, w), on any model of `StableDiffusion`. An `Inverted` holds the path from the picture to
noise and what guidance has to move away from to come back; `redraw` goes back, with these prompts or with others.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from course_lib.diffusion import guidance, samplers
from course_lib.diffusion.ddpm import EpsModel
from course_lib.diffusion.schedule import Schedule
from course_lib.latent.stable_diffusion import StableDiffusion

UPDATES, RATE = 10, 1e-2  # null-text: Adam's steps at each time, and its first rate
SCALE = 2.0**12  # of the error while gradients are computed: in float16 they would be rounded to 0


@dataclass
class Inverted:
    """A picture's way to noise.

    prompts: what the picture shows, one for each picture.  path: z_0, z at the sampler's times, ..., z_T.
    steps: of the sampler.  w: the guidance scale that `against` was made for.
    against: the features that guidance moves away from at each time from T on, one (B, L, D) a step.
    """

    prompts: list[str]
    path: list[Tensor]
    steps: int
    w: float
    against: list[Tensor]

    @property
    def z_T(self) -> Tensor:
        """The noise (B, C, h, w) at the end of the path."""
        return self.path[-1]

    def __getitem__(self, rows: slice) -> "Inverted":
        """Some of the pictures: found[:1] is the first one alone."""
        path, against = ([row[rows] for row in rows_of] for rows_of in (self.path, self.against))
        return replace(self, prompts=self.prompts[rows], path=path, against=against)


def ddim_step(zt: Tensor, eps_hat: Tensor, t: int, s: int, schedule: Schedule) -> Tensor:
    """z_s = sqrt(abar_s / abar_t) z_t + (sqrt(1 - abar_s) - sqrt(abar_s (1 - abar_t) / abar_t)) eps_hat.

    DDIM's step from t to s, in either direction.  Source: Song et al. 2021, Eq. 12 at eta = 0, and Eq. 13.
    """
    alpha_bar_t, alpha_bar_s = schedule.alpha_bar[t].item(), schedule.alpha_bar[s].item()
    back = (alpha_bar_s / alpha_bar_t) ** 0.5
    return back * zt + ((1 - alpha_bar_s) ** 0.5 - back * (1 - alpha_bar_t) ** 0.5) * eps_hat


@torch.no_grad()
def ddim_inversion(eps_model: EpsModel, z0: Tensor, schedule: Schedule, steps: int = 50, *,
                   fixed_point: int = 0) -> list[Tensor]:  # fmt: skip
    """Run DDIM backwards: [z_0, ..., z_T], the latents at 0 and at the sampler's times in rising order.

    Going back from s to t needs eps_hat at z_t, which is not known yet. DDIM inversion takes it at z_s, as if the
    network answered alike at both; `fixed_point` more evaluations insert the z_t just found, and find it again.
    Source: Song et al. 2021, section 4.3; Mokady et al. 2023, section 3.1; for the iteration Pan et al. 2023 (AIDI).
    eps_model: without guidance, since with w > 1 the error grows.  z0: (B, C, h, w).
    Raises ValueError for a negative number of evaluations.
    Derived in: notebooks/08_inversion.ipynb, section "Backwards".
    """
    if fixed_point < 0:
        raise ValueError(f"fixed_point: expected a number of further evaluations from 0 on, got {fixed_point}")
    times, path = [0, *reversed(schedule.times(steps))], [z0]
    for s, t in pairwise(times):
        zt = path[-1]
        for _ in range(1 + fixed_point):
            zt = ddim_step(path[-1], eps_model(zt, t), s, t, schedule)
        path.append(zt)
    return path


def invert(sd: StableDiffusion, images: Tensor, prompts: str | Sequence[str], *, steps: int = 50,
           fixed_point: int = 0) -> Inverted:  # fmt: skip
    """DDIM inversion of pictures under their prompts, to be redrawn at w = 1 or with guidance.

    images: (B, 3, H, W) in [-1, 1], or latents (B, C, h, w).  prompts: one for all, or one each.
    In bfloat16 the rounding of the network's answers adds up over the path: use float32 or float16.
    Raises ValueError if their numbers differ, or for pictures of another size than the model's.
    Derived in: notebooks/08_inversion.ipynb, section "Backwards".
    """
    z0, prompts = latents_of(sd, images), one_each(prompts, len(images))
    path = ddim_inversion(sd.eps_model(prompts), z0, sd.schedule, steps, fixed_point=fixed_point)
    empty = sd.encode_prompt("").expand(len(z0), -1, -1)
    return Inverted(prompts, path, steps, 1.0, [empty] * steps)


def negative_prompt_inversion(sd: StableDiffusion, inverted: Inverted, w: float = 7.5) -> Inverted:
    """Guidance moves away from the picture's own prompt: redrawn with it, both sides are equal and w has no effect.

    The closed form that null-text inversion comes near to, without any optimisation.
    Source: Miyake et al. 2023, section 3.
    Derived in: notebooks/08_inversion.ipynb, section "Null-text inversion".
    """
    own = sd.encode_prompt(inverted.prompts)
    return replace(inverted, w=w, against=[own] * inverted.steps)


def null_text_inversion(sd: StableDiffusion, inverted: Inverted, w: float = 7.5, *, updates: int = UPDATES,
                        rate: float = RATE, low_memory: bool = False,
                        progress: Callable[[int, float], None] | None = None) -> Inverted:  # fmt: skip
    """Find, for each time, features of "no prompt" with which guided DDIM stays on the inverted path.

    From t = T on: minimise || z*_s - step(z_t, w, against_t) ||^2 over against_t alone by Adam, from the solution of
    the time before; then step with it.  Source: Mokady et al. 2023, Eq. 3 and Algorithm 1. As in its code, the rate
    falls by 1 % a step, and a time is done once the mean square error is below 1e-5 + 2e-5 i at step i.
    updates: Adam's steps at each time at most; 0 leaves plain guidance.  rate: the first one.
    low_memory: compute activations twice instead of keeping them.  progress: called with (step, largest error).
    Each picture has features of its own; the pictures of a batch stop one by one.
    Raises ValueError for w at which there is no unconditional side, and for a negative number of updates.
    Derived in: notebooks/08_inversion.ipynb, section "Null-text inversion".
    """
    if w == 1 or updates < 0:
        raise ValueError(f"w, updates: expected w other than 1 and at least 0 updates, got {w}, {updates}")
    cond, against = sd.encode_prompt(inverted.prompts), sd.encode_prompt("").repeat(len(inverted.path[0]), 1, 1)
    times, zt, found = sd.schedule.times(inverted.steps), inverted.z_T, []
    for i, (t, s) in enumerate(zip(times, [*times[1:], 0])):
        target = inverted.path[-2 - i]
        with torch.no_grad():
            eps_cond = sd.unet_eps(zt, t, cond)

        def step(features: Tensor, zt=zt, t=t, s=s, eps_cond=eps_cond) -> Tensor:
            eps_uncond = sd.unet_eps(zt, t, features)
            return ddim_step(zt, guidance.combine(eps_uncond, eps_cond, w), t, s, sd.schedule)

        with sd.recomputation(low_memory):
            against = _fitted(step, against, target, updates, rate * (1 - i / 100), 1e-5 + 2e-5 * i)
        with torch.no_grad():
            zt = step(against)
        found.append(against)
        if progress:
            progress(i + 1, (zt - target).square().flatten(1).mean(1).max().item())
    return replace(inverted, w=w, against=found)


def _fitted(step: Callable[[Tensor], Tensor], start: Tensor, target: Tensor, updates: int, rate: float,
            enough: float) -> Tensor:  # fmt: skip
    """Adam on features (B, L, D) until step(features) is near the target; a picture that is near enough stays."""
    features = start.detach().clone().requires_grad_()
    optimizer = torch.optim.Adam([features], lr=rate)
    for _ in range(updates):
        errors = (step(features) - target).square().flatten(1).mean(1)  # (B,)
        far = errors.detach() >= enough
        if not far.any():
            break
        before = features.detach().clone()
        (grad,) = torch.autograd.grad(SCALE * errors.sum(), [features])
        features.grad = grad / SCALE
        optimizer.step()
        with torch.no_grad():
            features[~far] = before[~far]
    return features.detach()


@torch.no_grad()
def redraw(sd: StableDiffusion, inverted: Inverted, prompts: str | Sequence[str] | Tensor | None = None,
           w: float | None = None) -> Tensor:  # fmt: skip
    """Pictures (B, 3, H, W) from the inverted noise, with its own prompts or with others.

    w: the guidance scale; None is the one that the inversion was made for.
    Derived in: notebooks/08_inversion.ipynb, section "Backwards".
    """
    features = sd.encode_prompt(inverted.prompts if prompts is None else prompts)
    w = inverted.w if w is None else w
    eps_model = against_in_time(sd, features.expand(len(inverted.z_T), -1, -1), inverted, w)
    z0 = samplers.last(samplers.ddim(eps_model, inverted.z_T, sd.schedule, inverted.steps, clip=False))
    return sd.decode(z0)


def against_in_time(sd: StableDiffusion, features: Tensor, inverted: Inverted, w: float) -> EpsModel:
    """An eps model with guidance whose unconditional side is the inversion's own at each time.

    Raises ValueError, when it is called, at a time that the inversion did not visit.
    """
    at = dict(zip(sd.schedule.times(inverted.steps), inverted.against, strict=True))

    def eps_model(zt: Tensor, t: int) -> Tensor:
        if t not in at:
            raise ValueError(f"steps: expected {inverted.steps}, as in the inversion; it did not visit the time {t}")
        return guidance.guided(sd.unet_eps, features, w, at[t])(zt, t)

    return eps_model


def latents_of(sd: StableDiffusion, images: Tensor) -> Tensor:
    """Pictures (B, 3, H, W) encoded; latents (B, C, h, w) as they are.  Raises ValueError for another size."""
    side, channels = sd.resolution, sd.unet.config.in_channels
    if images.ndim == 4 and tuple(images.shape[1:]) == (3, side, side):
        with torch.no_grad():
            return sd.encode_image(images)
    if images.ndim == 4 and tuple(images.shape[1:]) == (channels, side // sd.factor, side // sd.factor):
        return images.to(sd.device, sd.working_dtype)
    raise ValueError(f"images: expected (B, 3, {side}, {side}) in [-1, 1] or latents (B, {channels}, "
                     f"{side // sd.factor}, {side // sd.factor}), got {tuple(images.shape)}")  # fmt: skip


def one_each(prompts: str | Sequence[str], count: int) -> list[str]:
    """One prompt for each of `count` pictures.  Raises ValueError if their numbers differ."""
    prompts = [prompts] * count if isinstance(prompts, str) else list(prompts)
    if len(prompts) != count:
        raise ValueError(f"prompts: expected one for all, or one for each of {count} pictures, got {len(prompts)}")
    return prompts
