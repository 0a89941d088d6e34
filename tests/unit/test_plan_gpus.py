"""A run by the number of GPUs: what is planned, what the link between them adds, and what a machine says of it."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.plans import run_of
from veneer.config import JobError
from veneer.machine.device import Machine
from veneer.machine.link import read_bandwidth
from veneer.machine.speeds import GpuLink, link_of, load_link, save_link
from veneer.planning.base import PlannedModel
from veneer.planning.batch_shapes import Lengths
from veneer.planning.doctor import Gpu, MachineReport, diagnose, with_link
from veneer.planning.gpus import OnGpus, by_gpus, numbers_of_gpus
from veneer.planning.planner import Planner
from veneer.planning.target import device_named

GiB = 2**30
NO_ROWS = Lengths(np.zeros(0, int), np.zeros(0, int))
TWO = MachineReport(Machine("cuda", "NVIDIA H100", 8, 80 * GiB, 79 * GiB, True), gpus=[Gpu("", 80, 79, 90)] * 2)


def planned(
    base: str, gpus: int, lengths: Any = "not read", link: GpuLink | None = None, **sections: Any
) -> list[OnGpus]:
    run = run_of(base, quantization={"bits": 4}, **sections)
    target = device_named("h100", gpus=gpus)
    planner = Planner(PlannedModel(run.model, lengths), replace(target, gpu_link=link or target.gpu_link))
    return by_gpus(run, planner, planner.forecast(run))


def test_numbers_of_gpus_double_up_to_those_there_are() -> None:
    assert [numbers_of_gpus(most) for most in (1, 2, 3, 8)] == [[1], [1, 2], [1, 2, 3], [1, 2, 4, 8]]


def test_the_speed_is_what_was_measured_on_four_h100() -> None:
    """8B in NF4, r = 16, 4 x 2,048 a card: 16,869, 34,156 and 67,581 tokens/s."""
    train = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "max_steps": 100}
    sections: dict[str, Any] = {"adapter": {"r": 16}, "data": {"max_length": 2048}, "train": train}
    found = planned("meta-llama/Llama-3.1-8B", 4, **sections)
    assert planned("meta-llama/Llama-3.1-8B", 1, **sections) == [], "one is compared with none"
    assert [one.gpus for one in found] == [1, 2, 4]
    for one, speed, gain in zip(found, (16_869, 34_156, 67_581), (1, 2.02, 4.01), strict=True):
        assert one.tokens_per_second == pytest.approx(speed, rel=0.05)
        assert one.gain == pytest.approx(gain, rel=0.02)
    assert found[1].exchange_seconds == pytest.approx(0.9e-3, rel=0.05)
    assert [one.rows_per_step for one in found] == [4, 8, 16]


def test_a_sharded_base_is_no_faster_than_its_copies() -> None:
    train = {"max_steps": 100, "shard": "layers", "gradient_accumulation_steps": 1}
    fast, slow = (
        planned("meta-llama/Llama-3.1-8B", 2, link=GpuLink(bandwidth, True, "a test"), train=train)
        for bandwidth in (187e9, 1e9)
    )
    assert fast[1].peak_bytes < fast[0].peak_bytes
    assert (fast[1].gain or 0) > 1.8
    # Half of 3.6 GB comes over the link twice.
    assert slow[1].step_seconds == pytest.approx(slow[1].exchange_seconds + 3.6, rel=0.02)


def test_what_makes_a_second_gpu_gain_less() -> None:
    even, wide = Lengths(*[np.full(900, 64)] * 2), Lengths(*[np.geomspace(16, 1000, 900).astype(int)] * 2)
    train = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "num_train_epochs": 1}

    def second(rows: Any = even, link: GpuLink | None = None) -> OnGpus:
        return planned("meta-llama/Llama-3.2-1B", 2, (rows, NO_ROWS), link, train=train)[1]

    fast = second()
    assert (fast.steps, fast.rows_per_step, fast.busiest) == (450, 2, 1.0)
    assert fast.gain is not None
    assert fast.gain > 1.8
    slow, uneven, few = second(link=GpuLink(1e9, False, "")), second(wide), second(Lengths(*[np.full(1, 64)] * 2))
    assert uneven.busiest > 1.02
    for other in (slow, uneven, few):
        assert other.gain is not None
        assert other.gain < fast.gain


def test_a_measured_link_is_kept_for_the_machine_and_its_number_of_gpus(empty_cache: Path) -> None:
    measured = GpuLink(300e9, True, "measured over 2 GPUs")
    save_link(TWO.machine, 2, measured)
    assert load_link(TWO.machine, 2) == measured
    assert load_link(TWO.machine, 4) is None
    assert link_of(None).bandwidth < measured.bandwidth


def test_the_doctor_measures_between_several_gpus_and_a_failure_is_a_finding() -> None:
    def broken(gpus: int) -> GpuLink:
        return GpuLink(read_bandwidth('{"error": "NCCL error: unhandled system error"}\n'), True, "")

    measured = with_link(TWO, lambda gpus: GpuLink(read_bandwidth('noise\n{"bandwidth": 3e11}\n'), True, f"{gpus}"))
    assert measured.gpu_link == GpuLink(3e11, True, "2")
    assert "gpus-do-not-exchange" not in {problem.id for problem in diagnose(measured)}
    (found,) = (one for one in diagnose(with_link(TWO, broken)) if one.id == "gpus-do-not-exchange")
    assert "unhandled system error" in found.message
    assert with_link(replace(TWO, gpus=TWO.gpus[:1]), broken).gpu_link_failure == "", "one GPU exchanges with none"
    with pytest.raises(JobError, match="no answer within"):
        read_bandwidth("")


def test_the_command_shows_the_table(call: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    run = tmp_path / "run.yaml"
    run.write_text("model: {base: meta-llama/Llama-3.2-1B}\ndata: {train: rows.jsonl}\ntrain: {max_steps: 9}\n")
    status, out, _ = call("plan", str(run), "--no-data", "--gpu", "h100", "--gpus", "2")
    assert status == 0
    assert "memory a card" in out
    status, out, _ = call("plan", str(run), "--no-data", "--gpu", "h100", "--gpus", "2", "--json")
    assert [one["gpus"] for one in json.loads(out)["by_gpus"]] == [1, 2]
    status, _, err = call("plan", str(run), "--no-data", "--gpus", "2")
    assert status == 2
    assert '--gpu "h100" --gpus 2' in err
