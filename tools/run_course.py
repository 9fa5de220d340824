"""Runs the notebooks of the course, each in a fresh kernel, and reports time and memory.

python tools/run_course.py --profile cpu            every notebook; HTML and course.json go to build/
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
import psutil
from nbclient import NotebookClient
from nbconvert import HTMLExporter
from tqdm import tqdm

REPO = Path(__file__).resolve().parents[1]
BUILD = REPO / "build"
MACHINE_PATHS = r"(?<![\w.])(/home/|/Users/|/root/|[A-Z]:\\|\S*ipykernel_\d+)"


def leaked_paths(nb, own=()):
    """(cell number, text) for each output that shows a path of the machine it ran on; `own` adds known folders."""
    known = [rf"(?<![\w.]){re.escape(folder)}(?![\w-])" for folder in own if len(folder) > 1]
    pattern = re.compile("|".join([MACHINE_PATHS, *known]))
    for number, cell in enumerate(nb.cells, 1):
        for out in cell.get("outputs", []):
            data = [value for kind, value in out.get("data", {}).items() if not kind.startswith("image/")]
            text = "\n".join(map(str, [out.get("text", ""), *out.get("traceback", []), *data]))
            if found := pattern.search(text):
                yield number, text[found.start() : found.start() + 80].split("\n")[0]


def last_state(text):
    """What a terminal shows in the end: of each line, the part after its last carriage return."""
    lines = text.replace("\x1b[A", "").split("\n")
    return "\n".join(([part for part in line.split("\r") if part.strip()] or [""])[-1] for line in lines)


def tidy(nb):
    """Drops what differs between machines and runs but tells a reader nothing; changes `nb` in place."""
    nb.metadata.kernelspec = {"display_name": "Python 3", "language": "python", "name": "python3"}
    nb.metadata.get("language_info", {}).pop("version", None)
    if not all(widgets.get("state") for widgets in nb.metadata.get("widgets", {}).values()):
        del nb.metadata["widgets"]  # with it GitHub would say "Invalid Notebook"
    for cell in nb.cells:
        cell.metadata.pop("execution", None)
        streams, kept = {}, []
        # A bar arrives in pieces, between prints too: one stream each is joined before looking for its last state.
        for out in cell.get("outputs", []):
            if out.get("name") in streams:
                streams[out.name].text += out.text
                continue
            kept.append(out)
            if out.output_type == "stream":
                streams[out.name] = out
            else:
                streams.pop("stdout", None)  # prints stay on their side of a picture
        for out in [out for out in kept if out.output_type == "stream"]:
            out.text = last_state(out.text)
        if "outputs" in cell:
            cell.outputs = [out for out in kept if out.get("text", "-").strip()]


def watch_memory(client, peak, done):
    """Until `done` is set, keeps in peak[0] the most bytes that the kernel and its children held at once."""
    while not done.wait(0.2):
        try:
            root = psutil.Process(client.km.provisioner.pid)
            peak[0] = max(peak[0], sum(p.memory_info().rss for p in [root, *root.children(recursive=True)]))
        except (AttributeError, TypeError, psutil.Error):
            pass  # the kernel has not started yet, or a child has just ended


def run_notebook(path, write):
    """Executes one notebook and writes its HTML, with `write` its outputs too; returns its row of the summary."""
    nb = nbformat.read(path, as_version=4)
    nb.metadata.pop("widgets", None)
    peak, done, error, start = [0], threading.Event(), "", time.perf_counter()
    quiet = ["--log-level=40"]  # without the kernel's remarks on its own transport
    client = NotebookClient(nb, kernel_name="python3", timeout=3600, record_timing=False, extra_arguments=quiet)
    watcher = threading.Thread(target=watch_memory, args=(client, peak, done), daemon=True)
    watcher.start()
    with tqdm(total=sum(bool(c.source.strip()) for c in nb.cells if c.cell_type == "code"), desc=path.stem) as bar:
        client.on_cell_complete = lambda **_: bar.update()
        try:
            client.execute(cwd=str(path.parent))
        except Exception as problem:  # whatever one notebook dies of, the others still run
            error = f"{type(problem).__name__}: {problem}"
    done.set()
    watcher.join()
    seconds = round(time.perf_counter() - start, 1)
    tidy(nb)
    (BUILD / f"{path.stem}.html").write_text(HTMLExporter().from_notebook_node(nb)[0], encoding="utf-8")
    if write and not error:
        leaks = leaked_paths(nb, (str(REPO), str(Path.home())))
        error = "\n".join(f"cell {number} shows a path of this machine: {text}" for number, text in leaks)
        if not error:
            nbformat.write(nb, path)
    if error:
        print(f"\n{path.name}: {error}\n", file=sys.stderr)
    return {"notebook": path.name, "ok": not error, "seconds": seconds, "peak_mib": peak[0] >> 20}


def conditions():
    """When, in which profile and on what the notebooks ran."""
    import torch  # here, so that --help is quick

    from course_lib import environment

    return {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "profile": environment.profile(),
        "device": environment.device_name(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def keep(report):
    """Merges the rows of this run into data/results/course_<profile>.json, which the README's table is made from."""
    path = REPO / "data" / "results" / f"course_{report['profile']}.json"
    earlier = json.loads(path.read_text(encoding="utf-8"))["notebooks"] if path.is_file() else []
    new = [row | {"date": report["date"]} for row in report["notebooks"]]  # rows of other days stay
    rows = {row["notebook"]: row for row in [*earlier, *new]}
    path.parent.mkdir(parents=True, exist_ok=True)
    merged = {**report, "notebooks": [rows[name] for name in sorted(rows)]}
    path.write_text(json.dumps(merged, indent=1) + "\n", encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(prog="python tools/run_course.py", description=__doc__.split("\n")[0])
    parser.add_argument("--profile", choices=["smoke", "cpu", "gpu"], help="sizes; default: as the environment says")
    parser.add_argument("--only", nargs="+", metavar="NN", default=[""], help="notebooks whose names start so")
    parser.add_argument("--write", action="store_true", help="keep the outputs in the notebooks")
    args = parser.parse_args()
    paths = sorted((REPO / "notebooks").glob("[0-9]*.ipynb"))
    for start in args.only:
        if not any(path.name.startswith(start) for path in paths):
            parser.error(f"notebooks/ has no notebook that starts with '{start}'")
    if args.profile:
        os.environ["COURSE_PROFILE"] = args.profile  # the kernels inherit it
    BUILD.mkdir(exist_ok=True)
    run = [run_notebook(path, args.write) for path in paths if path.name.startswith(tuple(args.only))]
    report = {**conditions(), "notebooks": run}
    if args.write:
        keep(report)
    (BUILD / "course.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print("\n" + ", ".join(f"{key} {value}" for key, value in report.items() if key != "notebooks"))
    for row in run:
        print("ok    " if row["ok"] else "FAILED", "{seconds:8.1f} s {peak_mib:6d} MiB  {notebook}".format(**row))
    print(f"{sum(row['ok'] for row in run)} of {len(run)} notebooks ran; HTML and course.json are in build/")
    return 0 if all(row["ok"] for row in run) else 1


if __name__ == "__main__":
    sys.exit(main())
