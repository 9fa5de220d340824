"""A concept is saved, put into a model and taken out without a trace; two that were learnt apart become one."""

import errno
from dataclasses import replace

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tiny import build

from course_lib.personalization import concept, custom_diffusion, dreambooth, lora, merge, textual_inversion
from course_lib.personalization.concept import Concept, applied, concept_of, load_concept, only_tokens, save_concept
from course_lib.personalization.finetune import finetune
from course_lib.personalization.merge import (
    compress,
    compressed,
    merge_concepts,
    merge_weights,
    mix_loras,
    uncompressed,
)
from course_lib.personalization.recipe import Settings

CAPTIONS = ["a tiger", "a photo of a tiger", "a cat of a tiger", "a red cat", "blue", "a tree", "", "the cat of ten"]
STEPS = Settings(steps=3, lr=2e-2, batch_size=2)
close = torch.testing.assert_close
exact = dict(rtol=0, atol=0)


@pytest.fixture(scope="module")
def sd():
    return build()


PICTURES = [Image.new("RGB", (64, 64), (200, 30, 30)), Image.linear_gradient("L")]


def custom(sd, token, noun="cat"):
    captions = ["a photo of a {}"] * 2
    return custom_diffusion.recipe(sd, PICTURES, token=token, noun=noun, captions=captions, settings=STEPS)


RECIPES = {
    "textual inversion": lambda sd: textual_inversion.recipe(sd, PICTURES, noun="cat", vectors=2, templates=["a {}"],
                                                             settings=STEPS),
    "dreambooth": lambda sd: dreambooth.recipe(sd, PICTURES, noun="cat", token="<v>", text=True, settings=STEPS),
    "lora": lambda sd: lora.recipe(sd, PICTURES, noun="cat", token="<v>", text=True, rank=2, settings=STEPS),
    "custom diffusion": lambda sd: custom(sd, "<v>"),
}  # fmt: skip


def trained(sd, recipe):
    with recipe as recipe:
        for _ in finetune(sd, recipe):
            pass
        return concept_of(recipe)


@pytest.fixture(scope="module")
def concepts(sd):
    """Two that Custom Diffusion learnt apart."""
    return [trained(sd, custom(sd, f"<{noun}>", noun)) for noun in ("cat", "tiger")]


def draw(sd, prompt="a photo of a <v> cat"):
    return sd.sample(prompt, w=2.0, steps=2, seed=3)


def snapshot(sd):
    """All that could be left behind: numbers, their places, what learns, modules, words."""
    parts = (sd.unet, sd.text_encoder, sd.vae)
    state = [(name, value.data_ptr(), value.clone()) for part in parts for name, value in part.state_dict().items()]
    learns = [p.requires_grad for part in parts for p in part.parameters()]
    modules = [(name, type(m), len(m._forward_hooks)) for part in parts for name, m in part.named_modules()]
    return state, learns, modules, sd.tokenizer.get_vocab(), dict(vars(sd.tokenizer))


def assert_untouched(sd, before):
    after = snapshot(sd)
    assert len(after[0]) == len(before[0]) and after[1:4] == before[1:4] and not any(after[1])
    assert after[4].keys() == before[4].keys() and all(after[4][key] is before[4][key] for key in before[4])
    for (name, place, value), (old_name, old_place, old) in zip(after[0], before[0], strict=True):
        assert (name, place) == (old_name, old_place) and torch.equal(value, old)


# ---- in a model, and out again ----


@pytest.mark.parametrize("method", RECIPES)
def test_a_saved_concept_draws_what_the_model_drew_in_training(sd, tmp_path, method):
    before, plain = snapshot(sd), draw(sd)
    with RECIPES[method](sd) as recipe:
        for _ in finetune(sd, recipe):
            pass
        seen = draw(sd)
        save_concept(tmp_path / "a.safetensors", recipe)
    assert_untouched(sd, before)
    with applied(sd, load_concept(tmp_path / "a.safetensors")) as same:
        assert same is sd
        close(draw(sd), seen, **exact)
        assert not any(p.requires_grad for part in (sd.unet, sd.text_encoder) for p in part.parameters())
    assert_untouched(sd, before)
    close(draw(sd), plain, **exact)
    assert not torch.allclose(seen, plain, atol=1e-3)


@pytest.mark.parametrize("method", RECIPES)
def test_an_error_inside_leaves_no_trace_either(sd, method):
    learnt, before = trained(sd, RECIPES[method](sd)), snapshot(sd)
    with pytest.raises(RuntimeError, match="mine"), applied(sd, learnt):
        draw(sd)
        raise RuntimeError("mine")
    assert_untouched(sd, before)


def test_a_concept_is_a_copy(sd):
    """Neither more training nor what happens in a model changes it."""
    with RECIPES["custom diffusion"](sd) as recipe:
        learnt = concept_of(recipe)
        kept = {name: value.clone() for name, value in learnt.tensors.items()}
        for _ in finetune(sd, recipe):
            pass
        assert not torch.equal(recipe.params["tokens"], kept["tokens"])
    with applied(sd, learnt):
        for name in kept.keys() - {"tokens"}:
            sd.unet.get_parameter(name.removeprefix("unet.")).data.add_(1)
    assert learnt.tensors.keys() == kept.keys()
    for name, value in kept.items():
        close(learnt.tensors[name], value, **exact)


def test_concepts_that_change_different_things_work_together(sd, concepts):
    """Two words and one's weights; low-rank changes go around the weights, whichever comes first."""
    words, lora, before = only_tokens(concepts[1]), trained(sd, RECIPES["lora"](sd)), snapshot(sd)
    assert list(words.tensors) == ["tokens"]
    prompt, drawn = "a <cat> cat of a <tiger> tiger", []
    for chosen in ([concepts[0], words, lora], [lora, concepts[0], words], [concepts[0], words]):
        with applied(sd, *chosen):
            drawn.append(draw(sd, prompt))
        assert_untouched(sd, before)
    close(drawn[0], drawn[1], **exact)
    assert not torch.allclose(drawn[0], drawn[2], atol=1e-3)


def low_rank(sd, rank, seed, layers=("to_k", "to_v")):
    """A LoRA with numbers of its own in some layers."""
    tensors, generator = {}, torch.Generator().manual_seed(seed)
    for name, layer in sd.unet.named_modules():
        if name.endswith(layers):
            tensors[f"unet.{name}.lora.down"] = 0.3 * torch.randn(rank, layer.in_features, generator=generator)
            tensors[f"unet.{name}.lora.up"] = 0.3 * torch.randn(layer.out_features, rank, generator=generator)
    return Concept("lora", tensors, "random", {"token": "sks", "noun": f"cat {seed}", "rank": rank}, {})


def test_loras_add_up(sd, tmp_path):
    """W_0 + B_1 A_1 + B_2 A_2, also where only one has a layer; applied together, or mixed into one file."""
    first, second = low_rank(sd, 2, 1), low_rank(sd, 3, 2, ("to_q", "to_v"))
    weights, before = {f"unet.{name}": p.detach().clone() for name, p in sd.unet.named_parameters()}, snapshot(sd)
    for one in (first, second):
        for name in one.tensors:
            if name.endswith(".down"):
                layer = name.removesuffix(".lora.down")
                weights[f"{layer}.weight"] += one.tensors[f"{layer}.lora.up"] @ one.tensors[name]
    with applied(sd, Concept("dreambooth", weights, "random", {}, {})):
        expected = draw(sd)
    save_concept(tmp_path / "a.safetensors", mix_loras([first, second]))
    mixed = load_concept(tmp_path / "a.safetensors")
    assert mixed.about["rank"] == 5 and mixed.about["nouns"] == ["cat 1", "cat 2"] and mixed.about["merged"] == 2
    for chosen in ([first, second], [mixed], [second, first]):
        with applied(sd, *chosen):
            close(draw(sd), expected, rtol=0, atol=1e-4)
        assert_untouched(sd, before)
    with applied(sd, first):
        assert (draw(sd) - expected).abs().max() > 0.01


def test_a_word_that_looks_like_a_row_of_another_is_refused(sd, concepts):
    """Prompts write a word of two rows as "<v> <v>_1", here and in diffusers, so the two could not be distinguished."""
    tensors = {"tokens": torch.zeros(2, 32)}
    one = Concept("textual_inversion", tensors, "random", {"tokens": ["<v>", "<v>_1"], "rows": ["<v>", "<v>_1"]}, {})
    with pytest.raises(ValueError, match=r"^concepts: expected tokens that .* <v>_1 is also the name of a row of <v>"):
        concept.check_tokens([one])
    concept.check_tokens([replace(one, about={"token": "<v>", "rows": ["<v>", "<v>_1"]})])  # one word of two rows


def test_what_does_not_fit_together_is_refused(sd, concepts):
    before = snapshot(sd)
    first, second = concepts
    wrong_width = Concept("textual_inversion", {"tokens": torch.zeros(1, 7)}, "custom", {"rows": ["<w>"]}, {})
    existing = Concept("textual_inversion", {"tokens": torch.zeros(1, 32)}, "custom", {"rows": ["<|endoftext|>"]}, {})
    foreign = Concept("dreambooth", {**first.tensors, "unet.mine": torch.zeros(3)}, "custom", first.about, {})
    name = next(name for name in first.tensors if name != "tokens")
    other_shape = Concept("dreambooth", {name: torch.zeros(2, 2)}, "custom", first.about, {})
    for chosen, message in [
        ([first, second], r"^concepts: .* but 8 are changed twice, such as unet\..*; merge the concepts first$"),
        (
            [only_tokens(first), only_tokens(first)],
            r"^concepts: expected a token of its own for each, got '<cat>' twice$",
        ),
        (
            [replace(first, method="dreambooth", tensors={name: first.tensors[name]}), first],
            r"^concepts: .* such as unet\..*; only custom_diffusion and lora can be joined, so use one$",
        ),
        ([wrong_width], r"^concepts: expected rows of 32 numbers, got \[7\]$"),
        (
            [existing],
            r"^words: expected a token that is new, but the tokenizer knows '<\|endoftext\|>'; choose ",
        ),
        ([foreign], r"^concept: expected tensors of this model, got 1 others, such as unet\.mine$"),
        ([other_shape], rf"^concept: expected tensors of this model, got 1 others, such as {name}$"),
    ]:
        with pytest.raises(ValueError, match=message), applied(sd, *chosen):
            pytest.fail("the block was entered")
        assert_untouched(sd, before)


def test_a_concept_inside_another_is_refused_with_the_way_out(sd, concepts):
    message = r"applied to this model already, give all of them to one call$"
    with applied(sd, concepts[0]), pytest.raises(ValueError, match=message), applied(sd, concepts[1]):
        pytest.fail("the block was entered")


def test_a_concept_of_another_model_is_refused(sd, concepts):
    other = build(1)
    message = r"^concept: expected one that was trained on this model, 'random', got one of 'random' with other weights"
    with pytest.raises(ValueError, match=message), applied(other, concepts[0]):
        pytest.fail("the block was entered")
    with pytest.raises(ValueError, match=message):
        merge_concepts(other, concepts, CAPTIONS)
    rounded = build().to(dtype=torch.bfloat16)
    with applied(rounded, concepts[0]):  # the same model in half precision is no other model
        assert rounded.unet.dtype == torch.bfloat16 and "<cat>" in rounded.tokenizer.get_vocab()
    concepts[0].fingerprint, kept = None, concepts[0].fingerprint
    try:
        with applied(other, concepts[0]):
            assert "<cat>" in other.tokenizer.get_vocab()
    finally:
        concepts[0].fingerprint = kept


# ---- on disk ----


@pytest.mark.parametrize("method", RECIPES)
def test_a_file_holds_everything(sd, tmp_path, method):
    learnt = trained(sd, RECIPES[method](sd))
    save_concept(tmp_path / "new" / "a.safetensors", learnt)
    read = load_concept(str(tmp_path / "new" / "a.safetensors"))
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.safetensors"]
    for name in ("method", "base", "about", "settings", "bytes"):
        assert getattr(read, name) == getattr(learnt, name)
    assert read.settings["steps"] == 3 and read.about["token"] == "<v>" and read.base == "random"
    assert read.tensors.keys() == learnt.tensors.keys()
    for name, value in learnt.tensors.items():
        close(read.tensors[name], value, **exact)
    close(read.fingerprint, learnt.fingerprint, **exact)


def test_half_precision_halves_the_file(sd, concepts, tmp_path):
    save_concept(tmp_path / "a.safetensors", concepts[0])
    save_concept(tmp_path / "b.safetensors", concepts[0], dtype=torch.float16)
    whole, half = (load_concept(tmp_path / f"{name}.safetensors") for name in "ab")
    assert half.bytes * 2 == whole.bytes == concepts[0].bytes
    assert {value.dtype for value in half.tensors.values()} == {torch.float16}
    close(half.fingerprint, whole.fingerprint, **exact)
    drawn = []
    for learnt in (whole, half):
        with applied(sd, learnt):
            drawn.append(draw(sd, "a <cat> cat"))
    close(drawn[0], drawn[1], rtol=0, atol=0.02)


@pytest.mark.parametrize("there_before", [True, False])
def test_a_full_disk_loses_nothing(sd, concepts, tmp_path, monkeypatch, there_before):
    path = tmp_path / "a.safetensors"
    if there_before:
        save_concept(path, concepts[0])

    def full(tensors, filename, metadata):
        filename.write_bytes(b"half a file")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(concept, "save_file", full)
    with pytest.raises(OSError, match=r"^path: .*a\.safetensors cannot be written .*No space left .* make room and"):
        save_concept(path, concepts[1])
    assert [one.name for one in tmp_path.iterdir()] == ["a.safetensors"] * there_before
    if there_before:
        assert load_concept(path).about["token"] == "<cat>"
    monkeypatch.undo()
    save_concept(path, concepts[1])
    assert load_concept(path).about["token"] == "<tiger>"


def test_files_of_others_and_damaged_ones_are_refused(concepts, tmp_path):
    save_concept(tmp_path / "a.safetensors", concepts[0])
    whole = (tmp_path / "a.safetensors").read_bytes()
    damaged = {"cut": whole[:-100], "empty": b"", "text": b"no concept", "header": b"\xff" * 40 + whole[40:]}
    for name, content in damaged.items():
        (tmp_path / name).write_bytes(content)
    for name in (*damaged, "missing"):
        with pytest.raises(ValueError, match=rf"^path: expected a concept file, but .*{name} cannot be read \("):
            load_concept(tmp_path / name)
    save_file({"<v>": torch.zeros(1, 32)}, tmp_path / "foreign")
    save_file({"<v>": torch.zeros(1, 32)}, tmp_path / "noted", metadata={"format": "pt"})
    for name in ("foreign", "noted"):
        with pytest.raises(ValueError, match=rf"^path: expected a file that save_concept wrote, but .*{name} is none;"):
            load_concept(tmp_path / name)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_neither_read_nor_written(concepts, tmp_path, number):
    broken = replace(concepts[0], tensors={name: value.clone() for name, value in concepts[0].tensors.items()})
    broken.tensors["tokens"][0, 3] = number
    with pytest.raises(ValueError, match=r"^path: expected finite numbers, but 1 tensors of .*a\.safetensors hold NaN"):
        save_concept(tmp_path / "a.safetensors", broken)
    large = replace(concepts[0], tensors={"tokens": torch.full((1, 32), 1e6)})
    with pytest.raises(ValueError, match=r"^path: expected finite numbers"):
        save_concept(tmp_path / "a.safetensors", large, torch.float16)
    assert list(tmp_path.iterdir()) == []
    note = {"format": concept.FORMAT, "method": "lora", "base": "x", "about": "{}", "settings": "{}"}
    save_file(broken.tensors, tmp_path / "a.safetensors", metadata=note)
    with pytest.raises(ValueError, match=r"^path: expected finite numbers, .*, such as tokens; train it anew"):
        load_concept(tmp_path / "a.safetensors")


@pytest.mark.parametrize("changed", [{"about": "{"}, {"settings": None}, {"method": None}])
def test_damaged_notes_are_one_sentence(tmp_path, changed):
    note = {"format": concept.FORMAT, "method": "lora", "base": "x", "about": "{}", "settings": "{}"} | changed
    save_file({"a": torch.zeros(1)}, tmp_path / "a", metadata={key: value for key, value in note.items() if value})
    with pytest.raises(ValueError, match=r"^path: expected a concept file, but the notes in .*a are damaged \("):
        load_concept(tmp_path / "a")


# ---- the closed form ----


def problem(D=12, out=6, words=(3, 2), captions=60, seed=0):
    """Fine-tuned weights, the base's, features of words and of captions, all drawn at random."""
    generator = torch.Generator().manual_seed(seed)
    random = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    base = random(out, D)
    return [base + random(out, D) for _ in words], base, [random(n, D) for n in words], random(captions, D)


def residual(W, weights, targets):
    """The largest entry of W C^T - V."""
    return max(((W - own) @ C.T).abs().max().item() for own, C in zip(weights, targets, strict=True))


def by_multipliers(weights, base, targets, C_reg):
    """The same W from the optimality conditions: 2 A W^T + C^T L = 2 A W_0^T and C W^T = V^T, in one linear system."""
    C, A = torch.cat(targets), C_reg.T @ C_reg
    V = torch.cat([own @ target.T for own, target in zip(weights, targets, strict=True)], dim=1)
    n, D = C.shape
    system = torch.cat([torch.cat([2 * A, C.T], dim=1), torch.cat([C, C.new_zeros(n, n)], dim=1)])
    return torch.linalg.solve(system, torch.cat([2 * A @ base.T, V.T]))[:D].T


@pytest.mark.parametrize("seed", range(5))
def test_merged_weights_meet_the_constraint_and_are_the_optimum(seed):
    weights, base, targets, C_reg = problem(seed=seed)
    W = merge_weights(weights, base, targets, C_reg)
    assert W.dtype == torch.float64 and residual(W, weights, targets) < 1e-8
    # the ridge is the same as a few more captions, small and in all directions
    small = (merge.RIDGE * C_reg.square().sum(0).mean()).sqrt() * torch.eye(C_reg.shape[1], dtype=C_reg.dtype)
    close(W, by_multipliers(weights, base, targets, torch.cat([C_reg, small])), rtol=1e-8, atol=1e-8)
    exact_one = merge_weights(weights, base, targets, C_reg, ridge=1e-14)
    close(exact_one, by_multipliers(weights, base, targets, C_reg), rtol=1e-8, atol=1e-8)
    average = sum(weights) / len(weights)
    assert residual(average, weights, targets) > 0.1


def test_no_other_weights_that_meet_the_constraint_change_less():
    weights, base, targets, C_reg = problem()
    W = merge_weights(weights, base, targets, C_reg)
    change = lambda W: ((W - base) @ C_reg.T).norm()  # noqa: E731
    C = torch.cat(targets)
    free = torch.eye(12, dtype=C.dtype) - torch.linalg.pinv(C) @ C  # C moves nothing in these directions
    for k in range(20):
        other = W + 0.1 * torch.randn(W.shape, generator=torch.Generator().manual_seed(k)).double() @ free
        assert residual(other, weights, targets) < 1e-8 and change(other) > change(W)


def test_limits_of_the_closed_form():
    weights, base, targets, C_reg = problem()
    C = torch.cat(targets)
    W = merge_weights(weights, base, targets, C_reg)
    # one concept alone: its words as it has them; with words in every direction it is all of its weights
    alone = merge_weights(weights[:1], base, targets[:1], C_reg)
    assert residual(alone, weights[:1], targets[:1]) < 1e-8 and not torch.allclose(alone, weights[0], atol=0.1)
    everything = torch.randn(12, 12, generator=torch.Generator().manual_seed(1)).double()
    close(merge_weights(weights[:1], base, [everything], C_reg), weights[0], rtol=0, atol=1e-7)
    # nothing was learnt: nothing changes
    close(merge_weights([base, base], base, targets, C_reg), base, rtol=0, atol=1e-10)
    # captions count by their directions, not by their length or how often they occur
    close(merge_weights(weights, base, targets, torch.cat([100 * C_reg] * 2)), W, rtol=0, atol=1e-7)
    # captions in all directions alike: the smallest change
    V = torch.cat([own @ target.T for own, target in zip(weights, targets, strict=True)], dim=1)
    smallest = base + torch.linalg.lstsq(C, (V - base @ C.T).T).solution.T
    close(merge_weights(weights, base, targets, torch.eye(12)), smallest, rtol=0, atol=1e-8)
    with pytest.raises(ValueError, match=r"^targets: expected one for each of 2 weights, got 1$"):
        merge_weights(weights, base, targets[:1], C_reg)


@pytest.mark.parametrize("captions", [1, 4, 8])
def test_few_captions_leave_it_finite_and_exact(captions):
    """C_reg^T C_reg is singular: fewer captions than dimensions, and the last ones nearly equal."""
    weights, base, targets, C_reg = problem(captions=captions)
    C_reg = torch.cat([C_reg, C_reg * (1 + 1e-9), C_reg[:1] + 1e-12])
    W = merge_weights([w.float() for w in weights], base.float(), [c.float() for c in targets], C_reg.float())
    assert W.isfinite().all() and residual(W, weights, targets) < 1e-4
    double = merge_weights(weights, base, targets, C_reg, ridge=1e-6)
    assert residual(double, weights, targets) < 1e-4  # measured: up to 2e-5
    if captions + sum(map(len, targets)) <= 12:  # room for the words beside the captions, which then do not change
        close(double @ C_reg.T, base @ C_reg.T, rtol=0, atol=1e-4)


# ---- fewer bytes ----


def test_all_singular_values_give_the_change_back():
    change = problem()[1]
    u, v = compress(change, keep=1)
    assert u.shape == (6, 6) and v.shape == (6, 12)
    close(u @ v, change, rtol=0, atol=1e-12)
    thin = change[:, :2] @ change[:2]
    close(torch.matmul(*compress(thin, keep=1)), thin, rtol=0, atol=1e-12)
    close(torch.matmul(*compress(torch.zeros(6, 12))), torch.zeros(6, 12), **exact)
    assert compress(change.float())[0].dtype == torch.float32


@pytest.mark.parametrize("keep", [0.01, 0.3, 0.6, 0.9])
def test_a_share_of_the_singular_values_is_kept_and_no_more(keep):
    for seed in range(5):
        change = problem(out=10, seed=seed)[1]
        u, v = compress(change, keep)
        S, r = torch.linalg.svdvals(change), u.shape[1]
        assert v.shape == (r, 12) and S[:r].sum() >= keep * S.sum() > S[: r - 1].sum()
        close(torch.linalg.svdvals(u @ v)[:r], S[:r])
        close((change - u @ v).norm(), S[r:].norm(), rtol=1e-9, atol=1e-9)  # no product of this rank is nearer


def test_a_given_share_means_a_known_rank():
    change = torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0]))
    assert [compress(change, keep)[0].shape[1] for keep in (0.3, 0.4, 0.41, 0.7, 0.9, 0.95, 1.0)] == [
        1, 1, 2, 2, 3, 4, 4]  # fmt: skip


@pytest.mark.parametrize("keep", [0, -0.1, 1.1, float("nan")])
def test_a_share_is_between_0_and_1(keep):
    with pytest.raises(ValueError, match=r"^keep: expected a share between 0 and 1, got "):
        compress(torch.eye(3), keep)


def test_a_compressed_concept_is_used_like_a_whole_one(sd, concepts, tmp_path):
    before = snapshot(sd)
    thin = [compressed(sd, one, keep=1) for one in concepts]
    save_concept(tmp_path / "a.safetensors", thin[0])
    with applied(sd, concepts[0]):
        whole = draw(sd, "a <cat> cat")
    with applied(sd, load_concept(tmp_path / "a.safetensors")):
        close(draw(sd, "a <cat> cat"), whole, rtol=0, atol=1e-4)
    assert_untouched(sd, before)
    for name, value in uncompressed(sd, thin[0]).tensors.items():
        close(value, concepts[0].tensors[name], rtol=0, atol=1e-5)
    one, other = merge_concepts(sd, concepts, CAPTIONS), merge_concepts(sd, thin, CAPTIONS)
    for name in one.tensors:
        close(other.tensors[name], one.tensors[name], rtol=1e-3, atol=1e-3)
    assert compressed(sd, concepts[0], keep=0.3).bytes < concepts[0].bytes / 2
    with pytest.raises(ValueError, match=r"^concept: expected one of custom-diffusion, .* got one of lora$"):
        compressed(sd, replace(concepts[0], method="lora"))


# ---- two concepts in one model ----


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_concepts_become_one(sd, concepts, tmp_path, order):
    before, chosen = snapshot(sd), [concepts[k] for k in order]
    merged = merge_concepts(sd, chosen, CAPTIONS)
    assert_untouched(sd, before)
    tokens = [("<cat>", "<tiger>")[k] for k in order]
    assert merged.about["tokens"] == merged.about["rows"] == tokens and merged.about["merged"] == 2
    assert merged.about["nouns"] == [("cat", "tiger")[k] for k in order]
    assert (merged.about["token"], merged.about["noun"]) == (tokens[0], merged.about["nouns"][0])
    assert merged.method == "custom_diffusion" and merged.tensors.keys() == concepts[0].tensors.keys()
    close(merged.tensors["tokens"], torch.cat([one.tensors["tokens"] for one in chosen]), **exact)
    save_concept(tmp_path / "a.safetensors", merged)
    with applied(sd, load_concept(tmp_path / "a.safetensors")):
        prompts = ["a <cat> cat", "a <tiger> tiger", "a <cat> cat of a <tiger> tiger"]
        images = [draw(sd, prompt) for prompt in prompts]
    assert all(image.isfinite().all() for image in images)
    assert all((one - two).abs().max() > 1e-3 for one in images for two in images if one is not two)


def test_the_merged_model_reads_each_concepts_words_as_it_did_alone(sd, concepts):
    merged = merge_concepts(sd, concepts, CAPTIONS)
    average = {name: sum(one.tensors[name] for one in concepts) / 2 for name in merged.tensors if name != "tokens"}
    worst = 0.0
    for one in concepts:
        token, noun = one.about["token"], one.about["noun"]
        with applied(sd, only_tokens(one)), torch.no_grad():
            for prompt in ("{}", "photo of a {}"):
                ids = sd.tokenizer(prompt.format(f"{token} {noun}")).input_ids
                features = sd.encode_prompt(prompt.format(f"{token} {noun}"))[0]
                c = features[ids.index(sd.tokenizer.convert_tokens_to_ids(token)) : len(ids)]
                assert len(c) == 3  # the token, its noun, the end
                for name, mean in average.items():
                    close(c @ merged.tensors[name].T, c @ one.tensors[name].T, rtol=0, atol=1e-4)
                    worst = max(worst, (c @ (mean - one.tensors[name]).T).abs().max().item())
    assert worst > 0.05  # what averaging the weights does to the same words


def test_merging_keeps_other_captions_better_than_the_concepts_do(sd, concepts):
    merged, base = merge_concepts(sd, concepts, CAPTIONS), dict(sd.unet.named_parameters())
    features = torch.cat([sd.encode_prompt(caption)[0, : len(sd.tokenizer(caption).input_ids)] for caption in CAPTIONS])

    def change(one):
        names = [name for name in one.tensors if name != "tokens"]
        return sum(((one.tensors[n] - base[n.removeprefix("unet.")]) @ features.T).square().sum() for n in names)

    assert change(merged) < min(change(one) for one in concepts)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_layer_that_one_concept_lacks_counts_as_the_base_there(sd, concepts, order):
    name = next(name for name in concepts[1].tensors if name != "tokens")
    base = sd.unet.get_parameter(name.removeprefix("unet.")).detach().clone()
    fewer = replace(concepts[1], tensors={key: value for key, value in concepts[1].tensors.items() if key != name})
    same = replace(concepts[1], tensors=concepts[1].tensors | {name: base})
    got, wanted = ([[concepts[0], one][k] for k in order] for one in (fewer, same))
    got, wanted = merge_concepts(sd, got, CAPTIONS), merge_concepts(sd, wanted, CAPTIONS)
    assert got.tensors.keys() == wanted.tensors.keys() == concepts[0].tensors.keys()
    for key, value in wanted.tensors.items():
        close(got.tensors[key], value, **exact)


def test_what_cannot_be_merged_is_refused(sd, concepts):
    other, before = trained(sd, RECIPES["textual inversion"](sd)), snapshot(sd)
    for chosen, message in [
        (concepts[:1], r"^concepts: expected two or more of custom_diffusion, got \['custom_diffusion'\]$"),
        ([concepts[0], other], r"^concepts: expected two or more of custom_diffusion, got .*'textual_inversion'\]$"),
        ([concepts[0], concepts[0]], r"^concepts: expected a token of its own for each, got '<cat>' twice$"),
        (
            [
                concepts[0],
                replace(concepts[1], tensors={k: v for k, v in concepts[1].tensors.items() if k != "tokens"}),
            ],
            r"^concepts: expected a word in each, but number 2 has none; it may be in a file beside it",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            merge_concepts(sd, chosen, CAPTIONS)
        assert_untouched(sd, before)
    with pytest.raises(ValueError, match=r"^captions: expected at least one sentence, got none$"):
        merge_concepts(sd, concepts, [])
