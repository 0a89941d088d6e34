"""Prompts that are padded for a recorded pass, here launched on a CPU, get the keys and values of each by itself."""

import pytest
import torch
import transformers
from transformers.cache_utils import DynamicCache

from tests.support.tiny import FAMILIES
from veneer.serving import recorded_prompts
from veneer.serving.mixed import AdapterBank, Matrices
from veneer.serving.recorded_prompts import RecordedPrompts


@pytest.mark.parametrize("adapters", [[0, 0, 0], [2, 0, 1]])
@torch.no_grad()
def test_padding_changes_no_key_of_a_prompt(adapters: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorded_prompts, "EAGER_PASSES", 10**9)
    name, settings = FAMILIES["llama"]
    torch.manual_seed(0)
    config = getattr(transformers, name)(**settings)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    bank = AdapterBank(model, 2, torch.float32)
    for number in (1, 2):
        linears = {path: module for path, module in model.named_modules() if path.endswith(("q_proj", "down_proj"))}
        bank.put(
            number,
            {
                path: Matrices(torch.randn(4, one.in_features) / 8, torch.randn(one.out_features, 4) / 8)
                for path, one in linears.items()
            },
        )
    like = DynamicCache(config=config)
    model(input_ids=torch.tensor([[0]]), past_key_values=like, use_cache=True)
    prompts = [torch.randint(3, 90, (length,)).tolist() for length in (5, 70, 33)]
    longest = max(map(len, prompts))
    recorded = RecordedPrompts(model, bank, like)
    found = recorded.read([ids + [0] * (longest - len(ids)) for ids in prompts], adapters)
    for row, (ids, adapter) in enumerate(zip(prompts, adapters, strict=True)):
        alone = DynamicCache(config=config)
        with bank.rows([adapter], len(ids)):
            model(input_ids=torch.tensor([ids]), past_key_values=alone, use_cache=True)
        for layer, wanted in zip(found.layers, alone.layers, strict=True):
            torch.testing.assert_close(layer.keys[row, :, : len(ids)], wanted.keys[0], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(layer.values[row, :, : len(ids)], wanted.values[0], rtol=1e-4, atol=1e-5)
    assert recorded.read([[0] * 600, [0] * 600], [0, 0]) is None
