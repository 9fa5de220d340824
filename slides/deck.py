"""Write the decks as Markdown for Marp, in both languages, from one file for each slide.

    python slides/deck.py build/slides            (then slides/build.sh makes HTML and PDF of it)
    python slides/deck.py --minutes               how long the notes of each deck take to say

A slide is slides/src/NAME.yaml. Figure, formula, links and minutes stand there once; title, alt text, text and notes
stand there in English and in Korean. decks.yaml says which slides a deck has. Numbers come from data/results by way
of `Measured`; none is typed.
"""

import argparse
import shutil
from functools import cache
from pathlib import Path

import jinja2
import yaml
from measured import Measured

HERE = Path(__file__).parent
LANGUAGES = ("en", "ko")
SHARED = {"minutes", "skip", "claims", "figure", "formula", "papers", "notebook", "class"}
SAID = {"title", "alt", "text", "notes"}
PACE = {"en": 140, "ko": 350}  # a calm pace: English words, or Korean letters, a minute


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


def linked(key: str) -> str:
    """A paper's short name as a link: `{{ paper("ye2023") }}`."""
    return f"[{papers()[key]['short']}]({papers()[key]['url']})"


def named_papers(language: str) -> str:
    """A line for each deck with links to the papers that its slides name and no deck before it named."""
    lines, known = [], set()
    for about in (about for name, about in decks().items() if name != "seminar"):
        keys = list(dict.fromkeys(key for name in about["slides"] for key in slide(name).get("papers", ())))
        new = [key for key in keys if key not in known]
        known.update(new)
        if new:
            lines.append(f"- **{about[language]}:** " + " · ".join(linked(key) for key in new))
    return "\n".join(lines)


@cache
def environment(language: str) -> jinja2.Environment:
    """What the templates can call: the numbers of data/results, and papers as links."""
    measured = Measured(language)
    found = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=False, autoescape=False)
    found.globals.update({name: getattr(measured, name) for name in dir(Measured) if not name.startswith("_")})
    found.globals.update(paper=linked, named_papers=lambda: named_papers(language))
    return found


def filled(name: str, language: str) -> dict[str, str]:
    """title, notes and so on of a slide, with its numbers."""
    texts, fill = slide(name)[language], environment(language).from_string
    return {key: fill(text.strip()).render() for key, text in texts.items()}


def minutes_to_say(name: str, language: str) -> tuple[float, float]:
    """How long a slide's notes take to say, and its question with the answer. The live part is not said."""
    amount = {"said": 0.0, "asked": 0.0, "live": 0.0}
    for line in filled(name, language)["notes"].splitlines():
        kind = "asked" if line.startswith(("Question: ", "질문: ")) else "said"
        kind = "live" if line.startswith(("Live: ", "실습: ")) else kind
        amount[kind] += len(line.split()) if language == "en" else len("".join(line.split()))
    return amount["said"] / PACE[language], amount["asked"] / PACE[language]


def markdown(deck: str, language: str) -> str:
    """The whole deck for Marp."""
    measured, known, about = Measured(language), papers(), decks()[deck]
    page = environment(language).from_string((HERE / "slide.md.jinja").read_text(encoding="utf-8"))
    pages = []
    for number, name in enumerate(about["slides"], 1):
        one = slide(name)
        links = [known[key] for key in one.get("papers", ())]
        verdicts = [(claim, measured.verdict(claim)) for claim in one.get("claims", ())]
        about_page = {"class": "", "skip": False, "notebook": "", **one, "links": links}
        about_page |= {"first": number == 1, "language": language, "live": name in about.get("live", ())}
        pages.append(page.render(**about_page, **filled(name, language), verdicts=verdicts))
    front = environment(language).from_string((HERE / "front.md.jinja").read_text(encoding="utf-8"))
    return front.render(title=about[language], language=language) + "\n---\n".join(f"\n{page}\n" for page in pages)


def minutes() -> list[tuple]:
    """(deck, language, minutes planned, minutes that the notes take, minutes of the questions) of all decks."""
    rows = []
    for name, about in decks().items():
        planned = sum(slide(one)["minutes"] for one in about["slides"])
        for language in LANGUAGES:
            said, asked = map(sum, zip(*(minutes_to_say(one, language) for one in about["slides"]), strict=True))
            rows.append((name, language, planned, said, asked))
    return rows


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


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("build/slides"), help="where to write")
    parser.add_argument("--minutes", action="store_true", help="print the minutes of each deck instead")
    args = parser.parse_args()
    if args.minutes:
        for name, language, planned, said, asked in minutes():
            print(f"{name:8} {language}  planned {planned:5.1f}  to say {said:5.1f}  questions {asked:5.1f}")
    else:
        print(*write(args.folder), sep="\n")
