"""What every test starts from: the smoke profile, the CPU, an empty cache, and no data set of this machine."""

import pytest
import torch

from course_lib.diffusion.unet import UNet


@pytest.fixture(autouse=True)
def plain_surroundings(monkeypatch, tmp_path):
    monkeypatch.setenv("COURSE_PROFILE", "smoke")
    monkeypatch.setenv("COURSE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("COURSE_CIFAR10", raising=False)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")  # two runs on an accelerator need not agree bit for bit


@pytest.fixture
def tiny_unet():
    """tiny_unet(num_classes=10): a small network whose weights are all moved away from zero, the same each time."""

    def make(**options):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            net = UNet(**{"channels": (32, 64), "attention": (False, True), "patch": 2, **options})
            with torch.no_grad():
                for weight in net.parameters():
                    weight.add_(0.05 * torch.randn(weight.shape))
        return net.eval()

    return make
