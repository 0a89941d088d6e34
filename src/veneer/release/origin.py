"""What a release is made from: an adapter and the base it belongs to.

A run's folder, or one of its checkpoints, knows its base from run.yaml. A folder that holds an adapter alone (from a
hub, or from plain PEFT) knows it from its passport, else from its adapter_config.json, and `--base` names it where
neither does. A passport names a base that is a folder or a file without its path; the path stands in
adapter_config.json, which a push takes out of it.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from veneer.config import Data, Model, Quantization, Run, RunFolder, UserError, load_run
from veneer.config.files import RESTORE, read_json
from veneer.config.hub import not_here, unreachable
from veneer.config.load import validate
from veneer.config.names import base_not_here, find_adapter
from veneer.config.names import require_adapter as require_adapter
from veneer.data import Renderer
from veneer.data.template import NAMED_TEMPLATES
from veneer.machine import find_machine
from veneer.model import BaseSource, compute_dtype, load_tokenizer, local_folder, locate, stored_quantization
from veneer.release.passport import read_passport, require_match, trained_in_4_bits
from veneer.release.weights import FETCH_AGAIN
from veneer.training import checkpoint


@dataclass(frozen=True)
class Origin:
    """An adapter with its base.

    Attributes:
        name: What the user wrote.
        adapter: Folder of the adapter in PEFT's format.
        run: Its run, where it has one.
        model, source: The base.
        quantization: What the base was quantized to in training; None: not at all, or it is not known, or its files are
            in 4 bits already.
        dtype: What training computed in.
        data: How training rendered its rows; None: it is not known.
        folder: Of the run.
    """

    name: str
    adapter: Path
    run: Run | None
    model: Model
    source: BaseSource
    quantization: Quantization | None
    dtype: torch.dtype
    data: Data | None = None
    folder: RunFolder | None = None

    @property
    def is_checkpoint(self) -> bool:
        """Whether it is a state on the run's way, and not what the run came to."""
        return self.folder is not None and self.adapter != self.folder.adapter

    @property
    def base_folder(self) -> Path:
        """The base's files; those of a hub model are fetched.

        Raises:
            UserError: They cannot be fetched.
        """
        return fetched(self.source)

    @property
    def peft_config(self) -> dict[str, Any]:
        """adapter_config.json."""
        return read_json(self.adapter / "adapter_config.json", fix=FETCH_AGAIN)

    def renderer(self) -> Renderer:
        """The tokenizer and the template as they were in training; the base's where the adapter brings none."""
        if self._brings_tokenizer:
            return renderer_of(self.adapter, self.data)
        return Renderer(load_tokenizer(self.source), self.data)

    @property
    def tokenizer_folder(self) -> Path:
        """The folder whose tokenizer ships."""
        return self.adapter if self._brings_tokenizer else self.base_folder

    @property
    def _brings_tokenizer(self) -> bool:
        return (self.adapter / "tokenizer.json").is_file()


def find_origin(name: str, base: str | None = None, force: bool = False, is_merged: bool = False) -> Origin:
    """An adapter and its base by the folder of a run, of one of its checkpoints, or of an adapter.

    Args:
        name: The folder.
        base: Another base than the one it names, or the one that it does not name.
        force: Go on where the adapter's passport says that it does not belong to the base.
        is_merged: `base` is the base with the adapter in it already; its weights are not compared.

    Raises:
        UserError: There is no adapter, no base, or they do not belong together.
    """
    found = find_adapter(name)
    adapter = found.path if found is not None else Path(name).expanduser()
    require_adapter(adapter, name)
    folder = found.run if found is not None else None
    if folder is not None and adapter != folder.adapter:
        checkpoint.verified(adapter)
    run = load_run(folder.run) if folder is not None else None
    model, quantization = _base(adapter, run)
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
    require_match(adapter, None if is_merged else source, force)
    if stored_quantization(source) is not None:
        quantization = None
    elif quantization is None:  # the base of the training may have been stored in 4 bits, which this one is not
        quantization = trained_in_4_bits(adapter)
    dtype, data = _dtype(folder, model), _data(adapter, run)
    return Origin(name, adapter, run, model, source, quantization, dtype, data, folder)


def renderer_of(folder: Path, data: Data | None) -> Renderer:
    """The renderer of a folder that holds a tokenizer and a template, with the settings of the training."""
    tokenizer = load_tokenizer(BaseSource("folder", str(folder), str(folder)))
    if data is None:
        return Renderer(tokenizer)
    named = data.chat_template in (*NAMED_TEMPLATES, "none")
    return Renderer(tokenizer, data if named else data.model_copy(update={"chat_template": "auto"}))


def fetched(source: BaseSource) -> Path:
    """The folder with all of a base's files."""
    if source.kind != "hub":
        return Path(source.location)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    wanted = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model", "LICENSE*", "NOTICE*"]
    try:
        given: dict[str, Any] = {"revision": source.revision, "local_files_only": source.only_local}
        return Path(snapshot_download(source.location, allow_patterns=wanted, **given))
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        kept = local_folder(source)
        if kept is not None:
            return kept
        if (why := unreachable()) is not None:
            raise not_here(f"model.base = {source.name}", why) from None
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"model.base = {source.name}: cannot be had from the hub: {reason}",
            "check the network and your access (hf auth login), or name a folder with --base",
        ) from None


def _base(adapter: Path, run: Run | None) -> tuple[Model | None, Quantization | None]:
    if run is not None:
        return run.model, run.quantization
    passport = read_passport(adapter)
    if passport is not None and isinstance(passport.get("settings"), dict):
        try:
            kept = validate(passport["settings"], {}, "passport.json")
        except UserError as error:
            raise UserError(
                f"{adapter}: the settings in passport.json are not this Veneer's ({' '.join(str(error).split())})",
                "update Veneer, or delete passport.json to go on without its checks",
            ) from None
        model = kept.model
        if (passport.get("base") or {}).get("kind") in ("folder", "gguf") and (place := _named_base(adapter)):
            model = model.model_copy(update={"base": place})
        return model, kept.quantization
    named = _named_base(adapter)
    return (Model(base=named) if named else None), None


def _named_base(adapter: Path) -> str | None:
    """The base that adapter_config.json names."""
    named = read_json(adapter / "adapter_config.json", fix=FETCH_AGAIN).get("base_model_name_or_path")
    return str(named) if named else None


def _data(adapter: Path, run: Run | None) -> Data | None:
    """How training rendered its rows: by its run, or by what the passport keeps of it."""
    if run is not None:
        return run.data
    settings = (read_passport(adapter) or {}).get("settings")
    return validate(settings, {}, "passport.json").data if isinstance(settings, dict) else None


def _dtype(folder: RunFolder | None, model: Model) -> torch.dtype:
    """What the run computed in; `auto` means other things on other machines, so its plan is asked first."""
    if folder is not None and folder.plan.is_file():
        kept = read_json(folder.plan, "dtype")["dtype"]
        if not isinstance(found := getattr(torch, str(kept), None), torch.dtype):
            raise UserError(f"{folder.plan}: damaged: dtype = {str(kept)[:40]!r}", RESTORE)
        return found
    return compute_dtype(model, find_machine())
