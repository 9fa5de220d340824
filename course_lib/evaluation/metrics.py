"""Measuring samples: how far two sets of pictures are apart, and whether a picture shows its class.

Used by: notebooks/02_ddpm_sampling.ipynb and notebooks/03_classifier_free_guidance.ipynb, section "Measured".

A small CIFAR classifier, trained and shipped here, gives the feature space. Its Fréchet distance is not the FID of
papers (that one needs Inception's weights: see `inception_fid`), so the two must not be compared.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from course_lib.diffusion import checkpoint
from course_lib.environment import CHECKPOINTS, from_uint8

Gaussian = tuple[Tensor, Tensor]  # mean (D,) and covariance (D, D), float64


class SmallClassifier(nn.Module):
    """A small residual network for 32x32 pictures; its last hidden layer is the feature space of the metrics.

    width: channels at 16x16; twice and four times as many at 8x8 and 4x4. Features have 4 * width numbers.
    """

    def __init__(self, width: int = 64, num_classes: int = 10):
        super().__init__()
        self.config = dict(width=width, num_classes=num_classes)

        def conv(i: int, o: int) -> nn.Sequential:
            return nn.Sequential(nn.Conv2d(i, o, 3, padding=1, bias=False), nn.BatchNorm2d(o), nn.ReLU(inplace=True))

        self.stem = conv(3, width // 2)  # 32x32
        self.stages = nn.ModuleList(
            nn.ModuleDict({"widen": conv(i, o), "block": conv(o, o)})
            for i, o in [(width // 2, width), (width, 2 * width), (2 * width, 4 * width)]
        )
        self.head = nn.Linear(4 * width, num_classes)

    def features(self, x: Tensor) -> Tensor:
        """x: (B, 3, 32, 32) in [-1, 1].  Returns (B, 4 * width)."""
        h = self.stem(x)
        for stage in self.stages:
            h = stage["widen"](F.max_pool2d(h, 2))
            h = h + stage["block"](h)
        return h.amax(dim=(2, 3))

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, 3, 32, 32) in [-1, 1].  Returns logits (B, num_classes)."""
        return self.head(self.features(x))


def load_classifier(
    device: torch.device | str = "cpu", name: str = "classifier-cifar10"
) -> tuple[SmallClassifier, Gaussian]:
    """A shipped classifier, and the Gaussian of its features on the 50,000 real training images.

    name: of its folder in data/checkpoints: "classifier-cifar10" or "classifier-toybox10".
    """
    folder = CHECKPOINTS / name
    real = load_file(folder / "real_features.safetensors")
    return checkpoint.load(folder, device, SmallClassifier), (real["mean"], real["cov"])


@torch.no_grad()
def features_and_logits(classifier: SmallClassifier, images: Tensor, batch_size: int = 500) -> tuple[Tensor, Tensor]:
    """Both outputs of the classifier for a whole set.  images: (N, 3, 32, 32), in [-1, 1] or uint8."""
    device = next(classifier.parameters()).device
    rows = []
    for batch in images.split(batch_size):
        x = batch.to(device).float()
        x = from_uint8(x) if images.dtype == torch.uint8 else x.clamp(-1, 1)
        rows.append(classifier.features(x.contiguous(memory_format=torch.channels_last)))
    features = torch.cat(rows)
    return features.cpu(), classifier.head(features).cpu()


def gaussian(features: Tensor) -> Gaussian:
    """The mean (D,) and covariance (D, D) of a cloud of features, in float64.

    features: (N, D), N > D: a smaller cloud is flat in some directions, and its distances come out too large.
    """
    if features.ndim != 2 or len(features) <= features.shape[1]:
        raise ValueError(f"features: expected (N, D) with N > D, got {tuple(features.shape)}; use more pictures")
    features = features.double()
    return features.mean(0), features.T.cov()


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """The distance between two Gaussians, each one a cloud of features.

    ||m_a - m_b||^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)).  Source: Heusel et al. 2017, Eq. 6 (FID).
    a, b: as `gaussian` returns them.  Returns a number >= 0 (rounding can leave a tiny negative one: cut to 0).
    """
    (mean_a, cov_a), (mean_b, cov_b) = a, b
    # The root of S_a S_b has the same trace as the root of the symmetric S_a^(1/2) S_b S_a^(1/2).
    values, vectors = torch.linalg.eigh(cov_a)
    root_a = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root_a @ cov_b @ root_a).clamp(min=0).sqrt().sum()
    return max(0.0, ((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross).item())


def frechet_left_out(features: Tensor, real: Gaussian, parts: int = 10) -> list[float]:
    """The distance to `real` without each of the parts of the samples in turn, for `statistics.jackknife`.

    features: (N, D) of samples whose classes come in turn, so that a part has all ten; [] if N is too small for D.
    """
    if len(features) * (parts - 1) <= features.shape[1] * parts:
        return []
    part = torch.arange(len(features)) // 10 % parts
    return [round(frechet_distance(gaussian(features[part != k]), real), 3) for k in range(parts)]


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """The share of pictures whose most likely class is the one asked for, in [0, 1].  logits: (N, K); labels: (N,)."""
    return (logits.argmax(dim=-1) == labels.to(logits.device)).float().mean().item()


def diversity(features: Tensor, labels: Tensor) -> float:
    """How different pictures of one class are: mean distance of two features of the same class.

    features: (N, D).  labels: (N,).  Returns the mean over classes with at least two pictures.
    """
    rows = [features[labels == c] for c in labels.unique()]
    rows = [torch.pdist(r.float()).mean() for r in rows if len(r) > 1]
    if not rows:
        raise ValueError("labels: expected at least two pictures of one class, got none")
    return torch.stack(rows).mean().item()


@torch.no_grad()
def clip_t(clip: nn.Module, tokenizer, x: Tensor, prompts: Sequence[str]) -> Tensor:
    """CLIP-T: the cosine of each picture with its own prompt, (B,).  Source: Ruiz et al. 2022, section 4.1.

    clip: a `transformers.CLIPModel`; x: (B, 3, H, W) in [-1, 1], on its device; prompts: B.
    """
    ids = tokenizer(list(prompts), padding="longest", truncation=True, return_tensors="pt").input_ids.to(x.device)
    image = clip.visual_projection(clip.vision_model(pixel_values=x).pooler_output)
    text = clip.text_projection(clip.text_model(input_ids=ids).pooler_output)
    return F.cosine_similarity(image, text)


def inception_fid(samples: Tensor, real: Tensor) -> float:
    """The FID of papers, through torchmetrics (extra `eval`), which downloads Inception's weights when first used.

    samples, real: (N, 3, H, W) uint8.  Raises ConnectionError in one sentence if they cannot be loaded.
    It was never run with these weights (no network); all distances in the course are `frechet_distance`'s.
    """
    try:
        from torchmetrics.image.fid import FrechetInceptionDistance

        metric = FrechetInceptionDistance(feature=2048)
    except Exception as error:
        raise ConnectionError(
            "Inception-FID needs `pip install -e .[eval]` and, once, a network to fetch Inception's weights; "
            f"frechet_distance works without. Reason: {error}"
        ) from None
    for batch in real.split(100):
        metric.update(batch, real=True)
    for batch in samples.split(100):
        metric.update(batch, real=False)
    return metric.compute().item()
