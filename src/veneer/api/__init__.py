"""The commands as functions, one file each, which the command line and Python both call.

Python reaches them as `veneer.train`, `veneer.plan`, ...; see `veneer/__init__.py`.
"""
