"""Which engine a run gets, that it is checked first, and that both engines train the same."""

import json
from collections.abc import Callable
from pathlib import Path
from subprocess import CalledProcessError
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import veneer
from tests.support.engines import batch_of, model_of
from tests.support.notices import notified
from tests.support.runs import StopAt, losses, tiny_run, write_rows
from veneer.config import Interrupted, JobError, RunFolder, Train, UserError
from veneer.data.batch import Batch
from veneer.engine import choose
from veneer.engine.agreement import agree
from veneer.engine.fused.block import ACTIVATIONS
from veneer.engine.fused.engine import FusedEngine
from veneer.engine.objective import LIKELIHOOD, Objective, StepOutput
from veneer.engine.reference import ReferenceEngine
from veneer.kernels.launch import TritonError
from veneer.training.job import TrainingJob
from veneer.training.metrics import read_metrics
from veneer.training.optimizer import parameters_to_update

MakeRun = Callable[..., veneer.Run]
WRONG = "layers.1.mlp.down_proj.lora_A"


@pytest.fixture
def make_run(tiny_model: Callable[..., Path], tmp_path: Path, rows: list[dict[str, Any]]) -> MakeRun:
    """A run of a name, with an engine."""
    path = write_rows(tmp_path / "rows.jsonl", rows)

    def make(name: str, engine: str = "fused", family: str = "llama", **sections: Any) -> veneer.Run:
        sections["train"] = {"engine": engine} | sections.get("train", {})
        return tiny_run(tiny_model(family), path, tmp_path / name, **sections)

    return make


@pytest.fixture
def wrong_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fused engine that makes one matrix's gradient too large."""
    forward_backward = FusedEngine.forward_backward

    def wrong(self: FusedEngine, batch: Batch, objective: Objective) -> StepOutput:
        output = forward_backward(self, batch, objective)
        next(p for name, p in self.model.named_parameters() if WRONG in name).grad.mul_(1.5)
        return output

    monkeypatch.setattr(FusedEngine, "forward_backward", wrong)


@pytest.mark.parametrize(("optim", "checkpointing"), [("adamw_torch", False), ("adamw_32bit", True)])
def test_both_engines_train_the_same(optim: str, checkpointing: bool, make_run: MakeRun, tmp_path: Path) -> None:
    settings = {
        "optim": optim,
        "gradient_checkpointing": checkpointing,
        "gradient_accumulation_steps": 2,
        "max_grad_norm": 0.5,
        "eval_steps": 3,
    }
    for engine in ("fused", "reference"):
        job = TrainingJob(make_run(engine, engine, train=settings, data={"validation": 2}))
        assert job.engine.name == engine
        job.fit()
    for kind in ("train", "eval"):
        assert losses(tmp_path / "fused", kind) == pytest.approx(losses(tmp_path / "reference", kind), rel=1e-4)
    norms = [
        [line["grad_norm"] for line in read_metrics(RunFolder(tmp_path / name).metrics) if line["kind"] == "train"]
        for name in ("fused", "reference")
    ]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)
    plan = json.loads((tmp_path / "fused" / "plan.json").read_text())
    assert plan["engine"] == "fused"
    assert "gives the reference's numbers" in plan["engine_reason"]


@pytest.mark.parametrize(("optim", "rank"), [("adamw_torch", 3), ("adamw_8bit", 64), ("adamw_8bit", 3)])
def test_a_resumed_fused_run_is_the_one_that_was_not(optim: str, rank: int, make_run: MakeRun, tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "train": {"optim": optim, "save_steps": 2},
        "adapter": {"lora_dropout": 0.2, "r": rank},
        "quantization": {"bits": 4},
    }
    TrainingJob(make_run("whole", **settings)).fit()
    with pytest.raises(Interrupted):
        TrainingJob(make_run("cut", **settings)).fit((StopAt(3),))
    state = load_file(tmp_path / "cut" / "checkpoints" / "step-000002" / "optimizer.safetensors")
    # Blocks of 256 values with a common constant must not reach from one matrix into the next.
    assert ({name.rsplit("/")[0] for name in state} == {"master"}) == (rank == 64 or optim != "adamw_8bit")
    TrainingJob(make_run("cut", **settings), resume=True).fit()
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    whole, cut = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("whole", "cut"))
    for name, tensor in whole.items():
        assert torch.equal(tensor, cut[name])


def test_resuming_on_another_engine_is_refused(make_run: MakeRun) -> None:
    with pytest.raises(Interrupted):
        TrainingJob(make_run("run", train={"save_steps": 2})).fit((StopAt(3),))
    with pytest.raises(UserError, match=r"train\.engine: the run began with fused, .* would continue with reference"):
        TrainingJob(make_run("run", "auto"), resume=True)


def test_auto_means_the_reference_engine_off_cuda(make_run: MakeRun) -> None:
    choice = TrainingJob(make_run("run", "auto")).choice
    assert (choice.engine.name, choice.reason) == ("reference", "the fused engine is made for CUDA GPUs")


def test_auto_takes_the_fused_engine_where_it_covers_the_model(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choose, "FUSED_DEVICES", ("cpu",))
    assert TrainingJob(make_run("llama", "auto")).engine.name == "fused"
    choice = TrainingJob(make_run("opt", "auto", family="opt")).choice
    assert choice.engine.name == "reference"
    assert "does not cover the architecture opt" in choice.reason
    assert choice.warning is None
    assert "float16 compute" in TrainingJob(make_run("half", "auto", model={"dtype": "float16"})).choice.reason


@pytest.mark.parametrize(
    ("settings", "reason"),
    [({"family": "opt"}, "the architecture opt"), ({"model": {"dtype": "float16"}}, "float16 compute")],
)
def test_asking_for_the_fused_engine_where_it_cannot_is_an_error(
    settings: dict[str, Any], reason: str, make_run: MakeRun, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=rf"train\.engine = fused: .*{reason}.*\n.*set train\.engine to auto"):
        TrainingJob(make_run("run", **settings))
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("wrong_kernel")
def test_a_wrong_kernel_makes_the_run_fall_back_loudly(
    make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choose, "FUSED_DEVICES", ("cpu",))
    with notified(rf"most in model\.{WRONG} by 0\.5 .*goes on with the reference engine"):
        veneer.train(make_run("fallen", "auto"))
    veneer.train(make_run("plain", "reference"))
    assert losses(tmp_path / "fallen") == losses(tmp_path / "plain")
    plan = json.loads((tmp_path / "fallen" / "plan.json").read_text())
    assert plan["engine"] == "reference"
    assert WRONG in plan["engine_reason"]


@pytest.mark.usefixtures("wrong_kernel")
def test_a_wrong_kernel_that_was_asked_for_ends_the_run(make_run: MakeRun, tmp_path: Path) -> None:
    with pytest.raises(JobError, match=rf"train\.engine = fused: .*{WRONG}.*\n.*train\.engine to reference"):
        TrainingJob(make_run("run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("no kernel image is available\nfor execution"),
        TritonError("out of resource: no kernel image is available"),
        CalledProcessError(1, ["gcc", "no kernel image is available"]),
    ],
)
def test_a_kernel_that_cannot_run_makes_the_run_fall_back(
    error: Exception, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(self: FusedEngine, batch: Batch, objective: Objective) -> StepOutput:
        raise error

    monkeypatch.setattr(choose, "FUSED_DEVICES", ("cpu",))
    monkeypatch.setattr(FusedEngine, "forward_backward", fails)
    choice = TrainingJob(make_run("run", "auto")).choice
    assert choice.engine.name == "reference"
    assert "no kernel image is available" in (choice.warning or "")


def test_what_is_wrong_for_rows_of_one_length_alone_makes_the_run_fall_back(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU computes their attention in another way than that of packed rows."""
    forward_backward = FusedEngine.forward_backward

    def wrong(self: FusedEngine, batch: Batch, objective: Objective) -> StepOutput:
        output = forward_backward(self, batch, objective)
        return output._replace(loss=output.loss * (1.5 if len(set(batch.lengths)) == 1 else 1.0))

    monkeypatch.setattr(choose, "FUSED_DEVICES", ("cpu",))
    monkeypatch.setattr(FusedEngine, "forward_backward", wrong)
    assert "losses differ by 0.5" in (TrainingJob(make_run("run", "auto")).choice.warning or "")


def test_a_gpu_without_triton_gets_the_reference_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FusedEngine, "on_gpu", True)
    monkeypatch.setattr("veneer.engine.fused.engine.HAS_TRITON", False)
    choice = choose.build(model_of("llama"), Train(), "cuda")
    assert choice.engine.name == "reference"
    assert choice.reason == "the fused engine does not cover a machine without Triton"


@pytest.mark.parametrize("engine", ["fused", "reference"])
def test_a_gradient_that_is_not_finite_reaches_no_file(
    engine: str, make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = TrainingJob(make_run("run", engine, train={"save_steps": 1}))
    forward_backward, count = job.engine.forward_backward, 0

    def breaks(batch: Batch, objective: Objective) -> StepOutput:
        nonlocal count
        count += 1
        output = forward_backward(batch, objective)
        if count == 3:
            next(p for name, p in job.model.named_parameters() if WRONG in name).grad[0, 0] = float("inf")
        return output

    monkeypatch.setattr(job.engine, "forward_backward", breaks)
    with pytest.raises(JobError, match="the gradient of step 3 is not finite"):
        job.fit()
    assert [path.name for path in sorted((tmp_path / "run" / "checkpoints").iterdir())] == [
        "step-000001",
        "step-000002",
    ]
    assert not (tmp_path / "run" / "adapter").exists()
    assert len(losses(tmp_path / "run")) == 2


def test_the_check_leaves_everything_as_it_was() -> None:
    model, engine_batch = model_of("llama", lora_dropout=0.3), batch_of()
    engine = FusedEngine(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    torch.manual_seed(7)
    first = engine.forward_backward(engine_batch, LIKELIHOOD).loss
    torch.manual_seed(7)
    state = torch.get_rng_state()
    found = agree(model, engine, [engine_batch])
    assert found.holds, "no dropout while engines are compared"
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all(p.grad is None for p in model.parameters())
    assert engine.forward_backward(engine_batch, LIKELIHOOD).loss == first, "the same dropout as before"


def test_a_gradient_that_is_not_finite_is_no_agreement(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("llama")
    engine = FusedEngine(model)
    forward_backward = engine.forward_backward

    def wrong(batch: Batch, objective: Objective) -> StepOutput:
        output = forward_backward(batch, objective)
        next(p for name, p in model.named_parameters() if WRONG in name).grad[0, 0] = float("nan")
        return output

    monkeypatch.setattr(engine, "forward_backward", wrong)
    found = agree(model, engine, [batch_of()])
    assert not found.holds
    assert WRONG in found.worst


@pytest.mark.parametrize("engine_type", [FusedEngine, ReferenceEngine])
def test_the_base_alone_is_without_its_adapter(engine_type: Any) -> None:
    model, batch = model_of("llama"), batch_of()
    engine = engine_type(model)
    tuned = engine.token_logprobs(batch)
    with model.disable_adapter():
        base = ReferenceEngine(model).token_logprobs(batch)
    with engine.adapter_off():
        torch.testing.assert_close(engine.token_logprobs(batch), base)
    assert not torch.allclose(base, tuned)
    assert torch.equal(engine.token_logprobs(batch), tuned)


def test_the_fused_engine_recomputes_where_checkpointing_is_asked_for() -> None:
    seen = []
    for checkpointing in (False, True):
        train = Train(engine="fused", gradient_checkpointing=checkpointing)
        engine = choose.build(model_of("llama"), train, "cpu").engine
        assert isinstance(engine, FusedEngine)
        seen.append([block.kept for block in engine.placement.blocks])
    everything = set(ACTIVATIONS)
    assert seen == [[everything, everything], [set(), everything]], "backward needs what the last keeps at once"


def test_the_reference_engine_updates_each_matrix() -> None:
    model = model_of("llama")
    names = parameters_to_update(model, ReferenceEngine(model), Train(), "cpu")
    assert set(names) == {name for name, p in model.named_parameters() if p.requires_grad}
