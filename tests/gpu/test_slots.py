"""Kernels of a decoding step on a GPU give their twins' numbers, at the shapes of large models."""

from typing import Any

import pytest
import torch

from veneer.kernels import decode_attention, own_adapter, own_linear, write_slots

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


def both(monkeypatch: pytest.MonkeyPatch, compute: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """What `compute` returns by Triton and by its twins."""
    found = []
    for by_triton in (True, False):
        with monkeypatch.context() as patch:
            for module in (decode_attention, own_adapter, own_linear, write_slots):
                patch.setattr(module, "runs_triton", lambda tensor, answer=by_triton: answer)
            torch.manual_seed(0)
            found.append(compute())
    return found[0].float(), found[1].float()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("slots", "heads", "keys", "length", "width", "value_width"),
    [(64, 32, 8, 1024, 128, 128), (1, 32, 8, 4096, 128, 128), (3, 6, 6, 256, 16, 16), (5, 16, 16, 512, 192, 128)],
)
def test_attention_over_slots(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, slots: int, heads: int, keys: int, length: int, width: int,
    value_width: int,
) -> None:  # fmt: skip
    def compute() -> torch.Tensor:
        position = torch.randint(0, length, (slots,), device="cuda")
        position[-1] = length - 1
        key = torch.randn(slots, keys, length, width, device="cuda", dtype=dtype)
        value = torch.randn(slots, keys, length, value_width, device="cuda", dtype=dtype)
        query = 3 * torch.randn(slots, heads, width, device="cuda", dtype=dtype)
        new = torch.randn(slots, keys, width + value_width, device="cuda", dtype=dtype)
        write_slots.write_slots(key, value, new[..., :width], new[..., width:], position)
        return decode_attention.decode_attention(query, key, value, position, width**-0.5)

    found, wanted = both(monkeypatch, compute)
    assert (found - wanted).abs().max() < (0.05 if dtype == torch.bfloat16 else 1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("rows", "tokens", "members", "rank", "width", "outputs"),
    [
        (64, 1, 3, 16, 4096, 4096),
        (64, 1, 1, 16, 14336, 1024),
        (1, 1, 2, 8, 64, 128),
        (5, 77, 2, 72, 512, 14336),
        (3, 128, 1, 16, 512, 4096),
    ],
)
def test_each_row_gets_its_own_adapters_delta(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, rows: int, tokens: int, members: int, rank: int, width: int,
    outputs: int,
) -> None:  # fmt: skip
    def compute() -> torch.Tensor:
        number = torch.randint(0, 9, (rows,), device="cuda")
        x = torch.randn(rows * tokens, width, device="cuda", dtype=dtype)
        a = torch.randn(9, members, rank, width, device="cuda", dtype=dtype) * width**-0.5
        b = torch.randn(9, rank, outputs, device="cuda", dtype=dtype) * rank**-0.5
        out = torch.randn(rows * tokens, outputs, device="cuda", dtype=dtype)
        h = own_adapter.project_own(x, a, number)
        own_adapter.add_own(out, h, members - 1, b, number)
        return out

    found, wanted = both(monkeypatch, compute)
    assert (found - wanted).abs().max() < (0.1 if dtype == torch.bfloat16 else 2e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("rows", "tokens", "rank", "width", "outputs"),
    [(64, 1, 16, 4096, (4096, 1024, 1024)), (64, 1, 64, 14336, (4096,)), (1, 1, 8, 576, (576, 192, 192)),
     (2, 20, 16, 4096, (14336, 14336))],
)  # fmt: skip
def test_layers_and_each_rows_own_adapter(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, rows: int, tokens: int, rank: int, width: int,
    outputs: tuple[int, ...],
) -> None:  # fmt: skip
    def compute() -> torch.Tensor:
        number = torch.randint(0, 9, (rows,), device="cuda")
        x = torch.randn(rows * tokens, width, device="cuda", dtype=dtype)
        weights = [torch.randn(size, width, device="cuda", dtype=dtype) * width**-0.5 for size in outputs]
        a = torch.randn(9, len(outputs), rank, width, device="cuda", dtype=dtype) * width**-0.5
        b = torch.randn(9, rank, sum(outputs), device="cuda", dtype=dtype) * rank**-0.5
        assert own_linear.fits(weights, rank)
        counts = own_linear.new_counts(sum(outputs), x.device)
        once = torch.cat(own_linear.own_linear(x, weights, a, b, number, counts), 1)
        for _ in range(20):  # one after the other, as in a recorded step
            assert torch.equal(torch.cat(own_linear.own_linear(x, weights, a, b, number, counts), 1), once)
            assert not counts.any()
        deltas = own_adapter.own_deltas(own_adapter.project_own(x, a, number), b, outputs, number)
        return torch.cat([once, *deltas], 1)

    found, wanted = both(monkeypatch, compute)
    assert (found - wanted).abs().max() < (0.1 if dtype == torch.bfloat16 else 2e-4)
