"""What leaves the house: the adapter's card and its passport."""

from veneer.release.card import write_card

__all__ = ["write_card"]
