"""Finds the chat template that a run uses, and what that template can say.

A base's own template is used as it is. Named ones, for bases that have none, are fitted to the tokenizer: where
its vocabulary lacks the template's end-of-turn token, the end-of-sequence token takes its place, since an answer
must end in a token that the model can learn. A template that writes no begin token, on a tokenizer that puts one before
text, gets one written into it, and one that asks for today's date gets the run's (frozen.py), so that the template that
ships renders what was trained.

Tools and calls are the template's own where it renders them. What a template cannot say is spelled into the text, in
the form that Qwen and Hermes models read (`<tools>`, `<tool_call>`, `<think>`), rather than lost: many templates leave
out tools or reasoning without a word. What it can do is found by rendering trial conversations.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import resources
from itertools import groupby
from pathlib import Path
from typing import Any

from veneer.config import Data, UserError
from veneer.config.files import read_text
from veneer.data.conversation import BadRowError, Message
from veneer.data.frozen import freeze_date
from veneer.data.sandbox import Job, RefusedError, TemplateLimitError, shared

# Named templates, and the token that ends a turn in each; None: the end-of-sequence token.
END_OF_TURN: dict[str, str | None] = {
    "chatml": "<|im_end|>",
    "llama-3": "<|eot_id|>",
    "mistral": None,
    "gemma": "<end_of_turn>",
    "phi-3": "<|end|>",
    "alpaca": None,
    "guanaco": None,
}
NAMED_TEMPLATES = tuple(END_OF_TURN)
LARGEST_BYTES = 2**20  # of a template's file; the longest published ones have 30 kB
TEMPLATE_FIX = "name another template in data.chat_template, or take this one's fault out"
TOOLS_HEAD = (
    "You may call one or more of these functions to answer:\n<tools>\n{tools}\n</tools>\n\nTo call one, write a JSON "
    'object with its name and arguments within <tool_call></tool_call>:\n<tool_call>\n{{"name": <name>, '
    '"arguments": <arguments>}}\n</tool_call>'
)


# How a template takes a call's arguments (as text, or as the object) and its id: the first way that it renders.
WAYS = [(is_text, call_id) for is_text in (False, True) for call_id in ("", "zq_call_id", "zqcallid1")]
TOOL = {"type": "function", "function": {"name": "zq_tool", "description": "", "parameters": {}}}


@dataclass(frozen=True)
class Spelled:
    """A conversation as the template is given it.

    Attributes:
        notes: changes that were made to its parts, for the ledger.
    """

    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...]
    notes: tuple[str, ...] = ()


class Template:
    """A chat template on its tokenizer.

    Args:
        tokenizer: A fast Transformers tokenizer.
        source: The Jinja text.
        settings: template_date and unrendered.

    Attributes:
        source: Jinja text that ships with the adapter.
        says_system, says_reasoning: Whether the template renders them.
        says_calls, says_tools: Whether it renders calls with their results, and definitions of tools.

    Raises:
        UserError: It exceeds the limits of time or memory.
    """

    def __init__(self, tokenizer: Any, source: str, settings: Data) -> None:
        self._special = dict(tokenizer.special_tokens_map)
        self._unrendered = settings.unrendered
        self._text_arguments, self._ids = False, ""
        self.source = freeze_date(source, settings.template_date)
        asked = Message("user", "a")
        if _puts_bos(tokenizer) and not self._trial([asked]).startswith(tokenizer.bos_token):
            self.source = "{{- bos_token -}}" + self.source
        self.says_system = "zq_system" in self._trial([Message("system", "zq_system"), asked])
        self.says_calls = any(self._says_calls(*way) for way in WAYS)
        self.says_tools = self.says_calls and "zq_tool" in self._trial([asked], (TOOL,))
        thought = Message("assistant", "b", reasoning="zq_thought")
        self.says_reasoning = "zq_thought" in self._trial([asked, thought])
        self._drops_reasoning = "zq_thought" not in self._trial([asked, _spell_reasoning(thought)])

    def _says_calls(self, is_text: bool, call_id: str) -> bool:
        """Whether calls are rendered whole when they are given in this way, which is kept."""
        self._text_arguments, self._ids = is_text, call_id
        call = {"name": "zq_call", "arguments": {"zq_key": "zq_value"}}
        ids = (call_id,) if call_id else ()
        called = [Message("assistant", "", tool_calls=(call,), ids=ids), Message("tool", "zq_result", ids=ids)]
        text = self._trial([Message("user", "a"), *called], (TOOL,))
        is_whole = all(word in text for word in ("zq_call", "zq_key", "zq_value", "zq_result"))
        # Python's quotes: the object was printed as it is; escaped ones: text was written as JSON once more.
        return is_whole and "'zq_key'" not in text and '\\"zq_key' not in text

    def texts(
        self, rows: Sequence[tuple[Spelled, Sequence[tuple[int, bool]]]], places: Sequence[str]
    ) -> list[list[str | BadRowError]]:
        """Texts of conversations.

        Args:
            rows: Each with the cuts to render: how many turns, and whether the generation prompt follows.
            places: file and line of each row, for messages.

        Returns:
            A text for each cut, or why the template refuses it.

        Raises:
            UserError: The template exceeds the limits of time or memory.
        """
        jobs = [Job([self._turn(message) for message in row.messages], row.tools, cuts) for row, cuts in rows]
        try:
            made = shared().render(self.source, self._special, jobs)
        except TemplateLimitError as error:
            raise UserError(
                f"{places[error.row]}: the chat template {error}",
                TEMPLATE_FIX,
            ) from None
        return [[_refused(text) if isinstance(text, RefusedError) else text for text in texts] for texts in made]

    def text(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        """The text of one conversation.

        Raises:
            BadRowError: The template refuses it. UserError: The template exceeds its limits.
        """
        return self._text(self.spelled(messages, ()), add_generation_prompt)

    def _text(self, row: Spelled, add_generation_prompt: bool) -> str:
        ((text,),) = self.texts([(row, [(len(row.messages), add_generation_prompt)])], ["a conversation"])
        if isinstance(text, BadRowError):
            raise text
        return text

    def spelled(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]]) -> Spelled:
        """A conversation with what the template cannot say written into its text, or left out if settings allow it.

        Raises:
            BadRowError: Something would be left out, and may not be.
        """
        messages, notes = list(messages), list[str]()
        if not self.says_system and any(message.role == "system" for message in messages):
            messages = self._without_system(messages, notes)
        if not self.says_reasoning and any(message.reasoning for message in messages):
            messages = self._without_reasoning(messages, notes)
        has_calls = any(message.tool_calls or message.role == "tool" for message in messages)
        if (tools and not self.says_tools) or (has_calls and not self.says_calls):
            messages, tools = self._spell_tools(messages, tools), ()
            notes.append("tools_spelled")
        if self._ids and has_calls:
            messages = _with_ids(messages, self._ids)
        return Spelled(tuple(messages), tuple(tools), tuple(notes))

    def _without_system(self, messages: list[Message], notes: list[str]) -> list[Message]:
        if self._unrendered == "refuse":
            raise BadRowError(
                "the chat template has no place for a system turn: it would be left out; set data.unrendered to "
                "into-user or leave-out, or data.chat_template to a template that renders it"
            )
        if self._unrendered == "into-user":
            notes.append("system_into_user")
            return _into_user(messages)
        notes.append("left_out_by_template")
        return [message for message in messages if message.role != "system"]

    def _without_reasoning(self, messages: list[Message], notes: list[str]) -> list[Message]:
        if not self._drops_reasoning:
            notes.append("reasoning_spelled")
            return [_spell_reasoning(message) for message in messages]
        if self._unrendered != "leave-out":
            raise BadRowError(
                "the chat template leaves the reasoning of answers out: it would not be learnt; set data.unrendered to "
                "leave-out to learn the answers without it, or data.chat_template to a template that renders it"
            )
        notes.append("left_out_by_template")
        return [replace(message, reasoning="") for message in messages]

    def _spell_tools(self, messages: list[Message], tools: Sequence[dict[str, Any]]) -> list[Message]:
        messages = _spell_calls(messages)
        if not tools:
            return messages
        head = TOOLS_HEAD.format(tools="\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools))
        has_system = bool(messages) and messages[0].role == "system"
        before = f"{messages[0].content}\n\n" if has_system else ""
        messages = [Message("system", before + head), *messages[has_system:]]
        return messages if self.says_system else _into_user(messages)

    def _turn(self, message: Message) -> dict[str, Any]:
        turn = message.as_turn()
        if self._text_arguments:
            for call in turn.get("tool_calls", ()):
                arguments = json.dumps(call["function"]["arguments"], ensure_ascii=False)
                call["function"] = call["function"] | {"arguments": arguments}
        return turn

    def _trial(self, messages: list[Message], tools: Sequence[dict[str, Any]] = ()) -> str:
        """The text that the template makes of a trial conversation, with nothing spelled out; empty if it refuses."""
        try:
            return self._text(Spelled(tuple(messages), tuple(tools)), False)
        except BadRowError:
            return ""


def find_template(tokenizer: Any, settings: Data) -> Template | None:
    """The template that `data.chat_template` names; None where rows are to stay plain text.

    Raises:
        UserError: It names neither a template nor a readable file, or the template exceeds its limits.
    """
    source = template_source(tokenizer, settings)
    if source is None:
        return None
    end = END_OF_TURN.get(settings.chat_template)
    if end is not None and end not in tokenizer.get_vocab():
        source = source.replace(end, tokenizer.eos_token)
    return Template(tokenizer, source, settings)


def template_source(tokenizer: Any, settings: Data) -> str | None:
    """The text of the template that `data.chat_template` names, not fitted to the tokenizer; None: there is none.

    Raises:
        UserError: It names neither a template nor a readable file.
    """
    name = settings.chat_template
    if name == "auto":
        return own_template(tokenizer) or None
    if name == "none":
        return None
    if name in END_OF_TURN:
        return resources.files("veneer.data").joinpath(f"templates/{name}.jinja").read_text(encoding="utf-8")
    fix = f"write auto, none, {', '.join(NAMED_TEMPLATES)}, or the path of a Jinja file"
    try:
        return read_text(Path(name).expanduser(), LARGEST_BYTES, fix)
    except UserError as error:
        why = str(error).splitlines()[0]
        raise UserError(
            f"data.chat_template = {name}: neither a known template nor a readable file ({why})", fix
        ) from None


def own_template(tokenizer: Any) -> str | None:
    """The chat template that a tokenizer brings; None or empty: it brings none."""
    own = tokenizer.chat_template
    found: str | None = own.get("default") if isinstance(own, dict) else own
    return found


def names_file(chat_template: str) -> bool:
    """Whether `data.chat_template` is the path of a Jinja file."""
    return chat_template not in ("auto", "none", *NAMED_TEMPLATES)


def begin_ids(tokenizer: Any) -> list[int]:
    """The begin token, where this tokenizer puts one before plain text."""
    return [tokenizer.bos_token_id] if _puts_bos(tokenizer) else []


def _puts_bos(tokenizer: Any) -> bool:
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer("")["input_ids"][:1] == [bos]


def _spell_reasoning(message: Message) -> Message:
    if not message.reasoning:
        return message
    content = f"<think>\n{message.reasoning}\n</think>\n\n{message.content}"
    return replace(message, content=content, reasoning="")


def _spell_calls(messages: list[Message]) -> list[Message]:
    """Calls within the text, and the results that follow each other as one user turn."""
    spelled: list[Message] = []
    for role, group in groupby(messages, lambda message: message.role):
        turns = list(group)
        if role == "tool":
            results = "\n".join(f"<tool_response>\n{turn.content}\n</tool_response>" for turn in turns)
            turns = [Message("user", results)]
        spelled += [_spell_call(turn) for turn in turns]
    return spelled


def _spell_call(message: Message) -> Message:
    if not message.tool_calls:
        return message
    calls = [f"<tool_call>\n{json.dumps(call, ensure_ascii=False)}\n</tool_call>" for call in message.tool_calls]
    content = "\n".join([message.content, *calls] if message.content else calls)
    return Message(message.role, content, message.weight, message.reasoning)


def _into_user(messages: list[Message]) -> list[Message]:
    """System turns at the head of the user turns behind them."""
    found: list[Message] = []
    held = ""
    for message in messages:
        if message.role == "system":
            held += f"{message.content}\n\n"
            continue
        if held and message.role != "user":
            break
        found.append(replace(message, content=held + message.content) if held else message)
        held = ""
    if held:
        raise BadRowError("no user turn follows a system turn, and the chat template has no place for it")
    return found


def _with_ids(messages: list[Message], form: str) -> list[Message]:
    """Calls and results with ids that the template takes: a row's own, fitted to it, else numbered ones."""
    found: list[Message] = []
    open_ids: list[str] = []
    count = 0
    for message in messages:
        ids = tuple(_fitted(known, form) for known in message.ids)
        if message.role == "tool":
            ids = ids or tuple(open_ids[:1])
            open_ids = [known for known in open_ids if known not in ids]
        elif message.tool_calls:
            ids = ids or tuple(f"call{count + n:05d}" for n in range(len(message.tool_calls)))
            count += len(ids)
            open_ids = list(ids)
        found.append(replace(message, ids=ids))
    return found


def _fitted(known: str, form: str) -> str:
    """An id of nine letters and digits, where a template takes no others (Mistral's)."""
    if form == "zq_call_id" or (len(known) == len(form) and known.isascii() and known.isalnum()):
        return known
    return hashlib.sha256(known.encode()).hexdigest()[: len(form)]


def _refused(error: RefusedError) -> BadRowError:
    return BadRowError(f"the chat template refuses the conversation: {error}")
