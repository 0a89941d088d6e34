"""Computes attention of one token a slot over the keys and values that the slot holds, where they lie.

Each row reads its own keys and no more: its length is read on the device, so that one recorded launch serves rows of
any lengths. The query heads that share a key are the rows of one product with it, so keys and values are read once. A
row's keys are divided among P programs, whose unnormalized sums a second kernel adds (flash decoding, after arXiv
2205.14135); P depends on shapes alone, so a row's numbers do not depend on the rows beside it.

Scores, softmax and sums are float32; weights are rounded to the values' dtype before their product, as everywhere.

Shapes: S slots, H query heads, K key heads, L positions of a slot, D and E widths of a key and a value, P parts.
"""

import math

import torch

from veneer.kernels.launch import launch, power_of_2, runs_triton, tl, triton

PROGRAMS = 1024  # that keep a large GPU busy, though rows differ in length
MOST_PARTS = 64
TILE = 16384  # bytes of keys that a program reads at a time


def decode_attention(
    query_SHD: torch.Tensor,
    key_SKLD: torch.Tensor,
    value_SKLE: torch.Tensor,
    position_S: torch.Tensor,
    scaling: float,
) -> torch.Tensor:
    """Return attention's output, [S, H, E], contiguous.

    Args:
        query_SHD: queries, with columns that are dense.
        key_SKLD, value_SKLE: keys and values, with columns that are dense.
        position_S: position of each slot's query, int64: it sees this one and those before it.
        scaling: factor of the scores.
    """
    S, H, D = query_SHD.shape
    K, L, E = value_SKLE.shape[1:]
    if not runs_triton(query_SHD):
        return _attention_torch(query_SHD, key_SKLD, value_SKLE, position_S, scaling)
    block_d, block_e = power_of_2(D), power_of_2(E)
    block_l = max(16, min(64, TILE // (max(block_d, block_e) * key_SKLD.element_size())))
    P = max(1, min(triton.cdiv(PROGRAMS, S * K), triton.cdiv(L, block_l), MOST_PARTS))
    out_SHE = query_SHD.new_empty((S, H, E))
    single = P == 1
    part_PSHE = out_SHE if single else query_SHD.new_empty((P, S, H, E), dtype=torch.float32)
    top_PSH, sum_PSH = (position_S, position_S) if single else part_PSHE.new_empty((2, P, S, H))
    launch(_attend, (S, K, P))(
        query_SHD, key_SKLD, value_SKLE, position_S, part_PSHE, top_PSH, sum_PSH, scaling / math.log(2), H, P,
        query_SHD.stride(0), query_SHD.stride(1), *key_SKLD.stride()[:3], *value_SKLE.stride()[:3],
        GROUP=H // K, D=D, E=E, IS_SPLIT=not single, BLOCK_G=power_of_2(H // K), BLOCK_D=block_d, BLOCK_E=block_e,
        BLOCK_L=block_l, PRECISION="ieee" if query_SHD.dtype == torch.float32 else "tf32", num_warps=4, num_stages=2,
    )  # fmt: skip
    if not single:
        launch(_combine, (S * H,))(
            part_PSHE, top_PSH, sum_PSH, out_SHE, S * H, P, E=E,
            BLOCK_P=1 << (P - 1).bit_length(), BLOCK_E=block_e, num_warps=1 if P <= 16 else 4,
        )  # fmt: skip
    return out_SHE


def _attention_torch(
    query_SHD: torch.Tensor,
    key_SKLD: torch.Tensor,
    value_SKLE: torch.Tensor,
    position_S: torch.Tensor,
    scaling: float,
) -> torch.Tensor:
    shared = query_SHD.shape[1] // key_SKLD.shape[1]
    key_SHLD, value_SHLE = (part.repeat_interleave(shared, 1).float() for part in (key_SKLD, value_SKLE))
    score_SHL = (key_SHLD @ query_SHD.float()[..., None])[..., 0] * scaling
    sees_SL = torch.arange(key_SKLD.shape[2], device=position_S.device) <= position_S[:, None]
    weight_SHL = score_SHL.masked_fill(~sees_SL[:, None], -torch.inf).softmax(-1).to(value_SKLE.dtype).float()
    return (weight_SHL[:, :, None] @ value_SHLE)[:, :, 0].to(query_SHD.dtype)


@triton.jit
def _attend(
    query, key, value, position, part, top, total, scaling, H, parts,
    q_s, q_h, k_s, k_k, k_l, v_s, v_k, v_l,
    GROUP: tl.constexpr, D: tl.constexpr, E: tl.constexpr, IS_SPLIT: tl.constexpr, BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_L: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    s, k, p = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    g, d, e = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    length = (tl.load(position + s) + 1).to(tl.int32)
    span = tl.maximum((length + parts - 1) // parts, BLOCK_L)
    first = p * span
    end = tl.minimum(first + span, length)
    is_g, is_d, is_e = g < GROUP, d < D, e < E
    h = k * GROUP + g
    q = tl.load(query + s * q_s + h[:, None] * q_h + d[None, :], mask=is_g[:, None] & is_d[None, :], other=0.0)
    highest = tl.full((BLOCK_G,), float("-inf"), dtype=tl.float32)
    weights = tl.zeros((BLOCK_G,), dtype=tl.float32)
    result = tl.zeros((BLOCK_G, BLOCK_E), dtype=tl.float32)
    keys, values = key + s * k_s + k * k_k, value + s * v_s + k * v_k
    for start in range(first, end, BLOCK_L):
        at = start + tl.arange(0, BLOCK_L)
        inside = at < end
        tile = tl.load(keys + at[None, :] * k_l + d[:, None], mask=inside[None, :] & is_d[:, None], other=0.0)
        score = tl.dot(q, tile, input_precision=PRECISION) * scaling
        score = tl.where(inside[None, :], score, float("-inf"))
        higher = tl.maximum(highest, tl.max(score, axis=1))
        weight = tl.exp2(score - higher[:, None])
        shrunk = tl.exp2(highest - higher)
        weights = weights * shrunk + tl.sum(weight, axis=1)
        tile = tl.load(values + at[:, None] * v_l + e[None, :], mask=inside[:, None] & is_e[None, :], other=0.0)
        result = tl.dot(weight.to(tile.dtype), tile, result * shrunk[:, None], input_precision=PRECISION)
        highest = higher
    row = (p * tl.num_programs(0) + s) * H + h
    if IS_SPLIT:
        tl.store(top + row, highest, mask=is_g)
        tl.store(total + row, weights, mask=is_g)
    else:
        result = result / weights[:, None]
    ptr = part + row[:, None] * E + e[None, :]
    tl.store(ptr, result.to(part.dtype.element_ty), mask=is_g[:, None] & is_e[None, :])


@triton.jit
def _combine(
    part, top, total, out, rows, parts, E: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_E: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    p, e = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_E)
    is_p, is_e = p < parts, e < E
    highest = tl.load(top + p * rows + row, mask=is_p, other=float("-inf"))
    share = tl.exp2(highest - tl.max(highest, axis=0))  # 0 for a part that has no keys
    weights = tl.load(total + p * rows + row, mask=is_p, other=0.0)
    ptr = part + (p[:, None] * rows + row) * E + e[None, :]
    results = tl.load(ptr, mask=is_p[:, None] & is_e[None, :], other=0.0)
    result = tl.sum(results * share[:, None], axis=0) / tl.sum(weights * share, axis=0)
    tl.store(out + row * E + e, result.to(out.dtype.element_ty), mask=is_e)
