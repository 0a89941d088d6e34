"""Evaluation compares a tuned model with its base on held-out rows: generated answers and losses, with intervals.

generation.py  answers of a model, in batches
decoding.py    how tokens are chosen, where an answer stops, and its text as it grows
memory.py      rows at a time: as many as fit, fewer where memory is short; room for answers in a model's positions
prefix.py      the tokens that all prompts begin with, computed once
partial.py     answers kept as they come, for an evaluation that is interrupted
during.py      metrics of answers while a model is trained
metrics/       what is measured of the answers and the losses, a file a metric
paired.py      two models on the same rows: which rows turned right or wrong, and a verdict
differences.py base against tuned by each metric: difference, detectable difference, verdict
row_values.py  what a metric measured of each row
gate.py        conditions on what was measured, such as exact_match >= 0.8
compare.py     base against tuned on the same rows
tasks/         tasks of lm-eval, an extra: base against tuned on each document
suites/        what a model can do beside its task, and what it forgot; memorisation; personal data in answers
win_rate/      which of two answers to the same row is better, by a judge model or a person
"""
