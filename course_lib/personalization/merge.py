"""Merge concepts that were trained separately, in closed form; and compress a concept.

Derived in: notebooks/14_multiple_concepts.ipynb.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from course_lib.latent import text
from course_lib.latent.stable_diffusion import StableDiffusion
from course_lib.personalization.concept import Concept, applied, check_base, only_tokens

RIDGE = 0.01  # chosen by measurements/tuning.py: smaller ones change the weights more and gain nothing
PROMPTS = ("{}", "photo of a {}")  # around the words whose features are to stay as in each concept


@torch.no_grad()
def merge_concepts(sd: StableDiffusion, concepts: Sequence[Concept], captions: Sequence[str],
                   ridge: float = RIDGE) -> Concept:  # fmt: skip
    """Merge several concepts of Custom Diffusion, trained one by one, into one concept with all their words.

    captions: 200 to 1000 ordinary sentences, for which the merged model should act like the base.
    Source: Kumari et al. 2023, section 3.2; see `merge_weights`.
    Differs from the authors' code: words before a new token are not constrained, since all concepts share them.
    If a concept lacks a layer, the base's weights are used for it.
    Raises ValueError unless there are two or more concepts of Custom Diffusion, of this model, each with its own token.
    Derived in: notebooks/14_multiple_concepts.ipynb, section "The closed form".
    """
    if len(concepts) < 2 or any(concept.method != "custom_diffusion" for concept in concepts):
        raise ValueError(f"concepts: expected two or more of custom_diffusion, got {[c.method for c in concepts]}")
    if wordless := [k for k, concept in enumerate(concepts, 1) if "tokens" not in concept.tensors]:
        raise ValueError(f"concepts: expected a word in each, but number {wordless[0]} has none; it may be in a file "
                         "beside it, such as <new1>.safetensors")  # fmt: skip
    if not captions:
        raise ValueError("captions: expected at least one sentence, got none")
    concepts = [uncompressed(sd, concept) for concept in concepts]
    about = {key: [value for c in concepts for value in c.about[key]] for key in ("tokens", "nouns", "rows")}
    with applied(sd, *[only_tokens(concept) for concept in concepts]):  # refuses those of another model
        targets = [word_features(sd, concept.about) for concept in concepts]
        regularisation = torch.cat([caption_features(sd, caption)[0] for caption in dict.fromkeys(captions)])
    weights = dict(sd.unet.named_parameters())
    tensors = {"tokens": torch.cat([concept.tensors["tokens"] for concept in concepts])}
    for name in dict.fromkeys(name for concept in concepts for name in concept.tensors if name != "tokens"):
        base = weights[name.removeprefix("unet.")]
        own = [concept.tensors.get(name, base).to(sd.device) for concept in concepts]
        tensors[name] = merge_weights(own, base, targets, regularisation, ridge).float().cpu()
    about |= {"token": about["tokens"][0], "noun": about["nouns"][0], "merged": len(concepts)}
    return Concept("custom_diffusion", tensors, concepts[0].base, about, {"ridge": ridge}, _fingerprint(concepts))


def _fingerprint(concepts: Sequence[Concept]) -> Tensor | None:
    """The base model's; a file of another tool does not say it."""
    return next((concept.fingerprint for concept in concepts if concept.fingerprint is not None), None)


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
                  ridge: float = RIDGE) -> Tensor:  # fmt: skip
    """One W that treats each concept's words as its own fine-tuned W does, and changes least for other captions.

    min || W C_reg^T - W_0 C_reg^T ||_F  such that  W C^T = V,  V = [W_1 C_1^T, W_2 C_2^T, ...]
    W = W_0 + v^T d,  d = C (C_reg^T C_reg)^-1,  v^T = (V - W_0 C^T) (d C^T)^-1.  Source: Kumari et al. 2023, Eq. 4, 5.
    weights: each (out, D).  base: W_0 (out, D).  targets: for each concept the features of its words, (n, D).
    regularisation: C_reg (m, D), features of captions.  ridge: this times the diagonal's mean is added to the
    diagonal, since few captions leave C_reg^T C_reg singular.  Solved in float64; returns W (out, D) in float64.
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


def mix_loras(concepts: Sequence[Concept]) -> Concept:
    """Add the changes of several LoRAs: A's rows and B's columns side by side, so that B A = sum of B_k A_k."""
    ranks, tensors = [concept.about["rank"] for concept in concepts], {}
    for name in dict.fromkeys(name for concept in concepts for name in concept.tensors):
        side = 0 if name.endswith(".down") else 1
        like = next(concept.tensors[name] for concept in concepts if name in concept.tensors)
        none = [torch.zeros((r, like.shape[1]) if side == 0 else (like.shape[0], r)) for r in ranks]  # no change
        tensors[name] = torch.cat([c.tensors.get(name, zero) for c, zero in zip(concepts, none, strict=True)], side)
    about = {f"{key}s": [value for c in concepts for value in c.about.get(f"{key}s") or [c.about.get(key, "")]]
             for key in ("token", "noun")}  # fmt: skip
    about |= {"token": about["tokens"][0], "noun": about["nouns"][0], "rank": sum(ranks), "merged": len(concepts)}
    return Concept("lora", tensors, concepts[0].base, about, {}, _fingerprint(concepts))


# ---- fewer bytes ----


def compress(change: Tensor, keep: float = 0.6) -> tuple[Tensor, Tensor]:
    """The leading part of a change of weights as two thin matrices: change ~ u v.

    keep: share of the sum of singular values that is kept.  Source: Kumari et al. 2023, section 4 (60 %: 75 to 15 MB).
    change: (out, D).  Returns u (out, r) and v (r, D).
    Derived in: notebooks/13_custom_diffusion.ipynb, section "How large is a concept".
    """
    if not 0 < keep <= 1:
        raise ValueError(f"keep: expected a share between 0 and 1, got {keep}")
    U, S, Vh = torch.linalg.svd(change.double(), full_matrices=False)
    share = S.cumsum(0) / S.sum().clamp(min=torch.finfo(S.dtype).tiny)
    r = int((share < keep * (1 - 1e-12)).sum()) + 1
    return (U[:, :r] * S[:r]).to(change.dtype), Vh[:r].to(change.dtype)


def compressed(sd: StableDiffusion, concept: Concept, keep: float = 0.6) -> Concept:
    """The concept with "<name>.u" and "<name>.v", the `compress` of W - W_0, in place of each weight W.

    Raises ValueError unless it is of Custom Diffusion, whose changes have few directions, and of this model.
    """
    if concept.method != "custom_diffusion":
        raise ValueError("concept: expected one of custom-diffusion, whose changes have few directions, got one of "
                         f"{concept.method.replace('_', '-')}")  # fmt: skip
    check_base(sd, concept)
    base, tensors = dict(sd.unet.named_parameters()), {}
    for name, value in uncompressed(sd, concept).tensors.items():
        if name == "tokens":
            tensors[name] = value
        else:
            change = value.float() - base[name.removeprefix("unet.")].detach().float().cpu()
            tensors[f"{name}.u"], tensors[f"{name}.v"] = compress(change, keep)
    return replace(concept, tensors=tensors, about=concept.about | {"compressed": keep})


def uncompressed(sd: StableDiffusion, concept: Concept) -> Concept:
    """The concept with whole weights: each pair "<name>.u", "<name>.v" becomes <name> = W_0 + u v.

    sd: the model of W_0, with no concept applied.
    """
    thin = [name.removesuffix(".u") for name in concept.tensors if name.endswith(".u")]
    base = {f"unet.{name}": param for name, param in sd.unet.named_parameters()} if thin else {}
    tensors = {name: value for name, value in concept.tensors.items() if not name.endswith((".u", ".v"))}
    for name in thin:
        u, v = (concept.tensors.get(f"{name}.{side}", torch.empty(0)).float() for side in "uv")
        if name not in base or u.ndim != 2 or v.ndim != 2 or (len(u), v.shape[1]) != tuple(base[name].shape):
            raise ValueError(f"concept: expected u and v of a weight of this model, got others for {name}")
        tensors[name] = base[name].detach().float().cpu() + u @ v
    return replace(concept, tensors=tensors)
