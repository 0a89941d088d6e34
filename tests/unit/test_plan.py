"""What fits, what to change, what is wrong with the settings, and what ails a machine."""

from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch

import veneer
from veneer.config import Run, UserError
from veneer.machine.cards import CARDS, find_card, parse_budget
from veneer.machine.device import Machine
from veneer.planning.advice import HANDLED, RULES, DataFacts, Situation, TokenizerFacts, advise
from veneer.planning.base import PlannedModel
from veneer.planning.doctor import Found, Gpu, diagnose, usable
from veneer.planning.fit import apply, fit
from veneer.planning.forecast import Planner, place_here, place_of
from veneer.planning.model_sizes import compare, model_sizes, smaller_bases
from veneer.planning.reference import advice_page

GiB = 2**30
SEVEN = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def run_of(base: str = "meta-llama/Llama-3.2-1B", **sections: Any) -> Run:
    values: dict[str, Any] = {
        "model": {"base": base},
        "data": {"train": "-", "max_length": 1024, "validation": 0},
        "train": {},
    }
    for name, section in sections.items():
        values[name] = values.get(name, {}) | section if section is not None else None
    return Run.model_validate(values)


def planner_of(run: Run, gpu: str, lengths: Any = "it is a test") -> Planner:
    return Planner(PlannedModel(run.model, lengths), place_of(gpu))


# Cards and sizes


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("24GiB", 24 * GiB), ("24 gib", 24 * GiB), ("16GB", 16 * 10**9), ("512MiB", GiB // 2),
        ("rtx 4090", 24564 * 2**20), ("NVIDIA GeForce RTX 4090", 24564 * 2**20), ("H100", 81559 * 2**20),
        ("NVIDIA H100 80GB HBM3", 81559 * 2**20), ("NVIDIA A100-SXM4-80GB", 81920 * 2**20), ("Tesla T4", 15360 * 2**20),
    ],
)  # fmt: skip
def test_cards_and_sizes_as_people_write_them(text: str, expected: int) -> None:
    assert parse_budget(text)[0] == expected


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("24", "a number without a unit"), ("0GiB", "more than nothing"), ("-8GiB", "more than nothing"),
        ("24TiB", "unknown unit"), ("rtx 4095", "nearest: rtx 40"), ("", "unknown card"), ("cpu", "unknown card"),
    ],
)  # fmt: skip
def test_what_is_no_card_and_no_size_is_refused_with_the_nearest(text: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        parse_budget(text)


def test_every_card_is_found_by_its_own_name() -> None:
    for name, card in CARDS.items():
        assert find_card(name) is card
        assert find_card(f"NVIDIA {name.upper()}") is card


# What fits


def test_a_known_gpu_at_hand_has_the_speed_of_its_data_sheet_until_it_is_measured(empty_cache: Path) -> None:
    assert place_here(CUDA).ceilings == place_of("h100").ceilings
    assert place_here(CPU).ceilings is None


def test_a_forecast_says_which_phase_peaks_and_by_how_much_it_fits() -> None:
    run = run_of()
    roomy, tight = planner_of(run, "80GiB").forecast(run), planner_of(run, "3GiB").forecast(run)
    assert roomy.peak_bytes == tight.peak_bytes == max(peak.bytes for peak in roomy.phases.values())
    assert roomy.phases[roomy.peak_phase].bytes == roomy.peak_bytes
    assert (roomy.verdict, tight.verdict) == ("fits", "does not fit")
    assert roomy.margin_bytes == place_of("80GiB").budget_bytes - roomy.peak_bytes
    assert roomy.trainable == 11_272_192
    assert roomy.disk_bytes > 4 * roomy.trainable
    timed = planner_of(run, "rtx 4090").forecast(run)
    assert timed.step_seconds is not None
    assert timed.step_seconds[0] < timed.step_seconds[1] < timed.step_seconds[2]
    assert roomy.step_seconds is None, "an amount of memory has no speed"


def test_copies_of_4_bit_weights_on_a_cpu_are_counted_where_they_are_made() -> None:
    run = run_of(quantization={"bits": 4}, train={"optim": "adamw_torch"})

    def copies(free: int, device: str) -> set[int]:
        place = replace(place_here(replace(CPU, free_bytes=free)), device=device, budget_bytes=free)
        found = Planner(PlannedModel(run.model, "it is a test"), place).forecast(run).phases
        return {peak.components.get("16-bit copies", 0) for name, peak in found.items() if name != "load"}

    weights = PlannedModel(run.model, "it is a test").shapes
    needed = 2 * sum(prod(weights.weights[f"{path}.weight"]) for path in weights.quantizable())
    assert copies(8 * needed, "cpu") == {needed}
    assert copies(8 * needed - 1, "cpu") == {0}
    assert copies(8 * needed, "cuda") == {0}


def test_what_costs_memory_is_foreseen_to_cost_it() -> None:
    def peak(**sections: Any) -> int:
        run = run_of(**sections)
        return planner_of(run, "80GiB").forecast(run).peak_bytes

    usual = peak()
    assert peak(quantization={"bits": 4}) < usual
    assert peak(quantization={"bits": 4, "double_quant": False}) > peak(quantization={"bits": 4})
    assert peak(adapter={"r": 64}) > usual
    assert peak(data={"max_length": 2048}) > usual
    assert peak(train={"per_device_train_batch_size": 8}) > usual
    assert peak(train={"gradient_checkpointing": False}) > usual
    assert peak(model={"dtype": "float32"}) > 1.5 * usual
    assert peak(train={"optim": "adamw_torch"}) >= usual


def kinds(run: Run, gpu: str, lengths: Any = "it is a test") -> tuple[list[str], Run | None]:
    planner = planner_of(run, gpu, lengths)
    found = fit(run, planner, smaller_bases)
    if found is None:
        return [], None
    assert found.forecast.verdict == "fits"
    assert Planner(PlannedModel(found.run.model, lengths), planner.place).forecast(found.run).verdict == "fits"
    return [change.id for change in found.changes], found.run


def test_nothing_is_changed_where_nothing_need_be() -> None:
    run = run_of()
    assert kinds(run, "24GiB") == ([], run)


def test_the_mildest_change_that_suffices_is_found() -> None:
    large = {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 1, "engine": "reference"}
    found, changed = kinds(run_of(train=large, evaluate={"batch_size": 1}), "6GiB")
    assert found == ["micro-batch"]
    assert changed is not None
    train = changed.train
    assert train.per_device_train_batch_size * train.gradient_accumulation_steps == 16, "the same training"

    kept = {"per_device_train_batch_size": 1, "gradient_checkpointing": False, "engine": "reference"}
    assert kinds(run_of(train=kept, data={"max_length": 2048}, evaluate={"batch_size": 1}), "6GiB")[0] == [
        "checkpointing"
    ]
    only = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "engine": "reference"}
    found, changed = kinds(run_of("meta-llama/Llama-3.1-8B", train=only, evaluate={"batch_size": 1}), "12GiB")
    assert found == ["4-bit"]
    assert changed is not None
    assert changed.quantization is not None
    found, changed = kinds(run_of("Qwen/Qwen2.5-7B", train=only, evaluate={"batch_size": 1}), "5.5GiB")
    assert found[0] == "base"
    assert changed is not None
    assert changed.model.base == "Qwen/Qwen2.5-3B"
    states = only | {"optim": "adamw_torch"}
    adapter = {"r": 256, "lora_alpha": 256}
    tight = run_of("Qwen/Qwen2.5-0.5B", train=states, adapter=adapter, evaluate={"batch_size": 1})
    assert kinds(tight, "3.5GiB")[0] == ["optimizer"]


def test_the_fused_engine_needs_less_and_is_changed_as_well() -> None:
    large = {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 1}
    found, changed = kinds(run_of(train=large, evaluate={"batch_size": 1}), "5GiB")
    assert found == ["micro-batch"]
    everything = {"per_device_train_batch_size": 1, "gradient_checkpointing": False}
    found, changed = kinds(run_of(train=everything, data={"max_length": 4096}, evaluate={"batch_size": 1}), "5GiB")
    assert found == ["checkpointing"]
    assert changed is not None
    assert changed.train.gradient_checkpointing == "auto"


def test_packing_is_tried_first_for_short_rows() -> None:
    import numpy as np

    from veneer.planning.batch_shapes import Lengths

    lengths = np.array([*[1000] * 32, *[40] * 500])
    rows = Lengths(lengths, lengths - 9), Lengths(lengths[:9], lengths[:9] - 9)
    train = {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 1}
    run = run_of(train=train, evaluate={"batch_size": 1})
    found, changed = kinds(run, "5GiB", rows)
    assert found == ["packing"]
    assert changed is not None
    assert changed.data.packing


def test_nothing_makes_a_run_fit_into_next_to_nothing() -> None:
    run = run_of()
    assert fit(run, planner_of(run, "1GiB"), lambda run, planner: iter(())) is None


def test_a_changed_run_is_checked_like_any_other() -> None:
    from veneer.planning.fit import Change

    with pytest.raises(ValueError, match="max_length"):
        apply(run_of(), Change("length", {"data.max_length": 0}, ""))


def test_methods_side_by_side_and_the_largest_base_of_each() -> None:
    run = run_of("meta-llama/Meta-Llama-3-8B", quantization={"bits": 4})
    found = compare(run, planner_of(run, "80GiB"))["methods"]
    assert list(found) == ["full", "lora", "qlora"]
    assert found["full"]["peak_bytes"] > found["lora"]["peak_bytes"] > found["qlora"]["peak_bytes"]
    assert found["qlora"]["fits"] == {"16GiB": True, "24GiB": True, "48GiB": True, "80GiB": True}
    assert found["lora"]["fits"] == {"16GiB": False, "24GiB": True, "48GiB": True, "80GiB": True}
    assert found["full"]["fits"] == {"16GiB": False, "24GiB": False, "48GiB": False, "80GiB": True}
    assert found["qlora"]["largest"]["80GiB"] == "Qwen/Qwen2.5-72B"
    assert found["full"]["largest"]["24GiB"] == "Qwen/Qwen2.5-1.5B"


def test_the_ladder_stops_where_nothing_fits_any_more() -> None:
    found = model_sizes(run_of(), place_of("12GiB"))
    assert found[0].best(12 * GiB) == "full"
    assert found[-1].best(place_of("12GiB").budget_bytes) is None
    assert all(model.best(12 * GiB) for model in found[:-1])


# Bad input


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"adapter": {"target_modules": ["q_prj"]}}, "nearest: q_proj"),
    ],
)
def test_what_cannot_be_planned_for_is_refused(sections: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        veneer.plan(run_of(**sections), "24GiB", read_data=False)


def test_folders_that_are_no_model_are_refused(tmp_path: Any) -> None:
    def said() -> str:
        with pytest.raises(UserError) as caught:
            veneer.plan(run_of(str(tmp_path)), "24GiB", read_data=False)
        return str(caught.value)

    assert "config.json" in said()
    (tmp_path / "config.json").write_text("{")
    assert "config.json: damaged: not JSON" in said()
    (tmp_path / "config.json").write_text('{"model_type": "llamma"}')
    assert "nearest: llama" in said()
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    assert "token by token" in said()


def test_4_bits_are_refused_where_they_reach_few_weights(tmp_path: Any) -> None:
    from transformers import MixtralConfig

    config = MixtralConfig(
        hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=384, num_local_experts=8,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"only \d+% of MixtralForCausalLM's weights"):
        veneer.plan(run_of(str(tmp_path), quantization={"bits": 4}), "24GiB", read_data=False)
    assert veneer.plan(run_of(str(tmp_path)), "24GiB", read_data=False).foreseen.forecast.verdict == "fits"


# Advice

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


def test_sound_settings_are_left_in_peace() -> None:
    assert ids(situation()) == set()
    assert ids(situation("rtx 3060", "meta-llama/Llama-3.1-8B", quantization={"bits": 4})) == {"requantized-merge"}


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
    "checkpointing-ample": {"gpu": "h100", "train": {"engine": "reference", "gradient_checkpointing": True}},
    "foreign-template": {"tokenizer": replace(TOKENIZER, uses_own=False), "data": {"chat_template": "chatml"}},
    "raw-text": {"data": {"chat_template": "none"}},
    "no-template": {"tokenizer": replace(TOKENIZER, has_template=False)},
    "no-end-token": {"facts": replace(DATA, end_of_turn=0)},
    "max-length-low": {"facts": replace(DATA, p95=1500)},
    "held-out-small": {"facts": replace(DATA, held_out=20)},
    "prompts-trained": {"data": {"loss_on": "all"}},
}
# Those whose situation is more than settings, each with a test of its own.
ALONE = {"experts", "few-steps", "positions", "quantized-twice"}


def test_every_rule_is_tested() -> None:
    assert set(FAULTS) | ALONE == {rule.id for rule in RULES}


def test_the_readme_counts_the_rules_there_are() -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    assert f"| {len(RULES)} rules look at" in readme


@pytest.mark.parametrize("rule", FAULTS)
def test_a_rule_finds_its_fault_and_says_what_to_do(rule: str) -> None:
    found = {advice.id: advice for advice in advise(situation(**FAULTS[rule]))}
    assert rule in found
    advice = found[rule]
    assert advice.severity in ("error", "warning", "info")
    assert advice.message.endswith(")"), "the source stands at the end"
    assert advice.fix


def test_few_steps_too_long_rows_and_a_base_quantized_before() -> None:
    sound = situation()
    few = replace(sound.forecast, rows=replace(sound.forecast.rows, steps=5))
    assert "few-steps" in ids(replace(sound, forecast=few))
    assert "positions" in ids(replace(sound, shapes=replace(sound.shapes, positions=512)))
    assert "quantized-twice" in ids(situation(quantization={"bits": 4}, file_type="Q4_1"))
    assert "quantized-twice" not in ids(situation(file_type="Q4_1"))


def test_the_engine_that_spends_memory_itself_is_told_to_where_it_may_not() -> None:
    fixes = {advice.id: advice.fix for advice in advise(situation("h100", train={"gradient_checkpointing": True}))}
    assert fixes["checkpointing-ample"] == "set train.gradient_checkpointing=auto"
    assert "checkpointing-ample" not in ids(situation("h100"))


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


# The doctor

CPU = Machine("cpu", "a CPU", 8, 32 * GiB, 30 * GiB, True)
CUDA = Machine("cuda", "NVIDIA H100", 8, 80 * GiB, 79 * GiB, True)
H100 = Gpu("NVIDIA H100", 80 * GiB, 79 * GiB, 90)
SOUND_GPU = Found(CUDA, "580.95.05", ["NVIDIA H100"], [H100], "13.0", [80, 90], "cuda", versions={"torch": "2.11"})


@pytest.mark.parametrize(
    ("found", "problem", "said"),
    [
        (
            replace(SOUND_GPU, gpus=[], torch_cuda=None, torch_capabilities=[]),
            "torch-without-cuda",
            "built for the CPU",
        ),
        (replace(SOUND_GPU, gpus=[], driver="570.10.01"), "driver-too-old", "580.65 or later"),
        (replace(SOUND_GPU, gpus=[], torch_cuda="12.6", driver="525.9.1"), "driver-too-old", "525.60 or later"),
        (replace(SOUND_GPU, gpus=[]), "gpu-unreachable", "CUDA_VISIBLE_DEVICES"),
        (replace(SOUND_GPU, bitsandbytes="cpu"), "bitsandbytes-without-cuda", "13.0"),
        (replace(SOUND_GPU, bitsandbytes="OSError: libcudart"), "bitsandbytes-without-cuda", "libcudart"),
        (replace(SOUND_GPU, gpus=[replace(H100, capability=61)]), "gpu-not-built-for", "6.1"),
        (replace(SOUND_GPU, outdated=["peft>=0.21 (found 0.9)"]), "libraries", "peft>=0.21"),
        (replace(SOUND_GPU, disk_free_bytes={"/": GiB}), "disk", "1.0 GiB"),
    ],
)
def test_each_fault_of_a_machine_has_its_fix(found: Found, problem: str, said: str) -> None:
    problems = diagnose(found)
    assert [p.id for p in problems] == [problem]
    assert said in problems[0].message + problems[0].fix


@pytest.mark.parametrize(
    "found", [SOUND_GPU, Found(CPU), replace(SOUND_GPU, gpus=[replace(H100, capability=89)], driver="580.105.8")]
)
def test_nothing_is_broken_on_a_sound_machine(found: Found) -> None:
    assert diagnose(found) == []


def test_what_does_not_work_says_why() -> None:
    parts = {part.name: part for part in usable(Found(CPU, bitsandbytes="cpu"))}
    assert parts["paged_adamw_8bit"].why == "needs a CUDA GPU; kept unpaged here"
    assert not parts["flash_attention_2"].works
    broken = {part.name: part for part in usable(Found(CPU, bitsandbytes="OSError: gone"))}
    assert "gone" in broken["4 bits"].why
    assert all(part.works or part.why for found in (SOUND_GPU, Found(CPU)) for part in usable(found))


def test_the_page_of_advice_is_what_the_rules_are() -> None:
    page = Path(__file__).parents[2] / "docs" / "advice.md"
    assert page.read_text() == advice_page(), "run `make docs`"
