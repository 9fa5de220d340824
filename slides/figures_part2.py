"""The figures of Part 2: the autoencoder, text by cross-attention, Stable Diffusion."""

import itertools
import json
import math
import textwrap
from dataclasses import replace
from functools import lru_cache

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from board import GREY, STYLE, Board, W, shows, size
from PIL import Image
from recorded import measured_on, record, toybox
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from course_lib.diffusion.ddpm import q_sample
from course_lib.editing.attention import relative_maps, word_maps
from course_lib.editing.inversion import ddim_step
from course_lib.environment import CHECKPOINTS, RESULTS, from_uint8
from course_lib.evaluation import edits, judge, statistics
from course_lib.latent import text
from course_lib.plots import BLACK, BLUE, GREEN, ORANGE, PINK, RED, to_uint8
from course_lib.toybox import sets, world
from course_lib.toybox.captions import describe

STEPS, SCALE = 25, 5.0  # DDIM steps and guidance scale of what is drawn here
MAP_PROMPT = "a photo of a teal cat wearing a red hat on the beach"  # of both figures about attention
MAP_WORDS = ("cat", "hat", "teal", "beach")


# ---- models, pictures and records ----


def steps() -> int:
    return size(STEPS, 2)


@lru_cache
def held_out(count: int) -> Tensor:
    """Renderings that no network was trained on, (count, 3, 64, 64)."""
    return from_uint8(sets.pairs(count, split="test").images)


def drawn_by(*more: str) -> str:
    """Small print of pictures that the shipped model draws here."""
    note = json.loads((CHECKPOINTS / "toybox-sd" / "unet" / "provenance.json").read_text(encoding="utf-8"))
    return " · ".join([*more, f"the shipped Toybox model, its UNet last trained on {note['device']}, {note['date']}"])


def as_colours(z: Tensor) -> Tensor:
    """Three channels of a latent as red, green and blue: (B, C, h, w) to (B, 3, h, w) in [-1, 1]."""
    return (z[:, :3] / 2).clamp(-1, 1)


@lru_cache
def maps_of_words(side: int) -> tuple[Tensor, dict[str, Tensor]]:
    """The picture of MAP_PROMPT, and the attention that each place of the layers of this size gives to each word."""
    return word_maps(toybox(), MAP_PROMPT, side=side, w=SCALE, steps=steps(), seed=1)


def heat(image: Tensor, values: Tensor) -> np.ndarray:
    """A grey picture under a map in colours, from dark blue (least) to yellow (most)."""
    low, high = values.min(), values.max()
    share = F.interpolate(((values - low) / (high - low))[None, None], image.shape[-1], mode="bilinear")[0, 0]
    colours = torch.from_numpy(plt.get_cmap("cividis")(share.numpy())[..., :3]).permute(2, 0, 1).float() * 2 - 1
    return to_uint8(0.35 * image.mean(0, keepdim=True) + 0.65 * colours)[0]


def bar_with_interval(ax, at: float, row: dict, colour: str, width: float, **more) -> None:
    errors = [[row["value"] - row["low"]], [row["high"] - row["value"]]]
    ax.bar([at], [row["value"]], width, color=colour, yerr=errors, error_kw={"capsize": 4, "elinewidth": 2}, **more)


@lru_cache
def multiply_adds() -> tuple[float, float]:
    """Billions of multiply-adds of one evaluation of Stable Diffusion 1.5's UNet: on pixels, and on latents."""
    from diffusers import UNet2DConditionModel

    settings = dict(
        block_out_channels=(320, 640, 1280, 1280), layers_per_block=2, cross_attention_dim=768, attention_head_dim=8,
        down_block_types=["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        up_block_types=["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    )  # fmt: skip
    found = []
    for channels, side in ((3, 512), (4, 64)):
        with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
            unet = UNet2DConditionModel(sample_size=side, in_channels=channels, out_channels=channels, **settings)
            unet(torch.empty(1, channels, side, side), torch.empty(1), encoder_hidden_states=torch.empty(1, 77, 768))
        found.append(counter.get_total_flops() / 2e9)
    return found[0], found[1]


@lru_cache
def judge_of_pictures():
    return judge.load_judge("cpu")


def latents_on_the_way(prompt: str, seed: int) -> list[tuple[int, Tensor]]:
    """(t, z_t) at every step of guided DDIM, noise first."""
    sd = toybox()
    zt, times, eps_model = sd.noise(1, seed=seed), [*sd.schedule.times(steps()), 0], sd.guided(prompt, SCALE)
    path = [(times[0], zt)]
    with torch.no_grad():
        for t, s in itertools.pairwise(times):
            zt = ddim_step(zt, eps_model(zt, t), t, s, sd.schedule)
            path.append((s, zt))
    return path


# ---- the figures, in the order of the deck ----


@shows(weights=("toybox-sd",))
def prompt_to_picture():
    """Two prompts: five latents from noise on, and the picture that the decoder makes of the last."""
    sd, board, side, count = toybox(), Board(3.75), 1.32, 5
    prompts = ("“a photo of a\ngreen owl at night”", "“a watercolour of a red\nboat under water”")
    for r, prompt in enumerate(prompts):
        y = 0.5 + r * (side + 0.1)
        path = latents_on_the_way(prompt.strip("“”").replace("\n", " "), seed=r)
        board.text(0.05, y + side / 2, prompt, 18, ha="left")
        for i in range(count):
            z = path[round(i * (len(path) - 1) / (count - 1))][1]
            board.tile(3.2 + i * (side + 0.06), y, side, as_colours(z))
        board.arrow((10.15, y + side / 2), (10.95, y + side / 2), GREEN, 4)
        with torch.no_grad():
            board.tile(11.03, y, side, sd.decode(path[-1][1]))
    board.text(0.05, 0.22, "prompt", 18, BLUE, ha="left")
    board.text(6.6, 0.22, "latents, from noise to content", 18, ORANGE)
    board.text(W - 0.03, 0.22, "decoder, then picture", 18, GREEN, ha="right")
    board.small(drawn_by(f"the first seeds, {steps()} DDIM steps, w = {SCALE:g}; three of twelve channels as colours"))
    return board.fig


@shows()
def keep_few_numbers():
    """A picture kept with fewer and fewer numbers of each block of 4 x 4 pixels, by principal components."""
    train = from_uint8(sets.pairs(size(1000, 50)).images)
    test = held_out(size(256, 20))

    def to_blocks(images: Tensor) -> Tensor:
        return F.pixel_unshuffle(images, 4).permute(0, 2, 3, 1)  # (B, 16, 16, 48)

    blocks = to_blocks(train).reshape(-1, 48)
    mean, directions = blocks.mean(0), torch.linalg.eigh(blocks.T.cov())[1].flip(1)

    def kept(images: Tensor, k: int) -> Tensor:
        z = (to_blocks(images) - mean) @ directions[:, :k]
        return F.pixel_shuffle((z @ directions[:, :k].T + mean).permute(0, 3, 1, 2), 4)

    board, side, shown = Board(4.8), 1.72, test[[2, 14]]
    columns = [("given", "12,288 numbers", shown)]
    for k in (12, 4):
        psnr = edits.psnr(kept(test, k), test).mean()
        columns.append((f"{k} of 48", f"{256 * k:,} numbers\n{psnr:.0f} dB", kept(shown, k)))
    columns.append(("lost at 12", "four times stronger", 4 * (shown - kept(shown, 12))))
    for i, (title, words, images) in enumerate(columns):
        x = 0.1 + i * 1.95
        board.text(x + side / 2, 0.22, title, 19, RED if i == 3 else BLACK)
        for r in range(2):
            board.tile(x, 0.45 + r * 1.79, side, images[r : r + 1])
        board.text(x + side / 2, 4.27, words, 15, GREY)
    pixels, latents = multiply_adds()
    big = 2.5
    small = big / math.sqrt(pixels / latents)
    board.text(10.2, 0.4, "multiply-adds of a step of\nStable Diffusion 1.5's UNet", 16)
    board.ax.add_patch(plt.Rectangle((8.1, 0.8), big, big, facecolor=BLUE + "44", edgecolor=BLUE, linewidth=3))
    board.text(8.1 + big / 2, 2.05, f"on pixels:\n{pixels:,.0f}\nbillion", 17)
    board.ax.add_patch(plt.Rectangle((11.5, 3.3 - small), small, small, facecolor=RED, edgecolor=RED))
    board.text(11.55, 2.4, f"on latents:\n{latents:,.0f}\nbillion", 17, RED)
    board.text(10.2, 3.85, f"{pixels / latents:,.0f} times fewer", 22, RED)
    board.small(f"Blocks of 4×4 pixels, principal components of {len(train):,} pictures; dB: mean peak signal-to-noise "
                f"ratio on {len(test)} held-out pictures. Right: counted, as areas")  # fmt: skip
    return board.fig


@shows(weights=("toybox-sd",))
def autoencoder():
    """A picture, its latent, and the picture again; what each is made of."""
    sd, board = toybox(), Board(4.4)
    x = held_out(24)[14:15]
    with torch.no_grad():
        z = sd.encode_image(x)
        again = sd.decode(z)
    board.tile(0.1, 0.75, 2.7, x)
    board.text(1.45, 0.4, "picture  $x$", 20)
    board.text(1.45, 3.75, "3 × 64 × 64", 17, GREY)
    board.arrow((2.88, 2.1), (3.2, 2.1))
    board.box(3.25, 1.4, 1.45, 1.4, "encoder\n$E$", BLUE, 19)
    board.arrow((4.75, 2.1), (5.05, 2.1))
    for c in range(12):
        side = 0.72
        channel = (z[:, c : c + 1] / (2.5 * z[:, c].std())).clamp(-1, 1)
        board.tile(5.1 + c % 3 * (side + 0.05), 0.6 + c // 3 * (side + 0.05), side, channel)
    board.text(6.23, 0.3, "latent  $z$", 20, ORANGE)
    board.text(6.23, 4.02, "12 × 16 × 16:\na quarter of the numbers", 16, GREY)
    board.arrow((7.45, 2.1), (7.75, 2.1))
    board.box(7.8, 1.4, 1.5, 1.4, "decoder\n$D$", GREEN, 19)
    board.arrow((9.35, 2.1), (9.6, 2.1))
    board.tile(9.65, 0.75, 2.7, again)
    board.text(11.0, 0.4, r"again  $D(E(x))$", 20)
    psnr = edits.psnr(again, x).item()
    board.text(11.0, 3.75, f"this copy: {psnr:.0f} dB", 17, GREY)
    return board.fig


@shows(weights=("toybox-sd", "toybox-judge"))
def lost_in_copies():
    """Held-out pictures, their copies, and what differs; and how often the judge reads attributes off both."""
    sd, board, side, columns, left = toybox(), Board(5.1), 1.36, 4, 1.25
    found = sets.pairs(size(256, 12), split="test")
    x = from_uint8(found.images)
    with torch.no_grad():
        again = torch.cat([sd.decode(sd.encode_image(part)) for part in x.split(32)])
    middle = (slice(0, columns), slice(None), slice(16, 48), slice(16, 48))
    for r, (words, images) in enumerate((("picture", x[middle]), ("copy", again[middle]),
                                         ("lost,\n× 4", 4 * (x - again)[middle]))):  # fmt: skip
        y = 0.4 + r * (side + 0.05)
        board.text(left - 0.15, y + side / 2, words, 18, RED if r == 2 else BLACK, ha="right")
        for i in range(columns):
            board.tile(left + i * (side + 0.05), y, side, images[i : i + 1])
    board.text(left + 2 * (side + 0.05), 0.2, "the middle of four pictures", 16, GREY)
    names, drawn = ("noun", "colour", "accessory", "pattern"), record("toybox_sd")["w"]["3.0"]
    right = [judge.correct(judge.answers(judge_of_pictures(), images)[0], found.specs) for images in (x, again)]
    ax = board.fig.add_axes((0.635, 0.215, 0.36, 0.64))
    for k, name in enumerate(names):
        rows = [vars(statistics.share(one[name].float())) for one in right] + [drawn[name]]
        for shift, colour, words, row in zip((-0.27, 0, 0.27), (GREY, GREEN, BLUE),
                                             ("pictures", "copies", "drawn from prompts"), rows):  # fmt: skip
            bar_with_interval(ax, k + shift, row, colour, 0.26, label=words if not k else None)
    ax.set_xticks(range(len(names)), names, fontsize=15)
    ax.set(ylim=(0, 1.05), ylabel="share read right")
    board.fig.legend(*ax.get_legend_handles_labels(), loc="upper right", bbox_to_anchor=(1.0, 0.985), ncols=3,
                     fontsize=14, columnspacing=1, handlelength=1)  # fmt: skip
    psnr = edits.psnr(again, x).mean()
    board.small(f"Held-out pictures, the first four · right: the judge on {len(x)} pictures and their copies "
                f"({psnr:.0f} dB on average), computed for this figure; and on {record('toybox_sd')['prompts']:,} "
                f"prompts drawn at w = 3, {measured_on('toybox_sd')}; 95 % intervals")  # fmt: skip
    return board.fig


@shows(weights=("toybox-sd",))
def size_of_latents():
    """One latent and one noise at three spreads of the latents: what is left of the picture at six times."""
    sd, board, side = toybox(), Board(4.75), 1.3
    sizes, times = (0.2, 1.0, 5.49), (1, 200, 400, 600, 800, 1000)
    z0 = sd.encode_image(held_out(24)[14:15])
    eps = sd.noise(1, seed=7)
    for i, t in enumerate(times):
        board.text(2.6 + i * 1.65 + side / 2, 0.2, f"t = {t}", 17)
    for r, a in enumerate(sizes):
        y = 0.42 + r * (side + 0.07)
        words = (f"spread {a:g}", "too small", RED) if a < 1 else (f"spread {a:g}", "as trained", GREEN)
        words = (f"spread {a:g}", "too large", RED) if a > 1 else words
        board.text(0.05, y + side / 2 - 0.18, words[0], 19, ha="left")
        board.text(0.05, y + side / 2 + 0.2, words[1], 17, words[2], ha="left")
        for i, t in enumerate(times):
            keep = sd.schedule.alpha_bar[t].item()
            zt = q_sample(a * z0, t, eps, sd.schedule)
            with torch.no_grad():  # as much of the noise removed as one factor can
                board.tile(2.6 + i * 1.65, y, side, sd.decode(zt * keep**0.5 * a / (keep * a**2 + 1 - keep)))
    board.small("The same picture and noise. Noise removed as far as one factor can, then decoded. "
                "5.49: latents of Stable Diffusion 1 without its factor 0.18215")  # fmt: skip
    return board.fig


@shows(weights=("toybox-sd",))
def latent_process():
    """Sampling on latents: z_t at six times, and what the decoder makes of each."""
    sd, board, side, count = toybox(), Board(4.35), 1.62, 7
    path = latents_on_the_way("a photo of a red cat on the beach", seed=4)
    with torch.no_grad():
        shown = [path[round(i * (len(path) - 1) / (count - 1))] for i in range(count)]
        pictures = [sd.decode(z) for _, z in shown]
    board.text(0.6, 0.45 + side / 2, "$z_t$", 26, ORANGE)
    board.text(0.6, 0.45 + 1.5 * side + 0.12, "$D(z_t)$", 22, GREEN)
    for i, ((t, z), picture) in enumerate(zip(shown, pictures)):
        x = 1.2 + i * (side - 0.02)
        board.text(x + 0.76, 0.2, f"t = {t}", 16)
        board.tile(x, 0.42, 1.52, as_colours(z))
        board.tile(x, 0.42 + side, 1.52, picture)
    board.text(1.2, 3.82, "three of the twelve channels as red, green, blue; only the last column is ever decoded", 15,
               GREY, ha="left")  # fmt: skip
    board.small(drawn_by(f"“a photo of a red cat on the beach”, {steps()} DDIM steps, w = {SCALE:g}"))
    return board.fig


@shows(weights=("toybox-sd",))
def tokens_and_rows():
    """A sentence: its tokens, their numbers, their rows, and which rows change if one word does."""
    sd, board = toybox(), Board(5.1)
    one, other = "a teal cat in the snow", "a red cat in the snow"
    ids = text.tokenize(sd.tokenizer, one)[0].tolist()
    rows, changed = sd.encode_prompt([one, other])
    change = (rows - changed).norm(dim=-1) / rows.norm(dim=-1)
    words = ["start", *one.split(), "end"]
    shown, left, step = [*range(len(words) + 2), len(ids) - 1], 2.3, 0.87
    for y, name in ((0.72, "tokens"), (1.3, "their numbers"), (2.35, "a row of 128\nnumbers each"),
                    (3.72, "changes if “teal”\nbecomes “red”")):  # fmt: skip
        board.text(0.05, y, name, 17, RED if y > 3 else BLACK, ha="left")
    for k, position in enumerate(shown):
        x = left + k * step + (0.4 if k == len(shown) - 1 else 0)
        padding = position >= len(words)
        name = "end" if padding else words[position]
        board.box(x, 0.47, step - 0.08, 0.5, name, GREY if padding or name in ("start", "end") else BLUE, 15)
        board.text(x + (step - 0.08) / 2, 1.3, str(ids[position]), 16, GREY)
        board.ax.imshow(rows[position].reshape(16, 8), cmap="cividis", vmin=-2, vmax=2, aspect="auto",
                        extent=(x + 0.12, x + step - 0.2, 3.05, 1.65), interpolation="nearest")  # fmt: skip
        board.ax.add_patch(plt.Rectangle((x + 0.12, 4.2 - 0.75 * change[position].item()), step - 0.32,
                                         0.75 * change[position].item(), color=RED))  # fmt: skip
        board.ax.plot([x + 0.08, x + step - 0.16], [4.2, 4.2], color=BLACK, linewidth=1.5)
    dots = left + (len(shown) - 1) * step + 0.15
    for y in (0.72, 2.35):
        board.text(dots, y, "…", 22, GREY)
    first = left + len(words) * step
    board.ax.plot([first, W - 0.1], [0.3, 0.3], color=GREY, linewidth=2)
    board.text((first + W) / 2, 0.14, f"padding: {len(ids)} rows in all", 14, GREY)
    pieces = [piece.removesuffix("</w>") for piece in sd.tokenizer.tokenize("giraffe")]
    board.text(0.05, 4.6, f"An unknown word falls into pieces: “giraffe” is  {'  ·  '.join(pieces)}", 17, ha="left")
    board.small(f"The shipped Toybox model: {len(sd.tokenizer)} tokens; change: length of the difference over the "
                "length of the row")  # fmt: skip
    return board.fig


@shows(weights=("toybox-sd",))
def similarity():
    """CLIP: the dot product of each of six held-out pictures with each of their captions."""
    from transformers import CLIPModel

    clip = CLIPModel.from_pretrained(CHECKPOINTS / "toybox-sd" / "clip").float().eval()
    found = sets.pairs(size(256, 24), split="test")
    captions = [describe(spec) for spec in found.specs]
    with torch.no_grad():
        x, ids = from_uint8(found.images), text.tokenize(toybox().tokenizer, captions)
        u = clip.visual_projection(clip.vision_model(pixel_values=x).pooler_output)
        v = clip.text_projection(clip.text_model(input_ids=ids).pooler_output)
    u, v = F.normalize(u, dim=-1), F.normalize(v, dim=-1)
    nouns = [spec.noun for spec in found.specs]
    chosen = [nouns.index(noun) for noun in dict.fromkeys(nouns)][:6]  # six pictures, six nouns
    board, left, wide, high, top = Board(5.0), 4.3, 1.34, 0.54, 1.25
    for i, k in enumerate(chosen):
        board.tile(left + i * wide + 0.12, 0.05, 1.1, x[k : k + 1])
        words = "\n".join(textwrap.wrap(captions[k].removeprefix("a photo of "), 40))
        board.text(left - 0.15, top + (i + 0.5) * high, words, 14, ha="right")
        for j, other in enumerate(chosen):
            value = round((u[other] @ v[k]).item(), 2) + 0.0  # not -0.00
            colour = plt.get_cmap("cividis")((value + 1) / 2)
            board.ax.add_patch(plt.Rectangle((left + j * wide + 0.03, top + i * high + 0.03), wide - 0.06, high - 0.06,
                                             facecolor=colour))  # fmt: skip
            board.text(left + (j + 0.5) * wide, top + (i + 0.5) * high, f"{value:.2f}", 19 if i == j else 15,
                       "white" if value < 0.3 else BLACK)  # fmt: skip
    first = statistics.share(((u @ v.T).argmax(1) == torch.arange(len(u))).float())
    board.text(left - 0.15, 0.6, "sentence against picture:\ndot product", 17, GREY, ha="right")
    board.small(f"The shipped Toybox CLIP; held-out pictures, the first of six nouns. Of {len(u)} such pictures "
                f"{first:.2f} fit their own caption best (95 % interval)")  # fmt: skip
    return board.fig


@shows(weights=("toybox-sd",))
def query_key_value():
    """Cross-attention: the latent's places ask, the words answer; one map of a word as it comes out."""
    image, maps = maps_of_words(8)
    board, side, left = Board(5.2), 1.5, 0.3
    board.tile(left, 0.55, side, image)
    for k in range(1, 8):
        board.ax.plot([left + side * k / 8] * 2, [0.55, 0.55 + side], color="white", linewidth=0.8)
        board.ax.plot([left, left + side], [0.55 + side * k / 8] * 2, color="white", linewidth=0.8)
    place = (left + side * 4 / 8, 0.55 + side * 2 / 8)
    board.ax.add_patch(plt.Rectangle(place, side / 8, side / 8, fill=False, edgecolor=ORANGE, linewidth=4))
    board.text(left + side / 2, 0.28, "places of the latent", 15)
    words = ("cat", "wearing", "red", "hat", "beach")
    for k, word in enumerate(words):
        board.text(left + side / 2, 2.9 + 0.36 * k, word, 18, BLUE if word == "hat" else BLACK)
    board.text(left + side / 2, 2.5, "words of the prompt", 15)
    board.box(2.55, 0.85, 1.75, 0.9, "query  $Q$\nof a place", ORANGE, 17)
    board.box(2.55, 2.65, 1.75, 0.8, "keys  $K$", BLUE, 17)
    board.box(2.55, 3.75, 1.75, 0.8, "values  $V$", GREEN, 17)
    board.arrow((1.88, 1.3), (2.48, 1.3))
    board.arrow((1.65, 3.4), (2.48, 3.05))
    board.arrow((1.65, 3.8), (2.48, 4.1))
    board.text(2.17, 1.0, "$W_Q$", 17, ORANGE)
    board.text(2.02, 2.85, "$W_K$", 17, BLUE)
    board.text(2.02, 4.35, "$W_V$", 17, GREEN)
    board.box(5.1, 1.35, 2.1, 1.3, "how well does\n$Q$ match each $K$?\nsoftmax", RED, 16)
    board.arrow((4.38, 1.35), (5.03, 1.75))
    board.arrow((4.38, 2.95), (5.03, 2.35))
    board.ax.add_patch(plt.Rectangle((7.6, 0.5), 1.95, 2.75, fill=False, edgecolor=GREY, linewidth=1.5))
    board.arrow((7.22, 1.95), (7.55, 1.95))
    shares = {word: maps[word][0, 2, 4].item() for word in words}
    for k, word in enumerate(words):
        y = 0.95 + 0.46 * k
        board.text(8.6, y, word, 15, ha="right")
        board.ax.barh(y, 0.75 * shares[word] / max(shares.values()), 0.26, left=8.68, color=RED)
    board.text(8.55, 0.28, "shares at this place", 15, RED)
    board.box(5.1, 3.65, 2.1, 1.0, "mean of the $V$,\nby these shares", GREEN, 16)
    board.arrow((4.38, 4.15), (5.03, 4.15))
    board.arrow((8.3, 3.3), (7.28, 4.0), bend=-0.2)
    board.arrow((7.28, 4.35), (8.35, 4.35))
    board.text(8.45, 4.35, "added to the place", 16, GREY, ha="left")
    board.tile(10.25, 0.75, 2.05, heat(image[0], maps["hat"][0]))
    board.text(11.27, 0.3, "the share of “hat”\nat all places: its map", 14, BLUE)
    board.arrow((9.55, 1.75), (10.18, 1.75))
    board.text(11.27, 3.05, "yellow: most", 15, GREY)
    board.small(f"“{MAP_PROMPT.removeprefix('a photo of ')}”, 8×8 layers, mean of heads, layers and {steps()} steps; "
                f"five of its words shown")  # fmt: skip
    return board.fig


@shows(weights=("toybox-sd",), records=("pointing",))
def word_maps_measured():
    """Maps of four words, and how well such maps find what a word names, over the recorded renderings."""
    image, maps = maps_of_words(8)
    maps = relative_maps(maps)
    found = record("pointing")
    rows = found["t"]["300"]["8"]
    with plt.rc_context(STYLE):
        fig = plt.figure(figsize=(W, 5.0))
        tiles = [("picture", to_uint8(image)[0]), *((word, heat(image[0], maps[word][0])) for word in MAP_WORDS)]
        for k, (name, tile) in enumerate(tiles):
            left, bottom = 0.005 + k % 3 * 0.155, 0.5 - k // 3 * 0.43
            ax = fig.add_axes((left, bottom, 0.145, 0.145 * W / 5.0))
            ax.imshow(tile, interpolation="nearest")
            ax.set_title(name, fontsize=17, loc="center")
            ax.axis("off")
        ax = fig.add_axes((0.585, 0.2, 0.405, 0.68))
        names = ("noun", "accessory", "colour", "scene")
        for k, name in enumerate(names):
            row = rows[name]
            bar_with_interval(ax, k - 0.2, row["area"], BLUE, 0.38, label="its own mask" if not k else None)
            bar_with_interval(ax, k + 0.2, row["shuffled"], GREY, 0.38, label="another picture's" if not k else None)
        ax.axhline(0.5, color=BLACK, linewidth=2, linestyle="--")
        ax.text(2, 0.52, "chance", fontsize=15, ha="center")
        fig.text(0.39, 0.21, "yellow: more\nthan words\nin general", fontsize=16, color=GREY, ha="center", va="center")
        ax.set_xticks(range(4), names)
        ax.set(ylim=(0, 1.02), ylabel="area under the curve")
        ax.set_title("Is the map high where the thing is?", fontsize=17)
        fig.legend(
            *ax.get_legend_handles_labels(), loc="lower right", bbox_to_anchor=(0.995, 0.02), ncols=2, fontsize=15
        )
        fig.text(0.005, 0.004, f"Relative maps. Right: 8×8 layers, t = 300, {found['renderings']} renderings, 95 % "
                 f"intervals, {measured_on('pointing')}", fontsize=11, color=GREY)  # fmt: skip
    return fig


@shows(weights=("toybox-sd",))
def four_parts():
    """Stable Diffusion: text encoder, UNet with its levels and cross-attention, sampler, autoencoder."""
    sd, board = toybox(), Board(5.3)
    config = sd.unet.config
    tokens, width = sd.tokenizer.model_max_length, config.cross_attention_dim
    millions = {part: sum(p.numel() for p in getattr(sd, part).parameters()) / 1e6
                for part in ("text_encoder", "unet", "vae")}  # fmt: skip

    def text_enters(x: float, y: float) -> None:
        board.ax.plot([x], [y], marker="v", markersize=15, color=BLUE)

    board.text(0.1, 0.42, "“a red cat on the beach”", 16, ha="left")
    board.arrow((2.95, 0.42), (3.35, 0.42))
    board.box(3.4, 0.08, 3.3, 0.7, f"1  text encoder, {millions['text_encoder']:.1f} M", BLUE, 17)
    board.arrow((5.05, 0.82), (5.05, 1.2), BLUE)
    board.text(5.3, 0.99, f"features: {tokens} tokens × {width} numbers", 15, BLUE, ha="left")
    board.text(0.85, 1.72, "$z_t$,  time $t$", 16)
    board.tile(0.2, 1.95, 1.3, as_colours(sd.noise(1, seed=4)))
    board.arrow((1.57, 2.5), (2.0, 2.2))
    frame = plt.Rectangle((1.95, 1.22), 7.4, 3.33, fill=False, edgecolor=GREY, linewidth=1.5, linestyle="--")
    board.ax.add_patch(frame)
    for i, (channels, kind) in enumerate(zip(config.block_out_channels, config.down_block_types)):
        y, w, h = 1.4 + 1.05 * i, 1.95, 0.8
        side = config.sample_size // 2**i
        left, right = 2.05 + 0.5 * i, 9.25 - 0.5 * i - w
        crosses = kind.startswith("CrossAttn")
        for x in (left, right):
            board.box(x, y, w, h, f"{side}×{side}, {channels} ch.", ORANGE if crosses else GREY, 15)
            if crosses:
                text_enters(x + 1.6, y)
        if i < len(config.block_out_channels) - 1:
            board.arrow((left + w + 0.08, y + h / 2), (right - 0.08, y + h / 2), GREY, 2.5)
            board.arrow((left + w / 2 + 0.1, y + h + 0.02), (left + w / 2 + 0.4, y + 1.03), BLACK)
            board.arrow((right + w / 2 - 0.4, y + 1.03), (right + w / 2 - 0.1, y + h + 0.02), BLACK)
        else:
            middle = (left + w + right) / 2
            board.box(middle - 0.5, y, 1.0, h, f"{side}×{side}", ORANGE, 15)
            text_enters(middle + 0.3, y)
            board.arrow((left + w + 0.05, y + h / 2), (middle - 0.53, y + h / 2), BLACK, 2)
            board.arrow((middle + 0.53, y + h / 2), (right - 0.05, y + h / 2), BLACK, 2)
    board.text(5.65, 4.8, f"2  UNet, {millions['unet']:.1f} M: predicts the noise in the latent", 17)
    text_enters(3.1, 5.12)
    board.text(3.3, 5.13, "here the text comes in, by cross-attention", 15, BLUE, ha="left")
    board.arrow((9.4, 2.2), (9.8, 2.2))
    board.text(9.9, 2.2, r"$\hat\epsilon$", 24, RED, ha="left")
    board.arrow((10.05, 2.45), (10.05, 2.95))
    board.box(9.5, 3.0, 1.7, 1.0, "3  sampler:\nstep to $z_s$", RED, 15)
    board.arrow((10.35, 4.05), (10.35, 4.6), GREY)
    board.text(10.35, 4.82, "the next $z_t$", 15, GREY)
    board.arrow((11.25, 3.3), (11.6, 2.75))
    board.box(10.8, 1.3, 1.55, 1.4, f"4  decoder\nof the VAE,\n{millions['vae']:.1f} M", GREEN, 15)
    board.arrow((11.6, 1.25), (11.6, 0.85))
    board.text(11.6, 0.6, "picture", 17)
    return board.fig


@shows(weights=("toybox-sd",), records=("toybox_sd",))
def guided_prompts():
    """Three prompts at four guidance scales from one noise; and what the judge reads at each scale."""
    scales, rows = (1.0, 3.0, 5.0, 7.5), record("toybox_sd")["w"]
    prompts = ("a photo of a green owl wearing a red hat at night", "a photo of a blue teapot in the forest",
               "a photo of a purple robot on the moon")  # fmt: skip
    sd, board, side, left = toybox(), Board(4.75), 1.25, 2.0
    noise = sd.noise(1, seed=0).expand(len(prompts), -1, -1, -1)
    for i, w in enumerate(scales):
        images = sd.sample(list(prompts), w=w, steps=steps(), x_T=noise)
        board.text(left + i * (side + 0.06) + side / 2, 0.2, f"w = {w:g}", 18)
        for r in range(len(prompts)):
            board.tile(left + i * (side + 0.06), 0.42 + r * (side + 0.06), side, images[r : r + 1])
    for r, prompt in enumerate(prompts):
        words = textwrap.fill(prompt.removeprefix("a photo of "), 16)
        board.text(left - 0.12, 0.42 + r * (side + 0.06) + side / 2, words, 14, ha="right")
    ax = board.fig.add_axes((0.675, 0.235, 0.225, 0.68))
    for name, colour, marker in (("noun", BLUE, "o"), ("colour", ORANGE, "s"), ("accessory", GREEN, "^")):
        values = [rows[str(w)][name] for w in scales]
        errors = [[v["value"] - v["low"] for v in values], [v["high"] - v["value"] for v in values]]
        ax.errorbar(scales, [v["value"] for v in values], errors, color=colour, marker=marker, markersize=10, capsize=5)
        ax.text(7.95, values[-1]["value"], name, fontsize=16, color=colour, va="center")
    ax.set(xlabel="guidance scale w", ylabel="share read right", xticks=scales, ylim=(0.5, 1.02))
    ax.set_xticklabels([f"{w:g}" for w in scales])
    board.small(f"Left: one noise, {steps()} DDIM steps, not picked. Right: the judge on "
                f"{record('toybox_sd')['prompts']:,} held-out prompts, 95 % intervals, "
                f"{measured_on('toybox_sd')}")  # fmt: skip
    return board.fig


@shows(weights=("toybox-sd", "toybox-judge"))
def negative_prompts():
    """Cats from the same noises without a negative prompt and with two; and how often the unwanted is read."""
    prompt, many, shown = "a photo of a cat", size(32, 4), size(6, 3)
    unwanted = {"in the forest": ("scene", ("in the forest",)),
                "striped spotted checked starry": ("pattern", ("striped", "spotted", "checked", "starry"))}  # fmt: skip
    sd, board, side = toybox(), Board(4.5), 1.22
    noise = sd.noise(many, seed=6)
    pictures = {words: sd.sample(prompt, x_T=noise, w=4.0, steps=size(10, 2), negative=words) for words in
                ("", *unwanted)}  # fmt: skip
    read = {words: judge.answers(judge_of_pictures(), images)[0] for words, images in pictures.items()}

    def chance(words: str, attribute: str, answers: tuple[str, ...]) -> Tensor:
        shares = read[words][attribute].softmax(1)
        return sum(shares[:, judge.ATTRIBUTES[attribute].index(one)] for one in answers)

    board.text(11.05, 0.75, "the judge’s\nprobability of it", 16, GREY)
    for r, (words, images) in enumerate(pictures.items()):
        y = 0.05 + r * (side + 0.1)
        said = "no negative\nprompt" if not words else "not:\n" + words.replace(" checked", "\nchecked")
        board.text(0.05, y + side / 2, said, 17, RED if words else BLACK, ha="left")
        for i in range(shown):
            board.tile(2.05 + i * (side + 0.06), y, side, images[i : i + 1])
        if words:
            before, after = (chance(one, *unwanted[words]) for one in ("", words))
            change = statistics.paired(after, before)
            board.text(11.05, y + side / 2 - 0.2, f"{before.mean():.2f}  →  {after.mean():.2f}", 22, RED)
            board.text(11.05, y + side / 2 + 0.25, f"change {change:+.2f}", 16)
    board.small(drawn_by(f"“{prompt}”, the first {shown} of {many} noises, {size(10, 2)} DDIM steps, w = 4, 95 % "
                         "intervals, computed for this figure"))  # fmt: skip
    return board.fig


@shows(weights=("toybox-sd",))
def draws():
    """What the small model draws, from prompts that it can obey, one noise each."""
    prompts = ("a photo of a red cat on the beach", "a photo of a green teapot in a room",
               "a photo of a blue bus in the city", "a photo of a purple penguin in the snow",
               "a photo of a yellow rocket on the moon", "a pencil sketch of an orange rabbit in the forest",
               "pixel art of a teal house at night", "a photo of a brown bear wearing a red hat in a meadow",
               "a photo of a white mug in the desert", "a watercolour of a black castle in the mountains",
               "a photo of a pink fish under water", "a photo of a green owl on a stage")  # fmt: skip
    sd, board, side = toybox(), Board(5.3), 1.62
    images = sd.sample(list(prompts), w=SCALE, steps=steps(), seed=3, batch=6)
    for k, (prompt, image) in enumerate(zip(prompts, images)):
        x, y = 0.2 + k % 6 * 2.07, 0.05 + k // 6 * 2.55
        board.tile(x, y, side, image[None])
        words = textwrap.fill(prompt.removeprefix("a photo of "), 18)
        board.ax.text(x + side / 2, y + side + 0.07, words, fontsize=14, ha="center", va="top", linespacing=1.05)
    board.small(drawn_by(f"{steps()} DDIM steps, w = {SCALE:g}, one noise each, not picked"))
    return board.fig


@shows(weights=("toybox-sd",), records=("toybox_sd",))
def fails():
    """What the judge reads off drawn pictures and off renderings; beside it three prompts that fail."""
    best, real, pairs = record("toybox_sd")["w"]["3.0"], record("toybox_sd")["real"], record("toybox_sd")["pairs"]
    next_to = pairs["next to"]
    names = ("scene", "noun", "colour", "accessory", "pattern")
    rows = [(name, best[name], real[name]) for name in names]
    rows.append(("two nouns,\n“next to”", next_to["drawn"]["both nouns"], next_to["real"]["both nouns"]))
    prompts = ("a photo of a blue starry mug in a room", "a photo of a red cat next to a blue chair in the snow",
               "a photo of a purple giraffe in the desert")  # fmt: skip
    images = toybox().sample([p for p in prompts for _ in range(2)], w=3.0, steps=steps(), seed=6, batch=6)
    with plt.rc_context(STYLE):
        fig = plt.figure(figsize=(W, 5.2))
        ax = fig.add_axes((0.075, 0.24, 0.53, 0.66))
        for k, (_, drawn, known) in enumerate(rows):
            bar_with_interval(ax, k - 0.2, drawn, BLUE, 0.38, label="drawn by the model" if not k else None)
            bar_with_interval(ax, k + 0.2, known, GREY, 0.38, label="rendered" if not k else None)
        ax.set_xticks(range(len(rows)), [name for name, _, _ in rows], fontsize=14)
        ax.set(ylim=(0, 1.05), ylabel="share read right")
        fig.legend(*ax.get_legend_handles_labels(), loc="upper left", bbox_to_anchor=(0.07, 1.0), ncols=2, fontsize=15)
        side = 0.1
        asked = (
            "“blue starry mug”:\nno stars",
            "“red cat next to\na blue chair”:\nthey mix",
            "“purple giraffe”:\nan unknown word",
        )
        for k in range(len(prompts)):
            y = 0.71 - k * 0.295
            for i in range(2):
                tile = fig.add_axes((0.625 + i * (side + 0.005), y, side, side * W / 5.2))
                tile.imshow(to_uint8(images[2 * k + i])[0], interpolation="nearest")
                tile.axis("off")
            fig.text(0.845, y + side * W / 10.4, asked[k], fontsize=14, va="center")
        small_print_at(fig, f"Left: the judge on {record('toybox_sd')['prompts']:,} prompts, “next to”: "
                       f"{next_to['drawn']['both nouns']['n']}; w = 3, 95 % intervals, {measured_on('toybox_sd')}. "
                       f"Right: two noises each, w = 3, drawn for this figure")  # fmt: skip
    return fig


def small_print_at(fig, words: str) -> None:
    """Small print of a figure whose axes were placed by hand."""
    fig.text(0.005, 0.006, "\n".join(textwrap.wrap(words, 150)), fontsize=11, color=GREY, va="bottom")


@shows(records=("spaces",))
def cost_of_spaces():
    """C4: the Fréchet distance over the seconds of training in four spaces, and what each draws at the end."""
    found = record("spaces")
    spaces = {"pixels": (BLUE, "o", "-"), "folded by 2": (GREEN, "s", "--"), "folded by 4": (PINK, "^", ":"),
              "latents": (RED, "D", "-")}  # fmt: skip
    sheet = np.array(Image.open(RESULTS / "spaces_samples.png").convert("RGB"))
    tiles = {name: sheet[64 * r : 64 * (r + 1)] for r, name in enumerate(("real", "real, decoded", *spaces))}
    with plt.rc_context(STYLE):
        fig = plt.figure(figsize=(W, 5.0))
        ax = fig.add_axes((0.075, 0.235, 0.4, 0.665))
        run = next(iter(found["runs"].values()))
        for name, (colour, marker, line) in spaces.items():
            rows = run[name]
            seconds, values = [r["seconds"] for r in rows], [r["distance"]["value"] for r in rows]
            errors = [[r["distance"]["value"] - r["distance"]["low"] for r in rows],
                      [r["distance"]["high"] - r["distance"]["value"] for r in rows]]  # fmt: skip
            ax.errorbar(seconds, values, errors, color=colour, marker=marker, linestyle=line, markersize=10, capsize=4,
                        label=name)  # fmt: skip
        ax.axhline(found["scale"]["real"]["distance"]["value"], color=BLACK, linewidth=2, linestyle="-.")
        ticks = [60 * found["minutes"] * part for part in (0.125, 0.25, 0.5, 1)]
        ax.text(ticks[0], found["scale"]["real"]["distance"]["value"] + 6, "real pictures", fontsize=14)
        ax.set_xscale("log", base=2)
        ax.set(ylim=(0, None), xticks=ticks, xticklabels=[f"{t:g}" for t in ticks])
        ax.set(xlabel="CPU seconds of training", ylabel="distance to real pictures")
        seconds = {name: [r["seconds"] / r["steps"] for rr in found["runs"].values() for r in rr[name][-1:]]
                   for name in spaces}  # fmt: skip
        fig.text(0.51, 0.945, f"after {found['minutes']:g} minutes", fontsize=18)
        fig.text(0.998, 0.945, "a step, seconds", fontsize=16, ha="right")
        side = 0.067
        for r, name in enumerate(("real", *spaces)):
            y = 0.75 - r * 0.16
            colour = spaces[name][0] if name in spaces else BLACK
            fig.text(0.615, y + side * W / 10, name, fontsize=17, color=colour, ha="right", va="center")
            for i in range(4):
                tile = fig.add_axes((0.625 + i * 0.0705, y, side, side * W / 5.0))
                tile.imshow(tiles[name][:, 64 * i : 64 * (i + 1)], interpolation="nearest", aspect="auto")
                tile.axis("off")
            if name in spaces:
                mean = sum(seconds[name]) / len(seconds[name])
                fig.text(0.985, y + side * W / 10, f"{mean:.2f}", fontsize=20, color=colour, ha="right", va="center")
        small_print_at(fig, f"The same small UNet trained for the same time in each space, batches of "
                       f"{found['batch_size']}; left one of {len(found['runs'])} trainings, {found['count']} samples, "
                       f"95 % intervals; right the mean of both; {measured_on('spaces')}")  # fmt: skip
    return fig


@shows()
def what_next_part2():
    """What Part 3 does: an embedding of a picture, its variations, and one thing changed. Drawn by the renderer."""
    board, side = Board(3.9), 1.8
    spec = world.Spec("cat", "teal", "striped", "in a meadow", 0.5, 0.57, 0.7, False, 11)
    panels = (("another picture of the same content", BLUE, (replace(spec, x=0.35, size=0.55),
               replace(spec, x=0.6, flip=True)), "an embedding keeps what is shown,\nand not where"),
              ("this picture with one thing changed", GREEN, (replace(spec, colour="orange"),
               replace(spec, scene="at night")), "“… an orange striped cat …”,\n“… at night”"))  # fmt: skip
    board.tile(0.1, 0.85, side, world.render(spec, 160), frame=GREY)
    board.text(0.1 + side / 2, 0.45, "given", 18)
    for k, (words, colour, specs, below) in enumerate(panels):
        x = 3.15 + k * 4.95
        board.text(x + side + 0.1, 0.45, words, 18, colour)
        board.ax.plot([x - 0.6] * 2, [0.3, 3.4], color=GREY, linewidth=1.5)
        for i, one in enumerate(specs):
            board.tile(x + i * (side + 0.2), 0.85, side, world.render(one, 160))
        board.text(x + side + 0.1, 3.1, below, 16)
    board.small("The tasks, not results: every picture here is drawn by the Toybox renderer of this course.")
    return board.fig
