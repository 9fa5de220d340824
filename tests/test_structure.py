"""The shape of course_lib: who may import whom, no re-exports, files short enough to read."""

import ast
from pathlib import Path

import pytest

LIBRARY = Path(__file__).resolve().parents[1] / "course_lib"
FILES = sorted(LIBRARY.rglob("*.py"))
# For notebooks, training and tests only: nothing in a part of the course leans on them.
OUTSIDE = {"evaluation", "plots", "widgets", "checks", "cli", "personalize"}
FORBIDDEN = {
    "diffusion": {"latent", "editing", "personalization"} | OUTSIDE,
    "latent": {"editing", "personalization"} | OUTSIDE,
    "editing": {"personalization"} | OUTSIDE,
    "personalization": {"editing"} | OUTSIDE,
    "data": {"diffusion", "latent", "editing", "personalization"} | OUTSIDE,
    "toybox": {"diffusion", "latent", "editing", "personalization"} | OUTSIDE,
    "environment": {"diffusion", "latent", "editing", "personalization"} | OUTSIDE,
    "evaluation": {"cli", "personalize", "plots", "widgets", "checks"},
}
MAX_LINES = 400


def imported_parts(source, package):
    """The parts of course_lib that a module in `package` (such as "course_lib.latent") imports, at any depth of it."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:  # `from ..x import y` is counted from the package
                parents = package.split(".")
                base = ".".join([*parents[: len(parents) - node.level + 1], *filter(None, [base])])
            names |= {f"{base}.{alias.name}" for alias in node.names}
    return {name.split(".")[1] for name in names if name.startswith("course_lib.")}


def part_of(path):
    """ "latent" for course_lib/latent/vae.py, "plots" for course_lib/plots.py."""
    return path.relative_to(LIBRARY).parts[0].removesuffix(".py")


def label(path):
    return path.relative_to(LIBRARY.parent).as_posix()


def test_there_is_a_library():
    assert FILES, "course_lib holds no Python file"


@pytest.mark.parametrize("path", FILES, ids=label)
def test_imports_follow_the_order_of_the_parts(path):
    package = ".".join(path.relative_to(LIBRARY.parent).parent.parts)
    wrong = imported_parts(path.read_text(encoding="utf-8"), package) & FORBIDDEN.get(part_of(path), set())
    assert not wrong, f"{label(path)} may not import course_lib.{', course_lib.'.join(sorted(wrong))}"


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import course_lib.latent.vae", {"latent"}),
        ("from course_lib import plots", {"plots"}),
        ("from course_lib.editing.attention import attention_hook", {"editing"}),
        ("def f():\n    from ..personalization import finetune", {"personalization"}),
        ("from .. import editing", {"editing"}),
        ("from . import unet", {"diffusion"}),
        ("import torch, course_library.latent", set()),
    ],
)
def test_the_rule_sees_every_way_to_import(source, found):
    assert imported_parts(source, "course_lib.diffusion") == found


@pytest.mark.parametrize("path", [path for path in FILES if path.name == "__init__.py"], ids=label)
def test_packages_do_not_re_export(path):
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    assert not any(isinstance(node, (ast.Import, ast.ImportFrom)) for node in nodes), f"{label(path)} imports something"


@pytest.mark.parametrize("path", FILES, ids=label)
def test_files_stay_short(path):
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_LINES, f"{label(path)} has {lines} lines, {MAX_LINES} at most"
