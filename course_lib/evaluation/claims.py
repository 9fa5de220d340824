"""The claims that the course measures: what was found, with interval, seed, device and date.

Used by: notebooks/11_textual_inversion.ipynb to notebooks/14_multiple_concepts.ipynb; `make claims` writes the record.
"""

import json
import textwrap
from pathlib import Path

from course_lib.environment import RESULTS

VERDICTS = ("holds", "does not hold", "cannot tell")


def load(path: str | Path | None = None) -> dict:
    """The record of the full measurement, data/results/claims.json; {} of "claims" where there is none."""
    path = Path(path) if path else RESULTS / "claims.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"claims": {}}


def verdict(name: str, path: str | Path | None = None) -> str:
    """What the full measurement says of a claim such as "C10", in a few lines to print.

    path: of the record, by default data/results/claims.json.
    """
    record = load(path)
    if name not in record["claims"]:
        return f"{name}: not in the record yet; `make claims` measures it"
    claim = record["claims"][name]
    lines = [f"{name}, {claim['verdict'].upper()}: {claim['claim']}", f"Measured: {claim['measured']}"]
    lines += [f"Why: {claim['why']}"] if claim.get("why") else []
    lines.append(f"(`make claims`: seed {record['seed']}, {record['device']}, {record['date']})")
    return "\n".join(textwrap.fill(line, 110, subsequent_indent="    ") for line in lines)
