"""FlexAttention's masks and layout, by its plain form on the CPU; its kernels are tested on the GPU."""

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

from veneer.engine.fused import attention
from veneer.engine.fused.attention import FLEX_BLOCK, Attention
from veneer.engine.fused.documents import Documents
from veneer.kernels.rope import Heads, split_heads

LENGTHS = [(5,), (128,), (100, 30), (300, 5, 1), (40,) * 8, (260, 129, 7)]
WINDOWS = [0, 1, 64, 200]


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_blocks_that_are_left_out_hold_nothing_and_full_ones_everything(lengths: tuple[int, ...], window: int) -> None:
    blocks = attention._flex_blocks(sum(lengths))
    mask = attention._flex_mask(lengths, window, blocks, torch.device("cpu"))
    total = blocks * FLEX_BLOCK
    document_T = torch.repeat_interleave(torch.tensor([*lengths, total - sum(lengths)]))
    query, key = torch.arange(total)[:, None], torch.arange(total)
    wanted = (document_T[:, None] == document_T) & (query >= key)
    if window:
        wanted &= query - key < window
    assert torch.equal(mask.mask_mod(0, 0, query, key), wanted)
    tiles = wanted.reshape(blocks, FLEX_BLOCK, blocks, FLEX_BLOCK)
    assert torch.equal(mask.to_dense()[0, 0].bool(), tiles.any(dim=(1, 3)))
    full = [
        set(numbers[:count].tolist())
        for numbers, count in zip(mask.full_kv_indices[0, 0], mask.full_kv_num_blocks[0, 0], strict=True)
    ]
    assert full == [set(row.nonzero().flatten().tolist()) for row in tiles.all(dim=3).all(dim=1)]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("window", [0, 64])
@pytest.mark.parametrize("lengths", LENGTHS[:4])
def test_capped_scores_are_the_plain_ones(
    lengths: tuple[int, ...], window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_compiled_flex", lambda: flex_attention)
    kind = Attention(Heads(4, 2, 16), 0.25, window, 5.0)
    qkv_TN = 3 * torch.randn(sum(lengths), 128, generator=torch.Generator().manual_seed(0))
    q, k, v = split_heads(qkv_TN, kind.heads)
    documents = Documents.of(lengths, "cpu")
    rows = [attention._flex_rows(x) for x in (q, k, v)]
    assert all(row.is_leaf and row.requires_grad for row in rows)
    found = attention._flex([row.detach() for row in rows], len(qkv_TN), documents, kind)  # no backward on a CPU
    torch.testing.assert_close(found, attention._plain(q, k, v, documents, kind))
