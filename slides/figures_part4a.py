"""The figures of Part 4, first half: the task, Textual Inversion, DreamBooth, LoRA."""

from dataclasses import replace
from functools import lru_cache

import matplotlib.pyplot as plt
import numpy as np
import torch
from board import GREY, STYLE, Board, W, generator, shows, size, small_print
from PIL import Image, ImageFilter
from recorded import SUBJECTS, mean_score, record, rows, toybox
from torch import Tensor

from course_lib.cli.methods import METHODS
from course_lib.data.pictures import captions_beside, open_images, to_tensor
from course_lib.editing.gan import gan_inversion, load_gan
from course_lib.editing.inversion import invert, redraw
from course_lib.environment import REPOSITORY, RESULTS, device_name
from course_lib.evaluation import statistics
from course_lib.latent.stable_diffusion import StableDiffusion
from course_lib.personalization import dreambooth
from course_lib.personalization.finetune import finetune
from course_lib.plots import BLACK, BLUE, GREEN, ORANGE, PINK, RED, SKY
from course_lib.toybox import subjects
from course_lib.toybox.world import render

FROZEN, TRAINED = "#e6e9ec", "#f2b544"  # fill of a weight; both are read by the words on them, and by the edge
COLOURS = dict(zip(SUBJECTS, (BLUE, RED, GREEN, ORANGE, PINK, SKY)))
MARKS = dict(zip(SUBJECTS, "os^vDP"))
SCENES = [scene.split()[-1] for scene in subjects.NEW_SCENES]
LAMBDAS = {0: "dreambooth_no_prior", 0.3: "dreambooth_prior_0.3", 1: "dreambooth", 3: "dreambooth_prior_3"}


# ---- records, pictures and models ----


def cost(method: str) -> dict:
    """A row of the record, for the sizes, which are the same for all subjects."""
    return record("personalization")["rows"]["biscuit"][method]["0"]


def means(method: str, score: str) -> np.ndarray:
    """One number for each of SUBJECTS: the mean over training seeds and prompts."""
    return np.array([np.mean(rows()[name][method][score]) for name in SUBJECTS])


def about_methods(*more: str) -> str:
    """Small print for numbers of the record of all methods."""
    r = record("personalization")
    trained = f"{len(SUBJECTS)} subjects, {len(r['rows']['biscuit']['lora'])} training seeds each"
    drawn = f"{r['images']} samples a prompt, {r['steps']} steps, w = {r['w']:g}"
    return " · ".join([*more, f"{trained}, {drawn}, measured on {r['device']}, {r['date']}"])


@lru_cache
def strips() -> dict[str, np.ndarray]:
    """ "biscuit lora 0" -> recorded first samples of the new scenes, (scenes, 64, 64, 3); 0 is the training seed."""
    tiles = np.array(Image.open(RESULTS / "personalization_tiles.png").convert("RGB"))
    names = record("personalization")["tiles"]
    return {name: tiles[64 * k : 64 * k + 64].reshape(64, -1, 64, 3).swapaxes(0, 1) for k, name in enumerate(names)}


def views(name: str) -> Tensor:
    """The five pictures of a subject, (5, 3, 64, 64) in [-1, 1]."""
    return torch.stack([to_tensor(image, 64) for image in open_images(REPOSITORY / "data" / "subjects" / name)])


def learn(sd: StableDiffusion, recipe) -> None:
    for _ in finetune(sd, recipe):
        pass


# ---- opening and end ----


@shows(records=("personalization", "personalization_tiles.png"))
def title_part4a():
    """Biscuit's five pictures, and the recorded first samples of all new scenes by the three methods."""
    board, side, pitch, left = Board(3.72), 0.97, 1.03, 5.16
    board.text(0.05, 0.2, "five pictures", 17, ha="left")
    for k, picture in enumerate(views("biscuit")):
        board.tile(0.05 + k % 2 * pitch, 0.42 + k // 2 * pitch, side, picture[None])
    for c, scene in enumerate(SCENES):
        board.text(left + c * pitch + side / 2, 0.2, scene, 16, GREY)
    trains = {"textual_inversion": "a word", "dreambooth": "all weights", "lora": "thin matrices"}
    for r, (method, what) in enumerate(trains.items()):
        y = 0.42 + r * pitch + side / 2
        words = METHODS[method].title.replace(" ", "\n")
        board.arrow((2.2, 0.42 + pitch + side / 2), (3.3, y), BLUE)
        board.text(left - 0.12, y, f"{words}\n({what})", 15, ha="right")
        for c in range(len(SCENES)):
            board.tile(left + c * pitch, y - side / 2, side, strips()[f"biscuit {method} 0"][c])
    r = record("personalization")
    board.small(f"first sample of the first training, all {len(SCENES)} new scenes, not picked · w = {r['w']:g}, "
                f"{r['steps']} steps · {r['device']}, {r['date']}")  # fmt: skip
    return board.fig


@shows()
def next_part4a():
    """The second half, a panel each: which weights, two subjects in one picture, faces and styles."""
    board, side = Board(3.7), 1.84
    heads = (("which weights must change?", BLUE, 1.97), ("two subjects in one picture", GREEN, 6.3),
             ("faces, styles, and a choice", ORANGE, 10.55))  # fmt: skip
    for words, colour, x in heads:
        board.text(x, 0.25, words, 18, colour)
    Model(board, 0.05, 0.72, 0.315, "custom_diffusion", words=False)
    board.text(1.97, 2.9, "Custom Diffusion:\nkeys and values, and a word", 16)
    for k, scene in enumerate(("in the snow", "on the moon")):
        board.tile(4.43 + k * 1.9, 0.6, side, together("biscuit", "tilly", scene))
    board.text(6.3, 2.9, "“a $S_1$ dog next to\na $S_2$ teapot …”", 16)
    for k, name in enumerate(("matteo", "linnea", "chalk", "riso")):
        board.tile(9.63 + k % 2 * 0.95, 0.6 + k // 2 * 0.95, 0.89, views(name)[:1])
    board.text(10.55, 2.9, "which method for\nwhich purpose?", 16)
    board.small("the tasks, not results: pictures by the renderer")
    return board.fig


def together(one: str, other: str, scene: str) -> np.ndarray:
    """Two subjects beside each other, by the renderer."""
    left, right = (subjects.SUBJECTS[name].spec(seed=0, scene=scene) for name in (one, other))
    beside = replace(right, x=0.74, y=0.71, size=0.48, flip=True)
    return render(replace(left, relation="next to", other=beside, x=0.27, y=0.7, size=0.5), 160)


# ---- the task ----


@shows()
def personalization_task():
    """Five pictures of a subject; three things that are asked for. All drawn by the renderer."""
    board, one = Board(5.2), subjects.SUBJECTS["biscuit"]
    board.text(0.1, 0.3, "given: five pictures, the noun “dog”", 19, ha="left")
    for k, picture in enumerate(views("biscuit")):
        board.tile(0.1 + k % 3 * 1.36, 0.65 + k // 3 * 1.36, 1.3, picture[None])
    board.arrow((4.35, 1.95), (5.25, 1.95), BLUE, 4)
    board.text(5.45, 0.3, "wanted: this dog, wherever a prompt says", 19, ha="left")
    asked = subjects.prompts("biscuit")
    for k, index in enumerate((0, 3, 5)):
        prompt, fields = asked[index]
        board.tile(5.45 + k * 2.35, 0.65, 2.2, one.render(one.spec(seed=0, **fields)))
        board.text(6.55 + k * 2.35, 3.12, "“" + prompt.replace("a photo of a {}", "$S_*$") + "”", 17)
    goals = (("looks like Biscuit", "subject fidelity", BLUE), ("does what the prompt says", "prompt fidelity", GREEN),
             ("a plain “dog” is still any dog", "class drift, class diversity", RED))  # fmt: skip
    for k, (words, score, colour) in enumerate(goals):
        board.box(0.1 + k * 4.12, 3.55, 3.95, 1.2, f"{words}\n→ {score}", colour, 18)
    board.small("The task, not a result: all pictures are drawn by the renderer of the Toybox world")
    return board.fig


@shows()
def pictures_and_captions():
    """Tilly's five pictures with their captions; below, pictures that should not be taken. All by the renderer."""
    board, tilly, side, pitch = Board(5.3), subjects.SUBJECTS["tilly"], 1.62, 2.5
    captions = captions_beside(REPOSITORY / "data" / "subjects" / "tilly")
    board.text(0.1, 0.22, "place, size and side change; the caption names all but the subject", 19, BLUE, ha="left")
    for k, (picture, caption) in enumerate(zip(views("tilly"), captions, strict=True)):
        x = 0.38 + k * pitch
        board.tile(x, 0.5, side, picture[None])
        gap, scene = caption.split(" {} ")
        board.text(x + side / 2, 2.33, f"“{gap} {{}}", 16)
        board.text(x + side / 2, 2.62, f"{scene}”", 17, BLUE)
    board.text(0.1, 3.14, "better left out", 19, RED, ha="left")
    room = tilly.spec(seed=3, scene="in a room")
    poses = ((0.36, 0.6, False), (0.62, 0.66, True), (0.48, 0.72, False))
    same = [replace(room, x=x, y=0.95 - size / 2, size=size, flip=flip) for x, size, flip in poses]
    cut = replace(tilly.spec(seed=1, scene="in the city"), x=0.98, size=0.8)
    small_one = replace(tilly.spec(seed=1, scene="in a meadow"), size=0.2)
    blurred = Image.fromarray(render(tilly.spec(seed=4, scene="on the beach"), 160)).filter(ImageFilter.GaussianBlur(7))
    groups = (("the same room in all", [render(spec, 160) for spec in same]),
              ("cut off", [render(cut, 160)]), ("too small", [render(small_one, 160)]),
              ("blurred", [np.asarray(blurred)]))  # fmt: skip
    x = 0.38
    for words, pictures in groups:
        wide = len(pictures) * 1.36 - 0.06
        for picture in pictures:
            board.tile(x, 3.4, 1.3, picture)
            x += 1.36
        board.text(x - 0.06 - wide / 2, 4.9, words, 17, RED)
        x += 1.12
    board.small("rules of practice, not a measurement: all pictures are drawn by the renderer")
    return board.fig


# ---- what is trained ----

CELL, GAP, HIGH, PITCH = 0.36, 0.1, 0.62, 0.86  # of a level of the UNet, in inches
PROMPTS = {
    "textual_inversion": "“a photo of a $S_*$\nin the snow”",
    "dreambooth": "“a photo of a sks dog\nin the snow”",
    "custom_diffusion": "“a photo of a $S_*$ dog\nin the snow”",
    "lora": "“a photo of a sks dog\nin the snow”",
}


class Model:
    """Stable Diffusion as this course has it, drawn so that what a method trains stands out.

    board, x, y: where its upper left corner is.  scale: 1 is 12.2 inches wide and 4.5 high.  method: a key of METHODS.
    words: whether its parts are named, which needs a scale near 1.
    """

    def __init__(self, board: Board, x: float, y: float, scale: float, method: str, words: bool = True):
        self.board, self.x, self.y, self.scale, self.method, self.words = board, x, y, scale, method, words
        self.text_side()
        for left in (3.75, 8.15):
            self.headers(left)
        for level in range(3):
            for left in (3.75, 8.15):
                self.block(left, level, attention=level < 2)
            start = 3.75 + (3.98 if level < 2 else 0.9)
            self.line((start + 0.04, level + 0.5), (8.11, level + 0.5))
            for one in (4.2, 8.6):
                self.line((one, level + 0.5), (one, level + 1.5), arrow=False, under=True)
        self.line((4.2, 3.5), (6, 3.5), arrow=False, under=True)
        self.line((8.6, 3.5), (6, 3.5), arrow=False, under=True)
        self.block(5.62, 3, attention=True)
        self.line((3.53, 0.5), (3.72, 0.5))
        self.line((12.15, 0.5), (12.35, 0.5))
        if words:
            self.say(3.35, self.at(0.5) - 0.03, "$z_t$", 18)

    @staticmethod
    def at(level: float) -> float:
        """The y of a level: 0.5 is the middle of the first."""
        return 1.0 + int(level) * PITCH + (level % 1) * HIGH

    def place(self, x: float, y: float) -> tuple[float, float]:
        return self.x + self.scale * x, self.y + self.scale * y

    def say(self, x: float, y: float, words: str, points: float = 15, colour: str = BLACK, ha: str = "center") -> None:
        self.board.text(*self.place(x, y), words, points, colour, ha=ha)

    def cell(self, x: float, y: float, w: float, h: float, words: str, trained: bool) -> None:
        """A weight, in the colour of what is trained or of what is frozen."""
        edge, fill = (BLACK, TRAINED) if trained else ("#9aa3ad", FROZEN)
        self.board.ax.add_patch(plt.Rectangle(self.place(x, y), self.scale * w, self.scale * h, facecolor=fill,
                                              edgecolor=edge, linewidth=1.5 if trained else 1, zorder=3))  # fmt: skip
        if self.words and words:
            self.board.ax.text(*self.place(x + w / 2, y + h / 2), words, fontsize=14, ha="center", va="center",
                               color=BLACK if trained else GREY, zorder=4)  # fmt: skip

    def line(self, a: tuple[float, float], b: tuple[float, float], arrow: bool = True, under: bool = False) -> None:
        """Between two places given as x and level."""
        (ax, ay), (bx, by) = (self.place(x, self.at(level)) for x, level in (a, b))
        self.draw_line((ax, ay), (bx, by), arrow, 1 if under else 2)

    def draw_line(self, a, b, arrow: bool = True, order: int = 2, colour: str = "#9aa3ad") -> None:
        style = dict(arrowstyle="-|>" if arrow else "-", color=colour, linewidth=2 * max(self.scale, 0.6), shrinkA=0,
                     shrinkB=0, mutation_scale=16 * max(self.scale, 0.6))  # fmt: skip
        self.board.ax.annotate("", b, a, arrowprops=style, zorder=order)

    def headers(self, left: float) -> None:
        self_x, cross_x = left + 0.9 + GAP + 2 * CELL, left + 0.9 + 2 * GAP + 6 * CELL
        if self.words:
            for x, words in ((left + 0.45, "ResNet"), (self_x, "self-attention"), (cross_x, "cross-attention")):
                self.say(x, 0.8, words, 14, BLUE if words.startswith("cross") else GREY)
        top = 0.62 if self.words else 0.95
        self.draw_line(self.place(cross_x, 0.3), self.place(cross_x, top), colour=BLUE)

    def block(self, left: float, level: int, attention: bool) -> None:
        y, all_of_it = self.at(level), self.method == "dreambooth"
        self.cell(left, y, 0.9, HIGH, "", all_of_it)
        if not attention:
            return
        for kind in range(2):  # self-attention, cross-attention
            start = left + 0.9 + GAP + kind * (4 * CELL + GAP)
            for k, letter in enumerate("QKVO"):
                trained = all_of_it or (self.method == "custom_diffusion" and kind == 1 and letter in "KV")
                self.cell(start + k * CELL, y, CELL, HIGH, letter, trained)
                if self.method == "lora":
                    self.cell(start + k * CELL, y + HIGH, CELL, 0.13, "", True)

    def text_side(self) -> None:
        """Prompt, table of words, text encoder, and the way of its features to the cross-attention."""
        new = self.method in ("textual_inversion", "custom_diffusion")
        for k in range(8):
            self.cell(0.25, 0.95 + k * 0.27, 1.2, 0.2, "", False)
        if new:
            self.cell(0.25, 0.95 + 8 * 0.27 + 0.08, 1.2, 0.24, "", True)
        self.cell(1.95, 1.35, 1.2, 1.3, "text\nencoder", False)
        self.draw_line(self.place(1.5, 2.0), self.place(1.92, 2.0), colour=BLUE)
        corner, end = self.place(2.55, 0.3), self.place(8.15 + 0.9 + 2 * GAP + 6 * CELL, 0.3)
        self.draw_line(self.place(2.55, 1.35), corner, arrow=False, colour=BLUE)
        self.draw_line(corner, end, arrow=False, colour=BLUE)
        if self.words:
            self.say(0.85, 0.65, "table of words", 14, GREY)
            self.say(4.75, 0.12, "features of the prompt", 14, BLUE)
            self.say(0.05, 4.25, PROMPTS[self.method], 16, ha="left")
            self.draw_line(self.place(0.85, 3.88), self.place(0.85, 3.62), colour=BLUE)
            if new:
                self.say(1.52, 0.95 + 8 * 0.27 + 0.2, "$S_*$", 17, ha="left")


def legend(board: Board, x: float, y: float, dx: float = 0, dy: float = 0) -> None:
    """What the two colours of a weight mean; dx, dy: from the first to the second."""
    for k, (fill, edge, words) in enumerate(((TRAINED, BLACK, "trained"), (FROZEN, "#9aa3ad", "frozen"))):
        left, top = x + k * dx, y + k * dy
        board.ax.add_patch(plt.Rectangle((left, top), 0.32, 0.24, facecolor=fill, edgecolor=edge))
        board.text(left + 0.45, top + 0.13, words, 15, ha="left")


def numbers(method: str) -> str:
    """How much a method trains, from the record."""
    row, unet = cost(method), cost("dreambooth")["parameters"]
    bytes_ = f"{row['bytes']:,} bytes" if row["bytes"] < 1e4 else f"{row['bytes'] / 1e6:.2g} MB"
    share = ", the whole UNet"
    if 1e-3 < row["parameters"] / unet < 1:
        share = f", {row['parameters'] / unet:.1%} of the UNet's"
    elif row["parameters"] < unet:
        share = f", one for each {unet // row['parameters']:,} of the UNet's"
    return f"{row['parameters']:,} numbers{share}; {bytes_}"


def trained(method: str):
    """The model with what one method trains."""
    board = Board(4.95)
    Model(board, 0, 0.06, 1, method)
    legend(board, 10.3, 3.6, dy=0.35)
    board.text(W - 0.05, 4.62, numbers(method), 18, ha="right")
    board.small(
        "the Toybox UNet; a level of its right side holds two such blocks; biases, normalisation and the frozen "
        "autoencoder are not drawn"
    )
    return board.fig


@shows(records=("personalization",))
def trained_textual_inversion():
    """What Textual Inversion trains."""
    return trained("textual_inversion")


@shows(records=("personalization",))
def trained_dreambooth():
    """What DreamBooth trains."""
    return trained("dreambooth")


@shows(records=("personalization",))
def trained_custom_diffusion():
    """What Custom Diffusion trains."""
    return trained("custom_diffusion")


@shows(records=("personalization",))
def trained_lora():
    """What LoRA trains."""
    return trained("lora")


@shows(records=("personalization",))
def trained_by_each():
    """The four methods side by side."""
    board = Board(5.55)
    for k, method in enumerate(("textual_inversion", "dreambooth", "custom_diffusion", "lora")):
        x, y = k % 2 * 6.3, k // 2 * 2.6
        board.text(x + 0.05, y + 0.18, METHODS[method].title, 19, BLUE, ha="left")
        board.text(x + 6.05, y + 0.18, f"{cost(method)['parameters']:,} numbers", 17, ha="right")
        Model(board, x, y + 0.3, 0.49, method, words=False)
    legend(board, 9.85, 5.25, dx=1.35)
    return board.fig


# ---- Textual Inversion ----


@shows()
def one_row_loss():
    """One step of Textual Inversion: the loss of Part 1 with a prompt, and the way of its gradient to one row."""
    board, frozen = Board(4.9), "#59626c"
    picture = views("biscuit")[:1]
    noisy = 0.75 * picture + 0.55 * torch.randn(picture.shape, generator=generator(0))
    board.tile(0.1, 0.45, 1.45, picture)
    board.text(0.1, 0.2, "one of five pictures", 15, ha="left")
    board.box(2.3, 0.6, 1.9, 1.15, "autoencoder,\nnoise ε at t", frozen, 16)
    board.arrow((1.62, 1.17), (2.24, 1.17))
    board.arrow((4.26, 1.17), (4.86, 1.17))
    board.tile(4.92, 0.45, 1.45, noisy)
    board.text(5.65, 0.2, "$z_t$", 20)
    board.arrow((6.44, 1.17), (7.04, 1.17))
    board.box(7.1, 0.45, 2.0, 1.45, r"UNet  $\epsilon_\theta$", frozen, 20)
    board.arrow((9.16, 1.17), (9.76, 1.17))
    board.box(9.82, 0.6, 2.5, 1.15, r"$\Vert\,\epsilon - \hat\epsilon\,\Vert^2$", RED, 22)
    board.text(0.1, 3.4, "“a photo of a $S_*$ in a room”", 19, ha="left")
    board.arrow((1.75, 3.65), (1.75, 4.1), BLUE)
    board.box(0.5, 4.15, 2.5, 0.6, "$v$: one new row", ORANGE, 18)
    board.arrow((3.06, 4.45), (4.36, 4.45), BLUE)
    board.box(4.42, 3.95, 2.2, 0.85, "text encoder", frozen, 18)
    board.ax.plot([6.68, 7.8], [4.37, 4.37], color=BLUE, linewidth=3)
    board.arrow((7.8, 4.37), (7.8, 1.97), BLUE)
    board.text(7.7, 3.0, "features $c_v(y)$\nby cross-attention", 16, BLUE, ha="right")
    style = dict(color=RED, linewidth=3, linestyle="--", mutation_scale=22, shrinkA=0, shrinkB=0)
    for a, b, head in (((9.76, 1.6), (9.16, 1.6), "-|>"), ((8.4, 1.97), (8.4, 4.64), "-"),
                       ((8.4, 4.62), (6.7, 4.62), "-|>"), ((4.36, 4.66), (3.06, 4.66), "-|>")):  # fmt: skip
        board.ax.annotate("", b, a, arrowprops=dict(arrowstyle=head, **style))
    board.text(8.65, 3.2, "the gradient passes through\nboth networks, and moves\nthe row alone", 17, RED, ha="left")
    return board.fig


@shows()
def image_or_concept():
    """What the two inversions look for: a latent of one picture, or a word for several."""
    board, one = Board(5.1), subjects.SUBJECTS["mochi"]
    pictures, asked = views("mochi"), subjects.prompts("mochi")
    board.text(0.1, 0.25, "GAN inversion: which latent gives this picture?", 20, RED, ha="left")
    board.tile(0.9, 0.6, 1.5, pictures[:1])
    board.arrow((2.5, 1.35), (3.7, 1.35), RED)
    board.box(3.8, 0.85, 2.2, 1.0, "latent  $w$", RED, 20)
    board.arrow((6.1, 1.35), (7.3, 1.35), RED)
    board.tile(7.4, 0.6, 1.5, pictures[:1])
    board.text(9.1, 1.35, "this picture again:\nplace, pose and room\nare in the latent, too", 17, ha="left")
    board.text(0.1, 2.75, "Textual Inversion: which word means what these pictures share?", 20, BLUE, ha="left")
    for k, picture in enumerate(pictures):
        board.tile(0.1 + k % 3 * 1.05, 3.05 + k // 3 * 0.92, 0.86, picture[None])
    board.arrow((3.15, 3.95), (3.7, 3.95), BLUE)
    board.box(3.8, 3.45, 2.2, 1.0, "word  $S_*$", BLUE, 20)
    board.arrow((6.1, 3.95), (7.3, 3.95), BLUE)
    for k, index in enumerate((0, 3, 5)):
        prompt, fields = asked[index]
        board.tile(7.4 + k * 1.67, 3.05, 1.5, one.render(one.spec(seed=0, **fields)))
        board.text(8.15 + k * 1.67, 4.74, prompt.replace("a photo of a {} ", ""), 16)
    board.small("what each looks for, not a result: all pictures are drawn by the renderer")
    return board.fig


@shows(weights=("toybox-sd", "toybox-gan"))
def three_ways():
    """C9: Mochi held by a GAN's latent, by a diffusion latent and by a word, and asked into new scenes."""
    sd, steps, w = toybox(), size(25, 2), 5.0
    mochi, scenes = views("mochi")[:1], ("at night", "in the snow", "on the beach", "in the desert")
    prompts = [f"a photo of a {{}} {scene}" for scene in scenes]
    held = invert(sd, mochi, "a photo of a cat in a room", steps=steps, fixed_point=1)
    latent = [redraw(sd, held), *[redraw(sd, held, prompt.format("cat"), w) for prompt in prompts]]
    method = METHODS["textual_inversion"]
    settings = method.settings_for(sd)
    with method.recipe(sd, REPOSITORY / "data" / "subjects" / "mochi", noun="cat", settings=settings) as recipe:
        if size(1, 0):
            learn(sd, recipe)
        lines = [prompt.format(method.token) for prompt in ("a photo of a {} in a room", *prompts)]
        word = sd.sample(lines, w=w, steps=steps, x_T=sd.noise(len(lines), seed=2)).split(1)
    network, encoder = load_gan("cpu")
    with torch.no_grad():
        guess = encoder(mochi)[:, None].expand(-1, len(network.blocks), -1)
    found, image = gan_inversion(network, mochi, guess, steps=size(100, 2))
    z = torch.randn(len(scenes), found.shape[-1], generator=generator(3))
    with torch.no_grad():
        moved = network.draw(found + 0.5 * (network.latents(z) - network.mean_latent())[:, None]).split(1)
    board, side, step = Board(4.25), 1.17, 1.22
    board.tile(0.3, 1.5, 1.45, mochi)
    board.text(1.03, 1.25, "Mochi", 18)
    for c, words in enumerate(("given scene", *(scene.split()[-1] for scene in scenes))):
        board.text(5.6 + c * 1.34 + side / 2, 0.18, words, 15, GREY if c == 0 else BLACK)
    ways = (("GAN’s latent", "moved at random", [image, *moved], RED),
            ("diffusion latent", "redrawn: “a cat at night” …", latent, ORANGE),
            ("the word $S_*$", "“$S_*$ at night” …, new noise", word, BLUE))  # fmt: skip
    for r, (name, what, images, colour) in enumerate(ways):
        y = 0.36 + r * step
        board.text(5.4, y + 0.38, name, 19, colour, ha="right")
        board.text(5.4, y + 0.8, what, 15, GREY, ha="right")
        board.arrow((1.85, 2.22), (2.4, y + side / 2), colour, 2)
        for c, picture in enumerate(images):
            board.tile(5.6 + c * 1.34, y, side, picture.detach())
    board.small(f"one training of the word, {steps} DDIM steps, w = {w:g} for new prompts, first samples, drawn on "
                f"{device_name()} from data/checkpoints")  # fmt: skip
    return board.fig


def sheet(names: tuple[str, str], methods: dict[str, tuple[str, str]], side: float):
    """Two subjects: what they were learnt from, and a row for each method (key -> title, colour), by scene."""
    board = Board(0.72 + (len(methods) + 1) * (side + 0.05) + 0.28)
    for k, name in enumerate(names):
        x = 2.2 + k * 5.12
        board.text(x, 0.2, f"{name.title()}, a {subjects.SUBJECTS[name].noun}", 18, ha="left")
        for c, picture in enumerate(views(name)):
            board.tile(x + c * (side + 0.05), 0.4, side, picture[None])
        for r, method in enumerate(methods, 1):
            y = 0.4 + r * (side + 0.05) + 0.32
            for c in range(5):
                board.tile(x + c * (side + 0.05), y, side, strips()[f"{name} {method} 0"][c])
        for c in range(5):
            board.text(x + c * (side + 0.05) + side / 2, 0.4 + side + 0.22, SCENES[c], 15, GREY)
    board.text(2.1, 0.4 + side / 2, "learnt from", 17, GREY, ha="right")
    for r, (title, colour) in enumerate(methods.values(), 1):
        board.text(2.1, 0.72 + r * (side + 0.05) + side / 2, title, 17, colour, ha="right")
    r = record("personalization")
    board.small(f"first sample of the first training, the first five of {len(SCENES)} new scenes, not picked · "
                f"w = {r['w']:g}, {r['steps']} steps · {r['device']}, {r['date']}")  # fmt: skip
    return board.fig


@shows(records=("personalization", "personalization_tiles.png"))
def word_samples():
    """Two subjects by Textual Inversion, between the untouched model and the truth."""
    shown = {"base": ("untouched", GREY), "textual_inversion": ("the word $S_*$", BLUE), "truth": ("truth", GREEN)}
    return sheet(("biscuit", "mochi"), shown, 0.95)


# ---- DreamBooth ----


@shows(records=("personalization", "personalization_tiles.png"))
def dreambooth_ahead():
    """C10: pictures of Tilly by both methods, and the differences for each subject."""
    pairs = {"subject fidelity": "subject_fidelity", "the same, gain over the\nuntrained prompt": None,
             "prompt fidelity": "prompt_fidelity", "CLIP-T": "clip_t"}  # fmt: skip
    with plt.rc_context(STYLE):
        fig = plt.figure(figsize=(W, 4.35))
        names = (("learnt from", None), ("Textual\nInversion", "textual_inversion"), ("DreamBooth", "dreambooth"),
                 ("truth", "truth"))  # fmt: skip
        side = 0.82
        for r, (title, method) in enumerate(names):
            images = views("tilly") if method is None else strips()[f"tilly {method} 0"]
            y = 4.35 - 0.1 - (r + 1) * (side + 0.05) - 0.3 * (r > 0)
            fig.text(1.62 / W, (y + side / 2) / 4.35, title, ha="right", va="center", fontsize=16)
            for c in range(4):
                ax = fig.add_axes(((1.75 + c * (side + 0.05)) / W, y / 4.35, side / W, side / 4.35))
                picture = images[c]
                picture = ((picture + 1) / 2).permute(1, 2, 0).numpy() if torch.is_tensor(picture) else picture
                ax.imshow(picture, interpolation="nearest")
                ax.axis("off")
                if r == 1:
                    ax.set_title(SCENES[c], loc="center", fontsize=14, color=GREY, pad=3)
        ax = fig.add_axes((8.2 / W, 0.24, 4.05 / W, 0.57))
        for k, (_, score) in enumerate(pairs.items()):
            one, other = (gained(m) if score is None else means(m, score) for m in ("dreambooth", "textual_inversion"))
            difference = one - other
            found = statistics.mean(torch.from_numpy(difference))
            told = found.low > 0 or found.high < 0
            for name, value in zip(SUBJECTS, difference):
                ax.plot(value, -k + 0.13, MARKS[name], color=COLOURS[name], markersize=9, alpha=0.9)
            ax.errorbar(found.value, -k - 0.2, xerr=[[found.value - found.low], [found.high - found.value]], fmt="D",
                        color=BLACK if told else GREY, markersize=9, capsize=6, linewidth=3)  # fmt: skip
        ax.axvline(0, color=BLACK, linewidth=1.5)
        ax.set_yticks([-k for k in range(len(pairs))], list(pairs))
        ax.set(ylim=(-len(pairs) + 0.4, 0.6))
        ax.tick_params(labelsize=15)
        ax.set_xlabel("DreamBooth minus Textual Inversion", fontsize=16)
        style = dict(linestyle="none", markersize=9)
        handles = [plt.Line2D([], [], marker=MARKS[n], color=COLOURS[n], label=n.title(), **style) for n in SUBJECTS]
        fig.legend(handles=handles, ncols=3, fontsize=14, loc="upper right", bbox_to_anchor=(1, 1.01),
                   handletextpad=0.1, columnspacing=0.9)  # fmt: skip
        words = about_methods("dots: subjects, bars: mean with 95 % interval over subjects (grey: holds 0)",
                              "left: first samples, not picked")  # fmt: skip
        small(fig, words)
    return fig


def gained(method: str) -> np.ndarray:
    """Subject fidelity over that of the method's own prompt before training."""
    return means(method, "subject_fidelity") - means(method, "untouched_subject_fidelity")


def small(fig, words: str) -> None:
    """Small print of a figure without a layout engine."""
    fig.text(0.998, 0.004, words.replace("not picked · ", "not picked\n"), fontsize=11, color=GREY, ha="right",
             va="bottom")  # fmt: skip


@lru_cache
def class_pictures(weight: float | None, count: int = 9) -> tuple[Tensor, Tensor]:
    """Pictures of "a photo of a dog" and of "a photo of a sks dog", after DreamBooth with lambda = weight on Biscuit.

    None: the untouched model.
    """
    sd, steps = toybox(torch.bfloat16), size(12, 2)  # as in the record

    def drawn(words: str) -> Tensor:
        return sd.sample([f"a photo of a {words}"] * count, w=5.0, steps=steps, x_T=sd.noise(count, seed=7)).float()

    if weight is None:
        return drawn("dog"), drawn("sks dog")
    prior = dreambooth.prior_examples(sd, "dog", size(PRIOR, 2)) if weight else None
    folder = REPOSITORY / "data" / "subjects" / "biscuit"
    with dreambooth.recipe(sd, folder, noun="dog", prior=prior, prior_weight=weight) as recipe:
        if size(1, 0):
            learn(sd, recipe)
        return drawn("dog"), drawn("sks dog")


PRIOR = 40  # pictures of the class in figures; the record has 100


def class_rows(shown: tuple[tuple[str, str, Tensor], ...], note: str):
    """Rows of pictures: title, colour, images."""
    side = 1.1
    board = Board(0.1 + len(shown) * (side + 0.06) + 0.3)
    for r, (title, colour, images) in enumerate(shown):
        y = 0.05 + r * (side + 0.06)
        board.text(1.85, y + side / 2, title, 17, colour, ha="right")
        for c, picture in enumerate(images):
            board.tile(1.98 + c * (side + 0.06), y, side, picture[None])
    board.small(f"{note}; a column shares its noise; 12 steps, w = 5, not picked · drawn on {device_name()}")
    return board.fig


@shows(weights=("toybox-sd",))
def class_drift():
    """C11: "a photo of a dog" before and after DreamBooth without prior preservation."""
    before, after = class_pictures(None)[0], class_pictures(0.0)
    shown = (("“a dog”,\nbefore", BLUE, before), ("“a dog”,\nafter", RED, after[0]),
             ("“a sks dog”,\nafter", GREEN, after[1]))  # fmt: skip
    return class_rows(shown, "DreamBooth on Biscuit, λ = 0, one training")


@shows(weights=("toybox-sd",))
def class_kept():
    """C13 in pictures: the same with prior preservation."""
    before, after = class_pictures(None)[0], class_pictures(1.0)
    shown = (("“a dog”,\nbefore", BLUE, before), ("“a dog”,\nafter, λ = 1", BLUE, after[0]),
             ("“a sks dog”,\nafter, λ = 1", GREEN, after[1]))  # fmt: skip
    return class_rows(shown, f"DreamBooth on Biscuit, λ = 1 with {size(PRIOR, 2)} class pictures, one training")


@shows(records=("personalization",))
def diversity_lost():
    """C12: diversity of the class, and of the subject's own prompts, before and after, for each subject."""
    panels = (("class_diversity", "the class noun alone"), ("diversity", "prompts with the subject"))
    with plt.rc_context(STYLE):
        fig, axes = plt.subplots(1, 2, figsize=(W, 4.3), layout="constrained", sharey=True)
        for ax, (score, title) in zip(axes, panels):
            values = np.stack([means("base", score), means("dreambooth_no_prior", score)], 1)
            for name, pair in zip(SUBJECTS, values):
                ax.plot((0, 1), pair, color=COLOURS[name], marker=MARKS[name], markersize=11, linewidth=2.5,
                        label=f"{name.title()}, a {subjects.SUBJECTS[name].noun}")  # fmt: skip
            ax.set_xticks((0, 1), ("untouched", "DreamBooth,\nλ = 0"))
            ax.set(xlim=(-0.3, 1.3), title=title)
            ax.set_ylim(0, 26)
        axes[0].set_ylabel("distance of two samples")
        axes[1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=15)
        small_print(fig, about_methods("features of the judge; zero: all samples alike"))
    return fig


@shows()
def prior_loss():
    """The two halves of DreamBooth's loss: the five pictures, and the model's own pictures of the class."""
    board = Board(4.5)
    own = class_pictures(None, 5)[0] if not size(0, 1) else views("biscuit")
    for r, (images, title, prompt, colour, factor) in enumerate((
        (views("biscuit"), "five pictures of Biscuit", "“a sks dog in a room”", GREEN, "1 ×"),
        (own, "the model’s own dogs, drawn before", "“a dog”", BLUE, "λ ×"),
    )):  # fmt: skip
        y = 0.4 + r * 2.05
        board.text(0.05, y - 0.2, title, 17, colour, ha="left")
        for c, picture in enumerate(images):
            board.tile(0.05 + c * 0.94, y, 0.9, picture[None])
        board.text(2.4, y + 1.12, prompt, 17)
        board.arrow((4.85, y + 0.45), (6.0, 1.95 + (r - 0.5) * 0.7), colour, 4)
        board.arrow((8.35, 1.95 + (r - 0.5) * 0.7), (9.3, y + 0.45), colour, 4)
        board.box(9.4, y, 2.9, 0.9, rf"{factor} $\Vert\,\epsilon - \hat\epsilon\,\Vert^2$", colour, 21)
    board.box(6.1, 1.2, 2.2, 1.5, "one UNet,\nall weights", ORANGE, 20)
    board.text(10.85, 1.88, "+", 30)
    board.small("upper pictures by the renderer, lower ones by the untouched Toybox model, first samples")
    return board.fig


@shows(records=("personalization",))
def lambda_dial():
    """C13: subject fidelity, class drift and class diversity over lambda."""
    panels = (("subject_fidelity", "subject fidelity", "↑", BLUE, (0, 0.9)),
              ("class_drift", "class drift", "↓", RED, (0, 0.9)),
              ("class_diversity", "class diversity", "↑", GREEN, (0, 26)))  # fmt: skip
    before = {"subject_fidelity": ("dreambooth", "untouched_subject_fidelity"), "class_drift": ("base", "class_drift"),
              "class_diversity": ("base", "class_diversity")}  # fmt: skip
    with plt.rc_context(STYLE):
        fig, axes = plt.subplots(1, 3, figsize=(W, 3.8), layout="constrained")
        for ax, (score, title, better, colour, limits) in zip(axes, panels):
            found = [mean_score(method, score) for method in LAMBDAS.values()]
            bars = np.array([[one.value - one.low, one.high - one.value] for one in found]).T
            ax.errorbar(range(len(found)), [one.value for one in found], bars, fmt="o-", color=colour, capsize=6,
                        markersize=11)  # fmt: skip
            ax.axhline(mean_score(*before[score]).value, color=BLACK, linestyle=":", linewidth=2.5)
            ax.set(xlabel="λ", title=f"{title} {better}", ylim=limits)
            ax.set_xticks(range(len(found)), [f"{k:g}" for k in LAMBDAS])
        axes[0].text(3.1, mean_score(*before["subject_fidelity"]).value - 0.02, "dotted: the same\nprompts, untouched",
                     fontsize=14, ha="right", va="top")  # fmt: skip
        small_print(fig, about_methods("bars: 95 % intervals over subjects"))
    return fig


# ---- LoRA ----


@shows(weights=("toybox-sd",), records=("personalization", "tuning"))
def thin_product():
    """W + BA drawn to scale, and the bytes of a concept by each method."""
    rank = record("tuning")["chosen"]["rank"]
    layer = toybox().unet.up_blocks[1].attentions[0].transformer_blocks[0].attn2.to_k
    height, width = layer.weight.shape
    unit = 2.2 / height
    board, top = Board(5.0), 0.75

    def matrix(x: float, y: float, rows_: int, columns: int, words: str, trained_: bool) -> None:
        board.ax.add_patch(plt.Rectangle((x, y), columns * unit, rows_ * unit, edgecolor=BLACK,
                                         facecolor=TRAINED if trained_ else FROZEN, linewidth=1.5))  # fmt: skip
        board.text(x + columns * unit / 2, y + rows_ * unit / 2, words, 22)

    y, middle = top, top + height * unit / 2
    matrix(0.3, y, height, width, "$W$", False)
    board.text(0.3 + width * unit / 2, y - 0.25, f"{height} × {width}", 15, GREY)
    board.text(2.78, middle, "+", 30)
    matrix(3.06, y, height, rank, "", True)
    board.text(3.06 + rank * unit / 2, y + height * unit + 0.3, "$B$", 22)
    board.text(3.06 + rank * unit / 2, y - 0.25, f"{height} × {rank}", 15, GREY)
    matrix(3.62, middle - rank * unit / 2, rank, width, "", True)
    board.text(3.62 + width * unit / 2, middle + 0.42, "$A$", 22)
    board.text(3.62 + width * unit / 2, middle - 0.35, f"{rank} × {width}", 15, GREY)
    thin = rank * (height + width)
    board.text(0.3, 3.9, f"{thin:,} numbers in place of {height * width:,}", 18, ha="left")
    left, names = 7.6, ("textual_inversion", "custom_diffusion", "lora", "dreambooth")
    board.text(6.3, 0.35, "bytes of one learnt subject (log scale)", 17, ha="left")
    for k, method in enumerate(names):
        size_, y = cost(method)["bytes"], 0.75 + k * 0.92
        long = 3.0 * (np.log10(size_) - 2) / 6
        fill = TRAINED if method == "lora" else FROZEN
        board.ax.add_patch(plt.Rectangle((left + 0.55, y), long, 0.55, facecolor=fill, edgecolor=BLACK))
        board.text(left + 0.45, y + 0.27, METHODS[method].title, 16, ha="right")
        board.text(left + 0.65 + long, y + 0.27, f"{size_:,}", 16, ha="left")
    pairs = cost("lora")["tensors"] // 2
    board.small(f"left: one layer of the Toybox UNet to scale (keys of a cross-attention), rank {rank}; LoRA has "
                f"{pairs} such pairs · float32, from the record of {record('personalization')['date']}")  # fmt: skip
    return board.fig
