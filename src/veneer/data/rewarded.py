"""Turns answers into examples for a reward model: the tokens that a chat template makes, and one place for the reward.

It is the last token and the only one that is trained, as the id of a label is elsewhere (labelled.py); its value says
nothing. The rows are those of preference training: of a pair, both answers.
"""

from collections.abc import Sequence
from typing import Any

from veneer.config import Data
from veneer.data.batch import Example
from veneer.data.conversation import BadRowError, Conversation
from veneer.data.labelled import labelled_example
from veneer.data.render import MakeRenderer, Renderer


class RewardRenderer(Renderer):
    """Turns conversations into tokens and a place for their reward.

    Args:
        tokenizer: A fast Transformers tokenizer; it pads on the right from here on.
        data: The settings, as of `Renderer`.
    """

    labels = ("reward",)

    def __init__(self, tokenizer: Any, data: Data) -> None:
        tokenizer.padding_side = "right"
        super().__init__(tokenizer, data)

    @property
    def make(self) -> MakeRenderer:
        return RewardRenderer

    @property
    def fingerprint(self) -> str:
        """A hash of the tokenizer, other than that of rows of tokens alone."""
        return f"reward {super().fingerprint}"

    def render(self, conversations: Sequence[Conversation]) -> list[list[Example] | BadRowError]:
        """Each row as examples with a place for the reward, or what is wrong with it."""
        return [
            row if isinstance(row, BadRowError) else [labelled_example(one.ids.tolist(), 0, one.place) for one in row]
            for row in super().render(conversations)
        ]
