"""A small UNet that predicts the noise in an image.

Derived in: notebooks/01_ddpm_training.ipynb, section "The network, piece by piece".

The architecture follows Ho et al. 2020 (appendix B): residual blocks that get the time, self-attention at a middle
resolution, a path down, a path up, and a skip connection from every block down to its counterpart up. Two optional
inputs are for later notebooks: a class label (03) and text features (05).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from course_lib.diffusion.ddpm import eps_from_v
from course_lib.diffusion.schedule import by_name


def time_embedding(t: Tensor, dim: int) -> Tensor:
    """Write the time t as sines and cosines of geometrically spaced frequencies.

    emb(t) = [cos(t w_1), ..., cos(t w_{dim/2}), sin(t w_1), ...],  w_i = 10000^(-2(i-1)/dim)
    Source: Vaswani et al. 2017, section 3.5; used for diffusion by Ho et al. 2020.

    t: (B,) times in 1..T.  dim: even number of features.  Returns (B, dim) float32.
    Derived in: notebooks/01_ddpm_training.ipynb, section "The network, piece by piece".
    """
    frequencies = torch.exp(-math.log(10_000) * torch.arange(dim // 2, device=t.device) / (dim // 2))
    angles = t[:, None].float() * frequencies  # (B, dim/2)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions that add to their input; the time enters between them as one number per channel."""

    def __init__(self, in_channels: int, out_channels: int, emb_dim: int, dropout: float = 0.0):
        super().__init__()
        self.norm1 = nn.GroupNorm(8, in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.emb_proj = nn.Linear(emb_dim, out_channels)
        self.norm2 = nn.GroupNorm(8, out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.skip = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()
        nn.init.zeros_(self.conv2.weight)  # a new block starts as the identity, which makes early training stable
        nn.init.zeros_(self.conv2.bias)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.emb_proj(F.silu(emb))[:, :, None, None]
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return self.skip(x) + h


class Attention(nn.Module):
    """Attention of every pixel to every other pixel, or to every text token if `context_dim` is given.

    softmax(Q K^T / sqrt(d)) V with Q from the image, K and V from the image (self) or from the text (cross).
    Source: Vaswani et al. 2017, Eq. 1; cross-attention in a UNet: Rombach et al. 2022, section 3.3.
    """

    def __init__(self, channels: int, context_dim: int | None = None, head_dim: int = 32):
        super().__init__()
        self.heads = max(1, channels // head_dim)
        self.norm = nn.GroupNorm(8, channels)
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(context_dim or channels, channels, bias=False)
        self.to_v = nn.Linear(context_dim or channels, channels, bias=False)
        self.to_out = nn.Linear(channels, channels)
        nn.init.zeros_(self.to_out.weight)
        nn.init.zeros_(self.to_out.bias)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        B, C, H, W = x.shape
        pixels = self.norm(x).permute(0, 2, 3, 1).reshape(B, H * W, C)  # (B, HW, C)
        context = pixels if context is None else context  # (B, L, D)

        def split_heads(y: Tensor) -> Tensor:
            return y.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, L, d)

        q, k, v = split_heads(self.to_q(pixels)), split_heads(self.to_k(context)), split_heads(self.to_v(context))
        probs = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(dim=-1)  # (B, heads, HW, L)
        out = probs @ v  # (B, heads, HW, d)
        out = self.to_out(out.transpose(1, 2).reshape(B, H * W, C))
        return x + out.reshape(B, H, W, C).permute(0, 3, 1, 2)


class Stage(nn.Module):
    """One residual block, then self-attention and cross-attention, where asked for."""

    def __init__(self, in_channels, out_channels, emb_dim, attention=False, context_dim=None, dropout=0.0):
        super().__init__()
        self.block = ResidualBlock(in_channels, out_channels, emb_dim, dropout)
        self.self_attention = Attention(out_channels) if attention else None
        self.cross_attention = Attention(out_channels, context_dim) if attention and context_dim else None

    def forward(self, x: Tensor, emb: Tensor, context: Tensor | None) -> Tensor:
        x = self.block(x, emb)
        if self.self_attention is not None:
            x = self.self_attention(x)
        if self.cross_attention is not None and context is not None:
            x = self.cross_attention(x, context)
        return x


class UNet(nn.Module):
    """eps_hat = UNet(xt, t, label, context): the predicted noise in x_t.

    Source: Ho et al. 2020, appendix B (the network); Ho & Salimans 2021 (the extra "no label" row).
    Derived in: notebooks/01_ddpm_training.ipynb, section "The network, piece by piece".
    Differs from the paper: smaller; every block zero-initialised; averaging instead of strided convolution.

    channels: width at each resolution, from the full one down.  blocks: residual blocks per resolution.
    attention: for each resolution, whether its blocks have attention.  num_classes: None for no label input.
    context_dim: width of the text features, None for no text input.  patch: first fold patch x patch pixels into one
    pixel with patch^2 times the channels: at 2, all work is done at half the resolution.
    schedule: the name of the noise schedule (linear, cosine, scaled_linear): the layers then predict v, and
    eps_hat = sqrt(1 - alpha_bar_t) x_t + sqrt(alpha_bar_t) v_hat (Salimans & Ho 2022, appendix D), so that the layers
    need not copy the noise from input to output.  None: the layers predict eps.
    Raises ValueError if the sizes do not fit together.
    """

    def __init__(
        self,
        channels: tuple[int, ...] = (64, 128, 256),
        blocks: int = 1,
        attention: tuple[bool, ...] = (False, True, False),
        num_classes: int | None = None,
        context_dim: int | None = None,
        in_channels: int = 3,
        patch: int = 1,
        schedule: str | None = None,
        dropout: float = 0.0,
    ):
        super().__init__()
        if len(attention) != len(channels):
            raise ValueError(f"attention: expected one flag per entry of channels ({len(channels)}), got {attention}")
        if any(c % 32 for c in channels):  # also keeps the norm groups whole where two widths are concatenated
            raise ValueError(f"channels: expected multiples of 32 (8 norm groups, heads of 32), got {channels}")
        self.config = dict(
            channels=list(channels), blocks=blocks, attention=list(attention), num_classes=num_classes,
            context_dim=context_dim, in_channels=in_channels, patch=patch, schedule=schedule, dropout=dropout,
        )  # fmt: skip
        self.num_classes, self.patch = num_classes, patch
        self.schedule = by_name(schedule) if schedule else None
        emb_dim = 4 * channels[0]
        self.time_mlp = nn.Sequential(nn.Linear(channels[0], emb_dim), nn.SiLU(), nn.Linear(emb_dim, emb_dim))
        # One row per class, and a last one for "no label", which guidance needs.
        self.label_embedding = nn.Embedding(num_classes + 1, emb_dim) if num_classes else None

        self.conv_in = nn.Conv2d(in_channels * patch**2, channels[0], 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        width, skips = channels[0], [channels[0]]
        for level, (c, attend) in enumerate(zip(channels, attention)):
            for _ in range(blocks):
                self.down.append(Stage(width, c, emb_dim, attend, context_dim, dropout))
                width = c
                skips.append(width)
            if level < len(channels) - 1:
                self.down.append(nn.AvgPool2d(2))
                skips.append(width)
        self.middle = nn.ModuleList(
            [Stage(width, width, emb_dim, True, context_dim, dropout), Stage(width, width, emb_dim, dropout=dropout)]
        )
        for level, (c, attend) in reversed(list(enumerate(zip(channels, attention)))):
            for _ in range(blocks + 1):
                self.up.append(Stage(width + skips.pop(), c, emb_dim, attend, context_dim, dropout))
                width = c
            if level > 0:
                self.up.append(nn.Upsample(scale_factor=2, mode="nearest"))
        self.norm_out = nn.GroupNorm(8, width)
        self.conv_out = nn.Conv2d(width, in_channels * patch**2, 3, padding=1)
        nn.init.zeros_(self.conv_out.weight)
        nn.init.zeros_(self.conv_out.bias)

    def forward(
        self, xt: Tensor, t: Tensor | int, label: Tensor | None = None, context: Tensor | None = None
    ) -> Tensor:
        """Predict the noise.

        xt: (B, C, H, W), H and W divisible by 2^(levels - 1).  t: an int or (B,) ints in 1..T.
        label: (B,) ints in 0..num_classes, where num_classes means "no label"; None is "no label" for all.
        context: (B, L, context_dim) text features; None skips the cross-attention.  Returns (B, C, H, W).
        """
        if not torch.is_tensor(t):
            t = torch.full((len(xt),), t, device=xt.device)
        emb = self.time_mlp(time_embedding(t, self.time_mlp[0].in_features))  # (B, emb_dim)
        if self.label_embedding is not None:
            if label is None:
                label = torch.full((len(xt),), self.num_classes, device=xt.device)
            emb = emb + self.label_embedding(label)

        h = self.conv_in(F.pixel_unshuffle(xt, self.patch))
        skips = [h]
        for stage in self.down:
            h = stage(h, emb, context) if isinstance(stage, Stage) else stage(h)
            skips.append(h)
        for stage in self.middle:
            h = stage(h, emb, context)
        for stage in self.up:
            h = stage(torch.cat([h, skips.pop()], dim=1), emb, context) if isinstance(stage, Stage) else stage(h)
        out = F.pixel_shuffle(self.conv_out(F.silu(self.norm_out(h))), self.patch)
        return out if self.schedule is None else eps_from_v(xt, t, out, self.schedule)
