"""veneer judge with a judge model: a real server whose judge follows a rule, and all that a server may do wrong."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from email.message import Message
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest

import veneer
from tests.support.judge_server import Handler, JudgeServer, answers_folder, judge_server, longer, shown
from veneer.api.judge import WhichAnswers
from veneer.config import JobError, RunFolder, UserError
from veneer.evaluation.compare import Evaluation, Score
from veneer.evaluation.metrics import measure
from veneer.evaluation.metrics.metric import Sample, ScoredRows
from veneer.release.certify import client
from veneer.release.certify.transport import Reply
from veneer.report.run_page import write_run_page

Call = Callable[..., tuple[int, str, str]]
PAIRS = [("short", "a longer answer")] * 14 + [("quite a long answer", "short")] * 4 + [("same", "same")] * 2
QUESTIONS = 2 * 18  # equal answers are not asked about


@pytest.fixture
def server() -> Iterator[JudgeServer]:
    with judge_server() as running:
        yield running


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return answers_folder(tmp_path / "run", PAIRS)


@pytest.fixture(autouse=True)
def _quick_and_without_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "DELAYS", (0.0, 0.0))
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def kept(run: Path) -> list[dict[str, Any]]:
    (file,) = (run / "evaluations").glob("judgments-*.jsonl")
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_judge_is_asked_in_both_positions_and_its_win_rate_kept(call: Call, run: Path, server: JudgeServer) -> None:
    status, out, _ = call("judge", str(run), "--endpoint", server.address, "--json")
    assert status == 0
    result = json.loads(out)
    assert (result["rows"], result["wins"], result["ties"], result["losses"]) == (20, 14, 2, 4)
    assert result["win_rate"]["value"] == pytest.approx(15 / 20)
    assert 0.5 < result["win_rate"]["low"] < 0.75 < result["win_rate"]["high"] < 1
    assert result["verdict"] == "better"
    assert result["disagreement"]["value"] == 0
    assert result["first_shown_wins"]["value"] == 0.5
    assert result["longer_wins"]["value"] == 1
    assert (result["equal_answers"], result["unreadable"]) == (2, 0)
    assert result["judge"]["model"] == "rule-judge"
    assert "{criterion}" in result["judge"]["template"]
    assert len(server.asked) == QUESTIONS
    assert {body["temperature"] for body in server.asked} == {0}
    assert json.loads(Path(result["file"]).read_text()) == result
    # It is in the run's record and on its page, and the rest of the record is as it was.
    record = json.loads((run / "evaluation.json").read_text())
    assert record["rows"] == 20
    assert [one["win_rate"] for one in record["win_rates"].values()] == [result["win_rate"]]
    assert "rule-judge" in write_run_page(RunFolder(run)).read_text()
    # The same call asks nothing more, and says the same.
    status, out, _ = call("judge", str(run), "--endpoint", f"{server.address}/v1/", "--json")
    assert (status, json.loads(out), len(server.asked)) == (0, result, QUESTIONS)


def test_a_person_reads_the_result(call: Call, run: Path, server: JudgeServer) -> None:
    status, out, err = call("judge", str(run), "--endpoint", server.address)
    assert (status, err) == (0, "")
    for told in ("win rate  75%", "tuned against base", "14 won, 2 tied, 4 lost", "first wins 50%", "rule-judge"):
        assert told in out
    assert "verdict   better" in out


def test_a_judge_that_always_says_a_has_told_nothing_apart(call: Call, run: Path, server: JudgeServer) -> None:
    server.rule = lambda a, b: "verdict: A"
    result = json.loads(call("judge", str(run), "--endpoint", server.address, "--json")[1])
    assert (result["wins"], result["ties"], result["losses"]) == (0, 20, 0)
    assert result["win_rate"]["value"] == 0.5
    assert result["verdict"] != "better"
    assert result["disagreement"]["value"] == 1
    assert result["first_shown_wins"]["value"] == 1


def test_garbage_is_no_result_and_ends_early(call: Call, run: Path, server: JudgeServer) -> None:
    server.rule = lambda a, b: "I like both.\nverdict: A or B"
    status, out, err = call("judge", str(run), "--endpoint", server.address, "--at-once", "1", "--json")
    assert (status, out) == (1, "")
    assert f"4 of {QUESTIONS} judgments have no verdict" in err
    assert "verdict: A or B" in err
    assert len(server.asked) <= 5
    server.rule = longer  # those without a verdict are asked again
    assert call("judge", str(run), "--endpoint", server.address)[0] == 0


def test_a_few_judgments_without_a_verdict_are_counted(call: Call, tmp_path: Path, server: JudgeServer) -> None:
    run = answers_folder(tmp_path / "other", [*PAIRS, ("odd", "odder")])
    server.rule = lambda a, b: "hm" if a == "odd" else longer(a, b)
    status, out, _ = call("judge", str(run), "--endpoint", server.address, "--json")
    result = json.loads(out)
    assert status == 0
    assert (result["rows"], result["wins"], result["unreadable"]) == (20, 14, 1)

    # A question that the server refuses, such as one that is too long, is one of them.
    def refuse(handler: Handler) -> bool:
        is_odd = handler.command == "POST" and shown(server.asked[-1])[0] == "odd"
        if is_odd:
            handler.send({"error": {"message": "maximum context length"}}, 400)
        return is_odd

    server.before = refuse
    other = call("judge", str(run), "--endpoint", server.address, "--at-once", "1", "--json", "--criterion", "brevity")
    assert json.loads(other[1])["unreadable"] == 1
    assert "maximum context length" in "".join(file.read_text() for file in (run / "evaluations").glob("*.jsonl"))


def test_a_busy_server_is_asked_again(call: Call, run: Path, server: JudgeServer) -> None:
    turned_away: list[float] = []

    def busy(handler: Handler) -> bool:
        if len(turned_away) >= 2 or handler.command == "GET":
            return False
        turned_away.append(time.monotonic())
        if len(turned_away) == 1:
            handler.send({"error": "slow down"}, 429, Retry_After="0.2")
        else:
            handler.send(b"<html>bad gateway</html>", 502)
        return True

    server.before = busy
    status, out, _ = call("judge", str(run), "--endpoint", server.address, "--at-once", "1", "--json")
    assert (status, json.loads(out)["wins"]) == (0, 14)
    assert turned_away[1] - turned_away[0] >= 0.2
    assert len(server.asked) == QUESTIONS + 2


def failing(after: int, reply: Callable[[Handler], None]) -> Callable[[Handler], bool]:
    """Have a server fail in some way once it has answered so many questions."""

    def before(handler: Handler) -> bool:
        if len(handler.server.asked) <= after:
            return False
        reply(handler)
        return True

    return before


@pytest.mark.parametrize(
    ("reply", "told"),
    [
        (
            lambda handler: handler.send({"error": {"message": "overloaded"}}, 503),
            "status 503: overloaded, after 3 tries",
        ),
        (lambda handler: handler.send({}, 429, Retry_After="9999"), "it asks to wait 9999 seconds"),
        (
            lambda handler: handler.send(b"", 307, Location="http://127.0.0.1:1/else"),
            "redirects to http://127.0.0.1:1/else",
        ),
        (lambda handler: handler.send(b"<html>hello</html>"), "no whole JSON, and begins with '<html>hello"),
        (lambda handler: handler.send({"choices": []}), "not that of an OpenAI-compatible server"),
        (lambda handler: handler.send({"message": "no such model"}, 404), "status 404: no such model"),
        (lambda handler: time.sleep(1), "no answer within 0.3 seconds"),
        (lambda handler: handler.connection.close(), "after 3 tries"),
    ],
)
def test_a_server_that_fails_is_one_message_and_what_was_judged_is_kept(
    call: Call, run: Path, server: JudgeServer, reply: Callable[[Handler], None], told: str
) -> None:
    server.before = failing(10, reply)
    command = ("judge", str(run), "--endpoint", server.address, "--at-once", "2", "--json", "--timeout", "0.3")
    status, out, err = call(*command)
    assert (status, out) == (1, "")
    assert told in err
    assert len(kept(run)) == 10
    assert not list((run / "evaluations").glob("win-rate-*"))
    server.before = lambda handler: False
    server.asked.clear()
    (file,) = (run / "evaluations").glob("judgments-*.jsonl")
    file.write_text(file.read_text() + '{"pair": "cut')  # as a process that is killed leaves it
    status, out, _ = call(*command)
    assert (status, json.loads(out)["wins"]) == (0, 14)
    assert len(server.asked) == QUESTIONS - 10
    assert len(kept(run)) == QUESTIONS


@pytest.mark.parametrize(
    ("reply", "told"),
    [
        (lambda handler: handler.send(b"", 302, Location="http://127.0.0.1:1/v1/models"), "redirects to"),
        (lambda handler: handler.send(b"hello"), "no whole JSON, and begins with 'hello"),
        (lambda handler: handler.send({"models": []}), "no OpenAI-compatible server"),
        (lambda handler: handler.send({"error": "who are you?"}, 401), "wants a key"),
        (lambda handler: time.sleep(1), "no answer within 0.3 seconds"),
    ],
)
def test_an_address_without_a_judge_is_refused(
    call: Call, run: Path, server: JudgeServer, reply: Callable[[Handler], None], told: str
) -> None:
    server.before = failing(-1, reply)
    status, _, err = call("judge", str(run), "--endpoint", server.address, "--timeout", "0.3")
    assert status == 2
    assert told in err
    assert not (run / "evaluations").exists()


def test_the_key_goes_to_the_server_and_nowhere_else(
    call: Call, run: Path, server: JudgeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = "sk-very-secret"
    monkeypatch.setenv("OPENAI_API_KEY", key)
    status, out, err = call("judge", str(run), "--endpoint", server.address, "--json")
    assert status == 0
    assert {headers["Authorization"] for headers in server.headers} == {f"Bearer {key}"}
    written = "".join(file.read_text() for file in run.rglob("*") if file.is_file())
    assert key not in out + err + written
    server.before = failing(-1, lambda handler: handler.send({"error": {"message": f"wrong key: {key}"}}, 401))
    status, out, err = call("judge", str(run), "--endpoint", server.address)
    assert status == 2
    assert "refuses the key (status 401: wrong key: [key])" in err
    monkeypatch.setenv("OPENAI_API_KEY", "sk-two\nlines")
    status, out, err = call("judge", str(run), "--endpoint", server.address)
    assert status == 2
    assert "OPENAI_API_KEY: holds characters" in err
    assert "sk-two" not in err


def test_the_key_is_not_sent_in_the_clear(server: JudgeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    monkeypatch.setattr(client, "is_loopback", lambda host: False)
    client.Client(server.address).find_model(None)
    assert server.headers[-1]["Authorization"] is None


def test_questions_are_asked_several_at_once(run: Path, server: JudgeServer) -> None:
    together = threading.Barrier(3, timeout=20)
    server.rule = lambda a, b: (together.wait(), longer(a, b))[1]
    judged = veneer.judge(run, server.address, at_once=3)
    assert judged.rate.wins == 14


def test_the_criterion_and_the_right_answer_are_shown(
    call: Call, run: Path, server: JudgeServer, tmp_path: Path
) -> None:
    (tmp_path / "criterion.txt").write_text("Prefer {braces} and brevity.\n")
    given = ("--criterion", str(tmp_path / "criterion.txt"), "--with-reference", "--max-new-tokens", "7", "--rows", "3")
    result = json.loads(call("judge", str(run), "--endpoint", server.address, "--json", *given)[1])
    assert result["judge"]["criterion"] == "Prefer {braces} and brevity."
    assert len(server.asked) == 6
    for body in server.asked:
        assert "Prefer {braces} and brevity." in body["messages"][0]["content"]
        assert "<right_answer>\nright " in body["messages"][0]["content"]
        assert body["max_tokens"] == 7


def test_more_rows_ask_about_these_alone(run: Path, server: JudgeServer) -> None:
    assert veneer.judge(run, server.address, which=WhichAnswers(rows=5)).rate.rows == 5
    assert len(server.asked) == 10
    assert veneer.judge(run, server.address).rate.rows == 20
    assert len(server.asked) == QUESTIONS


def test_two_runs_are_compared_on_the_rows_that_both_answered(run: Path, server: JudgeServer, tmp_path: Path) -> None:
    other = answers_folder(tmp_path / "other", [("", "longest of all the answers") for _ in PAIRS[:5]])
    judged = veneer.judge(run, server.address, which=WhichAnswers(against=str(other)))
    assert (judged.rate.rows, judged.rate.losses) == (5, 5)
    assert judged.facts["first"] == f"{other} tuned"
    with pytest.raises(UserError, match="both are the same answers"):
        veneer.judge(run, server.address, which=WhichAnswers(answers="tuned,tuned"))


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ((), "Exactly one of --endpoint, --page and --votes"),
        (("--endpoint", "ADDRESS", "--votes", "a.json"), "Exactly one of"),
        (("--endpoint", "localhost:80"), "not an address"),
        (("--endpoint", "http://me:secret@localhost"), "a user, a password or a query"),
        (("--endpoint", "http://127.0.0.1:1"), "Connection refused"),
        (("--endpoint", "ADDRESS", "--model", "other"), "does not serve it\n  fix: name one of: rule-judge"),
        (
            ("--endpoint", "ADDRESS", "--answers", "base,best"),
            "holds no answer `best`\n  fix: --answers takes two of: base, tuned",
        ),
        (("--endpoint", "ADDRESS", "--answers", "base"), "not two names"),
        (("--endpoint", "ADDRESS", "--samples", "none.jsonl"), "no such file"),
        (("--endpoint", "ADDRESS", "--against", "none"), "no such file"),
        (("--endpoint", "ADDRESS", "--criterion", "none.txt"), "no such file"),
        (("--endpoint", "ADDRESS", "--criterion", " "), "--criterion: 0 characters"),
        (("--endpoint", "ADDRESS", "--rows", "1"), "--rows"),
        (("--endpoint", "ADDRESS", "--seed", "1"), "--seed"),
        (("--page", "page.html", "--model", "a"), "--model"),
        (("--page", "page.html", "--at-once", "8"), "--at-once"),
        (("--votes", "votes.json", "--timeout", "9"), "--timeout"),
        (("--votes", "votes.json", "--max-new-tokens", "9"), "--max-new-tokens"),
        (("--votes", "votes.json", "--criterion", "a"), "--criterion"),
    ],
)
def test_bad_input_is_one_message(
    call: Call, run: Path, server: JudgeServer, given: tuple[str, ...], told: str
) -> None:
    words = [server.address if word == "ADDRESS" else word for word in given]
    status, _, err = call("judge", str(run), *words)
    assert status == 2
    assert told in err
    assert "secret" not in err
    assert "Traceback" not in err
    assert not (run / "evaluations").exists()


def test_a_run_without_answers_says_what_to_do(call: Call, run: Path, server: JudgeServer) -> None:
    (run / "samples.jsonl").unlink()
    status, _, err = call("judge", str(run), "--endpoint", server.address)
    assert status == 2
    assert "evaluate the run first" in err
    assert call("judge", str(run / "none"), "--endpoint", server.address)[0] == 2


def test_damaged_judgments_are_named(run: Path, server: JudgeServer) -> None:
    judged = veneer.judge(run, server.address)
    file = Path(judged.facts["judgments_file"])
    file.write_text("[]\n" + file.read_text())
    with pytest.raises(UserError, match=r"judgments-rule-judge-\w+\.jsonl:1: damaged"):
        veneer.judge(run, server.address)


def test_ctrl_c_ends_it_at_once_and_keeps_what_is_there(run: Path, server: JudgeServer) -> None:
    def stop(done: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        veneer.judge(run, server.address, at_once=1, on_done=stop)
    assert len(kept(run)) == 1


def test_an_error_of_the_job_is_a_job_error(run: Path, server: JudgeServer) -> None:
    server.rule = lambda a, b: ""
    with pytest.raises(JobError, match="an empty reply"):
        veneer.judge(run, server.address)


def test_rows_that_share_a_group_are_judged_as_such(tmp_path: Path, server: JudgeServer) -> None:
    places = [f"rows.jsonl:{n}" for n in range(1, 21)]
    answers = [("base", "the tuned") if n < 14 else ("the base", "tuned") for n in range(20)]
    scores = []
    for side in range(2):
        samples = [Sample(place, "question", "right", pair[side]) for place, pair in zip(places, answers)]
        scores.append(Score(measure(ScoredRows(samples)), samples, 20))
    groups = {place: str(n // 2) for n, place in enumerate(places)}
    run = answers_folder(tmp_path / "run", answers)
    for grouped in ({}, groups):
        lines = Evaluation(scores[0], scores[1], groups=grouped).samples()
        (run / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        found = veneer.judge(run, server.address).as_dict()
        assert (found["wins"], found["losses"], found["groups"]) == (14, 6, 10 if grouped else None)


@pytest.mark.parametrize(
    ("asked", "seconds"),
    [("3", 3), ("0.5", 0.5), (formatdate(1090, usegmt=True), 90), ("soon", 0), ("", 0), ("-1", 0)],
)
def test_how_long_a_busy_server_asks_to_wait(asked: str, seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.time", lambda: 1000.0)
    headers = Message()
    headers["Retry-After"] = asked
    assert client._wait(Reply(429, headers, b"")) == seconds
