"""Merged models on disk: to the bit what PEFT makes, whole or not at all, and clear words for what cannot be merged."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader
from safetensors.torch import load_file, save_file

import veneer
from tests.support.adapters import KINDS, peft_merged, save_adapter_of
from tests.support.tiny import FAMILIES, save_tiny_model
from veneer.config import Quantization, UserError
from veneer.model.quiet import quiet
from veneer.model.tuned import find_tuned
from veneer.release.certify.compare_weights import compare_weights
from veneer.release.gguf.export import export_model
from veneer.release.merge.adapter_delta import AdapterDelta
from veneer.release.merge.merged import DTYPES
from veneer.release.merge.merged import merge_into as merge
from veneer.release.merge.merged import unmerge_from as unmerge

TinyModel = Callable[..., Path]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder, from all its files."""
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def loaded(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def refused(out: Path, adapter: Path, base: Path | None = None, **settings: Any) -> str:
    """What is said of a merge that cannot be; nothing of it may be left."""
    with pytest.raises(UserError) as caught:
        merge(find_tuned(str(adapter), None if base is None else str(base)), out, **settings)
    assert not out.exists() or not any(out.iterdir())
    left = [path.name for path in out.parent.iterdir() if path.name.startswith(f".{out.name}")]
    assert left == [], "nothing half-written"
    return str(caught.value)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "experts"])
def test_every_kind_of_adapter_merges_to_the_bit_as_peft_does_and_is_rounded_once(
    kind: str, tmp_path: Path, tiny_model: TinyModel
) -> None:
    base = tiny_model("llama")
    adapter = save_adapter_of(kind, base, tmp_path / "adapter")
    expected = peft_merged(base, adapter)
    report = merge(find_tuned(str(adapter)), tmp_path / "out", "bfloat16")
    found = tensors(tmp_path / "out")
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name].bfloat16())] == []
    own = tensors(base)
    assert sum(not torch.equal(found[name], own[name].bfloat16()) for name in found) == report.changed > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_a_merged_model_answers_as_the_adapter_does(family: str, tmp_path: Path, tiny_model: TinyModel) -> None:
    from peft import PeftModel

    base = tiny_model(family)
    adapter = save_adapter_of("lora", base, tmp_path / "adapter")
    merge(find_tuned(str(adapter)), tmp_path / "out", "float32")
    ids = torch.arange(48).reshape(2, 24) + 3
    with torch.no_grad():
        expected = PeftModel.from_pretrained(loaded(base), str(adapter)).eval()(ids).logits
        assert (loaded(base)(ids).logits - expected).abs().max() > 0.02, "the adapter does something"
        assert (loaded(tmp_path / "out").eval()(ids).logits - expected).abs().max() <= 1e-4


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_on_nf4_gives_the_model_that_was_trained(family: str, tmp_path: Path, tiny_model: TinyModel) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    base = tiny_model(family)
    adapter = save_adapter_of("lora", base, tmp_path / "adapter")
    tuned = find_tuned(str(adapter))
    assert "was not quantized" in refused(tmp_path / "out", adapter, on="nf4")
    trained = replace(tuned, quantization=Quantization(), dtype=torch.float32)
    merge(trained, tmp_path / "out", "float32", on="nf4")
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    quantized = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, quantization_config=settings)
    for module in quantized.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    ids = torch.arange(24).reshape(1, 24) + 3
    with torch.no_grad():
        expected = PeftModel.from_pretrained(quantized, str(adapter)).eval()(ids).logits
        assert (loaded(tmp_path / "out").eval()(ids).logits - expected).abs().max() <= 1e-4


def test_tied_embeddings_come_apart_where_the_adapter_changes_one(tmp_path: Path) -> None:
    from peft import PeftModel

    name, settings = FAMILIES["llama"]
    save_tiny_model((name, settings | {"tie_word_embeddings": True}), tmp_path / "base")
    ids = torch.arange(24).reshape(1, 24) + 3
    for kind in ("embedding", "head"):
        adapter = save_adapter_of(kind, tmp_path / "base", tmp_path / kind)
        merge(find_tuned(str(adapter)), tmp_path / f"{kind}-out", "float32")
        assert json.loads((tmp_path / f"{kind}-out" / "config.json").read_text())["tie_word_embeddings"] is False
        with torch.no_grad(), quiet():
            expected = PeftModel.from_pretrained(loaded(tmp_path / "base"), str(adapter)).eval()(ids).logits
            found = loaded(tmp_path / f"{kind}-out").eval()(ids).logits
        assert (found - expected).abs().max() <= 1e-4


def make_head_of_its_own(base: Path) -> None:
    """A base whose configuration ties embeddings and head while its file holds two that differ."""
    name, settings = FAMILIES["llama"]
    save_tiny_model((name, settings | {"tie_word_embeddings": True}), base)
    held = load_file(base / "model.safetensors")
    assert "lm_head.weight" not in held
    torch.manual_seed(2)
    head = torch.randn(held["model.embed_tokens.weight"].shape) * 0.05
    save_file(held | {"lm_head.weight": head}, base / "model.safetensors", {"format": "pt"})


def test_a_head_that_differs_from_the_embeddings_ships_whatever_config_json_says(tmp_path: Path) -> None:
    from peft import PeftModel

    make_head_of_its_own(tmp_path / "base")
    adapter = save_adapter_of("lora", tmp_path / "base", tmp_path / "adapter")
    merge(find_tuned(str(adapter)), tmp_path / "out", "float32")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    ids = torch.arange(24).reshape(1, 24) + 3
    with torch.no_grad():
        expected = PeftModel.from_pretrained(loaded(tmp_path / "base"), str(adapter)).eval()(ids).logits
        assert (loaded(tmp_path / "out").eval()(ids).logits - expected).abs().max() <= 1e-4
    assert compare_weights(find_tuned(str(adapter)), tmp_path / "out", "base").wrong == []
    report = export_model(find_tuned(str(adapter)), tmp_path / "gguf", "f16")
    file = tmp_path / "gguf" / report.file
    assert compare_weights(find_tuned(str(adapter)), file, "base").wrong == []
    assert "output.weight" in {tensor.name for tensor in GGUFReader(file).tensors}
    held = load_file(tmp_path / "out" / "model.safetensors")
    del held["lm_head.weight"]
    save_file(held, tmp_path / "out" / "model.safetensors", {"format": "pt"})
    assert compare_weights(find_tuned(str(adapter)), tmp_path / "out", "base").wrong == ["lm_head.weight"]


def test_an_adapter_on_experts_is_merged_with_them_and_missed_where_it_is_not(tmp_path: Path) -> None:
    settings = {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16, "sliding_window": 16}
    save_tiny_model(("GptOssConfig", FAMILIES["llama"][1] | settings), tmp_path / "base")
    adapter = save_adapter_of("experts", tmp_path / "base", tmp_path / "adapter")
    expected = peft_merged(tmp_path / "base", adapter)
    tuned = find_tuned(str(adapter))
    report = merge(tuned, tmp_path / "out", "float32")
    found = tensors(tmp_path / "out")
    experts = [name for name in found if "experts" in name and name.endswith("proj")]
    assert report.changed == len(experts) + 2 == 6
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-6)
    own = tensors(tmp_path / "base")
    without = {name: own[name] if name in experts else value for name, value in found.items()}
    for file in (tmp_path / "out").glob("*.safetensors"):
        file.unlink()
    save_file(without, tmp_path / "out" / "model.safetensors", {"format": "pt"})
    missed = compare_weights(tuned, tmp_path / "out", "base")
    assert sorted(missed.wrong) == sorted(experts)


def test_a_layer_that_changes_no_weight_is_refused(
    tmp_path: Path, tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = save_adapter_of("lora", tiny_model("llama"), tmp_path / "adapter")
    monkeypatch.setattr(AdapterDelta, "_find_in_layer", lambda *arguments: None)  # as of a kind that is not known here
    assert "PEFT's Linear changes no weight that can be merged" in refused(tmp_path / "out", adapter)


def test_what_ships_beside_the_weights(tmp_path: Path, tiny_model: TinyModel) -> None:
    from transformers import AutoTokenizer

    base = tmp_path / "base"
    shutil.copytree(tiny_model("llama"), base)
    (base / "LICENSE").write_text("Apache-2.0")
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": 0, "top_k": 20}))
    adapter = save_adapter_of("lora", base, tmp_path / "adapter")
    report = merge(find_tuned(str(adapter)), tmp_path / "out", "bfloat16", shard_bytes=100_000)
    out = tmp_path / "out"
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert report.files == len(set(index["weight_map"].values())) > 1
    assert all((out / name).stat().st_size < 120_000 for name in index["weight_map"].values())
    assert index["metadata"]["total_size"] == report.bytes
    assert json.loads((out / "generation_config.json").read_text()) == {"eos_token_id": [0, 2], "do_sample": False}
    config = json.loads((out / "config.json").read_text())
    assert (config["dtype"], config["eos_token_id"]) == ("bfloat16", [0, 2])
    assert (out / "LICENSE").read_text() == "Apache-2.0"
    own, shipped = (AutoTokenizer.from_pretrained(folder) for folder in (base, out))
    assert shipped.chat_template == own.chat_template
    assert shipped("what does <|im_end|> say").input_ids == own("what does <|im_end|> say").input_ids
    assert loaded(out, torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", DTYPES)
def test_unmerge_gives_the_base_back_within_rounding(dtype: str, tmp_path: Path, tiny_model: TinyModel) -> None:
    base = tiny_model("llama")
    adapter = save_adapter_of("lora", base, tmp_path / "adapter")
    tuned = find_tuned(str(adapter))
    merge(tuned, tmp_path / "merged", dtype)
    unmerge(tmp_path / "merged", tuned, tmp_path / "back")
    own, back, merged = tensors(base), tensors(tmp_path / "back"), tensors(tmp_path / "merged")
    for name, tensor in own.items():
        largest = max(float(merged[name].float().abs().max()), float(tensor.abs().max()))
        assert back[name].dtype == DTYPES[dtype]
        assert (back[name].float() - tensor).abs().max() <= 2 * torch.finfo(DTYPES[dtype]).eps * largest
    assert loaded(tmp_path / "back").config.model_type == "llama"


def test_only_the_adapter_that_is_in_a_model_is_taken_out_and_its_base_may_be_gone(
    tmp_path: Path, tiny_model: TinyModel
) -> None:
    shutil.copytree(tiny_model("llama"), tmp_path / "base")
    (tmp_path / "base" / "LICENSE").write_text("Apache-2.0")
    own = save_adapter_of("lora", tmp_path / "base", tmp_path / "own")
    other = save_adapter_of("rslora", tmp_path / "base", tmp_path / "other", r=8)
    veneer.merge(str(own), tmp_path / "merged")
    shutil.rmtree(tmp_path / "base")
    with pytest.raises(UserError, match="holds another adapter"):
        veneer.unmerge(tmp_path / "merged", str(other), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert veneer.unmerge(tmp_path / "merged", str(own), tmp_path / "out").warnings == ()
    assert (tmp_path / "out" / "LICENSE").read_text() == "Apache-2.0"
    forced = veneer.unmerge(tmp_path / "merged", str(other), tmp_path / "forced", force=True)
    assert "holds another adapter" in forced.warnings[0]
    (tmp_path / "merged" / "merge.json").unlink()
    assert "no merge.json" in veneer.unmerge(tmp_path / "merged", str(own), tmp_path / "again").warnings[0]


def test_a_whole_file_counts_before_an_index_as_in_transformers(tmp_path: Path, tiny_model: TinyModel) -> None:
    shutil.copytree(tiny_model("llama"), tmp_path / "base")
    adapter = save_adapter_of("lora", tmp_path / "base", tmp_path / "adapter")
    stale = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (tmp_path / "base" / "model.safetensors.index.json").write_text(json.dumps(stale))
    assert merge(find_tuned(str(adapter)), tmp_path / "out").changed > 0


def test_what_cannot_be_taken_out_is_refused(tmp_path: Path, tiny_model: TinyModel) -> None:
    for kind, reason in (("dora", "a DoRA adapter cannot be removed"), ("head", "replaced lm_head.weight entirely")):
        tuned = find_tuned(str(save_adapter_of(kind, tiny_model("llama"), tmp_path / kind)))
        merge(tuned, tmp_path / f"{kind}-out")
        with pytest.raises(UserError, match=reason):
            unmerge(tmp_path / f"{kind}-out", tuned, tmp_path / "back")


def test_float16_warns_and_refuses_what_does_not_fit(tmp_path: Path, tiny_model: TinyModel) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_model("llama"), base)
    adapter = save_adapter_of("lora", base, tmp_path / "adapter")
    assert "65,504" in merge(find_tuned(str(adapter)), tmp_path / "out", "float16").warnings[0]
    for name in ("model.layers.0.mlp.up_proj.weight", "model.norm.weight"):
        weights = load_file(tiny_model("llama") / "model.safetensors")
        weights[name].view(-1)[5] = 1e5
        save_file(weights, base / "model.safetensors", {"format": "pt"})
        told = refused(tmp_path / "big", adapter, dtype="float16")
        assert f"{name}: holds 100,0" in told
        assert "--dtype" in told


def test_bad_bases_and_folders_are_told_and_nothing_is_written(
    tmp_path: Path, tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = save_adapter_of("lora", tiny_model("llama"), tmp_path / "adapter")
    out = tmp_path / "out"
    assert "does not fit a GPT2LMHeadModel" in refused(out, adapter, tiny_model("gpt2"))
    name, settings = FAMILIES["llama"]
    save_tiny_model((name, settings | {"hidden_size": 32}), tmp_path / "narrow")
    told = refused(out, adapter, tmp_path / "narrow")
    assert "the adapter does not fit a LlamaForCausalLM" in told
    assert "this base needs" in told
    save_tiny_model((name, settings | {"num_hidden_layers": 1}), tmp_path / "short")
    assert "find no place in a LlamaForCausalLM" in refused(out, adapter, tmp_path / "short")
    assert "holds no adapter" in refused(out, tiny_model("llama"))
    assert "no such folder" in refused(out, tmp_path / "nowhere")

    out.mkdir()
    (out / "mine").write_text("x")
    with pytest.raises(UserError, match="is not empty"):
        merge(find_tuned(str(adapter)), out)
    assert [path.name for path in out.iterdir()] == ["mine"]

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=1000))
    assert "0.0 MiB free" in refused(tmp_path / "full", adapter)


def test_a_folder_that_cannot_be_put_in_its_place_is_told_before_any_work(
    tmp_path: Path, tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuned = find_tuned(str(save_adapter_of("lora", tiny_model("llama"), tmp_path / "adapter")))
    here, mount = tmp_path / "here", tmp_path / "mount"
    here.mkdir()
    mount.mkdir()
    (tmp_path / "link").symlink_to(mount)
    monkeypatch.chdir(here)
    with pytest.raises(UserError, match="is the folder you are in"):
        merge(tuned, Path("."))
    with pytest.raises(UserError, match="is a link"):
        merge(tuned, tmp_path / "link")
    monkeypatch.setattr("os.path.ismount", lambda path: path == mount)
    with pytest.raises(UserError, match="is a mount, which"):
        merge(tuned, mount)

    def read_only(*_: Any, **__: Any) -> str:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("tempfile.mkdtemp", read_only)
    with pytest.raises(UserError, match=r"cannot be written \(Read-only file system\)"):
        merge(tuned, tmp_path / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "here", "link", "mount"]


def test_adapters_that_are_no_change_of_the_base_they_name_are_told(tmp_path: Path, tiny_model: TinyModel) -> None:
    adapter = save_adapter_of("lora", tiny_model("llama"), tmp_path / "adapter")
    path = adapter / "adapter_config.json"
    config = json.loads(path.read_text())
    for changes, reason in (
        ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4 changed the base's weights"),
        ({"peft_type": "PROMPT_TUNING"}, "PROMPT_TUNING (peft_type in adapter_config.json) cannot be merged"),
        ({"peft_type": "FOO"}, "PEFT does not know it"),
    ):
        path.write_text(json.dumps(config | changes))
        assert reason in refused(tmp_path / "out", adapter)


def test_damaged_files_are_told_and_nothing_is_written(tmp_path: Path, tiny_model: TinyModel) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_model("llama"), base)
    adapter = save_adapter_of("lora", base, tmp_path / "adapter")
    file = base / "model.safetensors"
    whole = file.read_bytes()
    for damage, reason in (
        (
            b"version https://git-lfs.github.com/spec/v1\noid",
            "model.safetensors is not a safetensors file",
        ),
        (whole[:8] + b"x" + whole[9:], "its header is not JSON"),
        (whole[:-100], "model.safetensors is cut off: it holds"),
        (whole.replace(b'"F32"', b'"Q99"', 1), "holds numbers of the type Q99, which is not known"),
        (whole[:3], "is not a safetensors file"),
    ):
        file.write_bytes(damage)
        assert reason in refused(tmp_path / "out", adapter)
    file.write_bytes(whole)
    for name in ("generation_config.json", "config.json"):
        kept = (base / name).read_text()
        for text in ("{", "[]"):
            (base / name).write_text(text)
            assert f"{name}" in refused(tmp_path / "out", adapter)
        (base / name).write_text(kept)
    loaded(base).save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    lost = sorted((tmp_path / "shards").glob("*.safetensors"))[1]
    lost.unlink()
    told = refused(tmp_path / "out", adapter, tmp_path / "shards")
    assert "1 of them are missing" in told
    assert lost.name in told
    file.unlink()
    (base / "pytorch_model.bin").write_bytes(b"x")
    assert "holds no model.safetensors, but pytorch_model.bin, which is a pickle" in refused(tmp_path / "out", adapter)
