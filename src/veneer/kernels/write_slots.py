"""Writes the key and the value of each slot's new token to its place, in one launch.

Shapes: S slots, K key heads, L positions of a slot, D and E widths of a key and a value.
"""

import torch

from veneer.kernels.launch import launch, power_of_2, runs_triton, tl, triton


def write_slots(
    key_SKLD: torch.Tensor,
    value_SKLE: torch.Tensor,
    new_key_SKD: torch.Tensor,
    new_value_SKE: torch.Tensor,
    position_S: torch.Tensor,
) -> None:
    """Write each slot's new key and value, in place.

    Args:
        key_SKLD, value_SKLE: keys and values, with columns that are dense.
        new_key_SKD, new_value_SKE: those of a token a slot, with columns that are dense.
        position_S: position of each slot's new token, int64.
    """
    S, K, D = new_key_SKD.shape
    E = new_value_SKE.shape[2]
    if not runs_triton(key_SKLD):
        slot_S = torch.arange(S, device=key_SKLD.device)
        key_SKLD[slot_S, :, position_S] = new_key_SKD
        value_SKLE[slot_S, :, position_S] = new_value_SKE
        return
    launch(_write, (S, K))(
        key_SKLD, value_SKLE, new_key_SKD, new_value_SKE, position_S, *key_SKLD.stride()[:3], *value_SKLE.stride()[:3],
        *new_key_SKD.stride()[:2], *new_value_SKE.stride()[:2], D=D, E=E, BLOCK=power_of_2(max(D, E)), num_warps=1,
    )  # fmt: skip


@triton.jit
def _write(
    key, value, new_key, new_value, position, k_s, k_k, k_l, v_s, v_k, v_l, a_s, a_k, b_s, b_k,
    D: tl.constexpr, E: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    s, k = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at, d = tl.load(position + s), tl.arange(0, BLOCK)
    row = tl.load(new_key + s * a_s + k * a_k + d, mask=d < D)
    tl.store(key + s * k_s + k * k_k + at * k_l + d, row, mask=d < D)
    row = tl.load(new_value + s * b_s + k * b_k + d, mask=d < E)
    tl.store(value + s * v_s + k * v_k + at * v_l + d, row, mask=d < E)
