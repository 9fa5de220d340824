"""The scores of a personalized model: at their limits, where the renderer knows the answer."""

from dataclasses import replace

import pytest
import torch

from course_lib.evaluation.personalized import SCORES, Scorer, by_prompt, pixels
from course_lib.latent.stable_diffusion import load
from course_lib.toybox import subjects
from course_lib.toybox.scenes import SCENES

close = torch.testing.assert_close


@pytest.fixture(scope="module")
def scorer():
    return Scorer(load("toybox", "cpu", torch.float32))


def pictures(name, scenes=tuple(SCENES)[:4], **fixed):
    """What the renderer draws of a subject; look=None: any one of its class."""
    one = subjects.SUBJECTS[name]
    return pixels([replace(one.spec(seed=0, scene=scene), **fixed) for scene in scenes])


def test_a_subject_is_more_like_itself_than_its_class_is(scorer):
    references = scorer.references("mochi")
    close(references.norm(dim=1), torch.ones(5), rtol=1e-4, atol=1e-4)
    itself, others = (scorer.subject_fidelity(x, references) for x in (pictures("mochi"), pictures("mochi", look=None)))
    assert itself.shape == (4,) and itself.mean() > others.mean() + 0.2
    close(
        scorer.subject_fidelity(pixels(subjects.references("mochi")), references), (references @ references.T).mean(1)
    )


def test_prompt_fidelity_is_the_share_of_what_was_asked_for(scorer):
    scenes = tuple(SCENES)[:4]
    x = pictures("mochi", scenes).repeat_interleave(2, dim=0)
    right, wrong = ([dict(scene=scene) for scene in order] for order in (scenes, scenes[::-1]))
    assert by_prompt(scorer.prompt_fidelity(x, right, 2), 2).tolist() == [1.0] * 4
    assert scorer.prompt_fidelity(x, wrong, 2).tolist() == [0.0] * 8
    half = [dict(scene=scene, style="pencil sketch") for scene in scenes]
    assert scorer.prompt_fidelity(x, half, 2).tolist() == [0.5] * 8


def test_clip_t_knows_which_prompt_belongs_to_a_picture(scorer):
    scenes = tuple(SCENES)[:4]
    x, prompts = pictures("mochi", scenes), [f"a photo of a cat {scene}" for scene in scenes]
    assert (scorer.clip_t(x, prompts) > scorer.clip_t(x, prompts[::-1])).all()


def test_diversity_and_shift_are_distances(scorer):
    x = pictures("mochi")
    same = x[:1].repeat(4, 1, 1, 1)
    close(scorer.diversity(same, 4), torch.zeros(1), rtol=0, atol=1e-3)
    assert scorer.diversity(torch.cat([same, x]), 4)[1] > 1
    close(scorer.class_shift(x, x), torch.zeros(4), rtol=0, atol=0)
    assert (scorer.class_shift(x, x.roll(1, 0)) > 1).all()
    with pytest.raises(ValueError, match="count: expected at least 2 pictures of a prompt, got 1"):
        scorer.diversity(x, 1)


def pair_pixels(first, second, noun=None):
    """Two subjects side by side; noun: that of the second in place of its own, without its look."""
    one, two = subjects.SUBJECTS[first], subjects.SUBJECTS[second]
    specs = []
    for scene in SCENES:
        other = two.spec(seed=1, scene=scene, x=0.75, y=0.71, size=0.46)
        other = replace(other, noun=noun, look=None) if noun else other
        specs.append(one.spec(seed=0, scene=scene, relation="next to", other=other, x=0.27, y=0.7, size=0.48))
    return pixels(specs)


def test_two_subjects_are_found_in_either_order(scorer):
    """Above a picture of the two classes without the subjects, mirrored or not."""
    references = [scorer.references(name) for name in ("mochi", "tilly")]
    x, other = pair_pixels("mochi", "tilly"), pair_pixels("mochi", "mochi")
    seen, mirrored, twice = (scorer.two_subjects(images, references) for images in (x, x.flip(-1), other))
    low = "lower_subject_fidelity"
    assert (seen["subject_fidelity"] >= seen[low]).all()
    assert seen[low].mean() > twice[low].mean() + 0.2 and mirrored[low].mean() > twice[low].mean() + 0.2
    assert scorer.both_nouns(x, ("teapot", "cat")).mean() > 0.75
    assert scorer.both_nouns(other, ("cat", "teapot")).mean() < 0.25  # a cat next to a cat is not the pair
    assert scorer.noun_share(pictures("mochi"), "cat").mean() == 1


def test_no_score_has_two_names():
    names = [name for name, _ in SCORES.values()]
    assert len(set(names)) == len(names) and {"subject fidelity", "prompt fidelity", "CLIP-T", "diversity",
                                              "class drift"} <= set(names)  # fmt: skip
