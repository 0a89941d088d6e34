"""Trials of a sweep side by side, each in a process with a GPU of its own.

A process loads base and rows once and measures trials as they are given to it: a line of JSON on its standard input
names one, a line on its standard output says what it came to. All decisions, and trials.jsonl, stay with the process
that started them; so a sweep over processes is resumed, and decides, as one without.

A process hears no Ctrl-C of the terminal, only what its starter makes of it: SIGTERM, with which a training ends with a
checkpoint. The end of its input means the same, so that none outlives a starter that was killed.
"""

import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any

from veneer.config import Interrupted, JobError, UserError
from veneer.evaluation.trials import Measured, Trial, Trials

STOPPED = 130
TAIL = 8192  # bytes of what a process has said in which its last line is looked for
Answer = dict[str, Any] | None  # None: the process has ended


class TrialProcesses:
    """Trains and measures trials in several processes; a context manager, which ends them.

    Args:
        command: command line of a process.
        environments: variables of each process beside those of this one.
        folder: folder of the sweep, for messages.
    """

    def __init__(self, command: Sequence[str], environments: Sequence[Mapping[str, str]], folder: Path) -> None:
        self._command, self._environments, self._folder = command, environments, folder
        self._processes: list[subprocess.Popen[str]] = []
        self._errors: list[IO[bytes] | None] = []
        self._listeners: list[threading.Thread] = []
        self._answers: queue.Queue[tuple[int, Answer]] = queue.Queue()
        self._running: dict[int, Trial] = {}

    def __enter__(self) -> "TrialProcesses":
        return self

    def __exit__(self, *error: object) -> None:
        """End the processes, and wait for them: of trials that are not done, checkpoints are written."""
        for process in self._processes:
            assert process.stdin is not None
            with suppress(BrokenPipeError):
                process.stdin.close()
        for process, listener in zip(self._processes, self._listeners, strict=True):
            process.wait()
            listener.join()
        for file in filter(None, self._errors):
            file.close()

    def load(self) -> None:
        """Start the processes, and wait until each has loaded base and rows.

        Raises:
            UserError: the sweep cannot be carried out. JobError: a process ended.
        """
        for number, environment in enumerate(self._environments):
            # All say much the same: the first one says it to the user, and of another the last line is told if it dies.
            errors = TemporaryFile() if number else None  # noqa: SIM115 - the end of this context closes it
            self._errors.append(errors)
            process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=os.environ | environment,
                start_new_session=True,
            )
            self._processes.append(process)
            listener = threading.Thread(target=self._listen, args=(number, process), daemon=True)
            self._listeners.append(listener)
            listener.start()
        for _ in self._processes:
            self._answer()

    def measured(self, trials: Iterable[Trial], rung: int | None) -> Iterator[Measured]:
        """Yield what each trial came to, as it comes; see `Measurer`."""
        waiting, idle = iter(trials), [*range(len(self._processes))]
        while True:
            while idle and (trial := next(waiting, None)) is not None:
                self._ask(idle.pop(0), trial, rung)
            if not self._running:
                return
            number, answer = self._answer()
            del self._running[number]
            idle.append(number)
            yield answer["facts"], answer["was_stopped"]

    def _ask(self, number: int, trial: Trial, rung: int | None) -> None:
        self._running[number] = trial
        pipe = self._processes[number].stdin
        assert pipe is not None
        with suppress(BrokenPipeError):  # why it has ended is told by the end of its output
            print(json.dumps({"trial": trial.name, "rung": rung}), file=pipe, flush=True)

    def _listen(self, number: int, process: "subprocess.Popen[str]") -> None:
        assert process.stdout is not None
        with process.stdout:
            for line in process.stdout:
                self._answers.put((number, json.loads(line)))
        self._answers.put((number, None))

    def _answer(self) -> tuple[int, dict[str, Any]]:
        """Wait for the next answer of any process.

        Raises:
            UserError, JobError: what a process raised, or that it ended. Interrupted: the user stopped it.
        """
        try:
            number, answer = self._answers.get()
        except KeyboardInterrupt:
            raise Interrupted(self._folder) from None
        if answer is None:
            status = self._processes[number].wait()
            if status == STOPPED:
                raise Interrupted(self._folder)
            how = signal.Signals(-status).name if status < 0 else f"status {status}"
            trial = f" with the trial {self._running[number].name}" if number in self._running else ""
            last = _last_line(self._errors[number])
            said = f"; the last that it said: {last}" if last else ""
            raise JobError(f"process {number} of the sweep ended{trial} ({how}){said}\n  fix: go on with --resume")
        if "user_error" in answer:
            raise UserError(answer["user_error"])
        if "error" in answer:
            raise JobError(f"process {number} of the sweep: {answer['error']}\n  fix: go on with --resume")
        return number, answer


def _last_line(file: IO[bytes] | None) -> str:
    """Return the last line of a file that is not empty; "" where there is none."""
    if file is None:
        return ""
    size = os.fstat(file.fileno()).st_size
    tail = os.pread(file.fileno(), TAIL, max(0, size - TAIL))  # which leaves the position, that the process shares
    lines = [line.strip() for line in tail.decode(errors="replace").splitlines()]
    return next(filter(None, reversed(lines)), "")


def serve_trials(trials: Trials, known: Mapping[str, Trial]) -> int:
    """Measure the trials that standard input names, until it ends; returns the exit status of the process.

    Args:
        trials: trials of the sweep, with base and rows.
        known: all trials of the sweep, by name.
    """
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever else is printed is no answer

    def answer(told: Mapping[str, Any]) -> None:
        print(json.dumps(told), file=out, flush=True)

    asked: queue.Queue[dict[str, Any] | None] = queue.Queue()
    is_busy = threading.Event()

    def listen() -> None:
        for line in sys.stdin:
            asked.put(json.loads(line))
        asked.put(None)
        if is_busy.is_set():
            os.kill(os.getpid(), signal.SIGTERM)

    is_busy.set()
    threading.Thread(target=listen, daemon=True).start()
    try:
        trials.load()
        answer({"loaded": True})
        is_busy.clear()
        while (request := asked.get()) is not None:
            is_busy.set()
            facts, was_stopped = trials.measure(known[request["trial"]], request["rung"])
            is_busy.clear()
            answer({"facts": facts, "was_stopped": was_stopped})
    except Interrupted:
        return STOPPED
    except UserError as error:
        answer({"user_error": str(error)})
        return 2
    except Exception as error:  # noqa: BLE001 - whatever it is, the sweep says it
        answer({"error": f"{type(error).__name__}: {error}" if not isinstance(error, JobError) else str(error)})
        return 1
    return 0
