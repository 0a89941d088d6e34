"""Does a training that goes wrong end as its policy says? Three faults under each policy of `train.on_divergence`.

    OMP_NUM_THREADS=1 python -m bench.diverge          # a minute on a core; no GPU

A tiny random model is trained on 16 rows by `veneer train`, in processes of their own:

nan       the engine's loss is NaN at step 6
row       the base cannot bear one sign, which the seventh row has: its loss is NaN wherever it comes
rate      the rate rises to 0.3 over an adapter on the head, where 0.1 is bearable

Told of each: exit status, the steps that were left out, rollbacks, the last factor of the rate, whether the message
names the broken row and it alone, and whether every number of the adapter is finite. The run that goes back because of
its rate is made once more, killed by SIGKILL after the record of a rollback, and resumed: the adapter must be the same,
bit for bit.
Writes bench/results/diverge.json.
"""

import argparse
import hashlib
import json
import os
import platform
import signal
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

RESULTS = Path(__file__).parent / "results" / "diverge.json"
POLICIES = ("stop", "skip", "rollback")
FAULTS = ("nan", "row", "rate")
STEPS, NAN_AT = 30, 6
SIGN = "~"
# What is to come of each: exit status, and whether there are rollbacks or updates that were left out.
EXPECTED = {
    ("nan", "stop"): (1, False),
    ("nan", "skip"): (0, True),
    ("nan", "rollback"): (0, True),
    ("row", "stop"): (1, False),
    ("row", "skip"): (0, True),
    ("row", "rollback"): (1, True),
    ("rate", "stop"): (1, False),
    ("rate", "skip"): (1, True),
    ("rate", "rollback"): (0, True),
}
RUN = """model: {{base: {base}, dtype: float32}}
adapter: {{r: 4, lora_alpha: 64, target_modules: [q_proj, lm_head]}}
data: {{train: {folder}/rows.jsonl, validation: 0, max_length: 128}}
train: {{output_dir: {folder}/{name}, max_steps: {steps}, per_device_train_batch_size: 4,
  gradient_accumulation_steps: 1, learning_rate: {rate}, warmup_ratio: 0.5, save_steps: 5,
  gradient_checkpointing: false, on_divergence: {policy}}}
"""


def in_process(work: Any) -> int:
    """Exit status of a function in a fork; -9 where it was killed."""
    child = os.fork()
    if child == 0:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        try:
            work()
        except SystemExit as end:
            os._exit(int(end.code or 0))
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def train(file: Path, fault: str, kills: bool) -> None:
    """Run `veneer train`, with the fault; `kills`: by SIGKILL, once the run has gone back."""
    from veneer.cli.main import main
    from veneer.engine.reference import ReferenceEngine
    from veneer.training.metrics import MetricsFile

    forward_backward, append, count = ReferenceEngine.forward_backward, MetricsFile.append, 0

    def wrong(engine: Any, batch: Any, objective: Any) -> Any:
        nonlocal count
        count += 1
        output = forward_backward(engine, batch, objective)
        return output._replace(loss=output.loss * float("nan")) if count == NAN_AT else output

    def appended(metrics: Any, record: Any) -> None:
        append(metrics, record)
        if kills and record["kind"] == "divergence":
            os.kill(os.getpid(), signal.SIGKILL)

    if fault == "nan":
        ReferenceEngine.forward_backward = wrong  # type: ignore[method-assign, assignment]
    MetricsFile.append = appended  # type: ignore[method-assign, assignment]
    main(["train", str(file), "--resume", "auto"])


def trial(base: Path, folder: Path, fault: str, policy: str) -> dict[str, Any]:
    """One fault under one policy."""
    rate, name = (0.3 if fault == "rate" else 0.01), f"{fault}-{policy}"
    file = folder / f"{name}.yaml"
    file.write_text(RUN.format(base=base, folder=folder, name=name, steps=STEPS, rate=rate, policy=policy))
    status = in_process(lambda: train(file, fault, kills=False))
    found = told(folder / name) | {"fault": fault, "policy": policy, "status": status}
    status_expected, acts = EXPECTED[fault, policy]
    found["as_expected"] = status == status_expected and acts == bool(found["skipped"] + found["rollbacks"])
    if fault == "row":
        found["as_expected"] &= found["names_row_alone"]
    if (policy, fault) == ("rollback", "rate"):  # of the others one leaves no adapter, and one is planted by count
        file.write_text(file.read_text().replace(f"{folder}/{name},", f"{folder}/{name}-killed,"))
        killed = in_process(lambda: train(file, fault, kills=True))
        in_process(lambda: train(file, fault, kills=False))
        again = told(folder / f"{name}-killed")
        found["same_when_killed"] = killed == -signal.SIGKILL and again["adapter"] == found["adapter"]
        found["as_expected"] &= found["same_when_killed"]
    return found


def told(run: Path) -> dict[str, Any]:
    """What a run's folder says of its divergences."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    said = run / "events.jsonl"
    events = [json.loads(line)["message"] for line in said.read_text().splitlines()] if said.exists() else []
    divergences = [record for record in records if record["kind"] == "divergence"]
    weights = run / "adapter" / "adapter_model.safetensors"
    return {
        "skipped": sum(record["action"] == "skip" for record in divergences),
        "rollbacks": sum("goes back to its checkpoint" in event for event in events),
        "rate_factor": divergences[-1]["rate_factor"] if divergences else 1.0,
        "names_row_alone": any("one is off: rows.jsonl:7 (loss nan)" in event for event in events),
        "final_loss": next((r["loss"] for r in reversed(records) if r["kind"] == "train"), None),
        "adapter": hashlib.sha256(weights.read_bytes()).hexdigest()[:16] if weights.exists() else None,
        "finite": all(t.isfinite().all().item() for t in load_file(weights).values()) if weights.exists() else None,
    }


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    from tests.support.runs import some_rows, write_rows
    from tests.support.tiny import FAMILIES, save_tiny_model, tiny_tokenizer

    torch.set_num_threads(1)
    trials = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["VENEER_CACHE"] = str(folder / "cache")
        save_tiny_model(FAMILIES["llama"], folder / "whole")
        kind, sizes = FAMILIES["gemma2"]  # it scales what is embedded, here beyond what float32 holds
        save_tiny_model((kind, sizes | {"tie_word_embeddings": False}), folder / "broken")
        tensors = load_file(folder / "broken" / "model.safetensors")
        tensors["model.embed_tokens.weight"][tiny_tokenizer().encode(SIGN, add_special_tokens=False)[0]] = 3e38
        save_file(tensors, folder / "broken" / "model.safetensors", {"format": "pt"})
        rows = some_rows()
        rows[6]["completion"] += SIGN
        write_rows(folder / "rows.jsonl", rows)
        for fault in FAULTS:
            for policy in POLICIES:
                trials.append(trial(folder / ("broken" if fault == "row" else "whole"), folder, fault, policy))
                print(json.dumps(trials[-1]), flush=True)
    machine = {"python": platform.python_version(), "torch": torch.__version__, "machine": platform.machine()}
    result = {"date": str(date.today()), **machine, "command": "python -m bench.diverge", "trials": trials}
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    wrong = [f"{one['fault']} under {one['policy']}" for one in trials if not one["as_expected"]]
    print("all as expected" if not wrong else f"not as expected: {', '.join(wrong)}")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
