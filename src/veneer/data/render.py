"""Renders conversations as tokens and says which of them are trained: the one place where text becomes tokens.

For each answer two texts are rendered with the model's own chat template: everything before it with the
generation prompt, and everything up to its end. Their difference is the answer, and its first and last characters give
the first and last token. Trained are the answer's tokens and the end-of-turn token after it; what the template puts
behind the end token (a line break, say) is not. Nothing is found by searching for strings.

A template that renders earlier turns anew once a later one follows (it strips their reasoning, say) makes those
texts disagree; `data.rewritten_history` says what becomes of such rows. Without a template
(`data.chat_template: none`) a row is prompt + completion + end-of-sequence token; a document is its text and that
token.

Training, evaluation, generation and serving all come here; examples are made many at a time, since tokenizers are
several times faster then. The file is long because it is one class: all its steps share a template and a tokenizer.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import date
from itertools import pairwise
from typing import Any

import numpy as np

from veneer.config import Data, UserError
from veneer.data.batch import Example
from veneer.data.conversation import BadRowError, Conversation, Message
from veneer.data.drafts import (
    ChatDraft,
    Draft,
    Texts,
    Weighted,
    add_span,
    left_out_of,
    prompt_text,
    shared_length,
    texts_around,
    weighted,
    with_marks,
)
from veneer.data.formats import OF_TASKS
from veneer.data.frozen import CALL
from veneer.data.sandbox import AT_ONCE
from veneer.data.template import NAMED_TEMPLATES, begin_ids, find_template
from veneer.data.tokens.encode import UNCUT, Encoder, Text

Tools = tuple[dict[str, Any], ...]
MakeRenderer = Callable[[Any, Data], "Renderer"]  # of a tokenizer and settings


class Renderer:
    """Turns conversations into tokens for training, evaluation and generation alike.

    Args:
        tokenizer: A fast Transformers tokenizer.
        data: The settings: chat_template, template_date, unrendered, system_prompt, loss_on, rewritten_history,
            special_tokens_in_text; None: the defaults.

    Attributes:
        settings: settings with the date that the template was given, where it asks for one.
        notes: number of conversations that were rendered with a change, by the kind of change.
        template: Jinja text that ships with the adapter; None where rows are plain text.
        stop_ids: Tokens that end an answer.

    Raises:
        UserError: The template is unknown or exceeds its limits, or the tokenizer has no end token.
    """

    labels: tuple[str, ...] = ()  # of a model that does not write text: the names of its outputs
    row_format: str | None = None  # the format of all rows; None: it is recognised

    def __init__(self, tokenizer: Any, data: Data | None = None) -> None:
        self.tokenizer = tokenizer
        self.settings = data or Data(train="-")
        if self.settings.template_date is None:  # one date for all who render with these settings
            self.settings = self.settings.model_copy(update={"template_date": date.today()})
        self.notes: Counter[str] = Counter()
        self._template = find_template(tokenizer, self.settings)
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
    def make(self) -> MakeRenderer:
        """What makes a renderer like this one, in other processes."""
        return Renderer

    @property
    def is_chat(self) -> bool:
        """Whether a chat template is in use; otherwise rows are plain prompt + completion."""
        return self._template is not None

    @property
    def is_dated(self) -> bool:
        """Whether the template asks for today's date, and was given that of `settings`."""
        return CALL in (self.template or "")

    @property
    def fingerprint(self) -> str:
        """A hash of the tokenizer: equal where the same texts become the same tokens."""
        return self._encoder.fingerprint

    @property
    def template(self) -> str | None:
        return None if self._template is None else self._template.source

    def render(self, conversations: Sequence[Conversation]) -> list[list[Example] | BadRowError]:
        """Each conversation as examples, or what is wrong with it.

        Most are one example. A preference pair is two, chosen and rejected; rewritten_history: split makes one of
        every answer.
        """
        parts = [conversations[at : at + AT_ONCE] for at in range(0, len(conversations), AT_ONCE)]
        if len(parts) < 2:
            return [row for part in parts for row in self._examples(self._drafts(part))]
        with ThreadPoolExecutor(1) as ahead:  # the sandbox renders while this thread tokenizes
            return [row for drafts in ahead.map(self._drafts, parts) for row in self._examples(drafts)]

    def _examples(self, drafts: list[list[Draft] | BadRowError]) -> list[list[Example] | BadRowError]:
        """The examples of each row's drafts."""
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
        if self._template is None:
            mark, messages, _ = self._marked(tuple(messages), tools)
            text, lead = Text("".join(message.content for message in messages), (), mark), self._lead
        else:
            try:
                chat = self._chat(tuple(messages), tools, "prompt", is_prompt=True)
                (texts,) = self._rendered([chat])
                text, lead = prompt_text(chat, texts), []
            except BadRowError as error:
                raise UserError(f"prompt: {error}") from None
        return lead + self._encoder.encode_at([text])[0][0]

    def answer_ids(self, conversation: Conversation) -> list[int]:
        """Tokens of the last answer as the model is to give it: reasoning and calls in the template's form.

        Raises:
            UserError: It cannot be rendered.
        """
        turns = conversation.prompt()
        last = replace(conversation.messages[len(turns)], weight=1.0)
        settings = self.settings.model_copy(update={"loss_on": "last", "rewritten_history": "last"})
        (drafts,) = self._drafts([replace(conversation, messages=(*turns, last), rejected=())], settings)
        if isinstance(drafts, BadRowError):
            raise UserError(f"{conversation.place}: {drafts}")
        ((ids, counts),) = self._encoder.encode_at([drafts[-1].text])
        return ids[counts[-2] : counts[-1]] if drafts[-1].is_chat else ids[counts[-1] :]

    def pieces(self, example: Example) -> list[dict[str, Any]]:
        """An example's text in pieces of equal weight, control tokens by themselves: text, weight, control."""
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

    def _drafts(
        self, conversations: Sequence[Conversation], settings: Data | None = None
    ) -> list[list[Draft] | BadRowError]:
        """The drafts of each conversation: one, of a pair two, or more where its history is split."""
        settings = settings or self.settings
        rows: list[list[Draft | ChatDraft] | BadRowError] = []
        for conversation in conversations:
            try:
                rows.append(self._sides(conversation, settings.loss_on))
            except BadRowError as error:
                rows.append(error)
        chats = [
            side for row in rows if not isinstance(row, BadRowError) for side in row if isinstance(side, ChatDraft)
        ]
        texts = iter(self._rendered(chats))
        drafts: list[list[Draft] | BadRowError] = []
        for row in rows:
            if isinstance(row, BadRowError):
                drafts.append(row)
                continue
            given = [(side, next(texts) if isinstance(side, ChatDraft) else []) for side in row]
            notes: set[str] = set()
            try:
                made: list[Draft] = []
                for side, some in given:
                    made += [side] if isinstance(side, Draft) else self._chat_drafts(side, some, settings, notes)
                drafts.append(made)
                self.notes.update(notes)
            except BadRowError as error:
                drafts.append(error)
        return drafts

    def _sides(self, conversation: Conversation, loss_on: str) -> list[Draft | ChatDraft]:
        """A row as drafts, or as what a template is to make texts of; a preference pair has two sides."""
        place = conversation.place
        sides = [conversation.messages] + ([conversation.rejected] if conversation.rejected else [])
        if not conversation.is_document and self._template is not None:
            return [self._chat(side, conversation.tools, place, loss_on) for side in sides]
        found: list[Draft | ChatDraft] = []
        for side in sides:
            mark, messages, tools = self._marked(side, conversation.tools)
            if conversation.is_document:
                found.append(Draft(Text(messages[0].content, (0,), mark), (0.0, 1.0), place, False))
            else:
                found.append(self._plain(messages, tools, mark, place))
        return found

    def _chat(
        self,
        messages: tuple[Message, ...],
        tools: tuple[dict[str, Any], ...],
        place: str,
        loss_on: str = "all",
        is_prompt: bool = False,
    ) -> ChatDraft:
        """The conversation that the template is to make texts of.

        Raises:
            BadRowError: The template would leave out what settings do not allow it to.
        """
        assert self._template is not None
        mark, messages, tools = self._marked(messages, tools)
        messages = self.with_system(messages)
        row = self._template.spelled(messages if is_prompt else weighted(messages, loss_on), tools)
        answers = tuple(n for n, message in enumerate(row.messages) if message.role == "assistant")
        return ChatDraft(row, answers, mark, place, is_prompt)

    def _rendered(self, chats: Sequence[ChatDraft]) -> list[Texts]:
        """The texts of each chat's cuts, and of its others."""
        if not chats:
            return []
        assert self._template is not None
        jobs = [[(chat.row, chat.cuts()), *chat.others()] for chat in chats]
        places = [chat.place for chat, some in zip(chats, jobs) for _ in some]
        texts = iter(self._template.texts([job for some in jobs for job in some], places))
        return [[text for _ in some for text in next(texts)] for some in jobs]

    def _plain(self, messages: tuple[Message, ...], tools: tuple[dict[str, Any], ...], mark: str, place: str) -> Draft:
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
        return Draft(text, (0.0, context, answer.weight), place, False)

    def _chat_drafts(self, chat: ChatDraft, made: Texts, settings: Data, notes: set[str]) -> list[Draft]:
        """Drafts of one conversation: one, or more where its history is split."""
        texts = texts_around(chat, made)
        messages, mark, place = chat.row.messages, chat.mark, chat.place
        for n in chat.answers:
            self._require_prompt(*texts[n])
        notes.update(chat.row.notes)
        if what := left_out_of(chat, texts):
            if self.settings.unrendered != "leave-out":
                raise BadRowError(
                    f"the chat template leaves out {what}; set data.unrendered to leave-out to learn the row without "
                    "it, or data.chat_template to a template that renders it"
                )
            notes.add("left_out_by_template")
        for n, following in pairwise(chat.answers):
            before, after = texts[n]
            if not texts[following][0].startswith(after):
                kept = self._kept_end(before, after, texts[following][0])
                if kept is None:
                    return self._rewritten(messages, texts, mark, place, settings.rewritten_history)
                texts[n] = before, after[:kept]
        return [self._draft([(*texts[n], messages[n].weight) for n in chat.answers], mark, place)]

    def _kept_end(self, before: str, after: str, then: str) -> int | None:
        """The end of an answer, if only what the template put behind its end token is gone once more follows.

        Some close a whole text with one more token. None: more than that is gone.
        """
        shared = shared_length(after, then)
        ends = [end for end in self._encoder.control_ends(after) if len(before) < end <= shared]
        return ends[-1] if ends and not self._encoder.without_control(after[ends[-1] :]).strip() else None

    def _rewritten(
        self, messages: Weighted, texts: dict[int, tuple[str, str]], mark: str, place: str, policy: str
    ) -> list[Draft]:
        """Refuse, shorten or split a conversation whose earlier turns are rendered anew."""
        if policy == "refuse":
            what = "the chat template renders earlier turns differently once an answer follows: "
            for n, following in pairwise(texts):
                self._require_prefix(texts[n][1], texts[following][0], following, what)
        kept = list(texts) if policy == "split" else list(texts)[-1:]
        return [self._draft([(*texts[n], messages[n].weight)], mark, place) for n in kept if messages[n].weight]

    def _draft(self, answers: list[tuple[str, str, float]], mark: str, place: str) -> Draft:
        """A draft of texts (before, after, weight) that continue each other."""
        borders = [border for before, after, _ in answers for border in (len(before), len(after))]
        context = float(self.settings.loss_on == "all")
        weights = [weight for _, _, weight in answers for weight in (context, weight)]
        return Draft(Text(answers[-1][1], tuple(borders), mark), (*weights, context), place, True)

    def with_system(self, messages: tuple[Message, ...]) -> tuple[Message, ...]:
        """Turns behind the system prompt of the settings, where they have none and a template renders them."""
        if not self.is_chat or self.settings.system_prompt is None or (messages and messages[0].role == "system"):
            return messages
        return (Message("system", self.settings.system_prompt), *messages)

    def _marked(self, messages: tuple[Message, ...], tools: Tools) -> tuple[str, tuple[Message, ...], Tools]:
        """The turns with control strings marked, unless the settings make them control tokens."""
        if self.settings.special_tokens_in_text == "control":
            return UNCUT, messages, tools
        return with_marks(self._encoder, messages, tools)

    def _require_prompt(self, before: str, after: str) -> None:
        """Raises BadRowError where the generation prompt is not what the template writes before an answer."""
        if after.startswith(before):
            return
        shared = shared_length(before, after)
        raise BadRowError(
            f"the generation prompt is not what stands before the answer: behind {before[:shared][-24:]!r} it has "
            f"{before[shared:][:24]!r}, and the template writes {after[shared:][:24]!r} there where an answer follows; "
            "set data.chat_template to a template that renders both alike: the model's own in a Jinja file with the "
            "generation prompt changed, or chatml or another name"
        )

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

    def _example(self, draft: Draft, ids: list[int], counts: list[int]) -> Example:
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
                add_span(spans, start, stop, weight)
                start, weight = max(1, stop), draft.weights[0]
            add_span(spans, start, end, weight)
        return Example(np.array(ids, dtype=np.int32), tuple(spans), draft.place)

    def _end_of_turn(self, ids: list[int], start: int, end: int) -> int:
        """The position of an answer's last control token, which becomes a stop token."""
        for at in range(end - 1, start - 1, -1):
            if ids[at] in self._encoder.control:
                self.stop_ids.add(ids[at])
                return at
        added = self.tokenizer.added_tokens_decoder
        plain = next((str(added[token]) for token in reversed(ids[start:end]) if token in added), None)
        if plain is not None:
            raise BadRowError(
                f"the chat template ends an answer in {plain}, which is not marked as a special token: it would not "
                'end generation; set "special": true for it in the added_tokens of the model\'s tokenizer.json'
            )
        raise BadRowError(
            "the chat template renders no end-of-turn token after an answer: the model would never learn to stop; "
            "let the template end an answer with eos_token, or set data.chat_template"
        )


def needs_template(format_name: str, renderer: Renderer) -> None:
    """Raises UserError where chat data meets a model that has no chat template."""
    if not renderer.is_chat and format_name not in (
        *("prompt-completion", "question-answer", "text", "rated", *OF_TASKS),
    ):
        raise UserError(
            f"the base model has no chat template, and the data is in the chat format {format_name}",
            f"set data.chat_template to {', '.join(NAMED_TEMPLATES)} or a Jinja file, take an instruct model as "
            "model.base, or use prompt / completion rows",
        )
