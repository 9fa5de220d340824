"""The choice of the methods' settings: cheap among the good, on subjects that are not measured."""

import json

import methods
import pytest
import records
import tuning

from course_lib.cli.methods import METHODS
from course_lib.environment import RESULTS
from course_lib.personalization import lora, merge


def stops(*scores, batch=4, seconds=1.0):
    return [dict(seen=seen, steps=seen // batch, seconds=seconds * seen, score=score)
            for seen, score in zip(tuning.SEEN, scores, strict=False)]  # fmt: skip


def test_the_cheapest_setting_close_to_the_best_is_chosen():
    rows = {
        "lr 0.001, batch 4": {"tofu": stops(0.1, 0.30, 0.495), "tockle": stops(0.1, 0.5, 0.505)},
        "lr 0.002, batch 8": {"tofu": stops(0.2, 0.485, 0.3, batch=8), "tockle": stops(0.2, 0.485, 0.3, batch=8)},
    }
    assert tuning.chosen(rows) == dict(lr=0.002, batch_size=8, steps=40, score=0.485, seconds=320.0, best=0.5)
    rows["lr 0.001, batch 4"]["tofu"][2]["score"] = 0.6  # now twice as many pictures are worth it
    assert tuning.chosen(rows) == dict(lr=0.001, batch_size=4, steps=120, score=0.5525, seconds=480.0, best=0.5525)


def test_of_two_that_cost_the_same_the_better_is_chosen():
    rows = {f"lr {lr:g}, batch 4": {"tofu": stops(score)} for lr, score in ((0.001, 0.49), (0.002, 0.5), (0.004, 0.3))}
    assert tuning.chosen(rows)["lr"] == 0.002


def test_the_lowest_rank_close_to_the_best_and_the_largest_harmless_ridge_are_chosen():
    others = {
        "rank 2": {"tofu": stops(0.2), "tockle": stops(0.4)},
        "rank 8": {"tofu": stops(0.3), "tockle": stops(0.4)},
    }
    assert tuning.chosen_rank(0.34, others) == 4 and tuning.chosen_rank(0.32, others) == 8
    ridge = {"1e-06": (0.50, 0.020), "0.01": (0.49, 0.021), "0.1": (0.50, 0.025), "1": (0.45, 0.020)}
    record = {
        "ridge": {key: {"rabbit": {"score": score}, "clock": {"score": score}, "moved": moved}
                  for key, (score, moved) in ridge.items()},
        "joint": {"captions": {"lower_subject_fidelity": 0.2}, "several sizes": {"lower_subject_fidelity": 0.3}},
    }  # fmt: skip
    assert tuning.chosen_together(record) == dict(ridge=0.01, joint="several sizes")


def test_no_measured_subject_is_tuned_on_and_all_methods_have_one_budget():
    assert not set(tuning.TUNED_ON) & set(methods.SUBJECTS)
    assert len({len(rates) for rates in tuning.RATES.values()}) == 1 and set(tuning.RATES) <= set(methods.VARIANTS)
    assert all(seen % batch == 0 for seen in tuning.SEEN for batch in tuning.BATCHES)


def test_a_record_is_filled_once_and_keeps_what_others_wrote_meanwhile(tmp_path):
    path, setting = tmp_path / "record.json", dict(seed=0)
    fill = records.fill

    def measure(value):
        if value == 2:  # another process finishes first
            fill(path, setting, ("rows", "lora", "tofu"), lambda: "theirs")
        return value

    assert fill(path, setting, ("rows", "lora", "tockle"), measure, 2) == 2
    assert fill(path, setting, ("rows", "lora", "tockle"), measure, 3) == 2  # there already
    assert records.read(path, setting)["rows"] == {"lora": {"tofu": "theirs", "tockle": 2}}
    with pytest.raises(SystemExit, match="seed: 0 there, 1 here"):
        fill(path, dict(seed=1), ("rows", "lora", "tofu"), measure, 1)


def test_the_shipped_settings_are_the_chosen_ones():
    record = json.loads((RESULTS / "tuning.json").read_text())
    for method, rows in record["rows"].items():
        assert record["chosen"][method] == tuning.chosen(rows)
        used = METHODS[method].settings["toybox"]
        assert {key: record["chosen"][method][key] for key in ("lr", "batch_size", "steps")} == dict(
            lr=used.lr, batch_size=used.batch_size, steps=used.steps
        )
    assert set(record["chosen"]) == {*tuning.RATES, "rank", "together"}
    assert record["chosen"]["rank"] == lora.RANK["toybox"]
    assert record["chosen"]["together"] == tuning.chosen_together(record)
    assert record["chosen"]["together"]["ridge"] == merge.RIDGE
