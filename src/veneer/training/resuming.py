"""Where a run goes on: from its last whole checkpoint, a named one, or a checkpoint of another run (a fork).

A run is one line of steps. To go on from an earlier checkpoint drops the records and checkpoints after it; a fork
leaves them, in the run that it came from. A run that has delivered and trains on (`--extend`, or from an earlier
checkpoint) keeps what it delivered until the new one takes its place: `reopened.json` says so meanwhile. What a run
came from, and how it grew, is in its `lineage.json`.
"""

import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from veneer.config import Run, RunFolder, Train, UserError, load_run
from veneer.config.files import read_json
from veneer.config.folder import remove, whole_folder, write_json
from veneer.config.manifest import ADAPTER, read_manifest
from veneer.config.notify import notify
from veneer.machine.device import Machine, resolve_optim
from veneer.model.load import compute_dtype
from veneer.training import checkpoint
from veneer.training.finished import with_found, with_train
from veneer.training.same_settings import require_forkable, require_same_settings
from veneer.training.schedule import learning_rate

NOT_TO_THE_BIT = (
    "the rows of each step and the state are the same; sums are added in another order, so the adapter agrees up to "
    "rounding with that of an undisturbed run, and not bit for bit"
)


@dataclass(frozen=True)
class Fork:
    """A run that begins with the state of another one.

    Attributes:
        source: Folder of that run.
        checkpoint: The checkpoint, which is whole.
        changed: Settings that differ, as `section.key: was A, is B`.
    """

    source: RunFolder
    checkpoint: Path
    changed: tuple[str, ...] = ()

    def lineage(self) -> dict[str, Any]:
        """Return what lineage.json keeps of it."""
        listed = read_manifest(self.checkpoint)["sha256"]
        return {
            "run": str(self.source.path.absolute()),
            "step": checkpoint.step_of(self.checkpoint),
            "adapter_sha256": listed.get(ADAPTER),
            "changed": list(self.changed),
        }


def find_fork(name: Path, folder: RunFolder) -> Fork:
    """Find the checkpoint that a fork begins with: the one named, or the last whole one of the run named.

    Args:
        name: Checkpoint, or run.
        folder: Folder of the fork.

    Raises:
        UserError: There is none, or it is damaged.
    """
    path = name.expanduser()
    is_checkpoint = re.fullmatch(r"step-\d+", path.name) is not None
    source = RunFolder(path.parent.parent if is_checkpoint else path)
    if not source.run.exists():
        raise UserError(
            f"--fork {name}: neither a run nor a checkpoint of one", "name runs/NAME or runs/NAME/checkpoints/step-N"
        )
    if source.path.resolve() == folder.path.resolve():
        raise UserError(
            f"train.output_dir = {folder.path}: that is the run that --fork names",
            "name a folder of its own for the fork: -o FOLDER",
        )
    found = named_checkpoint(source, path.name) if is_checkpoint else checkpoint.latest_whole(source.checkpoints)
    if found is None:
        raise UserError(f"--fork {name}: the run has no checkpoint", "name a run that has one")
    return Fork(source, found)


def fork_of(run: Run, fork: Fork) -> tuple[Run, Fork]:
    """Return a run as a fork, with what was found for its source where it asks for that to be found, and what differs.

    Raises:
        UserError: The state of the source does not fit its settings.
    """
    run = with_found(run, fork.source)
    return run, Fork(fork.source, fork.checkpoint, tuple(require_forkable(fork.source, run)))


def copy_checkpoint(fork: Fork, folder: RunFolder) -> Path:
    """Copy the checkpoint of a fork into its own folder, with what is known of its source."""
    remove(folder.checkpoints)  # of a process that ended before the fork had begun
    write_json(folder.lineage, {"forked_from": fork.lineage(), "extended": []})
    own = checkpoint.path_of(folder.checkpoints, checkpoint.step_of(fork.checkpoint))
    with whole_folder(own) as unfinished:
        shutil.copytree(fork.checkpoint, unfinished, dirs_exist_ok=True)
    read_manifest(own)
    return own


def named_checkpoint(folder: RunFolder, name: str) -> Path:
    """Return a checkpoint of a run by its name or path, or the number of its step; it is whole.

    Raises:
        UserError: There is no such checkpoint, or it is damaged.
    """
    last = Path(name).name
    step = re.fullmatch(r"(?:step-)?(\d+)", last)
    path = None if step is None else checkpoint.path_of(folder.checkpoints, int(step[1]))
    is_elsewhere = path is not None and last != name and Path(name).expanduser().resolve() != path.resolve()
    if path is None or not path.is_dir() or is_elsewhere:
        there = [found.name for found in checkpoint.all_in(folder.checkpoints)]
        raise UserError(
            f"--resume {name}: no checkpoint of {folder.path}",
            f"name one of {', '.join(there)}" if there else "it has none: start it without --resume",
        )
    read_manifest(path)
    return path


def require_resumable(run: Run, folder: RunFolder, extend: bool) -> Run:
    """Return the run with what was found for it when it began, where it asks for that to be found.

    Raises:
        UserError: There is no run, or it began with other settings.
    """
    folder.require_begun()
    if run.data.template_date is None:
        run = dated(run, load_run(folder.run).data.template_date)
    run = with_found(run, folder)
    require_same_settings(folder, run, extend)
    return run


def dated(run: Run, day: Any) -> Run:
    """Return the run with its template's date fixed, on whatever day the run is resumed."""
    return run.model_copy(update={"data": run.data.model_copy(update={"template_date": day})})


def as_begun(run: Run, began: RunFolder, machine: Machine) -> Run:
    """Return the run with the precision and the optimizer that `auto` meant where it began, if it means others here."""
    plan = read_json(began.plan, "dtype", "optim")
    here = str(compute_dtype(run.model, machine)).removeprefix("torch.")
    if run.model.dtype == "auto" and plan["dtype"] in ("float32", "float16", "bfloat16") and plan["dtype"] != here:
        run = run.model_copy(update={"model": run.model.model_copy(update={"dtype": plan["dtype"]})})
    optim = str(plan["optim"]).removeprefix("paged_")
    if run.train.optim == "auto" and optim != resolve_optim("auto", machine.device).removeprefix("paged_"):
        run = with_train(run, optim=optim)
    return run


def require_same_numbers(began: RunFolder, now: dict[str, Any]) -> None:
    """Raise UserError where precision or optimizer are not those a run began with: its state does not fit others."""
    then = read_json(began.plan, "dtype", "optim")
    for key, setting in (("dtype", "model.dtype"), ("optim", "train.optim")):
        if str(then[key]).removeprefix("paged_") != now[key].removeprefix("paged_"):
            raise UserError(
                f"{setting}: the run began with {then[key]}, on this machine it would continue with {now[key]}",
                "resume it on a machine like the first, or start a new run in another train.output_dir",
            )


def tell_changes(began: RunFolder, now: dict[str, Any], train: Train) -> None:
    """Say of a run that goes on otherwise than it began what cannot be promised."""
    then, before = read_json(began.plan), load_run(began.run).train
    machine = then.get("machine")
    names = ("per_device_train_batch_size", "gradient_accumulation_steps")
    split, split_before = ([getattr(settings, name) for name in names] for settings in (train, before))
    pairs = {
        "device": (machine.get("device") if isinstance(machine, dict) else None, now["machine"]["device"]),
        "number of GPUs": (then.get("gpus"), now["gpus"]),
        "engine": (then.get("engine"), now["engine"]),
        "micro-batches": (" x ".join(map(str, split_before)), " x ".join(map(str, split))),
    }
    changes = [
        f"{name} {is_now} (began with {was})" for name, (was, is_now) in pairs.items() if was not in (None, is_now)
    ]
    if changes:
        notify(f"the run goes on with another {', another '.join(changes)}: {NOT_TO_THE_BIT}", "info", str(began.path))


def require_longer(began: RunFolder, steps: int, done: int, ended_early: bool, train: Train) -> None:
    """Check that an extended run has more steps, and say what that means for its learning rate.

    Raises:
        UserError: It has fewer, or `train.early_stopping` would end it at once.
    """
    before = read_json(began.plan, "steps")["steps"]
    if steps < before:
        raise UserError(
            f"--extend: the run was to have {before} steps, and is asked for {steps}",
            "raise train.max_steps or train.num_train_epochs",
        )
    if ended_early:
        raise UserError(
            f"--extend: train.early_stopping has ended the run after step {done}, and would again",
            f"fork it with a larger patience: --fork {began.path} -o FOLDER",
        )
    if steps == before:
        return
    assert train.learning_rate != "auto"
    kind = train.lr_scheduler_type
    old, new = (
        learning_rate(min(done, total - 1), total, train.learning_rate, train.warmup_ratio, kind)
        for total in (before, steps)
    )
    meaning = (
        "the constant rate stays as it was"
        if kind == "constant" and old == new
        else f"from here the learning rate follows the {kind} schedule of {steps} steps, as if the run had been "
        f"planned with them: the next step has {new:.3g}, where the schedule of {before} steps had come to {old:.3g}"
    )
    notify(
        f"the run is extended from {before} to {steps} steps and goes on after step {done}: {meaning}",
        "info",
        "train.max_steps",
    )


def require_steps_left(fork: Fork, steps: int) -> None:
    """Raise UserError where a fork would end where it begins."""
    step = checkpoint.step_of(fork.checkpoint)
    if steps <= step:
        raise UserError(
            f"--fork {fork.checkpoint}: {step} steps are done there, and the fork has {steps}",
            "raise train.max_steps or train.num_train_epochs, or name an earlier checkpoint",
        )


def reopen(folder: RunFolder, found: Path, is_named: bool) -> None:
    """Note that a run which has delivered trains on, and drop what comes after the checkpoint that was named."""
    step = checkpoint.step_of(found)
    later = [path for path in checkpoint.all_in(folder.checkpoints) if checkpoint.step_of(path) > step]
    if folder.delivered.exists() and not folder.reopened.exists():
        write_json(folder.reopened, {"after_step": step})
        notify(f"{folder.delivered} stays as it is until the run is finished anew", "info", str(folder.delivered))
    if is_named and later:
        names = ", ".join(path.name for path in later)
        notify(f"the run goes back to step {step}: {names} and the records after it are dropped", "info", str(found))
        for path in reversed(later):
            remove(path)


def note_extension(folder: RunFolder, done: int, steps: int) -> None:
    """Add an extension to lineage.json."""
    before = read_json(folder.plan, "steps")["steps"]
    lineage = read_lineage(folder) or {"forked_from": None, "extended": []}
    step = {"after_step": done, "planned_before": before, "planned": steps}
    if step not in lineage["extended"]:
        write_json(folder.lineage, lineage | {"extended": [*lineage["extended"], step]})


def read_lineage(folder: RunFolder) -> dict[str, Any] | None:
    """Return what lineage.json holds; None: the run began by itself and was not extended."""
    if not folder.lineage.exists():
        return None
    return read_json(folder.lineage, "forked_from", "extended")


def public_lineage(folder: RunFolder) -> dict[str, Any] | None:
    """Return the lineage as it ships: a run by its name, without its path."""
    lineage = read_lineage(folder)
    if lineage is None or lineage["forked_from"] is None:
        return lineage
    origin = lineage["forked_from"]
    return lineage | {"forked_from": origin | {"run": Path(origin["run"]).name}}
