"""Reads files of rows: those that a setting names, the kind of each, and its rows.

find.py        files, Arrow folders and hub datasets;  kind.py  what a file is, by its content;  hub.py  opens datasets
read.py        their rows, in blocks (block.py), each with its place;  tables.py  those of Parquet and Arrow
json_text.py   JSON that is one value, read piece by piece
unpacked.py    to how many bytes a Parquet or Arrow file unpacks, and the limit of it
"""
