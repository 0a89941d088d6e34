"""The machine as found, and what a run will cost on it."""

from veneer.plan.machine import Machine, find_machine

__all__ = ["Machine", "find_machine"]
