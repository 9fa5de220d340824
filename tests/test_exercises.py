"""Every exercise has a place to write in, three hints and a solution that is Python."""

import ast
import re
from pathlib import Path

import exercises
import nbformat
import pytest

NOTEBOOKS = sorted((Path(__file__).resolve().parents[1] / "notebooks").glob("*.ipynb"))
each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


@each
def test_exercises_have_stub_hints_and_solution(path):
    nb = nbformat.read(path, as_version=4)
    tasks = list(exercises.found(nb))
    assert tasks, "no exercise was found"
    titles = [cell for cell in nb.cells if cell.cell_type == "markdown" and "**Exercise" in cell.source]
    assert len(titles) == len(tasks), "an exercise is not followed by its stub (tag `exercise`) and its solution"
    for number, task in enumerate(tasks, 1):
        assert task.text.startswith(f"**Exercise {int(path.stem[:2])}.{number}: "), task.text[:60]
        assert re.findall(r"<summary>Hint (\d)</summary>", task.text) == ["1", "2", "3"], task.text[:60]
        assert ast.parse(task.solution).body, f"exercise {number} has an empty solution"
        assert ast.dump(ast.parse(task.solution)) != ast.dump(ast.parse(task.stub))


def test_solutions_take_the_places_of_the_stubs():
    new = nbformat.v4
    text = "**Exercise 3.1: w.** Try it.\n\n<details><summary>Hint 1</summary>\n\nx\n</details>"
    code = "First:\n\n```python\nw = 3\n```\n\nThen:\n\n```python\nw += 1\n```\n"
    told = f"<details><summary>Solution</summary>\n\n{code}</details>"
    stub = new.new_code_cell("w = ...", metadata={"tags": ["exercise"]})
    nb = new.new_notebook(
        cells=[new.new_code_cell("w = 0"), new.new_markdown_cell(text), stub, new.new_markdown_cell(told)]
    )
    assert [task.solution for task in exercises.found(nb)] == ["w = 3\nw += 1"]
    solved = exercises.with_solutions(nb)
    assert solved.cells[2].source == "w = 3\nw += 1" and nb.cells[2].source == "w = ..."
