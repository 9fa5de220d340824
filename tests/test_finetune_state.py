"""A training that breaks off: killed, out of memory, without numbers, on a full disk; and one in two processes."""

import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from test_finetune import (
    METHODS,
    PICTURES,
    assert_unchanged,
    booth,
    build,
    copies,
    custom,
    inversion,
    prior,
    same_training,
    settings,
    state,
    train,
    trained,
)

from course_lib.personalization import finetune, textual_inversion

close = torch.testing.assert_close
exact = dict(rtol=0, atol=0)
# Each of them, with a text encoder that learns or not, once.
each_kind = pytest.mark.parametrize("method", ["textual inversion", "dreambooth and text", "lora", "custom diffusion"])


@pytest.fixture(scope="module")
def sd():
    return build()


@each_kind
def test_a_resumed_training_is_the_uninterrupted_one_bit_for_bit(sd, method, tmp_path):
    options, path = dict(steps=5, warmup=4), tmp_path / "new folder" / "state.pt"
    whole = trained(sd, method, **options)
    with METHODS[method](sd, **options) as recipe:
        for step, _loss in finetune.finetune(sd, recipe, checkpoint=path, save_every=2):
            if step == 3:
                break
    with METHODS[method](sd, **options) as recipe:
        steps = [step for step, _loss in finetune.finetune(sd, recipe, checkpoint=path, save_every=2)]
        assert steps == [4, 5]  # leaving the loop has saved the third
        close(copies(recipe.params), whole, **exact)
    assert [file.name for file in path.parent.iterdir()] == ["state.pt"]
    with METHODS[method](sd, **options) as recipe:  # a training that has ended
        close(train(recipe, sd, checkpoint=path), whole, **exact)


@each_kind
def test_leaving_the_loop_after_the_recipe_saves_nothing_wrong(sd, method, tmp_path):
    """A loop that is still held by a name ends when the model has been put back already."""
    path = tmp_path / "state.pt"
    with METHODS[method](sd, steps=4) as recipe:
        loop = finetune.finetune(sd, recipe, checkpoint=path, save_every=2)
        assert [next(loop)[0] for _ in range(3)] == [1, 2, 3]
    loop.close()
    assert torch.load(path, weights_only=True)["step"] in (2, 3)
    close(trained(sd, method, path, steps=4), trained(sd, method, steps=4), **exact)


KILLED_WHILE_SAVING = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
import torch
from test_finetune import build, trained

write = torch.save

def save(state, path):
    write(state, path)
    if state["step"] == 4:
        os.truncate(path, os.path.getsize(path) // 2)
        os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))

torch.save = save
trained(build(), "custom diffusion", sys.argv[2], steps=6, warmup=4)
"""


def run(tmp_path, script, *arguments, launcher=()):
    file = tmp_path / "script.py"
    file.write_text(script)
    command = [sys.executable, *launcher, str(file), str(Path(__file__).parent), *map(str, arguments)]
    root = str(Path(__file__).resolve().parents[1])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    environment["HF_HOME"] = str(tmp_path)  # no configuration of this user's
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)


@pytest.mark.slow
def test_after_a_kill_in_the_middle_of_saving_it_goes_on(sd, tmp_path):
    path = tmp_path / "state.pt"
    done = run(tmp_path, KILLED_WHILE_SAVING, path)
    assert done.returncode == -getattr(signal, "SIGKILL", -signal.SIGTERM), done.stderr
    assert len(list(tmp_path.glob("state.pt.*.tmp"))) == 1 and torch.load(path, weights_only=True)["step"] == 2
    whole = trained(sd, "custom diffusion", steps=6, warmup=4)
    close(trained(sd, "custom diffusion", path, steps=6, warmup=4), whole, **exact)
    assert not list(tmp_path.glob("state.pt.*.tmp"))


IN_TWO = """
import sys
sys.path.insert(0, sys.argv[1])
import torch.distributed as dist
from test_finetune import METHODS, build, trained

for method in METHODS:
    trained(build(), method, f"{sys.argv[2]}/{method}.pt", steps=3, batch_size=2, accumulate=2)
assert dist.get_world_size() == 2
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def in_two(tmp_path_factory):
    """A folder with what two processes have trained by each method.

    For --cpu accelerate starts one process only; for --multi_gpu two, and ACCELERATE_USE_CPU keeps them on CPUs.
    """
    folder = tmp_path_factory.mktemp("two")
    launcher = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
                "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]  # fmt: skip
    done = run(folder, IN_TWO, folder, launcher=launcher)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="gloo on Windows needs a host name that resolves")
@pytest.mark.parametrize("method", METHODS)
def test_two_processes_are_one_with_twice_the_batch(sd, in_two, method):
    two = torch.load(in_two / f"{method}.pt", weights_only=True)["params"]
    same_training(sd, method, trained(sd, method, steps=3, batch_size=4), two, 1e-3)


@pytest.mark.parametrize(("other", "named"), [
    (lambda sd: inversion(sd, lr=2e-2), "lr: .* was written with 0.01, got 0.02"),
    (lambda sd: inversion(sd, batch_size=1), "batch_size: .* with 2, got 1"),
    (lambda sd: inversion(sd, vectors=2), "rows: .*"),
    (lambda sd: textual_inversion.recipe(sd, PICTURES, noun="tiger", settings=settings()), "noun: .*'cat', got"),
    (lambda sd: custom(sd), "method: .*'textual_inversion', got 'custom_diffusion'"),
    (lambda sd: textual_inversion.recipe(sd, PICTURES[:2] * 2, noun="cat", settings=settings()), "images: .*other"),
    (lambda sd: inversion(sd, captions=["of a {}"] * 3), "images: .*other .* .the subject's"),
], ids=["lr", "batch_size", "rows", "noun", "method", "pictures", "captions"])  # fmt: skip
def test_the_state_of_another_training_is_refused(sd, tmp_path, other, named):
    path = tmp_path / "state.pt"
    with inversion(sd) as recipe:
        train(recipe, sd, checkpoint=path)
    written = path.read_bytes()
    with other(sd) as recipe:
        start = copies(recipe.params)
        with pytest.raises(ValueError, match=f"^{named}.*; go on with the same, or begin anew"):
            train(recipe, sd, checkpoint=path)
        close(copies(recipe.params), start, **exact)
    assert path.read_bytes() == written


@pytest.mark.parametrize(("first", "then", "named"), [
    (dict(prior=prior()), dict(), "prior_weight: .* 1.0, got 0.0"),
    (dict(prior=prior(count=3)), dict(prior=prior(count=4)), "images: .*the class or second subject's"),
    (dict(prior=prior("a cat")), dict(prior=prior("a tiger")), "images: .*the class or second subject's"),
    (dict(prior=prior(), prior_weight=1.0), dict(prior=prior(), prior_weight=0.5), "prior_weight: .* 1.0, got 0.5"),
], ids=["no prior", "fewer", "other", "weight"])  # fmt: skip
def test_the_state_is_tied_to_the_class_pictures(sd, tmp_path, first, then, named):
    path = tmp_path / "state.pt"
    with booth(sd, rank=2, **first) as recipe:
        train(recipe, sd, checkpoint=path)
    with booth(sd, rank=2, **then) as recipe, pytest.raises(ValueError, match=f"^{named}"):
        train(recipe, sd, checkpoint=path)


def test_the_state_is_tied_to_the_number_of_class_pictures(sd, tmp_path):
    path = tmp_path / "state.pt"
    with custom(sd, regularisation=[prior()]) as recipe:
        train(recipe, sd, checkpoint=path)
    with custom(sd) as recipe, pytest.raises(ValueError, match=r"^terms: .* with 2 sets of pictures .*, got 1"):
        train(recipe, sd, checkpoint=path)


def test_a_state_past_the_steps_asked_for_is_refused(sd, tmp_path):
    path = tmp_path / "state.pt"
    trained(sd, "textual inversion", path, steps=4)
    with inversion(sd, steps=2) as recipe, pytest.raises(ValueError, match=r"^steps: expected at least the 4 that "):
        train(recipe, sd, checkpoint=path)


def test_a_state_of_another_precision_is_refused(sd, tmp_path):
    path = tmp_path / "state.pt"
    trained(sd, "textual inversion", path)
    half = build().to(dtype=torch.bfloat16)
    with inversion(half) as recipe, pytest.raises(ValueError, match=r"^dtype: .*'float32', got 'bfloat16'"):
        train(recipe, half, checkpoint=path)


@pytest.mark.parametrize(("harm", "message"), [
    (lambda path: path.write_bytes(path.read_bytes()[:-200]), "is damaged"),
    (lambda path: path.write_bytes(b"nothing"), "is damaged"),
    (lambda path: torch.save([1, 2], path), "is damaged"),
    (lambda path: edit_state(path, lambda state: state.pop("optimizer")), "is incomplete"),
    (lambda path: edit_state(path, lambda state: state["params"].clear()), "is damaged"),
    (lambda path: edit_state(path, lambda state: state.pop("data")), "has no record of the pictures it was trained on"),
], ids=["cut", "other", "list", "no optimizer", "no params", "no hashes"])  # fmt: skip
def test_a_state_that_is_damaged_or_without_hashes_is_one_sentence(sd, tmp_path, harm, message):
    path = tmp_path / "state.pt"
    trained(sd, "textual inversion", path)
    harm(path)
    with inversion(sd) as recipe, pytest.raises(ValueError, match=r"^checkpoint: .*begin anew") as error:
        train(recipe, sd, checkpoint=path)
    assert message in str(error.value) and "\n" not in str(error.value)


def edit_state(path, change):
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)


def test_a_longer_training_goes_on(sd, tmp_path):
    path = tmp_path / "state.pt"
    trained(sd, "textual inversion", path, steps=2)
    close(trained(sd, "textual inversion", path, steps=4), trained(sd, "textual inversion", steps=4), **exact)


def test_a_loss_that_is_not_a_number_stops_before_the_state_is_saved(sd, tmp_path):
    path = tmp_path / "state.pt"
    with inversion(sd, steps=6) as recipe:
        loop = finetune.finetune(sd, recipe, checkpoint=path, save_every=2)
        assert [next(loop)[0], next(loop)[0]] == [1, 2]
        recipe.terms[0].examples.mean.fill_(torch.nan)
        with pytest.raises(FloatingPointError, match=r"not a number at step 4; .*state.pt holds the last good state\."):
            list(loop)
    assert torch.load(path, weights_only=True)["step"] == 2
    close(trained(sd, "textual inversion", path, steps=6), trained(sd, "textual inversion", steps=6), **exact)
    with inversion(sd) as recipe:
        recipe.terms[0].examples.mean.fill_(torch.inf)
        with pytest.raises(FloatingPointError, match=r"at step 2; no state was saved yet\."):
            train(recipe, sd)
    with inversion(sd, steps=50) as recipe:  # nobody trains on for nothing: every 20 steps it is looked at
        recipe.terms[0].examples.mean.fill_(torch.nan)
        with pytest.raises(FloatingPointError, match=r"at step 20; no state was saved yet\."):
            train(recipe, sd)


def test_an_infinite_gradient_stops_before_the_state_is_saved(sd, tmp_path):
    """The loss is finite then, and only the weights of the step would be lost."""
    path = tmp_path / "state.pt"
    with inversion(sd, steps=6) as recipe:
        loop = finetune.finetune(sd, recipe, checkpoint=path, save_every=2)
        assert [next(loop)[0], next(loop)[0]] == [1, 2]
        recipe.params["tokens"].register_hook(lambda grad: grad * torch.inf)
        with pytest.raises(FloatingPointError, match=r"not a number at step 4; .*state.pt holds the last good state\."):
            list(loop)
    assert torch.load(path, weights_only=True)["step"] == 2


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("unexpected pos 64 vs 0")])
def test_a_full_disk_warns_and_leaves_the_old_state(sd, tmp_path, monkeypatch, error):
    path = tmp_path / "state.pt"
    whole = trained(sd, "textual inversion", steps=4)
    with inversion(sd, steps=4) as recipe:
        loop = finetune.finetune(sd, recipe, checkpoint=path, save_every=2)
        assert [next(loop)[0], next(loop)[0]] == [1, 2]

        def full(state, file):
            Path(file).write_bytes(b"a part of it")
            raise error

        monkeypatch.setattr(torch, "save", full)
        with pytest.warns(UserWarning, match=r"state of step 4 was not saved .*(space|pos).*; training goes on"):
            assert [step for step, _loss in loop] == [3, 4]
        close(copies(recipe.params), whole, **exact)
    monkeypatch.undo()
    assert [file.name for file in tmp_path.iterdir() if file.is_file()] == ["state.pt"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        close(trained(sd, "textual inversion", path, steps=4), whole, **exact)


@pytest.mark.parametrize(
    "place", [(finetune, "denoising_loss"), (torch.optim.AdamW, "step")], ids=["loss", "optimizer"]
)
def test_short_of_memory_is_one_clear_sentence(sd, monkeypatch, place):
    def too_much(*args, **options):
        raise torch.OutOfMemoryError("Tried to allocate 2.00 GiB")

    before = state(sd)
    monkeypatch.setattr(*place, too_much)
    with pytest.raises(RuntimeError, match=r"^the device's memory is too small for a step: try gradient_checkpoint"):
        with METHODS["custom diffusion"](sd) as recipe:
            train(recipe, sd)
    assert_unchanged(before, state(sd))
