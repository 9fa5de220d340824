"""DreamBooth of the whole UNet under a cap of GPU memory, for benchmarks/personalization.py --only memory."""

import argparse
import contextlib
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from common import (
    FOREVER,
    base_model,
    draw_prior,
    own_settings,
    prepared,
    recipe,
    release,
    take_turns,
)

from course_lib.environment import quick_dtype
from course_lib.latent.stable_diffusion import StableDiffusion
from course_lib.personalization.finetune import finetune
from course_lib.personalization.memory import GIB, memory_plan
from course_lib.personalization.recipe import Recipe


def capped_rows(args: argparse.Namespace) -> Iterator[dict]:
    """DreamBooth of the whole UNet under each cap, with the options of our memory plan, and at last without a cap."""
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(args.cap[0] * GIB / total)  # before anything is allocated
    sd = base_model(args, quick_dtype(torch.device(args.device)))
    with tempfile.TemporaryDirectory() as folder:
        others = draw_prior(sd, Path(folder), 2, args.seed, steps=2)
        with recipe(sd, "dreambooth", own_settings(args, "dreambooth"), others) as ours:
            own = replace(ours.settings, steps=FOREVER)
            for cap in [*args.cap, None]:
                torch.cuda.set_per_process_memory_fraction(min(1.0, cap * GIB / total) if cap else 1.0)
                ours.settings, plan = own, "no cap, nothing switched on"
                if cap:
                    ours.settings, plan = memory_plan(sd, ours, int(cap * GIB))
                release()
                torch.cuda.reset_peak_memory_stats()
                try:
                    row = capped_row(args, sd, ours)
                except Exception as error:
                    if not args.keep_going:
                        raise
                    row = {"error": f"{type(error).__name__}: {error}"[:500]}
                row |= {"what": f"DreamBooth under {cap or total / GIB:.4g} GiB: a step", "plan": plan, "cap_gib": cap,
                        "peak_reserved_gib": round(torch.cuda.max_memory_reserved() / GIB, 3),
                        "peak_allocated_gib": round(torch.cuda.max_memory_allocated() / GIB, 3)}  # fmt: skip
                for param in ours.params.values():
                    param.grad = None  # left by a step that failed
                print(row, flush=True)
                yield row


def capped_row(args: argparse.Namespace, sd: StableDiffusion, ours: Recipe) -> dict:
    """The time of our step, the GPU memory of the whole process, and the settings."""
    with contextlib.closing(finetune(sd, ours)) as training:
        advance, _, losses = prepared(sd.device, lambda: lambda: next(training)[1])
        times = take_turns(args, {"course_lib": advance}, sd.device)["course_lib"]
        free, total = torch.cuda.mem_get_info()
    return {"ms": {"course_lib": round(1000 / args.steps * statistics.median(times), 2)}, "losses": losses,
            "whole_process_gib": round((total - free) / GIB, 3), "batch_size": ours.settings.batch_size,
            "gradient_checkpointing": ours.settings.gradient_checkpointing, "optimizer": ours.settings.optimizer,
            "pictures": ours.settings.batch_size * len(ours.terms)}  # fmt: skip
