"""What the commands draw and print: prompts with a concept's words, grids of pictures, sizes of files."""


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


def write_grid(path, images, columns):
    from PIL import Image

    from course_lib.plots import montage

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(montage(images, columns)).save(path)


def human_size(path):
    """How large a file, or a number of bytes, is: "3.5 kB"."""
    count = path if isinstance(path, int) else path.stat().st_size
    return f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count / 1e3:.1f} kB"
