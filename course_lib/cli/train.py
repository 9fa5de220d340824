"""The command `python -m course_lib.personalize train`: check, plan, train, save; it can be resumed.

Used by: notebooks/11_textual_inversion.ipynb, section "Your own pictures".

`args` holds the options of the command, see main.py.
"""

import contextlib
import glob
import hashlib
import math
import os
import shlex
import signal
import sys
import tempfile
import threading
import time
import warnings
from dataclasses import replace
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from tqdm import tqdm

from course_lib.cli.drawing import draw, fill_placeholder, human_size, note_unknown_words, write_grid
from course_lib.cli.methods import METHODS
from course_lib.data.pictures import captions_beside, image_sources, is_marked, open_image
from course_lib.environment import cache_dir, quick_dtype
from course_lib.latent.stable_diffusion import load
from course_lib.latent.text import check_noun, token_trouble, words
from course_lib.personalization import custom_diffusion, dreambooth, regularisation
from course_lib.personalization.concept import save_concept
from course_lib.personalization.finetune import finetune
from course_lib.personalization.memory import device_memory, memory_plan
from course_lib.personalization.state import read_state
from course_lib.toybox.world import NOUNS

SCENES = ("in the snow", "on the beach", "in the forest", "at night")
ONLY_SOME = frozenset.union(*(method.options for method in METHODS.values()))


def train(args):
    """Check the options, train, save; an interrupted training goes on from FILE.state.pt."""
    check_train(args)
    with only_one(args.out):
        return train_alone(args)


def train_alone(args):
    """Train, while no other training has the same --out."""
    begun, state = time.perf_counter(), args.out.with_name(args.out.name + ".state.pt")
    found, captions = pictures_and_captions(args)
    check_pictures_to_write(args)
    saved = start_state(args, state)
    step, before = saved.get("step", 0), saved.get("settings", {})
    make_room(args.out)
    sd = load_model(args, saved)
    note_unknown_words(sd, [*captions, *(args.prompts or [])], args.token)
    print(f"{found} pictures, {len(captions) or 'no'} captions beside them; the model is {sd.name} on {sd.device}")
    if sd.defaults.toybox_world:
        print("this model was trained on drawings only, such as data/subjects; for photos use --base sd15")
    with make_recipe(args, sd) as recipe:
        count = sum(param.numel() for param in recipe.params.values())
        print(f"{args.method}: {count:,} numbers are trained, in {recipe.settings.steps} steps")
        settings, plan = memory_plan(sd, recipe, device_memory(sd.device), args.low_memory)
        print(plan)
        # Memory options do not change results; a resumed run keeps its own.
        kept = {name: before[name] for name in ("gradient_checkpointing", "accumulate", "optimizer") if name in before}
        recipe.settings = replace(settings, **kept)
        if step and step >= settings.steps and args.out.exists():
            raise ValueError(f"steps: expected more than the {step} of {state}, got {settings.steps}; raise --steps to "
                             "go on, or add --fresh to begin anew")  # fmt: skip
        if step:
            print(f"goes on from step {step}, saved in {state}")
        stopped = loop(args, sd, recipe, state, step)
        if stopped:
            held = f"{state} holds step {stopped}" if state.is_file() else "no state could be saved"
            print(f"\nStopped after step {stopped}; {held}: the same command goes on from there.", file=sys.stderr)
            return 130
        save_or_rescue(args.out, recipe, state)
        if args.grid:
            picture = args.out.with_suffix(".png")
            prompts = new_scenes(args, recipe)
            write_grid(picture, draw(sd, prompts, args.grid, w=None, steps=25, seed=args.seed), args.grid)
            print(f"wrote {picture}; its rows: {'; '.join(prompts)}")
    print_end(args, state, time.perf_counter() - begun)
    return 0


def load_model(args, saved):
    """The base model, after a check that its tokenizer has the words; a resumed training keeps its precision."""
    sd = load(args.base, args.device, low_memory=args.low_memory or None)
    if saved:
        sd.to(dtype=getattr(torch, saved["dtype"]))
    elif sd.defaults.half_training:
        sd.to(dtype=quick_dtype(sd.device))
    check_words(args, sd)
    return sd


def check_train(args):
    """Raise a ValueError unless each folder has one token and one noun, and no option is of another method."""
    method, several = method_of(args), args.method == "custom-diffusion" and len(args.images) > 1
    for name in sorted(ONLY_SOME - method.options):
        if getattr(args, name) is not None:
            fits = " and ".join(key.replace("_", "-") for key, one in METHODS.items() if name in one.options)
            raise ValueError(f"{name}: expected with {fits} only, got it with {args.method}; leave it out")
    if len(args.images) > 1 and not several:
        raise ValueError(f"images: expected one folder with {args.method}, got {len(args.images)}; only "
                         "custom-diffusion trains several together")  # fmt: skip
    if args.token is None:
        args.token = [f"<v{k}>" for k in range(1, len(args.images) + 1)] if several else [method.token]
    for name in ("token", "class_noun"):
        if len(getattr(args, name)) != len(args.images):
            raise ValueError(f"{name}: expected one for each of {len(args.images)} folders, got {getattr(args, name)}")
    for name, least in (("prior", 0), ("sample_every", 0), ("save_every", 1), ("grid", 0)):
        if (getattr(args, name) or least) < least:
            raise ValueError(f"{name}: expected a whole number of at least {least}, got {getattr(args, name)}")
    for name in ("prior_weight", "similarity"):
        if not math.isfinite(getattr(args, name) or 0):
            raise ValueError(f"{name}: expected a finite number, got {getattr(args, name)}")
    if args.out.suffix != ".safetensors":
        raise ValueError(f"out: expected a name that ends in .safetensors, got {args.out}")


@contextlib.contextmanager
def only_one(out):
    """Raise a ValueError while another training on this machine has the same --out; a killed one leaves no lock."""
    lock = cache_dir() / "locks" / hashlib.sha256(str(out.expanduser().resolve()).encode()).hexdigest()[:16]
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        held = FileLock(lock, timeout=0)
        held.acquire()
    except Timeout:
        raise ValueError(f"out: expected a name of its own for each training, but another one is writing {out}; wait "
                         "for it, or choose another name") from None  # fmt: skip
    except OSError as error:
        warnings.warn(f"{lock.parent} cannot be written ({error}), so a second training with this --out would not be "
                      "noticed; COURSE_CACHE names another folder", stacklevel=2)  # fmt: skip
        held = None
    try:
        yield
    finally:
        if held:
            held.release()


def pictures_and_captions(args):
    """(number of pictures, their captions); opens one at a time, and raises ValueError if one cannot be read."""
    found, captions = 0, []
    for folder in args.images:
        for source in image_sources(folder):
            open_image(source)
            found += 1
        captions += captions_beside(folder) or []
    return found, captions


def check_pictures_to_write(args):
    """Raise a ValueError if a sample grid would overwrite a picture that no training drew."""
    paths = [args.out.with_suffix(".png")] if args.grid else []
    if args.sample_every:
        paths += args.out.parent.glob(f"{glob.escape(args.out.stem)}.step*.png")
    foreign = [path for path in paths if path.exists() and not is_marked(path)]
    if foreign:
        raise ValueError(f"out: expected a name whose sample pictures overwrite nothing, but {foreign[0]} exists; "
                         "choose another --out, or move that picture")  # fmt: skip


def make_room(out):
    """Make the folder of --out before the training; raises ValueError if nothing can be written there."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        writable = os.access(out.parent, os.W_OK)
    except OSError:
        writable = False
    if not writable:
        raise ValueError(f"out: expected a file in a folder that can be written, but {out.parent} is not one; "
                         "choose another")  # fmt: skip


def check_words(args, sd):
    """Raise a ValueError for a token or a class noun that the tokenizer cannot use."""
    free = args.method in ("dreambooth", "lora")  # their word may exist already, and be several sub-words
    for token in args.token:
        if free and not words(sd.tokenizer, token):
            raise ValueError(f"token: expected a rare word, such as sks, got {token!r}")
        if not free and (trouble := token_trouble(sd.tokenizer, token)):
            raise ValueError(f"token: {trouble}")
        word = token.rstrip("0123456789").removesuffix("_")
        if token != word and word in args.token:
            raise ValueError(f"token: expected words that differ in more than a number, since {token} is also the name "
                             f"of a row of {word}; choose another")  # fmt: skip
    for noun in args.class_noun:
        found = words(sd.tokenizer, noun)
        if not found:
            raise ValueError(f"class_noun: expected a word that the model knows, such as 'cat', got {noun!r}")
        cut = [word for word, positions in found if len(positions) > 1]
        if cut and sd.defaults.toybox_world:  # its tokenizer has every word of its training captions
            raise ValueError(f"class_noun: expected a word that the model knows, but {cut[0]!r} is not in its "
                             f"vocabulary; use the nearest of {', '.join(NOUNS)}")  # fmt: skip
        if cut:
            warnings.warn(f"class_noun: the tokenizer cuts {cut[0]!r} into pieces; if the model draws something else "
                          "for it, use a more common word", stacklevel=2)  # fmt: skip


def start_state(args, state):
    """The saved state of a training that goes on, {} for a new one."""
    if args.fresh:
        state.unlink(missing_ok=True)
    if not state.is_file():
        if args.out.exists() and not args.fresh:
            raise ValueError(f"out: expected a new file, but {args.out} exists; choose another name, or add --fresh to "
                             "train it anew")  # fmt: skip
        return {}
    try:
        saved = read_state(state, mmap=True)
        return {key: saved[key] for key in ("step", "settings", "dtype")}  # the file itself is not held open
    except ValueError as error:
        raise ValueError(f"{error} (--fresh begins anew)") from error


def method_of(args):
    """The row of the table that --method names."""
    return METHODS[args.method.replace("-", "_")]


def make_recipe(args, sd):
    """The recipe of --method; options that were not given keep the method's defaults."""
    method = method_of(args)
    several = len(args.images) > 1
    settings = custom_diffusion.joint_settings(sd, len(args.images)) if several else method.settings_for(sd)
    given = {name: getattr(args, name) for name in ("steps", "lr", "batch_size", "seed")}
    settings = replace(settings, **{name: value for name, value in given.items() if value is not None})
    options = {name: getattr(args, name) for name in ("vectors", "rank", "prior_weight")}
    options = {name: value for name, value in options.items() if value is not None}
    if "regularisation" in method.options:
        options["regularisation"] = class_pictures(args, sd)
    if several:
        zipped = zip(args.images, args.token, args.class_noun, strict=True)
        subjects = [custom_diffusion.SubjectPictures(*subject) for subject in zipped]
        return custom_diffusion.joint_recipe(sd, subjects, settings=settings, **options)
    if "prior" in method.options:
        options["prior"] = prior(args, sd)
    images, token, noun = args.images[0], args.token[0], args.class_noun[0]
    return method.recipe(sd, images, token=token, noun=noun, settings=settings, **options)


def prior(args, sd):
    """The model's own pictures of the class that --prior asks for, or None."""
    noun, usual = args.class_noun[0], 100 if args.method == "dreambooth" else 0
    count = usual if args.prior is None else args.prior
    check_noun(sd.tokenizer, noun)
    if not count:
        return None
    print(f"the model draws {count} pictures of the class {noun!r}, once; later trainings use them again")
    return dreambooth.prior_examples(sd, noun, count)


def class_pictures(args, sd):
    """Custom Diffusion's --regularisation pictures of each class, from the Toybox world or from folders."""
    given = args.regularisation or (["100"] if sd.defaults.toybox_world else ["0"])
    nouns, options = list(dict.fromkeys(args.class_noun)), {}
    if args.similarity is not None:
        options["threshold"] = args.similarity
    if len(given) == 1 and given[0].isdigit():
        if given == ["0"]:
            return []
        if not sd.defaults.toybox_world:
            raise ValueError(f"regularisation: expected a folder of captioned pictures, or 0, with {sd.name}, got "
                             f"{given[0]}; a number is for --base toybox")  # fmt: skip
        examples = [_found(regularisation.toybox_regularisation, sd, noun, int(given[0]), **options) for noun in nouns]
    else:
        folders = given * len(nouns) if len(given) == 1 else given
        if len(folders) != len(nouns):
            raise ValueError(f"regularisation: expected one folder, or one for each of {nouns}, got {len(folders)}")
        examples = []
        for folder, noun in zip(folders, nouns, strict=True):
            examples.append(_found(regularisation.folder_regularisation, sd, folder, noun, **options))
    for noun, one in zip(nouns, examples, strict=True):
        print(f"{len(one.prompts)} pictures are added for the class {noun!r}, such as {one.prompts[0][0]!r}")
    return examples


def _found(search, *args, **options):
    """The result of a search; its error message gets the names of the command's options."""
    try:
        return search(*args, **options)
    except ValueError as error:
        if not str(error).startswith("threshold:"):
            raise
        message = str(error).replace("threshold:", "similarity:", 1)
        raise ValueError(f"{message} (--regularisation 0)") from error


def loop(args, sd, recipe, state, done):
    """Train with a progress bar; returns the step at which Ctrl-C stopped it, or None."""
    steps, losses = recipe.settings.steps, []
    training = finetune(sd, recipe, checkpoint=state, save_every=args.save_every)
    bar = tqdm(total=steps, initial=min(done, steps), desc=args.method, unit="step")
    with asked_to_stop() as asked, bar, contextlib.closing(training):
        try:
            for step, loss in training:
                bar.update()
                losses.append(loss)
                if step % 10 == 0 or step == steps:  # reading a loss waits for the device
                    bar.set_postfix(loss=f"{torch.stack(losses).mean():.4f}")
                    losses.clear()
                if args.sample_every and (step % args.sample_every == 0 or step == steps):
                    path = args.out.with_name(f"{args.out.stem}.step{step:05d}.png")
                    prompts = fill_placeholder(args.prompts or ["a photo of a {}"], recipe)
                    write_grid(path, draw(sd, prompts, 4, w=None, steps=25, seed=args.seed), 4)
                if asked.is_set() and step < steps:
                    return step
        except FloatingPointError as error:
            raise FloatingPointError(f"lr: expected one that keeps the loss finite, got {recipe.settings.lr}: {error} "
                                     "(--fresh --lr X)") from error  # fmt: skip
        except ValueError as error:
            raise ValueError(f"{error} (--fresh begins anew)") from error
    return None


@contextlib.contextmanager
def asked_to_stop():
    """An event that the first Ctrl-C sets; a second one is an ordinary KeyboardInterrupt."""
    asked = threading.Event()

    def note(*_):
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()
        print("\nstops after this step and saves; Ctrl-C again stops at once", file=sys.stderr)

    if threading.current_thread() is not threading.main_thread():  # only the main thread gets signals
        yield asked
        return
    before = signal.signal(signal.SIGINT, note)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)


def save_or_rescue(path, recipe, state):
    """Save the concept; if that is not possible, save it in the folder for temporary files."""
    try:
        save_concept(path, recipe)
    except OSError as error:
        what = f"out: {path} cannot be written ({error.__cause__ or error})"
        try:
            rescue = Path(tempfile.mkdtemp(prefix="concept-")) / path.name
            save_concept(rescue, recipe)
        except OSError:
            held = f"but {state} holds the training" if state.is_file() else "and no state could be saved"
            raise OSError(f"{what}, nor can the folder for temporary files, {held}; make room, then give the same "
                          "command again") from error  # fmt: skip
        raise OSError(f"{what}; the concept is in {rescue}") from error


def print_end(args, state, seconds):
    """Print what was written, how to go on, and how to draw with it."""
    print(f"wrote {args.out} ({human_size(args.out)}) in {seconds:.0f} s")
    if state.is_file():
        print(f"{state} ({human_size(state)}) lets you go on with more --steps; delete it when the concept is good")
    command = ["sample", "--concept", str(args.out), "--base", args.base, "--prompt", "a photo of a {} on the beach"]
    print(
        "next:  python -m course_lib.personalize", shlex.join([*command, "--out", f"{args.out.stem}_on_the_beach.png"])
    )


def new_scenes(args, recipe):
    """The prompts of the grid at the end: those that were given, or the subjects in turn in four scenes."""
    if args.prompts:
        return fill_placeholder(args.prompts, recipe)
    method = METHODS[recipe.method]
    names = [method.name(token, noun) for token, noun in zip(args.token, args.class_noun, strict=True)]
    return [f"a photo of a {names[k % len(names)]} {scene}" for k, scene in enumerate(SCENES)]
