"""A concept in other tools' files: stock diffusers draws from ours what this course draws, and the other way round.

Each picture is also compared with the base model's: a loader that loads nothing, and says nothing, would go unseen.
"""

import pickle
import re
from collections import OrderedDict
from dataclasses import replace

import pytest
import sd15_random
import torch
from diffusers import StableDiffusionPipeline
from diffusers.models.attention_processor import CustomDiffusionAttnProcessor
from safetensors.torch import load_file, save_file
from tiny import build

from course_lib.latent.registry import fingerprint
from course_lib.latent.stable_diffusion import load
from course_lib.personalization.concept import Concept, applied, load_concept, save_concept
from course_lib.personalization.custom_diffusion import key_value_layers
from course_lib.personalization.interchange import export as exporting
from course_lib.personalization.interchange import lora_files
from course_lib.personalization.interchange.export import export
from course_lib.personalization.interchange.formats import CUSTOM, KOHYA, LORA, WORDS
from course_lib.personalization.interchange.load import load_foreign
from course_lib.personalization.interchange.lora_files import flat
from course_lib.personalization.lora import LAYERS, attach
from course_lib.personalization.merge import compress

close = torch.testing.assert_close
exact = dict(rtol=0, atol=0)
near = dict(rtol=0, atol=5e-5)  # float32 over two steps; what is loaded moves the picture by more than 0.01
STEPS, W = 2, 2.0


@pytest.fixture(scope="module")
def sd():
    return build()


def draw(sd, prompt, *concepts):
    with applied(sd, *concepts):
        return sd.sample(prompt, steps=STEPS, w=W, seed=3)


def stock_draw(pipe, sd, prompt):
    pipe.set_progress_bar_config(disable=True)
    images = pipe(prompt, guidance_scale=W, num_inference_steps=STEPS, latents=sd.noise(1, seed=3), output_type="pt")
    return 2 * images.images.float() - 1


def stock():
    """A stock pipeline of the same base, which nothing of ours has touched."""
    return build().to_pipeline()


def assert_moved(images, base):
    assert (images - base).abs().max() > 0.01, "the picture is the base model's: nothing was loaded"


def random(shape, scale, seed):
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def trained(sd, *names, scale=0.3):
    """Weights of a network as after a training that moved them visibly."""
    have = {f"unet.{k}": v for k, v in sd.unet.named_parameters()}
    have |= {f"text_encoder.{k}": v for k, v in sd.text_encoder.named_parameters()}
    return {name: have[name] + random(have[name].shape, scale, k) for k, name in enumerate(names)}


def concept(sd, method, tensors, tokens=(), rows=None, **about):
    about = {"token": "<v>", "noun": "cat", "tokens": list(tokens), "nouns": ["cat"] * len(tokens),
             "rows": rows or list(tokens)} | about  # fmt: skip
    if about["rows"]:
        tensors = {"tokens": random((len(about["rows"]), 32), 1.0, 9)} | tensors
    return Concept(method, tensors, sd.name, about, {}, fingerprint(sd))


@pytest.fixture(scope="module")
def word(sd):
    return concept(sd, "textual_inversion", {}, ["<v>"], ["<v>", "<v>_1"])


@pytest.fixture(scope="module")
def custom(sd):
    names = [f"unet.{name}.weight" for name in key_value_layers(sd.unet)]
    return concept(sd, "custom_diffusion", trained(sd, *names), ["<new1>", "<new2>"])


@pytest.fixture(scope="module")
def lora(sd):
    tensors = {}
    for part, layers in LAYERS.items():
        for name, layer in getattr(sd, part).named_modules():
            if name.endswith(layers):
                tensors[f"{part}.{name}.lora.down"] = random((4, layer.in_features), 0.3, len(tensors))
                tensors[f"{part}.{name}.lora.up"] = random((layer.out_features, 4), 0.3, len(tensors))
    return concept(sd, "lora", tensors, rank=4, token="sks")


@pytest.fixture(scope="module")
def dreambooth(sd):
    names = [f"unet.{name}" for name, _ in sd.unet.named_parameters() if "attentions" in name]
    names += ["text_encoder.final_layer_norm.weight", "text_encoder.embeddings.token_embedding.weight"]
    return concept(sd, "dreambooth", trained(sd, *names, scale=0.1), token="sks")


def assert_same_tensors(got, wanted):
    assert got.tensors.keys() == wanted.tensors.keys()
    for name, value in wanted.tensors.items():
        close(got.tensors[name], value, **exact)


# ---- ours, opened by stock diffusers ----


@pytest.mark.parametrize("vectors", [1, 2])
def test_stock_diffusers_draws_our_word(sd, word, tmp_path, vectors):
    one = concept(sd, "textual_inversion", {}, ["<v>"])
    ours = word if vectors == 2 else one
    prompt = "a photo of <v>"
    export(ours, tmp_path, sd)
    assert load_file(tmp_path / WORDS)["<v>"].shape == (vectors, 32)
    pipe = stock()
    base = stock_draw(pipe, sd, prompt)
    pipe.load_textual_inversion(tmp_path / WORDS)
    theirs = stock_draw(pipe, sd, prompt)
    assert_moved(theirs, base)
    close(theirs, draw(sd, prompt, ours), **near)
    again = load_foreign(tmp_path, sd, {"<v>": "cat"})
    assert (again.method, again.about["rows"]) == ("textual_inversion", ours.about["rows"])
    assert_same_tensors(again, ours)


def test_stock_diffusers_draws_our_custom_diffusion(sd, custom, tmp_path):
    prompt = "<new1> cat of <new2>"
    export(custom, tmp_path, sd)
    assert load_file(tmp_path / "<new1>.safetensors")["<new1>"].shape == (32,)
    pipe = stock()
    for token in custom.about["tokens"]:
        pipe.load_textual_inversion(tmp_path / f"{token}.safetensors")
    words_only = stock_draw(pipe, sd, prompt)
    pipe.unet.load_attn_procs(tmp_path, weight_name=CUSTOM, _pipeline=pipe)
    theirs = stock_draw(pipe, sd, prompt)
    assert_moved(theirs, words_only)
    close(theirs, draw(sd, prompt, custom), **near)
    again = load_foreign(tmp_path, sd, dict.fromkeys(custom.about["tokens"], "cat"))
    assert again.method == "custom_diffusion" and again.about["nouns"] == ["cat", "cat"]
    assert_same_tensors(again, custom)


def test_a_compressed_concept_is_written_whole(sd, custom, tmp_path):
    base = {f"unet.{name}": param for name, param in sd.unet.named_parameters()}
    thin = {"tokens": custom.tensors["tokens"]}
    for name, value in custom.tensors.items():
        if name != "tokens":
            thin[f"{name}.u"], thin[f"{name}.v"] = compress(value - base[name], keep=1.0)
    export(replace(custom, tensors=thin), tmp_path, sd)
    again = load_foreign(tmp_path, sd)
    assert again.tensors.keys() == custom.tensors.keys()
    for name, value in custom.tensors.items():
        close(again.tensors[name], value, rtol=0, atol=1e-5)


def test_stock_diffusers_draws_our_lora(sd, lora, tmp_path):
    pytest.importorskip("peft")
    prompt = "a photo of a sks cat"
    export(lora, tmp_path, sd)
    for part in ("unet", "text_encoder"):
        some = {name: value for name, value in lora.tensors.items() if name.startswith(part)}
        assert_moved(draw(sd, prompt, Concept("lora", some, "random", {"rank": 4}, {})), draw(sd, prompt))
    pipe = stock()
    base = stock_draw(pipe, sd, prompt)
    pipe.load_lora_weights(tmp_path)
    theirs = stock_draw(pipe, sd, prompt)
    assert_moved(theirs, base)
    close(theirs, draw(sd, prompt, lora), **near)


@pytest.mark.parametrize("layout", ["kohya", "peft"])
def test_stock_loaders_draw_our_lora_in_other_layouts(sd, lora, tmp_path, layout):
    """diffusers' loader opens kohya's file, peft's own loader a folder for each network; we read both again."""
    peft, prompt = pytest.importorskip("peft"), "a photo of a sks cat"
    folder, base = export(lora, tmp_path, sd, layout=layout), stock()
    untouched = stock_draw(base, sd, prompt)
    if layout == "kohya":
        base.load_lora_weights(folder, weight_name=KOHYA)
        assert_same_tensors(load_foreign(folder, sd), lora)
    else:
        for part in ("unet", "text_encoder"):
            setattr(base, part, peft.PeftModel.from_pretrained(getattr(base, part), folder / part).base_model.model)
            half = {name: value for name, value in lora.tensors.items() if name.startswith(part)}
            assert_same_tensors(load_foreign(folder / part, sd), Concept("lora", half, "random", {"rank": 4}, {}))
    theirs = stock_draw(base, sd, prompt)
    assert_moved(theirs, untouched)
    close(theirs, draw(sd, prompt, lora), **near)


def a1111_module(key):
    """The module of the first Stable Diffusion that A1111 looks up for the part of a LoRA key before the first dot."""
    for pattern, place in (
        (r"lora_unet_down_blocks_(\d+)_attentions_(\d+)_(.+)", lambda k: f"input_blocks_{1 + 3 * k[0] + k[1]}_1"),
        (r"lora_unet_mid_block_attentions_(\d+)_(.+)", lambda k: "middle_block_1"),
        (r"lora_unet_up_blocks_(\d+)_attentions_(\d+)_(.+)", lambda k: f"output_blocks_{3 * k[0] + k[1]}_1"),
    ):
        if match := re.fullmatch(pattern, key):
            *places, rest = match.groups()
            return f"{place([int(number) for number in places])}_{rest}"
    match = re.fullmatch(r"lora_te_text_model_encoder_layers_(\d+_self_attn_._proj|\d+_self_attn_out_proj)", key)
    return f"text {match[1]}"


def test_kohyas_layout_has_the_names_and_values_that_a1111_and_comfyui_look_up():
    """All attention layers of Stable Diffusion 1.5, by the names of its first code, which both programs use."""
    with torch.device("meta"):
        parts = sd15_random.networks()
    with attach({"unet": parts["unet"], "text_encoder": parts["text_encoder"]}, rank=2) as params:
        tensors = {name: torch.full(param.shape, float(k)) for k, (name, param) in enumerate(params.items())}
    (content,) = lora_files.written(tensors, "kohya").values()
    layers = {key.split(".")[0] for key in content}
    blocks = {"transformer_blocks_0_attn1": 4, "transformer_blocks_0_attn2": 4}
    known = {f"{place}_{attention}_{matrix}" for attention in blocks for matrix in ("to_q", "to_k", "to_v", "to_out_0")
             for place in [*(f"input_blocks_{k}_1" for k in (1, 2, 4, 5, 7, 8)), "middle_block_1",
                           *(f"output_blocks_{k}_1" for k in range(3, 12))]}  # fmt: skip
    known |= {f"text {k}_self_attn_{matrix}_proj" for k in range(12) for matrix in ("q", "k", "v", "out")}
    assert {a1111_module(key) for key in layers} == known and len(layers) == len(known) == 128 + 48
    assert {key.partition(".")[2] for key in content} == {"lora_down.weight", "lora_up.weight", "alpha"}
    # ComfyUI makes its names from those of diffusers' layers
    unet = {"lora_unet_" + name.removesuffix(".weight").replace(".", "_") for name in parts["unet"].state_dict()}
    assert {key for key in layers if "unet" in key} <= unet
    layer = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    key = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
    close(content[f"{key}.lora_down.weight"], tensors[f"{layer}.lora.down"], **exact)
    close(content[f"{key}.lora_up.weight"], tensors[f"{layer}.lora.up"], **exact)
    close(content[f"{key}.alpha"], torch.tensor(2.0), **exact)  # scale alpha / rank = 1


def test_a_word_is_a_file_with_one_tensor_which_a1111_and_comfyui_take_as_the_embedding(sd, word, tmp_path):
    content = load_file(export(word, tmp_path, sd) / WORDS)
    assert len(content) == 1
    close(content["<v>"], word.tensors["tokens"].squeeze(0), **exact)


@pytest.mark.parametrize(("kind", "layout"), [("word", "kohya"), ("custom", "peft"), ("lora", "a1111")])
def test_layouts_that_a_method_does_not_have_are_refused(sd, request, tmp_path, kind, layout):
    with pytest.raises(ValueError, match=f"^layout: expected 'diffusers', or with lora .* got '{layout}' with"):
        export(request.getfixturevalue(kind), tmp_path, sd, layout=layout)
    assert not list(tmp_path.iterdir())


def test_our_lora_comes_back(sd, lora, tmp_path):
    again = load_foreign(export(lora, tmp_path, sd) / LORA, sd, {"sks": "cat"})
    assert (again.method, again.about["rank"], again.about["token"]) == ("lora", 4, "sks")
    assert_same_tensors(again, lora)
    assert not (tmp_path / f"{LORA}.tmp").exists()


@pytest.mark.parametrize(("kind", "prompt"), [
    ("dreambooth", "a photo of a sks cat"), ("custom", "<new1> cat of <new2>"), ("lora", "a photo of a sks cat"),
    ("word", "a photo of <v>"),
])  # fmt: skip
def test_a_pipeline_folder_holds_everything(sd, request, tmp_path, kind, prompt):
    """The robust way: no processors, no peft, words in the tokenizer; and read back as what differs from the base."""
    ours = request.getfixturevalue(kind)
    export(ours, tmp_path, sd, pipeline=kind != "dreambooth")
    wanted = draw(sd, prompt, ours)
    theirs = stock_draw(StableDiffusionPipeline.from_pretrained(tmp_path), sd, prompt)
    assert_moved(theirs, draw(sd, prompt))
    close(theirs, wanted, **near)
    close(load(tmp_path).sample(prompt, steps=STEPS, w=W, seed=3), wanted, **near)
    again = load_foreign(tmp_path, sd)
    close(draw(sd, prompt, again), wanted, **near)
    assert again.method == (ours.method if kind != "lora" else "dreambooth")
    assert again.about["rows"] == ours.about["rows"]
    if kind != "lora":
        assert_same_tensors(again, ours)


def test_a_model_saved_in_half_precision_differs_only_where_it_was_trained(sd, dreambooth, tmp_path):
    export(dreambooth, tmp_path, sd, dtype=torch.float16)
    again = load_foreign(tmp_path, sd)
    assert again.tensors.keys() == dreambooth.tensors.keys()
    close(draw(sd, "a sks cat", again), draw(sd, "a sks cat", dreambooth), rtol=0, atol=0.02)


# ---- written by stock diffusers, opened here ----


def processors(sd, custom):
    """What diffusers' training script for Custom Diffusion leaves in the UNet."""
    pipe = stock()
    made = {}
    for name in pipe.unet.attn_processors:
        own = name.replace(".processor", "")
        cross = ".attn2." in name
        weight = lambda part: custom.tensors[f"unet.{own}.{part}.weight"]  # noqa: B023, E731
        made[name] = CustomDiffusionAttnProcessor(
            train_kv=cross, train_q_out=False, hidden_size=len(weight("to_k")) if cross else None,
            cross_attention_dim=32 if cross else None,
        )  # fmt: skip
        if cross:
            for part in ("to_k", "to_v"):
                getattr(made[name], f"{part}_custom_diffusion").weight.data = weight(part).clone()
    pipe.unet.set_attn_processor(made)
    return pipe


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
def test_their_custom_diffusion_is_read(sd, custom, tmp_path, safe):
    pipe = processors(sd, custom)
    pipe.unet.save_attn_procs(tmp_path, safe_serialization=safe)
    for token, row in zip(custom.about["tokens"], custom.tensors["tokens"]):
        if safe:
            save_file({token: row}, tmp_path / f"{token}.safetensors")
        else:
            torch.save({token: row}, tmp_path / f"{token}.bin")
        pipe.load_textual_inversion({token: row})
    prompt = "<new1> cat of <new2>"
    theirs = stock_draw(pipe, sd, prompt)
    ours = load_foreign(tmp_path, sd)
    assert (ours.method, ours.about["rows"]) == ("custom_diffusion", ["<new1>", "<new2>"])
    assert_moved(theirs, draw(sd, prompt))
    close(draw(sd, prompt, ours), theirs, **near)


def test_what_is_broken_in_stock_custom_diffusion(sd, custom, tmp_path):
    """Two traps that the file we write, and its description, go around. If this fails, diffusers has mended them."""
    prompt = "a photo of a cat"
    pipe = stock()
    base = stock_draw(pipe, sd, prompt)
    export(custom, tmp_path, sd)
    pipe.unet.load_attn_procs(tmp_path, weight_name=CUSTOM)  # without _pipeline it loads nothing, and says nothing
    close(stock_draw(pipe, sd, prompt), base, **exact)
    processors(sd, custom).unet.save_attn_procs(tmp_path)  # its own file lacks the entries that its loader asks for
    with pytest.raises(ValueError, match="number of processors"):
        pipe.unet.load_attn_procs(tmp_path, weight_name=CUSTOM, _pipeline=pipe)


def peft_pipe(targets, text_targets, rank=4, alpha=4):
    """A pipeline with LoRA of peft in it, as diffusers' training script makes it, all numbers moved."""
    peft = pytest.importorskip("peft")
    pipe = stock()
    for seed, (network, names) in enumerate(((pipe.unet, targets), (pipe.text_encoder, text_targets))):
        if names:
            network.add_adapter(peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=names))
        for name, param in network.named_parameters():
            if "lora_" in name:
                param.data = random(param.shape, 0.3, seed)
    return pipe


@pytest.mark.parametrize("style", ["alpha is the rank", "alpha in the metadata", "names of peft", "no text encoder"])
def test_their_lora_is_read(sd, tmp_path, style):
    peft = pytest.importorskip("peft")
    from diffusers.training_utils import _collate_lora_metadata
    from diffusers.utils import convert_state_dict_to_diffusers

    alpha = 10 if style == "alpha in the metadata" else 4
    text_targets = None if style == "no text encoder" else list(LAYERS["text_encoder"])
    pipe = peft_pipe(list(LAYERS["unet"]), text_targets, alpha=alpha)
    parts = {"unet": pipe.unet} | ({"text_encoder": pipe.text_encoder} if text_targets else {})
    convert = dict if style == "names of peft" else convert_state_dict_to_diffusers
    layers = {f"{name}_lora_layers": convert(peft.get_peft_model_state_dict(part)) for name, part in parts.items()}
    more = _collate_lora_metadata(parts) if alpha != 4 else {}
    StableDiffusionPipeline.save_lora_weights(tmp_path, **layers, **more)
    prompt = "a photo of a cat"
    theirs = stock_draw(pipe, sd, prompt)
    ours = load_foreign(tmp_path, sd)
    assert (ours.method, ours.about["rank"]) == ("lora", 4)
    assert_moved(theirs, draw(sd, prompt))
    close(draw(sd, prompt, ours), theirs, **near)


def test_their_lora_of_other_layers_becomes_weights(sd, tmp_path):
    peft = pytest.importorskip("peft")
    pipe = peft_pipe(["to_k", "proj_in", "ff.net.0.proj", "conv1"], ["fc1"])
    layers = {f"{name}_lora_layers": peft.get_peft_model_state_dict(getattr(pipe, name))
              for name in ("unet", "text_encoder")}  # fmt: skip
    StableDiffusionPipeline.save_lora_weights(tmp_path, **layers)
    theirs = stock_draw(pipe, sd, "a cat")
    ours = load_foreign(tmp_path, sd)
    assert ours.method == "dreambooth" and ours.fingerprint is not None
    assert_moved(theirs, draw(sd, "a cat"))
    close(draw(sd, "a cat", ours), theirs, **near)


def test_a_lora_of_older_scripts_is_read(sd, lora, tmp_path):
    """Diffusers' attention processors once held the matrices, and CLIP one more level of names."""
    pytest.importorskip("peft")
    content = {}
    for name, value in lora.tensors.items():
        name = re.sub(r"(attn\d)\.(to_[a-z]+)(\.0)?\.lora", r"\1.processor.\2_lora", name)
        name = name.replace("text_encoder.", "text_encoder.text_model.").replace("proj.lora", "proj.lora_linear_layer")
        content[f"{name}.weight"] = value
    torch.save(content, tmp_path / "pytorch_lora_weights.bin")
    ours = load_foreign(tmp_path, sd)
    assert_same_tensors(ours, lora)
    pipe = stock()
    pipe.load_lora_weights(content)
    theirs = stock_draw(pipe, sd, "a cat")
    assert_moved(theirs, draw(sd, "a cat"))
    close(draw(sd, "a cat", ours), theirs, **near)


def test_a_lora_of_kohyas_scripts_is_read(sd, lora, tmp_path):
    """Underscores in place of dots, alpha beside the matrices, and a rank of each layer's own."""
    pytest.importorskip("peft")
    content = {}
    for k, (name, down) in enumerate((n, v) for n, v in lora.tensors.items() if n.endswith(".down")):
        layer, rank = name.removesuffix(".lora.down"), 2 + 2 * (k % 2)
        flat = layer.replace("text_encoder.", "te_text_model_").replace(".", "_")
        content[f"lora_{flat}.lora_down.weight"] = down[:rank].clone()
        content[f"lora_{flat}.lora_up.weight"] = lora.tensors[f"{layer}.lora.up"][:, :rank].clone()
        content[f"lora_{flat}.alpha"] = torch.tensor(6.0)
    save_file(content, tmp_path / "rex.safetensors")
    ours = load_foreign(tmp_path / "rex.safetensors", sd)
    pipe = stock()
    pipe.load_lora_weights(tmp_path, weight_name="rex.safetensors")
    theirs = stock_draw(pipe, sd, "a cat")
    assert ours.about["rank"] == 4
    assert_moved(theirs, draw(sd, "a cat"))
    close(draw(sd, "a cat", ours), theirs, **near)


def test_their_word_is_read(sd, word, tmp_path):
    """The file that diffusers' training script writes; a name with capitals comes in the form that prompts expand."""
    torch.save({"<My-Cat>": word.tensors["tokens"]}, tmp_path / "learned_embeds.bin")
    ours = load_foreign(tmp_path, sd)
    assert ours.about["rows"] == ["<my-cat>", "<my-cat>_1"] and ours.about["noun"] == ""
    pipe = stock()
    pipe.load_textual_inversion(tmp_path, weight_name="learned_embeds.bin", token="<my-cat>")
    theirs = stock_draw(pipe, sd, "a <my-cat>")
    assert_moved(theirs, draw(sd, "a "))
    close(draw(sd, "a <my-cat>", ours), theirs, **near)


# ---- only read ----


@pytest.mark.parametrize("kind", ["pt", "safetensors"])
def test_an_embedding_of_a_web_interface_is_read(sd, word, tmp_path, kind):
    path, rows = tmp_path / f"rex.{kind}", word.tensors["tokens"]
    if kind == "pt":
        parameter = torch.nn.Parameter(rows.half())
        torch.save(
            {"string_to_token": {"*": 265}, "string_to_param": {"*": parameter}, "name": "Rex 2", "step": 9}, path
        )
    else:
        save_file({"emb_params": rows.half()}, path)
    ours = load_foreign(path, sd)
    token = "<rex-2>" if kind == "pt" else "<rex>"
    assert ours.about["rows"] == [token, f"{token}_1"]
    close(ours.tensors["tokens"], rows.half().float(), **exact)
    pipe = stock()
    pipe.load_textual_inversion({token: rows.half().float()})
    theirs = stock_draw(pipe, sd, f"a {token}")
    close(draw(sd, f"a {token}", ours), theirs, **near)
    renamed = load_foreign(path, sd, {"<v>": "dog"})
    assert (renamed.about["token"], renamed.about["noun"]) == ("<v>", "dog")
    close(draw(sd, "a <v>", renamed), theirs, **near)


@pytest.mark.parametrize("compressed", [False, True], ids=["whole", "compressed"])
def test_a_delta_of_the_authors_is_read(sd, custom, tmp_path, compressed):
    base = dict(sd.unet.named_parameters())
    weights = {name.removeprefix("unet."): value for name, value in custom.tensors.items() if name != "tokens"}
    if compressed:
        pairs = {name: compress(value - base[name], keep=1.0) for name, value in weights.items()}
        content = {name: {"u": u, "v": v} for name, (u, v) in pairs.items()}
    else:
        content = {name: torch.nn.Parameter(value) for name, value in weights.items()}
    words = dict(zip(custom.about["tokens"], custom.tensors["tokens"]))
    torch.save({"unet": content, "modifier_token": words}, tmp_path / "delta.bin")
    ours = load_foreign(tmp_path, sd)
    assert ours.method == "custom_diffusion" and (ours.fingerprint is not None) == compressed
    prompt = "<new1> cat of <new2>"
    assert_moved(draw(sd, prompt, ours), draw(sd, prompt))
    close(draw(sd, prompt, ours), draw(sd, prompt, custom), **near)


def test_a_delta_with_the_text_encoder_is_read(sd, dreambooth, tmp_path):
    """The authors' option: all of the cross-attention, and a text encoder with the new word's row in its table."""
    ours = build()
    unet = {n: v for n, v in ((n.removeprefix("unet."), v) for n, v in dreambooth.tensors.items()) if "attn2" in n}
    with applied(ours, dreambooth):
        ours.tokenizer.add_tokens("<new1>")
        ours.text_encoder.resize_token_embeddings(len(ours.tokenizer), mean_resizing=False)
        row = ours.text_encoder.get_input_embeddings().weight[-1].clone()
        text = {f"text_model.{name}": value.clone() for name, value in ours.text_encoder.state_dict().items()}
        ours.unet.load_state_dict({**build().unet.state_dict(), **unet})
        wanted = stock_draw(ours.to_pipeline(), sd, "a <new1> cat")
    torch.save({"unet": unet, "text_encoder": text, "modifier_token": {"<new1>": row}}, tmp_path / "delta.bin")
    read = load_foreign(tmp_path / "delta.bin", sd)
    moved = {name for name in read.tensors if name.startswith("text_encoder.")}
    assert moved == {name for name in dreambooth.tensors if name.startswith("text_encoder.")}
    close(draw(sd, "a <new1> cat", read), wanted, **near)


def test_the_embedding_of_the_first_textual_inversion_is_read(sd, word, tmp_path):
    """Its embeddings.pt keeps the rows in a torch.nn.ParameterDict, under "*" or under the word itself."""
    rows = word.tensors["tokens"]
    for key, token in (("*", "<embeddings>"), ("Rex", "<rex>")):
        held = torch.nn.ParameterDict({key: torch.nn.Parameter(rows)})
        torch.save({"string_to_token": {key: torch.tensor(265)}, "string_to_param": held}, tmp_path / "embeddings.pt")
        read = load_foreign(tmp_path / "embeddings.pt", sd)
        assert read.about["rows"] == [token, f"{token}_1"] and not read.tensors["tokens"].requires_grad
        close(read.tensors["tokens"], rows, **exact)


@pytest.mark.parametrize("name", ["rex.SAFETENSORS", "rex", "rex.bin"])
def test_a_safetensors_file_is_known_by_its_content(sd, word, tmp_path, name):
    save_file({"<v>": word.tensors["tokens"]}, tmp_path / name)
    close(load_foreign(tmp_path / name, sd).tensors["tokens"], word.tensors["tokens"], **exact)


def in_their_names(lora, rename):
    """Our LoRA under other names of its layers and matrices."""
    return {rename(name.removesuffix(".down").removesuffix(".up").removesuffix(".lora"))
            + (".lora_A.weight" if name.endswith(".down") else ".lora_B.weight"): value.clone()
            for name, value in lora.tensors.items()}  # fmt: skip


def test_a_folder_of_peft_is_read(sd, tmp_path):
    """Written by peft itself, one network a folder, its scale in adapter_config.json."""
    peft = pytest.importorskip("peft")
    for part in ("unet", "text_encoder"):
        base = build()
        network = peft.get_peft_model(getattr(base, part), peft.LoraConfig(
            r=4, lora_alpha=10, target_modules=list(LAYERS[part])))  # fmt: skip
        for seed, (name, param) in enumerate(network.named_parameters()):
            if "lora_" in name:
                param.data = random(param.shape, 0.3, seed)
        network.save_pretrained(tmp_path / part)
        setattr(base, part, network.base_model.model)
        wanted = base.sample("a photo of a cat", steps=STEPS, w=W, seed=3)
        ours = load_foreign(tmp_path / part, sd)
        assert (ours.method, ours.about["rank"], ours.about["token"]) == ("lora", 4, "")
        assert_moved(wanted, draw(sd, "a photo of a cat"))
        close(draw(sd, "a photo of a cat", ours), wanted, **near)


# Our names of layers and those of the first Stable Diffusion, whose middle and outer blocks are counted through; the
# tiny model has one layer a block.
ORIGINAL = {"unet.down_blocks.0.attentions.0.": "input_blocks.1.1.", "unet.mid_block.attentions.0.": "middle_block.1.",
            "unet.up_blocks.1.attentions.0.": "output_blocks.2.1.", "unet.up_blocks.1.attentions.1.":
            "output_blocks.3.1."}  # fmt: skip


@pytest.mark.parametrize("names", ["diffusers' layers", "original layers"])
def test_a_lora_of_comfyui_is_read(sd, lora, tmp_path, names):
    def rename(layer):
        if layer.startswith("text_encoder."):
            return layer.replace("text_encoder.", "text_encoders.clip_l.transformer.text_model.")
        for ours, original in ORIGINAL.items():
            if names == "original layers" and layer.startswith(ours):
                return layer.replace(ours, f"diffusion_model.{original}")
        assert names != "original layers"
        return layer.replace("unet.", "diffusion_model.")

    save_file(in_their_names(lora, rename), tmp_path / "rex.safetensors")
    assert_same_tensors(load_foreign(tmp_path / "rex.safetensors", sd), lora)


def test_original_names_mean_the_layers_that_diffusers_converts_them_to():
    """Two layers a block, as in Stable Diffusion 1, against diffusers' own table of a checkpoint's names."""
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint as convert

    config = {"layers_per_block": 2, "class_embed_type": None, "addition_embed_type": None}
    parts = {f"{where}_blocks.{k}.{part}" for where in ("input", "output") for k in range(12) for part in (0, 1)}
    parts -= {f"input_blocks.{k}.{part}" for k, part in ((0, 0), (0, 1), (3, 0), (3, 1), (6, 0), (6, 1), (9, 0), (9, 1),
                                                         (10, 1), (11, 1))}  # fmt: skip
    parts -= {f"output_blocks.{k}.1" for k in range(3)}
    layers = ["time_embed.0", "time_embed.2", "input_blocks.0.0", "out.0", "out.2"]
    layers += [f"input_blocks.{k}.0.op" for k in (3, 6, 9)]
    inner = {"0": ("in_layers.2", "emb_layers.1", "out_layers.3"), "1": ("proj_in", "transformer_blocks.0.attn2.to_k")}
    checked = [f"{name}.{layer}" for name in sorted(parts) for layer in inner[name[-1]]]
    checked += [f"middle_block.{k}.{layer}" for k in range(3) for layer in inner[str(k % 2)]]
    content = {f"model.diffusion_model.{layer}.{kind}": f"{layer}.{kind}" for layer in (*layers, *checked)
               for kind in ("weight", "bias")}  # fmt: skip
    theirs = {value: key.removesuffix(".weight") for key, value in convert(content, config).items()}
    assert len(checked) > 60
    for layer in checked:
        assert flat(f"diffusion_model.{layer}") == flat(f"unet.{theirs[f'{layer}.weight']}")


@pytest.mark.parametrize(("key", "kind"), [
    ("lora_unet_x_to_k.dora_scale", "DoRA"), ("base_model.model.x.to_k.lora_magnitude_vector.weight", "DoRA"),
    ("lora_unet_x_to_k.hada_w1_a", "LoHa"), ("lora_unet_x_to_k.lokr_w1", "LoKr"),
])  # fmt: skip
def test_what_looks_like_lora_and_is_not_is_refused_by_its_name(sd, lora, tmp_path, key, kind):
    content = in_their_names(lora, lambda layer: layer) | {key: torch.ones(2)}
    save_file(content, tmp_path / "rex.safetensors")
    with pytest.raises(ValueError, match=rf"^path: expected LoRA, but .*rex\.safetensors is {kind}, whose change"):
        load_foreign(tmp_path / "rex.safetensors", sd)


@pytest.mark.parametrize("kind", ["word", "lora", "custom", "scale"])
def test_numbers_that_are_not_finite_are_refused(sd, word, lora, custom, tmp_path, kind):
    ours = {"word": word, "lora": lora, "custom": custom, "scale": lora}[kind]
    broken = replace(ours, tensors={name: value.clone() for name, value in ours.tensors.items()})
    name = list(broken.tensors)[-1]
    broken.tensors[name][-1, 0] = torch.nan
    with pytest.raises(ValueError, match=r"^path: expected finite numbers, but 1 tensors of "):
        export(broken, tmp_path / "out", sd)
    assert not (tmp_path / "out").exists()
    folder = export(ours, tmp_path / "files", sd)
    file = next(file for file in (LORA, CUSTOM, WORDS) if (folder / file).is_file())
    content = load_file(folder / file)
    key = next(key for key, value in content.items() if value.numel())
    if kind == "scale":
        layer = next(key for key in content if key.startswith("unet.")).partition(".lora.")[0]
        content[f"{layer}.alpha"] = torch.tensor(torch.inf)
    else:
        content[key][0] = torch.nan
    save_file(content, folder / file)
    with pytest.raises(ValueError, match=r"^path: expected finite numbers, but 1 tensors of .* hold NaN or infinity"):
        load_foreign(folder, sd)


def test_a_pointer_of_git_lfs_and_a_long_list_are_one_sentence(sd, tmp_path):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    for name in ("a.safetensors", "b.bin"):
        (tmp_path / name).write_text(pointer)
        with pytest.raises(ValueError, match=r"^path: .* is a pointer of Git LFS, not the file itself"):
            load_foreign(tmp_path / name, sd)
        with pytest.raises(ValueError, match=r"^path: .* is a pointer of Git LFS, not the file itself"):
            load_concept(tmp_path / name)
    save_file({f"a_long_name_of_a_word_{k}": torch.ones(768) for k in range(100)}, tmp_path / "many.safetensors")
    with pytest.raises(ValueError, match=r"words of 32 numbers .* and 97 more in ") as caught:
        load_foreign(tmp_path / "many.safetensors", sd)
    assert len(str(caught.value)) < 400


# ---- what is refused ----


class Harmful:
    def __reduce__(self):
        return print, ("this would be any program",)


REFUSED = {
    "no file": (lambda path: None, "path: expected a file, or a folder with one of"),
    "no safetensors": (lambda path: path.write_bytes(b"nothing"), "cannot be read"),
    "none of these": (lambda path: save_file({"conv.weight": torch.ones(2, 2)}, path), "with 'conv.weight'"),
    "empty": (lambda path: save_file({}, path), "nothing in it"),
    "wide word": (lambda path: save_file({"<v>": torch.ones(768)}, path), r"words of 32 numbers .* \(768,\)"),
    "no rows": (lambda path: save_file({"<v>": torch.ones(0, 32)}, path), "words of 32 numbers"),
    "wide embedding": (lambda path: save_file({"emb_params": torch.ones(1, 768)}, path), "words of 32 numbers"),
    "keys and values of another": (
        lambda path: save_file({"x.attn2.processor.to_k_custom_diffusion.weight": torch.ones(3, 768)}, path),
        r"expected weights of this model 'random', got 1 others .*unet\.x\.attn2\.to_k\.weight \(3, 768\)",
    ),
    "LoRA of another": (
        lambda path: save_file({f"unet.x.to_k.lora.{k}.weight": torch.ones(2, 2) for k in ("up", "down")}, path),
        "expected LoRA of this model 'random', got 2 tensors .*unet.x.to_k.lora",
    ),
    "half a LoRA": (
        lambda path: save_file({"unet.mid_block.attentions.0.proj_in.lora.down.weight": torch.ones(2, 64, 1, 1)}, path),
        "expected LoRA of this model",
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*no file of a word")
@pytest.mark.parametrize("case", REFUSED)
def test_what_is_none_of_these_is_refused(sd, tmp_path, case):
    make, message = REFUSED[case]
    make(tmp_path / "rex.safetensors")
    with pytest.raises(ValueError, match=message):
        load_foreign(tmp_path / "rex.safetensors", sd)


@pytest.mark.parametrize("harmful", [
    Harmful(), {"<v>": Harmful()}, OrderedDict(a=Harmful()),
    {"string_to_param": torch.nn.ModuleDict({"a": torch.nn.Linear(1, 32)})},
    {"string_to_param": torch.nn.ParameterDict({"*": Harmful()})},
], ids=["alone", "in a dict", "in an ordered dict", "a module", "in a dict of parameters"])  # fmt: skip
def test_a_pickle_that_runs_something_is_refused(sd, tmp_path, capsys, harmful):
    torch.save(harmful, tmp_path / "rex.pt")
    with pytest.raises(ValueError, match=r"expected tensors only, but .* holds code that would run"):
        load_foreign(tmp_path / "rex.pt", sd)
    assert capsys.readouterr().out == ""


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_plain_pickle_and_a_list_are_refused(sd, tmp_path, capsys):
    (tmp_path / "a.bin").write_bytes(pickle.dumps(Harmful()))
    torch.save(["a", "list"], tmp_path / "b.bin")
    for name in ("a.bin", "b.bin"):
        with pytest.raises(ValueError, match=r"^path: expected"):
            load_foreign(tmp_path / name, sd)
    assert capsys.readouterr().out == ""


def test_other_doors_are_named(sd, word, lora, custom, tmp_path):
    save_concept(tmp_path / "rex.safetensors", word)
    with pytest.raises(ValueError, match="load_concept reads"):
        load_foreign(tmp_path / "rex.safetensors", sd)
    sd.save(tmp_path / "base")
    with pytest.raises(ValueError, match="is the base model itself"):
        load_foreign(tmp_path / "base", sd)
    with pytest.raises(ValueError, match=r"^words: expected a name and a noun for each of '<new1>', '<new2>', got"):
        load_foreign(export(custom, tmp_path / "custom", sd), sd, {"<v>": "cat"})
    with pytest.raises(ValueError, match=r"^concept: expected one that was trained on this model"):
        export(lora, tmp_path / "other", build(seed=1))
    with pytest.raises(ValueError, match=r"^concept: expected a method of this course, got 'other'"):
        export(Concept("other", {}, "random", {}, {}), tmp_path / "other", sd)
    assert not (tmp_path / "other").exists()


def test_weights_without_words_and_another_autoencoder_are_warned_of(sd, custom, dreambooth, tmp_path):
    folder = export(custom, tmp_path / "custom", sd)
    for file in folder.glob("<*"):
        file.unlink()
    with pytest.warns(UserWarning, match="no file of a word"):
        assert "tokens" not in load_foreign(folder, sd).tensors
    other = build()
    other.vae.decoder.conv_out.bias.data += 1
    export(dreambooth, tmp_path / "pipeline", other)
    with pytest.warns(UserWarning, match="its autoencoder or noise schedule is another one"):
        assert load_foreign(tmp_path / "pipeline", sd).method == "dreambooth"


def test_a_file_that_cannot_be_written_leaves_the_old_one(sd, word, tmp_path, monkeypatch):
    export(word, tmp_path, sd)
    before = (tmp_path / WORDS).read_bytes()

    def full(content, path, *args):
        (path / "part" if path.is_dir() else path).write_bytes(b"a part of it")
        raise OSError("No space left on device")

    monkeypatch.setattr(exporting, "save_file", full)
    with pytest.raises(OSError, match=r"^folder: .*cannot be written \(No space left"):
        export(word, tmp_path, sd)
    assert (tmp_path / WORDS).read_bytes() == before and [f.name for f in tmp_path.iterdir()] == [WORDS]
    (tmp_path / "pipeline").mkdir()
    monkeypatch.setattr(type(sd), "save", full)
    with pytest.raises(OSError, match=r"^folder: .*cannot be written \(No space left"):
        export(word, tmp_path / "pipeline", sd, pipeline=True)
    with pytest.raises(OSError, match=r"^folder: .*cannot be written"):
        export(word, tmp_path / WORDS, sd)  # a file where the folder would be


def test_the_base_stays_as_it_was_and_files_have_the_dtype(sd, custom, tmp_path):
    before = {name: value.clone() for name, value in sd.unet.state_dict().items()}
    export(custom, tmp_path / "pipeline", sd, pipeline=True)
    load_foreign(export(custom, tmp_path, sd, dtype=torch.float16), sd)
    for name, value in sd.unet.state_dict().items():
        close(value, before[name], **exact)
    assert "<new1>" not in sd.tokenizer.get_vocab()
    for name in (CUSTOM, "<new1>.safetensors"):
        assert {value.dtype for value in load_file(tmp_path / name).values()} == {torch.float16}
