"""Turns text into tokens, and keeps tokenized rows on disk.

encode.py    text into tokens with the place of each, control tokens kept apart
words.py     byte-level BPE word by word: the same tokens, faster
tokenize.py  blocks of rows as flat arrays, in several processes
corpus.py    tokenized rows on disk
"""
