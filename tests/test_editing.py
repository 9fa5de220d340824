"""Editing: each method equals the untouched sampler at its limit, and DDIM run backwards comes back."""

import pytest
import torch
from tiny import build
from torch import nn

from course_lib.diffusion import samplers, schedule
from course_lib.editing import inversion
from course_lib.editing.inversion import ddim_inversion, ddim_step, invert, null_text_inversion, redraw
from course_lib.editing.plug_and_play import Layers, plug_and_play
from course_lib.editing.prompt_to_prompt import Edit, SharedAttention, alignment, edit, places
from course_lib.editing.sdedit import sdedit
from course_lib.latent import registry
from course_lib.latent.stable_diffusion import load

TOYBOX = registry.MODELS["toybox"].folder
close = torch.testing.assert_close
SOURCE, TARGET = "a photo of a red cat on the beach", "a photo of a blue cat on the beach"


@pytest.fixture(scope="module")
def sd():
    if not TOYBOX.is_dir():
        pytest.skip("data/checkpoints/toybox-sd is not there yet")
    return load("toybox", "cpu", torch.float32)


@pytest.fixture(scope="module")
def picture(sd):
    return sd.sample(SOURCE, x_T=sd.noise(1, seed=3), w=3, steps=6)


# ---- inversion ----


def test_a_step_forwards_and_back_is_nothing():
    one, zt, eps = schedule.scaled_linear(), torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    close(ddim_step(ddim_step(zt, eps, 800, 400, one), eps, 400, 800, one), zt, rtol=1e-4, atol=1e-4)


def test_steps_are_those_of_the_sampler():
    one, model = schedule.scaled_linear(spacing="trailing"), lambda zt, t: 0.1 * zt
    zt = torch.randn(1, 4, 8, 8)
    wanted, times = samplers.last(samplers.ddim(model, zt, one, 5, clip=False)), one.times(5)
    for t, s in zip(times, [*times[1:], 0]):
        zt = ddim_step(zt, model(zt, t), t, s, one)
    close(zt, wanted)


def test_with_a_constant_network_the_inversion_is_exact():
    one, eps, z0 = schedule.scaled_linear(spacing="trailing"), torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8)
    path = ddim_inversion(lambda zt, t: eps, z0, one, 10)
    assert len(path) == 11
    close(samplers.last(samplers.ddim(lambda zt, t: eps, path[-1], one, 10, clip=False)), z0, rtol=1e-3, atol=1e-3)


def test_more_evaluations_come_nearer(sd, picture):
    errors = []
    for more in (0, 1, 3):
        found = invert(sd, picture, SOURCE, steps=8, fixed_point=more)
        errors.append((redraw(sd, found) - sd.decode(found.path[0])).square().mean().item())
    assert errors[0] > errors[1] > errors[2]


class Linear(nn.Module):
    """eps(z, t, features) = the mean of the features, whatever z is: the best features are known."""

    def __call__(self, zt, t, features):
        return features.mean((1, 2)).reshape(-1, 1, 1, 1).expand_as(zt)


def test_null_text_finds_the_optimum_of_a_linear_network():
    """The target asks for eps_uncond = 0.3, so the mean of the features has to become 0.3."""
    one, zt = schedule.scaled_linear(spacing="trailing"), torch.zeros(1, 4, 8, 8)
    target = ddim_step(zt, torch.full_like(zt, 0.3), 1000, 900, one)
    step = lambda features: ddim_step(zt, Linear()(zt, 1000, features), 1000, 900, one)  # noqa: E731
    found, error = inversion._fitted(step, torch.zeros(1, 3, 2), target, 400, 1e-2, 1e-12)
    close(found.mean(), torch.tensor(0.3), rtol=0, atol=1e-3)
    assert error < 1e-6


def test_null_text_brings_guided_sampling_back(sd, picture):
    found = invert(sd, picture, SOURCE, steps=6, fixed_point=2)
    truth = sd.decode(found.path[0])
    plain = (redraw(sd, found, w=5.0) - truth).square().mean()
    learnt = null_text_inversion(sd, found, 5.0)
    assert (redraw(sd, learnt) - truth).square().mean() < plain / 4
    assert not any(param.grad is not None for param in sd.unet.parameters())  # only the features are learnt
    closed = inversion.negative_prompt_inversion(sd, found, 5.0)
    close(redraw(sd, closed), redraw(sd, found), rtol=0, atol=1e-3)  # guidance has no effect


def test_without_updates_null_text_is_plain_guidance(sd, picture):
    found = invert(sd, picture, SOURCE, steps=4)
    close(redraw(sd, null_text_inversion(sd, found, 5.0, updates=0)), redraw(sd, found, w=5.0), rtol=0, atol=1e-4)


def test_memory_is_saved_without_another_result(sd, picture):
    found = invert(sd, picture, SOURCE, steps=3)
    one, other = (null_text_inversion(sd, found, 5.0, updates=2, low_memory=low) for low in (False, True))
    for a, b in zip(one.against, other.against, strict=True):
        close(a, b, rtol=0, atol=1e-5)


# ---- Prompt-to-Prompt ----


def test_words_are_aligned(sd):
    M, known = alignment(sd.tokenizer, SOURCE, TARGET)
    close(M, torch.eye(len(M)))  # a swap of one token by one
    assert known.all()
    M, known = alignment(sd.tokenizer, "a cat on the beach", "a cat wearing a hat on the beach")
    new = places(sd.tokenizer, "a cat wearing a hat on the beach", "wearing") + [4, 5]
    assert known.logical_not().nonzero().flatten().tolist() == sorted(set(new))
    assert M[3, 6] == 1 and M[5, 8] == 1  # "on" and "beach" come later in the target
    assert M[6, 9] == 1  # the end token


def test_a_word_of_several_tokens_shares_its_attention(sd):
    M, known = alignment(sd.tokenizer, "a photo of a cat", "a photo of a giraffe")
    new = places(sd.tokenizer, "a photo of a giraffe", "giraffe")
    assert len(new) > 1 and known.all()
    close(M[5, new], torch.full((len(new),), 1 / len(new)))
    close(M.sum(0)[: 5 + len(new)], torch.cat([torch.ones(5), torch.full((len(new),), 1 / len(new))]))


def test_equal_prompts_give_the_source_twice(sd):
    source, target = edit(sd, SOURCE, SOURCE, sd.noise(1, seed=3), Edit(1, 1), w=3, steps=4)
    close(source, target, rtol=0, atol=1e-4)


def test_without_any_share_the_target_is_drawn_as_it_is(sd):
    noise = sd.noise(2, seed=3)
    source, target = edit(sd, SOURCE, TARGET, noise, Edit(0, 0), w=3, steps=4)
    close(source, sd.sample(SOURCE, x_T=noise, w=3, steps=4), rtol=0, atol=1e-4)
    close(target, sd.sample(TARGET, x_T=noise, w=3, steps=4), rtol=0, atol=1e-4)
    changed = edit(sd, SOURCE, TARGET, noise, Edit(0.8, 0.4), w=3, steps=4)[1]
    assert (changed - target).abs().max() > 1e-2


def test_a_weight_of_one_changes_nothing(sd):
    noise = sd.noise(1, seed=3)
    plain = edit(sd, SOURCE, TARGET, noise, Edit(), w=3, steps=4)[1]
    close(edit(sd, SOURCE, TARGET, noise, Edit(weights={"blue": 1.0}), w=3, steps=4)[1], plain, rtol=0, atol=1e-5)
    assert (edit(sd, SOURCE, TARGET, noise, Edit(weights={"blue": 3.0}), w=3, steps=4)[1] - plain).abs().max() > 1e-3


def test_a_blend_keeps_the_rest(sd):
    noise = sd.noise(1, seed=3)
    source, free = edit(sd, SOURCE, TARGET, noise, Edit(), w=3, steps=6)
    blended = edit(sd, SOURCE, TARGET, noise, Edit(blend=("cat", "cat"), side=8), w=3, steps=6)[1]
    assert (blended - source).abs().mean() < (free - source).abs().mean()


def test_mistakes_of_an_edit_are_told(sd):
    noise = sd.noise(1, seed=3)
    for wrong, words in ((Edit(weights={"dog": 2.0}), "word: expected one of"), (Edit(blend=("dog", "cat")), "word")):
        with pytest.raises(ValueError, match=words):
            edit(sd, SOURCE, TARGET, noise, wrong, steps=2)
    with pytest.raises(ValueError, match=r"cross: expected a share in \[0, 1\], got 1\.5"):
        Edit(cross=1.5)
    shared = SharedAttention(sd, SOURCE, TARGET, Edit(blend=("cat", "cat"), side=5))
    with pytest.raises(ValueError, match="side"):
        shared.mask(noise)


# ---- Plug-and-Play, SDEdit ----


def test_plug_and_play_without_shares_draws_the_target_from_the_inverted_noise(sd, picture):
    found = invert(sd, picture, SOURCE, steps=4)
    plain = sd.sample(TARGET, x_T=found.z_T, w=3, steps=4)
    close(plug_and_play(sd, found, TARGET, w=3, features=0, own=0), plain, rtol=0, atol=1e-4)
    assert (plug_and_play(sd, found, TARGET, w=3) - plain).abs().max() > 1e-2


def test_hooks_are_undone_after_an_error(sd, picture):
    found, before = invert(sd, picture, SOURCE, steps=2), dict(sd.unet.attn_processors)
    with pytest.raises(ValueError, match="layers: expected names of layers of this UNet"):
        plug_and_play(sd, found, TARGET, layers=Layers(("nowhere",), ("up_blocks",)))
    assert sd.unet.attn_processors == before
    assert not any(module._forward_hooks for module in sd.unet.modules())


def test_sdedit_at_its_limits(sd, picture):
    z0 = sd.encode_image(picture)
    close(sdedit(sd, picture, TARGET, 0.0, steps=4), sd.decode(z0), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="strength"):
        sdedit(sd, picture, TARGET, 1.2)


def test_pictures_of_another_size_are_refused(sd):
    with pytest.raises(ValueError, match=r"images: expected \(B, 3, 64, 64\)"):
        invert(sd, torch.zeros(1, 3, 32, 32), SOURCE)
    with pytest.raises(ValueError, match="prompts: expected one for all"):
        invert(sd, torch.zeros(2, 3, 64, 64), [SOURCE])


def test_the_tiny_model_in_the_published_layout(tmp_path):
    sd = build()
    noise = sd.noise(1, seed=0)
    assert edit(sd, "a cat", "a tiger", noise, Edit(), w=3, steps=2)[1].isfinite().all()
