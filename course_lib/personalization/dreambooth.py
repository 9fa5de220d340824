"""DreamBooth: bind a rare word to a subject by training the whole UNet, and hold the class with its own pictures.

Derived in: notebooks/12_dreambooth.ipynb.

LoRA trains the same with few numbers: to each attention layer a product of two thin matrices is added.
"""

import contextlib

import torch
from torch import Tensor, nn

from course_lib.latent.stable_diffusion import StableDiffusion
from course_lib.personalization import concept
from course_lib.personalization.concept import Examples
from course_lib.personalization.finetune import Recipe, Settings, Term, begin, learn

TOYBOX, TOYBOX_LORA = Settings(steps=200, lr=2e-4), Settings(steps=200, lr=3e-3)
SD15, SD15_LORA = Settings(steps=800, lr=5e-6, batch_size=1), Settings(steps=800, lr=1e-4, batch_size=1)
LORA_LAYERS = ("to_q", "to_k", "to_v", "to_out.0")  # of every attention, as in diffusers' LoRA script


def recipe(sd: StableDiffusion, images, *, noun: str, token: str = "sks", prior: Examples | None = None,
           prior_weight: float = 1.0, text: bool = False, rank: int | None = None, captions=None, flip: bool = False,
           settings: Settings | None = None) -> Recipe:  # fmt: skip
    """All of the UNet learns "a sks dog", and again "a dog" from what it drew itself.

    L = E || eps - eps_theta(z_t, t, c("a sks dog")) ||^2 + lambda E || eps' - eps_theta(z'_t', t', c("a dog")) ||^2
    Source: Ruiz et al. 2023, Eq. 2.
    token: a rare word that the tokenizer may split.  prior: pictures of the class, see `prior_examples`; None trains
    without prior preservation.  prior_weight: lambda.  text: the text encoder learns too.  rank: of LoRA (Hu et al.
    2022); None trains all weights.
    Derived in: notebooks/12_dreambooth.ipynb, section "The loss".
    """
    if prior_weight < 0:
        raise ValueError(f"prior_weight: expected a number of at least 0, got {prior_weight}")
    check_noun(sd, noun)
    name = f"{token} {noun}"
    terms = [Term(concept.examples(sd, images, name, templates=("a photo of a {}",), captions=captions, flip=flip))]
    if prior is not None and prior_weight > 0:
        terms.append(Term(prior, prior_weight))
    if settings is None:
        toy = sd.name == "toybox"
        settings = (TOYBOX if toy else SD15) if rank is None else (TOYBOX_LORA if toy else SD15_LORA)
    method = "dreambooth" if rank is None else "lora"
    made = begin(sd, method, terms, settings, token=token, noun=noun, prior_weight=prior_weight if prior else 0.0,
                 rank=rank, text=text)  # fmt: skip
    parts = {"unet": sd.unet} | ({"text_encoder": sd.text_encoder} if text else {})
    try:
        for part, network in parts.items():
            if rank is None:
                params = {f"{part}.{key}": param for key, param in network.named_parameters()}
                made.params |= learn(made.undo, params)
            else:
                made.params |= add_lora(network, rank, made.undo, prefix=f"{part}.")
    except BaseException:
        made.close()
        raise
    made.text_learns = text
    return made


def prior_examples(sd: StableDiffusion, noun: str, count: int = 100, **options) -> Examples:
    """`count` pictures of the class, drawn by the model before it learns; options as in `generated_examples`."""
    return concept.generated_examples(sd, f"a photo of a {noun}", count, **{"steps": prior_steps(sd)} | options)


def prior_steps(sd: StableDiffusion) -> int:
    """DDIM steps of a class picture: 12 for the miniature, which has to be taught in a minute, 25 for others."""
    return 12 if sd.name == "toybox" else 25


def check_noun(sd: StableDiffusion, noun: str) -> None:
    """Raise a ValueError for an empty class noun, or one with letters that the tokenizer does not know."""
    ids = sd.tokenizer(noun, add_special_tokens=False).input_ids if noun and noun.strip() else []
    unknown = sd.tokenizer.unk_token_id in ids and sd.tokenizer.unk_token_id != sd.tokenizer.eos_token_id
    if not ids or unknown:
        raise ValueError(f"noun: expected a word that the model knows, such as 'cat', got {noun!r}")


# ---- LoRA ----


class LowRank(nn.Module):
    """A frozen linear layer plus a product of thin matrices: W x + (alpha / r) B A x, B = 0 at first.

    Source: Hu et al. 2022, Eq. 3.  down: A, (r, in).  up: B, (out, r).  alpha = r here: the factor is 1.
    """

    def __init__(self, layer: nn.Linear, rank: int):
        super().__init__()
        self.layer = layer
        like = dict(device=layer.weight.device, dtype=torch.float32)
        generator = torch.Generator().manual_seed(layer.in_features)
        A = torch.randn(rank, layer.in_features, generator=generator) / rank
        self.down = nn.Parameter(A.to(**like))
        self.up = nn.Parameter(torch.zeros(layer.out_features, rank, **like))

    def forward(self, x: Tensor, *args) -> Tensor:
        down, up = (w if torch.is_autocast_enabled(x.device.type) else w.to(x.dtype) for w in (self.down, self.up))
        return self.layer(x) + nn.functional.linear(nn.functional.linear(x, down), up)


def add_lora(network: nn.Module, rank: int, undo: contextlib.ExitStack, prefix: str = "unet.") -> dict:
    """Wrap the attention layers of a network; returns {"unet....to_k.lora.down": Parameter, ...}.

    Raises ValueError for a rank below 1, or a network without attention layers.
    """
    if not isinstance(rank, int) or rank < 1:
        raise ValueError(f"rank: expected a whole number of at least 1, got {rank!r}")
    endings = LORA_LAYERS if prefix == "unet." else ("q_proj", "k_proj", "v_proj", "out_proj")
    names = [name for name, layer in network.named_modules() if name.endswith(endings) and isinstance(layer, nn.Linear)]
    if not names:
        raise ValueError(f"network: expected attention layers ({', '.join(endings)}), found none")
    params = {}
    for name in names:
        parent, _, child = name.rpartition(".")
        parent, layer = network.get_submodule(parent), network.get_submodule(name)
        wrapped = LowRank(layer, rank)
        setattr(parent, child, wrapped)
        undo.callback(setattr, parent, child, layer)
        params |= {f"{prefix}{name}.lora.down": wrapped.down, f"{prefix}{name}.lora.up": wrapped.up}
    return params
