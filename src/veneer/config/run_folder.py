"""Describes a run's folder: the names of its files, whether it is free, and who holds it."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from veneer.config.errors import UserError
from veneer.config.files import read_json
from veneer.config.folder import make_folder, remove, whole_folder, write_text
from veneer.config.paths import require_path

if os.name != "nt":
    import fcntl

# What commands write into a run's folder, and how files begin that were never finished.
_WRITTEN = {
    *("run.yaml", "environment.json", "plan.json", "ledger.json", "pii.jsonl", "metrics.jsonl", "events.jsonl"),
    *("loss.png", "checkpoints", "adapter", "model", "evaluation.json", "samples.jsonl", "evaluations", "report.html"),
    *("certificate.json", "certificate.html", "trackers", "lineage.json", "reopened.json"),
}
_TEMPORARY = tuple(f".{name}." for name in sorted(_WRITTEN))
# What stands in a folder whose run has not begun: run.yaml comes after them.
_BEFORE_BEGIN = {"environment.json", "plan.json", "ledger.json", "pii.jsonl"}
_LOCK = ".lock"
NEEDED_FILES = 100  # of a run: inodes that have to be free
LOOK_SECONDS = 0.2  # far longer than `is_held` has a lock


class _Inside:
    """An attribute of a folder that is the path of something in it."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, folder: "RunFolder", kind: type["RunFolder"]) -> Path:
        return folder.path / self._name


@dataclass(frozen=True)
class RunFolder:
    """Where the files of a run lie; the contract between commands."""

    path: Path

    run = _Inside("run.yaml")
    environment = _Inside("environment.json")
    plan = _Inside("plan.json")
    ledger = _Inside("ledger.json")
    personal = _Inside("pii.jsonl")
    metrics = _Inside("metrics.jsonl")
    events = _Inside("events.jsonl")
    loss_plot = _Inside("loss.png")
    report = _Inside("report.html")
    certificate = _Inside("certificate.json")
    trackers = _Inside("trackers")  # their names of this run, and their files
    lineage = _Inside("lineage.json")  # the run that it was forked from, and by how much it was extended
    reopened = _Inside("reopened.json")  # it trains on, and what is delivered is of before
    checkpoints = _Inside("checkpoints")
    adapter = _Inside("adapter")
    model = _Inside("model")  # in place of the adapter, where all weights were trained
    evaluation = _Inside("evaluation.json")
    samples = _Inside("samples.jsonl")
    other_evaluations = _Inside("evaluations")  # on other rows, or with other settings, than the run's record

    @property
    def delivered(self) -> Path:
        """What a finished run delivers: its adapter, or its whole model."""
        return self.model if self.model.is_dir() else self.adapter

    @property
    def is_finished(self) -> bool:
        """Whether the run has delivered what it was asked for; one that was extended since has not."""
        return self.delivered.exists() and not self.reopened.exists()

    def holds_run(self) -> bool:
        """Whether anything is here that a new run would mix with.

        What a process left that was killed before its run had begun is no such thing: a new run replaces it.
        """
        held = self._held()
        return bool(held) and not (held <= self._before_begin() and _is_environment(self.environment))

    def _before_begin(self) -> set[str]:
        """Names of what stands here before run.yaml; a fork has the checkpoint that it begins with as well."""
        return _BEFORE_BEGIN | ({"lineage.json", "checkpoints"} if self.is_fork() else set())

    def is_fork(self) -> bool:
        """Whether the run was to begin with a checkpoint of another one."""
        try:
            return read_json(self.lineage)["forked_from"] is not None
        except (UserError, KeyError, TypeError):
            return False

    def _held(self) -> set[str]:
        """Names of what is here, but for files that were never finished and the lock."""
        if not self.path.is_dir():
            return set()
        names = {entry.name for entry in self.path.iterdir()}
        return {name for name in names if name != _LOCK and not name.startswith(_TEMPORARY)}

    def require_replaceable(self) -> None:
        """Raises UserError if the folder holds anything that no run wrote; an empty or a missing one is fine."""
        require_path(str(self.path), "train.output_dir")
        if self.path.is_symlink() or (self.path.exists() and not self.path.is_dir()):
            raise UserError(
                f"train.output_dir = {self.path}: --overwrite replaces a run's folder, and this is a file or a link",
                "name a folder in train.output_dir",
            )
        held = self._held()
        strange = sorted(held - _WRITTEN)
        if not strange and not {"run.yaml", "environment.json"} & held:
            strange = sorted(held)  # a few files of such names alone make no run
        if strange:
            raise UserError(
                f"train.output_dir = {self.path}: --overwrite replaces a run's folder, and this one holds what no run "
                f"wrote: {', '.join(strange[:6])}{', ...' if len(strange) > 6 else ''}",
                "move that elsewhere, or name another train.output_dir",
            )

    def remove(self) -> None:
        """Delete the run, what it began with last: what is killed half-way is a run still, or a free folder.

        Raises:
            UserError: It holds anything that no run wrote.
        """
        self.require_replaceable()
        last = ["run.yaml", *sorted(_BEFORE_BEGIN - {"environment.json"}), "environment.json"]
        for name in [*sorted(_WRITTEN - set(last)), *last]:
            remove(self.path / name)
        self.clear_unfinished()
        with contextlib.suppress(OSError):  # it may hold the lock, or not be there
            self.path.rmdir()

    def clear_unfinished(self) -> None:
        """Delete temporary files and folders; for who holds the run, since nobody else writes here then."""
        for folder in (self.path, self.checkpoints):
            for entry in folder.iterdir() if folder.is_dir() else ():
                if entry.name.startswith((*_TEMPORARY, ".step-")):
                    remove(entry)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run for this process; a process that ends, however it does, holds it no more.

        Raises:
            UserError: Another one holds it.
        """
        from filelock import FileLock, Timeout

        make_folder(self.path)
        lock = FileLock(self.path / _LOCK)
        try:
            lock.acquire(timeout=LOOK_SECONDS)
        except Timeout:
            raise UserError(
                f"train.output_dir = {self.path}: another process is training this run",
                "wait until it has ended, or name another train.output_dir",
            ) from None
        try:
            yield
        finally:
            (self.path / _LOCK).unlink(missing_ok=True)  # held still: who opened it meanwhile sees that it is gone
            lock.release()

    def is_held(self) -> bool:
        """Whether a process holds the run, found without writing anything.

        A lock that nobody holds is shared for an instant, which whoever begins to train meanwhile waits for.
        """
        try:
            handle = os.open(self.path / _LOCK, os.O_RDONLY)
        except FileNotFoundError:
            return False
        except OSError:  # it is there, and not ours to open
            return True
        try:
            if os.name == "nt":
                return True  # who ended has deleted it
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
        finally:
            os.close(handle)
        return False

    def has_environment(self) -> bool:
        """Whether a run of ours was to begin here."""
        return _is_environment(self.environment)

    def require_begun(self) -> None:
        """Raises UserError if the folder holds no run."""
        require_path(str(self.path), "train.output_dir")
        if not self.run.exists():
            raise UserError(f"train.output_dir = {self.path}: holds no run to resume", "start it without --resume")

    def require_free(self) -> None:
        """Raises UserError if the folder holds a run, or anything else, already."""
        require_path(str(self.path), "train.output_dir")
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"train.output_dir = {self.path}: is a file", "name a folder in train.output_dir")
        if self.holds_run():
            what = "already holds a run" if self.run.exists() else "is not empty"
            resume = "--resume to go on with it, --overwrite to replace it, or " if self.run.exists() else ""
            raise UserError(
                f"train.output_dir = {self.path}: {what}", f"{resume}another train.output_dir for a new run"
            )

    def require_writable(self, needed_bytes: int) -> None:
        """Raises UserError if the folder cannot be made and written, or lacks space. Leaves nothing behind."""
        parent = self.path
        while not parent.exists():
            parent = parent.parent
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with whole_folder(self.checkpoints, keep=False) as probe:
                write_text(probe / "step-000000" / "adapter_model.safetensors", "")  # the longest of its paths
        except OSError as error:
            raise UserError(
                f"train.output_dir = {self.path}: cannot be written ({error.strerror})",
                "name a folder you may write to in train.output_dir, with a shorter path if that is too long",
            ) from None
        finally:
            made = self.path
            while made != parent and (not made.exists() or (made.is_dir() and not any(made.iterdir()))):
                with contextlib.suppress(OSError):  # it was never made
                    made.rmdir()
                made = made.parent
        free = shutil.disk_usage(parent).free
        if free < needed_bytes:
            raise UserError(
                f"train.output_dir = {self.path}: {free / 2**20:,.0f} MiB free, the run needs about "
                f"{needed_bytes / 2**20:,.0f} MiB for its weights and checkpoints",
                "free space, name another train.output_dir, or lower train.save_total_limit",
            )
        _require_inodes(parent, f"train.output_dir = {self.path}")


def _require_inodes(folder: Path, what: str) -> None:
    """Raises UserError where the disk can hold no more files, though it may have space."""
    if not hasattr(os, "statvfs"):
        return
    disk = os.statvfs(folder)
    if disk.f_files and disk.f_favail < NEEDED_FILES:  # file systems without a limit say 0 of 0
        raise UserError(
            f"{what}: the disk can take {disk.f_favail} more files (inodes), a run needs {NEEDED_FILES}",
            "delete files there, or name a folder on another disk",
        )


def _is_environment(path: Path) -> bool:
    """Whether a file is the environment.json that a run of ours begins with."""
    try:
        return "veneer" in read_json(path, "libraries")["libraries"]
    except (UserError, TypeError):
        return False
