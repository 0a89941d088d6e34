"""What fits, what to change, what is wrong with the settings, and what ails a machine."""

from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import pytest

import veneer
from tests.support.plans import kinds, planner_of, run_of
from veneer.config import UserError
from veneer.machine.cards import CARDS, find_card, parse_budget
from veneer.machine.device import Machine
from veneer.model.known import MODEL_SIZES
from veneer.planning.base import PlannedModel
from veneer.planning.doctor import Gpu, MachineReport, diagnose, usable
from veneer.planning.fit import apply, fit
from veneer.planning.model_sizes import (
    ROW_STEP,
    ModelSize,
    _most_that_fit,
    compare,
    least_memory,
    longest_row,
    model_sizes,
)
from veneer.planning.planner import Planner
from veneer.planning.target import device_named, this_device

GiB = 2**30


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
    assert this_device(CUDA).ceilings == device_named("h100").ceilings
    assert this_device(CPU).ceilings is None


def test_a_forecast_says_which_phase_peaks_and_by_how_much_it_fits() -> None:
    run = run_of()
    roomy, tight = planner_of(run, "80GiB").forecast(run), planner_of(run, "3GiB").forecast(run)
    assert roomy.peak_bytes == max(peak.bytes for peak in roomy.phases.values())
    assert roomy.peak_bytes > tight.peak_bytes == tight.least_bytes == roomy.least_bytes, "block inputs leave the card"
    assert roomy.phases[roomy.peak_phase].bytes == roomy.peak_bytes
    assert (roomy.verdict, tight.verdict) == ("fits", "does not fit")
    assert roomy.margin_bytes == device_named("80GiB").budget_bytes - roomy.peak_bytes
    assert roomy.trainable == 11_272_192
    assert roomy.disk_bytes > 4 * roomy.trainable
    timed = planner_of(run, "rtx 4090").forecast(run)
    assert timed.step_seconds is not None
    assert timed.step_seconds[0] < timed.step_seconds[1] < timed.step_seconds[2]
    assert roomy.step_seconds is None, "an amount of memory has no speed"


def test_copies_of_4_bit_weights_on_a_cpu_are_counted_where_they_are_made() -> None:
    run = run_of(quantization={"bits": 4}, train={"optim": "adamw_torch"})

    def copies(free: int, device: str) -> set[int]:
        target = replace(this_device(replace(CPU, free_bytes=free)), device=device, budget_bytes=free)
        found = Planner(PlannedModel(run.model, "it is a test"), target).forecast(run).phases
        return {peak.components.get("16-bit copies", 0) for name, peak in found.items() if name != "load"}

    weights = PlannedModel(run.model, "it is a test").shapes
    needed = 2 * sum(prod(weights.weights[f"{path}.weight"]) for path in weights.quantizable())
    assert copies(8 * needed, "cpu") == {needed}
    assert copies(8 * needed - 1, "cpu") == {0}
    assert copies(8 * needed, "cuda") == {0}


def test_what_costs_memory_is_predicted_to_cost_it() -> None:
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


def test_a_base_that_is_spread_over_gpus_leaves_a_part_on_each() -> None:
    run = run_of(quantization={"bits": 4}, train={"shard": "layers"})
    base = planner_of(run, "80GiB").base

    def weights(gpus: int) -> dict[str, int]:
        found = Planner(base, replace(device_named("80GiB"), ranks=gpus)).forecast(run)
        assert found.placement.records_passes == (gpus == 1)
        return found.phases["backward"].components

    whole, shared = weights(1), weights(4)
    assert shared["4-bit weights"] == whole["4-bit weights"] // 4
    assert shared["gathered weights"] == 2 * whole["4-bit weights"] // base.shapes.depth
    same = set(whole) - {"4-bit weights", "gathered weights", "recorded passes", "activations"}
    assert {name: shared.get(name) for name in same} == {name: whole[name] for name in same}


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
    found, changed = kinds(run_of(train=large, evaluate={"batch_size": 1}), "4.2GiB")
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


@pytest.mark.parametrize("adapter", [None, {"method": "loha"}, {"init_lora_weights": "pissa"}])
def test_a_run_that_cannot_take_a_change_is_made_to_fit_without_it(adapter: dict[str, Any] | None) -> None:
    """Whole weights are not paged, and LoHa and PiSSA take no base in 4 bits."""
    run = run_of("meta-llama/Llama-3.1-8B", adapter=adapter, train={"optim": "adamw_32bit"})
    found, changed = kinds(run, "10GiB")
    assert found[0] == "base"
    assert changed is not None
    assert changed.quantization is None


@pytest.mark.parametrize("adapter", [{"method": "loha", "r": 8}, {"bias": "all", "r": 8}])
def test_any_run_is_compared_by_plain_lora(adapter: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """LoHa takes no base in 4 bits, and most bases have no biases, as those that it is compared with here."""
    monkeypatch.setattr("veneer.planning.model_sizes.MODEL_SIZES", MODEL_SIZES[:2])
    run = run_of("openai-community/gpt2", adapter=adapter, model={"dtype": "float32"})
    found = compare(run, planner_of(run, "8GiB"), (4,))
    assert found["r"] == (16 if "method" in adapter else 8), "a rank of another method is no rank of LoRA"
    assert all(method["peak_bytes"] for method in found["methods"].values())


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
    assert {method: row["longest_row"] for method, row in found.items()} == {"full": 6144, "lora": 8192, "qlora": 8192}
    cards = {method: row["smallest_card"] for method, row in found.items()}
    assert cards == {"full": "a100 80gb", "lora": "a10", "qlora": "rtx 4060"}


def test_the_longest_row_fits_and_a_longer_one_does_not() -> None:
    run = least_memory(run_of("meta-llama/Llama-3.2-1B", quantization={"bits": 4}))
    planner = planner_of(run, "4GiB")
    found = longest_row(run, planner, "qlora")
    assert found % ROW_STEP == 0

    def verdict(length: int) -> str:
        longer = run_of(run.model.base, data={"max_length": length}, quantization={"bits": 4})
        return planner.forecast(least_memory(longer)).verdict

    assert verdict(found) == "fits"
    assert verdict(found + ROW_STEP) != "fits"


@pytest.mark.parametrize("power", [1.0, 2.0, 0.5])
def test_a_limit_is_found_in_few_looks(power: float) -> None:
    for limit in (0, 1, 2, 77, 126, 127, 128, 500):
        looked: list[int] = []

        def needed_by(count: int, looked: list[int] = looked) -> int:
            looked.append(count)
            return int(1000 * count**power)

        assert _most_that_fit(needed_by, 128, int(1000 * limit**power)) == min(limit, 128)
        assert len(looked) <= (4 if power == 1 else 10)


def test_what_fits_only_with_streamed_weights_is_marked() -> None:
    model = ModelSize("a/base", 1, {"lora": 30 * GiB, "qlora": 9 * GiB}, {"qlora": 3 * GiB})
    seen = {size: (model.fits("qlora", size * GiB), model.streams("qlora", size * GiB)) for size in (3, 4, 10)}
    assert seen == {3: (False, False), 4: (True, True), 10: (True, False)}
    assert not model.fits("lora", 10 * GiB)
    assert not model.streams("lora", 10 * GiB)
    assert model.best(4 * GiB) == "qlora"


def test_streamed_weights_make_larger_bases_fit() -> None:
    budget = device_named("4GiB").budget_bytes
    found = {model.base: model for model in model_sizes(run_of(), device_named("4GiB"), ("lora", "qlora"))}
    small, large = found["Qwen/Qwen2.5-3B"], found["Qwen/Qwen2.5-7B"]
    assert [(model.best(budget), model.streams("qlora", budget)) for model in (small, large)] == [
        ("qlora", False),
        ("qlora", True),
    ]
    assert large.streamed_bytes["qlora"] < large.peak_bytes["qlora"]
    assert "lora" not in large.streamed_bytes


def test_the_ladder_stops_where_nothing_fits_any_more() -> None:
    found, budget = model_sizes(run_of(), device_named("3GiB")), device_named("3GiB").budget_bytes
    assert found[0].best(budget) == "full"
    assert found[-1].best(budget) is None
    assert all(model.best(budget) for model in found[:-1])


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
    assert veneer.plan(run_of(str(tmp_path)), "24GiB", read_data=False).prediction.forecast.verdict == "fits"


# The doctor

CPU = Machine("cpu", "a CPU", 8, 32 * GiB, 30 * GiB, True)
CUDA = Machine("cuda", "NVIDIA H100", 8, 80 * GiB, 79 * GiB, True)
H100 = Gpu("NVIDIA H100", 80 * GiB, 79 * GiB, 90)
SOUND_GPU = MachineReport(
    CUDA, "580.95.05", ["NVIDIA H100"], [H100], "13.0", [80, 90], "cuda", versions={"torch": "2.11"}
)


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
def test_each_fault_of_a_machine_has_its_fix(found: MachineReport, problem: str, said: str) -> None:
    problems = diagnose(found)
    assert [p.id for p in problems] == [problem]
    assert said in problems[0].message + problems[0].fix


@pytest.mark.parametrize(
    "found",
    [SOUND_GPU, MachineReport(CPU), replace(SOUND_GPU, gpus=[replace(H100, capability=89)], driver="580.105.8")],
)
def test_nothing_is_broken_on_a_sound_machine(found: MachineReport) -> None:
    assert diagnose(found) == []


def test_what_does_not_work_says_why() -> None:
    parts = {part.name: part for part in usable(MachineReport(CPU, bitsandbytes="cpu"))}
    assert parts["paged_adamw_8bit"].why == "needs a CUDA GPU; kept unpaged here"
    assert not parts["flash_attention_2"].works
    broken = {part.name: part for part in usable(MachineReport(CPU, bitsandbytes="OSError: gone"))}
    assert "gone" in broken["4 bits"].why
    assert all(part.works or part.why for found in (SOUND_GPU, MachineReport(CPU)) for part in usable(found))
