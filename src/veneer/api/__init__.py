"""What the commands do, as functions: the command line and Python call the same. One file a command.

Python reaches them as `veneer.train`, `veneer.plan`, ...; see `veneer/__init__.py`.
"""
