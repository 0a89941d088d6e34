"""Reads the text of a JSON file value by value, in no more memory than the longest value takes."""

import codecs
import json
import re
from typing import Any, BinaryIO

import numpy as np

from veneer.config import UserError

CHUNK = 1 << 20  # bytes read at once
PIECE = 1 << 17  # characters looked through at once
BLANK = re.compile(r"[ \t\r\n]*")
SCAN = json.JSONDecoder().raw_decode
BRACKETS = [[ord(mark) for mark in marks] for marks in ("[{", "]}")]
ENDS = [ord(mark) for mark in ",]"]  # what follows a value of an array


class JsonText:
    """The text of a JSON file from where it is read on; what lies behind is dropped."""

    def __init__(self, stream: BinaryIO, name: str, setting: str) -> None:
        self.stream, self.name, self.setting = stream, name, setting
        self.decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self.text, self.at, self.ended = "", 0, False
        self.lines = 1  # the line on which `text` begins

    def more(self) -> None:
        """Read on: as much again as is held, so that the retries on a large row stay linear in its size."""
        self.lines += self.text.count("\n", 0, self.at)
        self.text, self.at = self.text[self.at :], 0
        chunk = self.stream.read(max(CHUNK, len(self.text)))
        self.ended = not chunk
        try:
            self.text += self.decoder.decode(chunk, final=self.ended)
        except UnicodeDecodeError as error:
            self.lines += error.object.count(b"\n", 0, error.start)
            raise self.broken(len(self.text), "not UTF-8 text", "save the file as UTF-8") from None

    def mark(self) -> str:
        """The next character that is not blank, without taking it; empty at the end of the file."""
        while True:
            blank = BLANK.match(self.text, self.at)
            assert blank, "matches anything"
            self.at = blank.end()
            if self.at < len(self.text) or self.ended:
                return self.text[self.at : self.at + 1]
            self.more()

    def value(self, longest: int) -> tuple[Any, int]:
        """The JSON value that begins here, taken, and its length; of a longer one than that None and 0."""
        is_whole = False  # whether the text is known to reach behind it
        while True:
            try:
                value, end = SCAN(self.text, self.at)
                # `1.` may go on as `1.5e+3`: so near to what is not read yet, a number may not be whole.
                if self.ended or is_whole or end + 8 < len(self.text):
                    size, self.at = end - self.at, end
                    return (value, size) if size <= longest else (None, 0)
            except json.JSONDecodeError as error:
                # Of a value that is cut off, an open string is told where it begins, all else close to the cut.
                is_cut = error.msg.startswith("Unterminated string") or error.pos + 64 > len(self.text)
                if self.ended or is_whole or not is_cut:
                    raise self.broken(error.pos, f"broken JSON: {error.msg}") from None
            except (ValueError, RecursionError) as error:
                raise self.broken(self.at, f"JSON that cannot be read: {error}") from None
            if not self.reach_behind(longest):
                return None, 0
            is_whole = True

    def reach_behind(self, longest: int) -> bool:
        """Read on to the end of the value that begins here; one longer than `longest` is taken and not held: False."""
        size, depth, is_quoted, is_held = 0, 0, False, True
        while True:
            start = self.at + size
            piece = self.text[start : start + PIECE]
            plain = piece.replace("\\\\", "  ").replace('\\"', "  ")  # a quote that is left opens or ends a string
            plain = plain.removesuffix("\\")  # what it stands before is in the next piece
            if plain:
                end, depth, is_quoted = _end_of_value(plain, depth, is_quoted)
                size += end
                if size > longest or not is_held:
                    self.at, size, is_held = self.at + size, 0, False
                if end < len(plain):
                    return is_held
            elif not self.ended:
                self.more()
            elif is_held:
                return True  # it is not closed, which parsing it tells best
            else:
                raise self.broken(len(self.text), "broken JSON: the array is not closed")

    def broken(self, at: int, why: str, fix: str = "mend the file") -> UserError:
        line = self.lines + self.text.count("\n", 0, at)
        return UserError(f"{self.name}:{line}: {why}", f"{fix}, or name another in {self.setting}")


def _end_of_value(text: str, depth: int, is_quoted: bool) -> tuple[int, int, bool]:
    """The end of a value of an array, found by whole arrays, since a character at a time would take minutes.

    Args:
        text: A part of the value and what follows, without escaped quotes.
        depth: number of brackets that are open before it.
        is_quoted: whether a string is open before it.

    Returns:
        The place of the comma or bracket behind the value, the length of the text where there is none; and depth and
        is_quoted at the end of the text.
    """
    codes_N = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    outside_N = (np.cumsum(codes_N == ord('"')) + is_quoted) % 2 == 0
    steps_N = np.isin(codes_N, BRACKETS[0]).astype(np.int64) - np.isin(codes_N, BRACKETS[1])
    steps_N[~outside_N] = 0
    depths_N = depth + np.cumsum(steps_N)
    is_end_N = outside_N & (depths_N - steps_N <= 0) & np.isin(codes_N, ENDS)
    end = int(is_end_N.argmax()) if is_end_N.any() else len(text)
    return end, int(depths_N[-1]), not outside_N[-1]
