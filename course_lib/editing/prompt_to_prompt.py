"""Prompt-to-Prompt: draw another prompt with the attention of the first, so that the layout of its picture stays.

Derived in: notebooks/09_prompt_to_prompt.ipynb.

Source and target are drawn side by side from one noise. In the first steps the target's attention is the source's:
where each word acts (cross-attention), and which places belong together (self-attention). The target's words then put
other things into that layout.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import SequenceMatcher

import torch
import torch.nn.functional as F
from torch import Tensor

from course_lib.diffusion import guidance
from course_lib.editing.attention import attention_hook
from course_lib.editing.inversion import Inverted, ddim_step
from course_lib.latent import text
from course_lib.latent.stable_diffusion import StableDiffusion

BLEND_FROM = 0.2  # a blend begins after this share of the steps; earlier maps are too noisy


@dataclass(frozen=True)
class Edit:
    """How much of the source's attention the target takes.

    cross, own: shares of the steps, from the first on, with the source's cross- and self-attention; in [0, 1].
    weights: {word of the target: factor on its attention}, in all steps.
    blend: a word of the source and one of the target; what neither of them attends to stays as in the source.
    side, threshold: of the blend: the layers whose maps are taken, and the share of a map's maximum that counts.
    """

    cross: float = 0.8
    own: float = 0.4
    weights: Mapping[str, float] = field(default_factory=dict)
    blend: tuple[str, str] | None = None
    side: int = 16
    threshold: float = 0.3

    def __post_init__(self):
        for name in ("cross", "own", "threshold"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: expected a share in [0, 1], got {getattr(self, name)}")


def alignment(tokenizer, source: str, target: str) -> tuple[Tensor, Tensor]:
    """Which tokens of the source each token of the target takes its attention from: M (L, L) and known (L,).

    The target's attention becomes P_source M in the columns that are known; the others keep their own. Words are
    aligned in their order. A word that stays takes its own attention. Where words are exchanged for as many others,
    each takes that of the one in whose place it stands, shared equally by its tokens. Words that are added, or
    exchanged for another number of words, have nothing to take. Start, end and padding take those of the source.
    Source: Hertz et al. 2022, section 3.2, "Word Swap" and "Adding a New Phrase".
    Derived in: notebooks/09_prompt_to_prompt.ipynb, section "Which token is which".
    """
    L = tokenizer.model_max_length
    before, after = text.words(tokenizer, source), text.words(tokenizer, target)
    M, known = torch.zeros(L, L), torch.ones(L, dtype=torch.bool)
    ends = [words[-1][1][-1] + 1 if words else 1 for words in (before, after)]  # of the end token
    M[0, 0] = 1
    for position in range(ends[1], L):
        M[min(position - ends[1] + ends[0], L - 1), position] = 1
    names = [[word for word, _ in words] for words in (before, after)]
    for _, a, b, c, d in SequenceMatcher(None, *names, autojunk=False).get_opcodes():
        if b - a == d - c:
            for (_, old), (_, new) in zip(before[a:b], after[c:d], strict=True):
                M[[[k] for k in old], new] = 1 / len(new) if len(old) != len(new) else torch.eye(len(new))
        else:
            known[[position for _, new in after[c:d] for position in new]] = False
    return M, known


def places(tokenizer, prompt: str, word: str) -> list[int]:
    """The token positions of a word, at each place where it stands.  Raises ValueError if it is not in the prompt."""
    words = text.words(tokenizer, prompt)
    found = [position for name, positions in words if name == word for position in positions]
    if not found:
        raise ValueError(f"word: expected one of {', '.join(dict.fromkeys(name for name, _ in words))}, as in "
                         f"{prompt!r}, got {word!r}")  # fmt: skip
    return found


class SharedAttention:
    """A function for `attention_hook` on a batch that ends in [source, target]: the target's attention is replaced.

    With guidance the unconditional sides come first and stay as they are, as in the authors' code.
    progress: the share of the steps that are done; the sampling loop sets it.
    """

    def __init__(self, sd: StableDiffusion, source: str, target: str, edit: Edit, count: int = 1):
        self.edit, self.count, self.progress = edit, count, 0.0
        M, known = alignment(sd.tokenizer, source, target)
        self.M, self.known = M.to(sd.device), known.to(sd.device)
        self.factors = torch.ones(len(M), device=sd.device)
        for word, factor in edit.weights.items():
            self.factors[places(sd.tokenizer, target, word)] = factor
        self.blend = [places(sd.tokenizer, prompt, word) for prompt, word in zip((source, target), edit.blend or ())]
        self.seen, self.maps = 0, 0

    def __call__(self, probs: Tensor, layer: str, is_cross: bool) -> Tensor:
        others, source, target = probs.split([len(probs) - 2 * self.count, self.count, self.count])
        if not is_cross:
            return torch.cat([others, source, source]) if self.progress < self.edit.own else probs
        if self.progress < self.edit.cross:
            target = torch.where(self.known, source @ self.M, target)
        target = target * self.factors
        if self.blend and probs.shape[-2] == self.edit.side**2:
            maps = [one[..., at].sum(-1).mean(1) for one, at in zip((source, target), self.blend, strict=True)]
            self.maps, self.seen = self.maps + torch.stack(maps), self.seen + 1  # (2, B, side * side)
        return torch.cat([others, source, target])

    def mask(self, like: Tensor) -> Tensor:
        """Where the two words of the blend attend to, up to now: (B, 1, h, w) of zeros and ones."""
        if not self.seen:
            raise ValueError(f"side: expected the side of a layer with cross-attention, got {self.edit.side}")
        maps = (self.maps / self.seen).unflatten(-1, (self.edit.side,) * 2)
        maps = F.interpolate(F.max_pool2d(maps, 3, 1, 1), like.shape[-2:])  # (2, B, h, w)
        inside = maps > self.edit.threshold * maps.amax((-2, -1), keepdim=True)
        return inside.any(0)[:, None].to(like.dtype)


@torch.no_grad()
def edit(sd: StableDiffusion, source: str, target: str, start: Tensor | Inverted, change: Edit | None = None, *,
         w: float | None = None, steps: int | None = None, negative: str = "",
         pinned: bool = True) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Pictures of the source prompt and of the edited one, (B, 3, H, W) each.

    start: noise (B, C, h, w), from which the source is drawn; or an inverted picture, which brings its steps and the
    guidance that it was made for.  change: None is `Edit()`.  w: the guidance scale (default: that of the inversion, or
    the model's).  steps: default 25, or those of the inversion.  negative: a prompt to move away from; one that was
    inverted for guidance brings its own.
    pinned: keep the source of an inversion on its inverted path, so that its errors do not add up (Ju et al. 2023);
    False draws it again, as Mokady et al. 2023 do.
    With cross = own = 0 and no weights the target is drawn as by `sd.sample`; with equal prompts it is the source.
    Source: Hertz et al. 2022, Algorithm 1.  Differs from the authors' code: self-attention is taken over in all layers,
    not only in those of at most 16 x 16 places.
    Raises ValueError if a word of the edit is not in its prompt, or for steps or a negative prompt beside an inversion
    that has others.
    Derived in: notebooks/09_prompt_to_prompt.ipynb, section "The loop".
    """
    change, inverted = change or Edit(), start if isinstance(start, Inverted) else None
    zt = inverted.z_T if inverted else start.to(sd.device, sd.working_dtype)
    own = inverted is not None and inverted.w != 1  # features that were made for guidance
    w = (inverted.w if own else sd.defaults.guidance) if w is None else w
    steps, count = _steps_of(inverted, steps, negative), len(zt)
    shared = SharedAttention(sd, source, target, change, count)
    features = sd.encode_prompt([source] * count + [target] * count)
    against = inverted.against if own else [sd.encode_prompt(negative).expand(count, -1, -1)] * steps
    times, both = sd.schedule.times(steps), torch.cat([zt, zt])
    with attention_hook(sd.unet, shared):
        for i, (t, s) in enumerate(zip(times, [*times[1:], 0])):
            shared.progress = i / steps
            eps_hat = guidance.guided(sd.unet_eps, features, w, against[i].repeat(2, 1, 1))(both, t)
            both = ddim_step(both, eps_hat, t, s, sd.schedule)
            if inverted and pinned:
                both[:count] = inverted.path[-2 - i]
            if shared.blend and i >= BLEND_FROM * steps:
                kept, new = both.chunk(2)
                both = torch.cat([kept, kept + shared.mask(kept) * (new - kept)])
    images = torch.cat([sd.decode(part) for part in both.split(8)])
    return images[:count], images[count:]


def _steps_of(inverted: Inverted | None, steps: int | None, negative: str) -> int:
    """The sampler's steps; an inversion is only valid at its own."""
    if inverted is None:
        return 25 if steps is None else steps
    if steps not in (None, inverted.steps):
        raise ValueError(f"steps: expected {inverted.steps}, as in the inversion, or None, got {steps}")
    if negative and inverted.w != 1:
        raise ValueError(f"negative: expected none, since this inversion moves away from its own, got {negative!r}")
    return inverted.steps
