"""The methods: which tensors they train and from what start, and what they refuse without leaving a trace."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from test_finetune import METHODS, PICTURES, assert_unchanged, build, copies, prior, settings, state, tensors
from tiny import FULL_SIZE
from torch import nn

from course_lib.latent import registry, text
from course_lib.personalization import custom_diffusion, dreambooth, finetune, lora, textual_inversion
from course_lib.personalization.custom_diffusion import SubjectPictures, key_value_layers, retrieve, similarity
from course_lib.personalization.lora import LowRank
from course_lib.personalization.recipe import unfreeze

close = torch.testing.assert_close
exact = dict(rtol=0, atol=0)
# Stable Diffusion 1.5 made narrow: its blocks, its layers, its 77 tokens.
NARROW = dict(
    text_encoder=FULL_SIZE.TEXT_ENCODER
    | dict(vocab_size=len(FULL_SIZE.tokenizer()), hidden_size=16, intermediate_size=32, num_hidden_layers=2,
           num_attention_heads=2),
    unet=FULL_SIZE.UNET
    | dict(sample_size=8, block_out_channels=(8, 16, 24, 24), cross_attention_dim=16, attention_head_dim=2,
           norm_num_groups=4),
    vae=FULL_SIZE.VAE | dict(sample_size=64, block_out_channels=(4, 8, 16, 16), norm_num_groups=4),
)  # fmt: skip


@pytest.fixture(scope="module")
def sd():
    return build()


@pytest.fixture
def untouched(sd):
    """Whatever happens in the test: afterwards the model is what it was before."""
    before = state(sd)
    yield
    assert_unchanged(before, state(sd))


def ids(sd, prompt):
    return sd.tokenizer(prompt, add_special_tokens=False).input_ids


# ---- Textual Inversion ----


@pytest.mark.parametrize(("options", "expected"), [
    (dict(token="<|endoftext|>"), r"token: expected a token that is new, but the tokenizer knows '<\|endoftext\|>'"),
    (dict(token="<V>"), "token: expected a new token in lower case and brackets, such as <v>, got '<V>'"),
    (dict(token="sks"), "token: expected a new token in lower case and brackets, such as <v>, got 'sks'"),
    (dict(token="<a b>"), "token: expected a new token in lower case and brackets"),
    (dict(token=""), "token: expected a new token in lower case and brackets"),
    (dict(noun=""), "noun: expected a word that the model knows, such as 'cat', got ''"),
    (dict(noun="  "), "noun: expected a word that the model knows, such as 'cat', got '  '"),
    (dict(noun="<|endoftext|>"), "words: expected a known word for '<v>' to start from"),
    (dict(vectors=0), "vectors: expected a whole number of at least 1, got 0"),
    (dict(vectors=1.5), "vectors: expected a whole number of at least 1, got 1.5"),
    (dict(captions=["a {}"]), "captions: expected one for each of the 3 pictures, got 1"),
])  # fmt: skip
def test_textual_inversion_refuses(sd, untouched, options, expected):
    with (
        pytest.raises(ValueError, match=f"^{expected}"),
        textual_inversion.recipe(sd, PICTURES, **{"noun": "cat", **options}),
    ):
        pass


def test_a_second_recipe_with_words_waits_for_the_first_to_close(sd, untouched):
    with (
        METHODS["textual inversion"](sd),
        pytest.raises(ValueError, match=r"^text_encoder: expected one without"),
        METHODS["custom diffusion"](sd),
    ):
        pass
    with METHODS["custom diffusion"](sd) as recipe:
        assert recipe.about["tokens"] == ["<cat-1>"]


def test_every_vector_starts_as_the_mean_of_the_nouns_sub_words(sd, untouched):
    table = sd.text_encoder.get_input_embeddings().weight
    photo = ids(sd, "photo")
    assert len(photo) == 2
    with textual_inversion.recipe(sd, PICTURES, noun="photo", vectors=3) as recipe:
        close(recipe.params["tokens"].detach(), table[photo].mean(0).expand(3, -1), **exact)
        assert recipe.about == {"token": "<v>", "noun": "photo", "rows": ["<v>", "<v>_1", "<v>_2"]}
        size = len(table)
        assert text.tokenize(sd.tokenizer, "a <v>")[0, 1:6].tolist() == [*ids(sd, "a"), size, size + 1, size + 2,
                                                                        sd.tokenizer.eos_token_id]  # fmt: skip


@pytest.mark.parametrize("defaults", [registry.TOYBOX, registry.Defaults()], ids=["toybox", "sd15"])
def test_the_settings_follow_the_model(sd, untouched, monkeypatch, defaults):
    monkeypatch.setattr(sd, "defaults", defaults)

    def own(module):
        return replace(module.SETTINGS[defaults.settings], weighting=sd.weighting)

    for method in (textual_inversion, dreambooth, lora):
        with method.recipe(sd, PICTURES, noun="cat") as recipe:
            assert recipe.settings == own(method) and recipe.base == sd.name
    for count, longer in ((1, 1), (2, 2 if defaults.settings == "sd15" else 1)):
        subjects = [SubjectPictures(PICTURES, f"<v{k}>", "cat") for k in range(count)]
        with custom_diffusion.joint_recipe(sd, subjects) as recipe:
            assert recipe.settings.steps == longer * own(custom_diffusion).steps
            assert (recipe.terms[0].examples.mask is not None) == defaults.augment


# ---- DreamBooth and LoRA ----


@pytest.mark.parametrize(("options", "expected"), [
    (dict(noun=""), "noun: expected a word that the model knows, such as 'cat', got ''"),
    (dict(noun=" "), "noun: expected a word that the model knows"),
    (dict(prior_weight=-0.5), "prior_weight: expected a number of at least 0, got -0.5"),
    (dict(rank=0), "rank: expected a whole number of at least 1, got 0"),
    (dict(rank=2.0), "rank: expected a whole number of at least 1, got 2.0"),
])  # fmt: skip
def test_dreambooth_and_lora_refuse(sd, untouched, options, expected):
    for method in (lora,) if "rank" in options else (dreambooth, lora):
        with (
            pytest.raises(ValueError, match=f"^{expected}"),
            method.recipe(sd, PICTURES, **{"noun": "cat", **options}),
        ):
            pass


class FailsLate(dict):
    """Networks of which the last one has no room."""

    def items(self):
        *rest, last = super().items()
        yield from rest
        yield last[0], SimpleNamespace()


@pytest.mark.parametrize("module", [dreambooth, lora])
def test_a_recipe_that_fails_halfway_leaves_no_trace(sd, untouched, monkeypatch, module):
    monkeypatch.setattr(module, "trained_networks", lambda sd, text: FailsLate(unet=sd.unet, text_encoder=None))
    with pytest.raises(AttributeError), module.recipe(sd, PICTURES, noun="cat", text=True):
        pass


def test_unfreezing_that_fails_halfway_leaves_no_trace(sd, untouched):
    params = dict(sd.unet.named_parameters()) | {"broken": SimpleNamespace(data=None, device=torch.device("cpu"))}
    with pytest.raises(AttributeError), unfreeze(params):
        pass


def test_lora_starts_from_the_seed_and_differs_from_layer_to_layer(sd, untouched):
    def first_values(seed):
        with lora.recipe(sd, PICTURES, noun="cat", rank=2, settings=settings(seed=seed)) as recipe:
            return {name: param.detach().clone() for name, param in recipe.params.items() if name.endswith("down")}

    one, again, other = first_values(0), first_values(0), first_values(1)
    assert all(torch.equal(one[name], again[name]) and not torch.equal(one[name], other[name]) for name in one)
    for width in {value.shape for value in one.values()}:
        same = [value for value in one.values() if value.shape == width]
        assert len(same) > 1 and len({tuple(value.flatten().tolist()) for value in same}) == len(same)


def test_a_low_rank_layer_is_the_layer_and_then_adds_the_product():
    layer, x = nn.Linear(6, 4), torch.randn(2, 3, 6)
    wrapped = LowRank(layer, 2)
    assert wrapped.down.shape == (2, 6) and wrapped.up.shape == (4, 2) and wrapped.down.abs().sum() > 0
    close(wrapped(x), layer(x), **exact)
    nn.init.normal_(wrapped.up)
    by_hand = x @ (layer.weight + wrapped.up @ wrapped.down).T + layer.bias
    close(wrapped(x), by_hand)
    layer.to(torch.bfloat16)
    assert wrapped(x.bfloat16()).dtype == torch.bfloat16 and wrapped.up.dtype == torch.float32
    close(wrapped(x.bfloat16()).float(), by_hand, rtol=0.05, atol=0.05)
    with torch.autocast("cpu", torch.bfloat16):
        close(wrapped(x).float(), by_hand, rtol=0.05, atol=0.05)


def test_lora_wraps_the_attention_layers_and_lets_go(sd, untouched):
    zt, features = torch.randn(1, 4, 8, 8), sd.encode_prompt("a cat")
    before, layers = sd.unet_eps(zt, 500, features), dict(sd.unet.named_modules())
    with lora.attach({"unet": sd.unet}, 3) as params:
        names = {name.removeprefix("unet.").rsplit(".lora.", 1)[0] for name in params}
        endings = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "attn2.to_q", "attn2.to_k",
                   "attn2.to_v", "attn2.to_out.0")  # fmt: skip
        assert names == {name for name in layers if name.endswith(endings)} and len(params) == 2 * len(names) == 64
        assert {min(param.shape) for param in params.values()} == {3}
        close(sd.unet_eps(zt, 500, features), before, **exact)
        for param in params.values():
            nn.init.constant_(param, 0.1)
        assert not torch.allclose(sd.unet_eps(zt, 500, features), before, atol=1e-3)
    assert all(layer is layers[name] for name, layer in sd.unet.named_modules())
    close(sd.unet_eps(zt, 500, features), before, **exact)
    none = {"unet": sd.vae.decoder.up_blocks}
    with pytest.raises(ValueError, match=r"^network: expected attention layers .*, found none"), lora.attach(none, 3):
        pass


def test_the_scale_of_a_low_rank_layer_multiplies_the_product():
    layer, x = nn.Linear(6, 4), torch.randn(2, 6)
    half = LowRank(layer, 2, scale=0.5)
    nn.init.normal_(half.up)
    close(half(x), layer(x) + 0.5 * x @ (half.up @ half.down).T)


# ---- Custom Diffusion ----


CAT = SubjectPictures(PICTURES, "<v>", "cat")


@pytest.mark.parametrize(("subjects", "expected"), [
    ([], r"subjects: expected each with a token of its own, got \[\]"),
    ([CAT, SubjectPictures(PICTURES, "<v>", "tiger")], "subjects: expected each with a token of"),
    ([CAT, SubjectPictures(PICTURES, "<W>", "tiger")], "token: expected a new token in lower case"),
    ([CAT, SubjectPictures(PICTURES, "<w>", " ")], "noun: expected a word that the model knows"),
    ([CAT, SubjectPictures([], "<w>", "tiger")], "images: expected at least one picture, got none"),
], ids=["none", "twice", "capitals", "noun", "no pictures"])  # fmt: skip
def test_custom_diffusion_refuses(sd, untouched, subjects, expected):
    with (
        pytest.raises(ValueError, match=f"^{expected}"),
        custom_diffusion.joint_recipe(sd, subjects, augment=False),
    ):
        pass


def test_custom_diffusion_that_fails_halfway_leaves_no_trace(sd, untouched, monkeypatch):
    layers = key_value_layers(sd.unet) | {"broken": SimpleNamespace(weight=None)}
    monkeypatch.setattr(custom_diffusion, "key_value_layers", lambda unet: layers)
    with pytest.raises(AttributeError), custom_diffusion.recipe(sd, PICTURES, noun="cat", augment=False):
        pass


def test_the_keys_and_values_of_the_published_configuration_are_19_169_280():
    with torch.device("meta"):
        layers = key_value_layers(FULL_SIZE.networks()["unet"])
    assert len(layers) == 32 and sum(layer.weight.numel() for layer in layers.values()) == 19_169_280
    assert all(layer.bias is None and layer.in_features == 768 for layer in layers.values())


def test_custom_diffusion_learns_keys_values_and_a_row_for_each_word(sd, untouched):
    with METHODS["custom diffusion, 2 subjects"](sd) as recipe:
        matrices = {f"unet.{name}" for name, _ in sd.unet.named_parameters() if ".attn2.to_k." in name}
        matrices |= {name.replace("to_k", "to_v") for name in matrices}
        assert set(recipe.params) == matrices | {"tokens"} and len(matrices) == 8
        table = sd.text_encoder.get_input_embeddings().table.weight
        nouns = [ids(sd, noun)[0] for noun in ("cat", "tiger")]
        close(recipe.params["tokens"].detach(), table[nouns], **exact)
    with custom_diffusion.recipe(sd, PICTURES, noun="cat", augment=False, rare="of") as recipe:
        close(recipe.params["tokens"][0].detach(), table[ids(sd, "of")[0]], **exact)


def test_the_weights_of_subjects_and_regularisation_share_1_and_lambda(sd, untouched):
    subjects = [SubjectPictures(PICTURES, token, "cat") for token in ("<v>", "<w>")]
    with custom_diffusion.joint_recipe(
        sd, subjects, regularisation=[prior(), prior()], regularisation_weight=0.5, augment=False
    ) as recipe:
        assert [term.weight for term in recipe.terms] == [0.5, 0.5, 0.25, 0.25]


def test_pictures_are_shown_small_and_large_unless_they_have_captions(sd, untouched):
    with custom_diffusion.recipe(sd, PICTURES, noun="cat") as recipe:
        said = {prompt for prompts in recipe.terms[0].examples.prompts for prompt in prompts}
        assert {"a <v> cat", "a <v> cat zoomed in", "a <v> cat very small"} <= said
        assert 0 < recipe.terms[0].examples.mask.mean() < 1
    with custom_diffusion.recipe(sd, PICTURES, noun="cat", captions=["of {}"] * 3) as recipe:
        assert recipe.terms[0].examples.prompts == [("of <v> cat",)] * 3 and recipe.terms[0].examples.mask is None


def test_nothing_is_learnt_from_the_start_token(sd, untouched):
    h = torch.randn(2, 5, 32)
    with METHODS["custom diffusion"](sd):
        for layer in key_value_layers(sd.unet).values():
            close(layer(h), nn.functional.linear(h, layer.weight))
            layer(h)[:, :1].sum().backward()
            close(layer.weight.grad, torch.zeros_like(layer.weight), **exact)
            layer(h).sum().backward()
            close(layer.weight.grad, h[:, 1:].sum(dim=(0, 1)).expand_as(layer.weight))


def by_hand(sd, caption, noun):
    """The largest cosine between a row of the table for a noun and the means of the rows of a caption's words."""
    table = sd.text_encoder.get_input_embeddings().weight.detach()
    mean = lambda word: table[ids(sd, word)].mean(dim=0)  # noqa: E731
    return max(torch.cosine_similarity(mean(word), mean(noun), dim=0) for word in caption.split())


@pytest.mark.parametrize("noun", ["cat", "photo"])  # of one sub-word, and of two
def test_the_nearest_captions_are_found_nearest_first(sd, noun):
    captions = ["tiger of", "a cat of photo", "of", "a tiger", "a photo of a CAT", "tiger"]
    near = similarity(sd, captions, f"a tiger {noun}")
    close(near, torch.stack([by_hand(sd, caption.lower(), noun) for caption in captions]))
    assert near.tolist().count(1.0) == 2 and near.max() == 1  # the noun itself, wherever it stands
    order = sorted(range(len(captions)), key=lambda k: -near[k])  # stable: equally near ones in their order
    assert order[:2] == [1, 4]
    assert retrieve(sd, captions, noun, threshold=-1) == order
    assert retrieve(sd, captions, noun, count=1) == [1] and retrieve(sd, captions, noun) == [1, 4]
    between = (near[order[2]] + near[order[-1]]).item() / 2
    assert retrieve(sd, captions, noun, threshold=between) == [k for k in order if near[k] > between] != order
    with pytest.raises(ValueError, match=r"^threshold: expected one below the best of 2 captions .*, got 0.999; lower"):
        retrieve(sd, ["tiger of", "a"], noun, threshold=0.999)
    close(similarity(sd, [""], noun), torch.tensor([-1.0]))
    with pytest.raises(ValueError, match=r"^target: expected words, such as 'a photo of a cat', got ''$"):
        similarity(sd, captions, "")


def test_new_words_can_be_searched_too(sd, untouched):
    with METHODS["custom diffusion"](sd):
        close(similarity(sd, ["a <cat-1>", "tiger"], "cat")[0], torch.tensor(1.0))  # it starts as the cat


@pytest.mark.parametrize("make", [textual_inversion.recipe, custom_diffusion.recipe])
def test_captions_beside_the_pictures_count_where_the_word_is_all_that_is_trained(sd, untouched, tmp_path, make):
    for k, picture in enumerate(PICTURES):
        picture.save(tmp_path / f"{k}.png")
        (tmp_path / f"{k}.txt").write_text("of {}")
    with make(sd, tmp_path, token="<v>", noun="cat") as recipe:
        assert {prompt.split()[1] for (prompt,) in recipe.terms[0].examples.prompts} == {"<v>"}
    (tmp_path / "1.txt").write_text("of a cat")
    with pytest.raises(ValueError, match=r"^captions: expected <v> or \{\} in each, .*beside .* 1 lack it: 'of a cat'"):
        with make(sd, tmp_path, token="<v>", noun="cat"):
            pass


@pytest.mark.parametrize("token", ["<V>", "sks", "<|endoftext|>"])
def test_custom_diffusion_refuses_a_token(sd, untouched, token):
    with (
        pytest.raises(ValueError, match=r"^token: expected a .*token"),
        custom_diffusion.recipe(sd, PICTURES, token=token, noun="cat", augment=False),
    ):
        pass


# ---- every recipe on the layout of Stable Diffusion 1.5 ----


@pytest.fixture(scope="module")
def narrow():
    return FULL_SIZE.build(**NARROW)


def test_the_narrow_model_has_the_layout_of_stable_diffusion_15(narrow):
    with torch.device("meta"):
        full = FULL_SIZE.networks()
    for part in ("unet", "vae"):
        assert list(getattr(narrow, part).state_dict()) == list(full[part].state_dict())


NARROW_METHODS = {
    "textual inversion": (1, lambda sd, **o: textual_inversion.recipe(sd, PICTURES, noun="cat", **o)),
    "dreambooth": (686, lambda sd, **o: dreambooth.recipe(sd, PICTURES, noun="cat", prior=prior(), **o)),
    "dreambooth and text": (722, lambda sd, **o: dreambooth.recipe(sd, PICTURES, noun="cat", text=True, **o)),
    "lora": (256, lambda sd, **o: lora.recipe(sd, PICTURES, noun="cat", rank=2, **o)),
    "custom diffusion": (33, lambda sd, **o: custom_diffusion.recipe(
        sd, PICTURES, noun="cat", regularisation=[prior()], **o)),
    "custom diffusion, 2 subjects": (33, lambda sd, **o: custom_diffusion.joint_recipe(
        sd, [SubjectPictures(PICTURES, "<v>", "cat"), SubjectPictures(PICTURES, "<w>", "tiger")], augment=False, **o)),
}  # fmt: skip


@pytest.mark.parametrize("method", NARROW_METHODS)
def test_one_step_of_every_recipe_on_the_layout_of_stable_diffusion_15(narrow, method):
    count, make = NARROW_METHODS[method]
    before, everything = state(narrow), tensors(narrow)
    frozen = copies(everything)
    with make(narrow, settings=settings(steps=1)) as recipe:
        start = copies(recipe.params)
        ((step, loss),) = finetune.finetune(narrow, recipe)
        assert step == 1 and loss.isfinite() and len(recipe.params) == count
        moved = {name for name, value in everything.items() if not torch.equal(value, frozen[name])}
        assert moved == set(recipe.params) & set(everything)
        assert not [name for name, param in recipe.params.items() if torch.equal(param, start[name])]
    assert_unchanged(before, state(narrow))
