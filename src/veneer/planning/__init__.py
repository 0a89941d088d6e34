"""Memory and time of a run before anything is loaded, and what to change.

memory.py        bytes of each phase of a run: weights, adapter, optimizer, activations of a dry run
time.py          how long a step takes, from its operations and the machine's speeds
held_out.py      how many rows evaluation takes at a time
batch_shapes.py  micro-batches of a run's data, as an engine has them
base.py          a base model to plan for: shapes, engine, dry runs
target.py        the device that is planned for
forecast.py      memory and time of a run;  planner.py  makes it
fit.py           the cheapest changes that make a run fit
model_sizes.py   what fits which card: one family of bases, by method
advice.py        rules about settings, data and forecast
foresee.py       forecast and advice of a run, as `veneer plan` and `veneer train` ask for them
doctor.py        what is wrong with a machine;  measure.py  its speeds
"""
