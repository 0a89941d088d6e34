"""What leaves the house: the adapter's passport and card.

weights.py    safetensors read and written with one tensor in memory at a time
passport.py   what an adapter belongs to, and the refusal to load it on anything else
card.py       README.md of an adapter
"""

from veneer.release.card import write_card
from veneer.release.passport import require_match

__all__ = ["require_match", "write_card"]
