"""Frozen weights that are spread over ranks: real processes, over gloo, on tiny models in NF4."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes

from tests.support.offload import OFFLOADS, RESIDENT, STEPS, assert_same, course, nf4_model, placement_of
from veneer.engine.fused.engine import FusedEngine
from veneer.engine.fused.packed import block_bytes
from veneer.engine.fused.shards import shard_bytes
from veneer.machine.ranks import join_ranks

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


@pytest.mark.parametrize("ranks", [2, 3])
def test_shards_change_no_bit_and_no_rank_waits_for_another(ranks: int, tmp_path: Path) -> None:
    start_processes(compare_as_rank, (ranks, tmp_path), ranks, start_method="fork")  # type: ignore[no-untyped-call]
