"""Renders conversations as tokens and says which of them are trained. The one place where text becomes tokens.

For each answer two texts are rendered with the model's own chat template: everything before it with the
generation prompt, and everything up to its end. Their difference is the answer, and its first and last characters give
the first and last token. Trained are the answer's tokens and the end-of-turn token after it; what the template puts
behind the end token (a line break, say) is not. Nothing is found by searching for strings.

A template that renders earlier turns anew once a later one follows (it strips their reasoning, say) makes those
texts disagree; `data.rewritten_history` says what becomes of such rows. Without a template
(`data.chat_template: none`) a row is prompt + completion + end-of-sequence token; a document is its text and that
token.

Training, evaluation, generation and serving all come here; examples are made many at a time, since tokenizers are
several times faster then.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np

from veneer.config import Data, UserError
from veneer.data.batch import Example
from veneer.data.conversation import BadRowError, Conversation, Message
from veneer.data.template import NAMED_TEMPLATES, begin_ids, find_template
from veneer.data.tokens import MARKS, UNCUT, Encoder, Text

Weighted = tuple[Message, ...]


@dataclass(frozen=True, slots=True)
class _Draft:
    """A row before its tokens.

    Attributes:
        text: With a border before and after each answer.
        weights: Of the parts before, between and behind the borders: one more than there are borders.
        place: Of the row.
        is_chat: Whether a template made the text: every second part is an answer with its end-of-turn token. If
            not, the begin and end tokens are still to be added.
    """

    text: Text
    weights: tuple[float, ...]
    place: str
    is_chat: bool


class Renderer:
    """Turns conversations into tokens for training, evaluation and generation alike.

    Args:
        tokenizer: A fast Transformers tokenizer.
        data: The settings: chat_template, system_prompt, loss_on, rewritten_history, special_tokens_in_text; None:
            the defaults.

    Attributes:
        template: Jinja text that ships with the adapter; None where rows are plain text.
        stop_ids: Tokens that end an answer.

    Raises:
        UserError: The template is unknown, or the tokenizer has no end token.
    """

    def __init__(self, tokenizer: Any, data: Data | None = None) -> None:
        self.tokenizer = tokenizer
        self.settings = data or Data(train="-")
        self._template = find_template(tokenizer, self.settings.chat_template)
        if tokenizer.eos_token_id is None:
            raise UserError(
                "the tokenizer has no end-of-sequence token: nothing would tell the model to stop",
                "set eos_token in the model's tokenizer_config.json",
            )
        self._encoder = Encoder(tokenizer)
        self._lead = begin_ids(tokenizer)
        self.stop_ids: set[int] = {tokenizer.eos_token_id}
        if self.is_chat:  # a template that fails says so on the first real row
            self.render([Conversation((Message("user", "a"), Message("assistant", "b")), "a trial")])

    @property
    def is_chat(self) -> bool:
        """Whether a chat template is in use; otherwise rows are plain prompt + completion."""
        return self._template is not None

    @property
    def fingerprint(self) -> str:
        """Of the tokenizer: equal where the same texts become the same tokens."""
        return self._encoder.fingerprint

    @property
    def template(self) -> str | None:
        return None if self._template is None else self._template.source

    def render(self, conversations: Sequence[Conversation]) -> list[list[Example] | BadRowError]:
        """Each conversation as examples, or what is wrong with it.

        Most are one example. A preference pair is two, chosen and rejected; rewritten_history: split makes one of
        every answer.
        """
        drafts: list[list[_Draft] | BadRowError] = []
        for conversation in conversations:
            try:
                drafts.append(self._drafts(conversation))
            except BadRowError as error:
                drafts.append(error)
        flat = [draft for row in drafts if not isinstance(row, BadRowError) for draft in row]
        made = iter(zip(flat, self._encoder.encode_at([draft.text for draft in flat])))
        results: list[list[Example] | BadRowError] = []
        for row in drafts:
            if isinstance(row, BadRowError):
                results.append(row)
                continue
            parts = [next(made) for _ in row]
            try:
                results.append([self._example(draft, *tokens) for draft, tokens in parts])
            except BadRowError as error:
                results.append(error)
        return results

    def example(self, conversation: Conversation) -> Example:
        """A single conversation as tokens.

        Raises:
            UserError: It cannot be rendered.
        """
        (made,) = self.render([conversation])
        if isinstance(made, BadRowError):
            raise UserError(f"{conversation.place}: {made}")
        return made[0]

    def prompt_ids(self, messages: Sequence[Message], tools: tuple[dict[str, Any], ...] = ()) -> list[int]:
        """Tokens of a conversation that the model is to continue; the same that training puts before an answer."""
        mark, messages, tools = self._marked(tuple(messages), tools)
        if self._template is None:
            text, lead = Text("".join(message.content for message in messages), (), mark), self._lead
        else:
            try:
                text, lead = self._prompt_text(self._with_system(messages), tools, mark), []
            except BadRowError as error:
                raise UserError(f"prompt: {error}") from None
        return lead + self._encoder.encode_at([text])[0][0]

    def pieces(self, example: Example) -> list[dict[str, Any]]:
        """An example's text in stretches of equal weight, control tokens by themselves: text, weight, control."""
        pieces: list[dict[str, Any]] = []
        ids, weights = example.ids.tolist(), example.weights.tolist()
        start = 0
        for at in range(1, len(ids) + 1):
            control = ids[start] in self._encoder.control
            if at < len(ids) and not control and ids[at] not in self._encoder.control and weights[at] == weights[start]:
                continue
            text = self.tokenizer.decode(ids[start:at], skip_special_tokens=False, clean_up_tokenization_spaces=False)
            pieces.append({"text": text, "weight": weights[start], "control": control})
            start = at
        return pieces

    def overlong_characters(self, max_length: int) -> int:
        """A text of more characters than this has more than max_length tokens, whatever it says."""
        return self._encoder.longest_token * max_length

    def chunks(self, document: Example, length: int) -> list[Example]:
        """A document in pieces of at most so many tokens, each piece begun as documents are with this tokenizer."""
        return document.pieces(length, np.array(self._lead, dtype=np.int32))

    # From rows to drafts: text, and where the answers stand in it.

    def _drafts(self, conversation: Conversation) -> list[_Draft]:
        sides = [conversation.messages] + ([conversation.rejected] if conversation.rejected else [])
        drafts = []
        for side in sides:
            mark, messages, tools = self._marked(side, conversation.tools)
            if conversation.is_document:
                drafts.append(_Draft(Text(messages[0].content, (0,), mark), (0.0, 1.0), conversation.place, False))
            elif self._template is None:
                drafts.append(self._plain(messages, tools, mark, conversation.place))
            else:
                weighted = _weighted(self._with_system(messages), self.settings.loss_on)
                drafts += self._chat(weighted, tools, mark, conversation.place)
        return drafts

    def _plain(self, messages: tuple[Message, ...], tools: tuple[dict[str, Any], ...], mark: str, place: str) -> _Draft:
        *prompt, answer = messages
        if answer.role != "assistant" or any(message.role == "assistant" for message in prompt):
            raise BadRowError("without a chat template a row is one prompt and one completion")
        if tools or answer.reasoning or any(message.tool_calls for message in messages):
            raise BadRowError(
                "without a chat template tools, calls and reasoning have no place; set data.chat_template"
            )
        before = "".join(message.content for message in prompt)
        context = float(self.settings.loss_on == "all")
        text = Text(before + answer.content, (0, len(before)), mark)
        return _Draft(text, (0.0, context, answer.weight), place, False)

    def _chat(self, messages: Weighted, tools: tuple[dict[str, Any], ...], mark: str, place: str) -> list[_Draft]:
        """Drafts of one conversation: one, or more where its history is split."""
        answers = [n for n, message in enumerate(messages) if message.role == "assistant"]
        texts = {n: self._around(messages, n, tools) for n in answers}
        for n in answers:
            self._require_prefix(*texts[n], n, "the generation prompt is not what stands before the answer: ")
        for n, following in pairwise(answers):
            before, after = texts[n]
            if not texts[following][0].startswith(after):
                kept = self._kept_end(before, after, texts[following][0])
                if kept is None:
                    return self._rewritten(messages, texts, mark, place)
                texts[n] = before, after[:kept]
        return [self._draft([(*texts[n], messages[n].weight) for n in answers], mark, place)]

    def _kept_end(self, before: str, after: str, then: str) -> int | None:
        """Where an answer ends if only what the template put behind its end token is gone once more follows.

        Some close a whole text with one more token. None: more than that is gone.
        """
        shared = _shared(after, then)
        ends = [end for end in self._encoder.control_ends(after) if len(before) < end <= shared]
        return ends[-1] if ends and not self._encoder.without_control(after[ends[-1] :]).strip() else None

    def _rewritten(self, messages: Weighted, texts: dict[int, tuple[str, str]], mark: str, place: str) -> list[_Draft]:
        """What becomes of a conversation whose earlier turns are rendered anew."""
        if self.settings.rewritten_history == "refuse":
            what = "the chat template renders earlier turns differently once an answer follows: "
            for n, following in pairwise(texts):
                self._require_prefix(texts[n][1], texts[following][0], following, what)
        kept = list(texts) if self.settings.rewritten_history == "split" else list(texts)[-1:]
        return [self._draft([(*texts[n], messages[n].weight)], mark, place) for n in kept if messages[n].weight]

    def _draft(self, answers: list[tuple[str, str, float]], mark: str, place: str) -> _Draft:
        """A draft of texts (before, after, weight) that continue each other."""
        borders = [border for before, after, _ in answers for border in (len(before), len(after))]
        context = float(self.settings.loss_on == "all")
        weights = [weight for _, _, weight in answers for weight in (context, weight)]
        return _Draft(Text(answers[-1][1], tuple(borders), mark), (*weights, context), place, True)

    def _around(self, messages: Weighted, n: int, tools: tuple[dict[str, Any], ...]) -> tuple[str, str]:
        """The text before answer n, and the text up to its end."""
        assert self._template is not None
        after = self._template.render(messages[: n + 1], tools)
        try:
            before = self._template.render(messages[:n], tools, add_generation_prompt=True)
        except BadRowError:
            if n > 0:
                raise
            before = None
        if n > 0 or (before is not None and after.startswith(before)):
            assert before is not None
            return before, after
        # Templates that look at the first turn fail on none, or begin otherwise: what stands before is what two
        # other first answers share.
        others = [replace(messages[0], content=text, reasoning="", tool_calls=()) for text in ("a", "b")]
        first, second = (self._template.render([other], tools) for other in others)
        return first[: _shared(first, second)], after

    def _prompt_text(self, messages: tuple[Message, ...], tools: tuple[dict[str, Any], ...], mark: str) -> Text:
        """The text of a prompt, cut where training would cut it."""
        assert self._template is not None
        whole = self._template.render(messages, tools, add_generation_prompt=True)
        borders: list[int] = []
        for n, message in enumerate(messages):
            if message.role == "assistant":
                before, after = self._around(messages, n, tools)
                if not whole.startswith(after) or not after.startswith(before):
                    borders = []  # rewritten history: trained as one text, too
                    break
                borders += [len(before), len(after)]
        return Text(whole, tuple(borders), mark)

    def _with_system(self, messages: tuple[Message, ...]) -> tuple[Message, ...]:
        if self.settings.system_prompt is None or (messages and messages[0].role == "system"):
            return messages
        return (Message("system", self.settings.system_prompt), *messages)

    def _marked(
        self, messages: tuple[Message, ...], tools: tuple[dict[str, Any], ...]
    ) -> tuple[str, tuple[Message, ...], tuple[dict[str, Any], ...]]:
        """The turns with control strings marked, so that they stay text, and the mark; UNCUT where there are none."""
        if self.settings.special_tokens_in_text == "control":
            return UNCUT, messages, tools
        texts = [message.content for message in messages]
        if tools or any(message.reasoning or message.tool_calls for message in messages):
            texts += _strings(([(message.reasoning, message.tool_calls) for message in messages], tools))
        if not any(map(self._encoder.holds_control, texts)):
            return UNCUT, messages, tools
        mark = next((mark for mark in MARKS if not any(mark in text for text in texts)), None)
        if mark is None:
            raise BadRowError("holds every one of Unicode's noncharacters U+FDD0 to U+FDEF")
        marked = tuple(
            replace(
                message,
                content=self._encoder.marked(message.content, mark),
                reasoning=self._encoder.marked(message.reasoning, mark),
                tool_calls=tuple(self._mark_all(call, mark) for call in message.tool_calls),
            )
            for message in messages
        )
        return mark, marked, tuple(self._mark_all(tool, mark) for tool in tools)

    def _mark_all(self, value: Any, mark: str) -> Any:
        if isinstance(value, str):
            return self._encoder.marked(value, mark)
        if isinstance(value, dict):
            return {key: self._mark_all(item, mark) for key, item in value.items()}
        return [self._mark_all(item, mark) for item in value] if isinstance(value, list) else value

    def _require_prefix(self, start: str, whole: str, n: int, what: str) -> None:
        """Raises BadRowError with the first token in which two texts differ."""
        if whole.startswith(start):
            return
        first, second = self._encoder.encode([start, whole])
        at = next((at for at, (a, b) in enumerate(zip(first, second)) if a != b), min(len(first), len(second)))
        was, became = (self.tokenizer.decode(ids[at : at + 1]) for ids in (first, second))
        raise BadRowError(
            f"{what}token {at} before the answer of turn {n + 1} is {was!r} at first and {became!r} then, after "
            f"{self.tokenizer.decode(second[max(0, at - 8) : at])!r}; set data.rewritten_history to split or last, or "
            "data.chat_template to a template that leaves earlier turns alone"
        )

    # From drafts to examples: tokens and weights.

    def _example(self, draft: _Draft, ids: list[int], counts: list[int]) -> Example:
        if not draft.is_chat:  # a text with control tokens of its own may bring these two
            lead = [] if self._lead == ids[:1] else self._lead
            ids = [*lead, *ids, *([] if ids[-1:] == [self.tokenizer.eos_token_id] else [self.tokenizer.eos_token_id])]
            counts = [len(lead) + count for count in counts]
        if self._lead and ids[:2] == self._lead * 2:
            raise BadRowError("two begin tokens in a row; the chat template writes one too many")
        edges = [0, *counts, len(ids)]
        spans: list[tuple[int, int, float]] = []
        for part, weight in enumerate(draft.weights):
            start, end = max(1, edges[part]), edges[part + 1]  # nothing stands before the first token to predict it
            if draft.is_chat and part % 2:
                stop = self._end_of_turn(ids, edges[part], end) + 1
                _add(spans, start, stop, weight)
                start, weight = max(1, stop), draft.weights[0]
            _add(spans, start, end, weight)
        return Example(np.array(ids, dtype=np.int32), tuple(spans), draft.place)

    def _end_of_turn(self, ids: list[int], start: int, end: int) -> int:
        """Where the last control token of an answer stands; it becomes a stop token."""
        for at in range(end - 1, start - 1, -1):
            if ids[at] in self._encoder.control:
                self.stop_ids.add(ids[at])
                return at
        raise BadRowError(
            "the chat template renders no end-of-turn token after an answer: the model would never learn to stop; "
            "let the template end an answer with eos_token, or set data.chat_template"
        )


def needs_template(format_name: str, renderer: Renderer) -> None:
    """Raises UserError where chat data meets a model that has no chat template."""
    if not renderer.is_chat and format_name not in ("prompt-completion", "question-answer", "text", "rated"):
        raise UserError(
            f"the base model has no chat template, and the data is in the chat format {format_name}",
            f"set data.chat_template to {', '.join(NAMED_TEMPLATES)} or a Jinja file, take an instruct model as "
            "model.base, or use prompt / completion rows",
        )


def _weighted(messages: tuple[Message, ...], loss_on: str) -> Weighted:
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


def _add(spans: list[tuple[int, int, float]], start: int, end: int, weight: float) -> None:
    """Put a stretch behind the others; one that continues the last makes it longer."""
    if not weight or start >= end:
        return
    if spans and spans[-1][1:] == (start, weight):
        start = spans.pop()[0]
    spans.append((start, end, weight))


def _shared(first: str, second: str) -> int:
    """How many characters two texts begin with alike."""
    return next((n for n, (a, b) in enumerate(zip(first, second)) if a != b), min(len(first), len(second)))


def _strings(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)
