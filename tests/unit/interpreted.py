"""Run by test_kernels.py: kernels in Triton's interpreter against their torch twins."""

from typing import Any

import pytest
import torch

from veneer.kernels import launch, low_rank, nf4, softmax_loss
from veneer.kernels.cast import Cast, cast_all, cast_table
from veneer.kernels.column_scale import ColumnScale, row_norms, scale_backward
from veneer.kernels.decode_attention import decode_attention
from veneer.kernels.gated_mlp import (
    ACTIVATIONS,
    AdapterGradientParts,
    gated_mlp,
    gated_mlp_backward,
    gated_mlp_backward_adapters,
)
from veneer.kernels.low_rank import Dropout, Member
from veneer.kernels.own_adapter import add_own, own_deltas, project_own
from veneer.kernels.own_linear import _shape, fits, new_counts, own_linear
from veneer.kernels.rms_norm import normalize, rms_norm, rms_norm_backward
from veneer.kernels.rope import HeadNorm, Heads, rope, rope_backward
from veneer.kernels.update import OFF_GRID, Update
from veneer.kernels.write_slots import write_slots

MODULES = [
    *("cast", "column_scale", "low_rank", "nf4", "softmax_loss", "gated_mlp", "rms_norm", "rope"),
    *("decode_attention", "own_adapter", "own_linear", "write_slots"),
]


def both(monkeypatch: pytest.MonkeyPatch, compute: Any) -> tuple[Any, Any]:
    """What `compute` returns by Triton and by its twin; it must make its inputs itself, from a seed."""
    results = []
    for by_triton in (True, False):
        with monkeypatch.context() as patch:
            for module in MODULES:
                patch.setattr(f"veneer.kernels.{module}.runs_triton", lambda tensor, answer=by_triton: answer)
            torch.manual_seed(0)
            results.append(compute())
    return results[0], results[1]


def check(monkeypatch: pytest.MonkeyPatch, compute: Any) -> None:
    found, wanted = both(monkeypatch, compute)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=2e-4)


def apart(rows: int, columns: int, more: int = 5) -> torch.Tensor:
    """A matrix whose rows lie apart."""
    return torch.randn(rows, columns + more)[:, :columns]


@pytest.mark.parametrize("width", [48, 100])
@pytest.mark.parametrize("post", [False, True])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_rms_norm(monkeypatch: pytest.MonkeyPatch, width: int, post: bool, offset: float) -> None:
    def compute() -> Any:
        x, delta, dy, add = (torch.randn(3, width) for _ in range(4))
        weight, weight2, y = torch.randn(width), torch.randn(width), apart(3, width)
        total, rstd = rms_norm(x, delta, weight, 1e-5, offset, y, weight2 if post else None)
        dx = rms_norm_backward(dy.clone(), total, weight, rstd, 1e-5, offset, add)
        return total, rstd, y, dx, rms_norm_backward(dy, x, weight, None, 1e-5, offset)

    check(monkeypatch, compute)


def update_of(rows: int, columns: int, rank: int = 5) -> Update:
    return Update(apart(rows, rank), apart(rank, columns), 0.7)


def test_rms_norm_with_an_update(monkeypatch: pytest.MonkeyPatch) -> None:
    T, width = 19, 300

    def compute() -> Any:
        x, dy, add = torch.randn(T, width), apart(T, width), apart(T, width)
        weight, y, again = torch.randn(width), apart(T, width), torch.empty(T, width)
        total, rstd = rms_norm(x, apart(T, width), weight, 1e-5, 1.0, y, None, update_of(T, width))
        normalize(total, rstd, weight, 1.0, again)
        assert torch.equal(y, again)
        return total, rstd, y, rms_norm_backward(dy, x, weight, rstd, 1e-5, 1.0, add, update_of(T, width))

    check(monkeypatch, compute)


def scale_of(columns: int) -> ColumnScale:
    return ColumnScale(torch.randn(columns), torch.randn(columns))


@pytest.mark.parametrize("updates", [False, True])
@pytest.mark.parametrize("post", [False, True])
def test_rms_norm_of_scaled_columns(monkeypatch: pytest.MonkeyPatch, updates: bool, post: bool) -> None:
    T, width = 7, 300

    def compute() -> Any:
        x, weight, y = torch.randn(T, width), torch.randn(width), apart(T, width)
        update = update_of(T, width) if updates and not post else None
        post_weight = torch.randn(width) if post else None
        total, rstd = rms_norm(x, apart(T, width), weight, 1e-5, 1.0, y, post_weight, update, scale_of(width))
        return total, rstd, y

    check(monkeypatch, compute)


@pytest.mark.parametrize("updates", [False, True])
@pytest.mark.parametrize("in_place", [False, True])
def test_the_gradient_of_a_scale(monkeypatch: pytest.MonkeyPatch, updates: bool, in_place: bool) -> None:
    T, width = 300, 150

    def compute() -> Any:
        dy = apart(T, width)
        dz = dy if in_place else apart(T, width)
        update = update_of(T, width) if updates else None
        sums = scale_backward(dy, apart(T, width), scale_of(width), dz, update)
        return sums.sum(0), dz

    check(monkeypatch, compute)


@pytest.mark.parametrize("rank", [5, 40])
def test_norms_of_rows_are_those_of_the_whole_matrix(monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
    N, D = 70, 90

    def compute() -> Any:
        w, a, b, magnitude = torch.randn(N, D), torch.randn(rank, D), 0.2 * apart(N, rank), torch.rand(N)
        factor, inverse = torch.empty(2, N)
        row_norms(w.norm(dim=1), a @ w.T, a @ a.T, b, magnitude, factor, inverse)
        norm = (w + b @ a).norm(dim=1)
        torch.testing.assert_close(inverse * OFF_GRID, 1 / norm, rtol=1e-5, atol=0)
        torch.testing.assert_close(factor * OFF_GRID, magnitude / norm, rtol=1e-5, atol=0)
        return factor, inverse

    check(monkeypatch, compute)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("half", [8, 5])
def test_rope(monkeypatch: pytest.MonkeyPatch, normed: bool, half: int, scaled: bool) -> None:
    heads, T = Heads(6, 2, 16), 7

    def compute() -> Any:
        qkv, out = apart(T, heads.size * 10), apart(T, heads.size * 10)
        angles, position = torch.randn(9, half), torch.randint(0, 9, (T,), dtype=torch.int32)
        norm = HeadNorm(torch.randn(16), torch.randn(16), 1e-6) if normed else None
        raw, scale = qkv.clone(), scale_of(heads.size * 10) if scaled else None
        turned = rope(qkv, heads, position, angles.cos(), angles.sin(), norm, scale)
        dq, dk, dv = (torch.randn(T, n, 16) for n in (6, 2, 2))
        rope_backward(dq, dk, dv, heads, position, angles.cos(), angles.sin(), out, raw if norm else None, norm, scale)
        return turned, out

    check(monkeypatch, compute)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("activation", sorted(set(ACTIVATIONS.values())))
def test_gated_mlp(monkeypatch: pytest.MonkeyPatch, activation: int, scaled: bool) -> None:
    def compute() -> Any:
        gate_up, h, dh = apart(3, 1102), apart(3, 551), apart(3, 551)
        gated_mlp(gate_up, h, activation, scale_of(1102) if scaled else None)
        gated_mlp_backward(gate_up, dh, activation)
        return h, gate_up, dh

    check(monkeypatch, compute)


@pytest.mark.parametrize(("rank", "scaled"), [(5, False), (5, True), (0, True)])
@pytest.mark.parametrize("joint", [False, True])
def test_gated_mlp_with_the_adapters_gradients(
    monkeypatch: pytest.MonkeyPatch, joint: bool, rank: int, scaled: bool
) -> None:
    width = 150

    def compute() -> Any:
        stacked = rank if joint else 2 * rank
        slots = (0, 0) if joint else (0, 1)
        parts = AdapterGradientParts.empty(1100, width, rank, stacked, torch.empty(0), scaled)
        scale = scale_of(2 * width) if scaled else None
        results: list[torch.Tensor] = []
        for is_first, T in ((True, 1100), (False, 70)):
            gate_up, dh, u, v = apart(T, 2 * width), apart(T, width), apart(T, stacked), apart(T, rank)
            gated_mlp_backward_adapters(gate_up, dh, 0, u, v, slots, parts, is_first, scale)
            results += [gate_up] if rank else [gate_up, dh]
        own = parts.b_PRF.sum(0)
        sums = parts.a_PrF.sum(0), own[:rank, :width], own[-rank:, width:], parts.sums_PF.sum(0)
        return *results, *(total / 10 for total in sums)

    check(monkeypatch, compute)


def test_the_gates_gradient_is_autograds() -> None:
    functions: dict[int, Any] = {0: torch.nn.functional.silu, 2: torch.nn.functional.gelu}
    functions[1] = lambda x: torch.nn.functional.gelu(x, approximate="tanh")
    for activation, function in functions.items():
        gate_up = torch.randn(3, 14, dtype=torch.float32, requires_grad=True)
        dh = torch.randn(3, 7)
        (wanted,) = torch.autograd.grad(function(gate_up[:, :7]) * gate_up[:, 7:], gate_up, dh)
        found = gate_up.detach().clone()
        gated_mlp_backward(found, dh.clone(), activation)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("dropout", "skipped"), [(0.0, 0), (0.3, 0), (0.3, 64)])
def test_low_rank_products(monkeypatch: pytest.MonkeyPatch, dropout: float, skipped: int) -> None:
    T, D, rank, N = 70, 150, 5, 21
    members = (Member(0, 9, 0, rank, 2.0), Member(9, 13), Member(13, 21, rank, rank, 0.5))

    def compute() -> Any:
        mask = Dropout(dropout, torch.tensor([1234567]), 16, skipped) if dropout else None
        x, a = apart(T, D), torch.randn(2 * rank, D)
        xa, dx, copy = torch.zeros(T, 2 * rank), apart(T, D), torch.zeros(T, 2 * rank - 1)
        low_rank.project(x, a, xa, rank, mask, copy)
        norm = (torch.rand(T), torch.randn(D), 1.0)
        da = low_rank.outer(xa, x, rank, mask, norm)
        grad_a, grad_b = torch.randn(2 * rank, D), torch.randn(17 * rank)
        low_rank.add_a(da, grad_a)
        low_rank.add_b(low_rank.outer(xa, torch.randn(T, N), rank), grad_b, members)
        if mask is not None:
            low_rank.add_projected(dx, xa, a, rank, mask)
        return xa, copy, grad_a, grad_b, dx

    check(monkeypatch, compute)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_low_rank_products_of_more_ranks_than_a_program_takes(monkeypatch: pytest.MonkeyPatch, dropout: float) -> None:
    """A block of all ranks would need more shared memory than a GPU has."""
    T, D, rank = 20, 70, 300
    sizes: list[int] = []

    def noting(kernel: Any, *given: Any) -> Any:
        start = launch.launch(kernel, *given)

        def noted(*arguments: Any, **constants: Any) -> None:
            sizes.append(constants.get("BLOCK_R", 0))
            start(*arguments, **constants)

        return noted

    def compute() -> Any:
        mask = Dropout(dropout, torch.tensor([1234567]), 16) if dropout else None
        x, a, dx = apart(T, D), torch.randn(2 * rank, D), torch.zeros(T, D)
        xa, v = torch.zeros(T, 2 * rank), torch.randn(T, 2 * rank)
        low_rank.project(x, a, xa, rank, mask)
        if mask is not None:
            low_rank.add_projected(dx, v, a, rank, mask)
        return xa, low_rank.outer(v, x, rank, mask).sum(0), dx / 20

    monkeypatch.setattr(low_rank, "launch", noting)
    check(monkeypatch, compute)
    assert 128 <= max(sizes) <= 256


def test_masks_keep_their_share_and_differ() -> None:
    first, second = (low_rank.keep_mask(7, key, (300, 400), 0.1) for key in (0, 1))
    other = low_rank.keep_mask(8, 0, (300, 400), 0.1)
    for mask in (first, second, other):
        assert mask.float().mean().item() == pytest.approx(0.9, abs=0.005)
        assert mask.float().mean(0).min() > 0.8
        assert mask.float().mean(1).min() > 0.8
    assert torch.equal(low_rank.keep_mask(7, 0, (200, 400), 0.1, skipped=100), first[100:])
    for mask in (second, other, first.roll(1, 0), first.roll(1, 1)):
        assert (first == mask).float().mean().item() == pytest.approx(0.82, abs=0.01)


def test_adapters_find_their_places(monkeypatch: pytest.MonkeyPatch) -> None:
    def compute() -> Any:
        room = torch.zeros(40, 300)
        sources = [torch.randn(5, 290), torch.randn(30, 3), torch.randn(30, 3)]
        targets = [room[35:, :290], room[:30, 290:293], room[:30, 293:296]]
        factors = (1.0, 2.0, 0.5)
        cast_all(cast_table([Cast(t, s, f) for t, s, f in zip(targets, sources, factors, strict=True)]))
        return (room,)

    check(monkeypatch, compute)


@pytest.mark.parametrize("double", [True, False])
def test_four_bit_weights(monkeypatch: pytest.MonkeyPatch, double: bool) -> None:
    import bitsandbytes as bnb

    weights = [torch.randn(rows, 192) for rows in (70, 9, 33)]
    packed = [
        bnb.nn.Params4bit(w, requires_grad=False, quant_type="nf4", compress_statistics=double).to("cpu")
        for w in weights
    ]

    def compute(margins: bool = False) -> Any:
        out = apart(112 + 16, 192 + 16) if margins else apart(112, 192)
        a, b = (torch.randn(3, 192), torch.randn(112, 3)) if margins else (None, None)
        nf4.dequantize(nf4.table_of([nf4.PackedNF4.of(p) for p in packed]), out, a, b)
        return (out,)

    check(monkeypatch, compute)
    check(monkeypatch, lambda: compute(margins=True))
    packed[1].data = packed[1].data.view(-1).view(torch.bfloat16)  # as checkpoints may store them
    check(monkeypatch, compute)
    wanted = torch.cat(
        [bnb.functional.dequantize_4bit(p.data.view(-1).view(torch.uint8), p.quant_state) for p in packed]
    )
    torch.testing.assert_close(compute()[0], wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("cap", [0.0, 3.0])
def test_softmax_loss(monkeypatch: pytest.MonkeyPatch, cap: float) -> None:
    def compute() -> Any:
        logits, losses = 4 * torch.randn(5, 131), torch.empty(5)
        targets = torch.tensor([0, 130, -100, 7, 64])
        softmax_loss.softmax_loss(logits, targets, torch.rand(5), losses, cap)
        return logits, losses

    check(monkeypatch, compute)


@pytest.mark.parametrize("length", [170, 20])
def test_a_slot_reads_its_own_keys_in_parts_or_whole(monkeypatch: pytest.MonkeyPatch, length: int) -> None:
    slots, heads, keys = 3, 6, 2

    def compute() -> Any:
        query = torch.randn(heads, slots, 24).transpose(0, 1)
        position = torch.tensor([0, length // 2, length - 1])
        key, value = torch.randn(slots, keys, length + 5, 24), torch.randn(slots, keys, length + 5, 40)
        write_slots(key, value, torch.randn(keys, slots, 24).transpose(0, 1), torch.randn(slots, keys, 40), position)
        for slot, at in enumerate(position.tolist()):
            key[slot, :, at + 1 :] = value[slot, :, at + 1 :] = 1e4  # what a row does not see
        return decode_attention(query, key[:, :, :length], value[:, :, :length], position, 0.3), key, value

    check(monkeypatch, compute)


@pytest.mark.parametrize(
    ("sequences", "tokens", "members", "adapters", "rank", "width"),
    [(70, 1, 1, 3, 72, 90), (3, 30, 3, 12, 8, 1100), (2, 64, 1, 5, 8, 96)],
)
def test_each_row_gets_its_own_adapters_delta(
    monkeypatch: pytest.MonkeyPatch, sequences: int, tokens: int, members: int, adapters: int, rank: int, width: int
) -> None:
    def compute() -> Any:
        number = torch.randint(0, adapters, (sequences,))
        number[0] = 0
        x, out = apart(sequences * tokens, width), apart(sequences * tokens, 70)
        a, b = torch.randn(adapters, members, rank, width) / 30, torch.randn(adapters, rank, 70)
        h = project_own(x, a, number)
        for member in range(members):
            add_own(out, h, member, b, number)
        return (out,)

    check(monkeypatch, compute)


@pytest.mark.parametrize(
    ("sequences", "tokens", "adapters", "rank", "width", "outputs", "splits"),
    [(5, 1, 4, 8, 64, (64,), 1), (3, 20, 12, 24, 576, (64, 192, 64), 4), (64, 1, 9, 16, 64, (128, 64), 1)],
)
def test_layers_and_each_rows_own_adapter(
    monkeypatch: pytest.MonkeyPatch, sequences: int, tokens: int, adapters: int, rank: int, width: int,
    outputs: tuple[int, ...], splits: int,
) -> None:  # fmt: skip
    monkeypatch.setattr("veneer.kernels.own_linear._shape", lambda *inputs: _shape(*inputs) | {"SPLITS": splits})

    def compute() -> Any:
        number = torch.randint(0, adapters, (sequences,))
        number[0] = 0
        x = apart(sequences * tokens, width)
        weights = [torch.randn(size, width) / width**0.5 for size in outputs]
        assert fits(weights, rank)
        a = torch.randn(adapters, len(outputs), rank, width) / width**0.5
        b = torch.randn(adapters, rank, sum(outputs)) / rank**0.5
        counts = new_counts(sum(outputs), torch.device("cpu"))
        once = own_linear(x, weights, a, b, number, counts)
        assert not counts.any(), "the next launch begins as the first"
        assert all(map(torch.equal, own_linear(x, weights, a, b, number, counts), once))
        return [*once, *own_deltas(project_own(x, a, number), b, outputs, number)]

    check(monkeypatch, compute)
