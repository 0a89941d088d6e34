"""Each rule of advice finds its fault; advice agrees with the defaults, with itself, and with what a base is."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from tools.advice_page import HANDLED, advice_page

import veneer
from tests.support.plans import planner_of, run_of
from tests.support.runs import write_rows
from veneer.config import Run
from veneer.machine.device import Machine
from veneer.machine.speeds import link_of
from veneer.planning.advice import RULES, DataFacts, Situation, TokenizerFacts, advise
from veneer.planning.base import PlannedModel
from veneer.planning.gpus import OnGpus
from veneer.planning.planner import Planner
from veneer.planning.predict import predict_run, prepare_if_local
from veneer.planning.target import TargetDevice, device_named, this_device

GiB = 2**30
SEVEN = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
CPU = this_device(Machine("cpu", "a CPU", 8, 64 * GiB, 60 * GiB, True))
BASES = [
    *("smollm2-135m-instruct", "meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.1-8B-Instruct", "openai-community/gpt2"),
    "facebook/opt-1.3b",
]
SETTING = re.compile(r"\b([a-z]+)\.([a-z_]+)=([^\s,]+)")


# Rules

DATA = DataFacts(rows=20_000, held_out=500, p95=500, longest=900, end_of_turn=40_000, raw=False)
TOKENIZER = TokenizerFacts(has_template=True, uses_own=True)
SOUND: dict[str, Any] = {
    "adapter": {"r": 16, "lora_alpha": 32, "lora_dropout": 0},
    "train": {"learning_rate": 2e-4, "warmup_ratio": 0.03, "gradient_checkpointing": "auto", "optim": "adamw_8bit",
              "max_grad_norm": 1.0, "num_train_epochs": 2},
    "evaluate": {"batch_size": 1},
}  # fmt: skip


def situation(gpu: str = "rtx 3060", base: str = "meta-llama/Llama-3.2-3B", **changes: Any) -> Situation:
    """Settings without fault, but for the changes: `section={...}` of the run, or a fact of the situation."""
    sections = {name: value for name, value in changes.items() if name in Run.model_fields}
    facts = {name: value for name, value in changes.items() if name not in Run.model_fields}  # of the situation
    values: dict[str, Any] = {name: dict(section) for name, section in SOUND.items()}
    for name, section in sections.items():
        values[name] = values.get(name, {}) | section if section is not None else None
    run = run_of(base, **values)
    planner = planner_of(run, gpu)
    given: dict[str, Any] = {"tokenizer": TOKENIZER} | facts
    known = given.pop("facts", DATA)
    return Situation(run, planner.base.shapes, torch.bfloat16, planner.forecast(run), known, **given)


def ids(found: Situation) -> set[str]:
    return {advice.id for advice in advise(found)}


# Rule: a situation that it must find, beside `situation()` that it must not.
FAULTS: dict[str, dict[str, Any]] = {
    "alpha-low": {"adapter": {"lora_alpha": 4}},
    "alpha-high": {"adapter": {"lora_alpha": 128}},
    "rank-for-rows": {"adapter": {"r": 64, "lora_alpha": 64}, "facts": replace(DATA, rows=900)},
    "rank-for-layer": {"adapter": {"r": 1024, "lora_alpha": 1024}, "gpu": "h100"},
    "attention-only": {"adapter": {"target_modules": ["q_proj", "v_proj"]}},
    "tied-embedding": {"adapter": {"target_modules": [*SEVEN, "embed_tokens"]}},
    "dropout-large-data": {"adapter": {"lora_dropout": 0.05}, "facts": replace(DATA, rows=60_000)},
    "learning-rate": {"train": {"learning_rate": 2e-6}},
    "preference-rate": {"facts": replace(DATA, has_pairs=True)},
    "no-warmup": {"train": {"warmup_ratio": 0}},
    "epochs-many": {"train": {"num_train_epochs": 10}, "facts": replace(DATA, rows=1000)},
    "no-clipping": {"train": {"max_grad_norm": 0}},
    "paged-ample": {"train": {"optim": "paged_adamw_8bit"}},
    "fp16-compute": {"model": {"dtype": "float16"}},
    "fp32-on-4bit": {"model": {"dtype": "float32"}, "quantization": {"bits": 4}},
    "no-bfloat16": {"gpu": "t4"},
    "requantized-merge": {"quantization": {"bits": 4}},
    "16-bit-fits": {"quantization": {"bits": 4}, "gpu": "h100"},
    "eager-attention": {"model": {"attn_implementation": "eager"}},
    "flash-missing": {"model": {"attn_implementation": "flash_attention_2"}},
    "flash4-missing": {"gpu": "h100", "data": {"max_length": 8192}},
    "checkpointing-ample": {"gpu": "h100", "train": {"engine": "reference", "gradient_checkpointing": True}},
    "foreign-template": {"tokenizer": replace(TOKENIZER, uses_own=False), "data": {"chat_template": "chatml"}},
    "raw-text": {"data": {"chat_template": "none"}},
    "no-template": {"tokenizer": replace(TOKENIZER, has_template=False)},
    "no-end-token": {"facts": replace(DATA, end_of_turn=0)},
    "max-length-low": {"facts": replace(DATA, p95=1500)},
    "pair-lengths": {
        "facts": replace(DATA, has_pairs=True, longer=0.1),
        "train": {"learning_rate": 1e-5},
    },
    "held-out-small": {"facts": replace(DATA, held_out=20)},
    "prompts-trained": {"data": {"loss_on": "all"}},
}


def test_the_readme_counts_the_rules_there_are() -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    assert f"| {len(RULES)} rules look at" in readme


# Rule: a run that earns it, as changes of a sound one. `base`: a model of `bases`, whose rows are read, or a known one.
EARNED: dict[str, dict[str, Any]] = {
    **{rule: changes for rule, changes in FAULTS.items() if not {"facts", "tokenizer"} & changes.keys()},
    "rank-for-rows": {"base": "chat", "adapter": {"r": 64, "lora_alpha": 64}},
    "experts": {"base": "experts"},
    "dropout-large-data": {"base": "chat", "adapter": {"lora_dropout": 0.05}, "data": {"train": "many.txt"}},
    "preference-rate": {"base": "chat", "data": {"train": "pairs.jsonl"}},
    "pair-lengths": {"base": "chat", "data": {"train": "long-pairs.jsonl"}, "train": {"learning_rate": 1e-5}},
    "epochs-many": {"base": "chat", "train": {"num_train_epochs": 4}},
    "few-steps": {"base": "chat", "train": {"per_device_train_batch_size": 32}},
    "quantized-twice": {"base": "smollm2-135m-instruct", "quantization": {"bits": 4}},
    "foreign-template": {"base": "chat", "data": {"chat_template": "alpaca"}},
    "raw-text": {"base": "chat", "data": {"chat_template": "none"}},
    "no-template": {"base": "plain"},
    "no-end-token": {"base": "chat", "data": {"train": "long.jsonl", "overlong": "truncate", "max_length": 60}},
    "max-length-low": {"base": "chat", "data": {"max_length": 36}},
    "second-gpu": {"base": "chat", "gpus": 2},
    "positions": {"base": "openai-community/gpt2", "data": {"max_length": 1500}},
    "held-out-small": {"base": "chat", "data": {"validation": 20}},
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[..., Path]) -> Path:
    """Folders of tiny models, rows and templates."""
    folder = tmp_path_factory.mktemp("advice")
    for name, chat in (("chat", True), ("plain", False)):
        (folder / name).symlink_to(tiny_model(chat=chat))
    transformers.MixtralConfig(
        hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=384, num_local_experts=8, dtype="bfloat16",
    ).save_pretrained(folder / "experts")  # fmt: skip
    rows = [{"prompt": f"what does the cat say to {n}" + " please" * (n % 9), "completion": "cat"} for n in range(800)]
    write_rows(folder / "rows.jsonl", rows)
    (folder / "many.txt").write_text("".join(f"{n}\n" for n in range(50_200)))
    write_rows(folder / "pairs.jsonl", [{"prompt": row["prompt"], "chosen": "cat", "rejected": "dog"} for row in rows])
    long_pairs = [{"prompt": row["prompt"], "chosen": "cat " * 5, "rejected": "dog"} for row in rows]
    write_rows(folder / "long-pairs.jsonl", long_pairs)
    write_rows(folder / "long.jsonl", [row | {"completion": "cat " * 60} for row in rows])
    return folder


def advised(
    base: str = "meta-llama/Llama-3.2-3B", gpu: str = "rtx 3060", gpus: int = 1, **changes: Any
) -> dict[str, dict[str, str]]:
    """What `veneer plan` says of a run whose settings are sound but for the changes, by rule.

    Without the search for what would make it fit.
    """
    values: dict[str, Any] = {name: dict(section) for name, section in SOUND.items()}
    values["model"] = {"base": base}
    values["data"] = {"train": "rows.jsonl", "validation": 200, "max_length": 200, "workers": 1}
    for name, section in changes.items():
        values[name] = values.get(name, {}) | section
    run = Run.model_validate(values)
    planned = predict_run(run, device_named(gpu, gpus=gpus), prepare_if_local(run)).as_dict()
    return {advice["id"]: advice for advice in planned["advice"]}


def test_every_rule_is_earned_by_a_run() -> None:
    rules = [rule.id for rule in RULES]
    assert sorted(EARNED) == sorted(rules), "a rule of advice and the run that earns it"


@pytest.mark.parametrize("rule", EARNED)
def test_a_plan_finds_the_fault_of_a_run_and_says_what_to_do(
    rule: str, bases: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(bases)
    found = advised(**EARNED[rule])
    assert rule in found, f"{rule} is not among {sorted(found)}"
    advice = found[rule]
    assert advice["severity"] in ("error", "warning", "info")
    assert advice["message"].endswith(")"), "the source stands at the end"
    assert advice["fix"]


def test_a_plan_leaves_sound_runs_in_peace(bases: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(bases)
    assert advised() == advised("chat") == {}
    run = Run.model_validate(SOUND | {"model": {"base": "chat"}, "data": {"train": "rows.jsonl", "validation": 200}})
    found = {advice["id"]: advice for advice in veneer.plan(run, "rtx 3060").as_dict()["advice"]}
    assert found == {}, "a plan says no more"
    assert set(advised("meta-llama/Llama-3.1-8B", quantization={"bits": 4})) == {"requantized-merge"}


def test_a_rate_for_pairs_is_not_too_low_for_lora() -> None:
    facts = replace(DATA, has_pairs=True)
    assert ids(situation(facts=facts, train={"learning_rate": 5e-6})) == set()
    assert ids(situation(facts=facts, train={"learning_rate": 2e-3})) == {"preference-rate"}


@pytest.mark.parametrize(
    ("adapter", "usual"),
    [({"method": "vera"}, 2e-3), ({"method": "ia3"}, 2e-3), ({"method": "oft"}, 2e-4), (None, 2e-5)],
)
def test_rates_are_judged_by_what_is_usual_for_the_method(adapter: Any, usual: float) -> None:
    """Of a method that has neither, nothing is said of ranks and scales."""
    gpu, facts = "h100", replace(DATA, rows=900)
    kept = None if adapter is None else KEPT | adapter
    assert ids(situation(gpu, adapter=kept, facts=facts, train={"learning_rate": usual})) == set()
    for rate in (usual / 20, usual * 10):
        (found,) = advise(situation(gpu, adapter=kept, facts=facts, train={"learning_rate": rate}))
        assert (found.id, found.fix) == ("learning-rate", f"set train.learning_rate={usual:g}")
    pairs = replace(DATA, has_pairs=True)
    (found,) = advise(situation(gpu, adapter=kept, facts=pairs, train={"learning_rate": usual}))
    assert (found.id, found.fix) == ("preference-rate", f"set train.learning_rate={usual / 20:g}")


KEPT = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0}


def test_a_large_rank_of_vera_is_no_fault() -> None:
    assert ids(situation(adapter=KEPT | {"method": "vera", "r": 1024}, facts=replace(DATA, rows=900))) == set()


def test_the_fix_of_few_adapted_layers_changes_what_leaves_them_out() -> None:
    (found,) = advise(situation(adapter={"exclude_modules": ["gate_proj", "up_proj", "down_proj"]}))
    assert (found.id, found.fix) == ("attention-only", "leave adapter.exclude_modules out")
    assert ids(situation(adapter={"layers_to_transform": [26, 27]})) == set()


def test_released_gradients_are_not_clipped_on_purpose() -> None:
    train = {"learning_rate": 2e-5, "max_grad_norm": 0, "gradient_accumulation_steps": 1}
    assert "no-clipping" in ids(situation("h100", adapter=None, train=train | {"gradient_accumulation_steps": 2}))
    assert "no-clipping" not in ids(situation("h100", adapter=None, train=train))


def test_pairs_whose_chosen_answers_are_longer_by_chance_are_no_fault() -> None:
    train = {"learning_rate": 1e-5}
    for rows, longer in ((10_000, 0.75), (10_000, 0.3), (10, 1.0), (10_000, None)):
        facts = replace(DATA, has_pairs=True, rows=rows, longer=longer)
        assert "pair-lengths" not in ids(situation(facts=facts, train=train))
    facts = replace(DATA, has_pairs=True, longer=0.93)
    (found,) = [one for one in advise(situation(facts=facts, train=train)) if one.id == "pair-lengths"]
    assert "the chosen answer is the longer one in 93% of the pairs" in found.message


def test_rows_that_are_too_long_and_a_base_quantized_before() -> None:
    sound = situation()
    assert "positions" in ids(replace(sound, shapes=replace(sound.shapes, positions=512)))
    assert "quantized-twice" not in ids(situation(file_type="Q4_1"))


def test_the_engine_that_spends_memory_itself_is_told_to_where_it_may_not() -> None:
    fixes = {advice.id: advice.fix for advice in advise(situation("h100", train={"gradient_checkpointing": True}))}
    assert fixes["checkpointing-ample"] == "set train.gradient_checkpointing=auto"
    assert "checkpointing-ample" not in ids(situation("h100"))


@pytest.mark.parametrize(
    ("two", "said"),
    [
        ({"run_seconds": 8000.0, "gain": 1.25, "exchange_seconds": 0.2}, "20% of a step is the exchange of gradients"),
        ({"run_seconds": 8000.0, "gain": 1.25, "busiest": 1.6}, "one of two GPUs gets 60% more tokens"),
        ({"run_seconds": 9000.0, "gain": 1.1, "rows_per_step": 9}, "there are 9 rows"),
        ({"run_seconds": 9975.0, "gain": 1.0}, "saves 25 s, about what a run takes to start"),
        ({"run_seconds": 10_250.0, "gain": 0.98, "exchange_seconds": 0.5}, "0.98 times as fast: 50% of a step is"),
        ({"run_seconds": 5000.0, "gain": 2.0}, ""),
    ],
    ids=["slow link", "uneven rows", "few rows", "short run", "slower", "worth it"],
)
def test_a_second_gpu_that_gains_little_is_told_with_the_reason(two: dict[str, Any], said: str) -> None:
    one = OnGpus(1, GiB, 8, 100, 0.0, 1.0, 1.0, 10_000.0, 1000.0, 1.0)
    other = replace(one, **({"gpus": 2, "rows_per_step": 16} | two))
    sound = situation()
    target = replace(sound.forecast.target, gpus=2, gpu_link=link_of(None))
    found = advise(replace(sound, forecast=replace(sound.forecast, target=target), by_gpus=[one, other]))
    assert [advice.id for advice in found] == (["second-gpu"] if said else [])
    assert said in "".join(advice.message for advice in found)


def test_rules_about_what_was_not_read_keep_still() -> None:
    unread = replace(situation(**FAULTS["max-length-low"]), data=None, tokenizer=None)
    assert ids(unread) == set()


# The guides' own lists: what each calls a pitfall is found by a rule (an id), or cannot be done (an entry of HANDLED).
GUIDES: dict[str, tuple[str, ...]] = {
    "guide 0, 8: wrong chat template": ("foreign-template", "hand-written template"),
    "guide 0, 8: use_cache with checkpointing": ("forgotten use_cache=False",),
    "guide 0, 8: load_in_8bit": ("8-bit base",),
    "guide 0, 8: flash_attention_2 not installed": ("flash-missing", "eager-attention"),
    "guide 0, 8: chat model on raw text": ("raw-text",),
    "guide 0, 8: saving the full model": ("saving the full model",),
    "guide 0, 8: merging at fp16": ("merging in float16",),
    "guide 1: unstable training": ("learning-rate", "no-warmup", "no-clipping"),
    "guide 1: overfitting": ("epochs-many", "rank-for-rows"),
    "guide 2: prepare_model_for_kbit_training": ("forgotten prepare_model_for_kbit_training",),
    "guide 2: fp16 with a bf16 model": ("fp16-compute",),
    "guide 2: catastrophic forgetting": ("epochs-many",),
    "guide 2: no EOS, wrong template": ("no-end-token", "foreign-template", "padding that masks the end token"),
    "guide 2: rank too high": ("rank-for-rows",),
    "guide 3, code: no LoRA configuration": ("get_peft_model without a config",),
    "guide 3, code: merged into 4 bits": ("merging into a 4-bit base",),
    "guide 3, code: fp16 training": ("fp16-compute",),
    "guide 4, mistake 1: alpha too low": ("alpha-low",),
    "guide 4, mistake 2: use_cache": ("forgotten use_cache=False", "forgotten enable_input_require_grads"),
    "guide 4, mistake 3: q and v only": ("attention-only",),
    "guide 4, mistake 4: too many epochs": ("epochs-many",),
}


@pytest.mark.parametrize("pitfall", GUIDES)
def test_every_pitfall_of_the_guides_is_caught(pitfall: str) -> None:
    assert set(GUIDES[pitfall]) <= set(FAULTS) | set(HANDLED)


def test_the_three_bugs_of_guide_4_are_found() -> None:
    run = {
        "quantization": {"bits": 4, "quant_type": "nf4", "double_quant": True},
        "model": {"dtype": "float32"},
        "adapter": {"r": 32, "lora_alpha": 8, "lora_dropout": 0.05, "target_modules": ["q_proj", "v_proj"]},
    }
    found = ids(situation("rtx 4090", "meta-llama/Llama-2-7b-hf", **run))
    assert {"fp32-on-4bit", "alpha-low"} <= found, "two of its three bugs; the third, a key-value cache, cannot be"
    assert "attention-only" in found, "and the fourth, which it does not count"


def test_the_mistakes_of_guide_4_are_found() -> None:
    assert "alpha-low" in ids(situation(adapter={"r": 16, "lora_alpha": 1}))
    assert "epochs-many" in ids(situation(train={"num_train_epochs": 10}, facts=replace(DATA, rows=1000)))


def test_the_page_of_advice_is_what_the_rules_are() -> None:
    page = Path(__file__).parents[2] / "docs" / "advice.md"
    assert page.read_text() == advice_page(), "run `make docs`"


# Defaults


SMALL, LARGE = device_named("12GiB"), device_named("h100")


@pytest.mark.parametrize("quantization", [None, {"bits": 4}])
@pytest.mark.parametrize("base", BASES)
def test_the_smallest_run_file_is_not_told_to_change_what_it_did_not_write(
    base: str, quantization: dict[str, int] | None
) -> None:
    run = Run.model_validate({"model": {"base": base}, "data": {"train": "-"}, "quantization": quantization})
    written = {"model.base", "data.train", "quantization"}
    for target in (SMALL, CPU) if quantization else (SMALL, LARGE):
        unread = predict_run(run, target, "it was not asked for")
        read = Situation(run, unread.planner.base.shapes, unread.planner.base.stored, unread.forecast, DATA,
                         TOKENIZER, "qlora" if quantization else "lora")  # fmt: skip
        for found in (*unread.advice, *advise(read)):
            assert found.setting in written, f"{base} on {target.name}: {found}"


def test_what_a_gpu_lacks_is_said_even_of_defaults() -> None:
    run = Run.model_validate({"model": {"base": BASES[1]}, "data": {"train": "-"}})
    assert [found.id for found in predict_run(run, device_named("t4"), "").advice] == ["no-bfloat16"]


def test_recomputation_that_nobody_asked_for_is_not_complained_of() -> None:
    def fixes(**train: Any) -> list[str]:
        found = advise(situation("h100", train={"engine": "reference"} | train))
        return [advice.fix for advice in found if advice.id == "checkpointing-ample"]

    assert fixes(gradient_checkpointing="auto") == []
    assert fixes(gradient_checkpointing=True) == ["set train.gradient_checkpointing=false"]


# Fixes


FEW = replace(DATA, rows=40, held_out=3)
GPT2 = {"base": "openai-community/gpt2", "data": {"max_length": 1500}}
# Situations beside those of each rule, in which a fix could go wrong.
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
    target = found.forecast.target
    forecast = Planner(PlannedModel(run.model, "it is a test"), target).forecast(run)
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
    def warned(base: str, target: TargetDevice) -> bool:
        run = Run.model_validate({"model": {"base": base, "dtype": "float16"}, "data": {"train": "-"}})
        return "fp16-compute" in {found.id for found in predict_run(run, target, "").advice}

    target = device_named("h100")
    for base in ("meta-llama/Llama-3.1-8B", "Qwen/Qwen2.5-0.5B"):
        assert warned(base, target), base
    for base in ("meta-llama/Llama-2-7b-hf", "facebook/opt-125m", "openai-community/gpt2"):
        assert not warned(base, target), base


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
        return predict_run(run, CPU, "").forecast.rows

    assert rows().fullest.length == 1024
    assert rows(max_length=300).fullest.length == 300
    assert rows(packing=True).fullest.length == 2048, "a pack holds several rows"
