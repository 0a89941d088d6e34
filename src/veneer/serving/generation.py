"""One answer while it is made: what was asked, how far it is, and what it tells who asked.

Whoever asks gives a function that takes events; it is called on the scheduler's thread and must only hand them on.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from veneer.serving.detokenize import TextOfTokens
from veneer.serving.errors import ApiError
from veneer.serving.sampling import Choice, Decoding


class Likely(NamedTuple):
    """A token with its log-probability."""

    id: int
    logprob: float


class Token(NamedTuple):
    """A token of an answer: its log-probability, and the likeliest ones where they were asked for."""

    id: int
    logprob: float
    likeliest: Sequence[Likely]


@dataclass(frozen=True)
class Piece:
    """Text that is certain, and the tokens that were made since the last piece (where log-probabilities are asked)."""

    text: str
    tokens: tuple[Token, ...] = ()


@dataclass(frozen=True)
class Ended:
    """The end of an answer.

    Attributes:
        reason: stop or length.
        tokens: Tokens made, with the one that ended it.
        cached: Tokens of the prompt that had been read before.
    """

    reason: str
    tokens: int
    cached: int


Event = Piece | Ended | ApiError


@dataclass(eq=False)
class Generation:
    """An answer that is asked for.

    Attributes:
        prompt: Token ids.
        adapter: Number of the row's adapter in the bank; 0: the base.
        cache_key: Owner of the prompt's keys and values: a hash of base and adapter.
        limit: Most tokens.
        stop_ids: Tokens that end it.
        text: Its text so far.
        decoding: Settings by which its tokens are chosen.
        likeliest: Log-probabilities a token; None: none are asked for.
        grammar: Matcher of a grammar; None: there is none.
        tell: Takes its events.
        deadline: Time at which it is given up, by `time.monotonic`.
        on_end: Called once it is over, whatever ended it.
    """

    prompt: list[int]
    adapter: int
    cache_key: str
    limit: int
    stop_ids: frozenset[int]
    text: TextOfTokens
    decoding: Decoding
    tell: Callable[[Event], None]
    deadline: float
    likeliest: int | None = None
    grammar: Any = None
    on_end: Callable[[], None] = lambda: None
    ids: list[int] = field(default_factory=list)
    cached: int = 0
    is_cancelled: bool = False
    is_over: bool = False
    asked_at: float = field(default_factory=time.monotonic)
    first_at: float | None = None
    last_at: float = 0.0
    _untold: list[Token] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.decoding.seed)

    @property
    def position(self) -> int:
        """Position of the token that is read next."""
        return len(self.prompt) + len(self.ids) - 1

    @property
    def last_token(self) -> int:
        """The token that is read next."""
        return self.ids[-1] if self.ids else self.prompt[-1]

    @property
    def most_tokens(self) -> int:
        """Tokens of prompt and answer together, at most."""
        return len(self.prompt) + self.limit

    def take(self, choice: Choice) -> str | None:
        """Take its next token; return why the tokens end here: stop or length; None: they go on."""
        self.ids.append(choice.token)
        if choice.token in self.stop_ids:
            return "stop"
        if self.grammar is not None:
            self.grammar.consume(choice.token)
            if self.grammar.is_ended:
                return "stop"
        return "length" if len(self.ids) >= self.limit else None

    def say(self, choice: Choice, ended: str | None) -> str | None:
        """Tell the text of a token that was taken; return why the answer ends here, which a stop text may do too."""
        is_stop = choice.token in self.stop_ids
        if self.likeliest is not None and not is_stop:
            likely = tuple(Likely(*pair) for pair in choice.likeliest[: self.likeliest])
            self._untold.append(Token(choice.token, choice.logprob, likely))
        text = "" if is_stop else self.text.put(choice.token)
        if self.text.stopped:
            ended = "stop"
        elif ended is not None:
            text += self.text.end()
            ended = "stop" if self.text.stopped else ended
        if text or (self._untold and ended is not None):
            self.tell(Piece(text, tuple(self._untold)))
            self._untold.clear()
        return ended

    def over(self, event: Ended | ApiError | None) -> None:
        """End it, and tell so where somebody still listens."""
        if self.is_over:
            return
        self.is_over = True
        if event is not None and not self.is_cancelled:
            self.tell(event)
        self.on_end()
