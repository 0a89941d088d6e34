"""Adds tokens to a tokenizer, and rows for them to a base (`data.add_special_tokens`).

The rows begin as the mean of the others, so that a new token is at first no more likely than it should be (Hewitt 2021,
https://nlp.stanford.edu/~johnhew/vocab-expansion.html). The adapter holds them once they are trained: another base of
that size with the adapter on it, however its own new rows were filled, is the same model.

Tokens that the chat template writes are control tokens: their text in a row stays text, and answers are shown without
them. Others are parts of texts wherever they stand.
"""

from collections.abc import Sequence
from typing import Any

import torch

from veneer.config import Data, UserError
from veneer.data.template import template_source
from veneer.model.quiet import quiet

SETTING = "data.add_special_tokens"


def add_tokens(tokenizer: Any, data: Data) -> None:
    """Add the tokens of a run to the tokenizer of its base, in place.

    Raises:
        UserError: a token is there already, is named twice, or begins or ends with a space.
    """
    named = data.add_special_tokens or ()
    known = tokenizer.get_vocab()
    for number, token in enumerate(named):
        if token in named[:number]:
            raise UserError(f"{SETTING}: `{token}` is named twice", "name it once")
        if token in known:
            raise UserError(
                f"{SETTING}: `{token}` is a token of this base already, with the id {known[token]}",
                f"leave it out; adapter.trainable_token_indices: [{known[token]}] trains its row",
            )
        if token != token.strip():
            raise UserError(f"{SETTING}: {token!r} begins or ends with a space", "write it without")
    if not named:
        return
    from tokenizers import AddedToken

    source = template_source(tokenizer, data) or ""
    for token in named:  # in their order, which gives their ids
        is_control = token in source
        added = AddedToken(token, special=is_control, normalized=False)
        tokenizer.add_tokens([added], special_tokens=is_control)


def new_ids(base: Any, tokenizer: Any, tokens: Sequence[str]) -> tuple[int, ...]:
    """Return the ids of tokens that a run adds, and of others that the base has no rows for yet."""
    first = min(tokenizer.convert_tokens_to_ids(list(tokens)))
    return tuple(range(min(first, len(base.get_input_embeddings().weight)), len(tokenizer)))


@torch.no_grad()
def add_rows(base: Any, tokenizer: Any, tokens: Sequence[str]) -> tuple[int, ...]:
    """Give a base rows for the tokens that a run adds, in place: the mean of those of the base's own tokens.

    Args:
        base: frozen base model.
        tokenizer: tokenizer with the tokens.
        tokens: tokens that were added.

    Returns:
        Ids of the new rows.
    """
    ids = new_ids(base, tokenizer, tokens)
    embeddings = base.get_input_embeddings()
    if len(tokenizer) > len(embeddings.weight):
        with quiet():
            base.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    for module in (base.get_input_embeddings(), base.get_output_embeddings()):
        if module is not None:
            module.requires_grad_(False)
            module.weight[ids[0] : ids[-1] + 1] = mean_row(module.weight[: ids[0]]).to(module.weight)
    return ids


def mean_row(weight_VD: torch.Tensor) -> torch.Tensor:
    """Return the mean of a matrix's rows, float32."""
    return weight_VD.float().mean(0)
