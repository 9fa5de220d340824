"""tools/run_course.py on a folder of tiny notebooks: what it writes and says, and that it can be stopped."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import psutil
import pytest
import run_course
from bs4 import BeautifulSoup

REPO = Path(__file__).resolve().parents[1]
ALT = "Two lines: one with x < 3, one without."
PICTURE = f"""
import matplotlib.pyplot as plt
from course_lib import plots
plots.show(plots.curves()[0], alt="{ALT}")
"""


def notebook(path, *cells):
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in cells])
    nb.cells.insert(0, nbformat.v4.new_markdown_cell(f"# {path.stem} · A title\n\nNext: [02](02_next.ipynb). $x_0$"))
    path.parent.mkdir(exist_ok=True)
    nbformat.write(nb, path)


def command(folder, *more):
    return [sys.executable, str(REPO / "tools/run_course.py"), "--notebooks", str(folder / "nb"),
            "--build", str(folder / "build"), *more]  # fmt: skip


def test_a_folder_is_run_and_reported(tmp_path):
    notebook(tmp_path / "nb/01_first.ipynb", PICTURE)
    (tmp_path / "nb/02_next.ipynb").write_text("{ not JSON", encoding="utf-8")
    notebook(tmp_path / "nb/03_last.ipynb", "print(1)", "raise ValueError('this one fails')")
    done = subprocess.run(command(tmp_path), capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "02_next.ipynb is not a notebook" in done.stderr and "this one fails" in done.stderr
    assert "3 of 3: 03_last" in done.stderr  # the bar says how far it is
    assert done.stdout.startswith("3 notebooks in the profile smoke")
    assert "1 of 3 notebooks ran" in done.stdout
    rows = json.loads((tmp_path / "build/course.json").read_text(encoding="utf-8"))["notebooks"]
    assert [row["ok"] for row in rows] == [True, False, False]
    (image,) = BeautifulSoup((tmp_path / "build/01_first.html").read_text(encoding="utf-8"), "html.parser").select(
        "img"
    )
    assert image["alt"] == ALT
    index = BeautifulSoup((tmp_path / "build/index.html").read_text(encoding="utf-8"), "html.parser")
    assert [link["href"] for link in index.select("a")] == ["01_first.html", "03_last.html"]
    assert index.a.text == "01_first · A title"


def test_a_kernel_stores_each_picture_with_its_words(tmp_path):
    notebook(tmp_path / "nb/01_first.ipynb", PICTURE)
    client = run_course.NotebookClient(
        nbformat.read(tmp_path / "nb/01_first.ipynb", as_version=4), kernel_name="python3"
    )
    nb = client.execute()
    picture, words = nb.cells[1].outputs
    assert picture.metadata["image/png"]["alt"] == ALT and picture.data["image/png"]
    assert "x &lt; 3" in words.data["text/html"] and words.data["text/plain"] == ALT


@pytest.mark.skipif(os.name == "nt", reason="Windows has no signal to send to another process")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_can_be_stopped(tmp_path, number):
    started, later = tmp_path / "started", tmp_path / "later"
    notebook(
        tmp_path / "nb/01_first.ipynb",
        f"import os, time; open({str(started)!r}, 'w').write(str(os.getpid()))",
        "while True:\n    try:\n        time.sleep(60)\n    except KeyboardInterrupt:\n        pass",
    )
    notebook(tmp_path / "nb/02_next.ipynb", f"open({str(later)!r}, 'w')")
    process = subprocess.Popen(command(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        end = time.monotonic() + 60
        while not (started.is_file() and started.read_text()) and time.monotonic() < end:
            time.sleep(0.1)
        process.send_signal(number)
        out, err = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert "0 of 2 notebooks ran, then the run was stopped" in out
    assert not psutil.pid_exists(int(started.read_text())) and not later.exists()


def test_an_unknown_profile_is_refused_before_anything_runs(tmp_path):
    notebook(tmp_path / "nb/01_first.ipynb", "print(1)")
    surroundings = os.environ | {"COURSE_PROFILE": "big"}
    done = subprocess.run(command(tmp_path), capture_output=True, text=True, timeout=60, env=surroundings)
    assert done.returncode == 2 and not (tmp_path / "build").exists()
    assert done.stderr.splitlines()[-1].endswith("COURSE_PROFILE: expected one of smoke, cpu, gpu, got 'big'"), (
        done.stderr
    )


def test_a_row_has_the_slowest_cell_of_each_section(tmp_path):
    nb = nbformat.v4.new_notebook()
    code, text = nbformat.v4.new_code_cell, nbformat.v4.new_markdown_cell
    slow = [code("import time; time.sleep(1.2)"), code("time.sleep(1.6)"), code("1")]
    nb.cells = [text("# Title\n\n## First part"), *slow, text("words"), text("## Second"), code("2")]
    nbformat.write(nb, tmp_path / "01_slow.ipynb")
    row = run_course.run_notebook(tmp_path / "01_slow.ipynb", "01", tmp_path / "build", False, set())
    assert row["ok"] and list(row["slowest"]) == ["First part"] and 1.6 <= row["slowest"]["First part"] < 10


def test_the_expected_time_is_that_of_the_record(monkeypatch):
    rows = [{"notebook": "01_a.ipynb", "seconds": 100.0}, {"notebook": "02_b.ipynb", "seconds": 205.0}]
    monkeypatch.setattr(run_course, "recorded", lambda profile: {"device": "CPU, 2 cores", "notebooks": rows})
    text = run_course.expected([Path("01_a.ipynb"), Path("02_b.ipynb")], "cpu")
    assert text == "2 notebooks in the profile cpu, about 5 minutes (measured on CPU, 2 cores)"
    assert run_course.expected([Path("03_c.ipynb")], "cpu") == "1 notebook in the profile cpu"


def test_a_failed_notebook_keeps_its_record(monkeypatch, tmp_path):
    monkeypatch.setattr(run_course, "REPO", tmp_path)
    row = {"ok": True, "peak_mib": 1}
    first = [row | {"notebook": name, "seconds": 1.0} for name in ("01.ipynb", "02.ipynb")]
    run_course.merge_record({"profile": "cpu", "date": "2026-01-01", "notebooks": first})
    second = [
        row | {"notebook": "01.ipynb", "seconds": 2.0, "ok": False},
        row | {"notebook": "02.ipynb", "seconds": 2.0},
    ]
    run_course.merge_record({"profile": "cpu", "date": "2026-01-02", "notebooks": second})
    kept = run_course.recorded("cpu")["notebooks"]
    assert [(row["seconds"], row["date"]) for row in kept] == [(1.0, "2026-01-01"), (2.0, "2026-01-02")]
    speed = run_course.recorded("cpu")["ms_per_evaluation"]
    assert 0 < speed < 60_000  # notebook 00 scales the minutes of the record by it
