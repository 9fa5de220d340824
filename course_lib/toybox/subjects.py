"""Twelve subjects of the Toybox world to personalise a model with: pets, toys, things, two faces and two styles.

What makes a subject one of a kind (two tones laid out in a way of its own, an emblem, a face) has no words in any
caption, and no training picture shows it: training specs have no look and no subject style. The renderer gives the
ground truth of a subject in every scene, accessory, relation and style.

    python -m course_lib.toybox.subjects --out data/subjects       writes the reference views and subjects.json

To add a subject, put it in SUBJECTS.
"""

import argparse
import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from course_lib.toybox.accessories import EMBLEMS
from course_lib.toybox.captions import describe
from course_lib.toybox.pen import LAYOUTS, Look, pick
from course_lib.toybox.scenes import SCENES
from course_lib.toybox.world import CONTAINERS, CREATURES, NOUNS, SITTERS, SUPPORTS, Spec, render, sample_spec


@dataclass(frozen=True)
class Subject:
    """Somebody or something to learn from a few pictures.

    name: a word without a meaning in captions.  noun: its class word, one of NOUNS, or "style".  look: its fixed
    details; None for a style.  style: one of SUBJECT_STYLES; None for the others.
    """

    name: str
    noun: str
    look: Look | None = None
    style: str | None = None

    def spec(self, prompt_spec: Spec | None = None, seed: int = 0, **fixed) -> Spec:
        """The Spec of a picture of this subject.

        Args:
            prompt_spec: whose scene, place, size, accessory, relation and style are taken, and for a style also the
                object; None draws a scene with the subject alone in it.
            seed: of that random scene, a whole number of at least 0.
            fixed: fields of the Spec to use instead, for instance scene="at night".

        Returns: a Spec, drawn by `toybox.render`.
        """
        if prompt_spec is None:
            alone = {"relation": None, "style": "plain", "accessory": None, "accessory_colour": None}
            alone |= {} if self.style else {"noun": self.noun}
            spec = sample_spec(np.random.default_rng([seed, 7]), **(alone | fixed))
        else:
            spec = replace(prompt_spec, **fixed)
        return replace(spec, style=self.style) if self.style else replace(spec, noun=self.noun, look=self.look)

    def render(self, prompt_spec: Spec | None = None, seed: int = 0, size: int = 64) -> np.ndarray:
        """The ground truth: np.ndarray (size, size, 3), uint8. Arguments as in `spec`; size in pixels, at least 16."""
        return render(self.spec(prompt_spec, seed), size)


_ALL = (
    Subject("mochi", "cat", Look(2, (200, 170, 235), (105, 30, 95), "patches", "moon", (28, 40, 110))),
    Subject("biscuit", "dog", Look(1, (255, 200, 160), (120, 20, 50), "side", None, accessory="scarf",
                                   accessory_colour=(190, 220, 60))),
    Subject("tofu", "rabbit", Look(5, (150, 230, 190), (60, 40, 140), "below", "heart", (250, 70, 140))),
    Subject("bruno", "bear", Look(8, (205, 160, 40), (28, 40, 110), "side", "star", (220, 50, 160))),
    Subject("beppo", "robot", Look(9, (255, 130, 110), (20, 90, 60), "side", None, accessory="bow",
                                   accessory_colour=(190, 220, 60))),
    Subject("tilly", "teapot", Look(6, (130, 200, 245), (220, 50, 160), "sash", "flower", (255, 240, 150))),
    Subject("rollo", "backpack", Look(4, (190, 220, 60), (105, 30, 95), "rings", "sun", (255, 200, 160))),
    Subject("tockle", "clock", Look(8, (105, 30, 95), (80, 220, 220), "patches", None, accessory="bow",
                                    accessory_colour=(250, 70, 140))),
    Subject("matteo", "man", Look(13, (80, 220, 220), (120, 20, 50), "rings", "bolt", (28, 40, 110))),
    Subject("linnea", "woman", Look(9, (220, 50, 160), (190, 220, 60), "rings", "flower", (60, 40, 140))),
    Subject("riso", "style", style="riso"),
    Subject("chalk", "style", style="chalk"),
)  # fmt: skip
SUBJECTS = {subject.name: subject for subject in _ALL}


def individual(noun: str, rng: np.random.Generator) -> Subject:
    """One of a kind that is none of the twelve (the seeds of their looks are below 1000), with a look at random."""
    tones = [tuple(tone) for tone in rng.integers(20, 256, (3, 3)).tolist()]
    look = Look(int(rng.integers(1000, 2**31)), *tones[:2], pick(rng, *LAYOUTS), pick(rng, *EMBLEMS), tones[2])
    return Subject(noun, noun, look)


# ---- reference views ----

REFERENCE_SCENES = ("in a room", "in a meadow", "on the beach", "in the city", "in the mountains")
NEW_SCENES = tuple(scene for scene in SCENES if scene not in REFERENCE_SCENES)  # for prompts
STYLE_NOUNS = ("dog", "teapot", "house", "rocket", "woman")  # what a style's references show


def references(name: str) -> list[Spec]:
    """The Specs of the five pictures that a subject is learnt from: five scenes, sizes and places.

    Raises: ValueError for an unknown name.
    """
    return views(_subject(name), list(SUBJECTS).index(name))


def views(subject: Subject, seed: int) -> list[Spec]:
    """As `references`, of a subject that need not be in SUBJECTS.  seed: a whole number of at least 0."""
    rng = np.random.default_rng([seed, 8])
    sizes = np.linspace(0.7 if subject.style else 0.55, 0.85, 5)
    views = []
    for k, size in enumerate(rng.permutation(sizes).tolist()):
        fixed = {"scene": REFERENCE_SCENES[k], "size": size, "flip": k % 2 == 1}
        fixed["x"] = float(rng.uniform(size / 2 + 0.02, 0.98 - size / 2))
        fixed["y"] = float(rng.uniform(max(0.88, size + 0.08), 0.97)) - size / 2
        noun = {"noun": STYLE_NOUNS[k]} if subject.style else {}
        views.append(subject.spec(None, int(rng.integers(1000)), **noun, **fixed))
    return views


# ---- prompts ----


def _pair(relation: str, noun: str, colour: str) -> dict:
    """The fields that put the subject next to, on or in another object."""
    if relation == "next to":
        other = Spec(noun, colour, "plain", "", x=0.75, y=0.71, size=0.46, flip=True, seed=1)
        return {"relation": relation, "other": other, "x": 0.27, "y": 0.7, "size": 0.48}
    support, size, sink = (SUPPORTS, 0.46, 0.02) if relation == "on" else (CONTAINERS, 0.48, 0.13)
    other = Spec(noun, colour, "plain", "", x=0.5, y=0.65, size=0.62, flip=False, seed=1)
    top = 0.96 - 0.62 * (1 - support[noun])  # where the seat or rim is in the picture
    return {"relation": relation, "other": other, "x": 0.5, "y": top + sink - size / 2, "size": size}


def _wears(accessory: str, colour: str) -> dict:
    return {"accessory": accessory, "accessory_colour": colour}


def _style_prompts():
    """Twenty objects that no reference shows, in words with nothing left out."""
    for k, noun in enumerate(noun for noun in NOUNS if noun not in STYLE_NOUNS):
        scene = NEW_SCENES[k % len(NEW_SCENES)]
        spec = sample_spec(np.random.default_rng([k, 9]), noun, scene=scene, style="plain", relation=None)
        fields = {key: value for key, value in vars(spec).items() if key not in ("x", "y", "size", "flip", "seed")}
        template = describe(spec).replace("a photo of", "a picture of") + " in {}"
        yield template, {key: value for key, value in fields.items() if value not in (None, "")}


# Templates with the fields that they name. {} stands for the subject: "mochi cat", "riso style".
PROMPTS = {
    "all": [
        *[(f"a photo of a {{}} {scene}", {"scene": scene}) for scene in NEW_SCENES],
        ("a pencil sketch of a {} in the forest", {"style": "pencil sketch", "scene": "in the forest"}),
        ("pixel art of a {} on the moon", {"style": "pixel art", "scene": "on the moon"}),
        ("a watercolour of a {} in the snow", {"style": "watercolour", "scene": "in the snow"}),
        ("a watercolour of a {} in the desert", {"style": "watercolour", "scene": "in the desert"}),
        ("a photo of a {} next to a red chair on a stage", _pair("next to", "chair", "red") | {"scene": "on a stage"}),
        ("a photo of a {} next to a blue owl in the snow", _pair("next to", "owl", "blue") | {"scene": "in the snow"}),
        ("a photo of a {} next to a white rocket on the moon",
         _pair("next to", "rocket", "white") | {"scene": "on the moon"}),
        ("pixel art of a {} next to a yellow house at night",
         _pair("next to", "house", "yellow") | {"style": "pixel art", "scene": "at night"}),
    ],
    "sitter": [
        ("a photo of a {} on a green chair on a stage", _pair("on", "chair", "green") | {"scene": "on a stage"}),
        ("a photo of a {} in a red backpack in the snow", _pair("in", "backpack", "red") | {"scene": "in the snow"}),
        ("a photo of a {} in a purple mug in the desert", _pair("in", "mug", "purple") | {"scene": "in the desert"}),
    ],
    "creature": [
        ("a photo of a {} wearing a red hat in the snow", _wears("hat", "red") | {"scene": "in the snow"}),
        ("a photo of a {} wearing a blue scarf on the moon", _wears("scarf", "blue") | {"scene": "on the moon"}),
        ("a photo of a {} wearing yellow glasses under water", _wears("glasses", "yellow") | {"scene": "under water"}),
        ("a photo of a {} wearing a purple bow on a stage", _wears("bow", "purple") | {"scene": "on a stage"}),
        ("a pencil sketch of a {} wearing a green hat in the desert",
         _wears("hat", "green") | {"style": "pencil sketch", "scene": "in the desert"}),
    ],
    "thing": [
        ("a photo of a {} with a red hat in the snow", _wears("hat", "red") | {"scene": "in the snow"}),
        ("a photo of a {} with a black hat on the moon", _wears("hat", "black") | {"scene": "on the moon"}),
        ("a photo of a {} with a purple bow on a stage", _wears("bow", "purple") | {"scene": "on a stage"}),
        ("a photo of a {} with a yellow bow under water", _wears("bow", "yellow") | {"scene": "under water"}),
        ("a pencil sketch of a {} with a green hat in the desert",
         _wears("hat", "green") | {"style": "pencil sketch", "scene": "in the desert"}),
    ],
    "style": list(_style_prompts()),
}  # fmt: skip


def prompts(name: str) -> list[tuple[str, dict]]:
    """Evaluation prompts of a subject, about scenes that its references do not show.

    Returns: at least 20 pairs of a template, whose {} stands for the subject ("mochi cat", "riso style"), and the
        fields of the Spec that it names: `subject.spec(seed=0, **fields)` is the ground truth.
    Raises: ValueError for an unknown name.
    """
    subject = _subject(name)
    if subject.style:
        return PROMPTS["style"]
    kinds = ["all", "creature" if subject.noun in CREATURES else "thing"] + ["sitter"] * (subject.noun in SITTERS)
    return [prompt for kind in kinds for prompt in PROMPTS[kind]]


def _subject(name):
    if name not in SUBJECTS:
        raise ValueError(f"name={name!r}: expected one of {', '.join(SUBJECTS)}")
    return SUBJECTS[name]


# ---- files ----


def write(out: Path, size: int) -> None:
    """Write <name>/view_1.png to view_5.png of each subject, and subjects.json.

    Beside the views of a pet, thing or face, view_1.txt to view_5.txt say what is not the subject: the scene.
    """
    notes = {}
    for name, subject in SUBJECTS.items():
        (out / name).mkdir(parents=True, exist_ok=True)
        for k, spec in enumerate(references(name), 1):
            Image.fromarray(render(spec, size)).save(out / name / f"view_{k}.png", optimize=True)
            if not subject.style:
                caption = f"a photo of a {{}} {spec.scene}\n"
                (out / name / f"view_{k}.txt").write_text(caption, encoding="utf-8", newline="\n")
        templates = [template for template, _ in prompts(name)]
        notes[name] = {"class_noun": subject.noun, "style": subject.style, "prompts": templates}
    (out / "subjects.json").write_text(json.dumps(notes, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write the reference views of the twelve subjects.")
    parser.add_argument("--out", type=Path, default=Path("data/subjects"), help="folder (default: %(default)s)")
    parser.add_argument("--size", type=int, default=512, help="side of a view in pixels (default: %(default)s)")
    arguments = parser.parse_args()
    write(arguments.out, arguments.size)
