"""Checks vLLM's rules for LoRA adapters, without vLLM.

vLLM reads PEFT's files but supports a part of PEFT: plain LoRA matrices (rank-stabilized or not) on linear layers, no
trained biases, no whole saved modules, no DoRA, ranks up to 512 (`--max-lora-rank`, from its list of ranks).
Source: `vllm/lora/peft_helper.py` and `vllm/config/lora.py`.
"""

import re
from pathlib import Path

from veneer.config.files import read_json
from veneer.config.results import Check
from veneer.release.weights import read_header

MAX_RANK = 512


def vllm_lint(folder: Path) -> list[Check]:
    """Check each rule of vLLM on an adapter's folder in PEFT's format; `detail` says what breaks it."""
    config = read_json(folder / "adapter_config.json")
    names = list(read_header(folder / "adapter_model.safetensors"))
    ranks = [config.get("r") or 0, *(config.get("rank_pattern") or {}).values()]
    whole = config.get("modules_to_save") or []
    tokens = config.get("trainable_token_indices")
    embeddings = [name for name in names if "lora_embedding" in name or re.search(r"embed_tokens|wte", name)]
    known = re.compile(r"\.lora_(A|B)\.weight$|\.lora_embedding_(A|B)$")
    strange = [name for name in names if not known.search(name)]
    return [
        _check("kind", config.get("peft_type") == "LORA", f"the adapter is of the kind {config.get('peft_type')}"),
        _check("rank", max(ranks) <= MAX_RANK, f"rank {max(ranks)}, vLLM takes at most {MAX_RANK}"),
        _check("rank_pattern", len(set(ranks)) == 1, f"modules of several ranks ({', '.join(map(str, ranks))})"),
        _check(
            "alpha_pattern",
            set((config.get("alpha_pattern") or {}).values()) <= {config.get("lora_alpha")},
            "modules of several scales (alpha_pattern)",
        ),
        _check("dora", not config.get("use_dora"), "DoRA (use_dora)"),
        _check("bias", config.get("bias", "none") == "none" and not config.get("lora_bias"), "trained biases"),
        _check("saved_modules", not whole, f"whole saved modules ({', '.join(whole)})"),
        _check("embeddings", not embeddings and not tokens, "adapted embeddings"),
        _check("tensors", not strange, f"tensors that are no LoRA matrices ({', '.join(strange[:2])})"),
    ]


def _check(id: str, passed: bool, wrong: str) -> Check:
    return Check(id, bool(passed), detail="" if passed else wrong)
