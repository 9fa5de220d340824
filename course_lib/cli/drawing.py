"""Helpers of the commands: prompts with a concept's words, pictures, and the checks of --out."""

import itertools
import re
import tempfile
import warnings

PICTURES = (".png", ".jpg", ".jpeg", ".webp")
WEB_SYNTAX = re.compile(r"\([^()]*:[\d.]+\)|<lora:[^>]*>")


def subjects(learnt):
    """[(token, its words in a prompt)] of a concept or recipe: [("<v>", "<v> cat")]; [] if it names none."""
    about = learnt.about
    tokens, nouns = (about.get(f"{key}s") or [about.get(key) or ""] for key in ("token", "noun"))
    alone = learnt.method == "textual_inversion"
    return [(t, t if alone else f"{t} {noun}".strip()) for t, noun in zip(tokens, nouns, strict=True) if t]


def fill_placeholder(prompts, *learnt):
    """Replace each {} by the words of the next concept or recipe; warn if the words of one are in no prompt."""
    names = [name for one in learnt for _, name in subjects(one)]
    if not names and any("{}" in prompt for prompt in prompts):
        raise ValueError(
            "prompt: expected one without {}, since the file does not name its word; write the one its author gives"
            if learnt else "prompt: expected --concept FILE, whose words {} stands for, or a prompt without {}"
        )  # fmt: skip
    filled = []
    for prompt in prompts:
        following = itertools.cycle(names)
        filled.append(re.sub(r"\{\}", lambda _: next(following), prompt))  # noqa: B023
        if match := WEB_SYNTAX.search(prompt):
            warnings.warn(f"prompt: {match[0]} is for web interfaces; here it is text like any other", stacklevel=2)
    for tokens in ([token for token, _ in subjects(one)] for one in learnt):
        if tokens and not any(_holds(prompt, token) for prompt in filled for token in tokens):
            warnings.warn(f"prompt: none holds the new word {' or '.join(tokens)}, so its concept does little or "
                          "nothing; write it exactly so, or {} in its place", stacklevel=2)  # fmt: skip
    return filled


def _holds(prompt, token):
    edge = r"\b" if token[0].isalnum() else ""
    return re.search(f"{edge}{re.escape(token)}{edge}", prompt, re.IGNORECASE)


def draw(sd, prompts, count, *, w, steps, seed):
    """Draw `count` pictures of each prompt, from the same noises; w=None: the model's own guidance_scale."""
    w = sd.defaults.guidance if w is None else w
    x_T = sd.noise(count, seed=seed).repeat(len(prompts), 1, 1, 1)
    images = sd.sample(prompts, w=w, steps=steps, seed=seed, x_T=x_T)
    if not images.isfinite().all():
        raise FloatingPointError("picture: expected finite numbers, got NaN or infinity, so it was not written; use a "
                                 "smaller --w, or train with a smaller --lr")  # fmt: skip
    return images


def check_out(args, endings=(), folder=False):
    """Raise a ValueError before anything is computed if --out cannot be written, or holds something already.

    endings: those of a file.  folder: a name without an ending means a folder; without `endings` any name does.
    """
    out, suffix = args.out, args.out.suffix.lower()
    is_folder = folder and not (endings and suffix)
    if not is_folder and suffix not in endings:
        or_folder = ", or a folder's name without an ending" if folder else ""
        raise ValueError(f"out: expected a name that ends in {', '.join(endings)}{or_folder}, got {out}")
    kind = "folder" if is_folder else "file"
    if out.exists() and out.is_dir() != is_folder:
        raise ValueError(f"out: expected a {kind}, but {out} is a {'file' if is_folder else 'folder'}")
    if (any(out.iterdir()) if out.is_dir() else out.exists()) and not args.overwrite:
        raise ValueError(f"out: expected a new {kind}, but {out} exists; choose another name, or add --overwrite")
    place = next(path for path in (*[out] * is_folder, *out.parents) if path.exists())
    try:
        tempfile.TemporaryFile(dir=place).close()
    except OSError as error:
        raise ValueError(f"out: expected a {kind} where one can be written, but {place} cannot be written "
                         f"({error.strerror}); choose another") from error  # fmt: skip


def note_unknown_words(sd, prompts, tokens):
    """Warn about words that no caption of the Toybox model has; for other models nothing is known."""
    if not sd.defaults.toybox_world:
        return
    from course_lib.latent.text import words

    unknown = {}
    for prompt in prompts:
        for token in ("{}", *tokens):
            prompt = prompt.replace(token, " ")
        unknown |= {word: None for word, places in words(sd.tokenizer, prompt) if len(places) > 1}
    if unknown:
        warnings.warn(f"prompt: the Toybox model was not trained on {', '.join(unknown)}; their effect is unclear",
                      stacklevel=2)  # fmt: skip


def write_grid(path, images, columns):
    from PIL import Image

    from course_lib.data.pictures import mark
    from course_lib.environment import write_whole
    from course_lib.plots import montage

    with write_whole(path) as temporary:
        kind = Image.registered_extensions()[path.suffix.lower()]
        Image.fromarray(montage(images, columns)).save(temporary, kind, quality=95, exif=mark())


def human_size(path):
    """The size of a file, or a number of bytes, in words: "3.5 kB"."""
    count = path if isinstance(path, int) else path.stat().st_size
    return f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count / 1e3:.1f} kB"
