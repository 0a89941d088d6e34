"""A tuned model: an adapter with its base, tokenizer, chat template and passport, found by one name and checked.

Evaluation, generation, merge, export and certificate come through this one door, so that all of them put the adapter
on the same base in the same bits, and render conversations as training did. `find_tuned` reads settings and compares
fingerprints; weights are read when `load` is called.

A run's folder, or one of its checkpoints, knows its base from run.yaml. A folder that holds an adapter alone (from a
hub, or from plain PEFT) knows it from its passport, else from its adapter_config.json, and `--base` names it where
neither does. A passport names a base that is a folder or a file without its path; the path stands in
adapter_config.json, which a push takes out of it.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from veneer.config import Data, Model, Quantization, Run, RunFolder, UserError, load_run
from veneer.config.files import RESTORE, read_json, read_optional_json
from veneer.config.load import validate
from veneer.config.manifest import read_manifest
from veneer.config.names import base_not_here, require_adapter
from veneer.data.render import Renderer
from veneer.data.template import names_file
from veneer.machine.device import find_machine
from veneer.model.attach import load_adapter
from veneer.model.fingerprint import stored_quantization
from veneer.model.load import base_stop_ids, compute_dtype, load_model, load_tokenizer
from veneer.model.locate import BaseSource, fetched_folder, locate
from veneer.model.passport import Passport, read_passport, require_match, trained_in_4_bits

FETCH_AGAIN = "fetch it again, or restore it"


@dataclass(frozen=True)
class TunedModel:
    """An adapter with its base; nothing of either is loaded yet.

    Attributes:
        name: What the user wrote.
        adapter: Folder of the adapter in PEFT's format.
        passport: What the adapter belongs to; None: another tool made it.
        model, source: The base's settings, and where its files are.
        quantization: What the base was quantized to in training; None: not at all, or it is not known, or its files are
            in 4 bits already.
        dtype: What training computed in.
        data: How training rendered its rows; None: it is not known.
        run: The run of the adapter; None: it stands alone.
        folder: The run's folder.
    """

    name: str
    adapter: Path
    passport: Passport | None
    model: Model
    source: BaseSource
    quantization: Quantization | None
    dtype: torch.dtype
    data: Data | None = None
    run: Run | None = None
    folder: RunFolder | None = None

    @property
    def is_checkpoint(self) -> bool:
        """Whether it is a state on the run's way, and not what the run came to."""
        return self.folder is not None and self.adapter != self.folder.adapter

    @cached_property
    def base_folder(self) -> Path:
        """The base's files; those of a hub model are fetched.

        Raises:
            UserError: They cannot be fetched.
        """
        return fetched_folder(self.source)

    @property
    def weights(self) -> Path:
        """The adapter's weights."""
        return self.adapter / "adapter_model.safetensors"

    @property
    def peft_config(self) -> dict[str, Any]:
        """The content of adapter_config.json."""
        return _peft_config(self.adapter)

    @property
    def dtype_name(self) -> str:
        """What training computed in, as settings name it."""
        return _named(self.dtype)

    @cached_property
    def renderer(self) -> Renderer:
        """The tokenizer and the template as they were in training; the base's where the adapter brings none."""
        if not self._brings_tokenizer:
            return Renderer(load_tokenizer(self.source), self.data)
        tokenizer = load_tokenizer(BaseSource("folder", str(self.adapter), str(self.adapter)))
        data = self.data
        if data is not None and names_file(data.chat_template):
            data = data.model_copy(update={"chat_template": "auto"})  # what was in the file ships with the tokenizer
        return Renderer(tokenizer, data)

    @property
    def tokenizer_folder(self) -> Path:
        """The folder whose tokenizer ships."""
        return self.adapter if self._brings_tokenizer else self.base_folder

    @property
    def _brings_tokenizer(self) -> bool:
        return (self.adapter / "tokenizer.json").is_file()

    @cached_property
    def stop_ids(self) -> list[int]:
        """Every token at which an answer ends: those training taught, and those the base itself names."""
        ids = self.renderer.stop_ids | set((self.passport or {}).get("stop_token_ids", []))
        for file in (self.base_folder / "config.json", self.base_folder / "generation_config.json"):
            ids |= base_stop_ids(read_optional_json(file), str(file))
        return sorted(ids)

    def load(self, dtype: torch.dtype | None = None) -> Any:
        """The adapter on its base, on this machine's device, ready to answer.

        Args:
            dtype: compute dtype, as that of the training; None: what `model.dtype` means on this machine.

        Raises:
            UserError: The base or the adapter does not load.
        """
        model = self.model if dtype is None else self.model.model_copy(update={"dtype": _named(dtype)})
        return load_adapter(load_model(self.source, model, self.quantization, find_machine()), self.adapter)


def find_tuned(name: str, base: str | None = None, force: bool = False, is_merged: bool = False) -> TunedModel:
    """An adapter and its base by the folder of a run, of one of its checkpoints, or of an adapter.

    Args:
        name: The folder.
        base: Another base than the one it names, or the one that it does not name.
        force: Go on where the adapter's passport says that it does not belong to the base.
        is_merged: `base` is the base with the adapter in it already; its weights are not compared.

    Raises:
        UserError: There is no adapter, no base, or they do not belong together.
    """
    found = require_adapter(name)
    adapter, folder = found.path, found.run
    if folder is not None and adapter != folder.adapter:
        read_manifest(adapter)
    passport = read_passport(adapter)
    run = load_run(folder.run) if folder is not None else None
    kept = run or _run_of_passport(adapter, passport)
    model = _base(adapter, run, kept, passport)
    if base is not None:
        model = (model or Model(base=base)).model_copy(update={"base": base, "revision": None})
    if model is None:
        raise UserError(f"{name}: neither passport nor adapter_config.json names a base", "name it with --base")
    try:
        source = locate(model)
    except UserError as error:
        if base is not None:
            raise
        raise base_not_here(name, error) from None
    require_match(adapter, passport, None if is_merged else source, force)
    quantization = kept.quantization if kept is not None else None
    if stored_quantization(source) is not None:
        quantization = None
    elif quantization is None:  # the base of the training may have been stored in 4 bits, which this one is not
        quantization = trained_in_4_bits(passport)
    data = kept.data if kept is not None else None
    return TunedModel(
        name, adapter, passport, model, source, quantization, _dtype(folder, model), data, run=run, folder=folder
    )


def _run_of_passport(adapter: Path, passport: Passport | None) -> Run | None:
    """The settings that a passport keeps, in which files have no paths; None: there are none."""
    settings = (passport or {}).get("settings")
    if not isinstance(settings, dict):
        return None
    try:
        return validate(settings, {}, "passport.json")
    except UserError as error:
        raise UserError(
            f"{adapter}: the settings in passport.json are not this Veneer's ({' '.join(str(error).split())})",
            "update Veneer, or delete passport.json to go on without its checks",
        ) from None


def _base(adapter: Path, run: Run | None, kept: Run | None, passport: Passport | None) -> Model | None:
    """The base that an adapter names: by its run, else by its passport, else by adapter_config.json."""
    if run is not None:
        return run.model
    place = _peft_config(adapter).get("base_model_name_or_path")
    if kept is None:
        return Model(base=str(place)) if place else None
    has_place = ((passport or {}).get("base") or {}).get("kind") in ("folder", "gguf") and place
    return kept.model.model_copy(update={"base": str(place)}) if has_place else kept.model


def _peft_config(adapter: Path) -> dict[str, Any]:
    return read_json(adapter / "adapter_config.json", fix=FETCH_AGAIN)


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dtype(folder: RunFolder | None, model: Model) -> torch.dtype:
    """What the run computed in; `auto` means other things on other machines, so its plan is asked first."""
    if folder is not None and folder.plan.is_file():
        kept = read_json(folder.plan, "dtype")["dtype"]
        if not isinstance(found := getattr(torch, str(kept), None), torch.dtype):
            raise UserError(f"{folder.plan}: damaged: dtype = {str(kept)[:40]!r}", RESTORE)
        return found
    return compute_dtype(model, find_machine())
