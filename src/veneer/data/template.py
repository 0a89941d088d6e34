"""Chat templates: which one a run uses, and what it can say.

A base's own template is used as it is. Named ones, for bases that have none, are fitted to the tokenizer: where
its vocabulary lacks the template's end-of-turn token, the end-of-sequence token takes its place, since an answer
must end in a token that the model can learn. A template that writes no begin token, on a tokenizer that puts one before
text, gets one written into it, so that the template that ships renders what was trained.

What a template cannot say is spelled into the text, in the form that Qwen and Hermes models read (`<tools>`,
`<tool_call>`, `<think>`), rather than lost: many templates leave out tools or reasoning without a word.
"""

import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from veneer.config import UserError
from veneer.data.conversation import BadRowError, Message

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
TOOLS_HEAD = (
    "You may call one or more of these functions to answer:\n<tools>\n{tools}\n</tools>\n\nTo call one, write a JSON "
    'object with its name and arguments within <tool_call></tool_call>:\n<tool_call>\n{{"name": <name>, '
    '"arguments": <arguments>}}\n</tool_call>'
)


class Template:
    """A chat template on its tokenizer.

    Args:
        tokenizer: A fast Transformers tokenizer.
        source: The Jinja text.

    Attributes:
        source: What ships with the adapter.
        says_tools, says_reasoning: Whether the template renders them; if not, they are spelled into the text.
    """

    def __init__(self, tokenizer: Any, source: str) -> None:
        self._special = dict(tokenizer.special_tokens_map)
        self.source = source
        if _puts_bos(tokenizer) and not self._trial([Message("user", "a")]).startswith(tokenizer.bos_token):
            self.source = "{{- bos_token -}}" + source
        call = {"name": "zq_call", "arguments": {"a": 1}}
        tool = {"type": "function", "function": {"name": "zq_tool", "description": "", "parameters": {}}}
        asked = [
            Message("user", "a"),
            Message("assistant", "zq_text", tool_calls=(call,)),
            Message("tool", "zq_result"),
        ]
        words = ("zq_call", "zq_tool", "zq_text", "zq_result")
        self.says_tools = all(word in self._trial(asked, (tool,)) for word in words)
        thought = Message("assistant", "b", reasoning="zq_thought")
        self.says_reasoning = "zq_thought" in self._trial([Message("user", "a"), thought])
        self._drops_reasoning = "zq_thought" not in self._trial([Message("user", "a"), _spell_reasoning(thought)])

    def render(
        self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] = (), add_generation_prompt: bool = False
    ) -> str:
        """The text of a conversation.

        Raises:
            BadRowError: The template refuses it.
        """
        return self._rendered(*self._spelled(messages, tools), add_generation_prompt)

    def _rendered(
        self, messages: Sequence[Message], tools: Sequence[dict[str, Any]], add_generation_prompt: bool
    ) -> str:
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        try:  # what apply_chat_template calls; that itself refuses an empty conversation
            texts, _ = render_jinja_template(
                conversations=[[message.as_turn() for message in messages]],
                tools=list(tools) or None,
                chat_template=self.source,
                add_generation_prompt=add_generation_prompt,
                **self._special,
            )
        except (TemplateError, ValueError, TypeError, KeyError, IndexError) as error:
            raise BadRowError(f"the chat template refuses the conversation: {error}") from None
        text: str = texts[0]
        return text

    def _trial(self, messages: list[Message], tools: Sequence[dict[str, Any]] = ()) -> str:
        """What the template makes of a trial conversation, with nothing spelled out; nothing if it refuses."""
        try:
            return self._rendered(messages, tools, False)
        except BadRowError:
            return ""

    def _spelled(
        self, messages: Sequence[Message], tools: Sequence[dict[str, Any]]
    ) -> tuple[Sequence[Message], Sequence[dict[str, Any]]]:
        if not self.says_reasoning and any(message.reasoning for message in messages):
            if self._drops_reasoning:
                raise BadRowError("the chat template leaves the reasoning of answers out: it would not be learnt")
            messages = [_spell_reasoning(message) for message in messages]
        if self.says_tools or not (tools or any(m.tool_calls or m.role == "tool" for m in messages)):
            return messages, tools
        messages = [_spell_tools(message) for message in messages]
        if tools:
            head = TOOLS_HEAD.format(tools="\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools))
            has_system = bool(messages) and messages[0].role == "system"
            before = f"{messages[0].content}\n\n" if has_system else ""
            messages = [Message("system", before + head), *messages[has_system:]]
        return messages, ()


def find_template(tokenizer: Any, name: str) -> Template | None:
    """The template that `data.chat_template` names; None where rows are to stay plain text.

    Raises:
        UserError: It names neither a template nor a readable file.
    """
    if name == "auto":
        own = tokenizer.chat_template
        own = own.get("default") if isinstance(own, dict) else own
        return Template(tokenizer, own) if own else None
    if name == "none":
        return None
    if name in END_OF_TURN:
        source = resources.files("veneer.data").joinpath(f"templates/{name}.jinja").read_text(encoding="utf-8")
        end = END_OF_TURN[name]
        if end is not None and end not in tokenizer.get_vocab():
            source = source.replace(end, tokenizer.eos_token)
        return Template(tokenizer, source)
    try:
        return Template(tokenizer, Path(name).expanduser().read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError):
        raise UserError(
            f"data.chat_template = {name}: neither a known template nor a readable file",
            f"write auto, none, {', '.join(NAMED_TEMPLATES)}, or the path of a Jinja file",
        ) from None


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
    return Message(message.role, content, message.weight, tool_calls=message.tool_calls)


def _spell_tools(message: Message) -> Message:
    if message.role == "tool":
        return Message("user", f"<tool_response>\n{message.content}\n</tool_response>")
    if not message.tool_calls:
        return message
    calls = [f"<tool_call>\n{json.dumps(call, ensure_ascii=False)}\n</tool_call>" for call in message.tool_calls]
    content = "\n".join([message.content, *calls] if message.content else calls)
    return Message(message.role, content, message.weight, message.reasoning)
