"""The Toybox training scripts: a run that is killed goes on bit for bit, and the pieces the stages are made of."""

import argparse
import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from diffusers import ConfigMixin, ModelMixin, UNet2DConditionModel
from diffusers.configuration_utils import register_to_config
from safetensors import safe_open
from torch import nn
from transformers import CLIPTokenizer

from course_lib.data.toybox import NOUNS
from course_lib.data.toybox_accessories import ACCESSORIES
from course_lib.data.toybox_pen import COLOURS, PATTERNS
from course_lib.diffusion.checkpoint import sha256

sys.path.append(str(Path(__file__).resolve().parents[1] / "training"))  # the scripts import each other by name
toybox_run, toybox_clip, toybox_unet, toybox_vae = map(
    importlib.import_module, ("toybox_run", "toybox_clip", "toybox_unet", "toybox_vae")
)
Run = toybox_run.Run
close = torch.testing.assert_close
exact = dict(rtol=0, atol=0)
NEVER = 1e9  # minutes


def new_run(out, fill=0.5, **options):
    """A Run of a linear model, with the options of the command line."""
    parser = argparse.ArgumentParser()
    toybox_run.common_arguments(parser, out=str(out), batch_size=8, lr=0.05, steps=150)
    words = [f"--{name.replace('_', '-')}={value}" for name, value in {"save_every": NEVER, **options}.items()]
    model = nn.Linear(4, 2)
    with torch.no_grad():
        for weight in model.parameters():
            weight.fill_(fill)
    return Run(parser.parse_args(words), model, Accelerator(cpu=True))


def regression(run, losses=None, before=lambda step: None):
    """A loss for run.train: the average of four numbers is to be learnt. before(step) may break it off."""

    def batch_loss(generator):
        before(run.step)
        x = torch.randn(run.args.batch_size, 4, generator=generator)
        loss = (run.model(x) - x.mean(1, keepdim=True)).square().mean()
        if losses is not None:
            losses[run.step] = loss.item()
        return loss

    return batch_loss


def logged(run):
    return [(row["step"], row["loss"]) for row in map(json.loads, run.log.read_text().splitlines()) if "loss" in row]


def state(run):
    return torch.load(run.state, weights_only=True)


# ---- the loop ----


def test_a_killed_run_goes_on_bit_for_bit(tmp_path, monkeypatch):
    """Killed at step 121, last saved at step 100: 20 steps are lost and made again."""
    save = Run._save
    monkeypatch.setattr(Run, "_save", lambda run: save(run) if run.step in (100, 150) else None)
    expected, losses = {}, {}
    whole = new_run(tmp_path / "whole", save_every=-1)
    whole.train(regression(whole, expected))
    assert len(expected) == 150 and expected[150] < 0.1 * expected[1]

    def kill(step):
        if step == 121:
            raise KeyboardInterrupt

    first = new_run(tmp_path / "killed", save_every=-1)
    with pytest.raises(KeyboardInterrupt):
        first.train(regression(first, losses, kill))
    second = new_run(tmp_path / "killed", fill=9.0)  # nothing of the new model may survive
    assert second.step == 100
    second.train(regression(second, losses))
    assert losses == expected and [step for step, _ in logged(whole)] == [50, 100, 150]
    assert logged(second) == logged(whole)
    a, b = state(whole), state(second)
    for key in ("step", "updates", "net", "ema", "optimizer"):
        close(b[key], a[key], **exact)
    close(second.ema.model.state_dict(), a["ema"], **exact)
    assert a["step"] == a["updates"] == 150 and not torch.equal(a["ema"]["weight"], a["net"]["weight"])


def test_other_seeds_give_other_batches(tmp_path):
    a, b = (new_run(tmp_path / str(seed), seed=seed) for seed in (0, 1))
    draws = [run.generator(step).initial_seed() for run in (a, b) for step in (1, 2)]
    assert len(set(draws)) == 4 and a.generator(2).initial_seed() == draws[1]


def test_the_learning_rate_rises_stays_and_falls(tmp_path):
    run = new_run(tmp_path, lr=2.0, steps=1000, cooldown=0.3)
    curve = [run.learning_rate(step) for step in range(1001)]
    assert curve[1] == pytest.approx(0.02) and curve[50] == pytest.approx(1.0)
    assert curve[100:701] == [2.0] * 601
    assert curve[850] == pytest.approx(1.0) and curve[1000] == run.learning_rate(1200) == 0


def test_the_learning_rate_reaches_the_optimizer(tmp_path):
    run, rates = new_run(tmp_path, lr=1.0, steps=4), []
    run.train(regression(run, before=lambda step: rates.append(run.optimizer.param_groups[0]["lr"])))
    assert rates[1:] == pytest.approx([0.01, 0.02, 0.03]) and run.optimizer.param_groups[0]["lr"] == 0


def test_the_clock_saves_and_stops(tmp_path, monkeypatch):
    """20 seconds a step: with 1 minute it ends after the fourth step, and goes on from there another time."""
    now, saves = [0.0], []
    monkeypatch.setattr(toybox_run, "time", SimpleNamespace(time=lambda: now[0]))

    def pass_time(step):
        now[0] += 20

    for steps in (4, 8):
        run = new_run(tmp_path, minutes=1, save_every=0.6)
        run.train(regression(run, before=pass_time), on_save=lambda step: saves.append(step) or {"seen": step})
        assert run.step == state(run)["step"] == steps and run.minutes == pytest.approx(steps / 3)
    assert saves == [2, 4, 6, 8] and [step for step, _ in logged(run)] == [4, 8]
    assert json.loads(run.log.read_text().splitlines()[-1]) == {"step": 8, "minutes": 2.67, "seen": 8}


@pytest.mark.parametrize("save_every", [NEVER, -1])
def test_a_loss_that_is_not_a_number_ends_the_run(tmp_path, save_every):
    """What it says must be true: the saved state is good, however often is saved."""
    first = new_run(tmp_path, minutes=-1)
    first.train(regression(first))  # one step, and a state
    run = new_run(tmp_path, save_every=save_every)
    good = regression(run)
    with pytest.raises(RuntimeError, match=r"not a number at step \d+; .*state\.pt .*again with a smaller --lr$"):
        run.train(lambda generator: good(generator) * (float("nan") if run.step >= 20 else 1.0))
    assert run.step <= 50 and state(run)["step"] < 20
    assert all(value.isfinite().all() for value in state(run)["net"].values())


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
    toybox_run.ship(model, tmp_path / "model", run, made_by="a test")
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


@pytest.mark.parametrize("channels", [8, 4])
def test_the_untrained_unet_returns_its_input_and_learns_everywhere(channels):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = toybox_unet.CONFIG | dict(in_channels=channels, out_channels=channels, cross_attention_dim=128)
        unet = UNet2DConditionModel(**config)
        toybox_unet.start_as_copy(unet)
        xt, features, eps = torch.randn(2, channels, 16, 16), torch.randn(2, 32, 128), torch.randn(2, channels, 16, 16)
    t = torch.tensor([500, 999])
    optimizer = torch.optim.SGD(unet.parameters(), lr=0.1)
    for step in (1, 2):  # the layers behind zeros get their gradient from the second step on
        eps_hat = unet(xt, t, features).sample
        if step == 1:
            close(eps_hat.square().mean(), torch.tensor(1.0), rtol=0, atol=0.1)
            assert (eps_hat - xt).square().mean() < 2e-3
        optimizer.zero_grad()
        (eps_hat - eps).square().mean().backward()
        optimizer.step()
    assert [name for name, weight in unet.named_parameters() if not weight.grad.abs().max() > 0] == []
    for layer, rows in ((unet.conv_in, (1, 2, 3)), (unet.conv_out, (0, 2, 3))):  # by channel of the widest level
        assert (layer.weight.grad.abs().amax(rows) > 0).all()
    plus, minus = unet.conv_in.weight[: 2 * channels].detach().unflatten(0, (-1, 2)).unbind(1)
    assert not torch.allclose(plus, -minus, atol=1e-5)  # the two signs go ways of their own


def test_a_part_that_is_missing_is_named(tmp_path):
    (tmp_path / "vae").mkdir()
    with pytest.raises(SystemExit, match=r"^--parts: expected .*text_encoder; train it first \(`make train-toybox`"):
        toybox_unet.load_parts(tmp_path, torch.device("cpu"))


# ---- the autoencoder's stage ----


def test_psnr_by_hand():
    x = torch.zeros(2, 3, 4, 4)
    assert toybox_vae.psnr(x + 0.2, x) == pytest.approx(20, abs=1e-4)  # 10 log10(4 / 0.04)
    assert toybox_vae.psnr(x + 5, x) == pytest.approx(10 * torch.tensor(4.0).log10().item())  # cut off at 1


def test_reconstruction_error_by_hand():
    x, x_hat = torch.zeros(1, 1, 2, 2), torch.tensor([[[[1.0, 0.0], [0.0, 0.0]]]])
    error = toybox_vae.reconstruction_error(x_hat, x)  # pixels 1/4 + 2/4, one of two steps right and one of two down
    assert error.item() == pytest.approx(0.25 + 0.5 + 0.5 + 0.5)
    assert toybox_vae.reconstruction_error(x + 0.5, x).item() == pytest.approx(0.5 + 2 * 0.25)  # no edges
    tall = torch.arange(6.0).reshape(1, 1, 3, 2)  # steps of 1 to the right and 2 down
    assert toybox_vae.reconstruction_error(tall, 0 * tall).item() == pytest.approx(2.5 + 2 * 55 / 6 + 1 + 2)
