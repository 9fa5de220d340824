"""LoRA: DreamBooth's loss, with only a product of two thin matrices trained beside each attention layer.

Derived in: notebooks/12_dreambooth.ipynb, section "LoRA: the same with few numbers".
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from course_lib.latent.stable_diffusion import StableDiffusion
from course_lib.personalization.dreambooth import terms_of, trained_networks
from course_lib.personalization.examples import Examples
from course_lib.personalization.recipe import Recipe, Settings, new_recipe

SETTINGS = {"toybox": Settings(steps=60, lr=4e-3, batch_size=8), "sd15": Settings(steps=800, lr=1e-4, batch_size=1)}
RANK = {"toybox": 16, "sd15": 4}  # default of `recipe`: measurements/tuning.py; diffusers' script
LAYERS = {  # of every attention, as in diffusers' LoRA script
    "unet": ("to_q", "to_k", "to_v", "to_out.0"),
    "text_encoder": ("q_proj", "k_proj", "v_proj", "out_proj"),
}


@contextmanager
def recipe(sd: StableDiffusion, images, *, noun: str, token: str = "sks", rank: int | None = None,
           prior: Examples | None = None, prior_weight: float = 1.0, text: bool = False,
           captions: Sequence[str] | None = None, flip: bool = False,
           settings: Settings | None = None) -> Iterator[Recipe]:  # fmt: skip
    """DreamBooth's loss, with W_0 + B A in place of a new W in every attention layer.

    Source: Hu et al. 2022, section 4.  rank: of B A; None: that of the base model (RANK).  Other arguments as in
    `dreambooth.recipe`.
    The initial values of A depend on settings.seed and differ from layer to layer; B starts at 0.
    Derived in: notebooks/12_dreambooth.ipynb, section "LoRA: the same with few numbers".
    """
    terms, about = terms_of(sd, images, noun, token, prior, prior_weight, captions, flip)
    settings = settings or SETTINGS[sd.defaults.settings]
    rank = RANK[sd.defaults.settings] if rank is None else rank
    recipe = new_recipe(sd, "lora", terms, settings, **about, rank=rank, text=text)
    recipe.trains_text = text
    with attach(trained_networks(sd, text), rank, settings.seed) as recipe.params:
        yield recipe


class LowRank(nn.Module):
    """A frozen linear layer plus a product of thin matrices: W x + scale B A x, B = 0 at first.

    Source: Hu et al. 2022, Eq. 3.  down: A, (r, in).  up: B, (out, r).  scale: the paper's alpha / r.
    """

    def __init__(self, layer: nn.Linear, rank: int, generator: torch.Generator | None = None, scale: float = 1.0):
        super().__init__()
        self.layer, self.scale = layer, scale
        like = dict(device=layer.weight.device, dtype=torch.float32)
        A = torch.randn(rank, layer.in_features, generator=generator) / rank
        self.down = nn.Parameter(A.to(**like))
        self.up = nn.Parameter(torch.zeros(layer.out_features, rank, **like))

    def forward(self, x: Tensor, *args) -> Tensor:
        down, up = (w if torch.is_autocast_enabled(x.device.type) else w.to(x.dtype) for w in (self.down, self.up))
        thin = self.scale * nn.functional.linear(x, down)  # (..., r), where scaling is cheapest
        return self.layer(x) + nn.functional.linear(thin, up)


@contextmanager
def attach(networks: dict[str, nn.Module], rank: int, seed: int = 0) -> Iterator[dict[str, nn.Parameter]]:
    """Wrap the attention layers of networks in `LowRank`; yields {"unet....to_k.lora.down": Parameter, ...}.

    networks: {"unet": sd.unet}, optionally with "text_encoder".  Afterwards the networks are as before.
    Raises ValueError for a rank below 1, or a network without attention layers.
    """
    if not isinstance(rank, int) or rank < 1:
        raise ValueError(f"rank: expected a whole number of at least 1, got {rank!r}")
    generator, params, wrapped = torch.Generator().manual_seed(seed), {}, []
    try:
        for part, network in networks.items():
            names = [name for name, layer in network.named_modules()
                     if name.endswith(LAYERS[part]) and isinstance(layer, nn.Linear)]  # fmt: skip
            if not names:
                raise ValueError(f"network: expected attention layers ({', '.join(LAYERS[part])}), found none")
            for name in names:
                parent, _, child = name.rpartition(".")
                parent, layer = network.get_submodule(parent), network.get_submodule(name)
                thin = LowRank(layer, rank, generator)
                setattr(parent, child, thin)
                wrapped.append((parent, child, layer))
                params |= {f"{part}.{name}.lora.down": thin.down, f"{part}.{name}.lora.up": thin.up}
        yield params
    finally:
        for parent, child, layer in wrapped:
            setattr(parent, child, layer)
