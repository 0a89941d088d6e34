"""The models of a server by name: the base, and adapters that are loaded, replaced and unloaded while it serves.

An adapter is found through the one door for all of Veneer (model/tuned.py), which compares its passport with the base
that is served and refuses another. Its files are read on the caller's thread; only the copy of its matrices into the
bank happens between two steps, so nothing stalls. What is replaced or unloaded keeps its place in the bank until its
last answer is finished, so an answer never changes its weights half-way.
"""

import hashlib
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from veneer.config import UserError
from veneer.config.files import file_sha256
from veneer.data.render import Renderer
from veneer.model.fingerprint import fingerprint
from veneer.model.locate import BaseSource
from veneer.model.tuned import TunedModel, find_tuned
from veneer.serving.adapter_file import read_matrices
from veneer.serving.errors import ApiError, no_model
from veneer.serving.mixed import AdapterBank, Matrices
from veneer.serving.tool_calls import CallForm, call_form

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json")


@dataclass(frozen=True)
class Served:
    """A model that is served.

    Attributes:
        name: Name in requests.
        number: Number of its adapter in the bank; 0: the base, or the only model.
        renderer: Tokenizer and template of training.
        stop_ids: Tokens that end an answer.
        sha256: Hash of the adapter's weights; None: the base.
        cache_key: Owner of the keys and values of its prompts.
        created: Unix time of its load.
        calls: Form of its calls of tools; None: none that is read.
        tuned: The adapter; None: the base.
    """

    name: str
    number: int
    renderer: Renderer
    stop_ids: frozenset[int]
    sha256: str | None
    cache_key: str
    created: int
    calls: CallForm | None
    tuned: TunedModel | None = None


def served(
    name: str, number: int, renderer: Renderer, stop_ids: set[int], base: str, tuned: TunedModel | None = None
) -> Served:
    """Describe a model; `base` identifies its base."""
    sha256 = None if tuned is None else tuned.weights_sha256
    settings = "" if tuned is None or tuned.is_full else json.dumps(tuned.peft_config, sort_keys=True, default=str)
    key = hashlib.sha256(f"{base} {sha256} {settings}".encode()).hexdigest()
    parts = (name, number, renderer, frozenset(stop_ids), sha256, key, int(time.time()), call_form(renderer))
    return Served(*parts, tuned)


class Adapters:
    """The models of one server.

    Args:
        base: The base, or the only model.
        bank: The bank of adapters.
        call: Calls a function between two steps, and returns its result when it is there.
        find: Finds an adapter on the base that is served, by its folder.
        source: Source of the base.
        folders: Folders whose adapters may be loaded by a request.
        is_alone: Whether the only model is itself an adapter, so that no others can be loaded.
    """

    def __init__(
        self,
        base: Served,
        model: Any,
        bank: AdapterBank,
        call: Callable[[Callable[[], None]], "Future[None]"],
        find: Callable[[str], TunedModel],
        source: BaseSource,
        folders: tuple[Path, ...] = (),
        is_alone: bool = False,
    ) -> None:
        self.base, self._model, self._bank, self._call, self._find = base, model, bank, call, find
        self._source, self._is_alone = source, is_alone
        self.folders = tuple(folder.expanduser().resolve() for folder in folders)
        self._models: dict[str, Served] = {base.name: base}
        self._renderers: dict[str, Renderer] = {}
        self._used: Counter[int] = Counter()
        self._lock = threading.Lock()
        self._loading = threading.Lock()  # one adapter at a time

    @property
    def models(self) -> Mapping[str, Served]:
        """The models by name."""
        return dict(self._models)

    def get(self, name: str) -> Served:
        """Return a model by its name.

        Raises:
            ApiError: None of that name is served.
        """
        found = self._models.get(name)
        if found is None:
            raise no_model(name, sorted(self._models))
        return found

    def hold(self, name: str) -> Served:
        """Return a model by its name, and keep its place in the bank until `release`."""
        with self._lock:
            model = self.get(name)
            self._used[model.number] += 1
        return model

    def hold_again(self, model: Served) -> None:
        """Keep the place of a model that is held already once more."""
        with self._lock:
            self._used[model.number] += 1

    def release(self, model: Served) -> None:
        """Let go of a model that was held."""
        with self._lock:
            self._used[model.number] -= 1

    def load(self, name: str, folder: str, replaces: bool = False) -> Served:
        """Load an adapter, or replace the one of that name.

        Raises:
            UserError: It is not there, is another base's, or does not fit; or the name is taken.
        """
        with self._loading:
            before = self._models.get(name)
            if self._is_alone:
                raise UserError(f"{name}: {self.base.name} is served alone", "serve the base with adapters instead")
            if before is not None and (before.number == 0 or not replaces):
                raise UserError(f"{name}: a model of that name is served already", "choose another name, or replace it")
            tuned = self._find(folder)
            matrices = read_matrices(tuned, self._model)
            renderer = self._renderer(tuned)
            number = self._free_number(before is not None)
            base = fingerprint(self._source) or self._source.reference
            model = served(name, number, renderer, set(tuned.stop_ids), base, tuned)
            self._call(lambda: self._put(number, matrices)).result()
            with self._lock:
                self._models[name] = model
            return model

    def _put(self, number: int, matrices: Mapping[str, Matrices]) -> None:
        self._bank.put(number, matrices)

    def unload(self, name: str) -> None:
        """Unload an adapter; its answers that are being made are finished.

        Raises:
            ApiError: None of that name is served, or it is the base.
        """
        with self._lock:
            model = self.get(name)
            if model.number == 0:
                raise ApiError(400, f"{name} is the base, which stays", "lora_name")
            del self._models[name]

    def allowed_path(self, path: str) -> Path:
        """Return the folder that a request names, if it lies in one of those that may be loaded from.

        Raises:
            ApiError: It lies elsewhere, or nothing may be loaded.
        """
        if not self.folders:
            raise ApiError(
                403, "no folder was named whose adapters may be loaded (veneer serve --adapters FOLDER)", "lora_path"
            )
        outside = ApiError(403, "lora_path: lies in no folder whose adapters may be loaded", "lora_path")
        if "\0" in path:
            raise outside
        given = Path(path)
        for folder in self.folders:
            try:
                found = (given if given.is_absolute() else folder / given).resolve()
                if found.is_relative_to(folder) and found != folder and found.is_dir():
                    return found
            except (OSError, RuntimeError):  # a name that is too long, a link to itself
                continue
        raise outside

    def _free_number(self, replaces: bool) -> int:
        """Return a number that no model has; one more than may be loaded is there, for what replaces another."""
        most = len(self._bank.numbers) - 1
        with self._lock:
            taken = {model.number for model in self._models.values()}
            free = [n for n in self._bank.numbers if n not in taken and not self._used[n]]
            loaded = len(taken) - 1
        if not free or (loaded >= most and not replaces):
            what = (
                f"{loaded} adapters are loaded, and {most} may be" if loaded >= most else "unloaded ones still answer"
            )
            raise UserError(f"no room for another adapter: {what}", "unload one, or raise --adapters-at-a-time")
        return free[0]

    def _renderer(self, tuned: TunedModel) -> Renderer:
        """Return an adapter's renderer; those of equal tokenizers, templates and settings are one."""
        files = [file_sha256(tuned.adapter / name) for name in TOKENIZER_FILES]
        key = json.dumps([files, tuned.data and tuned.data.model_dump(mode="json")], sort_keys=True, default=str)
        if files[0] is None:
            return tuned.renderer
        if key not in self._renderers:
            self._renderers[key] = tuned.renderer
        return self._renderers[key]


def find_on(base: TunedModel | None, base_name: str, source: BaseSource, force: bool) -> Callable[[str], TunedModel]:
    """Return a function that finds adapters on the base that is served.

    Args:
        base: Adapter whose base it is; None: the base was named by itself.
        base_name: Name of the base, as settings have it.
        source: Its source.
        force: Whether to take adapters although they do not belong to it.
    """

    def find(folder: str) -> TunedModel:
        tuned = find_tuned(folder, base_name, force)
        if not force and tuned.passport is None:
            named = str(tuned.peft_config.get("base_model_name_or_path") or "")
            if named and named not in (source.name, source.reference, source.location):
                raise UserError(
                    f"{folder}: its adapter_config.json names the base {named}, and {source.name} is served",
                    "serve that base, or use --force",
                )
        if not force and base is not None and tuned.quantization != base.quantization:
            raise UserError(
                f"{folder}: it was trained on {_bits(tuned)}, and {base.name} on {_bits(base)}",
                "serve it by itself, or use --force",
            )
        return tuned

    return find


def _bits(tuned: TunedModel) -> str:
    return "a base in 4 bits" if tuned.quantization is not None else "a base as it is stored"
