"""Intervals: against printed tables and closed forms, at their limits, and whether they cover what they should."""

import math

import pytest
import torch

from course_lib.evaluation import statistics
from course_lib.evaluation.statistics import Estimate, bootstrap, difference, jackknife, over_subjects, paired, share


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("n", "t"), [
    (2, 12.7062047), (3, 4.3026527), (4, 3.1824463), (10, 2.2621572), (23, 2.0738731), (31, 2.0422725),
    (121, 1.9799304),
])  # fmt: skip
def test_the_interval_of_a_mean_has_the_t_of_the_tables(n, t):
    values = randn(n)
    assert statistics.mean(values).half == pytest.approx(t * values.std().item() / n**0.5, rel=1e-7)


def test_a_mean_of_few_values():
    """1, 2, 3: standard error 1 / sqrt(3), two degrees of freedom."""
    found = statistics.mean([1.0, 2.0, 3.0])
    assert (found.value, found.n) == (2.0, 3) and found.half == pytest.approx(4.3026527 / 3**0.5, abs=1e-6)
    alone = statistics.mean([0.7])
    assert alone.low == -math.inf and "no interval" in f"{alone:.2f}" and alone.errors == (0.0, 0.0)
    with pytest.raises(ValueError, match="values: expected at least one"):
        statistics.mean([])


@pytest.mark.parametrize("n", [4, 8, 23])
def test_the_interval_of_a_mean_covers_it_95_times_in_100(n):
    runs = 2000
    rows = 7 + 3 * randn(runs, n)
    inside = sum(found.low <= 7 <= found.high for found in map(statistics.mean, rows)) / runs
    assert inside == pytest.approx(0.95, abs=0.02)  # 1.96 would give 0.86 at n = 4


@pytest.mark.parametrize(("hits", "n", "low", "high"), [
    (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (5, 10, 0.2366, 0.7634), (81, 263, 0.2553, 0.3662),
    (15, 148, 0.0624, 0.1605), (1, 29, 0.0061, 0.1718),
])  # fmt: skip
def test_a_share_has_wilsons_interval(hits, n, low, high):
    """The last three are printed in Newcombe 1998, table I."""
    found = share(hits, n)
    assert (found.low, found.high) == (pytest.approx(low, abs=1e-4), pytest.approx(high, abs=1e-4))
    assert share([1] * hits + [0] * (n - hits)) == found


def test_a_share_of_all_is_not_printed_as_certain():
    assert f"{share([True] * 8):.2f}" == "1.00 (0.68 to 1.00)"
    with pytest.raises(ValueError, match="hits: expected 0 and 1 only"):
        share([0.5, 1.0])
    with pytest.raises(ValueError, match=r"got 3 of 2"):
        share(3, 2)


def test_a_difference_of_two_shares():
    """Newcombe 1998, part 2, table II, method 10: 56 of 70 against 48 of 80, and 10 of 10 against 0 of 10."""
    found = difference(share(56, 70), share(48, 80))
    assert (found.low, found.high) == (pytest.approx(0.0524, abs=1e-4), pytest.approx(0.3339, abs=1e-4))
    found = difference(share(10, 10), share(0, 10))
    assert (found.low, found.high) == (pytest.approx(0.6075, abs=1e-4), pytest.approx(1.0, abs=1e-9))


def test_half_widths_of_independent_means_add_in_squares():
    found = difference(Estimate(5.0, 2.0, 8.0, 9), Estimate(1.0, -3.0, 5.0, 7))
    assert (found.value, found.low, found.high) == (4.0, -1.0, 9.0)


def test_paired_values_share_their_noise():
    one = randn(50, seed=1)
    found = paired(one + 0.1, one)
    assert found.value == pytest.approx(0.1) and found.half < 1e-9
    with pytest.raises(ValueError, match=r"expected the same shape, got \(50,\) and \(49,\)"):
        paired(one, one[1:])


def test_the_jackknife_of_a_mean_is_the_means_own_interval():
    values = randn(20, seed=2)
    left_out = [values[torch.arange(20) != k].mean() for k in range(20)]
    assert jackknife(values.mean().item(), left_out).half == pytest.approx(statistics.mean(values).half, rel=1e-9)


def test_subjects_count_once_however_many_prompts_they_have():
    groups = [torch.full((n,), level) for n, level in ((23, 0.1), (20, 0.2), (5, 0.3), (23, 0.4))]
    found = over_subjects(groups)
    assert found.value == pytest.approx(0.25) and found.n == 4
    assert found.half == pytest.approx(statistics.mean([0.1, 0.2, 0.3, 0.4]).half)
    assert over_subjects([[1.0, 2.0, 3.0]]) == statistics.mean([1.0, 2.0, 3.0])  # one subject: its prompts


def test_the_bootstrap_redraws_every_level():
    """Its variance is that of subjects + seeds + prompts; with one level varying it is that level's alone."""
    S, K, P = 40, 3, 20
    subject, seed, prompt = 1.0 * randn(S, 1, 1, seed=3), 0.8 * randn(S, K, 1, seed=4), 0.5 * randn(S, K, P, seed=5)
    tree = (subject + seed + prompt).tolist()
    found = bootstrap(tree, draws=1500)
    expected = statistics.mean((subject + seed + prompt).mean(dim=(1, 2)))
    assert found.value == pytest.approx(expected.value) and found.n == S
    assert expected.half < found.half < 1.35 * expected.half  # seeds and prompts are redrawn within subjects as well
    same = bootstrap([[[0.3, 0.3]] * 2] * 3, draws=100)
    assert same.low == pytest.approx(0.3) and same.high == pytest.approx(0.3)
    one = bootstrap([[values] for values in [[0.0, 1.0] * 50]], draws=1500)  # one subject, one seed: prompts only
    assert one.half == pytest.approx(1.96 * 0.5 / 10, rel=0.1)


def test_how_an_estimate_is_printed_and_kept():
    assert f"{Estimate(0.1519, 0.1319, 0.1719, 4):+.3f}" == "+0.152 ± 0.020"
    assert str(Estimate(0.5, 0.2, 0.9, 4)) == "0.500 (0.200 to 0.900)"
    assert f"{statistics.mean([1.0] * 8):.2f}" == "1.00 (all 8 equal)"
    assert f"{Estimate(**Estimate(0.00355, -0.03111, 0.03821, 23).as_dict()):+.3f}" == "+0.004 ± 0.035"  # rounded
    assert Estimate(0.5, 0.2, 0.9, 4).errors == (pytest.approx(0.3), pytest.approx(0.4))
    assert Estimate(0.5, -math.inf, math.inf, 1).as_dict() == dict(value=0.5, low=None, high=None, n=1)


def test_paired_shares_by_newcombe():
    """Newcombe 1998, Table II, method 10: cells 36, 12, 2, 0 give 0.2 with 0.0569 to 0.3404."""
    one = torch.tensor([1.0] * 36 + [1.0] * 12 + [0.0] * 2)
    other = torch.tensor([1.0] * 36 + [0.0] * 12 + [1.0] * 2)
    found = statistics.paired_shares(one, other)
    assert (round(found.value, 4), round(found.low, 4), round(found.high, 4), found.n) == (0.2, 0.0569, 0.3404, 50)


def test_paired_shares_of_equal_hits_have_a_width():
    hits = torch.tensor([1.0, 0.0] * 10)
    found = statistics.paired_shares(hits, hits)
    assert found.value == 0 and found.low < -0.01 and found.high > 0.01
    with pytest.raises(ValueError, match="one, other: expected the same shape"):
        statistics.paired_shares(hits, hits[:3])
