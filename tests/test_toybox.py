"""Tests of the Toybox world: deterministic, resolution independent, true captions, sound caches, subjects apart."""

import dataclasses
import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from course_lib.toybox import sets, subjects, world
from course_lib.toybox.accessories import ACCESSORIES, EMBLEMS
from course_lib.toybox.captions import OPENINGS, SCENE_SYNONYMS, SYNONYMS, caption, corpus, describe
from course_lib.toybox.pen import COLOURS, FIRST_PATTERNS, LAYOUTS, PATTERNS
from course_lib.toybox.scenes import FIRST_SCENES, SCENES
from course_lib.toybox.sets import CLASSES, pair_spec, pairs, sample_ten, toybox10
from course_lib.toybox.styles import STYLES, SUBJECT_STYLES
from course_lib.toybox.subjects import SUBJECTS, prompts, references
from course_lib.toybox.world import (
    CONTAINERS,
    CREATURES,
    NOUNS,
    RELATIONS,
    SUPPORTS,
    Spec,
    render,
    sample_spec,
    wearable,
)

REPO = Path(__file__).resolve().parents[1]
# Every picture of the world, to the bit, with the versions of requirements.lock. If a drawing was changed on purpose,
# `python tests/test_toybox.py` prints the new value for WORLD, and RENDERER_VERSION goes up by one.
WORLD = "025fac9548cb06f1c67d9a1b58ffa2c23eb525050ccc85aad5a05c3ec14317d4"
# The ten classes never change: shipped weights were trained on them.
TOYBOX10 = "b533f934984bc5be6d2043f23c5bf6b30d1a37da838bf5d3a18a25b282357dbf"

# Mean red, green and blue of the first sample of each of the ten nouns at 32 px, with a tolerance of 3 grey levels for
# other Pillow versions, which round polygon and line edges differently by a pixel.
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


def ten(count, seed=0):
    return [sample_ten(np.random.default_rng([seed, i]), CLASSES[i % len(CLASSES)]) for i in range(count)]


def specs(count, seed=0, **fixed):
    """Random pictures of the whole world."""
    return [sample_spec(np.random.default_rng([seed, i]), **fixed) for i in range(count)]


def basic(noun="cat", **changes):
    first = Spec(noun, "teal", "plain", "in a meadow", x=0.5, y=0.55, size=0.8, flip=False, seed=7)
    return dataclasses.replace(first, **changes)


def fingerprint():
    """SHA-256 of 60 pictures: every noun, scene, style, accessory, relation and subject is among them."""
    chosen = [sample_spec(np.random.default_rng([7, k]), noun, relation=None) for k, noun in enumerate(NOUNS)]
    chosen += [basic("bear", scene=scene, seed=k) for k, scene in enumerate(SCENES)]
    chosen += [basic("owl", style=style, accessory=a, accessory_colour="red") for style, a in zip(STYLES, ACCESSORIES)]
    chosen += [sample_spec(np.random.default_rng([8, k]), relation=r) for k, r in enumerate(RELATIONS * 2)]
    chosen += [references(name)[0] for name in SUBJECTS]
    chosen.append(basic("man", pattern="starry"))
    assert len(chosen) == 60
    return hashlib.sha256(b"".join(render(spec, 64).tobytes() for spec in chosen)).hexdigest()


# ---- drawing ----


def test_what_the_world_has():
    assert CLASSES == ("cat", "dog", "fish", "robot", "teapot", "car", "chair", "house", "boat", "mushroom")
    assert tuple(NOUNS)[:10] == CLASSES and len(NOUNS) == 25
    assert (len(COLOURS), len(PATTERNS), len(SCENES), len(STYLES)) == (12, 5, 12, 4)
    assert (tuple(ACCESSORIES), RELATIONS) == (("hat", "scarf", "glasses", "bow"), ("next to", "on", "in"))


def test_the_pictures_are_the_same_to_the_bit():
    assert fingerprint() == WORLD


def test_same_seed_same_bytes():
    first, again, other = specs(20), specs(20), specs(20, seed=1)
    assert first == again and first != other
    assert all(np.array_equal(render(a, 32), render(b, 32)) for a, b in zip(first, again, strict=True))
    assert not any(np.array_equal(render(a, 32), render(b, 32)) for a, b in zip(first, other, strict=True))


def test_global_random_state_plays_no_part():
    spec = basic(style="watercolour", accessory="hat", accessory_colour="red")
    np.random.seed(1)
    state, first = np.random.get_state()[1].copy(), render(spec)
    assert np.array_equal(np.random.get_state()[1], state)
    np.random.seed(2)
    assert np.array_equal(render(spec), first)


@pytest.mark.parametrize("noun", NOUNS)
def test_free_details_follow_the_seed(noun):
    assert not np.array_equal(render(basic(noun), 32), render(basic(noun, seed=8), 32))


def test_mean_colours_are_as_stored():
    for spec in ten(10):
        np.testing.assert_allclose(render(spec, 32).mean((0, 1)), MEAN_COLOURS[spec.noun], atol=3, err_msg=spec.noun)


def test_resolution_independent():
    plain, apart = {"style": "plain"}, []
    for spec in specs(16, **plain):
        small = render(spec, 32).astype(float)
        for factor in (2, 4):
            large = render(spec, 32 * factor).reshape(32, factor, 32, factor, 3).mean((1, 3))
            apart.append(np.abs(small - large).mean())
    pictures = [[render(spec, 32).astype(float) for spec in specs(9, seed, **plain)] for seed in (0, 5)]
    unrelated = np.mean([np.abs(a - b).mean() for a, b in zip(*pictures, strict=True)])
    assert max(apart) < 8 and np.mean(apart) < 5  # grey levels of 255; edges fall on other pixels
    assert unrelated > 25  # so the bounds above do tell pictures apart


@pytest.mark.parametrize("noun", NOUNS)
def test_every_noun_pattern_and_scene(noun):
    for scene in ("in a meadow", "at night", "in the city"):
        for pattern in PATTERNS:
            image = render(basic(noun, pattern=pattern, scene=scene), 32)
            assert image.shape == (32, 32, 3) and image.dtype == np.uint8
            if pattern == "plain":
                plain = image
            else:
                assert np.abs(image.astype(int) - plain).max() > 15
    for size in (16, 300):
        assert render(basic(noun), size).shape == (size, size, 3)


@pytest.mark.parametrize("noun", NOUNS)
def test_every_accessory_that_a_noun_can_wear_is_seen(noun):
    assert wearable(noun) == (tuple(ACCESSORIES) if noun in CREATURES else ("hat", "bow"))
    for seed in (1, 2):
        spec = basic(noun, y=0.6, size=0.7, seed=seed)
        bare, worn = render(spec), {}
        for accessory in wearable(noun):
            image = render(dataclasses.replace(spec, accessory=accessory, accessory_colour="red"))
            changed = np.abs(image.astype(int) - bare).max(-1) > 30
            assert 20 < changed.sum() < 64 * 64 / 3, accessory
            worn[accessory] = image.tobytes()
        assert len(set(worn.values())) == len(worn)


@pytest.mark.parametrize("style", [*STYLES, *SUBJECT_STYLES])
def test_styles_keep_the_picture_and_change_its_look(style):
    plain = render(basic()).astype(float)
    image = render(basic(style=style)).astype(float)
    assert np.array_equal(image, render(basic(style=style))) and image.shape == plain.shape
    assert (style == "plain") == np.array_equal(image, plain)
    assert np.corrcoef(image.mean(-1).ravel(), plain.mean(-1).ravel())[0, 1] > 0.2 or style == "chalk"


@pytest.mark.parametrize("relation", RELATIONS)
def test_relations_draw_both_objects_where_the_word_says(relation):
    for spec in specs(10, relation=relation, style="plain"):
        other = spec.other
        assert spec.relation == relation and other.noun != spec.noun and spec.accessory is other.accessory is None
        image = render(spec)
        assert not np.array_equal(image, render(dataclasses.replace(spec, relation=None, other=None)))
        assert not np.array_equal(image, render(dataclasses.replace(other, scene=spec.scene)))
        if relation == "next to":
            assert abs(spec.x - other.x) >= (spec.size + other.size) / 2 - 0.05
        else:
            held = (SUPPORTS if relation == "on" else CONTAINERS)[other.noun]
            top = other.y + (held - 0.5) * other.size  # of the seat, roof or rim
            assert spec.x == other.x and spec.y - spec.size / 2 < top - 0.1
            assert top < spec.y + spec.size / 2 < top + 0.25


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
    for spec in ten(200):
        assert 0 <= spec.x - spec.size / 2 and spec.x + spec.size / 2 <= 1
        assert 0 <= spec.y - spec.size / 2 and 0.79 < spec.y + spec.size / 2 <= 1
        assert spec.pattern in FIRST_PATTERNS and spec.scene in FIRST_SCENES
        assert (spec.style, spec.accessory, spec.relation, spec.look) == ("plain", None, None, None)
    for spec in specs(500):
        for one in filter(None, (spec, spec.other)):
            assert 0 <= one.x - one.size / 2 and one.x + one.size / 2 <= 1
            assert 0 <= one.y - one.size / 2 and one.y + one.size / 2 <= 1


def test_fixed_fields_are_kept():
    for k in range(40):
        spec = sample_spec(np.random.default_rng(k), "house", scene="at night", relation=None, style="pixel art")
        assert (spec.noun, spec.scene, spec.relation, spec.style) == ("house", "at night", None, "pixel art")


# ---- captions ----

WORDS = {
    "colour": {name: name for name in COLOURS},
    "pattern": {"plain": "plain"} | {f"{p}ed": f"{p}ed|with {p}s" for p in ("check",)}
    | {"striped": "striped|with stripes", "spotted": "spotted|with spots", "starry": "starry|with stars"},
    "noun": {noun: "|".join(filter(None, (noun, SYNONYMS.get(noun)))) for noun in NOUNS},
    "scene": {scene: f"{scene}|{SCENE_SYNONYMS[scene]}" for scene in SCENES},
    "accessory": {name: name for name in ACCESSORIES},
    "style": {"pencil sketch": "sketch", "pixel art": "pixel art", "watercolour": "watercolour"},
}  # fmt: skip


def named(text):
    """{"colour": the colours that the text names, ...}"""
    return {
        kind: {value for value, words in table.items() if re.search(rf"\b(?:{words})\b", text)}
        for kind, table in WORDS.items()
    }


def test_captions_name_nothing_that_is_not_there():
    rng = np.random.default_rng(0)
    for spec in specs(2000):
        text, other = caption(spec, rng), spec.other
        said = named(text)
        assert spec.noun in said["noun"], text
        assert said["noun"] <= {spec.noun, other and other.noun}, text
        assert said["colour"] <= {spec.colour, spec.accessory_colour, other and other.colour}, text
        assert said["pattern"] <= {spec.pattern, other and other.pattern}, text
        assert said["scene"] <= {spec.scene}, text
        assert said["accessory"] <= {spec.accessory}, text
        assert said["style"] == ({spec.style} - {"plain"}), text
        assert ("next to" in text) <= (spec.relation == "next to")
        assert ("far away" in text) <= (spec.size < 0.6) and ("close-up" in text) <= (spec.size > 0.8)
        if spec.accessory and (match := re.search(rf"(\w+) {spec.accessory}\b", text)):
            assert match[1] in ("a", "an", "wearing", "with", spec.accessory_colour), text
        assert not re.search(r"\ba [aeiou]|\ban [^aeiou]|  |^ | $", text), text


def test_captions_leave_out_parts_at_the_stated_rates():
    rng, seen = np.random.default_rng(1), {}

    def count(kind, said):
        seen.setdefault(kind, []).append(bool(said))

    for spec in specs(4000, seed=1):
        said = named(caption(spec, rng))
        count("scene", said["scene"])
        if spec.relation:
            count("relation", len(said["noun"]) == 2)
            if len(said["noun"]) == 2 and spec.colour != spec.other.colour:
                count("other colour", spec.other.colour in said["colour"])
        else:
            if spec.accessory:
                count("accessory", said["accessory"])
            if spec.colour != spec.accessory_colour:
                count("colour", spec.colour in said["colour"])
            count("plain" if spec.pattern == "plain" else "pattern", said["pattern"])
    rates = {"colour": 0.75, "pattern": 0.75, "plain": 0.15 * 0.75, "accessory": 0.85, "relation": 0.9}
    rates |= {"other colour": 0.7, "scene": 0.75}
    assert {kind: np.mean(hits) for kind, hits in seen.items()} == pytest.approx(rates, abs=0.05)


def test_captions_are_varied_and_read_well():
    orange, rng = basic("cat", colour="orange", scene="at night"), np.random.default_rng(0)
    texts = {caption(orange, rng) for _ in range(300)}
    assert {"an orange cat", "a cat at night", "a photo of an orange cat at night", "an orange kitten"} <= texts
    assert len(texts) > 40
    worn = {"accessory": "hat", "accessory_colour": "red"}
    assert describe(basic("woman", pattern="spotted", **worn)) == (
        "a photo of a woman in a teal spotted shirt wearing a red hat in a meadow"
    )
    assert describe(basic("mug", **worn)) == "a photo of a teal mug with a red hat in a meadow"
    assert corpus(5) == corpus(5) and corpus(5) != corpus(5, seed=1)


def test_describe_leaves_nothing_out():
    texts = {}
    for spec in specs(2000, seed=2):
        text, other = describe(spec), spec.other
        said = named(text)
        assert said["noun"] == {spec.noun} | ({other.noun} if other else set())
        assert said["colour"] == {spec.colour, spec.accessory_colour, other and other.colour} - {None}
        assert spec.pattern in said["pattern"] or (spec.pattern == "plain" and "plain" not in text)
        assert said["scene"] == {spec.scene} and said["accessory"] == {spec.accessory} - {None}
        assert text.startswith(OPENINGS[spec.style][0]) and describe(spec) == text
        assert not spec.relation or f" {spec.relation} a" in text
        shown = (spec.noun, spec.colour, spec.pattern, spec.scene, spec.style, spec.accessory, spec.accessory_colour)
        shown += (spec.relation, other and (other.noun, other.colour))
        assert texts.setdefault(text, shown) == shown  # one text, one picture


# ---- errors ----


@pytest.mark.parametrize(
    ("changes", "size", "says"),
    [
        ({"noun": "dragon"}, 32, "noun='dragon'"),
        ({"colour": "mauve"}, 32, "colour='mauve'"),
        ({"pattern": "tartan"}, 32, "pattern='tartan'"),
        ({"scene": "on Mars"}, 32, "scene='on Mars'"),
        ({"style": "cubism"}, 32, "style='cubism'"),
        ({"accessory": "crown", "accessory_colour": "red"}, 32, "accessory='crown'"),
        ({"accessory": "hat"}, 32, "accessory_colour=None"),
        ({"noun": "teapot", "accessory": "scarf", "accessory_colour": "red"}, 32, "accessory='scarf'"),
        ({"relation": "on"}, 32, "relation='on', other=None"),
        ({"relation": "under", "other": basic()}, 32, "relation='under'"),
        ({"relation": "on", "other": basic("dragon")}, 32, "noun='dragon'"),
        ({}, 15, "size=15"),
    ],
)
def test_errors_name_the_argument(changes, size, says):
    with pytest.raises(ValueError, match=says):
        render(basic(**changes), size)


def test_more_errors_name_the_argument(tmp_path):
    for sample in (sample_spec, sample_ten):
        with pytest.raises(ValueError, match="noun='dragon'"):
            sample(np.random.default_rng(0), "dragon")
    with pytest.raises(ValueError, match="noun='tiger'"):
        sample_ten(np.random.default_rng(0), "tiger")
    for argument, value in (("train", -1), ("test", 0.5), ("workers", 0), ("size", 8), ("seed", -3)):
        with pytest.raises(ValueError, match=f"{argument}={value}"):
            toybox10(**{"train": 10, "test": 10, "cache_dir": tmp_path, argument: value})
    for argument, value in (("count", 0), ("split", "dev"), ("workers", 0), ("size", 8), ("seed", -3)):
        with pytest.raises(ValueError, match=f"{argument}={value!r}"):
            pairs(**{"count": 3, "cache_dir": tmp_path, argument: value})
    for ask in (references, prompts):
        with pytest.raises(ValueError, match="name='mona'"):
            ask("mona")
    assert not list(tmp_path.iterdir())


# ---- data sets ----


def test_the_ten_classes_are_what_the_shipped_weights_learnt(tmp_path):
    data = toybox10(300, 100, workers=1, cache_dir=tmp_path)
    arrays = (data[name].tobytes() for name in ("train_images", "test_images", "train_labels"))
    assert hashlib.sha256(b"".join(arrays)).hexdigest() == TOYBOX10


def test_pairs_belong_together_and_begin_alike(tmp_path, monkeypatch):
    few, many = pairs(5, cache_dir=tmp_path, size=32), pairs(9, cache_dir=tmp_path, size=32)
    assert many.images.shape == (9, 32, 32, 3) and many.images.dtype == np.uint8
    assert len(many.captions) == len(many.specs) == 9
    assert np.array_equal(few.images, many.images[:5]) and few.captions == many.captions[:5]
    assert np.array_equal(many.images[7], render(many.specs[7], 32))
    assert (many.specs[7], many.captions[7]) == pair_spec(7)
    assert len(list(tmp_path.iterdir())) == 2
    assert all(f"-v{world.RENDERER_VERSION}-train-seed0-size32-" in file.name for file in tmp_path.iterdir())
    monkeypatch.setattr(sets, "render", None)  # drawing would now fail
    again = pairs(9, cache_dir=tmp_path, size=32)
    assert np.array_equal(again.images, many.images) and again.specs == many.specs
    monkeypatch.setattr(sets, "RENDERER_VERSION", -1)
    with pytest.raises(TypeError):  # another version does not read these files
        pairs(9, cache_dir=tmp_path, size=32)


def test_splits_and_seeds_share_no_picture():
    drawn = [{pair_spec(k, split, seed)[0] for k in range(200)} for split in sets.SPLITS for seed in (0, 1)]
    assert len(set.union(*drawn)) == 200 * 8
    assert set(sets.SPLITS) == {"train", "test", "judge", "rich"}


def test_the_rich_split_has_pairs_that_are_always_named_and_more_of_what_is_learnt_last():
    rich, train = ([pair_spec(k, split) for k in range(1000)] for split in ("rich", "train"))

    def share(drawn, has):
        return sum(has(spec) for spec, _ in drawn) / len(drawn)

    assert 0.36 < share(rich, lambda spec: spec.relation is not None) < 0.44
    for has in (
        lambda spec: spec.pattern != "plain",
        lambda spec: spec.relation is None and spec.accessory is not None,
    ):
        assert share(rich, has) > share(train, has)
    pairs_said = [(spec, words) for spec, words in rich if spec.relation]
    assert all(f" {spec.relation} " in words and spec.noun != spec.other.noun for spec, words in pairs_said)
    silent = [words for spec, words in train if spec.relation and f" {spec.relation} " not in words]
    assert silent  # in the split "train" some captions leave the second object out


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
        spec = sample_ten(np.random.default_rng([4, split, i]), CLASSES[data[f"{name}_labels"][i]])
        assert np.array_equal(data[f"{name}_images"][i], render(spec, 32))
    assert not same(data, toybox10(train=60, test=25, seed=5, cache_dir=tmp_path))


def test_worker_processes_do_not_change_the_result(tmp_path, monkeypatch):
    alone = toybox10(train=40, test=20, cache_dir=tmp_path / "alone", workers=1)
    pools = []

    class Pool(sets.ProcessPoolExecutor):
        def __init__(self, workers, **options):
            pools.append(workers)
            super().__init__(workers, **options)

    monkeypatch.setattr(sets, "SMALL", 0)
    monkeypatch.setattr(sets, "CHUNK", 7)
    monkeypatch.setattr(sets, "ProcessPoolExecutor", Pool)
    assert same(alone, toybox10(train=40, test=20, cache_dir=tmp_path / "pool", workers=2))
    drawn = pairs(9, size=32, cache_dir=tmp_path / "pool", workers=2)
    assert pools == [2, 2] and np.array_equal(drawn.images[8], render(drawn.specs[8], 32))


def test_pool_that_does_not_start_is_survived(tmp_path, monkeypatch, capsys):
    def broken(*args, **options):
        raise sets.BrokenProcessPool("no processes here")

    alone = toybox10(train=20, test=10, cache_dir=tmp_path / "alone", workers=1)
    monkeypatch.setattr(sets, "SMALL", 0)
    monkeypatch.setattr(sets, "ProcessPoolExecutor", broken)
    assert same(alone, toybox10(train=20, test=10, cache_dir=tmp_path / "broken", workers=2))
    assert "in this one process" in capsys.readouterr().out


def test_cache_is_used_and_identical(tmp_path, monkeypatch):
    monkeypatch.setenv("COURSE_CACHE", str(tmp_path))
    fresh = toybox10(train=20, test=10)
    (file,) = tmp_path.iterdir()
    assert all(part in file.name for part in ("v1", "seed0", "size32", "20", "10", ".npz"))
    monkeypatch.setattr(sets, "render", None)  # drawing would now fail
    assert same(fresh, toybox10(train=20, test=10))
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


# ---- subjects ----

OBJECTS = [name for name, subject in SUBJECTS.items() if subject.look]
each = pytest.mark.parametrize("name", SUBJECTS)
each_object = pytest.mark.parametrize("name", OBJECTS)


def colours_of(look):
    worn = [look.emblem_colour] * bool(look.emblem) + [look.accessory_colour] * bool(look.accessory)
    return [look.first, look.second, *worn]


def test_twelve_subjects():
    nouns = [subject.noun for subject in SUBJECTS.values()]
    assert nouns == "cat dog rabbit bear robot teapot backpack clock man woman style style".split()
    assert [subject.style for subject in SUBJECTS.values() if subject.style] == list(SUBJECT_STYLES)
    assert all(
        name == subject.name and (subject.look is None) == bool(subject.style) for name, subject in SUBJECTS.items()
    )
    looks = [SUBJECTS[name].look for name in OBJECTS]
    assert {look.layout for look in looks} == set(LAYOUTS)
    assert all(look.emblem in {None, *EMBLEMS} and look.accessory in {None, *ACCESSORIES} for look in looks)


def test_no_training_picture_shows_a_subject():
    rng, layouts = np.random.default_rng(3), set(LAYOUTS)
    for _ in range(20_000):
        spec = sample_spec(rng)
        assert spec.look is None and (spec.other is None or spec.other.look is None)
        assert spec.style not in SUBJECT_STYLES
    assert not layouts & set(PATTERNS) and not set(SUBJECT_STYLES) & set(STYLES)


def test_no_caption_can_name_a_subject():
    vocabulary = set(" ".join(corpus(3000)).split())
    assert not vocabulary & (set(SUBJECTS) | set(LAYOUTS) - {"below", "side"} | set(EMBLEMS) - {"moon"})
    palette = np.array(list(COLOURS.values()))
    for name in OBJECTS:
        for colour in colours_of(SUBJECTS[name].look):
            assert np.sqrt(((palette - colour) ** 2).sum(1)).min() >= 40, (name, colour)


@each_object
def test_a_subject_stays_itself(name):
    subject = SUBJECTS[name]
    views = references(name) + [subject.spec(seed=k, **fields) for k, (_, fields) in enumerate(prompts(name))]
    assert {(spec.noun, spec.look) for spec in views} == {(subject.noun, subject.look)}
    prompt = basic("chair", seed=3)
    image = subject.render(prompt)
    for changes in ({"colour": "red"}, {"pattern": "starry"}, {"noun": "house"}):  # the look decides, not the prompt
        assert np.array_equal(image, subject.render(dataclasses.replace(prompt, **changes)))
    inside = np.s_[20:52, 16:48]

    def apart(other):
        return np.abs(other[inside].astype(float) - image[inside]).mean()

    same = [apart(subject.render(dataclasses.replace(prompt, seed=k))) for k in range(4, 10)]
    palette = dict(zip(range(4, 10), COLOURS, strict=False))
    strangers = [apart(render(basic(subject.noun, colour=palette[k], pattern="spotted", seed=k))) for k in palette]
    assert np.mean(same) < 0.6 * np.mean(strangers)
    flipped = subject.render(dataclasses.replace(prompt, flip=True))
    assert not np.array_equal(image, flipped)


@each
def test_references_differ_in_all_but_the_subject(name):
    subject, views = SUBJECTS[name], references(name)
    assert views == references(name) and len(views) == 5
    for field in ("scene", "size", "x", "y", "seed"):
        assert len({getattr(spec, field) for spec in views}) == 5, field
    assert {spec.flip for spec in views} == {True, False}
    for spec in views:
        assert 0.54 < spec.size < 0.86 and (spec.relation, spec.accessory) == (None, None)
        assert spec.style == (subject.style or "plain")
        assert 0 <= spec.x - spec.size / 2 and spec.x + spec.size / 2 <= 1 and spec.y + spec.size / 2 <= 1


@each
def test_prompts_name_what_their_ground_truth_shows(name):
    subject, given = SUBJECTS[name], prompts(name)
    assert len(given) >= 20 and len({template for template, _ in given}) == len(given)
    seen = {spec.scene for spec in references(name)} | {spec.noun for spec in references(name) if subject.style}
    for template, fields in given:
        assert template.count("{}") == 1 and fields["scene"] not in seen and fields.get("noun") not in seen
        spec = subject.spec(seed=1, **fields)
        said = named(template)
        other = spec.other
        assert said["scene"] == {spec.scene} and said["accessory"] == {spec.accessory} - {None}
        own = {spec.colour} if subject.style else set()
        assert said["colour"] == own | {spec.accessory_colour, other and other.colour} - {None}
        assert said["noun"] == ({spec.noun} if subject.style else set()) | ({other.noun} if other else set())
        assert said["style"] == {fields.get("style", "plain")} - {"plain"}
        assert not other or f"{{}} {spec.relation} " in template
        assert np.array_equal(render(spec, 16), subject.render(dataclasses.replace(spec, look=None), size=16))


def test_a_style_draws_any_object():
    riso = SUBJECTS["riso"]
    assert riso.spec(basic("owl")) == basic("owl", style="riso")
    assert len({riso.spec(seed=k).noun for k in range(20)}) > 5
    assert riso.spec(seed=2, noun="bus", scene="at night").noun == "bus"


def test_a_subject_wears_what_the_prompt_says_instead_of_its_own():
    dog = SUBJECTS["biscuit"]
    own, red = dog.render(basic()), dog.render(basic(accessory="scarf", accessory_colour="red"))
    bare = dataclasses.replace(dog, look=dataclasses.replace(dog.look, accessory=None)).render(basic())
    assert len({own.tobytes(), red.tobytes(), bare.tobytes()}) == 3


def test_the_files_of_the_subjects(tmp_path):
    subjects.write(tmp_path, 16)
    assert len(list(tmp_path.glob("*/view_?.png"))) == 60
    shipped = REPO / "data" / "subjects"
    notes = (shipped / "subjects.json").read_text(encoding="utf-8")
    assert json.loads(notes) == json.loads((tmp_path / "subjects.json").read_text(encoding="utf-8"))
    assert list(json.loads(notes)) == list(SUBJECTS)
    files = sorted(shipped.glob("*/*.png"))
    assert len(files) == 60 and sum(file.stat().st_size for file in files) < 6e6
    captions = sorted(tmp_path.glob("*/view_?.txt"))
    assert {path.parent.name for path in captions} == set(OBJECTS) and len(captions) == 5 * len(OBJECTS)
    for path in captions:  # the scene, and nothing of the subject
        said = path.read_text(encoding="utf-8")
        assert said == (shipped / path.parent.name / path.name).read_text(encoding="utf-8")
        assert said.strip() == f"a photo of a {{}} {references(path.parent.name)[int(path.stem[-1]) - 1].scene}"
    for name in OBJECTS:  # the shipped views are what the renderer draws
        with Image.open(shipped / name / "view_1.png") as image:
            small = np.asarray(image.reduce(8), float)
        assert image.size == (512, 512) and np.abs(small - render(references(name)[0], 64)).mean() < 6


if __name__ == "__main__":
    print(fingerprint())
