"""A tiny Stable Diffusion with random weights, for tests: the layout of the real one, drawn in milliseconds."""

import runpy
from pathlib import Path
from types import SimpleNamespace

# The real one's published configuration, and what builds networks of any.
FULL_SIZE = SimpleNamespace(
    **runpy.run_path(str(Path(__file__).resolve().parents[1] / "benchmarks" / "sd15_random.py"))
)
TINY = dict(
    text_encoder=dict(vocab_size=len(FULL_SIZE.tokenizer()), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                      num_attention_heads=2, max_position_embeddings=16, bos_token_id=0, eos_token_id=2),
    unet=dict(sample_size=16, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=32,
              attention_head_dim=4, norm_num_groups=8, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
              up_block_types=("UpBlock2D", "CrossAttnUpBlock2D")),
    vae=dict(sample_size=64, block_out_channels=(16, 32, 32), layers_per_block=1, norm_num_groups=8,
             down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3),
)  # fmt: skip


def build(seed: int = 0):
    """The tiny StableDiffusion; each seed is another model."""
    return FULL_SIZE.build(seed, **TINY)
