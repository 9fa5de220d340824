"""The shape of course_lib: who may import whom, no re-exports, files and steps short enough to read."""

import ast
from pathlib import Path

import measure_code
import pytest

LIBRARY = Path(__file__).resolve().parents[1] / "course_lib"
FILES = sorted(LIBRARY.rglob("*.py"))
# For notebooks, training and tests only: no part of the course imports them.
OUTSIDE = {"evaluation", "plots", "widgets", "bench", "checks", "cli", "personalize"}
FORBIDDEN = {
    "diffusion": {"latent", "editing", "personalization"} | OUTSIDE,
    "latent": {"editing", "personalization"} | OUTSIDE,
    "editing": {"personalization"} | OUTSIDE,
    "personalization": {"editing"} | OUTSIDE,
    "data": {"diffusion", "latent", "editing", "personalization"} | OUTSIDE,
    "toybox": {"diffusion", "latent", "editing", "personalization"} | OUTSIDE,
    "environment": {"diffusion", "latent", "editing", "personalization"} | OUTSIDE,
    "evaluation": {"cli", "personalize", "plots", "widgets", "bench", "checks"},
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


# Lines, docstrings included. The budgets keep the library a text that a person can read in a day.
BUDGETS = {"lessons": 2_900, "evaluation": 1_600, "editing and unCLIP": 1_060, "the rest": 2_817}


@pytest.mark.parametrize("group", BUDGETS)
def test_each_group_of_files_keeps_its_budget(group):
    assert 0 < measure_code.lines_by_group()[group] <= BUDGETS[group]


def test_every_file_belongs_to_a_group():
    total = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in FILES)
    assert sum(measure_code.lines_by_group().values()) == total


def test_functions_fit_on_a_screen():
    long = [f"{label(path)}: {name}" for path in FILES if measure_code.group_of(path) != "toybox"
            for name, lines, _ in measure_code.functions(path) if lines > 40]  # fmt: skip
    assert long == []


@pytest.mark.filterwarnings("ignore:prompt. more than")
def test_a_step_opens_few_files():
    steps = measure_code.steps()
    assert {"Part 1, training", "Stable Diffusion, training, dreambooth", "Stable Diffusion, sampling"} <= set(steps)
    for step, files in steps.items():
        assert sum(map(len, files.values())) > 2, f"{step}: nothing was watched"
        most = 4 if step.endswith("sampling") else 6 if step.endswith("custom_diffusion") else 5  # it adds its own hook
        assert len(files) <= most, f"{step} opens {sorted(files)}"


def compared_strings(source):
    """The string literals that a module compares with == or != or in."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Compare):
            for side in ast.walk(node):
                if isinstance(side, ast.Constant) and isinstance(side.value, str):
                    yield side.value


@pytest.mark.parametrize("path", [path for path in FILES if path.name != "registry.py"], ids=label)
def test_no_file_asks_which_base_model_it_has(path):
    """What depends on the base model stands on its registry entry."""
    assert not {"toybox", "sd15"} & set(compared_strings(path.read_text(encoding="utf-8")))


@pytest.mark.parametrize("source", ['sd.name == "toybox"', '"toybox" != name', 'x in ("toybox", "b")'])
def test_the_rule_sees_every_comparison(source):
    assert "toybox" in set(compared_strings(source))


def test_lambdas_are_not_given_names():
    lines = [line for path in FILES for line in path.read_text(encoding="utf-8").splitlines()]
    assert lines and not [line for line in lines if "noqa: E731" in line]
