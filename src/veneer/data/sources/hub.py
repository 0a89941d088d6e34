"""Opens hub datasets and the Arrow folders that `save_to_disk` wrote, with the `datasets` library kept quiet."""

import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veneer.config import UserError
from veneer.config.hub import unreachable

if TYPE_CHECKING:
    from veneer.data.sources.find import DataSource


def open_dataset(source: "DataSource", setting: str) -> Any:
    """The `datasets.Dataset` of an Arrow folder or hub dataset, memory-mapped.

    Raises:
        UserError: The folder is damaged; the hub cannot be reached or does not know dataset, subset or split.
    """
    offline = unreachable() if source.kind == "hub dataset" else None
    with quiet_datasets(), from_cache_alone(offline is not None):
        import datasets

        try:
            if source.kind == "arrow folder":
                return datasets.load_from_disk(source.location)
            return datasets.load_dataset(source.location, source.subset, split=source.split)
        except (OSError, ValueError, LookupError, TypeError, RuntimeError, datasets.exceptions.DatasetsError) as error:
            why, what = str(error).strip().split("\n")[0][:300], f"{setting} = {source.location}"
            if source.kind == "arrow folder":
                raise UserError(
                    f"{what}: damaged Arrow folder ({why})", f"save it again, or name other data in {setting}"
                ) from error
            found = "cannot be reached" if offline or isinstance(error, ConnectionError) else "does not give it"
            raise _not_given(source, setting, f"{found} ({offline or why})") from error


def require_at_hand(sources: Sequence["DataSource"], setting: str) -> None:
    """Raises UserError for a hub dataset of which nothing is in the cache, where the hub cannot be reached."""
    for source in sources:
        if source.kind != "hub dataset" or (offline := unreachable()) is None:
            continue
        from huggingface_hub import constants

        cache = Path(os.environ.get("HF_DATASETS_CACHE") or Path(constants.HF_HOME) / "datasets")
        owner = source.location.split("/")[0].lower()
        if not cache.is_dir() or not any(path.name.lower().startswith(owner) for path in cache.iterdir()):
            raise _not_given(source, setting, f"cannot be reached ({offline})")


def _not_given(source: "DataSource", setting: str, why: str) -> UserError:
    asked = f"split {source.split}" + (f" of subset {source.subset}" if source.subset else "")
    return UserError(
        f"{setting} = {source.location}: no such file in {Path.cwd()}, and of the hub dataset of that name the {asked} "
        f"was asked for: the hub {why}",
        f"correct the name, subset or split, or download the dataset and name its files in {setting}",
    )


@contextmanager
def from_cache_alone(wanted: bool) -> Iterator[None]:
    """Within the block, if it is wanted, `datasets` asks no hub; there is no argument that would say so."""
    if not wanted:
        yield
        return
    import datasets
    from huggingface_hub import constants

    before = datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE = before


@contextmanager
def quiet_datasets() -> Iterator[None]:
    """Within the block, no progress bars and no notices of retries; the switches are global, so they are put back."""
    import datasets
    import huggingface_hub

    loggers = [logging.getLogger(name) for name in ("datasets", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    lit = [utils for utils in (datasets.utils, huggingface_hub.utils) if not utils.are_progress_bars_disabled()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for utils in lit:
            utils.disable_progress_bars()
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels):
                logger.setLevel(level)
            for utils in lit:
                utils.enable_progress_bars()
