"""A plan counts evaluation as it will be done: rows at a time, the verdict, and what `veneer evaluate` then does."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import veneer
from tests.support.plans import kinds, planner_of, run_of
from tests.support.runs import tiny_run, write_rows
from veneer.cli.main import main
from veneer.config import load_run
from veneer.engine.trace import Peak
from veneer.model.known import smaller_siblings
from veneer.planning.batch_shapes import Lengths, Padded
from veneer.planning.forecast import Forecast
from veneer.planning.held_out import SPARE, rows_that_fit
from veneer.planning.model_sizes import least_memory, model_sizes, smaller_bases
from veneer.planning.target import TargetDevice, device_named, this_device
from veneer.training.job import TrainingJob

RECIPES = sorted((Path(__file__).parents[2] / "recipes" / "guides").glob("*.yaml"))


def test_rows_are_halved_until_they_fit_with_room_to_spare() -> None:
    def fitting(asked: int, budget: float) -> int:
        return rows_that_fit(asked, lambda rows: Peak(100 + 10 * rows, {}), 100, int(budget))

    assert fitting(16, 1000) == 16
    assert fitting(16, 260 * (1 + SPARE)) == 16
    assert fitting(16, 260) == 8, "no room to spare"
    assert fitting(16, 150) == 4
    assert fitting(10, 190) == 5
    assert fitting(16, 105) == 1, "too much even so, which the verdict says"
    assert fitting(16, 50) == 1


@pytest.mark.parametrize(
    ("path", "gpu"),
    [(path, ("8GiB", "24GiB")[n % 2]) for n, path in enumerate(RECIPES)],
    ids=lambda case: Path(case).stem,
)
def test_the_verdict_is_that_of_all_phases_shown(path: Path, gpu: str) -> None:
    run = load_run(path)
    found = planner_of(run, gpu).forecast(run)
    plan = found.as_dict()
    assert {"evaluation", "generation"} <= set(plan["phases"])
    assert plan["peak_bytes"] == max(peak["bytes"] for peak in plan["phases"].values())
    assert plan["peak_bytes"] == sum(plan["components"].values())
    assert plan["margin_bytes"] == plan["budget_bytes"] - plan["peak_bytes"]
    assert plan["fits"] == all(peak["bytes"] <= plan["budget_bytes"] for peak in plan["phases"].values())
    for phase, rows in plan["rows_at_a_time"].items():
        assert 1 <= rows <= run.evaluate.batch_size
        fits = plan["phases"][phase]["bytes"] * (1 + SPARE) <= plan["budget_bytes"]
        assert fits or rows == 1, "a phase that adapts itself is too large only with a single row"


def test_evaluation_takes_fewer_rows_before_it_makes_a_run_too_large() -> None:
    run = run_of("meta-llama/Llama-2-7b-hf", quantization={"bits": 4}, data={"max_length": 2048, "validation": 9},
                 train={"per_device_train_batch_size": 1})  # fmt: skip
    forecasts = [planner_of(run, gpu).forecast(run) for gpu in ("80GiB", "24GiB", "10GiB")]
    rows = [found.rows_at_a_time["generation"] for found in forecasts]
    assert [found.verdict for found in forecasts] == ["fits"] * 3
    assert rows[0] == 16
    assert rows[0] > rows[1] > rows[2] >= 1
    assert kinds(run, "10GiB") == ([], run), "nothing to change"


def test_only_answers_too_long_for_one_row_need_a_change() -> None:
    # Llama 2 keeps half a megabyte a token: 4,096 tokens are 2 GiB.
    data = {"max_length": 256, "validation": 9}
    train = {"per_device_train_batch_size": 1}
    run = run_of("meta-llama/Llama-2-7b-hf", quantization={"bits": 4}, data=data, train=train,
                 evaluate={"max_new_tokens": 4000})  # fmt: skip
    found = planner_of(run, "6GiB").forecast(run)
    assert (found.peak_phase, found.rows_at_a_time["generation"], found.verdict) == ("generation", 1, "does not fit")
    changes, changed = kinds(run, "6GiB")
    assert changes == ["answers"]
    assert changed is not None
    assert changed.evaluate.max_new_tokens < 4000


def test_rows_without_held_out_ones_have_no_evaluation() -> None:
    run = run_of()
    found = planner_of(run, "24GiB").forecast(run)
    assert found.rows_at_a_time == {}
    assert set(found.phases) == {"load", "forward", "backward", "optimizer"}


def test_a_plan_knows_the_rows_that_are_answered() -> None:
    lengths = np.array([50, 400, 30, 900])
    run = run_of(data={"validation": 3}, evaluate={"rows": 3})
    data = Lengths(lengths, lengths - 9), Lengths(lengths, lengths - 9)
    rows = planner_of(run, "24GiB", data).rows(run)
    assert rows.answered == Padded(3, 400, 391), "the first three"


def test_evaluate_takes_the_rows_that_the_plan_showed(
    tiny_model: Callable[..., Path], tmp_path: Path, rows: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_rows(tmp_path / "rows.jsonl", rows)
    data = {"validation": path, "duplicates": "keep"}
    run = tiny_run(tiny_model(), path, tmp_path / "run", data=data, train={"max_steps": 1})
    TrainingJob(run).fit()

    def planned(target: TargetDevice) -> Forecast:
        for user in ("plan", "load"):
            monkeypatch.setattr(f"veneer.api.{user}.this_device", lambda *_: target)
        return veneer.plan(run).prediction.forecast

    here = this_device()
    phase = planned(here).phases["generation"]
    whole = phase.bytes - sum(phase.components[name] for name in ("activations", "generation cache"))
    seen: list[int] = []
    for share in (2.0, 0.8, 0.3):
        budget = (whole + share * (phase.bytes - whole)) * (1 + SPARE)
        shown = planned(replace(here, budget_bytes=int(budget))).rows_at_a_time["generation"]
        batches: list[int] = []
        veneer.evaluate(tmp_path / "run", on_done=batches.append)
        assert max(batches) == shown
        seen.append(shown)
    assert seen[0] == 16
    assert seen[0] > seen[1] > seen[2]


# A smaller base


def test_a_smaller_base_is_of_the_same_family_and_kind() -> None:
    def names(base: str) -> list[str]:
        return [name.rpartition("/")[2] for name in smaller_siblings(base)]

    assert names("meta-llama/Meta-Llama-3.1-8B-Instruct") == ["Llama-3.2-3B-Instruct", "Llama-3.2-1B-Instruct"]
    assert names("meta-llama/Meta-Llama-3-70B-Instruct") == ["Meta-Llama-3-8B-Instruct"]
    assert names("unsloth/llama-3-70b-bnb-4bit") == ["llama-3-8b-bnb-4bit"]
    assert names("meta-llama/Llama-2-70b-chat-hf") == ["Llama-2-13b-chat-hf", "Llama-2-7b-chat-hf"]
    assert names("openai-community/gpt2-xl") == ["gpt2-large", "gpt2-medium", "gpt2"]
    assert names("Qwen/Qwen3-4B-Base") == ["Qwen3-1.7B-Base", "Qwen3-0.6B-Base"]
    assert names("HuggingFaceTB/SmolLM2-360M-Instruct") == ["SmolLM2-135M-Instruct"]
    for alone in ("Qwen/Qwen2.5-Coder-7B", "meta-llama/Llama-3.2-11B-Vision", "mistralai/Mistral-7B-v0.3",
                  "somebody/gpt2-xl", "openai-community/gpt2"):  # fmt: skip
        assert names(alone) == [], alone


def test_smaller_bases_come_from_large_to_small() -> None:
    run = run_of("meta-llama/Llama-3.3-70B-Instruct")
    totals = [planner.base.shapes.total for _, planner in smaller_bases(run, planner_of(run, "8GiB"))]
    assert totals == sorted(totals, reverse=True)
    assert len(totals) == 3, "the 3.1 of the same size is no help"


def test_no_base_of_another_family_is_offered() -> None:
    assert kinds(run_of("openai-community/gpt2"), "900MiB") == ([], None)
    found, changed = kinds(run_of("openai-community/gpt2-xl", train={"per_device_train_batch_size": 1}), "1.6GiB")
    assert found[0] == "base"
    assert changed is not None
    assert changed.model.base.startswith("openai-community/gpt2")


def test_the_table_of_what_a_machine_can_train_counts_evaluation_too() -> None:
    run = run_of("Qwen/Qwen2.5-0.5B", data={"max_length": 2048, "validation": 0.05})
    model = next(model for model in model_sizes(run, device_named("6GiB")) if model.base == run.model.base)
    lean = least_memory(run)
    found = planner_of(lean, "6GiB").forecast_as(lean, "lora")
    assert model.peak_bytes["lora"] == found.peak_bytes == max(peak.bytes for peak in found.phases.values())
    assert found.rows_at_a_time == {"evaluation": 1, "generation": 1}


def test_phases_are_shown_with_their_rows(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("model: {base: meta-llama/Llama-2-7b-hf}\nquantization: {bits: 4}\ndata: {train: rows.jsonl}\n")
    with pytest.raises(SystemExit):
        main(["plan", str(path), "--gpu", "10GiB", "--no-data"])
    shown = capsys.readouterr().out
    run = load_run(path)
    for phase, rows in planner_of(run, "10GiB").forecast(run).rows_at_a_time.items():
        assert re.search(rf"{phase}, {rows} rows? at a time", shown)


def test_the_time_of_answers_during_training_is_counted() -> None:
    def seconds(**evaluate: Any) -> float:
        run = run_of("meta-llama/Llama-2-7b-hf", data={"validation": 9}, train={"max_steps": 40}, evaluate=evaluate)
        found = planner_of(run, "H100").forecast(run).run_seconds
        assert found is not None
        return found[1]

    plain = seconds()
    assert seconds(during=["perplexity"]) == plain, "the loss is measured in any case"
    short, long = (seconds(during=["exact_match"], max_new_tokens=tokens) - plain for tokens in (16, 64))
    assert 0 < short < long < 8 * short
    assert seconds(during=["exact_match"], max_new_tokens=64, during_tokens=400) - plain < long
