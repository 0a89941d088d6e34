"""Holds what a row stands for, whatever its format: the turns of a conversation, or a document to read on.

Nothing here knows a file format or a template. A conversation is plain data, so that a worker process can send it.
"""

from dataclasses import dataclass
from typing import Any


class BadRowError(Exception):
    """A row cannot be used; the message says what is wrong with it, without its place."""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn.

    Attributes:
        role: system, user, assistant, tool; or document, for text that is no conversation.
        content: text; empty where an answer only calls tools.
        weight: weight of an answer's tokens in the loss; 0: read, not learnt.
        reasoning: text that an answer thought before it was given.
        tool_calls: `{"name": ..., "arguments": {...}}` each.
        name: tool that answered, of a tool turn.
        ids: ids of its calls, where the row has them; of a tool turn: the id of the call that it answers.
    """

    role: str
    content: str
    weight: float = 1.0
    reasoning: str = ""
    tool_calls: tuple[dict[str, Any], ...] = ()
    name: str = ""
    ids: tuple[str, ...] = ()

    def as_turn(self) -> dict[str, Any]:
        """The turn as chat templates read it."""
        turn: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.reasoning:
            turn["reasoning_content"] = self.reasoning
        if self.tool_calls:
            turn["tool_calls"] = [{"type": "function", "function": call} for call in self.tool_calls]
            for call, call_id in zip(turn["tool_calls"], self.ids):
                call["id"] = call_id
        elif self.ids:
            turn["tool_call_id"] = self.ids[0]
        if self.name:
            turn["name"] = self.name
        return turn


@dataclass(frozen=True, slots=True)
class Conversation:
    """One row.

    Attributes:
        messages: turns.
        place: file and line (`tickets.jsonl:12`).
        tools: Definitions of the tools that the answers may call, as JSON schemas.
        rejected: turns with the answer that was not preferred, of a preference pair.
        label: whether the answer is good, of a rated row.
        group: value of the column whose rows belong together; empty: it stands alone.
        choices: possible answers that the row names, the right one among them; they are no part of the prompt.
    """

    messages: tuple[Message, ...]
    place: str = ""
    tools: tuple[dict[str, Any], ...] = ()
    rejected: tuple[Message, ...] = ()
    label: bool | None = None
    group: str = ""
    choices: tuple[str, ...] = ()

    @property
    def is_document(self) -> bool:
        """Whether it is text to read on, not a conversation."""
        return self.messages[0].role == "document"

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to learn, or an answer that says nothing."""
        if self.is_document:
            return not self.messages[0].content.strip()
        sides = [self.messages, self.rejected] if self.rejected else [self.messages]
        return any(_says_nothing(side) for side in sides)

    @property
    def ends_with_answer(self) -> bool:
        """Whether nothing stands behind the last answer."""
        return self.is_document or self.messages[-1].role == "assistant"

    def prompt(self) -> tuple[Message, ...]:
        """The turns before the last answer; none of a document."""
        return () if self.is_document else self.messages[: self._last_answer()]

    def reference(self) -> str:
        """The last answer; nothing of a document."""
        return "" if self.is_document else self.messages[self._last_answer()].content

    def text(self) -> str:
        """All its text but for system prompts, which many rows share; near-duplicates are found by it."""
        turns = (*self.messages, *self.rejected[-1:])
        return "\n".join(message.content for message in turns if message.role != "system")

    def _last_answer(self) -> int:
        return max(n for n, message in enumerate(self.messages) if message.role == "assistant")


def _says_nothing(messages: tuple[Message, ...]) -> bool:
    answers = [message for message in messages if message.role == "assistant" and message.weight]
    return not answers or not all(answer.content.strip() or answer.tool_calls for answer in answers)
