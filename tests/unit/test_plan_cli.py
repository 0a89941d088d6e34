"""`veneer plan`, `veneer doctor`, and what `train` foresees."""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.support.runs import tiny_run, write_rows
from veneer.cli.main import main
from veneer.config import load_run
from veneer.config.load import to_yaml
from veneer.machine.device import Machine
from veneer.model.known import MODEL_SIZES
from veneer.planning.doctor import examine_machine
from veneer.planning.target import CONTEXT
from veneer.training.job import TrainingJob

Call = Callable[..., tuple[int, str, str]]
PLANNED = {"peak_bytes", "peak_phase", "fits", "verdict", "margin_bytes", "components", "phases", "advice", "changes"}


@pytest.fixture
def call(capfd: pytest.CaptureFixture[str]) -> Call:
    """Runs a command; gives its exit status, standard output and standard error."""

    def run(*arguments: str) -> tuple[int, str, str]:
        capfd.readouterr()
        with pytest.raises(SystemExit) as caught:
            main(list(arguments))
        out, err = capfd.readouterr()
        return int(caught.value.code or 0), out, err

    return run


@pytest.fixture
def run_file(tiny_model: Callable[..., Path], tmp_path: Path, rows: list[dict[str, Any]]) -> Path:
    train = write_rows(tmp_path / "rows.jsonl", rows)
    run = tiny_run(tiny_model(), train, tmp_path / "runs" / "tiny", data={"validation": 2})
    path = tmp_path / "tiny.yaml"
    path.write_text(to_yaml(run))
    return path


@pytest.fixture
def short_ladder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the bases that a place is compared with, the smallest two."""
    monkeypatch.setattr("veneer.planning.model_sizes.MODEL_SIZES", MODEL_SIZES[:2])


@pytest.mark.usefixtures("short_ladder")
def test_a_plan_speaks_json_alone_and_reads_the_data(call: Call, run_file: Path) -> None:
    status, out, _ = call("plan", str(run_file), "--gpu", "rtx 4090", "--json", "--compare")
    assert status == 0
    plan = json.loads(out)
    assert set(plan) >= PLANNED | {"compare", "step_seconds", "tokens_per_second", "host_bytes", "disk_bytes"}
    assert plan["verdict"] == "fits"
    assert plan["rows"]["unread"] is None
    assert plan["target"]["name"].startswith("rtx 4090")
    assert plan["peak_bytes"] == sum(plan["components"].values())
    assert plan["margin_bytes"] == 24564 * 2**20 - CONTEXT - plan["peak_bytes"]
    assert not (run_file.parent / "runs").exists(), "a plan writes nothing"


@pytest.mark.usefixtures("short_ladder")
def test_a_plan_for_a_person_names_phase_verdict_and_advice(call: Call, run_file: Path) -> None:
    status, out, err = call("plan", str(run_file), "--gpu", "24GiB", "adapter.lora_alpha=1", "--compare")
    assert status == 0
    shown = out + err
    for word in ("fits", "backward", "alpha-low", "full", "80GiB", "QLoRA"):
        assert word in shown


def test_what_does_not_fit_is_changed_until_it_does(call: Call, tmp_path: Path) -> None:
    path, fitted = tmp_path / "run.yaml", tmp_path / "fitted.yaml"
    path.write_text(
        "model: {base: meta-llama/Llama-3.1-8B}\ndata: {train: rows.jsonl, max_length: 1024, validation: 0}\n"
        "train: {per_device_train_batch_size: 1}\n"
    )
    status, out, _ = call("plan", str(path), "--gpu", "rtx 3060", "--fit", str(fitted), "--json", "--no-data")
    assert status == 0
    plan = json.loads(out)
    assert plan["verdict"] == "does not fit"
    assert {change["id"] for change in plan["changes"]} >= {"4-bit"}
    assert load_run(fitted).quantization is not None
    status, out, _ = call("plan", str(fitted), "--gpu", "rtx 3060", "--json", "--no-data")
    assert json.loads(out)["verdict"] == "fits"
    status, _, err = call("plan", str(path), "--gpu", "1GiB", "--fit", str(tmp_path / "none.yaml"), "--no-data")
    assert status == 1
    assert "nothing makes this run fit" in err
    assert not (tmp_path / "none.yaml").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--gpu", "24"], "a number without a unit"),
        (["--gpu", "rtx 4095"], "nearest: rtx 40"),
        (["--gpu=-8GiB"], "more than nothing"),
        (["--gpu", "0GiB"], "more than nothing"),
        (["--fit", "nowhere/x.yaml"], "the folder does not exist"),
        (["adapter.target_modules=[q_prj]"], "nearest: q_proj"),
        (["model.base=nowhere/at/all"], "model.base"),
    ],
)
def test_bad_input_is_refused(call: Call, run_file: Path, arguments: list[str], said: str) -> None:
    status, out, err = call("plan", str(run_file), *arguments)
    assert (status, out) == (2, "")
    assert said in err
    assert "Traceback" not in err


@pytest.mark.usefixtures("short_ladder")
def test_the_doctor_speaks_json_alone(call: Call) -> None:
    status, out, _ = call("doctor", "--json")
    found = json.loads(out)
    assert status == (1 if found["problems"] else 0)
    assert set(found) >= {"machine", "usable", "problems", "trains", "budget_bytes", "versions", "disk_free_bytes"}
    assert found["trains"][0]["base"] == "HuggingFaceTB/SmolLM2-135M"
    assert "from the Q4_1 GGUF file" in found["builtin"]["smollm2-135m-instruct"]
    assert "not the 16-bit weights of HuggingFaceTB/" in found["builtin"]["smollm2-135m-instruct"]
    assert found["trains"][0]["best"]


@pytest.mark.usefixtures("short_ladder")
def test_the_doctor_exits_1_with_the_fix(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    sound = examine_machine()
    monkeypatch.setattr("veneer.api.doctor.examine_machine", lambda: replace(sound, outdated=["peft>=99 (found 1)"]))
    status, out, err = call("doctor")
    assert status == 1
    assert "peft>=99" in out + err
    assert "pip install" in out + err


def test_a_run_that_cannot_fit_is_refused_before_it_loads_anything(
    call: Call, run_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = Machine("cpu", "a small machine", 2, 2**29, 2**28, True)
    monkeypatch.setattr(sys.modules["veneer.training.parts"], "find_machine", lambda: small)
    status, _, err = call("train", str(run_file))
    assert status == 2
    assert "the run does not fit" in err
    assert "0.2 GiB are there" in err
    assert not (run_file.parent / "runs").exists()
    status, _, _ = call("train", str(run_file), "--force", "train.max_steps=1")
    assert status == 0


def test_what_was_foreseen_is_kept_with_the_run_and_agrees_with_it(run_file: Path) -> None:
    job = TrainingJob(load_run(run_file))
    job.fit()
    plan = json.loads(job.folder.plan.read_text())
    assert plan["parameters"] == job.parameters
    assert plan["parameters"]["trainable"] == job.prediction.forecast.trainable
    assert plan["steps"] == plan["rows"]["steps"]
    assert plan["peak_bytes"] == job.prediction.forecast.peak_bytes
    assert isinstance(plan["advice"], list)
    longest = max(len(example.ids) for example in job.data.train)
    assert plan["rows"]["fullest"]["length"] == longest


def test_a_warning_is_shown_before_training_and_does_not_stop_it(call: Call, run_file: Path) -> None:
    status, out, err = call("train", str(run_file), "adapter.lora_alpha=1", "train.max_steps=1")
    assert status == 0
    assert "alpha-low" in out + err
