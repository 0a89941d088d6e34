"""Does Veneer learn from pairs what TRL's DPOTrainer learns? 200 steps of SmolLM2 in float32, on a CPU.

Both start from one adapter, that of the demo's run, which is the reference as well, and read the same tokens in the
same order, two pairs a step, at a constant rate. Veneer's side is `veneer train` itself, on the bundled pairs.

    python3 -m bench.prefer curve --start runs/demo --python /tmp/trl/bin/python

where the other Python has torch, transformers, peft, datasets and trl 1.16. Losses and margins are smoothed over 20
steps; the figure is the largest difference of smoothed values, relative to TRL's. Writes
bench/results/prefer-curve.json and .png.
"""

import json
import subprocess
import tempfile
import time
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

import veneer
from bench.curve import SMOOTHED, smooth
from veneer.cli.demo import SYSTEM_PROMPT
from veneer.config import Data, Model, Run
from veneer.config.files import read_json_lines
from veneer.data.batch import Batches
from veneer.data.pipeline import prepare
from veneer.data.render import Renderer
from veneer.machine.device import find_machine
from veneer.machine.environment import environment
from veneer.model.load import load_tokenizer
from veneer.model.locate import locate

RESULTS = Path(__file__).parent / "results"
PAIRS, RATE, BETA, SEED = 2, 5e-5, 0.1, 42


def run_of(start: Path, folder: Path, steps: int) -> Run:
    """Veneer's run."""
    pairs = resources.files("veneer.data").joinpath("demo", "pairs.jsonl")
    return Run.model_validate(
        {
            "model": {"base": "smollm2-135m-instruct", "dtype": "float32", "adapter": str(start)},
            "data": {"train": str(pairs), "validation": 0, "system_prompt": SYSTEM_PROMPT, "max_length": 512},
            "train": {
                "output_dir": folder,
                "objective": "dpo",
                "dpo": {"beta": BETA},
                "max_steps": steps,
                "per_device_train_batch_size": PAIRS,
                "gradient_accumulation_steps": 1,
                "learning_rate": RATE,
                "lr_scheduler_type": "constant",
                "warmup_ratio": 0,
                "optim": "adamw_torch",
                "gradient_checkpointing": False,
                "logging_steps": 1,
                "seed": SEED,
            },
        }
    )


def ordered_rows(run: Run, steps: int) -> tuple[Path, list[dict[str, Any]]]:
    """Return the base's folder, and the pairs of all steps in their order, as tokens and as text."""
    source = locate(Model(base=run.model.base))
    tokenizer = load_tokenizer(source)
    data: Data = run.data
    part = prepare(data, Renderer(tokenizer, data), SEED).train
    batches = Batches(part, part.lengths, PAIRS, 1, SEED, documents_per_row=2)
    rows = []
    for number in range(steps):
        for micro_batch in batches.members_of_step(number):
            for chosen, rejected in zip(micro_batch[::2], micro_batch[1::2], strict=True):
                row: dict[str, Any] = {}
                for name, member in (("chosen", chosen), ("rejected", rejected)):
                    (first, last, _), *_ = part[member].spans
                    ids = part[member].ids[:last].tolist()
                    row[f"{name}_ids"], row["prompt_ids"] = ids[first:], ids[:first]
                    row[name], row["prompt"] = tokenizer.decode(ids[first:]), tokenizer.decode(ids[:first])
                rows.append(row)
    return Path(source.reference), rows


def compare(start: Path, python: Path, steps: int) -> None:
    """Both runs, one after the other; then the differences."""
    seconds: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        run = run_of(start, work / "run", steps)
        base, rows = ordered_rows(run, steps)
        (work / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        began = time.process_time()
        veneer.train(run)
        seconds["veneer"] = time.process_time() - began
        records = [record for record in read_json_lines(work / "run" / "metrics.jsonl") if record["kind"] == "train"]
        ours = {"loss": [r["loss"] for r in records], "margin": [r["rewards/margins"] for r in records]}
        command = [str(python), str(Path(__file__).with_name("prefer_trl.py")), str(work / "rows.jsonl"), str(base)]
        command += [str(start / "adapter"), str(work / "trl.json")]
        command += [str(value) for value in (PAIRS, RATE, BETA)]
        subprocess.run(command, check=True)
        theirs = json.loads((work / "trl.json").read_text())
    seconds["trl"] = theirs["seconds"]
    differences = {
        what: float(np.max(np.abs(smooth(ours[what]) / smooth(theirs[what]) - 1))) for what in ("loss", "margin")
    }
    plot(ours, theirs, differences)
    found = {
        "on": find_machine().name,
        "versions": {"veneer": environment()["libraries"], "trl": theirs["versions"]},
        "date": time.strftime("%Y-%m-%d"),
        "steps": steps,
        "pairs_of_a_step": PAIRS,
        "learning_rate": RATE,
        "largest_difference_from_trl": differences,
        "largest_difference_of_a_step": max(abs(a - b) for a, b in zip(ours["loss"], theirs["loss"], strict=True)),
        "cpu_seconds": {who: round(spent, 1) for who, spent in seconds.items()},
        **{f"{who}_{what}": [round(value, 6) for value in side[what]]
           for who, side in (("veneer", ours), ("trl", theirs)) for what in ("loss", "margin")},
    }  # fmt: skip
    (RESULTS / "prefer-curve.json").write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(differences))


def plot(ours: dict[str, list[float]], theirs: dict[str, list[float]], differences: dict[str, float]) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, both = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
    for axes, what in zip(both, ("loss", "margin"), strict=True):
        for label, values, style in (("TRL", theirs[what], "-"), ("Veneer", ours[what], "--")):
            axes.plot(range(SMOOTHED, len(values) + 1), smooth(values), style, label=label)
        axes.set(
            xlabel="step", ylabel=f"{what}, mean of {SMOOTHED} steps", title=f"{differences[what]:.2%} apart at most"
        )
        axes.legend()
    figure.suptitle("SmolLM2 on the demo's pairs, DPO in float32 on a CPU")
    figure.savefig(RESULTS / "prefer-curve.png", dpi=120)
