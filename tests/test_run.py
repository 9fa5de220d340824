"""The loop of all trainings: resumed bit for bit, tied to its data and settings, stopped by a signal."""

import argparse
import importlib
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import nn

command, run_module = map(importlib.import_module, ("command", "run"))
Run = run_module.Run
close = torch.testing.assert_close
exact = dict(rtol=0, atol=0)
NEVER = 1e9  # minutes
REPO = Path(__file__).resolve().parents[1]


def arguments(out, **options):
    """The options of a training's command line; `options` replaces some, or adds what one script has."""
    parser = argparse.ArgumentParser()
    command.common_arguments(parser, out=str(out), batch_size=8, lr=0.05, steps=150)
    args = parser.parse_args(["--precision", "no"])
    vars(args).update({"save_every": NEVER, **options})
    return args


def new_run(out, fill=0.5, width=2, data="random numbers", **options):
    """A Run of a linear model."""
    model = nn.Linear(4, width)
    with torch.no_grad():
        for weight in model.parameters():
            weight.fill_(fill)
    return Run(arguments(out, **options), model, Accelerator(cpu=True), "a test", {"data": data})


def regression(run, losses=None, before=lambda step: None):
    """A loss for run.train, least at the average of four numbers. before(step) may raise."""

    def batch_loss(generator):
        before(run.step)
        x = torch.randn(run.args.batch_size, 4, generator=generator)
        loss = (run.net(x) - x.mean(1, keepdim=True)).square().mean()
        if losses is not None:
            losses[run.step] = loss.item()
        return loss

    return batch_loss


def logged(run):
    return [(row["step"], row["loss"]) for row in map(json.loads, run.log.read_text().splitlines()) if "loss" in row]


def state(run):
    return torch.load(run.state, weights_only=True)


# ---- it goes on bit for bit ----


def same_state(a, b):
    for key in ("step", "updates", "net", "ema", "optimizer", "total", "count"):
        close(a[key], b[key], **exact)


def test_a_killed_run_goes_on_bit_for_bit(tmp_path, monkeypatch):
    """Killed at step 121, last saved at step 100: 20 steps are lost and made again."""
    save = Run._save
    monkeypatch.setattr(Run, "_save", lambda run: save(run) if run.step in (100, 150) else None)
    expected, losses = {}, {}
    whole = new_run(tmp_path / "whole", save_every=-1)
    whole.train(regression(whole, expected))
    assert len(expected) == 150 and expected[150] < 0.1 * expected[1]

    def kill(step):
        if step == 121:
            raise RuntimeError("killed")

    first = new_run(tmp_path / "killed", save_every=-1)
    with pytest.raises(RuntimeError, match="killed"):
        first.train(regression(first, losses, kill))
    second = new_run(tmp_path / "killed", fill=9.0)  # nothing of the new model may survive
    assert second.step == 100
    second.train(regression(second, losses))
    assert losses == expected and [step for step, _ in logged(whole)] == [50, 100, 150]
    assert logged(second) == logged(whole)
    same_state(state(second), state(whole))
    close(second.ema.model.state_dict(), state(whole)["ema"], **exact)
    assert second.ema.updates == 150 and not torch.equal(second.ema.model.weight, second.net.weight)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_says_how_to_go_on_and_exits_with_130(tmp_path, capfd, number):
    """Between two rows of the log and two saves: the losses since the last row are saved too."""
    whole = new_run(tmp_path / "whole", steps=80, log_every=20)
    whole.train(regression(whole))
    before = signal.getsignal(number)
    stopped = new_run(tmp_path / "stopped", steps=80, log_every=20)
    shown = []
    with pytest.raises(SystemExit) as end:
        stopped.train(
            regression(stopped, before=lambda step: signal.raise_signal(number) if step == 33 else None), shown.append
        )
    assert end.value.code == 130 and signal.getsignal(number) is before
    assert shown == [] and state(stopped)["step"] == 33 and [step for step, _ in logged(stopped)] == [20]
    said = capfd.readouterr().err
    assert f"stopped after step 33, which is saved in {stopped.state}; the same command goes on from there" in said
    second = new_run(tmp_path / "stopped", steps=80, log_every=20)
    second.train(regression(second))
    assert logged(second) == logged(whole)
    same_state(state(second), state(whole))


def test_a_second_ctrl_c_stops_at_once_but_sigterm_after_ctrl_c_does_not():
    before = signal.getsignal(signal.SIGINT)
    with command.asked_to_stop() as asked:
        assert not asked
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)  # torchrun and scripts send it after a Ctrl-C
        assert asked == [signal.SIGINT, signal.SIGTERM]
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_run_outside_the_main_thread_trains_without_signals(tmp_path):
    run = new_run(tmp_path, steps=3)
    thread = threading.Thread(target=run.train, args=[regression(run)])
    thread.start()
    thread.join()
    assert run.step == 3 and state(run)["step"] == 3


@pytest.mark.parametrize("left", ['{"step": 38, "loss": -1.0}\n{"step": 40, "lo', '{"step": 2, "loss": -1.0}\n'])
def test_rows_of_the_log_after_the_last_save_are_forgotten(tmp_path, left):
    """What a kill can leave behind: rows of steps that are made again, half a row; and a log without a state."""
    tmp_path.joinpath("log.jsonl").write_text(left)
    run = new_run(tmp_path, steps=4, log_every=2)
    run.train(regression(run))
    assert [step for step, _ in logged(run)] == [2, 4] and all(loss > 0 for _, loss in logged(run))


def test_a_finished_run_makes_no_further_step(tmp_path):
    for _ in range(2):
        run = new_run(tmp_path, steps=3)
        run.train(regression(run))
        assert run.step == 3 and state(run)["step"] == 3


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_a_save_that_breaks_off_leaves_the_old_state(tmp_path, monkeypatch, share):
    run = new_run(tmp_path, steps=1)
    run.train(regression(run))
    content = run.state.read_bytes()

    def half(state, file):
        Path(file).write_bytes(content[: int(share * len(content))])
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(OSError, match="disk full"):
        run._save()
    assert run.state.read_bytes() == content and [p.name for p in tmp_path.glob("*.tmp")] == []


# ---- a state belongs to its data and settings ----


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": 1}, "--seed: {} was written with 0, got 1"),
        ({"batch_size": 9}, "--batch-size: {} was written with 8, got 9"),
        ({"lr": 0.1}, "--lr: {} was written with 0.05, got 0.1"),
        ({"ema": 0.9}, "--ema: {} was written with 0.998, got 0.9"),
        ({"steps": 2}, "--steps: {} was written with 3, got 2"),
        ({"cooldown": 0.5}, "--cooldown: {} was written with 0.3, got 0.5"),
        ({"precision": "bf16"}, "--precision: {} was written with no, got bf16"),
        ({"data": "others"}, "data: {} was written with random numbers, got others"),
        ({"channels": [8]}, "--channels: {} was written with None, got [8]"),
    ],
)
def test_other_data_and_settings_are_refused(tmp_path, options, message):
    run = new_run(tmp_path, steps=3)
    run.train(regression(run))
    content = run.state.read_bytes()
    with pytest.raises(ValueError) as error:
        new_run(tmp_path, **{"steps": 3, **options})
    advice = "; go on with the same value, or begin anew with another --out"
    assert str(error.value) == message.format(run.state) + advice
    assert run.state.read_bytes() == content


def test_what_does_not_change_the_weights_may_change(tmp_path):
    run = new_run(tmp_path, steps=3, minutes=-1, data_path="a")
    free = dict(minutes=9, save_every=1, log_every=2, ship=Path("x"), workers=3, draw_steps=0, parts=Path("p"))
    run = new_run(tmp_path, steps=3)
    run.train(regression(run))
    assert new_run(tmp_path, steps=3, **free).step == 3


def damaged(path, how):
    content, saved = path.read_bytes(), torch.load(path, weights_only=True)
    if how == "a byte changed":
        place = content.index(saved["ema"]["weight"].numpy().tobytes())
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    elif how == "no optimizer":
        torch.save({name: value for name, value in saved.items() if name != "optimizer"}, path)
    elif how == "other shapes":
        torch.save(saved | {"net": {"weight": torch.zeros(1)}}, path)
    elif how == "a list":
        torch.save([1, 2], path)
    elif how == "code":
        torch.save({"settings": Path("x")}, path)
    else:
        path.write_bytes({"cut off": content[: len(content) // 2], "empty": b"", "text": b"no state"}[how])


@pytest.mark.parametrize(
    "how", ["cut off", "empty", "text", "a byte changed", "no optimizer", "other shapes", "a list", "code"]
)
def test_a_damaged_state_is_refused_in_one_sentence(tmp_path, how):
    run = new_run(tmp_path, steps=3)
    run.train(regression(run))
    damaged(run.state, how)
    with pytest.raises(ValueError, match=r"state\.pt (is damaged|does not fit).*; delete it to begin again") as error:
        new_run(tmp_path, steps=3)
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


def test_a_state_without_settings_is_refused(tmp_path):
    """As the versions before wrote it."""
    torch.save(dict(step=3, minutes=0.0, seed=0, net={}), tmp_path / "state.pt")
    with pytest.raises(ValueError, match=r"written by an older version, without its data and settings.*--out"):
        new_run(tmp_path)


def test_a_digest_changes_with_every_number():
    a = torch.arange(6, dtype=torch.uint8)
    digests = {run_module.digest(t) for t in ([a], [a.flip(0)], [a, a], [a[:5]])}
    assert len(digests) == 4 and run_module.digest([a[:3], a[3:]]) == run_module.digest([a])


# ---- how it begins ----


@pytest.fixture
def started(monkeypatch):
    """The options that `new_accelerator` passed on; without an Accelerator, since a process has one precision only."""
    threads = []
    monkeypatch.setattr(command, "Accelerator", lambda **options: SimpleNamespace(num_processes=1, **options))
    monkeypatch.setattr(command, "PartialState", lambda cpu: SimpleNamespace(device=torch.device("cpu")))
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    with torch.random.fork_rng(devices=[]):
        yield threads


def test_a_resumed_run_keeps_its_precision(tmp_path, monkeypatch, started):
    monkeypatch.setenv("COURSE_PRECISION", "float32")
    run = new_run(tmp_path, precision="bf16", steps=2)  # in the settings; the linear model is trained as it is
    run.train(regression(run))
    args = arguments(tmp_path, precision="auto")
    assert command.new_accelerator(args).mixed_precision == args.precision == "bf16"
    fresh = arguments(tmp_path / "fresh", precision="auto")
    assert command.new_accelerator(fresh).mixed_precision == "no"
    monkeypatch.setenv("COURSE_PRECISION", "bfloat16")
    assert command.new_accelerator(arguments(tmp_path / "fresh", precision="auto")).mixed_precision == "bf16"
    assert command.new_accelerator(arguments(tmp_path / "fresh", precision="fp16")).mixed_precision == "fp16"


def test_each_of_several_processes_has_one_thread(tmp_path, monkeypatch, started):
    command.new_accelerator(arguments(tmp_path))
    assert started == []  # torch's own choice
    command.new_accelerator(arguments(tmp_path, threads=3))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(command, "Accelerator", lambda **options: SimpleNamespace(num_processes=2))
    command.new_accelerator(arguments(tmp_path))
    command.new_accelerator(arguments(tmp_path, threads=2))
    assert started == [3, 1, 2]


def test_processes_that_do_not_know_of_each_other_are_refused(tmp_path, monkeypatch, started):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="torchrun --nproc_per_node 2"):
        command.new_accelerator(arguments(tmp_path))


def test_a_start_without_provenance_is_refused(tmp_path, started):
    with pytest.raises(ValueError, match=r"^--start-from: expected a shipped model with provenance.json"):
        command.new_accelerator(arguments(tmp_path, start_from=tmp_path))


def test_where_a_run_started_from_is_kept_in_its_state(tmp_path):
    """The shipped folder may be written over by the run itself before it is resumed."""
    start = tmp_path / "shipped"
    start.mkdir()
    (start / "provenance.json").write_text('{"steps": 7}')
    run = new_run(tmp_path / "out", steps=2, start_from=start)
    run.train(regression(run))
    (start / "provenance.json").write_text('{"steps": 99}')
    again = new_run(tmp_path / "out", steps=2, start_from=start)
    assert again.facts()["started_from"] == {"steps": 7}


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (ValueError("--lr: two\nlines"), 2, "error: --lr: two lines\n"),
        (FileNotFoundError("no file"), 2, "error: no file\n"),
        (KeyboardInterrupt(), 130, "\nstopped; the state that was saved last is whole\n"),
    ],
)
def test_a_command_ends_with_one_sentence(capsys, error, code, said):
    def main():
        raise error

    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as end:
            command.command(main)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert end.value.code == code and capsys.readouterr().err == said


# ---- several processes ----


# Each process writes a file of its own: lines that two of them print may run into each other.
TWO = """
import signal, sys
sys.path[:0] = sys.argv[1:4]
from test_run import new_run, regression
from safetensors.torch import save_file
run = new_run(sys.argv[4])
count, index = run.accelerator.num_processes, run.accelerator.process_index
stop = lambda step: signal.raise_signal(signal.SIGTERM) if (index, step) == (1, 13) else None
try:
    run.train(regression(run, before=stop))
except SystemExit as end:
    save_file({"weight": run.net.weight.detach()}, f"{sys.argv[4]}-{index}-of-{count}-code-{end.code}.safetensors")
"""


def test_two_processes_train_one_model_and_stop_after_the_same_step(tmp_path):
    """A signal reaches one of them at step 13; they ask each other every tenth step."""
    (tmp_path / "two.py").write_text(TWO)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    folders = [str(REPO / "tests"), str(REPO), str(REPO / "training"), str(tmp_path / "run")]
    done = subprocess.run([*torchrun, str(tmp_path / "two.py"), *folders], capture_output=True, text=True,
                          timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"})  # fmt: skip
    assert done.returncode == 0, done.stderr
    first, second = (load_file(tmp_path / f"run-{k}-of-2-code-130.safetensors")["weight"] for k in range(2))
    assert torch.equal(first, second)
    assert torch.load(tmp_path / "run" / "state.pt", weights_only=True)["step"] == 20
    assert done.stderr.count("stopped after step 20, which is saved in") == 1
    alone = new_run(tmp_path / "alone", minutes=0)
    alone._any = lambda stop: stop and alone.step == 20
    alone.train(regression(alone))
    assert alone.step == 20 and not torch.equal(alone.net.weight, first)  # the other process had batches of its own


# ---- steps ----


def test_other_seeds_give_other_batches(tmp_path):
    a, b = (new_run(tmp_path / str(seed), seed=seed) for seed in (0, 1))
    draws = [run.generator(step).initial_seed() for run in (a, b) for step in (1, 2)]
    assert len(set(draws)) == 4 and a.generator(2).initial_seed() == draws[1]


def test_the_learning_rate_rises_stays_and_falls(tmp_path):
    run = new_run(tmp_path, lr=2.0, steps=1000, cooldown=0.3)
    curve = [run.learning_rate(step) for step in range(1001)]
    assert curve[1] == pytest.approx(0.02) and curve[50] == pytest.approx(1.0)
    assert curve[100:701] == [2.0] * 601
    assert curve[850] == pytest.approx(1.0) and curve[1000] == run.learning_rate(1200) == 0


def test_the_learning_rate_reaches_the_optimizer(tmp_path):
    run, rates = new_run(tmp_path, lr=1.0, steps=4), []
    run.train(regression(run, before=lambda step: rates.append(run.optimizer.param_groups[0]["lr"])))
    assert rates[1:] == pytest.approx([0.01, 0.02, 0.03]) and run.optimizer.param_groups[0]["lr"] == 0


def test_by_the_clock_the_learning_rate_falls_towards_the_minutes(tmp_path):
    run = new_run(tmp_path, lr=2.0, steps=10**6, cooldown=0.5, minutes=8)
    run.args.by_clock = True
    curve = []
    for run.minutes in (0, 3, 4, 6, 8, 9):
        curve.append(run.learning_rate(1000))
    assert curve == pytest.approx([2.0, 2.0, 2.0, 1.0, 0.0, 0.0])
    assert run.learning_rate(50) == 0.0  # whatever the step


def test_the_clock_saves_and_stops(tmp_path, monkeypatch):
    """20 seconds a step: with 1 minute it ends after the fourth step, and goes on from there another time."""
    now, saves = [0.0], []
    monkeypatch.setattr(run_module, "time", SimpleNamespace(time=lambda: now[0]))

    def pass_time(step):
        now[0] += 20

    for steps in (4, 8):
        run = new_run(tmp_path, minutes=1, save_every=0.6)
        run.train(regression(run, before=pass_time), on_save=lambda step: saves.append(step) or {"seen": step})
        assert run.step == state(run)["step"] == steps and run.minutes == pytest.approx(steps / 3)
    assert saves == [2, 4, 6, 8] and [step for step, _ in logged(run)] == [4, 8]  # a row at each end
    assert json.loads(run.log.read_text().splitlines()[-1]) == {"step": 8, "minutes": 2.67, "seen": 8}


def test_by_the_clock_the_minutes_are_those_of_the_whole_run(tmp_path, monkeypatch):
    """A resumed run must not train on at the rate 0; with more minutes it goes on."""
    now = [0.0]
    monkeypatch.setattr(run_module, "time", SimpleNamespace(time=lambda: now[0]))

    def pass_time(step):
        now[0] += 20

    for minutes, steps in ((1, 4), (1, 5), (2, 7)):  # a call takes one step at least
        run = new_run(tmp_path, minutes=minutes, by_clock=True)
        run.train(regression(run, before=pass_time))
        assert run.step == steps


@pytest.mark.parametrize("save_every", [NEVER, -1])
def test_a_loss_that_is_not_a_number_ends_the_run(tmp_path, save_every):
    """The saved state is the last good one, however often the run saves."""
    first = new_run(tmp_path, minutes=-1)
    first.train(regression(first))  # one step, and a state
    run = new_run(tmp_path, save_every=save_every)
    good = regression(run)
    with pytest.raises(FloatingPointError, match=r"not a number at step \d+; .*state\.pt holds .* smaller --lr"):
        run.train(lambda generator: good(generator) * (float("nan") if run.step >= 20 else 1.0))
    assert run.step <= 50 and state(run)["step"] < 20
    assert all(value.isfinite().all() for value in state(run)["net"].values())
