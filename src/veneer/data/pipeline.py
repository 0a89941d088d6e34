"""Takes the data settings of a run to examples: tokenized rows, duplicates, the split, the ledger.

Tokenized rows are kept in the user's cache under a fingerprint of the files' content, the tokenizer, the template and
the settings that matter, so a second start reads them back. What is decided afterwards (duplicates, split, packing)
is cheap and made anew.
"""

import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

import veneer
from veneer.config import Data, UserError
from veneer.config.cache import cached
from veneer.config.versions import version_of
from veneer.data.batch import Batches, Example, shared_in_rows
from veneer.data.conversation import Conversation
from veneer.data.leakage import SHOWN, TokenizedFiles, find_duplicates, leave_out_held_out, numbers_of, report_overlap
from veneer.data.ledger import Ledger
from veneer.data.render import Renderer, needs_template
from veneer.data.row_parser import RowProblem, blocks_of, chosen, recognise_source, take_again
from veneer.data.screening.deduplication import near_duplicates
from veneer.data.sources.block import RowBlock
from veneer.data.sources.find import DataSource, find_sources
from veneer.data.split import split_rows
from veneer.data.tokens.corpus import Corpus, is_sound, seal, write
from veneer.data.tokens.tokenize import Tokenized, tokenize
from veneer.data.warn import warnings_of

LAYOUT = 4  # of the cache's files; another number makes them anew
SMALL = 8 * 2**20  # bytes of input that one process does sooner than several would start
MOST_WORKERS = 8
# Settings that decide what is cached.
MATTER = (
    *("format", "columns", "text_by", "limit", "sample", "max_length", "overlong", "bad_rows", "pii", "group"),
    *("unrendered", "system_prompt", "loss_on", "rewritten_history", "special_tokens_in_text"),
    *("ignore_columns", "max_row_bytes"),
)


@dataclass(frozen=True)
class HeldOut:
    """A held-out row: its tokens for the loss, its turns for generation."""

    example: Example
    conversation: Conversation


class Part(Sequence[Example]):
    """The examples of one side of the split, on disk.

    Attributes:
        lengths: number of tokens of each.
        label_weights: weight of each label in the loss, where trained tokens are labels; None: all weigh alike.
        values: further values of each for objectives, by name, which the examples are given: `label` of rated rows, 1
            of a good answer and -1 of a bad one; others are filled before training.
    """

    def __init__(self, corpus: Corpus, rows: Any) -> None:
        self.values: dict[str, Any] = {}
        self.label_weights: Sequence[float] | None = None
        self.corpus = corpus
        self.rows = rows
        chosen_rows = np.zeros(len(corpus.rows), dtype=bool)
        chosen_rows[rows] = True
        self.examples = np.flatnonzero(chosen_rows[corpus.row_of])
        self.lengths = corpus.lengths[self.examples].astype(np.int64)
        labels = corpus.rows["label"][corpus.row_of[self.examples]]
        if labels.any():
            self.values["label"] = labels.astype(np.float32)

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, at: Any) -> Any:
        if isinstance(at, slice):
            return [self[n] for n in range(*at.indices(len(self)))]
        example = self.corpus[self.examples[at]]
        if self.label_weights is not None:
            example = example.weighted(self.label_weights)
        if not self.values:
            return example
        return replace(example, values={name: float(of[at]) for name, of in self.values.items()})

    @cached_property
    def shared(self) -> Any:
        """`shared_in_rows` of all examples, where these are pairs."""
        return np.array(shared_in_rows(self, 2), dtype=np.int64)

    def fingerprint(self) -> str:
        """A hash of the tokens and weights of all its rows, in order."""
        return hashlib.sha256(self.corpus.rows["hash"][self.rows].tobytes()).hexdigest()


@dataclass(frozen=True)
class Prepared:
    """The data of a run."""

    train: Part
    validation: Part
    ledger: Ledger
    _given: TokenizedFiles
    _held_out: TokenizedFiles
    _data: Data

    @property
    def has_pairs(self) -> bool:
        """Whether its rows are pairs of answers, two examples each: the chosen one and the rejected one."""
        return self.kind == "pairs"

    @property
    def kind(self) -> str:
        """What its rows are: single (answers), pairs (of them), rated (answers), or mixed."""
        of_formats = {"preference": "pairs", "rated": "rated"}
        found = {of_formats.get(known["format"], "single") for known in self.ledger.formats.values()}
        return found.pop() if len(found) == 1 else "mixed"

    def trained_rows(self, rows: Sequence[HeldOut]) -> list[str]:
        """Return the places of those rows, held out elsewhere, that stand among its own training rows.

        They are compared by their text without system prompts, as duplicates are.
        """
        places = {row.conversation.text(): row.conversation.place for row in rows}
        given, numbers = self._given, numbers_of(self._given.corpus, self.train.rows)
        turns = take_again(given.sources, given.formats, given.setting, self._data, numbers)
        return sorted({places[text] for _, row in turns if (text := row.text()) in places})

    def held_out(self, limit: int | None = None, group: str | None = None) -> list[HeldOut]:
        """The first held-out rows with their turns, which are read from their file again; all pieces of a long text.

        Rows that are rated bad are left out: their answers are nothing to compare with.

        Args:
            limit: Largest number of rows.
            group: Column by which rows belong together, instead of `data.group`.
        """
        return _with_turns(self._held_out, self._answered()[:limit], self._data, group)

    def held_out_sample(self, limit: int, seed: int) -> list[HeldOut]:
        """Some held-out rows with their turns, drawn by a seed, in the order in which they were drawn."""
        rows = np.random.default_rng(seed).permutation(self._answered())[:limit]
        return _with_turns(self._held_out, rows, self._data)

    def _answered(self) -> Any:
        """The held-out rows that are not rated bad."""
        return _not_bad(self.validation.corpus, self.validation.rows)

    def personal(self) -> str:
        """The places of the personal data that was found: JSON, a line each."""
        corpora = {part.corpus.folder: part.corpus for part in (self.train, self.validation)}
        return "".join((folder / "pii.jsonl").read_text(encoding="utf-8") for folder in corpora)


def prepare(data: Data, renderer: Renderer, seed: int) -> Prepared:
    """Read and render the data of a run.

    Raises:
        UserError: Files, rows, template or split are not usable; see the modules of this package.
        JobError: A tokenizing process was killed.
    """
    began = time.perf_counter()
    ledger = Ledger(was_cached=True)
    given = _read(data.train, "data.train", data, renderer, seed, ledger)
    repeats = find_duplicates(given.corpus, data, ledger)
    if isinstance(data.validation, float | int):
        held_out = given
        sides = split_rows(given.corpus, repeats, data.validation, seed)
    else:
        held_out = read_files(data.validation, "data.validation", data, renderer, ledger)
        sides = leave_out_held_out(given, held_out, repeats, data, ledger)
        report_overlap(given, held_out, sides, data, ledger)
    prepared = Prepared(
        *(Part(given.corpus, sides.train), Part(held_out.corpus, sides.validation), ledger),
        *(given, held_out, data),
    )
    _count(prepared, data, seed)
    ledger.warnings += warnings_of(ledger, data, is_written=not renderer.labels)
    ledger.seconds = time.perf_counter() - began
    return prepared


def read_held_out(
    files: str | Sequence[str],
    setting: str,
    data: Data,
    renderer: Renderer,
    limit: int | None = None,
    group: str | None = None,
) -> list[HeldOut]:
    """The first usable rows of files that stand beside the training data; `limit` and `group` as of `held_out`."""
    given = read_files(files, setting, data, renderer, Ledger())
    return _with_turns(given, _not_bad(given.corpus, np.arange(len(given.corpus.rows)))[:limit], data, group)


def _not_bad(corpus: Corpus, rows: Any) -> Any:
    return rows[corpus.rows["label"][rows] >= 0]


def read_files(
    files: str | Sequence[str], setting: str, data: Data, renderer: Renderer, ledger: Ledger
) -> TokenizedFiles:
    """All rows of held-out files, tokenized; `limit` and `sample` are the training data's."""
    return _read(files, setting, data.model_copy(update={"limit": None, "sample": None}), renderer, 0, ledger)


def _read(
    files: str | Sequence[str], setting: str, data: Data, renderer: Renderer, seed: int, ledger: Ledger
) -> TokenizedFiles:
    sources = find_sources(files, setting, data.split, data.subset)
    ledger.warnings += sorted({source.beside for source in sources if source.beside})
    formats = []
    for source in sources:
        of_task = renderer.row_format
        wanted = data if of_task is None else data.model_copy(update={"format": of_task})
        name, reason = recognise_source(source, setting, wanted)
        reason = reason if of_task is None else "set by model.task"
        needs_template(name, renderer)
        formats.append(name)
        ledger.formats[source.name] = {"format": name, "reason": reason}

    def make(folder: Path) -> None:
        ledger.was_cached = False
        blocks = _chosen_blocks(sources, setting, data, seed)
        workers = data.workers or _workers(sources)
        write(folder, _checked(tokenize(blocks, renderer, data, formats, workers), data))
        corpus = Corpus(folder)
        near_duplicates(len(corpus.rows), corpus.signatures).astype(np.uint32).tofile(folder / "near.bin")
        seal(folder)

    key = _fingerprint(sources, formats, data, renderer, seed)
    corpus = Corpus(cached(f"data/{key}", make, is_sound))
    renderer.stop_ids.update(corpus.account["stop_ids"])
    before = ledger.rows.copy()
    ledger.add(corpus.account)
    _require_rows(files, setting, data, corpus)
    assert ledger.rows["used"] - before["used"] == len(corpus.rows)
    return TokenizedFiles(setting, sources, formats, corpus)


def _chosen_blocks(
    sources: Sequence[DataSource], setting: str, data: Data, seed: int
) -> Iterator[tuple[int, RowBlock]]:
    """Blocks of the rows that `limit` and `sample` leave."""
    wanted = None
    if data.sample is not None:
        counts = [len(block.rows) for source in sources for block in blocks_of(source, setting, data)]
        total = min(sum(counts), data.limit or sum(counts))
        if data.sample < total:
            wanted = np.sort(np.random.default_rng(seed).choice(total, data.sample, replace=False))
    row = 0
    for which, source in enumerate(sources):
        for block in blocks_of(source, setting, data):
            first, row = row, row + len(block.rows)
            if data.limit is not None and row > data.limit:
                block = chosen(block, range(data.limit - first))
            if wanted is not None:
                low, high = np.searchsorted(wanted, [first, row])
                block = chosen(block, (wanted[low:high] - first).tolist())
            if block.rows:
                yield which, block
            if data.limit is not None and row >= data.limit:
                return


def _checked(parts: Iterable[tuple[int, RowBlock, Tokenized]], data: Data) -> Iterator[tuple[int, RowBlock, Tokenized]]:
    """Pass tokenized blocks on; refuse what the settings refuse as soon as it is seen.

    Raises:
        UserError: Bad rows, or overlong ones, where these are refused.
    """
    rows = 0
    for source, block, part in parts:
        rows += len(block.rows)
        bad = [problem for problem in part.problems if problem.fate in ("unreadable", "refused")]
        if bad and data.bad_rows == "refuse":
            count = part.fates["unreadable"] + part.fates["refused"]
            raise _bad_rows(bad, count, rows, "bad", "mend these rows, or leave such rows out with data.bad_rows=drop")
        if part.fates["overlong"] and data.overlong == "refuse":
            long = [problem for problem in part.problems if problem.fate == "overlong"]
            fix = "raise data.max_length, or set data.overlong to chunk (of text), drop or truncate"
            raise _bad_rows(long, part.fates["overlong"], rows, "overlong", fix)
        yield source, block, part


def _bad_rows(problems: list[RowProblem], count: int, rows: int, what: str, fix: str) -> UserError:
    lines = [f"{problem.place}: {problem.reason}" for problem in problems[:SHOWN]]
    if count > len(lines):
        lines.append(f"... and {count - len(lines)} more")
    counted = f"1 {what} row" if count == 1 else f"{count} {what} rows"
    return UserError(f"{counted} among the first {rows:,} of the data\n  " + "\n  ".join(lines), fix)


def _require_rows(files: str | Sequence[str], setting: str, data: Data, corpus: Corpus) -> None:
    fates, notes = corpus.account["fates"], corpus.account["notes"]
    read = sum(fates.values())
    cut = notes.get("all_cut", 0)
    if cut > data.max_cut_rows * read:
        raise UserError(
            f"{setting} = {files}: {cut} of {read} rows ({cut / read:.1%}) have no trained token within "
            f"data.max_length = {data.max_length}; at most {data.max_cut_rows:.1%} may (data.max_cut_rows)",
            "raise data.max_length, or leave such rows out with data.overlong=drop",
        )
    if not len(corpus.rows):
        left = ", ".join(f"{count} {fate}" for fate, count in sorted(fates.items()) if count)
        raise UserError(
            f"{setting} = {files}: no row is left of {read} ({left}; data.max_length = {data.max_length} tokens)",
            f"{'raise data.max_length' if fates.get('overlong') else 'mend these rows'} or name other data",
        )


def _count(prepared: Prepared, data: Data, seed: int) -> None:
    """Count the training rows and tokens into the ledger."""
    ledger, train = prepared.ledger, prepared.train
    corpus = train.corpus
    ledger.rows["training"], ledger.rows["validation"] = len(train.rows), len(prepared.validation.rows)
    ledger.tokens = {
        "total": int(train.lengths.sum()),
        "trained": int(corpus.trained[train.examples].sum()),
        "end_of_turn": int(corpus.ends[train.examples].sum(dtype=np.int64)),
        "longest_row": int(train.lengths.max()),
        "examples": len(train),
    }
    ledger.sha256 = {"train": train.fingerprint(), "validation": prepared.validation.fingerprint()}
    sizes = Batches(train, train.lengths, 1, 1, seed, data.max_length).sizes
    ledger.pack = {
        "used": data.packing,
        "packs": len(sizes),
        "efficiency": round(float(sizes.sum() / (len(sizes) * data.max_length)), 5),
        "lengths_by_128": len(np.unique(-(-sizes // 128))),
    }


def _with_turns(given: TokenizedFiles, rows: Any, data: Data, group: str | None = None) -> list[HeldOut]:
    data = data.model_copy(update={"group": group or data.group})
    turns = dict(take_again(given.sources, given.formats, given.setting, data, numbers_of(given.corpus, rows)))
    if len(turns) < len(rows):  # the same rows were read before, without the group
        raise UserError(
            f"evaluate.group = {group}: {len(rows) - len(turns)} of {len(rows)} held-out rows have no such column",
            "name a column that all of them have",
        )
    firsts = np.searchsorted(given.corpus.row_of, rows)
    known = given.corpus.rows[rows]
    held_out = []
    for at, source, number, count in zip(firsts, *(known[name].tolist() for name in ("source", "number", "examples"))):
        conversation = turns[source, number]
        for piece in range(count if conversation.is_document else 1):
            held_out.append(HeldOut(given.corpus[at + piece], conversation))
    return held_out


def _workers(sources: Sequence[DataSource]) -> int:
    """Processes for the data's size; one where several would take longer to start than to work."""
    sizes = [os.path.getsize(s.location) * (4 if s.compression else 1) for s in sources if os.path.isfile(s.location)]
    if len(sizes) == len(sources) and sum(sizes) < SMALL:
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(MOST_WORKERS, cores)


def _fingerprint(
    sources: Sequence[DataSource], formats: Sequence[str], data: Data, renderer: Renderer, seed: int
) -> str:
    """A hash of everything that decides the tokens."""
    tokenizer = renderer.tokenizer
    facts = {
        "layout": LAYOUT,
        "sources": [(source.name, source.fingerprint()) for source in sources],
        "formats": list(formats),
        "settings": {name: getattr(data, name) for name in MATTER},
        "seed": seed if data.sample is not None else None,
        "tokenizer": renderer.fingerprint,
        "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "template": renderer.template,
        "libraries": [veneer.__version__, version_of("tokenizers"), version_of("transformers")],
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]
