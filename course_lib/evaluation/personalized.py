"""Scores of a personalized Toybox model: likeness to the subject, following the prompt, drift of the class.

Used by: notebooks/12_dreambooth.ipynb, section "More like the subject?", notebooks 11, 13 and 14, and measurements/.

Every score has one name, the same in notebooks, records and tables: see SCORES.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPModel

from course_lib.environment import from_uint8
from course_lib.evaluation import judge
from course_lib.evaluation.metrics import clip_t
from course_lib.latent.stable_diffusion import StableDiffusion
from course_lib.toybox import subjects
from course_lib.toybox.world import Spec, render

SCORES = {  # key in a record -> (name in a table, what it is)
    "subject_fidelity": ("subject fidelity", "cosine of the judge's vectors: samples with the five reference pictures"),
    "prompt_fidelity": ("prompt fidelity", "share of scene, accessory, style and relation that the judge reads off"),
    "clip_t": ("CLIP-T", "cosine of picture and prompt by the Toybox model's CLIP, without the new word"),
    "diversity": ("diversity", "mean distance of two samples of one prompt, in the judge's features"),
    "class_drift": ("class drift", "subject fidelity of 'a photo of a <noun>', without the new word"),
    "class_diversity": ("class diversity", "diversity of 'a photo of a <noun>'"),
    "class_shift": ("class shift", "mean distance of these to the untouched model's, from the same noises"),
}
NAMED = ("scene", "accessory", "style", "relation")  # the attributes that a prompt about a subject can name


def pixels(specs: Sequence[Spec]) -> Tensor:
    """The renderer's pictures: (N, 3, 64, 64) in [-1, 1]."""
    return torch.stack([from_uint8(render(spec)) for spec in specs])


class Scorer:
    """Computes every score of pictures, with the judge and the Toybox model's own CLIP.

    Pictures are (N, 3, 64, 64) in [-1, 1], on any device; `count` pictures of one prompt stand next to each other.
    Scores are float32 on the CPU.
    """

    def __init__(self, sd: StableDiffusion):
        self.device, self.tokenizer = sd.device, sd.tokenizer
        self.judge = judge.load_judge(sd.device)
        self.clip = CLIPModel.from_pretrained(sd.source / "clip", dtype=torch.float32).eval().to(sd.device)

    @torch.no_grad()
    def individual(self, x: Tensor) -> Tensor:
        """Unit vectors (N, D): two pictures of one individual have a dot product near 1."""
        return torch.cat([self.judge.individual(part.to(self.device).float()).cpu() for part in x.split(100)])

    def references(self, name: str) -> Tensor:
        """The vectors of the five reference pictures of a subject, such as "mochi": (5, D)."""
        return self.individual(pixels(subjects.references(name)))

    def subject_fidelity(self, x: Tensor, references: Tensor) -> Tensor:
        """Mean cosine of each picture with the references: (N,), 1 is the same individual.  references: (R, D).

        Source: the DINO score of Ruiz et al. 2022, section 4.1, with the judge in DINO's place.
        """
        return (self.individual(x) @ references.T).mean(1)

    def prompt_fidelity(self, x: Tensor, fields: Sequence[dict], count: int) -> Tensor:
        """The share of the prompt's attributes that the judge finds in each picture: (N,) in [0, 1].

        fields: the attributes of each prompt, as `subjects.prompts` gives them, such as {"scene": "on the beach"}.
        """
        found = {name: row.argmax(1) for name, row in judge.answers(self.judge, x)[0].items() if name in NAMED}
        shares = []
        for k, field in enumerate(fields):
            rows = slice(k * count, (k + 1) * count)
            right = [found[n][rows] == judge.ATTRIBUTES[n].index(field[n]) for n in NAMED if n in field]
            shares.append(torch.stack(right).float().mean(0))
        return torch.cat(shares)

    def clip_t(self, x: Tensor, prompts: Sequence[str]) -> Tensor:
        """CLIP-T, (N,): cosine of each picture with its prompt.  prompts: N, without the new word."""
        return clip_t(self.clip, self.tokenizer, x.to(self.device).float(), prompts).cpu()

    def diversity(self, x: Tensor, count: int) -> Tensor:
        """The mean distance of two samples, for each group of `count`: (N / count,).  count: at least 2."""
        if count < 2:
            raise ValueError(f"count: expected at least 2 pictures of a prompt, got {count}")
        features = judge.answers(self.judge, x)[1].view(len(x) // count, count, -1)
        return torch.stack([torch.pdist(group).mean() for group in features])

    def class_shift(self, x: Tensor, before: Tensor) -> Tensor:
        """Distance of each picture to its counterpart of the untouched model, in the judge's features: (N,)."""
        after, before = (judge.answers(self.judge, images)[1] for images in (x, before))
        return (after - before).norm(dim=1)

    def noun_share(self, x: Tensor, noun: str) -> Tensor:
        """Whether the judge names this noun for each picture: (N,) of 0 and 1."""
        return (judge.answers(self.judge, x)[0]["noun"].argmax(1) == judge.ATTRIBUTES["noun"].index(noun)).float()

    def both_nouns(self, x: Tensor, nouns: tuple[str, str]) -> Tensor:
        """Whether the two nouns are the two likeliest of the judge's presence head: (N,) of 0 and 1."""
        wanted = torch.tensor(sorted(judge.ATTRIBUTES["noun"].index(noun) for noun in nouns))
        top = judge.answers(self.judge, x)[0]["presence"].topk(2, dim=1).indices.sort(dim=1).values
        return (top == wanted).all(1).float()

    def two_subjects(self, x: Tensor, references: Sequence[Tensor]) -> dict[str, Tensor]:
        """Subject fidelity to two subjects that stand beside each other, each (N,).

        The two lower halves of a picture are enlarged and compared with both subjects, in the order that fits better:
        subject_fidelity: the mean of the two; lower_subject_fidelity: the lower one, so that a picture which shows
        one subject twice does not win.  references: the vectors (R, D) of each subject.
        """
        halves = [F.interpolate(x[:, :, 28:64, a : a + 36].float(), 64, mode="bilinear") for a in (0, 28)]
        left, right = ([self.subject_fidelity(half, r) for r in references] for half in halves)
        orders = torch.stack([left[0], right[1]]), torch.stack([left[1], right[0]])
        best = torch.where(orders[0].mean(0) > orders[1].mean(0), *orders)  # (2, N)
        return {"subject_fidelity": best.mean(0), "lower_subject_fidelity": best.amin(0)}


def by_prompt(values: Tensor, count: int) -> Tensor:
    """The mean over the `count` pictures of each prompt: (N,) -> (N / count,)."""
    return values.view(-1, count).mean(1)
