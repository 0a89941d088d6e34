"""What a test expects `notify` to say; any other warning fails a unit test."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from veneer.config.notify import collected


@contextmanager
def notified(match: str) -> Iterator[list[str]]:
    """Within the block a warning is given that matches; yields all warnings, complete once the block has ended."""
    said: list[str] = []
    with collected() as notices:
        before = len(notices.events)
        yield said
        said += [event["message"] for event in notices.events[before:] if event["level"] == "warning"]
        del notices.events[before:]
    assert any(re.search(match, message) for message in said), said
