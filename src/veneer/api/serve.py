"""Serves runs, adapters and a base by an OpenAI-compatible server, or hands them to vLLM or llama.cpp."""

import importlib.util
import os
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch

from veneer.config import UserError
from veneer.config.names import gguf_file
from veneer.model.tuned import find_tuned
from veneer.serving import vllm
from veneer.serving.address import require_safe
from veneer.serving.gguf import serve_gguf
from veneer.serving.limits import Limits
from veneer.serving.server import Wanted, listen, named, opened, run
from veneer.serving.watch import WatchedFolder

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
OnReady = Callable[[str, list[str]], None]


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
    watch: Path | str | None = None,
    limits: Limits | None = None,
    engine: str = "veneer",
    on_ready: OnReady = lambda address, names: None,
) -> None:
    """Serve models until the process is told to end (Ctrl-C, SIGTERM), which finishes answers that are being made.

    Example:
        veneer.serve(["runs/tickets", "runs/mails"], port=8000)

    Args:
        models: Runs, adapters or a base, which share one base; `NAME=PLACE` gives one another name. Or a GGUF file,
            which llama.cpp serves.
        base: Another base than the adapters name.
        force: Take adapters although their passports say that they do not belong to the base.
        host, port: Address; beyond this machine a key is needed. Port 0: a free one.
        api_key: Key that requests have to bring.
        dtype: Compute dtype: float32, bfloat16 or float16; None: that of training.
        adapter_folders: Folders whose adapters requests may load.
        watch: Folder whose adapters are served as they come and go.
        limits: Limits of the server.
        engine: veneer, or vllm, which is started with the same adapters.
        on_ready: Callback that gets the address and the names of the models once they are loaded.

    Raises:
        UserError: A name stands for nothing, the models share no base, or the address is not safe.
    """
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"--dtype {dtype}: unknown", f"write {', '.join(DTYPES)}")
    if engine not in ("veneer", "vllm"):
        raise UserError(f"--engine {engine}: unknown", "write veneer or vllm")
    hosts = require_safe(host, api_key)
    limits = limits or Limits()
    pairs = [named(model) for model in models]
    if any(gguf_file(place) is not None for _, place in pairs):
        _serve_gguf(pairs, host, port, api_key, limits, on_ready)
        return
    if engine == "vllm":
        _serve_by_vllm(pairs, base, force, host, port, api_key)
        return
    folders = tuple(Path(folder) for folder in adapter_folders)
    for option, folder in [("--adapters", folder) for folder in folders] + [("--watch", Path(watch or "."))]:
        if not folder.expanduser().is_dir():
            raise UserError(f"{option} {folder}: no such folder", "name a folder that holds adapters or runs")
    _require_installed()
    from veneer.serving.app import make_app

    wanted = Wanted(pairs, base, force, DTYPES[dtype] if dtype is not None else None, folders, limits)
    with ExitStack() as stack:
        listening = stack.enter_context(listen(host, port))
        service = stack.enter_context(opened(wanted))
        if watch is not None:
            watched = WatchedFolder(Path(watch), service.adapters)
            watched.start()
            stack.callback(watched.stop)
        shown = f"[{host}]" if ":" in host else host
        address = f"http://{shown}:{listening.getsockname()[1]}"
        app = make_app(service, api_key, hosts)
        run(app, listening, lambda: on_ready(address, list(service.adapters.models)))


def _require_installed() -> None:
    """Raise UserError where the libraries of a server are not installed."""
    missing = [name for name in ("fastapi", "uvicorn") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"{' and '.join(missing)} not installed", "pip install 'veneer[serve]'")


def _serve_gguf(
    pairs: Sequence[tuple[str, str]], host: str, port: int, key: str | None, limits: Limits, on_ready: OnReady
) -> None:
    if len(pairs) > 1:
        raise UserError("llama.cpp serves one GGUF file", "start a server for each, or serve the runs themselves")
    name, place = pairs[0]
    file = gguf_file(place)
    assert file is not None
    serve_gguf(file, name.removesuffix(".gguf"), host, port, key, limits.slots, on_ready)


def _serve_by_vllm(
    pairs: Sequence[tuple[str, str]], base: str | None, force: bool, host: str, port: int, key: str | None
) -> None:
    """Start vLLM with the adapters, or say what would.

    Raises:
        UserError: vLLM does not accept them, or is not installed; the command that would serve them is in the message.
    """
    adapters = [(name, find_tuned(place, base, force)) for name, place in pairs]
    vllm.require_accepted(adapters)
    template = vllm.template_for(adapters[0][1])
    with tempfile.TemporaryDirectory(prefix="veneer-vllm-") as folder:
        file = None
        is_there = importlib.util.find_spec("vllm") is not None
        if template is not None:
            file = Path(folder if is_there else ".") / "veneer-chat-template.jinja"
            file.write_text(template, encoding="utf-8")
        words = vllm.command(adapters, host, port, file)
        if not is_there:
            written = f" ({file} was written)" if file is not None else ""
            raise UserError(
                "vLLM is not installed here", f"where it is, this serves them{written}:\n  {vllm.shown(words)}"
            )
        environment = os.environ | ({"VLLM_API_KEY": key} if key is not None else {})
        subprocess.run(words, env=environment, check=False)
