"""Says how the tokens of an answer are chosen, and where it stops. Names and scales are those of Transformers."""

import math
from dataclasses import dataclass

from veneer.config.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """The way in which each token of an answer is chosen.

    Attributes:
        temperature: 0: the likeliest token each time; above: sampled.
        top_p: Sample from the likeliest tokens that together have this probability; 1: from all.
        top_k: Sample from so many of the likeliest tokens; 0: from all.
        repetition_penalty: Divides the logits of tokens that are in the prompt or the answer already; 1: none.
        stop: The answer ends before the first of these texts.
        seed: seed of the sampling.

    Raises:
        UserError: A value is out of range, or has no effect beside the others.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int = 42

    def __post_init__(self) -> None:
        _require("--temperature", self.temperature, 0 <= self.temperature < math.inf, "0 or more, and finite")
        _require("--top-p", self.top_p, 0 < self.top_p <= 1, "more than 0 and at most 1")
        _require("--top-k", self.top_k, self.top_k >= 0, "0 (all tokens) or more")
        penalty = self.repetition_penalty
        _require("--repetition-penalty", penalty, 0 < penalty < math.inf, "more than 0, and finite")
        _require("--seed", self.seed, 0 <= self.seed < 2**63, "0 or more, and less than 2^63")
        if not all(self.stop):
            raise UserError('--stop "": an empty text would end every answer at once', "leave it out")
        for option, is_set in (("--top-p", self.top_p < 1), ("--top-k", self.top_k > 0)):
            if is_set and self.temperature == 0:
                raise UserError(
                    f"{option} chooses what is sampled from, and at temperature 0 nothing is sampled",
                    f"add --temperature 1, or leave {option} out",
                )


def _require(option: str, value: float, is_right: bool, what: str) -> None:
    if not is_right:
        raise UserError(f"{option} {value}: should be {what}", f"write a value of {option} that is {what}")
