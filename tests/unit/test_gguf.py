"""GGUF files of every family: tokens, numbers and stops in llama.cpp are those of the adapter in Transformers."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, quants
from safetensors.torch import load_file, save_file

from tests.support.adapters import save_adapter_of
from tests.support.tiny import FAMILIES, save_tiny_model
from tests.support.vocabularies import family_vocabulary
from veneer.config import Quantization, UserError
from veneer.data.batch import Example
from veneer.data.conversation import Message
from veneer.model.quiet import quiet
from veneer.model.tuned import TunedModel, find_tuned
from veneer.release.certify.client import Client
from veneer.release.certify.compare_weights import compare_weights
from veneer.release.certify.prompts import prompts_of
from veneer.release.certify.servers import Endpoint, llama_server
from veneer.release.gguf.export import export_adapter, export_model
from veneer.release.gguf.importance import measure_importance
from veneer.release.gguf.modelfile import TRIALS, chain_of, unlike
from veneer.release.gguf.tensor_layout import llama3_factors
from veneer.release.gguf.types import QUANTS, Mix, encoded

EXPORTED = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "phi3")
WIDE: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 8, "vocab_size": 384}


def tiny_tuned(family: str, folder: Path, kind: str = "lora", **settings: Any) -> TunedModel:
    """An adapter on a tiny model of a family with a tokenizer of the family's kind."""
    name, own = FAMILIES[family]
    tokenizer = family_vocabulary(family)
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": None}
    window = {"sliding_window": None} if family == "mistral" else {}
    save_tiny_model((name, own | ids | window | settings), folder / family)
    tokenizer.save_pretrained(folder / family)
    with quiet():
        adapter = save_adapter_of(kind, folder / family, folder / "adapter")
        tokenizer.save_pretrained(adapter)
    return find_tuned(str(adapter))


def adapter_logits(tuned: TunedModel, ids: list[int]) -> torch.Tensor:
    """Log-probabilities of the token after some, by the adapter in float32."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    with quiet(), torch.no_grad():
        base = AutoModelForCausalLM.from_pretrained(tuned.source.location, dtype=torch.float32)
        model = PeftModel.from_pretrained(base, str(tuned.adapter)).eval()
        found: torch.Tensor = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
    return found


def first_steps(server: Endpoint) -> list[tuple[list[int], dict[int, float]]]:
    """Prompts with the distribution behind them; where a random model's first token is an end, a server tells none."""
    found: list[tuple[list[int], dict[int, float]]] = []
    for word in (
        "the",
        "cat",
        "dog",
        "owl",
        "hen",
        "say",
        "please",
        "route",
        "this",
        "message",
        "to",
        "right",
        "team",
        "what",
    ):
        turns = [Message("user", f"{word} " * 20)]
        (answer,) = server.answer([turns], 1)
        ids = server.prompt_ids(turns)
        if answer.steps and ids is not None:
            found.append((ids, answer.steps[0]))
        if len(found) == 3:
            break
    assert found
    return found


def far(expected_V: torch.Tensor, step: dict[int, float]) -> float:
    """The largest difference of a log-probability."""
    return max(abs(float(expected_V[number]) - value) for number, value in step.items())


@pytest.mark.parametrize("family", EXPORTED)
def test_a_family_in_llama_cpp_has_the_tokens_and_the_numbers_of_the_adapter(family: str, tmp_path: Path) -> None:
    tuned = tiny_tuned(family, tmp_path)
    report = export_model(tuned, tmp_path / "out", "f32")
    renderer = tuned.renderer
    prompts = prompts_of(renderer, [], 60)
    assert len(prompts) >= 5
    with llama_server(tmp_path / "out" / report.file, True, renderer.stop_ids, 256) as server:
        for prompt in prompts:
            assert server.prompt_ids(prompt.messages) == prompt.ids, prompt.id
            assert server.prompt_count(prompt.messages) == len(prompt.ids), prompt.id
        told = first_steps(server)
    assert {len(step) for _, step in told} == {100}
    assert max(far(adapter_logits(tuned, ids), step) for ids, step in told) < 5e-3


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2"])
def test_the_adapter_alone_does_the_same_on_its_base(family: str, tmp_path: Path) -> None:
    tuned = tiny_tuned(family, tmp_path, "rslora")
    lora = export_adapter(tuned, tmp_path / "lora")
    assert f"ADAPTER ./{lora.file}" in (tmp_path / "lora" / "Modelfile").read_text()
    # The base as a GGUF file: an adapter that changes nothing, merged into it.
    nothing = tmp_path / "nothing"
    shutil.copytree(tuned.adapter, nothing)
    matrices = load_file(nothing / "adapter_model.safetensors")
    save_file({name: tensor * 0 for name, tensor in matrices.items()}, nothing / "adapter_model.safetensors")
    base = export_model(find_tuned(str(nothing)), tmp_path / "base", "f32")
    with llama_server(tmp_path / "base" / base.file, True, set(), 256, tmp_path / "lora" / lora.file) as server:
        told = first_steps(server)
    assert max(far(adapter_logits(tuned, ids), step) for ids, step in told) < 5e-3


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> tuple[TunedModel, Path, int]:
    """An adapter on rows wide enough for every type; its file in float32, and the bytes that were told of that."""
    folder = tmp_path_factory.mktemp("wide")
    tuned = tiny_tuned("llama", folder, **WIDE)
    report = export_model(tuned, folder / "whole", "f32")
    return tuned, folder / "whole" / report.file, report.bytes


@pytest.mark.parametrize("quant", QUANTS)
def test_every_type_loads_and_stays_near_what_it_stands_for(
    quant: str, wide: tuple[TunedModel, Path, int], tmp_path: Path
) -> None:
    from gguf import GGUFReader, quants

    tuned, whole, whole_bytes = wide
    report = export_model(tuned, tmp_path / "out", quant)
    expected = {tensor.name: tensor for tensor in GGUFReader(whole).tensors}
    for tensor in GGUFReader(tmp_path / "out" / report.file).tensors:
        exact = expected[tensor.name].data.reshape(-1)
        found = quants.dequantize(tensor.data, tensor.tensor_type).reshape(-1)
        error = float(((found - exact) ** 2).mean() / (exact**2).mean()) ** 0.5
        limit = {"F32": 1e-6, "F16": 1e-3, "BF16": 4e-3, "Q8_0": 0.01, "Q6_K": 0.03, "Q5_K": 0.05, "Q2_K": 0.35}
        assert error < limit.get(tensor.tensor_type.name, 0.2), (tensor.name, tensor.tensor_type.name)
    assert report.bytes < 1.02 * whole_bytes * (QUANTS[quant][2] + 1) / 32 + 60_000


def test_a_k_quant_is_llama_cpps_mix() -> None:
    mix = Mix("q4_k_m", 32, 4, False)
    kinds = {layer: mix.type_of(f"blk.{layer}.ffn_down.weight", (4096, 14336)) for layer in range(32)}
    more = [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31]
    assert [layer for layer, kind in kinds.items() if kind == "Q6_K"] == more
    assert {kinds[layer] for layer in kinds if layer not in more} == {"Q4_K"}
    assert mix.type_of("output.weight", (128256, 4096)) == "Q6_K"
    assert mix.type_of("token_embd.weight", (128256, 4096)) == "Q4_K"
    assert mix.type_of("blk.0.attn_norm.weight", (4096,)) == "F32"
    tied = Mix("q4_k_m", 30, 3, True)
    assert tied.type_of("token_embd.weight", (49152, 576)) == "Q8_0", "rows that blocks of 256 do not divide"
    assert tied.type_of("blk.0.attn_q.weight", (576, 576)) == "Q5_0"


def test_llama_3_stretches_long_waves_alone() -> None:
    rope = {"rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    factors = llama3_factors(rope | {"original_max_position_embeddings": 8192}, 128)
    assert factors.shape == (64,)
    assert factors[0] == 1.0
    assert factors[-1] == 8.0
    assert bool((factors[1:] >= factors[:-1]).all())


def test_rotary_frequencies_in_an_old_checkpoint_are_left_to_llama_cpp(tmp_path: Path) -> None:
    tuned = tiny_tuned("llama", tmp_path)
    file = tmp_path / "llama" / "model.safetensors"
    old = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    save_file(load_file(file) | old, file, {"format": "pt"})
    report = export_model(tuned, tmp_path / "out", "f16")
    with llama_server(tmp_path / "out" / report.file, True, set(), 256) as server:
        assert server.stop_ids() == set()
    assert compare_weights(tuned, tmp_path / "out" / report.file, "base").wrong == []


def test_a_server_is_there_only_once_its_queue_has_answered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is let go of before its queue runs never ends."""
    asked = []

    def ask(client: Client, path: str, *given: Any) -> Any:
        asked.append((path, answer := real(client, path, *given)))
        return answer

    real = Client.ask
    monkeypatch.setattr(Client, "ask", ask)
    tuned = tiny_tuned("llama", tmp_path)
    report = export_model(tuned, tmp_path / "out", "f16")
    for _ in range(5):
        with llama_server(tmp_path / "out" / report.file, True, set(), 256):
            path, slots = asked[0]
            assert path == "/slots"
            assert [slot["n_ctx"] for slot in slots] == [256]
        asked.clear()


def test_llama_3_rope_is_the_same_in_llama_cpp(tmp_path: Path) -> None:
    rope = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    tuned = tiny_tuned("llama", tmp_path, rope_parameters=rope)
    report = export_model(tuned, tmp_path / "out", "f32")
    with llama_server(tmp_path / "out" / report.file, True, set(), 256) as server:
        told = first_steps(server)
    assert max(far(adapter_logits(tuned, ids), step) for ids, step in told) < 5e-3


@pytest.mark.parametrize("family", [*EXPORTED, "smollm"])
def test_the_modelfile_renders_what_the_template_renders(family: str, tmp_path: Path) -> None:
    from tests.support.rows import renderer
    from veneer.release.gguf.modelfile import modelfile

    made = renderer(family_vocabulary(family))
    text = modelfile("m.gguf", made, ["<|im_end|>"])
    assert text.startswith("# ollama create NAME -f Modelfile\nFROM ./m.gguf\n")
    assert 'PARAMETER stop "<|im_end|>"' in text
    chain = chain_of(made)
    if family in ("llama", "qwen2", "smollm", "phi3"):
        assert chain is not None
        assert unlike(chain, made) == 0
        assert 'eq .Role "user"' in text
        assert "TEMPLATE" in text
    elif chain is None or unlike(chain, made):
        assert "llama-server --jinja" in text, "what cannot be said is told"
    assert len(TRIALS) == 4


def test_a_qlora_model_that_is_quantized_twice_is_warned_of(tmp_path: Path) -> None:
    tuned = replace(tiny_tuned("qwen2", tmp_path), quantization=Quantization(), dtype=torch.float32)
    twice = export_model(tuned, tmp_path / "a", "q4_k_m", "nf4")
    assert "quantized twice, to nf4 in training and to q4_k_m here" in twice.warnings[0]
    assert "--imatrix" in twice.warnings[0]
    assert export_model(tuned, tmp_path / "d", "q4_k_m").on == "nf4", "what was trained on is the default"
    once = export_model(tuned, tmp_path / "b", "q4_k_m", "base")
    assert "will run on q4_k_m ones" in once.warnings[0]
    assert export_model(tuned, tmp_path / "c", "q8_0").warnings == ()


def test_an_importance_matrix_is_the_mean_square_of_what_meets_each_column(tmp_path: Path) -> None:
    tuned = tiny_tuned("qwen2", tmp_path)
    model = tuned.load(tuned.dtype)
    ids = [3, 9, 27, 81, 40]
    found = measure_importance(model, [Example(ids, ((1, 5, 1.0),), "row")] * 2)
    seen: list[torch.Tensor] = []
    norm = model.get_base_model().model.layers[1].input_layernorm
    handle = norm.register_forward_hook(lambda module, inputs, output: seen.append(output[0].float()))
    model(input_ids=torch.tensor([ids]))
    handle.remove()
    expected = seen[0].square().mean(0)
    torch.testing.assert_close(found["model.layers.1.self_attn.q_proj.weight"], expected, rtol=1e-4, atol=1e-6)
    assert found.keys() >= {f"model.layers.0.mlp.{part}_proj.weight" for part in ("gate", "up", "down")}
    report = export_model(tuned, tmp_path / "out", "q4_k_m", importance=found)
    with_it = GGUFReader(tmp_path / "out" / report.file)
    assert with_it.fields["veneer.importance"].contents() is True


@pytest.mark.parametrize("kind", ["Q4_K", "Q2_K"])
def test_columns_that_matter_are_nearer_with_an_importance_matrix(kind: str) -> None:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(64, 512, generator=generator)
    importance = torch.rand(512, generator=generator) ** 6 * 100

    def error(given: torch.Tensor | None) -> float:
        data = np.concatenate(list(encoded(weight, kind, importance=given))).reshape(64, -1)
        there = torch.from_numpy(quants.dequantize(data, GGMLQuantizationType[kind]))
        return float(((there - weight).square() * importance).sum())

    assert error(importance) < 0.9 * error(None)


def test_what_cannot_be_exported_is_told_and_nothing_is_written(
    tmp_path: Path, tiny_model: Callable[..., Path]
) -> None:
    def refused(tuned: TunedModel, quant: str = "f16") -> str:
        with pytest.raises(UserError) as caught:
            export_model(tuned, tmp_path / "out", quant)
        assert [path.name for path in tmp_path.iterdir() if "out" in path.name] == []
        return str(caught.value)

    opt = find_tuned(str(save_adapter_of("lora", tiny_model("opt"), tmp_path / "opt")))
    told = refused(opt)
    assert "the architecture opt cannot be exported to GGUF" in told
    assert "Llama, Mistral, Qwen2, Qwen3, Gemma 2, Phi-3" in told
    llama = tiny_tuned("llama", tmp_path)
    assert "--quant q4: not known" in refused(llama, "q4")
    spec = json.loads((llama.adapter / "tokenizer.json").read_text())
    spec["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\w+"
    (llama.adapter / "tokenizer.json").write_text(json.dumps(spec))
    assert "splits text by" in refused(llama)
    weights = load_file(tmp_path / "llama" / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][0, 0] = 1e5
    save_file(weights, tmp_path / "llama" / "model.safetensors", {"format": "pt"})
    shutil.rmtree(llama.adapter)
    save_adapter_of("patterns", tmp_path / "llama", llama.adapter)
    family_vocabulary("llama").save_pretrained(llama.adapter)
    llama = find_tuned(str(llama.adapter))
    assert "blk.0.ffn_up.weight: holds 100,000, the largest number of f16 is 65,504" in refused(llama)
    with pytest.raises(UserError, match="modules of several scales"):
        export_adapter(llama, tmp_path / "out")
    dora = find_tuned(str(save_adapter_of("dora", tmp_path / "llama", tmp_path / "dora")))
    with pytest.raises(UserError, match="LoRA matrices only on linear layers: DoRA"):
        export_adapter(dora, tmp_path / "out")


def test_a_window_that_llama_cpp_does_not_know_shortens_the_context(tmp_path: Path) -> None:
    from gguf import GGUFReader

    tuned = tiny_tuned("mistral", tmp_path, sliding_window=96)
    report = export_model(tuned, tmp_path / "out", "f16")
    assert "has no sliding window" in report.warnings[0]
    fields = GGUFReader(tmp_path / "out" / report.file).fields
    assert fields["llama.context_length"].contents() == 96
