"""Stable Diffusion 1.5 at full size without its weights: random numbers in the published configuration.

    python benchmarks/sd15_random.py              # pictures of 256 pixels, 3 steps: a few minutes, about 6 GB
    python benchmarks/sd15_random.py --size 512   # the size it was made for

The same seed goes through this course's code and through diffusers' StableDiffusionPipeline. Writes what was counted,
timed and compared to data/results/sd15_random.json.
"""

import argparse
import datetime
import json
import resource
import sys
import time
from pathlib import Path

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL, UNet2DConditionModel
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from course_lib.environment import RESULTS, device_name
from course_lib.latent.stable_diffusion import StableDiffusion

# The config.json files of Stable Diffusion 1.5, as far as they differ from the defaults or say how large something is.
TEXT_ENCODER = dict(
    vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
    max_position_embeddings=77, hidden_act="quick_gelu", projection_dim=768, bos_token_id=0, eos_token_id=2,
    pad_token_id=1,
)  # fmt: skip
UNET = dict(
    sample_size=64, in_channels=4, out_channels=4, block_out_channels=(320, 640, 1280, 1280), layers_per_block=2,
    down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    cross_attention_dim=768, attention_head_dim=8, norm_num_groups=32,
)  # fmt: skip
VAE = dict(
    sample_size=512, in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(128, 256, 512, 512),
    layers_per_block=2, down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    norm_num_groups=32, scaling_factor=0.18215,
)  # fmt: skip
PARAMETERS = {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480}


def tokenizer(length: int = 77) -> CLIPTokenizer:
    """A CLIP tokenizer with one token for each letter, and a few merged pairs, so that sub-words occur too."""
    letters = sorted(ByteLevel.alphabet())
    merges = ["c a", "ca t</w>", "o f</w>", "t i", "ti g", "e r</w>", "tig er</w>", "p h", "o t", "ph ot"]
    vocabulary = [*letters, *(letter + "</w>" for letter in letters), *(pair.replace(" ", "") for pair in merges)]
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    ids = {token: number for number, token in enumerate(vocabulary)}
    return CLIPTokenizer(ids, [tuple(pair.split()) for pair in merges], model_max_length=length)


def networks(text_encoder: dict = TEXT_ENCODER, unet: dict = UNET, vae: dict = VAE) -> dict[str, torch.nn.Module]:
    """The three networks with random weights, on the device of the `with torch.device(...)` around the call."""
    return {
        "text_encoder": CLIPTextModel(CLIPTextConfig(**text_encoder)),
        "unet": UNet2DConditionModel(**unet),
        "vae": AutoencoderKL(**vae),
    }


def build(seed: int = 0, device: str = "cpu", **configs: dict) -> StableDiffusion:
    """A StableDiffusion of `networks`; the seed does not touch the CPU's global random numbers."""
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.manual_seed(seed)
        parts = networks(**configs)
    length = parts["text_encoder"].config.max_position_embeddings
    return StableDiffusion(**parts, tokenizer=tokenizer(length), name="random")


@torch.no_grad()
def difference(sd: StableDiffusion, prompt: str = "a photo of a cat", *, w: float = 7.5, steps: int = 2, seed: int = 0,
               size: int | None = None, negative: str = "") -> dict[str, float]:  # fmt: skip
    """Draw one picture here and in sd.to_pipeline(): the seconds of each, and the largest difference in [-1, 1].

    `spread`, the standard deviation of the picture, shows that not two blanks were compared.
    """
    start = time.perf_counter()
    ours = sd.sample(prompt, w=w, steps=steps, negative=negative, x_T=sd.noise(1, seed=seed, size=size))
    middle = time.perf_counter()
    pipe = sd.to_pipeline()
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe(
        prompt, guidance_scale=w, num_inference_steps=steps, negative_prompt=negative, height=size, width=size,
        generator=torch.Generator().manual_seed(seed), output_type="pt",
    ).images  # fmt: skip
    end = time.perf_counter()
    gap = (ours - (2 * theirs - 1)).abs().max().item()
    return {"seconds_ours": middle - start, "seconds_diffusers": end - middle, "max_abs_difference": gap,
            "spread": ours.std().item()}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=256, help="side of the picture in pixels, a multiple of 64")
    parser.add_argument("--steps", type=int, default=2, help="steps; a number that divides 1000")
    parser.add_argument("--out", type=Path, default=RESULTS / "sd15_random.json")
    args = parser.parse_args()

    start = time.perf_counter()
    sd = build()
    counted = {name: sum(p.numel() for p in getattr(sd, name).parameters()) for name in PARAMETERS}
    built = time.perf_counter() - start
    measured = difference(sd, size=args.size, steps=args.steps)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    result = {
        "parameters": counted,
        "published": PARAMETERS,
        "size": args.size,
        "steps": args.steps,
        "seconds_build": round(built, 1),
        **{key: float(f"{value:.3g}") for key, value in measured.items()},
        "peak_memory_gb": round(peak / 1e9, 1),
        "device": device_name(),
        "versions": {m.__name__: m.__version__ for m in (torch, diffusers, transformers)},
        "date": datetime.date.today().isoformat(),
    }
    print(json.dumps(result, indent=2))
    args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
