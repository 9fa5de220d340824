"""The pages show the figures that were measured, keep to their length, and name files and commands that exist."""

import re

import numpy as np
import pytest
import readme
import readme_figure
import tables
from methods import ON_SHEET, SEEDS, SUBJECTS
from PIL import Image
from try_commands import commands, why_left_out

from course_lib.environment import REPOSITORY as REPO
from course_lib.environment import RESULTS
from course_lib.evaluation.claims import CLAIMS
from course_lib.toybox.subjects import NEW_SCENES, prompts
from course_lib.toybox.subjects import SUBJECTS as ALL
from course_lib.toybox.world import render

TEXTS = {page: (REPO / page).read_text(encoding="utf-8") for page in (*readme.PAGES, "measurements/README.md")}
each_page = pytest.mark.parametrize("page", TEXTS)
# Words of former pages: another name is used now, or the sentence was a diary.
FORBIDDEN = r"\bminiature|\bcan not\b|\bgenerations?\b|\bwas planned\b|\bno GPU was\b|\bhears?\b|\bbelieves?\b"


def seen(text):
    """The words that a reader of the page sees: no comments, no link targets, no signs without a letter or digit."""
    text = re.sub(r"<!--.*?-->|\]\([^)]*\)", " ", text, flags=re.S)
    return [word for word in text.split() if re.search(r"\w", word)]


@pytest.mark.parametrize("page", readme.PAGES)
def test_tables_are_the_measured_ones(page):
    assert readme.filled(TEXTS[page], page) == TEXTS[page], f"{page} is old: run `make readme`"


def test_an_old_figure_is_seen_and_an_unknown_table_is_refused():
    text = "a\n<!-- table: speed -->\nold\n<!-- end -->\nb\n"
    again = readme.filled(text, "page")
    assert (
        again != text and again.startswith("a\n<!-- table: speed -->\n| what |") and again.endswith("<!-- end -->\nb\n")
    )
    with pytest.raises(SystemExit, match="page: no function makes the table nothing"):
        readme.filled("<!-- table: nothing -->\n<!-- end -->", "page")
    with pytest.raises(SystemExit, match="no closing"):
        readme.filled("<!-- table: speed -->\n| a |\n", "page")


def test_readme_is_short():
    assert len(TEXTS["README.md"].splitlines()) <= 150
    by_hand = re.sub(r"<!-- table: .*?<!-- end -->", "", TEXTS["README.md"], flags=re.S)  # tables grow with the course
    assert len(seen(by_hand)) <= 650


def test_seen_words_are_counted():
    assert seen("<!-- table: a -->\n| [C1](notebooks/x y.ipynb) holds | 0.1 |\n| --- |") == ["[C1", "holds", "0.1"]


@each_page
def test_no_forbidden_word(page):
    assert re.findall(FORBIDDEN, TEXTS[page], re.I) == []


def test_every_claim_and_notebook_is_listed():
    text = TEXTS["README.md"]
    assert [n for n in range(1, 22) if not re.search(rf"^\| \[?C{n}[ab]?\b", text, re.M)] == []
    missing = [path.name for path in (REPO / "notebooks").glob("*.ipynb") if f"(notebooks/{path.name})" not in text]
    assert missing == []


def test_claims_without_a_record_are_not_yet_measured(monkeypatch):
    monkeypatch.setattr(tables, "read", lambda name: {"claims": {}})
    rows = tables.verdicts().splitlines()[2:]
    assert len(rows) == len(CLAIMS) and all("| not yet measured |" in row for row in rows)


@each_page
def test_links_lead_to_files(page):
    here = (REPO / page).parent
    links = re.findall(r"\]\(([^)\s]+)\)", TEXTS[page])
    files = [link.split("#") for link in links if not link.startswith("http")]
    assert [link for link in files if not (here / link[0]).exists()] == []
    for name, *anchor in files:
        if anchor:
            text = (here / name).read_text(encoding="utf-8")
            titles = [re.sub(r"[^\w -]", "", line.lstrip("# ").lower()).replace(" ", "-")
                      for line in text.splitlines() if line.startswith("#")]  # fmt: skip
            assert anchor[0] in titles, f"{page}: {name} has no heading {anchor[0]}"


@each_page
def test_pictures_have_words(page):
    assert [alt for alt in re.findall(r"!\[([^\]]*)\]", TEXTS[page]) if len(alt.split()) < 5] == []


def test_the_figure_shows_the_recorded_samples():
    strips = readme_figure.recorded_strips()
    assert len(strips) == len(SUBJECTS) * (2 + (len(ON_SHEET) - 1) * len(SEEDS))
    for name in SUBJECTS:  # the renderer's rows tell whether the tiles were cut out in the right places
        truth = [render(ALL[name].spec(seed=0, **field)) for _, field in prompts(name)[: len(NEW_SCENES)]]
        assert np.array_equal(strips[f"{name} truth 0"], np.concatenate(truth, axis=1))
        assert not np.array_equal(strips[f"{name} dreambooth 0"], strips[f"{name} dreambooth 1"])
    assert np.array_equal(np.array(readme_figure.figure(strips)), np.array(Image.open(RESULTS / "readme_figure.png")))


@each_page
def test_commands_name_files_that_exist(page):
    scripts = re.findall(r"(?:training|benchmarks|measurements|tools|slides|course_lib)/[\w/]+\.(?:py|sh)", TEXTS[page])
    assert [name for name in scripts if not (REPO / name).is_file()] == []
    targets = set(re.findall(r"(?:`|^)make ([a-z-]+)", TEXTS[page], re.M))  # commands, not prose
    makefile = (REPO / "Makefile").read_text(encoding="utf-8")
    assert [target for target in sorted(targets) if not re.search(rf"^{target}:", makefile, re.M)] == []


def test_the_commands_of_a_page_are_found():
    text = "\n".join([
        "Say `make help`, `make`, or `python x.py\n--a`; not `x.py`.", "```bash", "make test   # all", "a \\", "  b",
        "```", "```python", "x = 1  # one", "```", "```", "no command", "```", "`make test`",
    ])  # fmt: skip
    assert commands(text) == ["make help", "python x.py --a", "make test", "a b", "# python\nx = 1  # one"]
    assert why_left_out("make lab") and not why_left_out("make test") and not why_left_out("make course PROFILE=smoke")
