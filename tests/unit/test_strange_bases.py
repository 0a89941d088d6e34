"""Bases of strangers: no code of theirs runs, and sizes or files that cannot be are told at once."""

import ast
import io
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.runs import write_rows
from veneer.config import Model, UserError
from veneer.machine.device import find_machine
from veneer.model.gguf import config_of, open_gguf
from veneer.model.limits import require_possible
from veneer.model.load import load_model, load_tokenizer
from veneer.model.locate import locate
from veneer.model.remote import read_config
from veneer.model.shapes import build, find_config

SOURCE = Path(__file__).parents[2] / "src"
Call = Callable[..., tuple[int, str, str]]


def planted(base: Path, folder: Path, **changes: Any) -> Path:
    """A base whose files name Python code of its own, which leaves a file behind where it is run."""
    for file in base.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\nclass Config: pass\nclass Tokens: pass\n")
    for name, entries in changes.items():
        file = folder / f"{name}.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | entries))
    return folder


@pytest.mark.parametrize(
    "changes",
    [
        {"config": {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config"}}},
        {
            "config": {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config"}},
            "tokenizer_config": {"tokenizer_class": "Tokens", "auto_map": {"AutoTokenizer": ["evil.Tokens", None]}},
        },
    ],
)
def test_code_of_a_models_maker_is_neither_run_nor_offered(
    call: Call, tmp_path: Path, tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, changes: Any
) -> None:
    base = planted(tiny_model(), tmp_path, **changes)
    monkeypatch.setattr(sys, "stdin", io.StringIO("yes\n" * 9))  # what Transformers would ask
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": "b"}] * 3)
    run = tmp_path / "run.yaml"
    run.write_text(f"model: {{base: {base}}}\ndata: {{train: {rows}}}\ntrain: {{output_dir: {tmp_path / 'out'}}}\n")
    for command in (["data", rows, "--model", str(base)], ["plan", str(run)], ["train", str(run)]):
        status, out, err = call(*command)
        assert status == 2, (command, out, err)
        assert "evil.Config" in err, command
        assert "never run" in err
        assert "[y/N]" not in out + err
    assert not (tmp_path / "ran").exists()


def test_a_base_that_transformers_knows_loads_without_the_code_it_names(
    tmp_path: Path, tiny_model: Callable[..., Path]
) -> None:
    changes = {"config": {"auto_map": {"AutoConfig": "evil.Config"}}}
    base = planted(tiny_model(), tmp_path, **changes)
    assert find_config(Model(base=str(base))).model_type == "llama"
    assert load_tokenizer(locate(Model(base=str(base)))).is_fast
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_an_attention_that_would_be_fetched_from_a_hub_is_refused(
    tmp_path: Path, tiny_model: Callable[..., Path], key: str
) -> None:
    base = planted(tiny_model(), tmp_path, config={key: "owner/kernel"})
    with pytest.raises(UserError, match="attn_implementation = owner/kernel: code from a hub, which is never run"):
        read_config(base, "model.base = it")


def test_every_call_that_could_run_a_models_code_says_no() -> None:
    """`from_pretrained` and `from_config` of Auto classes ask on standard input where nothing is said."""
    without = {"PeftModel", "GenerationConfig"}  # load no code
    found = 0
    for file in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            owner = node.func.value
            if node.func.attr not in ("from_pretrained", "from_config") or (
                isinstance(owner, ast.Name) and owner.id in without
            ):
                continue
            found += 1
            said = {word.arg: word.value for word in node.keywords}.get("trust_remote_code")
            assert isinstance(said, ast.Constant), f"{file}:{node.lineno}"
            assert said.value is False, f"{file}:{node.lineno}"
    assert found >= 8


@pytest.mark.parametrize(
    "file", ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "model.safetensors"]
)
@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"[" * 100_000, b'{"model": 3}', b"\xff"])
def test_a_base_with_a_damaged_file_is_refused_or_works(
    call: Call, tmp_path: Path, tiny_model: Callable[..., Path], file: str, content: bytes
) -> None:
    base = planted(tiny_model(), tmp_path)
    if not (base / file).exists():
        pytest.skip("this family has none")
    (base / file).write_bytes(content)
    status, _, err = call("generate", str(base), "--prompt", "the cat", "--max-new-tokens", "1")
    assert status in (0, 2), (status, err)
    assert "--debug" not in err
    assert status == 0 or str(base) in err or file in err


@pytest.mark.parametrize("key", ["num_hidden_layers", "hidden_size", "vocab_size", "intermediate_size"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])  # the latter makes a list of its layers' types
def test_sizes_that_no_model_has_are_refused_at_once(
    call: Call, tmp_path: Path, tiny_model: Callable[..., Path], family: str, key: str
) -> None:
    base = planted(tiny_model(family), tmp_path, config={key: 10**9, "layer_types": None})
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": "b"}] * 4)
    (tmp_path / "run.yaml").write_text(f"model: {{base: {base}}}\ndata: {{train: {rows}}}\ntrain: {{max_steps: 1}}\n")
    for command in ("plan", "train"):
        began = time.process_time()
        status, _, err = call(command, str(tmp_path / "run.yaml"))
        assert status == 2, err
        assert f"config.json: {key} = 1,000,000,000, and no model has more than" in err
        assert time.process_time() - began < 5


def test_sizes_are_found_within_parts_and_in_gguf_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="num_local_experts = 99,999"):
        require_possible({"text_config": {"num_local_experts": 99_999}}, "config.json")
    require_possible({"num_hidden_layers": 126, "vocab_size": 262_208, "max_position_embeddings": 10_485_760}, "")
    fields = {
        b"general.architecture": number(8, 4) + number(5) + b"llama",
        b"llama.block_count": number(4, 4) + b"\xff" * 4,
    }
    parts = [number(len(name)) + name + value for name, value in fields.items()]
    (tmp_path / "m.gguf").write_bytes(gguf(number(0), number(len(parts)), *parts))
    with pytest.raises(UserError, match=r"m\.gguf: block_count = 4,294,967,295"):
        config_of(tmp_path / "m.gguf")


@pytest.mark.parametrize("stop", ["</s>", [2, None], True, 10**40])
def test_a_base_that_ends_its_answers_at_no_token_is_refused_before_it_is_trained(
    tmp_path: Path, tiny_model: Callable[..., Path], stop: Any
) -> None:
    base = planted(tiny_model(), tmp_path)
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": stop}))
    model = Model(base=str(base))
    with pytest.raises(UserError, match=r"generation_config\.json: eos_token_id names .*, which is no token id"):
        load_model(locate(model), model, None, find_machine())


@pytest.mark.parametrize("content", [b"", b"{", b"\0\0"])
def test_a_damaged_generation_config_is_told(tmp_path: Path, tiny_model: Callable[..., Path], content: bytes) -> None:
    base = planted(tiny_model(), tmp_path)
    (base / "generation_config.json").write_bytes(content)
    model = Model(base=str(base))
    with pytest.raises(UserError, match=r"generation_config\.json: damaged"):
        load_model(locate(model), model, None, find_machine())


@pytest.mark.parametrize("count", [20_000, 2**31, 10**400])
def test_more_layers_than_any_model_has_are_refused_at_once(
    tmp_path: Path, tiny_model: Callable[..., Path], count: int
) -> None:
    base = planted(tiny_model(), tmp_path, config={"num_hidden_layers": count})
    with pytest.raises(UserError, match=r"num_hidden_layers = .*no model has more than"):
        find_config(Model(base=str(base)))


def test_a_configuration_that_builds_no_model_is_told(tmp_path: Path, tiny_model: Callable[..., Path]) -> None:
    rope = {"rope_type": "spiral", "rope_theta": 10000.0}
    base = planted(tiny_model(), tmp_path, config={"rope_parameters": rope, "rope_scaling": rope})
    with pytest.raises(UserError, match="the architecture llama cannot be built as"):
        build(find_config(Model(base=str(base))), torch.bfloat16)


def gguf(*parts: bytes) -> bytes:
    return b"GGUF" + (3).to_bytes(4, "little") + b"".join(parts)


def number(value: int, size: int = 8) -> bytes:
    return value.to_bytes(size, "little")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"GGUF",
        gguf(number(2**60), number(0)),
        gguf(number(0), number(2**60)),
        gguf(number(0), number(1), number(2**62), b"x" * 64),
        gguf(number(0), number(1), number(1), b"a", number(9, 4), number(0, 4), number(2**60), b"x" * 64),
        gguf(number(0), number(1), number(1), b"a", number(77, 4), b"x" * 64),
        gguf(number(0), number(1), number(1), b"a", *(number(9, 4) + number(1) for _ in range(9)), b"x" * 9),
    ],
)
def test_a_gguf_header_that_cannot_be_is_refused_at_once(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "m.gguf").write_bytes(content)
    began = time.process_time()
    with pytest.raises(UserError, match=r"m\.gguf: not a GGUF file, or a damaged one"):
        open_gguf(tmp_path / "m.gguf")
    assert time.process_time() - began < 2
