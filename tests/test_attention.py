"""The attention hook: it is called at every softmax, changes the result, and leaves nothing behind."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor, CustomDiffusionAttnProcessor
from tiny import TINY, build
from torch import nn

from course_lib.editing.attention import AttentionMaps, attention_hook, word_maps
from course_lib.latent import registry, text
from course_lib.latent.stable_diffusion import load

TOYBOX = registry.MODELS["toybox"].folder
PROMPTS = ["a photo of a cat", "tiger"]
close = torch.testing.assert_close
exact = dict(rtol=0, atol=0)


def same(probs, layer, is_cross):
    return probs


@pytest.fixture(scope="module")
def tiny():
    return build()


@pytest.fixture(scope="module", params=["tiny", "toybox"])
def sd(request, tiny):
    if request.param == "toybox" and not TOYBOX.is_dir():
        pytest.skip("data/checkpoints/toybox-sd is not there yet")
    return tiny if request.param == "tiny" else load("toybox", "cpu")


@torch.no_grad()
def predict(sd, features=None):
    features = sd.encode_prompt(PROMPTS) if features is None else features
    return sd.eps_model(features)(sd.noise(2, seed=1), torch.tensor([900, 300]))


def test_the_identity_changes_nothing(sd):
    plain = predict(sd)
    with attention_hook(sd.unet, same):
        hooked = predict(sd)
    close(hooked, plain, rtol=0, atol=1e-5)
    assert plain.std() > 0.01


def test_every_layer_is_seen_with_its_probabilities(sd):
    seen = {}

    def look(probs, layer, is_cross):
        assert layer not in seen and probs.dtype == torch.float32
        seen[layer] = (tuple(probs.shape), is_cross)
        close(probs.sum(-1), torch.ones(probs.shape[:-1]))
        return probs

    with attention_hook(sd.unet, look):
        predict(sd)
    assert {f"{layer}.processor" for layer in seen} == set(sd.unet.attn_processors)
    L, sides = sd.tokenizer.model_max_length, set()
    for layer, ((B, heads, Q, K), is_cross) in seen.items():
        assert is_cross == layer.endswith("attn2") and B == 2 and heads == sd.unet.get_submodule(layer).heads
        assert K == (L if is_cross else Q)
        sides.add(round(Q**0.5))
    assert 16 in sides and len(sides) > 1


def test_what_the_function_returns_is_used(tiny):
    """All cross-attention on the first token is the same as a prompt whose tokens are all the first one."""

    def first_only(probs, layer, is_cross):
        return torch.zeros_like(probs).index_fill_(-1, torch.tensor([0]), 1.0) if is_cross else probs

    features = tiny.encode_prompt(PROMPTS)
    with attention_hook(tiny.unet, first_only):
        hooked = predict(tiny, features)
    close(hooked, predict(tiny, features[:, :1].expand_as(features)), rtol=0, atol=1e-5)
    assert not torch.allclose(hooked, predict(tiny, features), atol=1e-4)


def test_everything_comes_back(sd):
    before, plain = dict(sd.unet.attn_processors), predict(sd)
    with attention_hook(sd.unet, lambda probs, layer, is_cross: torch.zeros_like(probs)):
        predict(sd)
    with pytest.raises(RuntimeError, match="mine"), attention_hook(sd.unet, same):
        raise RuntimeError("mine")
    with pytest.raises(ZeroDivisionError), attention_hook(sd.unet, lambda probs, layer, is_cross: 1 / 0):
        predict(sd)
    after = sd.unet.attn_processors
    assert after.keys() == before.keys() and all(after[key] is before[key] for key in before)
    close(predict(sd), plain, **exact)


def test_hooks_may_be_nested(tiny):
    calls = []

    def note(name):
        return lambda probs, layer, is_cross: calls.append((name, layer)) or probs

    with attention_hook(tiny.unet, note("outer")):
        with attention_hook(tiny.unet, note("inner")):
            predict(tiny)
        count = len(tiny.unet.attn_processors)
        assert len(calls) == 2 * count and [name for name, _ in calls[:2]] == ["outer", "inner"]
        assert calls[0][1] == calls[1][1]
        predict(tiny)
    assert [name for name, _ in calls[2 * count :]] == ["outer"] * count


def test_gradients_flow_through_it(tiny):
    features = tiny.encode_prompt(PROMPTS).requires_grad_()
    with attention_hook(tiny.unet, same):
        tiny.eps_model(features)(tiny.noise(2, seed=1), 500).square().mean().backward()
    hooked, features.grad = features.grad, None
    tiny.eps_model(features)(tiny.noise(2, seed=1), 500).square().mean().backward()
    close(hooked, features.grad, rtol=1e-3, atol=1e-6)
    assert hooked.abs().sum() > 0


def test_attention_over_pixels_with_its_own_norm_and_residual(tiny):
    """The autoencoder's layers take (B, D, h, w), normalise it and add it back."""
    z = tiny.noise(2, seed=1)
    plain = tiny.decode(z)
    with torch.no_grad(), attention_hook(tiny.vae, same):
        close(tiny.decode(z), plain, rtol=0, atol=1e-5)
    with torch.no_grad(), attention_hook(tiny.vae, lambda probs, layer, is_cross: 0 * probs):
        assert not torch.allclose(tiny.decode(z), plain, atol=1e-4)


@pytest.mark.parametrize("processor", ["auto", "AttnProcessor"])
def test_other_ways_to_compute_the_same_are_replaced_and_restored(processor):
    sd = build()
    if processor == "auto":
        sd.unet.set_attention_slice("auto")
    else:
        sd.unet.set_attn_processor(AttnProcessor())
    plain, before = predict(sd), sd.unet.attn_processors
    with attention_hook(sd.unet, same):
        close(predict(sd), plain, rtol=0, atol=1e-5)
    assert all(sd.unet.attn_processors[key] is before[key] for key in before)


def test_padding_that_is_masked_stays_masked(tiny):
    z, features = tiny.noise(2, seed=1), tiny.encode_prompt(PROMPTS)
    keep = torch.arange(features.shape[1]).expand(2, -1) < torch.tensor([[5], [3]])
    options = dict(encoder_hidden_states=features, encoder_attention_mask=keep)

    def look(probs, layer, is_cross):
        if is_cross:
            assert probs[0, ..., 5:].abs().max() == 0 and probs[1, ..., 3:].abs().max() == 0
        return probs

    with torch.no_grad():
        plain = tiny.unet(z, 9, **options).sample
        with attention_hook(tiny.unet, look):
            close(tiny.unet(z, 9, **options).sample, plain, rtol=0, atol=1e-5)


def test_a_network_without_attention_is_refused():
    plain = UNet2DConditionModel(block_out_channels=(32, 32), layers_per_block=1, norm_num_groups=8,
                                 mid_block_type=None, down_block_types=("DownBlock2D",) * 2,
                                 up_block_types=("UpBlock2D",) * 2)  # fmt: skip
    for network in (nn.Linear(2, 2), plain):
        with pytest.raises(ValueError, match=r"^unet: expected a network with attention layers of diffusers, "):
            with attention_hook(network, same):
                pytest.fail("the block was entered")


def test_attention_that_is_not_plain_is_refused():
    """To replace trained processors by plain attention would give other pictures, in silence."""
    unet = UNet2DConditionModel(**TINY["unet"])
    unet.set_attn_processor({key: CustomDiffusionAttnProcessor(hidden_size=32) for key in unet.attn_processors})
    with pytest.raises(ValueError, match=r"^unet: expected plain attention, but .*attn1 has its own, CustomDiff"):
        with attention_hook(unet, same):
            pytest.fail("the block was entered")
    unet = UNet2DConditionModel(**TINY["unet"])
    next(m for name, m in unet.named_modules() if name.endswith("attn2")).norm_q = nn.Identity()
    with pytest.raises(ValueError, match=r"^unet: expected plain attention, but .*attn2 has its own"):
        with attention_hook(unet, same):
            pytest.fail("the block was entered")


@pytest.mark.parametrize(("wrong", "got"), [(None, "NoneType"), (torch.zeros(1), r"\(1,\)")])
def test_a_function_that_returns_something_else_is_refused(tiny, wrong, got):
    message = rf"^fn: expected probabilities \(2, .*\) back, got {got} in down_blocks"
    with pytest.raises(ValueError, match=message), attention_hook(tiny.unet, lambda probs, layer, is_cross: wrong):
        predict(tiny)


def test_maps_are_means_over_layers_heads_and_calls(tiny):
    seen, kept = AttentionMaps(16), []

    def keep(probs, layer, is_cross):
        if is_cross and probs.shape[-2] == 256:
            kept.append(probs.mean(dim=1))
        return seen(probs, layer, is_cross)

    with attention_hook(tiny.unet, keep):
        predict(tiny)
        predict(tiny, tiny.encode_prompt(["of", "of"]))
    maps = seen.mean()
    assert len(kept) > 2 and maps.shape == (2, 16, 16, 16)
    close(maps[:, 3, 1, 2], torch.stack(kept).mean(0)[:, 1 * 16 + 2, 3])  # latent (1, 2) is the 18th in a row
    close(maps.sum(1), torch.ones(2, 16, 16))
    with pytest.raises(ValueError, match=r"^side: expected the side of a layer with cross-attention, got 5"):
        AttentionMaps(5).mean()


def test_word_maps_belong_to_the_picture_that_is_drawn(sd):
    prompt, x_T = "a photo of a cat", sd.noise(2, seed=3)
    images, maps = word_maps(sd, prompt, x_T, steps=4, w=3.0)
    close(images, sd.sample(prompt, x_T=x_T, steps=4, w=3.0), rtol=0, atol=1e-4)
    assert list(maps) == ["a", "photo", "of", "a (2)", "cat"] and maps["cat"].shape == (2, 16, 16)
    alone, one = word_maps(sd, prompt, steps=4, w=3.0, seed=3)
    close(alone, images[:1], rtol=0, atol=1e-4)
    close(one["cat"], maps["cat"][:1], rtol=0, atol=1e-5)


def test_words_own_all_their_tokens_and_places_and_only_the_prompts_half(tiny):
    seen, prompt, x_T = AttentionMaps(16), "a photo of a cat", tiny.noise(1, seed=3)
    with torch.no_grad(), attention_hook(tiny.unet, seen):
        tiny.eps_model(prompt)(x_T, 1000)
    by_hand = seen.mean()[0]
    _, maps = word_maps(tiny, prompt, x_T, steps=1, w=2.0)  # the first step is at t = T
    positions = dict(text.words(tiny.tokenizer, prompt))
    assert len(positions["photo"]) == 2
    close(maps["photo"][0], by_hand[positions["photo"]].sum(0), rtol=0, atol=1e-6)
    first, second = (at for word, at in text.words(tiny.tokenizer, prompt) if word == "a")
    close(maps["a"][0], by_hand[first].sum(0), rtol=0, atol=1e-6)
    close(maps["a (2)"][0], by_hand[second].sum(0), rtol=0, atol=1e-6)


def test_word_maps_need_a_prompt_that_is_read_and_a_layer_that_exists(tiny):
    with pytest.raises(ValueError, match=r"^w: expected a guidance scale other than 0"):
        word_maps(tiny, "a cat", w=0)
    with pytest.raises(ValueError, match=r"^side: expected the side of a layer with cross-attention, got 7"):
        word_maps(tiny, "a cat", steps=1, side=7)
