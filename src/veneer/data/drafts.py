"""Holds drafts: a row as text with borders around its answers, before a tokenizer sees it.

`render.py` makes them with a chat template, and makes examples of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from veneer.data.conversation import BadRowError, Message
from veneer.data.leftout import left_out, names_left_out, strings_of
from veneer.data.template import Spelled
from veneer.data.tokens.encode import MARKS, UNCUT, Encoder, Text

Weighted = tuple[Message, ...]
Texts = list[str | BadRowError]


@dataclass(frozen=True, slots=True)
class Draft:
    """A row's text before it is tokenized.

    Attributes:
        text: text with a border before and after each answer.
        weights: loss weights of the parts before, between and behind the borders: one more than there are borders.
        place: file and line of the row.
        is_chat: whether a template made the text: every second part is an answer with its end-of-turn token. If
            not, the begin and end tokens are still to be added.
    """

    text: Text
    weights: tuple[float, ...]
    place: str
    is_chat: bool


@dataclass(frozen=True, slots=True)
class ChatDraft:
    """A conversation whose texts a template is to make.

    Attributes:
        row: conversation as the template is given it.
        answers: positions of its answers among the turns.
        mark: character that marks control strings, or UNCUT.
        place: file and line of the row.
        is_prompt: whether it is to be continued; no answer of it is trained.
    """

    row: Spelled
    answers: tuple[int, ...]
    mark: str
    place: str
    is_prompt: bool = False

    def cuts(self) -> list[tuple[int, bool]]:
        """The texts before and behind each answer, and a prompt's own."""
        cuts = [cut for n in self.answers for cut in ((n, True), (n + 1, False))]
        return [*cuts, (len(self.row.messages), True)] if self.is_prompt else cuts

    def others(self) -> list[tuple[Spelled, list[tuple[int, bool]]]]:
        """Two other first answers, where the conversation begins with one: what they share stands before it."""
        if self.answers[:1] != (0,):
            return []
        first = [
            replace(self.row.messages[0], content=text, reasoning="", tool_calls=(), ids=()) for text in ("a", "b")
        ]
        return [(replace(self.row, messages=(message,)), [(1, False)]) for message in first]


def with_marks(
    encoder: Encoder, messages: tuple[Message, ...], tools: tuple[dict[str, Any], ...]
) -> tuple[str, tuple[Message, ...], tuple[dict[str, Any], ...]]:
    """The turns with control strings marked, so that they stay text, and the mark; UNCUT where there are none."""
    texts = [message.content for message in messages]
    if tools or any(message.reasoning or message.tool_calls for message in messages):
        texts += strings_of(([(message.reasoning, message.tool_calls) for message in messages], tools))
    if not any(map(encoder.holds_control, texts)):
        return UNCUT, messages, tools
    mark = next((mark for mark in MARKS if not any(mark in text for text in texts)), None)
    if mark is None:
        raise BadRowError("holds every one of Unicode's noncharacters U+FDD0 to U+FDEF")
    marked = tuple(
        replace(
            message,
            content=encoder.marked(message.content, mark),
            reasoning=encoder.marked(message.reasoning, mark),
            tool_calls=tuple(_mark_all(encoder, call, mark) for call in message.tool_calls),
        )
        for message in messages
    )
    return mark, marked, tuple(_mark_all(encoder, tool, mark) for tool in tools)


def _mark_all(encoder: Encoder, value: Any, mark: str) -> Any:
    if isinstance(value, str):
        return encoder.marked(value, mark)
    if isinstance(value, dict):
        return {key: _mark_all(encoder, item, mark) for key, item in value.items()}
    return [_mark_all(encoder, item, mark) for item in value] if isinstance(value, list) else value


def weighted(messages: tuple[Message, ...], loss_on: str) -> Weighted:
    """The turns with the weights that `loss_on` leaves their answers."""
    answers = [n for n, message in enumerate(messages) if message.role == "assistant"]
    if loss_on == "last":
        kept = set(answers[-1:])
    elif loss_on == "completion":
        asked = max((n for n, message in enumerate(messages[: answers[-1]]) if message.role == "user"), default=-1)
        kept = {n for n in answers if n > asked}
    else:
        return messages
    return tuple(m if n in kept else replace(m, weight=0.0) for n, m in enumerate(messages))


def texts_around(chat: ChatDraft, made: Texts) -> dict[int, tuple[str, str]]:
    """For each answer the text before it, and the text up to its end.

    Raises:
        BadRowError: The template refuses one of them.
    """
    found: dict[int, tuple[str, str]] = {}
    for at, n in enumerate(chat.answers):
        before, after = made[2 * at : 2 * at + 2]
        if n == 0 and (isinstance(before, BadRowError) or not text_or_raise(after).startswith(before)):
            # Templates that look at the first turn fail on none, or begin otherwise.
            first, second = map(text_or_raise, made[-2:])
            before = first[: shared_length(first, second)]
        found[n] = text_or_raise(before), text_or_raise(after)
    return found


def text_or_raise(made: str | BadRowError) -> str:
    if isinstance(made, BadRowError):
        raise made
    return made


def left_out_of(chat: ChatDraft, texts: dict[int, tuple[str, str]]) -> str:
    """The parts of a conversation that stand nowhere in its texts, in words; empty where all do."""
    messages = chat.row.messages
    behind, last = "", 0
    for n in chat.answers:
        before, after = texts[n]
        asked = before[len(behind) :] if before.startswith(behind) else before
        if what := left_out(messages[last:n], asked) or left_out(messages[n : n + 1], after[len(before) :]):
            return what
        behind, last = after, n + 1
    return names_left_out(chat.row.tools, behind)


def prompt_text(chat: ChatDraft, made: Texts) -> Text:
    """The text of a prompt, cut where training would cut it."""
    count = len(chat.cuts())
    whole = text_or_raise(made[count - 1])
    borders: list[int] = []
    for before, after in texts_around(chat, made).values():
        if not whole.startswith(after) or not after.startswith(before):
            borders = []  # rewritten history: trained as one text, too
            break
        borders += [len(before), len(after)]
    return Text(whole, tuple(borders), chat.mark)


def add_span(spans: list[tuple[int, int, float]], start: int, end: int, weight: float) -> None:
    """Append a span; one that continues the last makes that longer."""
    if not weight or start >= end:
        return
    if spans and spans[-1][1:] == (start, weight):
        start = spans.pop()[0]
    spans.append((start, end, weight))


def shared_length(first: Sequence[Any], second: Sequence[Any]) -> int:
    """The number of characters, or of tokens, that two sequences begin with alike."""
    return next((n for n, (a, b) in enumerate(zip(first, second)) if a != b), min(len(first), len(second)))
