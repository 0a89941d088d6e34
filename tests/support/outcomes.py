"""What a tiny run comes to, as text that two runs can be compared by: its rows, training, answers and plan.

An outcome holds results alone. What merely repeats a setting (run.yaml, the card, advice) or measures time is left out.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import veneer
from veneer.api.train import load_job
from veneer.config import JobError, Run, RunFolder, UserError
from veneer.data.pipeline import prepare
from veneer.model.classifier import make_renderer
from veneer.model.load import load_tokenizer
from veneer.model.locate import locate
from veneer.training.metrics import read_metrics

TIMED = {"time", "seconds", "tokens_per_second", "peak_bytes", "predicted_peak_bytes"}


def rows_of(run: Run) -> Any:
    """The ledger, with the hash of all tokens and their weights."""
    made = prepare(run.data, make_renderer(run, load_tokenizer(locate(run.model))), run.train.seed)
    return _without(made.ledger.as_dict(), {"seconds", "cached", "warnings"})


def training_of(run: Run) -> Any:
    """Every line of metrics.jsonl, the adapter, and the names of all files, those beside a local base as well."""
    load_job(run).fit()
    folder = RunFolder(run.train.output_dir)
    files = sorted(str(path) for path in (*Path().rglob("*"), *Path(run.model.base).rglob("*")))
    (weights,) = folder.delivered.glob("*.safetensors")
    adapter = hashlib.sha256(weights.read_bytes()).hexdigest()
    return {
        "metrics": [_without(line, TIMED) for line in read_metrics(folder.metrics)],
        "adapter": adapter,
        "files": files,
    }


def answers_of(run: Run) -> Any:
    """The scores and the answers of base and tuned model."""
    veneer.train(run)
    found = veneer.evaluate(run.train.output_dir)
    assert found.samples is not None
    return {"scores": _without(found.as_dict(), {"file"}), "answers": found.samples.read_text()}


def plan_of(run: Run) -> Any:
    """Memory and time on a GPU of 24 GiB."""
    return _without(veneer.plan(run, "rtx 4090").as_dict(), {"advice", "engine_reason"})


# The cheapest first.
VIEWS: tuple[Callable[[Run], Any], ...] = (rows_of, training_of, answers_of, plan_of)


def outcome(view: Callable[[Run], Any], run: Run) -> str:
    """One view of a run; the refusal, where it is refused, or the failure."""
    try:
        return json.dumps(view(run), sort_keys=True, default=str)
    except UserError as error:
        return f"refused: {error}"
    except JobError as error:
        return f"failed: {error}"


def _without(found: dict[str, Any], names: set[str]) -> dict[str, Any]:
    return {name: value for name, value in found.items() if name not in names}
