"""The HTML pages need no network, say what their pictures show, and link to pages that exist."""

import re
from pathlib import Path

import nbformat
import pages
import pytest
from bs4 import BeautifulSoup

REPO = Path(__file__).resolve().parents[1]
PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="


def picture(alt):
    return nbformat.v4.new_output("display_data", {"image/png": PIXEL}, metadata={"image/png": {"alt": alt}})


def page_of(nb, build):
    pages.write_page(nb, REPO / "notebooks" / "01_x.ipynb", build, {"01_x", "02_y"})
    return BeautifulSoup((build / "01_x.html").read_text(encoding="utf-8"), "html.parser")


def notebook(text, *outputs):
    code = nbformat.v4.new_code_cell("draw()", outputs=list(outputs))
    return nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(text), code])


def outside(soup):
    """What a browser would fetch from elsewhere to show the page."""
    named = [tag.get("src") or tag.get("href") for tag in soup.select("[src], link[href]")]
    return [name for name in named if re.match(r"(https?:)?//", name)] + [
        script for script in soup.select("script") if re.search(r"https?://", script.get_text())
    ]


def test_a_page_has_the_title_the_formulas_and_the_links_of_its_notebook(tmp_path):
    text = (
        "# 01 · Noise & more\n\n[![Open in Colab](https://colab.example/badge.svg)](https://colab.example/01)\n\n"
        "$\\sqrt{\\bar\\alpha_t}$ [next](02_y.ipynb#a-part) [library](../course_lib/plots.py) "
        "[below](#a-part)\n\n## A part"
    )
    soup = page_of(notebook(text), tmp_path)
    assert soup.title.text == "01 · Noise & more"
    links = [link["href"] for link in soup.select("a[href]") if "anchor-link" not in link.get("class", [])]
    assert links[0] == "https://colab.example/01" and soup.select("a")[1].text == "Open in Colab"
    assert links[1] == "02_y.html#a-part" and links[3] == "#a-part"
    assert re.fullmatch(r"https://github\.com/\S+/blob/main/course_lib/plots\.py", links[2])
    assert outside(soup) == []
    (mathjax,) = [script["src"] for script in soup.select("script[src]")]
    path, _, setting = mathjax.partition("?config=")
    assert (tmp_path / path).is_file()
    for name in setting.split(","):
        assert (tmp_path / "mathjax/config" / f"{name}.js").is_file()
    font = re.search(r'webFont: "(.+?)"', soup.find("script", type="text/x-mathjax-config").text).group(1)
    assert list((tmp_path / "mathjax/fonts/HTML-CSS" / font).rglob("*.woff"))


def test_every_picture_has_its_alt_text(tmp_path):
    soup = page_of(notebook("# A", picture('A "quoted" x < 3.'), picture("Another.")), tmp_path)
    assert [image["alt"] for image in soup.select("img")] == ['A "quoted" x < 3.', "Another."]
    assert all(image["src"] == f"data:image/png;base64,{PIXEL}" for image in soup.select("img"))


def test_a_widget_is_shown_as_it_was_stored(tmp_path):
    state = {
        "box": {"model_name": "VBoxModel", "state": {"children": ["IPY_MODEL_slider", "IPY_MODEL_out"]}},
        "slider": {"model_name": "IntSliderModel", "state": {"description": "position"}},
        "out": {"model_name": "OutputModel", "state": {"outputs": [dict(picture("A cat."))]}},
    }
    view = {pages.VIEW: {"model_id": "box"}, "text/plain": "VBox(children=(IntSlider(value=4"}
    bar = {pages.VIEW: {"model_id": "gone"}, "text/plain": "Loading: 100%"}
    nb = notebook("# A", *(nbformat.v4.new_output("display_data", data) for data in (view, bar)))
    nb.metadata.widgets = {pages.STATE: {"state": state}}
    soup = page_of(nb, tmp_path)
    assert [image["alt"] for image in soup.select("img")] == ["A cat."]
    assert "A control (position)" in soup.text and "VBox(" not in soup.text and "Loading: 100%" in soup.text
    assert outside(soup) == []
    assert nb.metadata.widgets  # the notebook itself is not changed


@pytest.mark.parametrize("path", sorted((REPO / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_the_page_of_each_notebook_needs_no_network(path, tmp_path):
    names = {each.stem for each in path.parent.glob("*.ipynb")}
    pages.write_page(nbformat.read(path, as_version=4), path, tmp_path, names)
    soup = BeautifulSoup((tmp_path / f"{path.stem}.html").read_text(encoding="utf-8"), "html.parser")
    assert outside(soup) == []
    assert not [
        image for image in soup.select("img") if len(image.get("alt", "")) < 10 or "No description" in image["alt"]
    ]
    for link in soup.select("a[href]"):
        target = link["href"].partition("#")[0]
        assert not target or target.startswith("https://") or target.removesuffix(".html") in names, target
