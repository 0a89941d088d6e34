"""The machine as found, and what a run will cost on it."""

from typing import TYPE_CHECKING

from veneer.lazy import import_on_use

if TYPE_CHECKING:
    from veneer.plan.machine import Machine, find_machine

__all__ = ["Machine", "find_machine"]

import_on_use(__name__, {"Machine": "veneer.plan.machine", "find_machine": "veneer.plan.machine"})
