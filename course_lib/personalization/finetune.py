"""One training loop for all methods of personalization.

Derived in: notebooks/11_textual_inversion.ipynb, section "The loop".
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn

from course_lib.diffusion.ddpm import loss_per_picture, step_generator
from course_lib.latent.stable_diffusion import StableDiffusion
from course_lib.personalization.examples import Examples
from course_lib.personalization.recipe import Recipe, Settings
from course_lib.personalization.state import keep_state, load_state

# ---- the loss ----


class PromptFeatures:
    """prompts -> (B, L, D).

    Caches prompts that training cannot affect; encodes each other distinct prompt once per step.
    """

    def __init__(self, sd: StableDiffusion, recipe: Recipe):
        self.sd, self.recipe, self.cache = sd, recipe, {}

    def _fixed(self, prompt: str) -> bool:
        tokens = self.recipe.tokens.tokens if self.recipe.tokens else ()
        return not self.recipe.trains_text and not any(token in prompt.lower() for token in tokens)

    def __call__(self, prompts: list[str]) -> Tensor:
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self.cache]
        fixed, moving = [p for p in new if self._fixed(p)], [p for p in new if not self._fixed(p)]
        if fixed:
            with torch.no_grad():
                self.cache |= dict(zip(fixed, self.sd.encode_prompt(fixed), strict=True))
        now = dict(zip(moving, self.sd.encode_prompt(moving), strict=True)) if moving else {}
        return torch.stack([now[p] if p in now else self.cache[p] for p in prompts])


@dataclass
class Draw:
    """The random numbers of one step for one term.

    z0: (B, C, h, w).  prompts: B strings.  mask: (B, 1, h, w).  t: (B,) in 1..T.  eps: as z0.  weight: lambda.
    """

    z0: Tensor
    prompts: list[str]
    mask: Tensor
    t: Tensor
    eps: Tensor
    weight: float

    def part(self, rows: slice) -> "Draw":
        """Some of its pictures: for one process, or for one part of an accumulated step."""
        z0, prompts, mask, t, eps = (x[rows] for x in (self.z0, self.prompts, self.mask, self.t, self.eps))
        return Draw(z0, prompts, mask, t, eps, self.weight)


def draw_step(sd: StableDiffusion, recipe: Recipe, count: int, step: int) -> list[Draw]:
    """All random numbers of a step, for all processes: `count` pictures of each term, their times and noises.

    They depend on (seed, step) alone, not on earlier steps; all processes make the same draw and share it.
    """
    generator, draws = step_generator(recipe.settings.seed, step), []
    for term in recipe.terms:
        z0, prompts, mask = draw_pictures(term.examples, count, generator)
        t = torch.randint(1, sd.schedule.T + 1, (count,), generator=generator).to(z0.device, non_blocking=True)
        eps = torch.randn(z0.shape, generator=generator).to(z0.device, non_blocking=True)
        draws.append(Draw(z0, prompts, mask, t, eps, term.weight))
    return draws


def draw_pictures(examples: Examples, count: int, generator: torch.Generator) -> tuple[Tensor, list[str], Tensor]:
    """Draw z0 ~ N(mean, std^2) (count, C, h, w), a prompt each, and masks (count, 1, h, w).

    It repeats a variant only after all others.  generator: on the CPU, so that a seed gives one batch everywhere.
    """
    V, device = len(examples.mean), examples.mean.device
    rows = torch.cat([torch.randperm(V, generator=generator) for _ in range(-(-count // V))])[:count]
    shares = torch.rand(count, generator=generator).tolist()
    choices = [examples.prompts[row] for row in rows.tolist()]
    prompts = [some[int(share * len(some))] for share, some in zip(shares, choices, strict=True)]
    noise = torch.randn(count, *examples.mean.shape[1:], generator=generator).to(device, non_blocking=True)
    rows = rows.to(device, non_blocking=True)
    z0 = examples.mean[rows] + examples.std[rows] * noise
    return z0, prompts, torch.ones_like(z0[:, :1]) if examples.mask is None else examples.mask[rows]


def denoising_loss(sd: StableDiffusion, draws: list[Draw], features: PromptFeatures,
                   weighting: str | None = None) -> Tensor:  # fmt: skip
    """sum_k lambda_k mean_i || eps_i - eps_theta(z_t,i, t_i, c_i) ||^2, all terms in one pass through the UNet.

    draws: one for each term.  The loss of one picture is notebook 01's; with masks it is the mean where they are 1.
    weighting: as in `Settings`. The Toybox model predicts v; its plain eps loss would scale with alpha_bar_t and
    barely train large t, where layout forms.
    """
    z0, t, eps, mask = (torch.cat([getattr(draw, name) for draw in draws]) for name in ("z0", "t", "eps", "mask"))
    context = features([prompt for draw in draws for prompt in draw.prompts])

    def eps_model(zt: Tensor, t: Tensor) -> Tensor:
        return sd.unet_eps(zt, t, context)

    losses = loss_per_picture(eps_model, z0, t, eps, sd.schedule, weighting or sd.weighting, mask)
    parts = losses.split([len(draw.z0) for draw in draws])
    return sum(draw.weight * part.mean() for draw, part in zip(draws, parts, strict=True))


# ---- the loop ----


def finetune(sd: StableDiffusion, recipe: Recipe, *, checkpoint: str | Path | None = None, save_every: int = 100,
             accelerator: Accelerator | None = None) -> Iterator[tuple[int, Tensor]]:  # fmt: skip
    """Train a recipe; yields (step, loss) after each step, so that the caller can plot, sample, save or stop.

    The loss stays on its device: read it rarely, since reading waits for the device.
    checkpoint: a file; the state is written there every `save_every` steps, at the end, and when the caller leaves
    the loop; a later call continues from it, bit for bit.  accelerator: for several processes (`accelerate launch`); by
    default one process, in the model's precision.
    Raises FloatingPointError if the loss is not a number, RuntimeError if memory is short, ValueError if the
    checkpoint is of another training; the checkpoint on disk stays valid.
    Derived in: notebooks/11_textual_inversion.ipynb, section "The loop".
    """
    s, params = recipe.settings, list(recipe.params.values())
    accelerator = accelerator or _accelerator(sd)
    optimizer = accelerator.prepare_optimizer(_optimizer(s, params))
    features, done, checked = PromptFeatures(sd, recipe), 0, torch.zeros((), device=sd.device)
    path = Path(checkpoint) if checkpoint else None
    if path and path.is_file():
        done = load_state(path, recipe, optimizer, accelerator)
    with sd.recomputation(s.gradient_checkpointing), _quick_attention(sd):
        for step in range(done + 1, s.steps + 1):
            loss = _backward(sd, recipe, features, accelerator, step)
            norm = accelerator.clip_grad_norm_(params, s.clip)
            for group in optimizer.param_groups:
                group["lr"] = s.lr * min(1.0, step / (s.warmup or 1))
            checked = checked + loss + (0 if accelerator.scaler else 0 * norm)  # a scaler skips infinite gradients
            saves = bool(path) and (step % save_every == 0 or step == s.steps)
            if step % 20 == 0 or step == s.steps or saves:
                _check_finite(checked, step, path)  # before it reaches the weights
            _within_memory(optimizer.step)
            optimizer.zero_grad(set_to_none=True)
            if saves:
                keep_state(path, recipe, optimizer, accelerator, step)
            try:
                yield step, loss
            except GeneratorExit:  # the caller leaves the loop here, and may want to go on later
                trainable = all(param.requires_grad for param in params)  # False once the recipe is closed
                if path and not saves and trainable and torch.isfinite(checked):
                    keep_state(path, recipe, optimizer, accelerator, step)
                raise


def _backward(sd: StableDiffusion, recipe: Recipe, features: PromptFeatures, accelerator: Accelerator,
              step: int) -> Tensor:  # fmt: skip
    """Compute the gradients of one step, over its parts and over all processes; returns its loss."""
    s, processes, rank = recipe.settings, accelerator.num_processes, accelerator.process_index
    draws, size, total = draw_step(sd, recipe, s.batch_size * processes, step), s.batch_size // s.accumulate, 0.0
    for part in range(s.accumulate):
        start = (part * processes + rank) * size
        shard = [draw.part(slice(start, start + size)) for draw in draws]
        loss = _within_memory(denoising_loss, sd, shard, features, s.weighting) / s.accumulate
        _within_memory(accelerator.backward, loss)
        total = total + loss.detach()
    if processes > 1:
        for param in recipe.params.values():  # no prompt in this process may have used the token: its grad is None
            grad = torch.zeros_like(param) if param.grad is None else param.grad
            param.grad = accelerator.reduce(grad, "mean")
    return total


def _accelerator(sd: StableDiffusion) -> Accelerator:
    """float16 needs accelerate's loss scaling; for bfloat16 the model's own autocast is enough."""
    return Accelerator(mixed_precision="fp16" if sd.dtype == torch.float16 else "no", cpu=sd.device.type == "cpu")


def _optimizer(s: Settings, params: list[nn.Parameter]) -> torch.optim.Optimizer:
    if s.optimizer == "adamw8bit":
        try:
            from bitsandbytes.optim import AdamW8bit
        except ImportError:
            raise ValueError("optimizer: 'adamw8bit' needs bitsandbytes: pip install bitsandbytes") from None
        return AdamW8bit(params, lr=s.lr, weight_decay=s.weight_decay)
    fused = params[0].device.type != "mps"  # one kernel for all weights
    return torch.optim.AdamW(params, lr=s.lr, weight_decay=s.weight_decay, fused=fused)


@contextlib.contextmanager
def _quick_attention(sd: StableDiffusion) -> Iterator[None]:
    """On a CPU in bfloat16, use plain products: the backward pass of torch's fused attention is slow there.

    Their (L, L) tables would be too large for latents of Stable Diffusion's size, for which nothing is changed.
    """
    plain = sd.device.type == "cpu" and sd.dtype == torch.bfloat16 and sd.unet.config.sample_size <= 32
    before = dict(sd.unet.attn_processors)
    if plain:
        sd.unet.set_attn_processor(AttnProcessor())
    try:
        yield
    finally:
        if plain:
            sd.unet.set_attn_processor(before)


def _within_memory(function, *args):
    try:
        return function(*args)
    except torch.OutOfMemoryError:
        raise RuntimeError(
            "the device's memory is too small for a step: try gradient_checkpointing=True, a smaller batch_size, "
            'optimizer="adamw8bit", or half precision (load(..., dtype=torch.float16))'
        ) from None


def _check_finite(total: Tensor, step: int, path: Path | None) -> None:
    if not torch.isfinite(total):
        rest = f"{path} holds the last good state" if path and path.is_file() else "no state was saved yet"
        raise FloatingPointError(
            f"the loss is not a number at step {step}; {rest}. Start again with a smaller lr or weighting='min_snr'"
        )
