"""What leaves the house: passport, card, merged models, GGUF files, and the proof that they are what was trained.

weights.py    safetensors read and written with one tensor in memory at a time
passport.py   what an adapter belongs to, and the refusal to load it on anything else
origin.py     an adapter with its base: what a release is made from
fold.py       an adapter folded into its base's tensors, one module at a time
merge.py      base and adapter as one model on disk; and the inverse
card.py       README.md of an adapter
lint.py       what vLLM takes
push.py       upload to a hub
"""

from veneer.release.card import renew_card, write_card
from veneer.release.merge import Merged, merge_into, unmerge_from
from veneer.release.origin import Origin, find_origin
from veneer.release.passport import require_match

__all__ = ["Merged", "Origin", "find_origin", "merge_into", "renew_card", "require_match", "unmerge_from", "write_card"]
