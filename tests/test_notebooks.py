"""Every committed notebook is valid, executed, free of errors and machine paths, and introduced by its top cell."""

import re
from pathlib import Path

import nbformat
import pytest
from tidy import last_state, leaked_paths, tidy

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

REPO = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((REPO / "notebooks").glob("*.ipynb"))
ADDRESS = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]["Repository"]
MAX_BYTES = 3_000_000
each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def read(path):
    return nbformat.read(path, as_version=4)


def written(cell):
    return cell.cell_type == "code" and cell.source.strip()


def test_there_are_notebooks():
    assert NOTEBOOKS, "notebooks/ holds no notebook, so nothing below was tested"


@each
def test_is_valid(path):
    nbformat.validate(nbformat.read(path, as_version=nbformat.NO_CONVERT))


@each
def test_every_code_cell_was_executed_without_error(path):
    cells = list(enumerate(read(path).cells, 1))
    fresh = [number for number, cell in cells if written(cell) and cell.execution_count is None]
    assert not fresh, f"cells {fresh} were not executed: run `make notebooks ONLY={path.stem[:2]}`"
    failed = [n for n, cell in cells if any(out.output_type == "error" for out in cell.get("outputs", []))]
    assert not failed, f"cells {failed} show an error"


@each
def test_outputs_show_no_path_of_a_machine(path):
    assert list(leaked_paths(read(path))) == []


@each
def test_widgets_come_with_their_state(path):
    for kind, widgets in read(path).metadata.get("widgets", {}).items():
        assert widgets.get("state"), f'{kind} has no state: GitHub shows "Invalid Notebook"'


@each
def test_has_a_picture(path):
    kinds = {kind for cell in read(path).cells for out in cell.get("outputs", []) for kind in out.get("data", {})}
    assert kinds & {"image/png", "image/jpeg", "image/svg+xml"}, "no output is a picture"


@each
def test_top_cell_introduces_the_notebook(path):
    top = read(path).cells[0]
    assert top.cell_type == "markdown"
    named = re.findall(r"course_lib/[\w/]+\.py", top.source)
    assert named, "the top cell names no reference file course_lib/….py"
    assert [name for name in named if not (REPO / name).is_file()] == []
    budget = re.search(r"budget", top.source, re.I)
    assert budget, "the top cell declares no budgets"
    assert re.search(r"\d\s*(s|min|minutes?)\b", top.source), "no time in the budgets"
    assert re.search(r"\d\s*[GM]i?B\b", top.source), "no memory in the budgets"
    badge = ADDRESS.replace("https://github.com/", "https://colab.research.google.com/github/")
    link = f"{badge}/blob/main/notebooks/{path.name}"
    assert "Open in Colab" in top.source and f"({link})" in top.source, f"the Colab badge must lead to {link}"


@each
def test_is_small(path):
    assert path.stat().st_size < MAX_BYTES, (
        f"{path.stat().st_size / 1e6:.1f} MB, less than {MAX_BYTES / 1e6:.0f} wanted"
    )


def notebook_printing(*outputs):
    return nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("run()", outputs=list(outputs))])


def printing(text, name="stdout"):
    return nbformat.v4.new_output("stream", text=text, name=name)


@pytest.mark.parametrize(
    ("text", "leaks"),
    [
        ("saved to /home/ada/course/x.png", 1),
        ("/Users/ada/x.py:3: UserWarning", 1),
        ("C:\\Users\\ada", 1),
        ("/tmp/ipykernel_314/159.py:2: UserWarning", 1),
        ("in /opt/mine/notebooks", 1),
        ("see https://example.org/home/page and data/checkpoints, ratio a/b", 0),
    ],
)
def test_a_path_of_a_machine_is_seen(text, leaks):
    assert len(list(leaked_paths(notebook_printing(printing(text)), ["/opt/mine"]))) == leaks


def test_a_progress_bar_is_kept_in_its_last_state():
    assert last_state("\r  0%|  |\r100%|##|\nnext\r\n") == "100%|##|\nnext\n"
    nb = notebook_printing(printing("\r  0%|", "stderr"), printing("step\n"), printing("\r100%|\n", "stderr"))
    tidy(nb)
    assert [out.text for out in nb.cells[0].outputs] == ["100%|\n", "step\n"]
