"""The loop of all methods: the tensors that are trained, its loss, and the state after a training that breaks off."""

import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import FULL_SIZE, TINY

from course_lib.personalization import custom_diffusion, dreambooth, finetune, lora, textual_inversion
from course_lib.personalization.examples import Examples
from course_lib.personalization.finetune import Draw, PromptFeatures, denoising_loss, draw_step
from course_lib.personalization.recipe import Settings, Term

close = torch.testing.assert_close
exact = dict(rtol=0, atol=0)
PARTS = ("unet", "vae", "text_encoder")
PICTURES = [Image.fromarray(np.random.default_rng(k).integers(0, 256, (32, 32, 3), dtype=np.uint8)) for k in range(3)]


def build():
    """Smaller still than the other tests' model: latents of 8 x 8."""
    return FULL_SIZE.build(**TINY | {"unet": TINY["unet"] | {"sample_size": 8}})


def settings(**options):
    return Settings(**{"steps": 2, "lr": 1e-2, "batch_size": 2, "weight_decay": 0.1, **options})


def prior(prompt="a cat", count=4):
    g = torch.Generator().manual_seed(1)
    return Examples(torch.randn(count, 4, 8, 8, generator=g), torch.zeros(count, 4, 8, 8), [(prompt,)] * count)


def inversion(sd, vectors=1, captions=None, **options):
    return textual_inversion.recipe(
        sd, PICTURES, noun="cat", vectors=vectors, captions=captions, settings=settings(**options)
    )


def booth(sd, text=False, rank=None, prior=None, prior_weight=1.0, **options):
    more = dict(text=text, prior=prior, prior_weight=prior_weight, settings=settings(**options))
    if rank is None:
        return dreambooth.recipe(sd, PICTURES, noun="cat", **more)
    return lora.recipe(sd, PICTURES, noun="cat", rank=rank, **more)


def custom(sd, count=1, regularisation=(), captions=("a {}",) * 3, **options):
    nouns = ("cat", "tiger")[:count]
    subjects = [custom_diffusion.SubjectPictures(PICTURES, f"<{noun}-1>", noun, captions) for noun in nouns]
    return custom_diffusion.joint_recipe(sd, subjects, regularisation=regularisation, settings=settings(**options))


METHODS = {
    "textual inversion": inversion,
    "textual inversion, 3 vectors": lambda sd, **o: inversion(sd, vectors=3, **o),
    "dreambooth": booth,
    "dreambooth and text": lambda sd, **o: booth(sd, text=True, **o),
    "lora": lambda sd, **o: booth(sd, rank=2, **o),
    "lora and text": lambda sd, **o: booth(sd, rank=2, text=True, **o),
    "custom diffusion": lambda sd, **o: custom(sd, regularisation=[prior()], **o),
    "custom diffusion, 2 subjects": lambda sd, **o: custom(sd, 2, **o),
}


@pytest.fixture(scope="module")
def sd():
    return build()


def copies(params):
    return {name: param.detach().clone() for name, param in params.items()}


def train(recipe, sd, **options):
    """All steps; what was trained."""
    for _step, _loss in finetune.finetune(sd, recipe, **options):
        pass
    return copies(recipe.params)


def trained(sd, method, checkpoint=None, **options):
    with METHODS[method](sd, **options) as recipe:
        return train(recipe, sd, checkpoint=checkpoint, save_every=2)


def same_training(sd, method, one, two, tolerance):
    """Two results differ by at most a share of the way from the start."""
    with METHODS[method](sd) as recipe:
        start = copies(recipe.params)
    way, gap = (sum((a[n] - b[n]).square().sum() for n in start) ** 0.5 for a, b in ((one, start), (one, two)))
    assert set(one) == set(two) == set(start) and way > 0.01
    assert gap <= tolerance * way, f"{gap / way:.1e} of the way"


# ---- what moves ----


def tensors(sd):
    """The parameters and buffers themselves: they stay the same objects when a layer around them is wrapped."""
    return {f"{part}.{name}": value for part in PARTS for name, value in _named(getattr(sd, part))}


def _named(network):
    return [*network.named_parameters(), *network.named_buffers()]


def state(sd):
    """All that a recipe may have changed: numbers, their types, words, hooks and modes."""
    networks = [getattr(sd, part) for part in PARTS]
    numbers = [(name, value.clone()) for network in networks for name, value in network.state_dict().items()]
    layers = [(type(m), m.training, len(m._forward_hooks)) for network in networks for m in network.modules()]
    learning = [p.requires_grad or p.grad is not None for network in networks for p in network.parameters()]
    return numbers, layers, any(learning), len(sd.tokenizer), sd.tokenizer.get_vocab()


def assert_unchanged(before, after):
    for (name, old), (new_name, new) in zip(before[0], after[0], strict=True):
        assert name == new_name and old.dtype == new.dtype and torch.equal(old, new), name
    assert before[1:] == after[1:]


@pytest.mark.parametrize("method", METHODS)
def test_exactly_the_recipes_tensors_move_and_after_an_error_all_is_as_before(sd, method):
    before, everything = state(sd), tensors(sd)
    frozen = copies(everything)
    with pytest.raises(RuntimeError, match="halfway"), METHODS[method](sd, steps=3) as recipe:
        start = copies(recipe.params)
        learning = {id(p) for part in PARTS for p in getattr(sd, part).parameters() if p.requires_grad}
        assert learning == {id(param) for param in recipe.params.values()}
        for step, _loss in finetune.finetune(sd, recipe):
            if step == 2:
                moved = {name for name, value in everything.items() if not torch.equal(value, frozen[name])}
                assert moved == set(recipe.params) & set(everything)
                assert not [name for name, param in recipe.params.items() if torch.equal(param, start[name])]
                raise RuntimeError("halfway")
    assert_unchanged(before, state(sd))


def test_how_many_tensors_are_trained(sd):
    unet, text = len(list(sd.unet.parameters())), len(list(sd.text_encoder.parameters()))
    expected = {
        "textual inversion": 1, "textual inversion, 3 vectors": 1, "dreambooth": unet,
        "dreambooth and text": unet + text, "lora": 4 * 8 * 2, "lora and text": 4 * 8 * 2 + 2 * 4 * 2,
        "custom diffusion": 9, "custom diffusion, 2 subjects": 9,
    }  # fmt: skip
    for method, count in expected.items():
        with METHODS[method](sd) as recipe:
            assert len(recipe.params) == count, method
            rows = recipe.params.get("tokens", ())
            assert len(rows) == {"textual inversion, 3 vectors": 3, "custom diffusion, 2 subjects": 2}.get(
                method, int("tokens" in recipe.params)
            )


def test_in_bfloat16_trained_tensors_are_float32_and_pictures_can_be_drawn_in_the_loop(sd):
    half = build().to(dtype=torch.bfloat16)
    before = state(half)
    for method in ("textual inversion", "dreambooth and text", "lora", "custom diffusion"):
        with METHODS[method](half, gradient_checkpointing=method == "lora") as recipe, METHODS[method](sd) as full:
            assert {param.dtype for param in recipe.params.values()} == {torch.float32}
            losses = [loss for _step, loss in finetune.finetune(sd, full)]
            for step, loss in finetune.finetune(half, recipe):
                close(loss, losses[step - 1], rtol=0.02, atol=0)
            assert half.sample(f"a {recipe.about['token']} cat", steps=1).isfinite().all()
        assert_unchanged(before, state(half))


def test_float16_on_a_cpu_is_refused():
    half = build().to(dtype=torch.float16)
    before = state(half)
    with pytest.raises(ValueError, match=r"^sd: expected float32 on a CPU, got float16; load it with"), inversion(half):
        pass
    assert_unchanged(before, state(half))


# ---- the loss ----


def draws_of_two_terms(weight):
    """What `draw_step` gives for a term with masks of different sizes and for a prior."""
    g = torch.Generator().manual_seed(0)
    mask = torch.ones(4, 1, 8, 8)
    mask[0, :, :3] = 0
    mask[1, :, :, 1:] = 0
    keys = dict(z0=torch.randn(4, 4, 8, 8, generator=g), eps=torch.randn(4, 4, 8, 8, generator=g), mask=mask,
                t=torch.tensor([1, 300, 700, 1000]))  # fmt: skip
    both = Draw(prompts=["a cat", "a tiger", "of", "of"], weight=1.0, **keys)
    return [both.part(slice(0, 2)), replace(both.part(slice(2, 4)), weight=weight)]


@pytest.fixture
def features(sd):
    return PromptFeatures(sd, SimpleNamespace(tokens=None, trains_text=False))


@pytest.mark.parametrize("weighting", ["eps", "v", "min_snr"])
def test_the_loss_is_the_formula(sd, features, weighting):
    draws, by_hand = draws_of_two_terms(0.3), 0.0
    for draw in draws:
        for i, prompt in enumerate(draw.prompts):
            z0, eps, t, mask = (getattr(draw, key)[i] for key in ("z0", "eps", "t", "mask"))
            alpha_bar = sd.schedule.alpha_bar[t].float()
            zt = alpha_bar.sqrt() * z0 + (1 - alpha_bar).sqrt() * eps
            eps_hat = sd.unet(zt[None], t - 1, encoder_hidden_states=sd.encode_prompt(prompt)).sample[0]
            shown = [(eps - eps_hat)[c][mask[0] == 1] for c in range(4)]  # the mask has one channel, the latents four
            snr = alpha_bar / (1 - alpha_bar)
            factor = {"eps": 1, "v": 1 / alpha_bar, "min_snr": min(snr, 5) / snr}[weighting]
            by_hand = by_hand + draw.weight * factor * torch.stack(shown).square().mean() / 2
    close(denoising_loss(sd, draws, features, weighting), by_hand, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("predicts", "own", "other"), [("epsilon", "eps", "v"), ("v_prediction", "v", "eps")])
def test_the_loss_is_that_of_the_models_own_training(sd, features, monkeypatch, predicts, own, other):
    monkeypatch.setitem(sd.noise_settings, "prediction_type", predicts)
    for asked, expected in ((None, own), ("min_snr", "min_snr")):
        with booth(sd, rank=2, weighting=asked) as recipe:
            assert recipe.settings.weighting == expected
    draws = draws_of_two_terms(0.3)
    loss = denoising_loss(sd, draws, features)
    close(loss, denoising_loss(sd, draws, features, own), **exact)
    assert loss != denoising_loss(sd, draws, features, other)


def test_a_prior_of_weight_0_is_none(sd, features):
    first, second = draws_of_two_terms(0.0)
    close(denoising_loss(sd, [first, second], features), denoising_loss(sd, [first], features))
    for weight, weights in ((0.0, [1.0]), (0.5, [1.0, 0.5])):
        with booth(sd, rank=2, prior=prior(), prior_weight=weight) as recipe:
            assert [term.weight for term in recipe.terms] == weights
    with pytest.raises(ValueError, match=r"^prior_weight: expected a number of at least 0, got -1"):
        with booth(sd, prior=prior(), prior_weight=-1):
            pass


def test_a_mask_of_ones_is_none(sd, features):
    with inversion(sd) as recipe:
        plain = draw_step(sd, recipe, 2, 1)
        examples = recipe.terms[0].examples
        examples.mask = torch.ones(len(examples.mean), 1, 8, 8)
        masked = draw_step(sd, recipe, 2, 1)
        close(denoising_loss(sd, masked, features), denoising_loss(sd, plain, features), **exact)
        examples.mask[:, :, 4:] = 0
        half = denoising_loss(sd, draw_step(sd, recipe, 2, 1), features)
        assert half != denoising_loss(sd, plain, features)


def test_the_weighting_min_snr_trains_with_a_prior(sd):
    results = {}
    for weighting in ("eps", "min_snr"):
        with booth(sd, rank=2, prior=prior(), weighting=weighting) as recipe:
            results[weighting] = train(recipe, sd)
    one, two = results.values()
    assert all(value.isfinite().all() for value in two.values())
    assert any(not torch.equal(one[name], two[name]) for name in one)


def test_what_cannot_change_is_encoded_once(sd, monkeypatch):
    asked = []
    encode = type(sd).encode_prompt
    monkeypatch.setattr(type(sd), "encode_prompt", lambda self, prompts: asked.extend(prompts) or encode(self, prompts))
    captions = ["a {}", "A <CAT-1> of", "of a {}"]  # a new word in capitals is a new word too
    with custom(sd, regularisation=[prior("a tiger")], captions=captions, steps=4, batch_size=3) as recipe:
        train(recipe, sd)
    counts = {prompt: asked.count(prompt) for prompt in asked}
    assert counts == {"a <cat-1> cat": 4, "A <CAT-1> of": 4, "of a <cat-1> cat": 4, "a tiger": 1}
    for text, times in ((False, 1), (True, 3)):
        asked.clear()
        with booth(sd, text=text, prior=prior(), steps=3) as recipe:
            train(recipe, sd)
        assert {prompt: asked.count(prompt) for prompt in asked} == {"a photo of a sks cat": times, "a cat": times}


def test_features_remember_each_prompt(sd, features, monkeypatch):
    asked, encode = [], sd.encode_prompt
    monkeypatch.setattr(sd, "encode_prompt", lambda prompts: asked.extend(prompts) or encode(prompts))
    for prompts in (["of"], ["a"], ["of", "a", "of"]):
        close(features(prompts), encode(prompts))
    assert asked == ["of", "a"]


# ---- the step ----


@pytest.mark.parametrize("method", ["lora", "custom diffusion"])
def test_two_halves_of_a_batch_are_the_batch(sd, method):
    whole = trained(sd, method, batch_size=4)
    same_training(sd, method, whole, trained(sd, method, batch_size=4, accumulate=2), 1e-3)


def test_gradient_checkpointing_gives_the_same_tensors(sd):
    plain, seen = trained(sd, "dreambooth"), []
    with booth(sd, gradient_checkpointing=True) as recipe:
        for _step, _loss in finetune.finetune(sd, recipe):
            seen.append(sd.unet.is_gradient_checkpointing and sd.unet.training)
            assert sd.sample("a sks cat", steps=1).isfinite().all()
        again = copies(recipe.params)
        assert seen == [True, True] and not sd.unet.is_gradient_checkpointing and not sd.unet.training
    close(again, plain, **exact)


def test_the_rate_rises_over_the_warm_up_and_gradients_are_clipped(sd):
    with inversion(sd, warmup=1) as recipe:
        start, none = copies(recipe.params), train(recipe, sd)
    with inversion(sd, warmup=4) as recipe:
        some = train(recipe, sd)
    with inversion(sd, clip=1e-12) as recipe:  # so small that Adam's epsilon outweighs it
        clipped = train(recipe, sd)
    ways = [(a["tokens"] - start["tokens"]).norm() for a in (none, some, clipped)]
    assert ways[1] / ways[0] == pytest.approx((1 / 4 + 2 / 4) / 2, rel=0.1) and ways[2] < 0.1 * ways[0]


# ---- settings ----


@pytest.mark.parametrize(("options", "expected"), [
    (dict(steps=0), "steps: expected a whole number of at least 1, got 0"),
    (dict(steps=2.5), "steps: expected a whole number of at least 1, got 2.5"),
    (dict(batch_size=0), "batch_size: expected a whole number of at least 1, got 0"),
    (dict(accumulate=-1), "accumulate: expected a whole number of at least 1, got -1"),
    (dict(batch_size=4, accumulate=3), "accumulate: expected a divisor of batch_size 4, got 3"),
    (dict(lr=0.0), "lr: expected a number between 0 and 1, such as 1e-4, got 0.0"),
    (dict(lr=5.0), "lr: expected a number between 0 and 1"),
    (dict(lr=float("nan")), "lr: expected a number between 0 and 1"),
    (dict(optimizer="sgd"), "optimizer: expected 'adamw' or 'adamw8bit', got 'sgd'"),
])  # fmt: skip
def test_impossible_settings_are_refused(options, expected):
    with pytest.raises(ValueError, match=f"^{expected}"):
        settings(**options)


def test_what_the_loop_cannot_do_is_refused(sd, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with inversion(sd, optimizer="adamw8bit") as recipe:
        with pytest.raises(ValueError, match=r"^optimizer: 'adamw8bit' needs bitsandbytes: pip install"):
            train(recipe, sd)
    with inversion(sd, weighting="snr") as recipe:
        with pytest.raises(ValueError, match=r"^weighting: expected 'eps', 'v' or 'min_snr', got 'snr'"):
            train(recipe, sd)


def test_a_term_counts_by_its_weight(sd):
    """Twice the weight of a term and half of it, twice, are one."""
    with inversion(sd, captions=["a {}"] * 3) as recipe:
        once = [replace(draw, weight=2.0) for draw in draw_step(sd, recipe, 2, 1)]
        twice = [replace(draw, weight=1.0) for draw in once * 2]
        features = PromptFeatures(sd, recipe)
        close(denoising_loss(sd, once, features), denoising_loss(sd, twice, features))
        recipe.terms = [Term(recipe.terms[0].examples, 0.25)]
        assert draw_step(sd, recipe, 2, 1)[0].weight == 0.25
