"""benchmarks/personalization.py: both sides train the same thing, and its figures are of what they say."""

import dataclasses
import importlib.util
import json
import math
import time
from pathlib import Path

import pytest
import tables
import tables_speed
import torch
from safetensors.torch import save_file

from course_lib import personalize
from course_lib.personalization.finetune import PromptFeatures, denoising_loss, draw_step

REPO = Path(__file__).resolve().parents[1]


def script(name, folder="benchmarks"):
    spec = importlib.util.spec_from_file_location(f"{folder}_{name}", REPO / folder / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


bench = script("personalization")


@pytest.fixture
def both(tmp_path, request):
    """A recipe of the course and the plain training of the same method, on models of their own."""
    method, augment = request.param if isinstance(request.param, tuple) else (request.param, None)
    args = bench.arguments(["--seed", "3"])
    settings = dataclasses.replace(bench.own_settings(args, method), batch_size=4)
    ours, theirs, others = *(bench.base_model(args, torch.float32) for _ in range(2)), []
    if method == "dreambooth":
        others = bench.draw_prior(ours, tmp_path, 3, seed=0, steps=1)
    elif method == "custom-diffusion":
        others = bench.draw_regularisation(ours, tmp_path, 3, search=False)
    with bench.recipe(ours, method, settings, others, augment) as recipe:
        yield recipe, ours, bench.Plain(theirs, method, settings, others, augment)


@pytest.mark.parametrize("both", [*bench.METHODS, ("custom-diffusion", True)], indirect=True, ids=str)
def test_both_ways_have_the_same_draws_loss_and_gradient(both):
    recipe, sd, plain = both
    draws, theirs = draw_step(sd, recipe, 4, step=1), plain.batch(1)
    for term, views in zip(recipe.terms, plain.terms, strict=True):
        assert [view.prompts for view in views] == term.examples.prompts
    for ours, other in zip(draws, theirs, strict=True):
        assert ours.prompts == other["prompts"]
        for key in ("t", "eps", "mask"):
            torch.testing.assert_close(other[key], getattr(ours, key), rtol=0, atol=0)
        torch.testing.assert_close(other["z0"], ours.z0, rtol=1e-3, atol=1e-3)
    loss, plain_loss = (
        denoising_loss(sd, draws, PromptFeatures(sd, recipe), plain.settings.weighting),
        plain.loss(theirs),
    )
    torch.testing.assert_close(plain_loss, loss, rtol=1e-3, atol=0)
    loss.backward()
    plain_loss.backward()
    assert plain.params.keys() == recipe.params.keys()
    pairs = [(recipe.params[name].grad, plain.params[name].grad) for name in plain.params]
    ours = torch.cat([grad.flatten() for grad, _ in pairs])
    others = torch.cat([other[-len(grad) :].flatten() for grad, other in pairs])  # of the matrix, the new row
    assert ours.norm() > 0 and torch.cosine_similarity(ours, others, dim=0) > 0.99


@pytest.mark.parametrize("both", ["textual-inversion"], indirect=True)
def test_the_plain_way_trains_the_whole_matrix_and_puts_the_other_rows_back(both):
    *_, plain = both
    before, pulled = plain.before.clone(), []
    plain.optimizer.register_step_post_hook(lambda *_: pulled.append(plain.table.detach().clone()))
    for _ in range(2):
        assert math.isfinite(plain())
    assert not torch.equal(pulled[0][:-1], before[:-1]), "nothing was there to be put back"
    torch.testing.assert_close(plain.table[:-1].detach(), before[:-1], rtol=0, atol=0)
    assert not torch.equal(plain.table[-1], before[-1])


def test_quick_steps_give_finite_ratios_and_a_table(tmp_path, monkeypatch):
    out = tmp_path / "benchmark_personalization.json"
    bench.main(["--quick", "--only", "step", "--methods", "textual-inversion", "lora", "--out", str(out)])
    result = json.loads(out.read_text(encoding="utf-8"))
    assert [row["method"] for row in result["rows"]] == ["textual-inversion", "lora"]
    assert all(math.isfinite(row["ratio"]) and row["ratio"] > 0 for row in result["rows"])
    assert {"seed", "device", "date", "torch"} <= result.keys()
    for module in (tables, tables_speed):
        monkeypatch.setattr(module, "RESULTS", tmp_path)
    assert "| LoRA: a step, batch 1 |" in tables_speed.personalization_speed()


def test_rows_are_on_disk_before_another_method_fails(tmp_path, monkeypatch):
    out, options = tmp_path / "steps.json", ["--quick", "--only", "step", "--methods", "lora", "dreambooth"]
    monkeypatch.setattr(bench, "draw_prior", lambda *args, **options: 1 / 0)  # which LoRA does not need
    with pytest.raises(ZeroDivisionError):
        bench.main([*options, "--out", str(out)])
    assert [row["method"] for row in json.loads(out.read_text())["rows"]] == ["lora"]
    with pytest.raises(SystemExit, match="dreambooth"):
        bench.main([*options, "--out", str(out), "--keep-going"])
    result = json.loads(out.read_text())
    (row,) = result["rows"]
    assert "ZeroDivisionError" in result["errors"][0]
    assert row["losses"]["plain way"] == pytest.approx(row["losses"]["course_lib"], rel=0.02)
    with pytest.raises(SystemExit, match="not begun"):
        bench.main([*options, "--out", str(out), "--minutes", "-1"])


def test_end_to_end_both_save_the_same_tensors(tmp_path, monkeypatch):
    commands = []

    def here(args, command, cache):
        """The same command lines, in this process: two starts of Python less."""
        commands.append(command)
        start = time.perf_counter()
        if command[0] == "-m":
            assert personalize.main(command[2:]) == 0
        else:
            bench.main(command[1:])
        return time.perf_counter() - start, 2**30

    monkeypatch.setattr(bench, "watched", here)
    args = bench.arguments(["--quick"])
    row = bench.end_row(args, "textual-inversion", "toybox", tmp_path)
    assert len(commands) == 2 and math.isfinite(row["ratio"])
    assert row["peak_gib"] == {"course_lib": 1.0, "plain way": 1.0}
    assert "targets" not in row, "a training cut short reaches no target"


def test_other_tensors_are_refused(tmp_path):
    save_file({"tokens": torch.zeros(1, 3)}, tmp_path / "a.safetensors")
    bench.check_same(tmp_path / "a.safetensors", {"tokens": torch.Size([1, 3])})
    with pytest.raises(SystemExit, match="other tensors"):
        bench.check_same(tmp_path / "a.safetensors", {"tokens": torch.Size([2, 3])})


def test_memory_is_that_of_the_child_alone(tmp_path):
    args = bench.arguments([])
    holds = "held = b'x' * (100 << 20); import time; time.sleep(0.2)"
    seconds, peak = bench.watched(args, ["-c", holds], tmp_path)
    assert seconds > 0.2
    if peak is not None:
        assert 100 * 2**20 < peak < 300 * 2**20
    with pytest.raises(SystemExit, match="exit code 3"):
        bench.watched(args, ["-c", "raise SystemExit(3)"], tmp_path)


def test_a_ratio_is_the_plain_time_by_ours():
    row = bench.compared({"course_lib": [1.0, 2.0, 1.0], "plain way": [3.0, 4.0, 2.0]}, "seconds", 1)
    assert row["ratio"] == 2.0 and row["seconds"] == {"course_lib": 1.0, "plain way": 3.0}
