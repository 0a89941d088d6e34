"""Processes of two agents of torchrun, as if they were machines, make one process's run."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from tests.support.runs import losses, some_rows, write_rows
from tests.support.tiny import FAMILIES, save_tiny_model


def test_two_nodes_of_two_processes_make_the_steps_of_one(tmp_path: Path) -> None:
    save_tiny_model(FAMILIES["llama"], tmp_path / "base")
    rows = write_rows(tmp_path / "rows.jsonl", some_rows())

    def settings(name: str, accumulation: int) -> Path:
        train = {"output_dir": str(tmp_path / name), "max_steps": 3, "per_device_train_batch_size": 2}
        train |= {"gradient_accumulation_steps": accumulation, "learning_rate": 1e-3, "engine": "fused"}
        run = {
            "model": {"base": str(tmp_path / "base"), "dtype": "float32"},
            "quantization": {"bits": 4},
            "adapter": {"r": 4, "lora_alpha": 8},
            "data": {"train": rows, "validation": 4, "max_length": 128},
            "train": train | {"shard": "layers"},  # over the two processes of each node
        }
        file = tmp_path / f"{name}.yaml"
        file.write_text(yaml.safe_dump(run))
        return file

    one = settings("one", 4)
    assert subprocess.run([sys.executable, "-m", "veneer", "train", str(one)], timeout=240).returncode == 0
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    many = settings("many", 1)
    agent = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "2"]
    agent += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{port}", "--rdzv-id", "nodes"]
    agent += ["--local-addr", "localhost", "-m", "veneer", "train", str(many)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    nodes = [subprocess.Popen(agent, env=environment) for _ in range(2)]
    assert [node.wait(timeout=240) for node in nodes] == [0, 0]
    for kind in ("train", "eval"):
        assert losses(tmp_path / "many", kind) == pytest.approx(losses(tmp_path / "one", kind), rel=1e-4)
    # Float32: gradients are added in another order, by at most 1e-6 of them; three updates of 1e-3 carry that on.
    one_s, many_s = (load_file(tmp_path / name / "adapter/adapter_model.safetensors") for name in ("one", "many"))
    assert all((one_s[name] - many_s[name]).abs().max() < 4e-5 for name in one_s)
