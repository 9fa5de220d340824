"""One training loop for all methods of personalization.

Derived in: notebooks/11_textual_inversion.ipynb, section "The loop".

All methods minimise, over a set S of tensors,
    sum_k lambda_k E || eps - eps_theta(z_t, t, c(prompt)) ||^2,   (z_0, prompt) ~ D_k.
A method is only S, `Recipe.params`, and the pairs (lambda_k, D_k), `Recipe.terms`. Prior preservation is a term.
"""

import contextlib
import os
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn

from course_lib.diffusion.ddpm import noise_errors
from course_lib.environment import send
from course_lib.latent.stable_diffusion import StableDiffusion
from course_lib.latent.text import NewTokens
from course_lib.personalization.concept import Examples, fingerprint, same_model


@dataclass
class Settings:
    """How to train; every recipe comes with values that suit it.

    batch_size: pictures of each term, per step and process, in `accumulate` parts.
    weighting: see `noise_errors`; None: the one that the model was trained with, so "v" for one that predicts v.
    optimizer: "adamw", or "adamw8bit" (CUDA, needs bitsandbytes).  warmup: steps over which the rate rises.
    gradient_checkpointing: compute activations twice instead of keeping them.
    """

    steps: int
    lr: float
    batch_size: int = 4
    accumulate: int = 1
    weighting: str | None = None
    optimizer: str = "adamw"
    weight_decay: float = 1e-2
    clip: float = 1.0
    warmup: int = 0
    gradient_checkpointing: bool = False
    seed: int = 0

    def __post_init__(self):
        for name in ("steps", "batch_size", "accumulate"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: expected a whole number of at least 1, got {value!r}")
        if not 0 < self.lr < 1:
            raise ValueError(f"lr: expected a number between 0 and 1, such as 1e-4, got {self.lr}")
        if self.batch_size % self.accumulate:
            raise ValueError(f"accumulate: expected a divisor of batch_size {self.batch_size}, got {self.accumulate}")
        if self.optimizer not in ("adamw", "adamw8bit"):
            raise ValueError(f"optimizer: expected 'adamw' or 'adamw8bit', got {self.optimizer!r}")


@dataclass
class Term:
    """lambda E || eps - eps_theta ||^2 over these examples."""

    examples: Examples
    weight: float = 1.0


@dataclass
class Recipe:
    """A method: which tensors of `sd` learn, and from what. Made by the modules of the methods.

        with dreambooth.recipe(sd, images, noun="dog") as recipe:
            for step, loss in finetune(sd, recipe): ...
            save_concept("rex.safetensors", recipe)
        # here sd is what it was before, bit for bit

    method: its name.  params: name -> Parameter, what learns.  terms: what it learns from.  settings: how.
    about: what prompts need to know (tokens, class noun ...), saved with the concept.
    tokens: rows for new words, if there are any.  text_learns: whether weights of the text encoder are in params.
    """

    method: str
    params: dict[str, nn.Parameter]
    terms: list[Term]
    settings: Settings
    about: dict
    base: str
    fingerprint: Tensor
    tokens: NewTokens | None = None
    text_learns: bool = False
    undo: contextlib.ExitStack = field(default_factory=contextlib.ExitStack, repr=False)

    def close(self) -> None:
        """Put the model back as it was."""
        self.undo.close()

    def __enter__(self) -> "Recipe":
        return self

    def __exit__(self, *error) -> None:
        self.close()


def learn(undo: contextlib.ExitStack, params: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """Let parameters of a frozen model learn, in float32, until `undo` puts back the very numbers they had."""

    def put_back(param: nn.Parameter, device: torch.device, original: Tensor) -> None:
        param.requires_grad_(False)
        param.grad = None
        param.data = original.to(device)

    for param in params.values():
        device, original = param.device, param.data
        param.data = original.to(torch.float32, copy=True)
        # the float32 copy is the one that a GPU's memory has to hold
        undo.callback(put_back, param, device, original.cpu() if device.type == "cuda" else original)
        param.requires_grad_(True)
    return params


def begin(sd: StableDiffusion, method: str, terms: list[Term], settings: Settings, **about) -> Recipe:
    """A recipe in which nothing learns yet; the model is remembered as it is now."""
    if sd.dtype == torch.float16 and sd.device.type == "cpu":
        raise ValueError("sd: expected float32 on a CPU, got float16; load it with dtype=torch.float32")
    settings = replace(settings, weighting=settings.weighting or sd.weighting)
    return Recipe(method, {}, terms, settings, about, sd.name, fingerprint(sd))


# ---- the loss ----


class Features:
    """prompts -> (B, L, D). What can not change is encoded once; the rest once a step, however often it occurs."""

    def __init__(self, sd: StableDiffusion, recipe: Recipe):
        self.sd, self.recipe, self.known = sd, recipe, {}

    def _fixed(self, prompt: str) -> bool:
        tokens = self.recipe.tokens.tokens if self.recipe.tokens else ()
        return not self.recipe.text_learns and not any(token in prompt.lower() for token in tokens)

    def __call__(self, prompts: list[str]) -> Tensor:
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self.known]
        fixed, moving = [p for p in new if self._fixed(p)], [p for p in new if not self._fixed(p)]
        if fixed:
            with torch.no_grad():
                self.known |= dict(zip(fixed, self.sd.encode_prompt(fixed), strict=True))
        now = dict(zip(moving, self.sd.encode_prompt(moving), strict=True)) if moving else {}
        return torch.stack([now[p] if p in now else self.known[p] for p in prompts])


def denoising_loss(sd: StableDiffusion, draws: list[dict], features: Features, weighting: str | None = None) -> Tensor:
    """sum_k lambda_k mean_i || eps_i - eps_theta(z_t,i, t_i, c_i) ||^2, all terms in one pass through the UNet.

    draws: one for each term, with z0 (B, C, h, w), prompts, mask (B, 1, h, w), t (B,), eps like z0, and weight.
    The error of one picture is notebook 01's; with masks it is the mean over what they show.
    weighting: as in `Settings`. Of the miniature, which predicts v, the error in eps would count a picture at large t
    by alpha_bar alone, 0.005 at t = T: and there, where colours and shapes are laid out, hardly anything was learnt.
    """
    weighting = weighting or sd.weighting
    join = lambda key: torch.cat([draw[key] for draw in draws])  # noqa: E731
    context = features([prompt for draw in draws for prompt in draw["prompts"]])
    eps_model = lambda zt, t: sd.unet_eps(zt, t, context)  # noqa: E731
    errors = noise_errors(eps_model, join("z0"), join("t"), join("eps"), sd.schedule, weighting, join("mask"))
    parts = errors.split([len(draw["z0"]) for draw in draws])
    return sum(draw["weight"] * part.mean() for draw, part in zip(draws, parts, strict=True))


def draw_step(sd: StableDiffusion, recipe: Recipe, count: int, step: int) -> list[dict]:
    """All that is random in a step, for all processes: `count` pictures of each term, their times and noises.

    It follows from (seed, step) alone: a step needs no history, and two processes share one draw.
    """
    key = np.random.SeedSequence([recipe.settings.seed, step]).generate_state(1)[0]
    generator, draws = torch.Generator().manual_seed(int(key)), []
    for term in recipe.terms:
        z0, prompts, mask = term.examples.batch(count, generator)
        t = send(torch.randint(1, sd.schedule.T + 1, (count,), generator=generator), z0.device)
        eps = send(torch.randn(z0.shape, generator=generator), z0.device)
        draws.append(dict(z0=z0, prompts=prompts, mask=mask, t=t, eps=eps, weight=term.weight))
    return draws


# ---- the loop ----


def finetune(sd: StableDiffusion, recipe: Recipe, *, checkpoint: str | Path | None = None, save_every: int = 100,
             accelerator: Accelerator | None = None) -> Iterator[tuple[int, Tensor]]:  # fmt: skip
    """Train a recipe; yields (step, loss) after each step, to plot, sample, save or stop.

    The loss stays on its device: read it now and then, as reading waits for the device.
    checkpoint: a file; the state is written there every `save_every` steps, at the end, and where the caller leaves
    the loop; a later call goes on from it bit for bit.  accelerator: for several processes (`accelerate launch`); by
    default one, in the model's precision.
    Raises FloatingPointError if the loss is not a number, RuntimeError if memory is short, ValueError if the
    checkpoint is of another training; the checkpoint on disk stays good.
    Derived in: notebooks/11_textual_inversion.ipynb, section "The loop".
    """
    s, params = recipe.settings, list(recipe.params.values())
    accelerator = accelerator or _accelerator(sd)
    optimizer = accelerator.prepare_optimizer(_optimizer(s, params))
    features, done, checked = Features(sd, recipe), 0, torch.zeros((), device=sd.device)
    path = Path(checkpoint) if checkpoint else None
    if path and path.is_file():
        done = load_state(path, recipe, optimizer, accelerator)
    size, processes, rank = s.batch_size // s.accumulate, accelerator.num_processes, accelerator.process_index
    with _training_mode(sd, s.gradient_checkpointing), _quick_attention(sd):
        for step in range(done + 1, s.steps + 1):
            draws, total = draw_step(sd, recipe, s.batch_size * processes, step), 0.0
            for part in range(s.accumulate):
                start = (part * processes + rank) * size
                shard = [{k: v if k == "weight" else v[start : start + size] for k, v in d.items()} for d in draws]
                loss = _within_memory(denoising_loss, sd, shard, features, s.weighting) / s.accumulate
                _within_memory(accelerator.backward, loss)
                total = total + loss.detach()
            if processes > 1:
                for param in params:  # a word that no prompt of this process has got no gradient
                    grad = torch.zeros_like(param) if param.grad is None else param.grad
                    param.grad = accelerator.reduce(grad, "mean")
            accelerator.clip_grad_norm_(params, s.clip)
            for group in optimizer.param_groups:
                group["lr"] = s.lr * min(1.0, step / (s.warmup or 1))
            checked = checked + total
            if step % 20 == 0 or step == s.steps or (path and step % save_every == 0):
                _check_finite(checked, step, path)  # before the weights take it in
            _within_memory(optimizer.step)
            optimizer.zero_grad(set_to_none=True)
            saved = bool(path) and (step % save_every == 0 or step == s.steps)
            if saved:
                _keep_state(path, recipe, optimizer, accelerator, step)
            try:
                yield step, total
            except GeneratorExit:  # the caller leaves the loop here, and may want to go on later
                learning = all(param.requires_grad for param in params)  # False once the recipe is closed
                if path and not saved and learning and torch.isfinite(checked):
                    _keep_state(path, recipe, optimizer, accelerator, step)
                raise


def _keep_state(path: Path, recipe: Recipe, optimizer, accelerator: Accelerator, step: int) -> None:
    """Save the state in one process of all; a full disk is no reason to end a training."""
    try:
        if accelerator.is_main_process:
            save_state(path, recipe, optimizer, accelerator, step)
    except OSError as error:
        rest = ", and the state saved before is whole" if path.is_file() else ""
        warnings.warn(f"{path}: the state of step {step} was not saved ({error}); training goes on{rest}", stacklevel=3)


def _accelerator(sd: StableDiffusion) -> Accelerator:
    """In the model's precision; accelerate would keep the one of the first training for the whole process."""
    half = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(sd.dtype, "no")
    AcceleratorState._reset_state()
    return Accelerator(mixed_precision=half, cpu=sd.device.type == "cpu")


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
def _training_mode(sd: StableDiffusion, checkpointing: bool) -> Iterator[None]:
    """Gradient checkpointing works in training mode only; there is no dropout that the mode would switch on."""
    if checkpointing:
        sd.unet.enable_gradient_checkpointing()
        sd.unet.train()
    try:
        yield
    finally:
        if checkpointing:
            sd.unet.disable_gradient_checkpointing()
            sd.unet.eval()


@contextlib.contextmanager
def _quick_attention(sd: StableDiffusion) -> Iterator[None]:
    """On a CPU in bfloat16, torch's fused attention is slow backwards: plain products are used instead.

    Their (L, L) tables would be too large for latents of Stable Diffusion's size.
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


# ---- the state on disk: what the next step needs ----


def save_state(path: Path, recipe: Recipe, optimizer, accelerator: Accelerator, step: int) -> None:
    """Write it in one go: a kill, or a full disk, leaves the old file whole."""
    state = dict(
        step=step, method=recipe.method, settings=asdict(recipe.settings), about=recipe.about,
        fingerprint=recipe.fingerprint,
        params={name: param.detach() for name, param in recipe.params.items()}, optimizer=optimizer.state_dict(),
        scaler=accelerator.scaler.state_dict() if accelerator.scaler else None,
    )  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        torch.save(state, temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        temporary.unlink(missing_ok=True)
        raise OSError(f"{path} can not be written: {error}") from error


def load_state(path: Path, recipe: Recipe, optimizer, accelerator: Accelerator) -> int:
    """Put the saved state in; returns its step. Raises ValueError if it is of another training."""
    state = torch.load(path, map_location="cpu", weights_only=True)
    if not same_model(recipe.fingerprint, state["fingerprint"]):
        raise ValueError(f"sd: {path} was written on another base model; load that one, or begin with another file")
    ours = asdict(recipe.settings) | {"method": recipe.method} | recipe.about
    theirs = state["settings"] | {"method": state["method"]} | state["about"]
    for name in ours:
        if name != "steps" and theirs.get(name) != ours[name]:  # a longer training may go on
            raise ValueError(
                f"{name}: {path} was written with {theirs.get(name)!r}, got {ours[name]!r}; go on with the same "
                "value, or begin anew with another file"
            )
    for name, param in recipe.params.items():
        param.data.copy_(state["params"][name])
    optimizer.load_state_dict(state["optimizer"])
    if accelerator.scaler and state["scaler"]:
        accelerator.scaler.load_state_dict(state["scaler"])
    return state["step"]
