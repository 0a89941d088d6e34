"""Renders conversations as tokens and says which of them are trained. The one place where text becomes tokens.

For each answer two texts are rendered with the model's own chat template: everything before it with the
generation prompt, and everything up to its end. Their difference is the answer. The part before has the very tokens
it will have when the model generates; should the answer change them (a merge across the border), the answer is
tokenized by itself, so that training and generation cannot disagree. Trained are the answer's tokens and the
end-of-turn token after it; what the template puts behind the end token (a line break, say) is not. Nothing is found
by searching for strings.

Without a template (`data.chat_template: none`) a row is prompt + completion + end-of-sequence token.
"""

from collections.abc import Sequence
from contextlib import suppress
from importlib import resources
from pathlib import Path
from typing import Any

from veneer.config import UserError
from veneer.data.batch import UNTRAINED, Example
from veneer.data.recognise import Conversation, Message

NAMED_TEMPLATES = ("alpaca", "guanaco")


class Renderer:
    """Turns conversations into tokens for training, evaluation and generation alike.

    Args:
        tokenizer: A fast Transformers tokenizer.
        chat_template: As `data.chat_template`.
        system_prompt: Put before conversations that have no system turn.

    Raises:
        UserError: The template is unknown, or the tokenizer has no end token.
    """

    def __init__(self, tokenizer: Any, chat_template: str = "auto", system_prompt: str | None = None) -> None:
        self.tokenizer = tokenizer
        self.system_prompt = system_prompt
        self.template = _find_template(tokenizer, chat_template)
        if tokenizer.eos_token_id is None:
            raise UserError(
                "the tokenizer has no end-of-sequence token: nothing would tell the model to stop",
                "set eos_token in the model's tokenizer_config.json",
            )
        # A tokenizer's own template writes the begin token itself; the named ones fit any tokenizer.
        self._lead = tokenizer.bos_token if chat_template in NAMED_TEMPLATES and self._bos() else ""
        self._special = set(tokenizer.all_special_ids) | {
            number for number, token in tokenizer.added_tokens_decoder.items() if token.special
        }
        self.stop_ids: set[int] = {tokenizer.eos_token_id}
        if self.is_chat:
            with suppress(UserError):  # a template that fails says so on the first real row
                self.example(Conversation((Message("user", "a"), Message("assistant", "b")), "a trial"))

    @property
    def is_chat(self) -> bool:
        """Whether a chat template is in use; otherwise rows are plain prompt + completion."""
        return self.template is not None

    def example(self, conversation: Conversation) -> Example:
        """A conversation as tokens with its training targets.

        Raises:
            UserError: The template cannot render it, or renders no end token, or rewrites earlier turns.
        """
        messages = self._with_system(conversation.messages)
        if self.template is None:
            return self._plain(messages, conversation.place)
        ids, trained, _ = self._turns(messages, conversation.place)
        return _example(ids, trained, conversation.place)

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """Tokens of a conversation that the model is to continue; the same that training puts before an answer."""
        messages = self._with_system(tuple(messages))
        if self.template is None:
            return self._bos() + self._tokens("".join(message.content for message in messages))
        ids, _, done = self._turns(messages, "prompt")
        return ids + self._continue(ids, done, self._text(messages, True, "prompt"))

    def _turns(self, messages: tuple[Message, ...], place: str) -> tuple[list[int], list[bool], str]:
        """Tokens up to the end of the last answer, which of them are trained, and the text they stand for."""
        ids: list[int] = []
        trained: list[bool] = []
        done = ""
        for n, message in enumerate(messages):
            if message.role != "assistant":
                continue
            before = self._text(messages[:n], True, place)
            after = self._text(messages[: n + 1], False, place)
            _require_prefix(done, before, place)
            _require_prefix(before, after, place)
            prompt_ids = self._continue(ids, done, before)
            answer_ids = self._continue(ids + prompt_ids, before, after)
            ends = [at for at, token in enumerate(answer_ids) if token in self._special]
            if not ends:
                raise UserError(
                    f"{place}: the chat template renders no end-of-turn token after an answer: "
                    "the model would never learn to stop",
                    "let the template end an answer with eos_token, or set data.chat_template",
                )
            self.stop_ids.add(answer_ids[ends[-1]])
            ids += prompt_ids + answer_ids
            trained += [False] * len(prompt_ids)
            trained += [message.trained and at <= ends[-1] for at in range(len(answer_ids))]
            done = after
        return ids, trained, done

    def _plain(self, messages: tuple[Message, ...], place: str) -> Example:
        *prompt, answer = messages
        if answer.role != "assistant" or any(message.role == "assistant" for message in prompt):
            raise UserError(
                f"{place}: without a chat template a row is one prompt and one completion",
                "set data.chat_template",
            )
        before = "".join(message.content for message in prompt)
        prompt_ids = self._tokens(before)
        answer_ids = [*self._continue(prompt_ids, before, before + answer.content), self.tokenizer.eos_token_id]
        bos = self._bos()
        trained = [False] * len(bos + prompt_ids) + [True] * len(answer_ids)
        return _example(bos + prompt_ids + answer_ids, trained, place)

    def _with_system(self, messages: tuple[Message, ...]) -> tuple[Message, ...]:
        if self.system_prompt is None or (messages and messages[0].role == "system"):
            return messages
        return (Message("system", self.system_prompt), *messages)

    def _text(self, messages: tuple[Message, ...], add_generation_prompt: bool, place: str) -> str:
        from jinja2 import TemplateError

        turns = [{"role": message.role, "content": message.content} for message in messages]
        try:
            text: str = self.tokenizer.apply_chat_template(
                turns,
                chat_template=self.template,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
        except (TemplateError, ValueError, TypeError) as error:
            raise UserError(
                f"{place}: the chat template refuses the conversation: {error}",
                "mend the row's turns, or set data.chat_template",
            ) from None
        return self._lead + text

    def _continue(self, ids: list[int], done: str, text: str) -> list[int]:
        """Tokens that go on from `ids`, which stand for the text `done`, to make `text`."""
        whole = self._tokens(text)
        return whole[len(ids) :] if whole[: len(ids)] == ids else self._tokens(text[len(done) :])

    def _tokens(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _bos(self) -> list[int]:
        """The begin token, where this tokenizer puts one before plain text."""
        bos = self.tokenizer.bos_token_id
        return [bos] if bos is not None and self.tokenizer("")["input_ids"][:1] == [bos] else []


def needs_template(format_name: str, renderer: Renderer) -> None:
    """Raises UserError where chat data meets a model that has no chat template."""
    if not renderer.is_chat and format_name != "prompt-completion":
        raise UserError(
            f"the base model has no chat template, and the data is in the chat format {format_name}",
            f"set data.chat_template to {', '.join(NAMED_TEMPLATES)} or a Jinja file, take an instruct model as "
            "model.base, or use prompt / completion rows",
        )


def _find_template(tokenizer: Any, name: str) -> str | None:
    if name == "auto":
        template = tokenizer.chat_template
        return template.get("default") if isinstance(template, dict) else template
    if name == "none":
        return None
    if name in NAMED_TEMPLATES:
        return resources.files("veneer.data").joinpath(f"templates/{name}.jinja").read_text(encoding="utf-8")
    try:
        return Path(name).read_text(encoding="utf-8")
    except OSError:
        raise UserError(
            f"data.chat_template = {name}: neither a known template nor a readable file",
            f"write auto, none, {', '.join(NAMED_TEMPLATES)}, or the path of a Jinja file",
        ) from None


def _require_prefix(start: str, whole: str, place: str) -> None:
    if not whole.startswith(start):
        at = next((n for n, (a, b) in enumerate(zip(start, whole)) if a != b), min(len(start), len(whole)))
        raise UserError(
            f"{place}: the chat template renders earlier turns differently once an answer follows: "
            f"{start[at : at + 30]!r} becomes {whole[at : at + 30]!r}",
            "set data.chat_template to a template that leaves earlier turns alone",
        )


def _example(ids: list[int], trained: list[bool], place: str) -> Example:
    """Targets are the next token where that token is trained; the last token has none."""
    targets = [token if is_trained else UNTRAINED for token, is_trained in zip(ids[1:], trained[1:])]
    return Example(tuple(ids), (*targets, UNTRAINED), place)
