"""Several ranks make the steps of one process: real processes, over gloo, on a tiny model."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.multiprocessing.spawn import start_processes

from tests.support.runs import losses, some_pairs, tiny_run, write_rows
from veneer.data.batch import deal
from veneer.training.job import TrainingJob

ROWS = 13  # in steps of 8: the last step of an epoch has 5, and leaves a rank of three with one row or none


@given(st.lists(st.integers(1, 4096), min_size=1, max_size=64), st.integers(1, 8))
def test_every_row_is_dealt_to_one_rank(sizes: list[int], ranks: int) -> None:
    sizes.sort(reverse=True)
    most = -(-len(sizes) // ranks)
    dealt = deal(np.arange(len(sizes)), np.array(sizes), ranks, most)
    assert sorted(row for rows in dealt for row in rows) == list(range(len(sizes)))
    assert max(map(len, dealt)) <= most


def test_a_long_row_weighs_as_many_short_ones() -> None:
    assert deal(np.arange(4), np.array([30, 10, 10, 10]), 2, 3) == [[0], [1, 2, 3]]


def train_as_rank(rank: int, ranks: int, folder: Path, resume: bool, arguments: tuple[Any, ...]) -> None:
    """Train in a forked process."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    torch.set_num_threads(1)  # threads of the parent are not there after the fork
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    base, data, output, sections = arguments
    TrainingJob(tiny_run(base, data, output, **sections), resume).fit()
    dist.destroy_process_group()


def train_as(ranks: int, folder: Path, *arguments: Any, resume: bool = False) -> None:
    (folder / "store").unlink(missing_ok=True)
    given = (ranks, folder, resume, arguments)
    start_processes(train_as_rank, given, ranks, start_method="fork")  # type: ignore[no-untyped-call]


@pytest.mark.parametrize(
    ("ranks", "engine", "objective"), [(2, "fused", "sft"), (4, "reference", "sft"), (2, "fused", "dpo")]
)
def test_ranks_make_the_steps_of_one_process_and_one_goes_on_from_them(
    ranks: int, engine: str, objective: str, tiny_model: Callable[..., Path], rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    data = write_rows(
        tmp_path / "rows.jsonl", (rows + rows if objective == "sft" else some_pairs(ROWS + 3))[: ROWS + 3]
    )

    def arguments(name: str, accumulation: int) -> tuple[Any, ...]:
        train = {
            "objective": objective, "engine": engine, "max_steps": 4, "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": accumulation, "learning_rate": 1e-3, "logging_steps": 1, "save_steps": 2,
            "eval_steps": 2,
        }  # fmt: skip
        return tiny_model(), data, tmp_path / name, {"train": train, "data": {"validation": 3}}

    base, file, output, sections = arguments("one", 4)
    TrainingJob(tiny_run(base, file, output, **sections)).fit()
    train_as(ranks, tmp_path, *arguments("many", 4 // ranks))

    def require_alike(name: str) -> None:
        # Float32: gradients are added in another order, by at most 1e-6 of them; four updates of 1e-3 carry that on.
        for kind in ("train", "eval"):
            assert losses(tmp_path / name, kind) == pytest.approx(losses(tmp_path / "one", kind), rel=1e-4)
        one, other = (load_file(tmp_path / run / "adapter/adapter_model.safetensors") for run in ("one", name))
        for tensor, value in one.items():
            torch.testing.assert_close(other[tensor], value, rtol=0, atol=4e-5)

    require_alike("many")
    base, file, output, sections = arguments("many", 4 // ranks)
    (output / "adapter").rename(output / "of_many")
    TrainingJob(tiny_run(base, file, output, **sections), "step-000002").fit()
    require_alike("many")
