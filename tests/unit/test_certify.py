"""A certificate passes what is right, and names what is wrong: each planted fault is caught at its stage."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import veneer
from tests.support.adapters import save_adapter_of
from tests.support.certified import certificate, edit
from veneer.cli.main import main
from veneer.config import UserError
from veneer.config.files import file_sha256
from veneer.data.conversation import Message
from veneer.model.tuned import find_tuned
from veneer.release.certify.agreement import divergence
from veneer.release.certify.client import Client
from veneer.release.certify.compare_weights import compare_weights
from veneer.release.certify.servers import Endpoint, llama_server

Damage = Callable[[Path], Any]


@pytest.fixture(scope="module")
def merged(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("merged") / "out"
    veneer.merge(str(run), out, "float32")
    return out


def test_a_merged_model_is_certified_and_the_proof_lies_beside_it(
    run: Path, merged: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["certify", str(merged), "--against", str(run), "--rows", "4", "--json"])
    assert caught.value.code == 0
    told = json.loads(capfd.readouterr().out)
    assert told["passed"] is True
    assert told["first_difference"] is None
    found = {check["id"]: check for check in told["checks"]}
    assert list(found) == [
        *("prompt_tokens", "stop_tokens", "settings", "decoding", "weights", "strength"),
        *("score", "stops", "distributions", "agreement"),
    ]
    assert found["distributions"]["value"] < 1e-6
    assert found["agreement"]["value"] == 1
    assert found["strength"]["value"] == pytest.approx(1, abs=1e-3)
    assert found["stops"]["value"] == "4 of 4", "the run learnt to stop"
    assert {row["id"] for row in told["prompts"]} >= {"edge: empty", "edge: very long", "edge: unicode"}
    assert json.loads((merged / "certificate.json").read_text()) == told
    page = (merged / "certificate.html").read_text()
    assert "<b>Passed.</b>" in page
    assert "strength of the adapter" in page
    assert "0 from wrong to right, 0 from right to wrong" in page
    card = (run / "adapter" / "README.md").read_text()
    assert "| greedy agreement | 100.0% |" in card


def damage_template(folder: Path) -> None:
    path = folder / "chat_template.jinja"
    path.write_text(path.read_text().replace("| trim + '<|eot_id|>'", "| trim + ' <|eot_id|>'"))


def double_bos(folder: Path) -> None:
    path = folder / "chat_template.jinja"
    path.write_text(path.read_text().replace("{{ bos_token }}", "{{ bos_token }}{{ bos_token }}"))


def lose_stop(folder: Path) -> None:
    edit(folder / "generation_config.json", eos_token_id=5)


def lose_token(folder: Path) -> None:
    path = folder / "tokenizer.json"
    spec = json.loads(path.read_text())
    spec["added_tokens"] = [entry for entry in spec["added_tokens"] if entry["content"] != "<|start_header_id|>"]
    path.write_text(json.dumps(spec))
    config = folder / "tokenizer_config.json"
    kept = json.loads(config.read_text())
    for key in ("added_tokens_decoder", "extra_special_tokens", "additional_special_tokens"):
        kept.pop(key, None)
    config.write_text(json.dumps(kept))


def corrupt(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.gate_proj.weight"][7, 3:9] = 0.7
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def overflow(folder: Path) -> None:
    weights = {name: tensor.half() for name, tensor in load_file(folder / "model.safetensors").items()}
    weights["model.layers.0.mlp.down_proj.weight"][2, 2] = torch.inf
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    edit(folder / "config.json", dtype="float16")


def sample_hot(folder: Path) -> None:
    edit(folder / "generation_config.json", do_sample=True, temperature=5.0)


def empty_generation(folder: Path) -> None:
    (folder / "generation_config.json").write_text("{}")


def cut_generation(folder: Path) -> None:
    path = folder / "generation_config.json"
    path.write_text(path.read_text()[:20])


def other_rope(folder: Path) -> None:
    kept = json.loads((folder / "config.json").read_text())
    edit(folder / "config.json", rope_parameters=kept["rope_parameters"] | {"rope_theta": 500_000.0})


def other_epsilon(folder: Path) -> None:
    edit(folder / "config.json", rms_norm_eps=1e-3)


def other_positions(folder: Path) -> None:
    edit(folder / "config.json", max_position_embeddings=64)


def add_head(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.extra.weight"] = weights["lm_head.weight"].clone()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "stage", "named"),
    [
        (sample_hot, "decoding settings", "the run was judged greedily"),
        (empty_generation, "stop tokens", "is not among its stop tokens: its answers would go on"),
        (lambda folder: (folder / "generation_config.json").unlink(), "decoding settings", "is missing, cut or empty"),
        (cut_generation, "decoding settings", "generation_config.json is missing, cut or empty"),
        (other_rope, "architecture settings", "rope_parameters.rope_theta is 500000.0, trained with 10000.0"),
        (other_epsilon, "architecture settings", "rms_norm_eps is 0.001, trained with 1e-06"),
        (other_positions, "architecture settings", "max_position_embeddings is 64, trained with 256"),
        (add_head, "weights", "model.extra.weight: not in base or adapter"),
        (damage_template, "prompt tokens", "the chat template differs"),
        (double_bos, "prompt tokens", "the begin token <|begin_of_text|> is doubled"),
        (lose_token, "prompt tokens", "the tokenizer lacks <|start_header_id|>"),
        (lose_stop, "stop tokens", "<|eot_id|> is not among its stop tokens"),
        (corrupt, "weights", "1 tensor differ: model.layers.1.mlp.gate_proj.weight"),
        (overflow, "weights", "model.layers.0.mlp.down_proj.weight holds numbers that are not finite: an overflow"),
    ],
)
def test_a_planted_fault_in_a_folder_is_caught_and_named(
    damage: Damage, stage: str, named: str, run: Path, merged: Path, tmp_path: Path
) -> None:
    shutil.copytree(merged, tmp_path / "out")
    damage(tmp_path / "out")
    found = certificate(tmp_path / "out", run)
    assert found["passed"] is False
    assert found["first_difference"].startswith(f"{stage}: ")
    assert named in found["first_difference"]


def altered(run: Path, folder: Path, damage: Damage) -> Path:
    """A copy of a run's adapter with a fault, and without its passport, which would refuse it."""
    shutil.copytree(run / "adapter", folder)
    (folder / "passport.json").unlink()
    damage(folder)
    return folder


def halve_alpha(folder: Path) -> None:
    edit(folder / "adapter_config.json", lora_alpha=16)


@pytest.mark.parametrize("kind", ["folder", "gguf"])
@pytest.mark.parametrize(
    ("damage", "base", "stage", "named"),
    [
        (halve_alpha, "base", "weights", "the adapter is in with 0.50 of its strength"),
        (lambda folder: None, "other-base", "weights", "it was merged into another base"),
    ],
)
def test_a_wrong_merge_is_caught_and_named(
    kind: str, damage: Damage, base: str, stage: str, named: str, run: Path, tmp_path: Path
) -> None:
    adapter = altered(run, tmp_path / "adapter", damage)
    own = str(run.parent / base)
    if kind == "folder":
        veneer.merge(str(adapter), tmp_path / "out", "bfloat16", base=own)
    else:
        veneer.export(str(adapter), tmp_path / "out", quant="q8_0", base=own)
    found = certificate(tmp_path / "out", run)
    assert found["first_difference"].startswith(f"{stage}: ")
    assert named in found["first_difference"]


@pytest.mark.parametrize(
    ("damage", "stage", "named"),
    [
        (damage_template, "prompt tokens", "the chat template differs"),
        (lose_token, "prompt tokens", "the tokenizer lacks <|start_header_id|>"),
    ],
)
def test_a_planted_fault_in_a_gguf_file_is_caught_and_named(
    damage: Damage, stage: str, named: str, run: Path, tmp_path: Path
) -> None:
    adapter = altered(run, tmp_path / "adapter", damage)
    veneer.export(str(adapter), tmp_path / "out", quant="f16", base=str(run.parent / "base"))
    found = certificate(tmp_path / "out", run)
    assert found["first_difference"].startswith(f"{stage}: ")
    assert named in found["first_difference"]


def test_a_gguf_file_and_a_server_of_it_are_certified(run: Path, tmp_path: Path) -> None:
    report = veneer.export(str(run), tmp_path / "out", quant="f16")
    found = certificate(tmp_path / "out", run)
    assert found["passed"], found["first_difference"]
    assert found["artifact"] == {
        **{"name": str(tmp_path / "out"), "kind": "gguf", "precision": "f16", "on": "base"},
        **{"runtime": "llama.cpp", "sha256": file_sha256(tmp_path / "out" / report.file)},
    }
    with llama_server(tmp_path / "out" / report.file, True, set(), 512) as server:
        served = certificate(server.address, run)
    assert served["passed"], served["first_difference"]
    assert served["artifact"]["kind"] == "endpoint"
    assert {check["id"] for check in served["checks"]} >= {"prompt_tokens", "distributions", "agreement", "score"}
    told = ("stop tokens", "weights", "strength of the adapter", "architecture settings", "decoding settings")
    assert list(served["skipped"]) == list(told), "what a server does not tell stands as not checked"


def answer_of(model: str, logprobs: list[dict[str, Any]]) -> dict[str, Any]:
    choice = {"message": {"content": "the hen"}, "finish_reason": "stop", "logprobs": {"content": logprobs}}
    return {"model": model, "choices": [choice]}


def test_a_server_that_names_tokens_by_their_texts_is_not_called_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def ask(client: Client, path: str, body: dict[str, Any] | None, *limits: Any) -> Any:
        if path == "/v1/models":
            return {"data": [{"id": "base"}, {"id": "tickets"}]}
        assert body is not None
        asked.append(body["model"])
        likely = {"token": " hen", "logprob": -0.1}
        return answer_of(body["model"], [likely | {"top_logprobs": [likely]}])

    monkeypatch.setattr(Client, "ask", ask)
    with pytest.raises(UserError, match="serves 2 models: base, tickets"):
        Endpoint("http://a", True)
    with pytest.raises(UserError, match="--model other: http://a does not serve it"):
        Endpoint("http://a", True, model="other")
    (answer,) = Endpoint("http://a", True, model="tickets").answer([[Message("user", "a")]], 4)
    assert asked == ["tickets"]
    assert (answer.text, answer.ids, answer.steps) == ("the hen", None, [])


def test_export_asks_for_llama_cpp_before_it_writes(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit) as caught:
        main(["export", str(run), "--out", str(tmp_path / "out")])
    assert caught.value.code == 2
    assert "--no-certify" in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("file", "status", "told"),
    [
        ("config.json", 2, "config.json: damaged: not JSON"),
        ("merge.json", 2, "merge.json: damaged: not JSON"),
        ("chat_template.jinja", 1, "its chat template fails, that of the training does not"),
    ],
)
def test_a_folder_that_cannot_be_read_is_told(
    file: str, status: int, told: str, run: Path, merged: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(merged, tmp_path / "out")
    (tmp_path / "out" / file).write_text("{% foo %}")
    with pytest.raises(SystemExit) as caught:
        main(["certify", str(tmp_path / "out"), "--against", str(run), "--rows", "0"])
    assert caught.value.code == status
    assert told in capfd.readouterr().err


def test_an_adapter_alone_in_gguf_is_told_from_a_model(run: Path, tmp_path: Path) -> None:
    veneer.export(str(run), tmp_path / "out", adapter_only=True)
    with pytest.raises(UserError, match="this is only an adapter"):
        certificate(tmp_path / "out", run)


def test_merge_and_export_certify_by_default_and_end_with_1_where_it_fails(
    run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def status(*arguments: str) -> int:
        with pytest.raises(SystemExit) as caught:
            main([*arguments, "--rows", "2", "--json"])
        return int(caught.value.code or 0)

    assert status("merge", str(run), "--out", str(tmp_path / "good")) == 0
    assert json.loads(capfd.readouterr().out)["certificate"]["passed"] is True
    assert status("export", str(run), "--out", str(tmp_path / "gguf"), "--quant", "q8_0") == 0
    assert json.loads(capfd.readouterr().out)["certificate"]["passed"] is True
    lose_stop(tmp_path / "good")
    assert status("certify", str(tmp_path / "good"), "--against", str(run)) == 1
    assert json.loads(capfd.readouterr().out)["passed"] is False


def test_bad_input_is_one_message_and_status_2(run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for arguments, told in (
        (["certify", str(tmp_path), "--against", str(run)], "neither a model's folder (no config.json)"),
        (["certify", "http://localhost:9", "--against", str(run)], "no OpenAI-compatible server answers there"),
        (["merge", str(run), "--out", str(run)], "is not empty"),
        (["merge", str(run), "--out", str(tmp_path / "o"), "--dtype", "int4"], "--dtype int4: not known"),
        (["merge", str(run), "--out", str(tmp_path / "o"), "--on", "q4"], "--on q4: not known"),
        (["export", str(run), "--out", str(tmp_path / "o"), "--format", "onnx"], "--format onnx: not known"),
        (["unmerge", str(tmp_path), "--adapter", str(run), "--out", str(tmp_path / "o")], "holds no model"),
    ):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 2
        err = capfd.readouterr().err
        assert told in err
        assert err.count("error: ") == 1
        assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_an_adapter_that_learnt_little_is_in_with_all_of_its_strength(
    dtype: str, tmp_path: Path, tiny_model: Callable[..., Path]
) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_model("llama"), base)
    kept = {name: tensor.bfloat16() for name, tensor in load_file(base / "model.safetensors").items()}
    save_file(kept, base / "model.safetensors", {"format": "pt"})
    adapter = save_adapter_of("lora", base, tmp_path / "adapter")
    file = adapter / "adapter_model.safetensors"
    save_file({name: tensor * 0.02 for name, tensor in load_file(file).items()}, file)
    veneer.merge(str(adapter), tmp_path / "out", dtype)
    found = compare_weights(find_tuned(str(adapter)), tmp_path / "out", "base")
    assert found.diagnosis == ""
    assert found.strength == pytest.approx(1, abs=1e-3)
    edit(adapter / "adapter_config.json", lora_alpha=32)
    lost = compare_weights(find_tuned(str(adapter)), tmp_path / "out", "base")
    assert "of its strength: its scale" in lost.diagnosis


def test_a_head_of_its_own_that_is_gone_is_a_wrong_tensor(run: Path, merged: Path, tmp_path: Path) -> None:
    shutil.copytree(merged, tmp_path / "out")
    weights = load_file(tmp_path / "out" / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, tmp_path / "out" / "model.safetensors", {"format": "pt"})
    assert "lm_head.weight" in compare_weights(find_tuned(str(run)), tmp_path / "out", "base").wrong


def test_divergence_counts_what_is_not_named_as_one_bucket() -> None:
    expected = torch.tensor([0.5, 0.25, 0.125, 0.125]).log()
    same = {0: float(expected[0]), 1: float(expected[1])}
    assert divergence(expected, same) == pytest.approx(0, abs=1e-6)
    other = {0: float(torch.tensor(0.25).log()), 1: float(torch.tensor(0.5).log())}
    assert divergence(expected, other) == pytest.approx(0.25 * float(torch.tensor(2.0).log()), abs=1e-6)
    assert divergence(expected, {0: float("nan")}) != divergence(expected, {0: float("nan")})
