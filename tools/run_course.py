"""Runs the notebooks of the course, each in a fresh kernel, and reports time and memory.

python tools/run_course.py --profile cpu            every notebook; an HTML page of each goes to build/
python tools/run_course.py --only 01 03 --write     these two, and keep their outputs in the notebooks
"""

import argparse
import json
import os
import platform
import re
import sys
import threading
import time
from pathlib import Path

import nbformat
from kernel import Stopped, execute, ignore_signals, stop_on_signals, watch_memory
from nbclient import NotebookClient
from pages import write_index, write_page
from tidy import leaked_paths, tidy
from tqdm import tqdm

from course_lib import environment

REPO = Path(__file__).resolve().parents[1]


def sections(nb):
    """For each cell the heading it stands under, without its marks."""
    heading, found = "", []
    for cell in nb.cells:
        if cell.cell_type == "markdown":
            heading = ([heading] + re.findall(r"^##+ (.+)$", cell.source, flags=re.MULTILINE))[-1].strip()
        found.append(heading)
    return found


def run_notebook(path, label, build, write, pages):
    """Executes one notebook and writes its page, with `write` its outputs too; returns its row of the summary.

    `slowest` of a row: for each section the seconds of its slowest cell, where that is more than a second.
    """
    peak, done, start = [0], threading.Event(), time.perf_counter()
    row = {"notebook": path.name, "ok": False, "seconds": 0.0, "peak_mib": 0, "slowest": {}}
    try:
        nb = nbformat.read(path, as_version=4)
    except Exception as problem:
        print(f"\n{path.name} is not a notebook: {str(problem)[:200]}\n", file=sys.stderr)
        return row
    nb.metadata.pop("widgets", None)
    quiet = ["--log-level=40"]  # without the kernel's remarks on its own transport
    client = NotebookClient(nb, kernel_name="python3", timeout=3600, record_timing=False, extra_arguments=quiet)
    watcher = threading.Thread(target=watch_memory, args=(client, peak, done), daemon=True)
    watcher.start()
    try:
        with tqdm(total=sum(bool(c.source.strip()) for c in nb.cells if c.cell_type == "code"), desc=label) as bar:
            headings, began = sections(nb), {}

            def executed(cell_index, **_):
                seconds = round(time.perf_counter() - began[cell_index], 1)
                if seconds > max(1, row["slowest"].get(headings[cell_index], 0)):
                    row["slowest"][headings[cell_index]] = seconds
                bar.update()

            client.on_cell_start = lambda cell_index, **_: began.update({cell_index: time.perf_counter()})
            client.on_cell_executed = executed  # on_cell_complete is called before the kernel has answered
            problem = execute(client, path.parent)
    finally:
        done.set()
        watcher.join()
    error = f"{type(problem).__name__}: {problem}" if problem else ""
    row |= {"seconds": round(time.perf_counter() - start, 1), "peak_mib": peak[0] >> 20}
    tidy(nb)
    write_page(nb, path, build, pages)
    if write and not error:
        leaks = leaked_paths(nb, (str(REPO), str(Path.home())))
        error = "\n".join(f"cell {number} shows a path of this machine: {text}" for number, text in leaks)
        if not error:
            with environment.write_whole(path) as temporary:
                nbformat.write(nb, temporary)
    if error:
        print(f"\n{path.name}: {error}\n", file=sys.stderr)
    return row | {"ok": not error}


def conditions():
    """The date, profile, device and versions of a run."""
    import torch  # here, so that --help is quick

    return {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "profile": environment.profile(),
        "device": environment.device_name(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def ms_per_evaluation():
    """Milliseconds per picture that the CIFAR-10 network takes here, timed as in notebook 00: the fastest of six."""
    import torch  # here, so that --help is quick

    from course_lib.diffusion import checkpoint

    device, seconds = environment.device(), []
    model = checkpoint.load(environment.CHECKPOINTS / "ddpm-cifar10", device)
    xt = torch.randn(environment.pick(smoke=4, cpu=32, gpu=256), 3, 32, 32).to(device)
    for _ in range(6):
        start = time.perf_counter()
        with torch.no_grad(), environment.autocast(device):
            model(xt, 500).sum().item()
        seconds.append(time.perf_counter() - start)
    return round(1000 * min(seconds) / len(xt), 3)


def recorded(profile):
    """data/results/course_<profile>.json, the runs that wrote the notebooks' outputs, or None."""
    path = REPO / "data" / "results" / f"course_{profile}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def merge_record(report):
    """Merges the rows of this run into data/results/course_<profile>.json, which the README's table is made from."""
    path = REPO / "data" / "results" / f"course_{report['profile']}.json"
    earlier = (recorded(report["profile"]) or {"notebooks": []})["notebooks"]
    # Rows of other days stay, and so does that of a notebook that failed, since its outputs are the old ones.
    new = [row | {"date": report["date"]} for row in report["notebooks"] if row["ok"]]
    rows = {row["notebook"]: row for row in [*earlier, *new]}
    path.parent.mkdir(parents=True, exist_ok=True)
    speed = {"ms_per_evaluation": ms_per_evaluation()}
    merged = {**report, **speed, "notebooks": [rows[name] for name in sorted(rows)]}
    path.write_text(json.dumps(merged, indent=1) + "\n", encoding="utf-8")


def expected(paths, profile):
    """How long these notebooks took when they were last recorded, as a sentence."""
    record = recorded(profile) or {"notebooks": []}
    seconds = {row["notebook"]: row["seconds"] for row in record["notebooks"]}
    text = f"{len(paths)} notebook{'s' * (len(paths) != 1)} in the profile {profile}"
    if not all(path.name in seconds for path in paths):
        return text
    minutes = max(1, round(sum(seconds[path.name] for path in paths) / 60))
    return f"{text}, about {minutes} minute{'s' * (minutes != 1)} (measured on {record['device']})"


def arguments():
    parser = argparse.ArgumentParser(prog="python tools/run_course.py", description=__doc__.split("\n")[0])
    parser.add_argument("--profile", choices=environment.PROFILES, help="sizes; default: as the environment says")
    parser.add_argument("--only", nargs="+", metavar="NN", default=[""], help="starts of notebook names")
    parser.add_argument("--write", action="store_true", help="keep the outputs in the notebooks")
    parser.add_argument("--notebooks", type=Path, default=REPO / "notebooks", help="their folder")
    parser.add_argument("--build", type=Path, default=REPO / "build", help="the folder for the pages and course.json")
    args = parser.parse_args()
    if args.profile:
        os.environ["COURSE_PROFILE"] = args.profile  # the kernels inherit it
    try:
        args.profile = environment.profile()
    except ValueError as problem:
        parser.error(str(problem))
    args.paths = sorted(args.notebooks.resolve().glob("[0-9]*.ipynb"))
    for start in args.only:
        if not any(path.name.startswith(start) for path in args.paths):
            parser.error(f"{args.notebooks} has no notebook that starts with '{start}'")
    return args


def main():
    args = arguments()
    stop_on_signals()
    args.build.mkdir(exist_ok=True, parents=True)
    chosen = [path for path in args.paths if path.name.startswith(tuple(args.only))]
    run, stopped = [], False
    print(expected(chosen, args.profile), flush=True)
    try:
        for k, path in enumerate(chosen, 1):
            label = f"{k} of {len(chosen)}: {path.stem}"
            run.append(run_notebook(path, label, args.build, args.write, {each.stem for each in args.paths}))
    except Stopped:
        stopped = True
    ignore_signals()
    write_index(args.paths, args.build)
    report = {**conditions(), "notebooks": run}
    if args.write:
        merge_record(report)
    (args.build / "course.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print("\n" + ", ".join(f"{key} {value}" for key, value in report.items() if key != "notebooks"))
    for row in run:
        print("ok    " if row["ok"] else "FAILED", "{seconds:8.1f} s {peak_mib:6d} MiB  {notebook}".format(**row))
    end = ", then the run was stopped" if stopped else ""
    print(f"{sum(row['ok'] for row in run)} of {len(chosen)} notebooks ran{end}; their pages are in {args.build.name}/")
    return 130 if stopped else int(not all(row["ok"] for row in run))


if __name__ == "__main__":
    sys.exit(main())
