"""The measures: against closed forms and independent computations, and at their limits."""

import sys
from types import SimpleNamespace

import pytest
import torch

from course_lib.evaluation.metrics import (
    SmallClassifier,
    accuracy,
    clip_t,
    diversity,
    features_and_logits,
    frechet_distance,
    frechet_left_out,
    gaussian,
    inception_fid,
    load_classifier,
)


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cloud(seed, spread=1.0, D=6):
    return gaussian(spread * randn(200, D, seed=seed) @ randn(D, D, seed=seed + 10) + seed)


def test_frechet_distance_to_itself_is_zero():
    assert frechet_distance(cloud(1), cloud(1)) == pytest.approx(0, abs=1e-10)


def test_frechet_distance_is_symmetric():
    assert frechet_distance(cloud(1), cloud(2)) == pytest.approx(frechet_distance(cloud(2), cloud(1)), rel=1e-10)


def test_frechet_distance_of_axis_aligned_gaussians():
    """sum (m_a - m_b)^2 + (s_a - s_b)^2 over the axes."""
    m_a, m_b, s_a, s_b = (randn(5, seed=seed) for seed in range(4))
    s_a, s_b = s_a.abs(), s_b.abs()
    expected = ((m_a - m_b) ** 2 + (s_a - s_b) ** 2).sum().item()
    assert frechet_distance((m_a, (s_a**2).diag()), (m_b, (s_b**2).diag())) == pytest.approx(expected, rel=1e-10)


def test_frechet_distance_by_another_way():
    """tr (S_a S_b)^(1/2) from the eigenvalues of the product itself, which is not symmetric."""
    (m_a, S_a), (m_b, S_b) = cloud(1), cloud(2)
    root = torch.linalg.eigvals(S_a @ S_b).sqrt().sum().real
    expected = ((m_a - m_b).square().sum() + S_a.trace() + S_b.trace() - 2 * root).item()
    assert frechet_distance((m_a, S_a), (m_b, S_b)) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_of_flat_clouds():
    """A singular covariance has tiny negative eigenvalues, which must not become NaN."""
    features = randn(100, 6)
    features[:, 3:] = features[:, :3] @ randn(3, 3, seed=1)
    assert frechet_distance(gaussian(features), gaussian(features)) == pytest.approx(0, abs=1e-5)


def test_gaussian_is_mean_and_covariance():
    features = randn(50, 3).float()
    mean, cov = gaussian(features)
    assert mean.dtype == cov.dtype == torch.float64
    centred = features.double() - features.double().mean(0)
    torch.testing.assert_close(mean, features.double().mean(0))
    torch.testing.assert_close(cov, centred.T @ centred / 49)


@pytest.mark.parametrize("shape", [(3, 3), (2, 5), (10,)])
def test_too_few_features_are_refused(shape):
    with pytest.raises(ValueError, match=r"^features: expected \(N, D\) with N > D, got "):
        gaussian(torch.zeros(shape))


def test_accuracy_is_the_share_of_right_answers():
    logits = torch.eye(4)[[0, 1, 2, 3, 0]]
    assert accuracy(logits, torch.tensor([0, 1, 2, 3, 1])) == pytest.approx(0.8)


def test_diversity_is_the_mean_distance_within_a_class():
    features = torch.tensor([[0.0, 0], [3, 4], [10, 10], [10, 11], [10, 13], [99, 99]])
    labels = torch.tensor([0, 0, 1, 1, 1, 2])  # distances 5; 1, 3, 2; none
    assert diversity(features, labels) == pytest.approx((5 + 2) / 2)
    assert diversity(torch.ones(4, 3), torch.zeros(4)) == 0
    with pytest.raises(ValueError, match=r"^labels: expected at least two pictures of one class"):
        diversity(torch.ones(2, 3), torch.tensor([0, 1]))


def test_clip_t_is_the_cosine_of_picture_and_prompt():
    class Tower(torch.nn.Module):
        def forward(self, pixel_values=None, input_ids=None):
            x = pixel_values.flatten(1) if pixel_values is not None else input_ids.float()
            return SimpleNamespace(pooler_output=x)

    clip = torch.nn.Module()
    clip.vision_model = clip.text_model = Tower()
    clip.visual_projection = clip.text_projection = torch.nn.Identity()
    ids = {"right": [1, 0, 2], "across": [0, 5, 0]}

    def tokenizer(prompts, **options):
        return SimpleNamespace(input_ids=torch.tensor([ids[prompt] for prompt in prompts]))

    x = torch.tensor([2.0, 0.0, 4.0]).view(1, 3, 1, 1).expand(2, -1, -1, -1)
    torch.testing.assert_close(clip_t(clip, tokenizer, x, ["right", "across"]), torch.tensor([1.0, 0.0]))


def test_the_classifier_is_a_head_on_its_features():
    classifier = SmallClassifier(width=8, num_classes=5).eval()
    x = randn(3, 3, 32, 32).float()
    with torch.no_grad():
        features = classifier.features(x)
        assert features.shape == (3, 32) and classifier(x).shape == (3, 5)
        torch.testing.assert_close(classifier.head(features), classifier(x), rtol=0, atol=0)


def test_features_do_not_depend_on_how_pictures_come():
    classifier = SmallClassifier(width=8).eval()
    pictures = torch.randint(0, 256, (7, 3, 32, 32), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    floats = pictures.float() / 127.5 - 1
    expected = features_and_logits(classifier, pictures)
    for images, batch_size in ((floats, 500), (pictures, 2)):
        for a, b in zip(features_and_logits(classifier, images, batch_size), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    beyond = features_and_logits(classifier, floats * 3)
    cut = features_and_logits(classifier, (floats * 3).clamp(-1, 1))
    torch.testing.assert_close(beyond[0], cut[0], rtol=0, atol=0)


def test_the_shipped_classifier_comes_with_its_gaussian():
    classifier, (mean, cov) = load_classifier()
    D = classifier.head.in_features
    assert mean.shape == (D,) and cov.shape == (D, D) and mean.dtype == cov.dtype == torch.float64
    torch.testing.assert_close(cov, cov.T)
    features, logits = features_and_logits(classifier, randn(2, 3, 32, 32).float())
    assert features.shape == (2, D) and features.isfinite().all() and logits.isfinite().all()


def test_inception_fid_says_in_one_sentence_what_it_lacks(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchmetrics", None)  # as if it were not installed
    monkeypatch.setitem(sys.modules, "torchmetrics.image.fid", None)
    pictures = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    with pytest.raises(ConnectionError, match=r"^Inception-FID needs `pip install -e .\[eval\]`.*Reason: ") as caught:
        inception_fid(pictures, pictures)
    assert "\n" not in str(caught.value) and caught.value.__suppress_context__


def test_each_part_of_the_samples_is_left_out_once():
    features = 10 * torch.randn(
        200, 4, generator=torch.Generator().manual_seed(0)
    )  # so that 3 decimals tell parts apart
    real = gaussian(torch.randn(500, 4, generator=torch.Generator().manual_seed(1)))
    found = frechet_left_out(features, real)
    third = torch.cat([features[:20], features[30:120], features[130:]])  # without the third ten of each hundred
    assert len(set(found)) == 10 and found[2] == round(frechet_distance(gaussian(third), real), 3)
    assert frechet_left_out(features[:4], real) == []
