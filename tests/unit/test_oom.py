"""Memory that runs out in the middle of a step ends no run, and changes none where the engine can tighten."""

import json
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from safetensors.torch import load_file

from tests.support.notices import notified
from tests.support.plans import planner_of, run_of
from tests.support.runs import losses, tiny_run, write_rows
from veneer.config import JobError, RunFolder, Train
from veneer.config.files import read_json
from veneer.data.batch import Batch
from veneer.engine.interface import BatchShapes
from veneer.engine.placement import MemoryPlacement
from veneer.engine.reference import ReferenceEngine
from veneer.planning.predict import Prediction
from veneer.training import job as training_job
from veneer.training.job import TrainingJob
from veneer.training.memory import need_and_fix
from veneer.training.metrics import read_metrics
from veneer.training.optimizer import allocate_states, build_optimizer, get_state

MakeJob = Callable[..., TrainingJob]
TIGHTENED = "keeps nothing"
CUDA_SAYS = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB of which"


@pytest.fixture
def make_job(tiny_model: Callable[..., Path], tmp_path: Path, rows: list[dict[str, Any]]) -> MakeJob:
    """Builds the job of a tiny run of two micro-batches a step, in a folder of its own."""
    path = write_rows(tmp_path / "rows.jsonl", rows)

    def make(name: str, **sections: Any) -> TrainingJob:
        sections["train"] = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2} | sections.get(
            "train", {}
        )
        return TrainingJob(tiny_run(tiny_model(), path, tmp_path / name, **sections))

    return make


class Shortage:
    """Makes passes of an engine run out of memory once they have added gradients and drawn random numbers.

    Args:
        job: job of the engine.
        patch: pytest's, that replaces the method.
        fails: whether the pass of a number, from 1, over a batch fails.
        tightens: how often the engine can tighten its placement.

    Attributes:
        batches: batches of the passes that did not fail.
        alive: how much of a failed pass was alive when the next one began.
    """

    def __init__(
        self, job: TrainingJob, patch: pytest.MonkeyPatch, fails: Callable[[int, Batch], bool], tightens: int = 0
    ) -> None:
        self.batches: list[Batch] = []
        self.alive: list[bool] = []
        self._passes, self._left, self._fails = 0, tightens, fails
        self._failed: list[weakref.ref[torch.Tensor]] = []
        self._forward_backward = job.engine.forward_backward
        patch.setattr(job.engine, "forward_backward", self)
        patch.setattr(job.engine, "tighten", self.tighten)

    def __call__(self, batch: Batch, objective: Any) -> Any:
        self._passes += 1
        self.alive += [reference() is not None for reference in self._failed]
        output = self._forward_backward(batch, objective)
        if self._fails(self._passes, batch):
            self._failed = [weakref.ref(output.loss)]
            raise torch.OutOfMemoryError(CUDA_SAYS)
        self.batches.append(batch)
        return output

    def tighten(self) -> str | None:
        self.alive += [reference() is not None for reference in self._failed]
        self._left -= 1
        return TIGHTENED if self._left >= 0 else None


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def assert_equal(found: Path, wanted: Path) -> None:
    """The adapters of two runs are the same to the last bit."""
    assert losses(found) == losses(wanted)
    for name, tensor in adapter(wanted).items():
        assert torch.equal(adapter(found)[name], tensor), name


def events(folder: Path) -> list[str]:
    return [json.loads(line)["message"] for line in RunFolder(folder).events.read_text().splitlines()]


@pytest.fixture(scope="module")
def undisturbed() -> dict[str, Path]:
    """Folders of runs in which no memory ran out, by engine; several cases share one."""
    return {}


@pytest.mark.parametrize("engine", ["reference", "fused"])
@pytest.mark.parametrize("failing", [{1}, {2}, {6}, {3, 4, 6, 7}], ids=str)
def test_a_step_is_redone_to_the_last_bit_once_the_engine_has_tightened(
    failing: set[int],
    engine: str,
    make_job: MakeJob,
    undisturbed: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings: dict[str, Any] = {"adapter": {"lora_dropout": 0.3}, "train": {"engine": engine, "logging_steps": 1}}
    if engine not in undisturbed:
        make_job("whole", **settings).fit()
        undisturbed[engine] = tmp_path / "whole"
    job = make_job("short", **settings)
    shortage = Shortage(job, monkeypatch, lambda number, batch: number in failing, len(failing))
    with notified("out of memory in step"):
        job.fit()
    assert_equal(tmp_path / "short", undisturbed[engine])
    assert not any(shortage.alive), "nothing keeps what a failed pass made"
    kept = [event for event in events(tmp_path / "short") if "out of memory" in event]
    assert len(kept) == len(failing)
    assert f"(tried to allocate 2.00 GiB): the placement is tightened ({TIGHTENED}), and it is redone" in kept[0]


def test_what_the_middle_of_a_pass_made_is_gone_before_it_is_redone(
    make_job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error comes out of a forward, and then out of a backward, with gradients of half of the layers."""
    settings: dict[str, Any] = {"adapter": {"lora_dropout": 0.3}}
    make_job("whole", **settings).fit()
    job = make_job("short", **settings)
    graphs: list[weakref.ref[Any]] = []  # to hooks, which the graph of a pass keeps
    alive: list[bool] = []
    count = 0

    def forward(module: Any, inputs: Any, output: torch.Tensor) -> None:
        nonlocal count
        count += 1
        if count not in (3, 8):
            return

        def fail(gradient: Any) -> None:
            raise torch.OutOfMemoryError(CUDA_SAYS)

        graphs.append(weakref.ref(fail))
        output.register_hook(fail)  # type: ignore[no-untyped-call]
        if count == 3:
            fail(None)

    def tighten() -> str:
        alive.append(graphs[-1]() is not None)
        assert all(parameter.grad is None for parameter in job.model.parameters())
        return TIGHTENED

    job.model.get_base_model().model.layers[0].mlp.register_forward_hook(forward)
    monkeypatch.setattr(job.engine, "tighten", tighten)
    with notified("out of memory in step 2 ") as said:
        job.fit()
    assert len(said) == 2
    assert alive == [False, False]
    assert_equal(tmp_path / "short", tmp_path / "whole")


def test_an_optimizer_whose_states_do_not_fit_updates_nothing(
    make_job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"train": {"optim": "adamw_8bit"}, "adapter": {"r": 64}}
    make_job("whole", **settings).fit()
    job = make_job("short", **settings)
    before = [parameter.clone() for parameter in job.model.parameters()]
    init_state = bitsandbytes.optim.optimizer.Optimizer2State.init_state
    count = 0

    def full(self: Any, group: Any, parameter: torch.Tensor, *at: int) -> None:
        nonlocal count
        count += 1
        init_state(self, group, parameter, *at)
        if count in (3, 5):
            del self.state[parameter]["state2"]
            raise torch.OutOfMemoryError(CUDA_SAYS)

    def tighten() -> str:
        assert all(map(torch.equal, job.model.parameters(), before))
        return TIGHTENED

    monkeypatch.setattr(bitsandbytes.optim.optimizer.Optimizer2State, "init_state", full)
    monkeypatch.setattr(job.engine, "tighten", tighten)
    with notified("out of memory in step 1 beside its passes"):
        job.fit()
    assert_equal(tmp_path / "short", tmp_path / "whole")


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_gradients_that_were_unscaled_are_redone_too(
    dtype: str, make_job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"model": {"dtype": dtype}}
    make_job("whole", **settings).fit()
    job = make_job("short", **settings)
    clip, count = torch.nn.utils.clip_grad_norm_, 0

    def full(*given: Any) -> Any:
        nonlocal count
        count += 1
        norm = clip(*given)
        if count in (1, 4):
            raise torch.OutOfMemoryError(CUDA_SAYS)
        return norm

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", full)
    monkeypatch.setattr(job.engine, "tighten", lambda: TIGHTENED)
    with notified("out of memory in step 3 beside its passes"):
        job.fit()
    assert_equal(tmp_path / "short", tmp_path / "whole")


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_8bit", "adamw_32bit", "paged_adamw_8bit"])
def test_states_allocated_beforehand_are_those_of_a_first_step(optim: str) -> None:
    torch.manual_seed(0)
    start, gradients = torch.randn(80, 64), [torch.randn(80, 64) for _ in range(3)]

    def trained(beforehand: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        parameter = torch.nn.Parameter(start.clone())
        optimizer = build_optimizer([parameter], Train.model_validate({"optim": optim}), "cpu")
        for gradient in gradients:
            if beforehand:
                allocate_states(optimizer)
            parameter.grad = gradient.clone()
            optimizer.step()
        return parameter.detach(), get_state(optimizer, {parameter: "w"})

    (found, state), (wanted, usual) = trained(True), trained(False)
    assert torch.equal(found, wanted)
    assert set(state) == set(usual)
    assert all(torch.equal(state[name], usual[name]) for name in usual)


@pytest.mark.parametrize("engine", ["reference", "fused"])
@pytest.mark.parametrize("packing", [False, True])
def test_micro_batches_are_cut_for_good_once_nothing_is_left_to_tighten(
    packing: bool, engine: str, make_job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"data": {"packing": packing, "max_length": 128}, "train": {"engine": engine}}
    if packing:
        settings["train"] |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1}
    make_job("whole", **settings).fit()
    job = make_job("short", **settings)
    longest = int(job.data.train.lengths.max())
    shortage = Shortage(job, monkeypatch, lambda number, batch: batch.tokens > 2 * longest, tightens=1)
    with notified("micro-batches of more than .* tokens are cut in two from here on") as said:
        job.fit()
    assert losses(tmp_path / "short") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)
    assert len(said) <= 4, "what was cut stays cut: later steps fail no more"
    assert any(batch.tokens > longest for batch in shortage.batches), "nothing is cut further than it needs"
    assert not any(shortage.alive)
    assert [event for event in events(tmp_path / "short") if "cut in two" in event]


def test_a_row_that_never_fits_ends_the_run_which_can_be_resumed(
    call: Callable[..., tuple[int, str, str]],
    run_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = ("train.save_steps=2", "train.per_device_train_batch_size=1", "train.gradient_accumulation_steps=4")
    status, *_ = call("train", str(run_file), *settings, f"train.output_dir={tmp_path / 'whole'}")
    assert status == 0
    count, forward_backward = 0, ReferenceEngine.forward_backward

    def full(self: Any, batch: Batch, objective: Any) -> Any:
        nonlocal count
        count += 1
        if count > 3 * 4 + 1:
            raise torch.OutOfMemoryError(CUDA_SAYS)
        return forward_backward(self, batch, objective)

    folder = tmp_path / "short"
    with monkeypatch.context() as patch:
        patch.setattr(ReferenceEngine, "forward_backward", full)
        status, out, err = call("train", str(run_file), *settings, f"train.output_dir={folder}")
    assert status == 1
    assert err.count("out of memory") == 1
    assert "error: out of memory in step 4 with a single row of " in err
    assert "(tried to allocate 2.00 GiB): with one row at a time training is predicted to need" in err
    assert "\n  fix: " in err
    assert "Traceback" not in out + err
    assert [path.name for path in RunFolder(folder).checkpoints.iterdir()] == ["step-000002"]
    assert not RunFolder(folder).adapter.exists()
    status, *_ = call("train", str(run_file), *settings, f"train.output_dir={folder}", "--resume")
    assert status == 0
    assert_equal(folder, tmp_path / "whole")


def test_rows_are_cut_down_to_single_ones_before_a_run_ends(make_job: MakeJob, monkeypatch: pytest.MonkeyPatch) -> None:
    job = make_job("run", train={"gradient_accumulation_steps": 1})
    tried: list[int] = []

    def fails(number: int, batch: Batch) -> bool:
        tried.append(len(batch.lengths))
        return True

    Shortage(job, monkeypatch, fails)
    with notified("cut in two"), pytest.raises(JobError, match=r"out of memory in step 1 with a single row of \d+ tok"):
        job.fit()
    assert tried == [4, 2, 1]


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """This machine's device is taken for one on which too little memory is an error that can be caught."""
    monkeypatch.setattr(training_job, "MEASURABLE", ("cpu",))


@pytest.mark.usefixtures("on_gpu")
def test_the_largest_micro_batch_is_tried_first_and_changes_nothing(
    make_job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"adapter": {"lora_dropout": 0.3}, "train": {"save_steps": 3}}
    with monkeypatch.context() as patch:
        patch.setattr(training_job, "MEASURABLE", ())
        make_job("whole", **settings).fit()
    job = make_job("tried", **settings)
    shortage = Shortage(job, monkeypatch, lambda number, batch: False)
    job.fit()
    assert_equal(tmp_path / "tried", tmp_path / "whole")
    longest = sorted(job.data.train.lengths.tolist(), reverse=True)
    assert list(shortage.batches[0].lengths) == longest[:4]
    assert len(shortage.batches) == 1 + 2 * 6


@pytest.mark.usefixtures("on_gpu")
def test_a_run_whose_longest_row_does_not_fit_ends_before_its_first_step(
    make_job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job("run")
    longest = int(job.data.train.lengths.max())
    Shortage(job, monkeypatch, lambda number, batch: max(batch.lengths) == longest)
    message = f"the largest micro-batch, tried before step 1, with a single row of {longest} tokens"
    with notified("cut in two"), pytest.raises(JobError, match=message):
        job.fit()
    assert read_metrics(RunFolder(tmp_path / "run").metrics) == []


@pytest.mark.usefixtures("on_gpu")
def test_what_the_trial_cut_is_cut_from_the_first_step_on(make_job: MakeJob, monkeypatch: pytest.MonkeyPatch) -> None:
    job = make_job("run")
    longest = int(job.data.train.lengths.max())
    shortage = Shortage(job, monkeypatch, lambda number, batch: batch.tokens > 2 * longest)
    with notified("the largest micro-batch, tried before step 1, with 4 rows") as said:
        job.fit()
    assert len(said) == 1
    assert len(shortage.batches) > 2 + 2 * 6, "steps have more passes than micro-batches"


@pytest.mark.usefixtures("on_gpu")
def test_a_placement_that_was_measured_is_not_tried_again(make_job: MakeJob, monkeypatch: pytest.MonkeyPatch) -> None:
    job = make_job("run")
    object.__setattr__(job.placement, "least_bytes", 1)
    shortage = Shortage(job, monkeypatch, lambda number, batch: False)
    job.fit()
    assert len(shortage.batches) == 2 * 6


@pytest.mark.parametrize("packing", [False, True])
def test_a_placement_is_chosen_for_micro_batches_that_fit(
    packing: bool, make_job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine says that none fits before there is a loop, which then begins with smaller micro-batches."""
    settings: dict[str, Any] = {"data": {"packing": packing}}
    make_job("whole", **settings).fit()
    plan_memory, asked = ReferenceEngine.plan_memory, []

    def short(self: Any, shapes: BatchShapes, *given: Any) -> MemoryPlacement:
        asked.append(shapes)
        if sum(shapes.largest) > 100:
            raise torch.OutOfMemoryError("The longest micro-batch does not fit with any placement. ")
        return plan_memory(self, shapes, *given)

    monkeypatch.setattr(ReferenceEngine, "plan_memory", short)
    with notified("the largest micro-batch, tried first, with .* rows.*cut in two from here on"):
        job = make_job("short", **settings)
    assert [bool(shapes.documents) for shapes in asked] == [packing] * len(asked)
    shortage = Shortage(job, monkeypatch, lambda number, batch: False)
    job.fit()
    assert max(batch.tokens for batch in shortage.batches) <= sum(asked[-1].largest) <= 100
    assert losses(tmp_path / "short") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)


def test_a_single_row_that_no_placement_fits_is_refused(
    make_job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*given: Any) -> MemoryPlacement:
        raise torch.OutOfMemoryError(CUDA_SAYS)

    monkeypatch.setattr(ReferenceEngine, "plan_memory", full)
    with notified("cut in two"), pytest.raises(JobError, match=r"tried first, with a single row of .*\n  fix: "):
        make_job("run")
    assert not (tmp_path / "run").exists()


def test_metrics_hold_the_predicted_peak_beside_the_measured_one(make_job: MakeJob, tmp_path: Path) -> None:
    job = make_job("run", train={"logging_steps": 1})
    job.fit()
    plan = read_json(RunFolder(tmp_path / "run").plan)
    for record in read_metrics(RunFolder(tmp_path / "run").metrics):
        phases: Sequence[str] = [name for name in plan["phases"] if name != "generation"]
        assert record["predicted_peak_bytes"] == max(plan["phases"][name]["bytes"] for name in phases)
        assert record["peak_bytes"] > 0


def test_the_cheapest_change_that_helps_is_named() -> None:
    """The prediction was too low, so what needs as much is no help, even where it is said to fit."""
    run = run_of("meta-llama/Llama-3.1-8B", quantization=None, train={"gradient_checkpointing": True})
    planner = planner_of(run, "80GiB")
    text = need_and_fix(Prediction(run, planner, planner.forecast(run), []), "cpu")
    assert "GiB were there\n  fix: set " in text
    named = text.split("fix: set ")[1]
    assert "per_device_train_batch_size" not in named, "a single row did not fit"
