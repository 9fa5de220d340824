"""README shows the figures that were measured, and every file it points at exists."""

import re
import subprocess
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]


def test_tables_are_the_measured_ones():
    run = subprocess.run(
        [sys.executable, "tools/readme.py", "--check"], cwd=REPO, capture_output=True, text=True, encoding="utf-8"
    )
    assert run.returncode == 0, run.stderr


def test_links_lead_to_files():
    links = re.findall(r"\]\(([^)#]+)\)", (REPO / "README.md").read_text(encoding="utf-8"))
    files = [link for link in links if not link.startswith("http")]
    assert files, "README.md links to no file, so nothing was tested"
    assert [link for link in files if not (REPO / link).exists()] == []


def test_commands_name_files_that_exist():
    text = (REPO / "README.md").read_text(encoding="utf-8")
    scripts = re.findall(r"(?:training|benchmarks)/\w+\.py", text)
    assert scripts and [name for name in scripts if not (REPO / name).is_file()] == []
    targets = set(re.findall(r"(?:`|^)make ([a-z-]+)", text, re.M))  # commands, not prose
    assert "test" in targets
    makefile = (REPO / "Makefile").read_text(encoding="utf-8")
    assert [target for target in sorted(targets) if not re.search(rf"^{target}:", makefile, re.M)] == []
