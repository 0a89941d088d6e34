"""16-bit copies of 4-bit weights change no number, and are left out where memory is short."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.tiny import FAMILIES, save_tiny_model
from veneer.config import Adapter, Model, Quantization
from veneer.engine.temporary import fill_zeros
from veneer.machine.device import find_machine
from veneer.model.attach import attach
from veneer.model.dense import adapter_beside_copies, adapter_in_copies, add_dense_copies
from veneer.model.load import load_model
from veneer.model.locate import BaseSource

pytestmark = pytest.mark.skipif(find_machine().device != "cpu", reason="copies are for the CPU")


def adapted(folder: Path, dtype: str, free_bytes: int, family: str = "llama") -> tuple[Any, int]:
    """A tiny model in 4 bits with an adapter that adds something, and the bytes of its copies."""
    save_tiny_model(FAMILIES[family], folder)
    machine = replace(find_machine(), free_bytes=0)
    base = load_model(
        BaseSource("folder", str(folder), "tiny"), Model(base="tiny", dtype=dtype), Quantization(), machine
    )
    needed = add_dense_copies(base, free_bytes)
    model = attach(base, Adapter(r=4), 0)
    fill_zeros(model)
    return model, needed


def gradients(model: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss of some tokens and the gradient of every adapter matrix."""
    ids_BL = torch.arange(3, 27).reshape(2, 12)
    loss = model(input_ids=ids_BL, labels=ids_BL).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_losses_and_gradients_are_the_same_to_the_bit(dtype: str, family: str, tmp_path: Path) -> None:
    plain, none = adapted(tmp_path, dtype, 0, family)
    dense, needed = adapted(tmp_path, dtype, 2**30, family)
    assert none == 0 < needed
    assert [name for name, _ in plain.named_parameters()] == [name for name, _ in dense.named_parameters()]
    assert plain.state_dict().keys() == dense.state_dict().keys()
    for _ in range(2):  # when the copy is made, and when it is there
        plain.zero_grad()
        dense.zero_grad()
        (loss, grads), (dense_loss, dense_grads) = gradients(plain), gradients(dense)
        assert torch.equal(loss, dense_loss)
        assert all(torch.equal(grads[name], dense_grads[name]) and grads[name].abs().sum() > 0 for name in grads)
    assert plain.state_dict().keys() == dense.state_dict().keys(), "a copy that is there is in no state dict either"
    assert len(list(plain.parameters())) == len(list(dense.parameters()))


@pytest.mark.filterwarnings("ignore:Merge lora module")
def test_a_merged_weight_is_not_answered_for_by_the_copy_of_the_old_one(tmp_path: Path) -> None:
    plain, _ = adapted(tmp_path, "float32", 0)
    dense, _ = adapted(tmp_path, "float32", 2**30)
    ids_BL = torch.arange(3, 27).reshape(2, 12)
    before = dense(input_ids=ids_BL).logits
    for model in (plain, dense):
        model.merge_adapter()
    assert not torch.equal(dense(input_ids=ids_BL).logits, before)
    assert torch.equal(dense(input_ids=ids_BL).logits, plain(input_ids=ids_BL).logits)


def test_copies_take_no_more_than_their_share_of_free_memory(tmp_path: Path) -> None:
    _, needed = adapted(tmp_path, "bfloat16", 2**30)
    assert adapted(tmp_path, "bfloat16", 8 * needed)[1] == needed
    assert adapted(tmp_path, "bfloat16", 8 * needed - 8)[1] == 0


def test_a_copy_with_the_adapter_in_it_answers_as_base_and_adapter_do(tmp_path: Path) -> None:
    dense, _ = adapted(tmp_path, "float32", 2**30)
    ids_BL = torch.arange(3, 27).reshape(2, 12)
    layer = dense.get_base_model().model.layers[0].mlp.up_proj
    with torch.no_grad():
        apart = dense(input_ids=ids_BL).logits
        with dense.disable_adapter(), adapter_in_copies(dense):
            base = dense(input_ids=ids_BL).logits
            assert layer.get_base_layer().with_adapter is None, "an adapter that is off stays off"
        with adapter_in_copies(dense):
            folded = dense(input_ids=ids_BL).logits
            merged = layer.get_base_layer().dense() + layer.get_delta_weight("default")
            assert torch.equal(layer.get_base_layer().with_adapter, merged)
        again = dense(input_ids=ids_BL).logits
    torch.testing.assert_close(folded, apart, rtol=1e-4, atol=1e-4)
    assert (base - apart).abs().max() > 100 * (folded - apart).abs().max(), "the adapter adds something"
    assert torch.equal(again, apart)
    _, grads = gradients(dense)
    assert all(grad.abs().sum() > 0 for grad in grads.values()), "it trains on as before"


@pytest.mark.parametrize("family", ["llama", "qwen2"])  # without biases and with
def test_an_adapter_beside_copies_gives_the_gradients_of_peft(family: str, tmp_path: Path) -> None:
    dense, _ = adapted(tmp_path, "float32", 2**30, family)
    loss, expected = gradients(dense)
    dense.zero_grad()
    with adapter_beside_copies(dense):
        beside_loss, found = gradients(dense)
    torch.testing.assert_close(beside_loss, loss, rtol=1e-5, atol=1e-6)
    for name, grad in expected.items():
        assert grad.abs().sum() > 0
        assert found[name].dtype == grad.dtype
        torch.testing.assert_close(found[name], grad, rtol=1e-3, atol=1e-6)
    dense.zero_grad()
    assert torch.equal(gradients(dense)[0], loss), "outside the block it is PEFT's again"


def test_in_bfloat16_an_adapter_beside_copies_errs_as_peft_does(tmp_path: Path) -> None:
    """Both round everywhere; the error against float32 is at most twice PEFT's, over all matrices together."""
    _, exact = gradients(adapted(tmp_path, "float32", 0)[0])
    dense, _ = adapted(tmp_path, "bfloat16", 2**30)
    _, peft = gradients(dense)
    dense.zero_grad()
    with adapter_beside_copies(dense):
        _, found = gradients(dense)

    def error(grads: dict[str, torch.Tensor]) -> float:
        return math.hypot(*((grads[name].float() - exact[name]).norm().item() for name in exact))

    assert 0 < error(found) <= 2 * error(peft)


def test_with_dropout_peft_computes_the_adapter(tmp_path: Path) -> None:
    dense, _ = adapted(tmp_path, "float32", 2**30)
    layer = dense.get_base_model().model.layers[0].mlp.up_proj
    with adapter_beside_copies(dense):
        assert layer.get_base_layer().beside is not None
    layer.lora_dropout["default"] = torch.nn.Dropout(0.1)
    with adapter_beside_copies(dense):
        assert layer.get_base_layer().beside is None


def test_what_is_more_than_plain_lora_or_has_no_copy_is_left_alone(tmp_path: Path) -> None:
    plain, _ = adapted(tmp_path, "float32", 0)
    dense, _ = adapted(tmp_path, "float32", 2**30)
    ids_BL = torch.arange(3, 27).reshape(2, 12)
    dense.get_base_model().model.layers[0].mlp.up_proj.lora_variant["default"] = object()  # as of DoRA
    for model in (plain, dense, plain.get_base_model()):
        with adapter_in_copies(model):
            assert not any(getattr(module, "with_adapter", None) is not None for module in model.modules())
    with torch.no_grad():
        assert plain(input_ids=ids_BL).logits.isfinite().all()
