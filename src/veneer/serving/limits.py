"""Limits of a server: what one request may ask for, and how much waits or runs at a time."""

from dataclasses import dataclass

from veneer.config import UserError

BODY_BYTES = 4 * 2**20
CHOICES = 16  # most answers to one prompt
LIKELIEST = 20  # most log-probabilities a token, as in OpenAI's protocol
STOPS = 16  # most stop texts
STOP_CHARACTERS = 256
TOOLS = 128
SCHEMA_CHARACTERS = 64 * 2**10


@dataclass(frozen=True)
class Limits:
    """The limits.

    Attributes:
        slots: Answers that are made at a time.
        queue: Answers that wait for a slot; further ones get 429.
        seconds: Time of an answer, its wait included.
        max_tokens: Tokens of an answer where the request names no number.
        body_bytes: Bytes of a request's body; larger ones get 413.
        adapters: Adapters that are loaded at a time.

    Raises:
        UserError: A limit is not positive.
    """

    slots: int = 32
    queue: int = 256
    seconds: float = 600.0
    max_tokens: int = 1024
    body_bytes: int = BODY_BYTES
    adapters: int = 16

    def __post_init__(self) -> None:
        for name in ("slots", "seconds", "max_tokens", "body_bytes", "adapters"):
            if not getattr(self, name) > 0:
                option = f"--{name.replace('_', '-')}"
                raise UserError(f"{option} {getattr(self, name)}: should be more than 0", f"write another {option}")
        if self.queue < 0:
            raise UserError(f"--queue {self.queue}: should be 0 or more", "write another --queue")
