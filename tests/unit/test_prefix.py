"""What prompts share is read once, and each is continued as if it had been read whole."""

from pathlib import Path

import pytest
import torch

from tests.support.tiny import FAMILIES, save_tiny_model
from veneer.evaluation.prefix import SHORTEST, SharedPrefix, padded, shared_length

SHARED = list(range(10, 10 + SHORTEST + 4))
PROMPTS = [[*SHARED, 40, 41, 42], [*SHARED, 50], [*SHARED, 60, 61, 62, 63, 64]]


def test_as_many_tokens_are_shared_as_all_prompts_begin_with() -> None:
    assert shared_length(PROMPTS) == len(SHARED)
    assert shared_length([*PROMPTS, [*SHARED[:-2], 1, 2, 3]]) == len(SHARED) - 2
    assert shared_length([SHARED, SHARED]) == len(SHARED) - 1, "each keeps a token of its own"
    assert shared_length(PROMPTS[:1]) == 0
    assert shared_length([[1, 2, 3], [1, 2, 4]]) == 0, "too few to be worth it"


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "gpt2", "opt"])
def test_logits_of_whole_prompts_and_of_prompts_behind_a_shared_prefix_are_equal(family: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, GenerationConfig

    save_tiny_model(FAMILIES[family], tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    prefix = SharedPrefix(model, PROMPTS)
    assert prefix.length == len(SHARED)
    asked = GenerationConfig(
        max_new_tokens=1, do_sample=False, pad_token_id=2, output_logits=True, return_dict_in_generate=True
    )

    def logits(shared: int) -> torch.Tensor:
        ids_BL, mask_BL = padded(PROMPTS, shared, 2)
        past = prefix.repeated(len(PROMPTS)) if shared else {}
        output = model.generate(input_ids=ids_BL, attention_mask=mask_BL, generation_config=asked, **past)
        first: torch.Tensor = output.logits[0]
        return first

    whole = torch.cat([model(input_ids=torch.tensor([prompt])).logits[:, -1] for prompt in PROMPTS])
    torch.testing.assert_close(logits(0), whole, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits(prefix.length), whole, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits(prefix.length), whole, rtol=1e-4, atol=1e-4)  # the cache was not used up


@pytest.mark.parametrize("family", ["mistral", "gemma2"])
def test_a_sliding_window_is_not_shared(family: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    save_tiny_model(FAMILIES[family], tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    prefix = SharedPrefix(model, PROMPTS)
    assert prefix.length == 0
    assert prefix.repeated(3) == {}
