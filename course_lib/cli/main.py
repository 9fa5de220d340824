"""Train a model on your own subject from a few pictures, save the result in a small file, and draw with it.

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

# torch and the library take seconds to import, so functions import them and --help stays quick.


def function_of(module, name):
    """The function of a command, imported when it is called."""

    def call(args):
        gc.disable()  # imported modules stay, so there is nothing to collect
        function = getattr(importlib.import_module(f"course_lib.cli.{module}"), name)
        gc.freeze()
        gc.enable()
        return function(args)

    return call


# ---- the options ----

TRAIN = """\
Four methods, from the smallest file to the largest (sizes with Stable Diffusion 1.5):

  textual-inversion: trains a new word (placeholder token) only. 3 kB, the least likeness. Notebook 11.
    python -m course_lib.personalize train --method textual-inversion --images data/subjects/mochi \\
        --class-noun cat --token "<mochi>" --out mochi_ti.safetensors

  lora: adds low-rank matrices to the attention layers and trains them. 3 MB. Notebook 12.
    python -m course_lib.personalize train --method lora --images data/subjects/mochi \\
        --class-noun cat --out mochi_lora.safetensors

  custom-diffusion: trains a new word, and the keys and values of cross-attention. 77 MB. Notebook 13. Several subjects
  can be trained together, or merged later (notebook 14).
    python -m course_lib.personalize train --method custom-diffusion --images data/subjects/mochi \\
        --class-noun cat --regularisation 100 --out mochi_cd.safetensors
    python -m course_lib.personalize train --method custom-diffusion --out both.safetensors \\
        --images data/subjects/mochi --token "<v1>" --class-noun cat \\
        --images data/subjects/tilly --token "<v2>" --class-noun teapot

  dreambooth: trains the whole UNet. 3.4 GB, the most likeness. Notebook 12. Class images, which the model draws itself
  (--prior, prior preservation), keep "a cat" from becoming your cat.
    python -m course_lib.personalize train --method dreambooth --images data/subjects/mochi \\
        --class-noun cat --prior 100 --out mochi_db.safetensors

For your own photos use --base sd15, since the toybox model was trained on drawings only. Put 3 to 10 into one folder,
the subject in the middle, with different places and light. PNG, JPEG, WebP, BMP, TIFF, GIF and AVIF are read, and HEIC
after `pip install pillow-heif`. Captions: 1.txt, 1.png.txt or 1.caption beside 1.png, or metadata.jsonl.
To resume a training after Ctrl-C or a power cut, give the same command again.
"""
MAIN = """\
Train, draw, and make the file smaller:
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

Both need the same model, and both custom-diffusion with a --token each, or both lora; changes of lora are added.
"""
COMPRESS = """\
  python -m course_lib.personalize compress --concept mochi.safetensors --keep 0.6 --out small.safetensors
"""
EXPORT = """\
  python -m course_lib.personalize export --concept mochi.safetensors --out mochi_diffusers
  python -m course_lib.personalize export --concept mochi_lora.safetensors --format kohya --out for_a1111
"""


def options():
    """The parser: a sub-command for each function of train.py and concepts.py."""
    parser = command(argparse.ArgumentParser, "python -m course_lib.personalize", __doc__.split("\n")[0], MAIN)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def sub(name, module, what, example=""):
        subparser = command(commands.add_parser, name, what, example, help=what, usage=f"{parser.prog} {name} OPTIONS")
        subparser.set_defaults(run=function_of(module, name))
        return subparser.add_argument

    train_options(sub("train", "train", "learn a subject from a few pictures", TRAIN))
    sample_options(sub("sample", "concepts", "draw pictures with a concept, or with the model alone", SAMPLE))
    add = sub("merge", "concepts", "make one concept of several (notebook 14)", MERGE)
    common(add, out="FILE", action="append")
    add("--captions", type=Path, metavar="FILE", help="200 to 1000 ordinary sentences, one a line, whose meaning "
        "merging preserves; default with toybox: 500 of its captions")  # fmt: skip
    add = sub("compress", "concepts", "make a concept of custom-diffusion smaller (notebook 13)", COMPRESS)
    common(add, out="FILE")
    add("--keep", type=float, default=0.6, help="share that stays: at 0.6 the loss is barely visible (default 0.6)")
    add("--half", action="store_true", help="save in float16, which halves the file again")
    add = sub("info", "concepts", "show what a concept file holds, ours or another tool's")
    common(add)
    add("--all", action="store_true", help="list all tensors")
    add = sub("export", "concepts", "write a concept for other tools (notebook 14)", EXPORT)
    common(add, out="FOLDER")
    add("--format", choices=["diffusers", "kohya", "peft"], default="diffusers", help="tool whose files are written "
        "(default diffusers); kohya and peft are for lora; A1111 and ComfyUI read kohya's file")  # fmt: skip
    return parser


def command(make, name, what, example, **more):
    return make(name, description=what, epilog=example, formatter_class=argparse.RawDescriptionHelpFormatter, **more)


def seed(text):
    """A whole number that every random number generator accepts as its seed."""
    if not text.isdecimal() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"expected a whole number from 0 to 2^63 - 1, got {text}")
    return int(text)


def common(add, out=None, required=True, **concept):
    add("--concept", metavar="FILE", type=Path, required=required, help="file of a trained concept", **concept)
    add("--base", help="toybox, sd15, a folder in diffusers' format or a hub id; default: the one that the file names")
    add("--device", help="cpu, cuda or mps; default: the fastest that is found")
    if out:
        add("--out", type=Path, required=True, metavar=out, help="where to write")
        add("--overwrite", action="store_true", help="write even if --out exists")


def sample_options(add):
    common(add, out="PICTURE", required=False, action="append")
    add("--prompt", action="append", help='what to draw; {} stands for the new words, in the order of --concept; '
        'default "a photo of a {}"')  # fmt: skip
    add("--count", type=int, default=4, help="pictures of each prompt (default 4); --out x.png (or .jpg, .webp) writes "
        "one picture with a row for each prompt, --out x writes a folder of labelled files")  # fmt: skip
    add("--w", type=float, help="guidance_scale: 1 is none, more follows the prompt (default 7.5; with toybox 5)")
    add("--steps", type=int, default=25, help="num_inference_steps: 25 is good, 50 hardly better (default 25)")
    add("--seed", type=seed, default=0, help="the same seed means the same pictures (default 0)")
    add("--low-memory", action="store_true", help="use less memory and more time")


def train_options(add):
    add("--method", required=True, choices=["textual-inversion", "dreambooth", "lora", "custom-diffusion"],
        metavar="METHOD", help="textual-inversion, dreambooth, lora or custom-diffusion, see below")  # fmt: skip
    add("--images", action="append", required=True, metavar="DIR", help="folder of 3 to 10 pictures; 1.txt beside "
        "1.png may hold its caption, with {} for the new words; with custom-diffusion repeat it for each subject, "
        "with --token and --class-noun")  # fmt: skip
    add("--class-noun", action="append", required=True, metavar="NOUN", help="its class in one word: cat, chair")
    add("--token", action="append", metavar="WORD", help='placeholder token, the new word, in lower case: "<mochi>"; '
        'default "<v>"; with dreambooth and lora an existing rare word, default sks')  # fmt: skip
    add("--out", type=Path, required=True, metavar="FILE", help="file of the trained concept; ends in .safetensors")
    add("--base", default="toybox", help="model to start from: toybox (in this repository, runs on a laptop; default), "
        "sd15 (Stable Diffusion 1.5, best on a GPU), a folder in diffusers' format, or a hub id")  # fmt: skip
    add("--steps", type=int, metavar="N", help="too few: poor likeness; too many: overfitting; default: 200 to 300 "
        "with toybox, else 250 to 3000")  # fmt: skip
    add("--lr", type=float, metavar="X", help="learning rate; halve it if pictures break, double it if nothing is "
        "learnt; default per method: 2e-2 to 2e-4 with toybox, else 2e-3 to 5e-6")  # fmt: skip
    add("--batch-size", type=int, metavar="N", help="pictures a step, more is steadier and slower; default: 1 to 8")
    add("--rank", type=int, metavar="N", help="lora: rank of its matrices, 4 to 16 (default: 16 for toybox, else 4)")
    add("--vectors", type=int, metavar="N", help="textual-inversion: num_vectors, rows for the word; 1 follows "
        "prompts best, 4 gives more likeness (default 1)")  # fmt: skip
    add("--prior", type=int, metavar="N", help="dreambooth, lora: class images that the model draws first and is then "
        "trained on too (prior preservation); 0 switches off (default 100 for dreambooth, 0 for lora)")  # fmt: skip
    add("--prior-weight", type=float, metavar="X", help="prior_loss_weight of these (default 1, the paper's)")
    add("--regularisation", action="append", metavar="DIR|N", help="custom-diffusion: a folder of captioned pictures "
        "of the class, or with toybox the number to draw from its world; 0 switches off (default 100 with toybox, "
        "else 0)")  # fmt: skip
    add("--similarity", type=float, metavar="X", help="custom-diffusion: least cosine of the class noun and a "
        "word of a caption; -1 accepts all captions (default 0.85)")  # fmt: skip
    add("--sample-every", type=int, metavar="N", help="draw every N steps, into FILE.stepN.png, from the same noises: "
        "shows when the likeness comes, and when overfitting begins")  # fmt: skip
    add("--grid", type=int, default=4, metavar="N", help="pictures of each prompt to draw at the end, into FILE.png; "
        "0 draws none (default 4)")  # fmt: skip
    add("--prompts", nargs="+", metavar="PROMPT", help='prompts of these pictures (default "a photo of a {}", and '
        "at the end four scenes)")  # fmt: skip
    add("--save-every", type=int, default=100, metavar="N", help="steps between two saved states; a resumed training "
        "goes on from the last one (default 100)")  # fmt: skip
    add("--fresh", action="store_true", help="begin anew, and drop an earlier training with this --out")
    add("--device", help="cpu, cuda or mps; default: the fastest that is found")
    add("--seed", type=seed, default=0, metavar="N", help="the same seed means the same result (default 0)")
    add("--low-memory", action="store_true", help="use less memory and more time; switched on where needed")


def main(argv=None):
    """Run one command; returns its exit code: 0, 2 after an error, 130 after Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # for a console without Korean letters, for example
    args = options().parse_args(argv)
    with warnings.catch_warnings():
        warnings.showwarning = note
        try:
            check_device(args.device)
            return args.run(args) or 0
        except KeyboardInterrupt:
            print("\nStopped at once; files that were saved before are whole.", file=sys.stderr)
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
                         "the fastest is used") from error  # fmt: skip


def sentence(error):
    """The error in one line, in the words of this command."""
    words = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "memory" in words):
        return ("memory: expected more than this device has left; try --low-memory, and to train --batch-size 1 or "
                "--method lora; files that were saved before are whole")  # fmt: skip
    return words if len(words) <= 700 else f"{words[:450]} ... {words[-200:]}"  # some libraries quote whole lists


def note(message, category, *_):
    """Print the library's warnings as notes; warnings of other packages are for programmers and are dropped."""
    if category is UserWarning:
        tqdm.write(f"note: {message}", file=sys.stderr)
