"""Adapters of a folder that come and go: what appears is loaded, what changes is loaded again, what goes is unloaded.

The folder is looked at every few seconds, since no way to be told of changes works on every system and on network
drives. What is half-written does not load; it is tried again once it has changed.
"""

import threading
from contextlib import suppress
from pathlib import Path

from veneer.config import UserError
from veneer.config.notify import notify
from veneer.serving.adapters import Adapters
from veneer.serving.errors import ApiError

SECONDS = 2.0  # between two looks
FILES = ("adapter_config.json", "adapter_model.safetensors", "passport.json")


class WatchedFolder:
    """Keeps the adapters of a server like those in a folder.

    Args:
        folder: Folder of runs and adapters; each is served by its folder's name.
        adapters: The models of the server.
    """

    def __init__(self, folder: Path, adapters: Adapters) -> None:
        self._folder, self._adapters = folder.expanduser().resolve(), adapters
        self._seen: dict[str, tuple[float, ...]] = {}
        self._loaded: set[str] = set()
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._run, name="veneer-watch", daemon=True)

    def start(self) -> None:
        """Look once, and then again and again on a thread of its own."""
        self.look()
        self._thread.start()

    def stop(self) -> None:
        """End the thread."""
        self._ends.set()
        self._thread.join()

    def look(self) -> None:
        """Load, replace and unload what has changed since the last look."""
        found = {entry.name: _state(entry) for entry in self._folder.iterdir()} if self._folder.is_dir() else {}
        found = {name: state for name, state in found.items() if state}
        for name in sorted(self._loaded - found.keys()):
            with suppress(ApiError):  # somebody else unloaded it
                self._adapters.unload(name)
            self._loaded.discard(name)
        for name, state in sorted(found.items()):
            if self._seen.get(name) != state:
                self._load(name)
        self._seen = found

    def _load(self, name: str) -> None:
        try:
            self._adapters.load(name, str(self._folder / name), replaces=name in self._loaded)
        except (UserError, ApiError) as error:
            notify(f"{name} is not served: {' '.join(str(error).split())}", where=str(self._folder))
            return
        self._loaded.add(name)
        notify(f"{name} is served", "info", str(self._folder))

    def _run(self) -> None:
        while not self._ends.wait(SECONDS):
            try:
                self.look()
            except OSError as error:  # a network drive that is away for a moment
                notify(f"{self._folder} cannot be read: {error.strerror}", where=str(self._folder))


def _state(entry: Path) -> tuple[float, ...]:
    """Return the times at which an adapter's files changed; empty: it is no adapter, or not whole."""
    folder = entry / "adapter" if (entry / "adapter").is_dir() else entry
    try:
        return tuple(
            (folder / name).stat().st_mtime_ns for name in FILES if name != FILES[2] or (folder / name).exists()
        )
    except OSError:
        return ()
