"""Concepts that were learnt apart become one model, in closed form; and a concept in fewer bytes.

Derived in: notebooks/14_multiple_concepts.ipynb.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from course_lib.latent import text
from course_lib.latent.stable_diffusion import StableDiffusion
from course_lib.personalization.concept import Concept, applied, only_tokens, uncompressed

PROMPTS = ("{}", "photo of a {}")  # around the words whose features each concept keeps


@torch.no_grad()
def merge_concepts(sd: StableDiffusion, concepts: Sequence[Concept], captions: Sequence[str],
                   ridge: float = 1e-6) -> Concept:  # fmt: skip
    """One concept with the words of all, from several that Custom Diffusion learnt one by one.

    captions: 200 to 1000 ordinary sentences, for which the merged model should act like the base.
    Source: Kumari et al. 2023, section 3.2; see `merge_weights`.
    Differs from the authors' code: the words before a new token are no constraint, since both concepts say them.
    Raises ValueError unless there are two or more concepts of Custom Diffusion, of this model, with different tokens.
    Derived in: notebooks/14_multiple_concepts.ipynb, section "The closed form".
    """
    if len(concepts) < 2 or any(concept.method != "custom_diffusion" for concept in concepts):
        raise ValueError(f"concepts: expected two or more of custom_diffusion, got {[c.method for c in concepts]}")
    if not captions:
        raise ValueError("captions: expected at least one sentence, got none")
    concepts = [uncompressed(sd, concept) for concept in concepts]
    about = {key: [value for c in concepts for value in c.about[key]] for key in ("tokens", "nouns", "rows")}
    with applied(sd, *[only_tokens(concept) for concept in concepts]):  # refuses those of another model
        targets = [word_features(sd, concept.about) for concept in concepts]
        regularisation = torch.cat([caption_features(sd, caption)[0] for caption in dict.fromkeys(captions)])
    weights = dict(sd.unet.named_parameters())
    tensors = {"tokens": torch.cat([concept.tensors["tokens"] for concept in concepts])}
    for name in concepts[0].tensors:
        if name != "tokens":
            own = [concept.tensors[name].to(sd.device) for concept in concepts]
            base = weights[name.removeprefix("unet.")]
            tensors[name] = merge_weights(own, base, targets, regularisation, ridge).float().cpu()
    about |= {"token": about["tokens"][0], "noun": about["nouns"][0], "merged": len(concepts)}
    return Concept("custom_diffusion", tensors, concepts[0].base, about, {"ridge": ridge}, concepts[0].fingerprint)


@torch.no_grad()
def caption_features(sd: StableDiffusion, prompt: str) -> tuple[Tensor, list[int]]:
    """The features of a prompt from its start to its end token (n, D), and its ids."""
    ids = text.tokenize(sd.tokenizer, prompt)
    length = int((ids[0] == sd.tokenizer.eos_token_id).nonzero()[0]) + 1
    return sd.encode_prompt(prompt)[0, :length], ids[0, :length].tolist()


@torch.no_grad()
def word_features(sd: StableDiffusion, about: dict) -> Tensor:
    """Features of the new tokens, of the nouns after them, and of the end, in every one of PROMPTS."""
    rows = []
    for token, noun in zip(about["tokens"], about["nouns"], strict=True):
        for prompt in PROMPTS:
            features, ids = caption_features(sd, prompt.format(f"{token} {noun}"))
            rows.append(features[ids.index(sd.tokenizer.convert_tokens_to_ids(token)) :])
    return torch.cat(rows).unique(dim=0)


def merge_weights(weights: Sequence[Tensor], base: Tensor, targets: Sequence[Tensor], regularisation: Tensor,
                  ridge: float = 1e-6) -> Tensor:  # fmt: skip
    """One W that treats each concept's words as its own fine-tuned W does, and changes least for other captions.

    min || W C_reg^T - W_0 C_reg^T ||_F  such that  W C^T = V,  V = [W_1 C_1^T, W_2 C_2^T, ...]
    W = W_0 + v^T d,  d = C (C_reg^T C_reg)^-1,  v^T = (V - W_0 C^T) (d C^T)^-1.  Source: Kumari et al. 2023, Eq. 4, 5.
    weights: each (out, D).  base: W_0 (out, D).  targets: for each concept the features of its words, (n, D).
    regularisation: C_reg (m, D), features of captions.  ridge: times the mean square of C_reg, added to the diagonal,
    since few captions leave C_reg^T C_reg singular.  Solved in float64; returns W (out, D) in float64.
    Derived in: notebooks/14_multiple_concepts.ipynb, section "The closed form".
    """
    if len(weights) != len(targets):
        raise ValueError(f"targets: expected one for each of {len(weights)} weights, got {len(targets)}")
    base, C_reg = base.double(), regularisation.double()
    C = torch.cat([target.double() for target in targets])  # (n, D)
    V = torch.cat([W.double() @ target.double().T for W, target in zip(weights, targets, strict=True)], dim=1)
    A = C_reg.T @ C_reg
    A = A + ridge * A.diagonal().mean() * torch.eye(len(A), dtype=A.dtype, device=A.device)
    d = torch.linalg.solve(A, C.T).T  # (n, D)
    v = torch.linalg.lstsq((d @ C.T).T, (V - base @ C.T).T, driver="gelsd" if C.device.type == "cpu" else None).solution
    return base + v.T @ d


def compress(change: Tensor, keep: float = 0.6) -> tuple[Tensor, Tensor]:
    """The leading part of a change of weights as two thin matrices: change ~ u v.

    keep: share of the sum of singular values that stays.  Source: Kumari et al. 2023, section 4 (60 %: 75 to 15 MB).
    change: (out, D).  Returns u (out, r) and v (r, D).
    Derived in: notebooks/13_custom_diffusion.ipynb, section "How large is a concept".
    """
    if not 0 < keep <= 1:
        raise ValueError(f"keep: expected a share between 0 and 1, got {keep}")
    U, S, Vh = torch.linalg.svd(change.double(), full_matrices=False)
    share = S.cumsum(0) / S.sum().clamp(min=torch.finfo(S.dtype).tiny)
    r = int((share < keep * (1 - 1e-12)).sum()) + 1
    return (U[:, :r] * S[:r]).to(change.dtype), Vh[:r].to(change.dtype)
