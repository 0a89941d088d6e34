"""Held-out rows for several models: read by the tokenizer of one, rendered again for another, or read as turns alone.

A comparison asks all models the same rows, so one of them reads the file, with all its checks, and the others take the
conversations that it found.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice

import numpy as np

from veneer.config import Data, UserError
from veneer.data.batch import Example
from veneer.data.conversation import BadRowError, Conversation
from veneer.data.pipeline import HeldOut
from veneer.data.render import Renderer
from veneer.data.row_parser import ParsedRow, RowParser, RowProblem, blocks_of, recognise_source
from veneer.data.sources.find import DataSource, find_sources


def read_conversations(
    file: str, setting: str, data: Data, limit: int | None = None, group: str | None = None
) -> list[HeldOut]:
    """Read a file's first usable rows for models whose tokenizer is elsewhere: their examples hold no tokens.

    Args:
        file: File of rows.
        setting: Setting or option that names it.
        data: Settings of the data.
        limit: Largest number of rows.
        group: Column by which rows belong together, instead of `data.group`.

    Raises:
        UserError: No row can be used, or one cannot and `data.bad_rows` is refuse.
    """
    data = data.model_copy(update={"group": group or data.group})
    sources = find_sources(file, setting, data.split, data.subset)
    parsers = [RowParser(data, recognise_source(source, setting, data)[0]) for source in sources]
    read = (row for source, parser in zip(sources, parsers) for row in _usable(source, parser, setting, data))
    found = [HeldOut(Example(np.empty(0, np.int32), (), row.place), row) for row in islice(read, limit)]
    if not found:
        raise UserError(f"{setting} = {file}: no row can be used", "mend these rows, or name another file")
    return found


def _usable(source: DataSource, parser: RowParser, setting: str, data: Data) -> Iterator[Conversation]:
    for block in blocks_of(source, setting, data):
        for at, row in enumerate(block.rows):
            taken = parser.take(row, block.place(at))
            if isinstance(taken, ParsedRow):
                yield taken.conversation
            elif isinstance(taken, RowProblem) and data.bad_rows == "refuse":
                raise UserError(f"{taken.place}: {taken.reason}", "mend this row, or leave it out of the file")


def render_for(renderer: Renderer, held_out: Sequence[HeldOut], max_length: int) -> list[HeldOut]:
    """Render rows for another model than the one that read them.

    Args:
        renderer: Tokenizer and template of that model.
        held_out: The rows.
        max_length: Most tokens in a piece of a document.

    Raises:
        UserError: It cannot render one.
    """
    rows: list[Conversation] = [*{row.conversation.place: row.conversation for row in held_out}.values()]
    found = []
    for row, made in zip(rows, renderer.render(rows), strict=True):
        if isinstance(made, BadRowError):
            raise UserError(f"{row.place}: {made}", "leave that row out, or compare other models")
        examples = renderer.chunks(made[0], max_length) if row.is_document else made[:1]
        found += [HeldOut(replace(example, place=row.place), row) for example in examples]
    return found
