"""The figures of Part 4 from Custom Diffusion on: its weights, merging, all methods side by side."""

from functools import lru_cache

import matplotlib.pyplot as plt
import numpy as np
import torch
from board import GREY, STYLE, Board, W, shows, size, wrapped
from PIL import Image
from recorded import SUBJECTS, mean_score, measured_on, record, rows
from safetensors import safe_open

from course_lib.cli.methods import METHODS
from course_lib.environment import CHECKPOINTS, REPOSITORY, RESULTS
from course_lib.evaluation import rules_methods, rules_models, statistics
from course_lib.plots import BLACK, BLUE, GREEN, ORANGE, PINK, RED, SKY
from course_lib.toybox import subjects
from course_lib.toybox.scenes import SCENES
from course_lib.toybox.world import NOUNS, render

NAMES = {"base": "untouched model"} | {key: method.title for key, method in METHODS.items()}
MARKS = dict(zip((*NAMES, "truth"), ((BLACK, "X"), (BLUE, "o"), (ORANGE, "s"), (GREEN, "^"), (PINK, "D"), (RED, "*"))))
# Trained numbers in Stable Diffusion 1.5 by its published configuration: a row, LoRA of rank 4, keys and values, UNet.
PUBLISHED = {"textual_inversion": 768, "lora": 797_184, "custom_diffusion": 19_169_280, "dreambooth": 859_520_964}
CLAIMS, PAIRS, STYLES, ROWS = "claims", "pairs", "styles", "personalization"


# ---- records ----


def value(claim: str, key: str) -> statistics.Estimate:
    """A value of a claim with its interval."""
    return statistics.Estimate(**record(CLAIMS)["claims"][claim]["values"][key])


@lru_cache
def pairs() -> dict:
    """pair -> method -> score -> values."""
    return rules_methods.of_pairs(record(PAIRS)["rows"])


def pair_level(label: str, score: str) -> statistics.Estimate:
    return statistics.over_subjects([one[label][score] for one in pairs().values()])


def about_rows(*more: str) -> str:
    seeds = len(record(ROWS)["rows"]["biscuit"]["lora"])
    return " · ".join([f"{len(SUBJECTS)} subjects, {seeds} training seeds each, bars: 95 % over subjects", *more,
                       measured_on(ROWS)])  # fmt: skip


def about_pairs(*more: str) -> str:
    images = record(PAIRS)["images"]
    words = f"{len(pairs())} pairs, 2 training seeds, 12 prompts of {images} samples; bars: 95 % over pairs"
    return " · ".join([words, *more, measured_on(PAIRS)])


@lru_cache
def sheet(name: str) -> np.ndarray:
    return np.array(Image.open(RESULTS / name).convert("RGB"))


def pair_sample(label: str, column: int) -> np.ndarray:
    """One recorded sample of two subjects: its row's label, and which of the six scenes."""
    row = record(PAIRS)["samples"].index(label)
    return sheet("pairs_samples.png")[64 * row : 64 * row + 64, 64 * column : 64 * column + 64]


def pair_tiles(
    board: Board, chosen: dict[str, str], labels: dict[str, str], columns: tuple[int, int], x: float
) -> None:
    """Recorded samples of pairs of subjects. chosen: pair -> its title.  labels: row -> its title.  x: of the first."""
    side, gap = 0.8, 0.05
    for p, (pair, words) in enumerate(chosen.items()):
        left = x + p * (2 * side + gap + 0.15)
        board.text(left + side, 0.28, words, 16)
        for r, label in enumerate(labels):
            for c, column in enumerate(columns):
                tile = pair_sample(f"{pair} {label}", column)
                board.tile(left + c * (side + gap), 0.55 + r * (side + gap), side, tile)
    for r, words in enumerate(labels.values()):
        board.text(x - 0.1, 0.55 + r * (side + gap) + side / 2, words, 15, ha="right")


def view(name: str, number: int) -> np.ndarray:
    """One of the five pictures that a subject or a style is learnt from."""
    return np.array(Image.open(REPOSITORY / "data" / "subjects" / name / f"view_{number}.png").convert("RGB"))


def errors(estimates: list[statistics.Estimate]) -> np.ndarray:
    return np.array([one.errors for one in estimates]).T


def panel(fig, x: float, y: float, w: float, h: float, height: float):
    """Axes at a place in inches, y downwards."""
    return fig.add_axes((x / W, 1 - (y + h) / height, w / W, h / height))


def bare(ax) -> None:
    """No grid across bars."""
    ax.grid(axis="x" if ax.get_xscale() == "log" else "y", visible=True)


def small(fig, words: str) -> None:
    """Small print of a figure whose axes are placed by hand."""
    fig.text(0.998, 0.004, wrapped(words), fontsize=11, color=GREY, ha="right", va="bottom")


# ---- opening ----


def individual(noun: str) -> tuple[subjects.Subject, list[np.ndarray]]:
    """A subject drawn at random for this noun, and the five pictures that measurements/pairs.py teaches it from."""
    place = list(NOUNS).index(noun)
    subject = subjects.individual(noun, np.random.default_rng([place, 16]))
    return subject, [render(spec, 192) for spec in subjects.views(subject, 100 + place)]


@shows(records=(PAIRS, "pairs_samples.png"))
def title_part4b():
    """Two subjects, and pictures with both: the first pair of the record, its first training, its first scenes."""
    pair = record(PAIRS)["samples"][0].removesuffix(" ground truth")
    board, side, large = Board(3.7), 1.2, 2.2
    board.text(1.97, 0.25, "two subjects, five pictures each", 17)
    for r, noun in enumerate(pair.split()):
        for c, image in enumerate(individual(noun)[1][:3]):
            board.tile(0.1 + c * 1.27, 0.5 + r * 1.27, side, image)
    one, other = pair.split()
    board.arrow((4.1, 1.72), (5.1, 1.72))
    board.text(8.75, 0.25, f"“a photo of a $V_1^*$ {one} next to a $V_2^*$ {other} …”", 17)
    for c, scene in enumerate(list(SCENES)[:3]):
        board.tile(5.3 + c * (large + 0.1), 0.5, large, pair_sample(f"{pair} joint 0", c))
        board.text(5.3 + c * (large + 0.1) + large / 2, 2.95, f"… {scene}", 17)
    words = (
        "three of the five pictures of each · joint training, first training seed, first scenes, none selected; the "
    )
    board.small(
        f"{words}first of {len(pairs())} pairs, whose nouns the untouched model draws best · {measured_on(PAIRS)}"
    )
    return board.fig


# ---- Custom Diffusion ----


@lru_cache
def shares() -> dict[str, float]:
    """Share of the shipped UNet's parameters by kind of layer; "keys, values" is a part of the cross-attention."""
    counts = dict.fromkeys(("cross-attention", "self-attention", "rest", "keys, values"), 0)
    for path in sorted((CHECKPOINTS / "toybox-sd" / "unet").glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():
                number = int(np.prod(file.get_slice(name).get_shape()))
                kind = "cross-attention" if ".attn2." in name else "self-attention" if ".attn1." in name else "rest"
                counts[kind] += number
                if name.endswith((".attn2.to_k.weight", ".attn2.to_v.weight")):
                    counts["keys, values"] += number
    whole = counts["cross-attention"] + counts["self-attention"] + counts["rest"]
    return {kind: number / whole for kind, number in counts.items()}


@shows(weights=("toybox-sd",), records=(CLAIMS,))
def changes_by_kind():
    """C14: how much more three kinds of layers change on a subject than in a control; and what their changes carry."""
    changes, kinds = record(CLAIMS)["experiments"]["changes"], ("cross-attention", "self-attention", "rest")
    logs = [statistics.over_subjects([one["excess"][kind] for one in changes.values()]) for kind in kinds]
    height = 4.5
    with plt.rc_context(STYLE):
        fig = plt.figure(figsize=(W, height))
        a, b = panel(fig, 1.2, 0.45, 3.6, 2.75, height), panel(fig, 5.85, 0.45, 6.45, 2.75, height)
        tops, low, high = (np.exp([getattr(one, key) for one in logs]) for key in ("value", "low", "high"))
        a.bar(range(3), tops - 1, bottom=1, width=0.6, color=(BLUE, SKY, GREY), capsize=6,
              yerr=[tops - low, high - tops], error_kw={"linewidth": 2.5})  # fmt: skip
        a.set(ylim=(1, None), ylabel="on the subject\n/ in the control", title="How much they change")
        a.set_xlabel("in the bars: share of all weights", fontsize=14)
        a.set_xticks(range(3), ["cross-\nattention", "self-\nattention", "the\nrest"], fontsize=14)
        for place, kind in enumerate(kinds):
            a.text(place, 1.012, f"{shares()[kind]:.0%}", ha="center", fontsize=15, color="white")
        parts = ("none", *kinds, "rest, scaled", "all")
        carried = [statistics.over_subjects([one["fidelity"][part] for one in changes.values()]) for part in parts]
        colours = (BLACK, BLUE, SKY, GREY, GREY, ORANGE)
        b.bar(range(6), [one.value for one in carried], width=0.62, yerr=errors(carried), capsize=5, color=colours,
              error_kw={"linewidth": 2, "ecolor": RED})  # fmt: skip
        b.patches[4].set(alpha=0.55)
        words = ("no\nchange", "cross-\nattention", "self-\nattention", "the\nrest", "the rest,\nscaled", "all")
        b.set_xticks(range(6), words, fontsize=14)
        b.set(ylabel="subject fidelity", title="What the change of one kind alone brings", ylim=(0, None))
        for ax in (a, b):
            ax.grid(axis="x", visible=False)
        words = f"{len(changes)} subjects, bars: 95 % over subjects · left, 3 training seeds: the control is the same "
        words += "training on the model's own class pictures; 1 = as in the control · right: the change of one kind of "
        words += "layer is added to the untouched model; scaled: to the size of the cross-attention's · "
        small(fig, words + measured_on(CLAIMS))
    return fig


@shows(weights=("toybox-sd",), records=(CLAIMS, ROWS))
def bytes_and_gap():
    """C15: bytes of each method's file, here and for Stable Diffusion 1.5; Custom Diffusion minus DreamBooth."""
    order, height = ("textual_inversion", "lora", "custom_diffusion", "dreambooth"), 4.4
    ours = [record(ROWS)["rows"]["biscuit"][key]["0"]["bytes"] for key in order]
    theirs = [4 * PUBLISHED[key] for key in order]
    with plt.rc_context(STYLE):
        fig = plt.figure(figsize=(W, height))
        a, b = panel(fig, 2.3, 0.45, 4.5, 2.85, height), panel(fig, 8.85, 0.45, 3.45, 2.85, height)
        for shift, values, colour in ((-0.2, ours, BLUE), (0.2, theirs, ORANGE)):
            places = [k + shift for k in range(4)]
            a.barh(places, values, 0.36, color=colour)
            for place, number in zip(places, values):
                a.text(number * 1.5, place, in_bytes(number), va="center", fontsize=15, color=colour)
        a.set(xscale="log", xlim=(100, 3e12), title="Bytes of a file, logarithmic")
        a.set_yticks(range(4), [NAMES[key] for key in order])
        a.set_xticks([1e3, 1e6, 1e9], ["1 kB", "1 MB", "1 GB"])
        a.minorticks_off()
        a.invert_yaxis()
        a.text(0.99, 0.88, "this course", color=BLUE, ha="right", transform=a.transAxes, fontsize=17)
        a.text(0.99, 0.77, "Stable Diffusion 1.5", color=ORANGE, ha="right", transform=a.transAxes, fontsize=17)
        found = [value("C15", key) for key in ("gain", "clip_t")]
        for place, (one, colour) in enumerate(zip(found, (BLUE, GREEN))):
            b.errorbar(one.value, place, xerr=errors([one]), marker="o", markersize=13, capsize=7, color=colour)
        b.axvline(0, color=BLACK, linewidth=1.5)
        b.axvline(-rules_methods.MARGIN, color=RED, linestyle="--", linewidth=2.5)
        b.text(-rules_methods.MARGIN - 0.003, -0.62, "margin", color=RED, va="center", ha="right", fontsize=16)
        b.set_yticks([0, 1], ["gain in subject\nfidelity", "CLIP-T"])
        b.set(ylim=(1.6, -0.8))
        b.text(1, 1.05, "Custom Diffusion − DreamBooth", transform=b.transAxes, ha="right", fontsize=19)
        b.set_xlabel("claimed: right of the margin", fontsize=15)
        words = "files in float32; Stable Diffusion 1.5: numbers trained by its published configuration, LoRA of rank 4"
        small(fig, about_rows(words + " · gain: over the method's own prompt before training"))
    return fig


def in_bytes(number: float) -> str:
    for unit, base in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= base:
            shown = number / base
            return f"{shown:.1f} {unit}" if shown < 10 else f"{shown:.0f} {unit}"
    return f"{number:.0f} bytes"


@shows(records=(PAIRS,))
def joint_pairs():
    """C16: recorded samples of joint training on three pairs; both nouns, and the lower subject fidelity."""
    board = Board(4.55)
    labels = {
        "ground truth": "truth",
        "untouched model": "untouched",
        "joint 0": "joint",
        "joint, pairs 0": "joint,\npairs",
    }
    chosen = {"mushroom bus": "mushroom, bus", "clock bus": "clock, bus", "owl fish": "owl, fish"}
    pair_tiles(board, chosen, labels, (0, 3), 1.3)
    rows_ = {"ground truth": ("truth", BLACK), "untouched model": ("untouched,\nplain nouns", BLACK),
             rules_methods.UNTRAINED: ("new words,\nuntrained", BLACK), "joint": ("joint", BLUE),
             "joint, pairs": ("joint, pairs", GREEN)}  # fmt: skip
    limits = (rules_methods.BOTH, rules_methods.SHARE_OF_TRUTH * pair_level("ground truth", rules_methods.LOW).value)
    for k, (score, title) in enumerate((("both_nouns", "both nouns read"), (rules_methods.LOW, "lower likeness"))):
        ax = panel(board.fig, 8.4 + 2.05 * k, 0.5, 1.85, 2.95, 4.55)
        for place, (label, (_, colour)) in enumerate(rows_.items()):
            one = pair_level(label, score)
            ax.errorbar(one.value, place, xerr=errors([one]), marker="o", markersize=10, capsize=5, color=colour,
                        linewidth=2.5)  # fmt: skip
        ax.axvline(limits[k], color=RED, linestyle="--", linewidth=2.5)
        ax.set(xlim=(-0.05, 1.12), ylim=(4.6, -0.6))
        ax.set_title(title, fontsize=16)
        ax.set_yticks(range(5), [words for words, _ in rows_.values()] if k == 0 else [""] * 5, fontsize=14)
        ax.set_xticks([0, 0.5, 1], ["0", ".5", "1"])
    board.text(W, 3.97, "dashed: what the claim asks for", 14, RED, ha="right")
    words = "first samples of the first training, none selected; three of the pairs chosen to show all kinds; "
    board.small(about_pairs(words + "lower likeness: the lower of the two subject fidelities"))
    return board.fig


@shows()
def merge_idea():
    """What a merged matrix has to do: give the concepts' own answers to their words, the old ones to all others."""
    board = Board(3.75)
    ways = ((0.45, "words “$V_1^*$ dog”", "exactly as $W_1$ does", BLUE), (1.5, "words “$V_2^*$ teapot”",
            "exactly as $W_2$ does", GREEN), (2.75, "ordinary captions", "nearly as $W_0$ did", GREY))  # fmt: skip
    board.box(5.2, 1.0, 2.0, 1.5, "one matrix\n$W$", ORANGE, 22)
    for y, asked, answer, colour in ways:
        board.box(0.75, y, 3.3, 0.88, asked, colour, 20)
        board.box(8.35, y, 3.3, 0.88, answer, colour, 20)
        middle = 1.75 + 0.25 * (y - 1.31)
        board.arrow((4.15, y + 0.44), (5.12, middle), colour)
        board.arrow((7.28, middle), (8.27, y + 0.44), colour)
    board.text(0.4, 1.4, "$C$", 26, BLUE)
    board.text(0.38, 3.2, r"$C_\mathrm{reg}$", 21, GREY)
    board.text(W - 0.4, 1.4, "$V$", 26, BLUE)
    board.text(6.2, 0.55, "must hold", 18, RED)
    board.text(6.2, 3.2, "as near as possible", 18, RED)
    return board.fig


@shows(records=(CLAIMS,))
def merge_numbers():
    """C17: what the constraint misses, by the closed form and by averaging; the distance to another solver."""
    found = record(CLAIMS)["claims"]["C17"]["values"]
    bars = (("constraint missed, closed form", found["residual"], BLUE, 1e-5),
            ("distance to another solver", found["gap_to_solver"], GREEN, 1e-3),
            ("constraint missed, mean of both", found["residual_of_average"], ORANGE, None))  # fmt: skip
    height = 2.75
    with plt.rc_context(STYLE):
        fig = plt.figure(figsize=(W, height))
        ax = panel(fig, 4.5, 0.05, 7.7, 1.75, height)
        for place, (_, number, colour, limit) in enumerate(bars):
            ax.barh(place, number, 0.62, color=colour, left=1e-9)
            ax.text(
                number * 1.5, place, f"{number:.1e}" if number < 0.01 else f"{number:.2f}", va="center", fontsize=18
            )
            if limit:
                ax.plot([limit, limit], [place - 0.42, place + 0.42], color=RED, linewidth=4)
        ax.text(1.3e-5, 0, " limit 1e-5", color=RED, fontsize=15, va="center")
        ax.text(1.3e-3, 1, " limit 1e-3", color=RED, fontsize=15, va="center")
        ax.set(xscale="log", xlim=(1e-9, 10))
        ax.set_yticks(range(3), [words for words, *_ in bars])
        ax.invert_yaxis()
        ax.set_xlabel("share of what was asked for, logarithmic", fontsize=15)
        words = f"largest of all layers, pairs and training seeds; a merge takes at most {found['seconds']:.1f} s; "
        small(fig, words + f"float32 matrices, checked in float64; {measured_on(CLAIMS)}")
    return fig


@shows(records=(CLAIMS,))
def word_in_name():
    """C18: "castle" after a cat was learnt as "castle cat": is it still a castle, and how much like the cat?"""
    board, done = Board(4.4), record(CLAIMS)["experiments"]["compound"]
    for k in range(3):
        board.tile(0.1 + k * 1.27, 0.55, 1.2, view("mochi", k + 1))
    board.text(1.97, 0.27, "Mochi, from five pictures", 17)
    board.text(1.97, 2.13, "learnt as “$V^*$ castle cat”", 18, BLUE)
    board.arrow((1.97, 2.42), (1.97, 2.88))
    board.box(0.1, 2.95, 3.75, 0.9, "then ask for\n“a photo of a castle”", ORANGE, 18)
    names = ("untouched", "learnt\nwithout", "learnt with\npictures")
    colours = (BLACK, RED, GREEN)
    for k, (key, title) in enumerate((("noun_share", "share read as a castle"), ("class_drift", "likeness to Mochi"))):
        ax = panel(board.fig, 4.95 + k * 4.05, 0.5, 3.3, 2.75, 4.4)
        values = [done[label][key] for label in ("untouched", "without", "with")]
        if key == "noun_share":
            images = record(CLAIMS)["images"]
            hits = [round(sum(one) * images) for one in values]
            found = [statistics.share(hit, images * len(one)) for hit, one in zip(hits, values)]
        else:
            found = [statistics.mean(one) for one in values]
        ax.bar(range(3), [one.value for one in found], 0.6, yerr=errors(found), capsize=6, color=colours,
               error_kw={"linewidth": 2.5, "ecolor": GREY})  # fmt: skip
        ax.set_xticks(range(3), names, fontsize=14)
        ax.set_title(title, fontsize=18)
        ax.set(ylim=(min(0, *(one.low for one in found)), 1.05))
        ax.grid(axis="x", visible=False)
        ax.axhline(0, color=BLACK, linewidth=1)
    n = record(CLAIMS)["images"] * len(done["with"]["noun_share"])
    board.small(f"Custom Diffusion, one subject, one training each, n = {n} samples of “a photo of a castle”, the same "
                "noises; bars: 95 % over samples, and over groups of them · " + measured_on(CLAIMS))  # fmt: skip
    return board.fig


@shows(records=(CLAIMS, PAIRS))
def two_subjects():
    """C19: recorded samples of two pairs by three methods; joint and merged minus DreamBooth in text and in image."""
    board = Board(4.55)
    labels = {"ground truth": "truth", "joint 0": "joint", "merged 0": "merged", "dreambooth 0": "Dream-\nBooth"}
    chosen = {"mushroom bus": "mushroom, bus", "clock bus": "clock, bus", "rocket car": "rocket, car"}
    pair_tiles(board, chosen, labels, (1, 5), 1.15)
    ax = panel(board.fig, 7.95, 0.5, 4.35, 2.95, 4.55)
    places = {"joint, text": 0, "merged, text": 0.7, "joint, image": 2.2, "merged, image": 2.9}
    for key, place in places.items():
        one, colour = value("C19", key), BLUE if "joint" in key else GREEN
        ax.errorbar(one.value, place, xerr=errors([one]), marker="o", markersize=12, capsize=6, color=colour)
    ax.axvline(0, color=BLACK, linewidth=1.5)
    ax.plot([-rules_methods.MARGIN] * 2, [1.75, 3.35], color=RED, linestyle="--", linewidth=2.5)
    ax.plot([0, 0], [-0.45, 1.15], color=RED, linestyle="--", linewidth=2.5)
    ax.set(ylim=(3.5, -0.9))
    ax.text(
        0.01,
        -0.65,
        "text alignment: CLIP-T",
        backgroundcolor="white",
        fontsize=15,
        transform=ax.get_yaxis_transform(),
        va="center",
    )
    ax.text(
        0.01,
        1.5,
        "image alignment: lower likeness",
        backgroundcolor="white",
        fontsize=15,
        transform=ax.get_yaxis_transform(),
        va="center",
    )
    ax.set_yticks(list(places.values()), ["joint", "merged"] * 2, fontsize=15)
    ax.set_title("minus DreamBooth", fontsize=18)
    ax.grid(axis="y", visible=False)
    board.text(W, 3.97, "dashed: the claim asks for more than this", 14, RED, ha="right")
    board.small(about_pairs("three of the six pairs, first samples of the first training, none selected"))
    return board.fig


# ---- faces, styles, half of two words ----


@shows(records=(STYLES,))
def faces_styles():
    """C20: pictures that two faces and two styles are learnt from, and how far DreamBooth gets towards the truth."""
    board, side = Board(4.75), 0.86
    run, names = record(STYLES), ("matteo", "linnea", "chalk", "riso")
    for r, name in enumerate(names):
        shown = name.capitalize() if name in run["faces"] else name
        board.text(1.0, 0.1 + r * (side + 0.05) + side / 2, shown, 18, ha="right")
        for c in range(4):
            board.tile(1.12 + c * (side + 0.05), 0.1 + r * (side + 0.05), side, view(name, c + 1))
    ax = panel(board.fig, 5.2, 0.1, 7.1, 4 * side + 0.15, 4.75)
    for place, name in enumerate(names):
        if name in run["faces"]:
            rows_, key = run["faces"][name], "subject_fidelity"
            low, high = rows_["base"]["0"]["by_prompt"][key], run["known"][name]["truth"]
            learnt = {m: [row["by_prompt"][key] for row in rows_[m].values()] for m in METHODS}
        else:
            low, high = (run["known"][name][k]["style_fidelity"] for k in ("untouched", "truth"))
            learnt = {m: [row["style_fidelity"] for row in run["styles"][name][m].values()] for m in METHODS}
        low, high = np.mean(low), np.mean(high)
        ax.plot([low, high], [place, place], color=GREY, linewidth=2, zorder=1)
        ax.plot([(low + high) / 2] * 2, [place - 0.32, place + 0.32], color=RED, linewidth=3, linestyle="--", zorder=1)
        ax.plot(low, place, "X", color=BLACK, markersize=14)
        ax.plot(high, place, "*", color=RED, markersize=20)
        one = statistics.mean(torch.tensor(learnt["dreambooth"]).mean(0))
        ax.errorbar(one.value, place, xerr=errors([one]), marker="s", markersize=13, capsize=7, color=ORANGE)
        if name == "chalk":
            ax.text(low, place + 0.48, "untouched", ha="left", fontsize=14)
            ax.text(one.value, place + 0.48, "DreamBooth", ha="center", fontsize=14, color=ORANGE)
            ax.text(high, place + 0.48, "truth", ha="center", fontsize=14, color=RED)
    ax.set(ylim=(3.55, -0.5), xlim=(-0.12, 1.12))
    ax.set_yticks(range(4), [""] * 4)
    ax.set_xlabel("subject or style fidelity;  dashed: half of the way", fontsize=15)
    words = "four of five pictures each; styles on objects that these do not show; 2 training seeds, 20 prompts of "
    board.small(f"{words}{run['images']} samples, bars: 95 % over prompts · {measured_on(STYLES)}")
    return board.fig


@shows(weights=("toybox-sd",), records=(CLAIMS,))
def half_and_half():
    """C21: from tiger to cat in seven steps, three noises; and the judge's log odds of the recorded pictures."""
    from course_lib.latent.stable_diffusion import load

    sd, shares_ = load("toybox", dtype=torch.float32), [k / 6 for k in range(7)]
    cat, tiger = (sd.encode_prompt(f"a photo of a {word}") for word in ("cat", "tiger"))
    count = size(3, 1)
    noise = sd.noise(count, seed=21)
    drawn = [sd.sample(a * cat + (1 - a) * tiger, x_T=noise, w=5.0, steps=size(25, 2)).cpu() for a in shares_]
    board, side, gap = Board(4.5), 0.98, 0.05
    for c, words in enumerate(("0", "1/6", "1/3", "1/2", "2/3", "5/6", "1")):
        board.text(0.1 + c * (side + gap) + side / 2, 0.62, words, 17)
        for r in range(count):
            board.tile(0.1 + c * (side + gap), 0.85 + r * (side + gap), side, drawn[c][r : r + 1])
    board.text(0.1, 0.22, "tiger", 18, BLUE, ha="left")
    board.text(7.26, 0.22, "cat", 18, ORANGE, ha="right")
    board.arrow((0.9, 0.22), (6.7, 0.22), GREY)
    done = record(CLAIMS)["experiments"]["mixtures"]
    table, real = torch.tensor(done["mixtures"]), torch.tensor(done["real"])
    odds = table[:, 0] - table[:, 1]
    low, high = real[1].quantile(0.975).item(), real[0].quantile(0.025).item()
    ax = panel(board.fig, 8.45, 0.5, 3.85, 2.85, 4.5)
    ax.axhspan(low, high, color=SKY, alpha=0.35, linewidth=0)
    ax.plot(shares_, odds, color=BLUE, alpha=0.2, linewidth=1)
    ax.plot(shares_, odds.median(1).values, color=ORANGE)
    ax.text(0.02, (low + high) / 2, "in between", va="center", fontsize=15, color=BLUE)
    half = torch.tensor(done["half"])
    between = statistics.share(rules_models.in_between(half[0] - half[1], real[0], real[1]))
    ax.set(xlabel="share $a$ of cat", ylabel="log odds, cat : tiger", ylim=(-27, 29), xticks=[0, 0.5, 1])
    ax.set_title(f"in between at 1/2: {between:.2f}", fontsize=15, loc="right", pad=14)
    words = (
        f"left: {count} noises, 25 DDIM steps, w = 5, not picked · right: {odds.shape[1]} noises at each a, line: the "
    )
    words += "median; band: outside of all but 2.5 % of real cats and real tigers · "
    board.small(words + measured_on(CLAIMS))
    return board.fig


# ---- all methods ----


@lru_cache
def truths() -> dict[str, list]:
    """score -> for each subject the renderer's own pictures of its prompts, scored as the methods' samples are."""
    from course_lib.evaluation.personalized import Scorer, pixels
    from course_lib.latent.stable_diffusion import load

    scorer, found = Scorer(load("toybox", dtype=torch.float32)), {"subject_fidelity": [], "clip_t": []}
    for name in SUBJECTS:
        subject = subjects.SUBJECTS[name]
        templates, fields = zip(*subjects.prompts(name)[: size(99, 2)])
        x = pixels([subject.spec(seed=0, **field) for field in fields])
        found["subject_fidelity"].append(scorer.subject_fidelity(x, scorer.references(name)))
        found["clip_t"].append(scorer.clip_t(x, [template.format(subject.noun) for template in templates]))
    return found


@shows(weights=("toybox-sd", "toybox-judge"), records=(ROWS,))
def text_and_image():
    """Text alignment against image alignment: the untouched model, four methods and the renderer's own pictures."""
    height = 5.0
    with plt.rc_context(STYLE):
        fig = plt.figure(figsize=(W, height))
        ax = panel(fig, 1.0, 0.1, 7.2, 3.75, height)
        for method, (colour, marker) in MARKS.items():
            if method == "truth":
                x, y = (statistics.over_subjects(truths()[score]) for score in ("clip_t", "subject_fidelity"))
            else:
                x, y = mean_score(method, "clip_t"), mean_score(method, "subject_fidelity")
            ax.errorbar(x.value, y.value, errors([y]), errors([x]), marker=marker, color=colour, capsize=6,
                        markersize=22 if marker == "*" else 14, linestyle="none", linewidth=2.2,
                        label=NAMES.get(method, "truth, rendered"))  # fmt: skip
        ax.set(xlabel="text alignment: CLIP-T", ylabel="subject fidelity")
        handles, names = ax.get_legend_handles_labels()
        fig.legend(handles, names, loc="center left", bbox_to_anchor=(0.685, 0.58), fontsize=18, labelspacing=0.9)
        small(
            fig, about_rows("at least 20 prompts of 4 samples; the truth: the renderer's pictures for the same prompts")
        )
    return fig


@shows(records=(ROWS, "official_scripts"))
def likeness_and_cost():
    """Subject fidelity against the bytes of a file and against the seconds of a whole training."""
    timed, height = record("official_scripts"), 5.0
    with plt.rc_context(STYLE):
        fig = plt.figure(figsize=(W, height))
        axes = panel(fig, 0.95, 0.1, 5.3, 3.3, height), panel(fig, 6.85, 0.1, 5.3, 3.3, height)
        for method in METHODS:
            one, (colour, marker) = mean_score(method, "subject_fidelity"), MARKS[method]
            places = record(ROWS)["rows"]["biscuit"][method]["0"]["bytes"], timed["rows"][method]["default"]["seconds"]
            beside = {"lora": 0.75, "custom_diffusion": 1.33}.get(method, 1)  # their files are nearly equally large
            for ax, place in zip(axes, (beside * places[0], places[1])):
                ax.errorbar(place, one.value, errors([one]), marker=marker, markersize=14, capsize=6, color=colour,
                            linestyle="none", label=NAMES[method])  # fmt: skip
        a, b = axes
        a.set(xscale="log", xlabel="bytes of a file, logarithmic", ylabel="subject fidelity", xlim=(150, 4e8))
        a.set_xticks([1e3, 1e4, 1e5, 1e6, 1e7, 1e8], ["1 kB", "", "", "1 MB", "", "100 MB"])
        b.set(xscale="log", xlabel="seconds from start to file, logarithmic", xlim=(16, 62))
        b.set_xticks([20, 30, 40, 50], ["20", "30", "40", "50"])
        for ax in axes:
            ax.minorticks_off()
            ax.set_ylim(0, 0.68)
        handles, names = a.get_legend_handles_labels()
        fig.legend(handles, names, loc="lower center", bbox_to_anchor=(0.5, 0.08), ncols=4, fontsize=17)
        words = "LoRA and Custom Diffusion are drawn side by side · seconds: one subject, two rounds, whole process"
        small(fig, about_rows(f"{words}, {timed['device']}, {timed['date']}"))
    return fig


def chosen() -> dict[str, tuple[str, bool]]:
    """Purpose -> the method that the records name, or those between which they do not decide; and if one is named.

    The rule of notebook 16: the best mean is named if its paired lead over each other method is above 0 beyond the
    interval, over subjects or pairs; with two styles or faces over their prompts.
    """
    titles = NAMES | {"joint, pairs": "joint with pairs"}

    def interval(groups):
        if len(groups) > 2:
            return statistics.over_subjects(groups)
        return statistics.mean(torch.cat([torch.atleast_2d(group).mean(0) for group in groups]))

    def choice(values, sign=1):
        values = {m: [sign * torch.as_tensor(one).double() for one in ones] for m, ones in values.items()}
        best = max(values, key=lambda m: interval(values[m]).value)
        leads = {m: interval([a - b for a, b in zip(values[best], ones)]) for m, ones in values.items() if m != best}
        close = [titles.get(m, m) for m, one in leads.items() if one.low <= 0]
        if close:
            return " / ".join([titles.get(best, best), *close]), False
        return titles.get(best, best), True

    def scored(score):
        return {m: [rows()[name][m][score] for name in SUBJECTS] for m in METHODS}

    sizes = {m: [[float(row["bytes"]) for row in record(ROWS)["rows"][name][m].values()] for name in SUBJECTS]
             for m in METHODS}  # fmt: skip
    styles = record(STYLES)
    by_style = {
        m: [[row["style_fidelity"] for row in one[m].values()] for one in styles["styles"].values()] for m in METHODS
    }
    faces = rules_methods.over_seeds(styles["faces"])
    by_face = {m: [one[m]["subject_fidelity"] for one in faces.values()] for m in METHODS}
    ways = ("joint", "joint, pairs", "merged", "averaged", "dreambooth")
    by_pair = {m: [one[m][rules_methods.LOW] for one in pairs().values()] for m in ways}
    return {
        "few bytes": choice(sizes, -1),
        "most alike": choice(scored("subject_fidelity")),
        "leaves the class alone": choice(scored("class_shift"), -1),
        "two subjects in one picture": choice(by_pair)
        if rules_methods.premise(pairs())[0]
        else ("premise not met", False),
        "a style": choice(by_style),
        "a face": choice(by_face),
    }


@shows(records=(ROWS, STYLES, PAIRS))
def choose_method():
    """For each purpose the method that the records name, or those between which they do not decide."""
    board, table = Board(4.9), chosen()
    board.text(0.2, 0.3, "you want", 17, GREY, ha="left")
    board.text(4.2, 0.3, "the records say", 17, GREY, ha="left")
    for k, (purpose, (answer, named)) in enumerate(table.items()):
        y = 0.92 + k * 0.64
        board.ax.plot([0.1, W - 0.1], [y - 0.32, y - 0.32], color=GREY, linewidth=1, alpha=0.5)
        board.text(0.2, y, purpose, 20, ha="left")
        if named:
            board.ax.plot(4.3, y, "o", color=GREEN, markersize=14)
            board.text(4.55, y, answer, 20, GREEN, ha="left")
        else:
            board.ax.plot(4.3, y, "o", color=RED, markersize=14, fillstyle="none", markeredgewidth=3)
            board.text(4.55, y, "cannot tell: " + answer, 16 if len(answer) < 60 else 15, RED, ha="left")
    words = "filled: best mean, ahead of each other method beyond the paired 95 % interval (over 6 subjects or pairs; "
    words += "two styles and two faces: over prompts) · joint, merged, averaged: Custom Diffusion on two subjects · "
    board.small(words + measured_on(ROWS))
    return board.fig


@shows(records=("benchmark_memory_sd15-random_cuda",))
def memory_fits():
    """Which method runs on which graphics card, by the memory plan of notebook 17, for Stable Diffusion 1.5."""
    import re

    gib, unet, rest, runtime = 2**30, PUBLISHED["dreambooth"], 123_060_480 + 83_653_863, 2**29
    run = record("benchmark_memory_sd15-random_cuda")["rows"][0]
    picture = float(re.search(r"activations ([\d.]+)", run["plan"])[1]) * gib / (0.3 * run["pictures"])
    remedies = (("as it is", 1.25, 8, GREEN), ("checkpointing", 0.3, 8, BLUE), ("+ 8-bit Adam", 0.3, 2, ORANGE))
    methods = {"Textual Inversion": (768, 4), "LoRA, rank 4": (PUBLISHED["lora"], 1),
               "Custom Diffusion": (PUBLISHED["custom_diffusion"], 8), "DreamBooth, prior": (unet, 2)}  # fmt: skip
    board, cards = Board(3.6), (8, 12, 16, 24)
    for c, card in enumerate(cards):
        board.text(4.35 + c * 2.3, 0.25, f"{card} GB", 18)
    for r, (name, (trained, pictures)) in enumerate(methods.items()):
        y = 0.5 + r * 0.64
        board.text(3.0, y + 0.28, name, 18, ha="right")
        for c, card in enumerate(cards):
            for label, kept, adam, colour_ in remedies:
                frozen = 2 * (unet + rest - trained)
                need = runtime + frozen + (8 + adam) * trained + kept * pictures * picture
                if need <= 0.9 * card * gib:
                    words, colour = label, colour_
                    break
            else:
                words, colour = "no: take LoRA", RED
            board.box(3.25 + c * 2.3, y, 2.2, 0.56, words, colour, 16)
    words = (
        "by the memory plan of notebook 17, a tenth of each card left free; bytes a picture: a run with random weights"
    )
    board.small(f"{words}, {measured_on('benchmark_memory_sd15-random_cuda')}")
    return board.fig


@shows()
def people():
    """Photos, file, new pictures of a face, and what each of them asks for."""
    board, side = Board(2.85), 1.3
    drawn = [subjects.SUBJECTS["matteo"].render(subjects.SUBJECTS["matteo"].spec(seed=0, scene=scene), size=192)
             for scene in list(SCENES)[:2]]  # fmt: skip
    columns = ((0.1, BLUE, "photos", "ask the person\nand the photographer"),
               (5.0, ORANGE, "trained file", "keep it as you\nkeep the photos"),
               (9.6, GREEN, "new pictures", "say that they\nare generated"))  # fmt: skip
    for x, colour, title, words in columns:
        board.text(x + side + 0.05, 0.2, title, 18, colour)
        board.text(x + side + 0.05, 2.13, words, 18)
    for k in range(2):
        board.tile(0.1 + k * (side + 0.1), 0.42, side, view("matteo", k + 1))
        board.tile(9.6 + k * (side + 0.1), 0.42, side, drawn[k])
    board.box(5.25, 0.55, 2.2, 1.05, "can draw\nthe face", ORANGE, 18)
    board.arrow((3.0, 1.07), (5.1, 1.07))
    board.arrow((7.6, 1.07), (9.45, 1.07))
    board.small("the face is invented; the course's renderer drew it, also on the right: no sample of a model")
    return board.fig


@shows()
def less_training():
    """Where the training is: once for each subject, or once for many."""
    board = Board(2.6)
    rows_ = ((0.1, 5, "training,\nfor each subject", ORANGE), (1.3, 1, "trained once,\nfor many subjects", GREEN))
    for y, count, words, colour in rows_:
        side = 0.54 if count > 1 else 0.8
        for k in range(count):
            board.tile(3.2 + (k - count / 2) * (side + 0.05), y + 0.5 - side / 2, side, view("mochi", k + 1))
        board.arrow((4.85, y + 0.5), (5.45, y + 0.5))
        board.box(5.6, y, 3.3, 1.0, words, colour, 20)
        board.arrow((9.05, y + 0.5), (9.65, y + 0.5))
        board.box(9.8, y, 2.5, 1.0, "new pictures\nof the subject", GREY, 18)
    board.text(0.05, 0.6, "this course", 18, ha="left")
    board.text(0.05, 1.8, "adapters,\nencoders", 18, ha="left")
    return board.fig


SHORT = {"C1": "loss and samples", "C2": "two worlds", "C3": "guidance trades",
         "C4": "cost in latents", "C5": "from an embedding", "C6": "edit, keep structure",
         "C7": "picture and subject", "C8": "only one row moves", "C9": "latent against word",
         "C10": "DreamBooth ahead", "C11": "class drift", "C12": "diversity falls",
         "C13": "prior preservation", "C14": "cross-attention", "C15": "near, few bytes",
         "C16": "two in one picture", "C17": "closed-form merge", "C18": "word in a name", "C19": "ahead on two",
         "C20": "faces and styles", "C21a": "word to word", "C21b": "half of each"}  # fmt: skip


@shows(records=(CLAIMS,))
def verdicts():
    """All claims of the course with their verdicts."""
    kinds = {"holds": (GREEN, "holds"), "cannot tell": (ORANGE, "cannot tell"), "does not hold": (RED, "does not hold"),
             "not testable here": (GREY, "not testable here")}  # fmt: skip
    board, claims = Board(4.5), record(CLAIMS)["claims"]
    for k, (claim, words) in enumerate(SHORT.items()):
        colour, _ = kinds.get(claims[claim]["verdict"], (GREY, ""))
        x, y = 0.08 + k % 4 * 3.09, 0.1 + k // 4 * 0.6
        filled = claims[claim]["verdict"] == "holds"
        board.ax.add_patch(plt.Rectangle((x, y), 2.98, 0.52, edgecolor=colour, linewidth=3,
                                         facecolor=colour + ("30" if filled else "10")))  # fmt: skip
        board.text(x + 0.1, y + 0.27, f"{claim}", 15, colour, ha="left")
        board.text(x + 0.8, y + 0.27, words, 14.5, ha="left")
    count = {kind: sum(one["verdict"] == kind for one in claims.values()) for kind in kinds}
    for x, (kind, (colour, words)) in zip((0.08, 3.17, 6.26, 9.35), kinds.items()):
        board.ax.add_patch(plt.Rectangle((x, 3.82), 0.3, 0.26, edgecolor=colour, linewidth=3,
                                         facecolor=colour + ("30" if kind == "holds" else "10")))  # fmt: skip
        board.text(x + 0.42, 3.95, f"{words}: {count[kind]}", 17, colour, ha="left")
    board.small("on the small models of this course · " + measured_on(CLAIMS))
    return board.fig
