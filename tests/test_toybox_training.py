"""The pieces that the Toybox trainings are made of."""

import importlib
import json
from types import SimpleNamespace

import pytest
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from safetensors import safe_open
from test_run import logged, new_run, regression
from torch import nn
from transformers import CLIPTokenizer

from course_lib.environment import from_uint8, sha256
from course_lib.toybox.accessories import ACCESSORIES
from course_lib.toybox.captions import SYNONYMS
from course_lib.toybox.pen import COLOURS, PATTERNS
from course_lib.toybox.sets import pair_spec, pairs
from course_lib.toybox.world import NOUNS

toybox_clip, toybox_stage, toybox_unet, toybox_vae = map(
    importlib.import_module, ("toybox_clip", "toybox_stage", "toybox_unet", "toybox_vae")
)
captioned = toybox_stage.captioned
close = torch.testing.assert_close
exact = dict(rtol=0, atol=0)


# ---- shipping ----


class Layers(ModelMixin, ConfigMixin):
    @register_to_config
    def __init__(self, count: int = 9, width: int = 1024):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(count))


def test_weights_are_shipped_in_halves_and_pieces_with_their_sums(tmp_path):
    model = Layers()
    run = new_run(tmp_path / "run", steps=3, images=7)
    run.train(regression(run))
    toybox_stage.ship(model, tmp_path / "model", run, made_by="a test")
    files = sorted((tmp_path / "model").glob("*.safetensors"))
    assert len(files) == 2 and all(path.stat().st_size <= 15e6 for path in files)
    for path in files:
        with safe_open(path, "pt") as weights:
            assert {weights.get_slice(name).get_dtype() for name in weights.keys()} == {"F16"}
    facts = json.loads((tmp_path / "model" / "provenance.json").read_text())
    assert facts["sha256"] == {path.name: sha256(path) for path in files}
    assert facts["made_by"] == "a test" and facts["steps"] == 3 and facts["images"] == 7
    assert facts["parameters"] == 9 * (1024**2 + 1024)
    assert [(row["step"], row["loss"]) for row in facts["last_rows"]] == logged(run)
    assert model.dtype == torch.float32  # the model itself stays as it was
    assert "_name_or_path" not in json.loads((tmp_path / "model" / "config.json").read_text())
    again = Layers.from_pretrained(tmp_path / "model").state_dict()
    close(again, {name: value.half().float() for name, value in model.state_dict().items()}, check_dtype=False, **exact)


# ---- the text encoder's stage ----


@pytest.fixture(scope="module")
def tokenizer():
    return toybox_clip.train_tokenizer(count=2000)


def test_words_of_the_world_are_one_token_and_others_fall_into_pieces(tokenizer):
    for word in ["a", "photo", *NOUNS, *COLOURS, *PATTERNS, *ACCESSORIES]:
        assert tokenizer.tokenize(word) == [f"{word}</w>"]
    pieces = tokenizer.tokenize("blorptang")
    assert len(pieces) > 2 and "".join(pieces) == "blorptang</w>"
    assert tokenizer.tokenize("A Red CAT") == tokenizer.tokenize("a red cat")


def test_a_prompt_has_32_tokens(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    again = CLIPTokenizer.from_pretrained(tmp_path)
    prompts = ["a photo of a red cat wearing a blue hat", "", "cat " * 50, "sks blorptang, déjà vu!"]
    ids, read = (t(prompts, padding="max_length", truncation=True).input_ids for t in (tokenizer, again))
    assert ids == read and again.model_max_length == 32 and {len(row) for row in ids} == {32}
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    assert ids[1] == [start] + [end] * 31 and ids[2][0] == start and ids[2][-1] == end
    assert again.decode(ids[0], skip_special_tokens=True).strip() == prompts[0]


def test_captions_follow_from_the_step_and_may_be_written_ahead(tmp_path, tokenizer):
    """Step k has the same pictures and captions in any worker and in a resumed run."""
    here, there = (new_run(tmp_path, steps=5, images=40, split="train", workers=workers) for workers in (0, 2))
    steps = list(captioned(here, tokenizer))
    assert len(steps) == 5 and not torch.equal(steps[0][0], steps[1][0])
    close(steps[0][0], torch.randint(40, (8,), generator=here.generator(1)), **exact)  # steps count from 1
    for (rows, ids), (other_rows, other_ids) in zip(steps, captioned(there, tokenizer), strict=True):
        close(rows, other_rows, **exact)
        close(ids, other_ids, **exact)
    here.step = 3
    rows, ids = next(captioned(here, tokenizer))
    close((rows, ids), tuple(steps[3]), **exact)
    assert rows.shape == (8,) and 0 <= rows.min() and rows.max() < 40 and ids.shape == (8, 32)
    for row, said in zip(rows.tolist(), tokenizer.batch_decode(ids, skip_special_tokens=True), strict=True):
        spec = pair_spec(row)[0]
        assert any(noun in said for noun in (spec.noun, SYNONYMS.get(spec.noun, spec.noun)))


def test_a_share_of_the_captions_is_left_empty(tmp_path, tokenizer):
    run = new_run(tmp_path, steps=20, images=40, split="train", batch_size=50, workers=0)
    ids = torch.cat([ids for _, ids in captioned(run, tokenizer, drop=0.1)])
    empty = (ids[:, 1] == tokenizer.eos_token_id).float().mean().item()
    assert 0.06 < empty < 0.14


def test_contrastive_loss_by_hand():
    """Two pairs with the similarities s [[1, 0], [0.6, 0.8]]: each row and each column is a choice of one in two."""
    image, text, s = torch.tensor([[1.0, 0.0], [0.6, 0.8]]), torch.eye(2), torch.tensor(3.0)
    of = lambda other, own: torch.log1p(torch.exp(s * (other - own)))  # noqa: E731  -log softmax of two
    pictures, captions = (of(0.0, 1.0) + of(0.6, 0.8)) / 2, (of(0.6, 1.0) + of(0.0, 0.8)) / 2
    close(toybox_clip.contrastive_loss(image, text, s), (pictures + captions) / 2)


def test_contrastive_loss_is_least_where_pairs_match():
    image = nn.functional.normalize(torch.randn(6, 16, generator=torch.Generator().manual_seed(0)), dim=-1)
    loss = [toybox_clip.contrastive_loss(image, image.roll(k, 0), torch.tensor(20.0)).item() for k in range(6)]
    assert loss[0] < 0.1 and min(loss[1:]) > 10 * loss[0]


# ---- the UNet's stage ----


def test_the_eps_model_of_a_perfect_v_network_is_right():
    """v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) z_0: so a network that returns v gives eps."""
    noise_schedule, g = toybox_unet.schedule.scaled_linear(), torch.Generator().manual_seed(0)
    z0, eps = torch.randn(3, 8, 4, 4, generator=g), torch.randn(3, 8, 4, 4, generator=g)
    t = torch.tensor([1, 500, 1000])
    alpha_bar = noise_schedule.at(t, z0)
    zt = alpha_bar.sqrt() * z0 + (1 - alpha_bar).sqrt() * eps
    asked = []

    def network(zt, times, features):
        asked.append(times)
        return SimpleNamespace(sample=alpha_bar.sqrt() * eps - (1 - alpha_bar).sqrt() * z0)

    model = toybox_unet.EpsModel(Wrapped(network), noise_schedule)
    close(model(zt, t, None), eps, rtol=0, atol=1e-5)
    close(asked[0], t - 1, **exact)  # diffusers counts from 0


class Wrapped(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.forward = function


def test_a_part_that_is_missing_is_named(tmp_path):
    (tmp_path / "vae").mkdir()
    with pytest.raises(ValueError, match=r"^--parts: expected .*text_encoder; train it first \(`make train-toybox`"):
        toybox_unet.load_parts(tmp_path, torch.device("cpu"))


# ---- the autoencoder's stage ----


def test_reconstruction_error_by_hand():
    x, x_hat = torch.zeros(1, 1, 2, 2), torch.tensor([[[[1.0, 0.0], [0.0, 0.0]]]])
    error = toybox_vae.reconstruction_error(x_hat, x)  # pixels 1/4 + 2/4, one of two steps right and one of two down
    assert error.item() == pytest.approx(0.25 + 0.5 + 0.5 + 0.5)
    assert toybox_vae.reconstruction_error(x + 0.5, x).item() == pytest.approx(0.5 + 2 * 0.25)  # no edges
    tall = torch.arange(6.0).reshape(1, 1, 3, 2)  # steps of 1 to the right and 2 down
    assert toybox_vae.reconstruction_error(tall, 0 * tall).item() == pytest.approx(2.5 + 2 * 55 / 6 + 1 + 2)


# ---- the encoder that is set, not trained ----


@pytest.fixture(scope="module")
def linear():
    """An untrained autoencoder with a linear encoder, its matrix and offset, and the pictures that they come from."""
    x = from_uint8(pairs(64).images)
    vae = toybox_vae.AutoencoderKL(**toybox_vae.CONFIG, latent_channels=8)
    toybox_vae.linear_encoder(vae, x, std=0.1)
    return vae, *toybox_vae.principal_components(x, 8), x


def test_principal_components_keep_what_varies_most(linear):
    _, A, b, x = linear
    z = torch.nn.functional.conv2d(x, A, b, stride=4)  # (64, 8, 16, 16)
    rows = z.permute(1, 0, 2, 3).flatten(1).double()
    close(rows.mean(1), torch.zeros(8).double(), rtol=0, atol=1e-4)
    assert rows.square().mean().item() == pytest.approx(1, abs=1e-3)
    covariance = torch.cov(rows)
    assert (covariance - covariance.diag().diag()).abs().max() < 1e-3  # uncorrelated
    assert (covariance.diag().diff() <= 1e-6).all()  # the largest first
    blocks = torch.nn.functional.pixel_unshuffle(x, 4).permute(1, 0, 2, 3).flatten(1)
    total, directions = blocks.var(1).sum(), A.flatten(1) / A.flatten(1).norm(dim=1, keepdim=True)
    kept = (directions @ blocks).var(1).sum() / total
    assert kept > 0.9  # 8 of 48 numbers
    close(directions @ directions.T, torch.eye(8), rtol=0, atol=1e-5)


def test_the_networks_weights_compute_the_linear_map(linear):
    vae, A, b, x = linear
    with torch.no_grad():
        posterior = vae.encode(x[:16]).latent_dist
    close(posterior.mean, torch.nn.functional.conv2d(x[:16], A, b, stride=4), rtol=0, atol=0.01)
    close(posterior.std, torch.full_like(posterior.std, 0.1), rtol=0, atol=1e-5)
