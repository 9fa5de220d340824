"""What the commands draw and print: prompts with a concept's words, grids of pictures, sizes of files."""

import warnings


def fill_placeholder(prompts, method, about):
    """Put a concept's own words in the place of {}."""
    token, noun = about.get("token") or (about.get("rows") or [""])[0], about.get("noun")
    name = token if method == "textual_inversion" or not noun else f"{token} {noun}".strip()
    if not name and any("{}" in prompt for prompt in prompts):
        raise ValueError("prompt: expected --concept FILE, whose words {} stands for, or a prompt without {}")
    return [prompt.replace("{}", name) for prompt in prompts]


def draw(sd, prompts, count, *, w, steps, seed):
    """`count` pictures for each prompt, from the same noises for all; w=None is the guidance that suits the model."""
    w = sd.defaults.guidance if w is None else w
    x_T = sd.noise(count, seed=seed).repeat(len(prompts), 1, 1, 1)
    return sd.sample(prompts, w=w, steps=steps, seed=seed, x_T=x_T)


def note_unknown_words(sd, prompts, tokens):
    """Warn of words that the Toybox model never saw; others were trained on too many words to tell."""
    if not sd.defaults.toybox_world:
        return
    from course_lib.latent.text import words

    unknown = {}
    for prompt in prompts:
        for token in ("{}", *tokens):
            prompt = prompt.replace(token, " ")
        unknown |= {word: None for word, places in words(sd.tokenizer, prompt) if len(places) > 1}
    if unknown:
        warnings.warn(f"prompt: the Toybox model never saw {', '.join(unknown)}; such words draw anything or nothing",
                      stacklevel=2)  # fmt: skip


def write_grid(path, images, columns):
    from PIL import Image

    from course_lib.data.pictures import mark
    from course_lib.plots import montage

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(montage(images, columns)).save(path, exif=mark())


def human_size(path):
    """How large a file, or a number of bytes, is: "3.5 kB"."""
    count = path if isinstance(path, int) else path.stat().st_size
    return f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count / 1e3:.1f} kB"
