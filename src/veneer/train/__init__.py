"""Training: the loop and what it stands on.

job.py         everything of a run brought together: checks, data, model, loop, adapter on disk
loop.py        optimizer steps, logging, evaluation, checkpoints
optimizer.py   AdamW by name; schedule.py  the learning rate as a function of the step
checkpoint.py  a resumable state on disk
metrics.py     metrics.jsonl, and the listeners that hear of each step
"""

from veneer.train.job import Trained, TrainingJob
from veneer.train.metrics import Listener

__all__ = ["Listener", "Trained", "TrainingJob"]
