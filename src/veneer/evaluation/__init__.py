"""Is the tuned model better than its base? Generated answers and losses on held-out rows, with intervals.

generation.py  answers of a model, in batches
decoding.py    how tokens are chosen, where an answer stops, and its text as it grows
memory.py      rows at a time: as many as fit, fewer where memory is short; room for answers in a model's positions
prefix.py      what all prompts begin with, read once
right.py       the answer that a row expects, and when one is right
fields.py      answers that are JSON objects, key by key
intervals.py   95% intervals for a proportion and for a mean over rows
paired.py      two models on the same rows: which turned right or wrong, and a verdict
compare.py     base against tuned on the same rows
"""

from veneer.evaluation.compare import Evaluation, Sample, Scorer
from veneer.evaluation.generation import generate

__all__ = ["Evaluation", "Sample", "Scorer", "generate"]
