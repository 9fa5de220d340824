"""The commands that use a concept: they overwrite nothing, say what does nothing, and fail early, in one sentence."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import FULL_SIZE, TINY

from course_lib import personalize
from course_lib.cli import drawing, train
from course_lib.cli import main as command_line
from course_lib.latent.registry import fingerprint
from course_lib.latent.stable_diffusion import StableDiffusion, load
from course_lib.personalization.concept import Concept, applied, load_concept, save_concept
from course_lib.personalization.custom_diffusion import key_value_layers
from course_lib.personalization.interchange.export import export

REPO = Path(__file__).resolve().parents[1]
close = torch.testing.assert_close


def random(shape, seed):
    return 0.3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A model folder, and in it concepts that nobody had to train."""
    root = tmp_path_factory.mktemp("world")
    FULL_SIZE.build(**TINY | {"unet": TINY["unet"] | {"sample_size": 8}}).save(root / "model", torch.float32)
    sd = load(root / "model", "cpu")
    common = dict(base=str(root / "model"), settings={}, fingerprint=fingerprint(sd))
    for k, noun in enumerate(("cat", "tiger")):
        about = {"token": f"<{noun}>", "noun": noun, "tokens": [f"<{noun}>"], "nouns": [noun], "rows": [f"<{noun}>"]}
        row = {"tokens": random((1, 32), k)}
        save_concept(root / f"{noun}_word.safetensors", Concept("textual_inversion", row, about=about, **common))
        weights = {f"unet.{name}.weight": layer.weight + random(layer.weight.shape, k)
                   for name, layer in key_value_layers(sd.unet).items()}  # fmt: skip
        save_concept(root / f"{noun}.safetensors", Concept("custom_diffusion", row | weights, about=about, **common))
        thin = {}
        for name, layer in sd.unet.named_modules():
            if name.endswith("to_v"):
                thin[f"unet.{name}.lora.down"] = random((2, layer.in_features), k)
                thin[f"unet.{name}.lora.up"] = random((layer.out_features, 2), k + 5)
        about = {"token": "sks", "noun": noun, "rank": 2}
        save_concept(root / f"{noun}_lora.safetensors", Concept("lora", thin, about=about, **common))
    (root / "captions.txt").write_text("a photo of a tiger\na cat\na photo\nof a cat\n", encoding="utf-16")
    return root


def run(*args):
    return personalize.main([str(arg) for arg in args])


def error_of(capsys, *args):
    """The one sentence with which a command ends."""
    capsys.readouterr()
    assert run(*args) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1, err
    return err.removeprefix("error: ").strip()


def sample(*args):
    return "sample", "--steps", 1, "--count", 1, *args


# ---- what is there stays ----


COMMANDS = {
    "sample": (lambda w: sample("--concept", w / "cat.safetensors"), "x.png"),
    "sample into a folder": (lambda w: sample("--concept", w / "cat.safetensors"), "x"),
    "merge": (lambda w: ("merge", "--concept", w / "cat.safetensors", "--concept", w / "tiger.safetensors",
                         "--captions", w / "captions.txt"), "x.safetensors"),
    "compress": (lambda w: ("compress", "--concept", w / "cat.safetensors"), "x.safetensors"),
    "export": (lambda w: ("export", "--concept", w / "cat.safetensors"), "x"),
}  # fmt: skip


@pytest.mark.parametrize("case", COMMANDS)
def test_nothing_is_overwritten_without_overwrite(world, tmp_path, capsys, case):
    make, name = COMMANDS[case]
    out, kind = tmp_path / name, "file" if "." in name else "folder"
    mine = out if kind == "file" else out / "mine.txt"
    mine.parent.mkdir(exist_ok=True)
    mine.write_text("mine")
    message = error_of(capsys, *make(world), "--out", out)
    assert message == f"out: expected a new {kind}, but {out} exists; choose another name, or add --overwrite"
    assert mine.read_text() == "mine" and len(list(tmp_path.rglob("*"))) == (1 if kind == "file" else 2)
    assert run(*make(world), "--out", out, "--overwrite") == 0
    if kind == "file":
        assert out.read_bytes() != b"mine"
    else:
        assert mine.read_text() == "mine" and len(list(out.iterdir())) > 1


@pytest.mark.parametrize("command", ["merge", "compress"])
def test_an_input_is_not_the_output(world, tmp_path, capsys, command):
    before = (world / "cat.safetensors").read_bytes()
    assert "exists" in error_of(capsys, *COMMANDS[command][0](world), "--out", world / "cat.safetensors")
    assert (world / "cat.safetensors").read_bytes() == before


@pytest.mark.parametrize(("case", "out", "message"), [
    ("sample", "x.gif", "out: expected a name that ends in .png, .jpg, .jpeg, .webp, or a folder's name without an e"),
    ("sample", "file/x.png", "out: expected a file where one can be written, but"),
    ("sample into a folder", "file", "out: expected a folder, but"),
    ("sample", "folder.png", "out: expected a file, but"),
    ("merge", "x.bin", "out: expected a name that ends in .safetensors, got"),
    ("compress", "x", "out: expected a name that ends in .safetensors, got"),
    ("export", "file/x", "out: expected a folder where one can be written, but"),
])  # fmt: skip
def test_an_out_that_cannot_be_is_named_before_anything_is_loaded(world, tmp_path, capsys, monkeypatch, case, out,
                                                                 message):  # fmt: skip
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder.png").mkdir()
    monkeypatch.setattr("course_lib.latent.stable_diffusion.load", lambda *a, **o: pytest.fail("it was loaded"))
    assert error_of(capsys, *COMMANDS[case][0](world), "--out", tmp_path / out).startswith(message)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "folder.png"]


def test_a_folder_without_the_right_to_write_is_named_first(world, tmp_path, capsys, monkeypatch):
    def refuse(dir):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(drawing.tempfile, "TemporaryFile", refuse)
    message = error_of(capsys, *COMMANDS["sample"][0](world), "--out", tmp_path / "new" / "x.png")
    assert message.endswith(f"but {tmp_path} cannot be written (Permission denied); choose another")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("ending", "kind"), [(".jpg", "JPEG"), (".JPEG", "JPEG"), (".webp", "WEBP"), (".png", "PNG")])
def test_the_ending_says_which_kind_of_picture(world, tmp_path, ending, kind):
    out = tmp_path / f"moon{ending}"
    assert run(*sample("--base", world / "model", "--prompt", "a cat", "--out", out)) == 0
    with Image.open(out) as picture:
        assert picture.format == kind and picture.size == (32, 32)
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


# ---- a concept that does nothing ----


def learnt(method="custom_diffusion", **about):
    return SimpleNamespace(method=method, about=about)


CAT, TIGER = (learnt(token=f"<{n}>", noun=n, tokens=[f"<{n}>"], nouns=[n]) for n in ("cat", "tiger"))


@pytest.mark.parametrize(("prompt", "concepts", "filled"), [
    ("a {} and a {}", [CAT, TIGER], "a <cat> cat and a <tiger> tiger"),
    ("a {} and a {}", [CAT], "a <cat> cat and a <cat> cat"),
    ("a {} and a {}", [learnt(tokens=["<a>", "<b>"], nouns=["dog", "mug"])], "a <a> dog and a <b> mug"),
    ("a {}", [learnt("textual_inversion", token="<v>", noun="cat")], "a <v>"),
    ("a {}", [learnt("lora", token="sks", noun="cat")], "a sks cat"),
    ("a {}", [learnt(tokens=["<new1>"], nouns=[""])], "a <new1>"),  # a foreign file knows no noun
    ("{}, {}", [learnt("lora", tokens=["sks", "sks"], nouns=["cat", "dog"])], "sks cat, sks dog"),
])  # fmt: skip
@pytest.mark.filterwarnings("error")
def test_the_words_of_several_concepts_fill_the_places_in_order(prompt, concepts, filled):
    assert drawing.fill_placeholder([prompt], *concepts) == [filled]


@pytest.mark.parametrize("prompt", ["a mochi", "a <mochi>", "a { }", "a &lt;v&gt;", "a v", "masks"])
@pytest.mark.parametrize("method", ["textual_inversion", "lora"])
def test_a_prompt_without_the_word_gives_a_warning(prompt, method):
    token = "<v>" if method == "textual_inversion" else "sks"
    with pytest.warns(UserWarning, match=rf"^prompt: none holds the new word {token}, so its concept does"):
        drawing.fill_placeholder([prompt], learnt(method, token=token, noun="cat"))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("prompts", [["a <v>"], ["a <V>!"], ["a cat", "a(<v>)"], ["a {}", "a cat"]])
def test_a_prompt_with_the_word_gives_no_warning(prompts):
    drawing.fill_placeholder(prompts, learnt("textual_inversion", token="<v>", noun="cat"))


@pytest.mark.parametrize("written", ["(<v>:1.3)", "<lora:mochi:0.8>"])
def test_the_syntax_of_web_interfaces_gives_a_warning(written):
    with pytest.warns(UserWarning, match=r"^prompt: .* is for web interfaces; here it is text like any other"):
        drawing.fill_placeholder([f"a {written} <v>"], learnt("textual_inversion", token="<v>", noun="cat"))


def test_a_missing_word_of_the_second_concept_gives_a_warning_too(world, tmp_path, capsys):
    options = ["--concept", world / "cat_word.safetensors", "--concept", world / "tiger_word.safetensors"]
    assert run(*sample(*options, "--prompt", "a {}", "--out", tmp_path / "x.png")) == 0
    captured = capsys.readouterr()
    assert "note: prompt: none holds the new word <tiger>, so its concept" in captured.err
    assert "<cat>" not in captured.err and "its rows: a <cat>" in captured.out


def test_a_foreign_lora_asks_for_its_word(world, tmp_path, capsys):
    sd = load(world / "model", "cpu")
    folder = export(load_concept(world / "cat_lora.safetensors"), tmp_path / "files", sd)
    options = sample("--concept", folder, "--base", world / "model", "--out", tmp_path / "x.png")
    assert error_of(capsys, *options).startswith("prompt: expected one without {}, since the file does not name")
    assert run(*options, "--prompt", "a sks cat") == 0
    assert run("info", "--concept", folder, "--base", world / "model") == 0
    assert "object" not in capsys.readouterr().out


@pytest.mark.parametrize(("layout", "written"), [("kohya", "kohya_lora.safetensors"), ("peft", "unet")])
def test_a_lora_is_exported_in_other_layouts_and_a_word_is_not(world, tmp_path, capsys, layout, written):
    options = ("--format", layout, "--out", tmp_path / "files")
    assert run("export", "--concept", world / "cat_lora.safetensors", *options) == 0
    assert capsys.readouterr().out.strip().endswith(f"files: {written}")
    options = ("--format", layout, "--out", tmp_path / "more")
    assert error_of(capsys, "export", "--concept", world / "cat_word.safetensors", *options).startswith("layout: ")


def test_two_loras_draw_together_and_are_mixed_into_one(world, tmp_path, capsys):
    two = ["--concept", world / "cat_lora.safetensors", "--concept", world / "tiger_lora.safetensors"]
    assert run("merge", *two, "--out", tmp_path / "both.safetensors") == 0
    assert "with the words sks cat, sks tiger" in capsys.readouterr().out
    assert run(*sample(*two, "--prompt", "{} {}", "--out", tmp_path / "two.png")) == 0
    mixed = ["--concept", tmp_path / "both.safetensors"]
    assert run(*sample(*mixed, "--prompt", "{} {}", "--out", tmp_path / "one.png")) == 0
    assert run(*sample(*two[:2], "--prompt", "sks cat sks tiger", "--out", tmp_path / "cat.png")) == 0
    one, two, cat = (np.asarray(Image.open(tmp_path / f"{name}.png")).astype(int) for name in ("one", "two", "cat"))
    assert abs(one - two).max() <= 1 and abs(cat - two).max() > 5


@pytest.mark.parametrize("others", [[], ["cat.safetensors"], ["cat_word.safetensors"]])
def test_what_cannot_be_merged_is_said_before_captions_are_asked_for(world, tmp_path, capsys, others):
    concepts = [value for name in ["cat_lora.safetensors", *others] for value in ("--concept", world / name)]
    message = error_of(capsys, "merge", *concepts, "--out", tmp_path / "x.safetensors")
    assert message.startswith("concept: expected two or more, all of custom-diffusion or all of lora, got lora")


def test_two_subjects_have_words_that_differ_in_more_than_a_number(world):
    """A prompt's <v> is written out as <v> <v>_1, so the second would be a row of the first, already in training."""
    args = SimpleNamespace(method="custom-diffusion", token=["<v>", "<v>_1"], class_noun=["cat", "tiger"])
    sd = load(world / "model", "cpu")
    with pytest.raises(
        ValueError, match=r"^token: expected words that .* since <v>_1 is also the name of a row of <v>"
    ):
        train.check_words(args, sd)
    args.token = ["<v1>", "<v2>"]
    train.check_words(args, sd)


# ---- numbers ----


@pytest.mark.parametrize(("option", "value"), [("w", "nan"), ("w", "inf"), ("count", 0)])
def test_numbers_out_of_range_are_one_sentence(world, tmp_path, capsys, option, value):
    out = tmp_path / "x.png"
    message = error_of(capsys, "sample", "--base", world / "model", "--prompt", "a", "--out", out, f"--{option}", value)
    assert message.startswith(f"{option}: expected a ") and message.endswith(f", got {value}") and not out.exists()


@pytest.mark.parametrize("seed", [-1, 2**63, 2**64])
def test_a_seed_out_of_range_is_one_sentence(world, tmp_path, capsys, seed):
    out, code = tmp_path / "x.png", None
    try:
        code = run("sample", "--base", world / "model", "--prompt", "a", "--out", out, "--seed", seed)
    except SystemExit as stopped:  # where the parser of the options finds it
        code = stopped.code
    assert code == 2 and not out.exists()
    assert f"expected a whole number from 0 to 2^63 - 1, got {seed}\n" in capsys.readouterr().err


def test_the_largest_seed_draws(world, tmp_path):
    options = sample("--base", world / "model", "--prompt", "a", "--seed", 2**63 - 1, "--out", tmp_path / "x.png")
    assert run(*options) == 0


@pytest.mark.parametrize("out", ["x.png", "x"])
def test_a_picture_that_is_not_finite_is_not_written(world, tmp_path, capsys, monkeypatch, out):
    monkeypatch.setattr(StableDiffusion, "decode", lambda self, z0: torch.full((len(z0), 3, 32, 32), torch.nan))
    message = error_of(capsys, *sample("--base", world / "model", "--prompt", "a", "--out", tmp_path / out))
    assert message.startswith("picture: expected finite numbers, got NaN") and list(tmp_path.iterdir()) == []


# ---- files and machines ----


def test_files_of_other_tools_get_the_right_message(world, tmp_path, capsys):
    (tmp_path / "a.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert "is a pointer of Git LFS" in error_of(capsys, "info", "--concept", tmp_path / "a.safetensors")
    (tmp_path / "b.safetensors").write_bytes(b"nothing")
    options = ["--concept", world / "cat.safetensors", "--concept", tmp_path / "b.safetensors"]
    assert "b.safetensors cannot be read" in error_of(capsys, *sample(*options, "--out", tmp_path / "x.png"))
    (tmp_path / "base.safetensors").write_bytes(b"nothing")
    options = ["--base", tmp_path / "base.safetensors", "--prompt", "a", "--out", tmp_path / "x"]
    message = error_of(capsys, *sample(*options))
    assert "is a single file" in message and "from_single_file" in message


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_concept_with_fewer_layers_or_without_a_word_is_no_traceback(world, tmp_path, capsys, order):
    cat, tiger = (load_concept(world / f"{noun}.safetensors") for noun in ("cat", "tiger"))
    some = dict(list(tiger.tensors.items())[:-1])
    save_concept(tmp_path / "fewer.safetensors", replace(tiger, tensors=some))
    wordless = {name: value for name, value in tiger.tensors.items() if name != "tokens"}
    save_concept(tmp_path / "wordless.safetensors", replace(tiger, tensors=wordless))

    def both(name):
        paths = [world / "cat.safetensors", tmp_path / name]
        return ["merge", "--captions", world / "captions.txt", "--out", tmp_path / "x.safetensors",
                *(value for k in order for value in ("--concept", paths[k]))]  # fmt: skip

    message = error_of(capsys, *both("wordless.safetensors"))
    assert message.startswith(f"concepts: expected a word in each, but number {order.index(1) + 1} has none")
    assert run(*both("fewer.safetensors")) == 0
    assert load_concept(tmp_path / "x.safetensors").tensors.keys() == cat.tensors.keys()


@pytest.mark.parametrize("device", ["cuda", "cuda:7", "meta", "gpu"])
def test_a_device_that_is_not_here_is_one_sentence(world, tmp_path, capsys, monkeypatch, device):
    real = torch.empty

    def built_without(*args, device=None, **options):
        if device and str(device).startswith("cuda"):
            raise AssertionError("Torch not compiled with CUDA enabled")
        return real(*args, device=device, **options)

    monkeypatch.setattr(torch, "empty", built_without)
    message = error_of(capsys, *sample("--base", world / "model", "--device", device, "--out", tmp_path / "x.png"))
    assert message.startswith("device: expected cpu, or cuda or mps where torch finds one, got") and device in message


def test_a_console_without_korean_letters_shows_their_numbers(world, tmp_path):
    code = "import sys; from course_lib.personalize import main; sys.exit(main())"
    options = sample("--base", world / "model", "--prompt", "a 고양이", "--out", tmp_path / "고양이.png")
    env = os.environ | {"PYTHONPATH": str(REPO), "PYTHONIOENCODING": "cp1252", "PYTHONUTF8": "0"}
    done = subprocess.run([sys.executable, "-c", code, *map(str, options)], env=env, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert b"\\uace0\\uc591\\uc774.png" in done.stdout and (tmp_path / "고양이.png").is_file()
    done = subprocess.run([sys.executable, "-c", code, "info", "--concept", "고양이"], env=env, capture_output=True)
    assert done.returncode == 2 and b"\\uace0\\uc591\\uc774 does not exist" in done.stderr


def test_a_message_of_a_library_is_cut_in_its_middle():
    message = command_line.sentence(ValueError(f"begin {'list ' * 1000} end"))
    assert len(message) < 700 and message.startswith("begin list") and message.endswith("list end")
    assert command_line.sentence(ValueError("a  b\nc")) == "a b c"


def test_an_unapplied_word_draws_the_plain_picture(world):
    """The premise of the note: without its word, Textual Inversion changes nothing at all."""
    sd = load(world / "model", "cpu")
    plain = sd.sample("a mochi", steps=1)
    with applied(sd, load_concept(world / "cat_word.safetensors")):
        close(sd.sample("a mochi", steps=1), plain, rtol=0, atol=0)
        assert (sd.sample("a <cat>", steps=1) - plain).abs().max() > 1e-4
