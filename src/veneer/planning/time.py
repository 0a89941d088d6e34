"""Predicts the time of a step from its operations and the machine's ceilings.

Each operation takes the longest of its arithmetic, its memory traffic and its launch; the device runs them one after
the other. Meanwhile the host launches them: where that takes longer, the device waits, and the host's time is the
step's. Ceilings are measured on the machine (`veneer doctor --measure`), or estimated from a card's data sheet by the
shares of it that an H100 reaches (docs/planning.md), with a wider range.
"""

from veneer.engine.trace import Work
from veneer.machine.speeds import Ceilings


def seconds(work: Work, ceilings: Ceilings, host: float = 1.0) -> float:
    """Return the time of some work; `host`: the host's time an operation, relative to that with autograd."""
    flops = {
        "bfloat16": ceilings.half_flops,
        "float16": ceilings.half_flops,
        "float32": ceilings.single_flops,
        "attention": ceilings.attention_flops,
    }
    device = sum(
        count
        * max(
            operation.flops / flops.get(operation.kind, ceilings.single_flops),
            operation.bytes / ceilings.bandwidth,
            ceilings.start_seconds,
        )
        for operation, count in work.items()
    )
    starts = host * sum(work.values()) * ceilings.host_seconds
    return max(device, starts) if ceilings.overlaps else device + starts
