"""Measures the library: lines, functions, parameters, and the files that a reader opens for one step.

    python tools/measure_code.py            prints both tables

A function's body is counted without its docstring. A step is run on a tiny model with random weights; the files and
functions of course_lib that it executes are those that a reader opens to follow it. Networks are not counted.
"""

import argparse
import ast
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
LIBRARY = REPO / "course_lib"
LESSONS = ("diffusion", "latent", "editing", "personalization")
NOT_LESSONS = (
    "diffusion/checkpoint.py",
    "latent/registry.py",
    "personalization/memory.py",
    "personalization/interchange/",
)
GROUPS = ("lessons", "evaluation", "editing and unCLIP", "the rest", "toybox")


def group_of(path: Path) -> str:
    """The budget that a file of the library counts towards."""
    name = path.relative_to(LIBRARY).as_posix()
    room = name.split("/")[0]
    if room in ("evaluation", "toybox"):
        return room
    if room in LESSONS and not name.startswith(NOT_LESSONS):
        return "editing and unCLIP" if room == "editing" or name == "latent/unclip.py" else "lessons"
    return "the rest"


def lines_by_group() -> dict[str, int]:
    """Lines of the library's files, by budget."""
    lines = dict.fromkeys(GROUPS, 0)
    for path in LIBRARY.rglob("*.py"):
        lines[group_of(path)] += len(path.read_text(encoding="utf-8").splitlines())
    return lines


def functions(path: Path) -> list[tuple[str, int, int]]:
    """(name, lines of the body without docstring, parameters) of each function of a file."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            body = node.body[1:] if ast.get_docstring(node) is not None else node.body
            size = body[-1].end_lineno - body[0].lineno + 1 if body else 0
            arguments = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
            found.append((node.name, size, len([a for a in arguments if a.arg not in ("self", "cls")])))
    return found


def opened(step: Callable[[], object]) -> dict[str, set[str]]:
    """file -> functions of course_lib that a call executes, without the networks."""
    seen: dict[str, set[str]] = {}

    def watch(frame, event, argument):
        path = Path(frame.f_code.co_filename)
        if event == "call" and LIBRARY in path.parents and path.name != "unet.py":
            name = frame.f_code.co_name
            if not name.startswith("<") and name != "forward":
                seen.setdefault(path.relative_to(LIBRARY).as_posix(), set()).add(name)

    sys.setprofile(watch)
    try:
        step()
    finally:
        sys.setprofile(None)
    return seen


def steps() -> dict[str, dict[str, set[str]]]:
    """The files opened for one step of training and one of sampling, in Part 1 and on Stable Diffusion."""
    import torch
    from PIL import Image

    sys.path.insert(0, str(REPO / "tests"))
    from tiny import build

    from course_lib.diffusion import guidance, samplers, schedule
    from course_lib.diffusion.train import Training
    from course_lib.diffusion.unet import UNet
    from course_lib.personalization import custom_diffusion, dreambooth, lora, textual_inversion
    from course_lib.personalization.finetune import finetune
    from course_lib.personalization.recipe import Settings

    net = UNet(channels=(32, 64), attention=(False, True), num_classes=10)
    images = torch.zeros(4, 3, 16, 16, dtype=torch.uint8)
    training = Training(net, schedule.linear(), images, torch.arange(4), batch_size=2).steps(2)
    next(training)
    sd, part1 = build(), guidance.guided(net, torch.tensor([1]), w=2.0)
    pixels = samplers.ddim(part1, torch.zeros(1, 3, 16, 16), schedule.linear(), 3)
    latents = samplers.ddim(sd.guided("a cat", w=2.0), sd.noise(1, seed=0), sd.schedule, 3, clip=False)
    for sampler in (pixels, latents):
        next(sampler)
    found = {"Part 1, training": opened(lambda: next(training)), "Part 1, sampling": opened(lambda: next(pixels))}
    photos, settings = [Image.new("RGB", (64, 64), "grey")] * 2, Settings(steps=2, lr=1e-3, batch_size=2)
    for method in (textual_inversion, dreambooth, lora, custom_diffusion):
        with method.recipe(sd, photos, noun="cat", captions=["a {}"] * 2, settings=settings) as recipe:
            loop = finetune(sd, recipe)
            next(loop)
            found[f"Stable Diffusion, training, {method.__name__.split('.')[-1]}"] = opened(loop.__next__)
            loop.close()
    return found | {"Stable Diffusion, sampling": opened(lambda: next(latents))}


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    found = [one for path in LIBRARY.rglob("*.py") if group_of(path) != "toybox" for one in functions(path)]
    sizes = sorted(size for _, size, _ in found)
    print("lines: " + ", ".join(f"{group} {count:,}" for group, count in lines_by_group().items()))
    print(f"functions without toybox: {len(found)}; body median {statistics.median(sizes):g}, "
          f"p90 {sizes[len(sizes) * 9 // 10]}, max {sizes[-1]}; "
          f"more than 40 lines: {', '.join(name for name, size, _ in found if size > 40) or 'none'}; "
          f"more than 7 parameters: {sum(count > 7 for _, _, count in found)}")  # fmt: skip
    print("\n| step | files | functions | which |\n|---|---|---|---|")
    for step, files in steps().items():
        print(f"| {step} | {len(files)} | {sum(map(len, files.values()))} | {', '.join(sorted(files))} |")


if __name__ == "__main__":
    main()
