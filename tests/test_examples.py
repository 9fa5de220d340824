"""Pictures become batches: every kind of file, what is refused, and where the loss counts."""

import json
import struct
import sys
import warnings
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, features
from safetensors.torch import load_file
from tiny import build

from course_lib.data import pictures
from course_lib.data.pictures import open_image, open_images
from course_lib.diffusion import samplers
from course_lib.latent.registry import fingerprint
from course_lib.personalization import examples
from course_lib.personalization.examples import OBJECT, Examples, subject_examples
from course_lib.personalization.finetune import draw_pictures

RED, BLUE, WHITE = (200, 30, 30), (20, 60, 220), (255, 255, 255)
close = torch.testing.assert_close
exact = dict(rtol=0, atol=0)


@pytest.fixture(scope="module")
def sd():
    return build()


def pooling(side=64, factor=8):
    """A model whose autoencoder takes the mean of each square of pixels: its latents can be looked at."""

    def encode(x):
        mean = F.avg_pool2d(x, factor)
        return SimpleNamespace(latent_dist=SimpleNamespace(mean=mean, std=torch.full_like(mean, 0.5)))

    vae = SimpleNamespace(encode=encode, config=SimpleNamespace(scaling_factor=2.0))
    unet = SimpleNamespace(config=SimpleNamespace(sample_size=side // factor))
    device = torch.device("cpu")
    return SimpleNamespace(vae=vae, unet=unet, factor=factor, resolution=side, device=device, dtype=torch.float32)


def halves(left=RED, right=BLUE, mode="RGB", size=(16, 8)):
    image = Image.new(mode, size, left)
    image.paste(right, (size[0] // 2, 0, *size))
    return image


def sixteen_bit(left, right):
    values = np.full((8, 16), left, np.uint16)
    values[:, 8:] = right
    return Image.fromarray(values)


def five(folder, size=(16, 8)):
    for k in range(5):
        halves((50 * k, 30, 30), size=size).save(folder / f"{k}.png")
    return folder


def assert_halves(image, left, right, atol=0):
    assert image.mode == "RGB"
    close(torch.tensor(image.getpixel((2, 4))), torch.tensor(left), rtol=0, atol=atol)
    close(torch.tensor(image.getpixel((13, 4))), torch.tensor(right), rtol=0, atol=atol)


# ---- files ----


@pytest.mark.parametrize(("name", "image", "options", "left", "right", "atol"), [
    ("a.jpg", halves(), dict(quality=95, subsampling=0), RED, BLUE, 6),
    ("a.jpg", halves().convert("CMYK"), dict(quality=95), RED, BLUE, 6),
    ("a.jpg", halves(40, 220, "L"), dict(quality=95), (40,) * 3, (220,) * 3, 6),
    ("a.webp", halves(), dict(lossless=True), RED, BLUE, 0),
    ("a.bmp", halves(), {}, RED, BLUE, 0),
    ("a.png", halves(), {}, RED, BLUE, 0),
    ("a.png", halves(40, 220, "L"), {}, (40,) * 3, (220,) * 3, 0),
    ("a.png", halves(0, 1, "1"), {}, (0,) * 3, WHITE, 0),
    ("a.png", halves().quantize(4), {}, RED, BLUE, 0),
    ("a.png", sixteen_bit(257 * 40, 65535), {}, (40,) * 3, WHITE, 0),
    ("a.tif", halves(40.0, 220.0, "F"), {}, (40,) * 3, (220,) * 3, 0),
    ("a.png", halves((*RED, 255), (0, 0, 0, 0), "RGBA"), {}, RED, WHITE, 0),
    ("a.webp", halves((*RED, 255), (0, 0, 0, 0), "RGBA"), dict(lossless=True), RED, WHITE, 0),
    ("a.png", halves((*RED, 255), (0, 0, 100, 51), "RGBA"), {}, RED, (204, 204, 224), 1),
    ("a.png", halves((40, 255), (0, 0), "LA"), {}, (40,) * 3, WHITE, 0),
    ("a.png", halves(), dict(transparency=BLUE), RED, WHITE, 0),
    ("a.png", halves(0, 1, "1").convert("P"), dict(transparency=0), WHITE, WHITE, 0),
    ("a.gif", halves().quantize(4), {}, RED, BLUE, 0),
], ids=["jpeg", "cmyk", "grey jpeg", "webp", "bmp", "png", "grey", "black and white", "palette", "16 bit", "float",
        "alpha", "alpha webp", "half alpha", "grey alpha", "one transparent colour", "palette with alpha",
        "still gif"])  # fmt: skip
def test_every_kind_of_picture_opens(tmp_path, name, image, options, left, right, atol):
    image.save(tmp_path / name, **options)
    opened = open_image(tmp_path / name)
    assert opened.size == (16, 8)
    assert_halves(opened, left, right, atol)


@pytest.mark.parametrize(("orientation", "stored_as"), [
    (1, None), (2, "FLIP_LEFT_RIGHT"), (3, "ROTATE_180"), (4, "FLIP_TOP_BOTTOM"), (5, "TRANSPOSE"), (6, "ROTATE_90"),
    (7, "TRANSVERSE"), (8, "ROTATE_270"),
])  # fmt: skip
@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_pictures_are_turned_as_the_camera_says(tmp_path, suffix, orientation, stored_as):
    seen, exif = ImageOps.expand(halves(size=(32, 16)), (0, 16, 0, 0), WHITE), Image.Exif()  # top, left, right differ
    exif[0x0112] = orientation
    stored = seen.transpose(Image.Transpose[stored_as]) if stored_as else seen
    stored.save(tmp_path / f"a.{suffix}", exif=exif, quality=95, **({} if suffix == "png" else {"lossless": True}))
    opened = np.array(open_image(tmp_path / f"a.{suffix}"), dtype=int)
    assert np.abs(opened - np.array(seen, dtype=int)).mean() < 6


def test_a_phones_picture_with_a_second_view_is_no_animation(tmp_path):
    halves().save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[halves(BLUE, RED)], quality=95)
    assert_halves(open_image(tmp_path / "a.jpg"), RED, BLUE, 12)


def exif_with(make, orientation=6):
    """EXIF bytes: the camera's make, as (type, value in 4 bytes), and how the picture is turned."""
    kind, value = make
    entries = struct.pack("<HHI4s", 0x010F, kind, 1, value) + struct.pack("<HHIHH", 0x0112, 3, 1, orientation, 0)
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + entries + struct.pack("<III", 0, 7, 2)


@pytest.mark.parametrize(("exif", "turned"), [
    (exif_with((5, struct.pack("<I", 38))), True),  # a fraction where words belong: Pillow cannot write it again
    (exif_with((2, b"abc\0"), 99), False),
    (exif_with((2, b"abc\0"))[:20], False),
    (b"Exif\0\0II*\0\xff\xff\xff\xff", False),
    (b"Exif\0\0nothing of the kind", False),
], ids=["a wrong type", "no such turn", "cut off", "points nowhere", "no EXIF at all"])  # fmt: skip
@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_a_good_picture_with_broken_exif_opens(tmp_path, exif, turned, suffix):
    seen = ImageOps.expand(halves(size=(32, 16)), (0, 16, 0, 0), WHITE)
    stored = seen.transpose(Image.Transpose.ROTATE_90) if turned else seen
    stored.save(tmp_path / f"a.{suffix}", exif=exif, quality=95, **({} if suffix == "png" else {"lossless": True}))
    opened = np.array(open_image(tmp_path / f"a.{suffix}"), dtype=int)
    assert np.abs(opened - np.array(seen, dtype=int)).mean() < 6


def test_a_phones_200_megapixels_open_and_more_are_refused(tmp_path, monkeypatch):
    side = 14_200
    Image.new("RGB", (side, side), RED).save(tmp_path / "a.jpg", quality=50)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opened = open_image(tmp_path / "a.jpg")
    assert opened.size == (-(-side // 4), -(-side // 4))  # decoded at a quarter
    close(torch.tensor(opened.getpixel((9, 9))), torch.tensor(RED), rtol=0, atol=4)
    assert Image.MAX_IMAGE_PIXELS is not None  # for others it is as it was
    monkeypatch.setattr(pictures, "LARGEST", 10**8)
    with pytest.raises(ValueError, match=r"a\.jpg cannot be read \(expected at most 100,000,000 pixels, got 14200 x"):
        open_image(tmp_path / "a.jpg")


def test_a_phones_heic_is_read_with_its_package_and_refused_without(tmp_path, monkeypatch):
    halves().save(tmp_path / "a.jpg", quality=95, subsampling=0)
    (tmp_path / "a.jpg").rename(tmp_path / "IMG_1.HEIC")
    five(tmp_path)
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(ValueError, match=r"IMG_1\.HEIC cannot be read \(HEIC needs a package: pip install pillow-heif"):
        open_images(tmp_path)
    calls = []  # in place of the package
    monkeypatch.setitem(sys.modules, "pillow_heif", SimpleNamespace(register_heif_opener=lambda: calls.append(1)))
    assert len(open_images(tmp_path)) == 6 and calls


@pytest.mark.parametrize("suffix", ["tif", "tiff", "jfif", "gif", "avif", "JFIF", "TIF"])
def test_less_common_pictures_of_a_folder_are_read(tmp_path, suffix):
    kind = {"jfif": "JPEG", "tif": "TIFF"}.get(suffix.lower(), suffix.upper())
    if kind == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    halves().save(tmp_path / f"a.{suffix}", kind, quality=95)
    (image,) = open_images(tmp_path)
    assert_halves(image, RED, BLUE, 40)


def test_photos_are_opened_one_at_a_time(tmp_path, monkeypatch):
    """What is alive at once: one photo, and with zooming ten."""
    alive, most = weakref.WeakSet(), []

    class Held:
        def __init__(self, image):
            self.image = image

    def opened(path):
        held = Held(open_image(path))
        alive.add(held)
        most.append(len(alive))
        return held

    for k in range(15):
        halves((10 * k, 30, 30)).save(tmp_path / f"{k}.png")
    expected = subject_examples(pooling(), open_images(tmp_path), "<v>").mean
    zoomed = examples.resized_examples(pooling(), open_images(tmp_path), "<v>", variants=20).mean
    monkeypatch.setattr(examples, "open_image", opened)
    monkeypatch.setattr(examples, "to_tensor", lambda held, size: pictures.to_tensor(held.image, size))
    close(subject_examples(pooling(), tmp_path, "<v>").mean, expected, **exact)
    assert max(most) <= 2
    close(examples.resized_examples(pooling(), tmp_path, "<v>", variants=20).mean, zoomed, **exact)
    assert max(most) <= 11


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png"])
def test_animations_are_refused(tmp_path, name):
    halves().save(tmp_path / name, save_all=True, append_images=[halves(BLUE, RED)], duration=100)
    with pytest.raises(ValueError, match=rf"^images: expected still pictures, got an animation of 2 .*{name}$"):
        open_image(tmp_path / name)


def test_a_folder_is_read_in_the_order_of_names(tmp_path):
    for name, colour in (("b.JPG", BLUE), ("a.png", RED), (".hidden.png", WHITE)):
        halves(colour).save(tmp_path / name, **({"quality": 95, "subsampling": 0} if name == "b.JPG" else {}))
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "c.png").mkdir()
    for source in (tmp_path, str(tmp_path), [tmp_path / "a.png", str(tmp_path / "b.JPG")]):
        images = open_images(source)
        assert len(images) == 2
        assert_halves(images[0], RED, BLUE)
        assert_halves(images[1], BLUE, BLUE, 6)
    assert_halves(open_images([halves().convert("RGBA")])[0], RED, BLUE)


@pytest.mark.parametrize(("files", "found"), [((), "nothing"), (("notes.txt",), "only notes.txt")])
def test_a_folder_without_pictures_is_refused(tmp_path, files, found):
    for name in files:
        (tmp_path / name).write_text("mine")
    with pytest.raises(ValueError, match=rf"^images: expected PNG, JPEG or WebP files in .*, found {found}$"):
        open_images(tmp_path)


def test_no_pictures_at_all_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"^images: expected a folder with pictures, but .*nowhere is not one$"):
        open_images(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"^images: expected at least one picture, got none$"):
        open_images([])
    with pytest.raises(ValueError, match=r"^images: .* but .*none\.png cannot be read"):
        open_images([tmp_path / "none.png"])


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "gif"])
@pytest.mark.parametrize("damage", ["cut", "empty", "text", "overwritten"])
def test_one_damaged_picture_among_five_is_named(tmp_path, suffix, damage):
    five(tmp_path, size=(64, 64))
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / f"3.{suffix}")
    whole = (tmp_path / f"3.{suffix}").read_bytes()
    half = len(whole) // 2
    broken = {"cut": whole[:half], "empty": b"", "text": b"no picture", "overwritten": b"\0" * half + whole[half:]}
    (tmp_path / f"3.{suffix}").write_bytes(broken[damage])
    sources = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match=rf"^images: .* but .*3\.{suffix} cannot be read .* remove or replace it$"):
        open_images(sources)


@pytest.mark.parametrize(("name", "place"), [("a.gif", 30), ("a.png", 11)])
def test_a_wrong_byte_is_refused_in_our_words(tmp_path, name, place):
    """Pillow's decoders then raise a ValueError of their own, without the file's name."""
    halves().quantize(4).save(tmp_path / name)
    content = bytearray((tmp_path / name).read_bytes())
    content[place] = 0
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"^images: .* but .*{name} cannot be read \("):
        open_image(tmp_path / name)


def test_captions_lie_beside_pictures(tmp_path, monkeypatch):
    five(tmp_path)
    halves().save(tmp_path / ".hidden.png")
    assert pictures.captions_beside(tmp_path) is None
    for k in range(5):
        (tmp_path / f"{k}.txt").write_text(f"\ufeff{{}} no. {k}\n", encoding="utf-8")
    assert pictures.captions_beside(tmp_path) == [f"{{}} no. {k}" for k in range(5)]
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    for folder in (tmp_path, "~"):
        assert subject_examples(pooling(), folder, "<v> cat").prompts == [(f"<v> cat no. {k}",) for k in range(5)]
    (tmp_path / "3.txt").unlink()
    with pytest.raises(ValueError, match=r"^captions: expected a text file for each picture, missing 3\.txt$"):
        subject_examples(pooling(), tmp_path, "<v> cat")


@pytest.mark.parametrize("form", ["{stem}.txt", "{stem}.TXT", "{stem}.caption", "{stem}.png.txt", "{stem}.png.caption"])
def test_common_forms_of_captions_are_read(tmp_path, form):
    five(tmp_path)
    (tmp_path / "metadata.jsonl").write_text(
        "\n".join(json.dumps({"file_name": f"{k}.png", "caption": f" row {k} "}) for k in range(5)) + "\n\n"
    )
    assert pictures.captions_beside(tmp_path) == [f"row {k}" for k in range(5)]
    for k in range(4):
        (tmp_path / form.format(stem=k)).write_text(f"{{}} no. {k}\n")
    assert pictures.captions_beside(tmp_path) == [*(f"{{}} no. {k}" for k in range(4)), "row 4"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is left out
        assert len(open_images(tmp_path)) == 5


@pytest.mark.parametrize("line", ["no JSON", "[1]", '{"file_name": "0.png"}', '{"text": "a {}"}',
                                  '{"file_name": "0.png", "text": 3}'])  # fmt: skip
def test_a_table_of_captions_in_another_form_is_named(tmp_path, line):
    five(tmp_path)
    (tmp_path / "metadata.jsonl").write_text(line)
    with pytest.raises(ValueError, match=r"^captions: expected .* in each line of .*metadata\.jsonl, got another"):
        pictures.captions_beside(tmp_path)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "BOM utf-16-be"])
def test_text_is_read_where_its_encoding_can_be_detected(tmp_path, encoding):
    words, file = "a {} in São Paulo, 고양이\nand more\n", tmp_path / "1.txt"
    bom = "\ufeff" if encoding.startswith("BOM ") else ""
    file.write_bytes((bom + words).encode(encoding.removeprefix("BOM ")))
    assert pictures.read_text(file) == words
    file.write_bytes(b"")
    assert pictures.read_text(str(file)) == ""


@pytest.mark.parametrize(("words", "encoding"), [
    ("a {} in São Paulo", "cp1252"), ("a {} 고양이", "cp949"), ("a {} 猫", "shift-jis"), ("a {}", "utf-32"),
    ("고양이", "utf-16-le"),
])  # fmt: skip
def test_text_in_an_encoding_that_cannot_be_detected_is_named(tmp_path, words, encoding):
    five(tmp_path)
    for k in range(5):
        (tmp_path / f"{k}.txt").write_bytes(words.encode(encoding if k == 3 else "utf-8"))
    with pytest.raises(ValueError, match=r"^captions: expected text in UTF-8 or UTF-16, but .*3\.txt is in another"):
        pictures.captions_beside(tmp_path)


def test_captions_hold_the_token_where_it_is_all_that_is_trained(tmp_path):
    five(tmp_path)
    assert pictures.captions_with("<v>", tmp_path) is None and pictures.captions_with("<v>", [halves()]) is None
    for k in range(5):
        (tmp_path / f"{k}.txt").write_text(["a {} here", "a <V> there"][k % 2])
    assert pictures.captions_with("<v>", str(tmp_path)) == pictures.captions_beside(tmp_path)
    assert pictures.captions_with("<v>", tmp_path, ["my {}"]) == ["my {}"]  # those given count, not those beside
    message = r"^captions: expected <v> or \{\} in each, as nothing else stands for the subject, "
    with pytest.raises(ValueError, match=rf"{message}got 'a cat'$"):
        pictures.captions_with("<v>", tmp_path, ["{}", "a cat"])
    (tmp_path / "3.txt").write_text("a cat")
    with pytest.raises(ValueError, match=rf"{message}but of those beside the pictures in .* 1 lack it: 'a cat'$"):
        pictures.captions_with("<v>", tmp_path)


# ---- batches ----


def numbered(V=5, std=0.0):
    mean = torch.arange(float(V)).reshape(V, 1, 1, 1).expand(V, 2, 4, 4).clone()
    prompts = [tuple(f"{row} {word}" for word in "abc") for row in range(V)]
    mask = (torch.arange(16).reshape(1, 1, 4, 4) >= torch.arange(V).reshape(V, 1, 1, 1)).float()
    return Examples(mean, torch.full_like(mean, std), prompts, mask)


def draw(examples, count, seed=0):
    return draw_pictures(examples, count, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("count", [1, 3, 5, 12])
def test_prompts_and_masks_are_those_of_the_variant(count):
    z0, prompts, mask = draw(numbered(), count)
    rows = z0[:, 0, 0, 0].int().tolist()
    assert len(prompts) == count and [int(prompt.split()[0]) for prompt in prompts] == rows
    close(mask, numbered().mask[rows], **exact)
    close(z0, numbered().mean[rows], **exact)


def test_a_variant_comes_again_only_after_all_others():
    for seed in range(20):
        rows = draw(numbered(), 12, seed)[0][:, 0, 0, 0].int().tolist()
        assert sorted(rows[:5]) == sorted(rows[5:10]) == list(range(5)) and rows[10] != rows[11]
    assert len({tuple(draw(numbered(), 5, seed)[0][:, 0, 0, 0].tolist()) for seed in range(20)}) > 10
    assert {prompt.split()[1] for prompt in draw(numbered(), 60)[1]} == set("abc")


def test_a_seed_means_one_batch():
    first, again, other = (draw(numbered(std=1.0), 7, seed) for seed in (3, 3, 4))
    close(first[0], again[0], **exact)
    assert first[1] == again[1] and not torch.equal(first[0], other[0])


def test_latents_are_drawn_with_their_mean_and_std():
    x = draw(numbered(V=1, std=2.0), 2000)[0]
    close(x.mean(), torch.tensor(0.0), rtol=0, atol=0.05)
    close(x.std(), torch.tensor(2.0), rtol=0.02, atol=0)


def test_examples_that_do_not_fit_are_refused():
    z = torch.zeros(2, 4, 8, 8)
    with pytest.raises(ValueError, match=r"^prompts: expected one entry for each of 2 variants, got 1$"):
        Examples(z, z, [("a cat",)])
    with pytest.raises(ValueError, match=r"^mask: expected each to have a place with 1, got an empty one"):
        Examples(z, z, [("a cat",)] * 2, torch.stack([torch.ones(1, 8, 8), torch.zeros(1, 8, 8)]))


# ---- variants ----


def test_latents_are_the_means_that_the_model_encodes(sd, tmp_path):
    """Eleven pictures: more than go through the autoencoder at a time."""
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (70, 90, 3), dtype=np.uint8)) for _ in range(11)]
    made = subject_examples(sd, images, "<v> cat")
    x = torch.stack([pictures.to_tensor(image, 64) for image in images])
    assert x.shape == (11, 3, 64, 64) and -1 <= x.min() < -0.5 and 0.5 < x.max() <= 1
    close(made.mean, sd.encode_image(x))
    close(made.std, sd.vae.config.scaling_factor * sd.vae.encode(x).latent_dist.std)
    assert made.mask is None and made.mean.std() > 0.01 and not made.mean.requires_grad
    assert made.prompts == [tuple(template.format("<v> cat") for template in OBJECT)] * 11


def test_the_middle_square_is_taken():
    wide = Image.new("RGB", (60, 20), RED)
    wide.paste(BLUE, (12, 0, 48, 20))
    x = pictures.to_tensor(wide, 8)
    close(x, (torch.tensor(BLUE) / 127.5 - 1).reshape(3, 1, 1).expand(3, 8, 8))


def test_mirrored_pictures_keep_their_captions():
    images, captions = [halves(), halves(BLUE, WHITE)], ["my {} here", "{} there"]
    plain = subject_examples(pooling(), images, "<v> cat", captions=captions)
    both = subject_examples(pooling(), images, "<v> cat", captions=captions, flip=True)
    close(both.mean, torch.cat([plain.mean, plain.mean.flip(-1)]))
    assert both.prompts == plain.prompts * 2 == [("my <v> cat here",), ("<v> cat there",)] * 2
    assert not torch.equal(plain.mean, plain.mean.flip(-1))
    with pytest.raises(ValueError, match=r"^captions: expected one for each of the 2 pictures, got 1$"):
        subject_examples(pooling(), images, "<v> cat", captions=["a {}"])


def test_templates_and_size_are_ones_own():
    made = subject_examples(pooling(), [halves()], "<v>", templates=["{} by {}", "so"], size=32)
    assert made.prompts == [("<v> by <v>", "so")] and made.mean.shape == (1, 3, 4, 4)


def test_a_latent_counts_if_all_its_pixels_do():
    mask = torch.ones(1, 1, 32, 32)
    mask[..., 9, 17] = 0
    made = examples.encode(pooling(32), torch.zeros(1, 3, 32, 32), [("a",)], mask)
    expected = torch.ones(1, 1, 4, 4)
    expected[..., 1, 2] = 0
    close(made.mask, expected, **exact)


def ramp():
    """Grey that grows from left to right, nowhere 0 in [-1, 1]: it shows how much of the picture is in a window."""
    return Image.fromarray(np.linspace(140, 250, 96).astype(np.uint8)[None].repeat(96, 0)).convert("RGB")


@pytest.mark.parametrize("size", [8, 16, 24, 64, 128])
def test_masks_are_never_empty_and_show_where_the_picture_is(size):
    for seed in range(10 if size < 64 else 3):
        made = examples.resized_examples(pooling(size), [ramp()], "<v> cat", seed=seed)
        assert len(made.mean) == 64 and made.mean.shape[2:] == made.mask.shape[2:] == (size // 8, size // 8)
        assert made.mask.flatten(1).any(dim=1).all()
        close((made.mean != 0).float(), made.mask.expand_as(made.mean), **exact)


@pytest.mark.parametrize("size", [64, 192])
def test_words_say_how_large_the_picture_is(size):
    made = examples.resized_examples(pooling(size), [ramp()], "<v> cat", variants=120)
    side, half = made.mask.flatten(1).sum(dim=1).sqrt() * 8 / size, 4 / size  # sides are rounded to latents
    span = made.mean[:, 0].amax((1, 2)) - made.mean[:, 0].where(made.mask[:, 0] > 0, torch.inf).amin((1, 2))
    ranges = {"very small": (0.4, 0.6), "far away": (0.6, 0.9), "zoomed in": (1, 1), "": (0.9, 1)}
    seen = dict.fromkeys(ranges, 0)
    for k, prompts in enumerate(made.prompts):
        word = next(word for word in ranges if prompts[0].endswith(word))
        seen[word] += 1
        assert prompts == tuple(f"{template.format('<v> cat')} {word}".strip() for template in OBJECT)
        assert ranges[word][0] - half <= side[k] <= ranges[word][1] + half
        if word == "zoomed in":  # only a part of what the first variant, the plain picture, shows
            assert 0.6 < span[k] / span[0] < 0.95
    assert made.prompts[0][0] == OBJECT[0].format("<v> cat") and side[0] == 1
    assert all(seen.values()) and 0.2 < seen["zoomed in"] / len(side) < 0.5


def test_resized_pictures_are_drawn_by_seed_and_every_picture_comes_first_as_it_is(sd):
    images = [halves(), halves(BLUE, WHITE), halves(WHITE, RED)]
    options = dict(variants=7, size=32)
    first, again, other = (examples.resized_examples(sd, images, "<v>", seed=seed, **options) for seed in (1, 1, 2))
    close(first.mean, again.mean, **exact)
    close(first.mask, again.mask, **exact)
    assert first.prompts == again.prompts and not torch.equal(first.mean, other.mean) and len(first.mean) == 7
    close(first.mean[:3], subject_examples(sd, images, "<v>", size=32).mean)
    assert len(examples.resized_examples(pooling(), images, "<v>", variants=1).mean) == 3


# ---- the model's own pictures ----


def test_generated_pictures_are_drawn_once(sd, tmp_path):
    calls = []
    hook = sd.unet.register_forward_pre_hook(lambda *_: calls.append(1))

    def make(count, prompt="a cat", **options):
        return examples.generated_examples(sd, prompt, count, steps=2, **options)

    try:
        three = make(3)
        used = len(calls)
        assert used == 2 and len(list((tmp_path / "cache" / "prior").iterdir())) == 1
        again, two = make(3), make(2)
        assert len(calls) == used
        more = make(10)
        drawn = len(calls)
        assert drawn == used + 2
        make(3, seed=1), make(3, "a tiger"), make(1, folder=tmp_path / "mine")
        assert len(calls) == drawn + 6 and len(list((tmp_path / "cache" / "prior").iterdir())) == 3
    finally:
        hook.remove()
    close(again.mean, three.mean, **exact)
    close(two.mean, three.mean[:2], **exact)
    close(more.mean[:3], three.mean, **exact)
    assert more.mean.unique(dim=0).shape == (10, 4, 16, 16) and more.prompts == [("a cat",)] * 10
    assert more.std.abs().max() == 0 and more.mask is None
    close(load_file(next((tmp_path / "mine").iterdir()))["z0"], three.mean[:1], rtol=1e-3, atol=1e-3)


def test_a_generated_picture_is_the_one_that_the_sampler_draws(sd):
    made = examples.generated_examples(sd, "a cat", 2, w=3.0, steps=4, seed=5)
    x_T = sd.noise(1, seed=5 * 1_000_003 + 1)
    with torch.no_grad():
        last = samplers.last(samplers.ddim(sd.guided("a cat", 3.0), x_T, sd.schedule, 4, clip=False))
    close(made.mean[1:], last, rtol=1e-3, atol=1e-3)


def test_another_models_pictures_are_not_taken(sd):
    ours, theirs = examples.generated_examples(sd, "a cat", 1, steps=1), build(1)
    assert not torch.allclose(ours.mean, examples.generated_examples(theirs, "a cat", 1, steps=1).mean, atol=1e-2)


def test_a_fingerprint_tells_models_apart(sd):
    ours = fingerprint(sd)
    assert len(ours) == sum(1 for part in (sd.unet, sd.text_encoder) for _ in part.parameters())
    assert ours.dtype == torch.float32
    close(fingerprint(build()), ours, **exact)
    assert (fingerprint(build(1)) != ours).float().mean() > 0.3
