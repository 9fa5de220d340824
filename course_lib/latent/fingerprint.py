"""Tells models apart: a concept is only good for the model that it was trained on.

Used by: notebooks/11_textual_inversion.ipynb, section "A concept is a file".
"""

import torch
from torch import Tensor

from course_lib.latent.stable_diffusion import StableDiffusion


def fingerprint(sd: StableDiffusion) -> Tensor:
    """The first number of each tensor of the UNet and the text encoder, (n,) float32: tells models apart, cheaply.

    Loaded in half precision, the same model has nearly the same numbers: compare with a tolerance.
    """
    parts = (*sd.unet.parameters(), *sd.text_encoder.parameters())
    return torch.stack([p.detach().flatten()[0].float().cpu() for p in parts])


def same_model(ours: Tensor, theirs: Tensor) -> bool:
    """Whether two fingerprints are of one model: half precision rounds, so nearly all numbers have to agree."""
    return (
        ours.shape == theirs.shape and torch.isclose(ours, theirs.float(), rtol=0.02, atol=1e-3).float().mean() > 0.95
    )
