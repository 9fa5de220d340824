"""The command line of all trainings in this folder: options, start, and how a run stops."""

import argparse
import contextlib
import os
import signal
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list

from course_lib.environment import mixed_precision, on_cpu

# Options that do not change the weights that come out. All others must be the same when a run is resumed.
FREE = {"out", "ship", "minutes", "threads", "workers", "compile", "save_every", "log_every", "draw_steps", "score",
        "data", "exact", "parts"}  # fmt: skip


def common_arguments(parser: argparse.ArgumentParser, out: str, batch_size: int, lr: float, steps: int | None) -> None:
    """The options that all trainings have. steps: None for a script that counts its steps itself."""
    add = parser.add_argument
    add("--out", type=Path, default=Path(out), help=f"folder for the state, the log and samples (default {out})")
    add("--ship", type=Path, help="folder for the averaged weights at the end, such as data/checkpoints/NAME")
    add("--start-from", type=Path, help="a shipped model of this script; training goes on from it with a new optimiser")
    add("--minutes", type=float, default=60, help="stop after this many minutes (default 60)")
    if steps:
        add("--steps", type=int, default=steps, help=f"number of steps in all (default {steps:,})")
        add("--cooldown", type=float, default=0.3, help="share of the steps over which the learning rate falls to 0 "
            "(default 0.3)")  # fmt: skip
        add("--by-clock", action="store_true", help="the learning rate falls towards --minutes, not towards --steps: "
            "for a machine of unknown speed. --minutes then counts the whole run, also when it is resumed, and the "
            "resumed run is not the same bit for bit")  # fmt: skip
    add("--batch-size", type=int, default=batch_size, help=f"pictures per step and process (default {batch_size})")
    add("--lr", type=float, default=lr, help=f"highest learning rate (default {lr})")
    add("--ema", type=float, default=0.998, help="decay of the averaged weights (default %(default)s; 0: no average)")
    add("--precision", choices=["auto", "no", "bf16", "fp16"], default="auto", help="auto: the fastest on this device, "
        "or that of the run that is resumed (default); no: float32")  # fmt: skip
    add("--threads", type=int, help="CPU threads of each process (default: all, or 1 with several processes)")
    add("--save-every", type=float, default=4, help="minutes between two saves (default %(default)s)")
    add("--log-every", type=int, default=50, help="steps between two rows of log.jsonl (default %(default)s)")
    add("--seed", type=int, default=0, help="the same seed gives the same run (default 0)")


def new_accelerator(args: argparse.Namespace) -> Accelerator:
    """Set threads, seed and precision; find the device and the other processes. A resumed run keeps its precision.

    Raises ValueError if --start-from or the saved state cannot be read, or if the processes do not know of each other.
    """
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if args.threads or processes > 1:
        torch.set_num_threads(args.threads or 1)
    torch.manual_seed(args.seed)
    if args.start_from and not (args.start_from / "provenance.json").is_file():
        raise ValueError(f"--start-from: expected a shipped model with provenance.json, but {args.start_from} has none")
    cpu = on_cpu() or os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true")
    if args.precision == "auto":
        state = args.out / "state.pt"
        saved = read_state(state)["settings"] if state.is_file() else {}
        chosen = saved.get("--precision") or mixed_precision(PartialState(cpu=cpu).device)
        args.precision = broadcast_object_list([chosen])[0]  # timings may differ between processes
    accelerator = Accelerator(mixed_precision=args.precision, cpu=cpu)
    if processes != accelerator.num_processes:  # each would train a model of its own
        raise ValueError("the processes do not know of each other; start them with `torchrun --nproc_per_node 2`")
    return accelerator


def read_state(path: Path) -> dict:
    """A saved state. Raises ValueError if the file is damaged, or of a version that did not keep its settings."""
    try:
        with zipfile.ZipFile(path) as file:
            if file.testzip():  # reads every checksum; torch does not
                raise ValueError("a checksum differs")
        state = torch.load(path, map_location="cpu", weights_only=True)
        settings = state.get("settings")
    except Exception as error:  # a file that was cut off or altered fails in many ways
        raise ValueError(f"{path} is damaged, or not the state of a training ({type(error).__name__}); delete it to "
                         "begin again, or choose another --out") from error  # fmt: skip
    if not settings:
        raise ValueError(f"{path} was written by an older version, without its data and settings, so it cannot be "
                         "resumed; choose another --out")  # fmt: skip
    return state


@contextlib.contextmanager
def asked_to_stop() -> Iterator[list[int]]:
    """A list that is empty until Ctrl-C or SIGTERM comes. A second Ctrl-C is an ordinary KeyboardInterrupt."""
    asked = []

    def note(number, frame):
        if number == signal.SIGINT and asked:
            raise KeyboardInterrupt
        asked.append(number)
        os.write(2, b"\nsaves after this step and stops; Ctrl-C again stops at once\n")  # print may be busy just now

    if threading.current_thread() is not threading.main_thread():  # other threads do not get signals
        yield asked
        return
    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def command(main: Callable[[], None]) -> None:
    """Run a script: an error is one sentence and exit code 2; Ctrl-C or SIGTERM outside the steps ends it with 130."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a KeyboardInterrupt, as Ctrl-C is
    try:
        main()
        PartialState().destroy_process_group()
    except KeyboardInterrupt:
        print("\nstopped; the state that was saved last is whole", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError, FloatingPointError) as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)
