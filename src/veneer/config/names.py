"""Finds what a name on the command line stands for: a base model, a run, one of its checkpoints, or an adapter.

Only names and folders are looked at, and nothing heavy is imported; an adapter's hub id alone is looked up and fetched.
A wrong name is refused here before any library is loaded, and the same functions resolve it for the work itself.
"""

import difflib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from veneer.config.address import server_root
from veneer.config.errors import UserError
from veneer.config.hub import adapter_folder
from veneer.config.paths import require_path
from veneer.config.run import Model, Run
from veneer.config.run_folder import RunFolder

BUILTIN_NAMES = ("smollm2-135m-instruct", "all-minilm-l6-v2")
_PICKLED = re.compile(r"(pytorch_|adapter_)?(model|consolidated)[\w.-]*\.(bin|pt|pth)")
_HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+$")


@dataclass(frozen=True)
class AdapterFolder:
    """An adapter on disk.

    Attributes:
        path: folder in PEFT's format.
        run: folder of the run it belongs to; None: it stands alone, and knows what it needs by its passport.
    """

    path: Path
    run: RunFolder | None

    @property
    def is_full(self) -> bool:
        """Whether it is a whole model instead, of a run that trains all weights."""
        return self.run is not None and (self.path / "config.json").is_file()


def find_adapter(name: str) -> AdapterFolder | None:
    """The adapter that a name stands for; None: nothing of that name holds a run or an adapter.

    Args:
        name: folder of a run, of one of its checkpoints, or of an adapter; or a hub id, where there is no folder of its
            owner's name, so that a mistyped `runs/nmae` asks nobody.

    Raises:
        UserError: The run has no adapter yet.
    """
    require_path(name, "name")
    path = Path(name).expanduser()
    run = RunFolder(path)
    if run.run.is_file():
        if not run.delivered.is_dir():
            raise UserError(f"{name}: the run has no adapter yet", _finish(run))
        return AdapterFolder(run.delivered, run)
    if _HUB_ID.match(name) and not path.parent.exists():
        fetched = adapter_folder(name)
        return AdapterFolder(fetched, None) if fetched is not None else None
    whole = path.absolute()
    owner = RunFolder(whole.parent.parent)
    is_checkpoint = whole.parent == owner.checkpoints and owner.run.is_file()
    if not (path / "adapter_config.json").is_file() and not (is_checkpoint and (path / "config.json").is_file()):
        return None
    return AdapterFolder(path, owner if is_checkpoint else None)


def require_adapter(name: str) -> AdapterFolder:
    """The adapter that a name stands for, with the files of PEFT's format.

    Raises:
        UserError: There is none, or its run has not come to one yet.
    """
    found = find_adapter(name) or AdapterFolder(Path(name).expanduser(), None)
    if not found.path.is_dir():
        raise UserError(f"{name}: no such folder", "name the folder of a run or of an adapter, or an adapter's hub id")
    for file in () if found.is_full else ("adapter_config.json", "adapter_model.safetensors"):
        if not (found.path / file).is_file():
            held = ", ".join(sorted(path.name for path in found.path.iterdir())[:6]) or "nothing"
            raise UserError(
                f"{name}: holds no adapter: {found.path / file} is missing (it holds {held})",
                "name the folder of a finished run, or of an adapter in PEFT's format",
            )
    return found


def require_run(name: str) -> RunFolder:
    """The folder of a run that has begun.

    Raises:
        UserError: There is none of that name.
    """
    require_path(name, "name")
    folder = RunFolder(Path(name).expanduser())
    if not folder.run.is_file():
        raise UserError(f"{name}: holds no run (no run.yaml)", "name the folder that `veneer train` wrote")
    return folder


def target_kind(name: str) -> str:
    """Find what kind of model a name stands for: endpoint (an address), adapter (of a run too), gguf or base.

    Raises:
        UserError: It stands for nothing, or the address holds a password.
    """
    if name.startswith(("http://", "https://")):
        server_root(name)
        return "endpoint"
    if find_adapter(name) is not None:
        return "adapter"
    if gguf_file(name) is not None:
        return "gguf"
    try:
        find_model(Model(base=name))
    except UserError as error:
        path = Path(name).expanduser()
        if path.exists():
            what = str(error).partition("\n")[0].removeprefix("model.base = ")
        else:
            near = _nearest_run(path)
            what = f"{name}: no run, adapter, model, .gguf file or address"
            what += "" if near is None else f"; the nearest run is {near}"
        raise UserError(
            what,
            "name a run, a checkpoint, an adapter's folder, a base model as model.base takes it, a merged folder, a "
            ".gguf file, or an address (http://...)",
        ) from None
    return "base"


def require_pair(name: str, against: str | None) -> str:
    """Return the kind of a target that is evaluated; the base of an adapter is what it is compared with by itself.

    Raises:
        UserError: It stands for nothing, or has nothing to be compared with.
    """
    kind = target_kind(name)
    if against is None and kind != "adapter":
        raise UserError(f"{name}: it is no adapter, so it has no base to be compared with", "name one with --against")
    return kind


def gguf_file(name: str) -> Path | None:
    """Return the GGUF file that a name stands for: the file, or a folder that holds one and no model's folder.

    Raises:
        UserError: The folder holds several, or there is no such file.
    """
    path = Path(name).expanduser()
    if path.is_dir() and not (path / "config.json").is_file():
        files = sorted(path.glob("*.gguf"))
        if len(files) > 1:
            raise UserError(f"{name}: holds {len(files)} GGUF files", f"name one of them, for example {files[0]}")
        return files[0] if files else None
    return path if path.suffix.lower() == ".gguf" and path.is_file() else None


def _nearest_run(path: Path) -> Path | None:
    """Return the run beside it, or below it in the folder `runs`, whose name is most like its own."""
    folders = [folder for folder in (path.parent, Path("runs")) if folder.is_dir()]
    runs = {found.parent.name: found.parent for folder in folders for found in folder.glob("*/run.yaml")}
    near = difflib.get_close_matches(path.name, runs, n=1)
    return runs[near[0]] if near else None


def find_model(model: Model) -> tuple[str, str]:
    """Find what `model.base` names, with nothing fetched or converted: its kind, and its name, path or hub id.

    Raises:
        UserError: Nothing of that name exists, or the folder holds no model.
    """
    kind, place = _find(model.base)
    if model.revision and kind != "hub":
        raise UserError(
            f"model.revision = {model.revision}: only a hub model has revisions, {model.base} is a {kind} model",
            "leave model.revision out",
        )
    return kind, place


def anchored(run: Run) -> Run:
    """A run with its base, its adapter, its rows and its template by absolute paths, where they are files or folders of
    this machine, so that it means the same from any folder."""
    model, data = run.model, run.data
    if _find_or_none(model.base) in ("folder", "gguf"):
        model = model.model_copy(update={"base": _absolute(model.base)})
    if model.adapter is not None and Path(model.adapter).expanduser().exists():
        model = model.model_copy(update={"adapter": _absolute(model.adapter)})
    changed: dict[str, Any] = {"train": _absolute_rows(data.train)}
    if isinstance(data.validation, str | tuple):
        changed["validation"] = _absolute_rows(data.validation)
    if Path(data.chat_template).expanduser().is_file():
        changed["chat_template"] = _absolute(data.chat_template)
    return run.model_copy(update={"model": model, "data": data.model_copy(update=changed)})


def _find_or_none(base: str) -> str | None:
    try:
        return _find(base)[0]
    except UserError:
        return None


def _absolute_rows(named: str | tuple[str, ...]) -> str | tuple[str, ...]:
    if not isinstance(named, str):
        return tuple(str(_absolute_rows(name)) for name in named)
    is_glob = any(sign in named for sign in "*?[")
    return _absolute(named) if is_glob or Path(named).expanduser().exists() else named


def _absolute(name: str) -> str:
    return str(Path(name).expanduser().absolute())


def base_not_here(name: str, error: UserError) -> UserError:
    """The error where the base that an adapter names is not on this machine."""
    return UserError(f"{name}: its base is not here: {str(error).splitlines()[0]}", "name the base with --base")


def _find(base: str) -> tuple[str, str]:
    require_path(base, "model.base")
    path = Path(base).expanduser()
    if base.lower() in BUILTIN_NAMES:
        return "builtin", base.lower()
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise UserError(
                f"model.base = {base}: a file, but not a .gguf file",
                "name a folder, a .gguf file or a hub id",
            )
        return "gguf", str(path)
    if path.is_dir():
        _require_model(path, base)
        return "folder", str(path)
    looks_like_path = base.startswith((".", "/", "~")) or base.lower().endswith(".gguf") or base.count("/") > 1
    if looks_like_path or not _HUB_ID.match(base):
        raise UserError(
            f"model.base = {base}: no such folder or file{'' if path.is_absolute() else f' in {Path.cwd()}'}, and not "
            "a hub id of the form owner/name",
            f"name an existing folder, a .gguf file, a hub id, or the built-in {', '.join(BUILTIN_NAMES)}",
        )
    return "hub", base


def _require_model(path: Path, base: str) -> None:
    if (path / "config.json").is_file():
        _refuse_pickles(path, base)
        return
    if (path / "adapter_config.json").is_file():
        raise UserError(f"model.base = {base}: holds an adapter, not a base model", "name the model it was trained on")
    held = sorted(entry.name for entry in path.iterdir())
    listing = ", ".join(held[:6]) + (", ..." if len(held) > 6 else "") if held else "nothing"
    raise UserError(
        f"model.base = {base}: the folder has no config.json (it holds {listing})",
        "name the folder that save_pretrained wrote",
    )


def _refuse_pickles(path: Path, base: str) -> None:
    """Raises UserError for a folder whose weights are pickles alone: to read one is to run what its maker wrote."""
    held = {entry.name for entry in path.iterdir()}
    for pickled in sorted(filter(_PICKLED.fullmatch, held)):
        wanted = "adapter_model.safetensors" if pickled.startswith("adapter") else "model.safetensors"
        if not held & {wanted, f"{wanted}.index.json"}:
            raise UserError(
                f"model.base = {base}: holds no {wanted}, but {pickled}, which is a pickle: those are never read",
                "fetch it as safetensors; or, if you trust its maker, convert it: load it with Transformers "
                "(AutoModelForCausalLM.from_pretrained) and call save_pretrained with another folder",
            )


def _finish(run: RunFolder) -> str:
    """Advice on a run without an adapter."""
    checkpoints = sorted(run.checkpoints.glob("step-*"))
    fix = "finish it with `veneer train ... --resume`"
    return f"{fix}, or name a checkpoint: {checkpoints[-1]}" if checkpoints else fix
