"""Training: the loop, its optimizer, its checkpoints, and checks of all of it.

parts.py       a run's parts: data, forecast, model, adapter
job.py         a whole run: parts, engine, loop, adapter on disk
verify.py      whether training does what it should, here, with this run's model and rows
loop.py        optimizer steps, logging, evaluation, checkpoints
objectives/    what is minimized
reference.py   what preferences are compared with
optimizer.py   AdamW by name; schedule.py  the learning rate as a function of the step
checkpoint.py  a resumable state on disk
saving.py      writes checkpoints beside the training; resuming.py  what a run that goes on must share
parallel.py    a rank's share of a step, and what ranks exchange
divergence.py  steps whose loss or gradient is off; alarms/  faults that nobody would see
held_out_loss.py  loss and metrics of held-out rows
stop.py        signals that ask the loop to end, with a checkpoint
metrics.py     metrics.jsonl, and the listeners that get its records (config/records.py)
pair_values.py what an objective says of each held-out pair
intervals.py   95% intervals; bootstrap.py  those of means, by drawing rows or groups of rows again
"""
