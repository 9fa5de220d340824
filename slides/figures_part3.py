"""The figures of Part 3: image embeddings, inversion, image editing, and what editing cannot do."""

import json
import textwrap
from functools import lru_cache

import matplotlib.pyplot as plt
import numpy as np
import torch
from board import GREY, STYLE, Board, W, shows, size
from figures_part2 import bar_with_interval, drawn_by, heat, small_print_at, steps
from PIL import Image
from recorded import measured_on, record, runs, toybox
from torch import Tensor

from course_lib.data.pictures import open_images, to_tensor
from course_lib.editing.attention import AttentionMaps, attention_hook, by_word, relative_maps
from course_lib.editing.gan import gan_inversion, load_gan
from course_lib.editing.inversion import Inverted, invert, null_text_inversion, redraw
from course_lib.editing.plug_and_play import plug_and_play
from course_lib.editing.prompt_to_prompt import Edit, edit
from course_lib.editing.sdedit import sdedit
from course_lib.environment import CHECKPOINTS, REPOSITORY, RESULTS, from_uint8
from course_lib.evaluation import edits, statistics
from course_lib.latent import text
from course_lib.latent.unclip import load_unclip, slerp, text_difference
from course_lib.plots import BLACK, BLUE, GREEN, ORANGE, RED, SKY, to_uint8
from course_lib.toybox import sets, subjects
from course_lib.toybox.world import NOUNS, render, sample_spec

SCALE, EMBEDDED = 5.0, 3.0  # guidance scales: of the shipped model, and of unCLIP's decoder


# ---- models, pictures and records ----


@lru_cache
def unclip():
    return load_unclip(dtype=torch.float32)


def by_unclip(*more: str) -> str:
    """Small print of pictures that the shipped unCLIP draws here."""
    path = CHECKPOINTS / "toybox-unclip" / "decoder" / "provenance.json"
    note = json.loads(path.read_text(encoding="utf-8"))
    return " · ".join([*more, f"the shipped unCLIP, its decoder last trained on {note['device']}, {note['date']}"])


@lru_cache
def alone() -> Tensor:
    """Held-out renderings of one object."""
    found = sets.pairs(24, split="test")
    at = [k for k, spec in enumerate(found.specs) if spec.relation is None and spec.style == "plain"]
    return from_uint8(found.images[at])


@lru_cache
def not_measured() -> tuple[list, Tensor, Tensor]:
    """Four edits that are not among the measured ones: the edits, the given pictures, the right answers."""
    others = edits.true_edits(56, edits.TUNING_SEED)
    batch = [others[k] for k in (42, 44, 45, 48)]
    given, truth, _ = edits.pictures(batch)
    return batch, given, truth


@lru_cache
def inverted() -> list[Inverted]:
    batch, given, _ = not_measured()
    found = invert(toybox(), given, [one.prompts[0] for one in batch], steps=steps(), fixed_point=1)
    return [found[k : k + 1] for k in range(len(batch))]


@lru_cache
def recorded_sheet() -> dict[str, np.ndarray]:
    """Rows of editing_samples.png, cut out: name -> ten tiles (10, h, w, 3). White gaps stand between the tiles."""
    names = ("given", "prompt again, new noise", "prompt again", "SDEdit 0.6", "pinned DDIM + Prompt-to-Prompt",
             "null-text + Prompt-to-Prompt", "Plug-and-Play", "right answer")  # fmt: skip
    sheet = np.array(Image.open(RESULTS / "editing_samples.png").convert("RGB"))
    grey = sheet.min(2)
    beside = runs((grey[: sheet.shape[0] * 9 // 10] < 250).mean(0) > 0.5, 60)  # columns of tiles
    below = runs((grey[:, beside[0][0] :] < 250).mean(1) > 0.6, 60)
    if (len(beside), len(below)) != (10, len(names)):
        raise ValueError(f"editing_samples.png: expected 10 by {len(names)} tiles, found {len(beside)}, {len(below)}")
    side = min(b - a for a, b in beside + below)
    return {name: np.stack([sheet[y : y + side, x : x + side] for x, _ in beside])
            for name, (y, _) in zip(names, below, strict=True)}  # fmt: skip


def scores_of(method: str) -> dict[str, Tensor]:
    """All recorded scores of an editing method, (edits,), nan where a score does not apply."""
    parts = record("editing")["methods"][method].values()
    return {name: torch.tensor([float("nan") if v is None else v for part in parts for v in part[name]])
            for name in ("obeyed", "kept", "structure")}  # fmt: skip


def of_unclip(part: str, score: str) -> statistics.Estimate:
    return statistics.mean([v for row in record("unclip")["parts"][part].values() for v in row[score]])


def row_of(estimate) -> dict:
    return {"value": estimate.value, "low": estimate.low, "high": estimate.high}


def with_label(
    board: Board, x: float, y: float, side: float, image, words: str, colour: str = BLACK, points=15
) -> None:
    board.tile(x, y, side, image)
    board.text(x + side / 2, y - 0.2, words, points, colour)


# ---- the figures, in the order of the deck ----


@shows(weights=("toybox-sd",))
def title_part3():
    """The first measured picture, and three edits of it by Plug-and-Play: one word of its prompt changed each time."""
    sd, board, side = toybox(), Board(3.5), 2.35
    (one,) = edits.true_edits(1)
    given, old = edits.pictures([one])[0], one.prompts[0]
    start = invert(sd, given, old, steps=steps(), fixed_point=1)
    changes = (("white", "yellow", BLUE), ("bus", "car", GREEN), ("photo", "pencil sketch", RED))
    board.tile(0.05, 0.45, side, given)
    board.text(0.05 + side / 2, 0.2, "given", 19)
    for k, (before, after, colour) in enumerate(changes):
        x = 3.7 + k * (side + 0.6)
        board.tile(x, 0.45, side, plug_and_play(sd, start, old.replace(before, after), w=SCALE))
        board.text(x + side / 2, 0.2, f"“{before}” → “{after}”", 17, colour)
    board.arrow((0.15 + side, 0.45 + side / 2), (3.6, 0.45 + side / 2), GREY)
    board.text(0.05, 3.02, f"“{old}”", 16, GREY, ha="left")
    board.small(drawn_by(f"the first of the measured pictures; Plug-and-Play, {steps()} steps, w = {SCALE:g}"))
    return board.fig


@shows(weights=("toybox-unclip",))
def unclip_parts():
    """unCLIP: CLIP puts texts and pictures into one space; a prior makes an image embedding, a decoder draws it."""
    model, board = unclip(), Board(4.6)
    prompt = "a photo of a red cat on the beach"
    z = model.imagine([prompt], seed=1)
    drawn = model.draw(z, w=EMBEDDED, steps=steps(), seed=3)
    board.text(0.15, 1.25, "“a red cat\non the beach”", 17, ha="left")
    board.arrow((2.05, 1.25), (2.45, 1.25))
    board.box(2.5, 0.75, 1.75, 1.0, "CLIP,\ntext side", BLUE, 17)
    board.arrow((4.3, 1.25), (4.75, 1.25))
    board.box(4.8, 0.6, 1.9, 1.3, "prior:\ndiffusion on\n128 numbers", RED, 16)
    board.arrow((6.75, 1.25), (7.15, 1.25))
    strip = z.clamp(-0.2, 0.2).view(8, 16).numpy() / 0.2
    board.ax.imshow(strip, extent=(7.2, 8.9, 1.68, 0.83), cmap="cividis", aspect="auto", interpolation="nearest")
    board.text(8.05, 0.5, "image embedding  $z_i$", 16, ORANGE)
    board.arrow((8.95, 1.25), (9.35, 1.25))
    board.box(9.4, 0.6, 1.35, 1.3, "decoder:\na UNet", GREEN, 16)
    board.arrow((10.8, 1.25), (11.0, 1.25))
    board.tile(11.03, 0.6, 1.32, drawn)
    board.text(11.69, 0.35, "picture", 16)
    images = alone()
    board.tile(0.35, 2.7, 1.5, images[:1])
    board.text(1.1, 4.42, "a picture", 16)
    board.arrow((1.95, 3.45), (2.45, 3.45))
    board.box(2.5, 2.95, 1.75, 1.0, "CLIP,\npicture side", BLUE, 17)
    board.ax.plot([4.3, 8.05], [3.45, 3.45], color=GREY, linewidth=3)
    board.arrow((8.05, 3.45), (8.05, 1.75))
    board.text(6.15, 3.2, "no prior: its own embedding", 15, GREY)
    varied = model.draw(model.of_images(images[:1]), w=EMBEDDED, steps=steps(), x_T=model.sd.noise(2, seed=1))
    for k in range(2):
        board.tile(9.4 + 1.5 * k, 2.7, 1.42, varied[k : k + 1])
    board.text(10.87, 4.4, "so the decoder draws variations of it", 15, GREY)
    return board.fig


@shows(weights=("toybox-unclip", "toybox-sd"))
def variations():
    """Pictures and four variations each, drawn from the CLIP embedding of the picture alone."""
    model = unclip()
    images = alone()
    side, gap, shown = 1.12, 0.07, range(7)
    board = Board(5.15)
    noise = model.sd.noise(3, seed=1)
    for i, k in enumerate(shown):
        x = 1.75 + i * 1.52
        drawn = model.draw(model.of_images(images[k : k + 1]), w=EMBEDDED, steps=steps(), x_T=noise)
        board.tile(x, 0.08, side, images[k : k + 1], frame=ORANGE)
        for r in range(3):
            board.tile(x, 0.08 + (r + 1) * (side + gap), side, drawn[r : r + 1])
    board.text(1.6, 0.65, "picture", 18, ORANGE, ha="right")
    board.text(1.6, 0.08 + 2.5 * (side + gap), "variations\nfrom three\nnoises", 17, ha="right")
    board.small(by_unclip(f"the first seven held-out pictures of one object, not picked; {steps()} DDIM steps, "
                          f"w = {EMBEDDED:g}"))  # fmt: skip
    return board.fig


@shows(weights=("toybox-unclip",))
def between_pictures():
    """One picture's embedding moved towards another picture's, and along three differences of texts."""
    model, images, side = unclip(), alone(), 1.18
    board, x_T = Board(5.75), model.sd.noise(1, seed=1)
    first, second = model.of_images(images[:2]).split(1)
    shares = (0, 0.2, 0.4, 0.6, 0.8, 1)
    rows = [("towards a\nsecond picture", ORANGE, shares, [slerp(first, second, share) for share in shares])]
    shares = (0, 0.1, 0.2, 0.3, 0.4, 0.5)
    for before, after in (("in a meadow", "at night"), ("a red bus", "a blue bus"), ("a bus", "a car")):
        moved = [text_difference(model, first, before, after, share) for share in shares]
        rows.append((f"“{before}” →\n“{after}”", BLUE, shares, moved))
    for r, (words, colour, shares, moved) in enumerate(rows):
        y = 0.38 + r * (side + 0.03) + (0.3 if r else 0)
        board.text(3.65, y + side / 2, words, 16, colour, ha="right")
        for i, z in enumerate(moved):
            x = 3.75 + i * (side + 0.04)
            board.tile(x, y, side, model.draw(z, w=EMBEDDED, steps=steps(), x_T=x_T))
            if r < 2:
                board.text(x + side / 2, y - 0.15, f"{shares[i]:g}", 15, colour)
    board.tile(0.1, 2.0, 1.45, images[:1], frame=BLACK)
    board.text(0.82, 1.8, "picture", 17)
    board.tile(12.36 - side, 0.38, side, images[1:2], frame=ORANGE)
    board.text(12.36 - side / 2, 0.2, "second", 15, ORANGE)
    board.small(by_unclip(f"the first two held-out pictures of one object; one noise for all; {steps()} DDIM steps, "
                          f"w = {EMBEDDED:g}"))  # fmt: skip
    return board.fig


@shows(weights=("toybox-unclip",))
def prior_or_regression():
    """One prompt that leaves much open: six pictures by way of the prior, six by way of the regression."""
    prompts, model, side = ["a photo of a teapot"] * 6, unclip(), 1.66
    board = Board(4.15)
    x_T = model.sd.noise(6, seed=3)
    ways = (("prior", RED, model.imagine(prompts)), ("regression", BLUE, model.regress(prompts)))
    for r, (name, colour, z) in enumerate(ways):
        drawn = model.draw(z, w=EMBEDDED, steps=steps(), x_T=x_T)
        y = 0.08 + r * (side + 0.16)
        board.text(1.6, y + side / 2, name, 20, colour, ha="right")
        for k in range(6):
            board.tile(1.8 + k * (side + 0.09), y, side, drawn[k : k + 1])
    board.small(by_unclip(f"“a photo of a teapot”, a column shares its noise, not picked; {steps()} DDIM steps, "
                          f"w = {EMBEDDED:g}, prior w = 2, the better of two embeddings"))  # fmt: skip
    return board.fig


@shows(records=("unclip",))
def unclip_measured():
    """C5: what variations keep, how alike they are, and how well prompts are obeyed by three ways."""
    panels = (
        ("read as in\nthe picture", (("its\nvariations", "variations", "kept", ORANGE),
                                    ("of another\npicture", "variations", "shuffled", GREY))),
        ("layouts agree", (("two\nvariations", "variations", "alike", ORANGE),
                           ("two of\none text", "variations", "apart", GREY))),
        ("prompt obeyed", (("prior", "prior", "obeyed", RED), ("regres-\nsion", "regression", "obeyed", BLUE),
                           ("text\nalone", "text alone", "obeyed", GREY))),
        ("distance of two\npictures of a prompt", (("prior", "prior", "diversity", RED),
                                                    ("regres-\nsion", "regression", "diversity", BLUE),
                                                    ("text\nalone", "text alone", "diversity", GREY))),
    )  # fmt: skip
    with plt.rc_context(STYLE):
        fig, axes = plt.subplots(1, 4, figsize=(W, 4.4), width_ratios=(2.2, 2.2, 3, 3))
        fig.subplots_adjust(0.045, 0.27, 0.995, 0.83, wspace=0.3)
        for k, (ax, (title, bars)) in enumerate(zip(axes, panels)):
            for i, (_, part, score, colour) in enumerate(bars):
                bar_with_interval(ax, i, row_of(of_unclip(part, score)), colour, 0.7)
            ax.set_xticks(range(len(bars)), [name for name, *_ in bars], fontsize=14)
            ax.set_title(title, fontsize=16)
            if k < 3:
                ax.set_ylim(0, 1)
        found = record("unclip")
        small_print_at(fig, f"n = {found['pictures']} held-out pictures and prompts, two pictures each, means with "
                       f"95 % intervals; {found['steps']} DDIM steps, w = {found['w']:g} "
                       f"(text alone {found['w_text']:g}); {measured_on('unclip')}")  # fmt: skip
    return fig


@shows(weights=("toybox-sd",))
def inversion_path():
    """A given picture on its way to noise, and drawn again from there; beside it another noise."""
    sd, board, side = toybox(), Board(4.6), 1.5
    with torch.no_grad():
        for r, k in enumerate((0, 2)):
            found = inverted()[k]
            count = len(found.path) - 1
            y = 0.48 + r * (side + 0.4)
            for i, share in enumerate((0, 0.2, 0.5, 1)):
                at = round(share * count)
                board.tile(0.1 + i * 1.78, y, side, sd.decode(found.path[at]))
                if i < 3:
                    x = 0.1 + i * 1.78 + side
                    board.arrow((x + 0.02, y + side / 2), (x + 0.26, y + side / 2), BLUE, 2.5)
                if not r:
                    name = ("picture", f"after {at} steps", f"after {at}", f"$z_T$, after {at}")[i]
                    board.text(0.1 + i * 1.78 + side / 2, 0.24, name, 16, BLUE)
            again = redraw(sd, found)
            other = sd.sample(found.prompts, w=1, steps=steps(), seed=2 + r)
            board.arrow((6.98, y + side / 2), (7.9, y + side / 2), RED, 3)
            board.tile(7.95, y, side, again)
            board.tile(10.3, y, side, other)
    board.text(7.45, 1.0, "DDIM", 15, RED)
    board.text(8.7, 0.24, "drawn again", 16, RED)
    board.text(11.05, 0.24, "another noise,\nsame prompt", 15, GREY)
    board.small(drawn_by(f"w = 1, {steps()} steps each way, one fixed-point evaluation; two renderings, not measured"))
    return board.fig


@shows(weights=("toybox-sd",))
def guidance_leaves():
    """The inverted path as a line, and where guided steps go; beside it a picture drawn back at five scales."""
    sd, board, side = toybox(), Board(4.75), 1.28
    board.ax.plot(np.linspace(0.4, 3.9, 50), 2.2 + 0.5 * np.sin(np.linspace(0, 2.6, 50)), color=BLUE, linewidth=4)
    for x in np.linspace(0.4, 3.9, 6):
        board.ax.plot([x], [2.2 + 0.5 * np.sin((x - 0.4) / 3.5 * 2.6)], "o", color=BLUE, markersize=12)
    board.text(0.45, 1.85, "$z^*_T$", 20, BLUE)
    board.text(4.05, 2.9, "$z^*_0$", 20, BLUE)
    xs = np.linspace(0.4, 3.9, 6)
    ys = 2.2 + 0.5 * np.sin((xs - 0.4) / 3.5 * 2.6) - np.array([0, 0.2, 0.55, 0.95, 1.35, 1.8])
    for a, b in zip(zip(xs, ys), zip(xs[1:], ys[1:])):
        board.arrow(a, b, RED, 3)
    board.text(2.35, 3.2, "the inverted path, w = 1", 16, BLUE)
    board.text(1.75, 0.75, "drawn back\nwith guidance", 16, RED)
    _, given, _ = not_measured()
    scales = (1.0, 2.0, 3.0, 5.0, 7.5)
    for r, k in enumerate((0, 2, 3)):
        y = 0.45 + r * (side + 0.06)
        board.tile(4.75, y, side, given[k : k + 1])
        for i, w in enumerate(scales):
            board.tile(6.12 + i * (side - 0.03), y, side - 0.08, redraw(sd, inverted()[k], w=w))
            if not r:
                board.text(6.12 + i * (side - 0.03) + side / 2, 0.22, f"w = {w:g}", 16, RED if i else BLUE)
    board.text(4.75 + side / 2, 0.22, "given", 16)
    board.small(drawn_by(f"{steps()} steps, one fixed-point evaluation; three renderings, not measured"))
    return board.fig


@shows(records=("editing",))
def errors_over_w():
    """The error of pictures that are inverted and drawn back, against the guidance scale, for four ways."""
    found = record("editing")["reconstruction"]
    ways = (("DDIM", "DDIM inversion", BLUE, "o", "-"),
            ("DDIM, 1 fixed-point evaluation", "with a fixed-point evaluation", SKY, "s", "--"),
            ("null-text", "null-text inversion", RED, "D", "-"),
            ("negative prompt", "negative-prompt inversion", GREEN, "^", "-"))  # fmt: skip
    with plt.rc_context(STYLE):
        fig = plt.figure(figsize=(W, 4.4))
        ax = fig.add_axes((0.08, 0.24, 0.5, 0.72))
        for i, (key, name, colour, marker, line) in enumerate(ways):
            points = [(float(w), statistics.mean(row["errors"])) for w, row in found[key].items()]
            scales, values, halves = zip(*((w, e.value, e.half) for w, e in points), strict=True)
            style = dict(color=colour, marker=marker, linestyle=line, markersize=11, capsize=4)
            ax.errorbar(scales, values, halves, **style)
            seconds = max(row["seconds_a_picture"] for row in found[key].values())
            y = 0.86 - 0.16 * i
            fig.text(0.635, y, "■", fontsize=20, color=colour, va="center")
            fig.text(0.665, y, name, fontsize=18, color=colour, va="center")
            fig.text(0.665, y - 0.068, f"{seconds:g} s a picture", fontsize=15, color=GREY, va="center")
        ax.set_yscale("log")
        ax.set(xlabel="guidance scale w", ylabel="error (range 2)")
        count = len(found["DDIM"]["1.0"]["errors"])
        small_print_at(fig, f"Root mean square difference to the autoencoder's own copy, {count} renderings, "
                       f"{record('editing')['steps']} steps, means with 95 % intervals; null-text and negative prompt "
                       f"start from the inversion with a fixed-point evaluation; {measured_on('editing')}")  # fmt: skip
    return fig


@shows(weights=("toybox-gan", "toybox-sd"), records=("keeping",))
def gan_latents():
    """Cats and other nouns inverted by a GAN of cats, and by the diffusion model; beside them the errors of all."""
    rng, alike = np.random.default_rng(106), dict(edits.ALONE, pattern="plain")  # as measurements/keeping.py
    others = [noun for noun in NOUNS if noun != "cat"]
    x = torch.stack([from_uint8(render(sample_spec(rng, noun, **alike))) for noun in ["cat"] * 20 + others[:2]])
    shown, nouns = x[[0, 1, 20, 21]], ["cat", "cat", *others[:2]]
    (generator, encoder), searched = load_gan(), size(300, 3)
    with torch.no_grad():
        guess = encoder(shown)[:, None].expand(-1, len(generator.blocks), -1)
    sd = toybox()
    found = invert(sd, shown, [f"a photo of a {noun}" for noun in nouns], steps=steps(), fixed_point=1)
    rows = (("given", BLACK, shown),
            ("one latent w", ORANGE, gan_inversion(generator, shown, generator.mean_latent(), steps=searched)[1]),
            ("a w for\neach block", RED, gan_inversion(generator, shown, guess, steps=searched)[1]),
            ("diffusion\nlatent", BLUE, redraw(sd, found)))  # fmt: skip
    ways = ("from the mean", "a latent for each block", "diffusion")
    with plt.rc_context(STYLE):
        board, side = Board(5.2), 1.06
        for r, (words, colour, images) in enumerate(rows):
            y = 0.4 + r * (side + 0.03)
            board.text(1.6, y + side / 2, words, 16, colour, ha="right")
            for k in range(4):
                board.tile(1.75 + k * (side + 0.08), y, side, images[k : k + 1])
                if not r:
                    board.text(1.75 + k * (side + 0.08) + side / 2, 0.2, nouns[k], 15)
        ax = board.fig.add_axes((0.6, 0.2, 0.39, 0.68))
        for place, key in enumerate(("cats", "others")):
            for k, (way, colour) in enumerate(zip(ways, (ORANGE, RED, BLUE), strict=True)):
                estimate = statistics.mean(record("keeping")["gan"][way][key]["own"])
                bar_with_interval(ax, place * 3.8 + k, row_of(estimate), colour, 0.85)
        ax.set_xticks([1, 4.8], ["cats", "other nouns"], fontsize=16)
        ax.set_title("PSNR to the picture, dB", fontsize=17)
        ax.grid(axis="x", alpha=0)
    count = len(record("keeping")["gan"]["diffusion"]["cats"]["own"])
    board.small(f"The GAN draws cats alone. Pictures: the first two measured of both kinds, {searched} steps of Adam. "
                f"Bars: {count} pictures each, 95 % intervals, {measured_on('keeping')}")  # fmt: skip
    return board.fig


@shows(weights=("toybox-sd",))
def sdedit_strip():
    """SDEdit: noise up to some time, then drawn on with the new prompt, at five strengths."""
    sd, board, side = toybox(), Board(5.3), 1.4
    batch, given, truth = not_measured()
    strengths = (0.2, 0.4, 0.6, 0.8, 1.0)
    board.text(0.95, 0.3, "given", 17)
    for i, strength in enumerate(strengths):
        board.text(2.75 + i * 1.6 + side / 2, 0.3, f"strength {strength:g}", 16)
    board.text(10.9 + side / 2, 0.3, "right answer", 16, GREEN)
    for r, k in enumerate((0, 1, 2)):
        y = 0.52 + r * (side + 0.06)
        board.tile(0.25, y, side, given[k : k + 1])
        board.arrow((1.78, y + side / 2), (2.6, y + side / 2))
        for i, strength in enumerate(strengths):
            image = sdedit(sd, given[k : k + 1], batch[k].prompts[1], strength, w=SCALE, steps=steps())
            board.tile(2.75 + i * 1.6, y, side, image)
        board.tile(10.9, y, side, truth[k : k + 1])
    asked = "; ".join(one.prompts[1].removeprefix("a photo of ") for one in batch[:3])
    board.small(drawn_by(f"asked for: {asked}; {steps()} steps, w = {SCALE:g}; not measured"))
    return board.fig


PAIRS = (("a photo of a red cat on the beach", "a photo of a blue cat on the beach"),
         ("a photo of a green teapot in a room", "a photo of a green mug in a room"),
         ("a photo of an orange rabbit in the forest", "a pencil sketch of an orange rabbit in the forest"),
         ("a photo of a brown dog in a meadow", "a photo of a brown dog wearing a red hat in a meadow"))  # fmt: skip


@shows(weights=("toybox-sd",))
def prompt_to_prompt():
    """Two drawings side by side, the second with the first one's attention; below four pairs of prompts."""
    sd, board, side = toybox(), Board(5.2), 1.42
    x_T = sd.noise(1, seed=4)
    board.text(0.1, 0.62, "source", 17, BLUE, ha="left")
    board.text(0.1, 2.62, "target", 17, RED, ha="left")
    for y, colour in ((0.62, BLUE), (2.62, RED)):
        board.ax.plot([0.95, 4.5], [y, y], color=colour, linewidth=3)
        board.arrow((4.3, y), (4.7, y), colour)
    for k in range(3):
        x = 1.15 + 1.15 * k
        board.box(x, 0.32, 0.85, 0.6, "$P$", BLUE, 19)
        board.box(x, 2.32, 0.85, 0.6, "$P^*$" if k == 2 else r"$\hat P$", RED, 19)
        if k < 2:
            board.arrow((x + 0.42, 1.0), (x + 0.42, 2.25), BLUE, 3)
    board.text(3.0, 1.62, "first steps:\nattention is\ntaken over", 15, GREY, ha="left")
    board.text(2.5, 3.25, "cross-attention: which word acts where\nself-attention: which places belong together",
               14, GREY)  # fmt: skip
    for i, (source, target) in enumerate(PAIRS):
        x = 6.45 + i * 1.5
        before, after = edit(sd, source, target, x_T, w=SCALE, steps=steps())
        again = sd.sample(target, x_T=x_T, w=SCALE, steps=steps())
        for r, image in enumerate((before, again, after)):
            board.tile(x, 0.42 + r * (side + 0.06), side, image)
        board.text(x + side / 2, 0.2, ("colour", "noun", "style", "a hat")[i], 16)
    for r, words in enumerate(("source", "prompt\nagain", "Prompt-to-\nPrompt")):
        board.text(6.35, 0.42 + r * (side + 0.06) + side / 2, words, 15, (BLUE, GREY, RED)[r], ha="right")
    board.small(drawn_by(f"one noise for all, {steps()} steps, w = {SCALE:g}, 0.8 of the steps with cross-, 0.4 with "
                         "self-attention"))  # fmt: skip
    return board.fig


def with_maps(source: str, target: str, x_T: Tensor, change: Edit | None = None) -> tuple:
    """An edit, and the relative maps of both prompts' words in the layers of 8 x 8 before any is taken over."""
    sd, maps = toybox(), AttentionMaps(8)
    with attention_hook(sd.unet, maps):
        before, after = edit(sd, source, target, x_T, change, w=SCALE, steps=steps())
    both = zip((source, target), maps.mean()[-2:], strict=True)
    return before, after, *(relative_maps(by_word(of_one, text.words(sd.tokenizer, prompt))) for prompt, of_one in both)


@shows(weights=("toybox-sd",))
def attention_controls():
    """The three edits of Prompt-to-Prompt, each with the map that it works on."""
    sd, board, side = toybox(), Board(5.65), 1.4
    x_T, target = sd.noise(1, seed=4), "a photo of a blue cat on the beach"
    again = sd.sample(target, x_T=x_T, w=SCALE, steps=steps())
    red, swapped, of_red, _ = with_maps("a photo of a red cat on the beach", target, x_T)
    cat, added, _, of_blue = with_maps("a photo of a cat on the beach", target, x_T)
    hat = "a photo of a blue cat wearing a red hat in the snow"
    weighed = {by: with_maps(hat, hat, x_T, Edit(1.0, 0.2, weights={"hat": by})) for by in (-2.0, 3.0)}
    plain, _, of_hat, _ = weighed[3.0]
    rows = (
        ("word swap", "red cat → blue cat", "“blue” takes the map of “red”",
         ((red, "source"), (heat(red[0], of_red["red"]), "map of “red”"), (swapped, "edited"),
          (again, "prompt again"))),
        ("added word", "cat → blue cat", "“blue” keeps its own map,\nthe other words take the source’s",
         ((cat, "source"), (heat(added[0], of_blue["blue"]), "map of “blue”"), (added, "edited"),
          (again, "prompt again"))),
        ("re-weighting", "blue cat wearing a red hat", "the map of “hat” times a number",
         ((plain, "source"), (heat(plain[0], of_hat["hat"]), "map of “hat”"), (weighed[-2.0][1], "“hat” × −2"),
          (weighed[3.0][1], "“hat” × 3"))),
    )  # fmt: skip
    for r, (name, asked, rule, tiles) in enumerate(rows):
        y, colour = 0.3 + r * (side + 0.3), (BLUE, GREEN, RED)[r]
        board.text(0.05, y + 0.22, name, 21, colour, ha="left")
        board.text(0.05, y + 0.62, asked, 16, ha="left")
        board.text(0.05, y + 1.07, rule, 15, GREY, ha="left")
        for x, (image, words) in zip((4.3, 6.05, 8.65, 10.6), tiles, strict=True):
            board.tile(x, y, side, image)
            board.text(x + side / 2, y - 0.14, words, 14, GREY if words == "prompt again" else BLACK)
        board.arrow((7.6, y + side / 2), (8.5, y + side / 2), colour)
    board.small(drawn_by(f"one noise, {steps()} steps, w = {SCALE:g}; maps of the 8×8 layers, relative to all words"))
    return board.fig


@shows(records=("editing", "editing_samples.png"))
def plug_and_play_rows():
    """Plug-and-Play as a diagram, and the first measured edits by it, beside prompting again and the right answer."""
    board, side = Board(5.2), 1.1
    board.text(0.1, 0.5, "$z^*_t$, old prompt", 16, BLUE, ha="left")
    board.text(0.1, 2.6, "$z_t$, new prompt", 16, RED, ha="left")
    for y, colour in ((1.0, BLUE), (3.1, RED)):
        board.box(0.1, y - 0.25, 1.2, 0.6, "encoder", GREY, 15)
        board.box(1.75, y - 0.25, 1.2, 0.6, "features", colour, 15)
        board.box(3.25, y - 0.25, 1.15, 0.6, "self-att.", colour, 15)
        board.arrow((1.33, y + 0.05), (1.72, y + 0.05), colour, 2.5)
        board.arrow((2.98, y + 0.05), (3.22, y + 0.05), colour, 2.5)
    board.arrow((2.35, 1.4), (2.35, 2.8), BLUE, 3)
    board.arrow((3.82, 1.4), (3.82, 2.8), BLUE, 3)
    board.text(2.25, 2.1, "first\n0.8 of\nsteps", 14, GREY, ha="right")
    board.text(3.72, 2.1, "first\n0.5 of\nsteps", 14, GREY, ha="right")
    board.text(2.2, 3.85, "layout is handed over, words are not:\nnothing has to be aligned", 14, GREY)
    sheet, shown = recorded_sheet(), ("given", "prompt again", "Plug-and-Play", "right answer")
    kinds = [one.kind for one in edits.true_edits(10)]
    for i, k in enumerate((0, 1, 2, 3, 4, 5)):
        x = 5.75 + i * (side + 0.02)
        board.text(x + side / 2, 0.27, kinds[k].replace(" ", "\n"), 14)
        for r, name in enumerate(shown):
            board.tile(x, 0.55 + r * (side + 0.02), side - 0.03, sheet[name][k])
    for r, name in enumerate(("given", "again", "P-a-P", "right")):
        board.text(5.68, 0.55 + r * (side + 0.02) + side / 2, name, 15, (BLACK, GREY, RED, GREEN)[r], ha="right")
    board.small(f"The first six of {record('editing')['edits']} measured edits; again: the new prompt from the "
                f"inverted noise; P-a-P: Plug-and-Play; {record('editing')['steps']} steps, "
                f"w = {record('editing')['w']:g}, {measured_on('editing')}")  # fmt: skip
    return board.fig


def first_failure(method: str, kind: str) -> edits.TrueEdit:
    """The first measured edit of a kind that this method was not found to obey."""
    obeyed = scores_of(method)["obeyed"]
    return next(one for one, score in zip(edits.true_edits(len(obeyed)), obeyed) if one.kind == kind and score == 0)


@shows(weights=("toybox-sd",), records=("editing",))
def where_edits_fail():
    """How often each kind of edit is obeyed, method by method; and the first failure of each in its weakest kind."""
    sd, board, side = toybox(), Board(5.3), 1.13
    methods = (("prompt again", "prompt again"), ("SDEdit 0.6", "SDEdit 0.6"),
               ("pinned DDIM + Prompt-to-Prompt", "pinned P2P"), ("null-text + Prompt-to-Prompt", "null-text P2P"),
               ("Plug-and-Play", "Plug-and-Play"))  # fmt: skip
    all_kinds = [one.kind for one in edits.true_edits(record("editing")["edits"])]
    groups = {kind: torch.tensor([one == kind for one in all_kinds]) for kind in edits.KINDS}
    shares = {key: {kind: statistics.share(scores_of(key)["obeyed"][at]) for kind, at in groups.items()}
              for key, _ in methods}  # fmt: skip
    left, wide, high = 1.7, 0.8, 0.66
    for i, kind in enumerate(edits.KINDS):
        board.text(left + (i + 0.5) * wide, 0.55, kind.replace(" ", "\n").replace("accessory", "access."), 14)
    for r, (key, name) in enumerate(methods):
        y = 0.9 + r * high
        board.text(left - 0.1, y + high / 2, name, 15, ha="right")
        for i, kind in enumerate(edits.KINDS):
            value = shares[key][kind].value
            colour = plt.get_cmap("cividis")(value)
            board.ax.add_patch(plt.Rectangle((left + i * wide, y), wide - 0.04, high - 0.04, facecolor=colour))
            board.text(left + (i + 0.48) * wide, y + high / 2 - 0.02, f"{value:.2f}", 15,
                       BLACK if value > 0.5 else "white")  # fmt: skip
    board.text(left + 3.5 * wide, 0.15, "share of edits obeyed", 17)
    board.text(left + 3.5 * wide, 4.5, "patterns: seldom obeyed by any method", 16, RED)
    board.text(10.05, 0.15, "first failure in the weakest kind", 17)
    for i, (key, name) in enumerate(methods[1:]):
        kind = min((kind for kind in edits.KINDS if kind != "pattern"), key=lambda kind: shares[key][kind].value)
        one, x = first_failure(key, kind), 7.77 + i * (side + 0.03)
        given, truth, _ = edits.pictures([one])
        start = invert(sd, given, one.prompts[0], steps=steps(), fixed_point=1)
        if key.startswith("SDEdit"):
            image = sdedit(sd, given, one.prompts[1], 0.6, w=SCALE, steps=steps())
        elif key.startswith("null-text"):
            image = edit(sd, *one.prompts, null_text_inversion(sd, start, SCALE), pinned=False)[1]
        elif key.startswith("pinned"):
            image = edit(sd, *one.prompts, start, w=SCALE)[1]
        else:
            image = plug_and_play(sd, start, one.prompts[1], w=SCALE)
        board.text(x + side / 2, 0.55, name.replace(" ", "\n").replace("-and-", "-\nand-"), 14)
        for k, picture in enumerate((given, image, truth)):
            board.tile(x, 0.85 + k * (side + 0.04), side - 0.02, picture)
        asked = " ".join(word for word in one.prompts[1].split() if word not in one.prompts[0].split())
        asked = textwrap.fill("→ " + asked.replace("wearing ", "").replace("with ", ""), 9)
        board.text(x + side / 2, 4.6, asked, 14, GREY)
    for k, (words, colour) in enumerate((("given", BLACK), ("edited", RED), ("right", GREEN))):
        y = 0.85 + k * (side + 0.04) + side / 2
        board.ax.text(7.62, y, words, fontsize=15, color=colour, ha="center", va="center", rotation=90)
    counts = [int(at.sum()) for at in groups.values()]
    error = max(max(share.errors) for row in shares.values() for share in row.values())
    board.small(f"{min(counts)} or {max(counts)} edits a cell, 95 % intervals reach at most {error:.2f} to a side; "
                f"pictures: weakest kind with patterns left aside, drawn again, w = {SCALE:g}; P2P: Prompt-to-Prompt; "
                f"{measured_on('editing')}")  # fmt: skip
    return board.fig


@shows(records=("editing",))
def obeyed_and_kept():
    """C6: share of edits obeyed against what is kept outside of the edit, for all methods."""
    methods = (("prompt again", "prompt again", BLACK, "s", (-16, 12), "right"),
               ("prompt again, new noise", "prompt again,\nnew noise", GREY, "s", (0, -24), "center"),
               ("SDEdit 0.4", "SDEdit 0.4", SKY, "o", (-12, -20), "right"),
               ("SDEdit 0.6", "0.6", SKY, "o", (-12, -14), "right"),
               ("SDEdit 0.8", "0.8", SKY, "o", (-12, -16), "right"),
               ("pinned DDIM + Prompt-to-Prompt", "pinned P2P", ORANGE, "D", (24, -14), "left"),
               ("negative-prompt + Prompt-to-Prompt", "negative-prompt P2P", GREEN, "^", (12, 12), "left"),
               ("null-text + Prompt-to-Prompt", "null-text P2P", RED, "D", (14, -14), "left"),
               ("Plug-and-Play", "Plug-and-Play", BLUE, "v", (-4, 30), "center"),
               ("autoencoder alone", "the given\npicture", GREY, "*", (-26, 8), "right"))  # fmt: skip
    with plt.rc_context(STYLE):
        fig = plt.figure(figsize=(W, 5.2))
        ax = fig.add_axes((0.075, 0.2, 0.915, 0.77))
        line = []
        for key, name, colour, marker, offset, ha in methods:
            found = scores_of(key)
            across = statistics.mean(found["kept"][found["kept"].isfinite()])
            up = statistics.share(found["obeyed"])
            ax.errorbar([across.value], [up.value], xerr=[across.half], yerr=[[e] for e in up.errors], color=colour,
                        marker=marker, markersize=15, capsize=4, linewidth=2)  # fmt: skip
            va = "center" if abs(offset[1]) < 16 else ("top" if offset[1] < 0 else "bottom")
            ax.annotate(name, (across.value, up.value), offset, textcoords="offset points", fontsize=15, color=colour,
                        ha=ha, va=va)  # fmt: skip
            if name.startswith(("SDEdit", "0.")):
                line.append((across.value, up.value))
        ax.plot(*zip(*line), color=SKY, linewidth=2, zorder=0)
        ax.set(xlabel="kept outside of the edit, PSNR in dB", ylabel="share of edits obeyed", ylim=(-0.04, 1.0))
        ax.set_xlim(11, 31)
        found = record("editing")
        small_print_at(fig, f"{found['edits']} edits of renderings whose right answer is known, the same for all; "
                       f"{found['steps']} steps, w = {found['w']:g}; 95 % intervals over edits; P2P: Prompt-to-Prompt; "
                       f"{measured_on('editing')}")  # fmt: skip
    return fig


@shows(weights=("toybox-sd",), records=("keeping", "personalization_tiles.png", "personalization"))
def edited_or_learnt():
    """C7: Biscuit edited and Biscuit learnt, in the same scenes; and what each keeps, over six subjects."""
    sd = toybox()
    scenes = ("in the snow", "in the forest", "under water", "at night")
    specs = subjects.references("biscuit")
    folder = REPOSITORY / "data" / "subjects" / "biscuit"
    photo = to_tensor(open_images(folder)[0], sd.resolution)[None]
    old = f"a photo of a dog {specs[0].scene}"
    start = invert(sd, photo, old, steps=steps(), fixed_point=1)
    targets = [f"a photo of a dog {scene}" for scene in scenes]
    rows = {"Prompt-to-Prompt": [edit(sd, old, target, start, w=SCALE)[1] for target in targets],
            "Plug-and-Play": [plug_and_play(sd, start, target, w=SCALE) for target in targets]}  # fmt: skip
    names = record("personalization")["tiles"]
    tiles = np.array(Image.open(RESULTS / "personalization_tiles.png").convert("RGB"))
    strip = tiles[64 * names.index("biscuit lora 0") :][:64]
    places = [64 * list(subjects.NEW_SCENES).index(scene) for scene in scenes]
    rows["learnt (LoRA)"] = [strip[:, x : x + 64] for x in places]
    with plt.rc_context(STYLE):
        fig = plt.figure(figsize=(W, 5.1))
        side = 0.105
        high = side * W / 5.1
        ax = fig.add_axes((0.0, 0.42, 0.115, 0.115 * W / 5.1))
        ax.imshow(to_uint8(photo)[0], interpolation="nearest")
        ax.set_title("Biscuit", fontsize=17, loc="center")
        ax.axis("off")
        titles = ("Prompt-\nto-Prompt", "Plug-\nand-Play", "learnt\n(LoRA)")
        for r, (title, images) in enumerate(zip(titles, rows.values(), strict=True)):
            y = 0.67 - r * (high + 0.025)
            colour = (BLUE, GREEN, RED)[r]
            fig.text(0.245, y + high / 2, title, fontsize=16, color=colour, ha="right", va="center")
            for i, image in enumerate(images):
                tile = fig.add_axes((0.255 + i * (side + 0.005), y, side, high))
                tile.imshow(to_uint8(image)[0] if torch.is_tensor(image) else image, interpolation="nearest")
                tile.axis("off")
                if not r:
                    tile.set_title(scenes[i], fontsize=14, loc="center")
        ax = fig.add_axes((0.745, 0.24, 0.25, 0.64))
        measured = record("keeping")["subjects"]
        ways = (("Prompt-to-Prompt", "P2P", BLUE), ("Plug-and-Play", "P-a-P", GREEN), ("lora", "LoRA", RED),
                ("noun", "noun", GREY))  # fmt: skip
        for k, score in enumerate(("keeps", "told")):
            for i, (way, name, colour) in enumerate(ways):
                values = [sum(one[way][score]) / len(one[way][score]) for one in measured.values()]
                bar_with_interval(ax, k * 4.8 + i, row_of(statistics.mean(values)), colour, 0.9)
                ax.text(k * 4.8 + i, 0.02, name, fontsize=13, rotation=90, ha="center", va="bottom", color="white")
        ax.set_xticks([1.5, 6.3], ["like this\npicture", "the subject,\nin the scene"], fontsize=15)
        ax.set_ylim(0, 1)
        ax.grid(axis="x", alpha=0)
        small_print_at(fig, f"Left: the given picture is edited; LoRA: recorded first samples of the first training. "
                       f"Right: structure shared with the picture; subject fidelity times scene read; {len(measured)} "
                       f"subjects, 95 % intervals over subjects, w = 5, {measured_on('keeping')}")  # fmt: skip
    return fig


@shows(records=("editing_samples.png", "personalization_tiles.png", "personalization"))
def next_part3():
    """Part 3 changed one picture; Part 4 learns a subject from five and draws it in other scenes."""
    board, sheet = Board(4.4), recorded_sheet()
    board.text(2.0, 0.25, "Part 3: this picture, changed", 18, BLUE)
    board.tile(0.1, 0.75, 1.7, sheet["given"][0])
    board.arrow((1.85, 1.6), (2.25, 1.6), BLUE)
    board.tile(2.3, 0.75, 1.7, sheet["Plug-and-Play"][0])
    board.text(2.05, 2.75, "“white” → “black”", 16)
    board.text(8.5, 0.25, "Part 4: this subject, in new pictures", 18, RED)
    for k, image in enumerate(open_images(REPOSITORY / "data" / "subjects" / "tilly")):
        board.tile(4.85 + k % 2 * 0.92, 0.6 + k // 2 * 0.92, 0.88, to_tensor(image, toybox().resolution)[None])
    board.text(5.75, 3.5, "five pictures", 15)
    scenes = ("in the snow", "under water", "on the moon")
    names = record("personalization")["tiles"]
    tiles = np.array(Image.open(RESULTS / "personalization_tiles.png").convert("RGB"))
    ways = (("textual_inversion", "a word"), ("dreambooth", "all weights"), ("custom_diffusion", "a few weights"))
    for r, (way, words) in enumerate(ways):
        y = 0.6 + r * 0.92
        board.text(8.35, y + 0.44, words, 16, RED, ha="right")
        board.arrow((8.45, y + 0.44), (8.85, y + 0.44), RED, 2.5)
        strip = tiles[64 * names.index(f"tilly {way} 0") :][:64]
        for i, scene in enumerate(scenes):
            at = 64 * list(subjects.NEW_SCENES).index(scene)
            board.tile(8.95 + i * 1.15, y, 0.88, strip[:, at : at + 64])
            if r == 2:
                board.text(9.39 + i * 1.15, 3.68, scene.replace("the ", "the\n").replace("r w", "r\nw"), 15)
    board.small("recorded first samples: of Plug-and-Play; and of Textual Inversion, DreamBooth and Custom Diffusion "
                f"in their first trainings on Tilly, {measured_on('personalization')}")  # fmt: skip
    return board.fig
