"""Predicts memory and time of a run before anything is loaded, and advises on settings.

memory.py        bytes of each phase of a run: weights, adapter, optimizer, activations of a dry run
time.py          time of a step, from its operations and the machine's speeds
held_out.py      batch sizes of evaluation
batch_shapes.py  shapes of a run's micro-batches
base.py          a base model to plan for: shapes, engine, dry runs
target.py        the device that is planned for
forecast.py      memory and time of a run;  planner.py  makes it
fit.py           the cheapest changes that make a run fit
model_sizes.py   largest base that fits a card, by method
advice.py        rules about settings, data and forecast
predict.py       forecast and advice of a run, for `veneer plan` and `veneer train`
doctor.py        faults of a machine;  measure.py  its speeds
"""
