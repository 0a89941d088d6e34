"""Refuses wrong names, files and options before a command imports anything heavy.

A wrong path is refused so before torch and Transformers are loaded, within a third of a second. The rules are those
of the packages that do the work, and are applied there again; nothing here decides anything else.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from veneer.config import Model, Run, RunFolder, UserError, load_run
from veneer.config.hub import require_reachable
from veneer.config.names import (
    base_not_here,
    find_adapter,
    find_model,
    gguf_file,
    require_adapter,
    require_pair,
    target_kind,
)
from veneer.config.options import require_known
from veneer.config.paths import require_path

SHORTEST_KEY = 8  # characters of an API key


def require_base(model: Model) -> None:
    """Raise UserError where a base does not exist, or is a hub model that is neither cached nor reachable."""
    kind, place = find_model(model)
    if kind == "hub":
        from huggingface_hub import try_to_load_from_cache

        if not isinstance(try_to_load_from_cache(place, "config.json", revision=model.revision), str):
            require_reachable(f"model.base = {place}")


def require_answering(name: str, base: str | None = None) -> None:
    """Raise UserError where a name is neither a base model nor an adapter whose base can be found."""
    if find_adapter(name) is not None:
        require_tuned(name, base)
        return
    try:
        find_model(Model(base=name))
    except UserError as error:
        if Path(name).expanduser().exists():
            raise
        raise UserError(
            str(error).splitlines()[0].replace("model.base = ", ""),
            "name a run, a checkpoint, an adapter's folder, or a base model as model.base takes it",
        ) from None
    require_base(Model(base=name))


def require_served(model: str, base: str | None = None) -> None:
    """Raise UserError where a model to serve, with its name in requests or without, does not exist."""
    name, equals, place = model.partition("=")
    place = place if equals and name and "/" not in name else model
    if gguf_file(place) is None:
        require_answering(place, base)


def require_merged(name: str, adapter: str) -> None:
    """Raise UserError where there is no such folder, or no adapter of that name; its base may be gone."""
    require_adapter(adapter)
    if not Path(name).expanduser().is_dir():
        raise UserError(f"{name}: no such folder", "name the folder that `veneer merge` wrote")


def require_tuned(name: str, base: str | None = None) -> None:
    """Raise UserError where there is no adapter of that name, or its base cannot be found."""
    found = require_adapter(name)
    if base is not None:
        require_base(Model(base=base))
    elif found.run is not None:
        try:
            require_base(load_run(found.run.run).model)
        except UserError as error:
            raise base_not_here(name, error) from None


def require_evaluation(name: str, against: str | None, data: str | None, base: str | None = None) -> None:
    """Raise UserError where a target is nothing that can be evaluated, has nothing to be compared with, or no rows."""
    targets = [(name, require_pair(name, against), base)]
    if against is not None:
        targets.append((against, target_kind(against), None))
    for target, kind, on in targets:
        if kind == "adapter":
            require_tuned(target, on)
        elif kind == "base":
            require_base(Model(base=target))
    if data is not None:
        from veneer.data.sources.find import find_sources

        find_sources(data, "--data")


def require_suites(names: str | None) -> None:
    """Raise UserError where one of the suites that are named does not exist."""
    from veneer.evaluation.suites import find_suites

    if names is not None:
        find_suites(names)


def require_tasks(names: str | None, options: Sequence[str]) -> None:
    """Raise UserError where lm-eval is not installed, a folder of tasks does not exist, or an option is not known."""
    from veneer.evaluation.tasks.options import read_options, task_names

    if names is not None:
        task_names(names)
    elif options:
        raise UserError(f"--task-option {options[0]}: acts on tasks alone", "name them with --tasks, or leave it out")
    read_options(options)


def require_output(folder: RunFolder, resume: bool | str, overwrite: bool, extend: bool, fork: bool) -> None:
    """Raise UserError where a run's folder is not free, or holds nothing to resume or to replace.

    Args:
        resume: Value of `--resume`; "auto" accepts either, a name of a checkpoint a run.
        overwrite, extend, fork: Whether these options are given.
    """
    goes_on = "--extend" if extend else "--resume"
    if (resume or extend) and overwrite:
        raise UserError(f"{goes_on} continues a run and --overwrite replaces it", "leave one of them out")
    if fork and (extend or resume not in (False, "auto")):
        raise UserError(f"{goes_on} continues a run and --fork begins one", "leave one of them out")
    require_path(str(folder.path), "train.output_dir")
    if extend or resume not in (False, "auto") or (resume == "auto" and folder.run.exists()):
        folder.require_begun()
    elif overwrite:
        folder.require_replaceable()
    else:
        folder.require_free()


def require_inputs(run: Run) -> None:
    """Raise UserError where base, data, metrics or trackers do not exist, or are on a hub that cannot be reached."""
    from veneer.data.sources.find import find_sources
    from veneer.data.sources.hub import require_at_hand
    from veneer.evaluation.metrics import require_metrics
    from veneer.training.trackers import require_trackers

    require_trackers(run.train.report_to)
    require_metrics(run.evaluate)
    require_base(run.model)
    data = run.data
    require_at_hand(find_sources(data.train, "data.train", data.split, data.subset), "data.train")
    if isinstance(data.validation, str | tuple):
        held_out = find_sources(data.validation, "data.validation", data.split, data.subset)
        require_at_hand(held_out, "data.validation")


def require_gpus(gpus: int) -> None:
    """Raise UserError where this machine has GPUs, and fewer than so many."""
    if gpus > 1:
        import torch

        if (there := torch.cuda.device_count()) and gpus > there:
            raise UserError(f"--gpus {gpus}: this machine has {there}", f"use --gpus {there}, or less")


def require_gate(gate: str | None) -> None:
    """Raise UserError where the condition of --gate cannot be parsed."""
    if gate is not None:
        from veneer.evaluation.gate import parse_gate

        parse_gate(gate)


def require_new_folder(out: Path) -> None:
    """Raise UserError where a folder cannot be made under that name."""
    from veneer.release.output import require_free

    require_free(out)


def output_file(option: str, path: Path, beginning: str) -> Path:
    """Return the path at which a file is to be written, with ~ resolved.

    Args:
        option: Option that names it.
        path: Path as it was given.
        beginning: First bytes of such files; only one of them is replaced, so that no input is overwritten.

    Raises:
        UserError: Its folder does not exist, or something else is there.
    """
    path = path.expanduser()
    if not path.absolute().parent.is_dir():
        raise UserError(f"{option} {path}: the folder does not exist", "name a file in a folder that exists")
    if path.exists():
        if not path.is_file():
            raise UserError(f"{option} {path}: exists and is not a file", "name another file")
        with path.open("rb") as file:
            if not file.read(len(beginning)).lower() == beginning.lower().encode():
                raise UserError(f"{option} {path}: exists and was not written by this command", "name another file")
    return path


def require_options(given: Mapping[str, str]) -> None:
    """Raise UserError for a value that is not among those its option takes (`{"--dtype": "int4"}`)."""
    for option, value in given.items():
        require_known(option, value)


def require_artifact(name: str) -> None:
    """Raise UserError where the artifact to be certified is neither an address nor an existing path."""
    path = Path(name).expanduser()
    if name.startswith(("http://", "https://")) or path.exists():
        return
    raise UserError(
        f"{name}: neither a model's folder, nor a GGUF file, nor an address (http://...)",
        "name what `veneer merge` or `veneer export` wrote, or a server",
    )


def require_folder(name: str) -> None:
    """Raise UserError where there is no folder of that name."""
    if not Path(name).expanduser().is_dir():
        raise UserError(f"{name}: no such folder", "name a finished run, an adapter, or a merged model")


def api_key(given: str | None, file: Path | None) -> str | None:
    """Return the key that requests to a server need, from an option or a file; None: none is set.

    Raises:
        UserError: Both are named, the file cannot be read, or the key is too short or holds what no key does.
    """
    if file is not None:
        if given is not None:
            raise UserError("--api-key-file and --api-key (or VENEER_API_KEY) both name a key", "leave one out")
        from veneer.config.files import read_text

        given = read_text(file.expanduser(), 4096, "name a file that holds the key").strip()
    if given is None:
        return None
    if len(given) < SHORTEST_KEY or not all("!" <= sign <= "~" for sign in given):
        raise UserError(
            f"the key: should be {SHORTEST_KEY} or more visible ASCII characters",
            "make one: python3 -c 'import secrets; print(secrets.token_urlsafe(32))'",
        )
    return given
