"""The resumable loop of all trainings in this folder: any device, several processes, averaged weights, a log.

A step's random numbers come from a generator seeded with (seed, process, step), so a run that was stopped or killed
goes on bit for bit from its last save. The model and its loss are in the scripts; this file is housekeeping.
"""

import argparse
import contextlib
import datetime
import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterable

import torch
from accelerate import Accelerator
from command import FREE, asked_to_stop, read_state
from torch import Tensor, nn

from course_lib.diffusion.ddpm import step_generator
from course_lib.diffusion.train import EMA
from course_lib.environment import device_name, write_whole


def digest(tensors: Iterable[Tensor]) -> str:
    """The first 16 digits of the SHA-256 of all numbers in these tensors."""
    total = hashlib.sha256()
    for tensor in tensors:
        total.update(tensor.detach().cpu().contiguous().numpy())
    return total.hexdigest()[:16]


class Run:
    """One resumable training of `model`: `run.train(batch_loss, on_save)`. `run.ema.model` holds the averaged weights.

    If args.out/state.pt exists, the run goes on from it.
    args: with the options of `common_arguments`.  accelerator: from `new_accelerator`.  made_by: the script.
    about: the data, the sizes of the model, and all else beside the options that the result depends on.
    Raises ValueError if the state is damaged, or belongs to other data or settings.
    """

    adamw = dict(betas=(0.9, 0.99), weight_decay=0.0)
    warmup = 100  # steps over which the learning rate rises
    clip = 1.0  # largest norm of the gradient

    def __init__(self, args: argparse.Namespace, model: nn.Module, accelerator: Accelerator, made_by: str, about: dict):
        self.args, self.accelerator, self.device = args, accelerator, accelerator.device
        self.net = model.to(self.device, memory_format=torch.channels_last).train()
        self.ema = EMA(self.net, args.ema)
        fused = self.device.type != "mps"  # one kernel updates all weights
        optimizer = torch.optim.AdamW(self.net.parameters(), lr=args.lr, fused=fused, **self.adamw)
        self.optimizer = accelerator.prepare(optimizer)
        self.step, self.minutes, self.total, self.count = 0, 0.0, 0.0, 0  # total and count: losses since the last row
        self.state, self.log, self.started_from = args.out / "state.pt", args.out / "log.jsonl", None
        if args.start_from:
            self.started_from = json.loads((args.start_from / "provenance.json").read_text())
        options = {f"--{name.replace('_', '-')}": value for name, value in vars(args).items() if name not in FREE}
        settings = {"script": made_by, **about, **options, "processes": accelerator.num_processes}
        self.settings = json.loads(json.dumps(settings, default=str))  # plain values, as they are kept in the file
        args.out.mkdir(parents=True, exist_ok=True)
        if self.state.is_file():
            self._load()
        if accelerator.is_main_process and self.log.is_file():  # rows after the last save are written again
            with write_whole(self.log) as temporary:
                kept = (json.dumps(row) + "\n" for row in self.rows() if row["step"] <= self.step)
                temporary.write_text("".join(kept))

    def learning_rate(self, step: int) -> float:
        """Rises over `warmup` steps, stays, and falls in a straight line to 0 at the end."""
        left = max(0.0, 1 - step / self.args.steps)
        if self.args.by_clock:
            left = min(left, max(0.0, 1 - self.minutes / self.args.minutes))
        return self.args.lr * min(1.0, step / self.warmup, left / max(self.args.cooldown, 1 / self.args.steps))

    def hyperparameters(self, step: int) -> dict:
        """The optimiser's values in this step."""
        return dict(lr=self.learning_rate(step))

    def generator(self, step: int) -> torch.Generator:
        """The random numbers of a step in this process, on its device."""
        return step_generator(self.args.seed, self.accelerator.process_index, step, on=self.device)

    def train(self, batch_loss: Callable[[torch.Generator], Tensor], on_save: Callable[[int], dict] | None = None):
        """Step until the steps or the minutes are over. batch_loss: generator -> loss; on_save: step -> measures.

        Ctrl-C or SIGTERM saves the state and ends the program with exit code 130. Raises FloatingPointError if the loss
        is not a number: a good state is never overwritten with a bad one.
        """
        args, start, before = self.args, time.time(), self.minutes
        saved, ask_every = start, 1 if self.accelerator.num_processes == 1 else 10
        with asked_to_stop() as asked:
            while self.step < args.steps:
                self._take_step(batch_loss)
                self.minutes = before + (time.time() - start) / 60
                by_clock = getattr(args, "by_clock", False)  # a script with its own schedule has no such option
                used = self.minutes if by_clock else self.minutes - before  # by the clock the rate ends at 0
                stop = bool(asked) or used > args.minutes
                end = self.step == args.steps or (self.step % ask_every == 0 and self._any(stop))
                due, save = self.step % args.log_every == 0, end or time.time() - saved > 60 * args.save_every
                if due or save:
                    self._check_finite()
                if due or (end and not asked):
                    self._write(loss=round((self.total / self.count).item(), 5))
                if due:
                    self.total, self.count = 0.0, 0
                if save and self.accelerator.is_main_process:
                    self._save()
                    if on_save and not asked:
                        self._write(**on_save(self.step))
                if save:
                    saved = time.time()
                if end:
                    break
            if self._any(bool(asked)):
                if self.accelerator.is_main_process:
                    print(f"stopped after step {self.step:,}, which is saved in {self.state}; "
                          "the same command goes on from there", file=sys.stderr)  # fmt: skip
                self.accelerator.end_training()  # a process whose group is still open may abort at its end
                raise SystemExit(130)

    def _take_step(self, batch_loss: Callable[[torch.Generator], Tensor]) -> None:
        self.step += 1
        with self.accelerator.autocast():
            loss = batch_loss(self.generator(self.step))
        self.accelerator.backward(loss)
        if self.accelerator.num_processes > 1:  # here, not in a wrapper's forward: a script may call parts of the net
            for param in self.net.parameters():
                if param.grad is not None:
                    param.grad = self.accelerator.reduce(param.grad, "mean")
        norm = self.accelerator.clip_grad_norm_(self.net.parameters(), self.clip)
        if not self.accelerator.scaler:  # which skips infinite gradients itself
            self.total = self.total + 0 * norm  # not a number if the norm is infinite, see _check_finite
        for group in self.optimizer.param_groups:
            group.update(self.hyperparameters(self.step))
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.update(self.net)
        self.total, self.count = self.total + loss.detach(), self.count + 1

    def _check_finite(self) -> None:
        if not torch.isfinite(self.total):
            rest = f"{self.state} holds the last good state" if self.state.is_file() else "nothing was saved"
            raise FloatingPointError(f"the loss is not a number at step {self.step}; {rest}; "
                                     "begin again with a smaller --lr and another --out")  # fmt: skip

    def _any(self, flag: bool) -> bool:
        """Whether any process says yes, since all have to stop after the same step."""
        if self.accelerator.num_processes == 1:
            return flag
        return self.accelerator.reduce(torch.tensor(float(flag), device=self.device), "sum").item() > 0

    def _write(self, **row) -> None:
        if self.accelerator.is_main_process:
            row = dict(step=self.step, minutes=round(self.minutes, 2), **row)
            print(json.dumps(row), flush=True)
            with self.log.open("a") as file:
                file.write(json.dumps(row) + "\n")

    def rows(self) -> list[dict]:
        """The rows of the log, up to one that a kill cut off."""
        rows = []
        with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):
            for line in self.log.read_text().splitlines():
                rows.append(json.loads(line))
        return rows

    def _save(self) -> None:
        scaler = self.accelerator.scaler  # of fp16's losses
        state = dict(settings=self.settings, started_from=self.started_from, step=self.step, minutes=self.minutes,
                     updates=self.ema.updates, total=float(self.total), count=self.count, net=self.net.state_dict(),
                     ema=self.ema.model.state_dict(), optimizer=self.optimizer.state_dict(),
                     scaler=scaler.state_dict() if scaler else None)  # fmt: skip
        with write_whole(self.state) as temporary:
            torch.save(state, temporary)

    def _load(self) -> None:
        state = read_state(self.state)
        theirs, ours = state["settings"], self.settings
        for name in {**ours, **theirs}:
            if theirs.get(name) != ours.get(name):
                raise ValueError(f"{name}: {self.state} was written with {theirs.get(name)}, got {ours.get(name)}; "
                                 "go on with the same value, or begin anew with another --out")  # fmt: skip
        try:
            self.net.load_state_dict(state["net"])
            self.ema.model.load_state_dict(state["ema"])
            self.optimizer.load_state_dict(state["optimizer"])
            if self.accelerator.scaler:
                self.accelerator.scaler.load_state_dict(state["scaler"])
            self.step, self.minutes, self.ema.updates = state["step"], state["minutes"], state["updates"]
            self.total, self.count, self.started_from = state["total"], state["count"], state["started_from"]
        except Exception as error:  # a part is missing, or of another shape
            raise ValueError(f"{self.state} does not fit this training ({type(error).__name__}); delete it to begin "
                             "again, or choose another --out") from error  # fmt: skip
        if self.accelerator.is_main_process:
            print(f"{self.state}: goes on from step {self.step:,} ({self.minutes:.0f} minutes so far)", flush=True)

    def facts(self) -> dict:
        """How the weights were made, for provenance.json."""
        args = self.args
        return dict(
            steps=self.step, minutes=round(self.minutes, 1), batch_size=args.batch_size, lr=args.lr, ema=args.ema,
            seed=args.seed, precision=args.precision, processes=self.accelerator.num_processes, device=device_name(),
            threads=torch.get_num_threads(), torch=torch.__version__, date=datetime.date.today().isoformat(),
            started_from=self.started_from,
        )  # fmt: skip
