"""Frozen weights that are spread over ranks: real processes, over gloo, on tiny models in NF4."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes

from tests.support.offload import OFFLOADS, RESIDENT, STEPS, assert_same, course, nf4_model, placement_of
from tests.support.runs import tiny_run, write_rows
from veneer.config import Run, UserError
from veneer.engine.fused.engine import FusedEngine
from veneer.engine.fused.packed import block_bytes
from veneer.engine.fused.shards import shard_bytes
from veneer.machine.ranks import join_ranks
from veneer.training import parts
from veneer.training.job import TrainingJob

SHORT = STEPS[2:4]
MODELS: list[dict[str, Any]] = [
    {"family": "llama", "lora_dropout": 0.3},
    {"family": "gemma2"},
    {"family": "qwen3", "changes": {"tie_word_embeddings": True}},
]


def compare_as_rank(rank: int, ranks: int, folder: Path) -> None:
    """Compare steps with shards with those of whole weights, in a forked process."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    torch.set_num_threads(1)  # threads of the parent are not there after the fork
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    joined = join_ranks()
    for model in MODELS:
        whole, sharded = FusedEngine(nf4_model(**model)), FusedEngine(nf4_model(**model), ranks=joined)
        packed = sum(block_bytes(block.groups) for block in sharded.blocks)
        assert packed / ranks <= shard_bytes(sharded.blocks) < packed / ranks + 512 * len(sharded.blocks)
        for block in sharded.blocks:  # what is computed can come from the shards alone
            for matrix in (matrix for group in block.groups for matrix in group.packed):
                matrix.weights.zero_()
        for name in ("resident", "everything at once") * (1 + rank):  # ranks need not make as many passes
            for engine in (whole, sharded):
                engine.apply(placement_of(engine, OFFLOADS.get(name, RESIDENT)))
            assert_same(course(sharded, SHORT), course(whole, SHORT))
    joined.gather(None)  # a rank that leaves takes its shards along
    dist.destroy_process_group()


def train_as_rank(rank: int, ranks: int, folder: Path, runs: list[Run]) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    for run in runs:
        TrainingJob(run).fit()
    dist.destroy_process_group()


def sharded_run(base: Path, rows: str, output: Path, **sections: Any) -> Run:
    train = {"shard": "layers", "engine": "fused", "max_steps": 2, "save_steps": 1}
    settings: dict[str, Any] = {"quantization": {"bits": 4}, "train": train}
    for name, section in sections.items():
        settings[name] = section if not isinstance(section, dict) else settings.get(name, {}) | section
    return tiny_run(base, rows, output, **settings)


def test_a_run_delivers_the_same_adapter_with_shards_and_without(
    tiny_model: Callable[..., Path], rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    data, kinds = write_rows(tmp_path / "rows.jsonl", rows), ("none", "layers")
    runs = [sharded_run(tiny_model(), data, tmp_path / kind, train={"shard": kind}) for kind in kinds]
    start_processes(train_as_rank, (2, tmp_path, runs), 2, start_method="fork")  # type: ignore[no-untyped-call]
    whole, sharded = ((tmp_path / kind / "adapter/adapter_model.safetensors").read_bytes() for kind in kinds)
    assert whole == sharded
    (tmp_path / "layers" / "adapter").rename(tmp_path / "layers" / "of_two")
    TrainingJob(runs[1], "step-000001").fit()  # one process goes on, with nothing to spread over


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"quantization": None}, "it spreads weights in 4 bits"),
        ({"quantization": None, "adapter": None, "train": {"engine": "auto"}}, "`adapter: none` trains all"),
        ({"train": {"engine": "reference"}}, "it takes the fused engine"),
    ],
)
def test_what_cannot_be_spread_is_refused_before_it_is_loaded(
    sections: dict[str, Any],
    said: str,
    tiny_model: Callable[..., Path],
    rows: list[dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(parts, "load_model", lambda *given: pytest.fail("it was loaded"))
    run = sharded_run(tiny_model(), write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "run", **sections)
    with pytest.raises(UserError, match=f"train.shard = layers: .*{said}"):
        parts.load_parts(run)


def test_shards_change_no_bit_and_no_rank_waits_for_another(tmp_path: Path) -> None:
    ranks = 3
    start_processes(compare_as_rank, (ranks, tmp_path), ranks, start_method="fork")  # type: ignore[no-untyped-call]
