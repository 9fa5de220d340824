"""Paths, profile, device and precision of this machine, and the few helpers that every part needs.

Explained in: notebooks/00_start_here.ipynb, section "Your machine".

COURSE_PROFILE is smoke, cpu or gpu: `smoke` checks that every cell runs, `cpu` is for a laptop, `gpu` for CUDA or MPS.
COURSE_CACHE is the folder for files that can be made again (default ~/.cache/personalization-course).
COURSE_PRECISION is float32, bfloat16 or float16: it overrides the measured choice of `precision`.
"""

from __future__ import annotations

import contextlib
import functools
import glob
import hashlib
import json
import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:  # torch takes more than a second to import, and not every command needs it
    import torch
    from torch import Tensor

REPOSITORY = Path(__file__).resolve().parents[1]
CHECKPOINTS = REPOSITORY / "data" / "checkpoints"
RESULTS = REPOSITORY / "data" / "results"
PROFILES = ("smoke", "cpu", "gpu")
PRECISIONS = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}  # torch's name of a dtype -> accelerate's


def cache_dir() -> Path:
    """The folder for data that can be made or downloaded again."""
    return Path(os.environ.get("COURSE_CACHE") or Path.home() / ".cache" / "personalization-course").expanduser()


# ---- the machine ----


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


def device() -> torch.device:
    """The fastest device here: CUDA, else Apple's MPS, else the CPU. The profiles smoke and cpu stay on the CPU."""
    import torch

    if profile() != "gpu":
        return torch.device("cpu")
    return torch.device(_accelerator() or "cpu")


def _accelerator() -> str | None:
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else None


def on_cpu() -> bool:
    """Whether there is no accelerator. `Accelerator(cpu=on_cpu())` can then join several CPU processes."""
    return device().type == "cpu"


def device_name() -> str:
    """The name of the hardware, to record beside a measured number: "CPU, 2 cores" or the name of the GPU."""
    import torch

    if device().type == "cuda":
        return torch.cuda.get_device_name()
    cores = usable_cores()
    return "Apple MPS" if device().type == "mps" else f"CPU, {cores} core{'s' if cores != 1 else ''}"


def usable_cores() -> int:
    """How many cores this process may run on: fewer than the machine has where it is pinned to some of them."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


# ---- precision ----


def precision(on: torch.device) -> tuple[str, str]:
    """The dtype in which this device computes fastest, and the reason: ("bfloat16", "a forward pass takes ...").

    On a CPU, float32 and bfloat16 are timed once, and the times are saved in the cache folder: some CPUs that have
    bfloat16 instructions are slower with them. COURSE_PRECISION overrides the choice.
    Raises ValueError if COURSE_PRECISION is not float32, bfloat16 or float16.
    """
    import torch

    asked = os.environ.get("COURSE_PRECISION")
    if asked:
        if asked not in PRECISIONS:
            raise ValueError(f"COURSE_PRECISION: expected one of {', '.join(PRECISIONS)}, got {asked!r}")
        return asked, "COURSE_PRECISION asks for it"
    if on.type == "cuda":
        new = torch.cuda.get_device_capability(on) >= (8, 0)
        return ("bfloat16", "this GPU supports it") if new else ("float16", "this GPU has no bfloat16")
    if on.type != "cpu":
        return "float32", f"half precision is not used on {on.type}"
    ms = _cpu_times()
    fastest = min(ms, key=ms.get)
    return fastest, "a forward pass takes " + " and ".join(f"{ms[name]:.1f} ms in {name}" for name in ms)


@functools.cache
def _cpu_times() -> dict[str, float]:
    """Milliseconds of a forward pass in each dtype on this CPU; from the cache folder if it was timed before."""
    import torch

    host = f"{platform.node()} {_cpu_model()} torch {torch.__version__} {torch.get_num_threads()} threads"
    path = cache_dir() / "precision.json"
    known = {}
    with contextlib.suppress(OSError, ValueError):  # no file yet, or a damaged one
        known = json.loads(path.read_text(encoding="utf-8"))
    if set(known.get(host, {})) != {"float32", "bfloat16"}:
        known[host] = _time_forward_passes()
        with contextlib.suppress(OSError), write_whole(path) as temporary:  # works without the file too
            temporary.write_text(json.dumps(known, indent=1), encoding="utf-8")
    return known[host]


def _cpu_model() -> str:
    with contextlib.suppress(OSError, IndexError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line for line in lines if line.startswith("model name")).split(":")[1].strip()
    return platform.processor()


def _time_forward_passes(rounds: int = 7) -> dict[str, float]:
    """Time a residual block and a linear layer, as large as those of the course's UNets, in each dtype in turn."""
    import torch
    from torch import nn

    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    best = dict.fromkeys(dtypes, float("inf"))
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = [nn.GroupNorm(8, 64), nn.SiLU(), nn.Conv2d(64, 128, 3, padding=1), nn.GroupNorm(8, 128), nn.SiLU(),
                  nn.Conv2d(128, 128, 3, padding=1), nn.Flatten(2), nn.Linear(256, 256)]  # fmt: skip
        network, x = nn.Sequential(*layers).eval(), torch.randn(4, 64, 16, 16)
        for k in range(rounds):
            for name, dtype in dtypes.items():
                network, inputs = network.to(dtype), x.to(dtype)
                start = time.perf_counter()
                network(inputs)
                if k > 0:  # the first pass in each dtype includes setup
                    best[name] = min(best[name], 1000 * (time.perf_counter() - start))
    return best


def mixed_precision(on: torch.device) -> str:
    """`precision` under accelerate's name: bf16, fp16, or "no"."""
    return PRECISIONS[precision(on)[0]]


def quick_dtype(on: torch.device) -> torch.dtype:
    """`precision` as a torch dtype."""
    import torch

    return getattr(torch, precision(on)[0])


def autocast(on: torch.device) -> torch.autocast:
    """`with autocast(device): ...` runs the heavy layers in half precision, where that is faster."""
    import torch

    dtype = quick_dtype(on)
    return torch.autocast(on.type, dtype, enabled=dtype != torch.float32)


# ---- small helpers, each written once ----


def from_uint8(images: Tensor | np.ndarray) -> Tensor:
    """Pixels 0..255 to float32 in [-1, 1].

    images: a torch tensor of any shape, or a NumPy array (..., H, W, C), which comes out as (..., C, H, W).
    """
    import torch

    if isinstance(images, np.ndarray):
        images = torch.from_numpy(np.moveaxis(images, -1, -3))
    return images.float() / 127.5 - 1


@contextlib.contextmanager
def write_whole(path: str | Path) -> Iterator[Path]:
    """Write a file whole or not at all: the block writes a temporary file, which is renamed at the end of the block.

    The folder is made if it is missing. After an error, or a kill, the old file is still there. Each process has its
    own temporary file; files left by killed processes are removed.
    """
    import psutil

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    ours = f"{path.name}.{platform.node()}."  # machines that share a folder know only their own processes
    for file in path.parent.glob(f"{glob.escape(ours)}*.tmp"):
        pid = file.name.removeprefix(ours).removesuffix(".tmp")
        if pid.isdigit() and not psutil.pid_exists(int(pid)):
            file.unlink(missing_ok=True)
    temporary = path.with_name(f"{ours}{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def sha256(path: str | Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
