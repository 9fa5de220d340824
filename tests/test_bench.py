"""Bench: a training starts, tells its progress, stops, gives the model back, and turns an error into a line."""

import time

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import FULL_SIZE, TINY

from course_lib import bench
from course_lib.personalization import lora, textual_inversion
from course_lib.personalization.recipe import Settings

METHODS = {"textual inversion": textual_inversion, "lora": lora}
PICTURES = [Image.fromarray(np.random.default_rng(k).integers(0, 256, (32, 32, 3), dtype=np.uint8)) for k in range(3)]
PROMPT = "a sks cat"


@pytest.fixture(scope="module")
def sd():
    return FULL_SIZE.build(**TINY | {"unet": TINY["unet"] | {"sample_size": 8}})


@pytest.fixture
def shown(monkeypatch):
    import IPython.display

    outputs = []
    monkeypatch.setattr(IPython.display, "display", lambda data, metadata=None, raw=False: outputs.append(data))
    monkeypatch.setattr(bench, "EVERY", 0.0)
    return outputs


def bench_on(sd, steps=3, lr=1e-2):
    """A bench, and the outputs that the UNet had at each drawing."""
    seen = []

    def recipe(method="lora"):
        return METHODS[method].recipe(sd, PICTURES, noun="cat", settings=Settings(steps=steps, lr=lr, batch_size=2))

    def draw(method):
        seen.append(output(sd))
        return torch.zeros(2, 3, 32, 32), f"two pictures by <{method}>"

    return bench.Bench(sd, recipe, draw, method=tuple(METHODS)), seen


@torch.no_grad()
def output(sd):
    return sd.unet_eps(torch.ones(1, 4, 8, 8), torch.tensor([500]), sd.encode_prompt(PROMPT))


def state(sd):
    parts = {"unet": sd.unet, "vae": sd.vae, "text": sd.text_encoder}
    return {f"{part}.{key}": v.clone() for part, net in parts.items() for key, v in net.state_dict().items()}


def restored(sd, before):
    torch.testing.assert_close(state(sd), before, rtol=0, atol=0)
    assert not any(param.requires_grad for param in sd.unet.parameters())
    return True


def until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.005)


def finished(one):
    one.thread.join(60)
    return not one.thread.is_alive() and one.stop.disabled and not one.train.disabled


def test_nothing_is_trained_before_a_click_and_a_page_without_a_kernel_has_a_picture(sd, shown):
    before = state(sd)
    one, seen = bench_on(sd)
    assert one.thread is None and one.stop.disabled and restored(sd, before)
    assert len(seen) == 1 and "nothing is trained" in one.line.value
    both, words = shown
    assert both["image/png"].startswith("iVBOR") and both["text/plain"] == words["text/plain"]
    assert "two pictures by &lt;lora&gt;" in one.picture.value


@pytest.mark.parametrize("method", METHODS)
def test_train_tells_its_progress_draws_with_the_trained_model_and_gives_it_back(sd, shown, method):
    before, lines = state(sd), []
    one, seen = bench_on(sd)
    one.controls["method"].value = method
    one.line.observe(lambda change: lines.append(change["new"]), "value")
    one.train.click()
    assert finished(one) and restored(sd, before)
    assert lines[0] == "preparing …" and lines[-2].endswith("drawing …")
    assert [line[:11] for line in lines[1:-2]] == ["step 1 of 3", "step 2 of 3", "step 3 of 3"]
    assert all("loss 0." in line or "loss 1." in line for line in lines[1:-2]) and "s left" in lines[1]
    assert lines[-1].startswith("trained, step 3 of 3") and one.bar.value == one.bar.max == 3
    assert f"&lt;{method}&gt;" in one.picture.value
    if method == "lora":  # a new word alone leaves this prompt as it is
        assert not torch.equal(seen[0], seen[1])
    torch.testing.assert_close(output(sd), seen[0], rtol=0, atol=0)


def test_stop_ends_the_training_between_two_steps_draws_and_gives_the_model_back(sd, shown):
    before = state(sd)
    one, seen = bench_on(sd, steps=100_000, lr=1e-4)
    one.train.click()
    until(lambda: one.bar.value > 1)
    assert one.thread.is_alive() and one.train.disabled and one.controls["method"].disabled and not one.stop.disabled
    one.stop.click()
    assert finished(one) and restored(sd, before)
    assert one.line.value.startswith("stopped, step ") and 1 < one.bar.value < 1000 and len(seen) == 2
    assert not torch.equal(seen[0], seen[1])


def test_one_training_at_a_time(sd, shown):
    one, other = bench_on(sd, steps=100_000, lr=1e-4)[0], bench_on(sd)[0]
    one.train.click()
    other.train.click()
    assert other.thread is None and other.line.value == "another training is running: stop it first"
    one.stop.click()
    assert finished(one)
    other.train.click()
    assert finished(other) and other.line.value.startswith("trained")


def test_an_error_becomes_a_line_and_the_next_training_works(sd, shown, monkeypatch):
    before = state(sd)
    one, _ = bench_on(sd)

    def broken(sd, recipe):
        yield 1, torch.tensor(0.5)
        raise FloatingPointError("the loss is <not> a number")

    with monkeypatch.context() as patch:
        patch.setattr(bench, "finetune", broken)
        one.train.click()
        assert finished(one) and restored(sd, before)
    assert one.line.value == "FloatingPointError: the loss is &lt;not&gt; a number"
    one.train.click()
    assert finished(one) and one.line.value.startswith("trained") and restored(sd, before)
