"""Advice agrees with the defaults, with itself, and with what a base is: beside test_plan.py, which tests each rule."""

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
import yaml

from tests.unit.test_plan import DATA, FAULTS, TOKENIZER, situation
from veneer.config import Run
from veneer.machine.device import Machine
from veneer.planning.advice import Situation, advise
from veneer.planning.base import PlannedModel
from veneer.planning.forecast import Planner, TargetDevice, place_here, place_of
from veneer.planning.foresee import foresee

GiB = 2**30
CPU = place_here(Machine("cpu", "a CPU", 8, 64 * GiB, 60 * GiB, True))
BASES = [
    *("smollm2-135m-instruct", "meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.1-8B-Instruct", "openai-community/gpt2"),
    "facebook/opt-1.3b",
]
SETTING = re.compile(r"\b([a-z]+)\.([a-z_]+)=([^\s,]+)")


# Defaults


@pytest.mark.parametrize("quantization", [None, {"bits": 4}])
@pytest.mark.parametrize("base", BASES)
def test_the_smallest_run_file_is_not_told_to_change_what_it_did_not_write(
    base: str, quantization: dict[str, int] | None
) -> None:
    run = Run.model_validate({"model": {"base": base}, "data": {"train": "-"}, "quantization": quantization})
    written = {"model.base", "data.train", "quantization"}
    for place in (place_of("12GiB"), place_of("h100"), CPU):
        unread = foresee(run, place, "it was not asked for")
        read = Situation(run, unread.planner.base.shapes, unread.planner.base.stored, unread.forecast, DATA,
                         TOKENIZER, "qlora" if quantization else "lora")  # fmt: skip
        for found in (*unread.advice, *advise(read)):
            assert found.setting in written, f"{base} on {place.name}: {found}"


def test_what_a_gpu_lacks_is_said_even_of_defaults() -> None:
    run = Run.model_validate({"model": {"base": BASES[1]}, "data": {"train": "-"}})
    assert [found.id for found in foresee(run, place_of("t4"), "").advice] == ["no-bfloat16"]


def test_recomputation_that_nobody_asked_for_is_not_complained_of() -> None:
    def fixes(**train: Any) -> list[str]:
        found = advise(situation("h100", train={"engine": "reference"} | train))
        return [advice.fix for advice in found if advice.id == "checkpointing-ample"]

    assert fixes(gradient_checkpointing="auto") == []
    assert fixes(gradient_checkpointing=True) == ["set train.gradient_checkpointing=false"]


# Fixes


FEW = replace(DATA, rows=40, held_out=3)
GPT2 = {"base": "openai-community/gpt2", "data": {"max_length": 1500}}
# Situations beside those that test_plan.py has for each rule, in which a fix could go wrong.
MORE: dict[str, dict[str, Any]] = {
    "rank for layers and rows": {"adapter": {"r": 1024, "lora_alpha": 1024}, "gpu": "h100", "facts": FEW},
    "nothing held out": {"facts": replace(DATA, rows=60, held_out=0)},
    "rank-stabilized": {"adapter": {"r": 64, "lora_alpha": 64, "use_rslora": True}, "facts": replace(DATA, rows=900)},
    "longer than the positions": {"base": "openai-community/gpt2", "facts": replace(DATA, p95=3000)},
    "too long for GPT-2": GPT2 | {"facts": replace(DATA, longest=1400)},
    "too long, unread": GPT2 | {"facts": None, "tokenizer": None},
}  # fmt: skip
FIRING = FAULTS | MORE


def steps_of(found: Situation, steps: int) -> Situation:
    """With so many optimizer steps, which more rows a step make fewer."""
    return replace(found, forecast=replace(found.forecast, rows=replace(found.forecast.rows, steps=steps)))


def settings_of(fix: str) -> dict[str, Any]:
    return {f"{section}.{key}": yaml.safe_load(value.rstrip(";")) for section, key, value in SETTING.findall(fix)}


def changed(found: Situation, settings: dict[str, Any]) -> Situation:
    """The situation of a run with other settings: forecast anew, with what the settings make of the facts."""
    values = found.run.model_dump()
    for name, value in settings.items():
        section, key = name.split(".")
        assert section in values, name
        assert key in type(getattr(Run(**values), section)).model_fields, name
        values[section] = (values[section] or {}) | {key: value}
    run = Run.model_validate(values)
    place = found.forecast.place
    forecast = Planner(PlannedModel(run.model, "it is a test"), place).forecast(run)
    before = found.run
    rows = [r.train.per_device_train_batch_size * r.train.gradient_accumulation_steps for r in (before, run)]
    if (steps := found.forecast.rows.steps) is not None:
        forecast = replace(forecast, rows=replace(forecast.rows, steps=steps * rows[0] // rows[1]))
    data, tokenizer = found.data, found.tokenizer
    if data is not None:
        held_out = (
            run.data.validation if isinstance(run.data.validation, int) and "data.validation" in settings else None
        )
        total = data.rows + data.held_out
        data = replace(data, longest=min(data.longest, run.data.max_length))
        data = data if held_out is None else replace(data, held_out=held_out, rows=total - held_out)
    if tokenizer is not None:
        named = run.data.chat_template not in ("auto", "none")
        tokenizer = replace(tokenizer, uses_own=tokenizer.has_template and not named)
        if data is not None and (named or tokenizer.has_template):
            data = replace(data, end_of_turn=data.rows)
    return replace(found, run=run, forecast=forecast, data=data, tokenizer=tokenizer)


FEW_STEPS = {f"few steps of {rows} x {times}": (rows, times) for rows, times in ((4, 4), (16, 1), (1, 16), (1, 1))}


def firing(name: str) -> Situation:
    if name in FIRING:
        return situation(**FIRING[name])
    rows, times = FEW_STEPS[name]
    train = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": times}
    return steps_of(situation(train=train), 5)


@pytest.mark.parametrize("name", [*FIRING, *FEW_STEPS])
def test_a_fix_is_accepted_and_calls_for_no_other(name: str) -> None:
    before = firing(name)
    fired = advise(before)
    assert fired, "it is a situation with a fault"
    for advice in fired:
        settings = settings_of(advice.fix)
        assert settings or "=" not in advice.fix, advice.fix
        if not settings:
            continue
        after = {found.id: found for found in advise(changed(before, settings))}
        known = {found.id for found in fired}
        new = [found for found in after.values() if found.id not in known]
        assert not [found for found in new if found.severity == "error" or found.setting in settings], (advice.fix, new)
        assert advice.id not in after or not settings_of(after[advice.id].fix), f"{advice.fix} does not help"
        for found in after.values():
            again = settings_of(found.fix)
            contrary = {key for key in settings.keys() & again.keys() if again[key] != settings[key]}
            assert not contrary, f"{advice.id} says {advice.fix}, and then {found.id} {found.fix}"


# What a base is


def test_float16_is_warned_of_only_where_the_base_was_published_in_bfloat16() -> None:
    def warned(base: str, place: TargetDevice) -> bool:
        run = Run.model_validate({"model": {"base": base, "dtype": "float16"}, "data": {"train": "-"}})
        return "fp16-compute" in {found.id for found in foresee(run, place, "").advice}

    place = place_of("h100")
    for base in ("meta-llama/Llama-3.1-8B", "Qwen/Qwen2.5-0.5B"):
        assert warned(base, place), base
    for base in ("meta-llama/Llama-2-7b-hf", "facebook/opt-125m", "openai-community/gpt2"):
        assert not warned(base, place), base


@pytest.mark.parametrize(
    ("written", "stored"), [(None, None), ("float16", torch.float16), ("bfloat16", torch.bfloat16)]
)
def test_the_precision_of_a_folder_is_what_its_configuration_says(
    written: str | None, stored: torch.dtype | None, tmp_path: Any
) -> None:
    more = "" if written is None else f', "dtype": "{written}"'
    (tmp_path / "config.json").write_text(f'{{"model_type": "gpt2", "n_layer": 2{more}}}')
    run = Run.model_validate({"model": {"base": str(tmp_path)}, "data": {"train": "-"}})
    assert PlannedModel(run.model, "").stored == stored


def test_rows_are_assumed_no_longer_than_the_models_positions() -> None:
    def rows(**data: Any) -> Any:
        run = Run.model_validate({"model": {"base": "openai-community/gpt2"}, "data": {"train": "-"} | data})
        return foresee(run, CPU, "").forecast.rows

    assert rows().fullest.length == 1024
    assert rows(max_length=300).fullest.length == 300
    assert rows(packing=True).fullest.length == 2048, "a pack holds several rows"
