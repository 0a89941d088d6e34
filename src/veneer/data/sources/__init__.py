"""Files of rows: which ones a setting names, what each is, and its rows.

find.py        files, Arrow folders and hub datasets, each recognised by its content
read.py        their rows, block by block, each with its place
json_text.py   JSON that is one value, read piece by piece
unpacked.py    to how many bytes a Parquet or Arrow file unpacks, and the limit of it
"""
