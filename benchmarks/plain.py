"""The plain way to personalize, as the usual training scripts do it; benchmarks/personalization.py compares with it."""

import argparse
import contextlib
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from common import (
    METHODS,
    NOUN,
    SUBJECT,
    base_model,
    draw_prior,
    draw_regularisation,
    own_settings,
    plain_dtype,
)
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from course_lib.data.pictures import to_tensor
from course_lib.diffusion.ddpm import loss_per_picture, step_generator
from course_lib.latent.stable_diffusion import StableDiffusion
from course_lib.personalization import custom_diffusion, lora
from course_lib.personalization.examples import OBJECT
from course_lib.personalization.recipe import Settings


@dataclass
class View:
    """A picture's file, its size and place in the square, and its sentences."""

    path: Path
    prompts: tuple[str, ...]
    share: float = 1.0
    place: tuple[float, float] = (0.0, 0.0)

    def open(self, size: int, factor: int) -> tuple[Tensor, Tensor]:
        """Decode, resize and place it: (3, size, size) in [-1, 1], and the mask (1, size, size) of what it covers."""
        side = max(factor, round(self.share * size / factor) * factor)
        with Image.open(self.path) as file:
            x = to_tensor(file.convert("RGB"), side)
        if side >= size:
            top, left = (int(v * (side - size + 1)) for v in self.place)
            return x[:, top : top + size, left : left + size], torch.ones(1, size, size)
        top, left = (int(v * ((size - side) // factor + 1)) * factor for v in self.place)
        picture, mask = torch.zeros(3, size, size), torch.zeros(1, size, size)
        picture[:, top : top + side, left : left + side] = x
        mask[:, top : top + side, left : left + side] = 1
        return picture, mask


def subject_views(method: str, settings: Settings, augment: bool, variants: int = 64) -> list[View]:
    """The subject's pictures under the method's sentences; augment: small and zoomed in, too (Custom Diffusion)."""
    files, token = sorted(SUBJECT.glob("*.png")), METHODS[method].token
    name = token if method == "textual-inversion" else f"{token} {NOUN}"
    templates = OBJECT if method in ("textual-inversion", "custom-diffusion") else ("a photo of a {}",)
    if method != "custom-diffusion" or not augment:
        return [View(file, tuple(text.replace("{}", name) for text in templates)) for file in files]
    views, rng = [], np.random.default_rng([settings.seed, len(files)])
    for k in range(max(variants, len(files))):
        share = 1.0 if k < len(files) else rng.uniform(1.2, 1.4) if rng.random() < 1 / 3 else rng.uniform(0.4, 1.0)
        words = " zoomed in" if share > 1 else " very small" if share < 0.6 else " far away" if share < 0.9 else ""
        prompts = tuple(text.replace("{}", name) + words for text in templates)
        views.append(View(files[k % len(files)], prompts, share, tuple(rng.random(2))))
    return views


class Plain:
    """A training as the usual scripts have it: from one step to the next it keeps files, and nothing else.

    params: name -> what is saved, as in `Recipe.params`.  others: [(path, prompt), ...] of prior pictures.
    augment: as in `custom_diffusion.recipe`.
    """

    def __init__(self, sd: StableDiffusion, method: str, settings: Settings, others: list, augment: bool | None = None):
        self.sd, self.method, self.table = sd, method, None
        self.terms = [subject_views(method, settings, sd.defaults.augment if augment is None else augment)]
        if others:
            self.terms.append([View(path, (prompt,)) for path, prompt in others])
        self.params = {}
        if method in ("textual-inversion", "custom-diffusion"):
            self.params["tokens"] = self.add_word(METHODS[method].token, NOUN)
        if method == "dreambooth":
            self.params |= {f"unet.{name}": param for name, param in sd.unet.named_parameters()}
        elif method == "lora":
            self.undo = contextlib.ExitStack()  # never closed: the model is not used for anything else
            rank = lora.RANK[sd.defaults.settings]
            self.params |= self.undo.enter_context(lora.attach({"unet": sd.unet}, rank, settings.seed))
        elif method == "custom-diffusion":
            for name, layer in custom_diffusion.key_value_layers(sd.unet).items():
                self.params[f"unet.{name}.weight"] = layer.weight
                layer.register_forward_hook(lambda _, __, out: torch.cat([out[:, :1].detach(), out[:, 1:]], dim=1))
        for param in self.params.values():
            param.data = param.data.float()
            param.requires_grad_(True)
        if self.table is not None:
            self.before = self.table.detach().clone()
        self.new_optimizer(settings)

    def add_word(self, token: str, noun: str) -> Tensor:
        """One row more in the embedding matrix, all of which is trained."""
        tokenizer, encoder = self.sd.tokenizer, self.sd.text_encoder
        ids = tokenizer(noun, add_special_tokens=False).input_ids
        tokenizer.add_tokens([token])
        self.table = encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False).weight
        self.table.data[-1] = self.table.data[ids].mean(dim=0)
        self.others = torch.arange(len(self.table), device=self.table.device) < len(self.table) - 1
        return self.table

    def new_optimizer(self, settings: Settings) -> None:
        """A new optimizer, at step 0."""
        self.settings, self.step, params = settings, 0, list(self.params.values())
        rates = dict(lr=settings.lr, weight_decay=settings.weight_decay)
        self.optimizer = torch.optim.AdamW(params, **rates, fused=False)
        self.scaler = torch.amp.GradScaler(self.sd.device.type, enabled=self.sd.dtype == torch.float16)

    @torch.no_grad()
    def batch(self, step: int) -> list[dict]:
        """A batch of each term, opened, resized and encoded; the draws are those of `finetune.draw_step`."""
        sd, count = self.sd, self.settings.batch_size
        generator, draws = step_generator(self.settings.seed, step), []
        for views in self.terms:
            V = len(views)
            rows = torch.cat([torch.randperm(V, generator=generator) for _ in range(-(-count // V))])[:count].tolist()
            which = torch.rand(count, generator=generator).tolist()
            prompts = [views[r].prompts[int(w * len(views[r].prompts))] for r, w in zip(rows, which, strict=True)]
            opened = [views[row].open(sd.resolution, sd.factor) for row in rows]
            x, mask = (torch.stack(parts).to(sd.device) for parts in zip(*opened, strict=True))
            posterior = sd.vae.encode(x.to(sd.dtype)).latent_dist
            noise = torch.randn(posterior.mean.shape, generator=generator).to(sd.device)
            z0 = sd.vae.config.scaling_factor * (posterior.mean.float() + posterior.std.float() * noise)
            t = torch.randint(1, sd.schedule.T + 1, (count,), generator=generator).to(sd.device)
            eps = torch.randn(z0.shape, generator=generator).to(sd.device)
            mask = 1 - F.max_pool2d(1 - mask, sd.factor)
            draws.append(dict(z0=z0, prompts=prompts, mask=mask, t=t, eps=eps))
        return draws

    def loss(self, draws: list[dict]) -> Tensor:
        """The terms concatenated; every prompt goes through the text encoder, however often it occurs."""

        def join(key: str) -> Tensor:
            return torch.cat([draw[key] for draw in draws])

        with torch.set_grad_enabled(self.table is not None):
            context = self.sd.encode_prompt([prompt for draw in draws for prompt in draw["prompts"]])

        def eps_model(zt: Tensor, t: Tensor) -> Tensor:
            return self.sd.unet_eps(zt, t, context)

        kind = self.settings.weighting or self.sd.weighting
        errors = loss_per_picture(eps_model, join("z0"), join("t"), join("eps"), self.sd.schedule, kind, join("mask"))
        return sum(part.mean() for part in errors.split(self.settings.batch_size))

    def __call__(self) -> float:
        """One step; its loss is read at once, as a progress bar does."""
        self.step += 1
        loss, s = self.loss(self.batch(self.step)), self.settings
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.params.values(), s.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = s.lr * min(1.0, self.step / (s.warmup or 1))
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        if self.table is not None:  # gradient and weight decay have moved every row: put the others back
            with torch.no_grad():
                self.table[self.others] = self.before[self.others]
        return loss.item()

    def save(self, path: Path) -> None:
        tensors = {name: param.detach().cpu().contiguous() for name, param in self.params.items()}
        if self.table is not None:
            tensors["tokens"] = tensors["tokens"][-1:].clone()
        save_file(tensors, path)


def train_plain(args: argparse.Namespace) -> None:
    """A plain training script, from its start to its file."""
    settings = Settings(**args.settings) if args.settings else own_settings(args, args.plain)
    settings = settings if args.train_steps is None else replace(settings, steps=args.train_steps)
    sd = base_model(args, plain_dtype(args))
    with tempfile.TemporaryDirectory() as folder:
        others = []
        if args.plain == "dreambooth" and args.prior:
            others = draw_prior(sd, Path(folder), args.prior, args.seed)
        elif args.plain == "custom-diffusion" and args.prior and sd.defaults.toybox_world:
            others = draw_regularisation(sd, Path(folder), args.prior)
        training = Plain(sd, args.plain, settings, others)
        for _ in range(settings.steps):
            training()
        training.save(args.out)
    print(f"wrote {args.out}")
