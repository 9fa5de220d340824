"""The command line of personalization: it does what the library does, and loses nothing that was trained."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from personalize_command import make_world, run, train_options, trained
from PIL import Image
from safetensors.torch import load_file
from tiny import FULL_SIZE, TINY

from course_lib.cli import main as command_line
from course_lib.cli import train as train_command
from course_lib.latent import registry
from course_lib.latent.stable_diffusion import load
from course_lib.personalization import dreambooth, finetune, memory, regularisation, textual_inversion
from course_lib.personalization.concept import applied, load_concept
from course_lib.personalization.examples import subject_examples
from course_lib.personalization.merge import uncompressed
from course_lib.personalization.recipe import Settings
from course_lib.toybox.sets import pair_spec
from course_lib.toybox.world import render

REPO = Path(__file__).resolve().parents[1]
METHODS = ("textual-inversion", "dreambooth", "lora", "custom-diffusion")
close = torch.testing.assert_close
exact = dict(rtol=0, atol=0)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def sd(world):
    return load(world / "model", "cpu")


@pytest.fixture(scope="module")
def custom(world, tmp_path_factory):
    """Two concepts of Custom Diffusion."""
    paths = {}
    for noun in ("cat", "tiger"):
        paths[noun] = tmp_path_factory.mktemp("custom") / f"{noun}.safetensors"
        trained(world, paths[noun], "custom-diffusion", "--token", f"<{noun}-1>", noun=noun)
    return paths


# ---- train ----


@pytest.mark.parametrize("method", METHODS)
def test_each_method_trains_saves_and_says_how_to_draw(world, sd, tmp_path, capsys, method, monkeypatch):
    out = tmp_path / "new" / "x.safetensors"
    look = ["--sample-every", 3, "--grid", 3, "--prompts", "a {}", "a {} of"] if method == "lora" else []
    concept = trained(world, out, method, *look)
    assert concept.method == method.replace("-", "_") and concept.settings["steps"] == 3
    before = {f"unet.{name}": param for name, param in sd.unet.named_parameters()}
    moved = [name for name, value in concept.tensors.items() if name not in before or not value.equal(before[name])]
    assert moved == list(concept.tensors)  # every one of them
    said = capsys.readouterr().out
    assert "numbers are trained, in 3 steps" in said and "this needs about 0.5 GiB; you have" in said
    if look:
        assert Image.open(out.with_name("x.step00003.png")).size == (4 * 34 - 2, 2 * 34 - 2)
        assert Image.open(out.with_name("x.png")).size == (3 * 34 - 2, 2 * 34 - 2)
        assert f"wrote {out.with_name('x.png')}; its rows: a sks cat; a sks cat of" in said
    else:
        assert not out.with_name("x.png").exists()
    following = shlex.split(said.split("next:")[1])[3:]
    args = command_line.options().parse_args(following)
    assert args.concept == [out] and following[0] == "sample"
    monkeypatch.chdir(out.parent)  # beside the pictures that the training drew
    assert run(*following, "--steps", 2) == 0 and Path(following[-1]).is_file()


@pytest.mark.parametrize(("method", "tokens", "names"), [
    ("textual_inversion", ["<v>"], ["<v>"]),
    ("dreambooth", ["sks"], ["sks cat"]),
    ("custom_diffusion", ["<a>", "<b>"], ["<a> cat", "<b> tiger"]),
])  # fmt: skip
def test_without_prompts_the_grid_shows_each_subject_in_new_scenes(method, tokens, names):
    args = SimpleNamespace(prompts=None, token=tokens, class_noun=["cat", "tiger"][: len(tokens)])
    prompts = train_command.new_scenes(args, SimpleNamespace(method=method, about={}))
    assert prompts[0] == f"a photo of a {names[0]} in the snow" and len(set(prompts)) == 4
    assert all(f"a {names[k % len(names)]} " in prompt for k, prompt in enumerate(prompts))
    args = command_line.options().parse_args(["train", "--method", "lora", "--images", "x", "--class-noun", "cat",
                                             "--out", "x.safetensors"])  # fmt: skip
    assert args.grid == 4  # without being asked for


def test_options_reach_the_recipe(world, tmp_path):
    concept = trained(world, tmp_path / "t.safetensors", "textual-inversion", "--vectors", 2, "--seed", 5)
    assert concept.about["rows"] == ["<v>", "<v>_1"] and concept.settings["seed"] == 5
    concept = trained(world, tmp_path / "l.safetensors", "lora", "--rank", 2, "--prior", 2, "--prior-weight", 0.5)
    assert concept.about["rank"] == 2 and concept.about["prior_weight"] == 0.5
    concept = trained(world, tmp_path / "d.safetensors", "dreambooth", "--prior", 0, "--token", "zwx")
    assert concept.about["prior_weight"] == 0 and concept.about["token"] == "zwx"


def test_two_subjects_are_learnt_together(world, tmp_path):
    options = train_options(world, tmp_path / "both.safetensors", "custom-diffusion")
    assert run(*options, "--images", world / "tiger", "--class-noun", "tiger") == 0
    concept = load_concept(tmp_path / "both.safetensors")
    assert concept.about["tokens"] == ["<v1>", "<v2>"] and concept.about["nouns"] == ["cat", "tiger"]


def test_the_same_command_again_refuses_or_goes_on(world, tmp_path, capsys):
    out = tmp_path / "x.safetensors"
    whole = trained(world, tmp_path / "whole.safetensors", "lora", "--steps", 5)
    trained(world, out, "lora")
    assert run(*train_options(world, out, "lora")) == 2
    assert "steps: expected more than the 3 of" in capsys.readouterr().err
    more = trained(world, out, "lora", "--steps", 5)
    assert "goes on from step 3" in capsys.readouterr().out
    for name, value in whole.tensors.items():
        close(more.tensors[name], value, **exact)
    assert run(*train_options(world, out, "lora", "--lr", 0.02, "--steps", 7)) == 2
    assert "lr: " in (err := capsys.readouterr().err) and "--fresh begins anew" in err
    assert trained(world, out, "lora", "--fresh", "--low-memory").settings["gradient_checkpointing"]
    more = trained(world, out, "lora", "--steps", 4)  # what only saves memory stays as the training began
    assert more.settings["gradient_checkpointing"] and more.settings["steps"] == 4
    out.with_name("x.safetensors.state.pt").unlink()
    assert run(*train_options(world, out, "lora")) == 2 and "exists" in capsys.readouterr().err


BAD = {
    "empty folder": (["--images", "EMPTY"], "images: expected"),
    "no such folder": (["--images", "nowhere"], "images: expected a folder with pictures, but nowhere is not one"),
    "text files only": (["--images", "TEXTS"], "images: expected PNG, JPEG or WebP files in"),
    "a text file with a picture's name": (["--images", "FALSE"], "images: expected a PNG, JPEG or WebP picture, but"),
    "one corrupt picture": (["--images", "CORRUPT"], "images: expected a PNG, JPEG or WebP picture, but"),
    "an animation": (["--images", "ANIMATION"], "images: expected still pictures, got an animation of 2 frames"),
    "captions without the word": (["--images", "CAPTIONS"], "captions: expected <v> or {} in each, as nothing else"),
    "an empty class noun": (["--class-noun", " "], "class_noun: expected a word that the model knows"),
    "a class noun of marks": (["--class-noun", "<|endoftext|>"], "class_noun: expected a word that the model knows"),
    "a token that exists": (["--token", "<|endoftext|>"], "token: expected a token that is new, but the tokenizer"),
    "a token that is a word": (["--token", "cat"], "token: expected a new token in lower case and brackets"),
    "a token that splits": (["--token", "sks"], "token: expected a new token in lower case and brackets"),
    "a token with capitals": (["--token", "<V>"], "token: expected a new token in lower case"),
    "an empty token": (["--method", "lora", "--token", " "], "token: expected a rare word, such as sks, got ' '"),
    "a file for a folder": (["--out", "IN A FILE"], "out: expected a file in a folder that can be written, but"),
    "another method's option": (["--rank", "4"], "rank: expected with lora only"),
    "no steps": (["--steps", "0"], "steps: expected a whole number"),
    "a rate out of range": (["--lr", "7"], "lr: expected a number between 0 and 1"),
    "another ending": (["--out", "x.bin"], "out: expected a name that ends in .safetensors"),
    "no model": (["--base", "EMPTY"], "name: expected a model folder"),
    "an unknown model": (["--base", "no such model"], "name: expected one of toybox, sd15"),
}


KINDS = ("EMPTY", "TEXTS", "FALSE", "CORRUPT", "ANIMATION", "CAPTIONS", "IN A FILE")


def bad_pictures(world, folder, kind):
    """A folder of good pictures with something wrong in it."""
    folder.mkdir()
    if kind in ("CORRUPT", "FALSE", "ANIMATION", "CAPTIONS"):
        for k in range(3):
            (folder / f"{k}.png").write_bytes((world / "cat" / f"{k}.png").read_bytes())
            (folder / f"{k}.txt").write_text("a cat" if kind == "CAPTIONS" else "a {}")
    if kind in ("TEXTS", "IN A FILE"):
        (folder / "0.txt").write_text("mine")
    elif kind == "FALSE":
        (folder / "1.png").write_text("mine")
    elif kind == "CORRUPT":
        (folder / "1.png").write_bytes((folder / "1.png").read_bytes()[:300])
    elif kind == "ANIMATION":
        frames = [Image.new("RGB", (40, 40), colour) for colour in ("red", "blue")]
        frames[0].save(folder / "1.webp", save_all=True, append_images=frames[1:])
        (folder / "1.txt").write_text("a {}")


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence_and_code_2(world, tmp_path, capsys, case):
    changes, message = BAD[case]
    options = train_options(world, tmp_path / "x.safetensors")
    folder = tmp_path / "empty"
    bad_pictures(world, folder, next((value for value in changes if value in KINDS), "EMPTY"))
    for flag, value in zip(changes[::2], changes[1::2], strict=True):
        if value in KINDS:
            value = str(folder / "0.txt" / "x.safetensors" if value == "IN A FILE" else folder)
        options = [*options, flag, value] if flag not in options else options
        options[options.index(flag) + 1] = value
    assert run(*options) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {message}") and err.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} - {"cache"} == {"empty"}


def test_a_noun_in_pieces_is_refused_where_the_vocabulary_is_known_and_warned_of_elsewhere(world, tmp_path, capsys, sd):
    args = SimpleNamespace(method="lora", token=["sks"], class_noun=["cat", "a photo"])
    with pytest.warns(UserWarning, match=r"^class_noun: the tokenizer cuts 'photo' into pieces; if the model draws"):
        train_command.check_words(args, sd)
    toybox = SimpleNamespace(defaults=registry.TOYBOX, tokenizer=sd.tokenizer)
    with pytest.raises(ValueError, match=r"^class_noun: expected a word .*, but 'photo' is not in its vocab"):
        train_command.check_words(args, toybox)
    args.class_noun = ["cat"]
    train_command.check_words(args, toybox)


def test_a_concept_of_another_model_is_refused_in_one_sentence(world, custom, tmp_path, capsys):
    FULL_SIZE.build(1, **TINY | {"unet": TINY["unet"] | {"sample_size": 8}}).save(tmp_path / "other", torch.float32)
    out = tmp_path / "x.png"
    capsys.readouterr()
    assert run("sample", "--concept", custom["cat"], "--base", tmp_path / "other", "--out", out) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: concept: expected one that was trained on this model") and err.count("\n") == 1
    assert not out.exists()
    trained(world, tmp_path / "x.safetensors")
    (tmp_path / "x.safetensors").unlink()
    options = train_options(world, tmp_path / "x.safetensors", "textual-inversion", "--steps", 5)
    options[options.index("--base") + 1] = str(tmp_path / "other")
    capsys.readouterr()
    assert run(*options) == 2
    err = capsys.readouterr().err
    assert "error: sd: " in err and "was written on another base model" in err and "--fresh begins anew" in err
    assert torch.load(tmp_path / "x.safetensors.state.pt", weights_only=True)["step"] == 3


def last_line(err):
    assert "Traceback" not in err
    return err.replace("\r", "\n").strip().splitlines()[-1]


def test_a_loss_that_is_no_number_ends_with_one_sentence(world, tmp_path, capsys, monkeypatch):
    """The weights are no numbers any more at the third step; the state of the second stays."""
    out, state, real = tmp_path / "x.safetensors", tmp_path / "x.safetensors.state.pt", finetune.denoising_loss
    calls = []

    def breaks(*args):
        calls.append(1)
        return real(*args) * (torch.nan if len(calls) > 2 else 1)

    monkeypatch.setattr(finetune, "denoising_loss", breaks)
    assert run(*train_options(world, out, "lora", "--save-every", 2)) == 2
    err = last_line(capsys.readouterr().err)
    assert err.startswith("error: lr: expected one that keeps the loss finite, got 0.01: the loss is not a number at ")
    assert f"step 3; {state} holds the last good state" in err and err.endswith("(--fresh --lr X)")
    assert torch.load(state, weights_only=True)["step"] == 2 and not out.exists()


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ..."), MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you ..."),
], ids=["GPU", "Python", "CPU"])  # fmt: skip
def test_out_of_memory_is_one_sentence_and_loses_nothing(world, tmp_path, capsys, monkeypatch, error):
    out, state, real = tmp_path / "x.safetensors", tmp_path / "x.safetensors.state.pt", finetune.denoising_loss
    calls = []

    def breaks(*args):
        calls.append(1)
        if len(calls) > 2:
            raise error
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(finetune, "denoising_loss", breaks)
        assert run(*train_options(world, out, "lora", "--save-every", 2)) == 2
    err = last_line(capsys.readouterr().err)
    assert err.startswith("error: memory: expected more than this device has left; try --low-memory, and to train")
    assert torch.load(state, weights_only=True)["step"] == 2 and not out.exists()
    assert trained(world, out, "lora").settings["steps"] == 3


def test_memory_in_the_name_of_a_folder_is_no_lack_of_it(tmp_path, capsys):
    assert run("info", "--concept", tmp_path / "memory.safetensors") == 2
    assert "memory.safetensors does not exist" in capsys.readouterr().err


def test_a_concept_that_cannot_be_saved_is_saved_elsewhere(world, tmp_path, capsys, monkeypatch):
    from safetensors.torch import save_file

    from course_lib.personalization import concept

    def full(tensors, path, **options):
        if tmp_path / "full" in Path(path).parents:
            raise OSError(28, "No space left on device")
        save_file(tensors, path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(concept, "save_file", full)
        patch.setattr(train_command.tempfile, "tempdir", str(tmp_path))
        assert run(*train_options(world, tmp_path / "full" / "x.safetensors")) == 2
        err = last_line(capsys.readouterr().err)
        rescued = Path(err.split("the concept is in ")[1])
        assert "No space left" in err and load_concept(rescued).method == "textual_inversion"
        patch.setattr(train_command.tempfile, "tempdir", str(tmp_path / "full"))  # no room there either
        out = tmp_path / "full" / "y.safetensors"
        assert run(*train_options(world, out)) == 2
        err, state = last_line(capsys.readouterr().err), out.with_name("y.safetensors.state.pt")
        assert f"nor can the folder for temporary files, but {state} holds the training; make room, then" in err
    assert trained(world, out).settings["steps"] == 3  # the same command


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0 or shutil.which("mount") is None, reason="no mount")
def test_a_disk_that_is_really_full(world, tmp_path, capsys, monkeypatch):
    """One of 64 kB: neither the state nor the concept has room."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(disk)], capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount")
    try:
        monkeypatch.setattr(train_command.tempfile, "tempdir", str(tmp_path))
        assert run(*train_options(world, disk / "x.safetensors", "dreambooth")) == 2
        err = last_line(capsys.readouterr().err)
        assert err.startswith(f"error: out: {disk / 'x.safetensors'} cannot be written (") and "No space" in err
        assert load_concept(Path(err.split("the concept is in ")[1])).method == "dreambooth"
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)


# ---- interrupted ----


def start(world, out, *more):
    code = "import sys; from course_lib.personalize import main; sys.exit(main())"
    options = train_options(world, out, "lora", "--steps", 100_000, *more)
    env = os.environ | {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    return subprocess.Popen([sys.executable, "-c", code, *options], env=env, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True)  # fmt: skip


PATIENCE = 600  # seconds: on a machine that is busy with other things the imports alone have taken more than 120


def wait_for(path, process):
    end = time.monotonic() + PATIENCE
    while not path.is_file():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "it did not begin"
        time.sleep(0.05)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL], ids=["Ctrl-C", "kill -9"])
def test_an_interrupted_training_goes_on(world, tmp_path, how):
    out, state = tmp_path / "x.safetensors", tmp_path / "x.safetensors.state.pt"
    process = start(world, out, "--save-every", 20)
    try:
        wait_for(state, process)
        process.send_signal(how)
        _, complaint = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()  # nothing trains on behind a test that failed
        process.wait()
    step = torch.load(state, weights_only=True)["step"]
    assert step >= 20 and not out.exists()
    if how == signal.SIGINT:
        assert process.returncode == 130 and "Traceback" not in complaint
        assert f"Stopped after step {step}; {state} holds step {step}: the same command goes on" in complaint
    resumed = trained(world, out, "lora", "--steps", step + 2)
    whole = trained(world, tmp_path / "whole.safetensors", "lora", "--steps", step + 2)
    for name, value in whole.tensors.items():
        # Bit for bit in one process (test_finetune_state); a library in two may add in another order. A step is 1e-2.
        close(resumed.tensors[name], value, rtol=0, atol=1e-3)


def test_a_second_ctrl_c_stops_at_once_and_the_handler_is_put_back():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), train_command.asked_to_stop() as asked:
        signal.raise_signal(signal.SIGINT)
        assert asked.is_set()
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_before_or_after_the_training_is_one_sentence(world, tmp_path, capsys, monkeypatch):
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(train_command, "load", interrupted)
    assert run(*train_options(world, tmp_path / "x.safetensors")) == 130
    assert capsys.readouterr().err == "\nStopped at once; files that were saved before are whole.\n"


def test_a_state_that_is_damaged_is_named(world, tmp_path, capsys):
    (tmp_path / "x.safetensors.state.pt").write_bytes(b"nothing")
    assert run(*train_options(world, tmp_path / "x.safetensors")) == 2
    assert capsys.readouterr().err.startswith("error: checkpoint: expected the state of an earlier training")


# ---- the memory plan ----


def plan(sd, free, *, low_memory=False, noun="cat", **options):
    pictures = [Image.new("RGB", (32, 32))] * 2
    settings = Settings(**{"steps": 2, "lr": 1e-3, "batch_size": 4, **options})
    with dreambooth.recipe(sd, pictures, noun=noun, settings=settings) as recipe:
        return memory.memory_plan(sd, recipe, free, low_memory)


def test_the_plan_counts_weights_gradients_and_moments(sd):
    G = 2**30
    s, words = plan(sd, 64 * G)
    learn = sum(param.numel() for param in sd.unet.parameters())
    all_of_it = sum(p.numel() for part in (sd.vae, sd.unet, sd.text_encoder) for p in part.parameters())
    expected = 4 * (all_of_it + learn) + memory.RUNTIME + 12 * learn + 4 * 1.25 * memory.layer_outputs(sd)
    assert f"this needs about {expected / G:.1f} GiB; you have 64.0" in words and "switched on" not in words
    assert not s.gradient_checkpointing and s.accumulate == 1


def test_every_number_that_learns_counts_16_bytes_on_a_cpu(sd):
    with dreambooth.recipe(sd, [Image.new("RGB", (32, 32))], noun="cat") as recipe:
        learn = sum(param.numel() for param in sd.unet.parameters())
        few = memory.memory_plan(sd, recipe, 2**40)[1]
        recipe.params = {"many": torch.nn.Parameter(torch.empty(learn + 2**28, device="meta"))}
        many = memory.memory_plan(sd, recipe, 2**40)[1]
    numbers = [[float(value) for value in re.findall(r"[\d.]*\d", words)][:5] for words in (few, many)]
    more = [b - a for a, b in zip(*numbers, strict=True)]  # weights, gradients, optimiser, activations, all
    assert more == pytest.approx([1, 1, 2, 0, 4], abs=0.11)


def test_what_does_not_fit_is_made_smaller_in_order(sd, monkeypatch):
    monkeypatch.setattr(memory, "layer_outputs", lambda sd: 2**30)
    s, words = plan(sd, 4 * 2**30)  # 4 pictures: 5 GiB
    assert s.gradient_checkpointing and s.accumulate == 1
    assert "this needs about 1.7 GiB; you have 4.0; gradient checkpointing switched on" in words
    s, words = plan(sd, int(1.5 * 2**30))
    assert s.accumulate == 4 and "gradient checkpointing, one picture at a time switched on" in words
    assert "may not fit" not in words and "may not fit" in plan(sd, 2**29)[1]
    s, words = plan(sd, 64 * 2**30, low_memory=True)
    assert s.gradient_checkpointing and s.accumulate == 4


def test_layers_put_out_about_what_autograd_keeps(sd):
    seen, own = {}, {param.untyped_storage().data_ptr() for param in sd.unet.parameters()}

    def pack(tensor):
        seen[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    features = sd.encode_prompt("a cat").requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = sd.unet_eps(sd.noise(1, seed=0), 1, features)  # noqa: F841 (keeps what was saved)
    kept = sum(tensor.untyped_storage().nbytes() for place, tensor in seen.items() if place not in own)
    assert 0.5 < kept / memory.layer_outputs(sd) < memory.KEPT


# ---- sample, merge, compress, info, export ----


def test_sample_draws_what_the_library_draws(world, sd, custom, tmp_path):
    out = tmp_path / "new" / "grid.png"
    options = ["--prompt", "a {} of", "--prompt", "a tiger", "--count", 3, "--steps", 2, "--seed", 4, "--w", 3]
    assert run("sample", "--concept", custom["cat"], "--out", out, *options) == 0
    with applied(sd, load_concept(custom["cat"])):
        x_T = sd.noise(3, seed=4)
        first = sd.sample("a <cat-1> cat of", x_T=x_T, steps=2, w=3)
        second = sd.sample("a tiger", x_T=x_T, steps=2, w=3)
    grid = torch.from_numpy(np.array(Image.open(out))).permute(2, 0, 1).float() / 127.5 - 1
    for row, images in enumerate((first, second)):
        for column, image in enumerate(images):
            tile = grid[:, 34 * row : 34 * row + 32, 34 * column : 34 * column + 32]
            close(tile, image, rtol=0, atol=0.02)
    assert run("sample", "--concept", custom["cat"], "--out", tmp_path / "many", *options) == 0
    names = sorted(path.name for path in (tmp_path / "many").iterdir())
    assert len(names) == 6 and names[0] == "01_a-cat-1-cat-of_1.png"


def test_sample_without_a_concept_is_the_model_alone(world, tmp_path, capsys):
    options = ["--base", world / "model", "--steps", 1, "--out", tmp_path]
    assert run("sample", *options[:-1], tmp_path / "x.png", "--prompt", "a cat") == 0
    assert (tmp_path / "x.png").is_file()
    assert run("sample", *options[:-1], tmp_path / "y.png") == 2
    assert "prompt: expected --concept FILE, whose words {} stands for" in capsys.readouterr().err


def test_two_concepts_are_merged_and_their_words_work(world, sd, custom, tmp_path, capsys):
    captions = tmp_path / "captions.txt"
    captions.write_text("a photo of a tiger\na cat\n\na photo\nof a cat\n", encoding="utf-8")
    options = ["--concept", custom["cat"], "--concept", custom["tiger"], "--out", tmp_path / "both.safetensors"]
    assert run("merge", *options) == 2 and "captions: expected --captions FILE" in capsys.readouterr().err
    assert run("merge", *options, "--captions", captions) == 0
    assert "<cat-1> cat, <tiger-1> tiger" in capsys.readouterr().out
    both = load_concept(tmp_path / "both.safetensors")
    with applied(sd, both):
        assert sd.sample("<cat-1> cat <tiger-1> tiger", steps=1).isfinite().all()
    assert both.about["merged"] == 2


def test_a_compressed_concept_is_smaller_and_draws_nearly_the_same(world, sd, custom, tmp_path, capsys):
    concept = load_concept(custom["cat"])
    for keep in (1.0, 0.3):
        small = tmp_path / f"{keep}.safetensors"
        assert run("compress", "--concept", custom["cat"], "--keep", keep, "--out", small) == 0
        thin, whole = load_concept(small), uncompressed(sd, load_concept(small))
        assert all(name == "tokens" or name.endswith((".u", ".v")) for name in thin.tensors)
        assert set(whole.tensors) == set(concept.tensors)
        if keep == 1.0:
            for name, value in concept.tensors.items():
                close(whole.tensors[name], value, rtol=0, atol=1e-5)
            with applied(sd, concept):
                expected = sd.sample("a <cat-1> cat", steps=2)
            with applied(sd, thin):
                close(sd.sample("a <cat-1> cat", steps=2), expected, rtol=0, atol=1e-3)
    assert thin.bytes < concept.bytes and thin.about["compressed"] == 0.3
    assert run("compress", "--concept", custom["cat"], "--half", "--out", tmp_path / "half.safetensors") == 0
    assert load_concept(tmp_path / "half.safetensors").tensors["tokens"].dtype == torch.float16
    assert run("compress", "--concept", custom["cat"], "--keep", 0, "--out", tmp_path / "no.safetensors") == 2
    assert "keep: expected a share" in capsys.readouterr().err


def test_a_compressed_concept_of_other_sizes_is_refused(sd, custom):
    concept = load_concept(custom["cat"])
    name = next(name for name in concept.tensors if name != "tokens")
    for u, v in ((torch.zeros(3, 1), torch.zeros(1, 32)), (torch.zeros(3), torch.zeros(3))):
        broken = replace(concept, tensors={f"{name}.u": u, f"{name}.v": v})
        with pytest.raises(ValueError, match=r"^concept: expected u and v of a weight of this model"):
            uncompressed(sd, broken)


def test_info_and_export_and_another_tools_file(world, custom, tmp_path, capsys):
    assert run("info", "--concept", custom["cat"]) == 0
    said = capsys.readouterr().out
    for row in (r"method +custom-diffusion", r"tokens +<cat-1>", r"steps +3", r"tensors +\d+", r"licence +The licence"):
        assert re.search(row, said), row
    assert run("export", "--concept", custom["cat"], "--out", tmp_path / "files") == 0
    word = tmp_path / "files" / "<cat-1>.safetensors"
    close(load_file(word)["<cat-1>"], load_concept(custom["cat"]).tensors["tokens"][0], **exact)
    assert run("info", "--concept", word, "--base", world / "model") == 0
    assert "a concept of another tool" in capsys.readouterr().out
    assert run("info", "--concept", word) == 2 and "name its model with --base" in capsys.readouterr().err
    assert run("info", "--concept", tmp_path / "none") == 2 and "does not exist" in capsys.readouterr().err


# ---- regularisation pictures ----


def test_pictures_of_the_class_are_found_by_their_captions(world, sd, tmp_path):
    captions = ["a photo of a cat", "tiger of of of", "a photo of a cat"]
    for k, caption in enumerate(captions):
        Image.open(world / "cat" / f"{k}.png").save(tmp_path / f"{k}.png")
        with pytest.raises(ValueError, match="caption"):
            regularisation.folder_regularisation(sd, tmp_path, "cat")
        (tmp_path / f"{k}.txt").write_text(caption, encoding="utf-8")
    found = regularisation.folder_regularisation(sd, tmp_path, "cat")
    assert found.prompts == [("a photo of a cat",)] * 2
    assert len(regularisation.folder_regularisation(sd, tmp_path, "cat", threshold=-1).prompts) == 3


def test_toybox_pictures_are_drawn_from_the_captions_found(sd, monkeypatch):
    monkeypatch.setattr(regularisation, "SEARCHED", 30)
    found = regularisation.toybox_regularisation(sd, "cat", 3, threshold=-1)
    assert found.mean.shape == (3, 4, 8, 8) and len(found.prompts) == 3
    again = regularisation.toybox_regularisation(sd, "cat", 3, threshold=-1)
    close(found.mean, again.mean, **exact)
    specs = {caption: spec for spec, caption in map(pair_spec, range(60))}
    pictures = [Image.fromarray(render(specs[caption], 32)) for ((caption,),) in zip(found.prompts, strict=True)]
    close(found.mean, subject_examples(sd, pictures, "cat").mean)  # each under its own caption
    with pytest.raises(ValueError, match=r"^regularisation: expected a whole number of at least 1, got 0"):
        regularisation.toybox_regularisation(sd, "cat", 0)


def test_pictures_of_pairs_name_both_nouns(sd):
    found = regularisation.toybox_pairs(sd, ("cat", "mug"), 3)
    assert found.mean.shape == (3, 4, 8, 8)
    for (caption,) in found.prompts:
        first, second = caption.split(" next to ")
        assert {"cat", "kitten"} & set(first.split()) and {"mug", "cup"} & set(second.split())
    with pytest.raises(ValueError, match=r"^nouns: expected two of cat, .*, got 'duck'"):
        regularisation.toybox_pairs(sd, ("cat", "duck"), 3)


def test_the_folder_of_the_option_becomes_a_term(world, sd, tmp_path):
    for k in range(3):
        Image.open(world / "cat" / f"{k}.png").save(tmp_path / f"{k}.png")
        (tmp_path / f"{k}.txt").write_text("a cat", encoding="utf-8")
    args = SimpleNamespace(regularisation=[str(tmp_path)], class_noun=["cat", "tiger"], similarity=-1)
    assert [len(one.prompts) for one in train_command.class_pictures(args, sd)] == [3, 3]
    for given, message in ((["5"], "a number is for --base toybox"), (["a", "b", "c"], "expected one folder, or one")):
        with pytest.raises(ValueError, match=message):
            train_command.class_pictures(SimpleNamespace(**vars(args) | {"regularisation": given}), sd)
    args.class_noun, args.similarity = ["of"], None
    with pytest.raises(ValueError, match=r"^similarity: expected one below the best of 3 captions .*sation 0\)$"):
        train_command.class_pictures(args, sd)


# ---- help ----


def test_help_teaches_and_does_not_wait_for_torch():
    code = ("import sys; from course_lib import personalize\n"
            "try: personalize.main(['train', '--help'])\n"
            "finally: assert 'torch' not in sys.modules")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPO)
    assert done.returncode == 0, done.stderr
    for method in METHODS:
        assert f"train --method {method}" in done.stdout
    assert all(f"otebook {number}" in done.stdout for number in (11, 12, 13, 14))


def test_every_example_of_the_help_can_be_parsed():
    text = "\n".join(value for name, value in vars(command_line).items() if name.isupper() and isinstance(value, str))
    lines = text.replace("\\\n", " ").splitlines()
    examples = [shlex.split(line)[3:] for line in lines if line.strip().startswith("python -m course_lib.personalize")]
    assert len(examples) >= 12
    for example in examples:
        args = command_line.options().parse_args(example)
        if example[0] == "train":
            train_command.check_train(args)
            for images in args.images:
                assert (REPO / images).is_dir()


def test_settings_without_options_are_those_of_the_method(world, sd, monkeypatch):
    for defaults in (registry.TOYBOX, registry.Defaults()):
        steps = textual_inversion.SETTINGS[defaults.settings].steps
        args = command_line.options().parse_args(["train", "--method", "textual-inversion", "--images",
            str(world / "cat"), "--class-noun", "cat", "--token", "<v>", "--out", "x.safetensors"])  # fmt: skip
        monkeypatch.setattr(sd, "defaults", defaults)
        with train_command.make_recipe(args, sd) as recipe:
            assert recipe.settings.steps == steps
