"""Finds rows that bring a chat template with them, whose control tokens would be learnt as letters.

A row brings a template where a turn, or a text, begins or ends with a control token. Those of the known model families
are looked for, whichever the base: of another family they are letters for it, too. Control tokens within a text
are left alone; a text may speak of them.
"""

import re
from collections.abc import Sequence
from dataclasses import replace

from veneer.data.conversation import BadRowError, Conversation, Message

_TOKEN = (
    r"(?:<\|[A-Za-z]\w*\|>|<｜[^｜<>\s]{1,40}｜>|<(?:start|end)_of_turn>|</?s>|<(?:bos|eos|eot|pad)>"
    r"|\[/?INST\]|<</?SYS>>|\[(?:CLS|SEP|PAD|gMASK)\])"
)
_BEGINS = re.compile(_TOKEN)
_ENDS = re.compile(rf"(?:\s*{_TOKEN})+\s*\Z")
TAIL = 400  # characters of a text that may be its last control tokens
SETTING = "data.special_tokens_in_text"


def strip_control_tokens(
    conversation: Conversation, setting: str, added: Sequence[str] = ()
) -> tuple[Conversation, bool]:
    """The conversation without control tokens at its ends, where the setting strips them; and whether any were there.

    Args:
        conversation: conversation as its row has it.
        setting: `data.special_tokens_in_text`.
        added: tokens that the run adds; they are no template's.

    Raises:
        BadRowError: It brings a template with it, and the setting does not say what becomes of that.
    """
    if setting not in ("auto", "strip"):
        return conversation, False
    sides = (conversation.messages, conversation.rejected)
    messages, rejected = (tuple(_stripped(m, n, setting, added) for n, m in enumerate(side, 1)) for side in sides)
    if (messages, rejected) == sides:
        return conversation, False
    return replace(conversation, messages=messages, rejected=rejected), True


def _stripped(message: Message, number: int, setting: str, added: Sequence[str]) -> Message:
    if message.role == "tool":
        return message  # what a tool gives is as it is
    text = message.content
    for token in added:
        text = text.replace(token, "-" * len(token))  # of the same length, since the end may be cut off
    what = "the text" if message.role == "document" else f"turn {number}"
    if begins := _BEGINS.match(text.lstrip()[:TAIL]):
        raise BadRowError(
            f"{what} begins with {begins[0]}: the row brings a template with it, whose tokens would be learnt as "
            f"letters; write messages instead, or set {SETTING} to control (they are control tokens) or text (letters)"
        )
    tail = text[-TAIL:]
    if not (ends := _ENDS.search(tail)):
        return message
    if setting == "strip" and message.role != "document":
        return replace(message, content=message.content[: len(text) - len(tail) + ends.start()])
    strip = "" if message.role == "document" else "strip (take such tokens off the end), "
    raise BadRowError(
        f"{what} ends with {ends[0].strip()}: the row brings a template's token with it, which would be learnt as "
        f"letters; set {SETTING} to {strip}control (it is a control token) or text (letters)"
    )
