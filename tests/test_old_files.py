"""Files of an earlier version, commit 1f1be9b: concepts and exports still open, its training states are refused.

tests/files holds one file of each method, trained for one step on the model of `old_model` with that version's code.
expected.safetensors has what that version's UNet gave for `SCENES`, without a concept ("before") and with each.
"""

import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file

from course_lib.cli.main import main
from course_lib.environment import REPOSITORY
from course_lib.personalization import merge, textual_inversion
from course_lib.personalization.concept import applied, load_concept, save_concept
from course_lib.personalization.finetune import finetune
from course_lib.personalization.interchange.load import load_foreign
from course_lib.personalization.recipe import Settings

FILES = Path(__file__).parent / "files"
NEW_WORD = "a photo of a <v> cat"
SCENES = {
    "before": "a photo of a cat", "textual_inversion": NEW_WORD, "dreambooth": "a photo of a sks cat",
    "lora": "a photo of a sks cat", "custom_diffusion": NEW_WORD, "compressed": NEW_WORD,
}  # fmt: skip
SMALL = dict(
    text_encoder=tiny.TINY["text_encoder"] | dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1),
    unet=dict(sample_size=8, block_out_channels=(8,), layers_per_block=1, cross_attention_dim=16, attention_head_dim=2,
              norm_num_groups=2, down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",),
              mid_block_type=None),
    vae=dict(sample_size=32, block_out_channels=(4, 4, 4), layers_per_block=1, norm_num_groups=2,
             down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3),
)  # fmt: skip


@pytest.fixture(scope="module")
def old_model():
    """A model whose numbers come from NumPy's frozen generator: the same with every version of torch."""
    sd, rng = tiny.FULL_SIZE.build(**SMALL), np.random.RandomState(0)
    for network in (sd.unet, sd.text_encoder, sd.vae):
        for param in network.parameters():
            values = torch.from_numpy(0.2 * rng.randn(*param.shape)).float()
            param.data.copy_(values + (1 if param.ndim == 1 else 0))
    return sd


@pytest.fixture(scope="module")
def expected():
    return load_file(FILES / "expected.safetensors")


@torch.no_grad()
def features(sd, prompt):
    x = torch.from_numpy(np.random.RandomState(1).randn(1, 4, 8, 8)).float()
    return sd.unet_eps(x, torch.tensor([500]), sd.encode_prompt([prompt]))


def check(sd, concept, name, expected):
    """With the concept the model gives what it gave then, without it what it gave before."""
    with applied(sd, concept):
        torch.testing.assert_close(features(sd, SCENES[name]), expected[name], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(features(sd, SCENES["before"]), expected["before"], rtol=1e-4, atol=1e-4)


def test_the_concepts_differ(expected):
    """Each concept does more than the tolerance of `check` lets pass."""
    assert set(expected) == set(SCENES)
    assert all((value - expected["before"]).abs().max() > 1e-2 for name, value in expected.items() if name != "before")


@pytest.mark.parametrize("name", [name for name in SCENES if name != "before"])
def test_an_old_concept_opens_and_does_what_it_did(name, old_model, expected, tmp_path):
    concept = load_concept(FILES / f"{name}.safetensors")
    assert concept.method == name.replace("compressed", "custom_diffusion") and concept.settings["steps"] == 1
    check(old_model, concept, name, expected)
    save_concept(tmp_path / "again.safetensors", concept)  # and once more, through the file of today
    check(old_model, load_concept(tmp_path / "again.safetensors"), name, expected)


def test_old_concepts_can_be_merged_and_compressed(old_model):
    whole, thin = (load_concept(FILES / f"{name}.safetensors") for name in ("custom_diffusion", "compressed"))
    other = load_concept(FILES / "custom_diffusion.safetensors")
    other.about |= {"token": "<w>", "tokens": ["<w>"], "rows": ["<w>"]}
    merged = merge.merge_concepts(old_model, [thin, other], ["a photo of a tiger", "a cat of a photo"])
    assert merged.about["rows"] == ["<v>", "<w>"] and set(merged.tensors) == set(whole.tensors)
    again = merge.compressed(old_model, whole, thin.about["compressed"])
    assert again.about == thin.about and set(again.tensors) == set(thin.tensors)
    for name, value in merge.uncompressed(old_model, thin).tensors.items():
        torch.testing.assert_close(merge.uncompressed(old_model, again).tensors[name], value, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("file", "name", "words"),
    [
        ("", "custom_diffusion", {"<v>": "cat"}),  # the folder: weights, and a file for the word
        ("learned_embeds.safetensors", "textual_inversion", {"<v>": ""}),
        ("pytorch_lora_weights.safetensors", "lora", {"sks": "cat"}),
    ],
)
def test_an_old_export_opens_as_a_concept(file, name, words, old_model, expected):
    concept = load_foreign(FILES / "exported" / file, old_model, words)
    assert concept.method == name
    check(old_model, concept, name, expected)


@pytest.mark.filterwarnings("ignore:prompt. more than")
def test_an_old_state_is_refused_in_one_sentence(old_model, tmp_path, capsys):
    """It has no hashes of its pictures, so nobody knows whether they are the same."""
    out = tmp_path / "cat.safetensors"
    state = Path(shutil.copy(FILES / "state.pt", f"{out}.state.pt"))
    before, images = state.read_bytes(), REPOSITORY / "data" / "subjects" / "mochi"
    settings = Settings(steps=1, lr=5e-2, batch_size=2)
    with textual_inversion.recipe(old_model, images, noun="cat", vectors=2, settings=settings,
                                  captions=["a photo of a {}"] * 5) as recipe:  # fmt: skip
        with pytest.raises(ValueError, match="has no record of the pictures it was trained on"):
            next(finetune(old_model, recipe, checkpoint=state))
    command = f"train --method textual-inversion --images {images} --class-noun cat --out {out}"
    assert main(command.split()) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: checkpoint: ") and "older version" in error and "--fresh" in error
    assert "\n" not in error and state.read_bytes() == before and not out.exists()
