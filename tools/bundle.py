"""Write all that a room without a network needs into one folder, for a USB stick: `make bundle`.

    python tools/bundle.py build/bundle

The folder holds the course with its weights (what is committed), the wheels of requirements.lock for machines like
this one (system, processor, version of Python), a page of each notebook, and the slides. On the other machine, which
needs Python and make: `bash install.sh`.
"""

import argparse
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
BUILD_NEEDS = ("setuptools>=77",)  # what pyproject.toml asks for, to install the course itself
INSTALL = """#!/usr/bin/env bash
# Installs the course from the wheels beside it; no network is used.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/course"
export PIP_NO_INDEX=1 PIP_FIND_LINKS="$PWD/../wheels"
make install
echo "Ready. Now: cd course, then make lab"
"""
README = """# The course without a network

- `bash install.sh` installs the course from `wheels/` into `course/.venv`.
  It needs {system}, Python {python}, and make.
- `cd course`, then `make lab` opens it.
- `pages/`: each notebook as a page, to be read in a browser. `slides/`: the decks, as HTML and PDF.
- `course/slides/INSTRUCTOR.md` (Korean: `INSTRUCTOR.ko.md`) says how to give the seminar.
"""


def wheels(folder: Path) -> None:
    """Download the wheels of the lock, and what pip needs to install the course itself."""
    pip = [sys.executable, "-m", "pip", "download", "-q", "-d", str(folder)]
    subprocess.run([*pip, "--no-deps", "-r", str(REPO / "requirements.lock")], check=True)
    subprocess.run([*pip, *BUILD_NEEDS], check=True)


def committed(folder: Path) -> None:
    """What is committed, without the history."""
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "course.tar"
        subprocess.run(["git", "-C", str(REPO), "archive", "-o", str(path), "HEAD"], check=True)
        with tarfile.open(path) as archive:
            archive.extractall(folder, filter="data")


def pages_and_slides(folder: Path) -> None:
    """Copy what `make pages` and `make slides` have written. Raises SystemExit if one of them was not run."""
    build = REPO / "build"
    slides = [path for path in (build / "slides").glob("*.*") if path.suffix in (".html", ".pdf")]
    for name, found in (("pages", list(build.glob("*.html"))), ("slides", slides)):
        if not found:
            raise SystemExit(f"tools/bundle.py: no {name} in build/; run `make {name}` first")
        (folder / name).mkdir(parents=True)
        for path in found:
            shutil.copy2(path, folder / name)
    if (build / "mathjax").is_dir():  # the pages' formulas
        shutil.copytree(build / "mathjax", folder / "pages" / "mathjax")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=REPO / "build" / "bundle")
    args = parser.parse_args()
    if args.folder.exists() and any(args.folder.iterdir()):
        parser.error(f"{args.folder} is not empty: name another folder, or remove it")
    args.folder.mkdir(parents=True, exist_ok=True)
    pages_and_slides(args.folder)
    committed(args.folder / "course")
    (args.folder / "install.sh").write_text(INSTALL, encoding="utf-8", newline="\n")
    system, python = f"{platform.system()} on {platform.machine()}", ".".join(map(str, sys.version_info[:2]))
    (args.folder / "README.md").write_text(README.format(python=python, system=system), encoding="utf-8")
    wheels(args.folder / "wheels")
    size = sum(path.stat().st_size for path in args.folder.rglob("*") if path.is_file())
    print(f"{args.folder}: {size / 1e9:.1f} GB; on the other machine: bash install.sh")


if __name__ == "__main__":
    main()
