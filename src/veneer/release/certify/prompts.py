"""The prompts of a certificate: held-out rows of the run, and the cases that break exports.

The edge cases are short; each has broken a converted model before: an empty question, one far longer than any that was
trained, text outside ASCII, text that looks like control tokens, white space that a template may trim, several turns.
A case that the model's template refuses (as in training) is left out.
"""

from dataclasses import dataclass, replace

from veneer.config import UserError
from veneer.data.conversation import Message
from veneer.data.pipeline import HeldOut
from veneer.data.render import Renderer
from veneer.evaluation.decoding import expected_answer
from veneer.model.tuned import TunedModel

UNICODE = "Grüße aus Zürich! 你好,世界 🙂👩‍🚀 مرحبا नमस्ते Ω≈ç√ \u200b½"
LONG_WORD = "please tell me more about it, "


@dataclass(frozen=True)
class Prompt:
    """A conversation to be answered.

    Attributes:
        id: Row of the data, or name of the edge case.
        ids: Tokens by the tokenizer and template of training, control strings read as control tokens:
            that is how most servers read them.
        reference: The right answer, of a held-out row.
        trained_ids: Tokens as training has them, control strings as its settings say.
    """

    id: str
    messages: tuple[Message, ...]
    ids: list[int]
    reference: str | None = None
    trained_ids: tuple[int, ...] = ()

    def as_read(self, found: list[int] | None) -> "Prompt":
        """Return the prompt as a server reads it that reads control strings as training does."""
        return replace(self, ids=found) if found is not None and tuple(found) == self.trained_ids else self


def prompts_of(renderer: Renderer, held_out: list[HeldOut], longest: int) -> list[Prompt]:
    """Return held-out rows that ask something, then the edge cases.

    Args:
        renderer: Tokenizer and template of training.
        held_out: Rows.
        longest: Tokens of the very long case.
    """
    settings = renderer.settings.model_copy(update={"special_tokens_in_text": "control"})
    reader = Renderer(renderer.tokenizer, settings)
    found = []
    for row in held_out:
        conversation = row.conversation
        turns = conversation.messages
        if conversation.is_document or conversation.tools or any(m.reasoning or m.tool_calls for m in turns):
            continue
        expected = expected_answer(renderer, conversation)
        made = _prompt(renderer, reader, conversation.place, conversation.prompt(), expected)
        if made is not None:
            found.append(made)
    for name, turns in _edges(renderer, longest):
        made = _prompt(renderer, reader, name, turns, None)
        if made is not None and made.ids:
            found.append(made)
    return found


def very_long(tuned: TunedModel, max_new_tokens: int) -> int:
    """Return the tokens of the very long case: a thousand, or half of a small model's positions."""
    positions = getattr(tuned.config.get_text_config(), "max_position_embeddings", None) or 4096
    return max(8, min(1000, (positions - max_new_tokens) // 2))


def _prompt(
    renderer: Renderer, reader: Renderer, name: str, turns: tuple[Message, ...], reference: str | None
) -> Prompt | None:
    turns = reader.with_system(turns)
    try:
        return Prompt(name, turns, reader.prompt_ids(turns), reference, tuple(renderer.prompt_ids(turns)))
    except UserError:
        return None


def _edges(renderer: Renderer, longest: int) -> list[tuple[str, tuple[Message, ...]]]:
    tokenizer = renderer.tokenizer
    each = max(1, len(tokenizer(LONG_WORD, add_special_tokens=False)["input_ids"]))
    control = "".join(dict.fromkeys(tokenizer.all_special_tokens))
    texts = {
        "empty": "",
        "very long": LONG_WORD * max(1, longest // each),
        "unicode": UNICODE,
        "special-token strings": f"what does {control} mean?",
        "white space": "  two  spaces,\n\n\nthree lines \t and a tab  ",
    }
    found: list[tuple[str, tuple[Message, ...]]] = [
        (f"edge: {name}", (Message("user", text),)) for name, text in texts.items()
    ]
    if renderer.is_chat:
        turns = (Message("user", "Hello"), Message("assistant", "Hello! How can I help?"), Message("user", "Thank you"))
        found.append(("edge: several turns", turns))
    return found
