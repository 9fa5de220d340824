"""CIFAR-10 from wherever it is: the order of sources, what is refused, and that no unknown pickle is opened."""

import hashlib
import pickle
import re
import socket

import numpy as np
import pytest
import torch

from course_lib.data import cifar10
from course_lib.environment import cache_dir
from course_lib.toybox import sets


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Any use of the network raises, and is noted."""
    tried = []

    def refuse(*args, **kwargs):
        tried.append(args)
        raise OSError("no network in this test")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    return tried


def arrays(train=20, test=10, seed=0):
    rng = np.random.default_rng(seed)
    sizes = {"train": train, "test": test}
    images = {f"{k}_images": rng.integers(0, 256, (n, 32, 32, 3)).astype(np.uint8) for k, n in sizes.items()}
    labels = {f"{k}_labels": rng.integers(0, 10, n) for k, n in sizes.items()}
    return images | labels


def npz(path, **changed):
    np.savez(path, **{k: v for k, v in (arrays() | changed).items() if v is not None})
    return path


@pytest.fixture
def official(tmp_path, monkeypatch):
    """official(folder): six small batches laid out as the official ones, and a table of MD5s that knows them."""

    def make(folder=tmp_path / cifar10.FOLDER, known=True):
        folder.mkdir(parents=True)
        table, pixels = {}, np.random.default_rng(1)
        for i, name in enumerate(cifar10.MD5):
            batch = {b"data": pixels.integers(0, 256, (3, 3072)).astype(np.uint8), b"labels": [i, 9 - i, i]}
            content = pickle.dumps(batch)
            (folder / name).write_bytes(content)
            table[name] = hashlib.md5(content, usedforsecurity=False).hexdigest()
        if known:
            monkeypatch.setattr(cifar10, "MD5", table)
        return folder

    return make


def refused(path, message):
    with pytest.raises(ValueError, match=rf"^path: {message}") as caught:
        cifar10.load(path)
    assert "\n" not in str(caught.value)


# ---- a plain .npz ----


def test_an_npz_is_read(tmp_path, capsys):
    data, expected = cifar10.load(npz(tmp_path / "copy.npz")), arrays()
    assert (data.name, data.source, data.classes) == ("Pictures of copy.npz", "copy.npz", cifar10.CLASSES)
    assert data.train_images.shape == (20, 3, 32, 32) and data.train_images.dtype == torch.uint8
    assert data.train_images.is_contiguous() and data.train_labels.dtype == torch.int64
    for split in ("train", "test"):
        images = torch.from_numpy(expected[f"{split}_images"]).permute(0, 3, 1, 2)
        torch.testing.assert_close(getattr(data, f"{split}_images"), images, rtol=0, atol=0)
        assert getattr(data, f"{split}_labels").tolist() == expected[f"{split}_labels"].tolist()
    assert capsys.readouterr().out == "Pictures of copy.npz from copy.npz: 20 + 10 images\n"


def test_only_a_whole_one_is_called_cifar10(tmp_path):
    def zeros(train, test):
        return {f"{split}_{kind}": np.zeros((n, 32, 32, 3) if kind == "images" else n, np.uint8)
                for split, n in (("train", train), ("test", test)) for kind in ("images", "labels")}  # fmt: skip

    np.savez_compressed(tmp_path / "whole.npz", **zeros(50_000, 10_000))
    assert cifar10.load(tmp_path / "whole.npz", verbose=False).name == "CIFAR-10"


def test_nothing_is_printed_when_not_wanted(tmp_path, capsys):
    cifar10.load(npz(tmp_path / "copy.npz"), verbose=False)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"test_labels": None}, r"expected an \.npz with the arrays .* lacks \['test_labels'\]"),
        (
            {"train_images": arrays()["train_images"] / 255},
            r"expected train_images uint8 \(N, 32, 32, 3\), got float64",
        ),
        (
            {"test_images": np.zeros((10, 3, 32, 32), np.uint8)},
            r"expected test_images uint8 .*got uint8 \(10, 3, 32, 32\)",
        ),
        ({"train_images": np.zeros((0, 32, 32, 3), np.uint8)}, "expected train_images uint8"),
        ({"train_images": np.zeros((20, 3072), np.uint8)}, "expected train_images uint8"),
        ({"train_labels": np.zeros(19, int)}, r"expected train_labels ints \(20,\), got int64 \(19,\)"),
        ({"train_labels": np.zeros((20, 10), int)}, "expected train_labels ints"),
        ({"test_labels": np.zeros(10)}, r"expected test_labels ints \(10,\), got float64"),
        ({"test_labels": np.full(10, 10)}, r"expected test_labels in 0\.\.9, got 10\.\.10"),
        ({"train_labels": np.full(20, -1)}, r"expected train_labels in 0\.\.9, got -1\.\.-1"),
    ],
)
def test_an_npz_with_something_else_is_refused(tmp_path, changed, message):
    refused(npz(tmp_path / "copy.npz", **changed), message)


@pytest.mark.parametrize("keep", [0.0, 0.1, 0.5, 0.99])
def test_a_cut_off_npz_is_refused(tmp_path, keep):
    content = npz(tmp_path / "copy.npz").read_bytes()
    (tmp_path / "copy.npz").write_bytes(content[: int(keep * len(content))])
    refused(tmp_path / "copy.npz", r".* is (damaged|not a plain \.npz)")


def test_an_npz_with_a_flipped_byte_is_refused(tmp_path):
    content = bytearray(npz(tmp_path / "copy.npz").read_bytes())
    content[20_000] ^= 255
    (tmp_path / "copy.npz").write_bytes(content)
    refused(tmp_path / "copy.npz", ".* is damaged")


def test_a_file_that_is_no_npz_is_refused(tmp_path):
    np.save(tmp_path / "one.npy", np.zeros(3))
    refused(tmp_path / "one.npy", ".* is damaged or not an .npz file")
    (tmp_path / "text").write_text("no pictures here")
    refused(tmp_path / "text", r".* is (damaged|not a plain \.npz)")


def test_a_path_that_is_not_there_is_named(tmp_path):
    refused(tmp_path / "nowhere.npz", r"expected a cifar-10-batches-py folder or an \.npz file, .* does not exist$")


# ---- pickles ----


class Trap:
    """Unpickling this writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_the_trap_works(tmp_path):
    pickle.loads(pickle.dumps(Trap(tmp_path / "ran"))).close()
    assert (tmp_path / "ran").exists()


def test_pickled_objects_in_an_npz_are_not_opened(tmp_path):
    trapped = np.array([Trap(tmp_path / "ran")], dtype=object)
    refused(npz(tmp_path / "copy.npz", train_images=trapped), r".* is not a plain \.npz .* pickles are not opened$")
    assert not (tmp_path / "ran").exists()


def test_a_bare_pickle_is_not_opened(tmp_path):
    (tmp_path / "copy.npz").write_bytes(pickle.dumps(Trap(tmp_path / "ran")))
    refused(tmp_path / "copy.npz", r".* is not a plain \.npz .* pickles are not opened$")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("batch", ["data_batch_1", "test_batch"])
def test_a_batch_with_another_md5_is_not_opened(tmp_path, official, batch):
    folder = official()
    (folder / batch).write_bytes(pickle.dumps(Trap(tmp_path / "ran")))
    refused(folder, rf".*{batch} is not the official file \(its MD5 differs\), so its pickle is not opened")
    assert not (tmp_path / "ran").exists()


def test_the_table_is_that_of_the_official_files(official):
    assert len(cifar10.MD5) == 6 and all(re.fullmatch("[0-9a-f]{32}", md5) for md5 in cifar10.MD5.values())
    from torchvision.datasets import CIFAR10

    assert dict(CIFAR10.train_list + CIFAR10.test_list) == cifar10.MD5
    refused(official(known=False), ".*data_batch_1 is not the official file")


def test_the_official_folder_is_read(tmp_path, official):
    folder = official()
    for path in (folder, folder.parent):  # the folder itself, or the one that holds it
        data = cifar10.load(path)
        assert (data.name, data.source) == ("CIFAR-10", "the official files in cifar-10-batches-py")
        assert len(data.train_images) == 15 and len(data.test_images) == 3
        assert data.train_labels.tolist() == [0, 9, 0, 1, 8, 1, 2, 7, 2, 3, 6, 3, 4, 5, 4]
        assert data.test_labels.tolist() == [5, 4, 5]
        row = pickle.loads((folder / "data_batch_2").read_bytes())[b"data"][1]  # red, green, blue; row by row
        torch.testing.assert_close(data.train_images[4], torch.from_numpy(row.reshape(3, 32, 32)), rtol=0, atol=0)


def test_a_missing_batch_is_named(official):
    folder = official()
    (folder / "data_batch_4").unlink()
    refused(folder, "expected the official batch data_batch_4 in .* not there$")


# ---- the order of the sources, and the network ----


def test_the_variable_names_a_copy(tmp_path, monkeypatch):
    monkeypatch.setenv("COURSE_CIFAR10", str(npz(tmp_path / "mine.npz")))
    assert cifar10.load().source == "mine.npz"
    assert cifar10.load(npz(tmp_path / "argument.npz")).source == "argument.npz"  # the argument goes first


def test_a_damaged_copy_is_not_passed_over(tmp_path, monkeypatch, official):
    official(cache_dir() / cifar10.FOLDER)
    monkeypatch.setenv("COURSE_CIFAR10", str(tmp_path / "gone.npz"))
    with pytest.raises(ValueError, match=r"^path: .*gone\.npz does not exist"):
        cifar10.load()


def test_an_earlier_download_is_found(tmp_path, monkeypatch, official, no_network):
    official(cache_dir() / cifar10.FOLDER)
    assert cifar10.load(download=True).source.startswith("the official files")
    assert no_network == []
    monkeypatch.setenv("COURSE_CIFAR10", str(npz(tmp_path / "mine.npz")))
    assert cifar10.load().source == "mine.npz"  # the variable goes first


def test_without_any_it_is_toybox_10_and_says_so(capsys, monkeypatch, no_network):
    blank = np.zeros((32, 32, 3), np.uint8)  # drawing takes long
    monkeypatch.setattr(sets, "render", lambda spec, size: blank)
    data = cifar10.load()
    assert data.name == "Toybox-10" and "no CIFAR-10 found" in data.source
    assert "CIFAR-10" not in data.name and data.classes != cifar10.CLASSES and len(data.classes) == 10
    assert capsys.readouterr().out.startswith("Toybox-10 from the renderer of this course")
    assert data.train_images.shape == (1_500, 3, 32, 32) and len(data.test_images) == 400
    assert data.train_labels.bincount().tolist() == [150] * 10
    assert no_network == []


def test_a_failed_download_is_one_sentence(no_network):
    with pytest.raises(ConnectionError, match=r"^CIFAR-10 could not be downloaded .*Toybox-10\. Reason: ") as caught:
        cifar10.load(download=True)
    assert no_network != []  # so the check in the tests above does see an attempt
    assert "\n" not in str(caught.value) and caught.value.__suppress_context__
    assert not (cache_dir() / cifar10.FOLDER).exists()
