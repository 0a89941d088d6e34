"""Which engine a run gets, that it is checked first, and that both engines train the same."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from subprocess import CalledProcessError
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from safetensors.torch import load_file

import veneer
from tests.support.engines import batch_of, model_of
from tests.support.loading import load
from tests.support.notices import notified
from tests.support.runs import StopAt, losses, tiny_run, write_rows
from tests.support.tiny import FAMILIES, save_tiny_model
from veneer.config import Adapter, Interrupted, JobError, Quantization, RunFolder, Train, UserError
from veneer.data.batch import Batch, Example
from veneer.engine import agreement, choose
from veneer.engine.agreement import Agreement, agree
from veneer.engine.fused.block import ACTIVATIONS
from veneer.engine.fused.engine import FusedEngine
from veneer.engine.objective import LIKELIHOOD, Objective, StepOutput
from veneer.engine.reference import ReferenceEngine
from veneer.engine.temporary import lies_on_host
from veneer.kernels.launch import TritonError
from veneer.model.attach import attach
from veneer.training.job import TrainingJob
from veneer.training.metrics import read_metrics
from veneer.training.optimizer import parameters_to_update
from veneer.training.verify import verify as verify_run

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
    layers = [
        [
            line["grad_norm_by_layer"]
            for line in read_metrics(RunFolder(tmp_path / name).metrics)
            if line["kind"] == "train"
        ]
        for name in ("fused", "reference")
    ]
    for fused, reference, norm in zip(*layers, norms[0], strict=True):
        assert len(fused) == 2, "of the decoder's layers"
        assert fused == pytest.approx(reference, rel=2e-3)
        assert math.hypot(*fused) == pytest.approx(norm, rel=1e-3), "before clipping; together they are the whole"
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
    with pytest.raises(JobError, match="step 3 diverged: the gradient is not finite"):
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


def changed_gradients(factor: Callable[[str], float]) -> Agreement:
    """Compare gradients of 8 layers, those of layer 0 a hundredth as large, with the same times a factor each."""
    names = [f"layers.{n}.self_attn.{kind}_proj.lora_A" for n in range(8) for kind in "qkv"]
    wanted = {name: torch.ones(4) * (0.01 if ".0." in name else 1.0) for name in names}
    found = {name: gradient * factor(name) for name, gradient in wanted.items()}
    return agreement._compare((1.0, found), (1.0, wanted), agreement.limits_of(torch.bfloat16, "cuda"))


def test_rounding_in_one_small_matrix_is_no_disagreement_and_a_wrong_kind_or_layer_is() -> None:
    assert changed_gradients(lambda name: 1.6 if ".0." in name and "k_proj" in name else 1.0).holds
    kind = changed_gradients(lambda name: 1.5 if "k_proj" in name else 1.0)
    assert not kind.holds
    assert kind.worst == "self_attn.k_proj.lora_A of all layers"
    one = changed_gradients(lambda name: 0.0 if ".0." in name and "k_proj" in name else 1.0)
    assert not one.holds
    assert one.worst == "layers.0.self_attn.k_proj.lora_A"
    assert "by 1 (0.9)" in one.describe()


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


def deep_model(tmp_path: Path) -> Any:
    """A tiny model of four blocks in 4 bits, with adapters at work."""
    name, settings = FAMILIES["llama"]
    save_tiny_model((name, settings | {"num_hidden_layers": 4}), tmp_path / "deep")
    base, _ = load(tmp_path / "deep", Quantization(), "float32")
    model = attach(base, Adapter(r=4), 0)
    for parameter_name, parameter in model.named_parameters():
        if "lora_B" in parameter_name:
            parameter.data = 0.1 * torch.randn_like(parameter)
    return model


def of_4_bits(model: Any) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, bnb.nn.Linear4bit)]


@pytest.fixture
def on_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each model counts as one in the host's memory, of which 100 tokens are checked."""
    monkeypatch.setattr(choose, "CHECKED_VOCABULARY", 100)
    monkeypatch.setattr(choose, "lies_on_host", lambda model: len(model.get_base_model().model.layers) > 2)


def some_examples() -> list[Example]:
    return [Example(torch.arange(start, start + 40).numpy(), ((1, 40, 1.0),), "") for start in (3, 300)]


@pytest.mark.usefixtures("on_host")
def test_the_first_blocks_are_checked_and_all_is_restored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = deep_model(tmp_path), batch_of()
    engine = FusedEngine(model)
    loss = engine.forward_backward(batch, LIKELIHOOD).loss
    before = {name: (p.data_ptr(), p.detach().clone()) for name, p in model.named_parameters()}
    layers = [module.weight.quant_state for module in of_4_bits(model)]
    seen: list[tuple[int, int]] = []

    def agree_on(model: Any, engine: Any, batches: Any) -> Any:
        seen.append((len(engine.blocks), len(engine.decoder.embed.weight)))
        assert max(int(batch.ids_T.max()) for batch in batches) < 100
        return agree(model, engine, batches)

    monkeypatch.setattr(choose, "agree", agree_on)
    agreement = choose.compare(model, engine, Train(engine="fused"), "cpu", [some_examples()])
    assert agreement.holds, agreement.describe()
    assert seen == [(2, 100)]
    after = {name: (p.data_ptr(), p.detach().clone()) for name, p in model.named_parameters()}
    assert after.keys() == before.keys()
    for name, (address, tensor) in before.items():
        assert after[name][0] == address, "an engine's buffer holds the adapter"
        assert torch.equal(after[name][1], tensor), name
    for module, state in zip(of_4_bits(model), layers, strict=True):
        assert module.weight.quant_state is state
        assert module.quant_state is state
    assert engine.forward_backward(batch, LIKELIHOOD).loss == loss


@pytest.mark.usefixtures("on_host", "wrong_kernel")
def test_a_wrong_kernel_is_found_in_the_first_blocks(tmp_path: Path) -> None:
    model = deep_model(tmp_path)
    agreement = choose.compare(model, FusedEngine(model), Train(engine="fused"), "cpu", [some_examples()])
    assert not agreement.holds
    assert agreement.worst == f"model.{WRONG}"


@pytest.mark.usefixtures("on_host")
def test_verify_works_on_a_model_in_the_hosts_memory(make_run: MakeRun, tmp_path: Path) -> None:
    deep_model(tmp_path)
    run = make_run("run", model={"base": str(tmp_path / "deep")}, quantization={"bits": 4})
    checks = {check.id: check for check in verify_run(run).checks}
    assert {"fused-loss", "targets", "reload", "overfit"} <= checks.keys()
    assert [check.id for check in checks.values() if not check.passed] == []


def on_another_device(model: Any) -> None:
    """Put a norm elsewhere than other frozen weights, as a load to the host does."""
    assert not lies_on_host(model)
    norm = model.get_base_model().model.norm
    norm.weight = torch.nn.Parameter(norm.weight.to("meta"), requires_grad=False)
    assert lies_on_host(model)


def test_the_reference_engine_never_gets_a_model_on_the_host(tmp_path: Path) -> None:
    model = deep_model(tmp_path)
    on_another_device(model)
    with pytest.raises(JobError, match=r"train\.engine asks for the reference engine; .*\n.*smaller model\.base"):
        choose.build(model, Train(engine="reference"), "cuda")
    with pytest.raises(JobError, match=r"losses differ; the reference engine cannot go on, .*\n.*smaller model\.base"):
        choose.fall_back(model, "losses differ")
