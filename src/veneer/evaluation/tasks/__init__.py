"""Tasks of lm-eval (EleutherAI's harness), asked of base and tuned model and compared document by document.

The harness does what it does by itself: it builds prompts, asks, and scores. Nothing is scored by other code, so that
scores are those that its own runner gets. What is added is the pairing: the same documents for both models, and a
difference with an interval instead of two intervals.

options.py  choices that change scores, under the harness's own names; needs no harness
find.py     tasks by name, or by a folder or file of one's own, refused before a model is loaded
harness.py  a loaded model asked by the harness
compare.py  base against tuned by each of a task's metrics, and by those of groups of tasks

find.py, harness.py and compare.py import lm-eval, which is an extra: they are imported once it is known to be there.
"""
