"""The words of the Toybox world: a small grammar that says what a picture shows, leaving attributes out at random.

`caption` makes the training sentences. Attributes are dropped so that words stay general: "a cat" has to mean every
cat, so that one cat can get a word of its own. `describe` leaves nothing out: it makes prompts whose result can be
scored.

Used by: notebooks/05_latent_diffusion.ipynb.
"""

import numpy as np

from course_lib.toybox.pen import pick
from course_lib.toybox.people import PEOPLE
from course_lib.toybox.world import CREATURES, Spec, sample_spec

SYNONYMS = {
    "cat": "kitten", "dog": "puppy", "rabbit": "bunny", "boat": "ship", "house": "cottage", "backpack": "rucksack",
    "bear": "teddy bear", "pot": "cooking pot", "clock": "alarm clock", "mug": "cup", "rocket": "spaceship",
    "man": "gentleman", "woman": "lady", "mushroom": "toadstool",
}  # fmt: skip
SCENE_SYNONYMS = {
    "on the beach": "by the sea", "in the snow": "in winter", "in the forest": "among the trees",
    "in a room": "indoors", "in a meadow": "on the grass", "in the desert": "among the cactuses",
    "under water": "in the sea", "at night": "under the stars", "in the city": "on a street",
    "on the moon": "in space", "in the mountains": "in front of a mountain", "on a stage": "in a theatre",
}  # fmt: skip
OPENINGS = {
    "plain": ("a photo of", "a photo of", "a picture of", "a drawing of", "an image of", ""),
    "pencil sketch": ("a pencil sketch of", "a sketch of"),
    "pixel art": ("pixel art of", "a pixel art picture of"),
    "watercolour": ("a watercolour of", "a watercolour painting of"),
}
WITH = {"striped": "with stripes", "spotted": "with spots", "checked": "with checks", "starry": "with stars"}


def article(words: str) -> str:
    """The words with "a" or "an" before them."""
    return ("an " if words[0] in "aeiou" else "a ") + words


def _thing(noun: str, colour: str | None, pattern: str | None, rng: np.random.Generator | None) -> str:
    """An object in words: "a teal spotted cat", "a man in a teal striped shirt"; rng None: always the same words."""
    if rng is not None and noun in SYNONYMS and rng.random() < 0.2:
        noun_words = SYNONYMS[noun]
    else:
        noun_words = noun
    adjectives = [word for word in (colour, pattern) if word]
    if noun in PEOPLE:
        return article(noun_words) + (f" in {article(' '.join([*adjectives, 'shirt']))}" if adjectives else "")
    if rng is not None and len(adjectives) == 2:
        choice = rng.random()
        if choice < 0.15:
            adjectives.reverse()
        elif choice < 0.3 and pattern in WITH:
            return f"{article(f'{colour} {noun_words}')} {WITH[pattern]}"
    return article(" ".join([*adjectives, noun_words]))


def caption(spec: Spec, rng: np.random.Generator, name_relation: bool = False) -> str:
    """Say in words what a picture shows, leaving out parts at random.

    Args:
        spec: the Spec of the picture.
        rng: np.random.Generator, the only source of chance.
        name_relation: name both objects of a pair in every caption, not in 90 % of them.

    Returns: for instance "a photo of a teal spotted cat wearing a red hat on the beach" or "an orange kitten". The noun
        is always named, and so is a style that is not plain.
    """
    says = (rng.random(6) < (0.75, 0.75, 0.85, 0.9, 0.7, 0.75)).tolist()
    say_colour, say_pattern, say_accessory, say_relation, say_other, say_scene = says
    pattern = spec.pattern if spec.pattern != "plain" or rng.random() < 0.15 else None
    words = _thing(spec.noun, spec.colour if say_colour else None, pattern if say_pattern else None, rng)
    if spec.accessory and say_accessory:
        colour = [spec.accessory_colour] if rng.random() < 0.8 else []
        words += " " + _wearing(spec, colour)
    if spec.relation and (say_relation or name_relation):
        other = spec.other
        says_pattern = say_other and other.pattern != "plain" and rng.random() < 0.5
        words += f" {spec.relation} "
        words += _thing(other.noun, other.colour if say_other else None, other.pattern if says_pattern else None, rng)
    scene = SCENE_SYNONYMS[spec.scene] if rng.random() < 0.2 else spec.scene
    opening = pick(rng, *OPENINGS[spec.style])
    far = spec.relation is None and spec.size < 0.6 and rng.random() < 0.25
    close = spec.relation is None and spec.size > 0.8 and rng.random() < 0.3
    if close and spec.style == "plain":
        opening = "a close-up of"
    parts = [opening, words, "far away" if far else "", scene if say_scene else ""]
    return " ".join(part for part in parts if part)


def describe(spec: Spec) -> str:
    """The same with nothing left out, and always in the same words: a prompt whose picture can be scored."""
    words = _thing(spec.noun, spec.colour, None if spec.pattern == "plain" else spec.pattern, None)
    if spec.accessory:
        words += " " + _wearing(spec, [spec.accessory_colour])
    if spec.relation:
        other, pattern = spec.other, spec.other.pattern
        words += f" {spec.relation} {_thing(other.noun, other.colour, None if pattern == 'plain' else pattern, None)}"
    return f"{OPENINGS[spec.style][0]} {words} {spec.scene}"


def _wearing(spec: Spec, colour: list[str]) -> str:
    """ "wearing a red hat" for creatures, "with a red bow" for things."""
    verb = "wearing" if spec.noun in CREATURES else "with"
    what = " ".join([*colour, spec.accessory])
    return f"{verb} {what if spec.accessory == 'glasses' else article(what)}"


def corpus(count: int, seed: int = 0) -> list[str]:
    """`count` captions of random pictures, without drawing them: to train a tokenizer, or to search."""
    rng = np.random.default_rng([seed, 9])
    return [caption(sample_spec(rng), rng) for _ in range(count)]
