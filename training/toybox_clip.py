"""Train the tokenizer and a small CLIP: a text tower and an image tower that put a picture near its caption.

    python training/toybox_clip.py --minutes 30

First a byte-pair vocabulary is learnt from 20,000 captions (a word of the Toybox becomes one token, a made-up word
several). Then both towers are trained on rendered pairs with the contrastive loss of notebook 05 (Radford et al.
2021, Figure 3). A picture gets a new caption each time it is seen. The text tower becomes the frozen text encoder of
the Toybox model.
It can be stopped at any time (Ctrl-C, kill -9): the same command goes on from the last save.
"""

import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from command import command, common_arguments, new_accelerator
from run import Run
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from toybox_stage import captioned, data_name, picture_arguments, pictures, ship
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from course_lib.environment import from_uint8
from course_lib.toybox import captions, sets

LENGTH = 32  # tokens of a prompt
SHAPE = dict(hidden_size=128, intermediate_size=512, num_attention_heads=4, projection_dim=128)


def train_tokenizer(count: int = 20_000, vocabulary: int = 1400) -> CLIPTokenizer:
    """A CLIP tokenizer that merges the pairs of letters of the Toybox captions, the most frequent first."""
    bpe = Tokenizer(models.BPE(unk_token="<|endoftext|>", end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Punctuation(),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, end_of_word_suffix="</w>", show_progress=False,
        initial_alphabet=letters, special_tokens=["<|startoftext|>", "<|endoftext|>"],
    )  # fmt: skip
    bpe.train_from_iterator(captions.corpus(count), trainer)
    merges = [tuple(merge) for merge in json.loads(bpe.to_str())["model"]["merges"]]
    # CLIP's order: every byte, every byte at the end of a word, the merges, the special tokens
    order = [*sorted(letters), *[letter + "</w>" for letter in sorted(letters)], *["".join(merge) for merge in merges]]
    order = [*dict.fromkeys(order), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={token: k for k, token in enumerate(order)}, merges=merges, model_max_length=LENGTH,
        pad_token="<|endoftext|>",
    )  # fmt: skip


def clip_config(tokenizer: CLIPTokenizer) -> CLIPConfig:
    """Two small transformers: 3 layers of width 128 for text, 4 for the 64 patches of a 64 x 64 picture."""
    ends = dict(bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id)  # fmt: skip
    text = dict(SHAPE, vocab_size=len(tokenizer), max_position_embeddings=LENGTH, num_hidden_layers=3, **ends)
    vision = dict(SHAPE, image_size=64, patch_size=8, num_hidden_layers=4)
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=SHAPE["projection_dim"])


def contrastive_loss(image_features: Tensor, text_features: Tensor, scale: Tensor) -> Tensor:
    """Cross-entropy of finding a picture's caption among all of the batch, and a caption's picture.

    (B, D) unit vectors.  Source: Radford et al. 2021, Figure 3.
    """
    logits = scale * image_features @ text_features.T
    target = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def features(clip: CLIPModel, x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Unit vectors of pictures (B, 3, 64, 64) and of captions (B, L)."""
    image = clip.visual_projection(clip.vision_model(pixel_values=x).pooler_output)
    text = clip.text_projection(clip.text_model(input_ids=ids).pooler_output)
    return F.normalize(image, dim=-1), F.normalize(text, dim=-1)


def open_in_float32(folder: Path) -> None:
    """Ask for float32 in config.json, as diffusers does for the other parts; transformers would open fp16 as fp16."""
    config = json.loads((folder / "config.json").read_text()) | {"dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


@torch.no_grad()
def retrieval(clip: CLIPModel, x: Tensor, ids: Tensor) -> tuple[float, float]:
    """Share of pictures whose own caption is nearest, and the reverse."""
    image, text = features(clip, x, ids)
    similarity = image @ text.T
    target = torch.arange(len(x), device=x.device)
    right = [(similarity.argmax(1) == target), (similarity.argmax(0) == target)]
    return tuple(round(r.float().mean().item(), 4) for r in right)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common_arguments(parser, out="runs/toybox_clip", batch_size=192, lr=1e-3, steps=4000)
    picture_arguments(parser, captions=True)
    args = parser.parse_args()
    accelerator = new_accelerator(args)
    tokenizer = train_tokenizer()
    clip = CLIPModel(clip_config(tokenizer))
    if args.start_from:
        clip = CLIPModel.from_pretrained(args.start_from, dtype=torch.float32)
    about = {"data": data_name(args.images, args.split), "tokens": len(tokenizer), **SHAPE}
    run = Run(args, clip, accelerator, "training/toybox_clip.py", about)
    images, batches = pictures(args.images, run.device, args.split), captioned(run, tokenizer)
    test = sets.pairs(256, split="test")
    test_x = from_uint8(test.images).to(run.device)
    prompts = [captions.describe(spec) for spec in test.specs]
    test_ids = tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids.to(run.device)

    def batch_loss(generator: torch.Generator) -> Tensor:
        rows, ids = next(batches)
        scale = run.net.logit_scale.exp().clamp(max=100)
        return contrastive_loss(*features(run.net, from_uint8(images[rows]), ids), scale)

    def on_save(step: int) -> dict:
        caption_of, picture_of = retrieval(run.ema.model, test_x, test_ids)
        return dict(caption_of_picture=caption_of, picture_of_caption=picture_of)

    run.train(batch_loss, on_save)
    if args.ship and accelerator.is_main_process:
        clip, folder = run.ema.model, args.ship
        ship(clip, folder / "clip", run, made_by="training/toybox_clip.py", retrieval=on_save(run.step))
        ship(clip.text_model, folder / "text_encoder", run, made_by="training/toybox_clip.py")
        open_in_float32(folder / "text_encoder")
        tokenizer.save_pretrained(folder / "tokenizer")


if __name__ == "__main__":
    command(main)
