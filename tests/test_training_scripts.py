"""The scripts of training/: stopped and resumed they ship what an undisturbed run ships."""

import importlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from test_run import same_state

from course_lib.data import cifar10
from course_lib.diffusion import checkpoint, schedule
from course_lib.diffusion.train import Training
from course_lib.diffusion.unet import UNet
from course_lib.environment import CHECKPOINTS, sha256
from course_lib.evaluation.metrics import SmallClassifier

REPO = Path(__file__).resolve().parents[1]
SCRIPT = REPO / "training" / "ddpm_cifar10.py"


def data_file(folder):
    rng = np.random.default_rng(0)
    path = folder / "data.npz"
    np.savez(
        path,
        train_images=rng.integers(0, 256, (64, 32, 32, 3)).astype(np.uint8), train_labels=rng.integers(0, 10, 64),
        test_images=rng.integers(0, 256, (4, 32, 32, 3)).astype(np.uint8), test_labels=rng.integers(0, 10, 4),
    )  # fmt: skip
    return path


def arrays(folder):
    """Pictures (N, 3, 32, 32) and labels of a training, and of 40 held-out ones."""
    with np.load(data_file(folder)) as file:
        images, labels = file["train_images"].transpose(0, 3, 1, 2).copy(), file["train_labels"]
    return images, labels, images[:40], labels[:40]


def options(data, out, steps, **more):
    more = {"log-every": 2, "save-every": 0, "draw-steps": 0, "minutes": 5, **more}
    tiny = "--channels 32 32 --batch-size 4 --precision no --threads 1".split()
    return [*tiny, "--data", str(data), "--out", str(out), "--steps", str(steps),
            *(str(part) for name, value in more.items() for part in (f"--{name}", value))]  # fmt: skip


def environment(**more):
    return {**os.environ, "PYTHONPATH": str(REPO), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", **more}


def losses(out):
    return [
        (row["step"], row["loss"])
        for row in map(json.loads, (out / "log.jsonl").read_text().splitlines())
        if "loss" in row
    ]


@pytest.fixture
def script(monkeypatch):
    """script(name, arguments): a training script, run inside this process."""
    threads = torch.get_num_threads()

    def run(name, arguments):
        module = importlib.import_module(name)
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        with torch.random.fork_rng(devices=[]):
            module.main()

    yield run
    torch.set_num_threads(threads)


def started(arguments, log, rows):
    """Start the script in a process of its own; returns it once its log has that many rows."""
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), *arguments], env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    deadline = time.time() + 300
    while process.poll() is None and time.time() < deadline:
        if log.is_file() and log.read_bytes().count(b"\n") >= rows:
            return process
        time.sleep(0.002)
    process.kill()
    raise AssertionError(f"ended before it could be stopped:\n{process.communicate()}")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL], ids=["Ctrl-C", "kill -9"])
def test_a_stopped_run_goes_on_bit_for_bit(tmp_path, script, how):
    """The log and every number of the final state of a run that was stopped are those of an undisturbed run."""
    data, steps = data_file(tmp_path), 40
    script("ddpm_cifar10", options(data, tmp_path / "whole", steps))
    expected = losses(tmp_path / "whole")
    assert [step for step, _ in expected] == list(range(2, 41, 2)) and all(math.isfinite(x) for _, x in expected)

    out = tmp_path / "stopped"
    kill = how == signal.SIGKILL
    arguments = options(data, out, steps, **{"save-every": 1e-3 if kill else 5})  # every 0.06 s, or at the end
    process = started(arguments, out / "log.jsonl", rows=4)
    process.send_signal(how)
    _, said = process.communicate(timeout=60)
    saved = torch.load(out / "state.pt", weights_only=True)["step"]
    assert 0 < saved < steps and len(losses(out)) < len(expected)
    if kill:  # what it can leave behind: rows after the last save, half a row
        with (out / "log.jsonl").open("a") as file:
            file.write('{"step": 38, "loss": -1.0, "minutes": 0}\n{"step": 40, "lo')
    else:
        assert process.returncode == 130 and f"stopped after step {saved}, which is saved in" in said.decode()
        assert "Traceback" not in said.decode()
    script("ddpm_cifar10", arguments)
    assert losses(out) == expected
    same_state(*(torch.load(folder / "state.pt", weights_only=True) for folder in (tmp_path / "whole", out)))


def test_other_pictures_are_refused(tmp_path, script):
    data, out = data_file(tmp_path), tmp_path / "out"
    script("ddpm_cifar10", options(data, out, 2))
    arrays = dict(np.load(data))
    arrays["train_images"][5, 0, 0, 0] ^= 1
    np.savez(data, **arrays)
    with pytest.raises(
        ValueError,
        match=r"^data: .*state.pt was written with Pictures of data\.npz \w+, got Pictures of data\.npz \w+; ",
    ):
        script("ddpm_cifar10", options(data, out, 2))


def test_a_damaged_state_is_one_sentence_and_exit_code_2(tmp_path):
    (tmp_path / "state.pt").write_bytes(b"no state")
    done = subprocess.run([sys.executable, str(SCRIPT), *options(data_file(tmp_path), tmp_path, 2)], env=environment(),
                          capture_output=True, text=True, timeout=300)  # fmt: skip
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"error: {tmp_path / 'state.pt'} is damaged, or not the state")


def test_the_script_ships_what_it_averaged_and_draws(tmp_path, script):
    data, ship = data_file(tmp_path), tmp_path / "shipped"
    script(
        "ddpm_cifar10",
        options(data, tmp_path / "out", 3, **{"ship": ship, "log-every": 1, "save-every": 5, "draw-steps": 1}),
    )
    assert (tmp_path / "out" / "samples_000003.png").stat().st_size > 1_000
    averaged = torch.load(tmp_path / "out" / "state.pt", weights_only=True)["ema"]
    for name, value in checkpoint.load(ship).state_dict().items():
        torch.testing.assert_close(value, averaged[name].half().float(), rtol=0, atol=0)
    note = json.loads((ship / "provenance.json").read_text())
    assert (
        note["made_by"] == "training/ddpm_cifar10.py"
        and note["steps"] == 3
        and note["data"] == "Pictures of data.npz (data.npz)"
    )
    kept = "schedule T batch_size lr ema precision minutes device threads torch date weighting last_losses files"
    assert set(kept.split()) | {"seed", "started_from"} <= set(note) and len(note["last_losses"]) == 3


def test_a_run_may_measure_its_samples(tmp_path, script, monkeypatch):
    data = cifar10.Dataset("Toybox-10", "a test", (), *map(torch.as_tensor, arrays(tmp_path)))
    monkeypatch.setattr(cifar10, "toybox10", lambda: data)
    arguments = [*options("-", tmp_path / "run", 2, score=160), "--toybox", "--ship", str(tmp_path / "shipped")]
    script("ddpm_cifar10", arguments)
    curve = json.loads((tmp_path / "shipped" / "provenance.json").read_text())["curve"]
    assert [row["step"] for row in curve] == [1, 2]
    for row in curve:
        assert len(row["held_out_loss"]) == len(row["frechet_left_out"]) == 10
        assert all(0.1 < loss < 10 for loss in row["held_out_loss"]) and 0 <= row["accuracy"] <= 1
        assert min(row["frechet_left_out"]) < row["frechet"] < max(row["frechet_left_out"]) + 50
    assert torch.tensor(curve[0]["held_out_loss"]).std() > 0


def test_a_shipped_model_is_a_start(tmp_path, script):
    """The real one: its provenance is that of an older version."""
    shipped = CHECKPOINTS / "ddpm-cifar10"
    arguments = options(data_file(tmp_path), tmp_path / "out", 1, **{"start-from": shipped, "ship": tmp_path / "ship"})
    script("ddpm_cifar10", arguments)
    note = json.loads((tmp_path / "ship" / "provenance.json").read_text())
    assert note["started_from"] == json.loads((shipped / "provenance.json").read_text())
    weights, start = (checkpoint.load(folder).state_dict() for folder in (tmp_path / "ship", shipped))
    for name, value in weights.items():  # it is that model: the rate of so short a run is next to 0
        torch.testing.assert_close(value, start[name], rtol=0, atol=1e-3)


STAGES = {  # small, but whole: data, steps, what is measured at a save, what is shipped
    "classifier_cifar10": "--epochs 2 --batch-size 16 --width 8",
    "toybox_vae": "--images 24 --batch-size 2 --steps 4",
    "toybox_clip": "--images 24 --batch-size 4 --steps 4",
    "toybox_unet": f"--images 24 --batch-size 2 --steps 4 --parts {CHECKPOINTS / 'toybox-sd'}",
    "toybox_judge": "--images 24 --batch-size 6 --steps 4 --individuals 230",
    "toybox_unclip decoder": f"--images 24 --batch-size 2 --steps 4 --parts {CHECKPOINTS / 'toybox-sd'}",
    "toybox_unclip prior": f"--images 24 --batch-size 4 --steps 4 --parts {CHECKPOINTS / 'toybox-sd'}",
    "toybox_unclip regression": f"--images 24 --batch-size 4 --steps 4 --parts {CHECKPOINTS / 'toybox-sd'}",
    "toybox_gan gan": "--images 24 --batch-size 2 --steps 8",  # its penalty comes at the eighth step
    "toybox_gan encoder": f"--batch-size 2 --steps 4 --generator {CHECKPOINTS / 'toybox-gan' / 'generator'}",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", STAGES)
def test_a_stage_stopped_by_ctrl_c_and_resumed_ships_the_same(tmp_path, monkeypatch, script, name):
    stage, (name, *part) = STAGES[name], name.split()
    arguments = [*part, *stage.split(), *"--precision no --threads 1".split()]
    if name == "classifier_cifar10":
        arguments += ["--data", data_file(tmp_path)]
    if name == "toybox_unet":
        module = importlib.import_module(name)
        monkeypatch.setattr(module, "PROMPTS", module.PROMPTS[:2])
    shipped = {}
    for kind in ("whole", "stopped"):
        command = [*arguments, "--out", tmp_path / kind / "run", "--ship", tmp_path / kind / "ship"]
        if kind == "stopped":
            run, step = importlib.import_module("run").Run, importlib.import_module("run").Run._take_step

            def stopped(self, batch_loss, step=step):
                step(self, batch_loss)
                if self.step == 2:
                    signal.raise_signal(signal.SIGINT)

            with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
                patch.setattr(run, "_take_step", stopped)
                script(name, command)
            assert end.value.code == 130 and not (tmp_path / kind / "ship").exists()
        script(name, command)
        files = sorted((tmp_path / kind / "ship").rglob("*.safetensors"))
        shipped[kind] = {path.relative_to(tmp_path / kind / "ship").as_posix(): sha256(path) for path in files}
    assert shipped["whole"] == shipped["stopped"] and shipped["whole"]
    for path in (tmp_path / "stopped" / "ship").rglob("provenance.json"):
        note = json.loads(path.read_text())
        assert note["made_by"] == f"training/{name}.py" and note["steps"] in (4, 8) and note["data"]
        assert note["batch_size"] and note["lr"] and note["date"] and note["threads"] == 1
        assert "runs" not in path.read_text() and str(tmp_path) not in path.read_text()
    if name == "classifier_cifar10":
        checkpoint.load(tmp_path / "stopped" / "ship", model_class=SmallClassifier)
        assert set(load_file(tmp_path / "stopped" / "ship" / "real_features.safetensors")) == {"mean", "cov"}


def test_the_scripts_steps_are_those_of_the_lesson(tmp_path, script):
    """`Training` of notebook 01 and training/ddpm_cifar10.py make the same network, bit for bit."""
    script("ddpm_cifar10", options(data_file(tmp_path), tmp_path, 3))
    data = cifar10.load(tmp_path / "data.npz")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = UNet(channels=(32, 32), attention=(False, True), patch=2, num_classes=10, schedule="linear")
    training = Training(
        net, schedule.linear(), data.train_images, data.train_labels, batch_size=4, lr=6e-4, total_steps=3,
        weighting="v", accelerator=Accelerator(cpu=True),
    )  # fmt: skip
    for _ in training.steps(3):
        pass
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    torch.testing.assert_close(saved["net"], dict(training.net.state_dict()), rtol=0, atol=0)
    torch.testing.assert_close(saved["ema"], dict(training.ema.model.state_dict()), rtol=0, atol=0)


def test_the_classifiers_learning_rate_is_torchs_one_cycle():
    """Rates and beta_1 of each of 40 steps; torch's scheduler sets those of the step to come."""
    OneCycle = importlib.import_module("classifier_cifar10").OneCycle
    run = OneCycle.__new__(OneCycle)
    run.args = type("Args", (), dict(steps=40, lr=0.004))
    optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.004, 40, pct_start=0.2)
    for step in range(1, 41):
        group, ours = optimizer.param_groups[0], run.hyperparameters(step)
        assert ours["lr"] == pytest.approx(group["lr"], rel=1e-6, abs=1e-12)
        assert ours["betas"] == pytest.approx(group["betas"])
        optimizer.step()
        if step < 40:
            scheduler.step()


def test_an_epoch_shows_each_picture_once():
    order = importlib.import_module("classifier_cifar10").order
    assert sorted(order(0, 0, 50).tolist()) == list(range(50))
    assert not torch.equal(order(0, 0, 50), order(0, 1, 50)) and torch.equal(order(0, 1, 50), order(0, 1, 50))
