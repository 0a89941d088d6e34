"""Requires of a resumed run the settings that it began with, but for those that change no number of its training."""

from collections.abc import Iterable
from typing import Any

from veneer.config import Run, RunFolder, UserError, load_run
from veneer.config.names import anchored

# Settings that may differ when a run is resumed: none of them changes a number of a training that goes well.
MAY_CHANGE = {
    "model.base",  # its weights and its configuration are compared
    "model.revision",
    "data.workers",
    "quantization.cache",
    "train.output_dir",
    "train.gradient_checkpointing",
    "train.memory_budget",
    "train.shard",
    "train.engine",  # another one is told
    "train.logging_steps",
    "train.on_divergence",  # it decides what follows on a step from which there was no way on
    "train.report_to",
    "train.eval_steps",
    "train.save_steps",
    "train.save_total_limit",
}


# Settings by which a run is extended.
LENGTH = {"train.num_train_epochs", "train.max_steps"}
# Settings that a fork may have otherwise as well: the state of a checkpoint means the same with any of them.
FORK_MAY_CHANGE = LENGTH | {
    "train.learning_rate",
    "train.lr_scheduler_type",
    "train.warmup_ratio",
    "train.weight_decay",
    "train.max_grad_norm",
    "train.early_stopping",
    "train.keep",
}


def require_same_settings(folder: RunFolder, run: Run, extend: bool = False) -> None:
    """Raise UserError for settings that must be those the run began with and are not.

    Args:
        folder: The run's folder.
        run: The settings.
        extend: Whether the run may have become longer.
    """
    changes = differences(anchored(load_run(folder.run)), anchored(run))
    refused = [change for name, change in changes.items() if not (extend and name in LENGTH)]
    if refused:
        longer = set(changes) <= LENGTH
        raise UserError(
            f"train.output_dir = {folder.path}: the run began with other settings\n  " + "\n  ".join(refused),
            "--extend makes the run longer"
            if longer
            else "resume with the settings it began with, or start a new run in another train.output_dir",
        )


def require_forkable(source: RunFolder, run: Run) -> list[str]:
    """Return what a fork has otherwise than its source, as `section.key: was A, is B`.

    Raises:
        UserError: Settings differ that the state of a checkpoint depends on.
    """
    changes = differences(anchored(load_run(source.run)), anchored(run))
    changes = {name: change for name, change in changes.items() if not name.startswith("evaluate.")}
    if refused := [change for name, change in changes.items() if name not in FORK_MAY_CHANGE]:
        raise UserError(
            f"--fork {source.path}: a fork goes on from that run's state, which these settings do not fit\n  "
            + "\n  ".join(refused),
            f"leave them as they were, or start from its adapter alone: model.adapter={source.path}",
        )
    return list(changes.values())


def differences(then: Run, now: Run) -> dict[str, str]:
    """Return settings that differ and must not, by name, as `section.key: was A, is B`."""
    before, after = _settings(then), _settings(now)
    names = sorted(name for name in before | after if before.get(name) != after.get(name))
    return {name: f"{name}: was {before.get(name)}, is {after.get(name)}" for name in names if name not in MAY_CHANGE}


def _settings(run: Run) -> dict[str, Any]:
    """Return all settings that decide the numbers of a training, by name; how a step is divided does not."""
    watched = run.train.early_stopping is not None and run.train.early_stopping.metric in run.evaluate.during
    left_out = {"evaluate": {"rows", "batch_size"} if watched else True}  # what is watched has to stay comparable
    sections = run.model_dump(mode="json", exclude=left_out)
    settings = {
        f"{name}.{key}".rstrip("."): value for name, section in sections.items() for key, value in _items(section)
    }
    size = settings.pop("train.per_device_train_batch_size") * settings.pop("train.gradient_accumulation_steps")
    return settings | {"train.per_device_train_batch_size x gradient_accumulation_steps": size}


def _items(section: Any) -> Iterable[tuple[str, Any]]:
    """Return the settings of a section; of one that is replaced by a word, that word."""
    return section.items() if isinstance(section, dict) else () if section is None else (("", section),)
