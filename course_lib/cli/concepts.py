"""The commands that use a trained concept: sample, merge, compress, info, export.

`args` holds the options of the command, see main.py. torch and the library import slowly, so functions import them.
"""

import math
import re
from pathlib import Path

from course_lib.cli import drawing


def sample(args):
    from course_lib.personalization.concept import applied

    if args.count < 1:
        raise ValueError(f"count: expected a whole number of at least 1, got {args.count}")
    if args.w is not None and not math.isfinite(args.w):
        raise ValueError(f"w: expected a finite number, got {args.w}")
    drawing.check_out(args, drawing.PICTURES, folder=True)
    sd, concepts = open_concepts(args)
    prompts = drawing.fill_placeholder(args.prompt or ["a photo of a {}"], *concepts)
    drawing.note_unknown_words(sd, prompts, [token for one in concepts for token, _ in drawing.subjects(one)])
    with applied(sd, *concepts):
        images = drawing.draw(sd, prompts, args.count, w=args.w, steps=args.steps, seed=args.seed)
    if args.out.suffix:
        drawing.write_grid(args.out, images, args.count)
        print(f"wrote {args.out}; its rows: {'; '.join(prompts)}")
        return 0
    for k, image in enumerate(images.split(1)):
        row, column = divmod(k, args.count)
        label = re.sub(r"\W+", "-", prompts[row]).strip("-")[:60]
        drawing.write_grid(args.out / f"{row + 1:02d}_{label}_{column + 1}.png", image, 1)
    print(f"wrote {len(images)} pictures into {args.out}")
    return 0


# ---- concepts and their files ----


def open_concepts(args, dtype=None):
    """(sd, concepts): the base model, and the files of --concept, which are ours or other tools'."""
    from course_lib.latent.registry import MODELS
    from course_lib.latent.stable_diffusion import load
    from course_lib.personalization.concept import load_concept
    from course_lib.personalization.interchange.load import load_foreign

    paths = [args.concept] if isinstance(args.concept, Path) else args.concept or []
    missing = [str(path) for path in paths if not path.exists()]
    if missing:
        raise ValueError(f"concept: expected a file, but {', '.join(missing)} does not exist")
    ours = {path: load_concept(path) for path in paths if is_ours(path)}
    base = args.base or next((concept.base for concept in ours.values()), None if paths else "toybox")
    if base is None:
        raise ValueError(f"concept: expected a concept of this course, but {paths[0]} is damaged or of another tool; "
                         "for another tool's file, name its model with --base")  # fmt: skip
    if not args.base and base not in MODELS and not Path(base).is_dir():
        raise ValueError(f"base: expected --base, since {base!r} is not on this machine; name its folder or hub id")
    sd = load(base, args.device, dtype, low_memory=getattr(args, "low_memory", False) or None)
    return sd, [ours[path] if path in ours else load_foreign(path, sd) for path in paths]


def is_ours(path):
    from safetensors import SafetensorError, safe_open

    from course_lib.latent.registry import check_pointer
    from course_lib.personalization.concept import FORMAT

    try:
        check_pointer(path)
        with safe_open(path, "pt") as file:
            return (file.metadata() or {}).get("format") == FORMAT
    except (OSError, SafetensorError):
        return False


def merge(args):
    import torch

    from course_lib.personalization.concept import check_base, save_concept
    from course_lib.personalization.merge import merge_concepts, mix_loras

    drawing.check_out(args, (".safetensors",))
    sd, concepts = open_concepts(args, torch.float32)
    methods = [concept.method.replace("_", "-") for concept in concepts]
    if len(methods) < 2 or set(methods) not in ({"lora"}, {"custom-diffusion"}):
        raise ValueError("concept: expected two or more, all of custom-diffusion or all of lora, got "
                         f"{', '.join(methods)}")  # fmt: skip
    if methods[0] == "lora":
        for concept in concepts:
            check_base(sd, concept)
        merged = mix_loras(concepts)
    else:
        merged = merge_concepts(sd, concepts, ordinary_sentences(args, sd))
    save_concept(args.out, merged)
    words = ", ".join(name for _, name in drawing.subjects(merged)) or "that their authors chose"
    print(f"wrote {args.out} ({drawing.human_size(args.out)}) with the words {words}")


def ordinary_sentences(args, sd):
    from course_lib.data.pictures import read_text
    from course_lib.toybox.captions import corpus

    if args.captions:
        return [line.strip() for line in read_text(args.captions).splitlines() if line.strip()]
    if sd.defaults.toybox_world:
        return corpus(500)
    raise ValueError(f"captions: expected --captions FILE, 200 to 1000 ordinary sentences, with the model {sd.name}")


def compress(args):
    import torch

    from course_lib.personalization.concept import save_concept
    from course_lib.personalization.merge import compressed

    drawing.check_out(args, (".safetensors",))
    sd, (concept,) = open_concepts(args, torch.float32)
    before = drawing.human_size(args.concept)
    save_concept(args.out, compressed(sd, concept, args.keep), torch.float16 if args.half else None)
    print(f"wrote {args.out} ({drawing.human_size(args.out)}; {args.concept} had {before})")


def info(args):
    from course_lib.personalization.concept import LICENCE, load_concept

    ours = is_ours(args.concept)
    concept = load_concept(args.concept) if ours else open_concepts(args)[1][0]
    kind = f"a concept of {'this course' if ours else 'another tool'}"
    about = {key: value for key, value in concept.about.items() if value not in (None, "", [], [""])}
    rows = {"file": f"{args.concept}, {kind}", "method": concept.method.replace("_", "-"), "model": concept.base,
            **{key.replace("_", " "): value for key, value in (about | concept.settings).items()},
            "size": drawing.human_size(concept.bytes), "tensors": len(concept.tensors), "licence": LICENCE}  # fmt: skip
    for key, value in rows.items():
        print(f"{key:22} {', '.join(map(str, value)) if isinstance(value, list) else value}")
    for name, value in list(concept.tensors.items())[: None if args.all else 5]:
        print(f"    {name}  {' x '.join(map(str, value.shape))}  {str(value.dtype).removeprefix('torch.')}")


def export(args):
    import torch

    from course_lib.personalization.interchange import export as files

    drawing.check_out(args, folder=True)
    sd, (concept,) = open_concepts(args, torch.float32)
    folder = files.export(concept, args.out, sd, layout=args.format)
    print(f"wrote {folder}: {', '.join(sorted(path.name for path in folder.iterdir()))}")
