"""Does anything cost a run more than its last steps? A tiny run is killed, stopped, starved and damaged, and resumed.

    OMP_NUM_THREADS=1 python -m bench.survive kill --runs 200     # a group; without a name: all of them
    python3 -m bench.survive kill --device cuda --runs 20 --jobs 4 --out $OUT/survive.json

A tiny random Llama learns 14 rows for 12 steps, with a checkpoint every other step and held-out losses on the way, by
`veneer train run.yaml --resume auto`, in forks of a process that has imported everything (bench/forked.py). On a GPU,
where each is a process of its own and loads for longer, it is 240 steps with a checkpoint every 40th. Each group
ends when that command has finished the run, and compares the adapter's SHA-256 with that of a run nobody disturbed:

kill     SIGKILL at a random instant of the run (loading, preparing, saving and delivering included), and again
points   SIGKILL just before the n-th change of the file system, n evenly over a new, a resumed and a replaced run
term     SIGTERM, SIGHUP or SIGINT at a random instant: status 130 with the command that goes on; no step made is lost
disk     the disk (a tmpfs of its own) fills at a random instant: status 1, what was saved is whole and named
damage   bytes flipped in a file of the newest checkpoint, or a file cut or gone: told, and never used in silence
save     seconds that a checkpoint and a logged step take of the training, of SmolLM2-135M with LoRA on a CPU

A kill is no power cut: what the kernel has taken counts as written here, whether or not it was flushed. Writes
bench/results/survive.json, a group at a time.
"""

import argparse
import hashlib
import json
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

from bench import forked
from bench.forked import Killer, call, import_what

RESULTS = Path(__file__).parent / "results" / "survive.json"
SEED = 0
STEPS = {"cpu": 12, "cuda": 240}
COUNTS = {"kill": 200, "points": 100, "term": 60, "disk": 40, "damage": 60}
RUN = """model: {{base: {folder}/base, dtype: {dtype}}}
adapter: {{r: {rank}, lora_alpha: 8, lora_dropout: 0.1}}
data: {{train: {folder}/rows.jsonl, validation: 2, max_length: 128}}
train: {{output_dir: {disk}/run, max_steps: {steps}, per_device_train_batch_size: 4, gradient_accumulation_steps: 1,
  learning_rate: 1e-2, save_steps: {save}, save_total_limit: 2, eval_steps: {held_out}, gradient_checkpointing: false,
  engine: {engine}}}
"""
DISK_BYTES, SLACK_BYTES = 48 * 2**20, 300_000


class Trials:
    """A tiny run in a folder of its own.

    Args:
        folder: Folder.
        device: cpu or cuda.
        steps: Steps of the run; 0: as many as the device's.
    """

    def __init__(self, folder: Path, device: str, steps: int = 0) -> None:
        from tests.support.runs import write_rows
        from tests.support.tiny import FAMILIES, save_tiny_model

        self.folder, self.disk = folder, folder / "disk"
        self.run, self.log, self.cache = self.disk / "run", folder / "log.txt", folder / "cache"
        self.disk.mkdir(parents=True)
        save_tiny_model(FAMILIES["llama"], folder / "base")
        words = ["cat", "dog", "owl", "hen"]
        rows = [{"prompt": f"what is a {words[n % 4]}", "completion": words[n % 4] * (1 + n)} for n in range(16)]
        write_rows(folder / "rows.jsonl", rows)
        self._on_gpu = device == "cuda"
        way = {"dtype": "bfloat16", "engine": "fused", "rank": 8}
        if not self._on_gpu:
            way = {"dtype": "float32", "engine": "reference", "rank": 4}
        whole = STEPS[device]
        times = {"steps": steps or whole, "save": whole // 6, "held_out": whole // 3}
        text = RUN.format(folder=folder, disk=self.disk, **way, **times)
        (folder / "run.yaml").write_text(text)
        self.command = ["train", str(folder / "run.yaml"), "--resume", "auto"]
        self.faults: Counter[str] = Counter()
        self.seen: Counter[str] = Counter()
        self.expected, self.seconds = "", 0.0
        os.environ["VENEER_CACHE"] = str(self.cache)

    def begin(self) -> None:
        """Train undisturbed, for the adapter and the time that it takes; on a GPU once before that, for its kernels."""
        for _ in range(2 if self._on_gpu else 1):
            self.reset()
            started = time.perf_counter()
            status = self.attempt()
            assert status == 0, self.log.read_text()
            self.seconds = time.perf_counter() - started
        self.expected = self.sha256()

    def reset(self) -> None:
        """Delete the run, and what was prepared and cached for it."""
        shutil.rmtree(self.run, ignore_errors=True)
        shutil.rmtree(self.cache, ignore_errors=True)

    def sha256(self) -> str:
        return hashlib.sha256((self.run / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()

    def attempt(self, *given: Any, more: tuple[str, ...] = (), **named: Any) -> int:
        """Run the command once; arguments are those of `call`."""
        return call([*self.command[:2], *more] if more else self.command, self.log, *given, **named)

    def phase(self) -> str:
        """Return what the run was doing when it ended, by its files."""
        names = {path.name for path in self.run.iterdir()} if self.run.is_dir() else set()
        inside = {path.name for path in (self.run / "checkpoints").glob(".step-*")}
        if "adapter" in names:
            return "delivered"
        if any(name.startswith(".adapter") for name in names):
            return "delivering"
        if inside:
            return "saving"
        if "metrics.jsonl" in names:
            return "training"
        return "beginning its folder" if names - {".lock"} else "loading and preparing"

    def check(self, what: str, optional: frozenset[str] = frozenset()) -> bool:
        """Have the command finish the run, and find it finished; returns whether all is as if nothing had been.

        Args:
            what: Trial.
            optional: Files that a finished run is good without.
        """
        for attempt in ("goes on", "is finished"):
            status = self.attempt()
            if status != 0:
                return self.fault(f"{attempt}: status {status}", what)
            if self.sha256() != self.expected:
                return self.fault(f"{attempt}: another adapter", what)
        left = [str(path.relative_to(self.run)) for path in self.run.rglob("*") if path.name.startswith(".")]
        missing = {"loss.png", "metrics.jsonl", "adapter/README.md", "adapter/passport.json"}
        missing = {name for name in missing if not (self.run / name).is_file()} - optional
        steps = [line["step"] for line in self.records() if line["kind"] == "train"]
        if left or missing or steps != sorted(set(steps)):
            return self.fault(f"left {left}, missing {sorted(missing)}, steps {steps}", what)
        return True

    def records(self) -> list[dict[str, Any]]:
        lines = (self.run / "metrics.jsonl").read_text().splitlines() if (self.run / "metrics.jsonl").exists() else []
        return [json.loads(line) for line in lines]

    def checkpoints(self) -> list[Path]:
        return sorted((self.run / "checkpoints").glob("step-*"))

    def fault(self, fault: str, what: str) -> bool:
        self.faults[fault.split(":")[0].split(" [")[0]] += 1
        print(f"{what}: {fault}\n{self.log.read_text()[-1500:]}", flush=True)
        return False

    def result(self, **more: Any) -> dict[str, Any]:
        return {"seconds_of_a_run": round(self.seconds, 2), "ended_while": dict(self.seen), **more}


def kill(trials: Trials, runs: int, times: random.Random) -> dict[str, Any]:
    """Kill each run at a random instant, and its resumed ones as often as not."""
    trials.begin()
    kills = identical = 0
    for number in range(runs):
        trials.reset()
        of_run, longest = 0, trials.seconds
        while (status := trials.attempt(after=times.uniform(0, longest))) == -signal.SIGKILL or not of_run:
            if status == -signal.SIGKILL:
                of_run += 1
                trials.seen[trials.phase()] += 1
                longest = 2 * trials.seconds
            else:  # it was done before
                trials.seconds *= 0.8
                longest = trials.seconds
                trials.reset()
        kills += of_run
        if status != 0:
            trials.fault(f"status {status}", f"kill, run {number}")
        identical += trials.check(f"kill, run {number}")
        if number % 20 == 19:
            print(f"{number + 1} of {runs} runs, {kills} kills, {trials.faults.total()} faults", flush=True)
    return trials.result(runs=runs, kills=kills, identical_adapters=identical)


def points(trials: Trials, runs: int, times: random.Random) -> dict[str, Any]:
    """Kill runs just before changes of the file system, evenly over all of them."""
    trials.begin()
    finished = trials.folder / "finished"
    shutil.copytree(trials.run, finished)

    def finished_before() -> None:
        trials.reset()
        shutil.copytree(finished, trials.run)

    def stopped_before() -> None:
        finished_before()
        shutil.rmtree(trials.run / "adapter")
        shutil.rmtree(trials.checkpoints()[-1])

    cases: dict[str, tuple[Callable[[], None], tuple[str, ...]]] = {
        "new": (trials.reset, ()),
        "resumed": (stopped_before, ()),
        "overwrite": (finished_before, ("--overwrite",)),
    }
    counts = {}
    for name, (prepare, more) in cases.items():
        prepare()
        counted = os.open(trials.folder / f"{name}.count", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        assert trials.attempt(Killer(None, counted).install, more=more) == 0, trials.log.read_text()
        counts[name] = os.fstat(counted).st_size
        os.close(counted)
    all_points = [(name, n) for name, count in counts.items() for n in range(1, count + 1)]
    killed = identical = 0
    for number in range(runs):
        name, n = all_points[number * len(all_points) // runs]
        prepare, more = cases[name]
        prepare()
        killed += trials.attempt(Killer(n).install, more=more) == -signal.SIGKILL
        trials.seen[trials.phase()] += 1
        identical += trials.check(f"points, {name}, change {n}")
    return trials.result(changes_of_a_run=counts, runs=runs, kills=killed, identical_adapters=identical)


def term(trials: Trials, runs: int, times: random.Random) -> dict[str, Any]:
    """Stop each run by a signal at a random instant."""
    trials.begin()
    stops = identical = finished = 0
    numbers = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
    for number in range(runs):
        trials.reset()
        how = times.choice(numbers)
        after = times.uniform(0, trials.seconds)
        what = f"term, run {number}, {how.name} after {after:.2f} s"
        status = trials.attempt(after=after, then=lambda child, how=how: os.kill(child, how))
        if status == 0:
            finished += 1  # its last step was made already
        elif status == 130:
            stops += 1
            trials.seen[trials.phase()] += 1
            said = trials.log.read_text()
            made = max((line["step"] for line in trials.records() if line["kind"] == "train"), default=0)
            saved = max((int(path.name[5:]) for path in trials.checkpoints()), default=0)
            if "go on with: " not in said and "start again with: " not in said:
                trials.fault("no command that goes on", what)
            if saved != made:
                trials.fault(f"steps lost: {made} made, {saved} saved", what)
        else:
            trials.fault(f"status {status}", what)
        identical += trials.check(what)
    return trials.result(runs=runs, stops=stops, had_finished=finished, identical_adapters=identical)


def disk(trials: Trials, runs: int, times: random.Random) -> dict[str, Any]:
    """Fill the disk of each run at a random instant, with a random rest; then free it."""
    trials.begin()
    shutil.rmtree(trials.disk)
    trials.disk.mkdir()
    options = ["-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(trials.disk)]
    if subprocess.run(["mount", *options], stderr=subprocess.DEVNULL).returncode != 0:
        return trials.result(skipped="no tmpfs could be mounted")
    failed = identical = survived = 0
    filler = trials.disk / "filler"

    def fill(rest: int) -> None:
        free = shutil.disk_usage(trials.disk).free
        with filler.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, max(1, free - rest))

    try:
        for number in range(runs):
            trials.reset()
            rest, after = times.randrange(SLACK_BYTES), times.uniform(0.3, 1) * trials.seconds
            what = f"disk, run {number}, {rest} bytes left after {after:.2f} s"
            status = trials.attempt(after=after, then=lambda child, rest=rest: fill(rest))
            said = trials.log.read_text()
            if status == 0:
                survived += 1
            elif status in (1, 2):
                failed += 1
                trials.seen[trials.phase()] += 1
                if not any(word in said for word in ("fix: free", "disk became full", "MiB free, the run needs")):
                    trials.fault("the message does not say what to free", what)
            else:
                trials.fault(f"status {status}", what)
            for path in trials.checkpoints():
                if not is_whole(path):
                    trials.fault("a checkpoint is not whole", f"{what}: {path.name}")
            filler.unlink(missing_ok=True)
            # Of these a run says that they could not be written, and delivers its adapter all the same.
            optional = frozenset({"loss.png", "adapter/README.md"}) if status == 0 else frozenset()
            identical += trials.check(what, optional)
    finally:
        subprocess.run(["umount", str(trials.disk)], check=True)
    return trials.result(runs=runs, failed=failed, survived=survived, identical_adapters=identical)


def is_whole(path: Path) -> bool:
    """Return whether a checkpoint is as it was written."""
    from veneer.config import UserError
    from veneer.config.manifest import read_manifest

    try:
        read_manifest(path)
    except UserError:
        return False
    return True


def damage(trials: Trials, runs: int, times: random.Random) -> dict[str, Any]:
    """Damage the newest checkpoint of a stopped run at random: it is told, and the one before is used."""
    trials.begin()
    stopped = trials.folder / "stopped"
    shutil.rmtree(trials.run / "adapter")
    shutil.copytree(trials.run, stopped)
    told = harmless = identical = 0
    for number in range(runs):
        trials.reset()
        shutil.copytree(stopped, trials.run)
        newest = trials.checkpoints()[-1]
        file = times.choice(sorted(newest.iterdir()))
        content = bytearray(file.read_bytes())
        how = times.choice(("flipped", "cut", "gone", "grown"))
        if how == "flipped":
            for _ in range(times.choice((1, 1, 8, 64))):
                content[times.randrange(len(content))] ^= 1 << times.randrange(8)
        elif how == "cut":
            del content[times.randrange(len(content)) :]
        elif how == "grown":
            content += b"\0" * times.choice((1, 512))
        file.write_bytes(content)
        if how == "gone":
            file.unlink()
        trials.seen[f"{file.name} {how}"] += 1
        what = f"damage, run {number}, {file.name} {how}"
        whole = is_whole(newest)  # white space of the manifest, say
        status = trials.attempt()
        said = trials.log.read_text()
        if status != 0 or trials.sha256() != trials.expected:
            trials.fault(f"status {status} or another adapter", what)
        elif "training goes on from the checkpoint before it" in said:
            told += 1
        elif whole:
            harmless += 1
        else:
            trials.fault("used in silence", what)
        identical += trials.check(what)
    return trials.result(runs=runs, told=told, harmless=harmless, identical_adapters=identical)


GROUPS = {"kill": kill, "points": points, "term": term, "disk": disk, "damage": damage}


def measure(group: str, folder: Path, device: str, runs: int, seed: int) -> dict[str, Any]:
    """Run a group in a folder of its own."""
    trials = Trials(folder, device)
    started = time.perf_counter()
    found = GROUPS[group](trials, runs, random.Random(f"{group} {seed}"))
    return found | {"seconds": round(time.perf_counter() - started), "faults": dict(trials.faults)}


def side_by_side(group: str, folder: Path, device: str, runs: int, jobs: int) -> dict[str, Any]:
    """Run a group in several processes, each with its share of the runs, and add up what they find."""
    children = []
    for job in range(jobs):
        share = runs // jobs + (job < runs % jobs)
        if (child := os.fork()) == 0:
            status = 1
            try:
                found = measure(group, folder / f"{group}-{job}", device, share, SEED + job)
                (folder / f"{group}-{job}.json").write_text(json.dumps(found))
                status = 0
            finally:
                os._exit(status)
        children.append(child)
    for child in children:
        ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert ended == 0, f"a job of {group} ended with {ended}"
    parts = [json.loads((folder / f"{group}-{job}.json").read_text()) for job in range(jobs)]
    total: dict[str, Any] = {}
    for part in parts:
        for name, value in part.items():
            if isinstance(value, dict):
                total[name] = dict(Counter(total.get(name, {})) + Counter(value))
            else:
                total[name] = max(total.get(name, 0), value) if "seconds" in name else total.get(name, 0) + value
    return total | {"jobs": jobs}


def facts_of(device: str) -> dict[str, Any]:
    """Return the machine and the versions that results are from."""
    name = ""
    if device == "cuda":
        query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        name = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    return {
        "date": date.today().isoformat(),
        "machine": f"{name or 'CPU only'}, {platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        **{one: version(one) for one in ("torch", "transformers", "peft", "safetensors")},
    }


def version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not known"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("group", nargs="*", help=f"of {', '.join(GROUPS)} and save; none: all")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--runs", type=int, help="of each group")
    parser.add_argument("--jobs", type=int, default=1, help="processes side by side")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "PYTORCH_NVML_BASED_CUDA_CHECK": "1", "TOKENIZERS_PARALLELISM": "false"}
    if given.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    found = json.loads(given.out.read_text()) if given.out.exists() else {}
    faults = 0
    with tempfile.TemporaryDirectory(prefix="veneer-survive-") as name:
        groups = given.group or [*GROUPS, "save"]
        if set(groups) & set(GROUPS):
            if given.device == "cuda":  # some libraries begin to use the GPU when they are imported
                forked.FORKS = False
            else:
                import_what(Trials(Path(name) / "warm", given.device, steps=4).command)
        for group in groups:
            command = f"python -m bench.survive {group}" + (" --device cuda" if given.device == "cuda" else "")
            if group == "save":
                from bench.survive_cost import measure_cost

                result = measure_cost(Path(name), given.device)
            else:
                runs = given.runs or COUNTS[group]
                command += f" --runs {runs}"
                if given.jobs > 1:
                    command += f" --jobs {given.jobs}"
                    result = side_by_side(group, Path(name), given.device, runs, given.jobs)
                else:
                    result = measure(group, Path(name) / group, given.device, runs, SEED)
                faults += sum(result["faults"].values())
            found[f"{group}, {given.device}"] = {"command": command, **facts_of(given.device), **result}
            given.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
            print(group, json.dumps(result, indent=1), flush=True)
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
