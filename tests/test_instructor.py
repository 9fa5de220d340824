"""The instructor's guide: both languages in step, every exercise listed, and all that it names exists."""

import json
import re
import sys
from pathlib import Path

import exercises
import nbformat
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
SLIDES = ROOT / "slides"
sys.path.insert(0, str(SLIDES))
import deck  # noqa: E402
import measured  # noqa: E402

GUIDES = {
    language: (SLIDES / name).read_text(encoding="utf-8")
    for language, name in (("en", "INSTRUCTOR.md"), ("ko", "INSTRUCTOR.ko.md"))
}
NOTEBOOKS = {
    path.name[:2]: nbformat.read(path, as_version=4) for path in sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))
}
KNOWN_DECKS = set(deck.decks())
LEVELS = {"en": ("easy", "medium", "hard"), "ko": ("쉬움", "보통", "어려움")}
NUMBERS = r"\d+\.\d+"
# Versions may be written; anything else with a decimal point, a per cent sign or an interval looks measured.
VERSIONS = r"Python 3\.\d+ to 3\.\d+|Python 3\.\d+–3\.\d+|Stable Diffusion 1\.5|CC BY 4\.0|Apache-2\.0"
languages = pytest.mark.parametrize("language", GUIDES)


def exercises_of_notebooks():
    """("1.2", "fewer steps") of every exercise, in order."""
    for nb in NOTEBOOKS.values():
        for one in exercises.found(nb):
            number, title = re.match(r"\*\*Exercise (\d+\.\d+): (.*?)\.?\*\*", one.text, re.S).groups()
            yield number, " ".join(title.split())


def without_code(text):
    return re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)


def headings(text):
    return re.findall(r"^(#+) (.+)$", without_code(text), flags=re.M)


def tables(text):
    """Each table as its rows, each row as its cells; the line of dashes is left out."""
    blocks = re.findall(r"(?:^\|.*\|\n)+", text, flags=re.M)
    return [
        [[cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines() if set(line) - set("|-")]
        for block in blocks
    ]


def listed(text):
    """The rows of the table of exercises: number and title, level, minutes, answer."""
    return [row for table in tables(text) for row in table if re.match(NUMBERS + " ", row[0])]


def sections(text):
    """(notebook, section) of every `03, "Guidance scale"`."""
    return re.findall(r"\b(\d\d), \"([^\"]+)\"", " ".join(text.split()))


def headings_of(nb):
    cells = [cell.source for cell in nb.cells if cell.cell_type == "markdown"]
    return {found.strip() for found in re.findall(r"^##+ (.+)$", "\n".join(cells), flags=re.M)}


@languages
def test_every_exercise_is_listed_in_order(language):
    expected = [f"{number} {title}" for number, title in exercises_of_notebooks()]
    assert len(expected) > 50
    assert [row[0] for row in listed(GUIDES[language])] == expected


@languages
def test_a_row_of_an_exercise_is_whole(language):
    for row in listed(GUIDES[language]):
        assert len(row) == 4, row
        assert row[1] in LEVELS[language], f"{row[0]}: {row[1]}"
        assert 5 <= int(row[2]) <= 60, row[0]
        assert len(row[3]) >= 20, f"{row[0]}: what does a full answer show?"
    assert {row[1] for row in listed(GUIDES[language])} == set(LEVELS[language])


def test_languages_grade_alike():
    for english, korean in zip(listed(GUIDES["en"]), listed(GUIDES["ko"]), strict=True):
        assert LEVELS["en"].index(english[1]) == LEVELS["ko"].index(korean[1]), english[0]
        assert english[2] == korean[2], english[0]


def test_languages_have_the_same_structure():
    english, korean = (GUIDES[language] for language in ("en", "ko"))
    assert [level for level, _ in headings(english)] == [level for level, _ in headings(korean)]
    assert [len(table) for table in tables(english)] == [len(table) for table in tables(korean)]
    for ours, theirs in zip(tables(english), tables(korean), strict=True):
        assert [len(row) for row in ours] == [len(row) for row in theirs], ours[0]
        assert len({len(row) for row in ours}) == 1, f"a row of {ours[0]} has another number of cells"
    assert re.findall(r"^```.*?^```$", english, re.M | re.S) and len(re.findall(r"^```", english, re.M)) == len(
        re.findall(r"^```", korean, re.M)
    )


def test_languages_name_the_same_things():
    """Sections, live cells, exercises and notebooks of the agendas, claims, files."""
    patterns = {
        "sections": r"\b\d\d, \"[^\"]+\"",
        "live cells": r"\bL\d+\b",
        "claims": r"\bC\d+[ab]?\b",
        "files": r"`[\w./*-]+\.(?:html|png|md|py|yaml|css|sh)`",
        "exercises": NUMBERS,
    }
    for what, pattern in patterns.items():
        english, korean = (
            re.findall(pattern, " ".join(re.sub(VERSIONS, "", GUIDES[language]).split())) for language in ("en", "ko")
        )
        skip = {"`INSTRUCTOR.md`", "`INSTRUCTOR.ko.md`"}
        assert sorted(set(english) - skip) == sorted(set(korean) - skip), what


@languages
def test_sections_named_exist(language):
    found = sections(GUIDES[language])
    assert len(found) >= 25
    for number, section in found:
        assert number in NOTEBOOKS, f"there is no notebook {number}"
        assert section in headings_of(NOTEBOOKS[number]), f"notebook {number} has no section {section!r}"


@languages
def test_decks_named_exist(language):
    text = GUIDES[language]
    built = re.findall(r"build/slides/(\w+)\.(\w+)\.html", text)
    assert {name for name, _ in built} <= KNOWN_DECKS and {code for _, code in built} == set(deck.LANGUAGES)
    first, *others = tables(text)
    assert [row[0].strip("`") for row in first[1:]] == [name for name, _ in built[::2]] == list(deck.decks())
    agendas = [table for table in others if any("`seminar`" in row[1] or "`part" in row[1] for row in table[1:])]
    assert len(agendas) == 4
    named = {name for table in agendas for row in table[1:] for name in re.findall(r"`([^`]+)`", row[1])}
    assert named == KNOWN_DECKS


@pytest.mark.parametrize(
    "language, said", [("en", r"they take about (\d+) minutes together"), ("ko", r"모두 합쳐 (\d+)분")]
)
def test_minutes_of_the_slides_that_can_go(language, said):
    slides = {name: deck.slide(name) for name in deck.decks()["seminar"]["slides"]}
    saved = sum(one["minutes"] for one in slides.values() if one.get("skip"))
    (found,) = re.findall(said, " ".join(GUIDES[language].split()))
    assert abs(int(found) - saved) <= 0.5, f"the seminar's slides with `skip: true` take {saved:g} minutes, not {found}"


def test_without_the_slides_that_can_go_each_row_of_the_seminar_has_one():
    def rows(names):
        first = [(SLIDES / "src" / f"{name}.yaml").read_text(encoding="utf-8").splitlines()[0] for name in names]
        return {row for line in first if line.startswith("#") for row in re.findall(r"\d\.\d", line)}

    names = deck.decks()["seminar"]["slides"]
    lost = rows(names) - rows(name for name in names if not deck.slide(name).get("skip"))
    assert not lost, f"all slides of {sorted(lost)} are marked `skip: true`"


@languages
def test_agendas_name_notebooks_live_cells_and_exercises_that_exist(language):
    text = GUIDES[language]
    cells = {row[0]: row for table in tables(text) for row in table if re.fullmatch(r"L\d+", row[0])}
    assert len(cells) >= 10
    for name, row in cells.items():
        assert len(sections(row[1])) == 1, f"{name}: expected a notebook and one section"
        assert re.search(r"`(?:data|build)/", row[3]), f"{name}: what is shown if it fails?"
    known = {number for number, _ in exercises_of_notebooks()}
    for table in tables(text):
        if not any("`seminar`" in row[1] or "`part" in row[1] for row in table[1:]) or len(table[0]) < 5:
            continue
        for row in table[1:]:
            assert set(re.findall(r"\b\d\d\b", row[2])) <= set(NOTEBOOKS), row
            assert set(re.findall(r"\bL\d+\b", row[3])) <= set(cells), row
            assert set(re.findall(NUMBERS, " ".join(row[4:]))) <= known, row


@languages
def test_live_cells_stand_in_an_agenda(language):
    rows = [row for table in tables(GUIDES[language]) for row in table]
    used = {name for row in rows if len(row) > 4 for name in re.findall(r"\bL\d+\b", row[3])}
    cells = {row[0] for row in rows if re.fullmatch(r"L\d+", row[0])}
    assert used == cells


@languages
def test_files_and_commands_named_exist(language):
    text = GUIDES[language]
    for path in re.findall(r"`((?:data|slides|tools|training|course_lib|tests)/[\w./-]*)`", text):
        assert (ROOT / path.replace("NAME", "algorithm1")).exists(), path
    for name in re.findall(r"`build/(\w+)\.html`", text):
        assert name == "index" or (ROOT / "notebooks" / f"{name}.ipynb").is_file(), name
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert (SLIDES / link).is_file(), link
    made = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.M))
    asked = set(re.findall(r"(?:`|^)make ([a-z-]+)", text, flags=re.M))
    assert {"slides", "pages", "bundle"} <= asked <= made


@languages
def test_verdicts_are_those_of_the_record(language):
    claims = json.loads((ROOT / "data" / "results" / "claims.json").read_text(encoding="utf-8"))["claims"]
    words = "|".join(re.escape(said[language]) for said in measured.VERDICTS.values())
    found = re.findall(rf"\b(C\d+[ab]?) \(({words})\)", GUIDES[language])
    assert {"C3", "C15", "C16", "C19", "C20"} <= {claim for claim, _ in found}
    for claim, verdict in found:
        assert verdict == measured.VERDICTS[claims[claim]["verdict"]][language], claim


@languages
def test_no_measured_number_is_typed(language):
    text = re.sub(VERSIONS, "", without_code(GUIDES[language]))
    known = {number for number, _ in exercises_of_notebooks()}
    typed = [number for number in re.findall(NUMBERS, text) if number not in known]
    assert not typed and not re.search(r"\d\s?%|±", text), typed


def test_korean_terms_are_those_of_the_glossary():
    others = yaml.safe_load((SLIDES / "glossary.yaml").read_text(encoding="utf-8"))["not"]
    found = [word for word in others if word in GUIDES["ko"]]
    assert not found, f"{found}: the glossary has {[others[word] for word in found]}"


def test_consent_is_marked_as_no_legal_advice():
    for language, words in (
        ("en", ("no legal advice", "Minors", "Deepfakes")),
        ("ko", ("법률 자문이 아니다", "초상권", "개인정보 보호법", "저작권법")),
    ):
        assert all(word in " ".join(GUIDES[language].split()) for word in words), language
