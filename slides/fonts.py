"""The theme with a Korean font inside it, cut down to the letters that the decks use: they look alike on every machine.

python slides/fonts.py build/slides/theme.css build/slides/*.md
"""

import base64
import io
import sys
from pathlib import Path

from fontTools import subset
from fontTools.ttLib import TTFont

HERE = Path(__file__).parent
FONTS = HERE / "node_modules" / "@expo-google-fonts" / "nanum-gothic"  # Nanum Gothic, SIL Open Font License 1.1
NAME = "Slides Korean"
KOREAN = "U+1100-11FF, U+3000-9FFF, U+AC00-D7AF, U+FF00-FFEF"  # all other signs come from the theme's other fonts
FACES = {400: "400Regular/NanumGothic_400Regular.ttf", 700: "700Bold/NanumGothic_700Bold.ttf"}


def hangul(text: str) -> str:
    """The letters of a text that other fonts of the theme may lack."""
    return "".join(sorted({letter for letter in text if ord(letter) >= 0x1100}))


def cut(path: Path, letters: str) -> bytes:
    """A WOFF of these letters alone."""
    font = TTFont(path)
    tool = subset.Subsetter(subset.Options(flavor="woff", layout_features=["*"], notdef_outline=True))
    tool.populate(text=letters)
    tool.subset(font)
    font.flavor = "woff"
    file = io.BytesIO()
    font.save(file)
    return file.getvalue()


def theme(text: str) -> str:
    """theme.css with the font of these letters."""
    faces = [
        f'@font-face {{ font-family: "{NAME}"; font-weight: {weight}; unicode-range: {KOREAN}; '
        f"src: url(data:font/woff;base64,{base64.b64encode(cut(FONTS / name, hangul(text))).decode()}); }}"
        for weight, name in FACES.items()
    ]
    return (HERE / "theme.css").read_text(encoding="utf-8") + "\n" + "\n".join(faces) + "\n"


if __name__ == "__main__":
    out, *decks = map(Path, sys.argv[1:])
    out.write_text(theme("".join(deck.read_text(encoding="utf-8") for deck in decks)), encoding="utf-8")
