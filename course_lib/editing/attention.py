"""Read and change attention: every softmax of a UNet passes through a function of yours.

Derived in: notebooks/06_stable_diffusion.ipynb, section "Where each word's attention lies".

Fast attention does not store its probabilities. Inside `attention_hook` they are computed step by step instead, so
that they can be read or replaced; afterwards the network is as before.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from diffusers.models import attention_processor as ap
from torch import Tensor, nn

from course_lib.latent import text
from course_lib.latent.stable_diffusion import StableDiffusion

Hook = Callable[[Tensor, str, bool], Tensor]
PLAIN = (ap.AttnProcessor, ap.AttnProcessor2_0, ap.SlicedAttnProcessor, ap.XFormersAttnProcessor)  # equal results


@contextmanager
def attention_hook(unet: nn.Module, fn: Hook) -> Iterator[None]:
    """Inside the `with` block, each attention layer of a diffusers UNet uses fn(probs, layer, is_cross) as its weights.

    probs = softmax(Q K^T / sqrt(d)): (B, heads, Q, K) float32, rows summing to 1, Q = h * w latents of the layer, K = L
    tokens in cross-attention (is_cross), else Q.  layer: dotted name, "down_blocks.0.attentions.0....attn2".
    fn returns probs or another tensor of that shape.  Hooks may be nested: the outer function comes first.
    The old processors are restored, also after an error.  The whole (Q, K) table is stored: half a gigabyte for each
    picture in the largest layer of Stable Diffusion 1 at 512 pixels.
    Raises ValueError if there is no attention layer, if one is not plain attention, or if fn returns another shape.
    Derived in: notebooks/06_stable_diffusion.ipynb, section "Where each word's attention lies".
    """
    before = dict(getattr(unet, "attn_processors", {}))
    if not before:
        raise ValueError(f"unet: expected a network with attention layers of diffusers, {type(unet).__name__} has none")
    hooked = {}
    for key, processor in before.items():
        layer = key.removesuffix(".processor")
        if not isinstance(processor, (*PLAIN, _Hooked)) or _is_special(unet.get_submodule(layer)):
            raise ValueError(f"unet: expected plain attention, but {layer} has its own, {type(processor).__name__}")
        hooked[key] = _Hooked(layer, [*getattr(processor, "hooks", []), fn])
    try:
        unet.set_attn_processor(hooked)
        yield
    finally:
        unet.set_attn_processor(before)


class _Hooked:
    """An attention processor of diffusers that computes its softmax and passes it through functions."""

    def __init__(self, layer: str, hooks: list[Hook]):
        self.layer, self.hooks = layer, hooks

    def __call__(self, attn: ap.Attention, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None,
                 attention_mask: Tensor | None = None, temb: Tensor | None = None) -> Tensor:  # fmt: skip
        is_cross, shape, x = encoder_hidden_states is not None, hidden_states.shape, hidden_states
        if x.ndim == 4:
            x = x.flatten(2).transpose(1, 2)  # (B, Q, D)
        if attn.group_norm is not None:
            x = attn.group_norm(x.transpose(1, 2)).transpose(1, 2)
        context = encoder_hidden_states if is_cross else x

        def heads(y: Tensor) -> Tensor:
            return y.unflatten(-1, (attn.heads, -1)).transpose(1, 2)  # (B, heads, Q or K, d)

        scores = attn.scale * heads(attn.to_q(x)) @ heads(attn.to_k(context)).transpose(-1, -2)  # (B, heads, Q, K)
        mask = attn.prepare_attention_mask(attention_mask, context.shape[1], len(x))
        if mask is not None:
            scores = scores + mask.unflatten(0, (len(x), attn.heads))
        probs = scores.softmax(dim=-1, dtype=torch.float32)
        for fn in self.hooks:
            changed = fn(probs, self.layer, is_cross)
            if getattr(changed, "shape", None) != probs.shape:
                came = tuple(changed.shape) if torch.is_tensor(changed) else type(changed).__name__
                raise ValueError(f"fn: expected probabilities {tuple(probs.shape)} back, got {came} in {self.layer}")
            probs = changed
        y = probs.to(scores.dtype) @ heads(attn.to_v(context))
        y = attn.to_out[1](attn.to_out[0](y.transpose(1, 2).flatten(2)))  # (B, Q, D)
        if len(shape) == 4:
            y = y.transpose(1, 2).reshape(shape)
        return (y + hidden_states if attn.residual_connection else y) / attn.rescale_output_factor


def _is_special(attn: ap.Attention) -> bool:
    """Whether a layer has options that _Hooked does not support; in Stable Diffusion 1 none has."""
    more = (attn.spatial_norm, attn.norm_cross, attn.norm_q, attn.norm_k, attn.added_kv_proj_dim)
    return any(part is not None for part in more)


class AttentionMaps:
    """A function for `attention_hook` that only reads: the mean of the cross-attention at one resolution.

    side: of the layers' latents, (side, side); layers of another size are ignored.
    Derived in: notebooks/06_stable_diffusion.ipynb, section "Where each word's attention lies".
    """

    def __init__(self, side: int = 16):
        self.side, self.total, self.count = side, 0, 0

    def __call__(self, probs: Tensor, layer: str, is_cross: bool) -> Tensor:
        if is_cross and probs.shape[-2] == self.side**2:
            self.total = self.total + probs.detach().mean(dim=1)  # over heads: (B, Q, L)
            self.count += 1
        return probs

    def mean(self) -> Tensor:
        """(B, L, side, side): the attention of each latent to each token; it sums to 1 over the tokens.

        Raises ValueError if no layer of this size was seen.
        """
        if not self.count:
            raise ValueError(f"side: expected the side of a layer with cross-attention, got {self.side}")
        return (self.total / self.count).transpose(1, 2).unflatten(-1, (self.side, self.side))


def by_word(maps: Tensor, words: Sequence[tuple[str, list[int]]]) -> dict[str, Tensor]:
    """The map of each word, the sum of those of its tokens: (..., L, h, w) to {word: (..., h, w)}.

    words: as `text.words` returns them.  A word that comes again has an entry of its own: "a", then "a (2)".
    Derived in: notebooks/05_latent_diffusion.ipynb, section "Cross-attention by hand".
    """
    found, count = {}, Counter()
    for word, positions in words:
        count[word] += 1
        name = word if count[word] == 1 else f"{word} ({count[word]})"
        found[name] = maps[..., positions, :, :].sum(dim=-3)
    return found


def relative_maps(maps: dict[str, Tensor]) -> dict[str, Tensor]:
    """Each word's map over its own mean, divided by the mean of these over all words.

    Above 1 a latent attends more to this word than to words in general. The outline that all words share cancels, and
    so does the weight of a word: "a" and "of" get many times the attention of "hat".
    maps: {word: (..., h, w)} of all words of one prompt, as `by_word` and `word_maps` return.
    Derived in: notebooks/05_latent_diffusion.ipynb, section "Cross-attention by hand".
    """
    scaled = {word: of_word / of_word.mean(dim=(-2, -1), keepdim=True) for word, of_word in maps.items()}
    mean = torch.stack(list(scaled.values())).mean(dim=0)
    return {word: of_word / mean for word, of_word in scaled.items()}


def word_maps(sd: StableDiffusion, prompt: str, x_T: Tensor | None = None, *, side: int = 16, w: float = 7.5,
              steps: int = 25, seed: int = 0) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """Draw a prompt and map the attention to each of its words, averaged over steps, heads and layers of one size.

    x_T: (B, C, h, w), the pictures' starting noise; None is one picture from `seed`.  The other arguments are those of
    `sd.sample`.  Returns the pictures (B, 3, H, W) and {word: (B, side, side)}, the share of attention there, see
    `by_word`.  The maps of the negative prompt are left out.
    Raises ValueError if the UNet has no cross-attention at `side`, or at w = 0, where the prompt is not read.
    Derived in: notebooks/06_stable_diffusion.ipynb, section "Where each word's attention lies".
    """
    if w == 0:
        raise ValueError("w: expected a guidance scale other than 0, at which the prompt is not read")
    x_T = sd.noise(1, seed=seed) if x_T is None else x_T
    seen = AttentionMaps(side)
    with attention_hook(sd.unet, seen):
        images = sd.sample(prompt, x_T=x_T, w=w, steps=steps, seed=seed, batch=len(x_T))
    maps = seen.mean()[-len(x_T) :]  # in a guided pair the prompt's half is the second
    return images, by_word(maps, text.words(sd.tokenizer, prompt))
