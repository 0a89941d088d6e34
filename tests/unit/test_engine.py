"""The reference engine computes what the plain model computes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.support.tiny import FAMILIES
from veneer.config import Adapter, Model, Quantization
from veneer.data.batch import Batch, Example
from veneer.engine.interface import document_losses
from veneer.engine.objective import LIKELIHOOD
from veneer.engine.reference import ReferenceEngine
from veneer.kernels import linear_cross_entropy as kernel
from veneer.machine.device import find_machine
from veneer.model.attach import attach
from veneer.model.load import load_model
from veneer.model.locate import locate

NO_SDPA = ("gemma2", "sdpa")  # Transformers has none for it


def load(folder: Path, bits: int = 16, **settings: Any) -> Any:
    model = Model.model_validate({"base": str(folder), "dtype": "float32"} | settings)
    base = load_model(locate(model), model, Quantization() if bits == 4 else None, find_machine())
    tuned = attach(base, Adapter(r=4), seed=0)
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return tuned


def examples(lengths: list[int]) -> list[Example]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for length in lengths:
        ids = torch.randint(3, 384, (length,), generator=generator).numpy().astype(np.int32)
        spans = tuple((n, min(n + 2, length), 1.0) for n in range(2, length, 3))
        found.append(Example(ids, spans, ""))
    return found


def gradients(model: Any) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    return found


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tokens", [1, 7, 33])
def test_chunked_cross_entropy_equals_torchs(tokens: int, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "CHUNK_BYTES", 4 * 53 * 5)  # five tokens a chunk
    torch.manual_seed(0)
    hidden_ND = torch.randn(tokens, 11, dtype=torch.float32, requires_grad=True)
    weight_VD, bias_V = torch.randn(53, 11), torch.randn(53) if bias else None
    targets_N, upstream_N = torch.randint(53, (tokens,)), torch.randn(tokens)
    expected_N = F.cross_entropy(F.linear(hidden_ND, weight_VD, bias_V), targets_N, reduction="none")
    (expected_gradient,) = torch.autograd.grad(expected_N, hidden_ND, upstream_N)
    losses_N = kernel.linear_cross_entropy(hidden_ND, weight_VD, bias_V, targets_N)
    (gradient,) = torch.autograd.grad(losses_N, hidden_ND, upstream_N)
    torch.testing.assert_close(losses_N, expected_N)
    torch.testing.assert_close(gradient, expected_gradient)


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_equal_the_plain_models(family: str, tiny_model: Callable[..., Path]) -> None:
    """Padding, grouping and the head's shortcut change nothing: each document alone through the model's own code."""
    model = load(tiny_model(family))
    documents = examples([3, 19, 40, 8, 21])
    engine = ReferenceEngine(model)
    model.train()
    expected = torch.zeros((), dtype=torch.float64)
    for document in documents:
        logits_LV = model(input_ids=torch.tensor(document.ids[None].astype(np.int64))).logits[0].float()
        loss = F.cross_entropy(logits_LV, torch.tensor(document.targets), reduction="sum")
        torch.autograd.backward(loss / 10)
        expected += loss.detach().double()
    plain = gradients(model)
    got = engine.forward_backward(Batch.of(documents).scaled(0.1), LIKELIHOOD).loss
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, plain[name], rtol=1e-3, atol=1e-6, msg=name)
    assert sum(document_losses(engine, Batch.of(documents))) == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("family", "attention"),
    [(family, attention) for family in FAMILIES for attention in ("eager", "sdpa") if (family, attention) != NO_SDPA],
)
def test_packed_rows_are_the_rows_one_by_one(family: str, attention: str, tiny_model: Callable[..., Path]) -> None:
    """Whatever the attention backend: a pack's loss and gradients are the sums of its documents'."""
    model = load(tiny_model(family), attn_implementation=attention)
    engine = ReferenceEngine(model)
    documents = examples([31, 5, 12, 12, 3, 1 + 2, 25])
    packed = engine.forward_backward(Batch.of(documents).scaled(0.1), LIKELIHOOD).loss
    together = gradients(model)
    alone = sum(engine.forward_backward(Batch.of([document]).scaled(0.1), LIKELIHOOD).loss for document in documents)
    torch.testing.assert_close(packed, alone, rtol=1e-6, atol=1e-6)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(together[name], gradient, rtol=1e-3, atol=1e-6, msg=name)


def test_a_token_counts_by_its_weight(tiny_model: Callable[..., Path]) -> None:
    model = load(tiny_model("llama"))
    engine = ReferenceEngine(model)
    one, other = examples([9, 17])
    halved = Example(one.ids, tuple((start, end, 0.5) for start, end, _ in one.spans), "")
    losses = document_losses(engine, Batch.of([one, other]))
    assert document_losses(engine, Batch.of([halved, other])) == pytest.approx([losses[0] / 2, losses[1]])
    engine.forward_backward(Batch.of([one]).scaled(0.5), LIKELIHOOD)
    expected = gradients(model)
    engine.forward_backward(Batch.of([halved]), LIKELIHOOD)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], msg=name)


def test_a_capped_head_is_noticed(tiny_model: Callable[..., Path]) -> None:
    assert ReferenceEngine(load(tiny_model("llama"))).chunked_head
    assert not ReferenceEngine(load(tiny_model("gemma2"))).chunked_head


def test_evaluating_first_takes_no_gradient_from_training(tiny_model: Callable[..., Path]) -> None:
    """4-bit weights that were used in evaluation mode must still pass gradients, and the same ones."""
    batch = Batch.of(examples([9, 17]))
    model = load(tiny_model("llama"), bits=4)
    engine = ReferenceEngine(model)
    engine.forward_backward(batch, LIKELIHOOD)
    before = gradients(model)
    document_losses(engine, batch)
    model.eval()
    model(input_ids=batch.ids_T[None])
    engine.forward_backward(batch, LIKELIHOOD)
    for name, gradient in gradients(model).items():
        assert torch.equal(gradient, before[name]), name
        assert gradient.abs().max() > 0


def test_documents_of_a_batch_do_not_see_each_other(tiny_model: Callable[..., Path]) -> None:
    engine = ReferenceEngine(load(tiny_model("mistral")))
    documents = examples([30, 29, 12])
    together = document_losses(engine, Batch.of(documents))
    alone = [document_losses(engine, Batch.of([document]))[0] for document in documents]
    torch.testing.assert_close(together, alone)
    again = document_losses(engine, Batch.of([examples([30, 30])[1], *documents[1:]]))
    torch.testing.assert_close(again[1:], together[1:])


def test_gradient_checkpointing_changes_no_gradient(tiny_model: Callable[..., Path]) -> None:
    batch = Batch.of(examples([9, 17]))
    found = []
    for checkpointing in (False, True):
        settings = Model(base=str(tiny_model("llama")), dtype="float32")
        base = load_model(locate(settings), settings, Quantization(), find_machine())
        model = attach(base, Adapter(r=4), 0, checkpointing)
        ReferenceEngine(model).forward_backward(batch, LIKELIHOOD)
        assert base.is_gradient_checkpointing == checkpointing
        found.append(gradients(model))
    for name in found[0]:
        assert torch.equal(found[0][name], found[1][name])
