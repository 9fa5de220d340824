"""Read picture files as PIL images in RGB, and their captions where there are any.

Derived in: notebooks/11_textual_inversion.ipynb, section "Five pictures".
"""

import codecs
import contextlib
import json
import re
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

from course_lib.environment import from_uint8

HEIC = (".heic", ".heif")  # Pillow needs pillow-heif for them
SUFFIXES = {".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif", *HEIC}
CAPTIONS = (".txt", ".TXT", ".caption")  # 1.txt or 1.png.txt beside 1.png
TABLE = "metadata.jsonl"  # or all in one file: {"file_name": "1.png", "text": "a {} on a table"}
LARGEST = 300_000_000  # pixels
MARK = "personalization-course"  # the EXIF tag "Software" of pictures that this course drew
TURNS = dict(enumerate(("FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_270", "TRANSVERSE",
                        "ROTATE_90"), start=2))  # fmt: skip


def open_image(path: str | Path | Image.Image) -> Image.Image:
    """A picture as RGB: turned as its EXIF tag says, transparent parts on white, 16-bit scaled to 8.

    A JPEG of more than 4096 pixels a side is decoded at half its size, or less, which saves memory.
    Raises ValueError, which names the file, if it is not a picture, is damaged, too large, or an animation.
    """
    if isinstance(path, Image.Image):
        return path.convert("RGB")
    try:
        with _opened(path) as file:
            if file.width * file.height > LARGEST:
                raise ValueError(f"expected at most {LARGEST:,} pixels, got {file.width} x {file.height}")
            frames = 1 if file.format == "MPO" else getattr(file, "n_frames", 1)  # an MPO is a phone's JPEG
            turn = TURNS.get(_orientation(file))
            file.draft(None, (2048, 2048))
            image = file.transpose(Image.Transpose[turn]) if turn else file.copy()
    except Exception as error:  # a damaged file makes decoders raise almost anything
        raise ValueError(
            f"images: expected a PNG, JPEG or WebP picture, but {path} cannot be read ({error}); remove or replace it"
        ) from error
    if frames > 1:
        raise ValueError(f"images: expected still pictures, got an animation of {frames} frames: {path}")
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image, dtype=np.float64)
        values = values / 257 if values.max() > 255 else values
        return Image.fromarray(values.clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return image if image.mode == "RGB" else image.convert("RGB")


@contextlib.contextmanager
def _opened(path: str | Path):
    """Image.open for phones: it reads HEIC, and accepts 200 megapixels."""
    if Path(path).suffix.lower() in HEIC:
        try:
            from pillow_heif import register_heif_opener
        except ImportError:
            raise ValueError("HEIC needs a package: pip install pillow-heif; or save it as JPEG") from None
        register_heif_opener()
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        with Image.open(path) as file:
            yield file
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def _orientation(file: Image.Image) -> int | None:
    """The EXIF tag; None if the tags are broken: the picture may still be good."""
    try:
        return file.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # Pillow's code for them expects well-formed tags
        return None


def mark() -> Image.Exif:
    """For `image.save(path, exif=mark())`: such a picture is not used as a photo of the subject later."""
    exif = Image.Exif()
    exif[ExifTags.Base.Software] = MARK
    return exif


def is_marked(path: Path) -> bool:
    """Whether this course drew a picture."""
    try:
        with _opened(path) as file:
            return MARK.encode() in file.info.get("exif", b"")
    except Exception:  # `open_image` says what is wrong with it
        return False


def open_images(source: str | Path | Sequence) -> list[Image.Image]:
    """The pictures of a folder (in the order of their names), of a list of paths, or a list of PIL pictures as RGB.

    Raises ValueError if there is none, or one that cannot be read.
    """
    return [open_image(one) for one in image_sources(source)]


def image_sources(source: str | Path | Sequence) -> Sequence:
    """The files of a folder, or the list as it is, for `open_image` to open one at a time, since photos are large.

    Warns about the entries that are left out: other files, folders, and pictures that this course drew.
    Raises ValueError if there is no picture.
    """
    if not isinstance(source, (str, Path)):
        if not len(source):
            raise ValueError("images: expected at least one picture, got none")
        return source
    folder = Path(source).expanduser()
    if not folder.is_dir():
        raise ValueError(f"images: expected a folder with pictures, but {folder} is not one")
    files = picture_files(folder)
    used = {*files, *map(_caption_file, files), folder / TABLE}
    rest = [path.name for path in sorted(folder.iterdir()) if path not in used and not path.name.startswith(".")]
    if not files:
        found = f"only {', '.join(rest[:3])}" if rest else "nothing"
        drawn = " (pictures that this course drew do not count)" if any(map(is_marked, folder.iterdir())) else ""
        raise ValueError(f"images: expected PNG, JPEG or WebP files in {folder}, found {found}{drawn}")
    if rest:
        more = f" and {len(rest) - 5} more" if len(rest) > 5 else ""
        warnings.warn(f"images: left out of {folder}, other files or drawn by this course: {', '.join(rest[:5])}{more}",
                      stacklevel=1)  # fmt: skip
    return files


def picture_files(folder: str | Path) -> list[Path]:
    """The pictures of a folder in the order of their names, without hidden ones and those that this course drew."""
    files = (path for path in Path(folder).expanduser().iterdir() if path.is_file() and not path.name.startswith("."))
    return sorted(path for path in files if path.suffix.lower() in SUFFIXES and not is_marked(path))


def _caption_file(picture: Path) -> Path | None:
    places = (place for suffix in CAPTIONS for place in (picture.with_suffix(suffix), Path(f"{picture}{suffix}")))
    return next((place for place in places if place.is_file()), None)


def read_text(path: str | Path) -> str:
    """A text file, in UTF-8 or UTF-16 (a BOM, or zeros in every second byte, tell which).

    Raises ValueError, which names the file, for other encodings: cp1252, cp949 and their kind cannot be told apart.
    """
    data = Path(path).read_bytes()
    even, odd = data[::2].count(0), data[1::2].count(0)
    marked = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    encoding = "utf-16" if marked else "utf-8-sig" if even == odd else "utf-16-le" if odd > even else "utf-16-be"
    text = data.decode(encoding, errors="replace")
    if "\0" in text or "\ufffd" in text:
        raise ValueError(f"captions: expected text in UTF-8 or UTF-16, but {path} is in another encoding; save it as "
                         "UTF-8")  # fmt: skip
    return text


def captions_beside(folder: str | Path) -> list[str] | None:
    """The captions of a folder: 1.txt, 1.png.txt or 1.caption beside 1.png, or metadata.jsonl; None: no captions.

    Raises ValueError if only some pictures have a caption, or one cannot be read.
    """
    files, rows = picture_files(folder), _rows(Path(folder).expanduser() / TABLE)
    texts = [read_text(file).strip() if (file := _caption_file(one)) else rows.get(one.name) for one in files]
    missing = [one.with_suffix(".txt").name for one, text in zip(files, texts, strict=True) if text is None]
    if len(missing) == len(texts):
        return None
    if missing:
        raise ValueError(f"captions: expected a text file for each picture, missing {', '.join(missing[:3])}")
    return texts


def _rows(table: Path) -> dict[str, str]:
    """{name of a picture: caption} of a metadata.jsonl, {} if there is none."""
    try:
        rows = [json.loads(line) for line in read_text(table).splitlines() if line.strip()] if table.is_file() else []
        return {row["file_name"]: (row.get("text") or row["caption"]).strip() for row in rows}
    except (AttributeError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f'captions: expected {{"file_name": "1.png", "text": "a {{}}"}} in each line of {table}, got '
                         f"another ({error!r})") from error  # fmt: skip


def captions_with(token: str, images, captions: Sequence[str] | None = None) -> Sequence[str] | None:
    """The captions given, or those beside the pictures, or None.

    Raises ValueError unless each holds the token, or {} in its place: nothing else stands for the subject.
    """
    given = captions
    if given is None and isinstance(images, (str, Path)) and Path(images).expanduser().is_dir():
        captions = captions_beside(images)
    word = re.compile(rf"(?<!\w){re.escape(token)}(?!\w)", re.IGNORECASE)
    without = [caption for caption in captions or () if "{}" not in caption and not word.search(caption)]
    if without:
        where = "got" if given is not None else f"but of those beside the pictures in {images} {len(without)} lack it:"
        raise ValueError(f"captions: expected {token} or {{}} in each, as nothing else stands for the subject, {where} "
                         f"{without[0]!r}")  # fmt: skip
    return captions


def to_tensor(image: Image.Image, size: int) -> Tensor:
    """The middle square of a picture, scaled: (3, size, size) in [-1, 1]."""
    square = ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)
    return from_uint8(np.array(square))
