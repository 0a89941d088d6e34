"""What attention costs where it adds in a fixed order, and whether it then gives the same bits each time.

    python3 bench/attention.py          # needs a Hopper GPU, without flash-attn-4; writes bench/results/attention.json

32 heads of queries and 8 of keys and values of width 128. Documents of random lengths, one behind the other, through
flash: its backward in any order (torch's default) and in a fixed one. Rows of one length through cuDNN: as torch calls
it, in any order, and by plans of our own, in a fixed one, with less and less room for gradients of scores; recorded, so
that launching takes no time.
"""

import json
import random
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.utils.deterministic

from veneer.engine.fused import cudnn
from veneer.engine.fused.attention import Attention, attend, attend_backward
from veneer.engine.fused.documents import Documents
from veneer.kernels.rope import Heads, split_heads

RESULTS = Path(__file__).parent / "results" / "attention.json"
HEADS = Heads(32, 8, 128)
SCALE = HEADS.size**-0.5
_aten = torch.ops.aten


def packed(shortest: int, longest: int, tokens: int) -> list[int]:
    """Lengths of documents that add up to so many tokens."""
    lengths: list[int] = []
    while sum(lengths) < tokens:
        lengths.append(min(random.randint(shortest, longest), tokens - sum(lengths)))
    return lengths


def inputs(tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """q, k, v in one matrix, and the gradient of attention's output."""
    widths = ((HEADS.query + 2 * HEADS.key) * HEADS.size, HEADS.query * HEADS.size)
    qkv, dout = (torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16) for width in widths)
    return qkv, dout


def clock(compute: Callable[[], Any]) -> float:
    """Median milliseconds."""
    compute()
    times: list[float] = []
    for _ in range(20):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        compute()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return float(round(statistics.median(times), 3))


def backward_of(compute: Callable[[], Sequence[torch.Tensor]]) -> dict[str, Any]:
    """Median milliseconds, MiB taken, and whether six are equal."""
    first = [x.clone() for x in compute()]
    same = all(torch.equal(a, b) for _ in range(5) for a, b in zip(first, compute(), strict=True))
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    compute()
    taken = torch.cuda.max_memory_allocated() - held
    return {"ms": clock(compute), "same": same, "mib": round(taken / 2**20, 1)}


def replayed(compute: Callable[[], Any]) -> float:
    """Median milliseconds of a recording."""
    compute()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        compute()
    return clock(graph.replay)


def documents(lengths: list[int]) -> dict[str, Any]:
    """Of uneven lengths, by flash."""
    kind, known = Attention(HEADS, SCALE, 0, 0.0), Documents.of(lengths, "cuda")
    qkv, dout = inputs(sum(lengths))
    assert kind.backend(known, qkv) == "flash"
    (out, lse, state, unused, _), bounds = attend(qkv, known, kind)[1], known.bounds
    where = (bounds, bounds, known.longest, known.longest, 0.0, True)
    gradient = dout.view(out.shape)

    def any_order() -> Any:
        return _aten._flash_attention_backward(gradient, *split_heads(qkv, HEADS), out, lse, *where, state, unused)

    found: dict[str, Any] = {"documents": len(lengths), "tokens": sum(lengths), "longest": known.longest}
    found["any order"] = backward_of(any_order)
    found["fixed order"] = backward_of(lambda: attend_backward(dout, qkv, (out, lse, state, unused, None), known, kind))
    return found


def rows(count: int, length: int) -> dict[str, Any]:
    """Of one length, by cuDNN."""
    qkv, dout = inputs(count * length)
    parts = split_heads(qkv, HEADS)
    gradient = dout.view(len(dout), HEADS.query, HEADS.size)
    q, k, v, d = (torch.unflatten(x, 0, (count, length)).transpose(1, 2) for x in (*parts, gradient))
    out, lse, bounds_q, bounds_k, max_q, max_k, seed, place, _ = _aten._scaled_dot_product_cudnn_attention(
        q, k, v, None, True, 0.0, True, False
    )

    def by_torch() -> Any:
        return _aten._scaled_dot_product_cudnn_attention_backward(
            d, q, k, v, out, lse, seed, place, None, bounds_q, bounds_k, max_q, max_k, 0.0, True
        )

    found: dict[str, Any] = {"rows": count, "length": length, "forward_ms": {}}
    found["forward_ms"]["torch"] = replayed(
        lambda: _aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, True, False)
    )
    found["forward_ms"]["here"] = replayed(lambda: cudnn.attend(parts, count, SCALE))
    found["torch, any order"] = backward_of(by_torch) | {"ms": replayed(by_torch)}
    own_out, own_lse = cudnn.attend(parts, count, SCALE)
    for room in (2**40, 640 * 2**20, cudnn.WORKSPACE_BYTES, 0):
        call = cudnn.Call.of(count, length, HEADS, room)

        def here(room: int = room) -> Any:
            return cudnn.attend_backward(gradient, parts, own_out, own_lse, SCALE, room)

        name = f"here, fixed order, {call.rows} rows and {call.heads.query} heads a call"
        if name not in found:
            found[name] = backward_of(here) | {"ms": replayed(here)}
    return found


def main() -> None:
    settings: Any = torch.utils.deterministic
    settings.fill_uninitialized_memory = False
    random.seed(0)
    shapes = [packed(60, 300, 8192), packed(200, 1200, 8192), packed(1000, 4000, 8192), [8092, 100], [2041, 7]]
    uneven = [documents(lengths) for lengths in (*shapes, packed(60, 300, 2048), packed(1000, 8000, 16384))]
    even = [rows(count, length) for count, length in ((4, 2048), (1, 2048), (2, 1024), (2, 8192), (3, 1000))]
    head = {
        "on": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
    }
    RESULTS.write_text(json.dumps(head | {"documents": uneven, "rows": even}, indent=1) + "\n")
    print(json.dumps([*uneven, *even], indent=1))


if __name__ == "__main__":
    main()
