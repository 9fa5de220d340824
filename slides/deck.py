"""Write the decks as Markdown for Marp, in both languages, from one file for each slide.

    python slides/decks.py build/slides            (then slides/build.sh makes HTML and PDF of it)

A slide is slides/src/NAME.yaml. Figure, formula, links and minutes stand there once; title, alt text, text and notes
stand there in English and in Korean. decks.yaml says which slides a deck has. Numbers come from data/results by way
of `Measured`; none is typed.
"""

import argparse
import hashlib
import json
import math
import shutil
from functools import cache
from pathlib import Path

import jinja2
import yaml

from course_lib.environment import RESULTS

HERE = Path(__file__).parent
LANGUAGES = ("en", "ko")
SHARED = {"minutes", "skip", "claims", "figure", "formula", "papers", "notebook", "class"}
SAID = {"title", "alt", "text", "notes"}
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
        to = {"en": " to ", "ko": "–"}[self.language]
        return f"{scale * found['value']:.{digits}f}{unit} ({to.join(f'{scale * end:.{digits}f}' for end in ends)})"

    def record(self, name: str, *keys: str | int) -> object:
        """A number of any record: `{{ record("ddpm_cifar10", "main", "frechet") }}`."""
        found = json.loads((self.folder / f"{name}.json").read_text(encoding="utf-8"))
        for key in keys:
            found = found[key]
        return found


@cache
def slide(name: str) -> dict:
    """A slide's file. Raises ValueError if something is missing, unknown, or there in one language alone."""
    path = HERE / "src" / f"{name}.yaml"
    if not path.is_file():
        raise ValueError(f"decks.yaml names the slide {name}, but there is no {path.name} in slides/src")
    found = yaml.safe_load(path.read_text(encoding="utf-8"))
    unknown = set(found) - SHARED - set(LANGUAGES)
    if unknown:
        raise ValueError(f"{path.name}: unknown {', '.join(sorted(unknown))}; expected {', '.join(sorted(SHARED))}")
    for language in LANGUAGES:
        said = set(found.get(language, ()))
        if said - SAID or {"title", "notes"} - said or ("alt" in said) != ("figure" in found):
            raise ValueError(f"{path.name}, {language}: expected title, notes, alt if there is a figure, and perhaps "
                             f"text; got {', '.join(sorted(said))}")  # fmt: skip
    if set(found["en"]) != set(found["ko"]):
        raise ValueError(
            f"{path.name}: expected the same entries in en and ko, got {set(found['en']) ^ set(found['ko'])}"
        )
    return found


def decks() -> dict[str, dict]:
    """name -> its titles and its slides' names."""
    return yaml.safe_load((HERE / "decks.yaml").read_text(encoding="utf-8"))


def papers() -> dict[str, dict]:
    """key -> short name and link of each paper."""
    return yaml.safe_load((HERE / "papers.yaml").read_text(encoding="utf-8"))


def markdown(deck: str, language: str) -> str:
    """The whole deck for Marp."""
    measured = Measured(language)
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=False, autoescape=False)
    environment.globals.update(of=measured.of, verdict=measured.verdict, record=measured.record, shown=measured.shown)

    def filled(text: str) -> str:
        return environment.from_string(text.strip()).render()

    page = environment.from_string((HERE / "slide.md.jinja").read_text(encoding="utf-8"))
    known, about = papers(), decks()[deck]
    pages = []
    for number, name in enumerate(about["slides"], 1):
        one = slide(name)
        said = {key: filled(text) for key, text in one[language].items()}
        links = [known[key] for key in one.get("papers", ())]
        verdicts = [(claim, measured.verdict(claim)) for claim in one.get("claims", ())]
        about_page = {"class": "", "skip": False, "notebook": "", **one, "links": links}
        about_page |= {"first": number == 1, "language": language}
        pages.append(page.render(**about_page, **said, verdicts=verdicts))
    front = environment.from_string((HERE / "front.md.jinja").read_text(encoding="utf-8"))
    return front.render(title=about[language], language=language) + "\n---\n".join(f"\n{page}\n" for page in pages)


def write(folder: Path) -> list[Path]:
    """Write all decks in all languages, and the figures that they show, into a folder."""
    (folder / "img").mkdir(parents=True, exist_ok=True)
    written = []
    for deck, about in decks().items():
        for language in LANGUAGES:
            path = folder / f"{deck}.{language}.md"
            path.write_text(markdown(deck, language), encoding="utf-8", newline="\n")
            written.append(path)
        for name in about["slides"]:
            if "figure" in slide(name):
                shutil.copy2(HERE / "img" / slide(name)["figure"], folder / "img")
    return written


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where to write")
    for path in write(parser.parse_args().folder):
        print(path)
