"""Finds what is evaluated by its name, and opens it as a `Responder`.

A run, a checkpoint, an adapter, a base or a merged folder is loaded here. A GGUF file is run by llama.cpp, and an
address is asked as it is; neither measures losses. Each model is asked in its own chat template, since that is how its
users ask it.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from veneer.api.load import load_tuned
from veneer.api.suites import LONGEST_PROMPT
from veneer.config import Data, Evaluate, Model, Run, UserError
from veneer.config.names import gguf_file, target_kind
from veneer.data.pipeline import HeldOut
from veneer.data.render import Renderer
from veneer.engine.reference import ReferenceEngine
from veneer.evaluation.memory import LESS_MEMORY, rows_at_a_time
from veneer.evaluation.partial import facts_of
from veneer.evaluation.responder import ModelResponder, Responder
from veneer.evaluation.suites import Suite
from veneer.machine.batching import Batching
from veneer.machine.device import find_machine
from veneer.machine.ranks import ALONE, Ranks
from veneer.model.fingerprint import fingerprint
from veneer.model.gguf import open_gguf
from veneer.model.load import load_model, load_tokenizer
from veneer.model.locate import locate
from veneer.model.tuned import TunedModel, find_tuned
from veneer.planning.batch_shapes import Padded
from veneer.planning.target import this_device
from veneer.release.certify.answers import SLOTS, ServerResponder
from veneer.release.certify.artifact import gguf_facts
from veneer.release.certify.servers import Endpoint, llama_server, require_llama_cpp

ROOM = 64  # tokens of a template around a turn


@dataclass(frozen=True)
class Workload:
    """What a model is to answer, by which it takes memory.

    Attributes:
        held_out: Rows, as the model's own renderer makes tokens of them.
        settings: Settings of the evaluation.
        suites: Suites that are asked as well.
        reader: Renderer that read the rows; None: they are turns alone.
        ranks: This process among those that share the rows.
    """

    held_out: Sequence[HeldOut]
    settings: Evaluate
    suites: Sequence[Suite]
    reader: Renderer | None
    ranks: Ranks = ALONE

    @property
    def max_new_tokens(self) -> int:
        """The longest answer to a row or an item."""
        return max([self.settings.max_new_tokens, *(suite.max_new_tokens for suite in self.suites)])

    @property
    def longest(self) -> int:
        """The most tokens of a row or an item; without a reader there is none for each byte of its text."""
        rows = (
            len(row.example.ids)
            or sum(ROOM + len(message.content.encode()) for message in row.conversation.messages)
            + len(str(row.conversation.tools).encode())
            for row in self.held_out
        )
        return max([*rows, LONGEST_PROMPT if self.suites else 0])

    @property
    def padded(self) -> Padded:
        """The number of rows or items, and the most tokens and answered tokens of one."""
        rows = max([len(self.held_out), *(len(suite.items) for suite in self.suites)])
        trained = max(row.example.trained for row in self.held_out)
        return Padded(rows, self.longest, max(trained, self.max_new_tokens if self.suites else 1))


class Target(Protocol):
    """A model that can be evaluated; nothing of it is loaded yet.

    Attributes:
        name: Name as the user wrote it.
        has_losses: Whether it measures losses.
        tuned: Its adapter with the base; None: it has none of its own.
    """

    @property
    def name(self) -> str: ...

    @property
    def has_losses(self) -> bool: ...

    @property
    def tuned(self) -> TunedModel | None: ...

    def renderer(self, data: Data) -> Renderer | None:
        """Return its tokenizer and template, with a run's settings; None: they are on a server."""

    def open(self, renderer: Renderer | None, work: Workload) -> AbstractContextManager[Responder]:
        """Load it, for a `with` block."""

    def facts(self) -> dict[str, Any]:
        """Return what identifies it, so that kept answers are taken for no other model's."""


class AdapterTarget:
    """An adapter on its base: a run's, a checkpoint's, or alone."""

    has_losses = True

    def __init__(self, name: str, base: str | None, force: bool) -> None:
        self.name, self.tuned = name, find_tuned(name, base, force)

    def renderer(self, data: Data) -> Renderer:
        return self.tuned.renderer

    @contextmanager
    def open(self, renderer: Renderer | None, work: Workload) -> Iterator[ModelResponder]:
        loaded = load_tuned(self.tuned)
        run = Run(model=self.tuned.model, quantization=self.tuned.quantization, data=Data(train="-"))
        batching = _batching(loaded.run or run, work, loaded.target)
        engine = ReferenceEngine(loaded.model, load_base=self.tuned.load_base)
        yield ModelResponder(loaded.model, engine, loaded.renderer, batching)

    def facts(self) -> dict[str, Any]:
        return facts_of(self.tuned)


class BaseTarget:
    """A base model, or a folder that `veneer merge` wrote."""

    has_losses = True
    tuned = None

    def __init__(self, name: str) -> None:
        self.name, self._model = name, Model(base=name)
        self._source = locate(self._model)

    def renderer(self, data: Data) -> Renderer:
        tokenizer = load_tokenizer(self._source)
        if tokenizer.chat_template and data.chat_template != "none":
            data = data.model_copy(update={"chat_template": "auto"})
        return Renderer(tokenizer, data)

    @contextmanager
    def open(self, renderer: Renderer | None, work: Workload) -> Iterator[ModelResponder]:
        assert renderer is not None
        target = this_device()
        model = load_model(self._source, self._model, None, find_machine())
        batching = _batching(Run(model=self._model, data=Data(train="-")), work, target)
        yield ModelResponder(model, ReferenceEngine(model), renderer, batching)

    def facts(self) -> dict[str, Any]:
        return {"base": fingerprint(self._source) or self._source.reference}


class GgufTarget:
    """A GGUF file, which llama.cpp runs with the tokenizer and the template in it."""

    has_losses = False
    tuned = None

    def __init__(self, name: str) -> None:
        found = gguf_file(name)
        assert found is not None
        require_llama_cpp()
        gguf_facts(found)
        self.name, self._file = name, found
        self._is_chat = "tokenizer.chat_template" in open_gguf(found).fields

    def renderer(self, data: Data) -> None:
        return None

    @contextmanager
    def open(self, renderer: Renderer | None, work: Workload) -> Iterator[ServerResponder]:
        context = work.longest + work.longest // 4 + work.max_new_tokens + ROOM  # its tokenizer may be another one
        with llama_server(self._file, self._is_chat, set(), context, slots=SLOTS) as server:
            yield ServerResponder(server, work.reader)

    def facts(self) -> dict[str, Any]:
        held = self._file.stat()
        return {"file": str(self._file.absolute()), "bytes": held.st_size, "changed": held.st_mtime_ns}


class EndpointTarget:
    """An OpenAI-compatible server."""

    has_losses = False
    tuned = None

    def __init__(self, name: str, model: str | None, option: str) -> None:
        self.name = name
        # One that is down is refused before anything is loaded.
        self._model = Endpoint(name, True, model=model, option=option).model

    def renderer(self, data: Data) -> None:
        return None

    @contextmanager
    def open(self, renderer: Renderer | None, work: Workload) -> Iterator[ServerResponder]:
        server = Endpoint(self.name, work.reader is None or work.reader.is_chat, model=self._model)
        yield ServerResponder(server, work.reader)

    def facts(self) -> dict[str, Any]:
        return {"address": self.name, "model": self._model}


def find_target(
    name: str, base: str | None = None, force: bool = False, model: str | None = None, option: str = "--model"
) -> Target:
    """Find what a name stands for.

    Args:
        name: A run, a checkpoint, an adapter, a base, a merged folder, a GGUF file, or an address.
        base, force: arguments of `load`, for an adapter.
        model: Name of the model, on a server that has several.
        option: Option that names the model.

    Raises:
        UserError: It stands for nothing, a server is not there, or an argument does not apply to it.
    """
    kind = target_kind(name)
    if kind != "adapter" and base is not None:
        raise UserError(f"--base {base}: {name} is not an adapter, so --base does not apply", "leave it out")
    if kind != "adapter" and force:
        raise UserError(f"--force: {name} is not an adapter, so --force does not apply", "leave it out")
    if kind == "adapter":
        return AdapterTarget(name, base, force)
    if kind == "endpoint":
        return EndpointTarget(name, model, option)
    return GgufTarget(name) if kind == "gguf" else BaseTarget(name)


def require_server(name: str | None, kind: str | None, model: str | None, option: str) -> None:
    """Raise UserError where the model of a server is named, and the target is none.

    Args:
        name, kind: Target and its kind; None: there is none.
        model: Model that is named; None: there is none.
        option: Option that names it.
    """
    if model is not None and kind != "endpoint":
        what = "there is no --against" if name is None else f"{name} is not a server with several models"
        raise UserError(f"{option} {model}: {what}", f"leave {option} out")


def _batching(run: Run, work: Workload, target: Any) -> Batching:
    settings = work.settings.model_copy(update={"max_new_tokens": work.max_new_tokens})
    size = rows_at_a_time(run.model_copy(update={"evaluate": settings}), work.padded, target)
    return Batching(size, LESS_MEMORY, ranks=work.ranks)
