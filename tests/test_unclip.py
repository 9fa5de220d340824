"""unCLIP: what the decoder reads, the prior's loop on a network whose answer is known, mixing embeddings."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.functional import normalize

from course_lib.latent import unclip
from course_lib.latent.unclip import FOLDER, NOISE, ImageTokens, UnCLIP, load_unclip, slerp, text_difference

close = torch.testing.assert_close
D = 16


def vectors(count, seed=0):
    return normalize(torch.randn(count, D, generator=torch.Generator().manual_seed(seed)), dim=-1)


# ---- tokens of a picture ----


def test_an_embedding_becomes_tokens():
    tokens = ImageTokens(D, 8, count=3)
    tokens.mean.copy_(torch.arange(D))
    tokens.std.fill_(2.0)
    e = torch.randn(5, D)
    found = tokens(e)
    assert found.shape == (5, 3, 8)
    close(found.flatten(1), ((e - torch.arange(D)) / 2) @ tokens.linear.weight.T + tokens.linear.bias)


def test_no_picture_is_the_mean_embedding():
    """Dropped in training, and "no picture" in guidance, are the same input: zeros after scaling."""
    tokens = ImageTokens(D, 8)
    tokens.mean.copy_(torch.randn(D))
    e, drop = torch.randn(2, D), torch.tensor([True, False])
    found = tokens(e, drop)
    close(found[0], tokens(tokens.mean[None])[0])
    close(found[1], tokens(e)[1])


# ---- the prior ----


SCALE = torch.linspace(0.5, 2, D), torch.linspace(-1, 1, D)  # std and mean of the embeddings


class Known(nn.Module):
    """A prior whose scaled answer is the text's embedding; it keeps the times at which it is asked."""

    def __init__(self):
        super().__init__()
        self.asked = []

    def forward(self, et, timestep, proj_embedding, encoder_hidden_states):
        self.asked.append(int(timestep[0]))
        return SimpleNamespace(predicted_image_embedding=proj_embedding)

    def post_process_latents(self, e):
        return e * SCALE[0] + SCALE[1]


class Texts(UnCLIP):
    """An UnCLIP whose texts are vectors by hand."""

    def __init__(self):
        sd = SimpleNamespace(device=torch.device("cpu"), encode_prompt=lambda lines: torch.zeros(
            1 if isinstance(lines, str) else len(lines), 3, 4))  # fmt: skip
        super().__init__(sd, None, ImageTokens(D, 8), Known(), Known())

    def of_texts(self, prompts):
        lines = [prompts] if isinstance(prompts, str) else prompts
        return torch.cat([vectors(1, len(line)) for line in lines])


def test_the_prior_ends_at_what_its_network_names():
    """Guided: from what it says without a text to what it says with it, w times as far; then back to CLIP's scale."""
    one = Texts()
    text, none = one.of_texts("a cat"), one.of_texts("")
    for w in (1.0, 3.0):
        wanted = normalize((none + w * (text - none)) * SCALE[0] + SCALE[1], dim=-1)
        close(one.imagine(["a cat", "a cow"], w=w, steps=7), wanted.expand(2, -1), rtol=0, atol=2e-3)
    assert one.prior.asked[:7] == [t - 1 for t in NOISE.times(7)]  # at w = 1 once a time; diffusers counts from 0
    close(one.regress("a cat"), normalize(text * SCALE[0] + SCALE[1], dim=-1))


def test_the_candidate_nearest_to_the_text_is_taken(monkeypatch):
    one = Texts()
    found = vectors(6, 9)
    monkeypatch.setattr(unclip.samplers, "last", lambda steps: found)
    best = one.imagine(["aa", "bbbb"], candidates=3)
    found = normalize(found * SCALE[0] + SCALE[1], dim=-1)
    for k, line in enumerate(("aa", "bbbb")):
        group = found[3 * k : 3 * k + 3]
        close(best[k], group[(group @ one.of_texts(line)[0]).argmax()])
    with pytest.raises(ValueError, match="candidates: expected at least 1, got 0"):
        one.imagine("a cat", candidates=0)


# ---- mixing ----


def test_an_arc_has_its_ends_and_stays_on_the_sphere():
    a, b = vectors(3, 1), vectors(3, 2)
    close(slerp(a, b, 0.0), a)
    close(slerp(a, b, 1.0), b)
    middle = slerp(a, b, 0.5)
    close(middle.norm(dim=-1), torch.ones(3))
    close((middle * a).sum(-1), (middle * b).sum(-1))
    close(slerp(a, a, 0.3), a, rtol=0, atol=1e-3)
    with pytest.raises(ValueError, match=r"share: expected a number in \[0, 1\], got 1\.5"):
        slerp(a, b, 1.5)


def test_the_difference_of_texts_is_a_direction():
    one, e = Texts(), vectors(2, 3)
    close(text_difference(one, e, "a", "bb", 0.0), e)
    wanted = normalize(one.of_texts("bb") - one.of_texts("a"), dim=-1)
    close(text_difference(one, e, "a", "bb", 1.0), wanted.expand(2, -1))


# ---- the shipped one ----


@pytest.fixture(scope="module")
def shipped():
    return load_unclip("cpu", torch.float32)


def test_the_shipped_model_draws_and_refuses(shipped, tmp_path):
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    e = shipped.of_images(images)
    close(e.norm(dim=-1), torch.ones(2))
    drawn = shipped.draw(e, steps=2)
    assert drawn.shape == (2, 3, 64, 64) and drawn.isfinite().all()
    close(shipped.context(e)[:, :-4], shipped.sd.encode_prompt("").expand(2, -1, -1))
    with pytest.raises(ValueError, match=r"images: expected \(B, 3, 64, 64\), got \(2, 3, 32, 32\)"):
        shipped.of_images(images[..., :32, :32])
    with pytest.raises(ValueError, match=r"folder: expected .*; train it with training/toybox_unclip\.py decoder"):
        load_unclip("cpu", folder=tmp_path)


def test_a_picture_is_nearer_to_its_own_text(shipped):
    from course_lib.environment import from_uint8
    from course_lib.toybox import sets
    from course_lib.toybox.captions import describe

    held_out = sets.pairs(40, split="test")
    e, texts = shipped.of_images(from_uint8(held_out.images)), shipped.of_texts([describe(s) for s in held_out.specs])
    found = shipped.imagine([describe(s) for s in held_out.specs], steps=10)
    assert ((e @ texts.T).argmax(1) == torch.arange(40)).float().mean() > 0.8
    assert (found * e).sum(1).mean() > (found * e.roll(1, 0)).sum(1).mean() + 0.2
    assert FOLDER.is_dir()
