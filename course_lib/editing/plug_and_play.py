"""Plug-and-Play: draw a prompt with the features and the self-attention of an inverted picture.

Derived in: notebooks/10_plug_and_play.ipynb.

It needs no alignment of words, and leaves cross-attention as it is. It takes over the layout from the UNet's own
layers, so the target prompt may say anything.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from course_lib.diffusion import guidance
from course_lib.editing.attention import attention_hook
from course_lib.editing.inversion import Inverted, ddim_step
from course_lib.latent.stable_diffusion import StableDiffusion


@dataclass(frozen=True)
class Layers:
    """Where features and self-attention are taken over: residual blocks, and beginnings of attention layers' names."""

    features: tuple[str, ...]
    own: tuple[str, ...]


# sd15: as in the authors' code: the second block's last convolution, and self-attention from that block on.
# toybox: of four layers the one whose edits are obeyed most (measurements/editing.py --tune).
LAYERS = {
    "sd15": Layers(("up_blocks.1.resnets.1.conv2",),
                   ("up_blocks.1.attentions.1", "up_blocks.1.attentions.2", "up_blocks.2", "up_blocks.3")),
    "toybox": Layers(("up_blocks.0.resnets.1",), ("up_blocks",)),
}  # fmt: skip


@contextmanager
def features_shared(unet: nn.Module, layers: Sequence[str], active) -> Iterator[None]:
    """Inside, the outputs of these layers are those of the batch's first third, in all three, while active() is true.

    Raises ValueError if the network has no layer of that name.
    """
    known, handles = dict(unet.named_modules()), []

    def share(module: nn.Module, args, output: Tensor) -> Tensor:
        return torch.cat([output.chunk(3)[0]] * 3) if active() else output

    try:
        for name in layers:
            if name not in known:
                raise ValueError(f"layers: expected names of layers of this UNet, which has no {name!r}")
            handles.append(known[name].register_forward_hook(share))
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def plug_and_play(sd: StableDiffusion, inverted: Inverted, target: str, *, w: float | None = None,
                  features: float = 0.8, own: float = 0.5, layers: Layers | None = None,
                  negative: str = "") -> Tensor:  # fmt: skip
    """Pictures (B, 3, H, W) of the target prompt in the layout of the inverted ones.

    In each step the UNet sees the inverted latent with its own prompt, and the target's with and without its prompt. In
    the first steps both of the target's get the outputs of some residual blocks and the self-attention from the first.
    features, own: the shares of the steps in which these are taken over; in [0, 1]. With 0 and 0 the target is drawn
    from the inverted noise as it is.  layers: None are those of LAYERS.  w, negative: guidance of the target.
    Source: Tumanyan et al. 2023, section 4 and Algorithm 1.
    Raises ValueError for shares outside of [0, 1] and for unknown layers.
    Derived in: notebooks/10_plug_and_play.ipynb, section "The loop".
    """
    for name, share in (("features", features), ("own", own)):
        if not 0 <= share <= 1:
            raise ValueError(f"{name}: expected a share in [0, 1], got {share}")
    layers, w = layers or LAYERS[sd.defaults.settings], sd.defaults.guidance if w is None else w
    for name in layers.own:
        if not any(key.startswith(name) for key in sd.unet.attn_processors):
            raise ValueError(f"layers: expected beginnings of attention layers of this UNet, none begins with {name!r}")
    count, done = len(inverted.z_T), 0.0
    prompts = (inverted.prompts, [negative] * count, [target] * count)
    texts = torch.cat([sd.encode_prompt(of_third) for of_third in prompts])

    def own_attention(probs: Tensor, layer: str, is_cross: bool) -> Tensor:
        if is_cross or done >= own or not layer.startswith(layers.own):
            return probs
        return torch.cat([probs.chunk(3)[0]] * 3)

    zt, times = inverted.z_T, sd.schedule.times(inverted.steps)
    with attention_hook(sd.unet, own_attention), features_shared(sd.unet, layers.features, lambda: done < features):
        for i, (t, s) in enumerate(zip(times, [*times[1:], 0])):
            done, source = i / inverted.steps, inverted.path[-1 - i]
            _, eps_uncond, eps_cond = sd.unet_eps(torch.cat([source, zt, zt]), t, texts).chunk(3)
            zt = ddim_step(zt, guidance.combine(eps_uncond, eps_cond, w), t, s, sd.schedule)
    return sd.decode(zt)
