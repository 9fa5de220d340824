"""Profiles and sizes."""

import pytest
import torch

from course_lib import environment

SIZES = dict(smoke=1, cpu=2, gpu=3)


@pytest.mark.parametrize("name", environment.PROFILES)
def test_the_profile_picks_the_size(monkeypatch, name):
    monkeypatch.setenv("COURSE_PROFILE", name)
    assert environment.profile() == name
    assert environment.pick(**SIZES) == SIZES[name]


@pytest.mark.parametrize(("accelerator", "expected"), [(None, "cpu"), ("cuda", "gpu"), ("mps", "gpu")])
@pytest.mark.parametrize("value", [None, ""])
def test_without_a_word_the_machine_decides(monkeypatch, value, accelerator, expected):
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
    monkeypatch.setattr(environment, "mixed_precision", lambda on: "no")
    with environment.autocast(torch.device("cpu")):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
    monkeypatch.setattr(environment, "mixed_precision", lambda on: "bf16")
    with environment.autocast(torch.device("cpu")):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
