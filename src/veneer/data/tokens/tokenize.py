"""Turns blocks of rows into tokens, in this process or in several, in the order of the rows.

What comes back of a block is a few flat arrays, so that little is sent between processes and nothing is held in memory
longer than it takes to write it down.
"""

import gc
import os
import threading
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

import numpy as np

from veneer.config import Data, JobError, UserError
from veneer.data.batch import Example
from veneer.data.conversation import BadRowError, Conversation
from veneer.data.formats import OTHER_PROMPTS, SAME_ANSWERS
from veneer.data.render import MakeRenderer, Renderer
from veneer.data.row_parser import ParsedRow, Personal, RowParser, RowProblem
from veneer.data.sandbox import TOO_LONG, shared
from veneer.data.screening.deduplication import signatures
from veneer.data.sources.block import RowBlock
from veneer.data.template import TEMPLATE_FIX

NOTED = 20  # problems of a block and a fate that are kept word for word
SPAN = np.dtype([("start", np.uint32), ("end", np.uint32), ("weight", np.float32)])
ROW = np.dtype(
    [
        ("source", np.uint16),
        ("examples", np.uint32),
        ("number", np.uint32),
        ("hash", np.uint64),  # of its tokens, weights and label
        ("group", np.uint64),  # of the group column's value
        ("label", np.int8),  # 1: a good answer, -1: a bad one; 0: the row does not say
    ]
)


@dataclass
class Tokenized:
    """A block's rows as tokens.

    Attributes:
        ids: tokens of all examples, one behind the other; uint32.
        lengths: number of tokens of each example; uint32.
        ends: number of trained end-of-turn tokens of each example; uint32.
        spans: spans of equal weight in the examples, one behind the other; dtype SPAN.
        span_counts: number of spans of each example; uint32.
        rows: rows that are used; dtype ROW.
        signatures: signatures that find near-duplicates; uint8, shape (rows, BINS).
        fates: number of rows that were used, unreadable, refused, empty, overlong.
        notes: number of rows that were truncated, lost all trained tokens, ended with no answer, were rated good or
            bad, were rendered with a change, or are pairs with an answer beyond max_length.
        all_lengths: number of tokens of every row that was rendered, before any was left out.
        problems: first rows that are not used, and why.
        personal: personal data that was found.
        stop_ids: tokens that end an answer.
    """

    ids: Any
    lengths: Any
    ends: Any
    spans: Any
    span_counts: Any
    rows: Any
    signatures: Any
    fates: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)
    all_lengths: Any = None
    problems: list[RowProblem] = field(default_factory=list)
    personal: list[Personal] = field(default_factory=list)
    stop_ids: set[int] = field(default_factory=set)


class Tokenizing:
    """Tokenizes blocks of rows; each worker process has one.

    Args:
        renderer: renderer of the base model.
        data: settings of the data.
        formats: format of each source.
    """

    def __init__(self, renderer: Renderer, data: Data, formats: Sequence[str]) -> None:
        self._data = data
        self.renderer = renderer
        self._parsers = [RowParser(data, name) for name in formats]
        self._longest_text = self.renderer.overlong_characters(data.max_length)

    def __call__(self, source: int, block: RowBlock) -> Tokenized:
        """Tokenize a block of a source."""
        with _no_garbage_collection():
            return self._tokenized(source, block)

    def _tokenized(self, source: int, block: RowBlock) -> Tokenized:
        fates: Counter[str] = Counter()
        notes: Counter[str] = Counter()
        problems: list[RowProblem] = []
        kept: list[tuple[int, ParsedRow]] = []
        too_long: list[int] = []
        for at, raw in enumerate(block.rows):
            taken = self._parsers[source].take(raw, block.place(at))
            if taken is None:
                fates["empty"] += 1
                problems.append(RowProblem(block.place(at), "empty", "an answer says nothing"))
            elif isinstance(taken, RowProblem):
                fates[taken.fate] += 1
                problems.append(taken)
                notes["same_answers"] += taken.reason == SAME_ANSWERS
                notes["other_prompts"] += taken.reason.startswith(OTHER_PROMPTS)
            elif self._is_hopeless(taken.conversation):
                fates["overlong"] += 1
                notes["overlong_pairs"] += bool(taken.conversation.rejected)
                characters = _characters(taken.conversation)
                too_long.append(characters * self._data.max_length // self._longest_text)
                problems.append(RowProblem(block.place(at), "overlong", f"{characters:,} characters"))
            else:
                kept.append((block.numbers[at], taken))
        used: list[tuple[int, ParsedRow, list[Example]]] = []
        all_lengths = too_long
        self.renderer.notes.clear()
        rendered = self.renderer.render([taken.conversation for _, taken in kept])
        notes += self.renderer.notes
        for (number, taken), made in zip(kept, rendered, strict=True):
            if isinstance(made, BadRowError):
                fates["refused"] += 1
                problems.append(RowProblem(taken.conversation.place, "refused", str(made)))
                continue
            if not made or not all(example.trained for example in made):
                fates["empty"] += 1
                problems.append(RowProblem(taken.conversation.place, "empty", "no token is trained"))
                continue
            all_lengths.append(max(len(example.ids) for example in made))
            is_pair = bool(taken.conversation.rejected)
            is_compared = is_pair or taken.conversation.label is not None
            if is_pair and len(made) == 2 and np.array_equal(made[0].ids, made[1].ids):
                fates["refused"] += 1
                notes["same_answers"] += 1
                problems.append(RowProblem(taken.conversation.place, "refused", "both answers are the same tokens"))
                continue
            examples, is_overlong, is_cut = self._fit(made, taken.conversation.is_document, is_compared)
            if not examples:
                fates["overlong"] += 1
                notes["all_cut"] += is_cut
                notes["overlong_pairs"] += is_pair
                reason = f"{all_lengths[-1]:,} tokens" + (", all trained ones at the end" if is_cut else "")
                problems.append(RowProblem(taken.conversation.place, "overlong", reason))
                continue
            fates["used"] += 1
            notes["chunked" if self._data.overlong == "chunk" else "truncated"] += is_overlong
            notes.update(taken.notes)
            notes["ends_without_answer"] += not taken.conversation.ends_with_answer
            if taken.conversation.label is not None:
                notes["rated_good" if taken.conversation.label else "rated_bad"] += 1
            used.append((number, taken, examples))
        result = _gathered(source, used, self.renderer.stop_ids)
        result.fates, result.notes = fates, +notes
        result.all_lengths = np.array(all_lengths, dtype=np.int64)
        result.problems = _first_of_each_fate(problems)
        result.personal = [found for _, taken, _ in used for found in taken.personal]
        result.stop_ids = self.renderer.stop_ids
        return result

    def _is_hopeless(self, conversation: Conversation) -> bool:
        """Whether a row is too long whatever its tokens are: a row of 50 MB is not tokenized to be left out."""
        is_kept = self._data.overlong == "truncate" or (self._data.overlong == "chunk" and conversation.is_document)
        return not is_kept and _characters(conversation) > self._longest_text

    def _fit(self, made: list[Example], is_document: bool, is_compared: bool) -> tuple[list[Example], bool, bool]:
        """A row's examples within max_length, whether it was longer, and whether no trained token was left.

        A pair is left out whole: one answer without its end against the other with it would be compared by that. So is
        a rated row.
        """
        limit = self._data.max_length
        if all(len(example.ids) <= limit for example in made):
            return made, False, False
        if self._data.overlong == "chunk" and is_document:
            return [piece for example in made for piece in self.renderer.chunks(example, limit)], True, False
        if is_compared or self._data.overlong != "truncate":
            return [], True, False
        cut = [example.cut(limit) for example in made]
        return (cut, True, False) if all(e.trained for e in cut) else ([], True, True)


def tokenize(
    blocks: Iterable[tuple[int, RowBlock]], renderer: Renderer, data: Data, formats: Sequence[str], workers: int
) -> Iterator[tuple[int, RowBlock, Tokenized]]:
    """Tokenize blocks with so many processes; each comes back with its source and its block, in order.

    Raises:
        JobError: A process was killed (for memory, as a rule). UserError: A template exceeds its limits.
    """
    if workers == 1:
        work = Tokenizing(renderer, data, formats)
        for source, block in blocks:
            yield source, block, work(source, block)
        return
    # Not the standard library's pool: to start cleanly it runs the caller's script again, which must be written for it.
    from loky import ProcessPoolExecutor
    from loky.process_executor import TerminatedWorkerError

    # Each worker renders as this renderer does: with its template, and its date.
    like = {name: getattr(renderer.settings, name) for name in ("chat_template", "template_date")}
    given = (os.getpid(), renderer.make, renderer.tokenizer, data.model_copy(update=like), list(formats))
    pool = ProcessPoolExecutor(workers, initializer=_start, initargs=given)
    waiting: deque[tuple[int, RowBlock, Any]] = deque()
    try:
        for source, block in blocks:
            waiting.append((source, block, pool.submit(_work, source, block)))
            if len(waiting) > 2 * workers:
                source, block, future = waiting.popleft()
                yield source, block, future.result()
        while waiting:
            source, block, future = waiting.popleft()
            yield source, block, future.result()
    except TerminatedWorkerError as error:
        if "SIGPROF" in str(error):  # the limit of a rendering; nothing else sets that timer
            raise UserError(f"the chat template {TOO_LONG}", TEMPLATE_FIX) from None
        raise JobError(
            f"a tokenizing process was killed (out of memory?): {error}\n  fix: lower data.workers"
        ) from None
    finally:
        pool.shutdown(wait=True, kill_workers=True)


_worker: list[Tokenizing] = []  # of a worker process: what it does, once it has started


def _start(parent: int, make: MakeRenderer, tokenizer: Any, data: Data, formats: list[str]) -> None:
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    shared().render_here()
    _worker.append(Tokenizing(make(tokenizer, data), data, formats))


def _end_with(parent: int) -> None:
    """End this process once its parent has ended: killed, that tells its workers nothing."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _work(source: int, block: RowBlock) -> Tokenized:
    return _worker[0](source, block)


def _first_of_each_fate(problems: list[RowProblem]) -> list[RowProblem]:
    """The first problems of each fate, so that many of one do not hide another."""
    seen: Counter[str] = Counter()
    kept = []
    for problem in problems:
        seen[problem.fate] += 1
        if seen[problem.fate] <= NOTED:
            kept.append(problem)
    return kept


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """A block's many small objects hold no cycles; looking for some, through all that torch loads, costs a third."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _characters(conversation: Conversation) -> int:
    return sum(len(message.content) for message in conversation.messages)


def _gathered(source: int, used: list[tuple[int, ParsedRow, list[Example]]], stop_ids: set[int]) -> Tokenized:
    rows: list[tuple[int, int, int, int, int, int]] = []
    examples: list[Example] = []
    for number, taken, made in used:
        digest = blake2b(digest_size=8)
        for example in made:
            digest.update(example.ids)
            digest.update(repr(example.spans).encode())
        label = {True: 1, False: -1, None: 0}[taken.conversation.label]
        if label:
            digest.update(repr(label).encode())
        rows.append((source, len(made), number, _number(digest), _group_hash(taken.group), label))
        examples += made
    ids = np.concatenate([e.ids for e in examples]).astype(np.uint32) if examples else np.empty(0, np.uint32)
    lengths = np.array([len(example.ids) for example in examples], dtype=np.uint32)
    spans = np.array([span for example in examples for span in example.spans], dtype=SPAN)
    span_counts = np.array([len(example.spans) for example in examples], dtype=np.uint32)
    # End tokens up to each place; the difference over a span is how many it holds.
    ends_before = np.concatenate([[0], np.cumsum(np.isin(ids, list(stop_ids)))])
    owner = np.repeat(np.arange(len(examples)), span_counts)
    begin = (np.cumsum(lengths) - lengths)[owner] if len(examples) else np.empty(0, np.int64)
    ends_of_span = ends_before[begin + spans["end"]] - ends_before[begin + spans["start"]]
    return Tokenized(
        ids=ids,
        lengths=lengths,
        ends=np.bincount(owner, weights=ends_of_span, minlength=len(examples)).astype(np.uint32),
        spans=spans,
        span_counts=span_counts,
        rows=np.array(rows, dtype=ROW),
        signatures=signatures([taken.conversation.text() for _, taken, _ in used]),
    )


def _group_hash(group: Any) -> int:
    if group is None:
        return 0
    return _number(blake2b(repr(group).encode("utf-8", "surrogatepass"), digest_size=8)) | 1


def _number(digest: Any) -> int:
    return int.from_bytes(digest.digest(), "little")
