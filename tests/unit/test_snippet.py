"""The Python snippet of a model card, run as it stands, gives the answers that were evaluated."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import veneer
from tests.support.runs import tiny_run, write_rows
from tests.support.tiny import FAMILIES, save_tiny_model
from veneer.data.conversation import Message
from veneer.release.publish.card import fenced, literal

ROWS = [
    {"prompt": name, "completion": answer}
    for name, answer in (("cat", "please route"), ("dog", "the team"), ("owl", "the hen"), ("hen", "right"))
    for _ in range(4)
]
SYSTEM = 'Say "it"\n\\in `ü`'
# Name: whether the base has a template, the run's quantization, and settings of its data.
CASES: dict[str, tuple[bool, dict[str, Any] | None, dict[str, Any]]] = {
    "lora": (True, None, {}),
    "qlora and a system prompt": (
        True, {"bits": 4, "quant_type": "fp4", "double_quant": False}, {"system_prompt": SYSTEM},
    ),
    "qlora without a template": (False, {"bits": 4}, {}),
}  # fmt: skip


def learnt(folder: Path, chat: bool, quantization: dict[str, Any] | None, data: dict[str, Any]) -> Path:
    """A run that was trained until it answers its rows by heart, and evaluated on them."""
    save_tiny_model(FAMILIES["llama"], folder / "base", chat)
    weights = load_file(folder / "base" / "model.safetensors")
    weights["lm_head.weight"] *= 20  # so that a random model can be sure of a token
    generator = torch.Generator().manual_seed(0)
    moved = {key: value + 0.01 * torch.randn(value.shape, generator=generator) for key, value in weights.items()}
    save_file(moved, folder / "base" / "model.safetensors", {"format": "pt"})
    rows, held_out = (write_rows(folder / name, ROWS[:: 1 + 3 * n]) for n, name in enumerate(("rows", "held.jsonl")))
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


def samples(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]


def snippet(run: Path) -> str:
    """The Python text in a run's card."""
    card = (run / "adapter" / "README.md").read_text()
    (found,) = re.findall(r"^(`{3,})python\n(.*?)^\1$", card, re.DOTALL | re.MULTILINE)
    return str(found[1])


def filled(run: Path) -> str:
    """The snippet with adapter and prompt put in; it prints its answer, and then the tokens of its prompt."""
    text = snippet(run)
    assert text.count('"ADAPTER"') == 1
    text = text.replace('"ADAPTER"', repr(str(run / "adapter")))
    return text.replace('PROMPT = "Hello"', f"PROMPT = {samples(run)[1]['prompt']!r}") + "\nprint(ids)\n"


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, list[str]]]:
    """Each case's run, and the lines that its snippet prints, in a process that knows nothing of Veneer."""
    folder = tmp_path_factory.mktemp("snippet")
    runs = {}
    for number, (name, case) in enumerate(CASES.items()):
        (folder / str(number)).mkdir()
        runs[name] = learnt(folder / str(number), *case)
        (folder / f"{number}.py").write_text(filled(runs[name]))
    code = "import runpy, sys\nfor file in sys.argv[1:]:\n    runpy.run_path(file)\n    print('---')"
    files = [str(folder / f"{number}.py") for number in range(len(CASES))]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(
        [sys.executable, "-c", code, *files],
        capture_output=True, text=True, check=False, cwd="/", env=environment, timeout=400,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    outputs = result.stdout.split("---\n")
    return {name: (run, output.splitlines()) for (name, run), output in zip(runs.items(), outputs)}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.skipif(torch.cuda.is_available(), reason="the run would be evaluated on the GPU, the snippet on the CPU")
def test_the_snippet_gives_the_evaluated_answer(case: str, printed: dict[str, tuple[Path, list[str]]]) -> None:
    chat, quantization, data = CASES[case]
    run, (answer, ids) = printed[case]
    text = snippet(run)
    if quantization is not None:
        assert f"bnb_4bit_quant_type={quantization.get('quant_type', 'nf4')!r}" in text
        assert f"bnb_4bit_use_double_quant={quantization.get('double_quant', True)}" in text
        assert "bnb_4bit_compute_dtype=torch.float32" in text
    else:
        assert "BitsAndBytes" not in text
    rows = samples(run)
    assert all(row["tuned_right"] and not row["base_right"] for row in rows), "the run learnt its rows"
    assert answer == rows[1]["tuned"]
    loaded = veneer.load(str(run))
    assert json.loads(ids) == loaded.renderer.prompt_ids([Message("user", rows[1]["prompt"])])
    if chat:
        assert ("system" in loaded.renderer.tokenizer.decode(json.loads(ids))) == ("system_prompt" in data)


def test_any_text_is_a_literal_and_a_block() -> None:
    for text in (SYSTEM, "with ```code```,\n````", "```", "a\\```", "'\"", ""):
        assert ast.literal_eval(literal(text)) == text
        assert "```" not in literal(text)
        fence = fenced(text).splitlines()[0].removesuffix("text")
        assert fence not in text
