"""Measures the data pipeline: speed against TRL's, packing, the cache, and the memory of files larger than memory.

Every measurement is a process of its own with tokenizer threads off, so that one process means one core. What is timed
here is all of `prepare` (reading, recognising, personal data, masks, likeness, split, packing, the cache); of TRL its
`_prepare_dataset` alone, on rows that are in memory already. Loading the tokenizer is timed of neither. Writes
bench/results/data.json.

    .venv/bin/python bench/data.py --data FOLDER --trl PYTHON_WITH_TRL [--gigabytes 10] [--runs 5]
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from veneer.config import Data
from veneer.data.pipeline import prepare
from veneer.data.render import Renderer

HERE = Path(__file__).parent
BASE = "smollm2-135m-instruct"
FILES = ("gsm8k_train.jsonl", "alpaca_en_demo.json")
LENGTH = 2048


def ours(file: str, workers: int, tokenizer_folder: str) -> dict[str, Any]:
    """Prepare a file; what a child process does. It loads no torch, so its memory is that of the data."""
    from transformers import AutoTokenizer

    data = Data(train=file, validation=0, max_length=LENGTH, packing=True, workers=workers, duplicates="keep")
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    renderer = Renderer(tokenizer, data)
    began = time.perf_counter()
    prepared = prepare(data, renderer, seed=0)
    seconds = time.perf_counter() - began
    ledger = prepared.ledger.as_dict()
    return {
        "seconds": round(seconds, 3),
        "tokens": ledger["tokens"]["total"],
        "sequences": int(ledger["packing"]["packs"]),
        "efficiency": ledger["packing"]["efficiency"],
        "cached": ledger["cached"],
        "rows": ledger["rows"],
    }


def child(cache: str, *arguments: str) -> dict[str, Any]:
    """Run a measurement in a process of its own."""
    settings = os.environ | {"VENEER_CACHE": cache, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(arguments, capture_output=True, text=True, env=settings)
    if result.returncode:
        raise SystemExit(result.stderr[-3000:])
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return found


def _tokenizer() -> str:
    """The folder of SmolLM2's tokenizer."""
    from veneer.config import Model
    from veneer.model.locate import locate

    return os.environ.get("BENCH_TOKENIZER") or str(locate(Model(base=BASE)).location)


def me(cache: str, file: str, workers: int) -> dict[str, Any]:
    return child(cache, sys.executable, __file__, "--child", file, str(workers), _tokenizer())


def against_trl(folder: Path, trl: str, runs: int) -> dict[str, Any]:
    """Tokens a second of both, alternating, and how full the packs are."""
    tokenizer = _tokenizer()
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name in FILES:
            turns = Path(scratch) / "turns.json"
            turns.write_text(json.dumps(list(_turns(folder / name))))
            measured: dict[str, list[dict[str, Any]]] = {"veneer": [], "trl completion": [], "trl assistant": []}
            again = []
            for run in range(runs):
                cache = f"{scratch}/{name}-{run}"
                measured["veneer"].append(me(cache, str(folder / name), 1))
                again.append(me(cache, str(folder / name), 1))
                for loss in ("completion", "assistant"):
                    script = str(HERE / "data_trl.py")
                    measured[f"trl {loss}"].append(child(cache, trl, script, loss, str(turns), tokenizer, str(LENGTH)))
            result[name] = {who: _summary(found) for who, found in measured.items()}
            fastest = max(result[name][who]["tokens_per_second"] for who in measured if who != "veneer")
            result[name]["times_trl"] = round(result[name]["veneer"]["tokens_per_second"] / fastest, 2)
            assert all(found["cached"] for found in again)
            second = statistics.median(found["seconds"] for found in again)
            result[name]["second_start_seconds_per_million_tokens"] = round(second / again[0]["tokens"] * 1e6, 3)
            print(name, json.dumps(result[name]), flush=True)
    return result


def _turns(file: Path) -> Iterator[list[dict[str, str]]]:
    """The rows of the two files as turns."""
    text = file.read_text(encoding="utf-8")
    rows = json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in text.splitlines()]
    for row in rows:
        if "question" in row:
            asked, said = row["question"], row["answer"]
        else:
            asked = f"{row['instruction']}\n\n{row['input']}" if row["input"] else row["instruction"]
            said = row["output"]
        yield [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]


def _summary(found: list[dict[str, Any]]) -> dict[str, Any]:
    speeds = [run["tokens"] / run["seconds"] for run in found]
    return {
        "tokens_per_second": round(statistics.median(speeds)),
        "slowest": round(min(speeds)),
        "fastest": round(max(speeds)),
        "tokens": found[0]["tokens"],
        "sequences": found[0]["sequences"],
        "efficiency": found[0]["efficiency"],
    }


def scaling(folder: Path, runs: int) -> dict[str, Any]:
    """One process against two on a file of a hundred megabytes."""
    lines = (folder / FILES[0]).read_text(encoding="utf-8").splitlines()
    seconds: dict[int, list[float]] = {1: [], 2: []}
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "large.jsonl"
        with file.open("w", encoding="utf-8") as out:
            for copy in range(12):
                out.writelines(line.replace('"question": "', f'"question": "Copy {copy}. ', 1) + "\n" for line in lines)
        for run in range(runs):
            for workers in seconds:
                found = me(f"{scratch}/{run}-{workers}", str(file), workers)
                seconds[workers].append(found["seconds"])
        tokens = found["tokens"]
    medians = {workers: statistics.median(times) for workers, times in seconds.items()}
    return {
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_second": {workers: round(tokens / median) for workers, median in medians.items()},
        "times_one_process": round(medians[1] / medians[2], 2),
    }


def large(gigabytes: float, workers: int) -> dict[str, Any]:
    """Peak memory of this process's children on a file larger than memory should be: generated, then prepared."""
    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCH_TMP")) as scratch:
        file = Path(os.environ.get("BENCH_FILE") or f"{scratch}/large.jsonl")
        if not file.exists():
            _generate(file, int(gigabytes * 1e9))
        peak = {"tree": 0, "main": 0}
        done = threading.Event()

        def watch() -> None:
            """Resident memory of the measured process and its workers; shared pages count in each of them."""
            while not done.wait(0.25):
                family = psutil.Process().children(recursive=True)
                sizes = []
                for process in family:
                    try:
                        sizes.append(process.memory_info().rss)
                    except psutil.NoSuchProcess:
                        continue
                peak["tree"] = max(peak["tree"], sum(sizes))
                peak["main"] = max(peak["main"], max(sizes, default=0))

        watcher = threading.Thread(target=watch)
        watcher.start()
        began = time.perf_counter()
        try:
            found = me(f"{scratch}/cache", str(file), workers)
        finally:
            done.set()
            watcher.join()
        return {
            "file_bytes": file.stat().st_size,
            "workers": workers,
            "wall_seconds": round(time.perf_counter() - began, 1),
            "peak_resident_gib_of_all_processes": round(peak["tree"] / 2**30, 3),
            "peak_resident_gib_of_the_largest": round(peak["main"] / 2**30, 3),
        } | found


def _generate(file: Path, size: int) -> None:
    """Distinct rows of about 1.1 kB of made-up words."""
    rng = random.Random(0)
    syllables = [a + b for a in "bcdfghklmnprstvw" for b in ("a", "e", "i", "o", "u", "an", "er", "in", "or", "us")]
    words = ["".join(rng.choices(syllables, k=rng.randint(3, 6))) for _ in range(50_000)]
    written = 0
    with file.open("w", encoding="utf-8") as out:
        while written < size:
            block = []
            for _ in range(1000):
                said = rng.choices(words, k=rng.randint(50, 150))
                cut = len(said) // 3
                row = {"prompt": " ".join(said[:cut]) + "?", "completion": " ".join(said[cut:]) + "."}
                block.append(json.dumps(row) + "\n")
            text = "".join(block)
            written += len(text)
            out.write(text)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, help="folder of gsm8k_train.jsonl and alpaca_en_demo.json")
    parser.add_argument("--trl", help="Python of an environment with TRL")
    parser.add_argument("--gigabytes", type=float, default=0.0, help="size of the large file; 0: leave it out")
    parser.add_argument("--workers", type=int, default=2, help="processes for the large file")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--child", nargs=3, metavar=("FILE", "WORKERS", "TOKENIZER"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        print(json.dumps(ours(given.child[0], int(given.child[1]), given.child[2])))
        return
    from veneer.machine.device import find_machine
    from veneer.machine.environment import environment

    path = HERE / "results" / "data.json"
    result: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    on = {"machine": find_machine().describe(), "environment": environment(), "runs": given.runs}
    if given.trl:
        version = subprocess.run(
            [given.trl, "-c", "import trl; print(trl.__version__)"], capture_output=True, text=True, check=True
        )
        on["trl_version"] = version.stdout.strip()
        result["against_trl"] = on | against_trl(given.data, given.trl, given.runs)
        result["scaling"] = on | scaling(given.data, min(3, given.runs))
        print("scaling", json.dumps(result["scaling"]), flush=True)
    if given.gigabytes:
        result["large"] = on | large(given.gigabytes, given.workers)
        print("large", json.dumps(result["large"]), flush=True)
    path.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
