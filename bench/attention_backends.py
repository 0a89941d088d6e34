"""Times attention's backends on the same documents: forward, and backward in a fixed order.

    python3 -m bench.attention_backends     # needs a Hopper GPU and flash-attn-4; writes its file in bench/results

Prints a JSON line for each shape: milliseconds of forward and backward by backend, medians of five.
"""

import json
import statistics
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch

from veneer.engine.fused.attention import Attention, attend, attend_backward
from veneer.engine.fused.documents import Documents
from veneer.kernels.rope import Heads

RESULTS = Path(__file__).parent / "results" / "attention_backends.json"
WORKSPACE = 1200 * 2**20  # of cuDNN's backward
BACKENDS = ("flash4", "cudnn", "flash", "flex")


class Shape(NamedTuple):
    """Heads and documents of one measurement."""

    heads: Heads
    lengths: tuple[int, ...]
    window: int = 0
    softcap: float = 0.0


LLAMA, GEMMA, SMALL = Heads(32, 8, 128), Heads(16, 8, 256), Heads(9, 3, 64)
SHAPES = (
    Shape(LLAMA, (2048,) * 4), Shape(LLAMA, (1024,) * 2), Shape(LLAMA, (4096,) * 2), Shape(LLAMA, (32768,)),
    Shape(LLAMA, (2100, 3000, 1000, 2092)), Shape(LLAMA, (180,) * 45), Shape(LLAMA, (90,) * 20),
    Shape(GEMMA, (2048,) * 4, 0, 50.0), Shape(GEMMA, (8192,), 4096, 50.0),
    Shape(SMALL, (2048,) * 4), Shape(SMALL, (180,) * 45), Shape(Heads(28, 4, 128), (2048,) * 4),
    Shape(Heads(32, 8, 64), (8192,) * 2),
)  # fmt: skip


def clock(compute: Callable[[], Any]) -> float:
    """Median milliseconds of five calls, after two."""
    for _ in range(2):
        compute()
    times = []
    for _ in range(5):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        compute()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return float(round(statistics.median(times), 3))


def forced(backend: str, kind: Attention) -> Attention:
    """The same attention through one backend, whatever the rule says."""

    class Forced(Attention):
        def backend(self, documents: Documents, like: torch.Tensor) -> str:
            return backend

    return Forced(*kind)


def takes(backend: str, shape: Shape, documents: Documents) -> bool:
    """Whether a backend computes a shape."""
    if backend == "cudnn":
        return documents.is_even and not shape.window and not shape.softcap
    return backend == "flash4" or (backend == "flex") == bool(shape.softcap)


def measure(shape: Shape) -> dict[str, Any]:
    heads, tokens = shape.heads, sum(shape.lengths)
    widths = ((heads.query + 2 * heads.key) * heads.size, heads.query * heads.size)
    qkv, dout = (torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16) for width in widths)
    documents = Documents.of(shape.lengths, "cuda")
    found: dict[str, Any] = {}
    for backend in BACKENDS:
        if not takes(backend, shape, documents):
            continue
        kind = forced(backend, Attention(heads, heads.size**-0.5, shape.window, shape.softcap))
        saved = attend(qkv, documents, kind)[1]

        def forward(kind: Attention = kind) -> Any:
            return attend(qkv, documents, kind)

        def backward(kind: Attention = kind, backend: str = backend, saved: Any = saved) -> Any:
            kept = attend(qkv, documents, kind)[1] if backend == "flex" else saved  # autograd's graph serves once
            return attend_backward(dout, qkv, kept, documents, kind, WORKSPACE)

        found[backend] = (clock(forward), clock(backward))
    return shape._asdict() | {"lengths": [len(shape.lengths), max(shape.lengths)], "forward_backward_ms": found}


def main() -> None:
    runs = []
    for shape in SHAPES:
        runs.append(measure(shape))
        print("RESULT " + json.dumps(runs[-1]), flush=True)
    versions = {name: metadata.version(name) for name in ("torch", "flash-attn-4", "nvidia-cudnn-frontend")}
    found = {"gpu": torch.cuda.get_device_name(), "versions": versions, "runs": runs}
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
