"""Records: rows of one setting never replace or join those of another."""

import json

import pytest
import records

SETTING = dict(images=4, dtype="bfloat16", weights={"unet": "abc"})


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "record.json"
    records.write(path, SETTING | {"rows": {"mochi": 1}})
    return path


def test_rows_of_the_same_setting_are_gone_on_with(path):
    assert records.start(path, SETTING, "rows")["rows"] == {"mochi": 1}
    assert "device" in records.read(path, SETTING) and records.read(path.with_name("new"), SETTING, "rows") == {
        **SETTING,
        "rows": {},
    }


@pytest.mark.parametrize(("other", "words"), [
    (dict(dtype="float32"), "dtype: bfloat16 there, float32 here"),
    (dict(weights={"unet": "xyz"}), "weights: other weights there, other weights here"),
    (dict(lr=1e-3), "lr: None there, 0.001 here"),
])  # fmt: skip
def test_rows_of_another_setting_are_refused_in_one_sentence(path, other, words):
    before = path.read_bytes()
    with pytest.raises(SystemExit) as caught:
        records.start(path, SETTING | other, "rows")
    assert words in str(caught.value) and "--fresh" in str(caught.value) and "\n" not in str(caught.value)
    assert path.read_bytes() == before


def test_fresh_replaces_them(path):
    assert records.start(path, SETTING | dict(dtype="float32"), "rows", fresh=True)["rows"] == {}
    assert not path.exists() and path.with_name(f"{path.name}.old").is_file()  # nothing measured is lost


def test_judging_again_does_not_change_the_day_of_the_measurement(path):
    old = json.loads(path.read_text()) | dict(date="2020-01-01", device="another machine")
    path.write_text(json.dumps(old))
    records.write(path, old | dict(claims={}), measured=False)
    kept = json.loads(path.read_text())
    assert (kept["date"], kept["device"], kept["claims"]) == ("2020-01-01", "another machine", {})
    records.write(path, old)
    assert json.loads(path.read_text())["date"] != "2020-01-01"
