"""What this machine is: device, precision, memory, known cards, measured speeds.

device.py   the device of a run, and the memory of its process
cards.py    GPUs by name: memory, speed, what they can compute
speeds.py   the ceilings of a machine: products, attention, bandwidth, launches
"""

from typing import TYPE_CHECKING

from veneer.lazy import import_on_use

if TYPE_CHECKING:
    from veneer.machine.device import Machine, find_machine

__all__ = ["Machine", "find_machine"]

__getattr__ = import_on_use(__name__, {"Machine": "veneer.machine.device", "find_machine": "veneer.machine.device"})
