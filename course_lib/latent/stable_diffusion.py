"""Stable Diffusion as one object of text encoder, autoencoder and UNet, for the Toybox model and the published ones.

Derived in: notebooks/06_stable_diffusion.ipynb, sections "The parts" and "The loop".

The three networks come from diffusers and transformers; the code that joins them is this course's own. Only the
networks compute in `dtype`; the rest is float32. This is the only file that loads diffusers' models.
"""

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import logging as diffusers_logging
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer
from transformers.utils import logging as transformers_logging

from course_lib import environment
from course_lib.diffusion import guidance, samplers, schedule
from course_lib.diffusion.ddpm import EpsModel, eps_from_v
from course_lib.latent import registry, text

SD1_NOISE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000,
             "prediction_type": "epsilon"}  # fmt: skip
SHORT_OF_MEMORY = 8 * 2**30  # bytes free on a GPU


class StableDiffusion:
    """The parts of a latent diffusion model, and the calls that join them.

    vae, unet, text_encoder, tokenizer: as diffusers and transformers make them; they are frozen, in evaluation mode.
    noise: the settings of a diffusers scheduler (beta_schedule, beta_start, ...); the default is Stable Diffusion 1's.
    Attributes: these parts, `schedule`, `device`, `dtype`, `name`, `source` (the folder that it was read from) and
    `defaults` (the settings that suit it).
    Raises ValueError for a noise schedule or a prediction type that this course does not use.
    Derived in: notebooks/06_stable_diffusion.ipynb, section "The parts".
    """

    def __init__(self, vae, unet, text_encoder, tokenizer, *, noise: dict = SD1_NOISE, name: str = "custom",
                 source: Path | None = None, defaults: registry.Defaults | None = None):  # fmt: skip
        self.noise_settings = {key: noise.get(key, default) for key, default in SD1_NOISE.items()}
        if self.noise_settings["prediction_type"] not in ("epsilon", "v_prediction"):
            raise ValueError("noise: expected a model with prediction_type 'epsilon' or 'v_prediction', got "
                             f"{noise['prediction_type']!r}")  # fmt: skip
        self.schedule = _schedule(self.noise_settings)
        self.vae, self.unet, self.text_encoder, self.tokenizer = vae, unet, text_encoder, tokenizer
        self.name, self.source = name, source
        self.defaults = defaults or registry.Defaults()
        for part in (vae, unet, text_encoder):
            part.eval().requires_grad_(False)
        self.to(unet.device, unet.dtype)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "StableDiffusion":
        """Move all networks to a device, a dtype or both; returns self."""
        self.device = torch.device(device or self.device)
        self.dtype = dtype or self.dtype
        for part in (self.vae, self.unet, self.text_encoder):
            nn.Module.to(part, self.device, self.dtype)  # diffusers' own `to` warns of float32 modules
        return self

    def autocast(self) -> torch.autocast:
        """In half precision, weights that are trained stay float32, and their layers still compute in `dtype`."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype in (torch.bfloat16, torch.float16))

    @contextmanager
    def recomputation(self, on: bool = True) -> Iterator[None]:
        """Inside, the UNet's backward pass computes each block's activations again, which saves memory.

        diffusers' gradient checkpointing needs training mode, which changes nothing else: the UNet has no dropout.
        """
        if on:
            self.unet.enable_gradient_checkpointing()
            self.unet.train()
        try:
            yield
        finally:
            if on:
                self.unet.disable_gradient_checkpointing()
                self.unet.eval()

    @property
    def working_dtype(self) -> torch.dtype:
        """The dtype between the networks: float32, and float64 where they compute in float64."""
        return torch.promote_types(self.dtype, torch.float32)

    @property
    def weighting(self) -> str:
        """The weighting of `loss_per_picture` that gives this network's own mean square error: "eps" or "v"."""
        return "eps" if self.noise_settings["prediction_type"] == "epsilon" else "v"

    @property
    def factor(self) -> int:
        """Pixels per latent along a side, diffusers' vae_scale_factor: 8 in Stable Diffusion 1."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def resolution(self) -> int:
        """The side of the training pictures in pixels: 512 for Stable Diffusion 1, 64 for the Toybox model."""
        return self.unet.config.sample_size * self.factor

    def encode_prompt(self, prompts: str | list[str] | Tensor) -> Tensor:
        """Features of prompts (prompt embeddings): (B, L, D) float32. Features are returned as given.

        Derived in: notebooks/06_stable_diffusion.ipynb, section "The parts".
        """
        if not torch.is_tensor(prompts):
            ids = text.tokenize(self.tokenizer, prompts)
            with self.autocast():
                return text.encode(self.text_encoder, ids).to(self.working_dtype)
        width = self.unet.config.cross_attention_dim
        if prompts.ndim != 3 or prompts.shape[-1] != width:
            raise ValueError(f"prompts: expected strings or (B, L, {width}) features, got {tuple(prompts.shape)}")
        return prompts.to(self.device)

    def encode_image(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """z0 = scaling_factor * z, z ~ N(mean(x), std(x)^2), or z = mean(x) without a generator.

        images: (B, 3, H, W) in [-1, 1], H and W multiples of `factor`.  Returns (B, C, H/factor, W/factor).
        Source: Rombach et al. 2022, section 3.1 and appendix G.
        Derived in: notebooks/04_autoencoder.ipynb, section "The scaling factor".
        """
        f = self.factor
        if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] % f or images.shape[3] % f:
            raise ValueError(f"images: expected (B, 3, H, W), H and W multiples of {f}, got {tuple(images.shape)}")
        z = self.vae.encode(images.to(self.device, self.dtype)).latent_dist
        z = z.mode() if generator is None else z.sample(generator)
        return self.vae.config.scaling_factor * z.to(self.working_dtype)

    def decode(self, z0: Tensor) -> Tensor:
        """Latents (B, C, h, w) back to images (B, 3, factor * h, factor * w), clamped to [-1, 1].

        Derived in: notebooks/04_autoencoder.ipynb, section "The scaling factor".
        """
        z = z0.to(self.device) / self.vae.config.scaling_factor
        return self.vae.decode(z.to(self.dtype)).sample.to(self.working_dtype).clamp(-1, 1)

    def unet_eps(self, zt: Tensor, t: Tensor | int, features: Tensor) -> Tensor:
        """eps_hat of the UNet at our t in 1..T; diffusers counts from 0, so it gets t - 1, here and nowhere else.

        A network that predicts v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) z_0, as the Toybox model does (and Stable
        Diffusion 2 at 768 pixels), is converted: eps = sqrt(1 - alpha_bar) z_t + sqrt(alpha_bar) v.
        Source: Salimans & Ho 2022, appendix D.
        zt: (B, C, h, w).  t: an int or (B,).  features: (N, L, D), each for B / N latents in a row.
        """
        t = t if torch.is_tensor(t) else torch.full((len(zt),), t, device=self.device)
        features = _repeat(features, len(zt))
        with self.autocast():
            output = self.unet(zt.to(self.dtype), t - 1, encoder_hidden_states=features.to(self.dtype)).sample
        output = output.to(self.working_dtype)
        if self.noise_settings["prediction_type"] == "epsilon":
            return output
        return eps_from_v(zt, t, output, self.schedule)

    def eps_model(self, prompts: str | list[str] | Tensor) -> EpsModel:
        """(zt, t) -> eps_hat for prompts or features, without guidance; gradients flow, unless switched off.

        Derived in: notebooks/06_stable_diffusion.ipynb, section "The loop".
        """
        features = self.encode_prompt(prompts)
        return lambda zt, t: self.unet_eps(zt, t, features)

    def guided(self, prompts: str | list[str] | Tensor, w: float = 7.5,
               negative: str | list[str] | Tensor = "") -> EpsModel:  # fmt: skip
        """(zt, t) -> eps_neg + w (eps_cond - eps_neg), both sides in one batch; at w = 1 and w = 0 only one side.

        negative: negative prompts, one for all or one each, or features; "" is plain guidance.
        Source: Ho & Salimans 2021, Eq. 6, with `guidance.combine`'s w, diffusers' guidance_scale.
        Derived in: notebooks/06_stable_diffusion.ipynb, sections "The loop" and "Negative prompts".
        """
        features, against = self.encode_prompt(prompts), self.encode_prompt(negative)
        return guidance.guided(self.unet_eps, features, w, _repeat(against, len(features)))

    def noise(self, count: int, generator: torch.Generator | None = None, *, seed: int | None = None,
              size: int | None = None) -> Tensor:  # fmt: skip
        """x_T ~ N(0, I): (count, C, h, w) float32, drawn on the CPU, so that a seed gives one picture on all devices.

        generator: on the CPU; or a seed.  size: the picture's side in pixels (default: `resolution`).
        """
        if seed is not None:
            generator = torch.Generator().manual_seed(seed)
        side = self.unet.config.sample_size if size is None else size // self.factor
        return torch.randn(count, self.unet.config.in_channels, side, side, generator=generator).to(self.device)

    @torch.no_grad()
    def sample(self, prompts: str | list[str] | Tensor, *, w: float = 7.5, steps: int = 25,
               negative: str | list[str] | Tensor = "", seed: int = 0, sampler=samplers.ddim, eta: float = 0.0,
               x_T: Tensor | None = None, batch: int = 8) -> Tensor:  # fmt: skip
        """Images (B, 3, H, W) in [-1, 1] for prompts: draw noise, run a sampler with guidance, decode.

        w: guidance_scale.  steps: num_inference_steps.  seed: of all noise.  x_T: (B, C, h, w), the starting noise, for
        N prompts B / N pictures each.  sampler: of `samplers`; eta: for ddim only.  batch: pictures at a time.
        Derived in: notebooks/06_stable_diffusion.ipynb, section "The loop".
        """
        features = self.encode_prompt(prompts)
        x_T = (self.noise(len(features), seed=seed) if x_T is None else x_T).to(self.device, self.working_dtype)
        features = _repeat(features, len(x_T))
        against = _repeat(self.encode_prompt(negative), len(x_T))
        options = {"clip": False, "generator": torch.Generator(self.device).manual_seed(seed)}
        if eta:
            options["eta"] = eta
        images = []
        for xt, cond, uncond in zip(x_T.split(batch), features.split(batch), against.split(batch)):
            eps_model = self.guided(cond, w, uncond)
            images.append(self.decode(samplers.last(sampler(eps_model, xt, self.schedule, steps, **options))))
        return torch.cat(images)

    def to_pipeline(self) -> StableDiffusionPipeline:
        """The same model, sharing these parts, as a stock diffusers pipeline that draws the same pictures.

        The pictures are equal if steps divides T: otherwise diffusers' DDIM steps to t - floor(T / steps), which is not
        exactly the time that it visits next.
        """
        scheduler = DDIMScheduler(
            **self.noise_settings, clip_sample=False, set_alpha_to_one=True, steps_offset=1, timestep_spacing="trailing"
        )
        return StableDiffusionPipeline(
            vae=self.vae, unet=self.unet, text_encoder=self.text_encoder, tokenizer=self.tokenizer,
            scheduler=scheduler, safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        )  # fmt: skip

    def save(self, folder: str | Path, dtype: torch.dtype = torch.float16, max_shard_size: str = "10GB") -> None:
        """Write a folder that `load` and stock diffusers open: safetensors in `dtype`, at most `max_shard_size` a file.

        Raises ValueError if new tokens are attached: they are not part of the format, and would be lost silently.
        """
        if not isinstance(self.text_encoder.get_input_embeddings(), nn.Embedding):
            raise ValueError("text_encoder: expected one without new tokens; detach them first, and save their rows")
        parts = {key: copy.deepcopy(getattr(self, key)) for key in ("vae", "unet", "text_encoder")}
        saved = StableDiffusion(**parts, tokenizer=self.tokenizer, noise=self.noise_settings)
        pipe = saved.to("cpu", dtype).to_pipeline()
        pipe.save_pretrained(folder, safe_serialization=True, max_shard_size=max_shard_size)
        # transformers opens a model in the dtype of its file, diffusers in float32: a pipeline needs one dtype.
        config = Path(folder) / "text_encoder" / "config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), "dtype": "float32"}, indent=2) + "\n")


def load(name: str | Path = "toybox", device: torch.device | str | None = None, dtype: torch.dtype | None = None, *,
         low_memory: bool | None = None) -> StableDiffusion:  # fmt: skip
    """Read a model: "toybox", "sd15", a folder in diffusers' format, or a hub id; only hub models use the network.

    device: default `environment.device()`.  dtype: default float32; on CUDA bfloat16, or float16 on older GPUs.
    low_memory: compute attention in slices and the autoencoder in tiles; by default on MPS, and on a GPU with less
    than 8 GiB free.  Raises what `registry.resolve` and `registry.fetch` raise.
    Derived in: notebooks/06_stable_diffusion.ipynb, section "The parts".
    """
    device = torch.device(device or environment.device())
    dtype = dtype or _default_dtype(device)
    half = dtype in (torch.float16, torch.bfloat16)
    entry = registry.resolve(name)
    folder = registry.fetch(entry, half)
    options = {"local_files_only": True, "use_safetensors": True, "variant": registry.variant(folder, half)}
    with _no_progress_bars():
        sd = StableDiffusion(
            vae=AutoencoderKL.from_pretrained(folder / "vae", **options),
            unet=UNet2DConditionModel.from_pretrained(folder / "unet", **options),
            text_encoder=CLIPTextModel.from_pretrained(folder / "text_encoder", **options),
            tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True),
            noise=DDIMScheduler.load_config(folder / "scheduler", local_files_only=True),
            name=entry.name,
            source=folder,
            defaults=entry.defaults,
        ).to(device, dtype)
    if _short_of_memory(device) if low_memory is None else low_memory:
        sd.unet.set_attention_slice("auto")
        sd.vae.enable_slicing()
        sd.vae.enable_tiling()
    return sd


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Hide the libraries' "loading weights" bars, which would stay in a saved notebook."""
    shown = [log for log in (diffusers_logging, transformers_logging) if log.is_progress_bar_enabled()]
    for log in shown:
        log.disable_progress_bar()
    try:
        yield
    finally:
        for log in shown:
            log.enable_progress_bar()


def from_pipeline(pipe: StableDiffusionPipeline, name: str = "custom") -> StableDiffusion:
    """A StableDiffusion that shares the parts of a diffusers pipeline, and freezes them."""
    return StableDiffusion(
        pipe.vae, pipe.unet, pipe.text_encoder, pipe.tokenizer, noise=dict(pipe.scheduler.config), name=name
    )


def _schedule(noise: dict) -> schedule.Schedule:
    kinds = {"scaled_linear": schedule.scaled_linear, "linear": schedule.linear}
    if noise["beta_schedule"] not in kinds:
        raise ValueError(f"noise: expected a beta_schedule of {', '.join(kinds)}, got {noise['beta_schedule']!r}")
    make = kinds[noise["beta_schedule"]]
    return make(noise["num_train_timesteps"], noise["beta_start"], noise["beta_end"], spacing="trailing")


def _repeat(features: Tensor, count: int) -> Tensor:
    """(N, L, D) -> (count, L, D): each prompt's features count / N times in a row."""
    if count % len(features):
        raise ValueError(f"prompts: expected a number that divides the {count} pictures, got {len(features)}")
    return features if count == len(features) else features.repeat_interleave(count // len(features), dim=0)


def _default_dtype(device: torch.device) -> torch.dtype:
    return environment.quick_dtype(device) if device.type == "cuda" else torch.float32


def _short_of_memory(device: torch.device) -> bool:
    return device.type == "mps" or (device.type == "cuda" and torch.cuda.mem_get_info(device)[0] < SHORT_OF_MEMORY)
