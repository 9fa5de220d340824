# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 13 · Custom Diffusion: only where the text comes in
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/personalization-course/personalization-course/blob/main/notebooks/13_custom_diffusion.ipynb)
#
# **What you will be able to do**
# - measure which weights of a UNet change most when all of them are trained, and what share of the network they are;
# - say which two matrices of a cross-attention read the text, find them in any UNet, and train nothing else;
# - find pictures that hold the meaning of a word, by the likeness of their captions;
# - measure whether a plain word drifts when it is part of a subject's name;
# - make the file of a concept smaller, and say what that costs.
#
# **Reference file:** `course_lib/personalization/custom_diffusion.py`
#
# **Budgets:** 2 CPU cores: about 5 min, about 2 GB of memory. T4: about 3 min, about 2 GB of GPU memory.
# One big GPU: about 2 min, about 2 GB. With `NAME = "sd15"` on a T4: by estimate 2 hours and 12 GB of GPU memory.
#
# **Before this:** notebooks 05 (cross-attention), 11 (the loop, new words) and 12 (DreamBooth, drift). The small model is shipped.

# %%
import sys

try:
    import course_lib  # noqa: F401
except ModuleNotFoundError:  # Colab: fetch the course first
    # !git clone -q --depth 1 https://github.com/personalization-course/personalization-course course
    # %pip install -q -e course
    sys.path.insert(0, "course")

# %%
import json
import tempfile
from dataclasses import replace

import diffusers
import torch
import torch.nn.functional as F
import transformers

from course_lib import claims
from course_lib.data import toybox_subjects
from course_lib.data.toybox import render
from course_lib.data.toybox_captions import SYNONYMS
from course_lib.data.toybox_sets import pair_spec
from course_lib.judge import ATTRIBUTES, answers, load_judge
from course_lib.latent import text
from course_lib.latent.stable_diffusion import load
from course_lib.latent.text import NewTokens
from course_lib.metrics import interval
from course_lib.personalization import concept, custom_diffusion, dreambooth, interchange, merge
from course_lib.personalization.custom_diffusion import Subject
from course_lib.personalization.finetune import finetune
from course_lib.personalization.memory import device_memory, memory_plan
from course_lib.personalization.regularisation import toybox_regularisation
from course_lib.personalization.saving import applied, concept_of
from course_lib.plots import BLACK, BLUE, GREEN, ORANGE, curves, grid, show
from course_lib.settings import REPOSITORY, RESULTS, pick, profile

# %% [markdown]
# **The switch.** `"toybox"` is the small model of this course: 64×64 pixels, on any laptop, without a network. `"sd15"` is Stable Diffusion 1.5: it wants a GPU and is downloaded once.
# No other line changes. The judge and the ground truth belong to the Toybox world; with `"sd15"` the cells that need them say so and go on.

# %%
NAME = "toybox"  # or "sd15", on a GPU

TOY = NAME == "toybox"
sd = load(NAME, dtype=torch.float32 if TOY else None)
W, STEPS = (4.0, pick(smoke=2, cpu=12, gpu=25)) if TOY else (6.0, 50)  # guidance and DDIM steps of all samples
MANY = pick(smoke=2, cpu=24, gpu=64) if TOY else 4  # pictures for a measurement
BATCH = 8 if TOY else 2


def settings(default, share=1.0, **changes):
    """A method's own settings; the smoke profile takes four steps. share: of the steps."""
    steps = pick(smoke=4, cpu=round(default.steps * share), gpu=round(default.steps * share))
    return replace(
        default, steps=steps, batch_size=pick(smoke=2, cpu=4, gpu=4) if TOY else default.batch_size, **changes
    )


CUSTOM = settings(custom_diffusion.TOYBOX if TOY else custom_diffusion.SD15)
print(f"profile {profile()}; {NAME} on {sd.device.type} in {sd.dtype}; {STEPS} DDIM steps, guidance scale {W}")

# %% [markdown]
# **The subject.** Mochi is a cat of two colours in patches, with a moon on its belly. No caption can say this, and no training picture shows it. We have five pictures.

# %%
subject = toybox_subjects.SUBJECTS["mochi"]
folder, noun = REPOSITORY / "data" / "subjects" / "mochi", subject.noun
pictures = torch.stack([concept.to_tensor(image, concept.picture_size(sd)) for image in concept.open_images(folder)])
judge = load_judge(sd.device)


def draw(prompts, count=1, seed=3):
    """`count` pictures of each prompt, on the CPU; the noises depend on the seed alone."""
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    noise = sd.noise(len(prompts) * count, seed=seed)
    return sd.sample(prompts, w=W, steps=STEPS, x_T=noise, batch=BATCH).cpu()


def tiles(images):
    """Pictures of 512 pixels are shown smaller."""
    return images if images.shape[-1] <= 128 else F.interpolate(images, 128, mode="area")


def teach(recipe, at=(), prompt=None):
    """Train a recipe; returns the concept, and the pictures of `prompt` after the steps in `at`."""
    if not TOY:
        recipe.settings, words = memory_plan(sd, recipe, device_memory(sd.device))
        print(words)
    on_the_way = []
    for step, _ in finetune(sd, recipe):
        if step in at:
            on_the_way.append(draw(prompt, 2))
    return concept_of(recipe), on_the_way


show(
    grid(tiles(pictures), 5, "Mochi, the five reference views", tile=1.1),
    alt="Five pictures of the same cartoon cat in five scenes.",
)

# %% [markdown]
# ## Which weights change most?
#
# **Idea.** DreamBooth trains the whole UNet. Afterwards every weight is a little different. If some kinds of layers changed much and others hardly at all,
# it might be enough to train only the first kind. So train all, and look.
#
# **Equation.** $W_l$ are the weights of a layer $l$ before, $W_l'$ after the training, and $\lVert\cdot\rVert$ is the root of the sum of squares of all numbers in it:
#
# $$\Delta_l = \frac{\lVert W_l' - W_l \rVert}{\lVert W_l \rVert}.$$
#
# We average $\Delta_l$ over three kinds of layers: cross-attention (`attn2` in diffusers' names, the only layers that text goes into), self-attention (`attn1`), and the rest: convolutions, feed-forward and time layers.
# Biases and normalisations have no matrix and stay out.

# %%
with dreambooth.recipe(
    sd, folder, noun=noun, settings=settings(dreambooth.TOYBOX if TOY else dreambooth.SD15)
) as recipe:
    everything, _ = teach(recipe)  # no prior pictures here: nothing holds the weights back

KINDS = {".attn2.": "cross-attention", ".attn1.": "self-attention"}
changes, before = {"cross-attention": [], "self-attention": [], "rest": []}, dict(sd.unet.named_parameters())
parts = {}
for name, W0 in before.items():
    if W0.ndim < 2:
        continue
    kind = next((kind for key, kind in KINDS.items() if key in name), "rest")
    W1 = everything.tensors[f"unet.{name}"]
    changes[kind].append(((W1 - W0.cpu().float()).norm() / W0.cpu().float().norm()).item())
    if kind == "cross-attention":
        parts.setdefault(next(p for p in ("to_q", "to_k", "to_v", "to_out") if p in name), []).append(changes[kind][-1])
changes = {kind: torch.tensor(values) for kind, values in changes.items()}
for kind, values in changes.items():
    print(f"{kind:16} {len(values):3} layers, mean change {values.mean():.4f} ± {interval(values):.4f}")
print("inside the cross-attention:", ", ".join(f"{p} {torch.tensor(v).mean():.4f}" for p, v in parts.items()))

# %% [markdown]
# Beside the changes stands what these layers weigh. Stable Diffusion 1.x's shares are the published ones: 5.11 % of the UNet for the whole cross-attention, 2.23 % for the two matrices in it that this notebook is about.

# %%
total = sum(p.numel() for p in before.values())
share = {kind: sum(p.numel() for n, p in before.items() if key in n) / total for key, kind in KINDS.items()}
keys_values = sum(p.numel() for n, p in before.items() if ".attn2.to_k." in n or ".attn2.to_v." in n) / total

fig, (left, right) = curves(2, width=4.6, height=3.0)
heights = [values.mean() for values in changes.values()]
left.bar(list(changes), heights, yerr=[interval(v) for v in changes.values()], capsize=4, color=(ORANGE, BLUE, GREEN))
left.set(title="Mean relative change, 95 % intervals", ylabel="‖W' − W‖ / ‖W‖")
for offset, (label, whole, thin, colour) in zip(
    (-0.2, 0.2), ((NAME, share["cross-attention"], keys_values, ORANGE), ("SD 1.x, published", 0.0511, 0.0223, BLACK))
):
    bars = right.bar([k + offset for k in (0, 1)], [100 * whole, 100 * thin], 0.38, label=label, color=colour)
    right.bar_label(bars, fmt="%.2f")
right.set(title="Share of the UNet's parameters", ylabel="per cent", xticks=(0, 1))
right.set_xticklabels(["cross-attention", "its K and V"])
right.legend(fontsize=8)
show(fig, alt="Left: bars of the mean relative change of cross-attention, self-attention and the rest. Right: share of"
     " parameters of cross-attention and of its keys and values, here and in Stable Diffusion 1.x.")  # fmt: skip

# %% [markdown]
# **The claim C14**: *the cross-attention changes most*. Fixed before looking: it holds if its mean is above both others by more than the 95 % interval of the difference
# (the two intervals, squared, added, and the root taken).

# %%
cross, lead = changes["cross-attention"], {}
for other in ("self-attention", "rest"):
    gap = (cross.mean() - changes[other].mean()).item()
    half = (interval(cross) ** 2 + interval(changes[other]) ** 2) ** 0.5
    lead[other] = "more" if gap > half else "less" if gap < -half else "cannot tell"
    print(f"cross-attention against {other}: {gap:+.4f} ± {half:.4f}: {lead[other]}")
told = "holds" if set(lead.values()) == {"more"} else "does not hold" if "less" in lead.values() else "cannot be told"
print(f"C14 {told} in this small measurement: one subject, {everything.settings['steps']} steps.\n")
print(claims.verdict("C14"))

# %% [markdown]
# A warning that belongs to this measurement. Adam divides each gradient by its own size, so it moves every number by about the same amount. A matrix of small numbers then has a large *relative* change whatever
# it is for. The first exercise takes this apart.
#
# ## Keys and values
#
# **Idea.** In a cross-attention each place of the picture asks a question and each token of the text gives an answer. The question comes from the picture. What the token offers comes from the text.
# A new subject needs new offers, not new questions.
#
# **Equation.** $f$ $(N, d)$ are the features of the picture at its $N$ places, $c$ $(L, D)$ those of the $L$ tokens, and $d'$ is the width of a head (notebook 05):
#
# $$\text{Attention}(Q, K, V) = \text{softmax}\!\left(\frac{Q K^\top}{\sqrt{d'}}\right) V, \qquad Q = f\,W_Q^\top, \qquad K = c\,W_K^\top, \qquad V = c\,W_V^\top .$$
#
# Only $W_K$ and $W_V$ see the text $c$. Text enters the UNet nowhere else. So Custom Diffusion trains these two in every cross-attention, and one new row of the embedding table, as in notebook 11: the word `<v>` in *"a photo of a <v> cat"*.
#
# How many numbers is that? In Stable Diffusion 1.x there are 16 cross-attentions; their matrices have the published shapes below.

# %%
# NBVAL_CHECK_OUTPUT
PUBLISHED = [(320, 768)] * 5 + [(640, 768)] * 5 + [(1280, 768)] * 6  # one W_K and one W_V of each
numbers = 2 * sum(rows * columns for rows, columns in PUBLISHED)
print(f"Stable Diffusion 1.x: {len(PUBLISHED)} layers, {numbers:,} numbers in K and V, "
      f"{numbers / 859_520_964:.2%} of the UNet, {numbers * 4 / 2**20:.1f} MiB in float32")  # fmt: skip
layers = custom_diffusion.key_value_layers(sd.unet)
ours = sum(layer.weight.numel() for layer in layers.values())
whole = sum(p.numel() for p in sd.unet.parameters())
print(f"{NAME}: {len(layers) // 2} layers, {ours:,} numbers, {ours / whole:.2%} of the UNet")

# %% [markdown]
# The recipe by hand: choose the parameters, attach a word. It has to choose exactly what the library chooses.

# %%
# NBVAL_CHECK_OUTPUT
chosen = {
    f"unet.{name}": param
    for name, param in sd.unet.named_parameters()
    if name.endswith((".attn2.to_k.weight", ".attn2.to_v.weight"))
}
with NewTokens.attach(sd.text_encoder, sd.tokenizer, {"<v>": noun}) as new:  # starts as the class noun
    chosen["tokens"], first = new.rows, new.rows.detach().clone()

with custom_diffusion.recipe(sd, Subject(folder, "<v>", noun), settings=CUSTOM) as recipe:
    assert recipe.params.keys() == chosen.keys()
    assert all(recipe.params[name] is param for name, param in chosen.items() if name != "tokens")
    torch.testing.assert_close(recipe.params["tokens"].detach(), first, rtol=0, atol=0)
    layer = next(iter(layers.values()))  # the start token is cut off: nothing is learnt from it
    features = sd.encode_prompt("a photo of a <v> cat").detach()
    start = torch.autograd.grad(layer(features)[:, 0].sum(), layer.weight, allow_unused=True)[0]
    assert start is None or not start.any()
print(f"same as course_lib: {len(chosen) - 1} matrices and {first.shape[0]} word of {first.shape[1]} numbers")

# %% [markdown]
# The *detached start token*: every prompt begins with the same start token, so what it offers is no matter of the subject; the library lets no gradient flow through it, as the authors' code does.
#
# **Five pictures are few.** With five pictures in which the subject is always about as large, the model learns that size too. So each picture is shown at many sizes, and the prompt says which:
# one in three is zoomed in ("zoomed in"), the others shrink onto grey ("far away", below 0.6 of the side "very small"). The grey must not be learnt: a mask says where the picture is, and only there the loss counts. The library does this for Stable Diffusion. Not for the small model, and not where captions lie beside the pictures: "When it goes wrong", below, shows why.

# %%
example = concept.resized_examples(sd, folder, f"<v> {noun}")
words = ("zoomed in", "far away", "very small")
said = [next((word for word in words if prompts[0].endswith(word)), "as it is") for prompts in example.prompts]
rows = [k for word in ("as it is", *words) for k in [i for i, s in enumerate(said) if s == word][:2]]
with torch.no_grad():
    seen = sd.decode(example.mean[rows]).cpu()
mask = F.interpolate(example.mask[rows].cpu(), seen.shape[-1]).expand(-1, 3, -1, -1) * 1.6 - 1  # 1 is light grey
fig = grid(torch.cat([tiles(seen), tiles(mask)]), len(rows), "Many sizes, and what counts of them", ["variant", "mask"],
           [said[k] for k in rows], tile=1.05)  # fmt: skip
show(
    fig,
    colours=160,
    alt="Eight variants of the reference pictures, whole, zoomed in, far away, very small, and below each its mask.",
)
print(f"{len(said)} variants:", ", ".join(f"{said.count(word)} {word}" for word in ("as it is", *words)))
print(f"sentences of the last: {example.prompts[-1][:3]}")

# %% [markdown]
# Now train it. The loop is notebook 11's: `finetune`. The strip shows the same two noises after 0, 25, 50 and 100 % of the steps.

# %%
prompt = f"a photo of a <v> {noun} in the snow"
at = sorted({max(1, CUSTOM.steps * k // 4) for k in (1, 2, 4)})
start_pictures = draw(prompt.replace("<v> ", ""), 2)
with custom_diffusion.recipe(sd, Subject(folder, "<v>", noun), settings=CUSTOM) as recipe:
    custom, on_the_way = teach(recipe, at, prompt)
moved = [name for name, param in sd.unet.named_parameters() if param.requires_grad]
assert not moved  # taken out again: the model is what it was
strip = torch.stack([start_pictures, *on_the_way], dim=1).flatten(0, 1)
fig = grid(tiles(strip), 1 + len(at), f"{prompt!r}", (), [f"step {k}" for k in (0, *at)], tile=1.2)
show(
    fig,
    colours=160,
    alt="Two rows of pictures from the same noises: before the training, and after 25, 50 and 100 per cent of it.",
)
print(f"{sum(v.numel() for v in custom.tensors.values()):,} numbers learnt, {custom.bytes / 1e6:.2f} MB")

# %% [markdown]
# ## Pictures that hold the class
#
# **Idea.** If the model sees nothing but Mochi under the word *cat*, it may forget the other cats. DreamBooth answers with pictures that the model drew itself. Custom Diffusion takes *real* pictures with their captions:
# those whose caption speaks of the class.
#
# **Equation.** $e(w)$ is the row of a word $w$ in the embedding table (the mean of its rows, if it has several tokens), $w_j$ are the words of a caption, and $w^*$ is the noun of the target, the last word of "a photo of a cat". A caption is near if
#
# $$\max_j\ \cos\bigl(e(w_j), e(w^*)\bigr) > 0.85, \qquad \cos(a, b) = \frac{a \cdot b}{\lVert a\rVert\,\lVert b\rVert}.$$
#
# A caption with the noun itself has 1. The paper measures otherwise: it compares the features of *whole sentences*, $\tau(\cdot)$ at CLIP's end token, and keeps 200 pictures with a cosine above 0.85. We try both.
# Our corpus is what the small model was trained on: the captions of the Toybox world.


# %%
def row(word):
    ids = sd.tokenizer(word, add_special_tokens=False, return_tensors="pt").input_ids.to(sd.device)
    return sd.text_encoder.get_input_embeddings()(ids)[0].float().mean(0)


@torch.no_grad()
def nearest_word(caption, noun):
    said = [word for word, _ in text.words(sd.tokenizer, caption)]
    return max(F.cosine_similarity(row(word), row(noun), dim=0).item() for word in said)


corpus = [pair_spec(k) for k in range(pick(smoke=500, cpu=2000, gpu=4000))]  # (what the picture shows, its caption)
captions, target, limit = [caption for _, caption in corpus], f"a photo of a {noun}", 0.85
near = custom_diffusion.similarity(sd, captions, target)
ours = torch.tensor([nearest_word(caption, noun) for caption in captions[:100]])
torch.testing.assert_close(near[:100], ours, rtol=0, atol=1e-4)
found = [int(k) for k in near.argsort(descending=True, stable=True)[:200] if near[k] > limit]
assert found == custom_diffusion.retrieve(sd, captions, target, 200, limit)
print(f"same as course_lib: {len(found)} of {len(captions)} captions are nearer than {limit}")

# %% [markdown]
# And the paper's way, on the same captions: as many of them, the nearest by their whole sentence. How many of each name the class?


# %%
@torch.no_grad()
def sentences(prompts):
    ids = text.tokenize(sd.tokenizer, prompts).to(sd.device)
    return sd.text_encoder(ids).pooler_output.float()


whole = torch.cat([sentences(captions[k : k + 100]) for k in range(0, len(captions), 100)])
by_sentence = torch.cosine_similarity(whole, sentences([target])).cpu()
theirs = by_sentence.argsort(descending=True)[: len(found)].tolist()
names = {noun, SYNONYMS.get(noun, noun)}
for label, chosen_captions in (("by the nearest word", found), ("by the whole sentence", theirs)):
    share = sum(any(name in captions[k].split() for name in names) for k in chosen_captions) / len(chosen_captions)
    print(f"{label:22} {share:5.0%} name a {' or '.join(sorted(names))}; nearest: {captions[chosen_captions[0]]!r}")

picked = found[:6] + theirs[:6]
images = torch.stack([torch.from_numpy(render(corpus[k][0])) for k in picked]).permute(0, 3, 1, 2)
fig = grid(images, 6, f"Found for {target!r}", ["by word", "by sentence"], tile=1.15)
show(
    fig,
    colours=160,
    alt="Two rows of six pictures: the first found by the nearest word, and the nearest by the whole sentence.",
)
for k in picked:
    print(f"word {near[k]:.2f}, sentence {by_sentence[k]:.2f}  {captions[k]}")

# %% [markdown]
# Where the whole sentence finds few pictures of the class, that is a limit of this small text encoder, not of the idea: at its end token the form of a sentence counts more than its noun. The library therefore goes by the word.
# With CLIP's own encoder, which has read 400 million captions, the paper's measure serves.
#
# The pictures become one more term of the recipe, as in notebook 12. Train again, with them. (With `sd15` we let the model draw its class pictures, as DreamBooth does: pictures of the Toybox world would teach it a new style.)


# %%
def holding(word, count):
    """Pictures that hold a word's meaning, as a term of a recipe."""
    return toybox_regularisation(sd, word, count) if TOY else dreambooth.prior_examples(sd, word, count)


regularisation = [holding(noun, pick(smoke=50, cpu=100, gpu=200))]
with custom_diffusion.recipe(
    sd, Subject(folder, "<v>", noun), regularisation=regularisation, settings=CUSTOM
) as recipe:
    held, _ = teach(recipe)

ROWS = {  # what it is called -> (concept, what stands for the subject)
    "the model as it is": (None, noun),
    "DreamBooth": (everything, f"sks {noun}"),
    "Custom Diffusion": (custom, f"<v> {noun}"),
    "… with pictures": (held, f"<v> {noun}"),
}


def draw_all(templates, count=1, seed=3):
    """Pictures of the same prompts from the same noises, by each of ROWS."""
    drawn = {}
    for label, (learnt, name) in ROWS.items():
        with applied(sd, *([learnt] if learnt else [])):
            drawn[label] = draw([template.replace("{}", name) for template in templates], count, seed)
    return drawn


def truth(fields):
    """The renderer's own picture of the subject, in the scene that the prompt names."""
    return torch.from_numpy(subject.render(subject.spec(seed=0, **fields))).permute(2, 0, 1).float() / 127.5 - 1


templates, fields = zip(*toybox_subjects.prompts("mochi"))
shown = {
    0: "snow",
    3: "under water",
    5: "moon",
    9: "watercolour,\nsnow",
    11: "next to a\nred chair",
    15: "red hat,\nsnow",
}
rows = draw_all([templates[k] for k in shown])
if TOY:
    rows["ground truth"] = torch.stack([truth(fields[k]) for k in shown])
fig = grid(tiles(torch.cat(list(rows.values()))), len(shown), "", list(rows), list(shown.values()), tile=1.15)
show(fig, colours=160,
     alt="Rows: the untouched model, DreamBooth, Custom Diffusion without and with regularisation pictures, the"
     " ground truth; columns: six prompts.")  # fmt: skip

# %% [markdown]
# Look first at the colours and the patches, then at the moon on the belly, then at whether the scene is the one that the prompt asks for. The first row shows what this model makes of a cat: no method can draw better than that.
#
# And the class word itself, without `<v>` and without `sks`: is *"a photo of a cat"* still any cat?

# %%
plain = draw_all([f"a photo of a {noun}"] * pick(smoke=2, cpu=8, gpu=8), seed=7)
fig = grid(
    tiles(torch.cat(list(plain.values()))), len(plain["DreamBooth"]), f"'a photo of a {noun}'", list(plain), tile=0.9
)
show(
    fig,
    colours=160,
    alt="Rows of pictures of the class prompt from the same noises: untouched model, and after each training.",
)

# %% [markdown]
# **The claim C15**: *Custom Diffusion comes near DreamBooth in likeness, with a few per cent of the parameters*. Likeness is what the judge's identity head says: the dot product of the individual vector of a sample with those of the five references, averaged.
# The zero of the scale is the untouched model, which draws some cat. Fixed before looking: C15 holds if Custom Diffusion keeps at least 80 % of what DreamBooth gains over it, by more than the interval over the prompts.


# %%
@torch.no_grad()
def individual(images):
    return torch.cat([judge.individual(part.to(sd.device)) for part in images.split(50)]).cpu()


if TOY:
    references = individual(pictures)
    asked, count = templates[: pick(smoke=2, cpu=12, gpu=len(templates))], pick(smoke=1, cpu=2, gpu=4)
    scores = {
        label: (individual(images) @ references.T).mean(1).view(len(asked), count).mean(1)
        for label, images in draw_all(asked, count, seed=11).items()
    }
    own = individual(torch.stack([truth(f) for f in fields[: len(asked)]])) @ references.T
    scores["ground truth"] = own.mean(1)
    for label, values in scores.items():
        print(f"{label:20} likeness {values.mean():.3f} ± {interval(values):.3f}")
    base = scores["the model as it is"]
    margin = (scores["Custom Diffusion"] - base) - 0.8 * (scores["DreamBooth"] - base)
    gain, half = margin.mean().item(), interval(margin)
    told = "holds" if gain > half else "does not hold" if gain < -half else "cannot be told"
    print(f"\nabove 80 % of DreamBooth's gain: {gain:+.3f} ± {half:.3f}: C15 {told} in this small measurement")
numbers = {label: sum(v.numel() for v in c.tensors.values()) for label, (c, _) in ROWS.items() if c}
print(f"numbers: {numbers['Custom Diffusion']:,} of DreamBooth's {numbers['DreamBooth']:,}, "
      f"{numbers['Custom Diffusion'] / numbers['DreamBooth']:.1%}\n")  # fmt: skip
print(claims.verdict("C15"))

# %% [markdown]
# The full measurement (`training/toybox_personalize.py`) has all methods, four subjects and more prompts. What they cost on disk and what they reach:

# %%
record = RESULTS / "personalization.json"
if record.is_file():
    table = json.loads(record.read_text())["rows"]
    print(f"{'method':36}{'kB':>10}{'likeness':>10}   mean of {', '.join(table)}")
    for method in dict.fromkeys(method for rows in table.values() for method in rows):
        have = [rows[method] for rows in table.values() if method in rows]
        kilobytes = sum(row.get("bytes", 0) for row in have) / len(have) / 1e3
        print(f"{method:36}{kilobytes:>10,.1f}{sum(row['fidelity'] for row in have) / len(have):>10.3f}")
else:
    print("no record yet: python training/toybox_personalize.py writes it")

# %% [markdown]
# ## A word inside a name
#
# **Idea.** A known example is a gate called *moongate*. Learn it under that name, and *moon* begins to look like the gate, since the name is made of it. The subject's name contains an ordinary word, and training pulls at every word of the prompt.
#
# We do the same on purpose. *Castle* has a meaning of its own in this world. We give our cat the name *"castle cat"*, and ask afterwards for *"a photo of a castle"*. Twice: with Mochi's pictures alone, and with pictures of castles that were found by their captions.

# %%
WORD, COMPOUND = "castle", f"castle {noun}"
castles = [holding(WORD, pick(smoke=20, cpu=100, gpu=200) if TOY else 100)]
print(f"{len(castles[0].mean)} pictures hold the word {WORD!r}, for instance {castles[0].prompts[0][0]!r}")
learnt = {"the model as it is": None}
for label, pictures_of in (("no regularisation", []), ("with castles", castles)):
    with custom_diffusion.recipe(
        sd, Subject(folder, "<v>", COMPOUND), regularisation=pictures_of, settings=CUSTOM
    ) as recipe:
        learnt[label], _ = teach(recipe)

named, asked = {}, {}
for label, one in learnt.items():
    with applied(sd, *([one] if one else [])):
        asked[label] = draw(f"a photo of a {WORD}", MANY, seed=21)
        named[label] = draw(f"a photo of a {'<v> ' if one else ''}{COMPOUND}", 4, seed=22)
n = min(8, MANY)
fig = grid(tiles(torch.cat([x[:n] for x in asked.values()])), n, f"'a photo of a {WORD}'", list(asked), tile=0.95)
show(
    fig,
    colours=160,
    alt="Three rows of pictures of a castle from the same noises: untouched model, learnt without, and with castles.",
)
fig = grid(tiles(torch.cat(list(named.values()))), 4, f"'a photo of a <v> {COMPOUND}'", list(named), tile=0.95)
show(
    fig,
    colours=160,
    alt="Three rows of pictures of the compound name: untouched model, learnt without, and with castles.",
)

# %% [markdown]
# **The claim C18**: *the word drifts, and pictures of it prevent that*. Three numbers, each for the samples of "a photo of a castle": how much they look like Mochi (likeness as above), how sure the judge is that it sees a castle,
# and how far each is, in the judge's features, from what the untouched model drew from the same noise. Fixed before looking: the word *drifts* if likeness to Mochi rises, or the probability of a castle falls, by more than its interval;
# the pictures *prevent* it if, with them, the same number is better by more than its interval. Both are differences picture by picture.

# %%
if TOY:
    castle = ATTRIBUTES["noun"].index(WORD)
    rows = {}
    for label, images in asked.items():
        logits, features = answers(judge, images)
        rows[label] = {
            "likeness to Mochi": (individual(images) @ references.T).mean(1),
            "probability of a castle": logits["noun"].softmax(1)[:, castle],
            "features": features,
        }
    base = rows["the model as it is"]
    for label, row in rows.items():
        row["moved"] = (row.pop("features") - base.get("features", 0)).norm(dim=1) if row is not base else None
        values = [
            f"{key} {v.mean():.3f} ± {interval(v):.3f}" for key, v in row.items() if torch.is_tensor(v) and v.ndim == 1
        ]
        print(f"{label:20}", "; ".join(values))

    print()
    drifts, prevents = {}, {}
    for key, sign in (("likeness to Mochi", 1), ("probability of a castle", -1)):
        worse = sign * (rows["no regularisation"][key] - base[key])
        saved = sign * (rows["no regularisation"][key] - rows["with castles"][key])
        drifts[key], prevents[key] = (v.mean().item() > interval(v) for v in (worse, saved))
        print(f"{key}: worse by {worse.mean():+.3f} ± {interval(worse):.3f} without regularisation; "
              f"{saved.mean():+.3f} ± {interval(saved):.3f} of it saved by the castles")  # fmt: skip
    both = any(drifts[key] and prevents[key] for key in drifts)
    told = (
        "holds"
        if both
        else "holds only in its first half: it drifts, prevention cannot be told"
        if any(drifts.values())
        else "cannot be told: no drift seen"
    )
    print(f"C18 {told} in this small measurement: {MANY} pictures.\n")
print(claims.verdict("C18"))

# %% [markdown]
# ## How large is a concept
#
# **Idea.** A matrix is large, but its *change* may be simple: a few directions of the text space get new answers. The singular value decomposition (SVD) sorts a change into directions, the strongest first. Keep the strong ones and throw the rest away.
#
# **Equation.** $U$, $\Sigma$, $V^\top$ are the SVD of the change, $\sigma_i$ its singular values from large to small, and $r$ is how many are kept:
#
# $$\Delta W = W' - W = U \Sigma V^\top \approx \underbrace{U_{:r}\Sigma_{:r}}_{u}\ \underbrace{V_{:r}^\top}_{v}, \qquad r = \min\Bigl\{r : \sum_{i \le r}\sigma_i \ge 0.6 \sum_i \sigma_i\Bigr\}.$$
#
# The paper keeps 60 % of the sum: 75 MB become 15 MB.


# %%
def thin(change, keep=0.6):
    U, S, Vh = torch.linalg.svd(change.double(), full_matrices=False)
    r = int((S.cumsum(0) / S.sum() < keep).sum()) + 1
    return (U[:, :r] * S[:r]).float(), Vh[:r].float()


def change_of(learnt, name):
    return learnt.tensors[name] - before[name.removeprefix("unet.")].detach().cpu().float()


def smaller(learnt, keep):
    tensors = {"tokens": learnt.tensors["tokens"]}
    for name in learnt.tensors:
        if name != "tokens":
            tensors[f"{name}.u"], tensors[f"{name}.v"] = thin(change_of(learnt, name), keep)
    return replace(learnt, tensors=tensors)


for name in (name for name in custom.tensors if name != "tokens"):
    u, v = thin(change_of(custom, name))
    u2, v2 = merge.compress(change_of(custom, name), 0.6)
    torch.testing.assert_close(u @ v, u2 @ v2)
print("same as course_lib: merge.compress, for every matrix")

# %% [markdown]
# What do we see of it? The same prompts and noises with the whole concept and with smaller ones, and the mean difference of the pictures. The dotted line is the difference between the whole concept and *no* trained matrices, only the word.

# %%
KEEP = (0.2, 0.4, 0.6, 0.8, 0.95)
asked_for = [
    f"a photo of a <v> {noun} {scene}" for scene in ("in the snow", "on the moon", "in the forest", "on a stage")
]


def with_concept(one):
    with applied(sd, one):
        return draw(asked_for, 1, seed=31)


whole = with_concept(custom)
nothing = with_concept(replace(custom, tensors={"tokens": custom.tensors["tokens"]}))
curve, kept_pictures = [], [whole]
for keep in KEEP:
    small = smaller(custom, keep)
    kept_pictures.append(with_concept(small))
    rank = [value.shape[1] for name, value in small.tensors.items() if name.endswith(".u")]
    gaps = (kept_pictures[-1] - whole).abs().flatten(1).mean(1) / 2
    curve.append((small.bytes / 1e3, gaps.mean().item(), interval(gaps)))
    print(f"keep {keep:.2f}: {small.bytes / 1e3:6.1f} kB, mean rank {sum(rank) / len(rank):5.1f}, "
          f"pictures differ by {gaps.mean():.4f} ± {interval(gaps):.4f} of the range")  # fmt: skip
scale = ((nothing - whole).abs().mean() / 2).item()
print(f"the word without the matrices: {scale:.4f}; the whole concept has {custom.bytes / 1e3:.1f} kB")

fig, ax = curves(width=5.2, height=2.8)
size, gap, half = zip(*curve)
ax.errorbar(size, gap, half, marker="o", capsize=3)
for keep, x, y in zip(KEEP, size, gap):
    ax.annotate(f"{keep:.0%}", (x, y), xytext=(5, 6), textcoords="offset points", fontsize=8)
ax.axhline(scale, color=BLACK, linewidth=1, linestyle=":")
ax.axvline(custom.bytes / 1e3, color=ORANGE, linewidth=1)
ax.set(
    title="Bytes against difference",
    xlabel="kB (orange: whole matrices)",
    ylabel="mean pixel difference",
    ylim=(0, None),
)
show(
    fig,
    alt="Curve of the pixel difference against the size of the compressed concept, with the share kept at each point.",
)
kept_pictures.append(nothing)
fig = grid(tiles(torch.cat(kept_pictures)), 4, "", ["whole", *[f"keep {k:.0%}" for k in KEEP], "word only"], tile=0.95)
show(
    fig,
    colours=160,
    alt="Rows of the same four prompts: with the whole concept, with smaller and smaller ones, and with the word only.",
)

# %% [markdown]
# Two thin matrices of $r$ columns cost $r\,(\text{out} + D)$ numbers in place of $\text{out}\cdot D$. If so much is kept that this is more, compression makes the file *larger*: the points right of the orange line.
#
# **Stock diffusers opens it.** The format is that of diffusers' own training script: a file for the matrices and one for each word. A loader that silently loads nothing is the known trap here, so we look at pictures before and after.

# %%
with tempfile.TemporaryDirectory() as place:
    files = interchange.export(custom, place, sd)
    for file in sorted(files.iterdir()):
        print(f"{file.name:52} {file.stat().st_size / 1e3:8.1f} kB")
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()  # their remarks on dtypes do not matter here
    pipe = load(NAME, dtype=sd.dtype).to_pipeline()  # a second copy: the pipeline changes its parts
    pipe.set_progress_bar_config(disable=True)
    z, ask = sd.noise(2, seed=41), f"a photo of a <v> {noun} in the snow"
    steps = pick(smoke=2, cpu=10, gpu=25)

    def stock():
        made = pipe(
            [ask] * 2, latents=z.to(sd.dtype), guidance_scale=W, num_inference_steps=steps, output_type="pt"
        ).images
        return 2 * made.float().cpu() - 1

    pipe.load_textual_inversion(files / "<v>.safetensors")
    words_only = stock()
    pipe.unet.load_attn_procs(
        files, weight_name=interchange.CUSTOM, _pipeline=pipe
    )  # without _pipeline: nothing, in silence
    theirs = stock()
with applied(sd, custom):
    ours = sd.sample([ask] * 2, x_T=z, w=W, steps=steps).cpu()
if sd.dtype == torch.float32 and sd.device.type == "cpu":
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-3)
    assert (theirs - words_only).abs().max() > 1e-3
print(f"\nours and diffusers' differ by at most {(theirs - ours).abs().max():.0e}; "
      f"the matrices change the pictures by up to {(theirs - words_only).abs().max():.2f} of 2")  # fmt: skip

# %% [markdown]
# The same from a shell, in the repository:
#
# ```
# python -m course_lib.personalize train --method custom-diffusion --images data/subjects/mochi --class-noun cat \
#     --token "<v>" --regularisation 100 --out mochi.safetensors
# python -m course_lib.personalize sample --concept mochi.safetensors --prompt "a photo of a {} on the moon" --out moon.png
# python -m course_lib.personalize compress --concept mochi.safetensors --keep 0.6 --out small.safetensors
# ```
#
# ## When it goes wrong
#
# Three mistakes on purpose, with Mochi's pictures and no regularisation: ten times the learning rate; the pictures without their captions, under templates such as "a close-up of a <v> cat"; and these in the many sizes of the figure above.

# %%
wrong = {"as above": (custom, None)}
bare = concept.open_images(folder)  # pictures from a list have no captions beside them
hot = replace(CUSTOM, lr=10 * CUSTOM.lr, steps=max(2, CUSTOM.steps // 2))
tries = {
    "10 × learning rate": (folder, dict(settings=hot)),
    "no captions": (bare, dict(augment=False, settings=CUSTOM)),
    "no captions, many sizes": (bare, dict(augment=True, settings=CUSTOM)),
}
for label, (images, options) in tries.items():
    with custom_diffusion.recipe(sd, Subject(images, "<v>", noun), **options) as recipe:
        wrong[label] = teach(recipe)
ask = [f"a photo of a <v> {noun} in the snow", f"a watercolour of a <v> {noun} in the desert", f"a photo of a {noun}",
       "a photo of a red car in the city", "a photo of a <v> cat far away on the moon"]  # fmt: skip
seen = []
for one, _ in wrong.values():
    with applied(sd, one):
        seen.append(draw(ask, 1, seed=51))
columns = ["<v> cat\nsnow", "<v> cat\nwatercolour", "a cat", "red car\nin the city", "<v> cat\nfar away"]
fig = grid(tiles(torch.cat(seen)), len(ask), "", list(wrong), columns, tile=1.1)
show(
    fig,
    colours=160,
    alt="Rows: the settings of this notebook and three mistakes, named at the left; columns: five prompts.",
)

# %% [markdown]
# What to look for. With too high a rate the matrices leave the region in which the rest of the UNet understands them: pictures turn into blotches, also those of the red car, which has nothing to do with the subject.
# Without captions no training sentence names a place. "a photo of a <v> cat" may then be learnt well, and lost as soon as a place is named: the features of the longer sentence, up to its end token and the padding behind it, are others, and for these nothing was learnt.
# And the many sizes: in 512 pixels a subject of half the side is still a subject; in 64 it is 32 pixels, eight latents a side, and what tells Mochi from other cats is gone. So the small model takes the pictures as they are.
#
# **In the run stored here** (to be filled in): which of the three can be seen.
#
# ## On the real one
#
# Set `NAME = "sd15"`, with a GPU, and run all cells. The library's settings for it are the published ones; on a T4 (14.5 GiB) `memory_plan` lowers what has to be lowered and prints it.
#
# | | toybox | sd15, published | on a T4 |
# |---|---|---|---|
# | steps, one subject | 300 | 250 | 250 |
# | learning rate | 1e-3 | 8e-5 | 8e-5 |
# | pictures a step | 4 | 8 | 8, one after the other (`accumulate=8`) |
# | weights that do not learn | float32 | float32 or half | float16 |
# | activations | kept | kept | computed twice (`gradient_checkpointing=True`) |
# | regularisation | found in the Toybox world | 200 pictures of LAION, similarity above 0.85 | your own captioned folder, or the model's own pictures |
# | guidance and steps of sampling | 4, 12 | 6, 100 to 200 | 6, 50 |

# %%
# NBVAL_CHECK_OUTPUT
learns = 19_169_280 + 768
print(f"trained numbers: {learns:,}; with gradients and Adam's two moments in float32: {16 * learns / 2**30:.2f} GiB")
print(f"the same for DreamBooth's 859,520,964: {16 * 859_520_964 / 2**30:.1f} GiB")

# %% [markdown]
# That difference is why Custom Diffusion trains where DreamBooth does not fit. What was **not** run here: the released weights were not available where this notebook was made, so no picture and no number above is Stable Diffusion's.
# Checked in their place: the published configuration with random weights takes a step of this recipe in the tests, and 19,169,280 parameters are counted in it.
#
# ## Exercises
#
# **Exercise (comes later).** C14 with a fair start: draw random changes of the size that Adam makes (each number ± the learning rate, times the square root of the steps) and compute $\Delta_l$ for them. Which kind of layer leads now? How much of the bar chart is left to explain?
#
# **Exercise (comes later).** Train only $W_V$, then only $W_K$. Which of the two carries the subject's look?
#
# **Exercise (comes later).** Repeat C18 with *"a photo of a <v> moon cat"* and ask for *"on the moon"*, a scene. Does a scene's word drift as easily as a noun?
#
# **Exercise (comes later).** Save the concept at `keep=0.6` in float16 (`save_concept(..., dtype=torch.float16)`). How many bytes are left, and what is the difference in the pictures?
