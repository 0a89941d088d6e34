"""Finding and loading base models: what is refused, and how."""

import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.tiny import FAMILIES
from veneer.config import Adapter, Model, Quantization, UserError
from veneer.config.cache import cached
from veneer.machine.device import find_machine
from veneer.model.attach import attach, count_parameters, load_adapter
from veneer.model.gguf import PRE_TOKENIZERS
from veneer.model.load import load_model, load_tokenizer
from veneer.model.locate import locate


def load(folder: Path, quantization: Quantization | None = None) -> Any:
    settings = Model(base=str(folder), dtype="float32")
    return load_model(locate(settings), settings, quantization, find_machine())


def located(base: str | Path) -> str:
    with pytest.raises(UserError) as caught:
        locate(Model(base=str(base)))
    return str(caught.value)


def test_what_is_no_model_is_refused(tmp_path: Path, tiny_model: Callable[..., Path]) -> None:
    (tmp_path / "notes.txt").write_text("x")
    assert "the folder has no config.json (it holds notes.txt)" in located(tmp_path)
    assert "no such folder or file" in located("./nowhere")
    assert "no such folder or file" in located("smollm3")
    assert "built-in smollm2-135m-instruct" in located("smollm3")
    assert "a file, but not a .gguf file" in located(tmp_path / "notes.txt")
    (tmp_path / "broken.gguf").write_bytes(b"GGUX")
    assert "not a GGUF file" in located(tmp_path / "broken.gguf")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    assert "holds an adapter, not a base model" in located(tmp_path / "adapter")


def test_hub_ids_keep_their_revision() -> None:
    source = locate(Model(base="owner/name", revision="v2"))
    assert (source.kind, source.location, source.revision) == ("hub", "owner/name", "v2")


def test_a_hub_that_is_not_reached_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"model\.base = owner/name: the tokenizer cannot be fetched from the hub"):
        load_tokenizer(locate(Model(base="owner/name")))


def test_a_revision_of_a_folder_is_refused(tiny_model: Callable[..., Path]) -> None:
    with pytest.raises(UserError, match=r"model\.revision = v2: only a hub model has revisions"):
        locate(Model(base=str(tiny_model()), revision="v2"))


def test_a_damaged_weight_file_is_told(tmp_path: Path, tiny_model: Callable[..., Path]) -> None:
    shutil.copytree(tiny_model(), tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(UserError, match="the model cannot be loaded"):
        load(tmp_path / "model")


@pytest.mark.parametrize(("way", "bits"), [("read here", 16), ("read here", 4), ("by Transformers", 16)])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_weights_that_are_not_finite_are_named(
    value: float, way: str, bits: int, tmp_path: Path, tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    if way == "by Transformers":
        monkeypatch.setattr("veneer.model.load.find_checkpoint", lambda source, quantization: None)
    shutil.copytree(tiny_model(), tmp_path / "base")
    weights = load_file(tmp_path / "base" / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = value
    save_file(weights, tmp_path / "base" / "model.safetensors")
    settings, quantization = Model(base=str(tmp_path / "base")), Quantization() if bits == 4 else None
    with pytest.raises(UserError, match=r"model\.layers\.1\.mlp\.up_proj\.weight holds NaN or infinite numbers"):
        load_model(locate(settings), settings, quantization, find_machine())


def test_a_model_with_missing_weights_is_refused(tmp_path: Path, tiny_model: Callable[..., Path]) -> None:
    shutil.copytree(tiny_model(), tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(UserError, match=r"its files lack 9 weights \(model\.layers\.2"):
        load(tmp_path / "model")


def test_a_target_that_matches_nothing_names_the_nearest(tiny_model: Callable[..., Path]) -> None:
    with pytest.raises(UserError) as caught:
        attach(load(tiny_model("opt")), Adapter(target_modules=("q_proj", "o_proj")), seed=0)
    told = str(caught.value)
    assert "`o_proj` matches no module of this model; nearest: " in told
    assert "out_proj" in told.split("nearest")[1].split("\n")[0]
    assert "or write all-linear" in told


def test_four_bits_leave_embeddings_head_and_norms_alone(tiny_model: Callable[..., Path]) -> None:
    base = load(tiny_model("llama"), Quantization())
    weight = base.model.layers[0].self_attn.q_proj.weight
    assert weight.dtype == torch.uint8
    assert weight.quant_state.blocksize == 64
    assert weight.quant_state.nested
    for module in (base.lm_head, base.model.embed_tokens, base.model.norm):
        assert module.weight.dtype == torch.float32
    assert not any(parameter.requires_grad for parameter in base.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_are_counted_the_same_in_four_bits_and_sixteen(family: str, tiny_model: Callable[..., Path]) -> None:
    plain, quantized = load(tiny_model(family)), load(tiny_model(family), Quantization())
    assert count_parameters(plain) == count_parameters(quantized)
    assert count_parameters(attach(quantized, Adapter(), 0))["trainable"] > 0


def test_a_cache_entry_is_made_once_by_whoever_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VENEER_CACHE", str(tmp_path))
    made = []

    def make(folder: Path) -> None:
        made.append(folder)
        (folder / "x").write_text("whole")

    threads = [threading.Thread(target=cached, args=("models/a", make)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1
    assert (cached("models/a", make) / "x").read_text() == "whole"


def test_a_cache_entry_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VENEER_CACHE", str(tmp_path))

    def make(folder: Path) -> None:
        (folder / "half").touch()
        raise RuntimeError

    with pytest.raises(RuntimeError):
        cached("models/a", make)
    assert [path.name for path in (tmp_path / "models").iterdir() if path.is_dir()] == []


def test_smollms_tokenizer_splits_digits_before_anything_else() -> None:
    make = PRE_TOKENIZERS["smollm"]
    assert make is not None
    assert [piece for piece, _ in make().pre_tokenize_str("a  12")] == ["a", "ĠĠ", "1", "2"]


@pytest.mark.parametrize("change", [{"r": 10**6}, {"rank_pattern": {"q_proj": 10**6}}])
def test_an_adapter_of_a_larger_rank_than_its_weights_is_refused_before_it_is_made(
    tmp_path: Path, tiny_model: Callable[..., Path], change: dict[str, Any]
) -> None:
    model = attach(load(tiny_model()), Adapter(), 0)
    model.save_pretrained(tmp_path)
    assert load_adapter(load(tiny_model()), tmp_path).peft_config
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    rank = model.peft_config["default"].r
    with pytest.raises(
        UserError, match=rf"adapter_config\.json: a rank of 1,000,000, and the weights have {rank} at most"
    ):
        load_adapter(load(tiny_model()), tmp_path)
