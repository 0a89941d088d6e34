"""A run's folder: the names of its files, and writing them whole or not at all.

Every file is written under a temporary name, flushed to disk and renamed, so that a crash or a full disk leaves
the old file or none, never half of one. Folders are made the same way.

Permissions are those that the umask leaves, as of any file a program creates: `tempfile` and safetensors would make
them private to the user, which colleagues and a server's account could not read, and a fixed mode would open what a
umask of 077 closes. The umask itself is never read or set, since that would change it for the whole process.
"""

import contextlib
import json
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from veneer.config.errors import UserError

# What commands write into a run's folder, and how files begin that were never finished.
_WRITTEN = {
    *("run.yaml", "environment.json", "plan.json", "ledger.json", "pii.jsonl", "metrics.jsonl", "events.jsonl"),
    *("loss.png", "checkpoints", "adapter", "evaluation.json", "samples.jsonl", "evaluations", "report.html"),
    *("certificate.json", "certificate.html"),
}
_TEMPORARY = tuple(f".{name}." for name in sorted(_WRITTEN))


@dataclass(frozen=True)
class RunFolder:
    """Where the files of a run lie; the contract between commands."""

    path: Path

    @property
    def run(self) -> Path:
        return self.path / "run.yaml"

    @property
    def environment(self) -> Path:
        return self.path / "environment.json"

    @property
    def plan(self) -> Path:
        return self.path / "plan.json"

    @property
    def ledger(self) -> Path:
        return self.path / "ledger.json"

    @property
    def personal(self) -> Path:
        return self.path / "pii.jsonl"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def loss_plot(self) -> Path:
        return self.path / "loss.png"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def evaluation(self) -> Path:
        return self.path / "evaluation.json"

    @property
    def samples(self) -> Path:
        return self.path / "samples.jsonl"

    @property
    def other_evaluations(self) -> Path:
        """Evaluations on other rows, or with other settings, than those of the run's record."""
        return self.path / "evaluations"

    def holds_run(self) -> bool:
        """Whether anything is here that a new run would mix with."""
        return self.path.is_dir() and any(self.path.iterdir())

    def require_replaceable(self) -> None:
        """Raises UserError if the folder holds anything that no run wrote; an empty or a missing one is fine."""
        if self.path.is_symlink() or (self.path.exists() and not self.path.is_dir()):
            raise UserError(
                f"train.output_dir = {self.path}: --overwrite replaces a run's folder, and this is a file or a link",
                "name a folder in train.output_dir",
            )
        if not self.holds_run():
            return
        held = sorted(entry.name for entry in self.path.iterdir())
        strange = [name for name in held if not name.startswith(_TEMPORARY) and name not in _WRITTEN]
        if not strange and not {"run.yaml", "environment.json"} & set(held):
            strange = held  # a few files of such names alone make no run
        if strange:
            raise UserError(
                f"train.output_dir = {self.path}: --overwrite replaces a run's folder, and this one holds what no run "
                f"wrote: {', '.join(strange[:6])}{', ...' if len(strange) > 6 else ''}",
                "move that elsewhere, or name another train.output_dir",
            )

    def remove(self) -> None:
        """Delete the run; under another name first, so that no half of one is left under its own.

        Raises:
            UserError: It holds anything that no run wrote.
        """
        self.require_replaceable()
        if self.path.exists():
            discarded = Path(tempfile.mkdtemp(dir=self.path.absolute().parent, prefix=f".{self.path.name}."))
            os.replace(self.path, discarded / "run")
            shutil.rmtree(discarded)

    def require_begun(self) -> None:
        """Raises UserError if the folder holds no run."""
        if not self.run.exists():
            raise UserError(f"train.output_dir = {self.path}: holds no run to resume", "start it without --resume")

    def require_free(self) -> None:
        """Raises UserError if the folder holds a run, or anything else, already."""
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
            with tempfile.TemporaryFile(dir=self.path):
                pass
        except OSError as error:
            raise UserError(
                f"train.output_dir = {self.path}: cannot be written ({error.strerror})",
                "name a folder you may write to in train.output_dir",
            ) from None
        finally:
            made = self.path
            while made != parent and made.is_dir() and not any(made.iterdir()):
                made.rmdir()
                made = made.parent
        free = shutil.disk_usage(parent).free
        if free < needed_bytes:
            raise UserError(
                f"train.output_dir = {self.path}: {free / 2**20:,.0f} MiB free, the run needs about "
                f"{needed_bytes / 2**20:,.0f} MiB for adapter and checkpoints",
                "free space, name another train.output_dir, or lower train.save_total_limit",
            )


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all; makes its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _unused_beside(path)
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        # Names of files need not be UTF-8; in JSON and YAML what is put for such a byte is its escape.
        with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """Write JSON whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes `path` when the block ends well, and vanishes when it does not.

    An existing `path` is replaced.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _unused_beside(path)
    temporary.mkdir()
    file_mode = stat.S_IMODE(temporary.stat().st_mode) & 0o666  # of a folder just made: what the umask leaves
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                file.chmod(file_mode)
                with file.open("rb") as handle:
                    os.fsync(handle.fileno())
        if path.exists():
            discarded = _unused_beside(path)
            discarded.mkdir()
            try:
                os.replace(path, discarded / path.name)
                os.replace(temporary, path)
            except BaseException:
                if (discarded / path.name).exists():  # the old one goes back
                    os.replace(discarded / path.name, path)
                discarded.rmdir()
                raise
            shutil.rmtree(discarded)
        else:
            os.replace(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _unused_beside(path: Path) -> Path:
    """A hidden name in the same folder, so that a rename to `path` stays on one disk."""
    return path.with_name(f".{path.name}.{secrets.token_hex(6)}")
