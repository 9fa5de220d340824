"""The loop that the Toybox trainings share: any device, several processes, averaged weights, exact resume, a log.

A step's random numbers come from a generator seeded with (seed, process, step), so a killed run goes on bit for bit
from its last save. The lesson is in the scripts that call it; this is housekeeping.
"""

import argparse
import contextlib
import copy
import datetime
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from course_lib.diffusion.train import EMA
from course_lib.environment import device_name, sha256
from course_lib.toybox import sets
from course_lib.toybox.captions import caption


def common_arguments(parser: argparse.ArgumentParser, out: str, batch_size: int, lr: float, steps: int) -> None:
    """The options that all stages have."""
    add = parser.add_argument
    add("--out", type=Path, default=Path(out), help=f"where state, log and samples go (default {out})")
    add("--ship", type=Path, help="where the averaged weights go at the end (data/checkpoints/...)")
    add("--start-from", type=Path, help="a shipped model of this stage to go on from, with a fresh optimiser")
    add("--minutes", type=float, default=60, help="stop after this long (default 60)")
    add("--steps", type=int, default=steps, help="all steps; the learning rate falls over the last --cooldown of them")
    add("--cooldown", type=float, default=0.3, help="share of the steps over which the learning rate falls to 0")
    add("--by-clock", action="store_true", help="the learning rate falls towards --minutes, not towards --steps: for a "
        "machine of unknown speed (a killed run still goes on, but no longer bit for bit)")  # fmt: skip
    add("--batch-size", type=int, default=batch_size, help="per step and process")
    add("--lr", type=float, default=lr)
    add("--ema", type=float, default=0.998)
    add("--images", type=int, default=40_000, help="how many pictures are drawn and used")
    add("--precision", choices=["no", "bf16", "fp16"], default="no")
    add("--compile", action="store_true", help="torch.compile the model: pays on a GPU")
    add("--workers", type=int, default=0, help="processes that write captions ahead of the steps: pays on a GPU")
    add("--threads", type=int, help="CPU threads (default: all)")
    add("--save-every", type=float, default=4, help="minutes between saves")
    add("--seed", type=int, default=0)


class Run:
    """One resumable training of `model`: `run.train(batch_loss, on_save)`. `run.ema.model` holds the averaged weights.

    If args.out/state.pt exists, the model, the average and the optimiser start from it.
    """

    def __init__(self, args: argparse.Namespace, model: nn.Module, accelerator: Accelerator):
        if args.threads:
            torch.set_num_threads(args.threads)
        if int(os.environ.get("WORLD_SIZE", 1)) != accelerator.num_processes:  # each would train a model of its own
            raise SystemExit("the processes do not know of each other; start them with `torchrun --nproc_per_node 2`")
        self.args, self.accelerator = args, accelerator
        self.net = model.to(accelerator.device, memory_format=torch.channels_last).train()
        self.ema = EMA(self.net, args.ema)
        fused = accelerator.device.type != "mps"  # one kernel updates all weights
        optimizer = torch.optim.AdamW(
            self.net.parameters(), lr=args.lr, weight_decay=0.0, betas=(0.9, 0.99), fused=fused
        )
        self.optimizer = accelerator.prepare(optimizer)
        self.model = torch.compile(self.net) if args.compile else self.net
        self.step, self.minutes, self.state = 0, 0.0, args.out / "state.pt"
        self.started_from = None
        if args.start_from:
            self.started_from = json.loads((args.start_from / "provenance.json").read_text())
        self.log = args.out / "log.jsonl"
        args.out.mkdir(parents=True, exist_ok=True)
        if self.state.is_file():
            self._load()

    def freeze(self, *modules: nn.Module) -> None:
        for module in modules:
            module.requires_grad_(False)

    def learning_rate(self, step: int) -> float:
        """Rises over 100 steps, stays, and falls in a straight line to 0 at the end."""
        left = max(0.0, 1 - step / self.args.steps)
        if self.args.by_clock:
            left = min(left, max(0.0, 1 - self.minutes / self.args.minutes))
        return self.args.lr * min(1.0, step / 100, left / max(self.args.cooldown, 1 / self.args.steps))

    def generator(self, step: int) -> torch.Generator:
        return generator_of(self.args.seed, self.accelerator.process_index, step)

    def captioned(self, tokenizer, drop: float = 0.0) -> Iterator[list[Tensor]]:
        """For each step to come: rows (B,) of the training pictures and token ids (B, L) of a new caption of each."""
        workers, device = self.args.workers, self.accelerator.device
        steps = Captioned(self.args, self.accelerator.process_index, tokenizer, drop)
        loader = DataLoader(
            steps, batch_size=None, sampler=range(self.step + 1, self.args.steps + 1), num_workers=workers,
            prefetch_factor=8 if workers else None, pin_memory=device.type == "cuda",
        )  # fmt: skip
        return ([part.to(device, non_blocking=True) for part in parts] for parts in loader)

    def train(self, batch_loss: Callable[[torch.Generator], Tensor], on_save: Callable[[int], dict] | None = None):
        """Step until the steps or the minutes are over. batch_loss: generator -> loss; on_save: step -> measures."""
        args, start, before = self.args, time.time(), self.minutes
        saved, total, count = start, 0.0, 0
        while self.step < args.steps:
            self.step += 1
            with self.accelerator.autocast():
                loss = batch_loss(self.generator(self.step))
            self.accelerator.backward(loss)
            if (
                self.accelerator.num_processes > 1
            ):  # here, not in a wrapper's forward: a stage may call parts of the net
                for param in self.net.parameters():
                    if param.grad is not None:
                        param.grad = self.accelerator.reduce(param.grad, "mean")
            self.accelerator.clip_grad_norm_(self.net.parameters(), 1.0)
            for group in self.optimizer.param_groups:
                group["lr"] = self.learning_rate(self.step)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.ema.update(self.net)
            total, count = total + loss.detach(), count + 1
            self.minutes = before + (time.time() - start) / 60
            stop = self._time_is_up(time.time() - start > 60 * args.minutes) or self.step == args.steps
            report, save = self.step % 50 == 0 or stop, stop or time.time() - saved > 60 * args.save_every
            if (report or save) and not torch.isfinite(total):  # so a good state is never overwritten with a bad one
                raise RuntimeError(
                    f"the loss is not a number at step {self.step}; {self.state} holds the last "
                    "good state: start again with a smaller --lr"
                )
            if report:
                self._write(loss=round((total / count).item(), 5))
                total, count = 0.0, 0
            if save:
                if self.accelerator.is_main_process:
                    self._save()
                    if on_save:
                        self._write(**on_save(self.step))
                saved = time.time()
            if stop:
                break

    def _time_is_up(self, up: bool) -> bool:
        """Several processes ask the first one's clock, now and then: all have to stop at the same step."""
        if self.accelerator.num_processes == 1:
            return up
        if self.step % 10:
            return False
        return bool(broadcast(torch.tensor(float(up), device=self.accelerator.device)).item())

    def _write(self, **row) -> None:
        if self.accelerator.is_main_process:
            row = dict(step=self.step, minutes=round(self.minutes, 2), **row)
            print(json.dumps(row), flush=True)
            with self.log.open("a") as file:
                file.write(json.dumps(row) + "\n")

    def _save(self) -> None:
        """All at once under another name, then renamed: a kill in the middle leaves the old file whole."""
        state = dict(step=self.step, minutes=self.minutes, seed=self.args.seed, updates=self.ema.updates,
                     net=self.net.state_dict(), ema=self.ema.model.state_dict(),
                     optimizer=self.optimizer.state_dict())  # fmt: skip
        torch.save(state, self.state.with_suffix(".tmp"))
        os.replace(self.state.with_suffix(".tmp"), self.state)

    def _load(self) -> None:
        state = torch.load(self.state, map_location="cpu", weights_only=True)
        self.net.load_state_dict(state["net"])
        self.ema.model.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.minutes, self.ema.updates = state["step"], state["minutes"], state["updates"]
        if self.accelerator.is_main_process and self.log.is_file():  # rows after the last save are written again
            rows = self.log.read_text().splitlines(keepends=True)
            self.log.write_text("".join(row for row in rows if json.loads(row)["step"] <= self.step))
        print(f"{self.state}: going on from step {self.step:,} ({self.minutes:.0f} minutes so far)", flush=True)


def generator_of(seed: int, process: int, step: int) -> torch.Generator:
    key = np.random.SeedSequence([seed, process, step]).generate_state(1)[0]
    return torch.Generator().manual_seed(int(key))


class Captioned(Dataset):
    """Which pictures a step has, and what is said of them. Item k depends on seed, process and k alone.

    A picture gets a new caption each time it is seen; a share `drop` of the captions is left empty.
    """

    def __init__(self, args: argparse.Namespace, process: int, tokenizer, drop: float):
        self.args, self.process, self.tokenizer, self.drop = args, process, tokenizer, drop

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        generator = generator_of(self.args.seed, self.process, step)
        rows = torch.randint(self.args.images, (self.args.batch_size,), generator=generator)
        dropped = (torch.rand(len(rows), generator=generator) < self.drop).tolist()
        words = np.random.default_rng(rows.tolist())
        lines = [caption(sets.pair_spec(row)[0], words) for row in rows.tolist()]
        lines = ["" if drop else line for drop, line in zip(dropped, lines, strict=True)]
        return rows, self.tokenizer(lines, padding="max_length", truncation=True, return_tensors="pt").input_ids


def ship(model: nn.Module, folder: Path, run: Run, **about) -> None:
    """Write weights as fp16 safetensors of at most 15 MB a file, with provenance.json beside them."""
    for old in folder.glob("*.safetensors*"):  # of an earlier generation, perhaps in another number of files
        old.unlink()
    half = copy.deepcopy(model).half()
    half.save_pretrained(folder, max_shard_size="15MB", safe_serialization=True)
    config = json.loads((folder / "config.json").read_text())
    config.pop("_name_or_path", None)  # where the weights came from: a path of this machine
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    args, rows = run.args, []
    with contextlib.suppress(FileNotFoundError):
        rows = [json.loads(line) for line in run.log.read_text().splitlines()]
    facts = dict(
        about, data="Toybox pictures with captions, drawn by course_lib/toybox/sets.py", steps=run.step,
        minutes=round(run.minutes, 1), batch_size=args.batch_size, lr=args.lr, seed=args.seed,
        ema=args.ema, images=args.images, processes=run.accelerator.num_processes, device=device_name(),
        threads=torch.get_num_threads(), precision=args.precision, torch=torch.__version__,
        date=datetime.date.today().isoformat(), parameters=sum(p.numel() for p in model.parameters()),
        started_from=run.started_from, last_rows=rows[-3:],
        sha256={p.name: sha256(p) for p in sorted(folder.glob("*.safetensors"))},
    )  # fmt: skip
    (folder / "provenance.json").write_text(json.dumps(facts, indent=1) + "\n")
