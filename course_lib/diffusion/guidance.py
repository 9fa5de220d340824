"""Classifier-free guidance: train one network with and without its condition, then exaggerate the difference.

Derived in: notebooks/03_classifier_free_guidance.ipynb.
"""

import torch
from torch import Tensor

from course_lib.diffusion.ddpm import EpsModel


def drop_condition(label: Tensor, null: int, p: float, generator: torch.Generator | None = None) -> Tensor:
    """Replace each label by "no label" with probability p, so that one network learns both models.

    label: (B,) ints.  null: the number that means "no label".  p: in [0, 1]; the paper uses 0.1 to 0.2.
    Returns (B,) ints.  Source: Ho & Salimans 2021, Algorithm 1.
    Derived in: notebooks/03_classifier_free_guidance.ipynb, section "One network, two models".
    """
    if not 0 <= p <= 1:
        raise ValueError(f"p: expected a probability in [0, 1], got {p}")
    drop = torch.rand(label.shape, device=label.device, generator=generator) < p
    return torch.where(drop, torch.full_like(label, null), label)


def combine(eps_uncond: Tensor, eps_cond: Tensor, w: float) -> Tensor:
    """eps_tilde = eps_uncond + w (eps_cond - eps_uncond): extrapolate from "any image" past "this class".

    eps_uncond, eps_cond: predictions of the same shape.  w: any number; 0 ignores the condition, 1 is the plain
    conditional model (no guidance), w > 1 exaggerates.
    Source: Ho & Salimans 2021, Eq. 6; the paper's w is ours minus 1, and ours is diffusers' guidance_scale.
    Derived in: notebooks/03_classifier_free_guidance.ipynb, section "The guided noise".
    """
    return eps_uncond + w * (eps_cond - eps_uncond)


def guided(model, label: Tensor, w: float, negative: Tensor | None = None) -> EpsModel:
    """An eps model that draws `label` with guidance scale w.

    model: callable (xt, t, label) -> eps_hat, like UNet; its `num_classes` is the number that means "no label".
    label: (B,) ints.  negative: (B,) labels to steer away from instead of "no label".
    At w = 1 only the condition is evaluated, at w = 0 only the other side: half the work. Otherwise both run as one
    batch.  Raises ValueError if the network was not trained with labels, or if negative has another shape than label.
    Derived in: notebooks/03_classifier_free_guidance.ipynb, section "The guided noise".
    """
    if negative is None:
        if getattr(model, "num_classes", None) is None:
            raise ValueError("model: expected a network with num_classes set (trained with labels), got one without")
        negative = torch.full_like(label, model.num_classes)
    if negative.shape != label.shape:
        raise ValueError(f"negative: expected the shape of label, {tuple(label.shape)}, got {tuple(negative.shape)}")
    if w in (0, 1):
        alone = label if w == 1 else negative
        return lambda xt, t: model(xt, t, alone)
    both = torch.cat([negative, label])

    def eps_model(xt: Tensor, t: Tensor | int) -> Tensor:
        t = torch.cat([t, t]) if torch.is_tensor(t) else t
        eps_uncond, eps_cond = model(torch.cat([xt, xt]), t, both).chunk(2)
        return combine(eps_uncond, eps_cond, w)

    return eps_model
