"""Training on pairs of answers: what it starts from, what it is compared with, and what is refused."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import veneer
from tests.support.notices import notified
from tests.support.runs import StopAt, losses, some_pairs, tiny_run, write_rows
from veneer.config import Interrupted, Run, RunFolder, UserError
from veneer.data.pipeline import prepare
from veneer.data.render import Renderer
from veneer.engine.interface import document_losses
from veneer.model.load import load_tokenizer
from veneer.model.locate import locate
from veneer.release.redact import public_settings
from veneer.training.job import TrainingJob
from veneer.training.metrics import read_metrics
from veneer.training.run_batches import batches_of
from veneer.training.verify import verify


@pytest.fixture
def pairs_file(tmp_path: Path) -> str:
    return write_rows(tmp_path / "pairs.jsonl", some_pairs())


@pytest.fixture(scope="module")
def start(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of supervised training that preference training starts from."""
    folder = tmp_path_factory.mktemp("start")
    rows = write_rows(folder / "rows.jsonl", [{"prompt": p["prompt"], "completion": p["chosen"]} for p in some_pairs()])
    veneer.train(tiny_run(tiny_model(), rows, folder / "run", train={"learning_rate": 3e-2}))
    return folder / "run"


def records(folder: Path, kind: str = "train") -> list[dict[str, Any]]:
    return [record for record in read_metrics(RunFolder(folder).metrics) if record["kind"] == kind]


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


@pytest.mark.parametrize("engine", ["reference", "fused"])
def test_training_begins_at_the_reference_and_learns_the_pairs(
    engine: str, tiny_model: Callable[..., Path], tmp_path: Path, pairs_file: str, start: Path
) -> None:
    train = {"max_steps": 40, "engine": engine, "dpo": {"beta": 1.0}, "learning_rate": 3e-3, "warmup_ratio": 0}
    train |= {"per_device_train_batch_size": 8}
    data = {"validation": pairs_file, "duplicates": "keep"}
    model = {"adapter": str(start)}
    veneer.train(tiny_run(tiny_model(), pairs_file, tmp_path / "run", train=train, data=data, model=model))
    first, *_, last = records(tmp_path / "run")
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-12)
    assert first["rewards/chosen"] == first["rewards/rejected"] == first["rewards/margins"] == 0
    assert last["loss"] < 0.1
    assert last["rewards/margins"] > 2
    assert last["rewards/accuracies"] == 1
    held_out = records(tmp_path / "run", "eval")[-1]
    assert held_out["loss"] < 0.1
    assert held_out["rewards/accuracies"] == 1
    ledger = json.loads((tmp_path / "run" / "ledger.json").read_text())
    assert (ledger["rows"]["training"], ledger["tokens"]["examples"]) == (8, 16)


def test_the_reference_is_the_starting_adapter_and_not_the_base(
    tiny_model: Callable[..., Path], tmp_path: Path, pairs_file: str, start: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def first_loss(name: str) -> float:
        monkeypatch.setenv("VENEER_CACHE", str(tmp_path / "cache" / name))
        run = tiny_run(tiny_model(), pairs_file, tmp_path / name, train={"max_steps": 1}, model={"adapter": str(start)})
        veneer.train(run)
        return losses(tmp_path / name)[0]

    assert first_loss("right") == pytest.approx(math.log(2), abs=1e-12)

    def of_the_base(engine: Any, batch: Any) -> list[float]:
        with engine.adapter_off():
            return document_losses(engine, batch)

    monkeypatch.setattr("veneer.training.reference_logprobs.document_losses", of_the_base)
    assert abs(first_loss("planted") - math.log(2)) > 1e-3


def plain_losses(run: Run, base: Path, start: Path, rates: list[float]) -> list[float]:
    """The losses of a run by Transformers, PEFT, AdamW and the loss of TRL's DPOTrainer, one pair after the other."""
    rows = prepare(run.data, Renderer(load_tokenizer(locate(run.model)), run.data), run.train.seed).train
    batches = batches_of(run, rows, 2)

    def loaded() -> Any:
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        return PeftModel.from_pretrained(model, str(start / "adapter"), is_trainable=True)

    def logp(model: Any, example: Any) -> torch.Tensor:
        ids = torch.from_numpy(example.ids.astype("int64"))
        logprobs = torch.log_softmax(model(input_ids=ids[None]).logits[0, :-1], -1)
        return (logprobs.gather(1, ids[1:, None])[:, 0] * torch.from_numpy(example.weights[1:])).sum()

    policy, reference = loaded(), loaded()
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, weight_decay=0)
    found = []
    for number, rate in enumerate(rates):
        pairs = []
        for members in batches.members_of_step(number):
            for chosen, rejected in zip(members[::2], members[1::2], strict=True):
                with torch.no_grad():
                    ref_logratios = logp(reference, rows[chosen]) - logp(reference, rows[rejected])
                logits = logp(policy, rows[chosen]) - logp(policy, rows[rejected]) - ref_logratios
                pairs.append(-F.logsigmoid(0.1 * logits))
        loss = torch.stack(pairs).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


@pytest.mark.parametrize("engine", ["reference", "fused"])
def test_a_run_is_that_of_a_plain_loop_with_trls_loss(
    engine: str, tiny_model: Callable[..., Path], tmp_path: Path, pairs_file: str, start: Path
) -> None:
    train = {"engine": engine, "gradient_accumulation_steps": 2, "max_steps": 12, "per_device_train_batch_size": 2}
    run = tiny_run(tiny_model(), pairs_file, tmp_path / "run", train=train, model={"adapter": str(start)})
    veneer.train(run)
    rates = [record["learning_rate"] for record in records(tmp_path / "run")]
    found = losses(tmp_path / "run")
    assert found == pytest.approx(plain_losses(run, tiny_model(), start, rates), rel=1e-3)
    assert max(found) - min(found) > 0.05, "a curve that differs from a constant"


def test_both_engines_train_alike(tiny_model: Callable[..., Path], tmp_path: Path, pairs_file: str) -> None:
    for engine in ("reference", "fused"):
        veneer.train(tiny_run(tiny_model(), pairs_file, tmp_path / engine, train={"engine": engine}))
    assert losses(tmp_path / "fused") == pytest.approx(losses(tmp_path / "reference"), rel=1e-3)
    assert losses(tmp_path / "fused")[-1] < math.log(2) - 0.01


def test_a_step_may_be_cut_anywhere_between_pairs(
    tiny_model: Callable[..., Path], tmp_path: Path, pairs_file: str
) -> None:
    for rows in (1, 8):
        train = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": 8 // rows}
        veneer.train(tiny_run(tiny_model(), pairs_file, tmp_path / str(rows), train=train))
    assert losses(tmp_path / "1") == pytest.approx(losses(tmp_path / "8"), rel=1e-4)


def test_a_resumed_run_compares_with_what_it_started_from(
    tiny_model: Callable[..., Path], tmp_path: Path, pairs_file: str, start: Path
) -> None:
    runs = [
        tiny_run(tiny_model(), pairs_file, tmp_path / name, model={"adapter": str(start)}, train={"save_steps": 3})
        for name in ("whole", "cut")
    ]
    veneer.train(runs[0])
    with pytest.raises(Interrupted):
        veneer.train(runs[1], listeners=[StopAt(4)])
    veneer.train(runs[1], resume=True)
    whole, resumed = adapter(tmp_path / "whole"), adapter(tmp_path / "cut")
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


def test_supervised_training_goes_on_from_an_adapter(
    tiny_model: Callable[..., Path], tmp_path: Path, start: Path
) -> None:
    rows = str(start.parent / "rows.jsonl")
    veneer.train(tiny_run(tiny_model(), rows, tmp_path / "run", model={"adapter": str(start)}, train={"max_steps": 1}))
    assert losses(tmp_path / "run")[0] < losses(start)[0] - 0.1


def test_what_is_told_of_the_reference(
    tiny_model: Callable[..., Path], tmp_path: Path, pairs_file: str, start: Path
) -> None:
    for name, named, wanted in (("base", None, "starts from the base"), ("run", str(start), f"starts from {start}, ")):
        run = tiny_run(tiny_model(), pairs_file, tmp_path / name, train={"max_steps": 1}, model={"adapter": named})
        veneer.train(run)
        events = [json.loads(line) for line in (tmp_path / name / "events.jsonl").read_text().splitlines()]
        assert any(wanted in event["message"] and "is the reference" in event["message"] for event in events)


def test_a_pair_with_a_cut_answer_is_left_out_whole_and_counted(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    rows = [*some_pairs(4), {"prompt": "what", "chosen": "cat", "rejected": "owl " * 60}]
    data = {"overlong": "truncate", "max_length": 64}
    run = tiny_run(tiny_model(), write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "run", data=data)
    ledger = prepare(run.data, Renderer(load_tokenizer(locate(run.model)), run.data), 0).ledger
    assert (ledger.rows["used"], ledger.rows["overlong"], ledger.notes["overlong_pairs"]) == (4, 1, 1)


SINGLE = [{"prompt": "what", "completion": "cat"}] * 2
RATED = [{"prompt": "what", "completion": "cat", "label": True}] * 2
EQUAL = [{"prompt": "what", "chosen": "cat", "rejected": "cat"}]
EMPTY = [{"prompt": "what", "chosen": "", "rejected": "cat"}]
REFUSED: list[tuple[str, list[dict[str, Any]], dict[str, Any], str]] = [
    ("sft rows", SINGLE, {"train": {"objective": "dpo"}}, "and dpo learns from rows with chosen and rejected"),
    ("rated rows", RATED, {"train": {"objective": "dpo"}}, "rows of the format rated"),
    ("pairs for sft", some_pairs(), {"train": {"objective": "sft"}}, "train.objective=dpo"),
    ("equal answers", some_pairs() + EQUAL, {}, "`chosen` and `rejected` are the same"),
    ("empty answers alone", EMPTY, {}, "no row is left of 1 (1 empty"),
    ("settings of dpo", SINGLE, {"train": {"dpo": {"beta": 0.2}}}, "so it has no effect"),
    ("smoothing", some_pairs(), {"train": {"dpo": {"loss_type": "ipo", "label_smoothing": 0.1}}}, "no effect with"),
    ("packing", some_pairs(), {"data": {"packing": True}}, "pairs are not packed"),
    ("loss on all", some_pairs(), {"data": {"loss_on": "all"}}, "data.loss_on = all"),
    ("a rate to be found", some_pairs(), {"train": {"learning_rate": "auto"}}, "of which there are 0; at least 8"),
    ("no adapter", some_pairs(), {"model": {"adapter": "/nowhere"}}, "/nowhere: no such folder"),
]  # fmt: skip


@pytest.mark.parametrize(("rows", "sections", "message"), [c[1:] for c in REFUSED], ids=[c[0] for c in REFUSED])
def test_bad_input_is_refused_with_one_message(
    rows: list[dict[str, Any]], sections: dict[str, Any], message: str, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    sections = {"data": {"duplicates": "keep"}} | sections
    run = tiny_run(tiny_model(), write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "run", **sections)
    with pytest.raises(UserError) as refused:
        TrainingJob(run)
    assert message in str(refused.value)
    assert not (tmp_path / "run").exists()


def test_mixed_files_are_refused(tiny_model: Callable[..., Path], tmp_path: Path, pairs_file: str) -> None:
    single = write_rows(tmp_path / "single.jsonl", SINGLE)
    run = tiny_run(tiny_model(), pairs_file, tmp_path / "run", data={"train": [pairs_file, single]})
    with pytest.raises(UserError, match="a run learns from one kind of rows"):
        TrainingJob(run)


@pytest.mark.parametrize("value", [0, -1])
def test_beta_is_above_0(value: float) -> None:
    with pytest.raises(UserError, match="beta"):
        Run(model={"base": "b"}, data={"train": "t"}, train={"dpo": {"beta": value}})


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"r": 8}, "adapter.r = 8"), ({"lora_alpha": 16}, "adapter.lora_alpha = 16"),
     ({"target_modules": ["q_proj"]}, "set adapter.target_modules")],
)  # fmt: skip
def test_an_adapter_of_another_form_is_refused(
    settings: dict[str, Any],
    message: str,
    tiny_model: Callable[..., Path],
    tmp_path: Path,
    pairs_file: str,
    start: Path,
) -> None:
    run = tiny_run(tiny_model(), pairs_file, tmp_path / "run", adapter=settings, model={"adapter": str(start)})
    with pytest.raises(UserError) as refused:
        TrainingJob(run)
    assert message in str(refused.value)


def test_an_adapter_of_another_base_is_refused(
    tiny_model: Callable[..., Path], tmp_path: Path, pairs_file: str, start: Path
) -> None:
    run = tiny_run(tiny_model("qwen2"), pairs_file, tmp_path / "run", model={"adapter": str(start)})
    with pytest.raises(UserError, match="the adapter does not belong to this"):
        TrainingJob(run)


def test_a_resumed_run_refuses_another_starting_adapter(
    tiny_model: Callable[..., Path], tmp_path: Path, pairs_file: str, start: Path
) -> None:
    shutil.copytree(start / "adapter", tmp_path / "start")
    (tmp_path / "start" / "passport.json").unlink()
    sections: dict[str, Any] = {"model": {"adapter": str(tmp_path / "start")}, "train": {"save_steps": 1}}
    run = tiny_run(tiny_model(), pairs_file, tmp_path / "run", **sections)
    with pytest.raises(Interrupted):
        veneer.train(run, listeners=[StopAt(2)])
    file = tmp_path / "start" / "adapter_model.safetensors"
    save_file({name: 2 * value for name, value in load_file(file).items()}, file)
    with pytest.raises(UserError, match="not what this run began with: the adapter that training starts from"):
        veneer.train(run, resume=True)


def test_changes_since_the_starting_adapter_are_told(
    tiny_model: Callable[..., Path], tmp_path: Path, pairs_file: str, start: Path
) -> None:
    sections: dict[str, Any] = {"model": {"adapter": str(start)}, "data": {"chat_template": "alpaca"}}
    sections["quantization"] = {"bits": 4}
    with notified("it was trained with another chat template") as told:
        TrainingJob(tiny_run(tiny_model(), pairs_file, tmp_path / "run", **sections))
    assert any("it was trained with quantization None" in message for message in told)


def test_a_checkpoint_and_a_plain_adapter_of_another_base_are_noticed(
    tiny_model: Callable[..., Path], tmp_path: Path, pairs_file: str, start: Path
) -> None:
    """Neither has a passport."""
    (checkpoint,) = (start / "checkpoints").iterdir()
    sections: dict[str, Any] = {"model": {"adapter": str(checkpoint)}, "train": {"max_steps": 1}}
    veneer.train(tiny_run(tiny_model(), pairs_file, tmp_path / "run", **sections))
    assert losses(tmp_path / "run")[0] == pytest.approx(math.log(2), abs=1e-12)
    with pytest.raises(UserError, match="it was trained on another base than"):
        TrainingJob(tiny_run(tiny_model("mistral"), pairs_file, tmp_path / "other", **sections))

    shutil.copytree(start / "adapter", tmp_path / "plain")
    (tmp_path / "plain" / "passport.json").unlink()
    sections["model"] = {"adapter": str(tmp_path / "plain")}
    with notified("it has no passport by which"):
        TrainingJob(tiny_run(tiny_model("mistral"), pairs_file, tmp_path / "other", **sections))


def test_a_shared_run_names_its_starting_adapter_without_its_path() -> None:
    run = Run(model={"base": "b", "adapter": "/home/someone/runs/sft"}, data={"train": "t"})
    assert public_settings(json.loads(run.model_dump_json()))["model"]["adapter"] == "sft"


def test_a_plan_counts_pairs(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    """A row of a micro-batch is two documents."""
    steps = {}
    for name, rows in (
        ("pairs", some_pairs(16)),
        ("single", [{"prompt": p["prompt"], "completion": p["chosen"]} for p in some_pairs(16)]),
    ):
        train = {"max_steps": None, "num_train_epochs": 1}
        file = write_rows(tmp_path / f"{name}.jsonl", rows)
        data = {"duplicates": "keep"}
        planned = veneer.plan(tiny_run(tiny_model(), file, tmp_path / name, train=train, data=data)).as_dict()
        steps[name] = planned["rows"]["steps"], planned["rows"]["tokens"]
    assert steps["pairs"][0] == steps["single"][0] == 4
    assert steps["pairs"][1] > 1.5 * steps["single"][1]


def test_a_run_on_pairs_is_evaluated_merged_and_verified(
    tiny_model: Callable[..., Path], tmp_path: Path, pairs_file: str, start: Path
) -> None:
    run = tiny_run(tiny_model(), pairs_file, tmp_path / "run", data={"validation": 3}, model={"adapter": str(start)})
    veneer.train(run)
    found = veneer.evaluate(tmp_path / "run").as_dict()
    assert found["rows"] == 3
    veneer.merge(str(tmp_path / "run"), tmp_path / "merged")
    assert list((tmp_path / "merged").glob("*.safetensors"))
    assert verify(run.model_copy(update={"train": run.train.model_copy(update={"output_dir": tmp_path / "no"})})).passed
