"""Turns rows of embeddings into examples: the tokens of their texts, and behind them how many each text has.

The last number of an example is the number of its texts, and the only one that is trained: so a row counts once in the
loss, and its texts stay together. The engine of embeddings takes the texts out again (engine/embedder.py).
"""

from collections.abc import Sequence
from functools import partial
from itertools import chain
from typing import Any

import numpy as np

from veneer.config import Data
from veneer.data.batch import Example
from veneer.data.conversation import BadRowError, Conversation
from veneer.data.labelled import LabelledRenderer
from veneer.data.render import MakeRenderer


class TextsRenderer(LabelledRenderer):
    """Turns an anchor, its positive text and negatives into tokens.

    Args:
        tokenizer: A fast Transformers tokenizer; it pads on the right from here on.
        data: The settings: max_length, overlong, special_tokens_in_text.
    """

    row_format = "text-pair"

    def __init__(self, tokenizer: Any, data: Data) -> None:
        super().__init__(tokenizer, data, ())

    @property
    def make(self) -> MakeRenderer:
        return partial(TextsRenderer)

    def render(self, conversations: Sequence[Conversation]) -> list[list[Example] | BadRowError]:
        """Each row as one example."""
        turns = [turn for row in conversations for turn in (row.messages[0], row.messages[-1], *row.messages[1:-1])]
        encoded = iter(self.encode([(turn.content,) for turn in turns]))
        return [[texts_example([next(encoded) for _ in row.messages], row.place)] for row in conversations]

    def pieces(self, example: Example) -> list[dict[str, Any]]:
        """An example's texts; all are learnt from."""
        texts = [self.tokenizer.decode(ids.tolist()) for ids in split_texts(example.ids)]
        return [{"text": f"{text}\n", "weight": float(n > 0), "control": False} for n, text in enumerate(texts)]


def texts_example(texts: Sequence[Sequence[int]], place: str) -> Example:
    """Return the tokens of texts, their lengths and their number, which is what is trained."""
    ids = np.array([*chain(*texts), *map(len, texts), len(texts)], dtype=np.int32)
    return Example(ids, ((len(ids) - 1, len(ids), 1.0),), place)


def split_texts(ids: Any) -> list[Any]:
    """Return the tokens of each text of an example: the anchor, the positive, the negatives; as arrays or tensors."""
    count = int(ids[-1])
    lengths = [int(length) for length in ids[-1 - count : -1]]
    ends = np.cumsum(lengths)
    return [ids[end - length : end] for length, end in zip(lengths, ends)]
