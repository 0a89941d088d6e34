"""Turns a raw row into a conversation, or into the reason why it is none: the part that needs no tokenizer.

Every row has one fate, and the ledger counts it: usable, unreadable (it could not be read from its file), refused (it
was read, and cannot be right), or empty.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from veneer.config import Data, UserError
from veneer.data.conversation import BadRowError, Conversation, Message
from veneer.data.formats import to_conversation
from veneer.data.recognise import recognise
from veneer.data.screening.prerendered import strip_control_tokens
from veneer.data.screening.privacy import find, redact
from veneer.data.sources.block import RowBlock, Unreadable
from veneer.data.sources.find import DataSource
from veneer.data.sources.read import parse, read_blocks
from veneer.data.template import template_source

LOOKED_AT = 100  # rows that a format is recognised by


@dataclass(frozen=True, slots=True)
class RowProblem:
    """A row that is not used, and why."""

    place: str
    fate: str  # unreadable, refused
    reason: str


@dataclass(frozen=True, slots=True)
class Personal:
    """Personal data in a row: its place and kind, never the text itself."""

    place: str
    kind: str
    turn: int
    start: int
    end: int


@dataclass(frozen=True)
class ParsedRow:
    """A usable row."""

    conversation: Conversation
    group: Any
    personal: tuple[Personal, ...]
    notes: tuple[str, ...] = ()  # what the ledger counts of it


class RowParser:
    """Turns the raw rows of one source into conversations.

    Args:
        data: settings of the data.
        format_name: format of this source, recognised.
    """

    def __init__(self, data: Data, format_name: str) -> None:
        self._data = data
        self.format_name = format_name
        named = data.add_special_tokens or ()
        # A base whose own template writes a token has that token.
        source = (template_source(None, data) if named and data.chat_template != "auto" else None) or ""
        self._added = [token for token in named if token not in source]

    def take(self, raw: Any, place: str) -> ParsedRow | RowProblem | None:
        """A row's conversation, its problem, or None if it is empty."""
        row = parse(raw)
        if isinstance(row, Unreadable):
            return self._problem(place, "unreadable", row.reason)
        try:
            fields = without(row, self._data.ignore_columns)
            conversation = replace(to_conversation(fields, self.format_name, self._data.columns), place=place)
            group = self._group(row)
            conversation = replace(conversation, group="" if group is None else str(group))
            setting = self._data.special_tokens_in_text
            conversation, is_stripped = strip_control_tokens(conversation, setting, self._added)
            if conversation.is_empty:
                return None
            conversation, personal = self._privacy(conversation)
        except BadRowError as error:
            return self._problem(place, "refused", str(error))
        has_ignored = any(row.get(name) for name in self._data.ignore_columns)
        notes = {"ignored_columns": has_ignored, "control_tokens_stripped": is_stripped}
        return ParsedRow(conversation, group, personal, tuple(name for name, is_so in notes.items() if is_so))

    def _problem(self, place: str, fate: str, reason: str) -> RowProblem:
        """A problem whose reason, which may quote the row, holds no personal data."""
        return RowProblem(place, fate, reason if self._data.pii == "off" else redact(reason, find(reason)))

    def _group(self, row: Mapping[str, Any]) -> Any:
        if self._data.group is None:
            return None
        if self._data.group not in row:
            raise BadRowError(f"no column `{self._data.group}` (data.group; fields here: {', '.join(row)})")
        return row[self._data.group]

    def _privacy(self, conversation: Conversation) -> tuple[Conversation, tuple[Personal, ...]]:
        if self._data.pii == "off":
            return conversation, ()
        messages, personal = _searched(conversation.messages, conversation.place)
        rejected, more = _searched(conversation.rejected, conversation.place)
        personal += tuple(found for found in more if found not in personal)
        if not personal:
            return conversation, ()
        if self._data.pii == "refuse":
            kinds = ", ".join(sorted({found.kind for found in personal}))
            raise BadRowError(f"personal data ({kinds}); data.pii = refuse")
        if self._data.pii == "redact":
            conversation = replace(conversation, messages=messages, rejected=rejected)
        return conversation, personal


def without(row: dict[str, Any], columns: Sequence[str]) -> dict[str, Any]:
    """A row as though its file had no such columns."""
    return {name: row[name] for name in row if name not in columns} if columns else row


def _searched(messages: tuple[Message, ...], place: str) -> tuple[tuple[Message, ...], tuple[Personal, ...]]:
    """The turns with what was found redacted, and what it was."""
    redacted, personal = [], []
    for number, message in enumerate(messages, 1):
        changed = message
        for part in ("content", "reasoning"):
            text = getattr(message, part)
            findings = find(text) if text else []
            if findings:
                shown = redact(text, findings)
                changed = replace(changed, content=shown) if part == "content" else replace(changed, reasoning=shown)
                personal += [Personal(place, f.kind, number, f.start, f.end) for f in findings]
        if message.tool_calls:
            calls, kinds = _searched_value(list(message.tool_calls))
            changed = replace(changed, tool_calls=tuple(calls))
            personal += [Personal(place, kind, number, start, end) for kind, start, end in kinds]
        redacted.append(changed)
    return tuple(redacted), tuple(personal)


def _searched_value(value: Any) -> tuple[Any, list[tuple[str, int, int]]]:
    """A tool call's arguments with what was found redacted, and what it was."""
    if isinstance(value, str):
        findings = find(value)
        return redact(value, findings), [(f.kind, f.start, f.end) for f in findings]
    if isinstance(value, dict):
        parts = {key: _searched_value(item) for key, item in value.items()}
        return {key: part[0] for key, part in parts.items()}, [kind for part in parts.values() for kind in part[1]]
    if isinstance(value, list):
        items = [_searched_value(item) for item in value]
        return [item[0] for item in items], [kind for item in items for kind in item[1]]
    return value, []


def blocks_of(source: DataSource, setting: str, data: Data) -> Iterator[RowBlock]:
    """The rows of a source as the settings have them read."""
    return read_blocks(source, setting, data.text_by, data.max_row_bytes)


def recognise_source(source: DataSource, setting: str, data: Data) -> tuple[str, str]:
    """The format of a source and the reason, from its first readable rows.

    Raises:
        UserError: It holds no rows, or none that can be read, or its format is unknown or ambiguous.
    """
    first: list[dict[str, Any]] = []
    place, problem = "", None
    for block in blocks_of(source, setting, data):
        for at, raw in enumerate(block.rows[:LOOKED_AT]):
            row = parse(raw)
            if isinstance(row, Unreadable):
                problem = problem or f"{block.place(at)}: {row.reason}"
                continue
            place = place or block.place(at)
            first.append(without(row, data.ignore_columns))
        if first:
            return recognise(first, data.format, data.columns, place)
    if problem:
        raise UserError(f"{setting} = {source.location}: no row can be read; {problem}", "mend the file")
    raise UserError(f"{setting} = {source.location}: the file holds no rows", f"name a file with rows in {setting}")


def take_again(
    sources: Sequence[DataSource], formats: Sequence[str], setting: str, data: Data, wanted: Mapping[int, Any] | None
) -> Iterator[tuple[tuple[int, int], Conversation]]:
    """Read rows once more for their conversations: (source, number) and conversation of each usable row.

    Args:
        wanted: For each source the numbers of these rows alone, rising; None: all rows.
    """
    for which, source in enumerate(sources):
        parser = RowParser(data, formats[which])
        numbers = None if wanted is None else wanted.get(which, np.empty(0, np.int64))
        if numbers is not None and not len(numbers):
            continue
        for block in blocks_of(source, setting, data):
            for at in range(len(block.rows)) if numbers is None else _places(numbers, block.numbers):
                taken = parser.take(block.rows[at], block.place(at))
                if isinstance(taken, ParsedRow):
                    yield (which, block.numbers[at]), taken.conversation
            if numbers is not None and block.numbers[-1] >= numbers[-1]:
                break


def _places(wanted: Any, numbers: Sequence[int]) -> list[int]:
    """The positions of those rising numbers that are in a rising array of wanted ones."""
    found = np.minimum(np.searchsorted(wanted, numbers), len(wanted) - 1)
    places: list[int] = np.flatnonzero(wanted[found] == np.asarray(numbers)).tolist()
    return places


def chosen(block: RowBlock, keep: Sequence[int]) -> RowBlock:
    """A block with only some of its rows."""
    return replace(block, numbers=[block.numbers[n] for n in keep], rows=[block.rows[n] for n in keep])
