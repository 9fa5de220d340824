"""The forward process, its posterior and the loss, against round trips, statistics and independent solutions."""

import pytest
import torch

from course_lib.diffusion.ddpm import loss_per_picture, posterior, predict_x0, q_sample, simple_loss
from course_lib.diffusion.schedule import cosine, linear

SCHEDULE = linear()


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64)


@pytest.mark.parametrize("t", [1, 17, 500, 1000])
def test_predict_x0_undoes_q_sample(t):
    x0, eps = randn(4, 3, 8, 8), randn(4, 3, 8, 8, seed=1)
    torch.testing.assert_close(predict_x0(q_sample(x0, t, eps, SCHEDULE), t, eps, SCHEDULE), x0, rtol=1e-11, atol=1e-11)


def test_at_time_0_nothing_is_added():
    x0, eps = randn(2, 3, 4, 4), randn(2, 3, 4, 4, seed=1)
    torch.testing.assert_close(q_sample(x0, 0, eps, SCHEDULE), x0, rtol=0, atol=0)


def test_one_time_for_all_or_one_for_each_image():
    x0, eps = randn(3, 3, 4, 4), randn(3, 3, 4, 4, seed=1)
    times = [3, 400, 1000]
    together = q_sample(x0, torch.tensor(times), eps, SCHEDULE)
    for i, t in enumerate(times):
        alone = q_sample(x0[i : i + 1], t, eps[i : i + 1], SCHEDULE)
        torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=0)


@pytest.mark.parametrize("t", [1, 250, 1000])
def test_mean_and_variance_of_q_sample(t):
    N, x0 = 40_000, 0.7
    xt = q_sample(torch.full((N, 1, 1, 1), x0).double(), t, randn(N, 1, 1, 1), SCHEDULE)
    alpha_bar = SCHEDULE.alpha_bar[t].item()
    variance = 1 - alpha_bar
    assert abs(xt.mean().item() - alpha_bar**0.5 * x0) < 4 * (variance / N) ** 0.5  # four standard errors
    assert abs(xt.var().item() - variance) < 4 * variance * (2 / N) ** 0.5


def test_q_sample_is_many_small_steps_at_once():
    mean, variance = 1.0, 0.0
    for t in range(1, 301):  # x_t = sqrt(1 - beta_t) x_{t-1} + sqrt(beta_t) eps
        beta = SCHEDULE.beta[t].item()
        mean, variance = (1 - beta) ** 0.5 * mean, (1 - beta) * variance + beta
    ones = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    assert q_sample(ones, 300, 0 * ones, SCHEDULE).item() == pytest.approx(mean, rel=1e-12)
    assert q_sample(0 * ones, 300, ones, SCHEDULE).item() ** 2 == pytest.approx(variance, rel=1e-12)


@pytest.mark.parametrize(("t", "before"), [(2, None), (500, None), (1000, None), (500, 400), (981, 961), (300, 1)])
@pytest.mark.parametrize("schedule", [linear(), cosine()], ids=["linear", "cosine"])
def test_posterior_is_the_product_of_two_gaussians(schedule, t, before):
    """q(x_s | x_t, x_0) ~ q(x_t | x_s) q(x_s | x_0), multiplied out and integrated on a fine grid of x_s."""
    x0, xt, s = 0.4, -0.3, t - 1 if before is None else before
    abar_t, abar_s = schedule.alpha_bar[t].item(), schedule.alpha_bar[s].item()
    alpha = abar_t / abar_s
    mean, variance = posterior(torch.tensor(x0).double(), torch.tensor(xt).double(), t, schedule, before)
    reach = 12 * variance**0.5
    x = torch.linspace(mean.item() - reach, mean.item() + reach, 20_001, dtype=torch.float64)
    log_p = -((xt - alpha**0.5 * x) ** 2) / (2 * (1 - alpha)) - (x - abar_s**0.5 * x0) ** 2 / (2 * (1 - abar_s))
    p = (log_p - log_p.max()).exp()
    p = p / p.sum()
    assert (p * x).sum().item() == pytest.approx(mean.item(), abs=1e-6 * variance**0.5)
    assert (p * (x - mean) ** 2).sum().item() == pytest.approx(variance, rel=1e-6)


def test_posterior_over_several_times_is_the_chain_of_single_steps():
    x0, xt, t, s = randn(1, 1, 2, 2), randn(1, 1, 2, 2, seed=1), 40, 25
    mean, variance = xt, 0.0
    for u in range(t, s, -1):  # the mean of step u is affine in x_u, so mean and variance can be carried along
        at_zero, step_variance = posterior(x0, torch.zeros_like(xt), u, SCHEDULE)
        slope = (posterior(x0, torch.ones_like(xt), u, SCHEDULE)[0] - at_zero).mean().item()
        mean, variance = at_zero + slope * mean, slope**2 * variance + step_variance
    jump_mean, jump_variance = posterior(x0, xt, t, SCHEDULE, s=s)
    torch.testing.assert_close(jump_mean, mean)
    assert jump_variance == pytest.approx(variance, rel=1e-9)


def test_the_last_step_is_certain():
    x0, xt = randn(2, 3, 4, 4), randn(2, 3, 4, 4, seed=1)
    for t, before in ((1, None), (300, 0)):
        mean, variance = posterior(x0, xt, t, SCHEDULE, before)
        assert variance == 0
        torch.testing.assert_close(mean, x0, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("t", "before"), [(0, None), (1001, None), (5, 5), (5, 6), (5, -1)])
def test_posterior_refuses_times_out_of_order(t, before):
    x = torch.zeros(1, 1, 1, 1)
    with pytest.raises(ValueError, match=r"^t: expected 0 <= s < t <= 1000, got s = "):
        posterior(x, x, t, SCHEDULE, before)


def eps_model(xt, t):
    """Some answer that depends on both inputs."""
    return 0.3 * xt + t.reshape(-1, 1, 1, 1) / 1000


def draws_of_the_loss(x0, seed):
    """The times and the noises that `simple_loss` draws from this seed, in its order."""
    g = generator(seed)
    t = torch.randint(1, 1001, (len(x0),), generator=g)
    return t, torch.randn(x0.shape, generator=g, dtype=x0.dtype)


def test_simple_loss_is_the_formula():
    x0 = randn(6, 3, 8, 8).clamp(-1, 1)

    t, eps = draws_of_the_loss(x0, 5)
    alpha_bar = SCHEDULE.alpha_bar[t].reshape(-1, 1, 1, 1)
    xt = alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * eps
    by_hand = ((eps - eps_model(xt, t)) ** 2).sum() / x0.numel()
    torch.testing.assert_close(simple_loss(eps_model, x0, SCHEDULE, generator(5)), by_hand)


def test_the_weighting_v_is_the_loss_on_v():
    """v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x_0 (Salimans & Ho 2022), from the two clean images and noises."""
    x0 = randn(6, 3, 8, 8).clamp(-1, 1)

    t, eps = draws_of_the_loss(x0, 5)
    alpha_bar, xt = SCHEDULE.at(t, x0), q_sample(x0, t, eps, SCHEDULE)
    eps_hat = eps_model(xt, t)
    x0_hat = predict_x0(xt, t, eps_hat, SCHEDULE)
    v, v_hat = (alpha_bar.sqrt() * e - (1 - alpha_bar).sqrt() * x for e, x in ((eps, x0), (eps_hat, x0_hat)))
    torch.testing.assert_close(simple_loss(eps_model, x0, SCHEDULE, generator(5), "v"), (v - v_hat).square().mean())


TIMES = [1, 2, 100, 400, 700, 1000]
WEIGHTS = {"eps": lambda abar: 1.0, "v": lambda abar: 1 / abar, "min_snr": lambda abar: min(5 * (1 - abar) / abar, 1)}


def errors_by_hand(x0, eps, weighting, mask):
    """Picture by picture, number by number."""
    found = []
    for i, t in enumerate(TIMES):
        abar = SCHEDULE.alpha_bar[t].item()
        xt = abar**0.5 * x0[i] + (1 - abar) ** 0.5 * eps[i]
        error = eps_model(xt[None], torch.tensor([t]))[0] - eps[i]
        shown = [error[c, mask[i, 0] == 1] for c in range(len(error))]
        found.append(WEIGHTS[weighting](abar) * torch.cat(shown).square().mean())
    return torch.stack(found)


@pytest.mark.parametrize("weighting", WEIGHTS)
def test_loss_per_picture_is_one_number_for_each_picture(weighting):
    x0, eps, t = randn(6, 4, 8, 8), randn(6, 4, 8, 8, seed=1), torch.tensor(TIMES)
    ones, mask = torch.ones(6, 1, 8, 8), (randn(6, 1, 8, 8, seed=2) > 0).double()
    plain = loss_per_picture(eps_model, x0, t, eps, SCHEDULE, weighting)
    assert plain.shape == (6,)
    torch.testing.assert_close(plain, errors_by_hand(x0, eps, weighting, ones))
    torch.testing.assert_close(loss_per_picture(eps_model, x0, t, eps, SCHEDULE, weighting, ones), plain)
    # the mask has one channel and the picture four: the mean is over four times as many numbers
    masked = loss_per_picture(eps_model, x0, t, eps, SCHEDULE, weighting, mask)
    torch.testing.assert_close(masked, errors_by_hand(x0, eps, weighting, mask))
    hidden = torch.where(mask == 1, x0, 1e3)  # what is hidden may be anything: this model looks at single places
    torch.testing.assert_close(loss_per_picture(eps_model, hidden, t, eps, SCHEDULE, weighting, mask), masked)


def test_min_snr_holds_back_the_times_with_little_noise():
    t = torch.arange(1, 1001)
    x0 = torch.zeros(1000, 1, 1, 1, dtype=torch.float64)
    weights = loss_per_picture(lambda xt, t: 0 * xt, x0, t, x0 + 1, SCHEDULE, "min_snr")  # the error is 1 everywhere
    snr = SCHEDULE.alpha_bar[1:] / (1 - SCHEDULE.alpha_bar[1:])
    torch.testing.assert_close(weights[snr <= 5], torch.ones_like(weights[snr <= 5]), rtol=0, atol=0)
    torch.testing.assert_close((weights * snr)[snr > 5], torch.full_like(weights[snr > 5], 5.0))
    assert 0 < (snr > 5).sum() < 1000


@pytest.mark.parametrize("weighting", WEIGHTS)
def test_simple_loss_is_the_mean_of_loss_per_picture(weighting):
    x0 = randn(6, 3, 8, 8)
    t, eps = draws_of_the_loss(x0, 5)
    errors = loss_per_picture(eps_model, x0, t, eps, SCHEDULE, weighting)
    torch.testing.assert_close(simple_loss(eps_model, x0, SCHEDULE, generator(5), weighting), errors.mean())


def test_another_weighting_is_refused():
    with pytest.raises(ValueError, match=r"^weighting: expected 'eps', 'v' or 'min_snr', got 'snr'$"):
        simple_loss(lambda xt, t: xt, torch.zeros(1, 3, 4, 4), SCHEDULE, weighting="snr")


def test_simple_loss_of_a_perfect_model_and_of_zeros():
    x0 = randn(64, 3, 16, 16).clamp(-1, 1)
    N = x0.numel()

    def perfect(xt, t):
        alpha_bar = SCHEDULE.at(t, xt)
        return (xt - alpha_bar.sqrt() * x0) / (1 - alpha_bar).sqrt()

    assert simple_loss(perfect, x0, SCHEDULE, generator()).item() < 1e-20
    silent = simple_loss(lambda xt, t: torch.zeros_like(xt), x0, SCHEDULE, generator()).item()
    assert abs(silent - 1) < 4 * (2 / N) ** 0.5  # E eps^2 = 1; four standard errors


def test_simple_loss_visits_every_time_from_1_to_T():
    seen = []
    short = linear(T=5, beta_end=0.5)
    simple_loss(lambda xt, t: (seen.append(t), xt)[1], torch.zeros(400, 1, 1, 1), short, generator())
    assert set(seen[0].tolist()) == {1, 2, 3, 4, 5}


def test_simple_loss_follows_its_generator_alone():
    x0 = torch.zeros(4, 3, 8, 8)

    def loss(g):
        return simple_loss(lambda xt, t: xt * 0.5, x0, SCHEDULE, g)

    state = torch.get_rng_state()
    first = loss(generator(3))
    assert torch.equal(torch.get_rng_state(), state)  # the global generator was left alone
    torch.manual_seed(1)
    torch.testing.assert_close(loss(generator(3)), first, rtol=0, atol=0)
    assert loss(generator(4)) != first
