"""Algorithm 1 as a training loop, with averaged weights; it also runs in several processes.

Derived in: notebooks/01_ddpm_training.ipynb, section "Algorithm 1".
A run that can be stopped and resumed: training/run.py.
"""

import copy
from collections.abc import Iterator
from functools import partial

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from course_lib.diffusion.ddpm import simple_loss, step_generator
from course_lib.diffusion.guidance import drop_condition
from course_lib.diffusion.schedule import Schedule
from course_lib.environment import from_uint8, on_cpu


class EMA:
    """An exponential moving average of the weights, which gives better pictures than the noisy last weights.

    shadow <- d shadow + (1 - d) weights.  Source: Ho et al. 2020, appendix B (d = 0.9999 over 800,000 steps).
    Differs from the paper: d grows as (1 + n) / (10 + n) up to `decay`, so that a short run is averaged too.
    `ema.model` is the averaged copy. Buffers, such as the statistics of a batch norm, are copied as they are.
    decay: from 0 (no averaging) to 1.
    Derived in: notebooks/01_ddpm_training.ipynb, section "Algorithm 1".
    """

    def __init__(self, model: nn.Module, decay: float = 0.999):
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay, self.updates = decay, 0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move the average towards the weights of `model`, which has just made a step."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        average = get_ema_multi_avg_fn(decay)  # shadow.lerp_(weight, 1 - decay) for all weights in one kernel
        average(list(self.model.parameters()), list(model.parameters()), self.updates)
        for shadow, buffer in zip(self.model.buffers(), model.buffers()):
            shadow.copy_(buffer)


def random_batch(
    images: Tensor, labels: Tensor | None, count: int, generator: torch.Generator, *,
    flip: bool = True, num_classes: int | None = None, p_drop: float = 0.1,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Draw a batch: `count` images, half of them mirrored, and their labels, some of them dropped.

    images: (N, C, H, W) uint8, on the generator's device.  labels: (N,) ints on it, or None.  num_classes: the label
    that stands for "no label".  p_drop: share of the labels that are dropped (Ho & Salimans 2021, Algorithm 1).
    Returns (count, C, H, W) float32 in [-1, 1], channels-last, and (count,) labels or None.
    """
    rows = torch.randint(len(images), (count,), device=images.device, generator=generator)
    x0 = from_uint8(images[rows])
    if flip:
        mirrored = torch.rand((count, 1, 1, 1), device=images.device, generator=generator) < 0.5
        x0 = torch.where(mirrored, x0.flip(-1), x0)
    x0 = x0.contiguous(memory_format=torch.channels_last)
    if labels is not None:
        labels = drop_condition(labels[rows], num_classes, p_drop, generator)
    return x0, labels


class Training:
    """Algorithm 1 on a set of images held in memory: `for step, loss in training.steps(500): ...`

    Every random number of step n (images, flips, times, noises, dropped labels) comes from a generator seeded with
    (seed, process, n), so they do not depend on earlier steps.
    Source: Ho et al. 2020, Algorithm 1; labels are dropped as in Ho & Salimans 2021, Algorithm 1.

    images: (N, C, H, W) uint8.  labels: (N,) ints or None.  total_steps: where the learning rate reaches 0 after
    falling over the last `cooldown` share of the steps; None keeps it constant.  p_drop: share of labels dropped.
    weighting: of the loss, see `simple_loss`.  `ema.model` holds the averaged weights: sample with it.
    """

    def __init__(
        self, model: nn.Module, schedule: Schedule, images: Tensor, labels: Tensor | None = None, *,
        batch_size: int = 64, lr: float = 4e-4, warmup: int = 200, total_steps: int | None = None,
        cooldown: float = 0.3, weighting: str = "eps", p_drop: float = 0.1, flip: bool = True,
        ema_decay: float = 0.999, clip: float = 1.0, seed: int = 0,
        accelerator: Accelerator | None = None,
    ):  # fmt: skip
        if images.dtype != torch.uint8 or images.ndim != 4:
            raise ValueError(f"images: expected uint8 (N, C, H, W), got {images.dtype} {tuple(images.shape)}")
        if labels is not None and len(labels) != len(images):
            raise ValueError(f"labels: expected one per image ({len(images)}), got {len(labels)}")
        self.num_classes = getattr(model, "num_classes", None)
        if labels is not None and self.num_classes is None:
            raise ValueError("model: expected a network with num_classes set, as labels were given; got one without")
        self.accelerator = accelerator or Accelerator(cpu=on_cpu())
        device = self.accelerator.device
        self.net = model.to(device, memory_format=torch.channels_last).train()
        self.ema = EMA(self.net, ema_decay)
        # fused: one kernel updates all weights, instead of several for each of them
        optimizer = torch.optim.AdamW(self.net.parameters(), lr=lr, weight_decay=0.0, fused=device.type != "mps")
        self.model, self.optimizer = self.accelerator.prepare(self.net, optimizer)
        self.schedule, self.images, self.labels = schedule, images.to(device), labels
        if labels is not None:
            self.labels = torch.as_tensor(labels).long().to(device)
        self.batch_size, self.lr, self.warmup = batch_size, lr, warmup
        self.total_steps, self.cooldown, self.weighting = total_steps, cooldown, weighting
        self.p_drop, self.flip, self.clip, self.seed = p_drop, flip, clip, seed
        self.step = 0

    def learning_rate(self, step: int) -> float:
        """It rises over `warmup` steps, stays constant, and falls linearly to 0 over the last `cooldown` share."""
        rate = min(1.0, step / self.warmup) if self.warmup else 1.0
        if self.total_steps:
            rate = min(rate, max(0.0, (self.total_steps - step) / (self.cooldown * self.total_steps)))
        return self.lr * rate

    def steps(self, count: int) -> Iterator[tuple[int, Tensor]]:
        """Train `count` steps; yields (step, loss) after each. The loss stays on the device: read it rarely."""
        for _ in range(count):
            self.step += 1
            generator = step_generator(self.seed, self.accelerator.process_index, self.step, on=self.images.device)
            x0, label = random_batch(self.images, self.labels, self.batch_size, generator,
                                     flip=self.flip, num_classes=self.num_classes, p_drop=self.p_drop)  # fmt: skip
            with self.accelerator.autocast():
                loss = simple_loss(partial(self.model, label=label), x0, self.schedule, generator, self.weighting)
            self.accelerator.backward(loss)
            self.accelerator.clip_grad_norm_(self.net.parameters(), self.clip)
            for group in self.optimizer.param_groups:
                group["lr"] = self.learning_rate(self.step)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.ema.update(self.net)
            yield self.step, loss.detach()
