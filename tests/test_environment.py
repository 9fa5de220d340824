"""Profiles and sizes."""

import hashlib
import platform

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from course_lib import environment
from course_lib.diffusion.ddpm import step_generator

SIZES = dict(smoke=1, cpu=2, gpu=3)


@pytest.mark.parametrize("name", environment.PROFILES)
def test_the_profile_picks_the_size(monkeypatch, name):
    monkeypatch.setenv("COURSE_PROFILE", name)
    assert environment.profile() == name
    assert environment.pick(**SIZES) == SIZES[name]


@pytest.mark.parametrize(("accelerator", "expected"), [(None, "cpu"), ("cuda", "gpu"), ("mps", "gpu")])
@pytest.mark.parametrize("value", [None, ""])
def test_without_a_profile_the_machine_decides(monkeypatch, value, accelerator, expected):
    monkeypatch.delenv("COURSE_PROFILE") if value is None else monkeypatch.setenv("COURSE_PROFILE", value)
    monkeypatch.setattr(environment, "_accelerator", lambda: accelerator)
    assert environment.profile() == expected
    assert environment.device() == torch.device(accelerator or "cpu")


@pytest.mark.parametrize("name", ["smoke", "cpu"])
def test_small_profiles_stay_on_the_cpu(monkeypatch, name):
    monkeypatch.setenv("COURSE_PROFILE", name)
    monkeypatch.setattr(environment, "_accelerator", lambda: "cuda")
    assert environment.device() == torch.device("cpu")


def test_the_gpu_profile_falls_back_to_the_cpu(monkeypatch):
    monkeypatch.setenv("COURSE_PROFILE", "gpu")
    monkeypatch.setattr(environment, "_accelerator", lambda: None)
    assert environment.device() == torch.device("cpu")


def test_an_unknown_profile_is_refused(monkeypatch):
    monkeypatch.setenv("COURSE_PROFILE", "fast")
    for call in (environment.profile, environment.device, lambda: environment.pick(**SIZES)):
        with pytest.raises(ValueError, match=r"^COURSE_PROFILE: expected one of smoke, cpu, gpu, got 'fast'$"):
            call()


@pytest.mark.parametrize(
    ("sizes", "got"),
    [
        ({}, "nothing"),
        ({"smoke": 1, "cpu": 2}, "smoke, cpu"),
        ({**SIZES, "tpu": 4}, "smoke, cpu, gpu, tpu"),
    ],
)
def test_sizes_for_every_profile_and_no_other(sizes, got):
    with pytest.raises(ValueError, match=rf"^sizes: expected exactly smoke, cpu, gpu, got {got}$"):
        environment.pick(**sizes)


def test_the_cache_is_where_the_variable_says(monkeypatch, tmp_path):
    monkeypatch.setenv("COURSE_CACHE", str(tmp_path / "here"))
    assert environment.cache_dir() == tmp_path / "here"
    monkeypatch.delenv("COURSE_CACHE")
    assert environment.cache_dir().parts[-2:] == (".cache", "personalization-course")


def test_the_device_has_a_name():
    assert environment.device_name()


@pytest.mark.parametrize(("capability", "name"), [((7, 5), "fp16"), ((8, 0), "bf16"), ((9, 0), "bf16")])
def test_half_precision_on_a_gpu_follows_its_age(monkeypatch, capability, name):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert environment.mixed_precision(torch.device("cuda")) == name


def test_half_precision_is_off_where_it_does_not_pay(monkeypatch):
    assert environment.mixed_precision(torch.device("mps")) == "no"
    cpu = torch.device("cpu")
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        monkeypatch.setenv("COURSE_PRECISION", name)
        with environment.autocast(cpu):
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype == environment.quick_dtype(cpu)


@pytest.mark.parametrize(
    ("ms", "chosen"), [((4.0, 6.0), ("float32", "no")), ((4.0, 2.0), ("bfloat16", "bf16"))], ids=["slower", "faster"]
)
def test_a_cpu_gets_the_precision_that_was_faster_and_is_timed_once(monkeypatch, ms, chosen):
    monkeypatch.delenv("COURSE_PRECISION", raising=False)
    timed = []
    times = dict(zip(("float32", "bfloat16"), ms, strict=True))
    monkeypatch.setattr(environment, "_time_forward_passes", lambda: timed.append(1) or times)
    for _ in range(2):  # the second time from the file in the cache folder
        environment._cpu_times.cache_clear()
        name, reason = environment.precision(torch.device("cpu"))
        assert (name, environment.mixed_precision(torch.device("cpu"))) == chosen
        assert f"{ms[0]:.1f} ms in float32" in reason and f"{ms[1]:.1f} ms in bfloat16" in reason
    assert timed == [1]
    environment._cpu_times.cache_clear()
    (environment.cache_dir() / "precision.json").write_text("{")
    assert environment.precision(torch.device("cpu"))[0] == chosen[0] and timed == [1, 1]  # damaged: timed again
    environment._cpu_times.cache_clear()


def test_both_precisions_are_really_timed():
    times = environment._time_forward_passes(rounds=2)
    assert list(times) == ["float32", "bfloat16"] and all(0 < ms < 10_000 for ms in times.values())


def test_an_unknown_precision_is_refused(monkeypatch):
    monkeypatch.setenv("COURSE_PRECISION", "int8")
    with pytest.raises(ValueError, match=r"^COURSE_PRECISION: expected one of float32, .*, got 'int8'$"):
        environment.precision(torch.device("cpu"))


def test_pixels_become_numbers_around_zero():
    rows = np.array([[[[0, 255, 51]]]], dtype=np.uint8)  # (N, H, W, C)
    x = environment.from_uint8(rows)
    assert_close(x, torch.tensor([-1.0, 1.0, -0.6]).view(1, 3, 1, 1))
    assert_close(environment.from_uint8(torch.from_numpy(rows)), x.view(1, 1, 1, 3))


def test_the_random_numbers_of_a_step_follow_from_its_numbers():
    def draw(*numbers):
        return torch.rand(3, generator=step_generator(*numbers)).tolist()

    assert draw(0, 1, 2) == draw(0, 1, 2)
    assert len({tuple(draw(*numbers)) for numbers in [(0, 1, 2), (1, 1, 2), (0, 2, 1), (0, 1, 2 + 2**32)]}) == 4


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "file.txt"
    with environment.write_whole(path) as temporary:
        temporary.write_text("first")
        assert not path.exists()
    with pytest.raises(OSError, match="full"), environment.write_whole(path) as temporary:
        temporary.write_text("sec")
        raise OSError("disk full")
    path.with_name(f"file.txt.{platform.node()}.999999999.tmp").write_text("of a killed process")
    path.with_name("file.txt.notes.tmp").write_text("the reader's own")
    with environment.write_whole(path) as temporary:
        temporary.write_text("third")
    path.with_name("file.txt.notes.tmp").unlink()
    assert path.read_text() == "third" and [file.name for file in path.parent.iterdir()] == ["file.txt"]


def test_a_hash_is_that_of_the_whole_file(tmp_path):
    content = bytes(range(256)) * 40_000  # more than one block
    (tmp_path / "file").write_bytes(content)
    assert environment.sha256(tmp_path / "file") == hashlib.sha256(content).hexdigest()
