"""The slides: both languages in step, no typed measurements, figures that show the shipped weights, notes, sections.

That nothing leaves a slide and that decks open without a network is looked at when they are built (slides/build.sh).
"""

import json
import re
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
SLIDES = ROOT / "slides"
sys.path.insert(0, str(SLIDES))
import board  # noqa: E402
import deck  # noqa: E402
import pack  # noqa: E402

NAMES = sorted(path.stem for path in (SLIDES / "src").glob("*.yaml"))
DECKS = deck.decks()
ROWS = ["1.1", "1.2", "1.3", "1.4", "1.5", "1.6", "1.7", "2.1", "2.2", "2.3", "3.1", "3.2", "3.3", "3.4",
        "4.1", "4.2", "4.3", "4.4", "4.5", "4.6", "5.1", "5.2"]  # fmt: skip
LENGTHS = {"seminar": (45, 55)}  # of all other decks: 15 to 20
# Marp reads these words in an alt text as picture filters and drops them.
MARP_WORDS = {"blur", "brightness", "contrast", "grayscale", "invert", "opacity", "saturate", "sepia", "bg", "fit"}
# A number with a decimal point, a per cent sign or an interval looks measured. Settings and papers may be named.
MEASURED = re.compile(r"\d+\.\d+|\d\s?%|±")
TOLD = re.compile(r"\{\{.*?\}\}|\$[^$]*\$|https?://\S+|(?:w|λ|t|eta|η) = [\d.]+|Stable Diffusion \d\.[\dx]|SD ?\d\.\d|"
                  r"[Nn]otebook \d+.*|노트북 \d+.*|[Pp]aper[^.]*\.|논문[^.]*\.|\.?\d[^;]*?\([^)]*et al\.[^)]*\)|95 ?%|"
                  r"0\.05|2\.2 ?%", re.S)  # fmt: skip
# The last three: the intervals' level, the margin of C15 and C19, and Custom Diffusion's share of Stable Diffusion 1.5.

slides = pytest.mark.parametrize("name", NAMES)
languages = pytest.mark.parametrize("language", deck.LANGUAGES)


def words_of(name, language):
    return [text for key, text in deck.slide(name)[language].items() if key != "alt"]


@slides
def test_a_slide_is_whole(name):
    one = deck.slide(name)
    assert one["minutes"] >= 0.5
    for language in deck.LANGUAGES:
        assert len(one[language]["notes"].split(". ")) >= 3, f"{language}: expected at least 3 sentences of notes"
        assert len(one[language]["title"]) <= 75
    for key in one.get("papers", ()):
        assert key in deck.papers(), f"papers.yaml has no {key}"
    for claim in one.get("claims", ()):
        assert claim in deck.Measured("en").claims


@slides
@languages
def test_no_measured_number_is_typed(name, language):
    for text in words_of(name, language):
        typed = MEASURED.findall(TOLD.sub("", text))
        assert not typed, f"{typed}: take it from data/results with {{{{ of(...) }}}} or {{{{ record(...) }}}}"


@slides
@languages
def test_what_is_to_be_said_fits_the_minutes(name, language):
    """Questions and live parts have time beside."""
    needed = deck.minutes_to_say(name, language)[0]
    assert needed <= deck.slide(name)["minutes"], f"{needed:.2f} minutes; shorten the notes, or give them more minutes"


@slides
def test_languages_use_the_same_numbers(name):
    def asked(language):
        return sorted(re.findall(r"\{\{\s*(.*?)\s*\}\}", " ".join(deck.slide(name)[language].values())))

    assert asked("en") == asked("ko")


@slides
def test_pictures_have_alt_text(name):
    one = deck.slide(name)
    if "figure" not in one:
        return
    assert (board.IMAGES / one["figure"]).is_file(), f"slides/board.py --only {Path(one['figure']).stem} draws it"
    for language, least in (("en", 20), ("ko", 10)):
        alt = one[language]["alt"]
        assert len(alt) >= least
        assert not MARP_WORDS & set(re.findall(r"\w+", alt.lower())), "Marp takes these words for picture filters"
        assert not set("[]()") & set(alt), "brackets would end the picture's Markdown"


@slides
def test_sections_named_exist(name):
    """`01, section "Algorithm 1"`: the notebook has that section."""
    for number, named in re.findall(r"(\d\d), (sections? \"[^;]*)", deck.slide(name).get("notebook", "")):
        (notebook,) = (ROOT / "notebooks").glob(f"{number}_*.ipynb")
        cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
        text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
        headings = [heading.strip() for heading in re.findall(r"^##+ (.*)$", text, flags=re.MULTILINE)]
        for section in re.findall(r"\"([^\"]+)\"", named):
            assert section in headings, f"{notebook.name} has no section {section!r}, but {headings}"


@slides
def test_korean_terms_are_those_of_the_glossary(name):
    others = yaml.safe_load((SLIDES / "glossary.yaml").read_text(encoding="utf-8"))["not"]
    text = " ".join(deck.slide(name)["ko"].values())
    found = [word for word in others if word in text]
    assert not found, f"{found}: the glossary has {[others[word] for word in found]}"


@pytest.mark.parametrize("name", DECKS)
@languages
def test_a_deck_can_be_written(name, language):
    text = deck.markdown(name, language)
    pages = re.split(r"^---$", text.split("---\n", 2)[2], flags=re.MULTILINE)
    assert len(pages) == len(DECKS[name]["slides"]), "a line of three dashes inside a slide would split it"
    assert all(re.search(r"^# \S", page, flags=re.MULTILINE) for page in pages)
    assert "{{" not in text and "undefined" not in text


@pytest.mark.parametrize("name", DECKS)
def test_length_and_minutes(name):
    names = DECKS[name]["slides"]
    assert len(set(names)) == len(names)
    low, high = LENGTHS.get(name, (15, 20))
    assert low <= len(names) <= high


@pytest.mark.parametrize(
    "name, language, planned, said, asked", deck.minutes(), ids=lambda x: x if isinstance(x, str) else ""
)
def test_notes_and_questions_fit_into_the_minutes_of_a_deck(name, language, planned, said, asked):
    assert said + asked <= planned + 1.5, f"{name}.{language}: {said:.1f} to say and {asked:.1f} for questions"


def test_the_seminar_takes_an_hour_and_with_its_live_parts_an_hour_and_a_half():
    minutes, live = sum(deck.slide(one)["minutes"] for one in DECKS["seminar"]["slides"]), DECKS["seminar"]["live"]
    assert 55 <= minutes <= 65 and 85 <= minutes + 2 * len(live) <= 95
    for name in live:
        assert name in DECKS["seminar"]["slides"]
        assert "Live: " in deck.slide(name)["en"]["notes"] and "실습: " in deck.slide(name)["ko"]["notes"]


def test_every_row_of_the_seminar_has_its_slide():
    rows = set()
    for name in DECKS["seminar"]["slides"]:
        first = (SLIDES / "src" / f"{name}.yaml").read_text(encoding="utf-8").splitlines()[0]
        rows |= set(re.findall(r"\d\.\d", first)) if first.startswith("#") else set()
    assert set(ROWS) <= rows, f"without a slide: {sorted(set(ROWS) - rows)}"
    claims = {claim for name in DECKS["seminar"]["slides"] for claim in deck.slide(name).get("claims", ())}
    assert set(deck.Measured("en").claims) <= claims, "a claim has no slide"


def test_every_slide_is_in_a_deck():
    shown = {name for one in DECKS.values() for name in one["slides"]}
    assert set(NAMES) == shown


def test_figures_show_the_shipped_weights():
    board.load_figures()
    known = json.loads((board.IMAGES / "figures.json").read_text(encoding="utf-8"))
    shown = {Path(deck.slide(name)["figure"]).stem for name in NAMES if "figure" in deck.slide(name)}
    assert shown == {path.stem for path in board.IMAGES.glob("*.png")}, "figures that no slide shows, or the reverse"
    old = [name for name in shown if known[name]["sources"] != board.sources(name)]
    assert not old, f"drawn from other weights or records: slides/board.py --only {' '.join(old)}"


def test_what_a_page_would_fetch_is_found():
    assert pack.external('<img src="img/a.png">') and pack.external("<style>a {background: url(http://x/y)}</style>")
    assert not pack.external('<img src="data:image/png;base64,AA"><a href="https://arxiv.org">paper</a>')
