"""How long a plan takes to follow a step on meta tensors: one forecast of an 8B base in 4 bits, on one core.

    OMP_NUM_THREADS=1 python3 -m bench.dry_run
    OMP_NUM_THREADS=1 PYTHONPATH=other/src:. python3 -m bench.dry_run --name before    # the same of other sources

CPU seconds of `Planner.forecast` for 18 lengths of rows, each of which is followed anew, by either engine. The least
counts most: other work on the machine only adds. Merges them into bench/results/dry_run.json.
"""

import argparse
import json
import statistics
import time
from importlib import metadata
from pathlib import Path

from tests.support.plans import planner_of, run_of

RESULTS = Path(__file__).parent / "results" / "dry_run.json"


def seconds(engine: str, length: int) -> float:
    """CPU seconds of a forecast."""
    run = run_of(
        "meta-llama/Llama-3.1-8B", data={"max_length": length}, train={"engine": engine}, adapter={}, quantization={}
    )
    planner = planner_of(run, "h100")
    began = time.process_time()
    planner.forecast(run)
    return time.process_time() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="now")
    name = parser.parse_args().name
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    found[name] = {"versions": {one: metadata.version(one) for one in ("torch", "transformers")}, "cores": 1}
    for engine in ("reference", "fused"):
        seconds(engine, 256)  # which imports what it needs
        times = [seconds(engine, length) for length in range(512, 1664, 64)]
        found[name][engine] = {"least": round(min(times), 3), "median": round(statistics.median(times), 3)}
        print(json.dumps({"of": name, "engine": engine} | found[name][engine]), flush=True)
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
