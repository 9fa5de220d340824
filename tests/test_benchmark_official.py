"""benchmarks/official.py: its commands are those of both sides, and its record and table say what was measured."""

import json
import time

import official
import official_commands
import pytest
import tables
import tables_speed
import torch
from safetensors.torch import save_file

from course_lib import personalize
from course_lib.cli.main import options
from course_lib.cli.methods import METHODS

NAMES = [plan.script.split("/")[1] for plan in official_commands.PLANS.values()]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def scripts(tmp_path):
    """A folder with four files that are named as diffusers' scripts."""
    folder = tmp_path / "scripts"
    folder.mkdir()
    for name in NAMES:
        (folder / name).write_text(f"# diffusers at commit {COMMIT}\n", encoding="utf-8")
    return folder


def given(command):
    """{"--steps": "2", "--flag": None}: the options of a command line."""
    after = [*command[1:], "--"]
    return {word: None if after[k + 1].startswith("--") else after[k + 1]
            for k, word in enumerate(after[:-1]) if word.startswith("--")}  # fmt: skip


def test_without_scripts_one_sentence_says_where_they_are(tmp_path, scripts):
    with pytest.raises(SystemExit, match=r"^--scripts: expected a clone .*/diffusers.*; nothing is downloaded"):
        official.main([])
    (scripts / NAMES[2]).unlink()
    with pytest.raises(SystemExit, match=f"scripts has no {NAMES[2]}$"):
        official.main(["--scripts", str(scripts)])


def test_scripts_are_found_in_a_clone_too(tmp_path):
    for plan in official_commands.PLANS.values():
        path = tmp_path / "examples" / plan.script
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    # A file of the library with the name of a script is none.
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "textual_inversion.py").touch()
    found = official_commands.scripts_in(tmp_path)
    assert {method: path.relative_to(tmp_path / "examples").as_posix() for method, path in found.items()} == {
        method: plan.script for method, plan in official_commands.PLANS.items()
    }


def test_a_script_is_known_by_checksum_and_commit(scripts, tmp_path):
    about = official_commands.version(scripts / NAMES[0])
    assert (about["script"], about["commit"], len(about["sha256"])) == (NAMES[0], COMMIT, 64)
    (tmp_path / "plain.py").write_text("print()\n", encoding="utf-8")
    assert official_commands.version(tmp_path / "plain.py")["commit"] == "unknown"


@pytest.mark.parametrize("method", official_commands.PLANS)
def test_equal_settings_are_equal_and_the_defaults_are_left_alone(method, scripts, tmp_path):
    args, plan = official.arguments(["--scripts", str(scripts), "--seed", "5"]), official_commands.PLANS[method]
    theirs = given(official_commands.their_command(args, method, tmp_path / "pictures", tmp_path / "run" / "out"))
    command = official_commands.our_command(args, method, "equal", tmp_path)
    ours = vars(options().parse_args(command[2:]))  # the command knows each of these options
    assert (int(theirs["--max_train_steps"]), float(theirs["--learning_rate"]), int(theirs["--train_batch_size"])) == (
        ours["steps"],
        ours["lr"],
        ours["batch_size"],
    )
    assert ours["seed"] == int(theirs["--seed"]) == 5 and ours["grid"] == 0 and "--lr_warmup_steps" in theirs
    pictures = ours["prior"] if method == "dreambooth" else ours["regularisation"]
    if plan.class_pictures:
        assert theirs["--with_prior_preservation"] is None and theirs["--num_class_images"] == "100"
        assert pictures in (100, ["100"])
    else:
        assert "--with_prior_preservation" not in theirs and pictures is None
    if method == "lora":
        assert ours["rank"] == int(theirs["--rank"]) == 4
    alone = given(official_commands.our_command(args, method, "default", tmp_path))
    assert not {"--steps", "--lr", "--batch-size", "--rank", "--prior", "--regularisation"} & alone.keys()
    assert alone["--token"] == METHODS[method].token and alone["--images"].endswith("mochi")


def test_times_and_targets():
    plan, fidelity = official_commands.PLANS["lora"], {"value": 0.6, "low": 0.5, "high": 0.7, "n": 23}
    found = {
        "official": dict(seconds=30.0, rounds=[30.0, 40.0, 20.0], subject_fidelity=fidelity),
        "equal": dict(seconds=30.0, rounds=[15.0, 40.0, 40.0]),
        "default": dict(seconds=10.0, rounds=[10.0] * 3, subject_fidelity=fidelity | {"value": 0.49}),
    }
    judged = official.judged("lora", found)
    assert judged["times_as_fast"] == {"equal": 1.0, "default": 3.0}
    assert judged["targets"] == {"half the time": True, f"<= {plan.target} s": True, "as alike": False}


@pytest.fixture
def in_this_process(monkeypatch):
    """Instead of other processes: the course's command runs here, and the script leaves a word as it would."""
    commands = []

    def watched(args, command, cache):
        start = time.perf_counter()
        if command[0] == "-m":
            assert personalize.main(command[2:]) == 0
        elif command[0] != "-c":
            assert sorted(path.name for path in (cache.parents[1] / "pictures").iterdir())[0] == "view_1.png"
            out = cache.parent / "out"
            out.mkdir(parents=True)
            save_file({"<v>": torch.ones(1, 128)}, out / "learned_embeds.safetensors")
        commands.append(command)
        return time.perf_counter() - start + 1e-3, 2**30

    monkeypatch.setattr(official, "watched", watched)
    return commands


@pytest.mark.slow
def test_a_record_is_written_gone_on_with_and_shown(scripts, tmp_path, monkeypatch, in_this_process):
    out = tmp_path / "official_scripts.json"
    line = ["--scripts", str(scripts), "--quick", "--methods", "textual_inversion", "--out", str(out)]
    official.main([*line, "--note", "Fake scripts"])
    record = json.loads(out.read_text(encoding="utf-8"))
    assert {"device", "date", "torch", "training_seed", "training_dtypes"} <= record.keys()
    assert [one["script"] for one in record["scripts"]] == NAMES
    row = record["rows"]["textual_inversion"]
    assert [row[side]["steps"] for side in official.SIDES] == [2, 2, 2]
    assert all(row[side]["subject_fidelity"]["n"] >= 20 for side in official.SIDES)
    assert row["official"]["subject_fidelity"] != row["equal"]["subject_fidelity"]
    trainings = len(in_this_process) - 1  # the first one only warms the disk
    assert trainings == 3
    for module in (tables, tables_speed):
        monkeypatch.setattr(module, "RESULTS", tmp_path)
    text = tables_speed.official()
    assert (
        "| Textual Inversion |" in text and "±" in text and COMMIT[:7] in text and "Fake scripts. Measured by" in text
    )
    monkeypatch.setattr(official.records, "start", lambda *args, **options: None)  # no fresh start: it is all there
    official.main([*line, "--note", "Fake scripts"])
    assert len(in_this_process) == trainings + 2
    with pytest.raises(SystemExit, match=r"another setting .note"):
        official.main([*line, "--note", "Others"])


def test_the_table_without_a_record_names_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr(tables_speed, "RESULTS", tmp_path)
    assert "benchmarks/official.py --scripts DIR" in tables_speed.official()
