"""What is evaluated: a run, a checkpoint, an adapter, a base, a merged folder, a GGUF file or a server, in pairs."""

import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

import veneer
from tests.support.notices import notified
from tests.support.runs import write_rows
from veneer.config import UserError
from veneer.config.cache import cache_folder
from veneer.release.certify import client, servers

Call = Callable[..., tuple[int, str, str]]
QUESTIONS = [{"prompt": f"what does the {name} say", "completion": "please route"} for name in ("cat", "dog", "owl")]


def scores(evaluated: Any, metric: str = "exact_match") -> tuple[float, float]:
    """The other's score and the target's."""
    values = evaluated.as_dict()["metrics"][metric]
    return values["base"]["value"], values["tuned"]["value"]


# Models that are loaded here


def test_a_run_against_its_base_by_name_scores_as_the_record_does(run: Path) -> None:
    record = veneer.evaluate(run)
    kept = (run / "evaluation.json").read_bytes()
    found = veneer.evaluate(run, against=str(run.parent / "base"), metrics=["exact_match", "perplexity"])
    assert scores(found) == scores(record) == (0, 1)
    _, tuned = scores(found, "perplexity")
    assert tuned == scores(record, "perplexity")[1]
    assert found.file is not None
    assert (found.is_record, found.file.parent) == (False, run / "evaluations")
    assert found.as_dict()["compared"] == {"base": str(run.parent / "base"), "tuned": str(run)}
    assert (run / "evaluation.json").read_bytes() == kept, "the record is of the run and its own base"


def test_an_adapter_and_a_checkpoint_have_their_base_beside_them(run: Path, any_notice: None) -> None:
    record = veneer.evaluate(run)
    checkpoint = max((run / "checkpoints").iterdir())
    for target, is_written in ((run / "adapter", False), (checkpoint, True)):
        found = veneer.evaluate(target, data=str(run.parent / "held.jsonl"), metrics=["exact_match", "perplexity"])
        assert scores(found, "perplexity") == scores(record, "perplexity")
        assert (found.file is not None) == is_written
        assert found.as_dict()["compared"]["base"] == "its base"


def test_what_merge_wrote_is_the_run_row_by_row(run: Path, tmp_path: Path) -> None:
    veneer.merge(str(run), tmp_path / "merged", dtype="float32")
    found = veneer.evaluate(tmp_path / "merged", against=str(run), out=tmp_path / "result.json", suites="knowledge")
    assert scores(found) == (1, 1)
    assert found.file == tmp_path / "result.json"
    written = json.loads(found.file.read_text())
    assert written["comparison"]["exact_match"]["rows"] == {
        **{"compared": written["rows"], "groups": None},
        **{"better": 0, "worse": 0},
    }
    assert len((tmp_path / "result.samples.jsonl").read_text().splitlines()) == written["rows"]
    knowledge = written["suites"]["scores"]["knowledge"]
    assert abs(knowledge["base"]["value"] - knowledge["tuned"]["value"]) < 0.1


def test_models_of_other_tokenizers_compare_by_bits_per_byte(
    run: Path, tiny_model: Callable[..., Path], any_notice: None
) -> None:
    other = str(tiny_model("qwen2"))
    with pytest.raises(UserError, match="perplexity: the tokenizers differ"):
        veneer.evaluate(run, against=other, metrics=["perplexity"])
    found = veneer.evaluate(run, against=other, metrics=["bits_per_byte"])
    assert scores(found, "bits_per_byte")[1] < scores(found, "bits_per_byte")[0]
    with notified("perplexity is left out: the tokenizers differ"):
        assert "perplexity" not in veneer.evaluate(run, against=other).as_dict()["metrics"]


def test_rows_need_a_run_or_a_file(run: Path) -> None:
    base = str(run.parent / "base")
    with pytest.raises(UserError, match="no target is a run"):
        veneer.evaluate(base, against=base)
    with pytest.raises(UserError, match="has no base to be compared with"):
        veneer.evaluate(base)
    with pytest.raises(UserError, match="--memorisation 5: it is measured of a run"):
        veneer.evaluate(run, against=base, memorisation=5)


def test_what_does_not_apply_to_a_target_is_refused(run: Path, tmp_path: Path) -> None:
    base = str(run.parent / "base")
    rows = write_rows(tmp_path / "rows.jsonl", QUESTIONS)
    given: tuple[tuple[Any, dict[str, Any], str], ...] = (
        (run, {"against": base, "model": "m"}, "--model m: .* is not a server with several models"),
        (run, {"model": "m"}, "--model m: .* is not a server"),
        (
            run,
            {"against": base, "against_model": "m"},
            "--against-model m: .*base is not a server",
        ),
        (run, {"against_model": "m"}, "--against-model m: there is no --against"),
        (base, {"against": str(run), "force": True}, "--force does not apply"),
        (base, {"against": str(run), "base": base}, "--base does not apply"),
        (run, {"out": run / "evaluation.json"}, "it is the record of a run"),
        (base, {"against": str(run), "data": rows, "out": run / "evaluation.json"}, "it is the record of a run"),
    )
    for target, arguments, said in given:
        with pytest.raises(UserError, match=said):
            veneer.evaluate(target, **arguments)


def test_rows_that_the_other_run_was_trained_on_are_named(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(run, other)
    text = (run / "run.yaml").read_text()
    data = yaml.safe_load(text)
    data["data"]["train"] = data["data"]["validation"]
    data["data"]["validation"] = 0
    (other / "run.yaml").write_text(yaml.safe_dump(data))
    with notified(r"other was trained on \d of the \d rows"):
        veneer.evaluate(run, against=str(other), metrics=["exact_match"])
    with notified("whether it was trained on these rows is not known"):
        data["data"]["train"] = str(tmp_path / "gone.jsonl")
        (other / "run.yaml").write_text(yaml.safe_dump(data))
        veneer.evaluate(run, against=str(other), metrics=["exact_match"])


def test_a_gate_names_what_is_measured_alone_and_is_refused_before_a_model_is_loaded(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(run.parent)
    (run.parent / "mine.py").write_text("def is_short(sample):\n    return len(sample.answer) < 100\n")
    found = veneer.evaluate(run, metrics=["mine:is_short"], gate='"mine:is_short" >= 0.1')
    assert found.passed
    monkeypatch.setattr("veneer.api.evaluate.load_tuned", None)
    for gate, arguments in (
        ("rouge_l >= 0.5", {"metrics": ["exact_match"]}),
        ("forgetting <= 0.1", {"suites": "refusal_harmful"}),
        ("tool_names >= 0.5", {"metrics": ["exact_match"]}),
        ("difference(forgetting) >= 0", {"suites": "json_form"}),
    ):
        with pytest.raises(UserError, match="is not measured"):
            veneer.evaluate(run, gate=gate, **arguments)


@pytest.mark.parametrize(
    "asked", [{"suites": "json_form"}, {"memorisation": 2}, {"against": "base", "suites": "json_form"}]
)
def test_as_many_answers_are_given_as_were_announced(run: Path, asked: dict[str, Any], any_notice: None) -> None:
    told: list[list[int]] = []
    given = asked | ({"against": str(run.parent / "base")} if "against" in asked else {})
    veneer.evaluate(
        run,
        metrics=["exact_match"],
        on_begin=lambda answers: told.append([answers]),
        on_done=lambda done: told[-1].append(done),
        **given,
    )
    assert told
    assert all(sum(done) == total for total, *done in told), told


def test_a_wrong_name_is_one_message_with_the_nearest_run(run: Path, call: Call, tmp_path: Path) -> None:
    for arguments, said in (
        ([str(run.parent / "runn")], f"the nearest run is {run}"),
        ([str(run), "--against", str(run.parent / "bse")], "no run, adapter, model, .gguf file or address"),
        ([str(run), "--against", str(run.parent)], "the folder has no config.json"),
        ([str(run), "--against", "http://127.0.0.1:9"], "no OpenAI-compatible server answers there"),
        ([str(run), "--out", str(tmp_path / "no" / "x.json")], "the folder does not exist"),
        ([str(run), "--out", str(run / "ledger.json")], "was not written by this command"),
        ([str(run), "--against", "http://me:secret@127.0.0.1:9"], "holds a user, a password or a query"),
        ([str(run.parent / "base")], "it has no base to be compared with"),
    ):
        status, out, error = call("evaluate", *arguments)
        assert (status, out) == (2, "")
        assert said in " ".join(error.split()), arguments
        assert "Traceback" not in error
        assert "secret" not in error


# llama.cpp


def test_a_gguf_file_answers_rows_and_suites_in_llama_cpp(run: Path, tmp_path: Path, any_notice: None) -> None:
    pytest.importorskip("xllamacpp")
    made = veneer.export(str(run), tmp_path / "gguf", quant="f16")
    with notified("perplexity is left out: it reads losses"):
        found = veneer.evaluate(tmp_path / "gguf", against=str(run), suites="json_form")
    assert scores(found) == (1, 1)
    assert found.as_dict()["suites"]["scores"]["json_form"]["rows"] > 0
    file = tmp_path / "gguf" / made.file
    with pytest.raises(UserError, match="perplexity: it reads losses"):
        veneer.evaluate(file, against=str(run), metrics=["perplexity"])
    with pytest.raises(UserError, match="knowledge: it reads losses"):
        veneer.evaluate(file, against=str(run), suites="knowledge,json_form")
    # Without any tokenizer here, rows are read as turns.
    rows = write_rows(tmp_path / "rows.jsonl", QUESTIONS)
    alone = veneer.evaluate(file, data=rows, against=str(file), metrics=["exact_match"])
    assert scores(alone) == (1 / 3, 1 / 3)
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + bytes(40))
    with pytest.raises(UserError, match=r"broken\.gguf"):
        veneer.evaluate(broken, against=str(run))


# Servers


class Scripted(BaseHTTPRequestHandler):
    """Answers as its server's `script` says, after it has listed its models."""

    def do_GET(self) -> None:
        listed = {"data": [{"id": name} for name in self.server.models]}  # type: ignore[attr-defined]
        self.send(json.dumps(listed).encode())

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(body)  # type: ignore[attr-defined]
        self.server.keys.append(self.headers["Authorization"])  # type: ignore[attr-defined]
        self.server.script(self, body)  # type: ignore[attr-defined]

    def say(self, text: str) -> None:
        self.send(json.dumps({"choices": [{"message": {"content": text}, "finish_reason": "stop"}]}).encode())

    def send(self, body: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


class ScriptedServer(ThreadingHTTPServer):
    """A server whose answers a test decides."""

    models: tuple[str, ...] = ("m",)
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Scripted)
        self.asked: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.script: Callable[[Scripted, dict[str, Any]], None] = lambda handler, body: handler.say("please route")

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with ScriptedServer() as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def test_a_server_is_compared_with_a_run_and_with_a_server(run: Path, server: ScriptedServer, tmp_path: Path) -> None:
    with notified("perplexity is left out: it reads losses, which http://127.0.0.1"):
        found = veneer.evaluate(run, against=server.address)
    assert scores(found) == (1 / 4, 1)  # it says of four animals what one says
    assert {tuple(body["messages"][-1]) for body in server.asked} == {("role", "content")}
    assert all(body["temperature"] == 0 for body in server.asked)
    server.models = ("small", "large")
    server.script = lambda handler, body: handler.say("please route" if body["model"] == "large" else "no")
    rows = write_rows(tmp_path / "rows.jsonl", QUESTIONS)
    pair = {"against": server.address, "model": "large", "against_model": "small"}
    assert scores(veneer.evaluate(server.address, rows, metrics=["exact_match"], **pair)) == (0, 1)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="serves 2 models: small, large"):
        veneer.evaluate(server.address, rows, against=server.address, model="large")


def test_calls_that_a_server_takes_out_of_the_text_are_read(server: ScriptedServer, tmp_path: Path) -> None:
    called = {"name": "weather", "arguments": {"city": "Bern"}}
    tool = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
    answer = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": called}]}
    rows = [{"messages": [{"role": "user", "content": "Is it wet?"}, answer], "tools": [tool]}]
    path = write_rows(tmp_path / "calls.jsonl", rows)
    text = {"function": called | {"arguments": json.dumps(called["arguments"])}}
    message = {"choices": [{"message": {"content": None, "tool_calls": [text]}, "finish_reason": "tool_calls"}]}
    server.script = lambda handler, body: handler.send(json.dumps(message).encode())
    found = veneer.evaluate(server.address, path, against=server.address, metrics=["tool_calls"])
    assert scores(found, "tool_calls") == (1, 1)
    assert server.asked[0]["tools"] == [tool]


def slow(handler: Scripted, body: dict[str, Any]) -> None:
    time.sleep(1)


GARBAGE: dict[str, Callable[[Scripted, dict[str, Any]], None]] = {
    "it is no whole JSON, and begins with '<html>": lambda handler, body: handler.send(b"<html>busy</html>"),
    "the server answered {}": lambda handler, body: handler.send(b"{}"),
    "status 503: overloaded, after 3 tries": lambda handler, body: handler.send(b'{"error": "overloaded"}', 503),
    "it wants a key (status 401: who are you?)": lambda handler, body: handler.send(b'{"error": "who are you?"}', 401),
    "not those of an OpenAI-compatible server": lambda handler, body: handler.send(b'{"choices": []}'),
    "it lacks 'message'": lambda handler, body: handler.send(b'{"choices": [{"text": "a"}]}'),
    "it is no whole JSON, and begins with '{\"choices": lambda handler, body: handler.send(b'{"choices": [{"mess'),
    "it is empty": lambda handler, body: handler.send(b""),
    "no answer within 0.3 seconds, after 2 tries": slow,
    "it redirects to http://elsewhere.invalid": lambda handler, body: handler.send(
        b"", 307, Location="http://elsewhere.invalid"
    ),
}


@pytest.mark.parametrize("said", GARBAGE)
def test_a_server_that_gives_no_answer_fails_the_job_and_keeps_the_others(
    server: ScriptedServer, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str
) -> None:
    monkeypatch.setattr(servers, "TIMEOUT_SECONDS", 0.3)
    monkeypatch.setattr(client, "DELAYS", (0.0, 0.0))
    monkeypatch.setattr("veneer.release.certify.answers.SLOTS", 1)
    path = write_rows(tmp_path / "rows.jsonl", QUESTIONS)
    arguments = ("evaluate", server.address, "--against", server.address, "--data", path, "--metrics", "exact_match")

    def after_two(handler: Scripted, body: dict[str, Any]) -> None:
        if len(server.asked) < 3:
            handler.say("please route")
        else:
            GARBAGE[said](handler, body)

    server.script = after_two
    status, out, error = call(*arguments)
    assert (status, out) == (1, "")
    assert said in " ".join(error.split())
    assert "2 of 3 answers are kept" in error
    assert "Traceback" not in error
    server.asked.clear()
    server.script = lambda handler, body: handler.say("please route")
    status, _, error = call(*arguments)
    assert status == 0, error
    asked = [body["messages"][-1]["content"] for body in server.asked]
    assert asked.count(QUESTIONS[2]["prompt"]) == 2
    assert asked.count(QUESTIONS[0]["prompt"]) == 1, "its first answer was kept"
    assert not list((cache_folder() / "evaluations").glob("*"))


@pytest.mark.parametrize(
    ("listed", "said"),
    [
        ((b"<html>welcome</html>", 200, {}), "it is no whole JSON"),
        ((b'{"data": []}', 200, {}), "it lists no models"),
        (
            (b"", 302, {"Location": "http://elsewhere.invalid/"}),
            "it redirects to http://elsewhere.invalid/, which is not",
        ),
        ((b'{"data": [3]}', 200, {}), "its answer is of another form"),
    ],
)
def test_an_address_without_a_server_is_refused(
    server: ScriptedServer, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, listed: Any, said: str
) -> None:
    body, code, headers = listed
    monkeypatch.setattr(Scripted, "do_GET", lambda self: self.send(body, code, **headers))
    path = write_rows(tmp_path / "rows.jsonl", QUESTIONS)
    status, out, error = call("evaluate", server.address, "--against", server.address, "--data", path)
    assert (status, out) == (2, "")
    assert said in " ".join(error.split())


def test_a_busy_server_is_asked_again_with_the_users_key(
    server: ScriptedServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    monkeypatch.setattr(client, "DELAYS", (0.0, 0.0))

    def every_other(handler: Scripted, body: dict[str, Any]) -> None:
        if len(server.asked) % 2:
            handler.send(b'{"error": "slow down"}', 429)
        else:
            handler.say("please route")

    server.script = every_other
    monkeypatch.setattr("veneer.release.certify.answers.SLOTS", 1)
    path = write_rows(tmp_path / "rows.jsonl", QUESTIONS)
    out = tmp_path / "result.json"
    found = veneer.evaluate(server.address, path, against=server.address, metrics=["exact_match"], out=out)
    assert scores(found) == (1, 1)
    assert len(server.asked) == 4 * len(QUESTIONS)
    assert set(server.keys) == {"Bearer sk-very-secret"}
    assert "sk-very" not in "".join(file.read_text() for file in tmp_path.iterdir())
    server.keys.clear()
    monkeypatch.setattr(client, "is_loopback", lambda host: False)
    veneer.evaluate(server.address, path, against=server.address, metrics=["exact_match"])
    assert set(server.keys) == {None}, "it is not sent in the clear"


def test_answers_of_another_model_at_the_same_address_are_not_gone_on_with(
    server: ScriptedServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("veneer.release.certify.answers.SLOTS", 1)
    path = write_rows(tmp_path / "rows.jsonl", QUESTIONS)

    def fails_once(handler: Scripted, body: dict[str, Any]) -> None:
        if len(server.asked) < 3:
            handler.say("half a pair: \ud83d")
        else:
            handler.send(b"<html>")

    server.script = fails_once
    pair = {"against": server.address, "metrics": ["exact_match"]}
    with pytest.raises(veneer.JobError, match="2 of 3 answers are kept"):
        veneer.evaluate(server.address, path, **pair)  # type: ignore[arg-type]
    server.asked.clear()
    server.models = ("n",)
    server.script = lambda handler, body: handler.say("please route")
    assert scores(veneer.evaluate(server.address, path, **pair)) == (1, 1)  # type: ignore[arg-type]
    assert len(server.asked) == 2 * len(QUESTIONS)


def test_a_command_that_is_interrupted_does_not_wait_for_a_server(server: ScriptedServer, tmp_path: Path) -> None:
    ended = threading.Event()

    def never(handler: Scripted, body: dict[str, Any]) -> None:
        ended.wait(60)

    server.script = never
    path = write_rows(tmp_path / "rows.jsonl", QUESTIONS)
    words = [*(sys.executable, "-m", "veneer", "evaluate", server.address, "--against", server.address), "--data", path]
    with subprocess.Popen(words, stderr=subprocess.PIPE, stdout=subprocess.PIPE) as command:
        while not server.asked and command.poll() is None:
            time.sleep(0.05)
        command.send_signal(signal.SIGINT)
        began = time.monotonic()
        command.wait(40)
        ended.set()
    assert time.monotonic() - began < 20
    assert command.returncode == 130


def test_rows_that_cannot_be_used_are_refused_without_a_tokenizer_too(server: ScriptedServer, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [*QUESTIONS, {"prompt": "what", "completion": 3.5}])
    with pytest.raises(UserError, match=r"rows\.jsonl:4"):
        veneer.evaluate(server.address, path, against=server.address, metrics=["exact_match"])
