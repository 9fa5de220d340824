"""Every committed notebook is valid, executed, free of errors and machine paths, and introduced by its top cell."""

import importlib
import re
import statistics
import sys
from pathlib import Path

import nbformat
import pytest
from IPython.core.inputtransformer2 import TransformerManager
from tidy import last_state, leaked_paths, tidy

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

REPO = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((REPO / "notebooks").glob("*.ipynb"))
ADDRESS = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]["Repository"]
MAX_BYTES = 3_000_000
MAX_LINES, MAX_MEDIAN = 25, 10  # of a code cell, and of the median one
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
def test_controls_leave_a_picture(path):
    nb = read(path)
    assert "widgets" not in nb.metadata
    kinds = [set(out.get("data", {})) for cell in nb.cells for out in cell.get("outputs", [])]
    assert not any("application/vnd.jupyter.widget-view+json" in kind for kind in kinds), (
        "use course_lib.widgets.explore"
    )


@each
def test_has_a_picture(path):
    kinds = {kind for cell in read(path).cells for out in cell.get("outputs", []) for kind in out.get("data", {})}
    assert kinds & {"image/png", "image/jpeg", "image/svg+xml"}, "no output is a picture"


@each
def test_every_picture_has_its_words(path):
    silent = []
    for number, cell in enumerate(read(path).cells, 1):
        outputs = cell.get("outputs", [])
        for out, after in zip(outputs, [*outputs[1:], {}]):
            alt = out.get("metadata", {}).get("image/png", {}).get("alt")
            if "image/png" in out.get("data", {}) and (not alt or after.get("data", {}).get("text/plain") != alt):
                silent.append(number)
    assert not silent, f"cells {silent}: show the figure with plots.show(fig, alt=...), and run the notebook again"


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


@each
def test_code_holds_no_comment_to_a_tool(path):
    found = [
        f"cell {number}: {line.strip()}"
        for number, cell in enumerate(read(path).cells, 1)
        for line in cell.source.splitlines()
        if cell.cell_type == "code" and re.search(r"#\s*(fmt:|noqa|NBVAL|type:\s*ignore)", line)
    ]
    assert not found, f"{found}: a strict cell has the tag nbval-check-output, the rest is in pyproject.toml"


@each
def test_cells_are_short(path):
    lengths = [len(cell.source.splitlines()) for cell in read(path).cells if written(cell)]
    long = max(lengths) > MAX_LINES or statistics.median(lengths) > MAX_MEDIAN
    text = f"longest cell {max(lengths)} lines, median {statistics.median(lengths):g}"
    assert not long, f"{text}; wanted at most {MAX_LINES} and {MAX_MEDIAN}"


@each
def test_kernel_is_named_as_jupyterlab_names_it(path):
    kernel = read(path).metadata.kernelspec
    assert dict(kernel) == {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}


def set_up_cell(path):
    return next(cell.source for cell in read(path).cells if cell.cell_type == "code")


@each
def test_set_up_cell_is_that_of_every_notebook(path):
    assert set_up_cell(path) == set_up_cell(NOTEBOOKS[0])
    assert f" {ADDRESS} course" in set_up_cell(path)


@pytest.fixture
def set_up(monkeypatch, tmp_path):
    """set_up(fetch): run the set-up cell where the course is not installed; fetch(line) stands for the shell."""
    importlib.import_module("course_lib.plots")  # so that all that is taken out here is put back at the end
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setattr(sys, "path_importer_cache", {})
    for name in [name for name in sys.modules if name.partition(".")[0] == "course_lib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [finder for finder in sys.meta_path if "editable" not in repr(finder)])

    def run(fetch):
        shell = type("Shell", (), {"system": staticmethod(fetch)})
        exec(TransformerManager().transform_cell(set_up_cell(NOTEBOOKS[0])), {"get_ipython": lambda: shell})

    return run


def test_set_up_in_a_wrong_kernel_fetches_nothing_and_says_what_to_do(set_up):
    lines = []
    with pytest.raises(ModuleNotFoundError, match="start with `make lab`"):
        set_up(lines.append)
    assert lines == []


def test_set_up_on_colab_without_a_network_fails_in_one_sentence_and_can_be_repeated(set_up, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "google.colab", sys)
    lines = []
    with pytest.raises(ModuleNotFoundError, match="on Colab, check the network and run this cell again"):
        set_up(lines.append)
    assert [line.split()[:2] for line in lines] == [["git", "clone"], ["pip", "install"]]

    def fetch(line):  # now there is one
        package = tmp_path / "course" / "course_lib"
        package.mkdir(parents=True, exist_ok=True)
        (package / "__init__.py").touch()
        (package / "plots.py").write_text("used = []\ndef use_style(): used.append(1)\n", encoding="utf-8")

    set_up(fetch)
    assert sys.modules["course_lib.plots"].used == [1]


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


def test_of_controls_the_picture_is_kept():
    view = {"model_id": "1", "version_major": 2, "version_minor": 0}
    data = {"application/vnd.jupyter.widget-view+json": view, "image/png": "iVBOR"}
    nb = notebook_printing(nbformat.v4.new_output("display_data", data=data))
    nb.metadata.widgets = {"application/vnd.jupyter.widget-state+json": {"state": {}}}
    tidy(nb)
    assert "widgets" not in nb.metadata
    assert dict(nb.cells[0].outputs[0].data) == {"image/png": "iVBOR"}
