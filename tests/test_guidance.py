"""Classifier-free guidance: its limits, its linearity, what it costs, and the dropping of labels."""

import pytest
import torch

from course_lib.diffusion.guidance import combine, drop_condition, guided
from course_lib.diffusion.samplers import ddim, last
from course_lib.diffusion.schedule import linear

LABEL = torch.tensor([3, 1])


class Counting:
    """A model (xt, t, label) -> eps_hat that notes the size of each batch it is given. Label 10 means "no label"."""

    num_classes = 10

    def __init__(self):
        self.sizes = []

    def __call__(self, xt, t, label):
        self.sizes.append(len(xt))
        t = t if torch.is_tensor(t) else torch.full((len(xt),), t)
        return (xt + 0.1 * label.reshape(-1, 1, 1, 1) + t.reshape(-1, 1, 1, 1) / 1000).sin()


@pytest.fixture
def xt():
    return torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))


def test_w_1_is_the_conditional_model_in_one_evaluation(xt):
    model = Counting()
    eps = guided(model, LABEL, w=1)(xt, 500)
    assert model.sizes == [2]
    torch.testing.assert_close(eps, model(xt, 500, LABEL), rtol=0, atol=0)


def test_w_0_is_the_unconditional_model_in_one_evaluation(xt):
    model = Counting()
    eps = guided(model, LABEL, w=0)(xt, 500)
    assert model.sizes == [2]
    torch.testing.assert_close(eps, model(xt, 500, torch.tensor([10, 10])), rtol=0, atol=0)


@pytest.mark.parametrize("w", [-1, 0.5, 2, 7.5])
def test_any_other_w_is_one_batch_of_both_halves(xt, w):
    model = Counting()
    eps = guided(model, LABEL, w)(xt, 500)
    assert model.sizes == [4]
    uncond, cond = model(xt, 500, torch.tensor([10, 10])), model(xt, 500, LABEL)
    torch.testing.assert_close(eps, uncond + w * (cond - uncond))


def test_the_result_is_a_straight_line_in_w(xt):
    model = Counting()
    at = {w: guided(model, LABEL, w)(xt, 500) for w in (-1, 0, 1, 3)}
    torch.testing.assert_close(at[3] - at[0], 3 * (at[1] - at[0]))
    torch.testing.assert_close(at[0] - at[-1], at[1] - at[0])


def test_one_time_for_each_image(xt):
    model, t = Counting(), torch.tensor([7, 900])
    both = guided(model, LABEL, w=3)(xt, t)
    for i in range(2):
        alone = guided(model, LABEL[i : i + 1], w=3)(xt[i : i + 1], t[i].item())
        torch.testing.assert_close(both[i : i + 1], alone)


def test_a_negative_label_takes_the_place_of_no_label(xt):
    model, negative = Counting(), torch.tensor([5, 5])
    eps = guided(model, LABEL, w=3, negative=negative)(xt, 500)
    torch.testing.assert_close(eps, combine(model(xt, 500, negative), model(xt, 500, LABEL), 3))
    # Walking away from what one walks to leads nowhere.
    torch.testing.assert_close(guided(model, LABEL, w=3, negative=LABEL)(xt, 500), model(xt, 500, LABEL))


@pytest.mark.parametrize("w", [0, 1, 3])
def test_a_negative_of_another_shape_is_refused(w):
    with pytest.raises(ValueError, match=r"^negative: expected the shape of label, \(2,\), got \(1,\)$"):
        guided(Counting(), LABEL, w, negative=torch.tensor([5]))


def test_the_papers_scale_is_ours_minus_one(xt):
    """Ho & Salimans 2021, Eq. 6: (1 + w') eps_cond - w' eps_uncond with w' = w - 1."""
    uncond, cond = xt, xt.flip(-1) ** 2
    for w in (0, 0.5, 1, 4):
        torch.testing.assert_close(combine(uncond, cond, w), (1 + (w - 1)) * cond - (w - 1) * uncond)


def test_a_guided_pair_is_an_eps_model_like_any_other(xt):
    x0 = last(ddim(guided(Counting(), LABEL, w=2), xt, linear(), 5))
    assert x0.shape == xt.shape and x0.isfinite().all()


def test_the_real_network_is_guided_too(tiny_unet):
    net = tiny_unet(num_classes=10)
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(guided(net, LABEL, w=0)(x, 5), net(x, 5), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(guided(net, LABEL, w=1)(x, 5), net(x, 5, LABEL), rtol=0, atol=0)
        assert not torch.allclose(net(x, 5), net(x, 5, LABEL), atol=1e-3)  # so the two lines above say something


def test_a_model_without_labels_is_refused(tiny_unet):
    with pytest.raises(ValueError, match=r"^model: expected a network with num_classes"):
        guided(tiny_unet(), LABEL, w=2)
    with pytest.raises(ValueError, match=r"^model: "):
        guided(lambda xt, t, label: xt, LABEL, w=2)


def test_the_share_of_dropped_labels():
    N, p = 40_000, 0.1
    label = torch.arange(N) % 10
    dropped = drop_condition(label, 10, p, torch.Generator().manual_seed(0))
    gone = dropped == 10
    assert abs(gone.double().mean().item() - p) < 4 * (p * (1 - p) / N) ** 0.5  # four standard errors
    assert torch.equal(dropped[~gone], label[~gone])
    assert torch.equal(label, torch.arange(N) % 10)  # the labels handed in are left alone


def test_p_0_drops_none_and_p_1_all():
    label = torch.arange(10_000) % 10
    assert torch.equal(drop_condition(label, 10, 0), label)
    assert drop_condition(label, 10, 1).eq(10).all()


def test_dropping_follows_its_generator():
    label = torch.arange(1_000) % 10
    a, b, c = (drop_condition(label, 10, 0.5, torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)


@pytest.mark.parametrize("p", [-0.1, 1.1])
def test_a_share_outside_0_to_1_is_refused(p):
    with pytest.raises(ValueError, match=rf"^p: expected a probability in \[0, 1\], got {p}$"):
        drop_condition(LABEL, 10, p)
