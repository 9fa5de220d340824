"""Train the parts of unCLIP (DALL-E 2) on the Toybox: a decoder, a diffusion prior, and a plain regression beside it.

    python training/toybox_unclip.py decoder --minutes 120
    python training/toybox_unclip.py prior --minutes 20
    python training/toybox_unclip.py regression --minutes 20

decoder: the shipped UNet, which gets four more tokens of context made from the picture's CLIP embedding. Half of the
captions and a tenth of the embeddings are left out (Ramesh et al. 2022, section 2.1), so it draws from either or both.
prior: diffusers' PriorTransformer; it denoises a CLIP image embedding, told the caption (section 2.2, Eq. 2).
regression: the same network, which sees no noise and names the embedding at once.
Each can be stopped at any time (Ctrl-C, kill -9): the same command goes on from the last save.
"""

import argparse
import json
from pathlib import Path

import torch
from command import command, common_arguments, new_accelerator
from diffusers import PriorTransformer, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from PIL import Image
from run import Run, digest
from torch import Tensor, nn
from toybox_stage import captioned, data_name, kept, picture_arguments, pictures, ship
from toybox_unet import PARTS, EpsModel, load_parts, scaled_latents
from tqdm import tqdm
from transformers import CLIPModel

from course_lib.diffusion import checkpoint, samplers, schedule
from course_lib.diffusion.ddpm import q_sample, simple_loss
from course_lib.diffusion.guidance import combine
from course_lib.environment import from_uint8
from course_lib.latent.unclip import NOISE, ImageTokens, image_embedding, predicted, text_embedding
from course_lib.plots import montage
from course_lib.toybox import sets
from course_lib.toybox.world import RENDERER_VERSION

PRIOR = dict(num_attention_heads=4, attention_head_dim=32, num_layers=4, additional_embeddings=4)
NO_TEXT, NO_PICTURE = 0.5, 0.1  # shares left out of the decoder's training


@torch.no_grad()
def embeddings(clip: CLIPModel, images: Tensor) -> Tensor:
    """CLIP's unit vectors (N, D_e) of pictures (N, 3, 64, 64) uint8."""
    parts = [image_embedding(clip, from_uint8(part)).cpu() for part in tqdm(images.split(200), desc="embed")]
    return torch.cat(parts)


def new_prior(clip: CLIPModel, mean: Tensor, std: Tensor) -> PriorTransformer:
    """The network of prior and regression; it works on scaled embeddings, and keeps the scale."""
    text = clip.config.text_config
    prior = PriorTransformer(**PRIOR, embedding_dim=clip.config.projection_dim,
                             num_embeddings=text.max_position_embeddings)  # fmt: skip
    prior.clip_mean.data.copy_(mean)
    prior.clip_std.data.copy_(std)
    for scale in (prior.clip_mean, prior.clip_std):
        scale.requires_grad_(False)
    return prior


@torch.no_grad()
def variations(net: nn.ModuleDict, vae, empty: Tensor, embedding: Tensor, noise_schedule, path: Path, w: float = 3.0,
               steps: int = 20) -> None:  # fmt: skip
    """Write four drawings of each embedding, from the same noises each time."""
    count, each = len(embedding), 4
    tokens = net["tokens"](torch.cat([net["tokens"].mean.expand_as(embedding), embedding]).repeat_interleave(each, 0))
    context = torch.cat([empty.expand(len(tokens), -1, -1), tokens], dim=1)
    model = EpsModel(net["unet"], noise_schedule)

    def eps_model(zt: Tensor, t: int) -> Tensor:
        times = torch.full((2 * len(zt),), t, device=zt.device)
        return combine(*model(torch.cat([zt, zt]), times, context).chunk(2), w)

    noise = torch.randn(each, vae.config.latent_channels, 16, 16, generator=torch.Generator().manual_seed(1))
    z_T = noise.to(embedding.device).repeat(count, 1, 1, 1)
    z0 = samplers.last(samplers.ddim(eps_model, z_T, noise_schedule, steps, clip=False))
    x0 = vae.decode(z0 / vae.config.scaling_factor).sample.clamp(-1, 1)
    picture = Image.fromarray(montage(x0.cpu(), columns=2 * each))
    picture.resize((picture.width * 2, picture.height * 2), Image.Resampling.NEAREST).save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["decoder", "prior", "regression"], help="what is trained")
    common_arguments(parser, out="runs/toybox_unclip", batch_size=64, lr=3e-4, steps=4000)
    picture_arguments(parser, captions=True)
    parser.add_argument("--parts", type=Path, default=PARTS, help="folder of the Toybox model, with clip and unet "
                        f"(default {PARTS})")  # fmt: skip
    args = parser.parse_args()
    args.out = args.out / args.part
    accelerator = new_accelerator(args)
    vae, text_encoder, tokenizer = load_parts(args.parts, accelerator.device)
    clip = CLIPModel.from_pretrained(args.parts / "clip", dtype=torch.float32).eval().requires_grad_(False)
    clip.to(accelerator.device)
    name = f"v{RENDERER_VERSION}-{args.split}-{args.images}"
    with accelerator.main_process_first():
        path = args.out.parent / f"embeddings-{name}-{digest(clip.vision_model.parameters())}.pt"
        embedding = kept(path, lambda: embeddings(clip, pictures(args.images, clip.device, args.split)))
    embedding = embedding.to(accelerator.device)
    about = {"data": data_name(args.images, args.split), "clip": digest(clip.parameters())}
    if args.part == "decoder":
        train_decoder(args, accelerator, about, embedding, vae, text_encoder, tokenizer, name)
        return
    if args.start_from:
        prior = PriorTransformer.from_pretrained(args.start_from, torch_dtype=torch.float32)
    else:
        prior = new_prior(clip, embedding.mean(0), embedding.std(0))
    mean, std = prior.clip_mean.data[0].to(embedding.device), prior.clip_std.data[0].to(embedding.device)
    run = Run(args, prior, accelerator, "training/toybox_unclip.py", about | PRIOR)
    batches, scaled = captioned(run, tokenizer, drop=0.1), (embedding - mean) / std
    specs = [sets.pair_spec(k, split="test")[1] for k in range(256)]
    test_ids = tokenizer(specs, padding="max_length", truncation=True, return_tensors="pt").input_ids.to(run.device)
    test = embeddings(clip, pictures(256, run.device, "test")).to(run.device)

    def asked(net: PriorTransformer, e0: Tensor, ids: Tensor, generator: torch.Generator) -> Tensor:
        """The network's e_0 for a noised embedding at a random time; the regression gets zeros in its place."""
        with torch.no_grad():
            texts, features = text_embedding(clip, ids), text_encoder(ids).last_hidden_state
        t = torch.full((len(e0),), NOISE.T, device=e0.device)
        if args.part == "prior":
            t = torch.randint(1, NOISE.T + 1, (len(e0),), generator=generator, device=e0.device)
            eps = torch.randn(e0.shape, generator=generator, device=e0.device)
            return predicted(net, q_sample(e0, t, eps, NOISE), t, texts, features)
        return predicted(net, torch.zeros_like(e0), t, texts, features)

    def batch_loss(generator: torch.Generator) -> Tensor:
        rows, ids = next(batches)
        return (asked(run.net, scaled[rows], ids, generator) - scaled[rows]).square().mean()

    @torch.no_grad()
    def on_save(step: int) -> dict:
        generator = torch.Generator(run.device).manual_seed(0)
        e0 = (test - mean) / std
        return dict(test_loss=round((asked(run.ema.model, e0, test_ids, generator) - e0).square().mean().item(), 5))

    run.train(batch_loss, on_save)
    if args.ship and accelerator.is_main_process:
        ship(run.ema.model, args.ship / args.part, run, made_by="training/toybox_unclip.py", predicts="x_0",
             measured=on_save(run.step))  # fmt: skip


def train_decoder(args, accelerator, about, embedding, vae, text_encoder, tokenizer, name) -> None:
    start = args.start_from or args.parts / "unet"
    unet = UNet2DConditionModel.from_pretrained(start, torch_dtype=torch.float32)
    tokens = ImageTokens(embedding.shape[1], unet.config.cross_attention_dim)
    if args.start_from:
        tokens = checkpoint.load(args.start_from.parent / "tokens", model_class=ImageTokens).requires_grad_(True)
    else:
        tokens.mean.copy_(embedding.mean(0))
        tokens.std.copy_(embedding.std(0))
        about["unet"] = digest(unet.parameters())
    if accelerator.device.type == "cpu":  # torch's fused attention is slow backwards on a CPU at these sizes
        unet.set_attn_processor(AttnProcessor())
    net = nn.ModuleDict({"unet": unet, "tokens": tokens})
    run = Run(args, net, accelerator, "training/toybox_unclip.py", about)
    if not args.start_from:
        run.started_from = json.loads((args.parts / "unet" / "provenance.json").read_text())
    encoder = digest([*vae.encoder.parameters(), *vae.quant_conv.parameters()])
    with accelerator.main_process_first():
        path = args.out.parent / f"latents-{name}-{encoder}-{vae.config.scaling_factor}.pt"
        latents = kept(path, lambda: scaled_latents(vae, sets.pair_images(args.images, args.split))).to(run.device)
    batches, noise_schedule = captioned(run, tokenizer, drop=NO_TEXT), schedule.scaled_linear(spacing="trailing")
    no_text = tokenizer([""], padding="max_length", return_tensors="pt").input_ids.to(run.device)
    empty = text_encoder(no_text).last_hidden_state

    def batch_loss(generator: torch.Generator) -> Tensor:
        rows, ids = next(batches)
        drop = torch.rand(len(rows), generator=generator, device=run.device) < NO_PICTURE
        more = run.net["tokens"](embedding[rows], drop)
        context = torch.cat([text_encoder(ids).last_hidden_state, more], dim=1)
        model = EpsModel(run.net["unet"], noise_schedule)
        z0 = latents[rows].float()
        return simple_loss(lambda zt, t: model(zt, t, context), z0, noise_schedule, generator, weighting="v")

    def on_save(step: int) -> dict:
        path = args.out / f"samples_{step:06d}.png"
        variations(run.ema.model, vae, empty, embedding[:16], noise_schedule, path)
        return dict(samples=path.name)

    run.train(batch_loss, on_save)
    if args.ship and accelerator.is_main_process:
        ship(run.ema.model["unet"], args.ship / "decoder", run, made_by="training/toybox_unclip.py", predicts="v")
        facts = dict(made_by="training/toybox_unclip.py", data=about["data"], **run.facts())
        checkpoint.save(run.ema.model["tokens"], args.ship / "tokens", facts)


if __name__ == "__main__":
    command(main)
