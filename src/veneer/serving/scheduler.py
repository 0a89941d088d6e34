"""The thread that owns the model: it reads prompts, makes a token for each answer at a time, and tells of them.

Between two steps requests join and leave: those that wait are admitted in their order as slots and tokens allow, those
that were cancelled or are late leave, and adapters are put into the bank. On a GPU prompts are launched and the text of
a step's tokens is told while the next step is computed: a prompt's thousand launches take the host longer than the GPU.
On a CPU one thing follows the other.

An error in a step ends the answers of that step, with a message to those who asked, and not the server.
"""

import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from itertools import islice
from typing import Any, TypeVar

import torch

from veneer.machine.device import return_freed_memory
from veneer.serving.batch import Batch, Reading
from veneer.serving.errors import ApiError
from veneer.serving.generation import Ended, Generation
from veneer.serving.metrics import Metrics
from veneer.serving.sampling import Choice, Row, choose

IDLE_SECONDS = 0.5  # between two looks at what is late while nothing else happens
TRIMMED = 16  # readings of prompts after which the heap is trimmed on a CPU: kept prompts come and go in it
HELD_STEPS = 8  # most steps that a prompt waits for a slot for the one behind it
T = TypeVar("T")


class Scheduler:
    """Makes answers on a thread of its own.

    Args:
        batch: The batch of the model.
        queue: Most answers that wait.
        metrics: Figures of the server.
        overlaps: Whether prompts are read and tokens are told while the next step is computed.
    """

    def __init__(self, batch: Batch, queue: int, metrics: Metrics, overlaps: bool = False) -> None:
        self.batch, self._most_waiting, self._metrics, self._overlaps = batch, queue, metrics, overlaps
        self._lock = threading.Condition()
        self._waiting: deque[Generation] = deque()
        self._calls: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._reading: Reading | None = None
        self._untold: list[tuple[Generation, Choice, str | None]] = []
        self._held = self._readings = 0
        self._is_stopped = False
        self._thread = threading.Thread(target=self._run, name="veneer-scheduler", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread after its current step; answers that are not finished are given up."""
        with self._lock:
            self._is_stopped = True
            self._lock.notify()
        self._thread.join()

    @property
    def waiting(self) -> int:
        """Answers that wait."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Answers that are made."""
        reading = self._reading
        return len(self.batch.rows) + (len(reading.generations) if reading is not None else 0)

    def submit(self, generations: list[Generation]) -> None:
        """Let the answers to one request wait for their turn.

        Raises:
            ApiError: Too many wait already (429), or the server stops (503).
        """
        with self._lock:
            if self._is_stopped:
                raise ApiError(503, "the server is shutting down", retry_after=5)
            busy = bool(self._waiting) or not self.batch.fits(generations[:1])
            if busy and len(self._waiting) + len(generations) > self._most_waiting:
                self._metrics.refused.add(1)
                wait = self._metrics.expected_wait(len(self._waiting))
                raise ApiError(429, f"{len(self._waiting)} answers wait already", code="queue_full", retry_after=wait)
            self._waiting.extend(generations)
            self._lock.notify()

    def cancel(self, generation: Generation) -> None:
        """Give an answer up; its slot is free at the next step."""
        generation.is_cancelled = True
        with self._lock:
            self._lock.notify()

    def call(self, function: Callable[[], T]) -> "Future[T]":
        """Call a function on this thread between two steps."""
        future: Future[T] = Future()
        with self._lock:
            self._calls.append((function, future))
            self._lock.notify()
        return future

    def _run(self) -> None:
        while True:
            with self._lock:
                if self._is_stopped:
                    break
                is_busy = self._calls or self._reading or self._untold or self.batch.rows
                if not (self._waiting or is_busy):
                    self._lock.wait()
                elif not is_busy:
                    # What waits while nothing runs does not fit only if it is too late or cancelled.
                    self._lock.wait(0 if self._may_begin() else IDLE_SECONDS)
            self._call()
            self._leave()
            try:
                if not (self._overlaps and self.batch.rows):
                    self._read()
                self._step()
            except Exception as error:  # noqa: BLE001 - whatever it is, the server goes on with other answers
                self._fail(error)
        self._fail(None)

    def _may_begin(self) -> bool:
        return bool(self._waiting) and self.batch.fits([self._waiting[0]])

    def _holds(self) -> bool:
        """Return whether the next prompt waits some steps, so that the one behind it is read with it.

        On a GPU most of the time of a pass over a short prompt is launches. It waits for a slot alone: where the one
        behind it does not fit beside the rows by itself, it is its tokens that have no room, and they may never have.
        """
        two = list(islice(self._waiting, 2))
        is_behind = self._overlaps and self.batch.reads_together and bool(self.batch.rows) and len(two) == 2
        holds = is_behind and self.batch.fits(two[1:]) and not self.batch.fits(two)
        self._held = self._held + 1 if holds and self._held < HELD_STEPS else 0
        return self._held > 0

    def _call(self) -> None:
        while self._calls:
            function, future = self._calls.popleft()
            try:
                future.set_result(function())
            except Exception as error:  # noqa: BLE001 - it is raised where the result is waited for
                future.set_exception(error)

    def _leave(self) -> None:
        """End answers that nobody waits for any more, or that took too long."""
        now = time.monotonic()
        reading = self._reading.generations if self._reading is not None else []
        for row in [*self.batch.rows, *reading, *self._waiting]:
            if row.is_over or (not row.is_cancelled and now < row.deadline):
                continue
            was_waiting = row in self._waiting
            if row.is_cancelled:
                self._metrics.cancelled.add(1)
                row.over(None)
            elif was_waiting:
                self._metrics.refused.add(1)
                row.over(ApiError(429, "no slot became free in time", code="queue_timeout", retry_after=10))
            else:
                self._metrics.late.add(1)
                row.over(ApiError(408, "the answer took longer than the server allows", code="timeout"))
            if row in self.batch.rows:
                self.batch.remove(row)
        with self._lock:
            self._waiting = deque(row for row in self._waiting if not row.is_over)

    def _read(self) -> None:
        """Read a chunk of the prompts that come next."""
        if self._reading is None and self._may_begin() and not self._holds():
            with self._lock:
                self._reading = self.batch.begin(list(self._waiting))
                for row in self._reading.generations:
                    self._waiting.remove(row)
        if self._reading is not None:
            reading, self._reading = self._reading, None
            try:
                is_read = reading.advance()
            except BaseException:
                self._reading = reading
                raise
            if is_read:
                self._readings += 1
                if not self._overlaps and self._readings % TRIMMED == 0:
                    return_freed_memory()
                for row in reading.generations:
                    self._metrics.prompt_tokens.add(len(row.prompt) - row.cached)
                    self._metrics.cached_tokens.add(row.cached)
            else:
                self._reading = reading

    def _step(self) -> None:
        """Make a token for each row."""
        rows = list(self.batch.rows)
        if not rows:
            self._tell()
            return
        logits_SV = self.batch.step()
        if self._overlaps:
            self._read()
        self._tell()
        alive = [number for number, row in enumerate(rows) if not row.is_over]
        if len(alive) < len(rows):  # a stop text ended some while their next token was computed
            rows = [rows[number] for number in alive]
            logits_SV = logits_SV[torch.tensor(alive, device=logits_SV.device)]
        if not rows:
            return
        choices = choose(logits_SV, [_row(row) for row in rows])
        for row, choice in zip(rows, choices, strict=True):
            ended = row.take(choice)
            self._metrics.note_token(row)
            if ended is not None:
                self.batch.remove(row)
            self._untold.append((row, choice, ended))
        if not self._overlaps:
            self._tell()

    def _tell(self) -> None:
        """Tell the text of tokens that were made."""
        untold, self._untold = self._untold, []
        for row, choice, ended in untold:
            if row.is_over:
                continue
            reason = row.say(choice, ended)
            if reason is not None:
                self._metrics.note_end(row)
                row.over(Ended(reason, len(row.ids), row.cached))
                if row in self.batch.rows:
                    self.batch.remove(row)

    def _fail(self, error: Exception | None) -> None:
        """End all answers that are being made; those that wait too where the server stops (no error)."""
        refusal = ApiError(503, "the server is shutting down", retry_after=5)
        if error is not None:
            traceback.print_exception(error)
            what = "the model ran out of memory" if isinstance(error, torch.OutOfMemoryError) else "the model failed"
            refusal = ApiError(503, f"{what} on this batch; try again", code="model_failed", retry_after=1)
            self._metrics.failed.add(1)
        self._untold.clear()
        reading = self._reading.generations if self._reading is not None else []
        for row in [*reading, *self.batch.rows, *(self._waiting if error is None else ())]:
            row.over(refusal)
        if self._reading is not None:
            self._reading.advance()  # which lets go of rows that are over, and computes nothing
            self._reading = None
        for row in list(self.batch.rows):
            self.batch.remove(row)
        if error is None:
            self._waiting.clear()


def _row(generation: Generation) -> Row:
    allowed = generation.grammar.allowed() if generation.grammar is not None else None
    return Row(
        generation.decoding, generation.prompt, generation.ids, generation.generator, generation.likeliest, allowed
    )
