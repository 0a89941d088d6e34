"""The command line: exit statuses, one clear message for bad input, JSON alone on stdout."""

import errno
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.support.runs import write_rows
from veneer.cli import demo as demo_module
from veneer.cli.main import main
from veneer.training import parts

ROOT = Path(__file__).parents[2]
Call = Callable[..., tuple[int, str, str]]


def test_train_evaluate_and_generate_speak_json_alone_on_stdout(
    call: Callable[..., tuple[int, str, str]], run_file: Path
) -> None:
    folder = str(run_file.parent / "runs" / "tiny")
    status, out, _ = call("train", str(run_file), "--json")
    assert status == 0
    assert {"run_dir", "steps", "final_loss", "tokens_per_second", "peak_bytes"} <= set(json.loads(out))
    status, out, _ = call("evaluate", folder, "--json")
    assert status == 0
    evaluation = json.loads(out)
    assert evaluation["rows"] == 2
    for metric in ("exact_match", "perplexity"):
        for which in ("base", "tuned"):
            assert {"value", "low", "high"} == set(evaluation["metrics"][metric][which])
    status, out, _ = call("generate", folder, "--prompt", "the cat", "--compare", "--json", "--max-new-tokens", "3")
    assert status == 0
    assert set(json.loads(out)["answers"][0]) == {"prompt", "answer", "base"}


def test_verify_tells_what_it_checked_and_writes_nothing(call: Call, run_file: Path) -> None:
    before = sorted(run_file.parent.iterdir())
    status, out, err = call("verify", str(run_file), "train.engine=fused", "--json")
    assert status == 0, err
    result = json.loads(out)
    assert (result["passed"], result["engine"]) == (True, "fused")
    assert len(result["checks"]) == 11
    for check in result["checks"]:
        assert {"id", "passed", "value", "limit"} <= set(check)
        assert check["passed"]
    status, out, _ = call("verify", str(run_file))
    assert status == 0
    for expected in ("overfit", "reload", "fused-loss, fused-gradient, fused-matrix: ", "passed"):
        assert expected in out
    assert sorted(run_file.parent.iterdir()) == before


def test_a_check_that_fails_is_status_1(call: Call, run_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from veneer.training import overfit

    monkeypatch.setattr(overfit, "_rate", lambda run, step: 1e-12)  # nothing is learnt at such a rate
    status, out, _ = call("verify", str(run_file), "--json")
    assert status == 1
    result = json.loads(out)
    assert [check["id"] for check in result["checks"] if not check["passed"]] == ["overfit"]
    assert not result["passed"]
    status, out, _ = call("verify", str(run_file))
    assert status == 1
    assert "failed   overfit: see docs/verify.md" in out


def test_an_engine_that_cannot_be_had_is_status_2(call: Call, run_file: Path, tiny_model: Callable[..., Path]) -> None:
    for command in ("train", "verify"):
        status, _, err = call(command, str(run_file), f"model.base={tiny_model('opt')}", "train.engine=fused")
        assert status == 2
        assert "the fused engine does not cover the architecture opt" in err
        assert "set train.engine to auto or reference" in err
    assert not (run_file.parent / "runs").exists()


def test_a_disk_that_becomes_full_is_told_with_a_fix(
    call: Call, run_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*given: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "runs/a")

    monkeypatch.setattr(parts, "prepare", full)
    status, _, err = call("train", str(run_file))
    assert status == 1
    assert "error: runs/a: the disk became full (No space left on device)" in err
    assert "fix: free space" in err


def test_a_base_that_does_not_fit_is_told_with_a_fix(
    call: Call, run_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*given: Any, **named: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of")

    monkeypatch.setattr("veneer.model.load.stream", full)
    status, _, err = call("train", str(run_file))
    assert status == 1
    assert "error: CUDA out of memory\n  fix: end what else holds memory there" in err


def test_train_tells_a_person_what_happens(call: Callable[..., tuple[int, str, str]], run_file: Path) -> None:
    status, out, err = call("train", str(run_file))
    assert status == 0, err
    for expected in (
        "machine",
        "engine   reference: the fused engine is made for CUDA GPUs",
        "16 read = 16 used",
        "14 to train on, 2 held out",
        "held-out loss",
        "next",
        " evaluate ",
    ):
        assert expected in out
    assert "Warning" not in out + err


BAD: list[tuple[str, list[str]]] = [
    ("unknown key `train.lr`; it is called `train.learning_rate` here", ["train.lr=1"]),
    ("quantization.bits = 3: should be 4", ["quantization.bits=3"]),
    ("train.learning_rate = -1", ["train.learning_rate=-1"]),
    ("data.train = nothing.jsonl: no such file", ["data.train=nothing.jsonl"]),
    ("the folder has no config.json", ["model.base=."]),
    ("model.base = nothing: no such folder or file", ["model.base=nothing"]),
    ("`q_prj` matches no module of this model; nearest: ", ["adapter.target_modules=[q_prj]"]),
    ("data.chat_template = x: neither", ["data.chat_template=x"]),
    ("train.output_dir = /sys/veneer: cannot be written", ["train.output_dir=/sys/veneer"]),
    ("leave none to train on", ["data.validation=16"]),
    ("holds no run to resume", ["--resume"]),
    ("train.engine = 'quick': should be 'auto', 'fused' or 'reference'", ["train.engine=quick"]),
]


@pytest.mark.parametrize(("message", "arguments"), BAD)
def test_bad_input_is_one_message_and_status_2_with_nothing_written(
    message: str, arguments: list[str], call: Callable[..., tuple[int, str, str]], run_file: Path
) -> None:
    status, out, err = call("train", str(run_file), *arguments)
    assert status == 2
    assert message in err
    assert err.startswith("error: ")
    assert "Traceback" not in err
    assert out == ""
    assert not (run_file.parent / "runs").exists()


def test_chat_data_on_a_base_without_template_is_status_2(
    call: Callable[..., tuple[int, str, str]], run_file: Path, tiny_model: Callable[..., Path]
) -> None:
    turns = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "the dog"}]
    chat = write_rows(run_file.parent / "chat.jsonl", [{"messages": turns}] * 4)
    status, _, err = call("train", str(run_file), f"model.base={tiny_model('opt', False)}", f"data.train={chat}")
    assert status == 2
    assert "the base model has no chat template" in err
    assert "set data.chat_template to chatml, llama-3, mistral" in err
    assert not (run_file.parent / "runs").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "nothing.yaml"],
        ["train"],
        ["fly"],
        ["verify", "nothing.yaml"],
        ["evaluate", "nothing"],
        ["generate", "nothing", "--prompt", "x"],
        ["evaluate", "nothing", "--rows", "0"],
    ],
)
def test_other_wrong_calls_end_with_status_2(arguments: list[str], call: Callable[..., tuple[int, str, str]]) -> None:
    status, _, err = call(*arguments)
    assert status == 2
    assert err
    assert "Traceback" not in err


def test_a_second_run_into_the_same_folder_is_refused(
    call: Callable[..., tuple[int, str, str]], run_file: Path
) -> None:
    assert call("train", str(run_file))[0] == 0
    status, _, err = call("train", str(run_file))
    assert status == 2
    assert "already holds a run" in err
    assert "another train.output_dir" in err


def test_a_failed_job_is_status_1(call: Callable[..., tuple[int, str, str]], run_file: Path) -> None:
    status, _, err = call(
        "train", str(run_file), "train.learning_rate=1", "adapter.lora_alpha=1e20", "train.max_grad_norm=0",
        "train.max_steps=300",
    )  # fmt: skip
    assert status == 1
    assert "diverged: the loss is" in err
    assert "fix: lower train.learning_rate" in err


def test_debug_shows_the_traceback() -> None:
    with pytest.raises(ValueError, match="no such file"):
        main(["train", "nothing.yaml", "--debug"])


def test_the_demo_fails_when_the_tuned_model_is_not_better(
    call: Callable[..., tuple[int, str, str]], run_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A random model learns nothing in one step at no learning rate to speak of."""
    from veneer.config import load_run

    overrides = ["train.learning_rate=1e-12", "train.max_steps=1", "quantization.bits=4"]
    monkeypatch.setattr(demo_module, "demo_run", lambda output_dir: load_run(run_file, overrides))
    status, out, err = call("demo", "--json")
    assert status == 1
    assert "not better" in err
    result = json.loads(out)
    assert {"metrics", "rows", "wall_seconds", "peak_resident_bytes", "run_dir"} <= set(result)


def test_the_demo_takes_the_next_free_folder(tmp_path: Path) -> None:
    assert demo_module._free(tmp_path / "demo") == tmp_path / "demo"
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "run.yaml").touch()
    assert demo_module._free(tmp_path / "demo") == tmp_path / "demo-2"


def test_the_recipe_of_the_demo_says_what_the_demo_does() -> None:
    from veneer.config import load_run

    recipe = load_run(ROOT / "recipes" / "smollm2-demo.yaml").model_dump(mode="json")
    demo = demo_module.demo_run(Path("runs/smollm2-demo")).model_dump(mode="json")
    for run in (recipe, demo):
        for key in ("train", "validation"):
            run["data"][key] = Path(run["data"][key]).name
    assert recipe == demo


def test_help_imports_nothing_heavy() -> None:
    code = "import sys; from veneer.cli.main import main\ntry: main(['train', '--help'])\nexcept SystemExit: pass\n"
    code += "print([m for m in ('torch', 'transformers', 'numpy', 'yaml', 'rich.progress') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip().endswith("[]")


@pytest.mark.parametrize("command", ["demo", "train", "verify", "evaluate", "generate", "runs", "watch"])
def test_every_command_has_help_with_an_example(command: str, call: Callable[..., tuple[int, str, str]]) -> None:
    status, out, _ = call(command, "--help")
    assert status == 0
    assert f"Example: veneer {command}" in " ".join(out.split())


def test_the_readmes_make_commands_exist() -> None:
    readme = (ROOT / "README.md").read_text()
    targets = set(re.findall(r"^([a-z0-9-]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"^\s*make ([a-z0-9-]+)|`make ([a-z0-9-]+)`", readme, re.MULTILINE))
    flat = {name for pair in named for name in pair if name}
    assert {"demo", "test"} <= flat <= targets


def test_the_readmes_run_file_is_a_run(tmp_path: Path) -> None:
    from veneer.config import load_run

    blocks = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert blocks
    for block in blocks:
        assert yaml.safe_load(block)
        (tmp_path / "readme.yaml").write_text(block)
        load_run(tmp_path / "readme.yaml")


def test_data_shows_what_becomes_of_rows(tiny_model: Callable[..., Path], tmp_path: Path, call: Call) -> None:
    rows = [{"prompt": f"the cat {n} [bold]", "completion": "the <b> owl"} for n in range(5)]
    path = write_rows(tmp_path / "rows.jsonl", [*rows, {"prompt": "a", "completion": ""}])
    page = tmp_path / "page.html"
    given = ["data", path, "--model", str(tiny_model()), "--html", str(page), "data.validation=1"]
    code, out, _ = call(*given)
    assert code == 0
    for expected in ("6 read = 5 used + 1 empty", "4 to train on, 1 held out", "rows.jsonl:6", "<|im_end|>", "[bold]"):
        assert expected in out
    html = page.read_text()
    assert '<span class="learnt ">the &lt;b&gt; owl</span><span class="learnt control">&lt;|im_end|&gt;</span>' in html
    assert "src=" not in html
    assert "http" not in html
    _, out, _ = call(*given, "--json", "--rows", "2")
    report = json.loads(out)
    assert {"read", "used", "unreadable", "empty", "duplicate", "overlong", "refused"} <= set(report["rows"])
    assert {"total", "trained", "end_of_turn"} <= set(report["tokens"])
    assert {"format", "warnings"} <= set(report)
    assert [sum(len(p["text"]) > 0 for p in sample["pieces"]) > 3 for sample in report["samples"]] == [True, True]


def test_data_takes_a_run_as_well(tiny_model: Callable[..., Path], tmp_path: Path, call: Call) -> None:
    write_rows(tmp_path / "rows.jsonl", [{"prompt": f"{n}", "completion": "b"} for n in range(4)])
    run = tmp_path / "run.yaml"
    run.write_text(f"model: {{base: {tiny_model()}}}\ndata: {{train: {tmp_path}/rows.jsonl, validation: 0}}\n")
    _, out, _ = call("data", str(run), "data.limit=3", "--json")
    assert json.loads(out)["rows"]["read"] == 3
    assert list(tmp_path.glob("runs*")) == []


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["rows.jsonl"], "name it with --model"),
        (["none.jsonl", "--model", "x"], "model.base"),
        (["rows.jsonl", "--model", "smollm2-135m-instruct", "--html", "no/where.html"], "the folder does not exist"),
        (["rows.jsonl", "--model", "smollm2-135m-instruct", "data.formt=auto"], "did you mean `format`?"),
    ],
)
def test_data_says_what_is_wrong(given: list[str], expected: str, call: Call) -> None:
    code, _, err = call("data", *given)
    assert code == 2
    assert expected in err


def test_a_list_of_files_may_be_an_override(tiny_model: Callable[..., Path], tmp_path: Path, call: Call) -> None:
    for name in ("a", "b"):
        write_rows(tmp_path / f"{name}.jsonl", [{"prompt": f"{name} {n}", "completion": "b"} for n in range(4)])
    files = f"data.train=[{tmp_path}/a.jsonl, {tmp_path}/b.jsonl]"
    columns = "data.columns={prompt: prompt, completion: completion}"
    _, out, _ = call("data", "x", "--model", str(tiny_model()), files, columns, "--json")
    assert json.loads(out)["rows"]["read"] == 8
