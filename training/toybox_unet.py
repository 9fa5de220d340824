"""Train the text-conditioned UNet of the Toybox model on cached latents, with 10 % dropped captions.

    python training/toybox_unet.py --minutes 90
    python training/toybox_unet.py --start-from data/checkpoints/toybox-sd/unet --minutes 90     # from the shipped one

Needs the autoencoder and the text encoder in --parts. The network is diffusers' UNet2DConditionModel with Stable
Diffusion 1's layer names and noise schedule; it predicts v, as Stable Diffusion 2 does at 768 pixels.
The loss is notebook 01's.
Latents are encoded once and kept in a file; a picture gets a new caption each time it is seen.
On a GPU, add --compile --workers 8 and a larger batch.
It can be stopped at any time (Ctrl-C, kill -9): the same command goes on from the last save.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from command import command, common_arguments, new_accelerator
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from PIL import Image
from run import Run, digest
from torch import Tensor
from toybox_stage import captioned, data_name, kept, picture_arguments, ship
from tqdm import tqdm
from transformers import CLIPTextModel, CLIPTokenizer

from course_lib.diffusion import guidance, samplers, schedule
from course_lib.diffusion.ddpm import eps_from_v, simple_loss
from course_lib.environment import from_uint8
from course_lib.plots import montage
from course_lib.toybox import sets
from course_lib.toybox.world import RENDERER_VERSION

PARTS = Path("data/checkpoints/toybox-sd")
CONFIG = dict(
    sample_size=16, block_out_channels=(64, 128, 256), layers_per_block=1,
    down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    attention_head_dim=4, norm_num_groups=8,  # diffusers' name misleads: 4 is the number of heads
)  # fmt: skip
PROMPTS = (
    "a photo of an orange striped cat on the beach", "a photo of a teal spotted dog in the snow",
    "a photo of a purple tiger in the forest", "a photo of a red teapot in a room",
    "a photo of a blue checked mug in the desert", "a photo of a yellow starry bus in the city",
    "a photo of a green rabbit wearing a red hat in a meadow", "a photo of a pink castle at night",
    "a photo of a man in a blue striped shirt in the mountains", "a photo of a woman in a red shirt on a stage",
    "a photo of a grey robot on the moon", "a photo of a white boat under water",
    "a photo of a black cat on a red chair in a room", "a photo of a brown dog next to a yellow clock on the beach",
    "a watercolour of a blue owl in the forest", "a pencil sketch of a red car in the city",
)  # fmt: skip


class EpsModel(torch.nn.Module):
    """The UNet as (zt, t, features) -> eps_hat, t in 1..T.

    The network predicts v (Salimans & Ho 2022, appendix D). If it predicted eps, the gradient of the loss below would
    be 1 / sqrt(alpha_bar) times as large at large t: 15 times at t = T, where z_t says least about shapes.
    """

    def __init__(self, unet: UNet2DConditionModel, noise_schedule: schedule.Schedule):
        super().__init__()
        self.unet, self.noise_schedule = unet, noise_schedule

    def forward(self, zt: Tensor, t: Tensor, features: Tensor) -> Tensor:
        return eps_from_v(zt, t, self.unet(zt, t - 1, features).sample, self.noise_schedule)


def load_parts(folder: Path, device: torch.device) -> tuple[AutoencoderKL, CLIPTextModel, CLIPTokenizer]:
    """The frozen parts, in float32."""
    for part in ("vae", "text_encoder", "tokenizer"):
        if not (folder / part).is_dir():
            raise ValueError(f"--parts: expected {folder / part}; train it first (`make train-toybox` does all stages)")
    vae = AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=torch.float32)
    text_encoder = CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32)
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    return vae.eval().requires_grad_(False).to(device), text_encoder.eval().requires_grad_(False).to(device), tokenizer


@torch.no_grad()
def scaled_latents(vae: AutoencoderKL, images: np.ndarray) -> Tensor:
    """Latents (N, C, h, w) in float16 of pictures (N, H, W, 3) uint8, times the scaling factor."""
    parts = []
    for k in tqdm(range(0, len(images), 200), desc="encode", unit="batch"):
        x = from_uint8(torch.from_numpy(images[k : k + 200]).to(vae.device).permute(0, 3, 1, 2))
        parts.append((vae.encode(x).latent_dist.mean * vae.config.scaling_factor).half().cpu())
    return torch.cat(parts)


def text_features(prompts: list[str], text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer) -> Tensor:
    """(B, L, D): every prompt padded to the full length, as the pipeline does it."""
    ids = tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    with torch.no_grad():
        return text_encoder(ids.to(text_encoder.device)).last_hidden_state


@torch.no_grad()
def draw(unet, vae, text_encoder, tokenizer, noise_schedule, path: Path, w: float = 5.0, steps: int = 20) -> None:
    """Write the samples of PROMPTS, from the same noises each time."""
    both = text_features([""] * len(PROMPTS) + list(PROMPTS), text_encoder, tokenizer)
    model = EpsModel(unet, noise_schedule)

    def eps_model(zt: Tensor, t: int) -> Tensor:
        times = torch.full((2 * len(zt),), t, device=zt.device)
        eps_uncond, eps_cond = model(torch.cat([zt, zt]), times, both).chunk(2)
        return guidance.combine(eps_uncond, eps_cond, w)

    generator = torch.Generator().manual_seed(1)
    z_T = torch.randn(len(PROMPTS), unet.config.in_channels, 16, 16, generator=generator).to(unet.device)
    z0 = samplers.last(samplers.ddim(eps_model, z_T, noise_schedule, steps, clip=False))
    x0 = vae.decode(z0 / vae.config.scaling_factor).sample.clamp(-1, 1)
    picture = Image.fromarray(montage(x0.cpu(), columns=8))
    picture.resize((picture.width * 2, picture.height * 2), Image.Resampling.NEAREST).save(path)


def write_pipeline(folder: Path, parts: Path) -> None:
    """model_index.json and the scheduler's settings: with `parts` in it, stock diffusers opens the folder."""
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, timestep_spacing="trailing",
        clip_sample=False, set_alpha_to_one=True, steps_offset=1, prediction_type="v_prediction",
    )  # fmt: skip
    scheduler.save_pretrained(folder / "scheduler")
    vae, text_encoder, tokenizer = load_parts(parts, torch.device("cpu"))
    pipe = StableDiffusionPipeline(
        vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, scheduler=scheduler,
        unet=UNet2DConditionModel.from_pretrained(folder / "unet"), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
    pipe.save_config(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common_arguments(parser, out="runs/toybox_unet", batch_size=32, lr=8e-4, steps=20_000)
    picture_arguments(parser, captions=True)
    parser.add_argument("--compile", action="store_true", help="torch.compile the UNet: faster on a GPU")
    parser.add_argument("--parts", type=Path, default=PARTS, help="folder with vae, text_encoder and tokenizer "
                        f"(default {PARTS})")  # fmt: skip
    parser.add_argument("--fresh-output", action="store_true", help="with --start-from: begin with a new last layer, "
                        "for a model that predicted eps")  # fmt: skip
    args = parser.parse_args()
    accelerator = new_accelerator(args)
    vae, text_encoder, tokenizer = load_parts(args.parts, accelerator.device)
    channels = vae.config.latent_channels
    unet = UNet2DConditionModel(
        **CONFIG, in_channels=channels, out_channels=channels, cross_attention_dim=text_encoder.config.hidden_size
    )
    if args.start_from:
        unet = UNet2DConditionModel.from_pretrained(args.start_from, torch_dtype=torch.float32)
    if args.fresh_output or not args.start_from:
        torch.nn.init.zeros_(unet.conv_out.weight)
        torch.nn.init.zeros_(unet.conv_out.bias)
    if accelerator.device.type == "cpu":  # torch's fused attention is slow backwards on a CPU at these sizes
        unet.set_attn_processor(AttnProcessor())
    encoder_weights = [*vae.encoder.parameters(), *vae.quant_conv.parameters()]
    encoder = digest(encoder_weights)  # not the decoder's: if it is trained further, the latents stay valid
    about = {"data": data_name(args.images, args.split), "encoder": encoder,
             "text encoder": digest(text_encoder.parameters()), "scaling factor": vae.config.scaling_factor,
             **{name: unet.config[name] for name in CONFIG}}  # fmt: skip
    run = Run(args, unet, accelerator, "training/toybox_unet.py", about)
    with accelerator.main_process_first():
        pictures = f"v{RENDERER_VERSION}-{args.split}-{args.images}"
        path = args.out / f"latents-{pictures}-{encoder}-{vae.config.scaling_factor}.pt"
        latents = kept(path, lambda: scaled_latents(vae, sets.pair_images(args.images, args.split))).to(run.device)
    network = torch.compile(run.net) if args.compile else run.net
    batches, noise_schedule = captioned(run, tokenizer, drop=0.1), schedule.scaled_linear(spacing="trailing")

    def batch_loss(generator: torch.Generator) -> Tensor:
        rows, ids = next(batches)
        features = text_encoder(ids).last_hidden_state  # frozen, so without a gradient
        model = EpsModel(network, noise_schedule)
        z0 = latents[rows].float()
        return simple_loss(lambda zt, t: model(zt, t, features), z0, noise_schedule, generator, weighting="v")

    def on_save(step: int) -> dict:
        path = args.out / f"samples_{step:06d}.png"
        draw(run.ema.model, vae, text_encoder, tokenizer, noise_schedule, path)
        return dict(samples=path.name)

    run.train(batch_loss, on_save)
    if args.ship and accelerator.is_main_process:
        ship(run.ema.model, args.ship / "unet", run, made_by="training/toybox_unet.py", predicts="v")
        write_pipeline(args.ship, args.parts)


if __name__ == "__main__":
    command(main)
