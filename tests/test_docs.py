"""Docstrings: everything public has one, and the notebook and section it names exist."""

import ast
import re
from pathlib import Path

import nbformat
import pytest

REPO = Path(__file__).resolve().parents[1]
LIBRARY = REPO / "course_lib"
PARTS = ("diffusion", "latent", "editing", "personalization")
LESSONS = sorted(path for part in PARTS for path in (LIBRARY / part).glob("*.py") if path.name != "__init__.py")
# The other files of toybox/ are how the renderer draws: nothing of them is called from elsewhere.
DATA = [
    LIBRARY / f"{name}.py"
    for name in ("data/cifar10", "data/pictures", "toybox/world", "toybox/captions", "toybox/sets")
]
FILES = [
    *LESSONS,
    *DATA,
    *(LIBRARY / f"{name}.py" for name in ("evaluation/judge", "evaluation/metrics", "plots", "environment")),
]
NOTEBOOK = r"notebooks/\w+\.ipynb"
each = pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(REPO).as_posix())


def public(tree):
    """(name, node) of every public function, class and method; forward() is described by its class."""
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            yield node.name, node
            for inner in node.body if isinstance(node, ast.ClassDef) else []:
                if isinstance(inner, ast.FunctionDef) and not inner.name.startswith("_") and inner.name != "forward":
                    yield f"{node.name}.{inner.name}", inner


def references(docstring):
    """[(notebooks, sections)] of each sentence "Derived in: ...", "Used by: ..." or "Explained in: ..."."""
    text = " ".join((docstring or "").split())
    for sentence in re.findall(r"(?:Derived in|Used by|Explained in): (.*?)(?:\.(?= )|\.?$)", text):
        yield re.findall(NOTEBOOK, sentence), re.findall(r'"([^"]+)"', sentence)


def headings(name):
    """The headings of a notebook, without # and number."""
    cells = nbformat.read(REPO / name, as_version=4).cells
    lines = [line for cell in cells if cell.cell_type == "markdown" for line in cell.source.splitlines()]
    return {re.sub(r"^#+\s*(\d+(\.\d+)*\.?\s+)?", "", line).strip() for line in lines if line.startswith("#")}


def docstrings(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    yield path.stem, ast.get_docstring(tree)
    for name, node in public(tree):
        yield name, ast.get_docstring(node)


def test_there_is_something_to_check():
    assert len(FILES) >= 12 and all(path.is_file() for path in FILES)
    found = [r for path in FILES for _, text in docstrings(path) for r in references(text)]
    assert len(found) > 20 and sum(len(sections) for _, sections in found) > 20


@each
def test_everything_public_says_what_it_is(path):
    assert [name for name, text in docstrings(path) if not text] == []


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_a_module_of_a_part_names_its_notebook(path):
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert any(notebooks for notebooks, _ in references(text))


@each
def test_the_notebooks_and_sections_named_exist(path):
    for name, text in docstrings(path):
        assert ("notebooks/" in (text or "")) <= any(True for _ in references(text)), f"{name}: in no known form"
        for notebooks, sections in references(text):
            assert notebooks, f"{name}: a reference without a notebook"
            for notebook in notebooks:
                assert (REPO / notebook).is_file(), f"{name}: {notebook} does not exist"
                missing = set(sections) - headings(notebook)
                assert not missing, f"{name}: {notebook} has no section {missing}; it has {sorted(headings(notebook))}"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('Derived in: notebooks/01_a.ipynb, section "The\n    loss".', [(["notebooks/01_a.ipynb"], ["The loss"])]),
        ('Derived in: notebooks/01_a.ipynb, sections "A" and "B".\n\nMore.', [(["notebooks/01_a.ipynb"], ["A", "B"])]),
        ("Derived in: notebooks/02_b.ipynb.\nNot here: x.", [(["notebooks/02_b.ipynb"], [])]),
        ("Used by: notebooks/02_b.ipynb and notebooks/03_c.ipynb, section \"M\".",
         [(["notebooks/02_b.ipynb", "notebooks/03_c.ipynb"], ["M"])]),
        ("Nothing to see.", []),
    ],
)  # fmt: skip
def test_every_way_to_refer_is_understood(text, found):
    assert list(references(text)) == found


# ---- CONTRIBUTING ----

CONTRIBUTING = re.sub(r"```.*?```", "", (REPO / "CONTRIBUTING.md").read_text(encoding="utf-8"), flags=re.S)


def section(title):
    """The text below a heading of CONTRIBUTING, up to the next one."""
    return CONTRIBUTING.split(f"## {title}\n")[1].split("\n## ")[0]


def defined(path):
    """The functions, classes and methods of a file."""
    tree = ast.parse((REPO / path).read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))}


def test_contributing_names_files_that_exist():
    code = [c for c in re.findall(r"`([^`\n]+)`", CONTRIBUTING) if not c.startswith((".venv", "build/"))]
    paths = [c for c in code if re.fullmatch(r"[\w.]+/[\w./-]*|\w+\.(?:py|md|toml|yml|lock)", c)]
    assert len(paths) > 30
    assert [path for path in paths if not (REPO / path).exists()] == []


@pytest.mark.parametrize("title", ["One training step, file by file", "One sampling step, file by file"])
def test_the_steps_name_functions_of_the_files(title):
    path, checked = None, 0
    for code in re.findall(r"`([^`]+)`", section(title)):
        if code.endswith(".py"):
            path = code
        elif code.isidentifier():
            assert path and code in defined(path), f"CONTRIBUTING, {title}: {path} has no {code}"
            checked += 1
    assert checked > 5


def test_how_to_add_names_things_that_exist():
    known = set()
    for path in [*LIBRARY.rglob("*.py"), *(REPO / "tools").glob("*.py"), *(REPO / "tests").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            known.add(getattr(node, "name", None) or getattr(node, "id", None) or getattr(node, "attr", None))
    names = [code for code in re.findall(r"`([^`]+)`", section("How to add")) if re.fullmatch(r"[A-Za-z_.]+", code)]
    parts = {part for name in names if not name.endswith(".py") for part in name.split(".")}
    assert len(parts) > 10 and sorted(parts - known - {"cpu"}) == []


def test_contributing_lists_every_reason_to_skip_a_test():
    reasons = set()
    for path in (REPO / "tests").glob("test_*.py"):
        text = path.read_text(encoding="utf-8")
        reasons |= set(re.findall(r'(?:reason=|[^\w]skip\(|importorskip\()"([^"]+)"', text))
    assert len(reasons) > 5
    listed = set(re.findall(r"`([^`]+)`", section("Set up and check")))
    assert sorted(reasons - listed) == []
