"""The slide decks: every slide has notes, every picture alt text; what is built is fresh and opens offline."""

import html as html_text
import importlib.util
import json
import os
import re
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SLIDES = ROOT / "slides"
DECKS = sorted(SLIDES.glob("part*.md"))
RANGE = {"part1_diffusion": (12, 18)}
BUILD = "run `make slides` and commit what it writes"
# Marp reads these words in an alt text as picture filters and drops them.
MARP_WORDS = {"blur", "brightness", "contrast", "grayscale", "invert", "opacity", "saturate", "sepia", "bg", "fit"}

_spec = importlib.util.spec_from_file_location("slides_pack", SLIDES / "pack.py")
pack = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(pack)

decks = pytest.mark.parametrize("deck", DECKS, ids=lambda deck: deck.stem)


def slides_of(deck):
    """The Markdown of each slide; a line of three dashes stands between two."""
    _, front, body = deck.read_text(encoding="utf-8").split("---\n", 2)
    assert "theme: course" in front
    return re.split(r"^---$", body, flags=re.MULTILINE)


def notes_of(slide):
    """The speaker notes of a slide: its HTML comments, less Marp's directives such as `_class: title`."""
    comments = [c.strip() for c in re.findall(r"<!--(.*?)-->", slide, flags=re.DOTALL)]
    return "\n".join(c for c in comments if not re.fullmatch(r"_?\w+: .*", c))


def pages_of(pdf):
    """The number of pages of a PDF, also where the page objects lie in compressed object streams."""
    data = pdf.read_bytes()
    for stream in re.findall(rb"stream\r?\n(.*?)endstream", data, flags=re.DOTALL):
        try:
            unpacked = zlib.decompressobj().decompress(stream, 10_000_000)
        except zlib.error:
            continue
        if b"/Type" in unpacked:
            data += unpacked
    return len(re.findall(rb"/Type\s*/Page(?![A-Za-z])", data))


def test_there_is_a_deck():
    assert DECKS, "slides/ holds no deck"


@decks
def test_length(deck):
    low, high = RANGE.get(deck.stem, (10, 25))
    assert low <= len(slides_of(deck)) <= high


@decks
def test_every_slide_has_a_title_and_notes(deck):
    for number, slide in enumerate(slides_of(deck), 1):
        assert re.search(r"^# \S", slide, flags=re.MULTILINE), f"slide {number} has no title"
        sentences = re.findall(r"[.?!](?:\s|$)", notes_of(slide))
        assert len(sentences) >= 3, f"slide {number}: expected at least 3 sentences of speaker notes"


@decks
def test_every_picture_is_there_and_has_alt_text(deck):
    found = pack.images(deck)
    assert found, "no picture in the deck"
    for alt, file in found:
        assert file.is_file(), f"{file.name} is missing: FIGURES=1 bash slides/build.sh"
        assert len(alt) >= 20, f"{file.name}: the alt text should say what the picture shows, got {alt!r}"
        filters = MARP_WORDS & set(re.findall(r"\w+", alt.lower()))
        assert not filters, f"{file.name}: Marp takes {filters} for picture filters"


@decks
def test_sections_named_in_the_notes_exist(deck):
    """Notes send the speaker to `Notebook 02, section "DDIM"`; that section is there under that name."""
    named = []
    for slide in slides_of(deck):
        for number, text in re.findall(r"[Nn]otebook (\d\d), (sections? \"[^.;:]*)", notes_of(slide)):
            named += [(number, section) for section in re.findall(r"\"([^\"]+)\"", text)]
    assert named
    for number, section in named:
        for notebook in (ROOT / "notebooks").glob(f"{number}_*.ipynb"):
            cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
            text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
            headings = [heading.strip() for heading in re.findall(r"^##+ (.*)$", text, flags=re.MULTILINE)]
            assert section in headings, f"{notebook.name} has no section {section!r}, but {headings}"


@decks
def test_built_files_are_fresh(deck):
    for built in (deck.with_suffix(".html"), deck.with_suffix(".pdf")):
        assert built.is_file(), f"{built.name} is missing: {BUILD}"
        assert pack.stamp_of(built) == pack.source_hash(deck), f"{built.name} is older than its source: {BUILD}"


@decks
def test_html_opens_without_a_network(deck):
    html = deck.with_suffix(".html").read_text(encoding="utf-8")
    assert not pack.external(html)
    assert html.count("data:image/png;base64,") == len(pack.images(deck))
    found = {html_text.unescape(alt) for alt in re.findall(r"<img[^>]*? alt=\"([^\"]+)\"", html)}
    assert found == {alt for alt, _ in pack.images(deck)}, "an alt text got lost"


@decks
def test_html_keeps_the_notes(deck):
    html = deck.with_suffix(".html").read_text(encoding="utf-8")
    assert len(re.findall(r"class=\"bespoke-marp-note\"", html)) == len(slides_of(deck))


@pytest.mark.parametrize(
    "text",
    [
        '<img alt="x" src="img/a.png">',
        '<script src="https://cdn.example/x.js"></script>',
        "<link rel=stylesheet href=//fonts.example/css>",
        "<style>@import 'https://fonts.example/css';</style>",
        '<div style="background-image:url(&quot;img/a.png&quot;)">',
    ],
)
def test_the_check_sees_what_would_be_fetched(text):
    assert pack.external(text)


@pytest.mark.parametrize(
    "text", ['<img src="data:image/png;base64,AA==">', '<a href="https://x.example">', "<use href='#a'/>", "url(#a)"]
)
def test_the_check_lets_pass_what_is_inside(text):
    assert not pack.external(text)


@decks
def test_pdf_has_a_page_for_each_slide(deck):
    assert pages_of(deck.with_suffix(".pdf")) == len(slides_of(deck))


@decks
def test_the_deck_is_small_enough_to_send(deck):
    assert sum(deck.with_suffix(suffix).stat().st_size for suffix in (".html", ".pdf")) < 6_000_000


def test_marp_is_pinned():
    version = json.loads((SLIDES / "package.json").read_text())["dependencies"]["@marp-team/marp-cli"]
    lock = json.loads((SLIDES / "package-lock.json").read_text())["packages"]["node_modules/@marp-team/marp-cli"]
    assert re.fullmatch(r"[\d.]+", version) and lock["version"] == version and lock["integrity"]


@pytest.mark.slow
def test_a_figure_is_drawn(tmp_path):
    command = [sys.executable, SLIDES / "figures.py", "--smoke", "--only", "fidelity_diversity", "--out", tmp_path]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MPLBACKEND": "Agg"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "fidelity_diversity.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_smoke_never_replaces_the_real_figures():
    done = subprocess.run([sys.executable, SLIDES / "figures.py", "--smoke"], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT)})  # fmt: skip
    assert done.returncode == 2 and "--out" in done.stderr
