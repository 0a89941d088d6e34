"""Adapters of every kind on tiny models, made by plain PEFT with seeded values, for the tests."""

from pathlib import Path
from typing import Any

import torch

from veneer.model.quiet import quiet

# Kind: class in PEFT, settings.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("LoraConfig", {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}),
    "rslora": ("LoraConfig", {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "use_rslora": True}),
    "dora": ("LoraConfig", {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "use_dora": True}),
    "lora-bias": ("LoraConfig", {"r": 4, "target_modules": ["q_proj", "up_proj"], "bias": "all"}),
    "embedding": ("LoraConfig", {"r": 4, "target_modules": ["embed_tokens", "q_proj"]}),
    "head": ("LoraConfig", {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "tokens": (
        "LoraConfig",
        {"r": 4, "target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [3, 5]}},
    ),
    "head-token": (
        "LoraConfig",
        {"r": 4, "target_modules": ["q_proj"], "trainable_token_indices": {"lm_head": [4]}},
    ),
    "patterns": (
        "LoraConfig",
        {
            **{"r": 4, "lora_alpha": 8, "target_modules": "all-linear"},
            **{"rank_pattern": {"q_proj": 8}, "alpha_pattern": {"up_proj": 64}},
        },
    ),
    "loha": ("LoHaConfig", {"r": 4, "alpha": 8, "target_modules": ["q_proj", "up_proj"]}),
    "lokr": ("LoKrConfig", {"r": 4, "alpha": 8, "target_modules": ["q_proj", "up_proj"]}),
    "ia3": ("IA3Config", {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}),
    "oft": ("OFTConfig", {"oft_block_size": 16, "r": 0, "target_modules": ["q_proj"]}),
    "experts": (
        "LoraConfig",
        {
            **{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]},
            **{"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
        },
    ),
    "norms": ("LNTuningConfig", {"target_modules": ["input_layernorm", "norm"]}),
    "vera": ("VeraConfig", {"r": 4, "target_modules": ["q_proj"]}),
}


def save_adapter_of(kind: str, base: Path, folder: Path, **settings: Any) -> Path:
    """Write an adapter of a kind for a base; every trained value is moved by a seeded 0.05."""
    import peft
    from transformers import AutoModelForCausalLM

    name, own = KINDS[kind]
    config = getattr(peft, name)(task_type="CAUSAL_LM", **(own | settings))
    torch.manual_seed(1)
    with quiet():
        model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn(parameter.shape) * 0.05
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(str(folder), save_embedding_layers=False)
    return folder


def peft_merged(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """What PEFT's merge_and_unload gives in float32."""
    import peft
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with quiet():
        state: dict[str, torch.Tensor] = (
            peft.PeftModel.from_pretrained(model, str(adapter)).merge_and_unload().state_dict()
        )
    return state
