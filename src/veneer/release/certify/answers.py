"""Generates answers of an exported GGUF file in llama.cpp, for the same rows as any other model's."""

from collections.abc import Callable, Sequence
from pathlib import Path

from veneer.data.conversation import Conversation
from veneer.data.render import Renderer
from veneer.release.certify.servers import llama_server

SLOTS = 8  # conversations at once: a step of llama.cpp answers them together, and each slot keeps what they begin with


def gguf_answers(
    file: Path,
    renderer: Renderer,
    asked: Sequence[Conversation],
    max_new_tokens: int,
    on_done: Callable[[int], None] = lambda done: None,
) -> list[str]:
    """Return greedy answers, in the order of the conversations.

    Args:
        file: The GGUF file.
        renderer: Tokenizer and template of training; only its system prompt is used, since the file has its own.
        asked: Rows to be answered, without their last answers.
        max_new_tokens: Longest answer.
        on_done: Callback that gets the number of rows just answered.

    Raises:
        UserError: llama.cpp is not installed, or does not load the file.
    """
    prompts = [renderer.with_system(chat.prompt()) for chat in asked]
    longest = max(len(renderer.prompt_ids(turns)) for turns in prompts)
    with llama_server(file, renderer.is_chat, set(), longest + max_new_tokens + 16, slots=SLOTS) as server:
        return server.texts(prompts, max_new_tokens, SLOTS, on_done)
