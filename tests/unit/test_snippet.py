"""The Python snippet of a model card, run as it stands, gives the answers that were evaluated."""

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import veneer
from tests.support.runs import tiny_run, write_rows
from tests.support.tiny import FAMILIES, save_tiny_model
from veneer.data import Message
from veneer.release.publish.card import fenced, literal

ROWS = [
    {"prompt": name, "completion": answer}
    for name, answer in (("cat", "please route"), ("dog", "the team"), ("owl", "the hen"), ("hen", "right"))
    for _ in range(4)
]
SYSTEM = 'Say "it"\n\\in `ü`'
Train = Callable[..., Path]


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Train:
    """A function that trains a run until it answers its rows by heart, and evaluates it on them."""

    def get(chat: bool, quantization: dict[str, Any] | None, **data: Any) -> Path:
        folder = tmp_path_factory.mktemp("snippet")
        save_tiny_model(FAMILIES["llama"], folder / "base", chat)
        weights = load_file(folder / "base" / "model.safetensors")
        weights["lm_head.weight"] *= 20  # so that a random model can be sure of a token
        generator = torch.Generator().manual_seed(0)
        moved = {key: value + 0.01 * torch.randn(value.shape, generator=generator) for key, value in weights.items()}
        save_file(moved, folder / "base" / "model.safetensors", {"format": "pt"})
        rows, held_out = (
            write_rows(folder / name, ROWS[:: 1 + 3 * n]) for n, name in enumerate(("rows", "held.jsonl"))
        )
        run = tiny_run(
            folder / "base",
            rows,
            folder / "run",
            quantization=quantization,
            adapter={"r": 16, "lora_alpha": 32},
            data={"validation": held_out, "duplicates": "keep"} | data,
            evaluate={"max_new_tokens": 12},
            train={"max_steps": 150, "learning_rate": 4e-3, "eval_steps": None},
        )
        veneer.train(run)
        veneer.evaluate(folder / "run")
        return folder / "run"

    return get


def snippet(run: Path) -> str:
    """The Python text in a run's card."""
    card = (run / "adapter" / "README.md").read_text()
    (found,) = re.findall(r"^(`{3,})python\n(.*?)^\1$", card, re.DOTALL | re.MULTILINE)
    return str(found[1])


def answered(text: str, adapter: Path, prompt: str) -> list[str]:
    """The lines that the snippet prints, in a process of its own, of a prompt put to an adapter."""
    assert text.count('"ADAPTER"') == 1
    filled = text.replace('"ADAPTER"', repr(str(adapter))).replace('PROMPT = "Hello"', f"PROMPT = {prompt!r}")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(
        [sys.executable, "-c", filled],
        capture_output=True, text=True, check=False, cwd="/", env=environment, timeout=200,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


@pytest.mark.parametrize(
    ("chat", "quantization", "data"),
    [
        (True, None, {}),
        (True, {"bits": 4, "quant_type": "fp4", "double_quant": False}, {"system_prompt": SYSTEM}),
        (False, {"bits": 4}, {}),
    ],
    ids=["lora", "qlora and a system prompt", "qlora without a template"],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="the run would be evaluated on the GPU, the snippet on the CPU")
def test_the_snippet_gives_the_evaluated_answer(
    chat: bool, quantization: dict[str, Any] | None, data: dict[str, Any], train: Train
) -> None:
    run = train(chat, quantization, **data)
    text = snippet(run)
    if quantization is not None:
        assert f"bnb_4bit_quant_type={quantization.get('quant_type', 'nf4')!r}" in text
        assert f"bnb_4bit_use_double_quant={quantization.get('double_quant', True)}" in text
        assert "bnb_4bit_compute_dtype=torch.float32" in text
    else:
        assert "BitsAndBytes" not in text
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert all(sample["tuned_right"] and not sample["base_right"] for sample in samples), "the run learnt its rows"
    row = samples[1]
    answer, ids = answered(f"{text}\nprint(ids)", run / "adapter", row["prompt"])
    assert answer == row["tuned"]
    loaded = veneer.load(str(run))
    assert json.loads(ids) == loaded.renderer.prompt_ids([Message("user", row["prompt"])])
    if chat:
        assert ("system" in loaded.renderer.tokenizer.decode(json.loads(ids))) == ("system_prompt" in data)


def test_any_text_is_a_literal_and_a_block() -> None:
    for text in (SYSTEM, "with ```code```,\n````", "```", "a\\```", "'\"", ""):
        assert ast.literal_eval(literal(text)) == text
        assert "```" not in literal(text)
        fence = fenced(text).splitlines()[0].removesuffix("text")
        assert fence not in text
