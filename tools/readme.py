"""Fill the tables of the pages from data/results/ and data/checkpoints/: no measured figure is typed by hand.

    python tools/readme.py            write them
    python tools/readme.py --check    say which pages are old (exit status 1 if any is)

A table stands between `<!-- table: NAME -->` and `<!-- end -->`; NAME is a function of tables.py, tables_results.py,
tables_editing.py or tables_speed.py.
"""

import re
import sys

import tables
import tables_editing
import tables_results
import tables_speed
from tables import REPO

PAGES = ("README.md", "RESULTS.md", "training/README.md", "benchmarks/README.md", "data/README.md")
TABLE = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.S)


def filled(text: str, page: str) -> str:
    """The text of a page with each of its tables written anew."""

    def again(found: re.Match) -> str:
        modules = (tables, tables_results, tables_editing, tables_speed)
        make = next((getattr(module, found[2]) for module in modules if hasattr(module, found[2])), None)
        if make is None:
            raise SystemExit(f"{page}: no function makes the table {found[2]}; see tools/tables*.py")
        return found[1] + make() + "\n" + found[3]

    if text.count("<!-- table:") != len(TABLE.findall(text)):
        raise SystemExit(f"{page}: a table has no closing <!-- end -->")
    return TABLE.sub(again, text)


def main() -> None:
    """Write the pages, or with --check compare them."""
    old = []
    for page in PAGES:
        path = REPO / page
        before = path.read_text(encoding="utf-8")
        after = filled(before, page)
        if after != before:
            old.append(page)
            if "--check" not in sys.argv:
                path.write_text(after, encoding="utf-8")
    if "--check" in sys.argv and old:
        raise SystemExit(f"{', '.join(old)}: tables are old; run `make readme`")


if __name__ == "__main__":
    main()
