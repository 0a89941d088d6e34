"""The text of a JSON file, value by value, in memory that one value of the longest kind bounds."""

import codecs
import json
import re
from typing import Any, BinaryIO

from veneer.config import UserError

CHUNK = 1 << 20  # bytes read at once
BLANK = re.compile(r"[ \t\r\n]*")
SCAN = json.JSONDecoder().raw_decode
MARKS = re.compile(r'\\.?|["\[\]{},]', re.DOTALL)  # what tells where a value ends


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
        while True:
            try:
                value, end = SCAN(self.text, self.at)
                # `1.` may go on as `1.5e+3`: so near to what is not read yet, a number may not be whole.
                if self.ended or end + 8 < len(self.text):
                    size, self.at = end - self.at, end
                    return (value, size) if size <= longest else (None, 0)
            except json.JSONDecodeError as error:
                # Of a value that is cut off, an open string is told where it begins, all else close to the cut.
                is_cut = error.msg.startswith("Unterminated string") or error.pos + 64 > len(self.text)
                if self.ended or not is_cut:
                    raise self.broken(error.pos, f"broken JSON: {error.msg}") from None
            except (ValueError, RecursionError) as error:
                raise self.broken(self.at, f"JSON that cannot be read: {error}") from None
            if len(self.text) - self.at > longest + 8:
                self.pass_over()
                return None, 0
            self.more()

    def pass_over(self) -> None:
        """Take the JSON value that begins here without holding it."""
        depth, quoted = 0, False
        while True:
            start, self.at = self.at, len(self.text)
            for found in MARKS.finditer(self.text, start):
                mark = found[0]
                if mark == "\\":  # what it stands before is not read yet
                    self.at = found.start()
                elif mark == '"':
                    quoted = not quoted
                elif not quoted and mark in "[{":
                    depth += 1
                elif not quoted and mark in "]}" and depth:
                    depth -= 1
                elif quoted or depth or mark not in ",]":
                    continue
                else:
                    self.at = found.start()
                    return
            if self.ended:
                raise self.broken(self.at, "broken JSON: the array is not closed")
            self.more()

    def broken(self, at: int, why: str, fix: str = "mend the file") -> UserError:
        line = self.lines + self.text.count("\n", 0, at)
        return UserError(f"{self.name}:{line}: {why}", f"{fix}, or name another in {self.setting}")
