"""Amounts of memory as people write them: 24GiB, 512 MiB, 8GB."""

import re

UNITS = {"gib": 2**30, "mib": 2**20, "gb": 10**9, "mb": 10**6}
_SIZE = re.compile(r"^([-+]?[0-9]*\.?[0-9]+)\s*([a-z]*)$")


def parse_size(text: str) -> int | None:
    """Parse an amount of memory with its unit: GiB, MiB, GB or MB, in any case.

    Returns:
        Bytes; None: the text is not an amount, but perhaps a name.

    Raises:
        ValueError: its unit is missing or unknown, or it is not positive, or larger than any memory.
    """
    size = _SIZE.match(text.strip().lower())
    if size is None:
        return None
    number, unit = float(size[1]), size[2]
    if unit not in UNITS:
        raise ValueError(f"an unknown unit `{unit}`" if unit else "a number without a unit")
    if not 1 <= number * UNITS[unit] < 2**63:
        raise ValueError("memory must be more than nothing" if number < 1 else "larger than any memory")
    return int(number * UNITS[unit])
