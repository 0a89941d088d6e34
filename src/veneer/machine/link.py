"""Measures the link between the GPUs of a machine, by what a training does on it: an all-reduce.

It runs in processes of its own, a GPU each, started by torch's launcher, since NCCL may be missing, fail or hang. Each
process ends itself after a while, whatever it waits for, so that none is left behind; why there is no answer is a
finding like any other.
"""

import json
import os
import statistics
import subprocess
import sys
import threading
import time
from itertools import permutations

import torch
import torch.distributed as dist

from veneer.config import JobError
from veneer.machine.ranks import Ranks, join_ranks, leave_ranks
from veneer.machine.speeds import GpuLink

SIZE = 2**27  # bytes: the gradients of a usual adapter
TIMES, WARM = 10, 3
LIMIT_SECONDS = 90.0  # until a process ends itself
LAUNCHER_SECONDS = 30.0  # that the launcher has to notice


def measure_link(gpus: int) -> GpuLink:
    """Measure the link between so many GPUs of this machine; without any, between processes on the CPU.

    Raises:
        JobError: they do not exchange anything, or not in time.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(gpus)]
    try:
        ended = subprocess.run(
            [*command, "-m", "veneer.machine.link"],
            capture_output=True,
            text=True,
            timeout=LIMIT_SECONDS + LAUNCHER_SECONDS,
            check=False,
        )
        said = ended.stdout
    except subprocess.TimeoutExpired as error:
        said = error.stdout.decode(errors="replace") if isinstance(error.stdout, bytes) else error.stdout or ""
    return GpuLink(read_bandwidth(said), _have_peers(gpus), f"measured over {gpus} GPUs")


def read_bandwidth(said: str) -> float:
    """Return the bandwidth among what the processes printed.

    Raises:
        JobError: they say why there is none, or nothing.
    """
    answers = [json.loads(line) for line in said.splitlines() if line.startswith('{"')]
    for answer in answers:
        if "bandwidth" in answer:
            return float(answer["bandwidth"])
    why = next((answer["error"] for answer in answers), f"no answer within {LIMIT_SECONDS:.0f} s")
    raise JobError(str(why))


def all_reduce_bandwidth(ranks: Ranks, device: str, size: int = SIZE) -> float:
    """Return the bus bandwidth of all-reduces in bytes a second; all ranks call it together.

    Args:
        ranks: this process among those that exchange.
        device: device of the tensor.
        size: its bytes.
    """
    buffer = torch.zeros(size // 4, device=device)
    seconds = []
    for _ in range(WARM + TIMES):
        _wait(device)
        began = time.perf_counter()
        dist.all_reduce(buffer)
        _wait(device)
        seconds.append(time.perf_counter() - began)
    return 2 * (ranks.size - 1) / ranks.size * buffer.nbytes / statistics.median(seconds[WARM:])


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _have_peers(gpus: int) -> bool | None:
    """Return whether each GPU reaches the memory of all others."""
    if not torch.cuda.is_available():
        return None
    return all(torch.cuda.can_device_access_peer(one, other) for one, other in permutations(range(gpus), 2))


def main() -> None:
    """Measure as one of the processes; the first prints the bandwidth, and one that fails why."""
    watchdog = threading.Timer(LIMIT_SECONDS, os._exit, [1])
    watchdog.daemon = True
    watchdog.start()
    try:
        ranks = join_ranks()
        found = all_reduce_bandwidth(ranks, "cuda" if torch.cuda.is_available() else "cpu")
    except (RuntimeError, ValueError) as error:
        print(json.dumps({"error": str(error).strip().splitlines()[0]}), flush=True)
        os._exit(1)  # its threads may hang as well
    if ranks.is_first:
        print(json.dumps({"bandwidth": found}), flush=True)
    leave_ranks()


if __name__ == "__main__":
    main()
