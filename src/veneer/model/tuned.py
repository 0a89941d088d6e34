"""A tuned model is an adapter with its base, tokenizer, chat template and passport, found by one name and checked.

Evaluation, generation, merge, export and certificate all use it, so that they put the adapter on the same base with the
same quantization, and render conversations as training did. `find_tuned` reads settings and compares fingerprints;
weights are read when `load` is called.

The base of a run's folder, or of one of its checkpoints, comes from run.yaml. That of an adapter's folder (from a hub,
or from plain PEFT) comes from its passport, else from its adapter_config.json; `--base` names it if neither does. A
passport names a base that is a folder or a file without its path; the path is in adapter_config.json, and a push
removes it.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from veneer.config import Data, Model, Quantization, Run, RunFolder, UserError, load_run
from veneer.config.files import RESTORE, read_json, read_optional_json
from veneer.config.load import validate
from veneer.config.manifest import read_manifest
from veneer.config.names import AdapterFolder, base_not_here, require_adapter
from veneer.config.task import require_answers
from veneer.data.labelled import LabelledRenderer
from veneer.data.render import Renderer
from veneer.data.rewarded import RewardRenderer
from veneer.data.template import names_file
from veneer.machine.device import find_machine
from veneer.model.attach import load_adapter
from veneer.model.classifier import (
    classifier_positions,
    classifier_settings,
    find_labels,
    has_head,
    read_classifier,
    renderer_of,
)
from veneer.model.fingerprint import stored_quantization, trained_sha256
from veneer.model.load import base_stop_ids, compute_dtype, freeze, load_model, load_tokenizer
from veneer.model.locate import BaseSource, fetched_folder, locate
from veneer.model.new_tokens import add_rows
from veneer.model.passport import Passport, read_passport, require_match, trained_in_4_bits
from veneer.model.shapes import find_config
from veneer.model.start import began_with_error

FETCH_AGAIN = "fetch it again, or restore it"


@dataclass(frozen=True)
class TunedModel:
    """An adapter with its base; nothing of either is loaded yet.

    Attributes:
        name: name that the user wrote.
        adapter: folder of the adapter in PEFT's format.
        passport: passport of the adapter; None: another tool made it.
        model, source: settings of the base, and the source of its files.
        quantization: quantization of the base in training; None: there was none, or it is not known, or its files are
            in 4 bits already.
        dtype: compute dtype of training.
        data: settings by which training rendered its rows; None: they are not known.
        run: run of the adapter; None: it has none.
        folder: folder of the run.
        trained_from: the base, where all of its weights were trained: `adapter` is the whole model then, and `model`
            and `source` name it as well.
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
    trained_from: Model | None = None

    @property
    def is_full(self) -> bool:
        """Whether it is a whole model, and no adapter."""
        return self.trained_from is not None

    @property
    def is_checkpoint(self) -> bool:
        """Whether it is a checkpoint, and not what the run delivers."""
        return self.folder is not None and self.adapter != self.folder.delivered

    @cached_property
    def base_folder(self) -> Path:
        """The folder of the base's files; those of a hub model are fetched.

        Raises:
            UserError: they cannot be fetched.
        """
        return fetched_folder(self.source)

    @property
    def weights_sha256(self) -> str | None:
        """What identifies the trained weights."""
        return trained_sha256(self.adapter)

    @property
    def weights(self) -> Path:
        """The file of the adapter's weights."""
        return self.adapter / "adapter_model.safetensors"

    @property
    def peft_config(self) -> dict[str, Any]:
        """The content of adapter_config.json."""
        return _peft_config(self.adapter)

    @property
    def dtype_name(self) -> str:
        """The compute dtype of training, as settings name it."""
        return _named(self.dtype)

    @cached_property
    def renderer(self) -> Renderer:
        """The tokenizer and the template of training; the base's if the adapter's folder has none.

        Raises:
            UserError: it is a classifier, which answers nothing.
        """
        require_answers(self.model, self.name)
        if not self._brings_tokenizer:
            source = locate(self.trained_from) if self.trained_from is not None else self.source
            return Renderer(load_tokenizer(source, self.data), self.data)
        tokenizer = load_tokenizer(BaseSource("folder", str(self.adapter), str(self.adapter)))
        data = self.data
        if data is not None and names_file(data.chat_template):
            data = data.model_copy(update={"chat_template": "auto"})  # the file's content is part of the tokenizer
        return Renderer(tokenizer, data)

    @cached_property
    def labelled_renderer(self) -> LabelledRenderer | RewardRenderer:
        """The tokenizer and the labels of a classifier; texts are cut off at the tokens that training allowed.

        Raises:
            UserError: it is no classifier, or its labels are not known.
        """
        passport = (self.passport or {}).get("classifier")
        if self.model.task == "causal-lm" or self.data is None:
            raise UserError(f"{self.name}: no classifier of Veneer's", "name a run with model.task that classifies")
        if passport is None and self.run is None and self.model.task != "reward":
            raise UserError(f"{self.name}: its passport names no labels", "fetch it again, or name its run")
        if self.model.task == "reward":
            labels: tuple[str, ...] = RewardRenderer.labels
        elif passport is not None:
            labels = tuple(passport["labels"])
        else:
            assert self.run is not None, "it is a checkpoint of one"
            labels = find_labels(self.run, find_config(self.model))
        place = BaseSource("folder", str(self.adapter), str(self.adapter)) if self._brings_tokenizer else self.source
        if self.model.task == "reward":
            return RewardRenderer(load_tokenizer(place), self.data.model_copy(update={"chat_template": "auto"}))
        positions = classifier_positions(self.model, len(labels))
        longest = min(self.data.max_length, self.data.max_length if positions is None else positions + 1)
        data = self.data.model_copy(update={"overlong": "truncate", "max_length": longest})
        return renderer_of(self.model.task, load_tokenizer(place), data, labels)

    @property
    def base_has_head(self) -> bool:
        """Whether the base had a head of its own, which training began with."""
        return has_head(find_config(self.model), self.model.task)

    def load_classifier(self, device: str | None = None, dtype: torch.dtype | None = None) -> Any:
        """Load a classifier as plain PEFT does: a base with a fresh head, and the adapter with the trained one.

        Args:
            device: device; None: this machine's.
            dtype: compute dtype; None: that of training.

        Raises:
            UserError: the base or the adapter does not load.
        """
        machine = find_machine()
        machine = machine if device is None else replace(machine, device=device)
        model = self.model.model_copy(update={"dtype": _named(dtype or self.dtype)})
        run = Run(model=model, data=self.data or Data(train="-"), quantization=self.quantization)
        renderer = self.labelled_renderer
        config, pad = find_config(self.model), renderer.tokenizer.pad_token_id
        base, _ = read_classifier(
            self.source, classifier_settings(run, config, renderer.labels, pad, machine), model.task
        )
        freeze(base)
        return load_adapter(base, self.adapter)

    @property
    def added_tokens(self) -> tuple[str, ...]:
        """The tokens that training added to those of the base."""
        return (self.data.add_special_tokens if self.data is not None else None) or ()

    @property
    def corrects_rounding(self) -> bool:
        """Whether the adapter began with the error of its base's 4 bits, so that it belongs to no other bits."""
        return began_with_error(AdapterFolder(self.adapter, self.folder))

    @property
    def config(self) -> Any:
        """The configuration of the base, with rows for the tokens that training added."""
        config = find_config(self.model)
        text = config.get_text_config()
        if self.added_tokens:
            text.vocab_size = max(text.vocab_size, len(self.renderer.tokenizer))
        return config

    @property
    def tokenizer_folder(self) -> Path:
        """The folder of the tokenizer to ship."""
        if self._brings_tokenizer:
            return self.adapter
        return self.base_folder if self.trained_from is None else fetched_folder(locate(self.trained_from))

    @property
    def _brings_tokenizer(self) -> bool:
        return (self.adapter / "tokenizer.json").is_file()

    @cached_property
    def stop_ids(self) -> list[int]:
        """The tokens at which an answer ends: those of training, and those of the base's configuration."""
        ids = self.renderer.stop_ids | set((self.passport or {}).get("stop_token_ids", []))
        for file in (self.base_folder / "config.json", self.base_folder / "generation_config.json"):
            ids |= base_stop_ids(read_optional_json(file), str(file))
        return sorted(ids)

    def load(self, dtype: torch.dtype | None = None) -> Any:
        """Load the adapter on its base, on this machine's device, for inference.

        Args:
            dtype: compute dtype, as that of training; None: that of `model.dtype` on this machine.

        Raises:
            UserError: the base or the adapter does not load, or it is a classifier.
        """
        require_answers(self.model, self.name)
        model = self.model if dtype is None else self.model.model_copy(update={"dtype": _named(dtype)})
        base = load_model(self.source, model, self.quantization, find_machine())
        if self.is_full:
            return base
        if self.added_tokens:
            add_rows(base, self.renderer.tokenizer, self.added_tokens)
        return load_adapter(base, self.adapter)

    def load_base(self) -> Any:
        """Load the base of a model that was trained whole, to the host's memory, in the precision of training.

        Raises:
            UserError: it is not here, or is not what the model was trained from.
        """
        assert self.trained_from is not None
        model = self.trained_from.model_copy(update={"dtype": self.dtype_name})
        try:
            source = locate(model)
        except UserError as error:
            raise base_not_here(self.name, error) from None
        require_match(self.adapter, self.passport, source)
        return load_model(source, model, None, replace(find_machine(), device="cpu"))


def find_tuned(name: str, base: str | None = None, force: bool = False, is_merged: bool = False) -> TunedModel:
    """Find an adapter and its base by the folder of a run, of one of its checkpoints, or of an adapter.

    Args:
        name: the folder.
        base: base to use instead of the one that the folder names, or if it names none.
        force: whether to go on if the adapter's passport does not match the base.
        is_merged: whether `base` has the adapter merged in already; its weights are not compared then.

    Raises:
        UserError: there is no adapter, no base, or they do not belong together.
    """
    found = require_adapter(name)
    adapter, folder = found.path, found.run
    if folder is not None and adapter != folder.delivered:
        read_manifest(adapter)
    passport = read_passport(adapter)
    run = load_run(folder.run) if folder is not None else None
    if found.is_full and run is not None:
        if is_merged:
            raise UserError(f"{name}: all weights were trained, so nothing can be taken out", "take the base itself")
        require_match(adapter, passport, None, force)
        trained_from = run.model if base is None else run.model.model_copy(update={"base": base, "revision": None})
        dtype = _dtype(folder, run.model)
        own = Model(base=str(adapter), dtype=_named(dtype), attn_implementation=run.model.attn_implementation)
        parts = (name, adapter, passport, own, locate(own), None, dtype, run.data)
        return TunedModel(*parts, run=run, folder=folder, trained_from=trained_from)
    settings = run or _run_of_passport(adapter, passport)
    model = _base(adapter, run, settings, passport)
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
    quantization = settings.quantization if settings is not None else None
    if stored_quantization(source) is not None:
        quantization = None
    elif quantization is None:  # training's base may have been stored in 4 bits, unlike this one
        quantization = trained_in_4_bits(passport)
    data = settings.data if settings is not None else None
    return TunedModel(
        name, adapter, passport, model, source, quantization, _dtype(folder, model), data, run=run, folder=folder
    )


def _run_of_passport(adapter: Path, passport: Passport | None) -> Run | None:
    """Return the settings in a passport, in which files have no paths; None: there are none."""
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


def _base(adapter: Path, run: Run | None, settings: Run | None, passport: Passport | None) -> Model | None:
    """Return the base that an adapter names: by its run, else by its passport, else by adapter_config.json."""
    if run is not None:
        return run.model
    location = _peft_config(adapter).get("base_model_name_or_path")
    if settings is None:
        return Model(base=str(location)) if location else None
    has_location = ((passport or {}).get("base") or {}).get("kind") in ("folder", "gguf") and location
    return settings.model.model_copy(update={"base": str(location)}) if has_location else settings.model


def _peft_config(adapter: Path) -> dict[str, Any]:
    return read_json(adapter / "adapter_config.json", fix=FETCH_AGAIN)


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dtype(folder: RunFolder | None, model: Model) -> torch.dtype:
    """Return the compute dtype of the run, by its plan if there is one, since `auto` depends on the machine."""
    if folder is not None and folder.plan.is_file():
        stored = read_json(folder.plan, "dtype")["dtype"]
        if not isinstance(found := getattr(torch, str(stored), None), torch.dtype):
            raise UserError(f"{folder.plan}: damaged: dtype = {str(stored)[:40]!r}", RESTORE)
        return found
    return compute_dtype(model, find_machine())
