"""Training: what a step is, the averaged weights, and a run that is killed and goes on bit for bit."""

import importlib.util
import json
import math
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from course_lib.diffusion import checkpoint
from course_lib.diffusion.ddpm import simple_loss
from course_lib.diffusion.schedule import linear
from course_lib.diffusion.train import EMA, Training

REPO = Path(__file__).resolve().parents[1]
SCRIPT = REPO / "training" / "ddpm_cifar10.py"
IMAGES = torch.randint(0, 256, (12, 3, 8, 8), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
LABELS = torch.arange(12) % 10


def training(net, images=IMAGES, labels=LABELS, **options):
    return Training(net, linear(), images, labels, accelerator=Accelerator(cpu=True), **{"batch_size": 4, **options})


def weights(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=0, msg=lambda m, n=name: f"{n}: {m}")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# ---- a step ----


def test_the_loss_falls(tiny_unet):
    run = training(tiny_unet(), IMAGES[:1], None, batch_size=16, lr=2e-3, warmup=0, flip=False)
    losses = [loss.item() for _, loss in run.steps(40)]
    assert np.mean(losses[-10:]) < 0.7 * np.mean(losses[:3])


def test_a_step_is_algorithm_1(tiny_unet):
    """Two steps written out by hand: same draws, same loss, clipped gradient, AdamW, averaging."""
    run = training(tiny_unet(num_classes=10), lr=1e-3, warmup=4, clip=0.1, weighting="v")
    losses = [loss for _, loss in run.steps(2)]

    net = tiny_unet(num_classes=10).train()
    shadow = {name: value.detach().clone() for name, value in net.named_parameters()}
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=0.0)
    drawer = training(tiny_unet(num_classes=10))  # only its batch() is used
    for step in (1, 2):
        g = seeded(int(np.random.SeedSequence([0, 0, step]).generate_state(1)[0]))
        x0, label = drawer.batch(g)
        loss = simple_loss(lambda xt, t: net(xt, t, label), x0, linear(), g, "v")  # noqa: B023
        torch.testing.assert_close(loss, losses[step - 1], rtol=1e-4, atol=1e-5)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 0.1)
        optimizer.param_groups[0]["lr"] = 1e-3 * step / 4
        optimizer.step()
        decay = min(0.999, (1 + step) / (10 + step))
        for name, value in net.named_parameters():
            shadow[name] = decay * shadow[name] + (1 - decay) * value.detach()
    for name, value in run.net.named_parameters():
        torch.testing.assert_close(value, net.get_parameter(name), rtol=1e-3, atol=2e-5)
        torch.testing.assert_close(run.ema.model.get_parameter(name), shadow[name], rtol=1e-3, atol=2e-5)


def test_a_batch_is_images_in_range_and_their_labels(tiny_unet):
    run = training(tiny_unet(num_classes=10), batch_size=500, p_drop=0.2)
    x0, label = run.batch(seeded())
    assert x0.shape == (500, 3, 8, 8) and x0.dtype == torch.float32 and x0.min() >= -1 and x0.max() <= 1
    assert x0.is_contiguous(memory_format=torch.channels_last)
    pixels = ((x0 + 1) * 127.5).round().to(torch.uint8)
    plain = (pixels[:, None] == IMAGES).flatten(2).all(2)  # (500, 12): which image is it?
    mirrored = (pixels[:, None] == IMAGES.flip(-1)).flatten(2).all(2)
    assert (plain | mirrored).sum(1).eq(1).all()
    assert abs(mirrored.any(1).double().mean() - 0.5) < 4 * 0.5 / 500**0.5
    kept = label != 10
    rows = (plain | mirrored).double().argmax(1)
    torch.testing.assert_close(label[kept], LABELS[rows[kept]], rtol=0, atol=0)
    assert abs(kept.double().mean() - 0.8) < 4 * (0.2 * 0.8 / 500) ** 0.5
    assert set(rows.tolist()) == set(range(12))


def test_without_flips_and_labels_a_batch_is_just_images(tiny_unet):
    x0, label = training(tiny_unet(), labels=None, batch_size=50, flip=False).batch(seeded())
    pixels = ((x0 + 1) * 127.5).round().to(torch.uint8)
    assert label is None and (pixels[:, None] == IMAGES).flatten(2).all(2).any(1).all()


def test_the_learning_rate_rises_stays_and_falls(tiny_unet):
    run = training(tiny_unet(num_classes=10), lr=1.0, warmup=10, total_steps=100, cooldown=0.3)
    curve = [run.learning_rate(step) for step in range(101)]
    assert curve[1] == pytest.approx(0.1) and curve[5] == pytest.approx(0.5)
    assert curve[10:71] == [1.0] * 61
    assert curve[85] == pytest.approx(0.5) and curve[100] == 0
    assert run.learning_rate(150) == 0  # never below 0
    forever = training(tiny_unet(num_classes=10), lr=2.0, warmup=0, total_steps=None)
    assert [forever.learning_rate(step) for step in (1, 10**6)] == [2.0, 2.0]


def test_the_curve_reaches_the_optimizer(tiny_unet):
    run = training(tiny_unet(num_classes=10), lr=1.0, warmup=10)
    for step, _ in run.steps(3):
        assert run.optimizer.param_groups[0]["lr"] == pytest.approx(step / 10)


def test_runs_with_one_seed_agree_and_with_two_differ(tiny_unet):
    state = torch.get_rng_state()
    losses = [
        [loss.item() for _, loss in training(tiny_unet(num_classes=10), seed=s).steps(3)] for s in (0, 0, 1, 2**32)
    ]
    assert losses[0] == losses[1] and losses[0] != losses[2]
    assert losses[0] != losses[3]  # torch's CPU generator alone would take 2^32 for 0
    assert torch.equal(torch.get_rng_state(), state)  # the global generator plays no part


def test_ema_is_the_average_written_as_a_loop(tiny_unet):
    net = tiny_unet()
    ema = EMA(net, decay=0.5)
    by_hand = weights(net)
    for n in range(1, 12):
        with torch.no_grad():
            for i, value in enumerate(net.parameters()):
                value.add_(torch.randn(value.shape, generator=seeded(100 * n + i)))
        ema.update(net)
        d = min(0.5, (1 + n) / (10 + n))
        by_hand = {name: d * by_hand[name] + (1 - d) * value for name, value in weights(net).items()}
    for name, value in ema.model.state_dict().items():
        torch.testing.assert_close(value, by_hand[name], rtol=1e-5, atol=1e-5)


def test_the_average_is_a_frozen_copy(tiny_unet):
    net = tiny_unet().train()
    ema = EMA(net)
    assert net.training and not ema.model.training
    assert not any(weight.requires_grad for weight in ema.model.parameters())
    before = weights(ema.model)
    with torch.no_grad():
        net.conv_in.weight.zero_()
    assert_same(weights(ema.model), before)


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (IMAGES.float(), LABELS, r"^images: expected uint8 \(N, C, H, W\), got torch.float32"),
        (IMAGES[0], LABELS, r"^images: expected uint8 \(N, C, H, W\), got torch.uint8 \(3, 8, 8\)"),
        (IMAGES, LABELS[:5], r"^labels: expected one per image \(12\), got 5"),
    ],
)
def test_data_of_another_kind_is_refused(tiny_unet, images, labels, message):
    with pytest.raises(ValueError, match=message):
        training(tiny_unet(num_classes=10), images, labels)


def test_labels_need_a_network_that_takes_them(tiny_unet):
    with pytest.raises(ValueError, match=r"^model: expected a network with num_classes set"):
        training(tiny_unet())


# ---- saving ----


def test_a_run_goes_on_where_it_was_saved(tiny_unet, tmp_path):
    whole = training(tiny_unet(num_classes=10), total_steps=8)
    losses = [loss.item() for _, loss in whole.steps(8)]
    first = training(tiny_unet(num_classes=10), total_steps=8)
    assert [loss.item() for _, loss in first.steps(5)] == losses[:5]
    first.save(tmp_path / "run" / "state.pt", minutes=1.5)
    second = training(tiny_unet(num_classes=10, dropout=0.0).requires_grad_(), total_steps=8)
    with torch.no_grad():  # nothing of the new network may survive
        for weight in second.net.parameters():
            weight.fill_(9)
    assert second.load(tmp_path / "run" / "state.pt") == {"minutes": 1.5}
    assert second.step == 5 and [(s, loss.item()) for s, loss in second.steps(3)] == list(zip((6, 7, 8), losses[5:]))
    assert_same(weights(second.net), weights(whole.net))
    assert_same(weights(second.ema.model), weights(whole.ema.model))


@pytest.mark.parametrize(
    ("options", "message"), [({"seed": 1}, "seed: .* 0, got 1"), ({"batch_size": 5}, "batch_size: .* 4, got 5")]
)
def test_other_settings_are_refused(tiny_unet, tmp_path, options, message):
    training(tiny_unet(num_classes=10)).save(tmp_path / "state.pt")
    other = training(tiny_unet(num_classes=10), **options)
    with pytest.raises(ValueError, match=f"^{message}; resume with the same value"):
        other.load(tmp_path / "state.pt")
    assert other.step == 0


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_a_save_that_breaks_off_leaves_the_old_state(tiny_unet, tmp_path, monkeypatch, share):
    run, path = training(tiny_unet(num_classes=10)), tmp_path / "state.pt"
    list(run.steps(1))
    run.save(path)
    before, content = weights(run.net), path.read_bytes()
    list(run.steps(1))

    def half(state, file):
        Path(file).write_bytes(content[: int(share * len(content))])
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(OSError, match="disk full"):
        run.save(path)
    monkeypatch.undo()
    again = training(tiny_unet(num_classes=10))
    again.load(path)
    assert again.step == 1
    assert_same(weights(again.net), before)


# ---- the script: kill -9, and go on ----


def data_file(folder):
    rng = np.random.default_rng(0)
    path = folder / "data.npz"
    np.savez(
        path,
        train_images=rng.integers(0, 256, (64, 32, 32, 3)).astype(np.uint8), train_labels=rng.integers(0, 10, 64),
        test_images=rng.integers(0, 256, (4, 32, 32, 3)).astype(np.uint8), test_labels=rng.integers(0, 10, 4),
    )  # fmt: skip
    return path


def options(data, out, steps, **more):
    more = {"log-every": 2, "save-every": 0, "draw-steps": 0, "minutes": 5, **more}
    tiny = "--channels 32 32 --batch-size 4 --precision no --threads 1".split()
    return [*tiny, "--data", str(data), "--out", str(out), "--steps", str(steps),
            *(str(part) for name, value in more.items() for part in (f"--{name}", value))]  # fmt: skip


def environment(**more):
    return {**os.environ, "PYTHONPATH": str(REPO), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", **more}


def losses(out):
    return [(row["step"], row["loss"]) for row in map(json.loads, (out / "log.jsonl").read_text().splitlines())]


@pytest.fixture
def script(monkeypatch):
    """script(arguments): the training script, run inside this process."""
    spec = importlib.util.spec_from_file_location("ddpm_cifar10", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    threads = torch.get_num_threads()

    def run(arguments):
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments])
        with torch.random.fork_rng(devices=[]):
            module.main()

    yield run
    torch.set_num_threads(threads)


def killed(arguments, log, rows):
    """Start the script in a process of its own, and kill it once its log has that many rows."""
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), *arguments], env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    try:
        deadline = time.time() + 300
        while process.poll() is None and time.time() < deadline:
            if log.is_file() and log.read_bytes().count(b"\n") >= rows:
                break
            time.sleep(0.002)
        finished = process.poll()
    finally:
        process.kill()  # kill -9; on Windows, TerminateProcess
        output = process.communicate()[0].decode()
    assert finished is None, f"ended before it was killed:\n{output}"


def test_a_killed_run_goes_on_bit_for_bit(tmp_path, script):
    """The log and every number of the final state of a run that was killed are those of an undisturbed run."""
    data, steps = data_file(tmp_path), 40
    script(options(data, tmp_path / "whole", steps))
    expected = losses(tmp_path / "whole")
    assert [step for step, _ in expected] == list(range(2, 41, 2)) and all(math.isfinite(x) for _, x in expected)

    out = tmp_path / "killed"
    arguments = options(data, out, steps, **{"save-every": 1e-3})  # every 0.06 s: some steps are lost each time
    killed(arguments, out / "log.jsonl", rows=4)
    assert (out / "state.pt").is_file() and len(losses(out)) < len(expected)
    with (out / "log.jsonl").open("a") as file:  # what a kill can leave behind: rows after the last save, half a row
        file.write('{"step": 38, "loss": -1.0, "minutes": 0}\n{"step": 40, "lo')
    saved = torch.load(out / "state.pt", weights_only=True)["step"]
    assert 0 < saved < steps
    script(arguments)
    assert losses(out) == expected
    a, b = (torch.load(folder / "state.pt", weights_only=True) for folder in (tmp_path / "whole", out))
    assert a["step"] == b["step"] == steps and a["updates"] == b["updates"] == steps
    assert_same(a["net"], b["net"])
    assert_same(a["ema"], b["ema"])
    for i, moments in a["optimizer"]["state"].items():
        assert_same(moments, b["optimizer"]["state"][i])


def test_a_run_stopped_between_two_rows_of_its_log(tmp_path, script, monkeypatch):
    """The losses since the last row are saved too: the next row is the mean of all its steps."""
    data, steps = data_file(tmp_path), Training.steps
    script(options(data, tmp_path / "whole", 8))

    def five(self, count):
        for step, loss in steps(self, count):
            yield step, loss
            if step == 5:
                raise KeyboardInterrupt

    monkeypatch.setattr(Training, "steps", five)
    with pytest.raises(KeyboardInterrupt):
        script(options(data, tmp_path / "stopped", 8))
    assert [step for step, _ in losses(tmp_path / "stopped")] == [2, 4]
    monkeypatch.setattr(Training, "steps", steps)
    script(options(data, tmp_path / "stopped", 8))
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")


def test_a_log_without_a_state_is_forgotten(tmp_path, script):
    """Killed before its first save, a run starts again, and so does its log."""
    data = data_file(tmp_path)
    (tmp_path / "log.jsonl").write_text('{"step": 2, "loss": -1.0, "minutes": 0}\n')
    script(options(data, tmp_path, 4))
    rows = losses(tmp_path)
    assert [step for step, _ in rows] == [2, 4] and all(loss > 0 for _, loss in rows)


def test_the_script_ships_what_it_averaged_and_draws(tmp_path, script):
    data, ship = data_file(tmp_path), tmp_path / "shipped"
    script(options(data, tmp_path / "out", 3, **{"ship": ship, "log-every": 1, "save-every": 5, "draw-steps": 1}))
    assert (tmp_path / "out" / "samples_000003.png").stat().st_size > 1_000
    averaged = torch.load(tmp_path / "out" / "state.pt", weights_only=True)["ema"]
    for name, value in checkpoint.load(ship).state_dict().items():
        torch.testing.assert_close(value, averaged[name].half().float(), rtol=0, atol=0)
    note = json.loads((ship / "provenance.json").read_text())
    assert (
        note["made_by"] == "training/ddpm_cifar10.py" and note["steps"] == 3 and note["data"] == "CIFAR-10 (data.npz)"
    )
    assert all(note[key] for key in ("date", "device", "torch", "last_losses"))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="gloo on Windows needs a host name that resolves")
def test_two_processes_train_one_model(tmp_path):
    """Each draws its own images; the gradients are averaged; one of them writes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    out = tmp_path / "out"
    launch = "--cpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no".split()
    launch += ["--num_cpu_threads_per_process", "1", "--main_process_port", str(port)]
    command = [sys.executable, "-m", "accelerate.commands.launch", *launch]
    arguments = options(data_file(tmp_path), out, 10, **{"log-every": 1})
    done = subprocess.run(
        [*command, str(SCRIPT), *arguments],
        env=environment(HF_HOME=str(tmp_path)),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert [step for step, _ in losses(out)] == list(range(1, 11))  # written once, not by each process
    assert torch.load(out / "state.pt", weights_only=True)["step"] == 10
    assert done.stdout.count("step 10:") == 1
