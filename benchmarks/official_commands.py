"""Where the scripts of diffusers are, and how they and the course are called, for benchmarks/official.py."""

import argparse
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from common import NOUN, SUBJECT

from course_lib.cli.methods import METHODS
from course_lib.environment import CHECKPOINTS, sha256

BATCH = 4
SAVED = "concept.safetensors"  # what the course's command writes
CLASS = {"with_prior_preservation": True, "class_prompt": f"a photo of a {NOUN}"}
INSTANCE = {"instance_prompt": f"a photo of a sks {NOUN}"}


@dataclass(frozen=True)
class Plan:
    """A method's script and the settings that both sides get.

    script: where diffusers keeps it, below examples/.  target: seconds that our default training may take.
    options: of the script alone; True is a flag.  class_pictures: the name of our option for their number, if any.
    """

    script: str
    steps: int
    lr: float
    target: int
    options: dict
    class_pictures: str | None = None


PLANS = {
    "textual_inversion": Plan("textual_inversion/textual_inversion.py", 200, 1e-2, 20,
                              {"placeholder_token": "<v>", "initializer_token": NOUN}),
    "lora": Plan("dreambooth/train_dreambooth_lora.py", 200, 1e-3, 25, INSTANCE | {"rank": 4}),
    "dreambooth": Plan("dreambooth/train_dreambooth.py", 200, 2e-4, 45, INSTANCE | CLASS, "prior"),
    "custom_diffusion": Plan("custom_diffusion/train_custom_diffusion.py", 300, 5e-4, 40,
                             CLASS | {"instance_prompt": f"a photo of a <v> {NOUN}", "modifier_token": "<v>",
                                      "initializer_token": NOUN, "no_safe_serialization": True}, "regularisation"),
}  # fmt: skip


def scripts_in(folder: Path | None) -> dict[str, Path]:
    """{method: its script}.  Raises SystemExit in one sentence if there is no folder, or a script is not in it."""
    names = ", ".join(Path(plan.script).name for plan in PLANS.values())
    wanted = ("--scripts: expected a clone of https://github.com/huggingface/diffusers, or a folder with these of its "
              f"examples: {names}")  # fmt: skip
    if folder is None:
        raise SystemExit(f"{wanted}; nothing is downloaded here, so clone it and give its folder")
    found = {}
    for method, plan in PLANS.items():
        places = (folder / Path(plan.script).name, folder / "examples" / plan.script)
        found[method] = next((path.resolve() for path in places if path.is_file()), None)
        if found[method] is None:
            raise SystemExit(f"{wanted}; {folder} has no {Path(plan.script).name}")
    return found


def version(script: Path) -> dict:
    """Which script this is: its checksum, and the commit that its head names, or the one of the clone around it."""
    named = re.search(r"commit ([0-9a-f]{7,40})", script.read_text(encoding="utf-8")[:2000])
    if named:
        commit = named[1]
    else:
        line = ["git", "-C", str(script.parent), "log", "-1", "--format=%H", "--", script.name]
        commit = subprocess.run(line, capture_output=True, text=True).stdout.strip()  # nothing outside a clone
    return dict(script=script.name, sha256=sha256(script), commit=commit or "unknown")


def words(options: dict) -> list[str]:
    """{"rank": 4, "hflip": True} -> ["--rank", "4", "--hflip"]."""
    pairs = [(f"--{key}",) if value is True else (f"--{key}", str(value)) for key, value in options.items()]
    return [word for pair in pairs for word in pair]


def steps_of(args: argparse.Namespace, method: str) -> int:
    """Steps of the official script, and of our command with equal settings."""
    return 2 if args.quick else PLANS[method].steps


def their_command(args: argparse.Namespace, method: str, pictures: Path, out: Path) -> list[str]:
    """The official script, called as its README does; args.found: {method: script}."""
    plan = PLANS[method]
    folder = "train_data_dir" if method == "textual_inversion" else "instance_data_dir"
    options = {"pretrained_model_name_or_path": CHECKPOINTS / "toybox-sd", folder: pictures, "output_dir": out,
               "resolution": 64, "train_batch_size": BATCH, "max_train_steps": steps_of(args, method),
               "learning_rate": plan.lr, "lr_scheduler": "constant", "lr_warmup_steps": 0, "mixed_precision": "no",
               "seed": args.seed} | plan.options  # fmt: skip
    if plan.class_pictures:
        options |= {"class_data_dir": out.parent / "class", "num_class_images": args.prior}
    return [str(args.found[method]), *words(options)]


def our_command(args: argparse.Namespace, method: str, side: str, out: Path) -> list[str]:
    """The course's command with the same settings ("equal"), or with its own ("default")."""
    plan, token = PLANS[method], METHODS[method].token
    options = {"method": method.replace("_", "-"), "images": SUBJECT, "class-noun": NOUN, "token": token,
               "base": "toybox", "device": "cpu", "out": out / SAVED, "seed": args.seed, "grid": 0}  # fmt: skip
    if side == "equal":
        options |= {"steps": plan.steps, "lr": plan.lr, "batch-size": BATCH}
        options |= {"rank": plan.options["rank"]} if "rank" in plan.options else {}
    if plan.class_pictures and (side == "equal" or args.quick):
        options[plan.class_pictures] = args.prior
    if args.quick:
        options["steps"] = 2
    return ["-m", "course_lib.personalize", "train", *words(options)]
