"""From a prompt to the features that the UNet attends to; and new words (placeholder tokens) for a text encoder.

Derived in: notebooks/05_latent_diffusion.ipynb, section "CLIP in miniature".
"""

import copy
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def tokenize(tokenizer, prompts: str | list[str]) -> Tensor:
    """Cut prompts into sub-words and number them: start, sub-words, end, then padding up to the encoder's length.

    Returns (B, L) ids.  Warns if a prompt is too long, and names what is left out.
    Raises ValueError if there is no prompt, or one is not a string.
    Derived in: notebooks/06_stable_diffusion.ipynb, section "The parts".
    """
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not prompts or not all(isinstance(prompt, str) for prompt in prompts):
        raise ValueError(f"prompts: expected a string or a list of strings, got {prompts}")
    length = tokenizer.model_max_length
    prompts = [expand(tokenizer, prompt) for prompt in prompts]
    for prompt in prompts:
        ids = tokenizer(prompt, add_special_tokens=False, verbose=False).input_ids
        if len(ids) > length - 2:
            rest = tokenizer.decode(ids[length - 2 :]).replace("</w>", " ").strip()
            warnings.warn(f"prompt: more than {length - 2} tokens, left out: {rest!r}", stacklevel=2)
    return tokenizer(
        prompts, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
    ).input_ids  # (B, L)


def expand(tokenizer, prompt: str) -> str:
    """Write out a new word of several vectors: "<v>" becomes "<v> <v>_1 <v>_2", as diffusers' pipelines do."""
    added = tokenizer.get_added_vocab()

    def write_out(match: re.Match) -> str:
        token = match[0] if match[0] in added else match[0].lower()  # the tokenizer reads "<V>" as "<v>"
        rows = [token]
        while f"{token}_{len(rows)}" in added:
            rows.append(f"{token}_{len(rows)}")
        return " ".join(rows) if token in added else match[0]

    return re.sub(r"<[^\s<>]+>(?!_)", write_out, prompt) if added else prompt


def encode(text_encoder: nn.Module, ids: Tensor) -> Tensor:
    """The features of each token, after the last layer and its norm, as Stable Diffusion 1.x uses them.

    ids: (B, L).  Returns (B, L, D) in the encoder's dtype.  Source: Rombach et al. 2022, section 3.3.
    Derived in: notebooks/06_stable_diffusion.ipynb, section "The parts".
    """
    return text_encoder(ids.to(text_encoder.device, non_blocking=True)).last_hidden_state


def words(tokenizer, prompt: str) -> list[tuple[str, list[int]]]:
    """The words of a prompt, and the token positions of each: [("a", [1]), ("teapot", [2, 3]), ...].

    Position 0 is the start token. Punctuation marks are words of their own.
    Derived in: notebooks/06_stable_diffusion.ipynb, section "Where each word's attention lies".
    """
    ids = tokenizer(expand(tokenizer, prompt), truncation=True, max_length=tokenizer.model_max_length).input_ids
    added, found, begun = tokenizer.get_added_vocab(), [], []
    for position, token in enumerate(tokenizer.convert_ids_to_tokens(ids)):
        if token in (tokenizer.bos_token, tokenizer.eos_token):
            continue
        begun.append(position)
        if token.endswith("</w>") or token in added:
            word = tokenizer.decode([ids[i] for i in begun]).replace("</w>", "").strip()
            found.append((word, begun))
            begun = []
    return found


def check_noun(tokenizer, noun: str) -> None:
    """Raise a ValueError for an empty class noun, or one with letters that the tokenizer does not know."""
    ids = tokenizer(noun, add_special_tokens=False).input_ids if noun and noun.strip() else []
    unknown = tokenizer.unk_token_id in ids and tokenizer.unk_token_id != tokenizer.eos_token_id
    if not ids or unknown:
        raise ValueError(f"noun: expected a word that the model knows, such as 'cat', got {noun!r}")


def token_trouble(tokenizer, token: str) -> str:
    """Why a token cannot be a new word, as a message to put after the argument's name; "" if it can be one."""
    if not re.fullmatch(r"<[^\s<>]+>(_\d+)?", token) or token != token.lower():
        return f"expected a new token in lower case and brackets, such as <v>, got {token!r}"
    if token in tokenizer.get_vocab():
        return f"expected a token that is new, but the tokenizer knows {token!r}; choose another, such as <v>"
    return ""


class NewTokens(nn.Module):
    """Trainable rows for new words (placeholder tokens) beside the frozen embedding table of a text encoder.

    Ids below V are looked up in the table, ids from V on in `rows`, the only trained parameter. The table is not
    resized, masked or restored: it is not in the optimizer, so weight decay does not reach it. `tokens` names the rows.

        with NewTokens.attach(sd, {"<v>": "cat"}) as new:
            ...  # prompts with <v> work; new.rows is trained

    table: the encoder's (V, D) embedding.  rows: (n, D) first values; kept in float32.
    """

    def __init__(self, table: nn.Embedding, rows: Tensor, tokens: list[str]):
        super().__init__()
        self.table, self.tokens = table.requires_grad_(False), tokens
        self.rows = nn.Parameter(rows.detach().to(table.weight.device, torch.float32, copy=True))

    @classmethod
    @contextmanager
    def attach(cls, sd, words: dict[str, str]) -> Iterator["NewTokens"]:
        """Add new words to a model, each with the embedding of a known word at first; afterwards they are removed.

        sd: a StableDiffusion; its text encoder and tokenizer are used.  words: {"<v>": "cat"}: a new token in lower
        case and angle brackets, and its initializer token: the word that it starts from (for several sub-words, the
        mean).
        Raises ValueError if a new word is not of that form or exists, if a known word is empty, or if the encoder has
        new tokens already.
        """
        table, tokenizer = sd.text_encoder.get_input_embeddings(), sd.tokenizer
        if not isinstance(table, nn.Embedding):
            raise ValueError(f"text_encoder: expected one without new tokens, got one with {type(table).__name__}")
        if len(tokenizer) != table.num_embeddings:
            raise ValueError(
                f"tokenizer: expected the {table.num_embeddings} words of the encoder, got {len(tokenizer)}"
            )
        rows = [cls._first_value(tokenizer, table, token, word) for token, word in words.items()]
        if not rows:
            raise ValueError('words: expected new tokens with a word each, such as {"<v>": "cat"}, got none')
        new = cls(table, torch.stack(rows), list(words))
        try:
            sd.tokenizer = copy.deepcopy(tokenizer)  # a word cannot be removed again, so it is added to a copy
            sd.tokenizer.add_tokens(list(words))
            sd.text_encoder.set_input_embeddings(new)
            yield new
        finally:
            sd.text_encoder.set_input_embeddings(table)
            sd.tokenizer = tokenizer

    @staticmethod
    def _first_value(tokenizer, table: nn.Embedding, token: str, word: str) -> Tensor:
        if trouble := token_trouble(tokenizer, token):
            raise ValueError(f"words: {trouble}")
        ids = tokenizer(word, add_special_tokens=False).input_ids
        if not ids or tokenizer.unk_token_id in ids:
            raise ValueError(f"words: expected a known word for {token!r} to start from, got {word!r}")
        return table.weight[ids].float().mean(dim=0)

    def forward(self, ids: Tensor) -> Tensor:  # (B, L) -> (B, L, D)
        row = ids - self.table.num_embeddings
        known = self.table(ids.masked_fill(row >= 0, 0))
        return torch.where((row >= 0)[..., None], self.rows[row.clamp(min=0)].to(known.dtype), known)
