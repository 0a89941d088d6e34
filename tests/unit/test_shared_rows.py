"""Rows that begin with the same tokens compute these once, and train as if each were computed whole."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.tiny import FAMILIES, save_tiny_model
from veneer.config import Adapter
from veneer.data.batch import Batch, Example
from veneer.engine.objective import LIKELIHOOD
from veneer.engine.prefix import MIN_SHARED, can_share, shared_tokens
from veneer.engine.reference import ReferenceEngine
from veneer.engine.temporary import fill_zeros
from veneer.model.attach import attach

PREFIX = list(range(10, 10 + MIN_SHARED + 4))
BATCH = Batch.of(
    [
        Example(np.array([*PREFIX, 40, 41, 42, 43, 44, 45], dtype=np.int32), ((22, 26, 1.0),), "a"),
        Example(np.array([*PREFIX, 50, 51, 52, 53, 54], dtype=np.int32), ((23, 25, 0.5),), "b"),
        Example(np.array([*PREFIX, 60, 61, 62, 63], dtype=np.int32), ((21, 24, 1.0),), "c"),
    ]
)


def adapted(family: str, folder: Path, dropout: float = 0.0) -> Any:
    from transformers import AutoModelForCausalLM

    save_tiny_model(FAMILIES[family], folder)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).requires_grad_(False).eval()
    model = attach(base, Adapter(r=4, lora_dropout=dropout), 0)
    fill_zeros(model)
    return model.eval()


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3"])
def test_loss_and_gradients_are_those_of_whole_rows(family: str, tmp_path: Path) -> None:
    model = adapted(family, tmp_path)
    seen: list[int] = []
    model.get_input_embeddings().register_forward_hook(lambda module, given, out: seen.append(given[0].numel()))

    def step(engine: ReferenceEngine) -> tuple[int, list[torch.Tensor], dict[str, torch.Tensor]]:
        """Tokens that went through the model, losses, gradients."""
        model.zero_grad()
        seen.clear()
        total = engine.forward_backward(BATCH.scaled(0.1), LIKELIHOOD).loss
        tokens = sum(seen)
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
        return tokens, [total, engine.token_logprobs(BATCH)], gradients

    whole_tokens, whole_losses, whole = step(ReferenceEngine(model))
    tokens, losses, gradients = step(ReferenceEngine(model, for_cpu=True))
    assert whole_tokens == 3 * 26
    assert tokens == len(PREFIX) + 3 * 6, "the shared tokens went through the model once"
    torch.testing.assert_close(losses, whole_losses, rtol=1e-5, atol=1e-5)
    for name, gradient in whole.items():
        assert gradient.abs().sum() > 0
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-3, atol=1e-6)


def test_no_trained_token_is_shared() -> None:
    ids_BL = torch.tensor([[*PREFIX, 1, 2, 3], [*PREFIX, 1, 5, 6]])
    assert shared_tokens(ids_BL, 22) == len(PREFIX) + 1
    assert shared_tokens(ids_BL, 18) == 18
    assert shared_tokens(ids_BL, MIN_SHARED - 1) == 0
    assert shared_tokens(ids_BL[:1], 22) == 0
    assert shared_tokens(ids_BL[:, : MIN_SHARED + 1], MIN_SHARED + 1) == MIN_SHARED, "a row keeps a token of its own"


@pytest.mark.parametrize(("family", "dropout"), [("mistral", 0.0), ("gemma2", 0.0), ("llama", 0.1)])
def test_models_that_cannot_share_compute_whole_rows(family: str, dropout: float, tmp_path: Path) -> None:
    assert not can_share(adapted(family, tmp_path, dropout).get_base_model())
