"""A step that diverges ends as `train.on_divergence` says: by a NaN, a poisoned row, or a rate that explodes."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import veneer
from tests.support.runs import some_rows, tiny_run, write_rows
from tests.support.tiny import FAMILIES, save_tiny_model, tiny_tokenizer
from tests.unit.test_records import faults
from veneer.config import Interrupted, JobError, UserError
from veneer.config.load import to_yaml
from veneer.data.batch import Batch
from veneer.engine.objective import Objective, StepOutput
from veneer.training.divergence import EXTREME, FIRST, PATIENCE, RECENT, DivergenceWatch
from veneer.training.job import TrainingJob
from veneer.training.metrics import read_metrics

Call = Callable[..., tuple[int, str, str]]
POISON = "~"  # a sign that one row has alone, and whose embedding is too large
# The head is trained, so that a high rate makes any logits: the loss of a random model is bounded otherwise.
EXPLODES: dict[str, Any] = {
    "adapter": {"target_modules": ["q_proj", "lm_head"], "lora_alpha": 64},
    "train": {"max_steps": 30, "warmup_ratio": 0.5, "save_steps": 5, "learning_rate": 0.3},
}


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base that cannot bear one sign: Gemma scales what is embedded, here beyond what float32 holds."""
    folder = tmp_path_factory.mktemp("poisoned")
    name, sizes = FAMILIES["gemma2"]
    save_tiny_model((name, sizes | {"tie_word_embeddings": False}), folder)
    tensors = load_file(folder / "model.safetensors")
    (token,) = tiny_tokenizer().encode(POISON, add_special_tokens=False)
    tensors["model.embed_tokens.weight"][token] = 3e38
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def poisoned_rows(path: Path) -> str:
    """Sixteen rows, the seventh of which is poisoned."""
    rows = some_rows()
    rows[6]["completion"] += POISON
    return write_rows(path, rows)


def divergences(folder: Path) -> list[dict[str, Any]]:
    found = [record for record in read_metrics(folder / "metrics.jsonl") if record["kind"] == "divergence"]
    assert not [fault for record in found for fault in faults(record)]
    return found


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


@pytest.fixture
def poisoned_file(poisoned: Path, tmp_path: Path) -> Callable[[str], str]:
    """Writes the file of a run over the poisoned row with a policy."""

    def write(policy: str) -> str:
        train = {"on_divergence": policy, "max_steps": 4, "save_steps": 1}
        run = tiny_run(poisoned, poisoned_rows(tmp_path / "rows.jsonl"), tmp_path / "run", train=train)
        (tmp_path / "run.yaml").write_text(to_yaml(run))
        return str(tmp_path / "run.yaml")

    return write


@pytest.mark.usefixtures("any_notice")
def test_a_poisoned_row_ends_the_run_which_goes_on_without_its_update(
    poisoned_file: Callable[[str], str], call: Call, tmp_path: Path
) -> None:
    file = poisoned_file("stop")
    status, _, err = call("train", file)
    assert status == 1, err
    assert "diverged: the loss is nan" in err
    assert "of its 4 rows one is off: rows.jsonl:7 (loss nan)" in err
    (event,) = divergences(tmp_path / "run")
    assert (event["action"], event["loss"]) == ("stop", None)
    last = json.loads((tmp_path / "run" / "events.jsonl").read_text().splitlines()[-1])
    assert (last["level"], "rows.jsonl:7" in last["message"]) == ("error", True)
    # As the message advises.
    status, _, err = call("train", file, "--resume", "train.on_divergence=skip")
    assert status == 0, err
    assert "its update is left out" in err
    assert "1 of 4 updates were left out" in err
    (event,) = divergences(tmp_path / "run")
    assert event["action"] == "skip"
    kept = [record["step"] for record in read_metrics(tmp_path / "run" / "metrics.jsonl") if record["kind"] == "train"]
    assert sorted([*kept, event["step"]]) == [1, 2, 3, 4]
    assert all(tensor.isfinite().all() for tensor in adapter(tmp_path / "run").values())


@pytest.mark.usefixtures("any_notice")
def test_going_back_does_not_help_against_a_row(
    poisoned_file: Callable[[str], str], call: Call, tmp_path: Path
) -> None:
    status, _, err = call("train", poisoned_file("rollback"))
    assert status == 1, err
    assert err.count("the run goes back to its checkpoint") == 3
    assert "went back 3 times before" in err
    assert err.count("rows.jsonl:7 (loss nan)") == 4
    assert [event["rate_factor"] for event in divergences(tmp_path / "run")][-1] == 1 / 8


class Wrong:
    """An engine's `forward_backward` that gives wrong numbers at some of its passes."""

    def __init__(self, job: TrainingJob, passes: set[int], what: str) -> None:
        self._inner, self._job, self._passes, self._what = job.engine.forward_backward, job, passes, what
        self._count = 0
        job.engine.forward_backward = self  # type: ignore[method-assign]

    def __call__(self, batch: Batch, objective: Objective) -> StepOutput:
        output = self._inner(batch, objective)
        self._count += 1
        if self._count not in self._passes:
            return output
        if self._what == "loss":
            return output._replace(loss=output.loss * math.nan)
        trained = (p for p in self._job.model.parameters() if p.grad is not None)
        next(trained).grad[0, 0] = math.inf
        return output


@pytest.mark.usefixtures("any_notice")
@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_8bit"])
@pytest.mark.parametrize("engine", ["reference", "fused"])
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_an_update_that_is_left_out_leaves_no_trace(
    what: str, engine: str, optim: str, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    """The moments, too: the run is that of one whose step had no gradient at all."""
    rows = write_rows(tmp_path / "rows.jsonl", some_rows())
    train = {"on_divergence": "skip", "engine": engine, "optim": optim, "max_steps": 3, "save_steps": 1}
    job = TrainingJob(tiny_run(tiny_model(), rows, tmp_path / "run", adapter={"r": 64}, train=train))
    Wrong(job, {2}, what)
    job.fit()
    first, second = (
        load_file(tmp_path / "run" / "checkpoints" / f"step-00000{step}" / "optimizer.safetensors") for step in (2, 3)
    )
    (event,) = divergences(tmp_path / "run")
    assert (event["step"], event["action"]) == (2, "skip")
    step_counts = {float(value) for name, value in first.items() if name.endswith("/step")}
    assert step_counts == {1.0}
    assert all(value.isfinite().all() for value in second.values())


@pytest.mark.usefixtures("any_notice")
def test_too_many_in_a_row_end_the_run(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", some_rows())
    train = {"on_divergence": "skip", "max_steps": 20}
    job = TrainingJob(tiny_run(tiny_model(), rows, tmp_path / "run", train=train))
    Wrong(job, set(range(3, 20)), "loss")
    with pytest.raises(JobError, match="step 8 diverged: the loss is nan; 5 updates in a row were left out before"):
        job.fit()


def exploding(tiny_model: Callable[..., Path], tmp_path: Path, policy: str, name: str = "run") -> veneer.Run:
    rows = write_rows(tmp_path / "rows.jsonl", some_rows())
    train = EXPLODES["train"] | {"on_divergence": policy}
    return tiny_run(tiny_model(), rows, tmp_path / name, adapter=EXPLODES["adapter"], train=train)


@pytest.mark.usefixtures("any_notice")
@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_a_rate_that_explodes_ends_the_run(policy: str, tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(
        JobError, match=r"diverged: the loss stays at .*\n.*\n  fix: lower train\.learning_rate \(0\.3\)"
    ):
        TrainingJob(exploding(tiny_model, tmp_path, policy)).fit()


@pytest.mark.usefixtures("any_notice")
def test_going_back_with_a_lower_rate_saves_the_run_wherever_it_is_killed(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    TrainingJob(exploding(tiny_model, tmp_path, "rollback", "whole")).fit()
    whole = divergences(tmp_path / "whole")
    assert {event["action"] for event in whole} == {"rollback"}
    assert whole[-1]["rate_factor"] == 0.5 ** len(whole)
    steps = [one["step"] for one in read_metrics(tmp_path / "whole" / "metrics.jsonl") if one["kind"] == "train"]
    assert steps == list(range(1, 31)), "what was undone is gone from metrics.jsonl"

    class StopAfterRollback:
        """A kill right after the event, and another one a few steps later."""

        def __call__(self, record: dict[str, Any]) -> None:
            if record["kind"] == "divergence" or record["step"] == whole[0]["step"] + 7:
                raise Interrupted(Path())

    run = exploding(tiny_model, tmp_path, "rollback", "killed")
    killed = 0
    while True:
        try:
            TrainingJob(run, resume="auto").fit((StopAfterRollback(),) if killed < 3 else ())
        except Interrupted:
            killed += 1
        else:
            break
    assert killed == 3
    assert adapter(tmp_path / "killed").keys() == adapter(tmp_path / "whole").keys()
    assert all(
        torch.equal(adapter(tmp_path / "killed")[name], one) for name, one in adapter(tmp_path / "whole").items()
    )


def test_weights_that_are_updated_within_the_backward_cannot_be_left_out(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    train = {"on_divergence": "skip", "max_grad_norm": 0}
    run = tiny_run(tiny_model(), write_rows(tmp_path / "rows.jsonl", some_rows()), tmp_path / "run", train=train)
    with pytest.raises(UserError, match=r"train\.on_divergence = skip: weights are updated within the backward"):
        TrainingJob(run.model_copy(update={"adapter": None}))


def judged(losses: list[float], policy: Any = "stop") -> list[str | None]:
    """What a watch says of losses, up to the one that ends the run."""
    watch = DivergenceWatch(policy)
    found: list[str | None] = []
    for step, loss in enumerate(losses, 1):
        finding = watch.judge(step, loss, 1.0)
        found.append(None if finding is None else finding.action)
        if found[-1] == "stop":
            break
    return found


NOISE = [2.0, 1.7, 2.4, 1.9, 2.2, 1.6, 2.1, 1.8, 2.5, 1.9]


def test_a_training_that_goes_well_is_left_alone() -> None:
    falling = [2.5 * 0.97**n + 0.3 * (n % 3) for n in range(200)]
    easy_first = [0.3, *NOISE, *NOISE]
    learnt_by_heart = [*NOISE, *[0.01, 0.012, 0.9, 0.011] * 30]
    chance = [0.69, *[0.5, 0.9, 0.2, 1.4, 0.1, 0.02, 2.0, 0.3] * 20]  # pairs, one at a time
    for losses in (falling, easy_first, learnt_by_heart, chance):
        assert set(judged(losses)) == {None}, losses


def test_what_is_off_is_found() -> None:
    start = NOISE * 2
    assert judged([*start, 7.0, *NOISE])[20:22] == ["none", None], "one hard row"
    assert judged([*start, *[9.0] * 5])[20:] == ["none"] * (PATIENCE - 1) + ["stop"]
    assert judged([*start, 2 * EXTREME])[20:] == ["stop"]
    assert judged([*start, *[4.4] * 30])[-1] == "stop", "it stays twice as high"
    assert judged([2.0, 30.0, *[200.0] * 20])[-1] == "stop", "before a spike could be looked for"
    assert None not in judged([*start, *[9.0] * 2], "skip")[20:]
    assert judged([2.0] * (FIRST - 2) + [math.nan]) == [None] * (FIRST - 2) + ["stop"]
    assert len(start) > RECENT


def test_a_watch_goes_on_from_what_a_checkpoint_keeps() -> None:
    watch, other = DivergenceWatch("stop"), DivergenceWatch("stop")
    for step, loss in enumerate([*NOISE, 9.0], 1):
        watch.judge(step, loss, 1.0)
    other.load_state_dict(json.loads(json.dumps(watch.state_dict())))
    assert other.judge(12, 9.0, 1.0) == watch.judge(12, 9.0, 1.0)
