"""How rows and heads are shared out among cuDNN's calls; the calls themselves are tested on a GPU."""

import sys
from collections.abc import Iterator
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch

from tests.support.notices import notified
from veneer.engine.fused import attention, cudnn
from veneer.engine.fused.attention import Attention
from veneer.engine.fused.cudnn import WORKSPACE_BYTES, Call, Layout
from veneer.engine.fused.documents import Documents
from veneer.kernels.rope import Heads, split_heads

LLAMA = Heads(32, 8, 128)


@pytest.mark.parametrize(("rows", "length"), [(1, 256), (4, 2048), (2, 8192), (3, 768)])
@pytest.mark.parametrize("heads", [LLAMA, Heads(32, 32, 128), Heads(9, 3, 64)])
def test_more_room_means_fewer_calls_and_each_fits_it(rows: int, length: int, heads: Heads) -> None:
    least = Call.of(rows, length, heads, 0)
    assert least == Call(1, Heads(heads.query // heads.key, 1, heads.size))
    covered = 0
    for room in (2**20 * 2**n for n in range(16)):
        call = Call.of(rows, length, heads, room)
        assert call == least or call.workspace_bytes(length) <= room
        assert call.rows * call.heads.key >= covered
        assert rows % call.rows == heads.key % call.heads.key == 0
        assert call.heads.query * heads.key == call.heads.key * heads.query
        covered = call.rows * call.heads.key
    assert covered == rows * heads.key


def test_workspace_is_what_cudnn_asked_for() -> None:
    """MiB of plans on an H100, cuDNN 9.19."""
    for call, length, measured in (
        (Call(4, LLAMA), 2048, 1153.0),
        (Call(4, Heads(8, 2, 128)), 2048, 288.25),
        (Call(2, LLAMA), 8192, 8450.0),
        (Call(2, Heads(32, 32, 128)), 2048, 512.5),
        (Call(4, Heads(32, 8, 64)), 2048, 1089.0),
    ):
        assert call.workspace_bytes(length) / 2**20 == pytest.approx(measured, abs=0.01)


def test_which_rows_go_through_flash() -> None:
    kind = Attention(LLAMA, 0.1, 0, 0.0)
    qkv = torch.empty((1, 48 * 128), dtype=torch.bfloat16, device="meta")
    for length, backend in ((256, "cudnn"), (16384, "cudnn"), (128, "flash"), (1000, "flash"), (32768, "flash")):
        documents = Documents((length,) * 2, torch.empty(0), torch.empty(0), length)
        assert kind.backend(documents, qkv) == backend
        assert kind.backend(documents._replace(lengths=(length, length - 1)), qkv) == "flash"
        assert kind._replace(window=100).backend(documents, qkv) == "flash"


class _Written:
    """Stands in for a plan: what cuDNN computes, written out."""

    def __init__(self, layout: Layout, *_: Any) -> None:
        self.layout = layout

    def grads(self, q: Any, k: Any, v: Any, out: Any, dout: Any, lse: Any) -> Any:
        tokens, heads, length = len(q), self.layout.call.heads, self.layout.length
        kind = Attention(heads, self.layout.scale, 0, 0.0)
        documents = Documents.of((length,) * (tokens // length), "cpu")
        q, k, v = (x.detach().clone().requires_grad_() for x in (q, k, v))
        attended = attention._plain(q, k, v, documents, kind)
        torch.testing.assert_close(out, attended.detach())
        torch.testing.assert_close(lse, _log_sum_exp(q, k, tokens // length, kind.scale))
        return torch.autograd.grad(attended, (q, k, v), dout)


def _log_sum_exp(q: Any, k: Any, rows: int, scale: float) -> torch.Tensor:
    """(B, H, L) of scores."""
    q, k = (torch.unflatten(x.detach(), 0, (rows, -1)).transpose(1, 2) for x in (q, k))
    scores = scale * q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT
    hidden = torch.ones(scores.shape[-2:]).triu(1).bool()
    found: torch.Tensor = scores.masked_fill(hidden, float("-inf")).logsumexp(-1)
    return found


def _run_written(plan: _Written, tensors: tuple[torch.Tensor, ...]) -> None:
    q, k, v, out, dout, lse, *grads = tensors
    for gradient, found in zip(grads, plan.grads(q, k, v, out, dout, lse), strict=True):
        gradient.copy_(found)


@pytest.mark.parametrize("room", [0, 6_000, WORKSPACE_BYTES])
def test_every_row_and_head_is_covered_once(room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cudnn, "_backward", _Written)
    monkeypatch.setattr(cudnn, "_run", _run_written)
    B, L, heads = 3, 10, Heads(8, 4, 16)
    kind, documents = Attention(heads, 0.3, 0, 0.0), Documents.of((L,) * B, "cpu")
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn((B * L, 256 + 8), generator=generator)[:, :256]
    dout = torch.randn((B * L, 128), generator=generator)
    wanted = attention.attend_backward(dout, qkv, None, documents, kind)
    parts = split_heads(qkv, heads)
    out = attention._plain(parts[0], parts[1], parts[2], documents, kind)
    lse = _log_sum_exp(parts[0], parts[1], B, kind.scale)
    found = cudnn.attend_backward(dout.view(B * L, 8, 16), parts, out, lse, kind.scale, room)
    for gradient, right in zip(found, wanted, strict=True):
        torch.testing.assert_close(gradient, right)


@pytest.fixture
def no_plans(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As if nothing had been planned."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    caches = (cudnn.is_able, cudnn._forward, cudnn._backward, cudnn._handle)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


def test_without_the_library_flash_does_it_and_says_so(no_plans: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cudnn", None)
    with notified(r"goes through flash, which is slower: cuDNN has no plan for rows of 512"):
        assert not cudnn.is_able(2, 512, LLAMA)


@pytest.mark.skipif(sys.platform != "linux", reason="cuDNN's frontend is a dependency on Linux alone")
def test_what_cudnn_refuses_flash_does_and_says_why(no_plans: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its refusal is no RuntimeError, and must not end a run."""
    import cudnn as library

    assert not issubclass(library.cudnnGraphNotSupportedError, RuntimeError)

    class Refuses:
        """A graph that takes anything until it is built."""

        def __init__(self, **_: Any) -> None:
            pass

        def build(self, _: Any) -> None:
            raise library.cudnnGraphNotSupportedError("no deterministic engine")

        def __getattr__(self, name: str) -> Any:
            return MagicMock() if name == "tensor" else lambda **_: [MagicMock()] * (2 if name == "sdpa" else 3)

    monkeypatch.setattr(library, "pygraph", Refuses)
    monkeypatch.setattr(cudnn, "_handle", lambda device: None)
    with notified("no deterministic engine"):
        assert not cudnn.is_able(2, 512, LLAMA)
