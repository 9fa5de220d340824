"""Finish a built deck: put its pictures into the HTML, stamp HTML and PDF with the hash of what they were made from.

    python slides/pack.py slides/part1_diffusion.md

Called by slides/build.sh; needs nothing but Python. tests/test_slides.py uses the same functions.
"""

import base64
import hashlib
import re
import sys
from pathlib import Path

THEME = Path(__file__).with_name("theme.css")
STAMP = "source-sha256"
IMAGE = re.compile(r"!\[([^\]]*)\]\(([^)\s]+)\)")


def images(deck: Path) -> list[tuple[str, Path]]:
    """(alt text, file) of every picture in a deck, in order."""
    return [(alt, deck.parent / name) for alt, name in IMAGE.findall(deck.read_text(encoding="utf-8"))]


def source_hash(deck: Path) -> str:
    """The SHA-256 of all that a deck is made from: its Markdown, the theme, its pictures. Line endings do not count."""
    digest = hashlib.sha256()
    for file in (deck, THEME):
        digest.update(file.read_bytes().replace(b"\r\n", b"\n"))
    for _, file in images(deck):
        digest.update(file.name.encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()


def stamp_of(built: Path) -> str | None:
    """The hash written into an HTML or PDF file by `pack`, or None."""
    found = re.search(rf"{STAMP}[:\" =a-z]*([0-9a-f]{{64}})".encode(), built.read_bytes())
    return found.group(1).decode() if found else None


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
    """Inline the pictures of a deck's HTML, stamp HTML and PDF. Returns a line about the files."""
    page, pdf = deck.with_suffix(".html"), deck.with_suffix(".pdf")
    html, stamp = page.read_text(encoding="utf-8"), source_hash(deck)
    for _, file in images(deck):
        name = file.relative_to(deck.parent).as_posix()
        data = "data:image/png;base64," + base64.b64encode(file.read_bytes()).decode()
        html = html.replace(f'src="{name}"', f'src="{data}"')
    html = html.replace("<head>", f'<head><meta name="{STAMP}" content="{stamp}">', 1)
    left = external(html)
    if left:
        raise SystemExit(f"{page.name} would fetch something when it is opened: {left[:3]}")
    page.write_text(html, encoding="utf-8", newline="\n")
    line = f"{page.name} {page.stat().st_size / 1e6:.1f} MB"
    if pdf.is_file() and stamp_of(pdf) is None:  # fresh from the browser; PDF readers ignore a comment after the end
        with pdf.open("ab") as file:
            file.write(f"\n% {STAMP}: {stamp}\n%%EOF\n".encode())
    if pdf.is_file():
        line += f", {pdf.name} {pdf.stat().st_size / 1e6:.1f} MB" + ("" if stamp_of(pdf) == stamp else " (older)")
    return line


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        print(pack(Path(argument)))
