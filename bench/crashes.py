"""Does anything kill a run? A tiny run is killed over and over, and one command has to finish it, bit for bit.

    OMP_NUM_THREADS=1 python -m bench.crashes          # a quarter of an hour on a core; no GPU

A tiny random Llama learns 14 rows for 4 steps on the CPU, with checkpoints and held-out losses on the way. Each trial
starts `veneer train run.yaml --resume auto` in a fork of a warm process and kills it with SIGKILL:

chosen   just before the n-th thing that it does to the file system (open for writing, rename, mkdir, unlink, rmdir,
         truncate, fsync), for evenly spaced n: of a new run, of one that goes on after a stop, and of one that
         replaces another (--overwrite)
random   after a random time, again and again until the run gets through

Then the same command has to end with status 0 and with the SHA-256 of the adapter of a run that nobody disturbed, with
no temporary file left; and once more, saying that it is finished, changing nothing. Writes bench/results/crashes.json.
A kill is no power cut: what the kernel has taken counts as written here, whether or not it was flushed.
"""

import argparse
import hashlib
import json
import os
import platform
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results" / "crashes.json"
CHOSEN, RANDOM, SEED = 400, 100, 0
LIMIT_SECONDS = 120.0  # of a command; a hang is a failure
CHANGES = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate"}  # names of audit events
RUN = """model: {{base: {folder}/base, dtype: float32}}
adapter: {{r: 4, lora_alpha: 8, lora_dropout: 0.1}}
data: {{train: {folder}/rows.jsonl, validation: 2, max_length: 128}}
train: {{output_dir: {folder}/run, max_steps: 4, per_device_train_batch_size: 4, gradient_accumulation_steps: 1,
  learning_rate: 1e-2, save_steps: 1, save_total_limit: 2, eval_steps: 2, gradient_checkpointing: false}}
"""


class Killer:
    """Counts what this process does to the file system under a folder, and kills it before the n-th change."""

    def __init__(self, at: int | None) -> None:
        self.count, self._at = 0, at
        self._flush = os.fsync

    def install(self) -> None:
        """For the rest of this process, which is a fork made for it."""
        sys.addaudithook(self._hear)
        os.fsync = self._fsync  # no audit event tells of it

    def _hear(self, event: str, given: Any) -> None:
        if event in CHANGES or (event == "open" and isinstance(given[2], int) and given[2] & (os.O_WRONLY | os.O_RDWR)):
            self._step()

    def _fsync(self, fd: Any) -> None:
        self._step()
        self._flush(fd)

    def _step(self) -> None:
        self.count += 1
        if self.count == self._at:
            os.kill(os.getpid(), signal.SIGKILL)


def status_of(arguments: list[str]) -> int:
    """Exit status of a command in this process."""
    from veneer.cli.main import main

    try:
        main(arguments)
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def call(arguments: list[str], log: Path, killer: Killer | None = None, seconds: float | None = None) -> int:
    """Run a command in a fork; its exit status, or less than 0: the signal that ended it.

    Args:
        arguments: Of `veneer`.
        log: Gets what it prints.
        killer: Kills it at a change of the file system; the number of changes is written beside the log.
        seconds: After which it is killed.
    """
    child = os.fork()
    if child == 0:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        status = 1
        torch.set_num_threads(1)  # makes torch's thread pool anew after a fork: two threads at once fail at it
        if killer is not None:
            killer.install()
        try:
            status = status_of(arguments)
        finally:
            sys.stdout.flush()
            if killer is not None:
                log.with_suffix(".count").write_text(str(killer.count))
            os._exit(status)
    ends = time.monotonic() + (LIMIT_SECONDS if seconds is None else seconds)
    while time.monotonic() < ends:
        ended, how = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(how)
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return -signal.SIGKILL if seconds is not None else -signal.SIGALRM


class Trials:
    """A tiny run in a folder of its own, killed and resumed."""

    def __init__(self, folder: Path) -> None:
        from tests.support.runs import write_rows
        from tests.support.tiny import FAMILIES, save_tiny_model

        self.folder, self.run, self.finished = folder, folder / "run", folder / "finished"
        save_tiny_model(FAMILIES["llama"], folder / "base")
        words = ["cat", "dog", "owl", "hen"]
        rows = [{"prompt": f"what is a {words[n % 4]}", "completion": words[n % 4] * (1 + n)} for n in range(16)]
        write_rows(folder / "rows.jsonl", rows)
        (folder / "run.yaml").write_text(RUN.format(folder=folder))
        self.command = ["train", str(folder / "run.yaml"), "--resume", "auto"]
        self.faults: Counter[str] = Counter()
        self._warm_up()

    def _warm_up(self) -> None:
        """Import all there is, by training once in this process; and what an undisturbed run is."""
        for _ in range(2):  # the second time it is finished
            assert status_of(self.command) == 0
        self.expected = self.sha256()
        self.reset()
        started = time.perf_counter()
        assert self.attempt() == 0, self.log.read_text()
        self.seconds = time.perf_counter() - started
        assert self.sha256() == self.expected, "a fork trains as its parent does"
        shutil.copytree(self.run, self.finished)

    @property
    def log(self) -> Path:
        return self.folder / "log.txt"

    def reset(self) -> None:
        shutil.rmtree(self.run, ignore_errors=True)

    def sha256(self) -> str:
        return hashlib.sha256((self.run / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()

    def attempt(self, killer: Killer | None = None, seconds: float | None = None, more: tuple[str, ...] = ()) -> int:
        command = [*self.command[:2], *more] if more else self.command
        return call(command, self.log, killer, seconds)

    def changes(self, prepare: Callable[[], None], more: tuple[str, ...] = ()) -> int:
        """How many things a run does to the file system."""
        prepare()
        assert self.attempt(Killer(None), more=more) == 0, self.log.read_text()
        return int(self.log.with_suffix(".count").read_text())

    def check(self, what: str) -> None:
        """One command goes on, and another finds it finished."""
        for attempt in ("goes on", "is finished"):
            status = self.attempt()
            if status != 0:
                self._fault(f"{attempt}: status {status}", what)
                return
            if self.sha256() != self.expected:
                self._fault(f"{attempt}: another adapter", what)
        left = [str(path.relative_to(self.run)) for path in self.run.rglob("*") if path.name.startswith(".")]
        missing = {"loss.png", "metrics.jsonl", "adapter/README.md", "adapter/passport.json"}
        missing = {name for name in missing if not (self.run / name).is_file()}
        if left or missing:
            self._fault(f"left {left}, missing {sorted(missing)}", what)

    def _fault(self, fault: str, what: str) -> None:
        self.faults[fault.split(":")[0].split(" [")[0]] += 1
        print(f"{what}: {fault}\n{self.log.read_text()[-1500:]}", flush=True)


def measure(trials: Trials, chosen: int, kills: int) -> dict[str, Any]:
    """All trials; see the module."""

    def finished_before() -> None:
        trials.reset()
        shutil.copytree(trials.finished, trials.run)

    def stopped_before() -> None:
        finished_before()
        shutil.rmtree(trials.run / "adapter")
        shutil.rmtree(trials.run / "checkpoints" / "step-000004")

    cases: dict[str, tuple[Callable[[], None], tuple[str, ...]]] = {
        "new": (trials.reset, ()),
        "resumed": (stopped_before, ()),
        "overwrite": (finished_before, ("--overwrite",)),
    }
    counts = {name: trials.changes(*case) for name, case in cases.items()}
    points = [(name, n) for name, count in counts.items() for n in range(1, count + 1)]
    taken = [points[n * len(points) // min(chosen, len(points))] for n in range(min(chosen, len(points)))]
    killed: Counter[str] = Counter()
    for number, (name, n) in enumerate(taken):
        prepare, more = cases[name]
        prepare()
        status = trials.attempt(Killer(n), more=more)
        killed[name] += status == -signal.SIGKILL
        trials.check(f"{name}, change {n}: ended with {status}")
        if number % 20 == 0:
            print(f"{number} of {len(taken)} crash points, {sum(trials.faults.values())} faults", flush=True)
    random_kills, runs = 0, 0
    times = random.Random(SEED)
    while random_kills < kills:
        trials.reset()
        runs += 1
        while random_kills < kills:
            status = trials.attempt(seconds=times.uniform(0, 1.2 * trials.seconds))
            if status != -signal.SIGKILL:
                break
            random_kills += 1
        trials.check(f"random, run {runs}")
    return {
        "changes_of_a_run": counts,
        "crash_points": dict(killed) | {"all": sum(killed.values())},
        "random_kills": random_kills,
        "runs_of_random_kills": runs,
        "faults": dict(trials.faults),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chosen", type=int, default=CHOSEN)
    parser.add_argument("--random", type=int, default=RANDOM)
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        os.environ["VENEER_CACHE"] = str(Path(name) / "cache")
        started = time.perf_counter()
        trials = Trials(Path(name))
        found = measure(trials, given.chosen, given.random)
        facts = {
            "command": f"python -m bench.crashes --chosen {given.chosen} --random {given.random}",
            "date": date.today().isoformat(),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, CPU only, one thread",
            "torch": torch.__version__,
            "seconds": round(time.perf_counter() - started),
            "seconds_of_a_run": round(trials.seconds, 2),
        }
    RESULTS.write_text(json.dumps(facts | found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(facts | found, indent=1))
    sys.exit(bool(found["faults"]))


if __name__ == "__main__":
    main()
