"""Serves runs, adapters and a base by an OpenAI-compatible server."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from veneer.config import UserError
from veneer.serving.limits import Limits
from veneer.serving.server import Wanted, listen, make_app, named, opened, require_safe, run

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def serve(
    models: Sequence[str],
    *,
    base: str | None = None,
    force: bool = False,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key: str | None = None,
    dtype: str | None = None,
    adapter_folders: Sequence[Path | str] = (),
    limits: Limits | None = None,
    on_ready: Callable[[str, list[str]], None] = lambda address, names: None,
) -> None:
    """Serve models until the process is told to end (Ctrl-C, SIGTERM), which finishes answers that are being made.

    Example:
        veneer.serve(["runs/tickets", "runs/mails"], port=8000)

    Args:
        models: Runs, adapters or a base, which share one base; `NAME=PLACE` gives one another name.
        base: Another base than the adapters name.
        force: Take adapters although their passports say that they do not belong to the base.
        host, port: Address; beyond this machine a key is needed. Port 0: a free one.
        api_key: Key that requests have to bring.
        dtype: Compute dtype: float32, bfloat16 or float16; None: that of training.
        adapter_folders: Folders whose adapters requests may load.
        limits: Limits of the server.
        on_ready: Callback that gets the address and the names of the models once they are loaded.

    Raises:
        UserError: A name stands for nothing, the models share no base, or the address is not safe.
    """
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"--dtype {dtype}: unknown", f"write {', '.join(DTYPES)}")
    hosts = require_safe(host, api_key)
    folders = tuple(Path(folder) for folder in adapter_folders)
    for folder in folders:
        if not folder.expanduser().is_dir():
            raise UserError(f"--adapters {folder}: no such folder", "name a folder that holds adapters or runs")
    chosen = DTYPES[dtype] if dtype is not None else None
    wanted = Wanted([named(model) for model in models], base, force, chosen, folders, limits or Limits())
    with listen(host, port) as listening, opened(wanted) as service:
        shown = f"[{host}]" if ":" in host else host
        address = f"http://{shown}:{listening.getsockname()[1]}"
        app = make_app(service, api_key, hosts)
        run(app, listening, lambda: on_ready(address, list(service.adapters.models)))
