"""From a subject's pictures to training examples: latents, prompts and masks.

Derived in: notebooks/11_textual_inversion.ipynb, section "Five pictures".

Each picture is encoded once: the autoencoder's posterior is stored, and a batch only samples from it.
"""

import contextlib
import functools
import hashlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from course_lib import environment
from course_lib.data.pictures import captions_beside, image_sources, open_image, to_tensor
from course_lib.diffusion import samplers
from course_lib.environment import write_whole
from course_lib.latent.registry import fingerprint
from course_lib.latent.stable_diffusion import StableDiffusion

OBJECT = (
    "a photo of a {}", "a picture of a {}", "a close-up of a {}", "a {}", "an image of a {}", "a bright photo of a {}",
    "a photo of one {}", "a photo of the {}",
)  # fmt: skip
STYLE = ("a picture in the style of {}", "a drawing in the style of {}", "a photo in the style of {}", "{}")


@dataclass
class Examples:
    """Pictures ready for training: V variants (crops, flips) with prompts.

    mean, std: (V, C, h, w), of each variant's latents.  prompts: for each variant the sentences that fit it.
    mask: (V, 1, h, w), 1 where a variant shows its picture, else 0; None: 1 everywhere.
    digest: a hash of the pixels, or of the settings that they were drawn with: a saved training is tied to it.
    """

    mean: Tensor
    std: Tensor
    prompts: list[tuple[str, ...]]
    mask: Tensor | None = None
    digest: str = ""

    def __post_init__(self):
        if not len(self.mean) == len(self.std) == len(self.prompts) or not len(self.mean):
            raise ValueError(
                f"prompts: expected one entry for each of {len(self.mean)} variants, got {len(self.prompts)}"
            )
        if self.mask is not None and not self.mask.flatten(1).any(dim=1).all():
            raise ValueError("mask: expected each to have a place with 1, got an empty one: the loss would be 0 / 0")
        if not self.digest:
            self.digest = hashlib.sha256(self.mean.float().cpu().numpy().tobytes()).hexdigest()


# ---- variants, encoded once ----


@torch.no_grad()
def encode(sd: StableDiffusion, x: Tensor, prompts: list[tuple[str, ...]], mask: Tensor | None = None) -> Examples:
    """Encode pictures x (V, 3, H, W) in [-1, 1] as Examples; mask: (V, 1, H, W) in pixels."""
    means, stds, digest = [], [], hashlib.sha256()
    for part in x.split(8):
        digest.update(((part + 1) * 127.5).round().to(torch.uint8).cpu().numpy().tobytes())
        posterior = sd.vae.encode(part.to(sd.device, sd.dtype)).latent_dist
        scale = sd.vae.config.scaling_factor
        means.append(scale * posterior.mean.float())
        stds.append(scale * posterior.std.float())
    if mask is not None:  # a latent counts if all its pixels do
        digest.update(mask.to(torch.uint8).cpu().numpy().tobytes())
        mask = 1 - F.max_pool2d(1 - mask.float(), sd.factor)
        mask = mask.to(sd.device)
    return Examples(torch.cat(means), torch.cat(stds), prompts, mask, digest.hexdigest())


def subject_examples(sd: StableDiffusion, images, name: str, *, templates: Sequence[str] = OBJECT,
             captions: Sequence[str] | None = None, flip: bool = False,
             size: int | None = None) -> Examples:  # fmt: skip
    """Pictures of a subject, with prompts about `name`.

    images: see `open_images`.  name: replaces {} in the templates, such as "<v> cat".  captions: one sentence per
    picture instead, {} allowed; by default the text files beside the pictures, if there are any.
    flip: add the mirrored pictures (not for faces and lettering).  size: side in pixels, by default the model's own.
    """
    if captions is None and isinstance(images, (str, Path)) and Path(images).expanduser().is_dir():
        captions = captions_beside(images)
    images = image_sources(images)
    if captions is not None and len(captions) != len(images):
        raise ValueError(f"captions: expected one for each of the {len(images)} pictures, got {len(captions)}")
    x = torch.stack([to_tensor(open_image(image), size or sd.resolution) for image in images])
    filled = tuple(template.replace("{}", name) for template in templates)
    prompts = [(caption.replace("{}", name),) for caption in captions] if captions else [filled] * len(x)
    if flip:
        x, prompts = torch.cat([x, x.flip(-1)]), prompts * 2
    return encode(sd, x, prompts)


def resized_examples(sd: StableDiffusion, images, name: str, *, variants: int = 64, size: int | None = None,
                     seed: int = 0) -> Examples:  # fmt: skip
    """Custom Diffusion's augmentation: pictures small on grey or zoomed in, with prompts that name the size.

    After one variant of each as it is, 1 in 3 is zoomed in 1.2 to 1.4 times ("zoomed in"), and the others shrink to 0.4
    to 1.0 of the side ("very small" below 0.6, "far away" below 0.9); the grey does not count in the loss.
    Source: Kumari et al. 2023, section 4 and appendix; the numbers are those of the authors' code.
    Differs from it: `variants` are drawn once and encoded once, instead of a new one in each step.
    """
    images = image_sources(images)
    opened = functools.lru_cache(10)(lambda k: open_image(images[k]))  # many photos may not fit into memory
    size, rng = size or sd.resolution, np.random.default_rng([seed, len(images)])
    pictures, prompts, masks = [], [], []
    for k in range(max(variants, len(images))):
        share = 1.0 if k < len(images) else rng.uniform(1.2, 1.4) if rng.random() < 1 / 3 else rng.uniform(0.4, 1.0)
        side = max(sd.factor, round(share * size / sd.factor) * sd.factor)
        x, mask = to_tensor(opened(k % len(images)), side), torch.zeros(1, size, size)
        place = rng.random(2)
        if side >= size:  # a window of the enlarged picture
            top, left = (int(v) for v in place * (side - size + 1))
            picture = x[:, top : top + size, left : left + size]
            mask += 1
        else:  # on the grid of the latents, so that whole latents are valid
            top, left = (int(v) * sd.factor for v in place * ((size - side) // sd.factor + 1))
            picture = torch.zeros(3, size, size)
            picture[:, top : top + side, left : left + side] = x
            mask[:, top : top + side, left : left + side] = 1
        pictures.append(picture)
        prompts.append(tuple(_say_size(template.replace("{}", name), share) for template in OBJECT))
        masks.append(mask)
    return encode(sd, torch.stack(pictures), prompts, torch.stack(masks))


def _say_size(prompt: str, share: float) -> str:
    if share > 1:
        return f"{prompt} zoomed in"
    if share < 0.6:
        return f"{prompt} very small"
    return f"{prompt} far away" if share < 0.9 else prompt


# ---- class images that the model draws, for prior preservation ----


@torch.no_grad()
def generated_examples(sd: StableDiffusion, prompt: str, count: int = 100, *, w: float = 5.0, steps: int = 25,
                       seed: int = 0, folder: str | Path | None = None) -> Examples:  # fmt: skip
    """Draw `count` pictures for a prompt and save their latents in a file, which later calls reuse.

    Training needs only the latents, so they are not decoded.
    Source: Ruiz et al. 2023, section 3.3.  w, steps: of the guided DDIM sampler.
    folder: of the file; default the course's cache.
    """
    folder = Path(folder) if folder else environment.cache_dir() / "prior"
    key = f"{fingerprint(sd).tolist()} {prompt} w{w} steps{steps} seed{seed}"
    digest = hashlib.sha256(key.encode()).hexdigest()
    path = folder / f"{digest[:16]}.safetensors"
    have = torch.empty(0)
    if path.is_file():
        with contextlib.suppress(SafetensorError, KeyError):  # a damaged file is drawn again
            have = load_file(path)["z0"]
    if len(have) < count:
        eps_model, parts = sd.guided(prompt, w), [have] if len(have) else []
        for k in range(len(have), count, 8):
            x_T = torch.cat([sd.noise(1, seed=seed * 1_000_003 + i) for i in range(k, min(k + 8, count))])
            parts.append(samplers.last(samplers.ddim(eps_model, x_T, sd.schedule, steps, clip=False)).cpu())
        have = torch.cat(parts)
        try:
            with write_whole(path) as temporary:
                save_file({"z0": have}, temporary, metadata={"prompt": prompt})
        except (OSError, SafetensorError) as error:
            warnings.warn(f"{path} cannot be written ({error}); the pictures will be drawn again", stacklevel=2)
    z0 = have[:count].to(sd.device)
    return Examples(z0, torch.zeros_like(z0), [(prompt,)] * count, digest=f"{digest} {count}")
