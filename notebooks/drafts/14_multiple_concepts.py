# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 14 · Several concepts in one picture
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/personalization-course/personalization-course/blob/main/notebooks/14_multiple_concepts.ipynb)
#
# **What you will be able to do**
# - teach a model two subjects at once, each with a word of its own, and draw them side by side;
# - merge two concepts that were learnt apart, in closed form and without any training;
# - derive that formula, solve it by hand and check it with another solver;
# - score a picture of two subjects, so that forgetting one of them shows;
# - take a concept from one tool to another and know which file opens where.
#
# **Reference file:** `course_lib/personalization/merge.py`
#
# **Budgets:** 2 CPU cores: about 5 min, about 2 GB of memory. T4: about 3 min, about 2 GB of GPU memory.
# One big GPU: about 2 min, about 2 GB. With `NAME = "sd15"` on a T4: by estimate 2 hours and 12 GB of GPU memory, without the DreamBooth rows.
#
# **Before this:** notebooks 12 (DreamBooth) and 13 (Custom Diffusion). The small model is shipped.

# %%
import sys

try:
    import course_lib  # noqa: F401
except ModuleNotFoundError:  # Colab: fetch the course first
    # !git clone -q --depth 1 https://github.com/personalization-course/personalization-course course
    # %pip install -q -e course
    sys.path.insert(0, "course")

# %%
import contextlib
import io
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F

from course_lib import claims, personalize
from course_lib.data.toybox import render
from course_lib.data.toybox_captions import corpus
from course_lib.data.toybox_subjects import SUBJECTS
from course_lib.judge import ATTRIBUTES, answers, load_judge
from course_lib.latent import text
from course_lib.latent.stable_diffusion import load
from course_lib.metrics import interval
from course_lib.personalization import concept, custom_diffusion, dreambooth, interchange
from course_lib.personalization.custom_diffusion import Subject
from course_lib.personalization.finetune import finetune
from course_lib.personalization.memory import device_memory, memory_plan
from course_lib.personalization.merge import merge_concepts, merge_weights
from course_lib.personalization.saving import Concept, applied, concept_of, load_concept, only_tokens, save_concept
from course_lib.plots import curves, grid, show
from course_lib.settings import REPOSITORY, pick, profile

# %% [markdown]
# **The switch.** `"toybox"` is the small model of this course, `"sd15"` is Stable Diffusion 1.5 on a GPU. No other line changes.
# The judge and the ground truth belong to the Toybox world; with `"sd15"` the cells that need them are passed over.

# %%
NAME = "toybox"  # or "sd15", on a GPU

TOY = NAME == "toybox"
sd = load(NAME, dtype=torch.float32 if TOY else None)
W, STEPS = (4.0, pick(smoke=2, cpu=12, gpu=25)) if TOY else (6.0, 50)  # guidance and DDIM steps of all samples
EACH = pick(smoke=1, cpu=6, gpu=16) if TOY else 1  # pictures of each prompt for a measurement
BATCH = 8 if TOY else 2


def settings(default, factor=1.0):
    """A method's own settings, `factor` times its steps; the smoke profile takes four steps."""
    steps = pick(smoke=4, cpu=round(default.steps * factor), gpu=round(default.steps * factor))
    return replace(default, steps=steps, batch_size=pick(smoke=2, cpu=4, gpu=4) if TOY else default.batch_size)


CUSTOM = custom_diffusion.TOYBOX if TOY else custom_diffusion.SD15
print(f"profile {profile()}; {NAME} on {sd.device.type} in {sd.dtype}; {STEPS} DDIM steps, guidance scale {W}")

# %% [markdown]
# **The subjects.** A chair and a cat in the paper, a cat and a teapot here: Mochi, and Tilly, a blue teapot with a pink sash and a yellow flower. The scene we are after: *"a photo of a <v1> cat next to a <v2> teapot on the beach"*, with these two and no others.

# %%
mochi, tilly = SUBJECTS["mochi"], SUBJECTS["tilly"]
folders = {name: REPOSITORY / "data" / "subjects" / name for name in ("mochi", "tilly")}
pictures = {
    name: torch.stack([concept.to_tensor(image, concept.picture_size(sd)) for image in concept.open_images(folder)])
    for name, folder in folders.items()
}
judge = load_judge(sd.device)


def draw(prompts, count=1, seed=3):
    """`count` pictures of each prompt, on the CPU; the noises depend on the seed alone."""
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    noise = sd.noise(len(prompts) * count, seed=seed)
    return sd.sample(prompts, w=W, steps=STEPS, x_T=noise, batch=BATCH).cpu()


def tiles(images):
    """Pictures of 512 pixels are shown smaller."""
    return images if images.shape[-1] <= 128 else F.interpolate(images, 128, mode="area")


def truth(scene, seed=0):
    """The renderer's own picture of the two, side by side."""
    other = tilly.spec(None, seed, scene=scene, x=0.75, y=0.71, size=0.46)
    spec = mochi.spec(None, seed, scene=scene, relation="next to", other=other, x=0.27, y=0.7, size=0.48)
    return torch.from_numpy(render(spec)).permute(2, 0, 1).float() / 127.5 - 1


def teach(recipe, at=(), prompt=None):
    """Train a recipe; returns the concept, and pictures of `prompt` after the steps in `at`."""
    if not TOY:
        recipe.settings, words = memory_plan(sd, recipe, device_memory(sd.device))
        print(words)
    on_the_way = []
    for step, _ in finetune(sd, recipe):
        if step in at:
            on_the_way.append(draw(prompt, 2))
    return concept_of(recipe), on_the_way


fig = grid(
    tiles(torch.cat(list(pictures.values()))), 5, "The five reference views of each", ["Mochi", "Tilly"], tile=1.1
)
show(fig, colours=160, alt="Five pictures of a cartoon cat and five of a cartoon teapot, each in five scenes.")

# %% [markdown]
# ## All data together
#
# **Idea.** Custom Diffusion changes the keys and values and adds a word. For two subjects: add two words, and train the same matrices on the pictures of both.
#
# **Equation.** $D_1$, $D_2$ are the pictures of the two, with the prompts "… <v1> cat" and "… <v2> teapot"; everything else is notebook 11's loss. $S$ is $W_K$, $W_V$ of every cross-attention and *two* rows $v_1^*$, $v_2^*$:
#
# $$\min_{S}\ \tfrac12\,\mathbb{E}_{D_1}\lVert \epsilon - \epsilon_\theta(z_t, t, c)\rVert^2 + \tfrac12\,\mathbb{E}_{D_2}\lVert \epsilon - \epsilon_\theta(z_t, t, c)\rVert^2 .$$
#
# In the library this is a list of subjects in place of one. There is nothing more to it: two terms of weight ½ and two rows.

# %%
both = [Subject(folders["mochi"], "<v1>", "cat"), Subject(folders["tilly"], "<v2>", "teapot")]
joint_settings = settings(CUSTOM, 1.5)
at = sorted({max(1, joint_settings.steps * k // 4) for k in (1, 2, 4)})
SCENE = "a photo of a {} next to a {} on the beach"
start = draw(SCENE.format("cat", "teapot"), 2)
with custom_diffusion.recipe(sd, both, settings=joint_settings) as recipe:
    assert [term.weight for term in recipe.terms] == [0.5, 0.5]
    assert recipe.params["tokens"].shape[0] == 2 and len(recipe.params) == 1 + len(
        custom_diffusion.key_value_layers(sd.unet)
    )
    joint, on_the_way = teach(recipe, at, SCENE.format("<v1> cat", "<v2> teapot"))
print(f"two terms, two rows, {len(joint.tensors) - 1} matrices, {joint.bytes / 1e6:.2f} MB")
strip = torch.stack([start, *on_the_way], dim=1).flatten(0, 1)
title = SCENE.format("<v1> cat", "<v2> teapot")
fig = grid(tiles(strip), 1 + len(at), title, (), [f"step {k}" for k in (0, *at)], tile=1.2)
show(
    fig,
    colours=160,
    alt="Two rows of pictures from the same noises: before the training, and after 25, 50 and 100 per cent of it.",
)

# %% [markdown]
# Each picture still shows one subject: no training picture has both. That the two can stand in one scene is what the model has to bring along, from all the scenes of two objects that it was trained on.
#
# ## Learnt apart
#
# **Idea.** Often the concepts are there already: you learnt the cat last week, a friend the teapot. Each is a file of new matrices $W_1$, $W_2$ for the *same* layers, and a word.

# %%
apart = {}
for one, token in (("mochi", "<v1>"), ("tilly", "<v2>")):
    subject = Subject(folders[one], token, SUBJECTS[one].noun)
    with custom_diffusion.recipe(sd, subject, settings=settings(CUSTOM)) as recipe:
        apart[one], _ = teach(recipe)
cat, pot = apart.values()
try:
    with applied(sd, cat, pot):
        raise AssertionError("two concepts were applied that change the same weights")
except ValueError as error:
    print("ValueError:", error)

# %% [markdown]
# The library refuses. A layer has one $W_K$; it can be the cat's or the teapot's. Two ways out are plausible and both wrong in general: the *mean* of the two, which makes each change half as large, and the *sum* of the two changes,
# in which each word also gets what was meant for the other. What do we want instead?
#
# ## The closed form
#
# **Idea.** We want one matrix that does two things: treat the words of each concept exactly as the concept's own matrix does, and treat everything else as the untouched model does, as nearly as possible.
#
# **Equation.** $W_0$ (out, $D$) is the untouched matrix and $W$ the one we look for. The rows of $C$ $(n, D)$ are the features of the words that must work ("<v1> cat", "photo of a <v1> cat", and the same for <v2>); $V$ (out, $n$) is what they should give:
# $V = [W_1 C_1^\top,\ W_2 C_2^\top]$. The rows of $C_\text{reg}$ $(m, D)$ are the features of ordinary captions. $\lVert\cdot\rVert_F$ is the root of the sum of all squares:
#
# $$\min_W\ \lVert W C_\text{reg}^\top - W_0 C_\text{reg}^\top \rVert_F \quad\text{such that}\quad W C^\top = V .$$
#
# *Derivation.* The target is a square of something linear, and the constraint is linear: Lagrange's multipliers solve it in three lines. Write $\Delta = W - W_0$, $A = C_\text{reg}^\top C_\text{reg}$ and $R = V - W_0 C^\top$, what is missing for the words.
# Take half of the square of the norm and one multiplier for each entry of the constraint, in a matrix $v^\top$ (out, $n$):
#
# $$\mathcal{L} = \tfrac12 \operatorname{tr}(\Delta A \Delta^\top) - \operatorname{tr}\bigl(v\,(\Delta C^\top - R)\bigr).$$
#
# 1. The derivative by $\Delta$ must vanish: $\Delta A = v^\top C$. So $\Delta = v^\top C A^{-1} = v^\top d$, with $d = C A^{-1}$ $(n, D)$.
# 2. The constraint: $\Delta C^\top = v^\top d\,C^\top = R$. So $v^\top = R\,(d\,C^\top)^{-1}$.
# 3. Together (Kumari et al. 2023, Eq. 4 and 5):
#
# $$W = W_0 + v^\top d, \qquad d = C\,(C_\text{reg}^\top C_\text{reg})^{-1}, \qquad v^\top = (V - W_0 C^\top)\,(d\,C^\top)^{-1}.$$
#
# In words: $A$ knows which directions of the text space ordinary captions use. $d$ points to where our words differ from them, and only there the matrix is changed. No gradient step is taken.
#
# First the features. They are taken with the words of both concepts attached, from the new token to the end token; the words before it ("photo of a") are said by both concepts, so they are no constraint.

# %%
captions = list(dict.fromkeys(corpus(pick(smoke=200, cpu=500, gpu=500))))


@torch.no_grad()
def features(prompt, since=None):
    """Features (n, D) of a prompt, from its start token, or from the token `since`, to its end token."""
    ids = text.tokenize(sd.tokenizer, prompt)[0].tolist()
    first = ids.index(sd.tokenizer.convert_tokens_to_ids(since)) if since else 0
    return sd.encode_prompt(prompt)[0, first : ids.index(sd.tokenizer.eos_token_id) + 1].double()


C_of = []
with applied(sd, only_tokens(cat), only_tokens(pot)):
    for token, noun in (("<v1>", "cat"), ("<v2>", "teapot")):
        said = [features(around.format(f"{token} {noun}"), token) for around in ("{}", "photo of a {}")]
        C_of.append(torch.cat(said).unique(dim=0))
    C_reg = torch.cat([features(caption) for caption in captions])
print(f"C {tuple(torch.cat(C_of).shape)}, C_reg {tuple(C_reg.shape)} from {len(captions)} captions")

# %% [markdown]
# **The ridge.** $A$ is to be inverted. But captions are alike: they use some directions of the text space a great deal and others hardly at all, and in float32 "hardly at all" is rounding. The *condition number*, the largest over the smallest singular value, says how much an inverse magnifies such errors.
# The cure is old: add a small number to the diagonal, $A + \rho\,\bar a\,I$, with $\bar a$ the mean of $A$'s diagonal and $\rho = 10^{-6}$. It means: also keep $W$ a little near $W_0$ in the directions that no caption uses. The constraint is untouched by it.

# %%
A = C_reg.T @ C_reg
ridged = A + 1e-6 * A.diagonal().mean() * torch.eye(len(A), dtype=A.dtype, device=A.device)
print(f"condition number of A: {torch.linalg.cond(A):.1e}, with the ridge: {torch.linalg.cond(ridged):.1e}")
few = C_reg[:40]
print(f"from 40 features only: {torch.linalg.cond(few.T @ few):.1e}: there are {len(A)} directions")

# %% [markdown]
# Now the formula, by hand.


# %%
def by_hand(W0, own):
    """own: the concepts' matrices W_1, W_2.  All in float64."""
    C = torch.cat(C_of)
    V = torch.cat([W_k @ C_k.T for W_k, C_k in zip(own, C_of)], dim=1)
    d = torch.linalg.solve(ridged, C.T).T
    v = torch.linalg.lstsq((d @ C.T).T, (V - W0 @ C.T).T).solution  # (n, out)
    return W0 + v.T @ d


before = dict(sd.unet.named_parameters())
names = [name for name in cat.tensors if name != "tokens"]
problem = {  # name -> (W_0, [W_1, W_2])
    name: (
        before[name.removeprefix("unet.")].detach().double(),
        [c.tensors[name].to(sd.device).double() for c in (cat, pot)],
    )
    for name in names
}
start_time = time.perf_counter()
merged = merge_concepts(sd, [cat, pot], captions)
seconds = time.perf_counter() - start_time
for name, (W0, own) in problem.items():
    ours = by_hand(W0, own)
    torch.testing.assert_close(ours, merge_weights(own, W0, C_of, C_reg), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(ours.float().cpu(), merged.tensors[name], rtol=1e-3, atol=1e-4)
print(f"same as course_lib: merge_weights, and merge_concepts for all {len(names)} matrices")

# %% [markdown]
# **Another solver.** A formula that agrees with itself proves little. So solve the same problem in another way. With the Cholesky factor $A = L L^\top$ and $Y = \Delta L$ the target becomes $\lVert Y \rVert_F$ and the constraint $Y\,(L^{-1} C^\top) = R$:
# of all solutions of a linear system the *smallest*. That is what the pseudo-inverse gives, and nothing of the derivation above is used.

# %%
C, L = torch.cat(C_of), torch.linalg.cholesky(ridged)
M = torch.linalg.solve_triangular(L, C.T, upper=False)  # (D, n)
rows = {"closed form": [], "other solver": [], "mean of the two": [], "sum of the changes": []}
gap = []
for W0, own in problem.values():
    V = torch.cat([W_k @ C_k.T for W_k, C_k in zip(own, C_of)], dim=1)
    R = V - W0 @ C.T
    Y = R @ torch.linalg.pinv(M)
    other = W0 + torch.linalg.solve_triangular(L.T, Y.T, upper=True).T  # Y L^-1
    answers_of = (by_hand(W0, own), other, sum(own) / 2, sum(own) - W0)
    for label, answer in zip(rows, answers_of):
        rows[label].append(((answer @ C.T - V).norm() / R.norm()).item())
    gap.append(((answers_of[0] - other).norm() / (other - W0).norm()).item())
for label, values in rows.items():
    print(f"{label:20} what the constraint misses, of what was asked for: at most {max(values):.1e}")
print(f"closed form and other solver differ by at most {max(gap):.1e} of the change")

# %% [markdown]
# **The claim C17**: *the constraint holds to rounding, the result equals an independent solver's, and it takes seconds*. Fixed before looking: both numbers below $10^{-6}$, the time below 10 s.

# %%
told = "holds" if max(rows["closed form"]) < 1e-6 and max(gap) < 1e-6 and seconds < 10 else "does not hold"
print(f"merge_concepts took {seconds:.2f} s for {len(names)} matrices, the captions encoded. C17 {told} here.\n")
print(claims.verdict("C17"))

# %% [markdown]
# ## Side by side
#
# Four ways to have both, from the same noises:
# - *joint*: trained on all data together;
# - *merged*: the closed form;
# - *mean*: the two matrices averaged;
# - *DreamBooth, one after the other*: the whole UNet learns Mochi as "sks cat", and then, on top, Tilly as "zwx teapot".


# %%
def with_matrices(combine):
    """Both words, and matrices that are made from W_0 and the two concepts' own."""
    tensors = {"tokens": torch.cat([cat.tensors["tokens"], pot.tensors["tokens"]])}
    tensors |= {name: combine(W0, *own).float().cpu() for name, (W0, own) in problem.items()}
    return Concept("custom_diffusion", tensors, sd.name, merged.about, {}, cat.fingerprint)


mean = with_matrices(lambda W0, W1, W2: (W1 + W2) / 2)
METHODS = {  # concept, and the two names in a prompt
    "the model as it is": (None, "cat", "teapot"),
    "joint": (joint, "<v1> cat", "<v2> teapot"),
    "merged": (merged, "<v1> cat", "<v2> teapot"),
    "mean": (mean, "<v1> cat", "<v2> teapot"),
}
if TOY:  # the whole UNet of Stable Diffusion, twice, is too much for a T4
    first = dreambooth.recipe(sd, folders["mochi"], noun="cat", token="sks", settings=settings(dreambooth.TOYBOX))
    with first:
        one, _ = teach(first)
    with applied(sd, one):
        with dreambooth.recipe(
            sd, folders["tilly"], noun="teapot", token="zwx", settings=settings(dreambooth.TOYBOX)
        ) as second:
            two, _ = teach(second)
    METHODS["DreamBooth, in turn"] = (replace(two, fingerprint=one.fingerprint), "sks cat", "zwx teapot")


def draw_all(templates, count=1, seed=3, methods=METHODS):
    """Pictures of the same prompts from the same noises, by each method; {a} and {b} are the two subjects."""
    drawn = {}
    for label, (learnt, a, b) in methods.items():
        with applied(sd, *([learnt] if learnt else [])):
            drawn[label] = draw([template.format(a=a, b=b) for template in templates], count, seed)
    return drawn


ASK = ["a photo of a {a} next to a {b} on the beach", "a photo of a {a} next to a {b} on a stage",
       "a photo of a {b} next to a {a} in the snow", "a photo of a {a} in the forest", "a photo of a {b} on the moon",
       "a photo of a cat in the city"]  # fmt: skip
COLUMNS = [
    "both,\nbeach",
    "both,\nstage",
    "the other way\nround, snow",
    "Mochi alone,\nforest",
    "Tilly alone,\nmoon",
    "any cat,\ncity",
]
drawn = draw_all(ASK)
if TOY:
    specs = mochi.spec(seed=0, scene="in the forest"), tilly.spec(seed=0, scene="on the moon")
    alone = torch.stack([torch.from_numpy(render(spec)) for spec in specs]).permute(0, 3, 1, 2) / 127.5 - 1
    pairs = torch.stack([truth("on the beach"), truth("on a stage"), truth("in the snow")])
    drawn["ground truth"] = torch.cat([pairs, alone, torch.ones_like(pairs[:1])])  # "any cat" has no one truth
fig = grid(tiles(torch.cat(list(drawn.values()))), len(ASK), "", list(drawn), COLUMNS, tile=1.2)
show(fig, colours=160,
     alt="Rows: the untouched model, joint, merged, mean, DreamBooth in turn, and ground truth; columns: prompts"
     " with both subjects, one of them, or none.")  # fmt: skip

# %% [markdown]
# What to look for: are there *two* objects; is each the right one, in its own colours; has colour leaked from one to the other; and does "a cat" without a new word stay any cat?
#
# **Scored.** The judge was made for one object in a picture. So we cut each picture of "next to" into a left and a right half and ask about each: which noun is it, and how much is it like Mochi, how much like Tilly (the dot product with the reference views, as in notebook 13)?
# A prompt does not say who stands left, so both orders are tried and the better one counts. The score of a picture is the *weaker* of the two likenesses: a method that draws one subject twice must not win.
#
# Does this score tell anything? First try it on the renderer's own pictures, where the answer is known.


# %%
@torch.no_grad()
def halves(images):
    """The lower left and right of pictures (N, 3, 64, 64), each as a picture of its own."""
    cut = (images[:, :, 28:63, 0:34], images[:, :, 28:63, 30:64])
    return [F.interpolate(part, 64, mode="bilinear", antialias=True).clamp(-1, 1).to(sd.device) for part in cut]


@torch.no_grad()
def score(images):
    """For each picture: the weaker of the two likenesses in the better order, and whether both nouns are there."""
    left, right = halves(images)
    like = [[(judge.individual(half) @ r.T).mean(1) for r in references] for half in (left, right)]
    straight, crossed = torch.stack([like[0][0], like[1][1]]), torch.stack([like[0][1], like[1][0]])
    better = straight.sum(0) >= crossed.sum(0)
    weaker = torch.where(better, straight.min(0).values, crossed.min(0).values)
    nouns = torch.stack([answers(judge, half)[0]["noun"].argmax(1) for half in (left, right)]).sort(0).values
    wanted = sorted(ATTRIBUTES["noun"].index(noun) for noun in ("cat", "teapot"))
    return weaker.cpu(), (nouns == torch.tensor(wanted)[:, None]).all(0).float()


if TOY:
    with torch.no_grad():
        references = [judge.individual(images.to(sd.device)) for images in pictures.values()]
    SCENES = ("on the beach", "in the snow", "on a stage", "at night")
    known = torch.stack([truth(scene, seed) for scene in SCENES for seed in range(EACH)])
    measured = {"ground truth": score(known)}
    templates = [f"a photo of a {{a}} next to a {{b}} {scene}" for scene in SCENES]
    measured |= {label: score(images) for label, images in draw_all(templates, EACH, seed=17).items()}
    for label, (weaker, named) in measured.items():
        print(
            f"{label:20} weaker likeness {weaker.mean():+.3f} ± {interval(weaker):.3f}, both nouns {named.mean():.0%}"
        )

    fig, ax = curves(width=6.4, height=2.8)
    values = [weaker for weaker, _ in measured.values()]
    ax.bar(list(measured), [v.mean() for v in values], yerr=[interval(v) for v in values], capsize=4)
    ax.set(title=f"The weaker of the two likenesses, {len(known)} pictures each")
    ax.tick_params(axis="x", labelsize=8)
    show(fig, alt="Bars with intervals: the weaker of the two likenesses for ground truth and each method.")

# %% [markdown]
# **The claims C16 and C19.** Fixed before looking, with differences picture by picture, from the same noise, and their 95 % intervals:
# - C16, *two subjects in one picture*: holds if joint training scores above the untouched model.
# - C19, *joint training and merging do better on two concepts than DreamBooth in turn*: holds if both score above it.


# %%
def against(a, b):
    change = measured[a][0] - measured[b][0]
    gap, half = change.mean().item(), interval(change)
    told = "better" if gap > half else "worse" if gap < -half else "cannot tell"
    print(f"{a} against {b}: {gap:+.3f} ± {half:.3f}: {told}")
    return told


if TOY:
    verdict = {"better": "holds", "worse": "does not hold", "cannot tell": "cannot be told"}
    print(f"C16 {verdict[against('joint', 'the model as it is')]} in this small measurement\n")
    two = {against(way, "DreamBooth, in turn") for way in ("joint", "merged")}
    told = "holds" if two == {"better"} else "does not hold" if "worse" in two else "cannot be told"
    print(f"C19 {told} in this small measurement")
    against("merged", "mean")
    against("joint", "merged")
print()
for claim in ("C16", "C19"):
    print(claims.verdict(claim), "\n")

# %% [markdown]
# ## When it goes wrong
#
# **Errors that are told.** Two subjects with one word; merging what is not two concepts of Custom Diffusion; merging a concept with itself.

# %%
same_word = [Subject(folders["mochi"], "<v>", "cat"), Subject(folders["tilly"], "<v>", "teapot")]
mistakes = {
    "one word for two": lambda: custom_diffusion.recipe(sd, same_word),
    "a single concept": lambda: merge_concepts(sd, [cat], captions),
    "the same word in both": lambda: merge_concepts(sd, [cat, cat], captions),
}
for label, mistake in mistakes.items():
    try:
        mistake()
        raise AssertionError(f"{label}: no error")
    except ValueError as error:
        print(f"{label}: ValueError: {error}")

# %% [markdown]
# **Errors that are not.** With too few captions and hardly any ridge, the formula believes that it may do what it likes in all directions that the few captions leave out. For one layer: how far does the constraint miss, how large is the change, and how much do captions move that the formula never saw?

# %%
with torch.no_grad():
    fresh = torch.cat([features(caption) for caption in corpus(100, seed=1)])
name = names[0]
W0, own = problem[name]
V = torch.cat([W_k @ C_k.T for W_k, C_k in zip(own, C_of)], dim=1)
print("captions   ridge    constraint misses   change of W   new captions move by")
for count, ridge in ((len(captions), 1e-6), (len(captions), 1e-2), (5, 1e-6), (5, 1e-14)):
    W_k = merge_weights(own, W0, C_of, C_reg if count > 5 else C_reg[:40], ridge)
    misses = (W_k @ C.T - V).norm() / (V - W0 @ C.T).norm()
    moved = ((W_k - W0) @ fresh.T).norm() / (W0 @ fresh.T).norm()
    print(f"{count:>8}   {ridge:.0e}   {misses:17.1e}   {(W_k - W0).norm() / W0.norm():11.3f}   {moved:20.3f}")

# %%
wrong = {
    "merged": merged,
    "5 captions, ridge 1e-14": with_matrices(lambda W0, *own: merge_weights(own, W0, C_of, C_reg[:40], 1e-14)),
    "sum of the changes": with_matrices(lambda W0, W1, W2: W1 + W2 - W0),
    "Tilly's matrices only": with_matrices(lambda W0, W1, W2: W2),
}
methods = {label: (one, "<v1> cat", "<v2> teapot") for label, one in wrong.items()}
ask = [ASK[0], ASK[3], ASK[4], "a photo of a red car in the city"]
failed = draw_all(ask, seed=5, methods=methods)
columns = ["both,\nbeach", "Mochi alone,\nforest", "Tilly alone,\nmoon", "red car,\ncity"]
fig = grid(tiles(torch.cat(list(failed.values()))), len(ask), "", list(failed), columns, tile=1.2)
show(
    fig,
    colours=160,
    alt="Rows: merged, merged from few captions, sum of the changes, one concept's matrices; columns: prompts.",
)

# %% [markdown]
# The last column has nothing to do with either subject: it shows what a way of merging does to the rest of the world.
#
# **In the run stored here** (to be filled in): which of these rows differ to the eye.
#
# ## Which file opens where
#
# | what | file | in it | opens in |
# |---|---|---|---|
# | any concept of this course | `name.safetensors` (`save_concept`) | tensors, and their story in the metadata | this course |
# | Textual Inversion | `learned_embeds.safetensors` | `{"<v>": rows}` | diffusers: `pipe.load_textual_inversion(file)`; web interfaces |
# | Custom Diffusion | `pytorch_custom_diffusion_weights.safetensors`, and `<v>.safetensors` beside it | keys and values as attention processors; the word | diffusers: `pipe.unet.load_attn_procs(folder, weight_name=…, _pipeline=pipe)`, and `load_textual_inversion` for each word |
# | Custom Diffusion, the authors' | `delta.bin` | `{"unet": …, "modifier_token": …}`, perhaps compressed | the authors' code; read here |
# | LoRA | `pytorch_lora_weights.safetensors` | thin matrices `lora.down`, `lora.up` | diffusers with peft: `pipe.load_lora_weights(folder)`; web interfaces |
# | embedding of a web interface (A1111) | `name.pt`, `name.safetensors` | `string_to_param` or `emb_params` | web interfaces; read here |
# | DreamBooth, and all others | a pipeline folder (`export(..., pipeline=True)`) | the whole model, words in its tokenizer | everything |
#
# `interchange.export` writes, `interchange.load_foreign` reads and finds out by itself which of these it has. A `.bin` or `.pt` is a *pickle*, which can hold code; it is opened only if there is nothing in it but tensors.
# The round trip of the merged concept, and two files of other tools:

# %%
with tempfile.TemporaryDirectory() as place:
    place = Path(place)
    for file in sorted(interchange.export(merged, place / "diffusers", sd).iterdir()):
        print(f"{file.name:52} {file.stat().st_size / 1e3:8.1f} kB")
    again = interchange.load_foreign(place / "diffusers", sd, {"<v1>": "cat", "<v2>": "teapot"})
    row = cat.tensors["tokens"]
    weights = {name.removeprefix("unet."): cat.tensors[name] for name in names}
    torch.save({"unet": weights, "modifier_token": {"<v1>": row[0]}}, place / "delta.bin")
    torch.save({"string_to_param": {"*": row}, "name": "mochi"}, place / "mochi.pt")
    delta = interchange.load_foreign(place / "delta.bin", sd, {"<v1>": "cat"})
    embedding = interchange.load_foreign(place / "mochi.pt", sd, {"<v1>": "cat"})

prompt, noise = SCENE.format("<v1> cat", "<v2> teapot"), sd.noise(2, seed=23)
seen = []
for one in (merged, again):
    with applied(sd, one):
        seen.append(sd.sample(prompt, w=W, steps=STEPS, x_T=noise).cpu())
torch.testing.assert_close(seen[0], seen[1], rtol=0, atol=1e-5)
with applied(sd, only_tokens(merged)):
    assert (sd.sample(prompt, w=W, steps=STEPS, x_T=noise).cpu() - seen[0]).abs().max() > 1e-4  # they were loaded
for name, value in cat.tensors.items():
    torch.testing.assert_close(delta.tensors[name], value, rtol=0, atol=0)
torch.testing.assert_close(embedding.tensors["tokens"], row, rtol=0, atol=0)
print(f"\nback from the files: the same pictures; delta.bin is {delta.method}, mochi.pt is {embedding.method}")

# %% [markdown]
# **From a shell.** The same without a notebook:
#
# ```
# python -m course_lib.personalize merge --concept cat.safetensors --concept teapot.safetensors --out both.safetensors
# python -m course_lib.personalize sample --concept both.safetensors \
#     --prompt "a photo of a <v1> cat next to a <v2> teapot on the beach" --out beach.png
# ```
#
# Run here, in a folder that goes away again:

# %%
if TOY:
    with tempfile.TemporaryDirectory() as place:
        place, said = Path(place), io.StringIO()
        for label, one in (("cat", cat), ("teapot", pot)):
            save_concept(place / f"{label}.safetensors", one)
        command = ["merge", "--out", place / "both.safetensors", "--device", sd.device.type]
        command += [word for label in ("cat", "teapot") for word in ("--concept", place / f"{label}.safetensors")]
        with contextlib.redirect_stdout(said):
            assert personalize.main([str(word) for word in command]) == 0
        from_shell = load_concept(place / "both.safetensors")
        print(said.getvalue().replace(f"{place}", ".").strip())
    if len(captions) >= 400:  # the command takes corpus(500), as the cpu and gpu profiles do here
        for name in names:
            torch.testing.assert_close(from_shell.tensors[name], merged.tensors[name], rtol=1e-3, atol=1e-4)
        print("the same matrices as in this notebook")

# %% [markdown]
# ## On the real one
#
# Set `NAME = "sd15"`, on a GPU, and run all cells; the rows of DreamBooth are left out, since the whole UNet with its optimiser does not fit a T4 (notebook 12, "Memory").
#
# | | toybox | sd15, published | on a T4 |
# |---|---|---|---|
# | steps, two subjects together | 450 | 500 (the library: 1.5 times the 250 of one) | the same |
# | learning rate | 1e-3 | 8e-5 | 8e-5 |
# | pictures a step | 4 of each | 8 | 8 of each, one after the other |
# | merging | 14 matrices of width 128 | 32 of width 768, about 2 s | seconds; in float64, on the CPU too |
# | captions for merging | 500 of the Toybox world | 200 to 1000, from LAION | your own: ordinary sentences, one a line (`--captions FILE`) |
#
# The captions here, `corpus(500)`, are sentences of the Toybox world. For a real model take sentences of the kind that you will prompt with.
#
# What was **not** run: the released weights were not available where this notebook was made, so no picture above is Stable Diffusion's. What was checked is the algebra, which knows no model, and the recipe with two subjects on the published configuration's shapes.
#
# The paper's own scores for two concepts, text likeness / picture likeness: DreamBooth .783/.695, training in turn .797/.700, merged .800/.695, joint .801/.706. They are small differences: do not expect the methods to be told apart at a glance.
#
# ## Exercises
#
# **Exercise (comes later).** Merge three concepts. How does the number of constraints $n$ grow, and what happens when it reaches $D$?
#
# **Exercise (comes later).** Drop the features of the end token from $C$. The pictures get worse: why does the end token carry so much of the subject?
#
# **Exercise (comes later).** Train in turn with Custom Diffusion: learn Tilly while Mochi's concept is applied. Which subject suffers? Compare with the bar of DreamBooth in turn.
