"""What slides may say of what was measured: methods that a slide's text calls as `{{ of("C10") }}`.

Nothing is typed: a number comes from data/results, with its 95 % interval.
"""

import json
import math
from pathlib import Path

import torch

from course_lib.environment import RESULTS
from course_lib.evaluation import rules_editing, rules_methods, statistics

VERDICTS = {
    "holds": {"en": "holds", "ko": "성립"},
    "does not hold": {"en": "does not hold", "ko": "성립하지 않음"},
    "cannot tell": {"en": "cannot tell", "ko": "판단할 수 없음"},
    "not testable here": {"en": "not testable here", "ko": "여기서 검증 불가"},
    "not yet measured": {"en": "measured later", "ko": "추후 측정"},
}


class Measured:
    """What a slide may say of a claim: `{{ of("C10") }}`, `{{ of("C10", "CLIP-T") }}`, `{{ verdict("C10") }}`."""

    def __init__(self, language: str, folder: Path = RESULTS):
        self.language, self.folder = language, folder
        self.claims = json.loads((folder / "claims.json").read_text(encoding="utf-8"))["claims"]

    def verdict(self, claim: str) -> str:
        return VERDICTS[self.claims[claim]["verdict"]][self.language]

    def of(self, claim: str, key: str | int = 0, percent: bool = False, digits: int = 2) -> str:
        """A value of a claim with its 95 % interval: "+0.10 (0.02 to 0.17)"; "measured later" without a record."""
        values = self.claims[claim]["values"]
        if not values:
            return VERDICTS["not yet measured"][self.language]
        return self.shown(list(values.values())[key] if isinstance(key, int) else values[key], percent, digits)

    def shown(self, found: dict | float, percent: bool = False, digits: int = 2) -> str:
        """A number, or an estimate with its interval."""
        scale, unit = (100, " %") if percent else (1, "")
        digits = max(0, digits - 2) if percent else digits
        if not isinstance(found, dict):
            return f"{scale * found:.{digits}f}{unit}"
        ends = [found["low"], found["high"]]
        if None in ends or not all(math.isfinite(end) for end in ends):
            return f"{scale * found['value']:.{digits}f}{unit}"
        to = {"en": " to ", "ko": " ~ "}[self.language]
        return f"{scale * found['value']:.{digits}f}{unit} ({to.join(f'{scale * end:.{digits}f}' for end in ends)})"

    def record(self, name: str, *keys: str | int) -> object:
        """A number of any record: `{{ record("ddpm_cifar10", "main", "frechet") }}`."""
        found = json.loads((self.folder / f"{name}.json").read_text(encoding="utf-8"))
        for key in keys:
            found = found[key]
        return found

    def count(self, verdict: str | None = None) -> int:
        """How many claims have this verdict, in English; without one, how many claims there are."""
        return sum(verdict in (None, claim["verdict"]) for claim in self.claims.values())

    def guided(self, data: str, w: float) -> dict:
        """The row of a guidance scale in the record of a model of Part 1; data: "cifar10" or "toybox10"."""
        return next(row for row in self.record(f"ddpm_{data}", "guidance") if row["w"] == w)

    def gap(self, data: str, digits: int = 0) -> str:
        """C2: how much farther than its own model the other model is from a data set, at w = 1."""
        own, other = self.guided(data, 1), self.record(f"ddpm_{data}", "other")
        left_out = [b - a for a, b in zip(own["frechet_left_out"], other["frechet_left_out"], strict=True)]
        return self.shown(statistics.jackknife(other["frechet"] - own["frechet"], left_out).as_dict(), digits=digits)

    def diversity_loss(self, data: str) -> str:
        """C3: by how much the diversity within a class falls from w = 1 to w = 3, over the ten classes."""
        spreads = [torch.tensor(self.guided(data, w)["diversity_by_class"]) for w in (1, 3)]
        return self.shown(statistics.paired(*spreads).as_dict())

    def rises(self, data: str) -> int:
        """C3: in how many of the ten classes the diversity rises from w = 1 to w = 3."""
        weak, strong = (self.guided(data, w)["diversity_by_class"] for w in (1, 3))
        return sum(b > a for a, b in zip(weak, strong, strict=True))

    def ratio(self, claim: str, key: str, over: str, under: str, digits: int = 1) -> str:
        """How many times as large one number of a claim is as another: `{{ ratio("C4", "seconds", "a", "b") }}`."""
        found = self.claims[claim]["values"][key]
        return f"{found[over] / found[under]:.{digits}f}"

    def mean(self, name: str, score: str, *keys: str | int, digits: int = 2) -> str:
        """The mean of a score over all parts of a record, with its interval: `{{ mean("unclip", "kept", "parts",
        "variations") }}`."""
        parts = self.record(name, *keys).values()
        found = statistics.mean([value for part in parts for value in part[score] if value is not None])
        return self.shown(vars(found), digits=digits)

    def edit_gain(self, method: str, score: str, digits: int = 2) -> str:
        """What an editing method has above prompting again, edit by edit, with its interval. score: "obeyed", "kept"
        or "structure" of the record editing.json."""

        def scores(of: str) -> dict:
            parts = self.record("editing", "methods", of).values()
            return {key: torch.tensor([math.nan if value is None else value for part in parts for value in part[key]])
                    for key in ("obeyed", "kept", "structure")}  # fmt: skip

        return self.shown(vars(rules_editing.gains(scores(method), scores(rules_editing.AGAIN))[score]), digits=digits)

    def level(self, method: str, score: str, digits: int = 2) -> str:
        """A method's mean over the subjects of personalization.json, with the 95 % interval over subjects.

        `{{ level("lora", "subject_fidelity") }}`. A subject's value is the mean over its training seeds and prompts.
        """
        rows = self.record("personalization", "rows")
        groups = [[row["by_prompt"][score] for row in one[method].values()] for one in rows.values()]
        found = statistics.over_subjects(groups)
        return self.shown(dict(value=found.value, low=found.low, high=found.high), digits=digits)

    def carried(self, part: str) -> str:
        """C14: the share of the gain in subject fidelity that the change of one kind of layer brings, in per cent."""
        changes = self.record("claims", "experiments", "changes").values()
        mean = {key: statistics.over_subjects([one["fidelity"][key] for one in changes]).value
                for key in ("none", "all", part)}  # fmt: skip
        return f"{100 * (mean[part] - mean['none']) / (mean['all'] - mean['none']):.0f} %"

    def paired(self, score: str, one: str, other: str, digits: int = 2) -> str:
        """C16: over the pairs of subjects, a score of "joint", "merged" and so on minus that of another row."""
        rows = rules_methods.of_pairs(self.record("pairs", "rows"))
        return self.shown(
            statistics.over_subjects(rules_methods.gaps(rows, score, one, other)).as_dict(), digits=digits
        )
