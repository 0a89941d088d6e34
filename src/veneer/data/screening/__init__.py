"""Checks rows before they are trained on.

privacy.py        personal data and secrets in a text
prerendered.py    rows that bring a chat template with them
deduplication.py  duplicates, near-duplicates and shared passages
"""
