"""Parts that several Toybox trainings share: pictures, captions of each step, cached files, shipping."""

import argparse
import copy
import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from run import Run
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from course_lib.diffusion.ddpm import step_generator
from course_lib.environment import sha256, write_whole
from course_lib.toybox import sets
from course_lib.toybox.world import RENDERER_VERSION


def picture_arguments(parser: argparse.ArgumentParser, images: int = 40_000, captions: bool = False) -> None:
    parser.add_argument("--images", type=int, default=images, help=f"pictures to draw and use (default {images:,})")
    if captions:
        parser.add_argument("--split", choices=["train", "rich"], default="train", help="rich: 40 %% pairs of objects, "
                            "always named, and more patterns and accessories (default train)")  # fmt: skip
        parser.add_argument("--workers", type=int, default=0, help="processes that write captions ahead of the steps: "
                            "faster on a GPU (default 0)")  # fmt: skip


def pictures(count: int, device: torch.device, split: str = "train") -> Tensor:
    """(count, 3, 64, 64) uint8."""
    return torch.from_numpy(sets.pair_images(count, split=split)).permute(0, 3, 1, 2).to(device)


def data_name(count: int, split: str = "train") -> str:
    """The pictures of a training, for its state: a resumed run must have the same."""
    return f"Toybox version {RENDERER_VERSION}, split {split}, {count} pictures"


def kept(path: Path, make: Callable[[], Tensor]) -> Tensor:
    """A tensor from a file, which is made and written the first time."""
    if path.is_file():
        try:
            return torch.load(path, weights_only=True)
        except Exception as error:  # a file that was cut off or altered fails in many ways
            raise ValueError(f"{path} is damaged ({type(error).__name__}); delete it, and it is made again") from error
    tensor = make()
    with write_whole(path) as temporary:
        torch.save(tensor, temporary)
    return tensor


def captioned(run: Run, tokenizer, drop: float = 0.0) -> Iterator[list[Tensor]]:
    """For each step to come: rows (B,) of the training pictures and token ids (B, L) of a new caption of each."""
    workers, args = run.args.workers, run.args
    loader = DataLoader(
        Captioned(args, run.accelerator.process_index, tokenizer, drop), batch_size=None,
        sampler=range(run.step + 1, args.steps + 1), num_workers=workers, worker_init_fn=_leave_ctrl_c_to_the_run,
        prefetch_factor=8 if workers else None, pin_memory=run.device.type == "cuda",
    )  # fmt: skip
    return ([part.to(run.device, non_blocking=True) for part in parts] for parts in loader)


def _leave_ctrl_c_to_the_run(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends Ctrl-C to the workers too


class Captioned(Dataset):
    """The pictures of a step and a caption of each. Item k depends on seed, process and k alone.

    A picture gets a new caption each time it is seen; a share `drop` of the captions is left empty.
    """

    def __init__(self, args: argparse.Namespace, process: int, tokenizer, drop: float):
        self.args, self.process, self.tokenizer, self.drop = args, process, tokenizer, drop

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        generator = step_generator(self.args.seed, self.process, step)
        rows = torch.randint(self.args.images, (self.args.batch_size,), generator=generator)
        dropped = (torch.rand(len(rows), generator=generator) < self.drop).tolist()
        words = np.random.default_rng(rows.tolist())
        split = self.args.split
        lines = [sets.pair_caption(sets.pair_spec(row, split)[0], words, split) for row in rows.tolist()]
        lines = ["" if drop else line for drop, line in zip(dropped, lines, strict=True)]
        return rows, self.tokenizer(lines, padding="max_length", truncation=True, return_tensors="pt").input_ids


def ship(model: nn.Module, folder: Path, run: Run, **about) -> None:
    """Write weights as fp16 safetensors of at most 15 MB a file, with provenance.json beside them."""
    for old in folder.glob("*.safetensors*"):  # of an earlier model, perhaps in another number of files
        old.unlink()
    copy.deepcopy(model).half().save_pretrained(folder, max_shard_size="15MB", safe_serialization=True)
    config = json.loads((folder / "config.json").read_text())
    config.pop("_name_or_path", None)  # where the weights came from: a path of this machine
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    facts = dict(
        about, data="Toybox pictures with captions, drawn by course_lib/toybox/sets.py",
        split=getattr(run.args, "split", "train"), images=run.args.images,
        parameters=sum(p.numel() for p in model.parameters()), **run.facts(), last_rows=run.rows()[-3:],
        sha256={p.name: sha256(p) for p in sorted(folder.glob("*.safetensors"))},
    )  # fmt: skip
    (folder / "provenance.json").write_text(json.dumps(facts, indent=1) + "\n")
