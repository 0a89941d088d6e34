"""A GGUF file served by llama.cpp's own server, through the extra that certificates use.

Its template and its stop tokens are those that the export wrote into the file.
"""

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

from veneer.config import UserError
from veneer.release.certify.servers import require_llama_cpp

CONTEXT = 4096  # tokens of a slot


def serve_gguf(
    file: Path, name: str, host: str, port: int, key: str | None, slots: int, on_ready: Callable[[str, list[str]], None]
) -> None:
    """Serve a GGUF file until the process is told to end.

    Raises:
        UserError: llama.cpp is not installed, or does not load the file.
    """
    require_llama_cpp()
    import xllamacpp

    settings = xllamacpp.CommonParams()
    settings.model.path, settings.model_alias = str(file), {name}
    settings.hostnames, settings.port = [host], port
    settings.n_parallel, settings.n_ctx = slots, slots * CONTEXT
    settings.warmup, settings.verbosity, settings.use_jinja = False, 1, True
    if key is not None:
        settings.api_keys = [key]
    try:
        server = xllamacpp.Server(settings)
    except RuntimeError as error:
        raise UserError(
            f"{file}: llama.cpp does not load it: {error}", "export it again, or name another file"
        ) from None
    ends = threading.Event()
    before = {number: signal.signal(number, lambda *_: ends.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        on_ready(server.listening_address, [name])
        while not ends.wait(1):
            pass
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    os._exit(0)  # llama.cpp's threads take a second to let go, and nothing is to be kept
