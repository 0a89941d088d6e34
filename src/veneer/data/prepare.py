"""Everything from the data settings of a run to examples: reading, recognising, rendering, splitting, counting."""

import hashlib
from dataclasses import dataclass

import numpy as np

from veneer.config import Data, UserError
from veneer.data.batch import Example
from veneer.data.ledger import Ledger
from veneer.data.read import read_rows
from veneer.data.recognise import Conversation, recognise, to_conversations
from veneer.data.render import Renderer, needs_template


@dataclass(frozen=True)
class HeldOut:
    """A held-out row: its tokens for the loss, its turns for generation."""

    example: Example
    conversation: Conversation


@dataclass(frozen=True)
class Prepared:
    """The data of a run. Token counts of the ledger are of the training rows."""

    train: list[Example]
    validation: list[HeldOut]
    ledger: Ledger


def prepare(data: Data, renderer: Renderer, seed: int) -> Prepared:
    """Read and render the data of a run.

    Raises:
        UserError: Files, rows, template or split are not usable; see the modules of this package.
    """
    ledger = Ledger()
    rows = _examples(data.train, "data.train", data, renderer, ledger)
    recognised = ledger.format, ledger.reason
    if isinstance(data.validation, str):
        train = rows
        held_out = read_held_out(data.validation, "data.validation", data, renderer, ledger)
        seen = {row.example.ids for row in train}
        if both := sum(row.example.ids in seen for row in held_out):
            ledger.warnings.append(f"{both} held-out rows stand in the training data too: they measure memory")
    else:
        train, held_out = _split(rows, data.validation, seed)
    ledger.format, ledger.reason = recognised
    ledger.training, ledger.validation = len(train), len(held_out)
    for row in train:
        ledger.tokens_total += len(row.example.ids)
        ledger.tokens_trained += row.example.trained
        ledger.tokens_end_of_turn += sum(target in renderer.stop_ids for target in row.example.targets)
        ledger.longest = max(ledger.longest, len(row.example.ids))
    ledger.sha256 = {"train": _fingerprint(train), "validation": _fingerprint(held_out)}
    _warn(ledger)
    return Prepared([row.example for row in train], held_out, ledger)


def read_held_out(path: str, setting: str, data: Data, renderer: Renderer, ledger: Ledger) -> list[HeldOut]:
    """The usable rows of a file that stands beside the training data, counted into a ledger."""
    return _examples(path, setting, data.model_copy(update={"limit": None}), renderer, ledger)


def _fingerprint(rows: list[HeldOut]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(np.array([row.example.ids, row.example.targets], dtype=np.int64).tobytes())
    return digest.hexdigest()


def _examples(path: str, setting: str, data: Data, renderer: Renderer, ledger: Ledger) -> list[HeldOut]:
    rows = read_rows(path, setting, data.limit)
    ledger.format, ledger.reason = recognise(rows, data.format)
    needs_template(ledger.format, renderer)
    ledger.read += len(rows)
    used: list[HeldOut] = []
    seen: set[tuple[int, ...]] = set()
    for conversation in to_conversations(rows, ledger.format):
        if conversation.is_empty:
            ledger.empty += 1
            continue
        example = renderer.example(conversation)
        if len(example.ids) > data.max_length:
            ledger.overlong += 1
            continue
        ledger.duplicate += example.ids in seen
        seen.add(example.ids)
        used.append(HeldOut(example, conversation))
    ledger.used += len(used)
    if not used:
        raise UserError(
            f"{setting} = {path}: no row is left of {len(rows)} ({ledger.empty} with an empty answer, "
            f"{ledger.overlong} longer than data.max_length = {data.max_length} tokens)",
            "raise data.max_length or name other data",
        )
    return used


def _split(rows: list[HeldOut], validation: float | int, seed: int) -> tuple[list[HeldOut], list[HeldOut]]:
    """A seeded split in which equal rows stand on one side."""
    wanted = validation if isinstance(validation, int) else round(validation * len(rows))
    if validation and not wanted and len(rows) > 1:
        wanted = 1
    if wanted >= len(rows):
        raise UserError(
            f"data.validation = {validation}: {wanted} of {len(rows)} usable rows leave none to train on",
            f"set data.validation below {len(rows)}, or name a file",
        )
    groups: dict[tuple[int, ...], list[HeldOut]] = {}
    for row in rows:
        groups.setdefault(row.example.ids, []).append(row)
    held_out: set[tuple[int, ...]] = set()
    count = 0
    keys = list(groups)
    for n in np.random.default_rng(seed).permutation(len(keys)):
        size = len(groups[keys[n]])
        if count + size <= wanted:
            held_out.add(keys[n])
            count += size
    train = [row for row in rows if row.example.ids not in held_out]
    return train, [row for row in rows if row.example.ids in held_out]


def _warn(ledger: Ledger) -> None:
    if ledger.overlong:
        ledger.warnings.append(f"{ledger.overlong} rows are longer than data.max_length and were left out")
    if ledger.empty:
        ledger.warnings.append(f"{ledger.empty} rows have an empty answer and were left out")
    if ledger.duplicate:
        ledger.warnings.append(f"{ledger.duplicate} rows repeat an earlier one (kept)")
    if not ledger.validation:
        ledger.warnings.append("no row is held out: nothing will show whether the model got better")
