"""Models on disk: what is written is read, what is damaged is refused, and what is shipped is whole."""

import json

import pytest
import torch

from course_lib.diffusion import checkpoint
from course_lib.environment import CHECKPOINTS, sha256
from course_lib.evaluation.metrics import SmallClassifier

# a folder with model_index.json is a pipeline: tests/test_toybox_weights.py looks at its parts
SHIPPED = sorted(path.parent for path in CHECKPOINTS.glob("*/config.json"))
MAX_BYTES = 16_000_000
each = pytest.mark.parametrize("folder", SHIPPED, ids=lambda path: path.name)


@pytest.fixture
def saved(tiny_unet, tmp_path):
    net = tiny_unet(num_classes=10)
    checkpoint.save(net, tmp_path / "net", dict(made_by="a test"))
    return net, tmp_path / "net"


def test_what_is_saved_is_loaded(saved):
    net, folder = saved
    again = checkpoint.load(folder)
    assert again.config == net.config and not again.training
    assert all(not weight.requires_grad and weight.dtype == torch.float32 for weight in again.parameters())
    for name, weight in net.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], weight.half().float(), rtol=0, atol=0)
    assert again.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    note = json.loads((folder / "provenance.json").read_text())
    assert note["made_by"] == "a test"
    assert note["files"][checkpoint.WEIGHTS]["sha256"] == sha256(folder / checkpoint.WEIGHTS)


def test_saving_leaves_the_model_alone(tiny_unet, tmp_path):
    net = tiny_unet()
    before = {name: weight.clone() for name, weight in net.state_dict().items()}
    checkpoint.save(net, tmp_path, {})
    for name, weight in net.state_dict().items():
        torch.testing.assert_close(weight, before[name], rtol=0, atol=0)


def test_float32_keeps_every_bit(tiny_unet, tmp_path):
    net = tiny_unet()
    checkpoint.save(net, tmp_path, {}, dtype=torch.float32)
    for name, weight in checkpoint.load(tmp_path).state_dict().items():
        torch.testing.assert_close(weight, net.state_dict()[name], rtol=0, atol=0)


def test_one_changed_byte_is_noticed(saved):
    file = saved[1] / checkpoint.WEIGHTS
    content = bytearray(file.read_bytes())
    content[-100] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"^folder: .* is damaged \(.*SHA-256 differs"):
        checkpoint.load(saved[1])


def test_a_model_of_another_class_is_refused(saved):
    with pytest.raises(ValueError, match=r"^folder: expected a SmallClassifier, but .* holds a UNet$"):
        checkpoint.load(saved[1], model_class=SmallClassifier)


@pytest.mark.parametrize("name", ["config.json", "provenance.json", checkpoint.WEIGHTS])
def test_a_missing_file_is_named(saved, name):
    (saved[1] / name).unlink()
    with pytest.raises(ValueError, match=rf"^folder: expected a model folder with {name}, but .* has none$"):
        checkpoint.load(saved[1])


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"^folder: expected a model folder with config.json, but .*nowhere has none$"):
        checkpoint.load(tmp_path / "nowhere")


# ---- what is shipped ----


def test_the_models_of_part_1_are_shipped():
    assert {"ddpm-cifar10", "ddpm-toybox10", "classifier-cifar10"} <= {folder.name for folder in SHIPPED}


@each
def test_a_shipped_folder_is_whole_and_says_where_it_comes_from(folder):
    assert (folder / "config.json").is_file()
    note = json.loads((folder / "provenance.json").read_text())
    assert all(note.get(key) for key in ("made_by", "date", "device", "files"))
    for name, entry in note["files"].items():
        assert sha256(folder / name) == entry["sha256"], f"{name} is not the file of provenance.json"
    large = [file.name for file in folder.rglob("*") if file.is_file() and file.stat().st_size > MAX_BYTES]
    assert large == []


@pytest.mark.parametrize("name", ["ddpm-cifar10", "ddpm-toybox10"])
def test_a_shipped_network_predicts_finite_noise(name):
    net = checkpoint.load(CHECKPOINTS / name)
    xt = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    eps_hat = net(xt, torch.tensor([10, 1000]), torch.tensor([0, net.num_classes]))
    assert eps_hat.isfinite().all() and eps_hat.std() > 0.1  # it has been trained: a new network returns zeros
