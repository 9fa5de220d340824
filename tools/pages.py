"""Turns executed notebooks into HTML pages that need no network, with an index page.

python tools/pages.py       the pages of notebooks/ with the outputs that are stored in them; they go to build/
"""

import copy
import html
import importlib.util
import re
import shutil
from pathlib import Path, PurePosixPath

import nbformat
from bs4 import BeautifulSoup
from nbconvert import HTMLExporter

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

REPO = Path(__file__).resolve().parents[1]
MATHJAX = """
MathJax.Hub.Config({
    tex2jax: {inlineMath: [["$", "$"]], processEscapes: true},
    "HTML-CSS": {availableFonts: [], preferredFont: null, imageFont: null, webFont: "STIX-Web"},
    messageStyle: "none",
});
"""  # the fonts that jupyter-server-mathjax brings along
VIEW, STATE = "application/vnd.jupyter.widget-view+json", "application/vnd.jupyter.widget-state+json"


def title_of(nb, name: str) -> str:
    """The first heading of a notebook, or its file name."""
    text = "\n".join(cell.source for cell in nb.cells if cell.cell_type == "markdown")
    found = re.search(r"^# (.+)$", text, re.M)
    return found.group(1).strip() if found else name


def _with_alt(out) -> dict:
    """A picture as an <img> with its alt text: nbconvert's own template leaves the text out."""
    alt = html.escape(out.metadata.get("image/png", {}).get("alt", ""))
    source = "".join(out.data["image/png"].split())
    return nbformat.v4.new_output(
        "display_data", {"text/html": f'<img alt="{alt}" src="data:image/png;base64,{source}">'}
    )


def _without_kernel(out, state: dict) -> list:
    """A widget as its stored picture, and a line that names its controls."""
    names, drawn, waiting = [], [], [out.data[VIEW]["model_id"]]
    while waiting:
        model = state.get(waiting.pop(0), {}).get("state", {})
        names += [model["description"]] if model.get("description") else []
        drawn += [nbformat.from_dict(each) for each in model.get("outputs", [])]
        waiting += [child.removeprefix("IPY_MODEL_") for child in model.get("children", [])]
    if not names and not drawn:  # a progress bar
        return [nbformat.v4.new_output("display_data", {"text/plain": out.data["text/plain"]})]
    controls = f" ({html.escape(', '.join(names))})" if names else ""
    note = f"<p><em>A control{controls} that works in JupyterLab only. This is a picture of it.</em></p>"
    return [*drawn, nbformat.v4.new_output("display_data", {"text/html": note})]


def _for_page(nb, name: str):
    """A copy of the notebook whose outputs a page can show: no widget, every picture with its alt text."""
    nb = copy.deepcopy(nb)
    nb.metadata.title = title_of(nb, name)
    state = nb.metadata.pop("widgets", {}).get(STATE, {}).get("state", {})
    for cell in nb.cells:
        outputs = []
        for out in cell.get("outputs", []):
            outputs += _without_kernel(out, state) if VIEW in out.get("data", {}) else [out]
        if "outputs" in cell:
            cell.outputs = [_with_alt(out) if "image/png" in out.get("data", {}) else out for out in outputs]
    return nb


def _offline(page: str, folder: Path, pages: set[str]) -> str:
    """The page without anything that a browser would fetch, and with links that lead somewhere.

    folder: where the notebook lies.  pages: the names, as 01_x, of the notebooks that have a page beside this one.
    """
    soup = BeautifulSoup(page, "html.parser")
    for script in soup.find_all("script"):  # widgets and diagrams; MathJax comes from beside the page
        if re.search(r"https?://", script.get("src") or script.get_text()):
            script.decompose()
    soup.find("script", type="text/x-mathjax-config").string = MATHJAX
    for image in soup.select("img[src^=http]"):  # the badge
        image.replace_with(image.get("alt", ""))
    address = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]["Repository"]
    for link in soup.select("a[href]"):
        path, mark, place = link["href"].partition("#")
        if not path or re.match(r"[a-z]+:", path):
            continue
        target = PurePosixPath(path)
        if target.suffix == ".ipynb" and target.stem in pages:
            link["href"] = f"{target.stem}.html{mark}{place}"
        elif (folder / path).resolve().is_relative_to(REPO):
            link["href"] = f"{address}/blob/main/{(folder / path).resolve().relative_to(REPO).as_posix()}{mark}{place}"
    return str(soup)


def write_page(nb, path: Path, build: Path, pages: set[str]) -> None:
    """Write build/<name>.html of the notebook at `path`, whose content is `nb`. MathJax is copied beside it."""
    mathjax = build / "mathjax"
    if not mathjax.is_dir():
        package = importlib.util.find_spec("jupyter_server_mathjax").submodule_search_locations[0]
        shutil.copytree(Path(package) / "static", mathjax)
    exporter = HTMLExporter(mathjax_url="mathjax/MathJax.js?config=TeX-AMS-MML_HTMLorMML-full,Safe")
    page, _ = exporter.from_notebook_node(_for_page(nb, path.stem))
    (build / f"{path.stem}.html").write_text(_offline(page, path.parent, pages), encoding="utf-8")


def write_index(paths: list[Path], build: Path) -> None:
    """Write build/index.html: a link to the page of each of these notebooks that has one."""
    links = ""
    for path in paths:
        page = build / f"{path.stem}.html"
        if page.is_file():
            title = re.search(r"<title>(.*?)</title>", page.read_text(encoding="utf-8"), re.S).group(1)
            links += f'<li><a href="{page.name}">{title}</a></li>\n'
    heading = "Introduction to Personalization with Diffusion Models"
    (build / "index.html").write_text(
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{heading}</title>\n'
        "<style>body { font: 1.1rem/1.7 sans-serif; max-width: 45rem; margin: 2rem auto; padding: 0 1rem }</style>\n"
        f"</head>\n<body>\n<main>\n<h1>{heading}</h1>\n<ul>\n{links}</ul>\n</main>\n</body>\n</html>\n",
        encoding="utf-8",
    )


def main() -> None:
    build, paths = REPO / "build", sorted((REPO / "notebooks").glob("[0-9]*.ipynb"))
    build.mkdir(exist_ok=True)
    for path in paths:
        write_page(nbformat.read(path, as_version=4), path, build, {each.stem for each in paths})
    write_index(paths, build)
    print(f"{len(paths)} pages and index.html are in build/")


if __name__ == "__main__":
    main()
