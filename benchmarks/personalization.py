"""What personalization costs, beside the same work done the plain way; variants take turns, so noise hits both alike.

    python benchmarks/personalization.py                       # toybox on the CPU: a step, then end to end
    python benchmarks/personalization.py --only step --methods lora --rounds 5
    python benchmarks/personalization.py --base sd15-random --device cuda --only step
    python benchmarks/personalization.py --base sd15-random --device cuda --only memory   # DreamBooth under a cap
    python benchmarks/personalization.py --plain dreambooth --out plain.safetensors    # one plain training, no timing

The plain way is what the usual training scripts do: in each step they open, resize and encode the pictures, send every
prompt through the text encoder, train the whole embedding matrix and put the other rows back, encode the prior pictures
(decoded, concatenated with the others) again, take AdamW without fused kernels, and on a CPU compute in float32. The
draws, the batches, the passes through the UNet and the tensors that come out are the same. Only our side also keeps a
state on disk from which a training can be resumed.

Writes data/results/benchmark_personalization.json (for another base or device: with their names; for --only memory:
benchmark_memory_...). A ratio is the plain way's time by ours, the median over rounds: 2 means twice as fast.
sd15-random is Stable Diffusion 1.5 in its published configuration with random weights; while steps are timed, both
ways' models are in memory at once.
"""

import argparse
import contextlib
import datetime
import gc
import json
import os
import platform
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTokenizer

from course_lib.cli import methods
from course_lib.data.pictures import open_images, to_tensor
from course_lib.diffusion.ddpm import loss_per_picture
from course_lib.environment import RESULTS, device_name, quick_dtype
from course_lib.latent.registry import MODELS, Defaults
from course_lib.latent.stable_diffusion import StableDiffusion, load
from course_lib.personalization import custom_diffusion, lora
from course_lib.personalization.concept import load_concept
from course_lib.personalization.examples import OBJECT, encode
from course_lib.personalization.finetune import finetune
from course_lib.personalization.memory import GIB, memory_plan
from course_lib.personalization.recipe import Recipe, Settings
from course_lib.personalization.regularisation import SEARCHED
from course_lib.toybox.sets import pair_spec
from course_lib.toybox.world import render

REPO = Path(__file__).resolve().parents[1]
SUBJECT, NOUN = REPO / "data" / "subjects" / "mochi", "cat"
METHODS = {name.replace("_", "-"): method for name, method in methods.METHODS.items()}
RANK = 4
PRIOR_W = 5.0  # guidance of the prior pictures, on both sides
FASTER, SECONDS = 2.0, {"textual-inversion": 60, "dreambooth": 60, "custom-diffusion": 60}  # targets, on a CPU
FOREVER = 10**9


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="the JSON; with --plain the file of the trained tensors")
    parser.add_argument("--only", choices=["step", "end", "memory"], help="time of a step, end to end (default: both), "
                        "or the whole UNet's training under a cap of GPU memory")  # fmt: skip
    parser.add_argument("--cap", type=float, nargs="+", default=[14.5], help="GiB of --only memory (default 14.5)")
    parser.add_argument("--minutes", type=float, default=FOREVER, help="after these no other method is begun")
    parser.add_argument("--keep-going", action="store_true", help="note what fails in the JSON and go on")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--base", default="toybox", help="toybox, sd15-random, or what the course's command takes")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or mps (default cpu)")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4], help="of the steps that are timed")
    parser.add_argument("--rounds", type=int, default=15, help="rounds of the steps (default 15)")
    parser.add_argument("--steps", type=int, default=3, help="steps of each variant in a round (default 3)")
    parser.add_argument("--end-rounds", type=int, default=2, help="rounds end to end (default 2)")
    parser.add_argument("--train-steps", type=int, help="steps end to end (default: the method's own)")
    parser.add_argument("--prior", type=int, default=100, help="prior or regularisation pictures end to end (default "
                        "100, as in the course's command)")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="CPU threads (default: all)")
    parser.add_argument("--quick", action="store_true", help="one round of next to nothing: does it run?")
    parser.add_argument("--plain", choices=list(METHODS), help="train once the plain way and save to --out")
    parser.add_argument("--settings", type=json.loads, help="with --plain: JSON of a finetune.Settings")
    args = parser.parse_args(argv)
    if args.plain and not args.out:
        parser.error("--plain needs --out FILE")
    if args.quick:
        args.rounds = args.steps = args.end_rounds = 1
        args.train_steps, args.prior, args.batch_sizes = 2, 2, [1]
    return args


def plain_dtype(args: argparse.Namespace) -> torch.dtype:
    """Half precision is the usual thing on a GPU, and not on a CPU."""
    return torch.float32 if args.device == "cpu" else quick_dtype(torch.device(args.device))


def base_model(args: argparse.Namespace, dtype: torch.dtype) -> StableDiffusion:
    """The model, anew; the random one with as many words as the real one, so that its embedding matrix is as large."""
    if args.base != "sd15-random":
        return load(args.base, args.device, dtype)
    full_size = runpy.run_path(str(REPO / "benchmarks" / "sd15_random.py"))
    sd, small = full_size["build"](args.seed, args.device), full_size["tokenizer"]()
    count = full_size["TEXT_ENCODER"]["vocab_size"]
    words = small.get_vocab() | {f"unused{k}</w>": k for k in range(len(small), count)}
    merges = json.loads(small.backend_tokenizer.to_str())["model"]["merges"]
    sd.tokenizer = CLIPTokenizer(words, [tuple(pair) for pair in merges], model_max_length=77)
    return sd.to(args.device, dtype)


def defaults_of(base: str) -> Defaults:
    """What suits a base model; the random one has the layout of Stable Diffusion 1.5."""
    return MODELS[base].defaults if base in MODELS else Defaults()


def own_settings(args: argparse.Namespace, method: str) -> Settings:
    return replace(METHODS[method].settings[defaults_of(args.base).settings], seed=args.seed)


def synchronize(device: torch.device) -> None:
    if device.type in ("cuda", "mps"):
        getattr(torch, device.type).synchronize()


# ---- the pictures that hold the class: the same for both ways ----


@torch.no_grad()
def draw_prior(sd: StableDiffusion, folder: Path, count: int, seed: int, steps: int | None = None) -> list:
    """Prior pictures as files: [(path, prompt), ...]."""
    prompt, pairs, steps = f"a photo of a {NOUN}", [], steps or sd.defaults.prior_steps
    for k in range(0, count, 8):
        images = sd.sample([prompt] * min(8, count - k), w=PRIOR_W, steps=steps, seed=seed + k)
        for image in ((images + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy():
            pairs.append((folder / f"prior_{len(pairs):04d}.png", prompt))
            Image.fromarray(image).save(pairs[-1][0])
    return pairs


def draw_regularisation(sd: StableDiffusion, folder: Path, count: int, search: bool = True) -> list:
    """Pictures of the Toybox world as files: [(path, caption), ...]; those that are found, or any."""
    pairs = [pair_spec(k) for k in range(max(SEARCHED, 20 * count) if search else count)]
    captions = [caption for _, caption in pairs]
    found = custom_diffusion.retrieve(sd, captions, f"a photo of a {NOUN}", count) if search else range(count)
    files = []
    for k in found:
        files.append((folder / f"found_{k:04d}.png", captions[k]))
        Image.fromarray(render(pairs[k][0], sd.resolution)).save(files[-1][0])
    return files


def recipe(sd: StableDiffusion, method: str, settings: Settings, others: list, augment: bool | None = None):
    """The course's recipe, with the other pictures encoded once, as `prior` or as `regularisation`."""
    more = None
    if others:
        x = torch.stack([to_tensor(image, sd.resolution) for image in open_images([path for path, _ in others])])
        more = encode(sd, x, [(prompt,) for _, prompt in others])
    options = {"token": METHODS[method].token, "noun": NOUN, "settings": settings}
    if method == "custom-diffusion":
        options |= {"regularisation": [more] if more else [], "augment": augment}
    elif method != "textual-inversion":
        options |= {"prior": more}
    return METHODS[method].recipe(sd, open_images(SUBJECT), **options)  # as a list: both ways take the templates


# ---- the plain way ----


@dataclass
class View:
    """A picture's file as it is shown: how large, where, and under which sentences."""

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
            self.params |= self.undo.enter_context(lora.attach({"unet": sd.unet}, RANK, settings.seed))
        elif method == "custom-diffusion":
            for name, layer in custom_diffusion.key_value_layers(sd.unet).items():
                self.params[f"unet.{name}.weight"] = layer.weight
                layer.register_forward_hook(lambda _, __, out: torch.cat([out[:, :1].detach(), out[:, 1:]], dim=1))
        for param in self.params.values():
            param.data = param.data.float()
            param.requires_grad_(True)
        if self.table is not None:
            self.before = self.table.detach().clone()
        self.begin(settings)

    def add_word(self, token: str, noun: str) -> Tensor:
        """One row more in the embedding matrix, all of which learns."""
        tokenizer, encoder = self.sd.tokenizer, self.sd.text_encoder
        ids = tokenizer(noun, add_special_tokens=False).input_ids
        tokenizer.add_tokens([token])
        self.table = encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False).weight
        self.table.data[-1] = self.table.data[ids].mean(dim=0)
        self.others = torch.arange(len(self.table), device=self.table.device) < len(self.table) - 1
        return self.table

    def begin(self, settings: Settings) -> None:
        """A new optimizer, at step 0."""
        self.settings, self.step, params = settings, 0, list(self.params.values())
        rates = dict(lr=settings.lr, weight_decay=settings.weight_decay)
        self.optimizer = torch.optim.AdamW(params, **rates, fused=False)
        self.scaler = torch.amp.GradScaler(self.sd.device.type, enabled=self.sd.dtype == torch.float16)

    @torch.no_grad()
    def batch(self, step: int) -> list[dict]:
        """A batch of each term, opened, resized and encoded; the draws are those of `finetune.draw_step`."""
        sd, count = self.sd, self.settings.batch_size
        key = np.random.SeedSequence([self.settings.seed, step]).generate_state(1)[0]
        generator, draws = torch.Generator().manual_seed(int(key)), []
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
        eps_model = lambda zt, t: self.sd.unet_eps(zt, t, context)  # noqa: E731
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
    """What a plain script does from its start to its file."""
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


# ---- the time of a step ----


def prepared(device: torch.device, make: Callable) -> tuple[Callable, float | None, list[float]]:
    """What `make` gives after two steps, the GPU memory that these took beside the weights (GiB), and their losses."""
    cuda = device.type == "cuda"
    held = torch.cuda.memory_allocated() if cuda else 0
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    advance = make()
    losses = [round(float(advance()), 6) for _ in range(2)]
    synchronize(device)
    return advance, round((torch.cuda.max_memory_allocated() - held) / GIB, 3) if cuda else None, losses


def step_rows(args: argparse.Namespace, method: str) -> Iterator[dict]:
    """Both variants on a model of their own, for each batch size."""
    ours, theirs = base_model(args, quick_dtype(torch.device(args.device))), base_model(args, plain_dtype(args))
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as undo:
        others, few = [], 2 if args.quick else 8  # what the pictures show does not matter here
        if method == "dreambooth":
            others = draw_prior(ours, Path(folder), few, args.seed, steps=2)
        elif method == "custom-diffusion":
            others = draw_regularisation(ours, Path(folder), few, search=False)
        settings = replace(own_settings(args, method), steps=FOREVER)
        made = undo.enter_context(recipe(ours, method, settings, others))
        plain = Plain(theirs, method, settings, others)
        for size in args.batch_sizes:
            row = dict(what=f"{METHODS[method].title}: a step, batch {size}", method=method, batch_size=size)
            made.settings = replace(settings, batch_size=size)
            with contextlib.closing(finetune(ours, made)) as training:
                plain.begin(made.settings)
                seen = {"course_lib": prepared(ours.device, lambda t=training: lambda: next(t)[1]),
                        "plain way": prepared(ours.device, lambda: plain)}  # fmt: skip
                times = take_turns(args, {name: advance for name, (advance, *_) in seen.items()}, ours.device)
                row |= compared(times, "ms", 1000 / args.steps)
                row["losses"] = {name: losses for name, (*_, losses) in seen.items()}
                if ours.device.type == "cuda":
                    row["gpu_gib"] = {name: gib for name, (_, gib, _) in seen.items()}
            tell(row)
            yield row


def release() -> None:
    """Give back GPU memory that nothing holds any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# ---- under a cap ----


def capped_rows(args: argparse.Namespace) -> Iterator[dict]:
    """DreamBooth of the whole UNet under each cap, with what our memory plan switches on, and at last without a cap."""
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(args.cap[0] * GIB / total)  # before anything is there
    sd = base_model(args, quick_dtype(torch.device(args.device)))
    with tempfile.TemporaryDirectory() as folder:
        others = draw_prior(sd, Path(folder), 2, args.seed, steps=2)
        with recipe(sd, "dreambooth", own_settings(args, "dreambooth"), others) as made:
            own = replace(made.settings, steps=FOREVER)
            for cap in [*args.cap, None]:
                torch.cuda.set_per_process_memory_fraction(min(1.0, cap * GIB / total) if cap else 1.0)
                made.settings, plan = own, "no cap, nothing switched on"
                if cap:
                    made.settings, plan = memory_plan(sd, made, int(cap * GIB))
                release()
                torch.cuda.reset_peak_memory_stats()
                try:
                    row = capped_row(args, sd, made)
                except Exception as error:
                    if not args.keep_going:
                        raise
                    row = {"error": f"{type(error).__name__}: {error}"[:500]}
                row |= {"what": f"DreamBooth under {cap or total / GIB:.4g} GiB: a step", "plan": plan, "cap_gib": cap,
                        "peak_reserved_gib": round(torch.cuda.max_memory_reserved() / GIB, 3),
                        "peak_allocated_gib": round(torch.cuda.max_memory_allocated() / GIB, 3)}  # fmt: skip
                for param in made.params.values():
                    param.grad = None  # of a step that did not come to its end
                print(row, flush=True)
                yield row


def capped_row(args: argparse.Namespace, sd: StableDiffusion, made: Recipe) -> dict:
    """The time of our step, what the whole process holds on the GPU, and which settings were used."""
    with contextlib.closing(finetune(sd, made)) as training:
        advance, _, losses = prepared(sd.device, lambda: lambda: next(training)[1])
        times = take_turns(args, {"course_lib": advance}, sd.device)["course_lib"]
        free, total = torch.cuda.mem_get_info()
    return {"ms": {"course_lib": round(1000 / args.steps * statistics.median(times), 2)}, "losses": losses,
            "whole_process_gib": round((total - free) / GIB, 3), "batch_size": made.settings.batch_size,
            "gradient_checkpointing": made.settings.gradient_checkpointing, "optimizer": made.settings.optimizer,
            "pictures": made.settings.batch_size * len(made.terms)}  # fmt: skip


def take_turns(args: argparse.Namespace, variants: dict[str, Callable], device: torch.device) -> dict[str, list]:
    """Seconds that --steps steps of each variant take, in every round; the order changes."""
    times = {name: [] for name in variants}
    for n in range(args.rounds):
        for name in sorted(variants, reverse=n % 2 == 1):
            start = time.perf_counter()
            for _ in range(args.steps):
                variants[name]()
            synchronize(device)
            times[name].append(time.perf_counter() - start)
    return times


def compared(times: dict[str, list], unit: str, scale: float) -> dict:
    """The plain way's time by ours: the median over rounds, and where the middle half of the rounds lies."""
    ratios = sorted(b / a for a, b in zip(times["course_lib"], times["plain way"], strict=True))
    quarter = len(ratios) // 4
    return {"ratio": round(statistics.median(ratios), 3),
            "middle_half": [round(ratios[quarter], 3), round(ratios[-1 - quarter], 3)], "rounds": len(ratios),
            unit: {name: round(scale * statistics.median(values), 2) for name, values in times.items()}}  # fmt: skip


def tell(row: dict) -> None:
    times = row.get("ms") or row["seconds"]
    unit = "ms" if "ms" in row else "s"
    verdicts = ", ".join(f"{key} {'reached' if ok else 'missed'}" for key, ok in row.get("targets", {}).items())
    print(f"{row['ratio']:7.2f} x  {row['what']}: {times['course_lib']} {unit}, plain {times['plain way']} {unit}"
          f"  {verdicts}", flush=True)  # fmt: skip


# ---- end to end ----

# A small process between us and the one that is measured: it sees that one's largest memory and nothing of ours.
WATCH = """
import json, subprocess, sys, time
start = time.perf_counter()
code = subprocess.call(sys.argv[1:], stdout=sys.stderr)
seconds, peak = time.perf_counter() - start, None
try:
    import resource
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
except ImportError:
    pass  # Windows does not tell
print(json.dumps([code, seconds, peak]))
"""


def watched(args: argparse.Namespace, command: list[str], cache: Path) -> tuple[float, int | None]:
    """(seconds, bytes) of a Python process with an empty cache."""
    environment = os.environ | {"COURSE_CACHE": str(cache), "PYTHONPATH": str(REPO)}
    if args.threads:
        environment["OMP_NUM_THREADS"] = str(args.threads)
    line = [sys.executable, "-c", WATCH, sys.executable, *command]
    run = subprocess.run(line, cwd=REPO, env=environment, capture_output=True, text=True, encoding="utf-8")
    code, seconds, peak = json.loads(run.stdout) if run.stdout else (run.returncode, 0.0, None)
    if code:
        raise SystemExit(f"{' '.join(command)}\nended with exit code {code}:\n{run.stderr[-2000:]}")
    return seconds, peak


def command_of(args: argparse.Namespace, method: str, base: str, out: Path) -> list[str]:
    """The course's own command line."""
    command = ["-m", "course_lib.personalize", "train", "--method", method, "--images", str(SUBJECT), "--class-noun",
               NOUN, "--token", METHODS[method].token, "--base", base, "--device", args.device, "--out", str(out),
               "--seed", str(args.seed), "--grid", "0"]  # fmt: skip
    if args.train_steps:
        command += ["--steps", str(args.train_steps)]
    if method == "dreambooth":
        command += ["--prior", str(args.prior)]
    elif method == "custom-diffusion":
        command += ["--regularisation", str(args.prior if defaults_of(args.base).toybox_world else 0)]
    return command + (["--rank", str(RANK)] if method == "lora" else [])


def plain_command_of(args: argparse.Namespace, method: str, base: str, out: Path, settings: dict) -> list[str]:
    """This file, with the settings that the course's command has used."""
    options = {"--plain": method, "--out": out, "--base": base, "--device": args.device, "--seed": args.seed,
               "--prior": args.prior, "--settings": json.dumps(settings)}  # fmt: skip
    return [str(Path(__file__).resolve()), *(str(word) for option in options.items() for word in option)]


def end_row(args: argparse.Namespace, method: str, base: str, folder: Path) -> dict:
    """Process start to saved file, in turn; both have to leave the same tensors."""
    times, peaks, settings = {"course_lib": [], "plain way": []}, {"course_lib": [], "plain way": []}, None
    for n in range(args.end_rounds):
        for name in list(times) if n % 2 == 0 else list(reversed(times)):
            with tempfile.TemporaryDirectory(dir=folder) as empty:
                out = Path(empty) / f"{method}.safetensors"
                if name == "course_lib":
                    command = command_of(args, method, base, out)
                else:
                    command = plain_command_of(args, method, base, out, settings)
                seconds, peak = watched(args, command, Path(empty) / "cache")
                times[name].append(seconds)
                peaks[name].append(peak)
                if name == "course_lib":
                    concept = load_concept(out)
                    settings, shapes = concept.settings, {key: v.shape for key, v in concept.tensors.items()}
                else:
                    check_same(out, shapes)
    row = dict(what=f"{METHODS[method].title}: end to end, {settings['steps']} steps of {settings['batch_size']}",
               method=method, **compared(times, "seconds", 1))  # fmt: skip
    if None not in peaks["course_lib"]:
        row["peak_gib"] = {name: round(max(values) / 2**30, 3) for name, values in peaks.items()}
    if args.device == "cpu" and defaults_of(args.base).toybox_world and not args.train_steps:
        row["targets"] = {f">= {FASTER:g} times as fast": row["ratio"] >= FASTER}
        if method in SECONDS:
            seconds = row["seconds"]["course_lib"]
            row["targets"][f"<= {SECONDS[method]} s"] = seconds <= SECONDS[method]
    tell(row)
    return row


def check_same(path: Path, shapes: dict) -> None:
    theirs = {name: value.shape for name, value in load_file(path).items()}
    if theirs != shapes:
        raise SystemExit(
            f"the plain way has saved other tensors: {sorted(set(theirs.items()) ^ set(shapes.items()))[:3]}"
        )


def end_rows(args: argparse.Namespace) -> Iterator[dict]:
    with tempfile.TemporaryDirectory() as folder:
        base = args.base
        if base == "sd15-random":  # both open it as files
            base = str(Path(folder) / "base")
            base_model(args, torch.float32).save(base)
        if not args.quick:  # the first process of all reads everything from a cold disk: not counted
            watched(args, plain_command_of(args, "textual-inversion", base, Path(folder) / "first.safetensors",
                                           asdict(own_settings(args, "textual-inversion")) | {"steps": 1}),
                    Path(folder))  # fmt: skip
        for method in args.methods:
            yield end_row(args, method, base, Path(folder))


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.plain:
        return train_plain(args)
    start, rows, errors = time.time(), [], []
    usual = defaults_of(args.base).toybox_world and args.device == "cpu"
    kind = "benchmark_memory" if args.only == "memory" else "benchmark_personalization"
    name = kind + ("" if usual else f"_{Path(args.base).name}_{args.device}")
    args.out = args.out or RESULTS / f"{name}.json"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    keys = ("methods", "batch_sizes", "steps", "train_steps", "prior", "only", "quick")
    result = dict(
        made_by="benchmarks/personalization.py", date=datetime.date.today().isoformat(), base=args.base,
        device=f"CPU, {cores} core{'s' * (cores != 1)}" if args.device == "cpu" else device_name(), seed=args.seed,
        threads=torch.get_num_threads(), torch=torch.__version__, python=platform.python_version(),
        system=platform.system(), step_dtype={"course_lib": str(quick_dtype(torch.device(args.device))),
                                              "plain way": str(plain_dtype(args))},
        settings={key: getattr(args, key) for key in keys},
        minutes=0.0, rows=rows,
    )  # fmt: skip
    args.out.parent.mkdir(parents=True, exist_ok=True)
    tasks = [("memory", lambda: capped_rows(args))] if args.only == "memory" else []
    if args.only in (None, "step"):
        tasks += [(method, lambda m=method: step_rows(args, m)) for method in args.methods]
    if args.only in (None, "end"):
        tasks.append(("end", lambda: end_rows(args)))
    for name, task in tasks:
        if time.time() - start > 60 * args.minutes:
            errors.append(f"{name}: not begun, the minutes are over")
            continue
        try:
            for row in task():  # written at once: a kill loses no row
                rows.append(row)
                write(args.out, result, start, errors)
        except Exception as error:
            if not args.keep_going:
                raise
            errors.append(f"{name}: {type(error).__name__}: {error}"[:1000])
            traceback.print_exc()
        release()
    write(args.out, result, start, errors)
    print(f"{result['minutes']} minutes on {result['device']}; written to {args.out}", flush=True)
    if errors:
        raise SystemExit(f"failed: {errors}")


def write(out: Path, result: dict, start: float, errors: list[str]) -> None:
    result["minutes"] = round((time.time() - start) / 60, 1)
    out.write_text(json.dumps(result | ({"errors": errors} if errors else {}), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
