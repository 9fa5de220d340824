"""The measurement of claim C4: same pictures and network in three spaces, a clock, scores that tell pictures apart."""

import json
import sys
import time
from argparse import Namespace

import numpy as np
import pytest
import spaces as measurement
import torch
from PIL import Image

from course_lib.diffusion import ddpm
from course_lib.environment import RESULTS, from_uint8
from course_lib.evaluation.statistics import Estimate
from course_lib.latent.stable_diffusion import load
from course_lib.toybox import sets


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    data = sets.toybox10(120, 60, size=64, cache_dir=tmp_path_factory.mktemp("cache"), workers=1)
    images = torch.from_numpy(data["train_images"]).permute(0, 3, 1, 2).contiguous()
    sd = load("toybox", "cpu", torch.float32)
    return sd, images, torch.from_numpy(data["train_labels"]).long(), measurement.spaces(sd, images), data


def test_each_space_holds_the_same_pictures(world):
    sd, images, _, where, _ = world
    x = from_uint8(images[:4])
    assert list(where) == ["pixels", "folded by 2", "folded by 4", "latents"]
    for name in ("pixels", "folded by 2", "folded by 4"):
        torch.testing.assert_close(where[name].to_x0(where[name].data[:4]), x, rtol=0, atol=0)
    z0 = where["latents"].to_x0(where["latents"].data[:4])
    assert z0.shape == (4, 12, 16, 16) and not where["latents"].clip
    with torch.no_grad():
        torch.testing.assert_close(where["latents"].to_image(z0), sd.decode(sd.encode_image(x)), rtol=1e-4, atol=1e-4)


def test_the_networks_differ_only_where_they_meet_the_space(world):
    shapes = {name: {key: value.shape for key, value in measurement.network(space).state_dict().items()}
              for name, space in world[3].items()}  # fmt: skip
    for name in ("folded by 2", "folded by 4", "latents"):
        other = {key for key in shapes["pixels"] if shapes["pixels"][key] != shapes[name][key]}
        assert other == {"conv_in.weight", "conv_out.weight", "conv_out.bias"}
    assert shapes["folded by 4"]["conv_in.weight"][1] == 48  # as small a map as the latents


def test_only_training_counts_and_training_learns(world):
    sd, _, labels, where, _ = world
    marks = measurement.train(where["latents"], labels, sd.schedule, [0.3, 3.0], 8, seed=0)
    seconds, steps, _ = next(marks)
    start = time.process_time()
    while time.process_time() < start + 4:  # the caller's work
        pass
    later, more, net = next(marks)
    assert 0.3 <= seconds < 3 <= later < 4 and 1 <= steps < more

    def loss(net):
        generator, z0 = torch.Generator().manual_seed(5), where["latents"].data[:64]
        with torch.no_grad():
            return ddpm.simple_loss(lambda x, t: net(x, t, labels[:64]), z0, sd.schedule, generator, "v").item()

    assert loss(net) < 0.95 * loss(measurement.network(where["latents"]))


def test_samples_are_of_each_class_in_turn_and_from_the_same_noise(world):
    sd, _, _, where, _ = world
    seen = []

    def net(xt, t, label):
        seen.append((xt, label))
        return torch.zeros_like(xt)

    net.num_classes, args = 10, Namespace(count=40, steps=2, w=2.0)
    for _ in range(2):
        images = measurement.draw(where["pixels"], net, sd.schedule, args)
    assert images.shape == (40, 3, 64, 64) and images.abs().max() <= 1
    first = torch.cat([label[len(label) // 2 :] for _, label in seen[0:4:2]])  # the half with a condition
    torch.testing.assert_close(first, torch.arange(40) % 10)
    torch.testing.assert_close(seen[4][0], seen[0][0], rtol=0, atol=0)


def test_the_scores_tell_pictures_from_blur_and_noise(world):
    sd, images, _, _, data = world
    scale = measurement.Scale(from_uint8(images))
    test, labels = from_uint8(data["test_images"]), torch.from_numpy(data["test_labels"]).long()
    found = measurement.known(scale, sd, test, labels, 60)
    share = {name: row["share"]["value"] for name, row in found.items() if "share" in row}
    distance = {name: row["distance"]["value"] for name, row in found.items()}
    assert share["real"] > 0.9 > 0.7 > share["real, blurred"] > share["noise"] and share["real, decoded"] > 0.9
    assert 0 < distance["real"] < 0.3 * distance["real, blurred"] < distance["noise"]
    wrong = scale(test, (labels + 1) % 10)
    assert wrong["share"]["value"] < 0.1 and wrong["distance"] == found["real"]["distance"]


def test_the_script_makes_what_is_missing_and_the_sheet(tmp_path, monkeypatch):
    monkeypatch.setenv("COURSE_CACHE", str(tmp_path))
    options = ["--minutes", "0.0001", "--pictures", "40", "--test", "30", "--count", "20", "--steps", "1"]
    options += ["--out", str(tmp_path / "spaces.json"), "--samples", str(tmp_path), "--batch-size", "2"]
    monkeypatch.setattr(sys, "argv", ["spaces.py", *options])
    measurement.main()
    rows = json.loads((tmp_path / "spaces.json").read_text())["runs"]["0"]
    assert list(rows) == ["pixels", "folded by 2", "folded by 4", "latents"]
    assert {len(marks) for marks in rows.values()} == {4}
    assert Image.open(tmp_path / "spaces_samples.png").size == (640, 384)
    monkeypatch.setattr(measurement, "compare", None)  # all is there: not called again
    measurement.main()
    np.testing.assert_equal(json.loads((tmp_path / "spaces.json").read_text())["runs"]["0"], rows)


def test_the_record_is_of_equal_times_and_its_scale_is_one():
    record = json.loads((RESULTS / "spaces.json").read_text())
    share = {name: Estimate(**row["share"]) for name, row in record["scale"].items() if "share" in row}
    distance = {name: Estimate(**row["distance"]) for name, row in record["scale"].items()}
    assert share["real"].low > share["real, blurred"].high and share["real, blurred"].low > share["noise"].high
    assert distance["real, decoded"].high < distance["real, blurred"].low < distance["noise"].low
    assert distance["lost by decoding"].low > 0  # the same pictures before and after: even this is seen
    for run in record["runs"].values():
        for rows in run.values():
            assert rows[-1]["seconds"] == pytest.approx(60 * record["minutes"], rel=0.02)
