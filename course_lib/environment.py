"""Where things are, and how large a run this machine is given.

Explained in: notebooks/00_start_here.ipynb, section "Your machine".

COURSE_PROFILE is smoke, cpu or gpu: `smoke` proves that every cell runs, `cpu` is for a laptop, `gpu` for CUDA or MPS.
COURSE_CACHE is the folder for what can be made again (default ~/.cache/personalization-course).
"""

import os
from pathlib import Path

import torch
from torch import Tensor

REPOSITORY = Path(__file__).resolve().parents[1]
CHECKPOINTS = REPOSITORY / "data" / "checkpoints"
RESULTS = REPOSITORY / "data" / "results"
PROFILES = ("smoke", "cpu", "gpu")


def cache_dir() -> Path:
    """The folder for data that can be made or downloaded again."""
    return Path(os.environ.get("COURSE_CACHE") or Path.home() / ".cache" / "personalization-course").expanduser()


def device() -> torch.device:
    """The fastest device here: CUDA, else Apple's MPS, else the CPU. The profiles smoke and cpu stay on the CPU."""
    if profile() != "gpu":
        return torch.device("cpu")
    return torch.device(_accelerator() or "cpu")


def _accelerator() -> str | None:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else None


def on_cpu() -> bool:
    """Whether there is no accelerator: told so, `Accelerator(cpu=on_cpu())` joins several processes."""
    return _accelerator() is None


def mixed_precision(on: torch.device) -> str:
    """The half precision that pays on this device, by accelerate's name: bf16, fp16, or "no".

    A CPU multiplies bf16 fast only if it was built for it: without, everything would be slower than in float32.
    """
    if on.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(on) >= (8, 0) else "fp16"
    if on.type == "cpu":
        try:
            return "bf16" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "no"
        except (AttributeError, RuntimeError):  # a torch built without oneDNN
            return "no"
    return "no"


def quick_dtype(on: torch.device) -> torch.dtype:
    """The dtype in which a model draws fastest on this device."""
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "no": torch.float32}[mixed_precision(on)]


def autocast(on: torch.device) -> torch.autocast:
    """`with autocast(device): ...` runs the heavy layers in half precision, where that pays."""
    dtype = quick_dtype(on)
    return torch.autocast(on.type, dtype, enabled=dtype != torch.float32)


def send(x: Tensor, to: torch.device) -> Tensor:
    """Copy from the CPU to a device. A GPU does not wait for it, nor Python for the GPU: that needs pinned memory."""
    return x.pin_memory().to(to, non_blocking=True) if to.type == "cuda" and not x.is_cuda else x.to(to)


def device_name() -> str:
    """What this machine computes with, for the record beside a figure: "CPU, 2 cores" or the name of the GPU."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return "Apple MPS" if torch.backends.mps.is_available() else f"CPU, {cores} core{'s' if cores != 1 else ''}"


def profile() -> str:
    """smoke, cpu or gpu: from COURSE_PROFILE, else gpu where there is an accelerator, else cpu.

    Raises ValueError if COURSE_PROFILE is anything else.
    """
    chosen = os.environ.get("COURSE_PROFILE") or ("gpu" if _accelerator() else "cpu")
    if chosen not in PROFILES:
        raise ValueError(f"COURSE_PROFILE: expected one of {', '.join(PROFILES)}, got {chosen!r}")
    return chosen


def pick(**sizes):
    """Choose a size for this profile: `steps = pick(smoke=2, cpu=200, gpu=2000)`.

    Raises ValueError if a profile is left out or unknown.
    """
    if set(sizes) != set(PROFILES):
        raise ValueError(f"sizes: expected exactly {', '.join(PROFILES)}, got {', '.join(sizes) or 'nothing'}")
    return sizes[profile()]
