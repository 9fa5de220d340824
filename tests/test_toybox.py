"""Tests of the Toybox renderer: deterministic, resolution independent, true captions, a sound cache."""

import dataclasses
import re

import numpy as np
import pytest

from course_lib.data import toybox
from course_lib.data.toybox import CLASSES, Spec, caption, render, sample_spec, toybox10
from course_lib.data.toybox_pen import COLOURS, PATTERNS
from course_lib.data.toybox_scenes import SCENES

# Mean red, green and blue of the first sample of each noun at 32 px. We compare these with a tolerance of 3 grey levels
# and not a hash of the pixels, because Pillow versions round polygon and line edges differently by a pixel; a change
# of colour, place or shape moves the mean by more than that.
MEAN_COLOURS = {
    "cat": (114.0, 124.9, 100.3),
    "dog": (109.7, 125.5, 87.5),
    "fish": (177.5, 199.2, 200.0),
    "robot": (177.6, 136.1, 111.7),
    "teapot": (99.6, 142.7, 179.2),
    "car": (171.6, 171.3, 166.0),
    "chair": (68.8, 70.8, 114.8),
    "house": (141.0, 160.9, 149.9),
    "boat": (141.7, 168.2, 169.8),
    "mushroom": (191.7, 175.0, 142.5),
}


def specs(count, seed=0):
    return [sample_spec(np.random.default_rng([seed, i]), CLASSES[i % len(CLASSES)]) for i in range(count)]


def test_ten_nouns_in_label_order():
    assert CLASSES == ("cat", "dog", "fish", "robot", "teapot", "car", "chair", "house", "boat", "mushroom")
    assert (len(COLOURS), len(PATTERNS), len(SCENES)) == (12, 3, 8)


def test_same_seed_same_bytes():
    first, again, other = specs(20), specs(20), specs(20, seed=1)
    assert first == again and first != other
    assert all(np.array_equal(render(a), render(b)) for a, b in zip(first, again, strict=True))
    assert not any(np.array_equal(render(a), render(b)) for a, b in zip(first, other, strict=True))


def test_global_random_state_plays_no_part():
    spec = specs(1)[0]
    np.random.seed(1)
    state, first = np.random.get_state()[1].copy(), render(spec)
    assert np.array_equal(np.random.get_state()[1], state)
    np.random.seed(2)
    assert np.array_equal(render(spec), first)


def test_free_details_follow_the_seed():
    spec = specs(1)[0]
    assert not np.array_equal(render(spec), render(dataclasses.replace(spec, seed=spec.seed + 1)))


def test_mean_colours_are_as_stored():
    for spec in specs(10):
        np.testing.assert_allclose(render(spec, 32).mean((0, 1)), MEAN_COLOURS[spec.noun], atol=3, err_msg=spec.noun)


def test_resolution_independent():
    apart = []
    for spec in specs(20):
        small = render(spec, 32).astype(float)
        for factor in (2, 4):
            large = render(spec, 32 * factor).reshape(32, factor, 32, factor, 3).mean((1, 3))
            apart.append(np.abs(small - large).mean())
    unrelated = np.mean(
        [np.abs(render(a, 32) - render(b, 32).astype(float)).mean() for a, b in zip(specs(9), specs(9, 5), strict=True)]
    )
    assert max(apart) < 7 and np.mean(apart) < 4.5  # grey levels of 255; edges fall on other pixels
    assert unrelated > 25  # so the bounds above do tell pictures apart


@pytest.mark.parametrize("noun", CLASSES)
def test_every_noun_pattern_and_size(noun):
    for pattern in PATTERNS:
        spec = Spec(noun, "teal", pattern, "in a meadow", x=0.5, y=0.55, size=0.8, flip=False, seed=7)
        for size in (16, 32, 512):
            image = render(spec, size)
            assert image.shape == (size, size, 3) and image.dtype == np.uint8
        if pattern != "plain":
            assert np.any(image != render(dataclasses.replace(spec, pattern="plain"), 512))


@pytest.mark.parametrize("scene", SCENES)
@pytest.mark.parametrize("colour", COLOURS)
def test_object_stands_out_from_its_scene(scene, colour):
    """The object's colour is seen on its body, and its outline separates it from the scene."""
    spec = Spec("mushroom", colour, "plain", scene, x=0.5, y=0.55, size=0.8, flip=False, seed=3)
    image = render(spec, 64).astype(float)
    near = np.abs(image - COLOURS[colour]).max(-1) < 45
    assert near[10:36, 16:48].mean() > 0.4
    column = image[2:30, 32].mean(-1)  # from the sky down into the cap, through the outline and, at night, the rim
    assert np.abs(np.diff(column)).max() > 25


def test_size_position_and_flip_move_the_object():
    spec = Spec("car", "red", "plain", "in the snow", x=0.5, y=0.6, size=0.5, flip=False, seed=3)

    def red(**changes):
        image = render(dataclasses.replace(spec, **changes), 64).astype(int)
        return (image[..., 0] - image[..., 1] > 90).nonzero()

    rows, columns = red()
    assert red(x=0.7)[1].mean() - columns.mean() == pytest.approx(0.2 * 64, abs=1.5)
    assert rows.mean() - red(y=0.4)[0].mean() == pytest.approx(0.2 * 64, abs=1.5)
    assert len(red(size=0.8)[0]) > 1.8 * len(rows)
    for flip, left in ((False, False), (True, True)):  # the headlight, the only yellow thing, is in front
        image = render(dataclasses.replace(spec, flip=flip), 64).astype(int)
        lamp = ((image[..., 0] - image[..., 2] > 60) & (image[..., 0] - image[..., 1] < 45)).nonzero()[1]
        assert len(lamp) and (lamp.mean() < 32) == left


def test_sampled_objects_stay_inside_the_picture():
    for spec in specs(200):
        assert 0 <= spec.x - spec.size / 2 and spec.x + spec.size / 2 <= 1
        assert 0 <= spec.y - spec.size / 2 and 0.79 < spec.y + spec.size / 2 <= 1


def test_captions_are_true_and_varied():
    rng, seen = np.random.default_rng(0), {"colour": set(), "pattern": set(), "scene": set(), "opening": set()}
    for spec in specs(300):
        text = caption(spec, rng)
        opening, rest = re.fullmatch(r"((?:a photo of |a picture of )?)(.*)", text).groups()
        words = rest.removesuffix(" " + spec.scene).split()
        assert words[-1] == spec.noun
        assert words[0] == ("an" if words[1][0] in "aeiou" else "a")
        assert words[1:-1] in ([], [spec.colour], [spec.pattern], [spec.colour, spec.pattern])
        assert "plain" not in words
        seen["opening"].add(opening)
        seen["scene"].add(rest.endswith(spec.scene))
        seen["colour"].add(spec.colour in words)
        seen["pattern"].add(spec.pattern in words)
    assert len(seen.pop("opening")) == 3
    assert all(kept == {True, False} for kept in seen.values())


def test_caption_article():
    spec = Spec("cat", "orange", "plain", "at night", 0.5, 0.5, 0.8, False, 0)
    texts = {caption(spec, np.random.default_rng(i)) for i in range(100)}
    assert {"an orange cat", "a cat", "a photo of an orange cat at night"} <= texts
    assert not any("a orange" in text for text in texts)


@pytest.mark.parametrize(
    ("changes", "size", "named"),
    [
        ({"noun": "dragon"}, 32, "noun='dragon'"),
        ({"colour": "mauve"}, 32, "colour='mauve'"),
        ({"pattern": "tartan"}, 32, "pattern='tartan'"),
        ({"scene": "on the moon"}, 32, "scene='on the moon'"),
        ({}, 15, "size=15"),
    ],
)
def test_errors_name_the_argument(changes, size, named):
    with pytest.raises(ValueError, match=named):
        render(dataclasses.replace(specs(1)[0], **changes), size)


def test_more_errors_name_the_argument(tmp_path):
    with pytest.raises(ValueError, match="noun='dragon'"):
        sample_spec(np.random.default_rng(0), "dragon")
    for argument, value in (("train", -1), ("test", 0.5), ("workers", 0), ("size", 8), ("seed", -3)):
        with pytest.raises(ValueError, match=f"{argument}={value}"):
            toybox10(**{"train": 10, "test": 10, "cache_dir": tmp_path, argument: value})
    assert not list(tmp_path.iterdir())


def same(a, b):
    return list(a) == list(b) and all(np.array_equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


def test_data_set_is_balanced_and_each_picture_stands_alone(tmp_path):
    data = toybox10(train=60, test=25, seed=4, cache_dir=tmp_path)
    assert list(data) == ["train_images", "train_labels", "test_images", "test_labels"]
    assert data["train_images"].shape == (60, 32, 32, 3) and data["test_labels"].shape == (25,)
    assert all(array.dtype == np.uint8 for array in data.values())
    assert np.bincount(data["train_labels"], minlength=10).tolist() == [6] * 10
    assert set(np.bincount(data["test_labels"], minlength=10)) == {2, 3}
    assert data["train_labels"].tolist() != [i % 10 for i in range(60)]  # shuffled
    for split, name, i in ((0, "train", 0), (0, "train", 41), (1, "test", 13)):
        spec = sample_spec(np.random.default_rng([4, split, i]), CLASSES[data[f"{name}_labels"][i]])
        assert np.array_equal(data[f"{name}_images"][i], render(spec, 32))
    assert not same(data, toybox10(train=60, test=25, seed=5, cache_dir=tmp_path))


def test_worker_processes_do_not_change_the_result(tmp_path, monkeypatch):
    alone = toybox10(train=40, test=20, cache_dir=tmp_path / "alone", workers=1)
    pools = []

    class Pool(toybox.ProcessPoolExecutor):
        def __init__(self, workers, **options):
            pools.append(workers)
            super().__init__(workers, **options)

    monkeypatch.setattr(toybox, "SMALL", 0)
    monkeypatch.setattr(toybox, "CHUNK", 7)
    monkeypatch.setattr(toybox, "ProcessPoolExecutor", Pool)
    assert same(alone, toybox10(train=40, test=20, cache_dir=tmp_path / "pool", workers=2))
    assert pools == [2]


def test_pool_that_does_not_start_is_survived(tmp_path, monkeypatch, capsys):
    def broken(*args, **options):
        raise toybox.BrokenProcessPool("no processes here")

    alone = toybox10(train=20, test=10, cache_dir=tmp_path / "alone", workers=1)
    monkeypatch.setattr(toybox, "SMALL", 0)
    monkeypatch.setattr(toybox, "ProcessPoolExecutor", broken)
    assert same(alone, toybox10(train=20, test=10, cache_dir=tmp_path / "broken", workers=2))
    assert "in this one process" in capsys.readouterr().out


def test_cache_is_used_and_identical(tmp_path, monkeypatch):
    monkeypatch.setenv("COURSE_CACHE", str(tmp_path))
    fresh = toybox10(train=20, test=10)
    (file,) = tmp_path.iterdir()
    assert all(part in file.name for part in (f"v{toybox.RENDERER_VERSION}", "seed0", "size32", "20", "10", ".npz"))
    monkeypatch.setattr(toybox, "render", None)  # drawing would now fail
    assert same(fresh, toybox10(train=20, test=10))
    monkeypatch.setattr(toybox, "RENDERER_VERSION", -1)
    with pytest.raises(TypeError):  # another version does not read this file
        toybox10(train=20, test=10)
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b[:5000] + b"x" + b[5001:]])
def test_damaged_cache_is_drawn_again(tmp_path, capsys, damage):
    fresh = toybox10(train=20, test=10, cache_dir=tmp_path)
    (file,) = tmp_path.iterdir()
    assert capsys.readouterr().out == ""
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    assert same(fresh, toybox10(train=20, test=10, cache_dir=tmp_path))
    assert "drawn again" in capsys.readouterr().out
    assert same(fresh, toybox10(train=20, test=10, cache_dir=tmp_path))
    assert capsys.readouterr().out == "" and list(tmp_path.iterdir()) == [file]


def test_failed_writing_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(*args, **arrays):
        raise OSError("disk full")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(OSError, match="disk full"):
        toybox10(train=10, test=0, cache_dir=tmp_path)
    assert not list(tmp_path.iterdir())
