"""Put the pictures of a built deck into its HTML, its controls into the footer, and look that it fetches nothing.

    python slides/pack.py build/slides/seminar.en.md

Called by slides/build.sh. tests/test_slides.py uses the same functions.
"""

import base64
import re
import sys
from pathlib import Path

IMAGE = re.compile(r"!\[([^\]]*)\]\(([^)\s]+)\)")

# Marp lays its controls over the slide while the mouse moves. Here they stay within the footer, the last 36 of 720
# pixels, which check.mjs keeps clear of all else.
CONTROLS = """<style>
.bespoke-marp-parent > .bespoke-marp-osc { bottom: 0 !important; left: 0 !important; transform: none !important;
  padding: 0.4vh 1vh !important; border-radius: 0 1vh 0 0 !important; font-size: 2.2vh !important; }
.bespoke-marp-parent > .bespoke-marp-osc > button { width: 3.6vh !important; height: 3.6vh !important; }
.bespoke-marp-parent > .bespoke-marp-osc > span { min-width: 10vh !important; }
</style>"""


def images(deck: Path) -> list[tuple[str, Path]]:
    """(alt text, file) of every picture in a deck, in order."""
    return [(alt, deck.parent / name) for alt, name in IMAGE.findall(deck.read_text(encoding="utf-8"))]


def external(html: str) -> list[str]:
    """All that a browser would fetch when it opens the page: every src, link, url() or import that is not inside it.

    A link that a reader may click (<a href>) does not count, nor does the name of an XML language (xmlns).
    """
    inside = r"(?!data:|#|javascript:|about:|blob:)"
    tags = r"(?:img|script|iframe|source|video|audio|embed|object|link|image|use|input)"
    patterns = [
        rf"<{tags}\b[^>]*?\s(?:src|href|xlink:href|data|poster|srcset)\s*=\s*[\"']?{inside}[^\"'\s>]+",
        rf"url\(\s*(?:&quot;|[\"'])?{inside}[^)\"'&\s]+",
        r"@import\s+(?:url\()?[\"'][^\"']+",
    ]
    return [found[:200] for pattern in patterns for found in re.findall(pattern, html, flags=re.IGNORECASE)]


def pack(deck: Path) -> str:
    """Inline the pictures of a deck's HTML and move its controls.

    Returns a line about the files; SystemExit if something is left outside.
    """
    page, pdf = deck.with_suffix(".html"), deck.with_suffix(".pdf")
    html = page.read_text(encoding="utf-8")
    for _, file in images(deck):
        name = file.relative_to(deck.parent).as_posix()
        data = "data:image/png;base64," + base64.b64encode(file.read_bytes()).decode()
        html = html.replace(f'src="{name}"', f'src="{data}"')
    html = html.replace("</head>", f"{CONTROLS}</head>", 1)
    left = external(html)
    if left:
        raise SystemExit(f"{page.name} would fetch something when it is opened: {left[:3]}")
    page.write_text(html, encoding="utf-8", newline="\n")
    sizes = [f"{path.name} {path.stat().st_size / 1e6:.1f} MB" for path in (page, pdf) if path.is_file()]
    return ", ".join(sizes)


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        print(pack(Path(argument)))
