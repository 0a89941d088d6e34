"""Runs a function on many items in threads, for work that waits: requests to a server."""

import threading
from collections.abc import Callable, Iterator, Sequence
from queue import SimpleQueue
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def as_they_come(work: Callable[[T], R], items: Sequence[T], at_once: int) -> Iterator[R]:
    """Yield results as they come, from threads that do not outlive the process.

    An error ends the work: what is under way is still finished and yielded, and then the error is raised.
    """
    waiting, lock, stop = iter(items), threading.Lock(), threading.Event()
    done: SimpleQueue[list[R] | BaseException | None] = SimpleQueue()  # a result, an error, or the end of a thread

    def run() -> None:
        for item in iter(lambda: _next(waiting, lock, stop), None):
            try:
                done.put([work(item)])
            except BaseException as error:  # noqa: BLE001 - it is raised again in the thread that waits
                stop.set()
                done.put(error)
        done.put(None)

    running = min(at_once, len(items))
    for _ in range(running):
        threading.Thread(target=run, daemon=True).start()
    failed: BaseException | None = None
    try:
        while running:
            found = done.get()
            if isinstance(found, list):
                yield found[0]
            elif found is None:
                running -= 1
            else:
                failed = failed or found
    finally:
        stop.set()
    if failed is not None:
        raise failed


def _next(waiting: Iterator[T], lock: threading.Lock, stop: threading.Event) -> T | None:
    with lock:
        return None if stop.is_set() else next(waiting, None)
