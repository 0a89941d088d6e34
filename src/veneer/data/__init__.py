"""Turns files of rows into batches of tokens, with an account of every row and token.

sources/          which files a setting names, and their rows
row_parser.py     one row: a conversation, or why it is none
recognise.py      the format of a file;  shapes.py  what is amiss with a file of no known format
formats.py        the formats, and their rows as conversations;  turns.py  lists of turns;  values.py  values in calls
conversation.py   what a row stands for
template.py       chat templates, and what they cannot say;  frozen.py  their date;  leftout.py  what they left out
sandbox.py        renders them, in a process with limits
drafts.py         a row's text before it is tokens;  render.py  its tokens, and which of them are trained
tokens/           text as tokens, rows as arrays, in several processes and on disk
screening/        personal data, rendered rows, duplicates
split.py          which rows are held out;  leakage.py  what both sides share
ledger.py         the account of every row and token;  warn.py  what it should make one wary of
pipeline.py       all of that for a run;  starter.py  a first run file for some data
batch.py          which examples stand in which step, packing, and the batch an engine reads
"""
