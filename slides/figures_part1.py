"""The figures of Part 1: diffusion, sampling, guidance."""

import datetime
import json
import time
from functools import lru_cache

import matplotlib.pyplot as plt
import numpy as np
import torch
from board import GREY, STYLE, Board, W, generator, rows_of, shows, size, small_print, wrapped
from torch import Tensor

from course_lib import plots
from course_lib.data import cifar10
from course_lib.diffusion import checkpoint, guidance, samplers, schedule
from course_lib.diffusion.ddpm import posterior, predict_x0, q_sample
from course_lib.environment import CHECKPOINTS, RESULTS, device_name
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
def results() -> dict:
    return json.loads((RESULTS / "ddpm_cifar10.json").read_text())


def about_results(rows: list[dict], *more: str) -> str:
    """Small print for curves of measured rows."""
    r, n = results(), sorted({row["n"] for row in rows})
    last = ", in its last run" if r["training"]["before"] else ""
    trained = f"model trained {r['training']['minutes']:.0f} minutes on {r['training']['device']}{last}"
    count = f"n = {' and '.join(f'{k:,}' for k in n)} samples a point, one seed"
    return " · ".join([*more, count, f"measured on {r['device']}, {r['date']}", trained])


# ---- the figures, in the order of the deck ----


@shows()
def title():
    """Noise turns into pictures: Toybox pictures at falling noise, from left to right."""
    board = Board(3.5)
    x0, columns, side = things(48, seed=3), 9, 1.31
    eps = torch.randn(x0.shape, generator=generator(0))
    for row, k in enumerate((3, 0)):
        for i in range(columns):
            t = round(999 * (1 - i / (columns - 1)) ** 2)
            xt = q_sample(x0[k : k + 1], t, eps[k : k + 1], SCHEDULE)
            board.tile(0.05 + i * (side + 0.065), 0.1 + row * (side + 0.1), side, xt)
    board.text(0.05, 3.2, "noise", 18, GREY, ha="left")
    board.text(W - 0.05, 3.2, "picture", 18, GREY, ha="right")
    board.arrow((1.0, 3.2), (W - 1.3, 3.2), BLUE)
    return board.fig


@shows()
def builds_to():
    """A few photos of one subject, and the pictures that are asked for. Both drawn by the renderer, and called so."""
    board = Board(4.7)

    def scene(noun, where, x, y, s, flip=False):
        spec = world.Spec(noun, "teal", "striped", where, x, y, s, flip, 11)
        return world.render(spec, 160)

    noun = "cat" if "cat" in sets.CLASSES else sets.CLASSES[0]
    scenes = list(world.SCENES)
    for i, where in enumerate(scenes[:4]):
        picture = scene(noun, where, 0.5, 0.55, 0.74 + 0.04 * (i % 2), flip=i % 2 == 1)
        board.tile(0.1 + i % 2 * 1.75, 0.6 + i // 2 * 1.75, 1.68, picture)
    board.text(1.8, 0.28, "a few photos of one subject", 18)
    board.box(4.25, 1.55, 1.75, 1.5, "the model\nlearns  $S_*$", ORANGE, 19)
    board.arrow((3.6, 2.3), (4.17, 2.3))
    board.arrow((6.06, 2.3), (6.6, 2.3))
    for i, where in enumerate(scenes[4:7]):
        board.tile(6.68 + i * 1.92, 1.35, 1.84, scene(noun, where, 0.4 + 0.1 * i, 0.57, 0.66, flip=i == 1))
        board.text(7.6 + i * 1.92, 3.55, f"“$S_*$\n{where}”", 15)
    board.text(W - 0.05, 1.05, "the same subject, where a prompt says", 18, ha="right")
    board.small("The task, not a result: every picture here is drawn by the Toybox renderer of this course.")
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
    board, side = Board(5.5), 1.52
    label = torch.tensor([3])
    for r, words in enumerate((r"it sees  $x_t$", r"it answers  $\hat\epsilon$", r"so the picture is  $\hat{x}_0$")):
        board.text(3.15, 1.2 + r * 1.62, words, 20, (BLACK, RED, BLUE)[r], ha="right")
    for i, t in enumerate(times):
        xt = q_sample(x0, t, eps, SCHEDULE)
        with torch.no_grad():
            eps_hat = call(xt, t, label)
        x = 3.5 + i * 1.75
        board.text(x + side / 2, 0.2, f"t = {t}", 18)
        for r, image in enumerate((xt, eps_hat / 2, predict_x0(xt, t, eps_hat, SCHEDULE))):
            board.tile(x, 0.45 + r * 1.62, side, image)
    board.tile(10.85, 0.45 + 2 * 1.62, side, x0)
    board.text(10.85 + side / 2, 0.45 + 1.62 * 2 - 0.25, r"truth  $x_0$", 18)
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
    board.text(0.1, top + 3.9, "every block also hears\nthe time $t$ and, if given,\nthe label $c$", 17, RED, ha="left")
    if top:
        board.ax.plot([0.95, 0.95, W - 0.95], [top + 0.42, 0.3, 0.3], color=ORANGE, linewidth=4)
        board.arrow((W - 0.95, 0.27), (W - 0.95, top + 0.45), ORANGE, 4)
        board.text(W / 2, 0.58, "shortcut: the noise need not pass through all layers", 16, GREY)
    board.small(f"model ddpm-cifar10: {parameters / 1e6:.1f} million parameters; {patch}×{patch} pixels enter as one")
    return board.fig


def energy_distance(a: Tensor, b: Tensor) -> float:
    """How far two sets of pictures are apart: 2 E|a-b| - E|a-a'| - E|b-b'| on 8x8 thumbnails, 0 for equal sources."""
    a, b = (torch.nn.functional.avg_pool2d(x, 4).flatten(1) for x in (a, b))
    return (2 * torch.cdist(a, b).mean() - torch.pdist(a).mean() - torch.pdist(b).mean()).item()


@shows()
def training_run():
    """C1: a small network learns Toybox-10; its loss, and what Algorithm 2's samples look like on the way."""
    from course_lib.diffusion.train import Training
    from course_lib.diffusion.unet import UNet

    steps, batch, count, n = size(400, 3), 32, size(1500, 40), size(48, 8)
    milestones = [size(10, 1), size(40, 2), size(120, 2), steps]
    arrays = sets.toybox10(count + n, 0, workers=1)["train_images"].transpose(0, 3, 1, 2).copy()
    images, real = torch.from_numpy(arrays[:count]), torch.from_numpy(arrays[count:]).float() / 127.5 - 1
    other = torch.from_numpy(arrays[:n]).float() / 127.5 - 1
    torch.manual_seed(0)
    net = UNet(channels=(32, 64), attention=(False, True), patch=2, schedule="linear")
    training = Training(net, SCHEDULE, images, batch_size=batch, lr=2e-3, warmup=20, total_steps=steps,
                        ema_decay=0.98, weighting="v")  # fmt: skip
    losses, rows, distances, sampling = [], [], [], size(25, 2)
    x_T = torch.randn(n, 3, 32, 32, generator=generator(4))
    start, drawing = time.time(), 0.0
    for step, loss in training.steps(steps):
        losses.append(loss.item())
        if step in milestones:
            began = time.time()
            with torch.autocast("cpu", torch.bfloat16):
                x0 = samplers.last(samplers.ddpm(training.ema.model, x_T, SCHEDULE, sampling, generator=generator(6)))
            rows.append(x0.float()[:5])
            distances.append(energy_distance(x0.float(), real))
            drawing += time.time() - began
    minutes, floor = (time.time() - start - drawing) / 60, energy_distance(other, real)
    with plt.rc_context(STYLE):
        fig = plt.figure(figsize=(W, 5.3))
        ax = fig.add_axes((0.07, 0.22, 0.34, 0.68))
        ax.plot(range(1, steps + 1), losses, color=BLUE, alpha=0.3, linewidth=1.5)
        width = size(20, 1)
        mean = np.convolve(losses, np.ones(width) / width, "valid")
        ax.plot(np.arange(len(mean)) + 1 + (width - 1) / 2, mean, color=BLUE)
        for m in milestones:
            ax.axvline(m, color=ORANGE, linewidth=2, linestyle=":")
        ax.set(xlabel="training step", ylabel="loss, weighted for v", ylim=(0, None), title="The loss of Algorithm 1")
        fig.text(0.445, 0.94, "samples of Algorithm 2", fontsize=19)
        fig.text(0.998, 0.94, "distance to data", fontsize=17, ha="right")
        wide, high = 0.068, 0.068 * W / 5.3
        for r, (m, row, distance) in enumerate(zip(milestones, rows, distances)):
            y = 0.745 - r * 0.18
            fig.text(0.525, y + high / 2, f"step {m}", ha="right", va="center", fontsize=17)
            for i, image in enumerate(row):
                tile = fig.add_axes((0.54 + i * 0.0725, y, wide, high))
                tile.imshow(plots.to_uint8(image)[0], interpolation="nearest", aspect="auto")
                tile.axis("off")
            fig.text(0.985, y + high / 2, f"{distance:.2f}", ha="right", va="center", fontsize=20, color=RED)
        fig.text(0.985, 0.12, f"two sets of real pictures: {floor:.2f}", ha="right", fontsize=16, color=RED)
        parameters = sum(p.numel() for p in net.parameters()) / 1e6
        note = (f"UNet of {parameters:.2f} M parameters, {steps} steps of {batch} on {count:,} Toybox-10 pictures, "
                f"{minutes:.1f} minutes on {device_name()}, {datetime.date.today()}, one seed · "
                f"energy distance of n = {n} samples ({sampling} of 1000 steps), 8×8 thumbnails")  # fmt: skip
        fig.text(0.998, 0.004, wrapped(note), fontsize=11, color=GREY, ha="right", va="bottom")
    return fig


@shows(weights=("ddpm-toybox10",))
def one_step_back():
    """From x_t to an earlier time: guess the clean picture, go part of the way, add a little noise."""
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
                (x0_hat, r"$\hat{x}_0$", "guess the clean picture"),
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
    """Algorithm 2 at work: x_t and the guess of the clean picture, nine looks on the way from noise."""
    call, _ = model("ddpm-toybox10")
    steps, columns, side = size(250, 9), 9, 1.2
    label = torch.tensor([3])
    x_T = torch.randn(1, 3, 32, 32, generator=generator(3))
    path = list(samplers.ddpm(guidance.guided(call, label, 1.5), x_T, SCHEDULE, steps, generator=generator(3)))
    path = [(SCHEDULE.T, x_T, path[0][2]), *path]
    board = Board(3.35)
    for r, words in enumerate((r"$x_t$", r"$\hat{x}_0$")):
        board.text(0.65, 1.0 + r * 1.3, words, 24, (BLACK, BLUE)[r], ha="right")
    for i in range(columns):
        k = round(i * (len(path) - 1) / (columns - 1))
        _, xt, x0_hat = path[k]
        left = path[k + 1][0] if k + 1 < len(path) else 0
        x = 0.9 + i * (side + 0.07)
        board.text(x + side / 2, 0.2, f"t = {left if k else SCHEDULE.T}", 16)
        board.tile(x, 0.4, side, xt)
        board.tile(x, 0.4 + 1.3, side, x0_hat)
    board.small(about("ddpm-toybox10", f"class {sets.CLASSES[3]}, w = 1.5, {steps} of 1000 steps"))
    return board.fig


@shows(records=("ddpm_cifar10.json",))
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
            points = sorted((r["evaluations"], r["frechet"]) for r in rows if belongs(r))
            ax.plot(*zip(*points), color=colour, marker=marker, markersize=12, label=words)
            everything += [y for _, y in points]
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
        judge = "w = 1, features of the course's CIFAR-10 classifier: not the FID of papers"
        small_print(fig, about_results(rows, judge))
    return fig


@shows(weights=("ddpm-cifar10", "ddpm-toybox10"))
def two_worlds():
    """C2: the same noise, the same code, two data sets."""
    board, side, columns, n, steps = Board(5.15), 0.92, 6, size(24, 12), size(25, 2)
    label = torch.arange(n) % 10
    for k, (name, words, colour) in enumerate((("ddpm-cifar10", "trained on CIFAR-10 photos", BLUE),
                                               ("ddpm-toybox10", "trained on Toybox-10 drawings", RED))):  # fmt: skip
        x = 0.1 + k * 6.35
        board.text(x + 2.9, 0.28, words, 20, colour)
        rows_of(board, draw(name, label, 1.5, steps, seed=2), columns, x, 0.6, side)
    notes = [model(name)[1] for name in ("ddpm-cifar10", "ddpm-toybox10")]
    trained = [f"{k['steps']:,} steps in {k['minutes']:.0f} minutes on {k['device']}, {k['date']}"
               + (", its last run" if k.get("started_from") else "") for k in notes]  # fmt: skip
    board.small(f"the same {n} start noises, {steps} DDIM steps, w = 1.5, n = {n} each, not picked · "
                f"trained: left {trained[0]}; right {trained[1]}")  # fmt: skip
    return board.fig


@shows(weights=("ddpm-cifar10",))
def conditions():
    """One column a class, one row a start noise: the label as a second input."""
    side, gap, n, steps = 1.14, 0.06, size(4, 2), size(25, 2)
    names = ("plane", "car", *cifar10.CLASSES[2:])
    board = Board(0.45 + 4 * (side + gap) + 0.42)
    label, x_T = torch.arange(10).repeat(n), torch.randn(n, 3, 32, 32, generator=generator(7)).repeat_interleave(10, 0)
    images = draw("ddpm-cifar10", label, 1.0, steps, x_T=x_T)
    for c, name in enumerate(names):
        board.text(0.25 + c * (side + gap) + side / 2, 0.22, name, 18)
    rows_of(board, images, 10, 0.25, 0.45, side, gap)
    board.small(
        about("ddpm-cifar10", f"w = 1, {steps} DDIM steps, n = {len(images)}, not picked, a row shares its noise")
    )
    return board.fig


@shows()
def guidance_arrows():
    """The formula as a picture: from the unconditional prediction through the conditional one, and beyond."""
    board = Board(3.3)
    start, step = np.array([1.9, 2.55]), np.array([3.1, -0.55])
    board.arrow(tuple(start), tuple(start + 3 * step), ORANGE, 5)
    marks = ((0, GREY, "any picture"), (1, BLUE, "the class, as the data has it"), (3, RED, "more than the data"))
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
    scales = (0, 1, 2, 4, 8)
    side, gap, steps = 0.98, 0.05, size(25, 2)
    board = Board(0.4 + 5 * (side + gap) + 0.42)
    label = torch.tensor([0, 1, 4, 6, 7, 8, 9, 3, 5, 2])
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


@shows(records=("ddpm_cifar10.json",))
def fidelity_diversity():
    """C3: class accuracy against diversity, one point for each guidance scale; and the Fréchet distance over w."""
    rows, real = sorted(results()["guidance"], key=lambda r: r["w"]), results()["real"]
    w, fidelity, spread = ([row[k] for row in rows] for k in ("w", "accuracy", "diversity"))
    with plt.rc_context(STYLE):
        fig, (a, b) = plt.subplots(1, 2, figsize=(W, 5.3), layout="constrained", width_ratios=(1.5, 1))
        half = [row["accuracy_ci95"] for row in rows]
        a.errorbar(spread, fidelity, yerr=half, color=BLUE, marker="o", markersize=11, capsize=5)
        a.plot([real["diversity"]], [real["accuracy"]], "*", color=BLACK, markersize=24)
        a.annotate("real pictures", (real["diversity"], real["accuracy"]), (-14, -2), textcoords="offset points",
                   ha="right", va="center")  # fmt: skip
        a.margins(0.14)
        fig.canvas.draw()
        label_points(a, spread, fidelity, [f"{k:g}" for k in w])
        a.set(xlabel="diversity within a class", ylabel="share that shows the class")
        a.set_title("Fidelity against diversity, by w")
        b.plot(w, [row["frechet"] for row in rows], color=RED, marker="o", markersize=11)
        b.set(xlabel="guidance scale w", ylabel="Fréchet distance", title="Distance to real pictures")
        best = min(rows, key=lambda row: row["frechet"])
        b.axvline(best["w"], color=GREY, linestyle=":", linewidth=2)
        at = (best["w"], b.get_ylim()[1])
        b.annotate(f"lowest at w = {best['w']:g}", at, (6, -4), textcoords="offset points", va="top")
        judge = "features and judge: the course's CIFAR-10 classifier, bars 95 %"
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
    """Two rulers: the guidance scale of this course, and of the paper."""
    board = Board(3.7)
    left, unit = 2.4, 1.13
    rulers = ((1.2, 0, "this course,\ndiffusers,\nmost code", BLUE), (2.8, 1, "Ho & Salimans\n2021", RED))
    for y, shift, name, colour in rulers:
        board.text(0.1, y, name, 18, colour, ha="left")
        board.arrow((left, y), (W - 0.1, y), colour, 4)
        for k in range(9):
            x = left + 0.35 + k * unit
            board.ax.plot([x, x], [y - 0.13, y + 0.13], color=colour, linewidth=3)
            board.text(x + 0.12 * (k < 2), y + 0.38, f"{k - shift}", 20, colour, ha="left" if k < 2 else "center")
    for k, words in ((0, "condition\nignored"), (1, "no\nguidance"), (7.5, "Stable Diffusion's\nusual 7.5")):
        x = left + 0.35 + k * unit
        board.ax.plot([x, x], [0.75, 2.95], color=BLACK, linestyle=":", linewidth=2)
        board.text(x, 0.4, words, 16)
    return board.fig
