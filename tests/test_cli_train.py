"""Uses of `train` that go wrong: photos beside outputs, states of other data, odd files, two runs at once."""

import shutil
from types import SimpleNamespace

import pytest
from filelock import FileLock
from personalize_command import make_world, run, train_options, trained
from PIL import Image

from course_lib.cli import drawing
from course_lib.cli import train as train_command
from course_lib.data import pictures
from course_lib.latent import registry
from course_lib.latent.stable_diffusion import load
from course_lib.personalization.state import read_state


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def sd(world):
    return load(world / "model", "cpu")


@pytest.fixture
def photos(world, tmp_path):
    """A folder of one's own, to put things beside the photos."""
    return shutil.copytree(world / "cat", tmp_path / "photos")


def with_images(options, folder):
    """The same command with other pictures."""
    options = list(options)
    options[options.index("--images") + 1] = str(folder)
    return options


def refused(capsys, *options):
    """The one sentence with which a command is refused."""
    capsys.readouterr()
    assert run(*options) == 2
    err = capsys.readouterr().err.replace("\r", "\n").strip().splitlines()
    assert not any("Traceback" in line for line in err)
    return err[-1]


# ---- outputs beside photos ----


@pytest.mark.parametrize("name", ["0.png", "x.step00002.png"])
def test_a_photo_is_not_overwritten_by_a_sample_grid(world, photos, capsys, name):
    (photos / "0.png").rename(photos / name)
    before = (photos / name).read_bytes()
    stem = name.split(".")[0]
    options = train_options(world, photos / f"{stem}.safetensors", "lora", "--grid", 1, "--sample-every", 2, "--fresh")
    message = refused(capsys, *with_images(options, photos))
    assert message.startswith("error: out: expected a name whose sample pictures overwrite nothing, but ")
    assert name in message and (photos / name).read_bytes() == before
    assert not (photos / f"{stem}.safetensors").exists()


def test_what_the_command_drew_is_no_photo(world, photos, capsys):
    options = with_images(
        train_options(world, photos / "x.safetensors", "lora", "--grid", 1, "--sample-every", 2), photos
    )
    assert run(*options) == 0
    assert {"x.png", "x.step00002.png"} <= {path.name for path in photos.iterdir()}
    capsys.readouterr()
    assert run(*options, "--steps", 4) == 0  # its own grids are drawn again
    said = capsys.readouterr()
    assert "3 pictures, no captions beside them" in said.out and "goes on from step 3" in said.out
    assert "left out of" in said.err and "x.png" in said.err
    for suffix in (".jpg", ".webp"):
        Image.new("RGB", (8, 8)).save(photos / f"9{suffix}", exif=pictures.mark())
    assert len(pictures.picture_files(photos)) == 3


# ---- a state and another training ----


STATES = {
    "other pictures": ("lora", [], ["--images", "TIGER"], "images: "),
    "captions": ("lora", [], ["--images", "CAPTIONS"], "images: "),
    "more class pictures": ("lora", ["--prior", "2"], ["--prior", "3"], "images: "),
    "their weight": ("lora", ["--prior", "2"], ["--prior", "2", "--prior-weight", "0.5"], "prior_weight: "),
    "without regularisation": ("custom-diffusion", ["--regularisation", "CAPTIONS"], ["--regularisation", "0"],
                               "terms: "),
    "another similarity": ("custom-diffusion", ["--regularisation", "CAPTIONS"],
                           ["--regularisation", "CAPTIONS", "--similarity", "-1"], "images: "),
    "past the steps": ("lora", [], ["--steps", "2"], "steps: expected at least the 3 that"),
}  # fmt: skip


@pytest.mark.parametrize("renamed", [False, True], ids=["with its output", "output renamed"])
@pytest.mark.parametrize("case", STATES)
def test_a_state_of_another_training_is_refused_in_one_sentence(world, photos, tmp_path, capsys, case, renamed):
    method, first, then, message = STATES[case]
    for k, words in enumerate(("a {} cat", "a {} cat", "a {} of")):
        (photos / f"{k}.txt").write_text(words.replace("{} ", "") if "--regularisation" in first else words)
    place = {"TIGER": str(world / "tiger"), "CAPTIONS": str(photos)}
    out, state = tmp_path / "x.safetensors", tmp_path / "x.safetensors.state.pt"
    options = train_options(world, out, method)
    assert run(*options, *(place.get(value, value) for value in first)) == 0
    if renamed:
        out.rename(tmp_path / "y.safetensors")
    steps = [] if "--steps" in then else ["--steps", "5"]
    changed = [*options, *steps, *(place.get(value, value) for value in then)]
    if "--images" in then:
        changed = with_images([*options, *steps], place[then[1]])
    sentence = refused(capsys, *changed)
    expected = "steps: expected more than the 3 of" if case == "past the steps" and not renamed else message
    assert sentence.startswith(f"error: {expected}") and "--fresh" in sentence
    assert read_state(state)["step"] == 3 and out.exists() != renamed


# ---- files and captions ----


def test_what_is_left_out_is_named_and_captions_are_counted(world, photos, tmp_path, capsys):
    (photos / "1.png").rename(photos / "1.TIF")
    Image.open(photos / "1.TIF").save(photos / "1.TIF", "TIFF")
    (photos / "broken.jpg").symlink_to(tmp_path / "nowhere.jpg")
    (photos / "more").mkdir()
    (photos / "captions.txt").write_text("a {}")
    options = with_images(train_options(world, tmp_path / "x.safetensors", "lora"), photos)
    assert run(*options) == 0
    said = capsys.readouterr()
    assert "3 pictures, no captions beside them; the model is" in said.out
    assert said.err.count("note: images: left out of") == 1
    assert "other files or drawn by this course: broken.jpg, captions.txt, more\n" in said.err
    for name in ("0.png.txt", "1.caption", "2.TXT"):
        (photos / name).write_text("a {} of")
    assert run(*options, "--fresh") == 0 and "3 pictures, 3 captions beside them" in capsys.readouterr().out


@pytest.mark.parametrize(("method", "token"), [("lora", "sks"), ("dreambooth", "sks"), ("custom-diffusion", "<v>"),
                                               ("textual-inversion", "<v>")])  # fmt: skip
def test_captions_need_the_word_in_every_method(world, photos, tmp_path, capsys, method, token):
    for k, caption in enumerate(("a {} cat", f"{token} cat", f"a pre{token}fix" if token == "sks" else "a cat")):
        (photos / f"{k}.txt").write_text(caption)
    sentence = refused(capsys, *with_images(train_options(world, tmp_path / "x.safetensors", method), photos))
    assert sentence.startswith(f"error: captions: expected {token} or {{}} in each") and "1 lack it" in sentence


# ---- seeds and other numbers ----


@pytest.mark.parametrize("command", ["train", "sample"])
@pytest.mark.parametrize("seed", ["-1", str(2**63), str(2**64), "1.5", "x"])
def test_a_seed_that_no_generator_takes_is_refused(world, tmp_path, capsys, command, seed):
    options = train_options(world, tmp_path / "x.safetensors") if command == "train" else ["sample", "--out", "x.png"]
    with pytest.raises(SystemExit) as ended:
        run(*options, "--seed", seed)
    assert ended.value.code == 2
    assert f"argument --seed: expected a whole number from 0 to 2^63 - 1, got {seed}" in capsys.readouterr().err


def test_the_largest_seed_trains_and_draws(world, tmp_path):
    out, largest = tmp_path / "x.safetensors", 2**63 - 1
    assert trained(world, out, "lora", "--seed", largest, "--grid", 1).settings["seed"] == largest
    assert run("sample", "--concept", out, "--out", tmp_path / "p.png", "--steps", 1, "--seed", largest) == 0


@pytest.mark.parametrize("name", ["prior-weight", "similarity"])
@pytest.mark.parametrize("value", ["nan", "inf"])
def test_numbers_are_finite(world, tmp_path, capsys, name, value):
    method = {"prior-weight": "lora", "similarity": "custom-diffusion"}[name]
    message = refused(capsys, *train_options(world, tmp_path / "x.safetensors", method, f"--{name}", value))
    assert message == f"error: {name.replace('-', '_')}: expected a finite number, got {value}"


# ---- two at once ----


def test_a_second_training_with_the_same_out_is_refused(world, tmp_path, capsys):
    out, options = tmp_path / "x.safetensors", train_options(world, tmp_path / "x.safetensors")
    with train_command.only_one(out):
        sentence = refused(capsys, *options)
        assert sentence.startswith("error: out: expected a name of its own for each training, but another one is writ")
        assert trained(world, tmp_path / "y.safetensors").method == "textual_inversion"
    assert run(*options) == 0
    held = [FileLock(path, timeout=0) for path in (tmp_path / "cache" / "locks").iterdir()]
    for lock in held:  # nothing is held afterwards
        with lock:
            assert lock.is_locked
    with train_command.only_one(tmp_path / "z" / ".." / "x.safetensors"):  # another way to write the same name
        assert run(*options, "--fresh") == 2


# ---- the Toybox model ----


def test_an_unknown_noun_gets_the_list_of_toybox_nouns(sd):
    args = SimpleNamespace(method="lora", token=["sks"], class_noun=["photo"])
    toybox = SimpleNamespace(defaults=registry.TOYBOX, tokenizer=sd.tokenizer)
    with pytest.raises(ValueError, match=r"use the nearest of teapot, .*dog.*cat|use the nearest of .*cat.*teapot"):
        train_command.check_words(args, toybox)


def test_unknown_words_of_a_prompt_are_noted_for_the_toybox(sd, recwarn):
    toybox = SimpleNamespace(defaults=registry.TOYBOX, tokenizer=sd.tokenizer)
    drawing.note_unknown_words(toybox, ["a {} cat", "a sks tiger of <v>"], ["sks", "<v>"])
    drawing.note_unknown_words(sd, ["a photo"], [])
    assert not recwarn.list
    with pytest.warns(UserWarning, match=r"^prompt: the Toybox model was not trained on photo; their effect"):
        drawing.note_unknown_words(toybox, ["a sks cat", "a photo of a photo"], ["sks"])


def test_with_the_toybox_the_command_says_that_it_was_trained_on_drawings_only(world, tmp_path, capsys, monkeypatch):
    real = train_command.load

    def as_toybox(*args, **options):
        model = real(*args, **options)
        model.defaults = registry.TOYBOX
        return model

    hint = "this model was trained on drawings only, such as data/subjects; for photos use --base sd15"
    trained(world, tmp_path / "x.safetensors", "lora")
    assert hint not in capsys.readouterr().out
    monkeypatch.setattr(train_command, "load", as_toybox)
    trained(world, tmp_path / "y.safetensors", "lora")
    assert hint in capsys.readouterr().out
