"""Style fidelity: near 0 for plain renderings and near 1 in the style, of objects that the scorer never saw."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from course_lib.evaluation.judge import load_judge
from course_lib.evaluation.personalized import pixels
from course_lib.evaluation.style import StyleScorer, grams
from course_lib.toybox import subjects
from course_lib.toybox.world import sample_spec


def specs(fields):
    return [sample_spec(np.random.default_rng([k, 9]), **field) for k, field in enumerate(fields)]


def drawn(specs, style):
    return pixels([replace(spec, style=style) for spec in specs])


@pytest.mark.parametrize("style", ["chalk", "riso"])
def test_it_knows_a_style_on_other_objects(style):
    some = specs([dict(relation=None, style="plain")] * 100)
    scorer = StyleScorer(load_judge(), drawn(some, style), drawn(some, "plain"))
    others = specs([field for _, field in subjects.prompts(style)])
    found = {name: scorer(drawn(others, name)) for name in ("plain", style, "watercolour", "pixel art")}
    assert found[style].shape == (20,)
    assert found["plain"].mean().abs() < 0.15 and (found[style].mean() - 1).abs() < 0.15
    assert all(found[style].min() > value.max() for name, value in found.items() if name != style)


def test_grams_forget_where():
    judge, x = load_judge(), torch.rand(2, 3, 64, 64) * 2 - 1
    flipped = grams(judge, torch.cat([x, x[:1]]))
    assert torch.equal(flipped[0], flipped[2]) and flipped.dtype == torch.float64
    tiles = torch.rand(1, 3, 16, 16).repeat(1, 1, 4, 4) * 2 - 1
    moved = grams(judge, torch.cat([tiles, tiles.roll(16, 3)]))
    assert torch.allclose(moved[0], moved[1])
