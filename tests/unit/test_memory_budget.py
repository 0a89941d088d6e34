"""`train.memory_budget`: what a plan and a run make of it, and which ones are refused."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.support.runs import tiny_run, write_rows
from veneer.cli.main import main
from veneer.config import UserError, load_run
from veneer.config.load import to_yaml
from veneer.config.sizes import parse_size
from veneer.engine.placement import MemoryPlacement, Rates
from veneer.engine.reference import ReferenceEngine
from veneer.machine.device import Machine
from veneer.planning.base import PlannedModel
from veneer.planning.predict import predict_run
from veneer.planning.target import CONTEXT, DEFERRED, device_named, least_budget, this_device
from veneer.training import parts as training_parts
from veneer.training.job import TrainingJob
from veneer.training.same_settings import differences

GiB = 2**30
Call = Callable[..., tuple[int, str, str]]
CPU = Machine("cpu", "a CPU", 8, 32 * GiB, 30 * GiB, True)
CUDA = Machine("cuda", "NVIDIA H100", 8, 80 * GiB, 60 * GiB, True)


@pytest.fixture
def call(capfd: pytest.CaptureFixture[str]) -> Call:
    """Runs a command; gives its exit status, standard output and standard error."""

    def run(*arguments: str) -> tuple[int, str, str]:
        capfd.readouterr()
        with pytest.raises(SystemExit) as caught:
            main(list(arguments))
        out, err = capfd.readouterr()
        return int(caught.value.code or 0), out, " ".join(err.split())

    return run


@pytest.fixture
def run_file(tiny_model: Callable[..., Path], tmp_path: Path, rows: list[dict[str, Any]]) -> Path:
    train = write_rows(tmp_path / "rows.jsonl", rows)
    run = tiny_run(tiny_model(), train, tmp_path / "runs" / "tiny", train={"gradient_checkpointing": "auto"})
    path = tmp_path / "tiny.yaml"
    path.write_text(to_yaml(run))
    return path


def on(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let commands find another machine than this one."""
    monkeypatch.setattr("veneer.training.parts.find_machine", lambda: machine)
    monkeypatch.setattr("veneer.planning.target.find_machine", lambda: machine)


@pytest.mark.parametrize(
    ("text", "size"),
    [("12GiB", 12 * GiB), (" 1.5 gib ", 3 * GiB // 2), ("512MiB", GiB // 2), ("8GB", 8 * 10**9), ("9mb", 9 * 10**6)],
)
def test_sizes_are_read_with_their_unit(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "rtx 4090", "GiB", "1e3GiB", "12 GiB or so"])
def test_what_is_no_size_may_be_a_name(text: str) -> None:
    assert parse_size(text) is None


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("12", "a number without a unit"),
        ("12.5", "a number without a unit"),
        ("12potatoes", "an unknown unit `potatoes`"),
        ("0GiB", "more than nothing"),
        ("-4GiB", "more than nothing"),
        ("9" * 400 + "GiB", "larger than any memory"),
        ("lots", "not an amount of memory"),
        ("true", "string"),
        ("[12GiB]", "string"),
    ],
)
def test_a_budget_is_an_amount_with_its_unit(call: Call, run_file: Path, value: str, said: str) -> None:
    text = run_file.read_text().replace("memory_budget: auto", f"memory_budget: {value}")
    assert value in text
    run_file.write_text(text)
    for arguments in (["train", str(run_file)], ["plan", str(run_file), "--gpu", "24GiB"]):
        status, out, err = call(*arguments)
        assert (status, out) == (2, "")
        assert "train.memory_budget = " in err
        assert said in err
        assert "such as 12GiB" in err


def test_a_budget_on_a_cpu_is_refused_before_data_is_read(
    call: Call, run_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on(CPU, monkeypatch)
    monkeypatch.setattr("veneer.training.parts.prepare", lambda *_: pytest.fail("the data was read"))
    for command in ("train", "plan"):
        status, out, err = call(command, str(run_file), "train.memory_budget=12GiB")
        assert (status, out) == (2, "")
        assert "memory_budget is for CUDA GPUs; this machine trains on its CPU" in err
        assert "--gpu" in err
    on(replace(CPU, device="mps"), monkeypatch)
    assert "its MPS" in call("plan", str(run_file), "train.memory_budget=12GiB")[2]


@pytest.mark.parametrize(
    ("budget", "said", "fix"),
    [("12GiB", "the GPU has 8188 MiB", "8188MiB or less"), ("790MiB", "CUDA alone takes 790 MiB", "set it to more")],
)
def test_a_budget_that_no_run_can_keep_is_refused(
    call: Call, run_file: Path, monkeypatch: pytest.MonkeyPatch, budget: str, said: str, fix: str
) -> None:
    on(replace(CUDA, total_bytes=8188 * 2**20), monkeypatch)
    for arguments in (["train"], ["plan"], ["plan", "--gpu", "rtx 4060"]):
        status, out, err = call(arguments[0], str(run_file), *arguments[1:], f"train.memory_budget={budget}")
        assert (status, out) == (2, "")
        assert said in err
        assert fix in err


def test_a_budget_below_the_least_is_refused_with_the_least(
    call: Call, run_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on(CUDA, monkeypatch)
    status, out, err = call("train", str(run_file), "train.memory_budget=800MiB")
    assert (status, out) == (2, "")
    assert not (run_file.parent / "runs").exists()
    least = re.findall(r"the run needs at least (\S+GiB)", err)[0]
    assert f"set it to {least} or more" in err
    planned = call("plan", str(run_file), "train.memory_budget=800MiB", "--json")[1]
    assert json.loads(planned)["least_budget"] == least

    enough = load_run(run_file, [f"train.memory_budget={least}"])
    assert not predict_run(enough, this_device(CUDA, least), "the longest rows").cannot_fit
    less = f"{(parse_size(least) or 0) // 2**20 - 110}MiB"
    short = load_run(run_file, [f"train.memory_budget={less}"])
    assert predict_run(short, this_device(CUDA, less), "the longest rows").cannot_fit


def test_where_less_is_free_than_the_budget_raising_it_is_no_advice(
    call: Call, run_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on(replace(CUDA, free_bytes=DEFERRED + 2**20), monkeypatch)
    status, _, err = call("train", str(run_file), "train.memory_budget=12GiB")
    assert status == 2
    assert "0.0 GiB are there" in err
    assert "set it to" not in err


def test_host_memory_too_small_for_what_leaves_the_card_is_refused(
    call: Call, run_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on(CUDA, monkeypatch)
    made_up = MemoryPlacement((), host_bytes=48 * GiB)
    monkeypatch.setattr(PlannedModel, "placement", lambda *_: made_up)
    monkeypatch.setattr(training_parts, "this_device", lambda *_: replace(this_device(CUDA), host_bytes=24 * GiB))
    status, out, err = call("train", str(run_file))
    assert (status, out) == (2, "")
    assert "the run keeps 48.0 GiB in the host's memory, of which 24.0 GiB can be pinned now" in err
    assert "raise train.memory_budget" in err
    assert not (run_file.parent / "runs").exists()
    planned = json.loads(call("plan", str(run_file), "--json")[1])
    assert planned["host_bytes"] > 48 * GiB

    training_parts._require_host_memory(made_up, 48 * GiB)
    with pytest.raises(UserError, match=r"24\.0 GiB can be pinned"):
        training_parts._require_host_memory(made_up, 24 * GiB)


def test_a_plan_keeps_within_the_budget(call: Call, run_file: Path) -> None:
    status, out, _ = call("plan", str(run_file), "--gpu", "rtx 4090", "train.memory_budget=12GiB", "--json")
    assert status == 0
    plan = json.loads(out)
    assert plan["budget_bytes"] == 12 * GiB - CONTEXT
    assert "at most 12.0 GiB" in plan["target"]["name"]


def test_a_budget_lowers_what_is_free_and_never_raises_it() -> None:
    free = this_device(CUDA).budget_bytes
    assert free == CUDA.free_bytes - DEFERRED
    assert this_device(CUDA, "12GiB").budget_bytes == 12 * GiB - CONTEXT
    assert this_device(CUDA, "70GiB").budget_bytes == free
    assert device_named("24GiB", "24GiB") == replace(device_named("24GiB"), name=device_named("24GiB", "24GiB").name)
    assert this_device(CPU).within("12GiB") == this_device(CPU), "an evaluation elsewhere is no error"
    assert parse_size(least_budget(5 * GiB)) >= 5 * GiB + CONTEXT  # type: ignore[operator]


def test_the_engine_hears_of_the_budget_less_what_cuda_takes(run_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[int | None] = []

    def hears(
        self: ReferenceEngine, shapes: Any, setting: Any, later_bytes: int, budget_bytes: int | None, rates: Rates
    ) -> Any:
        heard.append(budget_bytes)
        assert rates.host_bytes < 2**60, "the host's memory is known here"
        return MemoryPlacement(())

    monkeypatch.setattr(ReferenceEngine, "plan_memory", hears)
    monkeypatch.setattr(training_parts, "this_device", lambda *_: replace(this_device(CPU), budget_bytes=9 * GiB))
    for budget in ("auto", "12GiB"):
        TrainingJob(load_run(run_file, [f"train.memory_budget={budget}"]))
    assert heard == [None, 9 * GiB]


def test_a_run_may_go_on_with_another_budget(run_file: Path) -> None:
    began = load_run(run_file, ["train.memory_budget=12GiB"])
    assert differences(began, load_run(run_file)) == {}
