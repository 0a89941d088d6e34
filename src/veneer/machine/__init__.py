"""The machine: its device, precision and memory, known GPUs, measured speeds.

device.py   the device of a run, and the memory of its process
cards.py    GPUs by name: memory, speed, what they can compute
batching.py, concurrent.py   rows in batches that fit; requests that wait, several at once
ranks.py    the processes of a run on several GPUs; launch.py  starts them
environment.py   versions and platform
speeds.py   the ceilings of a machine: products, attention, bandwidth, launches
"""
