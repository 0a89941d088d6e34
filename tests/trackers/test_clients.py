"""Runs that are stopped and resumed, reported through the real clients in their offline modes, and read back.

The clients are extras that the tests' environment lacks; `make test-trackers` makes one that has them. A client that
is missing there fails its test.
"""

import json
import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.runs import some_rows, tiny_run, write_rows
from veneer.config import RunFolder
from veneer.config.load import to_yaml
from veneer.training.metrics import read_metrics

# Trains to a stop at step 3 and then on, as two processes do.
TWICE = """
import sys, veneer
from pathlib import Path
from veneer.config import Interrupted
run = veneer.load_run(sys.argv[1])
def stop(record):
    if record["step"] == 3:
        raise Interrupted(Path())
if sys.argv[2] == "first":
    try:
        veneer.train(run, listeners=[stop])
    except Interrupted:
        pass
else:
    veneer.train(run, resume=True)
"""


@pytest.fixture
def train(tiny_model: Callable[..., Path], tmp_path: Path) -> Callable[..., RunFolder]:
    def train(tracker: str, **environment: str) -> RunFolder:
        rows = write_rows(tmp_path / "rows.jsonl", some_rows())
        settings: dict[str, Any] = {"eval_steps": 2, "save_steps": 2, "report_to": (tracker,)}
        run = tiny_run(tiny_model(), rows, tmp_path / "tracked", data={"validation": 2}, train=settings)
        (tmp_path / "run.yaml").write_text(to_yaml(run))
        for part in ("first", "second"):
            done = subprocess.run(
                [sys.executable, "-c", TWICE, str(tmp_path / "run.yaml"), part],
                cwd=tmp_path,
                env=os.environ | environment | {"VENEER_CACHE": str(tmp_path / "cache")},
                capture_output=True,
                text=True,
            )
            assert done.returncode == 0, done.stderr
            assert done.stdout == ""
            assert f"train.report_to: {tracker}: " in done.stderr
            assert f"warning: train.report_to: {tracker}" not in done.stderr
        return RunFolder(run.train.output_dir)

    return train


def losses_of(folder: RunFolder, kind: str) -> dict[int, float]:
    return {one["step"]: one["loss"] for one in read_metrics(folder.metrics) if one["kind"] == kind}


def id_of(folder: RunFolder, tracker: str) -> str:
    return str(json.loads((folder.trackers / f"{tracker}.json").read_text())["id"])


@pytest.mark.filterwarnings("ignore")  # MLflow's own use of SQLAlchemy
def test_mlflow(train: Callable[..., RunFolder], tmp_path: Path) -> None:
    from mlflow import MlflowClient

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    folder = train("mlflow", MLFLOW_TRACKING_URI=uri)
    client = MlflowClient(uri)
    run = client.get_run(id_of(folder, "mlflow"))
    assert (run.info.run_name, run.info.status) == ("tracked", "FINISHED")
    assert run.data.params["adapter.r"] == "4"
    assert {file.path for file in client.list_artifacts(run.info.run_id)} == {"run.yaml", "plan.json", "ledger.json"}
    for kind in ("train", "eval"):
        history = client.get_metric_history(run.info.run_id, f"{kind}/loss")
        assert {metric.step: metric.value for metric in history} == losses_of(folder, kind)


def test_trackio(train: Callable[..., RunFolder], tmp_path: Path) -> None:
    folder = train("trackio", TRACKIO_DIR=str(tmp_path / "trackio"))
    with sqlite3.connect(tmp_path / "trackio" / "veneer.db") as database:
        rows = database.execute("select run_name, step, metrics from metrics").fetchall()
    assert {name for name, _, _ in rows} == {id_of(folder, "trackio")}
    for kind in ("train", "eval"):
        logged = [(step, json.loads(metrics).get(f"{kind}/loss")) for _, step, metrics in rows]
        assert {step: loss for step, loss in logged if loss is not None} == losses_of(folder, kind)


def test_wandb(train: Callable[..., RunFolder]) -> None:
    folder = train("wandb", WANDB_MODE="offline")
    files = sorted(folder.trackers.glob("wandb/offline-run-*/*.wandb"))
    assert [file.stem for file in files] == [f"run-{id_of(folder, 'wandb')}"] * 2
    held = b"".join(map(_without_headers, files))
    for kind in ("train", "eval"):
        assert f"{kind}/loss".encode() in held
        assert all(json.dumps(loss).encode() in held for loss in losses_of(folder, kind).values())
    assert b"tracked" in held
    assert b"lora_alpha" in held


def _without_headers(file: Path) -> bytes:
    """The records of a file of W&B, which are not compressed: each block of 32 KiB begins with a header of 7 bytes."""
    data = file.read_bytes()
    return b"".join(data[start + 7 : start + 2**15] for start in range(0, len(data), 2**15))
