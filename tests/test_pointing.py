"""The pointing score: exact areas by hand, and masks that hold what they should."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from course_lib.editing.attention import by_word, relative_maps
from course_lib.environment import CHECKPOINTS
from course_lib.evaluation import pointing
from course_lib.latent import stable_diffusion, text
from course_lib.toybox.captions import describe
from course_lib.toybox.world import coverage, render, sample_spec

close = torch.testing.assert_close


@pytest.fixture(scope="module")
def sd():
    if not (CHECKPOINTS / "toybox-sd").is_dir():
        pytest.skip("data/checkpoints/toybox-sd is not there yet")
    return stable_diffusion.load("toybox", "cpu")


def a_spec(**fixed):
    values = dict(relation=None, style="plain", scene="in a room", accessory="hat", accessory_colour="red",
                  colour="teal", pattern="striped", x=0.5, y=0.58, size=0.6)  # fmt: skip
    return sample_spec(np.random.default_rng(0), "cat", **values | fixed)


def test_the_area_counts_pairs_of_pixels():
    """Of the pairs (inside, outside): right, wrong, and ties that count half."""
    generator = torch.Generator().manual_seed(0)
    scores, mask = torch.randint(0, 4, (6, 6), generator=generator), torch.rand(6, 6, generator=generator) < 0.3
    inside, outside = scores[mask][:, None], scores[~mask]
    expected = ((inside > outside).float() + 0.5 * (inside == outside)).mean().item()
    assert pointing.area(scores, mask) == pytest.approx(expected)
    assert pointing.area(-scores, mask) == pytest.approx(1 - expected)
    assert pointing.area(torch.ones(6, 6), mask) == 0.5
    assert pointing.area(mask.float(), mask) == 1


def test_a_smaller_map_is_enlarged_to_the_mask():
    corner = torch.zeros(4, 4)
    corner[0, 3] = 1
    mask = torch.zeros(64, 64, dtype=torch.bool)
    mask[:16, 48:] = True
    assert pointing.area(corner, mask) > 0.95 and pointing.area(corner, mask.T) < 0.5


@pytest.mark.parametrize("value", [True, False])
def test_a_mask_needs_both_sides(value):
    with pytest.raises(ValueError, match=r"^mask: expected pixels inside and outside, got (0|16) of 16 inside"):
        pointing.area(torch.rand(4, 4), torch.full((4, 4), value))


def test_the_object_covers_the_same_pixels_before_every_scene():
    """Where it covers all, scenes do not show; where it covers nothing, only the shadow differs from an empty scene."""
    spec = a_spec()
    cover = coverage(spec)
    assert cover.min() == 0 and cover.max() == 1 and 0.1 < cover.mean() < 0.6
    room, empty = (render(one, 64).astype(int) for one in (spec, replace(spec, x=9.0)))
    differs = np.abs(room - empty).max(axis=2)
    assert (differs[cover == 1] > 0).mean() > 0.97
    above_the_ground = (cover == 0) & (np.arange(64)[:, None] < 40)
    assert differs[above_the_ground].max() <= 2


def test_masks_split_the_picture_and_the_hat_is_on_top():
    masks = pointing.masks(a_spec())
    parts = torch.stack([masks["noun"], masks["accessory"], masks["scene"]])
    assert (parts.sum(0) == 1).all() and (parts.flatten(1).sum(1) > 50).all()
    rows = torch.arange(64.0)[:, None].expand(64, 64)
    assert rows[masks["accessory"]].mean() + 10 < rows[masks["noun"]].mean()
    assert not pointing.masks(a_spec(accessory=None, accessory_colour=None))["accessory"].any()


def test_each_kind_of_word_is_found_at_its_own_place(sd):
    spec = a_spec(accessory_colour="teal")
    words = text.words(sd.tokenizer, describe(spec))
    assert " ".join(word for word, _ in words[4:]) == "teal striped cat wearing a teal hat in a room"
    expected = dict(zip(pointing.KINDS, (words[k][1] for k in (4, 5, 6, 9, 10, 13))))
    assert pointing.places(sd.tokenizer, spec) == expected
    plain = a_spec(pattern="plain", accessory=None, accessory_colour=None)
    assert list(pointing.places(sd.tokenizer, plain)) == ["colour", "noun", "scene"]
    person = replace(spec, noun="man")
    assert pointing.places(sd.tokenizer, person)["noun"] < pointing.places(sd.tokenizer, person)["colour"]


def test_relative_maps_drop_what_all_words_share():
    generator = torch.Generator().manual_seed(0)
    outline, own = torch.rand(4, 4, generator=generator) + 0.1, torch.ones(2, 4, 4)
    own[1, 0, 0] = 3.0
    maps = relative_maps({"a": 50 * outline, "hat": 0.1 * outline * own[1]})
    ratio = maps["hat"] / maps["a"]
    close(ratio[0, 0] / ratio[1, 1], torch.tensor(3.0))
    close((maps["a"] + maps["hat"]) / 2, torch.ones(4, 4))
    assert maps["hat"].argmax() == 0 and (maps["hat"].flatten()[1:] < 1).all()


@torch.no_grad()
def test_maps_of_a_rendering_are_those_of_one_pass(sd):
    specs = [a_spec(), a_spec(colour="red")]
    maps = pointing.noised_maps(sd, specs, 300, sides=(16,))[16]
    close(maps.sum(1), torch.ones(2, 16, 16))
    close(maps, pointing.noised_maps(sd, specs, 300, sides=(16,))[16])
    assert not torch.allclose(maps, pointing.noised_maps(sd, specs, 900, sides=(16,))[16], atol=1e-4)
    at = pointing.places(sd.tokenizer, specs[0])["noun"]
    plain = pointing.kind_maps(maps[0], sd.tokenizer, specs[0], relative=False)
    close(plain["noun"], maps[0, at].sum(0))
    assert set(pointing.kind_maps(maps[0], sd.tokenizer, specs[0])) == set(pointing.KINDS)


def test_every_place_of_a_word_counts_once_in_relative_maps():
    """Of "a", "hat", "a": the mean over words is over three maps, and each map over its own mean."""
    maps = torch.rand(4, 4, 4, generator=torch.Generator().manual_seed(0)) + 0.1
    found = relative_maps(by_word(maps, [("a", [0]), ("hat", [1, 2]), ("a", [3])]))
    assert list(found) == ["a", "hat", "a (2)"]
    first, hat, second = (m / m.mean() for m in (maps[0], maps[1] + maps[2], maps[3]))
    close(found["hat"], 3 * hat / (first + hat + second))
    close(found["a (2)"], 3 * second / (first + hat + second))


def test_the_other_words_are_those_that_do_not_name_the_mask(sd):
    """The map of "in" alone lies on the hat: perfect there, below chance for the cat."""
    spec = a_spec()
    words, mask = text.words(sd.tokenizer, describe(spec)), pointing.masks(spec)["accessory"]
    maps = torch.ones(32, 64, 64)
    (place,) = next(at for word, at in words if word == "in")
    maps[place] += mask
    found = pointing.other_areas(maps, sd.tokenizer, spec)
    assert [len(found[kind]) for kind in ("noun", "accessory", "scene")] == [len(words) - k for k in (3, 2, 1)]
    assert max(found["accessory"]) == 1 and min(found["noun"]) < 0.5 < max(found["noun"])
    assert found["colour"] == found["noun"] and found["accessory_colour"] == found["accessory"]
