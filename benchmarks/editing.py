"""Seconds for one edit of one picture, beside the plain way. Writes data/results/benchmark_editing.json.

    python benchmarks/editing.py                                       # toybox, on all cores
    python benchmarks/editing.py --base sd15-random --device cuda      # Stable Diffusion 1.5's layout, random weights

The plain way asks the UNet once for each prompt (source and target, with and without guidance) instead of in one
batch, and in null-text inversion keeps gradients of all weights and predicts with the prompt again in each update. Both
compute in float32 on a CPU and in half precision on a GPU, and give the same pictures (null-text: the same features);
the largest difference is recorded. They take turns, and a ratio is the median over rounds.
"""

import argparse
import datetime
import json
import statistics
import time
from pathlib import Path

import torch
from common import base_model, plain_dtype, release
from torch import Tensor

from course_lib.diffusion.guidance import combine
from course_lib.editing.attention import attention_hook
from course_lib.editing.inversion import Inverted, ddim_step, invert, null_text_inversion
from course_lib.editing.plug_and_play import LAYERS, plug_and_play
from course_lib.editing.prompt_to_prompt import Edit, alignment, edit
from course_lib.environment import RESULTS, device_name

SOURCE, TARGET = "a photo of a red cat on the beach", "a photo of a blue cat on the beach"
TARGETS = {"Prompt-to-Prompt": 3, "null-text inversion": 60, "Plug-and-Play": 6}  # seconds, 64x64, two cores
W = 5.0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="default: data/results/benchmark_editing.json, with the base's name")
    parser.add_argument("--base", default="toybox", help="toybox, sd15-random, or any that `load` takes")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=25, help="DDIM steps")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="two steps, one round, to see that it runs")
    args = parser.parse_args()
    if args.quick:
        args.steps, args.rounds = 2, 1
    if args.out is None:
        args.out = RESULTS / f"benchmark_editing{'' if args.base == 'toybox' else f'_{args.base}_{args.device}'}.json"
    return args


# ---- the plain way ----


class Plain:
    """The same edits with one call of the UNet for each prompt."""

    def __init__(self, sd, steps: int):
        self.sd, self.steps, self.times = sd, steps, [*sd.schedule.times(steps), 0]
        self.texts = {line: sd.encode_prompt(line) for line in (SOURCE, TARGET, "")}
        self.stored, self.mode = {}, ""

    def attention(self, change: Edit, progress: float):
        """Store the source's tables, and put them into the target's."""
        M, known = (part.to(self.sd.device) for part in alignment(self.sd.tokenizer, SOURCE, TARGET))

        def fn(probs: Tensor, layer: str, is_cross: bool) -> Tensor:
            if self.mode == "store":
                self.stored[layer] = probs
            elif self.mode == "use" and is_cross and progress < change.cross:
                return torch.where(known, self.stored[layer] @ M, probs)
            elif self.mode == "use" and not is_cross and progress < change.own:
                return self.stored[layer]
            return probs

        return fn

    def eps(self, zt: Tensor, t: int, line: str, mode: str) -> Tensor:
        self.mode = ""
        uncond = self.sd.unet_eps(zt, t, self.texts[""])
        self.mode = mode
        return combine(uncond, self.sd.unet_eps(zt, t, self.texts[line]), W)

    @torch.no_grad()
    def prompt_to_prompt(self, noise: Tensor) -> Tensor:
        source, target, change = noise, noise, Edit()
        for i, (t, s) in enumerate(zip(self.times, self.times[1:], strict=False)):
            with attention_hook(self.sd.unet, self.attention(change, i / self.steps)):
                eps_source = self.eps(source, t, SOURCE, "store")
                eps_target = self.eps(target, t, TARGET, "use")
            source = ddim_step(source, eps_source, t, s, self.sd.schedule)
            target = ddim_step(target, eps_target, t, s, self.sd.schedule)
        self.sd.decode(source)
        return self.sd.decode(target)

    def null_text(self, found: Inverted) -> Tensor:
        """The features at the last time."""
        sd, zt, against = self.sd, found.z_T, self.texts[""].clone()
        for i, (t, s) in enumerate(zip(self.times, self.times[1:], strict=False)):
            against = against.detach().clone().requires_grad_()
            optimizer = torch.optim.Adam([against], lr=1e-2 * (1 - i / 100))
            for _ in range(10):
                eps_hat = combine(sd.unet_eps(zt, t, against), sd.unet_eps(zt, t, self.texts[SOURCE]), W)
                loss = (ddim_step(zt, eps_hat, t, s, sd.schedule) - found.path[-2 - i]).square().mean()
                if loss < 1e-5 + 2e-5 * i:
                    break
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            with torch.no_grad():
                eps_hat = combine(sd.unet_eps(zt, t, against), sd.unet_eps(zt, t, self.texts[SOURCE]), W)
                zt = ddim_step(zt, eps_hat, t, s, sd.schedule)
        return against.detach()

    @torch.no_grad()
    def plug_and_play(self, found: Inverted) -> Tensor:
        layers, zt, kept = LAYERS[self.sd.defaults.settings], found.z_T, {}

        def features(module, args, output):
            kept["features"] = output if self.mode == "store" else kept["features"]
            return kept["features"] if self.mode == "store" or progress < 0.8 else output

        def own(probs, layer, is_cross):
            if is_cross or not layer.startswith(layers.own):
                return probs
            if self.mode == "store":
                self.stored[layer] = probs
            return self.stored[layer] if progress < 0.5 else probs

        handle, progress = self.sd.unet.get_submodule(layers.features[0]).register_forward_hook(features), 0.0
        with attention_hook(self.sd.unet, own):
            for i, (t, s) in enumerate(zip(self.times, self.times[1:], strict=False)):
                progress, self.mode = i / self.steps, "store"
                self.sd.unet_eps(found.path[-1 - i], t, self.texts[SOURCE])
                self.mode = "use"
                eps_hat = combine(*(self.sd.unet_eps(zt, t, self.texts[line]) for line in ("", TARGET)), W)
                zt = ddim_step(zt, eps_hat, t, s, self.sd.schedule)
        handle.remove()
        return self.sd.decode(zt)


# ---- timing ----


def seconds(fn, device: torch.device) -> tuple[float, Tensor, float | None]:
    """How long a call takes, what it returns, and its largest GPU memory in GiB."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
    start = time.perf_counter()
    found = fn()
    if device.type == "cuda":
        torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None
    return time.perf_counter() - start, found, peak


def main() -> None:
    args = arguments()
    on = torch.device(args.device)
    ours, theirs = (base_model(args, plain_dtype(args)) for _ in range(2))
    theirs.unet.requires_grad_(True)
    plain, noise, rows = Plain(theirs, args.steps), ours.noise(1, seed=args.seed), []
    picture = ours.sample(SOURCE, x_T=noise, w=W, steps=args.steps)
    found, again = (invert(sd, picture, SOURCE, steps=args.steps, fixed_point=1) for sd in (ours, theirs))
    ways = {
        "Prompt-to-Prompt": (lambda: edit(ours, SOURCE, TARGET, noise, w=W, steps=args.steps)[1],
                             lambda: plain.prompt_to_prompt(noise)),
        "null-text inversion": (lambda: null_text_inversion(ours, found, W).against[-1],
                                lambda: plain.null_text(again)),
        "Plug-and-Play": (lambda: plug_and_play(ours, found, TARGET, w=W), lambda: plain.plug_and_play(again)),
    }  # fmt: skip
    for what, (one, other) in ways.items():
        taken = {"course_lib": [], "plain way": []}
        for n in range(args.rounds + 1):  # the first round warms up
            turns = {"course_lib": one, "plain way": other}
            results = {name: seconds(turns[name], on) for name in sorted(turns, reverse=n % 2 == 1)}
            for name, (time_taken, *_) in results.items():
                taken[name] += [time_taken] if n else []
            release()
        ratios = [b / a for a, b in zip(taken["course_lib"], taken["plain way"], strict=True)]
        apart = (results["course_lib"][1].float() - results["plain way"][1].float()).abs().max().item()
        row = dict(what=what, seconds={name: round(statistics.median(times), 2) for name, times in taken.items()},
                   times_as_fast=round(statistics.median(ratios), 2), largest_difference=round(apart, 5),
                   gpu_gib={name: peak and round(peak, 2) for name, (*_, peak) in results.items()})  # fmt: skip
        if args.base == "toybox" and on.type == "cpu":
            row["target_seconds"] = TARGETS[what]
        print(json.dumps(row), flush=True)
        rows.append(row)
    result = dict(made_by="benchmarks/editing.py", rows=rows, base=args.base, steps=args.steps, rounds=args.rounds,
                  seed=args.seed, w=W,
                  device=device_name() if on.type != "cuda" else torch.cuda.get_device_name(), torch=torch.__version__,
                  threads=torch.get_num_threads(), date=datetime.date.today().isoformat())  # fmt: skip
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
