"""Puts a server together: base, adapters, scheduler and routes; and runs it until it is told to end.

SIGTERM and Ctrl-C drain: no new connection is taken, answers that are being made are finished, for a limited time.
"""

import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from veneer.config import Model, UserError
from veneer.config.files import reason
from veneer.config.names import find_adapter
from veneer.data.render import Renderer
from veneer.machine.device import find_machine
from veneer.model.fingerprint import fingerprint
from veneer.model.load import base_stop_ids, load_model, load_tokenizer
from veneer.model.locate import BaseSource, locate
from veneer.model.passport import base_name
from veneer.model.shapes import positions_of, shapes_of
from veneer.model.tuned import TunedModel, find_tuned
from veneer.serving.adapter_file import more_than_low_rank
from veneer.serving.adapters import Adapters, Served, find_on, served
from veneer.serving.batch import make_batch, ready
from veneer.serving.grammar import Grammars
from veneer.serving.guard import Guard
from veneer.serving.limits import Limits
from veneer.serving.metrics import Metrics
from veneer.serving.mixed import AdapterBank
from veneer.serving.prefix_cache import PrefixCache
from veneer.serving.scheduler import Scheduler
from veneer.serving.service import Service

CACHE_SHARE = {"cuda": 0.8, "cpu": 0.25}  # of the memory that is free once the base is loaded, for keys and values
PREFIX_SHARE = 8  # of that, one part in so many holds prompts that were read before
LONGEST = 2**17  # positions, where a model names none


@dataclass(frozen=True)
class Wanted:
    """What is to be served.

    Attributes:
        models: Names of runs, adapters or a base, each with the name that requests have for it.
        base: Another base than the adapters name; None: theirs.
        force: Whether to take adapters that do not belong to the base.
        dtype: Compute dtype; None: that of training.
        folders: Folders whose adapters requests may load.
        limits: The limits.
    """

    models: Sequence[tuple[str, str]]
    base: str | None = None
    force: bool = False
    dtype: torch.dtype | None = None
    folders: tuple[Path, ...] = ()
    limits: Limits = field(default_factory=Limits)


@dataclass(frozen=True)
class Base:
    """The base of a server, loaded.

    Attributes:
        model: The Transformers model; with its adapter on it where it is served alone.
        served: Its name in requests, and its renderer.
        name, source: Name in settings, and source of its files.
        first: The first adapter; None: there is none.
        is_alone: Whether the model is an adapter that shares its base with no other.
    """

    model: Any
    served: Served
    name: str
    source: BaseSource
    first: TunedModel | None
    is_alone: bool


def named(argument: str) -> tuple[str, str]:
    """Return name and place of what is served: `NAME=PLACE`, or a place whose last part is the name."""
    name, equals, place = argument.partition("=")
    if equals and name and "/" not in name and place:
        return name, place
    path = Path(argument)
    parts = [part for part in (path.name, path.parent.name, path.parent.parent.name) if part not in ("", ".", "..")]
    if path.name in ("adapter", "model") and len(parts) > 1:
        return parts[1], argument
    return (parts[0] if parts else argument), argument


def load_base_of(wanted: Wanted) -> Base:
    """Load the base that all models share.

    Raises:
        UserError: One of the names stands for nothing, or they share no base.
    """
    names = [name for name, _ in wanted.models]
    if doubled := {name for name in names if names.count(name) > 1}:
        raise UserError(f"{min(doubled)}: two models have that name", "write OTHER_NAME=... for one of them")
    adapters = [place for _, place in wanted.models if find_adapter(place) is not None]
    bases = [place for _, place in wanted.models if place not in adapters]
    if len(bases) + (wanted.base is not None and bool(bases)) > 1:
        raise UserError(f"{', '.join(bases)}: a server has one base", "name one, or start a server for each")
    if not adapters:
        return _base_alone(wanted, bases[0] if bases else str(wanted.base))
    first = find_tuned(adapters[0], wanted.base or (bases[0] if bases else None), wanted.force)
    more = more_than_low_rank(first)
    if more is not None:
        if len(wanted.models) > 1:
            raise UserError(
                f"{first.name}: it cannot share a base with others: {more}",
                "serve it alone, or merge it (veneer merge) and serve the merged folder",
            )
        model = first.load(wanted.dtype)
        key = fingerprint(first.source) or first.source.reference
        alone = served(names[0], 0, first.renderer, set(first.stop_ids), key, first)
        return Base(model, alone, first.model.base, first.source, first, True)
    machine = find_machine()
    dtype = str(wanted.dtype or first.dtype).removeprefix("torch.")
    settings = first.model.model_copy(update={"dtype": dtype})
    model = load_model(first.source, settings, first.quantization, machine)
    own = next((name for name, place in wanted.models if place in bases), None)
    shared = _served_base(own or _short_name(first.source, names), first.source, model)
    return Base(model, shared, first.model.base, first.source, first, False)


def _base_alone(wanted: Wanted, place: str) -> Base:
    dtype = "auto" if wanted.dtype is None else str(wanted.dtype).removeprefix("torch.")
    settings = Model(base=place, dtype=dtype)
    source = locate(settings)
    model = load_model(source, settings, None, find_machine())
    own = next((name for name, at in wanted.models if at == place), None)
    return Base(model, _served_base(own or _short_name(source, []), source, model), place, source, None, False)


def _served_base(name: str, source: BaseSource, model: Any) -> Served:
    renderer = Renderer(load_tokenizer(source))
    stops = renderer.stop_ids | base_stop_ids(getattr(model, "generation_config", None), "generation_config.json")
    return served(name, 0, renderer, stops, fingerprint(source) or source.reference)


def _short_name(source: BaseSource, taken: Sequence[str]) -> str:
    name = base_name(source)
    return name if name not in taken else f"base-{name}"


@contextmanager
def opened(wanted: Wanted) -> Iterator[Service]:
    """Load what is to be served and start its scheduler, for a `with` block."""
    base, limits, metrics = load_base_of(wanted), wanted.limits, Metrics()
    model = base.model
    device = model.get_input_embeddings().weight.device
    dtype = next(p.dtype for p in model.parameters() if p.dtype.is_floating_point)
    bank = AdapterBank(model, limits.adapters + 1, dtype)  # one for what replaces another
    positions = positions_of(model.config.get_text_config()) or LONGEST
    share = CACHE_SHARE.get(device.type, CACHE_SHARE["cpu"])
    token_bytes = max(1, shapes_of(model).key_value_bytes * dtype.itemsize // 2)
    tokens = int(find_machine().free_bytes * share) // token_bytes
    prefix = PrefixCache(tokens * token_bytes // PREFIX_SHARE)
    tokens = min(tokens - tokens // PREFIX_SHARE, limits.slots * positions)
    with ready(model):
        batch = make_batch(model, bank, limits.slots, tokens, positions, prefix)
        scheduler = Scheduler(batch, limits.queue, metrics, overlaps=device.type == "cuda")
        find = find_on(base.first, base.name, base.source, wanted.force)
        adapters = Adapters(base.served, model, bank, scheduler.call, find, base.source, wanted.folders, base.is_alone)
        scheduler.start()
        try:
            for name, place in wanted.models:
                if name != base.served.name:
                    adapters.load(name, place)
            grammars = Grammars(_vocabulary(model))
            metrics.gauges["running_answers"] = "Answers that are made now", lambda: scheduler.running
            metrics.gauges["waiting_answers"] = "Answers that wait", lambda: scheduler.waiting
            metrics.gauges["models"] = "Models that are served", lambda: len(adapters.models)
            metrics.gauges["prefix_cache_bytes"] = "Bytes of prompts that are kept", lambda: prefix.bytes
            yield Service(adapters, scheduler, grammars, limits, metrics)
        finally:
            scheduler.stop()


def _vocabulary(model: Any) -> int:
    head = model.get_output_embeddings()
    return int(getattr(head, "out_features", None) or head.weight.shape[0])


def listen(host: str, port: int) -> socket.socket:
    """Take an address, before anything is loaded; port 0 takes a free one.

    Raises:
        UserError: It is in use, or not this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=256)
    except OSError as error:
        raise UserError(
            f"--host {host} --port {port}: cannot be listened on ({reason(error)})", "name another --port"
        ) from None


def run(app: Guard, listening: socket.socket, on_ready: Callable[[], None], drain_seconds: int = 30) -> None:
    """Answer requests until the process is told to end (SIGTERM, Ctrl-C); answers that are being made are finished.

    Args:
        app: The application.
        listening: Socket of the address.
        on_ready: Called once requests are answered.
        drain_seconds: Time for what is being answered.
    """
    import uvicorn

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            on_ready()

    config = uvicorn.Config(
        app,  # type: ignore[arg-type, unused-ignore]
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=drain_seconds,
        timeout_keep_alive=30,
        h11_max_incomplete_event_size=2**16,
        lifespan="off",
    )
    with suppress(KeyboardInterrupt):  # raised again by uvicorn, once all is finished
        Server(config).run(sockets=[listening])
