"""The win rate of one set of answers over another to the same rows, by a judge model or by a person.

pairs.py       both answers to each row, from files that an evaluation wrote
prompt.py      what a judge is asked, and how its verdict is read
judging.py     each pair in both positions; judgments are kept as they come
blind.py       order and sides of a page for a person, and the votes that come back
win_rate.py    the win rate with its interval and verdict
"""
