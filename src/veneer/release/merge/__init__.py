"""Base and adapter as one model.

adapter_delta.py  what an adapter adds to each tensor of its base, one module at a time
plan.py           the value of each tensor of a merged model, rounded
merged.py         the merged model on disk; and the inverse
disk_names.py     what a base's files call the parameters of its model
stored_4bit.py    bases whose files are in 4 bits already
"""
