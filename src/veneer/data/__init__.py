"""From files of rows to batches of tokens, with an account of every row and token.

source.py         which files a setting names, and what each is
json_text.py      JSON that is one value, read piece by piece
read.py           their rows, block by block, each with its place
unpacked.py       what of a Parquet or Arrow file would be unpacked at once, and the limit of it
values.py         values within tool calls
turns.py          turns as the world writes them
recognise.py      the shape of a row, and the conversation it stands for
shapes.py         what is amiss with a file that has no such shape
conversation.py   what that is
prerendered.py    rows that bring a chat template with them
privacy.py        personal data in a text
row_parser.py     all of the above for one row: a conversation, or why it is none
template.py       chat templates, and what they cannot say;  frozen.py  their date;  leftout.py  what they left out
sandbox.py        renders them, in a process with limits
tokens.py         text into tokens, with borders where they must be
render.py         a conversation as tokens, and which of them are trained
tokenize.py       blocks of rows as flat arrays, in several processes
deduplication.py  near-duplicates and shared passages
corpus.py         tokenized rows on disk
split.py          which rows are held out
ledger.py         the account;  warn.py what it should make one wary of
pipeline.py       all of that for a run;  starter.py  a first run file for some data
batch.py          which examples stand in which step, packing, and the batch an engine reads
"""

from typing import TYPE_CHECKING

from veneer.lazy import import_on_use

if TYPE_CHECKING:
    from veneer.data.batch import Batch, Batches, Example
    from veneer.data.conversation import Conversation, Message
    from veneer.data.ledger import Ledger
    from veneer.data.pipeline import Prepared, prepare
    from veneer.data.render import Renderer

__all__ = [
    "Batch",
    "Batches",
    "Conversation",
    "Example",
    "Ledger",
    "Message",
    "Prepared",
    "Renderer",
    "prepare",
]

__getattr__ = import_on_use(
    __name__,
    {
        "Batch": "veneer.data.batch",
        "Batches": "veneer.data.batch",
        "Conversation": "veneer.data.conversation",
        "Example": "veneer.data.batch",
        "Ledger": "veneer.data.ledger",
        "Message": "veneer.data.conversation",
        "Prepared": "veneer.data.pipeline",
        "Renderer": "veneer.data.render",
        "prepare": "veneer.data.pipeline",
    },
)
