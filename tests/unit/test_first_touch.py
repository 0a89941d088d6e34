"""From nothing to a run and its answers: init, train without a file, replacing a run, and what is refused at once."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import veneer
from tests.support.runs import write_rows
from veneer.cli import checks
from veneer.cli.main import main
from veneer.config import RunFolder, UserError, load_run
from veneer.config.names import BUILTIN_NAMES
from veneer.config.options import OPTIONS
from veneer.model.builtin import BUILTIN
from veneer.release.gguf import types as gguf_types
from veneer.release.merge import merged as merge_module

Call = Callable[..., tuple[int, str, str]]
QUICK = ("train.max_steps=1", "data.max_length=64", "adapter.r=2", "train.eval_steps=null", "train.save_steps=null")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: list[dict[str, Any]]) -> Path:
    """An empty folder to work in, with a file of rows."""
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "rows.jsonl", rows)
    return tmp_path


def test_train_needs_no_file(call: Call, here: Path, tiny_model: Callable[..., Path]) -> None:
    base = str(tiny_model())
    status, out, err = call("train", "--model", base, "--data", "rows.jsonl", *QUICK, "--json")
    assert status == 0, err
    assert json.loads(out)["run_dir"] == "runs/rows"
    assert load_run(here / "runs/rows/run.yaml").model.base == base
    # Overrides may come first, and -o names the folder.
    status, _, err = call("train", *QUICK, "--model", base, "--data", "rows.jsonl", "-o", "runs/b", "train.seed=7")
    assert status == 0, err
    run = load_run(here / "runs/b/run.yaml")
    assert (run.train.seed, run.train.max_steps) == (7, 1)


def test_options_override_a_file(call: Call, run_file: Path, here: Path) -> None:
    status, _, err = call("train", str(run_file), "--data", "none.jsonl", "-o", "elsewhere")
    assert status == 2
    assert "data.train = none.jsonl: no such file" in err
    assert call("train", str(run_file), "-o", "elsewhere", "train.max_steps=1")[0] == 0
    assert (here / "elsewhere" / "adapter").is_dir()


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([], "no YAML file is named, and --model and --data are missing"),
        (["--model", "x"], "and --data is missing"),
        (["train.seed=1", "--data", "rows.jsonl"], "and --model is missing"),
        (["--model", "no/such/base", "--data", "rows.jsonl"], "model.base = no/such/base: no such folder"),
    ],
)
def test_what_is_to_be_trained_must_be_said(call: Call, here: Path, given: list[str], expected: str) -> None:
    status, _, err = call("train", *given)
    assert status == 2
    assert expected in err


def test_overwrite_replaces_a_run(call: Call, run_file: Path) -> None:
    folder = run_file.parent / "runs" / "tiny"
    assert call("train", str(run_file), "train.max_steps=2")[0] == 0
    before = (folder / "adapter" / "adapter_model.safetensors").read_bytes()
    status, _, err = call("train", str(run_file))
    assert status == 2
    assert "--overwrite to replace it" in err
    # What cannot be trained replaces nothing.
    assert call("train", str(run_file), "--overwrite", "adapter.target_modules=[no_proj]")[0] == 2
    assert (folder / "adapter" / "adapter_model.safetensors").read_bytes() == before
    status, out, err = call("train", str(run_file), "train.max_steps=3", "--overwrite", "--json")
    assert status == 0, err
    assert json.loads(out)["steps"] == 3
    assert (folder / "adapter" / "adapter_model.safetensors").read_bytes() != before
    assert sorted(path.name for path in folder.parent.iterdir()) == ["tiny"]
    status, _, err = call("train", str(run_file), "--overwrite", "--resume")
    assert status == 2
    assert "leave one of them out" in err


def test_overwrite_deletes_only_what_a_run_wrote(tmp_path: Path) -> None:
    broken = RunFolder(tmp_path / "broken")
    broken.path.mkdir()
    broken.require_replaceable()
    (broken.path / "environment.json").touch()
    (broken.path / ".plan.json.x1").touch()  # a file that was never finished
    (broken.path / "checkpoints").mkdir()
    broken.remove()
    assert list(tmp_path.iterdir()) == []
    broken.remove()  # nothing there is fine

    for names in (["notes.txt"], ["run.yaml", "notes.txt"], ["samples.jsonl"], ["run.yaml", ".git"]):
        folder = RunFolder(tmp_path / "other")
        folder.path.mkdir(exist_ok=True)
        for name in names:
            (folder.path / name).touch()
        with pytest.raises(UserError, match=f"holds what no run wrote: .*{names[-1]}"):
            folder.remove()
        assert {path.name for path in folder.path.iterdir()} >= set(names)
        for path in folder.path.iterdir():
            path.unlink()
    (tmp_path / "link").symlink_to(tmp_path / "other")
    with pytest.raises(UserError, match="a file or a link"):
        RunFolder(tmp_path / "link").require_replaceable()


CHAT = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "the dog"}]
ROWS: dict[str, list[dict[str, Any]]] = {
    "messages": [{"messages": CHAT}],
    "sharegpt": [{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}],
    "alpaca": [{"instruction": "a", "input": "", "output": "b"}],
    "prompt-completion": [{"prompt": "a", "completion": "b"}],
    "question-answer": [{"question": "a", "answer": "b"}],
    "text": [{"text": "the cat and the dog"}],
    "preference": [{"prompt": "a", "chosen": "b", "rejected": "c"}],
}


@pytest.mark.parametrize("name", list(ROWS))
@pytest.mark.parametrize("count", [1, 7, 60, 230])
def test_init_writes_a_run_that_trains_as_it_stands(
    name: str, count: int, call: Call, here: Path, tiny_model: Callable[..., Path]
) -> None:
    rows = [
        json.loads(json.dumps(ROWS[name][0]).replace('"a"', f'"a {n}"').replace("cat", f"cat {n}"))
        for n in range(count)
    ]
    write_rows(here / "my rows: #1.jsonl", rows)
    status, out, err = call("init", "my rows: #1.jsonl", "--model", str(tiny_model()), "--json")
    assert status == 0, err
    assert json.loads(out)["formats"]["my rows: #1.jsonl"].startswith(name)
    run = load_run(here / "run.yaml")
    assert run.train.output_dir == Path("runs/my rows: #1")
    assert "# " in (here / "run.yaml").read_text()
    ledger = veneer.prepare(run, samples=0).ledger
    assert ledger["rows"]["used"] == count
    assert ledger["rows"]["training"] > 0
    if count == 7:
        assert call("plan", "run.yaml", "--json")[0] == 0
        assert call("train", "run.yaml", *QUICK, "data.max_length=128", "quantization=null")[0] == 0


def test_init_takes_the_built_in_model_and_overwrites_nothing_unasked(call: Call, here: Path) -> None:
    status, out, err = call("init", "rows.jsonl", "--out", "a.yaml")
    assert status == 0, err
    assert "rows.jsonl: prompt-completion (the fields `prompt`, `completion`)" in out
    assert "plan a.yaml" in out
    assert load_run(here / "a.yaml").model.base == BUILTIN_NAMES[0]
    assert load_run(here / "a.yaml").quantization is None  # it is a quantized file already
    (here / "a.yaml").write_text("mine")
    status, _, err = call("init", "rows.jsonl", "--out", "a.yaml")
    assert status == 2
    assert "a.yaml: the file exists" in err
    assert (here / "a.yaml").read_text() == "mine"
    assert call("init", "rows.jsonl", "--out", "a.yaml", "--overwrite")[0] == 0
    assert load_run(here / "a.yaml").data.train == "rows.jsonl"


def test_init_knows_a_base_without_a_template(call: Call, here: Path, tiny_model: Callable[..., Path]) -> None:
    assert call("init", "rows.jsonl", "--model", str(tiny_model("opt", False)))[0] == 0
    assert load_run(here / "run.yaml").data.chat_template == "chatml"


def test_init_says_what_cannot_be_trained_on(call: Call, here: Path) -> None:
    write_rows(here / "odd.jsonl", [{"query": "a", "reply": "b"}])
    status, _, err = call("init", "odd.jsonl")
    assert status == 2
    assert "fit no known format" in err
    assert not (here / "run.yaml").exists()


def test_init_takes_rated_rows(call: Call, here: Path) -> None:
    write_rows(here / "rated.jsonl", [{"prompt": "a", "completion": "b", "label": True}])
    status, _, err = call("init", "rated.jsonl")
    assert status == 0, err
    assert load_run(here / "run.yaml").data.train == "rated.jsonl"


def test_an_answer_appears_as_it_is_made_on_a_terminal(
    call: Call, here: Path, tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, streams = str(tiny_model()), []
    generate = veneer.generate

    def spy(*given: Any, on_text: Any = None, **more: Any) -> Any:
        streams.append(on_text is not None)
        return generate(*given, on_text=on_text, **more)

    monkeypatch.setattr("veneer.api.generate.generate", spy)
    asked = ("generate", base, "--prompt", "the cat", "--max-new-tokens", "5")
    _, plain, _ = call(*asked)
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes any output for a terminal then
    _, shown, _ = call(*asked)
    assert shown.count(plain.strip()) == 1
    call(*asked, "--json")
    call(*asked, "--prompt", "the dog")
    assert streams == [False, True, False, False]


def test_generate_reads_prompts_from_a_file(call: Call, here: Path, tiny_model: Callable[..., Path]) -> None:
    write_rows(here / "asked.jsonl", [{"prompt": "the cat"}, {"messages": CHAT[:1]}])
    given = ("--prompts-file", "asked.jsonl", "--max-new-tokens", "3", "--json", "-p", "the owl")
    status, out, err = call("generate", str(tiny_model()), *given)
    assert status == 0, err
    answers = json.loads(out)["answers"]
    assert [found["prompt"] for found in answers] == ["the owl", "the cat", CHAT[:1]]
    assert answers[1]["answer"] == answers[2]["answer"]


def test_the_version_is_shown(call: Call) -> None:
    assert call("--version") == (0, f"veneer {veneer.__version__}\n", "")


def test_python_runs_the_package() -> None:
    given = [sys.executable, "-m", "veneer", "--version"]
    assert subprocess.run(given, capture_output=True, text=True, check=True).stdout.startswith("veneer ")


def test_the_shell_can_complete_commands(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    for name, value in (("_VENEER_COMPLETE", "complete_bash"), ("COMP_WORDS", "veneer gen"), ("COMP_CWORD", "1")):
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as caught:
        main([])
    assert not caught.value.code
    assert capfd.readouterr().out.split() == ["generate"]


# Wrong for certain: (arguments, part of the message). Told before torch is imported.
WRONG: list[tuple[list[str], str]] = [
    (["train", "missing.yaml"], "missing.yaml: no such file"),
    (["train", "run.yaml", "data.train=missing.jsonl"], "data.train = missing.jsonl: no such file"),
    (["train", "run.yaml", "data.validation=missing.jsonl"], "data.validation = missing.jsonl: no such file"),
    (["train", "run.yaml", "model.base=./missing"], "model.base = ./missing: no such folder"),
    (["train", "run.yaml", "train.lr=1"], "unknown key `train.lr`"),
    (["train", "run.yaml", "train.output_dir=full"], "is not empty"),
    (["train", "run.yaml", "train.output_dir=full", "--overwrite"], "holds what no run wrote"),
    (["train", "run.yaml", "--resume"], "holds no run to resume"),
    (["verify", "missing.yaml"], "no such file"),
    (["verify", "run.yaml", "data.train=missing.jsonl"], "no such file"),
    (["plan", "missing.yaml"], "no such file"),
    (["plan", "run.yaml", "model.base=./missing"], "no such folder"),
    (["plan", "run.yaml", "--gpu", "rtx 9999"], "--gpu rtx 9999: an unknown card"),
    (["plan", "run.yaml", "--fit", "no/where.yaml"], "the folder does not exist"),
    (["data", "missing.jsonl", "--model", "smollm2-135m-instruct"], "missing.jsonl: no such file"),
    (["data", "missing.yaml"], "no such file"),
    (["data", "rows.jsonl", "--model", "./missing"], "no such folder"),
    (["init", "missing.jsonl", "--out", "new.yaml"], "missing.jsonl: no such file"),
    (["evaluate", "nowhere"], "nowhere: no run, adapter, model"),
    (["evaluate", "full"], "full: the folder has no config.json"),
    (["generate", "nowhere", "-p", "x"], "nowhere: no such folder or file in "),
    (["generate", "full", "-p", "x"], "the folder has no config.json"),
    (["generate", "base", "-p", "x", "--top-p", "3"], "--top-p 3.0: should be more than 0 and at most 1"),
    (["generate", "base", "--prompts-file", "missing.txt"], "missing.txt: no such file fix: name a file of prompts"),
    (["generate", "base", "-p", "x", "--max-new-tokens", "0"], "Invalid value for '--max-new-tokens'"),
    (["merge", "nowhere", "--out", "x"], "nowhere: no such folder"),
    (["merge", "adapter", "--out", "x", "--dtype", "int4"], "--dtype int4: not known"),
    (["merge", "adapter", "--out", "x", "--on", "x"], "--on x: not known"),
    (["merge", "adapter", "--out", "full"], "--out full: is not empty"),
    (["merge", "adapter", "--out", "x", "--base", "./missing"], "model.base = ./missing: no such folder"),
    (["unmerge", "base", "--adapter", "nowhere", "--out", "x"], "nowhere: no such folder"),
    (["unmerge", "missing", "--adapter", "adapter", "--out", "x"], "missing: no such folder"),
    (["export", "nowhere", "--out", "x"], "nowhere: no such folder"),
    (["export", "adapter", "--out", "x", "--quant", "q9"], "--quant q9: not known"),
    (["export", "adapter", "--out", "x", "--on", "x"], "--on x: not known"),
    (["export", "adapter", "--out", "x", "--format", "onnx"], "--format onnx: not known"),
    (["certify", "x", "--against", "nowhere"], "nowhere: no such folder"),
    (["certify", "x", "--against", "adapter"], "x: neither a model's folder"),
    (["push", "nowhere", "--repo", "me/x"], "nowhere: no such folder"),
]  # fmt: skip


def test_what_is_wrong_for_certain_is_refused_before_anything_heavy_is_imported(here: Path) -> None:
    (here / "full").mkdir()
    (here / "full" / "notes.txt").touch()
    (here / "base").mkdir()
    (here / "base" / "config.json").write_text("{}")
    (here / "adapter").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (here / "adapter" / name).write_text("{}")
    (here / "run.yaml").write_text(yaml.safe_dump({"model": {"base": "base"}, "data": {"train": "rows.jsonl"}}))
    before = sorted(here.rglob("*"))
    code = (
        "import contextlib, io, json, sys\nfrom veneer.cli.main import main\n"
        "for arguments in json.loads(sys.argv[1]):\n"
        "    told, status = io.StringIO(), 0\n"
        "    try:\n"
        "        with contextlib.redirect_stderr(told): main(arguments)\n"
        "    except SystemExit as end: status = end.code\n"
        "    heavy = [name for name in ('torch', 'transformers', 'pyarrow', 'datasets') if name in sys.modules]\n"
        "    print(json.dumps([status, told.getvalue(), heavy]))\n"
    )
    given = json.dumps([arguments for arguments, _ in WRONG])
    result = subprocess.run([sys.executable, "-c", code, given], capture_output=True, text=True, check=True, cwd=here)
    ended = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(ended) == len(WRONG)
    for (arguments, expected), (status, told, heavy) in zip(WRONG, ended, strict=True):
        assert (status, heavy) == (2, []), (arguments, told)
        assert expected in " ".join(told.split()), (arguments, told)
        assert "Traceback" not in told
        assert told.count("error:") <= 1
    assert sorted(here.rglob("*")) == before


def test_an_adapter_whose_base_is_gone_is_refused(here: Path) -> None:
    folder = RunFolder(here / "run")
    (folder.adapter).mkdir(parents=True)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (folder.adapter / name).touch()
    folder.run.write_text("model: {base: ./gone}\ndata: {train: rows.jsonl}\n")
    with pytest.raises(UserError, match=r"model.base = ./gone: no such folder"):
        checks.require_answering("run")
    checks.require_answering("run", BUILTIN_NAMES[0])


def test_what_is_known_without_libraries_is_what_they_take() -> None:
    assert set(BUILTIN_NAMES) == set(BUILTIN)
    assert set(OPTIONS["--quant"]) == set(gguf_types.QUANTS)
    assert set(OPTIONS["--dtype"]) == set(merge_module.DTYPES)
