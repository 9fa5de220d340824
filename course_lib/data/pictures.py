"""Files and captions become pictures: PIL images in RGB, and a sentence for each where there is one.

Derived in: notebooks/11_textual_inversion.ipynb, section "Five pictures".
"""

import codecs
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from torch import Tensor

from course_lib.environment import from_uint8

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


def open_image(path: str | Path) -> Image.Image:
    """A picture as RGB: turned as its EXIF tag says, transparent parts on white, 16-bit scaled to 8.

    Raises ValueError, which names the file, if it is no picture, damaged, or an animation.
    """
    try:
        with Image.open(path) as file:
            frames = 1 if file.format == "MPO" else getattr(file, "n_frames", 1)  # an MPO is a phone's JPEG
            image = ImageOps.exif_transpose(file)
            image.load()
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
    return image.convert("RGB")


def open_images(source: str | Path | Sequence) -> list[Image.Image]:
    """The pictures of a folder (in the order of their names), of a list of paths, or a list of PIL pictures as it is.

    Raises ValueError if there is none, or one that cannot be read; files that are no pictures are named.
    """
    if isinstance(source, (str, Path)):
        folder = Path(source).expanduser()
        if not folder.is_dir():
            raise ValueError(f"images: expected a folder with pictures, but {folder} is none")
        source = _picture_files(folder)
        if not source:
            files = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
            found = f"only {', '.join(path.name for path in files[:3])}" if files else "nothing"
            raise ValueError(f"images: expected PNG, JPEG or WebP files in {folder}, found {found}")
    images = [one.convert("RGB") if isinstance(one, Image.Image) else open_image(one) for one in source]
    if not images:
        raise ValueError("images: expected at least one picture, got none")
    return images


def _picture_files(folder: Path) -> list[Path]:
    """In the order of their names, without hidden ones."""
    files = (path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    return sorted(path for path in files if path.suffix.lower() in SUFFIXES)


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
    """What <picture>.txt beside each picture of a folder says; None where no picture has one.

    Raises ValueError if only some pictures have a caption.
    """
    texts = [path.with_suffix(".txt") for path in _picture_files(Path(folder).expanduser())]
    missing = [text.name for text in texts if not text.is_file()]
    if len(missing) == len(texts):
        return None
    if missing:
        raise ValueError(f"captions: expected a text file for each picture, missing {', '.join(missing[:3])}")
    return [read_text(text).strip() for text in texts]


def captions_with(token: str, images, captions: Sequence[str] | None = None) -> Sequence[str] | None:
    """The captions given, or those beside the pictures, or None: where only what a new word says is to be learnt.

    Raises ValueError unless each holds the token, or {} in its place.
    """
    given = captions
    if given is None and isinstance(images, (str, Path)) and Path(images).expanduser().is_dir():
        captions = captions_beside(images)
    without = [caption for caption in captions or () if "{}" not in caption and token not in caption.lower()]
    if without:
        where = "got" if given is not None else f"but of those beside the pictures in {images} {len(without)} lack it:"
        raise ValueError(f"captions: expected {token} or {{}} in each, as nothing else stands for the subject, {where} "
                         f"{without[0]!r}")  # fmt: skip
    return captions


def to_tensor(image: Image.Image, size: int) -> Tensor:
    """The middle square of a picture, scaled: (3, size, size) in [-1, 1]."""
    square = ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)
    return from_uint8(np.array(square))
