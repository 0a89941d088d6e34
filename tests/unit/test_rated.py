"""Training on rated rows, and by objectives without a reference: what it comes to, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from transformers import AutoModelForCausalLM

import veneer
from tests.support.runs import StopAt, losses, some_pairs, some_rated, tiny_run, write_rows
from tests.unit.test_prefer import adapter, records
from veneer.config import Interrupted, Run, UserError
from veneer.data.batch import Example
from veneer.data.mismatched import MismatchedRows
from veneer.data.pipeline import prepare
from veneer.data.render import Renderer
from veneer.model.load import load_tokenizer
from veneer.model.locate import locate
from veneer.training.job import TrainingJob
from veneer.training.run_batches import batches_of

OF_PAIRS = ("dpo", "orpo", "simpo", "cpo")


@pytest.fixture
def rated_file(tmp_path: Path) -> str:
    return write_rows(tmp_path / "rated.jsonl", some_rated())


@pytest.fixture
def pairs_file(tmp_path: Path) -> str:
    return write_rows(tmp_path / "pairs.jsonl", some_pairs())


def test_rated_rows_are_learnt_by_kto(tiny_model: Callable[..., Path], tmp_path: Path, rated_file: str) -> None:
    train = {"max_steps": 20, "per_device_train_batch_size": 8}
    run = tiny_run(
        tiny_model(), rated_file, tmp_path / "run", data={"validation": rated_file, "duplicates": "keep"}, train=train
    )
    veneer.train(run)
    first, last = (records(tmp_path / "run")[at] for at in (0, -1))
    assert first["loss"] == 0.5
    assert first["rewards/chosen"] == first["rewards/rejected"] == first["rewards/margins"] == first["kl"] == 0
    assert last["loss"] < 0.45
    assert last["rewards/margins"] > 0.4
    held_out = records(tmp_path / "run", "eval")[-1]
    assert held_out["loss"] == pytest.approx(last["loss"], abs=0.02)
    told = [json.loads(line)["message"] for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    assert any("the rows are rated" in message and "train.objective: kto" in message for message in told)
    ledger = json.loads((tmp_path / "run" / "ledger.json").read_text())
    assert (ledger["notes"]["rated_good"], ledger["notes"]["rated_bad"]) == (8, 8)


def plain_losses(run: Run, base: Path, rates: list[float]) -> tuple[list[float], list[float]]:
    """Losses and estimates of KL by Transformers, PEFT, AdamW and the loss of TRL's KTOTrainer, row by row."""
    data = prepare(run.data, Renderer(load_tokenizer(locate(run.model)), run.data), run.train.seed)
    rows, others = data.train, MismatchedRows(data.train, run.data.max_length, run.train.seed)
    job = TrainingJob(
        run.model_copy(update={"train": run.train.model_copy(update={"output_dir": run.train.output_dir / "x"})})
    )
    state = {name: value.detach().clone() for name, value in get_peft_model_state_dict(job.model).items()}

    def loaded() -> Any:
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        model = PeftModel(model, job.model.peft_config["default"])
        from peft import set_peft_model_state_dict

        set_peft_model_state_dict(model, state)
        return model

    def logp(model: Any, example: Example) -> torch.Tensor:
        ids = torch.from_numpy(example.ids.astype("int64"))
        logprobs = torch.log_softmax(model(input_ids=ids[None]).logits[0, :-1], -1)
        return (logprobs.gather(1, ids[1:, None])[:, 0] * torch.from_numpy(example.weights[1:])).sum()

    policy, reference = loaded(), loaded()
    trained = [parameter for name, parameter in policy.named_parameters() if "lora" in name]
    for parameter in trained:
        parameter.requires_grad_()
    optimizer = torch.optim.AdamW(trained, weight_decay=0)
    batches, found, estimates = batches_of(run, rows), [], []
    for number, rate in enumerate(rates):
        members = [n for micro in batches.members_of_step(number) for n in micro]
        with torch.no_grad():
            of_reference = torch.stack([logp(reference, rows[n]) for n in members])
            kl = (
                torch.stack([logp(policy, others[n]) - logp(reference, others[n]) for n in members]).mean().clamp(min=0)
            )
        ratios = torch.stack([logp(policy, rows[n]) for n in members]) - of_reference
        is_good = torch.tensor([rows[n].values["label"] > 0 for n in members])
        good, bad = torch.sigmoid(0.1 * (ratios - kl)), torch.sigmoid(0.1 * (kl - ratios))
        loss = torch.where(is_good, 1.3 * (1 - good), 0.7 * (1 - bad)).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
        estimates.append(kl.item())
    return found, estimates


@pytest.mark.parametrize("engine", ["reference", "fused"])
def test_a_run_is_that_of_a_plain_loop_with_trls_loss(
    engine: str, tiny_model: Callable[..., Path], tmp_path: Path, rated_file: str
) -> None:
    kto = {"desirable_weight": 1.3, "undesirable_weight": 0.7}
    train = {
        "engine": engine,
        "gradient_accumulation_steps": 2,
        "max_steps": 8,
        "per_device_train_batch_size": 2,
        "kto": kto,
    }
    run = tiny_run(tiny_model(), rated_file, tmp_path / "run", train=train)
    veneer.train(run)
    written = records(tmp_path / "run")
    wanted, estimates = plain_losses(run, tiny_model(), [record["learning_rate"] for record in written])
    assert [record["loss"] for record in written] == pytest.approx(wanted, rel=1e-3)
    assert [record["kl"] for record in written] == pytest.approx(estimates, rel=2e-3, abs=1e-4)
    assert max(estimates) > 0.01, "an estimate that differs from 0"


@pytest.mark.parametrize("objective", ["kto", *OF_PAIRS])
def test_a_step_may_be_cut_anywhere_between_rows(
    objective: str, tiny_model: Callable[..., Path], tmp_path: Path, rated_file: str, pairs_file: str
) -> None:
    file = rated_file if objective == "kto" else pairs_file
    for rows in (1, 8):
        train: dict[str, Any] = {
            "per_device_train_batch_size": rows,
            "gradient_accumulation_steps": 8 // rows,
            "objective": objective,
            "max_steps": 3,
        }
        if objective == "dpo":
            train["dpo"] = {"rpo_alpha": 0.5}
        veneer.train(tiny_run(tiny_model(), file, tmp_path / str(rows), train=train))
    one, eight = records(tmp_path / "1"), records(tmp_path / "8")
    assert losses(tmp_path / "1") == pytest.approx(losses(tmp_path / "8"), rel=1e-4)
    assert one[-1].keys() == eight[-1].keys()
    name = "kl" if objective == "kto" else "rewards/margins" if objective == "simpo" else "nll_loss"
    assert one[-1][name] == pytest.approx(eight[-1][name], rel=1e-3, abs=1e-5)
    assert losses(tmp_path / "1")[-1] < losses(tmp_path / "1")[0]


@pytest.mark.parametrize("objective", ["orpo", "simpo", "cpo"])
def test_no_reference_is_computed_where_none_is_needed(
    objective: str, tiny_model: Callable[..., Path], tmp_path: Path, pairs_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*arguments: Any) -> None:
        raise AssertionError("a reference was computed")

    monkeypatch.setattr("veneer.training.reference.measure_reference", never)
    run = tiny_run(
        tiny_model(),
        pairs_file,
        tmp_path / "run",
        train={"objective": objective, "max_steps": 2},
        data={"validation": 3},
    )
    veneer.train(run)
    assert records(tmp_path / "run", "eval")[-1]["rewards/margins"] != 0
    assert veneer.evaluate(tmp_path / "run").as_dict()["rows"] == 3


def test_a_resumed_run_has_the_estimates_of_the_whole_one(
    tiny_model: Callable[..., Path], tmp_path: Path, rated_file: str
) -> None:
    runs = [tiny_run(tiny_model(), rated_file, tmp_path / name, train={"save_steps": 3}) for name in ("whole", "cut")]
    veneer.train(runs[0])
    with pytest.raises(Interrupted):
        veneer.train(runs[1], listeners=[StopAt(4)])
    veneer.train(runs[1], resume=True)
    whole, resumed = adapter(tmp_path / "whole"), adapter(tmp_path / "cut")
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


def test_other_labels_are_other_data(tiny_model: Callable[..., Path], tmp_path: Path, rated_file: str) -> None:
    run = tiny_run(tiny_model(), rated_file, tmp_path / "run", train={"save_steps": 1})
    with pytest.raises(Interrupted):
        veneer.train(run, listeners=[StopAt(2)])
    write_rows(Path(rated_file), [row | {"label": not row["label"]} for row in some_rated()])
    with pytest.raises(UserError, match="training rows"):
        veneer.train(run, resume=True)


def test_packed_rated_rows_train_as_others(tiny_model: Callable[..., Path], tmp_path: Path, rated_file: str) -> None:
    whole = {"per_device_train_batch_size": 8, "max_steps": 3}
    veneer.train(tiny_run(tiny_model(), rated_file, tmp_path / "rows", train=whole))
    veneer.train(tiny_run(tiny_model(), rated_file, tmp_path / "packs", data={"packing": True}, train=whole))
    assert losses(tmp_path / "packs") == pytest.approx(losses(tmp_path / "rows"), rel=1e-4)


def test_a_step_with_one_kind_of_rows_has_no_metrics_of_the_other(
    tiny_model: Callable[..., Path], tmp_path: Path, rated_file: str
) -> None:
    veneer.train(tiny_run(tiny_model(), rated_file, tmp_path / "run", train={"per_device_train_batch_size": 1}))
    found = {
        tuple(name in record for name in ("rewards/chosen", "rewards/rejected")) for record in records(tmp_path / "run")
    }
    assert found <= {(True, False), (False, True)}
    assert not any("rewards/margins" in record for record in records(tmp_path / "run"))


def test_each_prompt_stands_before_another_rows_answer() -> None:
    rows = [Example(np.array([n, n, *[10 + n] * (n + 1)], np.int32), ((2, 3 + n, 1.0),), f"row {n}") for n in range(5)]
    made = MismatchedRows(rows, 6, 0)
    answers = [example.ids[2:].tolist() for example in made]
    assert [example.ids[:2].tolist() for example in made] == [[n, n] for n in range(5)]
    assert all(10 + n not in answer for n, answer in enumerate(answers))
    assert sorted(answer[0] for answer in answers) == [10, 11, 12, 13, 14], "each answer stands somewhere"
    for example, answer in zip(made, answers, strict=True):
        assert example.spans == ((2, 2 + len(answer), 1.0),)
        assert len(example.ids) <= 6
    assert [e.ids.tolist() for e in MismatchedRows(rows, 6, 0)] == [e.ids.tolist() for e in made]
    assert [e.ids.tolist() for e in MismatchedRows(rows, 6, 1)] != [e.ids.tolist() for e in made]
    (alone,) = MismatchedRows(rows[:1], 6, 0)
    assert alone.ids.tolist() == rows[0].ids.tolist()


def test_bad_rows_are_not_what_answers_are_measured_by(
    tiny_model: Callable[..., Path], tmp_path: Path, rated_file: str
) -> None:
    data = {"validation": rated_file, "duplicates": "keep"}
    run = tiny_run(tiny_model(), rated_file, tmp_path / "run", data=data, train={"max_steps": 1})
    veneer.train(run)
    assert veneer.evaluate(tmp_path / "run").as_dict()["rows"] == 4


def test_a_plan_is_made_of_rated_rows(tiny_model: Callable[..., Path], tmp_path: Path, rated_file: str) -> None:
    train = {"max_steps": None, "num_train_epochs": 1}
    planned = veneer.plan(tiny_run(tiny_model(), rated_file, tmp_path / "run", train=train)).as_dict()
    assert planned["rows"]["steps"] == 2
    assert any(advice["id"] == "preference-rate" for advice in planned["advice"])


def test_labels_of_one_kind_are_told(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    rows = [row for row in some_rated() if row["label"]]
    run = tiny_run(tiny_model(), write_rows(tmp_path / "good.jsonl", rows), tmp_path / "run")
    ledger = prepare(run.data, Renderer(load_tokenizer(locate(run.model)), run.data), 0).ledger
    assert any("all rated rows are rated good" in warning for warning in ledger.warnings)


def test_a_rated_row_with_a_cut_answer_is_left_out(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    rows = [*some_rated(4), {"prompt": "what", "completion": "owl " * 60, "label": False}]
    run = tiny_run(
        tiny_model(), write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "run",
        data={"overlong": "truncate", "max_length": 64},
    )  # fmt: skip
    ledger = prepare(run.data, Renderer(load_tokenizer(locate(run.model)), run.data), 0).ledger
    assert (ledger.rows["used"], ledger.rows["overlong"]) == (4, 1)


RATED, PAIRS = some_rated(), some_pairs()
SINGLE = [{"prompt": row["prompt"], "completion": row["completion"]} for row in RATED]
REFUSED: list[tuple[str, list[dict[str, Any]], dict[str, Any], str]] = [
    ("pairs for kto", PAIRS, {"train": {"objective": "kto"}}, "kto learns from rows with prompt, completion and label"),
    ("rated for dpo", RATED, {"train": {"objective": "dpo"}}, "set train.objective=kto"),
    ("rated for orpo", RATED, {"train": {"objective": "orpo"}}, "orpo learns from rows with chosen and rejected"),
    ("rated for sft", RATED, {"train": {"objective": "sft"}}, "data.format=prompt-completion and data.bad_rows=drop"),
    ("single for kto", SINGLE, {"train": {"objective": "kto"}}, "hold single answers"),
    ("single for cpo", SINGLE, {"train": {"objective": "cpo"}}, "hold single answers"),
    ("settings of kto", PAIRS, {"train": {"kto": {}}}, "train.kto: the run's objective is dpo"),
    ("settings of dpo", RATED, {"train": {"dpo": {}}}, "train.dpo: the run's objective is kto"),
    ("settings unnamed", PAIRS, {"train": {"simpo": {}}}, "or set train.objective=simpo"),
    ("smoothing", PAIRS, {"train": {"objective": "cpo", "cpo": {"loss_type": "hinge", "label_smoothing": 0.1}}},
     "train.cpo.label_smoothing = 0.1: has no effect with loss_type hinge"),
    ("loss on all", RATED, {"data": {"loss_on": "all"}}, "data.loss_on = all"),
    ("packing", PAIRS, {"train": {"objective": "orpo"}, "data": {"packing": True}}, "pairs are not packed"),
    ("a rate to be found", RATED, {"train": {"learning_rate": "auto"}}, "name a rate, such as 1e-5"),
    ("one row", RATED[:1], {}, "one row alone"),
    ("a label that is none", [*RATED, RATED[0] | {"label": 3}], {}, "`label` must be true or false"),
    ("empty answers alone", [RATED[0] | {"completion": ""}], {}, "no row is left of 1 (1 empty"),
]  # fmt: skip


@pytest.mark.parametrize(("rows", "sections", "message"), [c[1:] for c in REFUSED], ids=[c[0] for c in REFUSED])
def test_bad_input_is_refused_with_one_message(
    rows: list[dict[str, Any]], sections: dict[str, Any], message: str, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    run = tiny_run(tiny_model(), write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "run", **sections)
    with pytest.raises(UserError) as refused:
        TrainingJob(run)
    assert message in str(refused.value)
    assert not (tmp_path / "run").exists()


def test_a_plan_refuses_rows_that_the_objective_does_not_learn_from(
    tiny_model: Callable[..., Path], tmp_path: Path, rated_file: str
) -> None:
    run = tiny_run(tiny_model(), rated_file, tmp_path / "run", train={"objective": "orpo"})
    with pytest.raises(UserError, match="orpo learns from rows with chosen and rejected"):
        veneer.plan(run)


def test_mixed_files_are_refused(
    tiny_model: Callable[..., Path], tmp_path: Path, pairs_file: str, rated_file: str
) -> None:
    run = tiny_run(tiny_model(), rated_file, tmp_path / "run", data={"train": [rated_file, pairs_file]})
    with pytest.raises(UserError, match="a run learns from one kind of rows"):
        TrainingJob(run)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        *(({name: {"beta": value}}, f"{name}.beta") for name in ("kto", "orpo", "simpo", "cpo") for value in (0, -1)),
        ({"simpo": {"gamma": -1}}, "gamma of 0 or more"),
        ({"kto": {"desirable_weight": 0}}, "desirable_weight above 0"),
        ({"dpo": {"rpo_alpha": -1}}, "rpo_alpha of 0 or more"),
        ({"cpo": {"loss_type": "simpo"}}, "loss_type sigmoid, hinge or ipo"),
        ({"cpo": {"gamma": 1}}, "unknown key `train.cpo.gamma`"),
        ({"objective": "ppo"}, "should be 'auto', 'sft', 'dpo', 'kto', 'orpo', 'simpo' or 'cpo'"),
    ],
)
def test_a_setting_out_of_its_limits_is_refused(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps({"model": {"base": "b"}, "data": {"train": "t"}, "train": settings}))
    with pytest.raises(UserError) as refused:
        veneer.config.load_run(file)
    assert message in str(refused.value)


def test_a_sweep_over_rated_rows_is_refused(tiny_model: Callable[..., Path], tmp_path: Path, rated_file: str) -> None:
    run = tiny_run(tiny_model(), rated_file, tmp_path / "run", data={"validation": 3})
    (tmp_path / "sweep.yaml").write_text(
        json.dumps(
            {
                "run": json.loads(run.model_dump_json()),
                "grid": {"adapter.r": [2, 4]},
                "output_dir": str(tmp_path / "sweep"),
            }
        )
    )
    with pytest.raises(UserError, match="its rows are rated"):
        veneer.sweep(tmp_path / "sweep.yaml")
