"""Text from tokens as they come, and texts that end an answer.

A token may be half a character, and a tokenizer may write a space only between two tokens. So each new piece is the
difference of two decodings of the last few tokens, begun where the text was whole before; half a character waits.
Joined, the pieces are the decoding of all tokens. A text that ends the answer may begin and end within tokens: what may
become one waits, and what is given is never taken back.
"""

from collections.abc import Sequence
from typing import Any

HALF = "\ufffd"  # what half a character decodes to
MOST_WAITING = 16  # tokens that wait for the rest of a character; more are no character


class TextOfTokens:
    """The text of one answer while it grows.

    Args:
        tokenizer: The tokenizer.
        stop: Texts that end the answer; they are no part of it.
        keep_special: Whether control tokens are part of the text.

    Attributes:
        stopped: Whether a stop text ended it.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = (), keep_special: bool = False) -> None:
        self._tokenizer, self._stop, self._skip = tokenizer, tuple(stop), not keep_special
        self._ids: list[int] = []
        self._begin = self._whole = 0  # tokens before those that are decoded, and before the piece that is new
        self._held = ""  # what may become a stop text
        self.stopped = False

    def put(self, token: int) -> str:
        """Take a token; return the text that is certain by now."""
        self._ids.append(token)
        piece = self._new()
        is_half = piece.endswith(HALF) and len(self._ids) - self._whole < MOST_WAITING
        if is_half or not piece:  # tokens without a text are no beginning: what follows would lose its space
            return ""
        self._begin, self._whole = self._whole, len(self._ids)
        return self._released(piece)

    def end(self) -> str:
        """Return what is left when no more tokens come."""
        if self.stopped:
            return ""
        text = self._released(self._new()) + self._held  # nothing is held where a stop text was found
        self._held = ""
        return text

    def _new(self) -> str:
        before = self._decode(self._ids[self._begin : self._whole])
        return self._decode(self._ids[self._begin :])[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=self._skip, clean_up_tokenization_spaces=False))

    def _released(self, piece: str) -> str:
        """Return what of the held text and the new piece can be no part of a stop text."""
        if not self._stop:
            return piece
        text = self._held + piece
        found = [at for at in map(text.find, self._stop) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        begun = max(
            (size for stop in self._stop for size in range(1, len(stop)) if text.endswith(stop[:size])), default=0
        )
        self._held = text[len(text) - begun :]
        return text[: len(text) - begun]
