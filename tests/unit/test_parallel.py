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

from tests.support.classifiers import classify, save_tiny_base, some_texts
from tests.support.heads import embed, some_tagged, some_texts_with_positives, tag
from tests.support.runs import losses, some_pairs, some_rated, tiny_run, write_rows
from veneer.api.train import load_job
from veneer.config import Run, UserError
from veneer.data.batch import deal
from veneer.machine.link import all_reduce_bandwidth
from veneer.machine.ranks import join_ranks
from veneer.training.job import TrainingJob
from veneer.training.objectives import OBJECTIVES

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


def work_as_rank(rank: int, ranks: int, folder: Path, work: Callable[[], object]) -> None:
    """Work as one of several ranks, in a forked process."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    torch.set_num_threads(1)  # threads of the parent are not there after the fork
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    work()
    dist.destroy_process_group()


def work_as(ranks: int, folder: Path, work: Callable[[], object]) -> None:
    (folder / "store").unlink(missing_ok=True)
    start_processes(work_as_rank, (ranks, folder, work), ranks, start_method="fork")  # type: ignore[no-untyped-call]


def require_alike(many: Path, one: Path) -> None:
    """Float32: gradients are added in another order, by at most 1e-6 of them; four updates of 1e-3 carry that on."""
    for kind in ("train", "eval"):
        assert losses(many, kind) == pytest.approx(losses(one, kind), rel=1e-4)
    weights, others = (load_file(run / "adapter/adapter_model.safetensors") for run in (one, many))
    for tensor, value in weights.items():
        torch.testing.assert_close(others[tensor], value, rtol=0, atol=4e-5)


@pytest.mark.parametrize(("ranks", "engine"), [(2, "fused"), (4, "reference")])
def test_ranks_make_the_steps_of_one_process_and_one_goes_on_from_them(
    ranks: int, engine: str, tiny_model: Callable[..., Path], rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    data = write_rows(tmp_path / "rows.jsonl", (rows + rows)[: ROWS + 3])
    train: dict[str, Any] = {"engine": engine, "max_steps": 4, "per_device_train_batch_size": 2, "learning_rate": 1e-3}
    train |= {"logging_steps": 1, "save_steps": 2, "eval_steps": 2}
    one, many = (
        tiny_run(
            *(tiny_model(), data, tmp_path / name),
            train=train | {"gradient_accumulation_steps": accumulation},
            data={"validation": 3},
        )
        for name, accumulation in (("one", 4), ("many", 4 // ranks))
    )
    TrainingJob(one).fit()
    work_as(ranks, tmp_path, lambda: TrainingJob(many).fit())
    require_alike(tmp_path / "many", tmp_path / "one")
    (tmp_path / "many/adapter").rename(tmp_path / "many/of_many")
    TrainingJob(many, "step-000002").fit()
    require_alike(tmp_path / "many", tmp_path / "one")


REFUSED = {"embedding"}  # tasks whose loss does not add up over ranks
OBJECTIVES_OF = {**dict.fromkeys(("dpo", "orpo", "simpo", "cpo"), some_pairs), "kto": some_rated}
TASKS: dict[str, Callable[..., Run]] = {"sequence-classification": classify, "token-classification": tag}
TASKS |= {"embedding": embed}
ROWS_OF = {"sequence-classification": some_texts, "token-classification": some_tagged}
ROWS_OF |= {"embedding": some_texts_with_positives}
KINDS = [*(name for name in OBJECTIVES if name != "sft"), "reward", *TASKS]


@pytest.fixture(scope="module")
def trained(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Short runs of each kind, trained by one process (one-KIND) and by two (many-KIND), or why they were not."""
    folder = tmp_path_factory.mktemp("kinds")
    bases = {"bert": save_tiny_base("bert", folder / "bert"), "llama": save_tiny_base("llama", folder / "llama")}

    def run_of(kind: str, name: str, accumulation: int) -> Run:
        train: dict[str, Any] = {
            "max_steps": 2,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": accumulation,
        }
        train |= {"logging_steps": 1, "learning_rate": 1e-3, "output_dir": folder / f"{name}-{kind}"}
        sections: dict[str, Any] = {"train": train, "data": {"validation": 3, "duplicates": "keep"}}
        if kind in TASKS:
            return TASKS[kind](bases["bert"], ROWS_OF[kind](16), folder / name, **sections)
        rows = OBJECTIVES_OF.get(kind, some_pairs)(16)
        base = tiny_model()
        if kind == "reward":
            base = bases["llama"]
            sections |= {"model": {"task": "reward"}, "evaluate": {"max_new_tokens": 256}}
            sections["data"] |= {"chat_template": "chatml"}
        else:
            train |= {"objective": kind, "engine": "fused" if kind in ("dpo", "kto") else "reference"}
        file = write_rows(folder / f"{kind}.jsonl", rows)
        return tiny_run(base, file, folder / f"{name}-{kind}", **sections)

    def train_all() -> None:
        for kind in KINDS:
            try:
                load_job(run_of(kind, "many", 2)).fit()
            except UserError as error:
                (folder / f"many-{kind}.txt").write_text(str(error))
        found = all_reduce_bandwidth(join_ranks(), "cpu", 2**20)
        (folder / "bandwidth.txt").write_text(str(found))

    for kind in KINDS:
        load_job(run_of(kind, "one", 4)).fit()
    work_as(2, folder, train_all)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_learn_by_each_objective_what_one_process_learns_or_say_that_they_do_not(
    kind: str, trained: Path
) -> None:
    """Every objective that there is, and every task."""
    refusal = trained / f"many-{kind}.txt"
    assert refusal.exists() == (kind in REFUSED), refusal.read_text() if refusal.exists() else "it was trained"
    if kind in REFUSED:
        assert "train it on one GPU" in refusal.read_text()
    else:
        require_alike(trained / f"many-{kind}", trained / f"one-{kind}")


def test_the_link_between_ranks_is_measured(trained: Path) -> None:
    assert float((trained / "bandwidth.txt").read_text()) > 0
