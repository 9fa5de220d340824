"""Run every command that README.md and CONTRIBUTING.md show, in a fresh clone, and say which of them work.

    python3 tools/try_commands.py --list               only lists the commands that would be run or left out
    python3 tools/try_commands.py                      runs them, in the order of the pages
    python3 tools/try_commands.py --only personalize   those that match a regular expression

Commands are the lines of blocks marked bash, each block marked python as a whole, and the code in sentences that begins
with a program. They run in the repository, with .venv/bin first in PATH, so it has to be a clone that may be changed:
notebooks and tables are written. New files that git does not ignore are removed at the end.
Run `make install` first. The script itself needs nothing but Python; exit status 1 if a command fails.
"""

import argparse
import os
import re
import subprocess
import sys
import time
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "CONTRIBUTING.md")
PROGRAMS = r"(?:[A-Z_]+=\S+ )*(?:make|python|pip|jupyter|bash|torchrun|uv|\.venv/bin/\w+(?:-\w+)*) \S.*"
LEFT_OUT = {  # commands that are not run, and why; the first pattern that matches counts
    r"make lab|jupyter lab": "opens a browser and does not end",
    r"make (course|notebooks)( PROFILE=cpu)?": "takes about an hour; `make course PROFILE=smoke` runs the same cells",
    r"make lock.*|uv pip compile.*": "asks the package index and changes requirements.lock",
    r"pip install.*|python -m venv .*": "needs the package index; `make install` does the same",
    r"make install PYTHON=.*": "needs that version of Python",
    r"python -m course_lib.personalize|python -m course_lib.personalize train": "the name of a command, not a call",
    r"(.*/)?python3? tools/try_commands.py.*": "this script",
}


def commands(text: str) -> list[str]:
    """The commands of a page, in their order and each once; a block marked python is one command."""
    found, fenced = [], r"^```(\w*)\n(.*?)^```$"
    for piece in re.split(r"(^```\w*\n.*?^```$)", text, flags=re.M | re.S):
        block = re.match(fenced, piece, re.M | re.S)
        if block and block[1] == "bash":
            lines = [re.sub(r"\s+#.*", "", line).strip() for line in block[2].replace("\\\n", " ").splitlines()]
            found += [line for line in lines if line and not line.startswith("#")]
        elif block and block[1] == "python":
            found.append("# python\n" + block[2].strip())
        elif not block:
            found += [code for code in re.findall(r"`([^`]+)`", piece) if re.fullmatch(PROGRAMS, code, re.S)]
    return list(dict.fromkeys(" ".join(c.split()) if not c.startswith("# python") else c for c in found))


def why_left_out(command: str) -> str:
    """The reason why a command is not run, or ""."""
    return next((why for pattern, why in LEFT_OUT.items() if re.fullmatch(pattern, command, re.S)), "")


def run(command: str, timeout: float) -> tuple[bool, float, str]:
    """(worked, seconds, its output)."""
    paths = [str(REPO / ".venv" / name) for name in ("bin", "Scripts")] + [os.environ.get("PATH", "")]
    call = ["python", "-c", command] if command.startswith("# python") else ["bash", "-c", command]
    environment = os.environ | {"PATH": os.pathsep.join(paths)}
    start = time.perf_counter()
    try:
        done = subprocess.run(call, cwd=REPO, env=environment, timeout=timeout, stdin=subprocess.DEVNULL,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip
        worked, output = done.returncode == 0, done.stdout
    except subprocess.TimeoutExpired as error:
        worked, output = False, (error.stdout or b"") + f"\nstopped after {timeout:.0f} s".encode()
    return worked, time.perf_counter() - start, output.decode("utf-8", "replace")


def new_files() -> set[str]:
    """Files that git neither tracks nor ignores."""
    listed = ["git", "ls-files", "--others", "--exclude-standard"]
    return set(subprocess.run(listed, cwd=REPO, capture_output=True, text=True, check=True).stdout.splitlines())


def main() -> int:
    """Try them; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="run nothing")
    parser.add_argument("--only", default="", metavar="REGEX", help="commands that match")
    parser.add_argument("--timeout", type=float, default=7200, metavar="SECONDS", help="of one command (default 7200)")
    args = parser.parse_args()
    before, failed = new_files(), 0
    for page in PAGES:
        for command in commands((REPO / page).read_text(encoding="utf-8")):
            shown, why = f"{page}: {command}".replace("\n", "\n    "), why_left_out(command)
            if not re.search(args.only, command):
                continue
            if why or args.list:
                print(f"left out  {shown}  ({why})" if why else f"would run {shown}")
                continue
            worked, seconds, output = run(command, args.timeout)
            print(f"{'ok' if worked else 'FAILED':9} {shown}  ({seconds:.0f} s)", flush=True)
            if not worked:
                failed += 1
                print("\n".join("          " + line for line in output.splitlines()[-15:]), flush=True)
    for name in sorted(new_files() - before):
        (REPO / name).unlink()
        print(f"removed   {name}")
    print(f"{failed} failed" if not args.list else "nothing was run")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
