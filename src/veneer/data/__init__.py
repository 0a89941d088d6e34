"""From a file of rows to batches of tokens: read -> recognise -> render -> split -> batch, and the ledger.

read.py       rows of a JSON or JSONL file, each with its place
recognise.py  the shape of a row, and the conversation it stands for
render.py     a conversation as tokens, and which of them are trained
prepare.py    all of that for a run: examples for training and held-out rows, with the ledger
batch.py      which examples stand in which step, and the batch an engine reads
ledger.py     every row and token accounted for
"""

from veneer.data.batch import Batch, Batches, Example
from veneer.data.ledger import Ledger
from veneer.data.prepare import Prepared, prepare
from veneer.data.recognise import Conversation, Message
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
