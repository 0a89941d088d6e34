"""What adapters of their own cost the rows of a layer, beside its products with weights: kernels/own_linear.py.

    python3 -m bench.own_linear    # an H100: the linear layers of an 8B block, 8 adapters of r=16

Microseconds of a block's linear layers (q, k and v; o; gate and up; down), recorded as a CUDA graph of many blocks so
that weights are read from memory. For steps of 64, 16 and 1 rows: cuBLAS without adapters; `own_linear`; and what it
replaced, cuBLAS with launches of their own for A and B. For prompts, of one adapter each: cuBLAS without adapters; with
deltas to which products are added, as the server does; with deltas added in place; and the parts of that. Each is the
median of 7 measurements of 10 replays. Writes bench/results/own_linear.json.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results" / "own_linear.json"
GROUPS = {
    "q, k, v": (4096, (4096, 1024, 1024)),
    "o": (4096, (4096,)),
    "gate, up": (4096, (14336, 14336)),
    "down": (14336, (4096,)),
}
ADAPTERS, RANK, BLOCKS = 8, 16, 6


class Group:
    """Weights and adapters of layers that read one input, as the server holds them."""

    def __init__(self, width: int, outputs: tuple[int, ...]) -> None:
        from veneer.kernels.own_linear import new_counts

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(shape, device="cuda", dtype=torch.bfloat16) * 0.02

        self.outputs, self.width = outputs, width
        self.weights = [draw(size, width) for size in outputs]
        self.a_NMRD, self.b_NRF = draw(ADAPTERS + 1, len(outputs), RANK, width), draw(ADAPTERS + 1, RANK, sum(outputs))
        self.counts = new_counts(sum(outputs), self.a_NMRD.device)


def microseconds(run: Callable[[], None]) -> dict[str, float]:
    """Return the median of a block's time, and how far measurements lie from it."""
    cuda: Any = torch.cuda
    stream = cuda.Stream()
    with cuda.stream(stream):
        run()
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    graph.replay()
    times = []
    for _ in range(7):
        begin, end = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(10):
            graph.replay()
        end.record()
        end.synchronize()
        times.append(100 * begin.elapsed_time(end) / BLOCKS)
    return {"median": round(statistics.median(times), 1), "spread": round(max(times) - min(times), 1)}


def ways(groups: list[Group], sequences: int, tokens: int) -> dict[str, Callable[[], None]]:
    """Return functions that compute all groups once, by what they do."""
    from veneer.kernels.own_adapter import add_own, own_deltas, project_own
    from veneer.kernels.own_linear import MOST_ROWS, own_linear

    rows = sequences * tokens
    x = {width: torch.randn(rows, width, device="cuda", dtype=torch.bfloat16) for width in (4096, 14336)}
    number = torch.arange(sequences, device="cuda") % ADAPTERS + 1
    projected = {one: project_own(x[one.width], one.a_NMRD, number) for one in groups}

    def cublas() -> None:
        for one in groups:
            for weight in one.weights:
                torch.mm(x[one.width], weight.T)

    def own() -> None:
        for one in groups:
            own_linear(x[one.width], one.weights, one.a_NMRD, one.b_NRF, number, one.counts)

    def added_in_place() -> None:
        for one in groups:
            products = [torch.mm(x[one.width], weight.T) for weight in one.weights]
            h_PTK, at = project_own(x[one.width], one.a_NMRD, number), 0
            for member, product in enumerate(products):
                add_own(product, h_PTK, member, one.b_NRF[:, :, at : at + product.shape[1]], number)
                at += product.shape[1]

    def deltas_first() -> None:
        for one in groups:
            h_PTK = project_own(x[one.width], one.a_NMRD, number)
            for delta, weight in zip(own_deltas(h_PTK, one.b_NRF, one.outputs, number), one.weights, strict=True):
                delta.addmm_(x[one.width], weight.T)

    def project() -> None:
        for one in groups:
            project_own(x[one.width], one.a_NMRD, number)

    def deltas() -> None:
        for one in groups:
            own_deltas(projected[one], one.b_NRF, one.outputs, number)

    def add_products() -> None:
        for one in groups:
            for weight in one.weights:
                torch.empty(rows, len(weight), device="cuda", dtype=torch.bfloat16).addmm_(x[one.width], weight.T)

    found: dict[str, Callable[[], None]] = {"cuBLAS without adapters": cublas, "added in place": added_in_place}
    if rows <= MOST_ROWS:
        return found | {"own_linear": own}
    parts = {"of it A": project, "of it B": deltas, "of it products that are added": add_products}
    return found | {"deltas first": deltas_first} | parts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS)
    a = parser.parse_args()
    torch.manual_seed(0)
    blocks = {name: [Group(*shape) for _ in range(BLOCKS)] for name, shape in GROUPS.items()}
    found: dict[str, Any] = {
        "on": {
            "gpu": torch.cuda.get_device_name(),
            "versions": {name: metadata.version(name) for name in ("torch", "triton")},
            "date": time.strftime("%Y-%m-%d"),
        }
    }
    for sequences, tokens in ((64, 1), (16, 1), (1, 1), (1, 256), (1, 512), (4, 256)):
        kind = f"{sequences} rows" if tokens == 1 else f"{sequences} x {tokens} tokens"
        every = [group for number in range(BLOCKS) for group in (blocks[name][number] for name in GROUPS)]
        of_kind = found[kind] = {
            "all": {name: microseconds(way) for name, way in ways(every, sequences, tokens).items()}
        }
        for group, some in blocks.items():
            of_kind[group] = {name: microseconds(way)["median"] for name, way in ways(some, sequences, tokens).items()}
        print(json.dumps({kind: of_kind}), flush=True)
        a.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
