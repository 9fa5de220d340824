"""`make lab` opens notebook 00 with the whole repository beside it, and looking at a notebook does not change it."""

import json
import platform
import re
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from importlib.util import find_spec
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
NEEDED = find_spec("jupyterlab") and shutil.which("make")


@pytest.fixture(scope="module")
def printed_url():
    """What `CI=1 make lab` prints; JupyterLab runs while the tests do."""
    make = ["make", "--dry-run", "--assume-old", ".venv/.installed", "lab", "CI=1", f"PY={sys.executable}"]
    lines = subprocess.run(make, cwd=REPO, capture_output=True, text=True, check=True).stdout.splitlines()
    command = next(line for line in lines if "jupyterlab" in line).split()
    lab = subprocess.Popen([*command, "--ServerApp.port=0"], cwd=REPO, stderr=subprocess.PIPE, text=True)
    try:
        end = time.monotonic() + 60
        while not (found := re.search(r"http://localhost\S+", lab.stderr.readline())) and time.monotonic() < end:
            assert lab.poll() is None, "JupyterLab ended"
        assert found, "JupyterLab printed no address"
        while time.monotonic() < end:  # it prints a moment before it answers
            try:
                fetch(found.group(), "/api")
                break
            except urllib.error.URLError:
                time.sleep(0.2)
        yield found.group()
    finally:
        lab.kill()
        lab.communicate()


def fetch(printed, path="", **options):
    """The page that a browser gets for the printed address, or another page of the same server."""
    server, token = re.fullmatch(r"(http://[^/]+)/.*token=(\w+)", printed).groups()
    request = urllib.request.Request(server + path if path else printed, **options)
    request.add_header("Authorization", f"token {token}")
    with urllib.request.urlopen(request, timeout=30) as answer:
        return answer.read().decode()


@pytest.mark.slow
@pytest.mark.skipif(not NEEDED, reason="needs make and jupyterlab")
def test_the_printed_address_opens_notebook_00(printed_url):
    assert re.search(r'"treePath": "notebooks/00_start_here.ipynb"', fetch(printed_url))


@pytest.mark.slow
@pytest.mark.skipif(not NEEDED, reason="needs make and jupyterlab")
def test_the_file_browser_shows_the_library(printed_url):
    names = [entry["name"] for entry in json.loads(fetch(printed_url, "/api/contents"))["content"]]
    assert {"course_lib", "notebooks", "README.md"} <= set(names)


@pytest.mark.slow
@pytest.mark.skipif(not NEEDED, reason="needs make and jupyterlab")
def test_a_notebook_that_is_opened_and_saved_is_unchanged(printed_url):
    path = REPO / "notebooks" / "00_start_here.ipynb"
    before, place = path.read_bytes(), "/api/contents/notebooks/00_start_here.ipynb"
    model = json.loads(fetch(printed_url, place + "?content=1&type=notebook"))
    metadata = model["content"]["metadata"]
    assert metadata["language_info"]["version"] == platform.python_version()  # so JupyterLab has nothing to add
    assert metadata["kernelspec"]["display_name"] == "Python 3 (ipykernel)"
    try:
        body = json.dumps({"type": "notebook", "format": "json", "content": model["content"]}).encode()
        fetch(printed_url, place, data=body, method="PUT")
        assert path.read_bytes() == before
    finally:
        path.write_bytes(before)
