"""Style fidelity: whether pictures are made in a style, whatever they show.

Used by: notebooks/15_faces_and_styles.ipynb, section "What a style is", and measurements/styles.py.

Gatys et al. 2016, section 2.2, describe a style by Gram matrices of a network's layers, which keep how often two
features occur together and forget where. Here these are the judge's first layers. A bare distance of Gram matrices
depends on the scene as much as on the style, so a ridge regression learns the direction that parts renderings in the
style from plain ones of the same scenes.
"""

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from course_lib.data.pictures import to_tensor
from course_lib.evaluation.judge import Judge
from course_lib.toybox.world import Spec, render

RIDGE = 0.001  # of the summed squares of all features


def drawings(specs: Sequence[Spec]) -> Tensor:
    """The renderer's pictures as a style is learnt from them: of 512 pixels, made smaller. (N, 3, 64, 64) in [-1, 1].

    Drawn at 64 pixels right away, chalk has a coarser grain and riso larger dots.
    """
    return torch.stack([to_tensor(Image.fromarray(render(spec, 512)), 64) for spec in specs])


class StyleScorer:
    """Places pictures between plain renderings (0) and renderings in the style (1).

    styled, plain: (N, 3, 64, 64) in [-1, 1], `drawings` of the same specs in the style and without it.
    """

    def __init__(self, judge: Judge, styled: Tensor, plain: Tensor):
        self.judge = judge
        X = torch.cat([grams(judge, styled), grams(judge, plain)])
        y = torch.cat([torch.ones(len(styled)), torch.zeros(len(plain))]).double() - 0.5
        self.mean = X.mean(0)
        X = X - self.mean
        K = X @ X.T
        self.w = X.T @ torch.linalg.solve(K + RIDGE * K.trace() * torch.eye(len(K)), y)  # (X^T X + r I)^-1 X^T y
        self.zero, self.one = 0.0, 1.0
        self.zero, self.one = (self(x).mean().item() for x in (plain, styled))

    def __call__(self, x: Tensor) -> Tensor:
        """Style fidelity of each picture, (N,): 0 on average for plain renderings, 1 for those in the style."""
        return (((grams(self.judge, x) - self.mean) @ self.w - self.zero) / (self.one - self.zero)).float()


@torch.no_grad()
def grams(judge: Judge, x: Tensor) -> Tensor:
    """G_ij = sum over places of h_i h_j of the layers at 32x32 and 16x16, each of norm 1: (N, D) in float64."""
    h, rows = judge.stem(x.to(next(judge.parameters()).device).float()), []
    for layer in (h, judge.widen[0](h)):
        G = torch.einsum("nihw,njhw->nij", layer, layer).flatten(1)
        rows.append(G / G.norm(dim=1, keepdim=True))
    return torch.cat(rows, dim=1).double().cpu()
