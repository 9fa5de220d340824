"""Teaches a model your own subject from a few pictures, draws with it, and keeps it in a small file.

python -m course_lib.personalize train --method textual-inversion --images data/subjects/mochi --class-noun cat \\
    --out mochi.safetensors
python -m course_lib.personalize sample --concept mochi.safetensors --prompt "a photo of a {} on the moon" \\
    --out moon.png

The lessons: notebooks 11 (Textual Inversion), 12 (DreamBooth, LoRA), 13 (Custom Diffusion), 14 (several concepts).
"""

import argparse
import gc
import importlib
import sys
import warnings
from pathlib import Path

from tqdm import tqdm

# torch and the library take seconds to import: functions do it, so that --help is quick.


def function_of(module, name):
    """The function of a command, imported when it is called."""

    def call(args):
        gc.disable()  # imports keep what they make: nothing to collect
        function = getattr(importlib.import_module(f"course_lib.cli.{module}"), name)
        gc.freeze()
        gc.enable()
        return function(args)

    return call


# ---- the options ----

TRAIN = """\
Four methods, from the smallest file to the largest (sizes with Stable Diffusion 1.5):

  textual-inversion: a new word is learnt, nothing else. 3 kB, the least likeness. Notebook 11.
    python -m course_lib.personalize train --method textual-inversion --images data/subjects/mochi \\
        --class-noun cat --token "<mochi>" --out mochi_ti.safetensors

  lora: thin matrices are added to the attention layers. 3 MB. Notebook 12.
    python -m course_lib.personalize train --method lora --rank 4 --images data/subjects/mochi \\
        --class-noun cat --out mochi_lora.safetensors

  custom-diffusion: a word, and the keys and values that text goes through. 77 MB. Notebook 13. Several subjects can be
  learnt together, or merged later (notebook 14).
    python -m course_lib.personalize train --method custom-diffusion --images data/subjects/mochi \\
        --class-noun cat --regularisation 100 --out mochi_cd.safetensors
    python -m course_lib.personalize train --method custom-diffusion --out both.safetensors \\
        --images data/subjects/mochi --token "<v1>" --class-noun cat \\
        --images data/subjects/tilly --token "<v2>" --class-noun teapot

  dreambooth: all of the UNet. 3.4 GB, the most likeness. Notebook 12. The model's own pictures of the class (--prior)
  keep "a cat" from becoming your cat.
    python -m course_lib.personalize train --method dreambooth --images data/subjects/mochi \\
        --class-noun cat --prior 100 --out mochi_db.safetensors

With your own photos: --base sd15, as the toybox model knows drawings only; 3 to 10 in one folder, the subject in the
middle, at different places and in different light. PNG, JPEG, WebP, BMP, TIFF, GIF and AVIF are read, and HEIC of
phones after `pip install pillow-heif`. Captions: 1.txt, 1.png.txt or 1.caption beside 1.png, or metadata.jsonl.
A training that was interrupted, by Ctrl-C or by a power cut, goes on if the same command is given again.
"""
MAIN = """\
Teach, draw, and then what you like:
  python -m course_lib.personalize train --method custom-diffusion --images data/subjects/mochi --class-noun cat \\
      --out mochi.safetensors
  python -m course_lib.personalize sample --concept mochi.safetensors --prompt "a photo of a {} on the moon" \\
      --out moon.png
  python -m course_lib.personalize compress --concept mochi.safetensors --keep 0.6 --out small.safetensors

`train --help` has an example of each method. The lessons are notebooks/11_textual_inversion.ipynb, 12_dreambooth.ipynb
(with LoRA), 13_custom_diffusion.ipynb and 14_multiple_concepts.ipynb.
"""


SAMPLE = """\
  python -m course_lib.personalize sample --concept mochi.safetensors --prompt "a photo of a {} on the moon" \\
      --prompt "a watercolour of a {}" --count 4 --out mochi.png
"""
MERGE = """\
  python -m course_lib.personalize merge --concept cat.safetensors --concept chair.safetensors --out both.safetensors

Both have to be of the same model, and of custom-diffusion with a --token each, or of lora, whose changes add up.
"""
COMPRESS = """\
  python -m course_lib.personalize compress --concept mochi.safetensors --keep 0.6 --out small.safetensors
"""
EXPORT = """\
  python -m course_lib.personalize export --concept mochi.safetensors --format diffusers --out mochi_diffusers
"""


def options():
    """The parser: a sub-command for each function of train.py and concepts.py."""
    parser = command(argparse.ArgumentParser, "python -m course_lib.personalize", __doc__.split("\n")[0], MAIN)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def sub(name, module, what, example=""):
        made = command(commands.add_parser, name, what, example, help=what, usage=f"{parser.prog} {name} OPTIONS")
        made.set_defaults(run=function_of(module, name))
        return made.add_argument

    train_options(sub("train", "train", "learn a subject from a few pictures", TRAIN))
    sample_options(sub("sample", "concepts", "draw pictures with a concept, or with the model alone", SAMPLE))
    add = sub("merge", "concepts", "make one concept of several (notebook 14)", MERGE)
    common(add, out="FILE", action="append")
    add("--captions", type=Path, metavar="FILE", help="200 to 1000 ordinary sentences, one a line, that shall go on to "
        "mean what they did; default with toybox: 500 of its captions")  # fmt: skip
    add = sub("compress", "concepts", "make a concept of custom-diffusion smaller (notebook 13)", COMPRESS)
    common(add, out="FILE")
    add("--keep", type=float, default=0.6, help="share of the change that stays: 0.6 is hardly seen (default 0.6)")
    add("--half", action="store_true", help="in float16: half the bytes again")
    add = sub("info", "concepts", "say what a concept file holds, this course's or another tool's")
    common(add)
    add("--all", action="store_true", help="list all tensors")
    add = sub("export", "concepts", "write a concept for other tools (notebook 14)", EXPORT)
    common(add, out="FOLDER")
    add("--format", choices=["diffusers"], default="diffusers", help="whose files (default diffusers)")
    return parser


def command(make, name, what, example, **more):
    return make(name, description=what, epilog=example, formatter_class=argparse.RawDescriptionHelpFormatter, **more)


def seed(text):
    """A whole number that every generator of random numbers takes."""
    if not text.isdecimal() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"expected a whole number from 0 to 2^63 - 1, got {text}")
    return int(text)


def common(add, out=None, required=True, **concept):
    add("--concept", metavar="FILE", type=Path, required=required, help="what was trained", **concept)
    add("--base", help="toybox, sd15, a folder in diffusers' format or a hub id; default: what the file says")
    add("--device", help="cpu, cuda or mps; default: the fastest here")
    if out:
        add("--out", type=Path, required=True, metavar=out, help="what is written")
        add("--overwrite", action="store_true", help="also if there is something of this name already")


def sample_options(add):
    common(add, out="PICTURE", required=False, action="append")
    add("--prompt", action="append", help='what to draw; {} stands for the new words, in the order of --concept; '
        'default "a photo of a {}"')  # fmt: skip
    add("--count", type=int, default=4, help="pictures of each prompt (default 4); --out x.png (or .jpg, .webp) is one "
        "picture with a row for each prompt, --out x a folder with labelled files")  # fmt: skip
    add("--w", type=float, help="guidance: 1 is none, more obeys the prompt (default 7.5; with toybox 5)")
    add("--steps", type=int, default=25, help="of the sampler; 25 is good, 50 hardly better (default 25)")
    add("--seed", type=seed, default=0, help="the same seed means the same pictures (default 0)")
    add("--low-memory", action="store_true", help="slower, with less memory")


def train_options(add):
    add("--method", required=True, choices=["textual-inversion", "dreambooth", "lora", "custom-diffusion"],
        metavar="METHOD", help="textual-inversion, dreambooth, lora or custom-diffusion, see below")  # fmt: skip
    add("--images", action="append", required=True, metavar="DIR", help="folder of 3 to 10 pictures; 1.txt beside "
        "1.png may describe it, with {} for the new words; with custom-diffusion again for each subject, with "
        "--token and --class-noun")  # fmt: skip
    add("--class-noun", action="append", required=True, metavar="NOUN", help="what it is, in one word: cat, chair")
    add("--token", action="append", metavar="WORD", help='its new word, lower case in brackets: "<mochi>"; default '
        '"<v>"; ' "with dreambooth and lora a rare word that exists, default sks")  # fmt: skip
    add("--out", type=Path, required=True, metavar="FILE", help="what was learnt; ends in .safetensors")
    add("--base", default="toybox", help="model to start from: toybox (in this repository, runs on a laptop; default), "
        "sd15 (Stable Diffusion 1.5, wants a GPU), a folder in diffusers' format, or a hub id")  # fmt: skip
    add("--steps", type=int, metavar="N", help="too few: not alike; too many: only the pictures it saw; default: 200 "
        "to 300 with toybox, 250 to 3000 else")  # fmt: skip
    add("--lr", type=float, metavar="X", help="learning rate; half of it if pictures break, twice if nothing is "
        "learnt; default per method: 1e-2 to 1e-4 with toybox, 2e-3 to 5e-6 else")  # fmt: skip
    add("--batch-size", type=int, metavar="N", help="pictures a step, more is calmer and slower; default: 1 to 8")
    add("--rank", type=int, metavar="N", help="lora: how thick its matrices are, 4 to 16 (default 4)")
    add("--vectors", type=int, metavar="N", help="textual-inversion: rows for the word; 1 obeys prompts best, 4 is "
        "more alike (default 1)")  # fmt: skip
    add("--prior", type=int, metavar="N", help="dreambooth, lora: pictures of the class that the model draws first and "
        "learns again, so that the class stays; 0 switches off (default 100 for dreambooth, 0 for lora)")  # fmt: skip
    add("--prior-weight", type=float, metavar="X", help="how much they count (default 1, the paper's)")
    add("--regularisation", action="append", metavar="DIR|N", help="custom-diffusion: a folder of captioned pictures "
        "of the class, or with toybox how many to find in its world; 0 switches off (default 100 with toybox, "
        "else 0)")  # fmt: skip
    add("--similarity", type=float, metavar="X", help="custom-diffusion: how near the class noun a word of a "
        "caption has to be; -1 takes all (default 0.85)")  # fmt: skip
    add("--sample-every", type=int, metavar="N", help="draw with it every N steps, into FILE.stepN.png, from the same "
        "noises: see it come, and see it become too much")  # fmt: skip
    add("--grid", type=int, default=4, metavar="N", help="pictures of each prompt that are drawn at the end, into "
        "FILE.png; 0 draws none (default 4)")  # fmt: skip
    add("--prompts", nargs="+", metavar="PROMPT", help='for all these pictures (default "a photo of a {}", and at the '
        "end four scenes)")  # fmt: skip
    add("--save-every", type=int, default=100, metavar="N", help="steps between two saved states; after a power cut it "
        "goes on from the last (default 100)")  # fmt: skip
    add("--fresh", action="store_true", help="begin anew, and forget an earlier training with this --out")
    add("--device", help="cpu, cuda or mps; default: the fastest here")
    add("--seed", type=seed, default=0, metavar="N", help="the same seed means the same result (default 0)")
    add("--low-memory", action="store_true", help="slower, with less memory; switched on by itself where it has to be")


def main(argv=None):
    """Run one command; returns its exit code: 0, 2 for what went wrong, 130 after Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # where a console has no Korean, say
    args = options().parse_args(argv)
    with warnings.catch_warnings():
        warnings.showwarning = note
        try:
            check_device(args.device)
            return args.run(args) or 0
        except KeyboardInterrupt:
            print("\nStopped at once; what was saved before is whole.", file=sys.stderr)
            return 130
        except (ValueError, OSError, RuntimeError, FloatingPointError, MemoryError) as error:
            print(f"error: {sentence(error)}", file=sys.stderr)
            return 2


def check_device(name):
    """Raise a ValueError for a device that is not here, or that this torch was built without."""
    if name is None:
        return
    import torch

    try:
        if torch.device(name).type not in ("cpu", "cuda", "mps"):
            raise RuntimeError("of another kind")
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device: expected cpu, or cuda or mps where torch finds one, got {name!r}; without --device "
                         "the fastest here is taken") from error  # fmt: skip


def sentence(error):
    """What went wrong, in one line and in the words of this command."""
    words = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "memory" in words):
        return ("memory: expected more than this device has left; try --low-memory, and to train --batch-size 1 or "
                "--method lora; what was saved before is whole")  # fmt: skip
    return words if len(words) <= 700 else f"{words[:450]} ... {words[-200:]}"  # some libraries quote whole lists


def note(message, category, *_):
    """A warning of the library is a sentence for the reader; those of others are for programmers."""
    if category is UserWarning:
        tqdm.write(f"note: {message}", file=sys.stderr)
