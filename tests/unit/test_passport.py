"""An adapter is loaded on what it was trained with, and on nothing else."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import veneer
from tests.support.runs import tiny_run, write_rows
from veneer.config import Model, UserError
from veneer.model.fingerprint import fingerprint
from veneer.model.locate import locate
from veneer.model.tuned import find_tuned


@pytest.fixture
def trained(tmp_path: Path, tiny_model: Callable[..., Path], rows: list[dict[str, Any]]) -> Path:
    """A finished tiny run on a base of its own; gives the run's folder, beside which lies `base`."""
    shutil.copytree(tiny_model(), tmp_path / "base")
    run = tiny_run(tmp_path / "base", write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "run")
    veneer.train(run.model_copy(update={"train": run.train.model_copy(update={"max_steps": 1})}))
    return tmp_path / "run"


def test_a_run_means_the_same_from_any_folder_and_on_its_base_in_another(
    tmp_path: Path, tiny_model: Callable[..., Path], rows: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tiny_model(), tmp_path / "base")
    write_rows(tmp_path / "rows.jsonl", rows)
    monkeypatch.chdir(tmp_path)
    veneer.train(tiny_run(Path("base"), "rows.jsonl", Path("run"), data={"validation": 2}, train={"max_steps": 1}))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert veneer.evaluate("../run").is_record
    assert veneer.generate("../run", ["what does the cat say"], max_new_tokens=2)

    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(UserError, match=r"its base is not here: model\.base = /.*/base: no such(.|\n)*--base"):
        veneer.evaluate("../run")
    assert veneer.evaluate("../run", base="../moved").is_record
    assert veneer.merge("../run", "merged", base="../moved").changed


def refused(run: Path) -> str:
    with pytest.raises(UserError) as caught:
        veneer.load(str(run))
    return str(caught.value)


def test_the_passport_says_what_the_adapter_belongs_to(trained: Path) -> None:
    passport = json.loads((trained / "adapter" / "passport.json").read_text())
    assert passport["base"]["name"] == "base"
    assert passport["settings"]["data"]["train"] == "rows.jsonl"
    assert passport["settings"]["train"]["output_dir"] == "run"
    assert str(trained.parent) not in json.dumps(passport)
    assert passport["base"]["architecture"] == "LlamaForCausalLM"
    assert passport["data"]["sha256"] == json.loads((trained / "ledger.json").read_text())["sha256"]
    assert passport["stop_token_ids"] == [2]
    assert {"torch", "peft", "veneer"} <= set(passport["environment"]["libraries"])
    assert veneer.load(str(trained)).run is not None


def test_another_base_is_refused_by_name_and_force_says_what_it_overrides(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = trained.parent / "base" / "model.safetensors"
    weights = load_file(file)
    weights["model.layers.1.mlp.up_proj.weight"] += 1e-3
    save_file(weights, file, {"format": "pt"})
    told = refused(trained)
    assert "the adapter does not belong to this" in told
    assert "base weights: trained with" in told
    assert "--force" in told
    capsys.readouterr()
    assert veneer.load(str(trained), force=True).run is not None
    assert "warning: --force overrides the adapter's passport" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("key", "value"), [("rms_norm_eps", 0.5), ("max_position_embeddings", 4096), ("_name_or_path", 0)]
)
def test_a_base_of_another_configuration_is_refused(trained: Path, key: str, value: float) -> None:
    file = trained.parent / "base" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    if key == "_name_or_path":
        assert veneer.load(str(trained)).run is not None  # it says nothing of the model
        return
    told = r"the base's config\.json: trained with \w{12}, found \w{12}"
    with pytest.raises(UserError, match=told):
        veneer.evaluate(str(trained))
    with pytest.raises(UserError, match=told):
        veneer.generate(str(trained), ["a"])
    with pytest.raises(UserError, match=told):
        veneer.merge(str(trained), str(trained.parent / "out"))
    passport = trained / "adapter" / "passport.json"
    kept = json.loads(passport.read_text())
    del kept["base"]["config_sha256"]  # as passports were
    passport.write_text(json.dumps(kept))
    assert veneer.load(str(trained)).run is not None


def test_another_template_tokenizer_or_adapter_file_is_refused(trained: Path) -> None:
    adapter = trained / "adapter"
    template = adapter / "chat_template.jinja"
    kept = template.read_text()
    template.write_text(kept.replace("assistant", "bot"))
    assert "chat template: trained with" in refused(trained)
    template.write_text(kept)
    tokenizer = adapter / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text() + "\n")
    told = refused(trained)
    assert "tokenizer: trained with" in told
    assert "chat template" not in told
    path = adapter / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"lora_alpha": 1}))
    assert "adapter_config.json: trained with" in refused(trained)
    path.write_text(json.dumps(config | {"base_model_name_or_path": "elsewhere"}))
    assert "adapter_config.json" not in refused(trained)
    weights = load_file(adapter / "adapter_model.safetensors")
    save_file({name: tensor * 2 for name, tensor in weights.items()}, adapter / "adapter_model.safetensors")
    assert "adapter weights: trained with" in refused(trained)


def test_an_adapter_without_a_passport_loads_and_a_broken_passport_is_told(trained: Path) -> None:
    passport = trained / "adapter" / "passport.json"
    passport.write_text("{")
    assert "passport.json: damaged: not JSON" in refused(trained)
    passport.write_text(json.dumps({"settings": {"model": {"base": "x"}, "brand": 1}}))
    with pytest.raises(UserError, match=r"settings in passport.json are not this Veneer's \(.*brand"):
        find_tuned(str(trained / "adapter"))
    passport.unlink()
    assert veneer.load(str(trained)).run is not None


def test_a_base_in_shards_has_the_fingerprint_of_the_base_in_one_file(
    tmp_path: Path, tiny_model: Callable[..., Path]
) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model(), dtype=torch.float32)
    model.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    one, other = (fingerprint(locate(Model(base=str(path)))) for path in (tiny_model(), tmp_path / "shards"))
    assert one is not None
    assert one == other
