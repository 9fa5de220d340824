"""Prompts to features, words to positions, and new tokens that leave everything else as it was."""

import runpy
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers.loaders import TextualInversionLoaderMixin
from transformers import CLIPTextConfig, CLIPTextModel

from course_lib.latent import text
from course_lib.latent.text import NewTokens

FULL_SIZE = runpy.run_path(str(Path(__file__).resolve().parents[1] / "benchmarks" / "sd15_random.py"))
close = torch.testing.assert_close
exact = dict(rtol=0, atol=0)


@pytest.fixture
def tokenizer():
    return FULL_SIZE["tokenizer"](16)


@pytest.fixture
def encoder(tokenizer):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = CLIPTextModel(CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=16, bos_token_id=0, eos_token_id=2,
        ))  # fmt: skip
    return net.eval().requires_grad_(False)


@pytest.fixture
def sd(encoder, tokenizer):
    return SimpleNamespace(text_encoder=encoder, tokenizer=tokenizer)


def features(encoder, tokenizer, *prompts):
    return text.encode(encoder, text.tokenize(tokenizer, list(prompts)))


def test_tokens_are_padded_to_the_encoders_length(tokenizer):
    ids = text.tokenize(tokenizer, ["a cat", ""])
    assert ids.shape == (2, 16) and ids[0, 0] == tokenizer.bos_token_id
    a, cat = tokenizer.convert_tokens_to_ids(["a</w>", "cat</w>"])
    assert ids[0, 1:4].tolist() == [a, cat, tokenizer.eos_token_id]
    assert (ids[0, 4:] == tokenizer.pad_token_id).all() and ids[1, 1] == tokenizer.eos_token_id
    close(text.tokenize(tokenizer, "a cat"), ids[:1], **exact)


def test_a_long_prompt_is_cut_with_a_warning(tokenizer):
    just = " ".join(["cat"] * 14)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        whole = text.tokenize(tokenizer, just)
    with pytest.warns(UserWarning, match=r"^prompt: more than 14 tokens, left out: 'tiger of'$"):
        cut = text.tokenize(tokenizer, just + " tiger of")
    close(cut, whole, **exact)
    assert cut[0, -1] == tokenizer.eos_token_id


@pytest.mark.parametrize("prompts", [[], [1], ["a", None]])
def test_what_is_no_prompt_is_refused(tokenizer, prompts):
    with pytest.raises(ValueError, match=r"^prompts: expected a string or a list of strings, got \["):
        text.tokenize(tokenizer, prompts)


def test_features_are_the_last_layer_after_its_norm(encoder, tokenizer):
    ids = text.tokenize(tokenizer, ["a cat", "tiger"])
    hidden = encoder(ids, output_hidden_states=True)
    close(text.encode(encoder, ids), hidden.last_hidden_state, **exact)
    assert text.encode(encoder, ids).shape == (2, 16, 32)
    mean = ((text.encode(encoder, ids) - encoder.final_layer_norm.bias) / encoder.final_layer_norm.weight).mean(-1)
    close(mean, torch.zeros(2, 16), rtol=0, atol=1e-5)


def test_words_know_their_positions(sd):
    found = text.words(sd.tokenizer, "A photo of a cat, wee tiger")
    assert found[:4] == [("a", [1]), ("photo", [2, 3]), ("of", [4]), ("a", [5])]
    assert found[4:] == [("cat", [6]), (",", [7]), ("wee", [8, 9, 10]), ("tiger", [11])]
    assert text.words(sd.tokenizer, "") == []
    assert text.words(sd.tokenizer, "é") == [("é", [1, 2])]  # two bytes
    assert text.words(sd.tokenizer, " ".join(["cat"] * 20)) == [("cat", [i]) for i in range(1, 15)]
    with NewTokens.attach(sd, {"<v>": "cat"}):
        assert text.words(sd.tokenizer, "a <v> tiger") == [("a", [1]), ("<v>", [2]), ("tiger", [3])]


def test_a_new_token_starts_as_the_word_it_came_from(sd):
    plain = features(sd.text_encoder, sd.tokenizer, "a cat of", "a tiger")
    with NewTokens.attach(sd, {"<v>": "cat", "<two-words>": "photo"}) as new:
        close(features(sd.text_encoder, sd.tokenizer, "a <v> of", "a tiger"), plain, **exact)
        table = new.table.weight
        photo = sd.tokenizer("photo", add_special_tokens=False).input_ids
        assert len(photo) == 2
        close(new.rows[1], table[photo].mean(0), **exact)
        assert new.rows.shape == (2, 32) and new.rows.dtype == torch.float32 and new.tokens == ["<v>", "<two-words>"]
        ids = text.tokenize(sd.tokenizer, "<v>of <two-words>'s <V>")[0].tolist()
        of, apostrophe, s = sd.tokenizer.convert_tokens_to_ids(["of</w>", "'", "s</w>"])
        size = table.shape[0]
        assert ids[1:7] == [size, of, size + 1, apostrophe, s, size]


def test_a_word_of_several_vectors_is_written_out(sd):
    rows = ["<v>", "<v>_1", "<v>_2", "<w>"]
    assert text.expand(sd.tokenizer, "a <v>") == "a <v>"  # not a new word yet
    with NewTokens.attach(sd, dict.fromkeys(rows, "cat")) as new:
        assert text.expand(sd.tokenizer, "a <v> of") == "a <v> <v>_1 <v>_2 of"
        theirs = TextualInversionLoaderMixin().maybe_convert_prompt("a <v> of", sd.tokenizer)
        assert text.expand(sd.tokenizer, "a <v> of") == theirs
        assert text.expand(sd.tokenizer, "<v>, <w> <v>") == "<v> <v>_1 <v>_2, <w> <v> <v>_1 <v>_2"
        assert text.expand(sd.tokenizer, "a <V> of") == "a <v> <v>_1 <v>_2 of"  # to the sd.tokenizer the same word
        close(text.tokenize(sd.tokenizer, "a <V>, <v>"), text.tokenize(sd.tokenizer, "a <v>, <v>"), **exact)
        for same in ("a cat", "", "<w>", "<u> <", "the row <v>_1", "x<y>_z", "<U>"):
            assert text.expand(sd.tokenizer, same) == same
        size = new.table.num_embeddings
        both = text.tokenize(sd.tokenizer, ["<v> cat", "<v>_2 cat"])
        cat, end = sd.tokenizer.convert_tokens_to_ids("cat</w>"), sd.tokenizer.eos_token_id
        assert both[0, 1:6].tolist() == [size, size + 1, size + 2, cat, end]
        assert both[1, 1:4].tolist() == [size + 2, cat, end]
        found = text.words(sd.tokenizer, "a <v> cat")  # where the UNet sees each
        assert found == [("a", [1]), ("<v>", [2]), ("<v>_1", [3]), ("<v>_2", [4]), ("cat", [5])]
        with pytest.warns(UserWarning, match=r"^prompt: more than 14 tokens, left out: 'tiger'$"):
            text.tokenize(sd.tokenizer, "cat " * 11 + "<v> tiger")  # counted as written out
    assert text.expand(sd.tokenizer, "a <v>") == "a <v>"


def test_only_the_new_rows_move(sd):
    before = {name: value.clone() for name, value in sd.text_encoder.state_dict().items()}
    prompts = ["a photo of a tiger", "cat"]
    plain = features(sd.text_encoder, sd.tokenizer, *prompts)
    with NewTokens.attach(sd, {"<v>": "cat", "<w>": "tiger"}) as new:
        first = new.rows.detach().clone()
        assert [name for name, p in sd.text_encoder.named_parameters() if p.requires_grad] == [
            "embeddings.token_embedding.rows"
        ]
        optimizer = torch.optim.AdamW(sd.text_encoder.parameters(), lr=0.1, weight_decay=0.5)
        for _ in range(3):
            optimizer.zero_grad()
            features(sd.text_encoder, sd.tokenizer, "a <v> of", "a cat").square().mean().backward()
            assert new.rows.grad[0].abs().sum() > 0 and new.rows.grad[1].eq(0).all()
            optimizer.step()
        assert not torch.equal(new.rows[0], first[0])
        close(new.table.weight, before["embeddings.token_embedding.weight"], **exact)
        close(features(sd.text_encoder, sd.tokenizer, *prompts), plain, **exact)
        assert not torch.allclose(features(sd.text_encoder, sd.tokenizer, "<v>"), plain[1:], atol=1e-3)
    after = sd.text_encoder.state_dict()
    assert list(after) == list(before)
    for name, value in before.items():
        close(after[name], value, **exact)


def test_detaching_puts_everything_back(sd):
    table, size = sd.text_encoder.get_input_embeddings(), len(sd.tokenizer)
    prompts = ["a <v>, cat", "<v>"]
    ids = text.tokenize(sd.tokenizer, prompts)
    with pytest.raises(RuntimeError, match="halfway"), NewTokens.attach(sd, {"<v>": "cat"}) as new:
        assert sd.text_encoder.get_input_embeddings() is new and len(sd.tokenizer) == size + 1
        raise RuntimeError("halfway")
    assert sd.text_encoder.get_input_embeddings() is table and len(sd.tokenizer) == size
    assert "<v>" not in sd.tokenizer.get_vocab()
    close(text.tokenize(sd.tokenizer, prompts), ids, **exact)
    with NewTokens.attach(sd, {"<v>": "tiger"}) as again:
        assert again.rows.shape == (1, 32)


def test_rows_stay_float32_beside_a_half_table(sd):
    sd.text_encoder.to(torch.bfloat16)
    with NewTokens.attach(sd, {"<v>": "cat"}) as new:
        out = features(sd.text_encoder, sd.tokenizer, "a <v>")
        assert out.dtype == torch.bfloat16 and new.rows.dtype == torch.float32
        out.float().square().mean().backward()
        assert new.rows.grad.dtype == torch.float32 and new.rows.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ({}, r"expected new tokens with a word each"),
        ({"sks": "cat"}, r"expected a new token in lower case and brackets, such as <v>, got 'sks'"),
        ({"cat": "cat"}, r"expected a new token in lower case and brackets"),
        ({"<New1>": "cat"}, r"expected a new token in lower case and brackets"),
        ({"<a b>": "cat"}, r"expected a new token in lower case and brackets"),
        ({"<|endoftext|>": "cat"}, r"expected a token that is new, but the tokenizer knows '<\|endoftext\|>'"),
        ({"<v>": ""}, r"expected a known word for '<v>' to start from, got ''"),
    ],
)
def test_words_that_cannot_be_added_are_refused(sd, words, expected):
    table, size = sd.text_encoder.get_input_embeddings(), len(sd.tokenizer)
    with pytest.raises(ValueError, match=f"^words: {expected}"), NewTokens.attach(sd, words):
        pass
    assert sd.text_encoder.get_input_embeddings() is table and len(sd.tokenizer) == size


def test_an_encoder_takes_new_tokens_once_and_only_with_its_own_tokenizer(sd):
    with (
        NewTokens.attach(sd, {"<v>": "cat"}),
        pytest.raises(ValueError, match=r"^text_encoder: expected one without new tokens, got one with NewTokens"),
        NewTokens.attach(sd, {"<w>": "cat"}),
    ):
        pass
    sd.tokenizer.add_tokens("<stray>")
    with pytest.raises(ValueError, match=r"^tokenizer: expected the 524 words of the encoder, got 525"):
        with NewTokens.attach(sd, {"<v>": "cat"}):
            pass
