"""A tiny run that learnt its rows by heart, for tests of certificates: sure of each answer, whatever rounds it."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import veneer
from tests.support.tiny import FAMILIES, save_tiny_model
from tests.support.vocabularies import family_vocabulary


def tickets() -> list[dict[str, str]]:
    """Sixteen rows, four of each."""
    said = (("cat", "please route"), ("dog", "the team"), ("owl", "the hen"), ("hen", "right"))
    return [{"prompt": f"what does the {name} say", "completion": answer} for name, answer in said for _ in range(4)]


def make_base(folder: Path, seed: int) -> None:
    """A tiny random Llama with Llama 3's vocabulary in small."""
    name, settings = FAMILIES["llama"]
    tokenizer = family_vocabulary("llama")
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": None}
    save_tiny_model((name, settings | ids), folder)
    tokenizer.save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(seed)
    weights["lm_head.weight"] *= 20  # so that a random model can be sure of a token
    moved = {key: value + 0.01 * torch.randn(value.shape, generator=generator) for key, value in weights.items()}
    save_file(moved, folder / "model.safetensors", {"format": "pt"})


def certificate(artifact: Path | str, run: Path) -> dict[str, Any]:
    """The certificate of an artifact against a run, by four of its rows."""
    return veneer.certify(str(artifact), str(run), rows=4)[0].as_dict()


def edit(path: Path, **changes: Any) -> None:
    """Change values of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
