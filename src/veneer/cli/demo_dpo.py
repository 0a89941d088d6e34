"""veneer demo --dpo: the demo's run learns a rule of the desk from pairs of answers, and is compared with itself.

The rule is newer than the demo's labels: a record of a message that names no product says "none" and not null. The
pairs are training messages with the answer by the new rule, and one against it (tools/demo_pairs.py). Training starts
from the demo's adapter, which is the reference. The win rate over it is counted on the demo's test messages with their
answers by the new rule, on which no setting was chosen: a right answer beats a wrong one; two right or two wrong ones
tie.
"""

import json
import time
from importlib import resources
from pathlib import Path
from typing import Any

METRIC = "record"  # all keys of an answer are right


def demo_dpo(out: Any, sft: Path, output_dir: Path) -> dict[str, Any]:
    """Train on the bundled pairs, compare with the run that training started from, and print both.

    Args:
        out: console to print on.
        sft: folder of the demo's run.
        output_dir: folder of the new run.

    Returns:
        The evaluation with `win_rate`, the report of training, `wall_seconds` and `peak_resident_bytes`.
    """
    from veneer.api.train import finish
    from veneer.cli import show, show_demo
    from veneer.machine.device import peak_resident_bytes
    from veneer.training.job import TrainingJob

    started = time.perf_counter()
    out.print(f"[bold]1  The run[/bold] {sft} is where training starts, and the reference")
    job = TrainingJob(dpo_run(sft, output_dir))
    out.print('[bold]2  The pairs[/bold]: a new rule of the desk: no product is "none", not null')
    show.show_ledger(out, job.data.ledger.as_dict())
    show_demo.show_pair(out, json.loads(bundled("pairs.jsonl").read_text(encoding="utf-8").splitlines()[0]))
    out.print(f"[bold]3  Training[/bold] {job.steps} steps, after the reference's log-probabilities")
    with show.LiveProgress(out, job.steps) as progress:
        trained = finish(job, [progress])
    del job  # the comparison loads its models itself
    out.print("[bold]4  The win rate[/bold]: the run before and after answers the test messages")
    result = _compare(out, sft, output_dir)
    seconds, peak = time.perf_counter() - started, peak_resident_bytes()
    out.print(f"{seconds:.0f} s, at most {show.size(peak)} of memory")
    return result | trained.as_dict() | {"wall_seconds": round(seconds, 1), "peak_resident_bytes": peak}


def _compare(out: Any, sft: Path, tuned: Path) -> dict[str, Any]:
    """Let both runs answer the test messages, and print how often which one is right."""
    import veneer
    from veneer.cli import show, show_demo
    from veneer.evaluation.win_rate.win_rate import WinRate

    test = str(bundled("rule_test.jsonl"))
    rows = len(Path(test).read_text(encoding="utf-8").splitlines())
    with show.answer_progress(out, 2 * rows, "   answering") as on_done:
        evaluated = veneer.evaluate(str(tuned), test, on_done=on_done, against=str(sft))
    compared = evaluated.evaluation.comparison[METRIC]
    better, worse = len(compared.better_rows), len(compared.worse_rows)
    rate = WinRate(better, compared.rows - better - worse, worse, compared, longer_wins=None).as_dict()
    result = evaluated.as_dict() | {"win_rate": rate, "file": str(evaluated.file)}
    samples = evaluated.evaluation.samples()
    show_demo.show_win_rate(out, result, [one for one in samples if one["base_right"] != one["tuned_right"]])
    return result


def bundled(name: str) -> Path:
    """Return the path of a file of the demo's data."""
    return Path(str(resources.files("veneer.data").joinpath("demo", name)))


def dpo_run(sft: Path, output_dir: Path) -> Any:
    """Make the run; recipes/smollm2-dpo.yaml has the same settings, which were chosen on data/demo/dev.jsonl."""
    from veneer.cli.demo import demo_run

    run = demo_run(output_dir)
    changes: dict[str, dict[str, Any]] = {
        "model": {"adapter": str(sft)},
        "data": {"train": str(bundled("pairs.jsonl")), "validation": str(bundled("dev_pairs.jsonl"))},
        "train": {"objective": "dpo", "dpo": {"beta": 0.3, "rpo_alpha": 1.0}, "learning_rate": 5e-4},
    }
    settings = run.model_dump(mode="json", exclude_unset=True)
    return type(run).model_validate({name: settings[name] | changes.get(name, {}) for name in settings})
