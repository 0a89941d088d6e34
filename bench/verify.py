"""How long do the checks take? The one before every run, and `veneer verify`, on random weights of a real shape.

    python -m bench.verify --folder /tmp/base-8b --tokenizer TOKENIZER              # makes 16 GB there if need be
    python -m bench.verify --shape tiny --folder /tmp/tiny --tokenizer TOKENIZER    # anywhere, in a minute

TOKENIZER is a folder with a chat template. Rows are sums. Writes bench/results/verify.json.

load_seconds    data, base in NF4, adapter
choose_seconds  the engine's check before a run, kernels compiled on the way
verify_seconds  all of `veneer verify` after it
"""

import argparse
import gc
import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.load import SHAPES, make

RESULTS = Path(__file__).parent / "results" / "verify.json"
ROWS = 200
RUN = """model: {{base: {folder}, dtype: bfloat16}}
quantization: {{}}
adapter: {{r: 16}}
data: {{train: {rows}}}
train: {{output_dir: {output}}}
"""


def measure(folder: Path) -> dict[str, Any]:
    from veneer.config import load_run
    from veneer.engine.choose import build, choose
    from veneer.training.parts import load_parts
    from veneer.training.verify import verify_parts

    with tempfile.TemporaryDirectory() as name:
        rows = Path(name) / "rows.jsonl"
        sums = [{"prompt": f"What is {n} plus {n * n}?", "completion": f"It is {n + n * n}."} for n in range(ROWS)]
        rows.write_text("".join(json.dumps(row) + "\n" for row in sums))
        written = Path(name) / "run.yaml"
        written.write_text(RUN.format(folder=folder, rows=rows, output=Path(name) / "run"))
        run = load_run(written, ())
        started = time.perf_counter()
        parts = load_parts(run)
        loaded = time.perf_counter()
        choice = choose(parts.model, run.train, parts.machine.device, parts.data.train)
        chosen = time.perf_counter()
        what = f"{choice.engine.name}: {choice.reason}"
        del choice  # one engine at a time, as in a run
        gc.collect()
        found = verify_parts(run, parts, build(parts.model, run.train, parts.machine.device))
        return {
            "machine": parts.machine.describe(),
            "load_seconds": round(loaded - started, 1),
            "choose_seconds": round(chosen - loaded, 1),
            "chosen": what,
            "verify_seconds": round(found.seconds, 1),
            "verify": found.as_dict(),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="8B")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=RESULTS)
    a = parser.parse_args()
    if not (a.folder / "config.json").exists():
        make(a.shape, a.folder)
    if not (a.folder / "tokenizer.json").exists():
        shutil.copytree(a.tokenizer, a.folder, dirs_exist_ok=True)
    found = {"shape": a.shape, "date": time.strftime("%Y-%m-%d")} | measure(a.folder)
    a.out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
