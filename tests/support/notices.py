"""What a test expects `notify` to say; any other warning fails a unit test."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from veneer.config.notify import Event, collected


@contextmanager
def notified(match: str) -> Iterator[list[Event]]:
    """Within the block a warning is given that matches; yields the events, complete once the block has ended."""
    said: list[Event] = []
    with collected() as notices:
        yield said
    said += [event for event in notices.events if event.level == "warning"]
    if notices.outer is not None:
        notices.outer.events[:] = [event for event in notices.outer.events if event not in said]
    assert any(re.search(match, event.message) for event in said), [event.message for event in said]
