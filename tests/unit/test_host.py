"""A load to the host gives the tensors of an ordinary one; with a CPU as the device that quantizes, here."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.engines import COVERED
from tests.support.loading import CACHED, IDS, assert_same, copied, load, plainly
from tests.support.notices import notified
from tests.support.runs import tiny_run, write_rows
from tests.support.tiny import FAMILIES
from veneer.config import Adapter, Model, Quantization, UserError
from veneer.engine.placement import BlockPlacement, MemoryPlacement, WeightState
from veneer.machine.device import find_machine
from veneer.model import load as loading
from veneer.model.attach import attach, count_parameters
from veneer.model.host import host_bytes, move_rest, quantizing_of
from veneer.model.load import keep_4bit_layout, settings_of
from veneer.model.locate import locate
from veneer.model.quiet import quiet
from veneer.model.stream import find_checkpoint, stream
from veneer.planning.predict import predict_run
from veneer.training import parts


def load_to_host(folder: Path, quantization: Quantization | None = None, dtype: str = "bfloat16") -> tuple[Any, str]:
    """Load as for a GPU that the model does not fit; return the way as well."""
    model = Model.model_validate({"base": str(folder), "dtype": dtype})
    settings = settings_of(model, quantization, find_machine())
    with quiet():
        loaded = loading._load(locate(model), settings, quantization, "cpu", to_host=True)
    assert loaded.missing == []
    if loaded.copy is not None:
        loaded.copy.write(loaded.base)
    loaded.base.config.use_cache = False
    keep_4bit_layout(loaded.base)
    return loaded.base.requires_grad_(False), loaded.way


def with_memory(monkeypatch: pytest.MonkeyPatch, available: int) -> None:
    memory = SimpleNamespace(total=available, available=available)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)


@pytest.mark.parametrize(
    ("family", "dtype"), [*((family, "bfloat16") for family in COVERED), ("llama", "float32"), ("phi3", "float32")]
)
def test_every_covered_family_is_the_same_from_files_and_from_the_kept_copy(
    family: str, dtype: str, tmp_path: Path, tiny_model: Callable[..., Path]
) -> None:
    folder = copied(tiny_model(family), tmp_path / "model")
    theirs = plainly(folder, CACHED, dtype)
    for expected in ("files", "cache"):
        base, way = load_to_host(folder, CACHED, dtype)
        assert way == expected
        assert_same(base, theirs)
    again, report = load(folder, CACHED, dtype)
    assert report.way == "cache", "an ordinary load uses the copy of a load to the host"
    assert_same(again, theirs)


@pytest.mark.parametrize("changed", [{"quant_type": "fp4"}, {"double_quant": False}], ids=str)
def test_other_kinds_of_quantization(changed: dict[str, Any], tiny_model: Callable[..., Path]) -> None:
    quantization = Quantization(**changed)
    assert_same(load_to_host(tiny_model(), quantization)[0], plainly(tiny_model(), quantization, "bfloat16"))


def test_tied_embeddings_and_names_without_the_models_prefix(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(1)
    config = LlamaConfig(**FAMILIES["llama"][1], tie_word_embeddings=True)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    held = load_file(tmp_path / "model.safetensors")
    for names in (held, {name.removeprefix("model."): tensor for name, tensor in held.items()}):
        save_file(names, tmp_path / "model.safetensors", {"format": "pt"})
        assert_same(load_to_host(tmp_path, Quantization())[0], plainly(tmp_path, Quantization(), "bfloat16"))


def test_a_base_that_is_quantized_already(tmp_path: Path, tiny_model: Callable[..., Path]) -> None:
    load(tiny_model(), Quantization(), "bfloat16")[0].save_pretrained(tmp_path)
    base, way = load_to_host(tmp_path)
    assert way == "files"
    assert_same(base, plainly(tmp_path, None, "bfloat16"))


def test_without_4_bit_weights_it_is_an_ordinary_load(tiny_model: Callable[..., Path]) -> None:
    assert_same(load_to_host(tiny_model())[0], plainly(tiny_model(), None, "bfloat16"))


def test_adapters_attach_to_it(tiny_model: Callable[..., Path]) -> None:
    models = [
        attach(base, Adapter(), 0) for base, _ in (load_to_host(tiny_model(), Quantization()), load(tiny_model()))
    ]
    assert count_parameters(models[0]) == count_parameters(models[1])
    models[0](input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in models[0].parameters() if p.requires_grad)


def test_infinite_weights_are_refused(tmp_path: Path, tiny_model: Callable[..., Path], empty_cache: Path) -> None:
    folder = copied(tiny_model(), tmp_path / "model")
    held = load_file(folder / "model.safetensors")
    held["model.layers.1.mlp.up_proj.weight"][3, 3] = torch.inf
    save_file(held, folder / "model.safetensors", {"format": "pt"})
    for available in (2**40, 1000):
        with pytest.MonkeyPatch.context() as patch:
            with_memory(patch, available)
            with pytest.raises(UserError, match=r"layers\.1\.mlp\.up_proj\.weight holds NaN or infinite"):
                load_to_host(folder, CACHED)
    assert [*folder.glob(".veneer/*"), *empty_cache.glob("*/*/*")] == []


def test_another_shape_than_the_configurations_is_refused(tmp_path: Path, tiny_model: Callable[..., Path]) -> None:
    folder = copied(tiny_model(), tmp_path / "model", intermediate_size=192)
    with pytest.raises(UserError, match=r"mlp\.down_proj\.weight has the shape \[64, 128\] in its files"):
        load_to_host(folder, Quantization())


@pytest.mark.parametrize("family", ["qwen2", "gemma2"])
def test_all_but_weights_of_4_bits_and_ends_is_moved(family: str, tiny_model: Callable[..., Path]) -> None:
    base, _ = load_to_host(tiny_model(family), Quantization())
    move_rest(base, "meta")
    found = {name: tensor.device.type for name, tensor in (*base.named_parameters(), *base.named_buffers())}
    ends = {"model.embed_tokens.weight", "lm_head.weight"} & found.keys()
    stays = {name for name in found if name.endswith("_proj.weight")} | ends
    assert {name for name, device in found.items() if device == "cpu"} == stays
    moved = {name.rsplit(".", 1)[-1] for name in found.keys() - stays}
    assert moved >= {"weight", "inv_freq"} | ({"bias"} if family == "qwen2" else set())


def test_a_weight_is_on_the_device_alone(tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformers resolves several handles at a time; the device must hold one weight in 16 bits."""
    from bitsandbytes.nn import Params4bit

    at_work, most, quantize = 0, 0, Params4bit._quantize

    def counted(self: Any, device: Any) -> Any:
        nonlocal at_work, most
        at_work += 1
        most = max(most, at_work)
        try:
            return quantize(self, device)
        finally:
            at_work -= 1

    monkeypatch.setattr(Params4bit, "_quantize", counted)
    load_to_host(tiny_model(), Quantization())
    assert (at_work, most) == (0, 1)


def test_where_memory_is_short_the_kept_copy_is_written_and_mapped(
    tmp_path: Path, tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copied(tiny_model(), tmp_path / "model")
    theirs = plainly(folder, CACHED, "bfloat16")
    with_memory(monkeypatch, 1000)
    for _ in range(2):
        base, way = load_to_host(folder, CACHED)
        assert way == "cache"
        assert_same(base, theirs)
        (file,) = folder.glob(".veneer/*/weights.safetensors")
        mapped = Path("/proc/self/maps").read_text() if Path("/proc/self/maps").exists() else str(file)
        assert str(file) in mapped
    before = file.read_bytes()
    base.model.layers[0].mlp.up_proj.weight.data.zero_()
    assert file.read_bytes() == before, "the file is not written through the model"
    monkeypatch.undo()
    again, report = load(folder, CACHED, "bfloat16")
    assert report.way == "cache"
    assert_same(again, theirs)


def test_a_base_in_4_bits_is_mapped_from_its_own_files(
    tmp_path: Path, tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    load(tiny_model(), Quantization(), "bfloat16")[0].save_pretrained(tmp_path)
    theirs = plainly(tmp_path, None, "bfloat16")
    with_memory(monkeypatch, 1000)
    assert_same(load_to_host(tmp_path)[0], theirs)


def test_a_damaged_copy_is_not_mapped(
    tmp_path: Path, tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copied(tiny_model(), tmp_path / "model")
    load_to_host(folder, CACHED)
    (file,) = folder.glob(".veneer/*/weights.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with_memory(monkeypatch, 1000)
    with notified("the checksum of lm_head.weight is another; quantizing again"):
        base, _ = load_to_host(folder, CACHED)
    assert_same(base, plainly(folder, CACHED, "bfloat16"))


def test_without_memory_and_copy_it_is_refused(
    tmp_path: Path, tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copied(tiny_model(), tmp_path / "model")
    with_memory(monkeypatch, 1000)
    needs = r"need 0\.0 GiB of the host's memory, where 0\.0 GiB are available"
    with pytest.raises(UserError, match=rf"{needs}; .*quantization\.cache = false(.|\n)*smaller model\.base"):
        load_to_host(folder, Quantization())
    with monkeypatch.context() as patch:
        patch.setattr("veneer.model.quantized_cache.shutil.disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 0))
        with pytest.raises(UserError, match=rf"{needs}; .*0\.0 GB free, 0\.0 GB needed(.|\n)*free disk space"):
            load_to_host(folder, CACHED)


def test_files_that_only_transformers_reads_are_refused(tmp_path: Path, tiny_model: Callable[..., Path]) -> None:
    folder = copied(tiny_model(), tmp_path / "model")
    held = load_file(folder / "model.safetensors")
    save_file(held | {"extra": torch.ones(2).to(torch.float8_e4m3fn)}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="it does not fit the GPU, and only safetensors in 16"):
        load_to_host(folder, Quantization())


@pytest.mark.parametrize("state", [WeightState.STREAMED, WeightState.NF4])
def test_a_run_that_will_stream_loads_to_the_host(
    state: WeightState,
    tmp_path: Path,
    tiny_model: Callable[..., Path],
    rows: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class LoadedError(Exception):
        """Ends the test once the load is asked for."""

    def predicted(*given: Any) -> Any:
        prediction = predict_run(*given)
        kept, streamed = BlockPlacement({}, {"qkv": WeightState.NF4}), BlockPlacement({}, {"qkv": state})
        placement = MemoryPlacement((kept, streamed))
        return replace(prediction, forecast=replace(prediction.forecast, placement=placement))

    def loads(source: Any, model: Any, quantization: Any, machine: Any, to_host: bool) -> Any:
        assert to_host == (state == WeightState.STREAMED)
        raise LoadedError

    monkeypatch.setattr(parts, "predict_run", predicted)
    monkeypatch.setattr(parts, "load_model", loads)
    run = tiny_run(tiny_model(), write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "run")
    with pytest.raises(LoadedError):
        parts.load_parts(run)


def test_a_load_to_the_host_without_a_gpu_is_an_ordinary_load(tiny_model: Callable[..., Path]) -> None:
    base, _ = load(tiny_model(), Quantization(), "bfloat16", to_host=True)
    assert_same(base, plainly(tiny_model(), Quantization(), "bfloat16"))


def test_bytes_of_a_load_are_foreseen(tiny_model: Callable[..., Path]) -> None:
    model = Model(base=str(tiny_model()), dtype="bfloat16")
    source, settings = locate(model), settings_of(model, Quantization(), find_machine())
    checkpoint = find_checkpoint(source, Quantization())
    assert checkpoint is not None
    base, _, _ = stream(source, checkpoint, settings, "cpu", to_host=True)
    constants = 4 * (16 + 256) + 4  # tables and offset, the same for each layer
    found = sum(tensor.nbytes for name, tensor in base.state_dict().items() if "quant_state" not in name)
    layers = sum("absmax" in name and "nested" not in name for name in base.state_dict())
    foreseen = host_bytes(checkpoint.pieces, quantizing_of(checkpoint.config, settings, "cpu"))
    assert foreseen == pytest.approx(found - layers * constants, rel=0.01)
