"""The commands that use a trained concept: sample, merge, compress, info, export.

`args` holds the options of the command, see main.py. torch and the library take seconds to import, so functions do it.
"""

import re
from dataclasses import replace
from pathlib import Path


def sample(args):
    from course_lib.cli.drawing import draw, fill_placeholder, note_unknown_words, write_grid
    from course_lib.personalization.concept import applied

    if args.count < 1:
        raise ValueError(f"count: expected a whole number of at least 1, got {args.count}")
    sd, concepts = open_concepts(args)
    first = concepts[0] if concepts else None
    prompts = fill_placeholder(args.prompt or ["a photo of a {}"], first and first.method, first.about if first else {})
    note_unknown_words(sd, prompts, [token for one in concepts for token in one.about.get("tokens") or
                                     [one.about.get("token") or ""]])  # fmt: skip
    with applied(sd, *concepts):
        images = draw(sd, prompts, args.count, w=args.w, steps=args.steps, seed=args.seed)
    if args.out.suffix.lower() == ".png":
        write_grid(args.out, images, args.count)
        print(f"wrote {args.out}; its rows: {'; '.join(prompts)}")
        return 0
    for k, image in enumerate(images.split(1)):
        row, column = divmod(k, args.count)
        label = re.sub(r"\W+", "-", prompts[row]).strip("-")[:60]
        write_grid(args.out / f"{row + 1:02d}_{label}_{column + 1}.png", image, 1)
    print(f"wrote {len(images)} pictures into {args.out}")
    return 0


# ---- concepts and their files ----


def open_concepts(args, dtype=None):
    """(sd, concepts): the files of --concept, ours or other tools', and the model that they are for."""
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
        raise ValueError(
            f"concept: {paths[0]} is damaged, or of another tool: then say with --base which model it is for"
        )
    if not args.base and base not in MODELS and not Path(base).is_dir():
        raise ValueError(f"base: expected --base, since {base!r} is not on this machine; give its folder or name")
    sd = load(base, args.device, dtype, low_memory=getattr(args, "low_memory", False) or None)
    return sd, [ours[path] if path in ours else load_foreign(path, sd) for path in paths]


def is_ours(path):
    from safetensors import SafetensorError, safe_open

    from course_lib.personalization.concept import FORMAT

    try:
        with safe_open(path, "pt") as file:
            return (file.metadata() or {}).get("format") == FORMAT
    except (OSError, SafetensorError):
        return False


def merge(args):
    import torch

    from course_lib.cli.drawing import human_size
    from course_lib.personalization.concept import save_concept, uncompressed
    from course_lib.personalization.merge import merge_concepts
    from course_lib.toybox.captions import corpus

    sd, concepts = open_concepts(args, torch.float32)
    if args.captions:
        captions = [line.strip() for line in args.captions.read_text(encoding="utf-8").splitlines() if line.strip()]
    elif sd.defaults.toybox_world:
        captions = corpus(500)
    else:
        raise ValueError(
            f"captions: expected --captions FILE, 200 to 1000 ordinary sentences, with the model {sd.name}"
        )
    merged = merge_concepts(sd, [uncompressed(sd, concept) for concept in concepts], captions)
    save_concept(args.out, merged)
    words = ", ".join(
        f"{token} {noun}" for token, noun in zip(merged.about["tokens"], merged.about["nouns"], strict=True)
    )
    print(f"wrote {args.out} ({human_size(args.out)}) with the words {words}")


def compress(args):
    import torch

    from course_lib.cli.drawing import human_size
    from course_lib.personalization import merge as merging
    from course_lib.personalization.concept import check_base, save_concept, uncompressed

    sd, (concept,) = open_concepts(args, torch.float32)
    if concept.method != "custom_diffusion":
        raise ValueError(f"concept: expected one of custom-diffusion, whose changes have few directions, got one of "
                         f"{concept.method}")  # fmt: skip
    check_base(sd, concept)
    base, tensors = {f"unet.{name}": param for name, param in sd.unet.named_parameters()}, {}
    for name, value in uncompressed(sd, concept).tensors.items():
        if name == "tokens":
            tensors[name] = value
        else:
            tensors[f"{name}.u"], tensors[f"{name}.v"] = merging.compress(
                value.float() - base[name].float().cpu(), args.keep
            )
    about = concept.about | {"compressed": args.keep}
    small = replace(concept, tensors=tensors, about=about)
    save_concept(args.out, small, torch.float16 if args.half else None)
    print(f"wrote {args.out} ({human_size(args.out)}; {args.concept} has {human_size(args.concept)})")


def info(args):
    from course_lib.cli.drawing import human_size
    from course_lib.personalization.concept import LICENCE, load_concept

    ours = is_ours(args.concept)
    concept = load_concept(args.concept) if ours else open_concepts(args)[1][0]
    kind = f"a concept of {'this course' if ours else 'another tool'}"
    about = {key: value for key, value in concept.about.items() if value not in (None, "", [])}
    rows = {"file": f"{args.concept}, {kind}", "method": concept.method.replace("_", "-"), "model": concept.base,
            **{key.replace("_", " "): value for key, value in (about | concept.settings).items()},
            "size": human_size(concept.bytes), "tensors": len(concept.tensors), "licence": LICENCE}  # fmt: skip
    for key, value in rows.items():
        print(f"{key:22} {', '.join(map(str, value)) if isinstance(value, list) else value}")
    for name, value in list(concept.tensors.items())[: None if args.all else 5]:
        print(f"    {name}  {' x '.join(map(str, value.shape))}  {str(value.dtype).removeprefix('torch.')}")


def export(args):
    import torch

    from course_lib.personalization.concept import uncompressed
    from course_lib.personalization.interchange import export as files

    sd, (concept,) = open_concepts(args, torch.float32)

    folder = files.export(uncompressed(sd, concept), args.out, sd)
    print(f"wrote {folder}: {', '.join(sorted(path.name for path in folder.iterdir()))}")
