"""The claims of the seminar: what each one says, how a verdict follows from intervals, and the record of them all.

Used by: every notebook that tests a claim; measurements/claims.py writes the record, data/results/claims.json.

The rule of each claim is one function, in rules_models.py (C1 to C4, C21) or rules_methods.py (C8 to C19). A notebook
calls it with what it measured live, measurements/claims.py with the full record: two measurements, one rule.
"""

import json
import textwrap
from dataclasses import dataclass, field
from pathlib import Path

from course_lib.environment import RESULTS
from course_lib.evaluation.statistics import Estimate

VERDICTS = ("holds", "does not hold", "cannot tell", "not testable here")
NOT_YET = "not yet measured"
CLAIMS = {  # name -> what is claimed, and the notebook and section that test it ("" where none does yet)
    "C1": ("as the loss of Algorithm 1 falls, the samples of Algorithm 2 get better", "01_ddpm_training", ""),
    "C2": ("the same code trained on two data sets draws two different worlds", "02_ddpm_sampling", ""),
    "C3": ("guidance trades diversity for fidelity to the condition", "03_classifier_free_guidance", ""),
    "C4": ("at equal quality a step on latents costs less than one on pixels", "04_autoencoder", ""),
    "C5": ("a picture's CLIP embedding gives variations of it, and a prior makes such an embedding from text", "", ""),
    "C6": ("an editing method follows the edit and keeps the structure, better than prompting again", "", ""),
    "C7": ("editing keeps this picture, personalization carries this subject into new ones", "", ""),
    "C8": ("Textual Inversion adds one row, and every other tensor stays bit-identical",
           "11_textual_inversion", "One tensor moved"),
    "C9": ("the inverted latent of a picture reproduces it but cannot be prompted anew; the learnt word can",
           "11_textual_inversion", "An image inverted, a concept inverted"),
    "C10": ("DreamBooth has a higher subject fidelity than Textual Inversion",
            "12_dreambooth", "More like the subject?"),
    "C11": ("training all weights makes the class word drift towards the subject",
            "12_dreambooth", "What happens to the class"),
    "C12": ("training all weights lowers the diversity of the class", "12_dreambooth", "What happens to the class"),
    "C13": ("prior preservation lowers class drift and the loss of diversity, at a price in subject fidelity",
            "12_dreambooth", "What happens to the class"),
    "C14": ("when all weights are trained, those of the cross-attention change most",
            "13_custom_diffusion", "Which weights change most?"),
    "C15": ("Custom Diffusion comes near DreamBooth's subject fidelity with a few per cent of the parameters",
            "13_custom_diffusion", "Pictures that hold the class"),
    "C16": ("two subjects that are learnt together appear in one picture", "14_multiple_concepts", "Side by side"),
    "C17": ("concepts merge in closed form: the constraint holds to rounding, and it takes seconds",
            "14_multiple_concepts", "The closed form"),
    "C18": ("a word inside the subject's name drifts, and retrieved regularisation pictures prevent it",
            "13_custom_diffusion", "A word inside a name"),
    "C19": ("on two subjects, joint training and merging are ahead of DreamBooth",
            "14_multiple_concepts", "Side by side"),
    "C20": ("a face and a style can be learnt, and the style carries over to other objects", "", ""),
    "C21": ("mixing the text features of two words gives a slider from one to the other", "06_stable_diffusion", ""),
}  # fmt: skip


def verdict_of(*gains: Estimate) -> str:
    """The verdict from estimates that the claim says are above 0.

    "holds" if every interval lies above 0, "does not hold" if one lies below 0, else "cannot tell".
    """
    if all(gain.low > 0 for gain in gains):
        return "holds"
    return "does not hold" if any(gain.high < 0 for gain in gains) else "cannot tell"


@dataclass(frozen=True)
class Finding:
    """What a rule found: notebooks print it, the record keeps it.

    name: such as "C10".  verdict: one of VERDICTS, or NOT_YET.  measured: the numbers, in words.  values: the numbers,
    Estimates or what JSON can hold.  why: an explanation that was measured as well, or "".
    """

    name: str
    verdict: str
    measured: str
    values: dict = field(default_factory=dict)
    why: str = ""

    def __str__(self) -> str:
        lines = [f"{self.name}, {self.verdict.upper()}: {CLAIMS[self.name][0]}", f"Measured: {self.measured}"]
        lines += [f"Why: {self.why}"] if self.why else []
        return "\n".join(textwrap.fill(line, 110, subsequent_indent="    ") for line in lines)

    def as_dict(self) -> dict:
        """For the record, with the claim's sentence and place."""
        text, notebook, section = CLAIMS[self.name]
        values = {k: v.as_dict() if isinstance(v, Estimate) else v for k, v in self.values.items()}
        return dict(claim=text, verdict=self.verdict, measured=self.measured, why=self.why, values=values,
                    notebook=notebook, section=section)  # fmt: skip


def not_yet(name: str) -> Finding:
    """The entry of a claim that the record has no measurement of."""
    notebook = CLAIMS[name][1]
    return Finding(name, NOT_YET, f"notebook {notebook[:2]} tests it live, without a record" if notebook else "")


def load(path: str | Path | None = None) -> dict:
    """The record of the full measurement, data/results/claims.json; {} of "claims" where there is none."""
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
    return (
        f"{found}\n(the full measurement, `make claims`: seed {record['seed']}, {record['device']}, {record['date']})"
    )
