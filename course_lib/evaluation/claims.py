"""The claims of the seminar: what each one says, how a verdict follows from intervals, and the record of them all.

Used by: every notebook that tests a claim; measurements/claims.py writes the record, data/results/claims.json.

The rule of each claim is one function, in rules_models.py (C1 to C4, C21a, C21b), rules_editing.py (C5 to C7) or
rules_methods.py (C8 to C20). A
notebook calls it with what it measured live, measurements/claims.py with the full record: two measurements, one rule.
"""

import json
import textwrap
from dataclasses import dataclass, field
from pathlib import Path

from course_lib.environment import REPOSITORY, RESULTS
from course_lib.evaluation.statistics import Estimate

VERDICTS = ("holds", "does not hold", "cannot tell", "not testable here")
NOT_YET = "not yet measured"
# name -> "claim" and "short": what is claimed; "notebook" and "section": where it is tested, "" where nowhere yet
CLAIMS = json.loads((REPOSITORY / "data" / "claims.json").read_text(encoding="utf-8"))


def verdict_of(*gains: Estimate) -> str:
    """The verdict from estimates that the claim says are above 0.

    "holds" if every interval lies above 0, "does not hold" if one lies below 0, else "cannot tell".
    """
    if not gains:
        raise ValueError("gains: expected at least one estimate, got none")
    if all(gain.low > 0 for gain in gains):
        return "holds"
    return "does not hold" if any(gain.high < 0 for gain in gains) else "cannot tell"


@dataclass(frozen=True)
class Finding:
    """The result of a rule; notebooks print it, and the record stores it.

    name: such as "C10".  verdict: one of VERDICTS, or NOT_YET.  measured: the numbers, in words.  values: the numbers,
    Estimates or what JSON can hold.  why: an explanation that was measured as well, or "".
    """

    name: str
    verdict: str
    measured: str
    values: dict = field(default_factory=dict)
    why: str = ""
    device: str = ""  # of the record that it follows from, where that is one of its own

    def __str__(self) -> str:
        lines = [f"{self.name}, {self.verdict.upper()}: {CLAIMS[self.name]['claim']}", f"Measured: {self.measured}"]
        lines += [f"Why: {self.why}"] if self.why else []
        return "\n".join(textwrap.fill(line, 110, subsequent_indent="    ") for line in lines)

    def as_dict(self) -> dict:
        """For the record, with the claim's sentence and place."""
        place = {key: value for key, value in CLAIMS[self.name].items() if key != "short"}
        values = {k: v.as_dict() if isinstance(v, Estimate) else v for k, v in self.values.items()}
        entry = place | dict(verdict=self.verdict, measured=self.measured, why=self.why, values=values)
        return entry | (dict(device=self.device) if self.device else {})


def not_yet(name: str) -> Finding:
    """The entry of a claim that the record has no measurement of."""
    notebook = CLAIMS[name]["notebook"]
    return Finding(name, NOT_YET, f"notebook {notebook[:2]} tests it live, without a record" if notebook else "")


def load(path: str | Path | None = None) -> dict:
    """The record of the full measurement, data/results/claims.json; {"claims": {}} where there is none."""
    path = Path(path) if path else RESULTS / "claims.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"claims": {}}


def verdict(name: str, path: str | Path | None = None) -> str:
    """The verdict of the full measurement on a claim such as "C10", in a few lines to print.

    path: of the record, by default data/results/claims.json.
    """
    record = load(path)
    claim = record["claims"].get(name)
    if claim is None or claim["verdict"] == NOT_YET:
        return f"{name}: not in the record of the full measurement yet"
    found = Finding(name, claim["verdict"], claim["measured"], why=claim["why"])
    device = claim.get("device", record["device"])
    return f"{found}\n(the full measurement, `make claims`: seed {record['seed']}, {device}, {record['date']})"


def against_record(live: Finding, path: str | Path | None = None) -> str:
    """Whether a live finding has the recorded verdict, and if not, the numbers of both, in a few lines to print.

    path: of the record, by default data/results/claims.json.
    """
    there = load(path)["claims"].get(live.name, {})
    if there.get("verdict", NOT_YET) == NOT_YET:
        return f"{live.name}: the record has nothing to compare this run with yet"
    if there["verdict"] == live.verdict:
        return f"{live.name}: this run and the record have the same verdict, {live.verdict}"
    pairs = {k: (one, there["values"].get(k)) for k, one in live.values.items() if isinstance(one, Estimate)}
    text = "; ".join(f"{k} {one:+.3f}, n = {one.n}, against {old['value']:+.3f} ({old['low']} to {old['high']}), "
                     f"n = {old['n']}" for k, (one, old) in pairs.items() if old)  # fmt: skip
    return textwrap.fill(f"This run says {live.verdict!r}, the record {there['verdict']!r}. This run against the "
                         f"record: {text or 'no number in common'}", 110, subsequent_indent="    ")  # fmt: skip
