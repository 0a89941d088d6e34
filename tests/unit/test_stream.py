"""Streamed loading gives what Transformers' own reader gives, to the bit, and tells what is wrong with files."""

import gc
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.loading import CACHED, IDS, assert_same, copied, load, plainly, plainly_of
from tests.support.tiny import FAMILIES
from veneer.config import Adapter, Model, Quantization, UserError
from veneer.config.folder import whole_folder
from veneer.machine.device import find_machine
from veneer.model import reader
from veneer.model.attach import attach
from veneer.model.load import load_base
from veneer.model.locate import BaseSource, locate
from veneer.model.reader import Reader
from veneer.model.shards import read_headers
from veneer.model.stream import collect_cycles


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("quantization", [None, Quantization()], ids=["16-bit", "4-bit"])
def test_every_family_loads_as_with_transformers(
    family: str, quantization: Quantization | None, tiny_model: Callable[..., Path]
) -> None:
    base, report = load(tiny_model(family), quantization, "bfloat16")
    assert report.way == "files"
    assert report.bytes_read == sum(piece.size for piece in read_headers([tiny_model(family) / "model.safetensors"]))
    assert_same(base, plainly(tiny_model(family), quantization, "bfloat16"))


@pytest.mark.parametrize("changed", [{"quant_type": "fp4"}, {"double_quant": False}], ids=str)
def test_other_kinds_of_quantization(changed: dict[str, Any], tiny_model: Callable[..., Path]) -> None:
    quantization = Quantization(**changed)
    assert_same(load(tiny_model(), quantization)[0], plainly(tiny_model(), quantization))


@pytest.mark.parametrize("tied", [False, True])
def test_sharded_and_tied(tied: bool, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(1)
    config = LlamaConfig(**FAMILIES["llama"][1], tie_word_embeddings=tied)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    for quantization in (None, Quantization()):
        assert_same(load(tmp_path, quantization, "bfloat16")[0], plainly(tmp_path, quantization, "bfloat16"))


@pytest.mark.parametrize("sharded", [False, True])
def test_hub_models_are_streamed_from_the_hubs_own_cache(
    sharded: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model: Callable[..., Path], empty_cache: Path
) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    folder = copied(tiny_model(), tmp_path / "hub" / "models--owner--name" / "snapshots" / commit)
    (folder.parents[1] / "refs").mkdir()
    (folder.parents[1] / "refs" / "main").write_text(commit)
    if sharded:
        (folder / "model.safetensors").rename(folder / "model-1.safetensors")
        index = {
            "metadata": {},
            "weight_map": dict.fromkeys(load_file(folder / "model-1.safetensors"), "model-1.safetensors"),
        }
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    model = Model(base="owner/name", dtype="float32")
    ways = []
    for _ in range(2):
        base, report = load_base(locate(model), model, CACHED, find_machine())
        ways.append(report.way)
    assert ways == ["files", "cache"]
    assert torch.equal(base.lm_head.weight, load(tiny_model())[0].lm_head.weight)
    assert base.name_or_path == "owner/name"
    assert len(list(empty_cache.glob("quantized/name-*/nf4-double-float32-cpu/manifest.json"))) == 1


def test_weights_that_nothing_uses_are_left_aside(tmp_path: Path, tiny_model: Callable[..., Path]) -> None:
    folder = copied(tiny_model(), tmp_path / "model")
    held = load_file(folder / "model.safetensors")
    more = {f"model.a{n}.rotary_emb.inv_freq": torch.ones(8) for n in range(80)}
    save_file(held | more, folder / "model.safetensors", metadata={"format": "pt"})
    assert_same(load(folder, Quantization())[0], plainly(folder, Quantization()))


def test_generation_settings_that_stand_in_the_configuration(tmp_path: Path, tiny_model: Callable[..., Path]) -> None:
    folder = copied(tiny_model(), tmp_path / "model", temperature=0.25)
    (folder / "generation_config.json").unlink()
    assert_same(load(folder)[0], plainly(folder))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "consolidated.00.pth"])
def test_weights_that_are_pickles_are_refused_unread(
    tmp_path: Path, tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    folder = copied(tiny_model(), tmp_path / "model")
    torch.save(load_file(folder / "model.safetensors"), folder / name)
    assert load(folder)[1].way == "files"  # beside safetensors it is not looked at
    (folder / "model.safetensors").unlink()
    monkeypatch.setattr(torch, "load", lambda *given, **settings: pytest.fail("unpickled"))
    with pytest.raises(
        UserError, match=rf"holds no model\.safetensors, but {name}, which is a pickle(.|\n)*convert it"
    ):
        load(folder)
    with pytest.raises(
        OSError, match=r"no file named model\.safetensors"
    ):  # as of a hub, whose files are not seen before
        plainly_of(BaseSource("folder", str(folder), "model"))


def test_an_adapter_in_a_base_that_is_a_pickle_is_refused(tmp_path: Path, tiny_model: Callable[..., Path]) -> None:
    folder = copied(tiny_model(), tmp_path / "model")
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.bin").write_bytes(b"x")
    with pytest.raises(UserError, match=r"holds no adapter_model\.safetensors, but adapter_model\.bin"):
        load(folder)


def test_adapters_attach_and_train_on_it(tiny_model: Callable[..., Path]) -> None:
    model = attach(load(tiny_model(), Quantization())[0], Adapter(), 0)
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("cut", [4, 500, -1])
def test_a_file_that_is_cut_off_is_told(cut: int, tmp_path: Path, tiny_model: Callable[..., Path]) -> None:
    folder = copied(tiny_model(), tmp_path / "model")
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:cut])
    with pytest.raises(UserError, match=r"the model cannot be loaded: model\.safetensors is .*cut off"):
        load(folder, Quantization())


def test_a_file_that_shrinks_while_it_is_read_is_told(tmp_path: Path, tiny_model: Callable[..., Path]) -> None:
    folder = copied(tiny_model(), tmp_path / "model")
    pieces = read_headers([folder / "model.safetensors"])
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: max(piece.offset for piece in pieces)])
    with pytest.raises(ValueError, match="is cut off within"), Reader(pieces, "cpu") as reader:
        for piece in pieces:
            reader.take(piece.name)


def test_tensors_that_share_their_bytes_are_told(tmp_path: Path) -> None:
    save_file({"a": torch.ones(3), "b": torch.zeros(3)}, tmp_path / "w.safetensors")
    content = (tmp_path / "w.safetensors").read_bytes()
    (tmp_path / "w.safetensors").write_bytes(content.replace(b"[12,24]", b"[0,12] "))
    with pytest.raises(ValueError, match=r"w\.safetensors is damaged: b does not begin where"):
        read_headers([tmp_path / "w.safetensors"])


def test_a_missing_shard_is_told(tmp_path: Path, tiny_model: Callable[..., Path]) -> None:
    folder = copied(tiny_model(), tmp_path / "model")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    names = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(names))
    with pytest.raises(UserError, match=r"1 of them are missing: model-00002-of-00002\.safetensors"):
        load(folder)


@pytest.mark.parametrize("quantization", [None, Quantization()], ids=["16-bit", "4-bit"])
def test_another_shape_than_the_configurations_is_refused(
    quantization: Quantization | None, tmp_path: Path, tiny_model: Callable[..., Path]
) -> None:
    folder = copied(tiny_model(), tmp_path / "model", intermediate_size=192)
    with pytest.raises(UserError) as caught:
        load(folder, quantization)
    told = str(caught.value)
    assert "model.layers.0.mlp.down_proj.weight has the shape [64, 128] in its files, and [64, 192]" in told
    assert "(6 tensors differ)" in told


def test_memory_ahead_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = [3000, 100, 40_000, 5000, 5000, 5000, 5000, 0, 5000]
    held = {f"t.{n}": torch.arange(size, dtype=torch.int32) for n, size in enumerate(sizes)}
    save_file(held, tmp_path / "x.safetensors")
    monkeypatch.setattr(reader, "CHUNK", 4096)
    monkeypatch.setattr(reader, "READ_AHEAD", 50_000)
    pieces = read_headers([tmp_path / "x.safetensors"])
    assert [piece.name for piece in pieces] == list(held)
    with Reader(pieces, "cpu") as reading:
        for name in [*held, "t.2", "t.0"]:
            assert torch.equal(reading.take(name), held[name])
    assert reading.bytes_read == 4 * sum(sizes) + 4 * (40_000 + 3000)
    assert 5000 * 4 <= reading.most_ahead_bytes <= max(50_000, 4 * 40_000)


def test_a_quantized_checkpoint_loads_as_it_is(tmp_path: Path, tiny_model: Callable[..., Path]) -> None:
    base, _ = load(tiny_model(), Quantization(), "bfloat16")
    base.save_pretrained(tmp_path)
    for quantization in (None, Quantization()):
        again, report = load(tmp_path, quantization, "bfloat16")
        assert report.way == "files"
        assert_same(again, plainly(tmp_path, None, "bfloat16"))
        with torch.no_grad():
            assert torch.equal(again(input_ids=IDS).logits, base(input_ids=IDS).logits)
    assert load(tmp_path, None, "float32")[0].model.layers[0].mlp.up_proj.compute_dtype == torch.float32


@pytest.mark.parametrize("part", ["", ".absmax", ".quant_map"])
def test_a_quantized_checkpoint_that_lacks_a_part_is_told(
    part: str, tmp_path: Path, tiny_model: Callable[..., Path]
) -> None:
    load(tiny_model(), Quantization())[0].save_pretrained(tmp_path)
    name = f"model.layers.0.mlp.up_proj.weight{part}"
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors[name]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=rf"lacks {name}, which belongs to a weight in 4 bits"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        (Quantization(quant_type="fp4"), "quantization.quant_type = fp4: .* is quantized already, with nf4"),
        (Quantization(double_quant=False), "quantization.double_quant = false: .* is quantized already, with true"),
    ],
)
def test_a_quantized_checkpoint_of_another_kind_is_refused(
    asked: Quantization, told: str, tmp_path: Path, tiny_model: Callable[..., Path]
) -> None:
    load(tiny_model(), Quantization())[0].save_pretrained(tmp_path)
    with pytest.raises(UserError, match=told):
        load(tmp_path, asked)


def test_four_bits_of_a_base_in_another_format_are_refused(tmp_path: Path, tiny_model: Callable[..., Path]) -> None:
    folder = copied(tiny_model(), tmp_path / "model", quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(UserError, match=r"quantization\.bits = 4: .* is quantized already, in gptq"):
        load(folder, Quantization())


@pytest.mark.parametrize("family", FAMILIES)
def test_kept_weights_are_those_that_were_quantized(
    family: str, tmp_path: Path, tiny_model: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copied(tiny_model(family), tmp_path / "model")
    first, report = load(folder, CACHED, "bfloat16")
    assert report.way == "files"
    again, later = load(folder, CACHED, "bfloat16")
    assert later.way == "cache"
    assert_same(again, first)
    assert capsys.readouterr().err.count("cached the 4-bit weights in") == 1
    again.save_pretrained(tmp_path / "saved")
    first.save_pretrained(tmp_path / "saved too")
    saved, saved_too = (load_file(tmp_path / name / "model.safetensors") for name in ("saved", "saved too"))
    assert saved.keys() == saved_too.keys()
    assert all(torch.equal(saved[name], saved_too[name]) for name in saved)


def test_kept_weights_are_used_only_where_asked_for_and_alike(tmp_path: Path, tiny_model: Callable[..., Path]) -> None:
    folder = copied(tiny_model(), tmp_path / "model")
    load(folder, CACHED)
    for quantization, dtype in (
        (Quantization(), "float32"),
        (CACHED.model_copy(update={"double_quant": False}), "float32"),
        (CACHED.model_copy(update={"quant_type": "fp4"}), "float32"),
        (CACHED, "bfloat16"),
    ):
        base, report = load(folder, quantization, dtype)
        assert report.way == "files"
        assert_same(base, plainly(folder, quantization, dtype))
    assert load(folder, CACHED)[1].way == "cache"


def change_base(folder: Path) -> None:
    held = load_file(folder / "model.safetensors")
    held["model.layers.1.mlp.up_proj.weight"] *= 2
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})


def change_configuration(folder: Path) -> None:
    found = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(found | {"rms_norm_eps": 1e-4}))


def kept_file(folder: Path, name: str) -> Path:
    (file,) = folder.glob(f".veneer/*/{name}")
    return file


def flip_byte(folder: Path) -> None:
    content = bytearray(kept_file(folder, "weights.safetensors").read_bytes())
    content[len(content) // 2] ^= 1
    kept_file(folder, "weights.safetensors").write_bytes(content)


def cut(folder: Path) -> None:
    content = kept_file(folder, "weights.safetensors").read_bytes()
    kept_file(folder, "weights.safetensors").write_bytes(content[:-5000])


def lose_a_weight(folder: Path) -> None:
    manifest = json.loads(kept_file(folder, "manifest.json").read_text())
    held = load_file(kept_file(folder, "weights.safetensors"))
    name = "model.norm.weight"
    del held[name], manifest["checksums"][name]
    save_file(held, kept_file(folder, "weights.safetensors"))
    kept_file(folder, "manifest.json").write_text(json.dumps(manifest))


def be_of_another_version(folder: Path) -> None:
    text = kept_file(folder, "manifest.json").read_text()
    kept_file(folder, "manifest.json").write_text(text.replace('"bitsandbytes": "', '"bitsandbytes": "9'))


def spoil_manifest(folder: Path) -> None:
    kept_file(folder, "manifest.json").write_text("[]")


@pytest.mark.parametrize(
    ("happen", "told"),
    [
        (change_base, "the base's files have changed since"),
        (change_configuration, "the base's files have changed since"),
        (flip_byte, "the checksum of model.layers"),
        (cut, "weights.safetensors is cut off"),
        (lose_a_weight, "it lacks model.norm.weight"),
        (be_of_another_version, "made with another bitsandbytes"),
        (spoil_manifest, "manifest.json: damaged"),
    ],
)
def test_kept_weights_that_do_not_fit_are_told_and_made_anew(
    happen: Callable[[Path], None],
    told: str,
    tmp_path: Path,
    tiny_model: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = copied(tiny_model(), tmp_path / "model")
    load(folder, CACHED)
    happen(folder)
    capsys.readouterr()
    base, report = load(folder, CACHED)
    error = capsys.readouterr().err
    assert told in error
    assert "quantizing again" in error
    assert report.way == "files"
    assert_same(base, plainly(folder, CACHED))
    assert load(folder, CACHED)[1].way == "cache"
    assert capsys.readouterr().err == ""


def test_a_full_gpu_is_no_fault_of_the_kept_weights(
    tmp_path: Path, tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copied(tiny_model(), tmp_path / "model")
    load(folder, CACHED)
    capsys.readouterr()

    def full(*given: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr("veneer.model.load.stream", full)
    with pytest.raises(torch.OutOfMemoryError):
        load(folder, CACHED)
    assert capsys.readouterr().err == ""


def test_where_weights_cannot_be_kept_beside_the_base_the_cache_takes_them(
    tmp_path: Path, tiny_model: Callable[..., Path], empty_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copied(tiny_model(), tmp_path / "model")
    (folder / ".veneer").touch()
    load(folder, CACHED)
    assert f"cached the 4-bit weights in {empty_cache}" in capsys.readouterr().err
    assert load(folder, CACHED)[1].way == "cache"


def test_what_a_killed_process_left_of_a_copy_is_deleted(tmp_path: Path, tiny_model: Callable[..., Path]) -> None:
    folder = copied(tiny_model(), tmp_path / "model")
    with pytest.raises(KeyboardInterrupt), whole_folder(folder / ".veneer" / "nf4-double-float32-cpu") as at_work:
        left = at_work.with_name(at_work.name[:-1] + ("0" if at_work.name[-1] != "0" else "1"))
        left.mkdir()
        (left / "weights.safetensors").write_bytes(b"half")
        load(folder, CACHED)
        assert at_work.exists(), "another process may be at work there"
        assert not left.exists()
        raise KeyboardInterrupt
    assert [path.name for path in (folder / ".veneer").iterdir()] == ["nf4-double-float32-cpu"]


def test_a_full_disk_is_told_and_nothing_is_left(
    tmp_path: Path,
    tiny_model: Callable[..., Path],
    empty_cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = copied(tiny_model(), tmp_path / "model")

    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("veneer.model.quantized_cache._write_tensor", full)
        base, _ = load(folder, CACHED)
    assert_same(base, plainly(folder, CACHED))
    with monkeypatch.context() as patch:
        patch.setattr("veneer.model.quantized_cache.shutil.disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 0))
        load(folder, CACHED)
    told = capsys.readouterr().err
    assert told.count("warning: the 4-bit weights could not be cached") == 2
    assert "No space left on device" in told
    assert "0.0 GB free, 0.0 GB needed" in told
    assert [file for file in (*folder.glob(".veneer/*"), *empty_cache.glob("*/*/*"))] == []


def test_a_load_leaves_frozen_what_the_program_froze() -> None:
    gc.unfreeze()
    with collect_cycles(0, "cpu"):
        assert gc.get_freeze_count() == 0, "what a small load leaves is not looked for"
    with collect_cycles(2**30, "cpu"):
        assert gc.get_freeze_count() > 0, "older objects are not looked through"
    assert gc.get_freeze_count() == 0
    gc.freeze()
    before = gc.get_freeze_count()
    with collect_cycles(2**30, "cpu"):
        pass
    assert gc.get_freeze_count() > before / 2
