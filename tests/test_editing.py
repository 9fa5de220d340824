"""Editing: each method equals the untouched sampler at its limit, and DDIM run backwards comes back."""

import dataclasses
import json
import math

import part3
import pytest
import torch
from diffusers import UNet2DConditionModel
from tiny import FULL_SIZE, build
from torch import nn

from course_lib.diffusion import samplers, schedule
from course_lib.editing import inversion
from course_lib.editing.attention import attention_hook
from course_lib.editing.inversion import ddim_inversion, ddim_step, invert, null_text_inversion, redraw
from course_lib.editing.plug_and_play import LAYERS, Layers, features_shared, plug_and_play
from course_lib.editing.prompt_to_prompt import Edit, SharedAttention, alignment, edit, places
from course_lib.editing.sdedit import sdedit
from course_lib.evaluation import edits, rules_editing, rules_methods
from course_lib.evaluation.judge import load_judge
from course_lib.evaluation.personalized import pixels
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
    found = inversion._fitted(step, torch.zeros(1, 3, 2), target, 400, 1e-2, 1e-12)
    close(found.mean(), torch.tensor(0.3), rtol=0, atol=1e-3)


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


def test_low_memory_computes_each_block_again(sd, picture):
    found, calls = invert(sd, picture, SOURCE, steps=3), []
    handle = sd.unet.up_blocks[-1].resnets[-1].register_forward_pre_hook(lambda *args: calls.append(1))
    counts = []
    for low in (False, True):
        calls.clear()
        null_text_inversion(sd, found, 5.0, updates=1, low_memory=low)
        counts.append(len(calls))
    handle.remove()
    assert counts[1] > counts[0] and not sd.unet.training and not sd.unet.is_gradient_checkpointing


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


def test_attention_that_is_not_shared_is_untouched_bit_for_bit(sd):
    zt, features = sd.noise(4, seed=3), sd.encode_prompt(["", "", SOURCE, TARGET])
    with attention_hook(sd.unet, lambda probs, layer, is_cross: probs):
        plain = sd.unet_eps(zt, 500, features)
    with attention_hook(sd.unet, SharedAttention(sd, SOURCE, TARGET, Edit(0, 0))):
        assert torch.equal(sd.unet_eps(zt, 500, features), plain)
    with attention_hook(sd.unet, SharedAttention(sd, SOURCE, TARGET, Edit(0, 0.1))):
        changed = sd.unet_eps(zt, 500, features)
    assert torch.equal(changed[:3], plain[:3]) and not torch.equal(changed[3], plain[3])  # the target alone


def test_a_negative_prompt_takes_part(sd, picture):
    noise = sd.noise(1, seed=3)
    target = edit(sd, SOURCE, TARGET, noise, Edit(0, 0), w=3, steps=3, negative="a beach")[1]
    close(target, sd.sample(TARGET, x_T=noise, w=3, steps=3, negative="a beach"), rtol=0, atol=1e-4)
    found = invert(sd, picture, SOURCE, steps=3)
    with_it, without = (edit(sd, SOURCE, TARGET, found, w=3, negative=line)[1] for line in ("a beach", ""))
    assert (with_it - without).abs().max() > 1e-3


def test_a_pinned_source_is_the_inverted_picture(sd, picture):
    found = invert(sd, picture, SOURCE, steps=4)
    truth = sd.decode(found.path[0])
    pinned, free = (edit(sd, SOURCE, TARGET, found, w=3, pinned=pinned)[0] for pinned in (True, False))
    close(pinned, truth)
    assert (free - truth).abs().max() > 1e-2


def test_without_learnt_features_the_model_s_guidance_is_the_default(sd, picture):
    found = invert(sd, picture, SOURCE, steps=3)
    close(edit(sd, SOURCE, TARGET, found)[1], edit(sd, SOURCE, TARGET, found, w=sd.defaults.guidance)[1])
    closed = inversion.negative_prompt_inversion(sd, found, 2.0)
    close(edit(sd, SOURCE, TARGET, closed)[1], edit(sd, SOURCE, TARGET, closed, w=2.0)[1])


def test_a_part_of_an_inversion_is_that_of_its_pictures(sd, picture):
    both = invert(sd, torch.cat([picture, -picture]), [SOURCE, TARGET], steps=3)
    alone = invert(sd, -picture, [TARGET], steps=3)
    assert both[1:].prompts == [TARGET] and len(both[1:].against) == 3
    close(both[1:].path, alone.path, rtol=0, atol=1e-4)


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
    found = invert(sd, torch.zeros(1, 3, 64, 64), SOURCE, steps=2)
    with pytest.raises(ValueError, match="steps: expected 2, as in the inversion, or None, got 3"):
        edit(sd, SOURCE, TARGET, found, steps=3)
    with pytest.raises(ValueError, match="negative: expected none, since this inversion"):
        edit(sd, SOURCE, TARGET, inversion.negative_prompt_inversion(sd, found, 3.0), negative="rain")
    shared = SharedAttention(sd, SOURCE, TARGET, Edit(blend=("cat", "cat"), side=5))
    with pytest.raises(ValueError, match="side"):
        shared.mask(noise)


# ---- Plug-and-Play, SDEdit ----


def test_plug_and_play_without_shares_draws_the_target_from_the_inverted_noise(sd, picture):
    found = invert(sd, picture, SOURCE, steps=4)
    plain = sd.sample(TARGET, x_T=found.z_T, w=3, steps=4)
    close(plug_and_play(sd, found, TARGET, w=3, features=0, own=0), plain, rtol=0, atol=1e-4)
    assert (plug_and_play(sd, found, TARGET, w=3) - plain).abs().max() > 1e-2


def test_features_that_are_not_shared_are_untouched_bit_for_bit(sd):
    zt, features = sd.noise(3, seed=1), sd.encode_prompt(["a cat", "", "a dog"])
    plain = sd.unet_eps(zt, 500, features)
    with features_shared(sd.unet, ["up_blocks.0.resnets.1"], lambda: False):
        assert torch.equal(sd.unet_eps(zt, 500, features), plain)
    with features_shared(sd.unet, ["up_blocks.0.resnets.1"], lambda: True):
        shared = sd.unet_eps(zt, 500, features)
    assert torch.equal(shared[0], plain[0]) and not torch.equal(shared[1:], plain[1:])
    assert torch.equal(sd.unet_eps(zt, 500, features), plain)


def test_hooks_are_undone_after_an_error(sd, picture):
    found, before = invert(sd, picture, SOURCE, steps=2), dict(sd.unet.attn_processors)
    with pytest.raises(ValueError, match="layers: expected names of layers of this UNet"):
        plug_and_play(sd, found, TARGET, layers=Layers(("nowhere",), ("up_blocks",)))
    with pytest.raises(ValueError, match="layers: expected beginnings of attention layers"):
        plug_and_play(sd, found, TARGET, layers=Layers((), ("nowhere",)))
    assert sd.unet.attn_processors == before
    assert not any(module._forward_hooks for module in sd.unet.modules())


def test_sdedit_at_its_limits(sd, picture):
    z0 = sd.encode_image(picture)
    close(sdedit(sd, picture, TARGET, 0.0, steps=4), sd.decode(z0), rtol=0, atol=1e-5)
    noise, times = sd.noise(1, seed=0), sd.schedule.times(4)
    alpha_bar = sd.schedule.alpha_bar[times[2]].item()
    zt, eps_model = alpha_bar**0.5 * z0 + (1 - alpha_bar) ** 0.5 * noise, sd.guided([TARGET], 3.0)
    for t, s in ((times[2], times[3]), (times[3], 0)):  # strength 0.5: the last two of four steps
        zt = ddim_step(zt, eps_model(zt, t), t, s, sd.schedule)
    close(sdedit(sd, picture, TARGET, 0.5, w=3.0, steps=4), sd.decode(zt), rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="strength"):
        sdedit(sd, picture, TARGET, 1.2)
    with pytest.raises(ValueError, match="prompts: expected one for all, or one for each of 1 pictures, got 2"):
        sdedit(sd, picture, [TARGET, SOURCE])


def test_pictures_of_another_size_are_refused(sd):
    with pytest.raises(ValueError, match=r"images: expected \(B, 3, 64, 64\)"):
        invert(sd, torch.zeros(1, 3, 32, 32), SOURCE)
    with pytest.raises(ValueError, match="prompts: expected one for all"):
        invert(sd, torch.zeros(2, 3, 64, 64), [SOURCE])


SMALL = Layers(("up_blocks.1.resnets.1.conv2",), ("up_blocks.1",))


def test_the_published_layers_are_those_of_the_published_unet():
    with torch.device("meta"):
        unet = UNet2DConditionModel(**FULL_SIZE.UNET)
    names, attention = dict(unet.named_modules()), [name for name in unet.attn_processors if ".attn1." in name]
    assert set(LAYERS["sd15"].features) <= set(names)
    assert sum(name.startswith(LAYERS["sd15"].own) for name in attention) == 8  # of the decoder's 9


def test_every_method_runs_on_the_published_layout_at_reduced_size():
    """Stable Diffusion 1.5's configuration with random weights, smaller: the same functions, two pictures at once."""
    sd = build()
    images = sd.sample(["a cat", "a dog"], x_T=sd.noise(2, seed=1), w=3, steps=2)
    found = invert(sd, images, ["a cat", "a dog"], steps=3, fixed_point=1)
    learnt = null_text_inversion(sd, found, 3.0, updates=1, low_memory=True)
    closed = inversion.negative_prompt_inversion(sd, found, 3.0)
    edited = {
        "Prompt-to-Prompt": edit(sd, "a cat", "a tiger", sd.noise(2, seed=0), Edit(), w=3, steps=2)[1],
        "null-text": edit(sd, "a cat", "a tiger", learnt, Edit())[1],
        "negative prompt": edit(sd, "a cat", "a tiger", closed, Edit(blend=("cat", "tiger"), side=8))[1],
        "Plug-and-Play": plug_and_play(sd, found, "a tiger", w=3, layers=SMALL),
        "SDEdit": sdedit(sd, images, "a tiger", 0.5, w=3, steps=2),
    }
    for name, picture in edited.items():
        assert picture.shape == images.shape and picture.isfinite().all(), name
    assert sd.defaults.settings == "sd15"


# ---- edits with a right answer ----


@pytest.fixture(scope="module")
def batch():
    return edits.true_edits(14)


def test_an_edit_changes_one_thing_and_its_sentence(batch):
    for one in batch:
        before, after = (dataclasses.asdict(spec) for spec in (one.source, one.target))
        moved = {name for name in before if before[name] != after[name]} - {"accessory_colour"}
        assert moved == {one.attribute}, one.kind
        assert one.prompts[0] != one.prompts[1]
    assert {one.kind for one in batch} == set(edits.KINDS)
    assert [one.source for one in edits.true_edits(3)] == [one.source for one in batch[:3]]
    assert edits.true_edits(1, edits.TUNING_SEED)[0] != batch[0]


def test_the_true_target_has_the_best_scores(batch):
    source, target, mask = edits.pictures(batch)
    network = load_judge()
    truth, untouched = edits.scores(network, batch, target), edits.scores(network, batch, source)
    assert truth["obeyed"].mean() > 0.85 and untouched["obeyed"].mean() < 0.2
    assert (truth["truth"] == 80 - 10 * torch.log10(torch.tensor(1.0))).all()
    assert truth["kept"][truth["kept"].isfinite()].min() > 20  # only what lies under the mask's threshold differs
    close(untouched["structure"], torch.ones(14), rtol=0, atol=1e-4)
    close(truth["structure"], torch.ones(14), rtol=0, atol=1e-4)
    styles = torch.tensor([one.kind == "style" for one in batch])
    assert truth["kept"][styles].isnan().all() and truth["kept"][~styles].isfinite().float().mean() > 0.8
    assert mask.shape == (14, 1, 64, 64) and set(mask.unique().tolist()) == {0.0, 1.0}


def test_structure_falls_when_the_object_moves(batch):
    """A new colour in the same pose keeps it, also where its stripes have other edges; another place does not."""
    network = load_judge()
    for one in batch:
        if one.kind in ("colour", "pattern", "scene"):
            moved = dataclasses.replace(one.target, x=one.source.x + 0.12, flip=not one.source.flip)
            found = edits.scores(network, [one] * 2, pixels([one.target, moved]))["structure"]
            assert found[0] > 0.99 and found[1] < 0.75, one


def test_psnr_by_hand():
    x, y = torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4)
    y[1, :, :2] = 0.2
    close(edits.psnr(x, y), torch.tensor([80.0, 10 * math.log10(4 / 0.02)]))
    where = torch.zeros(2, 1, 4, 4)
    where[:, :, :2] = 1
    close(edits.psnr(x, y, where)[1].item(), 10 * math.log10(4 / 0.04), rtol=1e-5, atol=0)
    assert edits.psnr(x, y, torch.zeros(2, 1, 4, 4)).isnan().all()


# ---- rules ----


def rows_of(obeyed, kept, structure, n=200, seed=0):
    """Scores around these means, with a spread of their own."""
    g = torch.Generator().manual_seed(seed)
    hits = (torch.arange(n) < round(obeyed * n)).float()[torch.randperm(n, generator=g)]
    return {"obeyed": hits, "kept": kept + torch.randn(n, generator=g), "structure": structure + 0.1 * torch.randn(n)}


ERRORS = [0.2, 0.3, 0.25, 0.21], [0.02, 0.033, 0.024, 0.02]


def c6_of(errors=ERRORS, **methods):
    """C6 with both methods good, but for those that are given."""
    rows = {rules_editing.AGAIN: rows_of(0.9, 19, 0.5, seed=1), "SDEdit 0.4": rows_of(0.5, 24, 0.8, seed=2),
            "SDEdit 0.8": rows_of(0.9, 18, 0.4, seed=3)}  # fmt: skip
    good = {name: rows_of(0.9, 23, 0.7, seed=4 + k) for k, name in enumerate(rules_editing.METHODS)}
    renamed = {name: methods.get(name.split()[0].replace("-", "_").lower(), row) for name, row in good.items()}
    return rules_editing.c6(rows | renamed, errors)


def test_c6_needs_both_methods_to_obey_and_to_keep():
    assert c6_of().verdict == "holds"
    assert c6_of(ERRORS[::-1]).verdict == "does not hold"
    assert c6_of(plug_and_play=rows_of(0.3, 30, 0.95, seed=9)).verdict == "does not hold"  # keeps all, obeys nothing
    assert c6_of(plug_and_play=rows_of(0.9, 17, 0.3, seed=9)).verdict == "does not hold"  # obeys, keeps nothing
    assert c6_of(null_text=rows_of(0.9, 23, 0.7, n=12, seed=9)).verdict == "cannot tell"  # too few edits
    assert c6_of(plug_and_play=rows_of(0.7, 20.5, 0.7, seed=9)).verdict == "does not hold"  # SDEdit keeps 21 there


def test_sdedit_is_compared_where_it_obeys_as_often():
    rows = {"SDEdit 0.4": rows_of(0.5, 24, 0.8), "SDEdit 0.8": rows_of(0.9, 18, 0.4), "other": rows_of(0.9, 99, 0.4)}
    mean = lambda obeyed: rules_editing.sdedit_as_obedient(rows, obeyed, 200).mean().item()  # noqa: E731
    assert abs(mean(0.7) - 21) < 0.3 and abs(mean(0.1) - 24) < 0.3 and abs(mean(0.95) - 18) < 0.3


def test_scores_that_do_not_apply_are_left_out_and_fewer_edits_are_the_first():
    one, other = rows_of(0.8, 20, 0.5, 30), rows_of(0.8, 18, 0.5, 40)
    one["kept"][:5] = float("nan")
    found = rules_editing.gains(one, other)
    assert found["kept"].n == 25 and found["structure"].n == 30


def test_c5_counts_from_chance_and_picture_by_picture():
    def c5(kept, alike, by_prior, n=200):
        rows = [torch.full((n,), mean) + 0.1 * torch.randn(n, generator=torch.Generator().manual_seed(k))
                for k, mean in enumerate((kept, 0.3, alike, 0.2, by_prior, 0.9))]  # fmt: skip
        names = ("kept", "shuffled", "alike", "apart")
        return rules_editing.c5(dict(zip(names, rows, strict=False)), {"obeyed": rows[4]}, {"obeyed": rows[5]}).verdict

    assert c5(0.8, 0.3, 0.8) == "holds"
    assert c5(0.6, 0.3, 0.8) == "does not hold"  # half of the way from .3 to 1 is .65
    assert c5(0.8, 0.9, 0.8) == "does not hold"
    assert c5(0.8, 0.3, 0.5) == "does not hold"  # half of the way from .3 to .9 is .6


def test_c7_asks_that_an_edit_is_made():
    g = torch.Generator().manual_seed(0)

    def way(scene, keeps, told):
        means = {"scene": scene, "keeps": keeps, "between scenes": keeps, "told": told}
        return {name: mean + 0.02 * torch.randn(6, generator=g) for name, mean in means.items()}

    rows = {name: way(0.8, 0.8, 0.3) for name in rules_editing.EDITORS}
    rows |= {"picture": way(0.0, 1.0, 0.0), "lora": way(0.9, 0.4, 0.5), "noun": way(0.9, 0.3, 0.2)}
    assert rules_editing.c7(rows).verdict == "holds"
    assert rules_editing.c7(rows | {"Plug-and-Play": way(0.0, 1.0, 0.0)}).verdict != "holds"  # nothing was edited
    assert rules_editing.c7(rows | {"lora": way(0.9, 0.4, 0.1)}).verdict == "does not hold"
    assert rules_editing.c7(rows | {"Prompt-to-Prompt": way(0.9, 0.2, 0.3)}).verdict == "does not hold"


def test_c9_takes_the_gan():
    g = torch.Generator().manual_seed(0)
    near = lambda mean, n=6: mean + 0.02 * torch.randn(n, generator=g)  # noqa: E731
    gan = lambda own, others: dict(own=near(own, 20), next=near(10.0, 20), others=near(others, 20))  # noqa: E731
    found = lambda gan: rules_methods.c9(  # noqa: E731
        0.02, 0.3, {"any noise": near(0.1), "inverted latent": near(0.2), "the word": near(0.4)},
        {"inverted latent": near(0.8), "the word": near(0.3)}, gan)  # fmt: skip
    assert found(None).verdict == found(gan(20.0, 14.0)).verdict == "holds"
    assert found(gan(20.0, 24.0)).verdict == "does not hold" and found(gan(9.0, 5.0)).verdict == "does not hold"


def test_records_that_are_not_whole_give_no_finding(tmp_path):
    assert part3.findings(tmp_path) == []
    (tmp_path / "editing.json").write_text(json.dumps({"methods": {"Plug-and-Play": {}}}))
    (tmp_path / "keeping.json").write_text(json.dumps({"subjects": {}}))
    assert part3.findings(tmp_path) == []
    record = {"methods": {"one": {"10": {"obeyed": [0.0], "kept": [None], "seconds": 2},
                                  "0": {"obeyed": [1.0], "kept": [20.0], "seconds": 1}}}}  # fmt: skip
    rows = part3.by_picture(record, "one", "methods")
    assert rows["obeyed"].tolist() == [1.0, 0.0] and rows["kept"][0] == 20 and rows["kept"][1].isnan()
