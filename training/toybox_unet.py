"""Train the text-conditioned UNet of the Toybox Stable Diffusion on cached latents, with 10 % dropped captions.

    python training/toybox_unet.py --minutes 90
    python training/toybox_unet.py --start-from data/checkpoints/toybox-sd/unet --minutes 90     # go on

Needs the autoencoder and the text encoder in --parts. The network is diffusers' UNet2DConditionModel with Stable
Diffusion 1's layer names and noise schedule; it predicts v, as Stable Diffusion 2's does. The loss is notebook 01's.
Latents are encoded once and kept in a file; a picture gets a new caption each time it is seen.
On a GPU, add --compile --workers 8 --precision bf16 and a larger batch.
It can be stopped at any time (Ctrl-C, kill -9): the same command goes on from the last save.
"""

import argparse
import hashlib
import os
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from PIL import Image
from run import Run, common_arguments, ship
from torch import Tensor
from tqdm import tqdm
from transformers import CLIPTextModel, CLIPTokenizer

from course_lib.diffusion import guidance, samplers, schedule
from course_lib.diffusion.ddpm import simple_loss
from course_lib.environment import on_cpu
from course_lib.plots import montage
from course_lib.toybox import sets

PARTS = Path("data/checkpoints/toybox-sd")
CONFIG = dict(
    sample_size=16, block_out_channels=(64, 128, 256), layers_per_block=1,
    down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    attention_head_dim=4, norm_num_groups=8,  # diffusers' name is misleading: 4 is the number of heads
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
    """The UNet as (zt, t, features) -> eps_hat, t in 1..T: eps_hat = sqrt(1 - alpha_bar) z_t + sqrt(alpha_bar) v_hat.

    The network predicts v (Salimans & Ho 2022, appendix D). Of a network that predicts eps, the loss below would pull
    1 / sqrt(alpha_bar) times as hard at large t: 15 times at t = T, where there is least to learn about shapes.
    """

    def __init__(self, unet: UNet2DConditionModel, noise_schedule: schedule.Schedule):
        super().__init__()
        self.unet, self.noise_schedule = unet, noise_schedule

    def forward(self, zt: Tensor, t: Tensor, features: Tensor) -> Tensor:
        alpha_bar = self.noise_schedule.at(t, zt)
        v_hat = self.unet(zt, t - 1, features).sample
        return (1 - alpha_bar).sqrt() * zt + alpha_bar.sqrt() * v_hat


def load_parts(folder: Path, device: torch.device) -> tuple[AutoencoderKL, CLIPTextModel, CLIPTokenizer]:
    """The frozen parts, in float32."""
    for part in ("vae", "text_encoder", "tokenizer"):
        if not (folder / part).is_dir():
            raise SystemExit(f"--parts: expected {folder / part}; train it first (`make train-toybox` does all stages)")
    vae = AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=torch.float32)
    text_encoder = CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32)
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    return vae.eval().requires_grad_(False).to(device), text_encoder.eval().requires_grad_(False).to(device), tokenizer


@torch.no_grad()
def cached_latents(vae: AutoencoderKL, images, path: Path) -> Tensor:
    """Scaled latents (N, C, h, w) in float16 of all pictures, encoded once and kept in a file."""
    if path.is_file():
        latents = torch.load(path, weights_only=True)
        if len(latents) >= len(images):
            return latents[: len(images)]
    parts = []
    for k in tqdm(range(0, len(images), 200), desc="encode", unit="batch"):
        x = torch.as_tensor(images[k : k + 200]).to(vae.device).permute(0, 3, 1, 2).float() / 127.5 - 1
        parts.append((vae.encode(x).latent_dist.mean * vae.config.scaling_factor).half().cpu())
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(torch.cat(parts), path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)
    return torch.cat(parts)


def text_features(prompts: list[str], text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer) -> Tensor:
    """(B, L, D): every prompt padded to the full length, as the pipeline does it."""
    ids = tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    with torch.no_grad():
        return text_encoder(ids.to(text_encoder.device)).last_hidden_state


@torch.no_grad()
def draw(unet, vae, text_encoder, tokenizer, noise_schedule, path: Path, w: float = 5.0, steps: int = 20) -> None:
    """The same prompts and noises each time: the run in pictures."""
    both = text_features([""] * len(PROMPTS) + list(PROMPTS), text_encoder, tokenizer)

    model = EpsModel(unet, noise_schedule)

    def eps_model(zt: Tensor, t: int) -> Tensor:
        times = torch.full((2 * len(zt),), t, device=zt.device)
        eps_uncond, eps_cond = model(torch.cat([zt, zt]), times, both).chunk(2)
        return guidance.combine(eps_uncond, eps_cond, w)

    z_T = torch.randn(len(PROMPTS), unet.config.in_channels, 16, 16, generator=torch.Generator().manual_seed(1)).to(
        unet.device
    )
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
    parser.add_argument("--parts", type=Path, default=PARTS, help="folder with vae, text_encoder and tokenizer")
    parser.add_argument(
        "--fresh-output", action="store_true", help="with --start-from: a new last layer: those weights predicted eps"
    )
    args = parser.parse_args()
    accelerator = Accelerator(mixed_precision=args.precision, cpu=on_cpu())
    torch.manual_seed(args.seed)
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
    if accelerator.device.type == "cpu":
        # torch's fused attention is slow backwards on a CPU at these sizes
        unet.set_attn_processor(AttnProcessor())
    run = Run(args, unet, accelerator)
    with accelerator.main_process_first():
        encoder = vae.state_dict().items()  # the decoder may be trained further: the latents stay valid
        weights = b"".join(v.cpu().numpy().tobytes() for name, v in encoder if name.startswith(("encoder", "quant")))
        key = hashlib.sha256(weights).hexdigest()[:12]
        images = sets.pair_images(args.images)
        latents = cached_latents(vae, images, args.out / f"latents-{key}.pt").to(accelerator.device)
        del images  # only the latents are needed from here on
    captioned = run.captioned(tokenizer, drop=0.1)
    noise_schedule = schedule.scaled_linear(spacing="trailing")

    def batch_loss(generator: torch.Generator) -> Tensor:
        rows, ids = next(captioned)
        with torch.no_grad():
            features = text_encoder(ids).last_hidden_state
        model = EpsModel(run.model, noise_schedule)
        z0 = latents[rows].float()
        draws = torch.Generator(device=z0.device).manual_seed(generator.initial_seed())
        return simple_loss(lambda zt, t: model(zt, t, features), z0, noise_schedule, draws, weighting="v")

    def on_save(step: int) -> dict:
        path = args.out / f"samples_{step:06d}.png"
        draw(run.ema.model, vae, text_encoder, tokenizer, noise_schedule, path)
        return dict(samples=path.name)

    run.train(batch_loss, on_save)
    if args.ship and accelerator.is_main_process:
        ship(run.ema.model, args.ship / "unet", run, made_by="training/toybox_unet.py", predicts="v")
        write_pipeline(args.ship, args.parts)


if __name__ == "__main__":
    main()
