"""What it costs flash attention's backward to add in a fixed order, and whether it then gives the same bits each time.

    python3 bench/attention.py          # needs a CUDA GPU; half a minute; writes bench/results/attention.json

Documents of random lengths, one behind the other, with 32 heads of queries and 8 of keys and values of width 128.
"""

import json
import random
import statistics
from pathlib import Path
from typing import Any

import torch
import torch.utils.deterministic

RESULTS = Path(__file__).parent / "results" / "attention.json"


def packed(shortest: int, longest: int, tokens: int) -> list[int]:
    """Lengths of documents that add up to so many tokens."""
    lengths: list[int] = []
    while sum(lengths) < tokens:
        lengths.append(min(random.randint(shortest, longest), tokens - sum(lengths)))
    return lengths


def measure(lengths: list[int]) -> dict[str, Any]:
    """Median milliseconds, MiB taken, and whether six backwards are equal, in any order and in a fixed one."""
    tokens, longest = sum(lengths), max(lengths)
    q, k, v = (torch.randn(tokens, heads, 128, device="cuda", dtype=torch.bfloat16) for heads in (32, 8, 8))
    bounds = torch.tensor([0, *lengths], device="cuda").cumsum(0).int()
    where = (bounds, bounds, longest, longest, 0.0, True)
    out, lse, state, unused, _ = torch.ops.aten._flash_attention_forward(q, k, v, *where, False)
    gradient = torch.randn_like(out)

    def backward() -> Any:
        return torch.ops.aten._flash_attention_backward(gradient, q, k, v, out, lse, *where, state, unused)

    found: dict[str, Any] = {"documents": len(lengths), "tokens": tokens, "longest": longest}
    for name, is_fixed in (("any order", False), ("fixed order", True)):
        torch.use_deterministic_algorithms(is_fixed)
        first = backward()
        same = all(torch.equal(a, b) for _ in range(5) for a, b in zip(first, backward(), strict=True))
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        backward()
        taken = torch.cuda.max_memory_allocated() - held
        times = []
        for _ in range(20):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            begin.record()
            backward()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end))
        found[name] = {"ms": round(statistics.median(times), 3), "same": same, "mib": round(taken / 2**20, 1)}
    torch.use_deterministic_algorithms(False)
    return found


def main() -> None:
    settings: Any = torch.utils.deterministic
    settings.fill_uninitialized_memory = False
    random.seed(0)
    shapes = [packed(60, 300, 8192), packed(200, 1200, 8192), packed(1000, 4000, 8192), [8092, 100], [2041, 7]]
    found = [measure(lengths) for lengths in (*shapes, packed(60, 300, 2048), packed(1000, 8000, 16384))]
    head = {"on": torch.cuda.get_device_name(), "torch": torch.__version__}
    RESULTS.write_text(json.dumps(head | {"runs": found}, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
