"""Identifies the model that evaluation scored, and reads its recorded answers.

`veneer evaluate` scores the adapter on its base in its bits: for QLoRA the 4-bit base. Its answers are in
samples.jsonl. What ships is compared with them row by row. They count only where evaluation.json says that they are of
this adapter, in this precision, with answers of this length; otherwise the same model answers the rows again.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from veneer.config import Run
from veneer.config.files import read_json, read_json_lines
from veneer.model.fingerprint import trained_sha256
from veneer.model.tuned import TunedModel


def judged_by(run: Run, adapter: Path, dtype: Any) -> dict[str, Any]:
    """Return what identifies the model that evaluation scores and how it answers; kept in evaluation.json."""
    return {
        "adapter_sha256": trained_sha256(adapter),
        "base": run.model.base,
        "quantization": run.quantization.model_dump(exclude={"cache"}) if run.quantization else None,
        "dtype": str(dtype).removeprefix("torch."),
        "max_new_tokens": run.evaluate.max_new_tokens,
    }


@dataclass(frozen=True)
class Recorded:
    """An answer that evaluation recorded."""

    reference: str
    text: str


def recorded_answers(tuned: TunedModel) -> dict[str, Recorded]:
    """Return answers of the tuned model by the place of their row; empty if none are of this very model."""
    if tuned.run is None or tuned.folder is None:
        return {}
    try:
        evaluation = read_json(tuned.folder.evaluation)
        if evaluation["judged"] != judged_by(tuned.run, tuned.adapter, tuned.dtype):
            return {}
        samples = read_json_lines(tuned.folder.samples)
        return {row["place"]: Recorded(row["reference"].strip(), row["tuned"]) for row in samples}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}  # an older Veneer's, or not written yet
