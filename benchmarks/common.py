"""Shared by both ways of the benchmark of personalization: base model, settings, pictures, timing in turns."""

import argparse
import gc
import json
import runpy
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image
from transformers import CLIPTokenizer

from course_lib.cli import methods
from course_lib.data.pictures import open_images, to_tensor
from course_lib.environment import quick_dtype
from course_lib.latent.registry import MODELS, Defaults
from course_lib.latent.stable_diffusion import StableDiffusion, load
from course_lib.personalization import custom_diffusion
from course_lib.personalization.examples import encode
from course_lib.personalization.memory import GIB
from course_lib.personalization.recipe import Settings
from course_lib.personalization.regularisation import SEARCHED
from course_lib.toybox.sets import pair_spec
from course_lib.toybox.world import render

REPO = Path(__file__).resolve().parents[1]
SUBJECT, NOUN = REPO / "data" / "subjects" / "mochi", "cat"
METHODS = {name.replace("_", "-"): method for name, method in methods.METHODS.items()}
PRIOR_W = 5.0  # guidance of the prior pictures, on both sides
FASTER, SECONDS = 2.0, {"textual-inversion": 60, "dreambooth": 60, "custom-diffusion": 60}  # targets, on a CPU
FOREVER = 10**9


def plain_dtype(args: argparse.Namespace) -> torch.dtype:
    """Half precision on a GPU and float32 on a CPU, as is usual."""
    return torch.float32 if args.device == "cpu" else quick_dtype(torch.device(args.device))


def base_model(args: argparse.Namespace, dtype: torch.dtype) -> StableDiffusion:
    """A new model; the random one has as many words as the real one, so its embedding matrix is as large."""
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
    """The defaults of a base model; the random one has the layout of Stable Diffusion 1.5."""
    return MODELS[base].defaults if base in MODELS else Defaults()


def own_settings(args: argparse.Namespace, method: str) -> Settings:
    return replace(METHODS[method].settings[defaults_of(args.base).settings], seed=args.seed)


def synchronize(device: torch.device) -> None:
    if device.type in ("cuda", "mps"):
        getattr(torch, device.type).synchronize()


# ---- pictures of the class: the same for both ways ----


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
    """Pictures of the Toybox world as files: [(path, caption), ...]; those that the search finds, or any."""
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


# ---- timing ----


def prepared(device: torch.device, make: Callable) -> tuple[Callable, float | None, list[float]]:
    """The step function of `make` after two steps, their GPU memory beside the weights (GiB), and their losses."""
    cuda = device.type == "cuda"
    held = torch.cuda.memory_allocated() if cuda else 0
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    advance = make()
    losses = [round(float(advance()), 6) for _ in range(2)]
    synchronize(device)
    return advance, round((torch.cuda.max_memory_allocated() - held) / GIB, 3) if cuda else None, losses


def release() -> None:
    """Free GPU memory that is no longer used."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


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


def print_row(row: dict) -> None:
    times = row.get("ms") or row["seconds"]
    unit = "ms" if "ms" in row else "s"
    verdicts = ", ".join(f"{key} {'reached' if ok else 'missed'}" for key, ok in row.get("targets", {}).items())
    print(f"{row['ratio']:7.2f} x  {row['what']}: {times['course_lib']} {unit}, plain {times['plain way']} {unit}"
          f"  {verdicts}", flush=True)  # fmt: skip
