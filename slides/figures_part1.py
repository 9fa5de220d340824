"""The figures of Part 1: diffusion, sampling, guidance."""

import base64
import io
import json
import re
from dataclasses import replace
from functools import lru_cache

import matplotlib.pyplot as plt
import numpy as np
import torch
from board import GREY, STYLE, Board, W, generator, rows_of, shows, size, small_print
from PIL import Image
from recorded import record, runs
from torch import Tensor

from course_lib import plots
from course_lib.data import cifar10
from course_lib.diffusion import checkpoint, guidance, samplers, schedule
from course_lib.diffusion.ddpm import posterior, predict_x0, q_sample
from course_lib.environment import CHECKPOINTS, REPOSITORY
from course_lib.evaluation import statistics
from course_lib.evaluation.statistics import Estimate
from course_lib.latent import stable_diffusion
from course_lib.plots import BLACK, BLUE, GREEN, ORANGE, PINK, RED, SKY
from course_lib.toybox import sets, world

SCHEDULE = schedule.linear()


# ---- data and models ----


@lru_cache
def things(side: int = 32, seed: int = 0) -> Tensor:
    """One Toybox picture of each of the ten classes, (10, 3, side, side) in [-1, 1]."""
    rng = np.random.default_rng(seed)
    drawn = [world.render(sets.sample_ten(rng, noun), side) for noun in sets.CLASSES]
    return torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2).float() / 127.5 - 1


@lru_cache
def model(name: str):
    """A shipped model as a callable that computes in bfloat16, and its provenance."""
    net = checkpoint.load(CHECKPOINTS / name)

    def call(xt, t, label=None):
        with torch.autocast("cpu", torch.bfloat16):
            return net(xt.contiguous(memory_format=torch.channels_last), t, label).float()

    call.num_classes, call.net = net.num_classes, net
    return call, json.loads((CHECKPOINTS / name / "provenance.json").read_text())


def about(name: str, *more: str) -> str:
    """Small print for pictures drawn by a shipped model."""
    note = model(name)[1]
    trained = f"{note['steps']:,} steps of {note['batch_size']} in {note['minutes']:.0f} minutes"
    trained += " in its last run" if note.get("started_from") else ""
    return " · ".join([*more, f"model {name}: {trained} on {note['device']}, {note['date']}"])


def draw(name: str, label: Tensor, w: float, steps: int, seed: int = 0, x_T: Tensor | None = None) -> Tensor:
    """DDIM samples of a shipped model, (B, 3, 32, 32)."""
    x_T = torch.randn(len(label), 3, 32, 32, generator=generator(seed)) if x_T is None else x_T
    eps_model = guidance.guided(model(name)[0], label, w)
    return samplers.last(samplers.ddim(eps_model, x_T, SCHEDULE, steps))


@lru_cache
def results(name: str = "cifar10") -> dict:
    return record(f"ddpm_{name}")


def distance(row: dict) -> Estimate:
    """The Fréchet distance of a row with its interval."""
    return statistics.jackknife(row["frechet"], row["frechet_left_out"])


def at_w(name: str, w: float) -> dict:
    """The row of a guidance scale in the record of a model."""
    return next(row for row in results(name)["guidance"] if row["w"] == w)


@lru_cache
def path(labels: tuple[int, ...], w: float, steps: int, seed: int) -> list[tuple[int, Tensor, Tensor]]:
    """Algorithm 2 with the Toybox-10 model: (time, x_t, predicted clean picture) at every step, noise first."""
    x_T = torch.randn(len(labels), 3, 32, 32, generator=generator(seed))
    eps_model = guidance.guided(model("ddpm-toybox10")[0], torch.tensor(labels), w)
    found = list(samplers.ddpm(eps_model, x_T, SCHEDULE, steps, generator=generator(seed)))
    times = [*(t for t, _, _ in found[1:]), 0]
    return [(SCHEDULE.T, x_T, found[0][2]), *((t, xt, x0) for t, (_, xt, x0) in zip(times, found))]


def at_times(frames: list[tuple], wanted: tuple[int, ...]) -> list[tuple]:
    """The frames of a path that are nearest to these times."""
    return [min(frames, key=lambda frame: abs(frame[0] - t)) for t in wanted]


LOOKS = (1000, 600, 400, 300, 220, 150, 100, 50, 0)  # times at which a path is shown


def about_results(rows: list[dict], *more: str) -> str:
    """Small print for curves of measured rows."""
    r, n = results(), sorted({row["n"] for row in rows})
    last = ", in its last run" if r["training"]["before"] else ""
    trained = f"model trained {r['training']['minutes']:.0f} minutes on {r['training']['device']}{last}"
    count = f"n = {' and '.join(f'{k:,}' for k in n)} samples a point, one seed"
    return " · ".join([*more, count, f"measured on {r['device']}, {r['date']}", trained])


# ---- the figures, in the order of the deck ----


@shows(weights=("ddpm-toybox10",))
def title():
    """Two samples of the Toybox-10 model while Algorithm 2 draws them."""
    board, side = Board(3.6), 1.31
    frames = at_times(path((8, 0), 2.5, size(150, 9), 0), LOOKS)
    for i, (_, xt, _) in enumerate(frames):
        for row in range(2):
            board.tile(0.05 + i * (side + 0.065), 0.05 + row * (side + 0.07), side, xt[row : row + 1])
    board.text(0.05, 3.05, "noise", 18, GREY, ha="left")
    board.text(W - 0.05, 3.05, "picture", 18, GREY, ha="right")
    board.arrow((1.0, 3.05), (W - 1.3, 3.05), BLUE)
    board.small(about("ddpm-toybox10", "two samples on the way, w = 2.5, 150 of 1000 steps"))
    return board.fig


@shows()
def builds_to():
    """A few pictures of one subject, and the pictures that are asked for. All drawn by the renderer, and called so."""
    board, side = Board(4.9), 2.0

    def scene(where, x, y, s, flip=False):
        return world.render(world.Spec("cat", "teal", "striped", where, x, y, s, flip, 11), 160)

    scenes = list(world.SCENES)
    for i, where in enumerate(scenes[:4]):
        picture = scene(where, 0.5, 0.55, 0.74 + 0.04 * (i % 2), flip=i % 2 == 1)
        board.tile(0.05 + i % 2 * 1.85, 0.65 + i // 2 * 1.85, 1.78, picture)
    board.text(1.85, 0.3, "given: a few pictures", 19)
    board.box(4.2, 1.75, 1.5, 1.5, "the model\nlearns  $S_*$", ORANGE, 18)
    board.arrow((3.75, 2.5), (4.13, 2.5))
    board.arrow((5.76, 2.5), (6.16, 2.5))
    for i, where in enumerate(scenes[4:7]):
        x = 6.24 + i * (side + 0.06)
        board.tile(x, 1.3, side, scene(where, 0.4 + 0.1 * i, 0.57, 0.66, flip=i == 1))
        board.text(x + side / 2, 3.75, f"“$S_*$\n{where}”", 17)
    board.text(W - 0.1, 0.3, "wanted: this subject, where a prompt says", 19, ha="right")
    board.small("The task, not a result: every picture here is drawn by the Toybox renderer of this course.")
    return board.fig


PARTS = ("word", "text\nencoder", "UNet: keys\nand values", "UNet: all\nthe rest")
TRAINED = (  # method, part of the course, what is trained of PARTS, the pictures that it is shown
    ("Training the model", "Parts 1, 2", ("", "", "trained", "trained"), "the whole data set"),
    ("Editing", "Part 3", ("", "", "", ""), "one, and nothing is trained"),
    ("Textual Inversion", "Part 4", ("a new row", "", "", ""), "a few of the subject"),
    ("DreamBooth", "Part 4", ("", "if asked", "trained", "trained"), "the same, and of its class"),
    ("LoRA", "Part 4", ("", "if asked", "+ thin", "+ thin"), "as DreamBooth"),
    ("Custom Diffusion", "Part 4", ("a new row", "", "trained", ""), "the same, and similar ones"),
)


@shows()
def course_map():
    """What each method trains, and which pictures it is shown."""
    board, top, high = Board(4.65), 0.85, 0.57
    left, wide = 3.75, 1.27
    for k, words in enumerate(PARTS):
        board.text(left + (k + 0.5) * wide, 0.45, words, 14)
    board.text(left + 4 * wide + 0.25, 0.45, "pictures that it is shown", 15, ha="left")
    for r, (method, part, trained, pictures) in enumerate(TRAINED):
        y = top + r * high
        board.text(0.05, y + high / 2, method, 17, ha="left")
        board.text(left - 0.15, y + high / 2, part, 14, GREY, ha="right")
        for k, word in enumerate(trained):
            colour = ORANGE if word else GREY
            board.ax.add_patch(plt.Rectangle((left + k * wide + 0.05, y + 0.05), wide - 0.1, high - 0.1, linewidth=2,
                                             edgecolor=colour if word else "#d5d9de",
                                             facecolor=colour + ("55" if word else "11")))  # fmt: skip
            board.text(left + (k + 0.5) * wide, y + high / 2, word, 15)
        board.text(left + 4 * wide + 0.25, y + high / 2, pictures, 15, ha="left")
    words = "orange: trained; grey: stays as it is; + thin: two thin matrices beside each layer of the attention"
    board.text(0.05, top + 6 * high + 0.2, words, 14, GREY, ha="left")
    return board.fig


@shows(records=("claims",))
def judging():
    """The four verdict words: what the interval looks like, when it is said, and of which claims it is said here."""
    claims = record("claims")["claims"]
    rows = (("holds", GREEN, [(0.35, 1.15)], "all intervals above 0"),
            ("does not hold", RED, [(0.5, 1.2), (-1.15, -0.3)], "one interval below 0"),
            ("cannot tell", ORANGE, [(0.4, 1.2), (-0.5, 0.75)], "one contains 0, none below"),
            ("not testable here", GREY, [], "the premise is not met"))  # fmt: skip
    board, top, high, zero = Board(4.9), 0.75, 0.93, 4.05
    for x, words in (
        (0.05, "verdict"),
        (2.75, "95 % intervals and 0"),
        (5.6, "said when"),
        (9.35, "claims of this course"),
    ):
        board.text(x, 0.3, words, 16, GREY, ha="left")
    board.ax.plot([zero, zero], [top - 0.1, top + 3 * high], color=BLACK, linewidth=2, linestyle=":")
    for r, (verdict, colour, intervals, meaning) in enumerate(rows):
        y = top + (r + 0.5) * high
        board.text(0.05, y, verdict, 20, colour, ha="left")
        for k, (low, high_end) in enumerate(intervals):
            at = y + 0.32 * (k - (len(intervals) - 1) / 2)
            board.ax.plot([zero + low, zero + high_end], [at, at], color=colour, linewidth=5)
            board.ax.plot([zero + (low + high_end) / 2], [at], "o", color=colour, markersize=12)
        board.text(5.6, y, meaning, 17, ha="left")
        named = [name for name, claim in claims.items() if claim["verdict"] == verdict]
        lines = [" ".join(named[k : k + 6]) for k in range(0, len(named), 6)]
        board.text(9.35, y, "\n".join(lines) or "none", 14, ha="left")
    board.small("Intervals: examples, not results. Right: data/results/claims.json; some rules ask for more than this.")
    return board.fig


@shows()
def forward():
    """One picture at six times, above the share of picture and noise at every time."""
    times = (0, 50, 150, 300, 500, 1000)
    x0 = things(32)[3:4]
    eps = torch.randn(x0.shape, generator=generator(0))
    with plt.rc_context(STYLE):
        fig = plt.figure(figsize=(W, 5.3))
        side = 1.9
        for i, t in enumerate(times):
            ax = fig.add_axes((0.008 + i / 6, 1 - (side + 0.42) / 5.3, side / W, side / 5.3))
            ax.imshow(plots.to_uint8(q_sample(x0, t, eps, SCHEDULE))[0], interpolation="nearest")
            ax.set_title(f"t = {t}", loc="center", fontsize=19)
            ax.axis("off")
        ax = fig.add_axes((0.075, 0.14, 0.66, 0.37))
        t = np.arange(1001)
        ax.plot(t, SCHEDULE.alpha_bar.sqrt(), color=BLUE)
        ax.plot(t, (1 - SCHEDULE.alpha_bar).sqrt(), color=RED, linestyle="--")
        for time_ in times:
            ax.axvline(time_, color=GREY, linewidth=1, alpha=0.5)
        ax.set(xlabel="time t", ylabel="factor", xlim=(0, 1000), ylim=(0, 1.05))
        fig.text(0.75, 0.43, r"$\sqrt{\bar\alpha_t}$  of the picture", color=BLUE, fontsize=18)
        fig.text(0.75, 0.31, r"$\sqrt{1-\bar\alpha_t}$  of the noise", color=RED, fontsize=18)
        fig.text(0.75, 0.19, "linear schedule, T = 1000", color=GREY, fontsize=14)
    return fig


@shows(weights=("ddpm-toybox10",))
def why_noise():
    """The network's input, its predicted noise, and the clean picture that follows, at four times."""
    call, _ = model("ddpm-toybox10")
    times, x0 = (100, 300, 500, 800), things(32)[3:4]
    eps = torch.randn(x0.shape, generator=generator(5))
    board, side = Board(5.3), 1.46
    label = torch.tensor([3])
    for r, words in enumerate((r"input  $x_t$", r"predicted noise  $\hat\epsilon$", r"hence the picture  $\hat{x}_0$")):
        board.text(3.15, 1.15 + r * 1.56, words, 20, (BLACK, RED, BLUE)[r], ha="right")
    for i, t in enumerate(times):
        xt = q_sample(x0, t, eps, SCHEDULE)
        with torch.no_grad():
            eps_hat = call(xt, t, label)
        x = 3.5 + i * 1.75
        board.text(x + side / 2, 0.2, f"t = {t}", 18)
        for r, image in enumerate((xt, eps_hat / 2, predict_x0(xt, t, eps_hat, SCHEDULE))):
            board.tile(x, 0.42 + r * 1.56, side, image)
    board.tile(10.85, 0.42 + 2 * 1.56, side, x0)
    board.text(10.85 + side / 2, 0.42 + 1.56 * 2 - 0.25, r"truth  $x_0$", 18)
    board.small(about("ddpm-toybox10", "one picture, label given"))
    return board.fig


@shows()
def algorithm1():
    """One step of training as a diagram: a picture, noise, their mixture, the network, the difference."""
    board = Board(3.7)
    x0 = things(32)[3:4]
    eps = torch.randn(x0.shape, generator=generator(1))
    xt = q_sample(x0, 250, eps, SCHEDULE)
    board.tile(0.1, 0.1, 1.5, x0)
    board.text(1.75, 0.85, "$x_0$", 22, ha="left")
    board.tile(0.1, 2.1, 1.5, eps / 2)
    board.text(1.75, 2.85, r"$\epsilon$", 22, RED, ha="left")
    board.arrow((2.3, 0.85), (3.3, 1.55))
    board.arrow((2.3, 2.85), (3.3, 2.15))
    board.text(2.95, 0.62, "mix at a\nrandom $t$", 16, GREY, ha="left")
    board.tile(3.4, 1.1, 1.5, xt)
    board.text(4.15, 2.82, "$x_t$", 22)
    board.arrow((5.0, 1.85), (5.75, 1.85))
    board.box(5.85, 1.2, 2.2, 1.3, r"network  $\epsilon_\theta$" + "\n$(x_t, t)$", BLUE, 18)
    board.arrow((8.15, 1.85), (8.85, 1.85))
    board.tile(8.95, 1.1, 1.5, (eps + 0.35 * torch.randn(eps.shape, generator=generator(2))) / 2)
    board.text(9.7, 0.8, r"$\hat\epsilon$", 22, RED)
    board.arrow((2.1, 3.35), (11.5, 2.75), RED, bend=0.12)
    board.arrow((10.55, 1.85), (10.95, 1.85))
    board.box(11.0, 1.25, 1.35, 1.3, "squared\nerror", RED, 17)
    return board.fig


@shows(weights=("ddpm-cifar10",))
def network():
    """The UNet of the shipped model, drawn from its configuration."""
    net = model("ddpm-cifar10")[0].net
    widths, patch, attends = net.config["channels"], net.config["patch"], net.config["attention"]
    parameters = sum(p.numel() for p in net.parameters())
    top = 0.55 if net.config.get("schedule") else 0.0  # room for the shortcut around the network
    board = Board(4.9 + top)
    colours, sides = (BLUE, SKY, GREEN, PINK), [32 // patch // 2**i for i in range(len(widths))]
    step_y, box_h = 1.28, 0.98
    for i, (c, s) in enumerate(zip(widths, sides)):
        y, w = top + 0.75 + i * step_y, 2.55 - 0.3 * i
        words = f"{s}×{s}, {c} ch." + ("\n+ attention" if attends[i] else "")
        left, right = 2.35 + 0.55 * i, W - 2.35 - 0.55 * i - w
        board.box(left, y, w, box_h, words, colours[i], 16)
        board.box(right, y, w, box_h, words, colours[i], 16)
        if i < len(widths) - 1:
            board.arrow((left + w + 0.1, y + box_h / 2), (right - 0.1, y + box_h / 2), GREY, 2.5)
            board.arrow((left + w / 2 + 0.2, y + box_h), (left + w / 2 + 0.5, y + step_y), BLACK)
            board.arrow((right + w / 2 - 0.5, y + step_y), (right + w / 2 - 0.2, y + box_h), BLACK)
        else:
            board.arrow((left + w + 0.1, y + box_h / 2), (right - 0.1, y + box_h / 2), BLACK)
            board.text(W / 2, y + box_h / 2 - 0.35, "middle,\nattention", 15)
    board.text(W / 2, top + 0.85, "skip connections\ncarry the detail", 16, GREY)
    x0 = things(32)[3:4]
    eps = torch.randn(x0.shape, generator=generator(1))
    board.tile(0.1, top + 0.5, 1.5, q_sample(x0, 250, eps, SCHEDULE))
    board.text(0.5, top + 0.22, "$x_t$", 20)
    board.arrow((1.7, top + 1.25), (2.25, top + 1.25), BLACK)
    board.tile(W - 1.6, top + 0.5, 1.5, eps / 2)
    board.text(W - 0.5, top + 0.22, r"$\hat\epsilon$", 20, RED)
    board.arrow((W - 2.25, top + 1.25), (W - 1.7, top + 1.25), BLACK)
    board.text(0.1, top + 3.9, "every block also gets\nthe time $t$ and, if given,\nthe label $c$", 17, RED, ha="left")
    if top:
        board.ax.plot([0.95, 0.95, W - 0.95], [top + 0.42, 0.3, 0.3], color=ORANGE, linewidth=4)
        board.arrow((W - 0.95, 0.27), (W - 0.95, top + 0.45), ORANGE, 4)
        board.text(W / 2, 0.58, "shortcut: the noise need not pass through all layers", 16, GREY)
    board.small(f"model ddpm-cifar10: {parameters / 1e6:.1f} million parameters; {patch}×{patch} pixels enter as one")
    return board.fig


def small_run() -> tuple[np.ndarray, list[tuple[str, str]], str, str]:
    """The stored run of notebook 01, section "Training until a boat appears".

    Returns its samples, (rows, columns, 16, 16, 3), the last row real; a step and distance for each other row; the
    distance of other real boats; and how long it was.
    """
    notebook = json.loads((REPOSITORY / "notebooks" / "01_ddpm_training.ipynb").read_text(encoding="utf-8"))
    outputs = [one for cell in notebook["cells"] for one in cell.get("outputs", ())]
    told = "".join("".join(one.get("text", "")) for one in outputs)
    rows = re.findall(r"samples at step +(\d+): energy distance to real boats ([^,]+),", told)
    (floor,) = re.findall(r"^other real boats: (.+)$", told, flags=re.MULTILINE)
    (length,) = re.findall(r"^\d+ steps of \d+ pictures: .+ parameters$", told, flags=re.MULTILINE)
    (cell,) = (cell for cell in notebook["cells"] if 'alt="Rows of samples at four steps' in "".join(cell["source"]))
    (sheet,) = (one["data"]["image/png"] for one in cell["outputs"] if "image/png" in one.get("data", {}))
    pixels = np.array(Image.open(io.BytesIO(base64.b64decode(sheet))).convert("RGB"))
    inked = (pixels < 250).any(axis=2)
    side = 60  # pixels: every tile is longer, every letter and gap shorter
    across = runs(inked.mean(axis=0) > 0.5, side)
    down = runs(inked[:, across[0][0] :].mean(axis=1) > 0.5, side)
    if len(down) != len(rows) + 1:
        raise ValueError(f"notebook 01: expected a row of tiles for each of {len(rows)} steps and one of real boats")

    def tile(top: int, bottom: int, left: int, right: int) -> np.ndarray:
        middles = (np.arange(16) + 0.5) / 16
        y, x = (top + middles * (bottom - top)).astype(int), (left + middles * (right - left)).astype(int)
        return pixels[y][:, x]

    return np.array([[tile(*y, *x) for x in across] for y in down]), rows, floor, length


@shows(records=("ddpm_toybox10_curve",))
def training_run():
    """C1. Left, the recorded run that decides: its loss and its samples' distance. Right, notebook 01's small run."""
    curve = record("ddpm_toybox10_curve")
    steps = [row["step"] for row in curve["curve"]]
    kinds = (("loss on held-out pictures", BLUE, [statistics.mean(row["held_out_loss"]) for row in curve["curve"]]),
             ("distance of the samples", RED, [distance(row) for row in curve["curve"]]))  # fmt: skip
    tiles, rows, floor, length = small_run()
    board, side, left = Board(5.3), 0.74, 7.0
    for k, (words, colour, values) in enumerate(kinds):
        ax = board.fig.add_axes((0.06, 0.59 - 0.365 * k, 0.37, 0.29))
        errors = list(zip(*(value.errors for value in values)))
        ax.errorbar(steps, [value.value for value in values], errors, color=colour, marker="o", capsize=5)
        ax.set_title(words, fontsize=16, color=colour, loc="right", y=0.86)
        ax.tick_params(labelsize=14, labelbottom=k == 1)
        ax.margins(0.06, 0.12)
    ax.set_xlabel("training step", fontsize=15)
    board.text(0.05, 0.25, "the recorded run, which decides", 18, ha="left")
    board.text(5.95, 0.25, "notebook 01: samples", 18, ha="left")
    board.text(W - 0.05, 0.25, "distance", 18, RED, ha="right")
    for r, images in enumerate(tiles):
        y = 0.5 + r * (side + 0.06)
        name, found = (f"step {rows[r][0]}", rows[r][1]) if r < len(rows) else ("real", floor)
        board.text(5.95, y + side / 2, name, 16, ha="left")
        board.text(W - 0.05, y + side / 2, found, 15, RED, ha="right")
        for i in range(5):
            board.tile(left + i * (side + 0.06), y, side, images[i])
    n, made = curve["curve"][0]["samples_scored"], f"{curve['device']}, {curve['date']}"
    board.small(f"Loss: that of Algorithm 1, weighted (the loss on v). Left: a network of the shipped size on "
                f"Toybox-10, {curve['steps']:,} steps of {curve['batch_size']} on {made}; Fréchet distance of {n} "
                f"samples, w = 1, bars 95 % · right: {length}, boats of 16×16 pixels, first samples; energy distance "
                "of 48")  # fmt: skip
    return board.fig


@shows(weights=("ddpm-toybox10",))
def one_step_back():
    """From x_t to an earlier time: predict the clean picture, go part of the way, add noise."""
    t, before = 400, 250
    call, _ = model("ddpm-toybox10")
    x0 = things(32)[3:4]
    xt = q_sample(x0, t, torch.randn(x0.shape, generator=generator(5)), SCHEDULE)
    with torch.no_grad():
        x0_hat = predict_x0(xt, t, call(xt, t, torch.tensor([3])), SCHEDULE).clamp(-1, 1)
    mean, variance = posterior(x0_hat, xt, t, SCHEDULE, before)
    xs = mean + variance**0.5 * torch.randn(x0.shape, generator=generator(6))
    board, side = Board(4.1), 2.2
    pictures = ((xt, f"$x_t$,  t = {t}", "now"),
                (x0_hat, r"$\hat{x}_0$", "predict the clean picture"),
                (mean, "mean of the posterior", "go part of the way"),
                (xs, f"t = {before}", "add fresh noise"))  # fmt: skip
    for i, (image, name, words) in enumerate(pictures):
        x = 0.2 + i * 3.25
        board.tile(x, 0.75, side, image, frame=(GREY, BLUE, GREEN, ORANGE)[i])
        board.text(x + side / 2, 0.4, words, 17, (GREY, BLUE, GREEN, BLACK)[i])
        board.text(x + side / 2, 3.25, name, 18)
        if i:
            board.arrow((x - 0.95, 1.85), (x - 0.1, 1.85))
    board.small(about("ddpm-toybox10", f"a large step (from {t} to {before}), so that it can be seen"))
    return board.fig


@shows(weights=("ddpm-toybox10",))
def trajectory():
    """Algorithm 2 at work: x_t and the prediction of the clean picture, nine looks on the way from noise."""
    board, side = Board(3.35), 1.2
    for r, words in enumerate((r"$x_t$", r"$\hat{x}_0$")):
        board.text(0.65, 1.0 + r * 1.3, words, 24, (BLACK, BLUE)[r], ha="right")
    for i, (t, xt, x0_hat) in enumerate(at_times(path((8, 0), 2.5, size(150, 9), 0), LOOKS)):
        x = 0.9 + i * (side + 0.07)
        board.text(x + side / 2, 0.2, f"t = {t}", 16)
        board.tile(x, 0.4, side, xt[:1])
        board.tile(x, 0.4 + 1.3, side, x0_hat[:1])
    board.small(about("ddpm-toybox10", f"class {sets.CLASSES[8]}, w = 2.5, 150 of 1000 steps"))
    return board.fig


@shows(records=("ddpm_cifar10",))
def steps_quality():
    """Distance to the real pictures against the number of network evaluations, for three solvers."""
    rows, real = results()["solvers"], results()["real"]
    rows = [r for r in rows if r["spacing"] == "leading"]
    kinds = [("DDIM, fresh noise (η = 1)", RED, "s", lambda r: r["solver"] == "ddim" and r["eta"] == 1),
             ("DDIM, deterministic (η = 0)", BLUE, "o", lambda r: r["solver"] == "ddim" and r["eta"] == 0),
             ("Heun, second order", GREEN, "^", lambda r: r["solver"] == "heun")]  # fmt: skip
    floor = real["test_images_n_sweep_to_train"]
    with plt.rc_context(STYLE):
        fig, ax = plt.subplots(figsize=(W, 5.3), layout="constrained")
        everything = []
        for words, colour, marker, belongs in kinds:
            points = sorted((r["evaluations"], distance(r)) for r in rows if belongs(r))
            errors = list(zip(*(found.errors for _, found in points)))
            ax.errorbar([x for x, _ in points], [found.value for _, found in points], errors, color=colour,
                        marker=marker, markersize=11, capsize=5, label=words)  # fmt: skip
            everything += [found.value for _, found in points]
        ax.axhline(floor, color=BLACK, linestyle="--", linewidth=2, label="real pictures, as many")
        ticks = sorted({r["evaluations"] for r in rows if r["solver"] == "ddim"})
        ax.set_xscale("log")
        ax.set_xticks(ticks, [str(k) for k in ticks])
        ax.minorticks_off()
        if max(everything) > 8 * min(everything):
            ax.set_yscale("log")
        else:
            ax.set_ylim(0, 1.1 * max([*everything, floor]))
        ax.set(xlabel="evaluations of the network per picture (log scale)", ylabel="Fréchet distance (lower is better)")
        ax.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
        judge = "CIFAR-10, w = 1, bars 95 %, features of the course's classifier: not the FID of papers"
        small_print(fig, about_results(rows, judge))
    return fig


@shows(weights=("ddpm-cifar10", "ddpm-toybox10"), records=("ddpm_cifar10", "ddpm_toybox10"))
def two_worlds():
    """C2: the same noise, the same code, two data sets; below, how far both models are from each data set."""
    board, side, columns, n = Board(5.3), 0.92, 6, size(24, 12)
    label = torch.arange(n) % 10
    worlds = (("cifar10", "trained on CIFAR-10 photos", "CIFAR-10", BLUE),
              ("toybox10", "trained on Toybox-10 drawings", "Toybox-10", RED))  # fmt: skip
    scales = {name: results(name)["main"]["w"] for name, *_ in worlds}
    steps = size(results()["main"]["steps"], 2)
    for k, (name, words, data, colour) in enumerate(worlds):
        x = 0.05 + k * 6.35
        board.text(x + 2.9, 0.22, words, 19, colour)
        rows_of(board, draw(f"ddpm-{name}", label, scales[name], steps, seed=2), columns, x, 0.47, side, 0.05)
        own, other = distance(at_w(name, 1.0)), distance(results(name)["other"])
        board.text(x + 2.9, 4.6, f"distance to {data}: {own:.1f}\nof the other model: {other:.1f}", 15, colour)
    notes = [model(f"ddpm-{name}")[1] for name, *_ in worlds]
    trained = [f"{k['minutes']:.0f} minutes on {k['device']}" + (", its last run" if k.get("started_from") else "")
               for k in notes]  # fmt: skip
    board.small(f"Samples: the same {n} start noises, {steps} DDIM steps, not picked, w = {scales['cifar10']:g} left, "
                f"{scales['toybox10']:g} right · trained: left {trained[0]}; right {trained[1]} · distances: Fréchet, "
                f"in the features of a classifier of each data set, w = 1, n = {at_w('cifar10', 1.0)['n']:,}, "
                f"{results()['device']}, {results()['date']}")  # fmt: skip
    return board.fig


@shows(weights=("ddpm-toybox10",))
def conditions():
    """One column without a label and one for each class; a row shares its start noise."""
    side, gap, n, steps = 1.04, 0.06, size(4, 2), size(20, 2)
    names, null = ("no label", *sets.CLASSES), model("ddpm-toybox10")[0].num_classes
    board = Board(0.45 + n * (side + gap) + 0.3)
    label = torch.tensor([null, *range(10)]).repeat(n)
    x_T = torch.randn(n, 3, 32, 32, generator=generator(7)).repeat_interleave(11, 0)
    images = draw("ddpm-toybox10", label, 1.0, steps, x_T=x_T).reshape(n, 11, 3, 32, 32)
    for c, name in enumerate(names):
        x = 0.03 + c * (side + gap) + 0.15 * (c > 0)
        board.text(x + side / 2, 0.22, name, 15, GREY if c == 0 else BLACK)
        rows_of(board, images[:, c], 1, x, 0.45, side, gap)
    board.small(about("ddpm-toybox10", f"w = 1, {steps} DDIM steps, not picked, a row shares its start noise"))
    return board.fig


@shows()
def guidance_arrows():
    """The formula as a picture: from the unconditional prediction through the conditional one, and beyond."""
    board = Board(3.3)
    start, step = np.array([1.4, 2.55]), np.array([3.1, -0.55])
    board.arrow(tuple(start), tuple(start + 3 * step), ORANGE, 5)
    marks = ((0, GREY, "label ignored"), (1, BLUE, "label used, no guidance"), (3, RED, "beyond both"))
    for w, colour, name in marks:
        x, y = start + w * step
        board.ax.plot([x], [y], "o", color=colour, markersize=20)
        board.text(x + 0.15 * (w == 1), y + 0.42, name, 17, colour, ha="left" if w == 1 else "center")
        board.text(x, y - 0.42, f"w = {w}", 20, colour)
    board.text(start[0] + 0.1, start[1] - 0.85, r"$\epsilon_\theta(x_t, t)$", 20, GREY)
    board.text(start[0] + step[0], start[1] + step[1] - 0.85, r"$\epsilon_\theta(x_t, t, c)$", 20, BLUE)
    board.text(start[0] + 3 * step[0] - 1.55, start[1] + 3 * step[1] - 0.3, r"$\tilde\epsilon$", 26, RED)
    return board.fig


@shows(weights=("ddpm-cifar10",))
def guidance_sweep():
    """The same noise and labels at five guidance scales."""
    scales = (0, 1, 3, 5, 8)
    side, gap, steps = 0.94, 0.05, size(20, 2)
    board = Board(0.4 + 5 * (side + gap) + 0.42)
    label = torch.arange(10)
    x_T = torch.randn(10, 3, 32, 32, generator=generator(12))
    names = ("plane", "car", *cifar10.CLASSES[2:])
    for c, k in enumerate(label):
        board.text(1.75 + c * (side + gap) + side / 2, 0.2, names[k], 16)
    for r, w in enumerate(scales):
        y = 0.4 + r * (side + gap)
        board.text(1.55, y + side / 2, f"w = {w}", 22, (GREY, BLUE, GREEN, RED, PINK)[r], ha="right")
        rows_of(board, draw("ddpm-cifar10", label, w, steps, x_T=x_T), 10, 1.75, y, side, gap)
    board.small(about("ddpm-cifar10", f"{steps} DDIM steps, one start noise a column, not picked"))
    return board.fig


@shows(records=("ddpm_cifar10", "ddpm_toybox10"))
def fidelity_diversity():
    """C3: class accuracy against diversity by guidance scale; and the change of diversity, class by class, twice."""
    rows, real = sorted(results()["guidance"], key=lambda r: r["w"]), results()["real"]
    w, fidelity, spread = ([row[k] for row in rows] for k in ("w", "accuracy", "diversity"))
    with plt.rc_context(STYLE):
        fig, (a, *both) = plt.subplots(1, 3, figsize=(W, 4.8), layout="constrained", width_ratios=(1.15, 1, 1))
        half = [row["accuracy_ci95"] for row in rows]
        a.errorbar(spread, fidelity, yerr=half, color=BLUE, marker="o", markersize=10, capsize=5)
        a.plot([real["diversity"]], [real["accuracy"]], "*", color=BLACK, markersize=22)
        a.annotate("real", (real["diversity"], real["accuracy"]), (0, -24), textcoords="offset points", ha="center")
        a.margins(0.14)
        fig.canvas.draw()
        label_points(a, spread, fidelity, [f"{k:g}" for k in w])
        a.set(xlabel="diversity within a class", ylabel="share that shows the class")
        a.set_title("CIFAR-10, by w", fontsize=17)
        for ax, (name, data, classes) in zip(both, (("cifar10", "CIFAR-10", cifar10.CLASSES),
                                                    ("toybox10", "Toybox-10", sets.CLASSES))):  # fmt: skip
            weak, strong = (torch.tensor(at_w(name, k)["diversity_by_class"]) for k in (1.0, 3.0))
            change = sorted(zip((strong - weak).tolist(), classes))
            colours = [RED if value > 0 else BLUE for value, _ in change]
            ax.barh(range(10), [value for value, _ in change], color=colours, height=0.7)
            mean = statistics.paired(strong, weak)
            ax.errorbar([mean.value], [10.2], xerr=[[e] for e in mean.errors], color=BLACK, marker="o", capsize=5)
            ax.set_yticks([*range(10), 10.2], [*(name for _, name in change), "mean"], fontsize=14)
            ax.axvline(0, color=BLACK, linewidth=1.5)
            ax.invert_yaxis()
            ax.grid(axis="y", visible=False)
            ax.set_title(f"{data}, w: 1 → 3", fontsize=17)
            ax.set_xlabel("change of diversity", fontsize=15)
        judge = "features and judge: a classifier of each data set, bars 95 %"
        small_print(fig, about_results(rows, f"{rows[0]['steps']} DDIM steps, {judge}"))
    return fig


def label_points(ax, xs: list[float], ys: list[float], words: list[str]) -> None:
    """Write each word beside its point, and leave out one that would sit on another."""
    placed = []
    for x, y, word in zip(xs, ys, words):
        at = ax.transData.transform((x, y))
        if all(np.hypot(*(at - other)) > 26 for other in placed):
            placed.append(at)
            ax.annotate(word, (x, y), (11, 9), textcoords="offset points", fontsize=17, color=RED, fontweight="bold")


@shows()
def conventions():
    """Three rulers: the guidance scale of this course, of the diffusers library, and of the paper."""
    board = Board(4.6)
    left, unit = 2.75, 1.08
    rulers = ((1.3, 0, "this course,\nmost code", BLUE), (2.55, 0, "diffusers", GREEN),
              (3.8, 1, "Ho & Salimans\n2021", RED))  # fmt: skip
    at = [left + 0.35 + k * unit for k in range(9)]
    for y, shift, name, colour in rulers:
        board.text(0.05, y, name, 18, colour, ha="left")
        board.arrow((left, y), (W - 0.1, y), colour, 4)
        for k, x in enumerate(at):
            board.ax.plot([x, x], [y - 0.13, y + 0.13], color=colour, linewidth=3)
            board.text(x + 0.12 * (k < 2), y + 0.36, f"{k - shift}", 19, colour, ha="left" if k < 2 else "center")
    board.ax.plot([left, at[1]], [2.55, 2.55], color=GREEN, linewidth=13, alpha=0.4, solid_capstyle="butt")
    board.text(at[1] + 0.75, 2.22, "up to 1: no guidance, the prompt is used", 15, GREEN, ha="left")
    for x, words in (
        (at[0], "condition\nignored"),
        (at[1], "no\nguidance"),
        (at[7] + unit / 2, "Stable Diffusion's\n7.5"),
    ):
        for ends in ((0.85, 1.5), (3.4, 3.95)) if x == at[0] else ((0.85, 3.95),):  # diffusers at 0 is something else
            board.ax.plot([x, x], ends, color=BLACK, linestyle=":", linewidth=2)
        board.text(x, 0.42, words, 16)
    return board.fig


@shows(weights=("toybox-sd",))
def what_next():
    """The next three parts, a panel each: latents and a prompt; one picture edited; one subject in new pictures."""
    board, side = Board(3.9), 1.75
    spec = world.Spec("cat", "teal", "striped", "in a meadow", 0.5, 0.57, 0.7, False, 11)
    picture = world.render(spec, 160)
    sd = stable_diffusion.load("toybox")
    given = torch.from_numpy(world.render(spec, sd.resolution)).permute(2, 0, 1)[None].float() / 127.5 - 1
    z = sd.encode_image(given)[0].cpu()  # (channels, h, w)
    z = (z - z.mean((1, 2), keepdim=True)) / z.std((1, 2), keepdim=True) / 2
    panels = (("Part 2: in a small space, by text", BLUE), ("Part 3: this picture, changed", GREEN),
              ("Part 4: this subject, anywhere", ORANGE))  # fmt: skip
    for k, (words, colour) in enumerate(panels):
        board.text(0.1 + k * 4.2 + 1.9, 0.3, words, 18, colour)
    left, middle, right = 0.1, 4.3, 8.5
    board.tile(left, 0.75, side, picture)
    board.tile(left + 2.45, 0.95, 1.3, z[None, :3])
    board.arrow((left + side + 0.07, 1.62), (left + 2.4, 1.62), BLUE)
    board.text(left + 3.1, 2.42, f"latents {z.shape[1]}×{z.shape[2]}", 15)
    board.text(left + 1.9, 3.05, "“a photo of a teal striped cat\nin a meadow”", 15)
    board.tile(middle, 0.75, side, picture)
    board.tile(middle + 2.05, 0.75, side, world.render(replace(spec, colour="orange"), 160))
    board.arrow((middle + side + 0.03, 1.62), (middle + 2.03, 1.62), GREEN)
    board.text(middle + 1.9, 3.05, "“a photo of an orange\nstriped cat in a meadow”", 15)
    for i, where in enumerate(("in the desert", "under water")):
        moved = replace(spec, scene=where, x=0.4 + 0.2 * i, flip=i == 1)
        board.tile(right + i * 2.05, 0.75, side, world.render(moved, 160))
        board.text(right + i * 2.05 + side / 2, 3.05, f"“$S_*$\n{where}”", 15)
    board.small("Pictures: the Toybox renderer of this course, not results. Latents: three of the channels of its "
                "autoencoder, standardised.")  # fmt: skip
    return board.fig
