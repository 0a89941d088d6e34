"""What is evaluated: a run, a checkpoint, an adapter, a base, a merged folder, a GGUF file or a server, in pairs."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

import veneer
from tests.support.notices import notified
from tests.support.runs import write_rows
from veneer.config import UserError
from veneer.config.cache import cache_folder
from veneer.release.certify import servers

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
    with pytest.raises(UserError, match="not a server with several models"):
        veneer.evaluate(run, against=base, model="m")


def test_a_wrong_name_is_one_message_with_the_nearest_run(run: Path, call: Call, tmp_path: Path) -> None:
    for arguments, said in (
        ([str(run.parent / "runn")], f"the nearest run is {run}"),
        ([str(run), "--against", str(run.parent / "bse")], "no run, adapter, model, .gguf file or address"),
        ([str(run), "--against", str(run.parent)], "the folder has no config.json"),
        ([str(run), "--against", "http://127.0.0.1:9"], "no OpenAI-compatible server answers there"),
        ([str(run), "--out", str(tmp_path / "no" / "x.json")], "the folder does not exist"),
        ([str(run), "--out", str(run / "ledger.json")], "was not written by this command"),
    ):
        status, out, error = call("evaluate", *arguments)
        assert (status, out) == (2, "")
        assert said in " ".join(error.split()), arguments
        assert "Traceback" not in error


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
        self.script: Callable[[Scripted, dict[str, Any]], None] = lambda handler, body: handler.say("please route")

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with ScriptedServer() as running:
        thread = threading.Thread(target=running.serve_forever)
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
    time.sleep(2)


GARBAGE: dict[str, Callable[[Scripted, dict[str, Any]], None]] = {
    "it is no whole JSON, and begins with '<html>": lambda handler, body: handler.send(b"<html>busy</html>"),
    "the server answered {}": lambda handler, body: handler.send(b"{}"),
    'the server answered {"error"': lambda handler, body: handler.send(b'{"error": "overloaded"}', 503),
    "not those of an OpenAI-compatible server": lambda handler, body: handler.send(b'{"choices": []}'),
    "it lacks 'message'": lambda handler, body: handler.send(b'{"choices": [{"text": "a"}]}'),
    "it is no whole JSON, and begins with '{\"choices": lambda handler, body: handler.send(b'{"choices": [{"mess'),
    "it is empty": lambda handler, body: handler.send(b""),
    "none within 0.5 seconds": slow,
    "it redirects to http://elsewhere.invalid": lambda handler, body: handler.send(
        b"", 307, Location="http://elsewhere.invalid"
    ),
}


@pytest.mark.parametrize("said", GARBAGE)
def test_a_server_that_gives_no_answer_fails_the_job_and_keeps_the_others(
    server: ScriptedServer, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str
) -> None:
    monkeypatch.setattr(servers, "TIMEOUT_SECONDS", 0.5)
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
