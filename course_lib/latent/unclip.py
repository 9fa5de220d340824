"""unCLIP (DALL-E 2): from text to a CLIP image embedding by a prior, from the embedding to a picture by a decoder.

Derived in: notebooks/07_image_embeddings.ipynb.

The embedding says what a picture shows, not where each pixel lies. So one embedding has many pictures, its variations;
and embeddings can be mixed, or moved along the difference of two texts. The decoder is the Toybox UNet with four more
tokens of context; the prior is diffusers' PriorTransformer, and the course's own loop samples it.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from course_lib.diffusion import checkpoint, samplers, schedule
from course_lib.environment import CHECKPOINTS
from course_lib.latent import text
from course_lib.latent.stable_diffusion import StableDiffusion, load

FOLDER = CHECKPOINTS / "toybox-unclip"
NOISE = schedule.cosine(spacing="trailing")  # of the prior; Ramesh et al. 2022, appendix C


class ImageTokens(nn.Module):
    """A CLIP image embedding as more tokens of context, beside those of the text.

    embedding: D_e of CLIP.  width: D of the UNet's context.  count: tokens; the paper's four.
    `mean` and `std`, (D_e,): of the embeddings of the training pictures, to which inputs are scaled.
    Source: Ramesh et al. 2022, section 2.1.  Differs from the paper: it also adds the embedding to that of the time.
    """

    def __init__(self, embedding: int = 128, width: int = 128, count: int = 4):
        super().__init__()
        self.config = dict(embedding=embedding, width=width, count=count)
        self.linear = nn.Linear(embedding, count * width)
        self.register_buffer("mean", torch.zeros(embedding))
        self.register_buffer("std", torch.ones(embedding))

    def forward(self, embedding: Tensor, drop: Tensor | None = None) -> Tensor:
        """(B, D_e) -> (B, count, D).  drop: (B,) of True where "no picture" is said, by zeros for the embedding."""
        scaled = (embedding - self.mean) / self.std
        if drop is not None:
            scaled = scaled.masked_fill(drop[:, None], 0)
        return self.linear(scaled).unflatten(-1, (self.config["count"], self.config["width"]))


class UnCLIP:
    """Prior, decoder and CLIP as one object.

    sd: the model whose UNet is the decoder.  clip: transformers' CLIPModel.  tokens: of the decoder.
    prior, regression: PriorTransformers; the first denoises an embedding, the second names it in one evaluation.
    Embeddings are unit vectors (B, D_e).
    """

    def __init__(self, sd: StableDiffusion, clip, tokens: ImageTokens, prior, regression):
        self.sd, self.clip, self.tokens, self.prior, self.regression = sd, clip, tokens, prior, regression

    @torch.no_grad()
    def of_images(self, images: Tensor) -> Tensor:
        """CLIP's embeddings (B, D_e) of pictures (B, 3, 64, 64) in [-1, 1].  Raises ValueError for another shape."""
        side = self.clip.config.vision_config.image_size
        if images.ndim != 4 or tuple(images.shape[1:]) != (3, side, side):
            raise ValueError(f"images: expected (B, 3, {side}, {side}), got {tuple(images.shape)}")
        return image_embedding(self.clip, images.to(self.sd.device))

    @torch.no_grad()
    def of_texts(self, prompts: str | list[str]) -> Tensor:
        """CLIP's embeddings (B, D_e) of texts, which lie elsewhere than those of pictures: hence the prior."""
        return text_embedding(self.clip, text.tokenize(self.sd.tokenizer, prompts).to(self.sd.device))

    @torch.no_grad()
    def imagine(self, prompts: str | list[str], *, w: float = 2.0, steps: int = 25, candidates: int = 2,
                seed: int = 0) -> Tensor:  # fmt: skip
        """Image embeddings (B, D_e) for prompts, drawn by the diffusion prior.

        It predicts the embedding itself (x_0), not the noise. Of `candidates` for a prompt the one is taken whose dot
        product with the text's embedding is larger.  w: guidance scale of the prior.
        Source: Ramesh et al. 2022, section 2.2 and Eq. 2.
        Raises ValueError if candidates < 1.
        Derived in: notebooks/07_image_embeddings.ipynb, section "The prior".
        """
        if candidates < 1:
            raise ValueError(f"candidates: expected at least 1, got {candidates}")
        prompts = [prompts] if isinstance(prompts, str) else prompts
        many = [prompt for prompt in prompts for _ in range(candidates)]
        texts, features = self.of_texts(many), self.sd.encode_prompt(many)
        no_texts, no_features = self.of_texts(""), self.sd.encode_prompt("")

        def eps_model(et: Tensor, t: int) -> Tensor:
            e0 = predicted(self.prior, et, t, texts, features)
            if w != 1:
                none = predicted(self.prior, et, t, no_texts.expand_as(texts), no_features.expand_as(features))
                e0 = none + w * (e0 - none)
            alpha_bar = NOISE.at(t, et)
            return (et - alpha_bar.sqrt() * e0) / (1 - alpha_bar).sqrt()

        e_T = torch.randn(texts.shape, generator=torch.Generator().manual_seed(seed)).to(self.sd.device)
        found = self._unscaled(samplers.last(samplers.ddim(eps_model, e_T, NOISE, steps, clip=False)))
        best = (found * texts).sum(-1).unflatten(0, (-1, candidates)).argmax(1)
        return found.unflatten(0, (-1, candidates))[torch.arange(len(prompts)), best]

    @torch.no_grad()
    def regress(self, prompts: str | list[str]) -> Tensor:
        """The mean embedding (B, D_e) of what a prompt may show: the same network, asked once, without noise."""
        texts, features = self.of_texts(prompts), self.sd.encode_prompt(prompts)
        return self._unscaled(predicted(self.regression, torch.zeros_like(texts), NOISE.T, texts, features))

    def context(self, embedding: Tensor, prompt: str | list[str] = "") -> Tensor:
        """What the decoder reads: features (B, L + 4, D) of a prompt and of an image embedding (B, D_e)."""
        features = self.sd.encode_prompt(prompt)
        return torch.cat([features.expand(len(embedding), -1, -1), self.tokens(embedding)], dim=1)

    def no_context(self) -> Tensor:
        """(1, L + 4, D): neither text nor picture, which guidance moves away from."""
        empty = self.tokens(self.tokens.mean[None])
        return torch.cat([self.sd.encode_prompt(""), empty], dim=1)

    def draw(self, embedding: Tensor, prompt: str | list[str] = "", *, w: float = 3.0, steps: int = 25, seed: int = 0,
             x_T: Tensor | None = None) -> Tensor:  # fmt: skip
        """Pictures (B, 3, H, W) of embeddings (N, D_e).  x_T: noise (B, C, h, w), for B / N pictures each.

        Source: Ramesh et al. 2022, section 2.1.
        Derived in: notebooks/07_image_embeddings.ipynb, section "The decoder".
        """
        features = self.context(embedding, prompt)
        return self.sd.sample(features, w=w, steps=steps, negative=self.no_context(), seed=seed, x_T=x_T)

    def _unscaled(self, embedding: Tensor) -> Tensor:
        return F.normalize(self.prior.post_process_latents(embedding), dim=-1)


def predicted(prior, et: Tensor, t: Tensor | int, texts: Tensor, features: Tensor) -> Tensor:
    """The prior's e_0 (B, D_e), in scaled numbers, at our t in 1..T.  texts: (B, D_e).  features: (B, L, D)."""
    t = t if torch.is_tensor(t) else torch.full((len(et),), t, device=et.device)
    return prior(et, t - 1, proj_embedding=texts, encoder_hidden_states=features).predicted_image_embedding


def image_embedding(clip, images: Tensor) -> Tensor:
    """Unit vectors (B, D_e) of pictures (B, 3, H, W) in [-1, 1].  clip: transformers' CLIPModel."""
    return F.normalize(clip.visual_projection(clip.vision_model(pixel_values=images).pooler_output), dim=-1)


def text_embedding(clip, ids: Tensor) -> Tensor:
    """Unit vectors (B, D_e) of texts, as token ids (B, L)."""
    return F.normalize(clip.text_projection(clip.text_model(input_ids=ids).pooler_output), dim=-1)


def slerp(a: Tensor, b: Tensor, share: float) -> Tensor:
    """Unit vectors on the arc from a to b, each (B, D_e): `share` of the way, in [0, 1].

    Source: Ramesh et al. 2022, section 3.2.
    Derived in: notebooks/07_image_embeddings.ipynb, section "Between two pictures".
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share: expected a number in [0, 1], got {share}")
    angle = (a * b).sum(-1, keepdim=True).clamp(-1 + 1e-6, 1 - 1e-6).acos()
    return (((1 - share) * angle).sin() * a + (share * angle).sin() * b) / angle.sin()


def text_difference(unclip: UnCLIP, embedding: Tensor, before: str, after: str, share: float = 0.35) -> Tensor:
    """Move image embeddings (B, D_e) towards the difference of two texts: "with a hat" minus "without".

    slerp(z_i, z_d, share), z_d = norm(z_t(after) - z_t(before)).  share: the paper's are 0.25 to 0.5.
    Source: Ramesh et al. 2022, section 3.3.  The paper draws from the inverted noise of the picture; see exercise 7.4.
    Derived in: notebooks/07_image_embeddings.ipynb, section "The difference of two texts".
    """
    direction = F.normalize(unclip.of_texts(after) - unclip.of_texts(before), dim=-1)
    return slerp(embedding, direction.expand_as(embedding), share)


def load_unclip(device: torch.device | str | None = None, dtype: torch.dtype | None = None,
                folder: Path = FOLDER) -> UnCLIP:  # fmt: skip
    """The shipped unCLIP of the Toybox.  Raises ValueError if a part is missing; the rest as `load`."""
    from diffusers import PriorTransformer, UNet2DConditionModel  # heavy, and only here
    from transformers import CLIPModel

    for part in ("decoder", "tokens", "prior", "regression"):
        if not (folder / part / "config.json").is_file():
            raise ValueError(f"folder: expected {folder / part}; train it with training/toybox_unclip.py {part}")
    sd, options = load("toybox", device, dtype), {"local_files_only": True, "torch_dtype": torch.float32}
    unet = UNet2DConditionModel.from_pretrained(folder / "decoder", **options | {"torch_dtype": sd.dtype})
    clip = CLIPModel.from_pretrained(sd.source / "clip", local_files_only=True, dtype=torch.float32)
    priors = [PriorTransformer.from_pretrained(folder / name, **options) for name in ("prior", "regression")]
    tokens = checkpoint.load(folder / "tokens", sd.device, ImageTokens)
    for part in (clip, *priors):
        part.eval().requires_grad_(False).to(sd.device)
    decoder = StableDiffusion(sd.vae, unet.to(sd.device), sd.text_encoder, sd.tokenizer, name="toybox-unclip",
                              noise=sd.noise_settings, source=folder, defaults=sd.defaults)  # fmt: skip
    return UnCLIP(decoder, clip, tokens, *priors)
