"""How many Toybox pictures this machine draws in a second, with one worker process per usable core.

    python benchmarks/toybox_speed.py

Writes data/results/toybox_speed.json. The pictures are random ones of the whole world, as in the training set; the
start of the worker processes is not counted.
"""

import argparse
import datetime
import json
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from PIL import __version__ as pillow

from course_lib.environment import RESULTS, usable_cores
from course_lib.toybox.world import render, sample_spec


def draw(job: tuple[int, int, int, int]) -> int:
    """Draw `count` pictures, numbered from `start`; returns how many."""
    seed, start, count, size = job
    for k in range(start, start + count):
        render(sample_spec(np.random.default_rng([seed, k])), size)
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS / "toybox_speed.json")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--size", type=int, default=64, help="side in pixels")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=usable_cores(), help="processes (default: one per usable core)")
    args = parser.parse_args()
    step = max(1, args.images // (10 * args.workers))
    jobs = [(args.seed, k, min(step, args.images - k), args.size) for k in range(0, args.images, step)]
    with ProcessPoolExecutor(args.workers, mp_context=get_context("spawn")) as pool:
        list(pool.map(draw, [(args.seed, 0, 4, args.size)] * 4 * args.workers))  # starts and warms the processes
        start = time.perf_counter()
        drawn = sum(pool.map(draw, jobs))
        seconds = time.perf_counter() - start
    result = {
        "images_per_second": round(drawn / seconds, 1),
        "images": drawn,
        "size": args.size,
        "workers": args.workers,
        "seconds": round(seconds, 2),
        "seed": args.seed,
        "device": f"CPU, {usable_cores()} core{'s' * (usable_cores() != 1)}",
        "numpy": np.__version__,
        "pillow": pillow,
        "date": datetime.date.today().isoformat(),
    }
    print(f"{result['images_per_second']:.0f} pictures of {args.size} pixels a second, {args.workers} processes")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
