"""SDEdit: add noise to a picture up to some time, and draw on with another prompt.

Derived in: notebooks/08_inversion.ipynb, section "Noise and draw on".
"""

import torch
from torch import Tensor

from course_lib.editing.inversion import ddim_step, latents_of, one_each
from course_lib.latent.stable_diffusion import StableDiffusion


@torch.no_grad()
def sdedit(sd: StableDiffusion, images: Tensor, prompts: str | list[str], strength: float = 0.6, *,
           w: float | None = None, steps: int = 25, negative: str = "", seed: int = 0) -> Tensor:  # fmt: skip
    """Pictures (B, 3, H, W) of the prompts that begin as the given ones with noise.

    z_t = sqrt(abar_t) z_0 + sqrt(1 - abar_t) eps at the time after (1 - strength) of the steps, then DDIM from there.
    strength: in [0, 1]; 0 gives the picture back (through the autoencoder), 1 begins at T.  images: as `invert` takes.
    Source: Meng et al. 2022, section 3; "strength" as in diffusers' image-to-image pipeline.  Differs from the paper:
    its process keeps the picture's scale and is stochastic, here z_t is the usual noised latent and DDIM draws.
    Raises ValueError for a strength outside of [0, 1], or if there are neither one prompt nor as many as pictures.
    Derived in: notebooks/08_inversion.ipynb, section "Noise and draw on".
    """
    if not 0 <= strength <= 1:
        raise ValueError(f"strength: expected a share in [0, 1], got {strength}")
    zt, times = latents_of(sd, images), sd.schedule.times(steps)
    times = times[steps - round(strength * steps) :]
    if times:
        alpha_bar = sd.schedule.at(times[0], zt)
        zt = alpha_bar.sqrt() * zt + (1 - alpha_bar).sqrt() * sd.noise(len(zt), seed=seed)
    eps_model = sd.guided(one_each(prompts, len(zt)), sd.defaults.guidance if w is None else w, negative)
    for t, s in zip(times, [*times[1:], 0]):
        zt = ddim_step(zt, eps_model(zt, t), t, s, sd.schedule)
    return sd.decode(zt)
