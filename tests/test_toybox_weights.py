"""The shipped Toybox Stable Diffusion: small files with known sums, and the layout that the course speaks of.

That stock diffusers opens it and draws the same pictures is in test_stable_diffusion.py.
"""

import json
from collections import Counter

import pytest
import torch
from diffusers import DDIMScheduler
from safetensors import safe_open

from course_lib.environment import RESULTS, sha256
from course_lib.latent import registry, stable_diffusion
from course_lib.personalization.custom_diffusion import retrieve
from course_lib.toybox.captions import SYNONYMS
from course_lib.toybox.sets import pair_spec, pairs

TOYBOX = registry.MODELS["toybox"].folder
WEIGHTS = sorted(TOYBOX.rglob("*.safetensors"))
MEASURED = RESULTS / "toybox_sd.json"
pytestmark = pytest.mark.skipif(not TOYBOX.is_dir(), reason="data/checkpoints/toybox-sd is not there yet")


def name(path):
    return path.relative_to(TOYBOX).as_posix()


@pytest.fixture(scope="module")
def sd():
    return stable_diffusion.load("toybox")


# ---- the files ----


def test_the_files_are_small():
    sizes = {name(path): path.stat().st_size for path in TOYBOX.rglob("*") if path.is_file()}
    assert {file: size for file, size in sizes.items() if size > 16e6} == {}
    assert sum(sizes.values()) <= 80e6
    assert not [file for file in sizes if file.endswith((".bin", ".pt", ".ckpt", ".pkl"))]


@pytest.mark.parametrize("folder", sorted({path.parent for path in WEIGHTS}), ids=name)
def test_weights_are_those_of_their_provenance(folder):
    """In both directions: no file without a sum, no sum without a file."""
    facts = json.loads((folder / "provenance.json").read_text())
    assert facts["sha256"] == {path.name: sha256(path) for path in folder.glob("*.safetensors")}
    assert facts["made_by"].startswith("training/toybox_") and facts["steps"] > 0


@pytest.mark.parametrize("path", WEIGHTS, ids=name)
def test_weights_are_finite_float16(path):
    with safe_open(path, "pt") as weights:
        tensors = {key: weights.get_tensor(key) for key in weights.keys()}
    assert [key for key, value in tensors.items() if value.dtype != torch.float16] == []
    assert [key for key, value in tensors.items() if not value.isfinite().all()] == []


@pytest.mark.skipif(not MEASURED.is_file(), reason="data/results/toybox_sd.json is not there yet")
def test_the_figures_were_measured_with_these_weights():
    measured = json.loads(MEASURED.read_text())["weights"]
    assert measured == {name(path): sha256(path)[:16] for path in WEIGHTS}


# ---- the layout ----


def test_the_unet_has_text_at_two_resolutions(sd):
    assert 10e6 <= sum(weight.numel() for weight in sd.unet.parameters()) <= 16e6
    seen = Counter()
    for key, module in sd.unet.named_modules():
        if key.endswith("attn2"):
            module.register_forward_hook(lambda module, inputs, output: seen.update([output.shape[1]]))
    z, features = torch.zeros(1, sd.unet.config.in_channels, 16, 16), sd.encode_prompt("a photo of a cat")
    assert sd.unet(z, 500, features).sample.shape == z.shape and features.shape[1] == 32
    assert seen[16 * 16] > 0 and seen[8 * 8] > 0


def test_the_noise_is_stable_diffusions(sd):
    scheduler = DDIMScheduler.from_pretrained(TOYBOX, subfolder="scheduler")
    expected = dict(prediction_type="v_prediction", beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012,
                    num_train_timesteps=1000, clip_sample=False)  # fmt: skip
    assert {key: scheduler.config[key] for key in expected} == expected


def test_the_autoencoder_makes_64_pixels_16_numbers(sd):
    z0 = sd.encode_image(torch.zeros(1, 3, 64, 64))
    assert z0.shape == (1, sd.unet.config.in_channels, 16, 16) and sd.factor == 4
    assert sd.decode(z0).shape == (1, 3, 64, 64)


def test_a_pass_through_the_autoencoder_keeps_the_picture(sd):
    """Latents of pictures are about one wide, as the noise is; and the picture comes back."""
    images = torch.from_numpy(pairs(16, split="test").images).permute(0, 3, 1, 2) / 127.5 - 1
    z0 = sd.encode_image(images)
    assert 0.7 < z0.std() < 1.4
    assert (sd.decode(z0) - images).square().mean() < 0.04  # 14 dB


def test_captions_of_a_class_are_found_by_their_words(sd):
    """By CLIP's feature of the whole sentence few of the nearest name the class, see `similarity`."""
    captions = [pair_spec(k)[1] for k in range(2000)]
    for noun in ("cat", "dog", "teapot", "backpack"):
        found = retrieve(sd, captions, f"a photo of a {noun}", count=50)
        words = [set(captions[k].split()) & {noun, SYNONYMS.get(noun)} for k in found]
        assert len(found) == 50 and all(words)
