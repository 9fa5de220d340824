"""The exercises of a notebook: text, stub, solution.

`python tools/exercises.py notebooks/03_*.ipynb build/solved` writes copies with each solution in the place of its stub;
`pytest --nbval-lax build/solved/*.ipynb` runs them.
"""

import copy
import re
import sys
from collections import namedtuple
from pathlib import Path

import nbformat

Exercise = namedtuple("Exercise", "text stub solution place")
SOLUTION = r"<details><summary>Solution</summary>(.*)</details>"


def found(nb):
    """An Exercise for each cell `**Exercise N.M: title.**` that is followed by its stub and its folded solution."""
    for place, (text, stub, told) in enumerate(zip(nb.cells, nb.cells[1:], nb.cells[2:])):
        folded = re.search(SOLUTION, told.source, re.S)
        if text.source.startswith("**Exercise") and "exercise" in stub.metadata.get("tags", ()) and folded:
            code = "\n".join(re.findall(r"```python\n(.*?)\n```", folded[1], re.S))
            yield Exercise(text.source, stub.source, code, place + 1)


def with_solutions(nb):
    """A copy of the notebook with each solution in the place of its stub."""
    nb = copy.deepcopy(nb)
    for exercise in list(found(nb)):
        nb.cells[exercise.place].source = exercise.solution
    return nb


if __name__ == "__main__":
    *sources, folder = map(Path, sys.argv[1:])
    folder.mkdir(parents=True, exist_ok=True)
    for source in sources:
        nbformat.write(with_solutions(nbformat.read(source, as_version=4)), folder / source.name)
