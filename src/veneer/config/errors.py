"""Defines the exceptions that reach a user. Anything else that escapes is a defect of Veneer."""

from pathlib import Path


class UserError(ValueError):
    """The input is wrong: exit status 2, nothing written.

    Args:
        message: fault, with its place, the value and the limit.
        fix: advice, which names the setting to change.
    """

    def __init__(self, message: str, fix: str = "") -> None:
        super().__init__(message if not fix else f"{message}\n  fix: {fix}")


class JobError(RuntimeError):
    """The job itself or one of its gates failed: exit status 1."""


class Interrupted(RuntimeError):  # noqa: N818 - it is no error
    """The user stopped a job that can be resumed: exit status 130.

    Args:
        checkpoint: checkpoint from which it goes on; None: it had none yet.
        command: command that goes on, or starts again; empty: whoever called knows it.
    """

    def __init__(self, checkpoint: Path | None, command: str = "") -> None:
        self.checkpoint = checkpoint
        saved = "no checkpoint was written yet" if checkpoint is None else f"{checkpoint} is where --resume goes on"
        verb = "start again" if checkpoint is None else "go on"
        super().__init__(f"{saved}\n  {verb} with: {command}" if command else saved)
