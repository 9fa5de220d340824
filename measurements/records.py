"""The JSON files in data/results: read them, add rows, and never mix or overwrite rows of different settings."""

import argparse
import datetime
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import torch
from filelock import FileLock

from course_lib import environment
from course_lib.environment import device_name, sha256, write_whole
from course_lib.latent.stable_diffusion import StableDiffusion


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that every measurement has."""
    parser.add_argument("--dtype", choices=list(environment.PRECISIONS), help="default: the fastest on this machine")
    parser.add_argument("--threads", type=int, help="CPU threads (default: all)")
    parser.add_argument("--fresh", action="store_true", help="drop the rows of --out and measure everything again")


def prepare(args: argparse.Namespace) -> torch.dtype:
    """Set the number of threads, and choose the dtype of the networks."""
    if args.threads:
        torch.set_num_threads(args.threads)
    device = environment.device()
    return getattr(torch, args.dtype) if args.dtype else environment.quick_dtype(device)


def setting_of_model(sd: StableDiffusion) -> dict:
    """The settings that the figures of a model depend on: its dtype and its weights."""
    files = sorted(sd.source.rglob("*.safetensors"))
    weights = {p.relative_to(sd.source).as_posix(): sha256(p)[:16] for p in files}
    return dict(dtype=str(sd.dtype).removeprefix("torch."), weights=weights)


def read(path: Path, setting: dict, *tables: str) -> dict:
    """The record in `path`; if there is none, one with this setting and empty tables.

    setting: all that its rows depend on, beside the code.
    Raises SystemExit in one sentence if the file holds rows of another setting.
    """
    if not path.is_file():
        return setting | {table: {} for table in tables}
    record = json.loads(path.read_text(encoding="utf-8"))
    other = [key for key, value in setting.items() if record.get(key) != value]
    if other:
        differences = ", ".join(f"{key}: {_short(record.get(key))} there, {_short(setting[key])} here" for key in other)
        raise SystemExit(f"{path} holds rows of another setting ({differences}): give that setting, or another --out, "
                         "or --fresh to replace them")  # fmt: skip
    return record


def start(path: Path, setting: dict, *tables: str, fresh: bool = False) -> dict:
    """As `read`, once at the start of a measurement; fresh=True puts the old file aside, as <name>.old."""
    if fresh and path.is_file():
        path.replace(path.with_name(f"{path.name}.old"))
    return read(path, setting, *tables)


def fill(path: Path, setting: dict, keys: tuple[str, ...], measure: Callable, *args, **options) -> object:
    """What the record holds under these keys, such as ("rows", "mochi", "lora"); if missing, measured and written.

    Several processes may fill one file: it is read again, under a lock, before something is added. What another process
    has written meanwhile is kept.  Raises SystemExit as `read`.
    """

    def place(record: dict) -> dict:
        for key in keys[:-1]:
            record = record.setdefault(key, {})
        return record

    there = place(read(path, setting))
    if keys[-1] not in there:
        found = measure(*args, **options)
        with _lock(path):
            record = read(path, setting)
            there = place(record)
            if keys[-1] not in there:
                there[keys[-1]] = found
                write(path, record)
    return there[keys[-1]]


def _lock(path: Path) -> FileLock:
    name = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]
    folder = environment.cache_dir() / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    return FileLock(folder / f"record-{name}.lock")


def write(path: Path, record: dict, measured: bool = True) -> None:
    """Write the record whole. If something was measured now, with the device, the day and torch's version."""
    if measured or "date" not in record:
        record.update(device=device_name(), date=datetime.date.today().isoformat(), torch=torch.__version__)
    with write_whole(path) as temporary:
        temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _short(value: object) -> str:
    return "other weights" if isinstance(value, dict) else str(value)
