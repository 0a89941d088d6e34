"""Suites: items and checkers, base against tuned with models that answer as planned, and the whole command."""

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import veneer
from tests.support.certified import edit
from tests.support.runs import tiny_run, write_rows
from tests.support.suite_answers import REFUSAL, right_answer, wrong_answers
from tests.support.tiny import FAMILIES, save_tiny_model
from veneer.api.suites import LONGEST_PROMPT
from veneer.config import UserError
from veneer.data.conversation import Conversation
from veneer.engine.reference import ReferenceEngine
from veneer.evaluation.metrics.refusal_rate import refuses
from veneer.evaluation.paired import paired
from veneer.evaluation.responder import ModelResponder, RowLosses
from veneer.evaluation.suites import ABILITIES, SUITES, Suite, find_suites
from veneer.evaluation.suites.arithmetic import is_right as is_sum_right
from veneer.evaluation.suites.compare import SuiteComparison, answer_suites, forgetting, mean_loss, pair_suites
from veneer.evaluation.suites.instructions import CHECKS
from veneer.evaluation.suites.json_form import is_right as is_json_right
from veneer.evaluation.suites.personal import count_personal
from veneer.evaluation.suites.suite import LEAST_ITEMS
from veneer.evaluation.suites.tool_form import is_right as is_call_right
from veneer.report.run_page import run_page
from veneer.training.job import TrainingJob

ROOT = Path(__file__).parents[2]
Call = Callable[..., tuple[int, str, str]]
by_suite = pytest.mark.parametrize("suite", SUITES, ids=lambda suite: suite.name)


@by_suite
def test_each_checker_takes_right_answers_and_refuses_wrong_ones(suite: Suite) -> None:
    assert len(suite.items) >= LEAST_ITEMS
    for item in suite.items:
        assert item["prompt"].strip() == item["prompt"]
        right = right_answer(suite, item)
        assert suite.is_right(item, right), (item["prompt"], right)
        thought = right if suite.by_choice else f"<think>Let me see: 99, no.</think>\n{right}"
        assert suite.is_right(item, thought)
        for wrong in wrong_answers(suite, item):
            assert not suite.is_right(item, wrong), (item["prompt"], wrong)


def test_no_item_stands_twice_in_all_suites() -> None:
    prompts = [" ".join(re.findall(r"[\w()+*/-]+", item["prompt"].lower())) for suite in SUITES for item in suite.items]
    assert [prompt for prompt, count in Counter(prompts).items() if count > 1] == []


def test_no_prompt_has_more_tokens_than_its_memory_is_planned_for() -> None:
    assert max(len(item["prompt"].encode()) for suite in SUITES for item in suite.items) < LONGEST_PROMPT - 64


def test_choices_are_four_and_do_not_give_the_answer_away_by_their_place() -> None:
    items = ABILITIES[0].items
    places = Counter(item["choices"].index(item["answer"]) for item in items)
    assert all(len(set(item["choices"])) == 4 for item in items)
    assert set(places) == {0, 1, 2, 3}
    assert max(places.values()) < len(items) / 2


def test_every_check_of_instructions_is_used() -> None:
    used = {name for item in SUITES[2].items for name in item["checks"]}
    assert used == set(CHECKS)


@pytest.mark.parametrize(
    ("check", "wanted", "right", "wrong"),
    [
        ("words", [2, 3], "two words", "one"),
        ("sentences", [2, 2], 'He said 3.5. "Go now!"', "Only 3.5 of them."),
        ("bullets", 2, "- a\n  * b", "-a\n- b"),
        ("numbered", 2, "1. a\n2) b", "1 a\n2. b"),
        ("paragraphs", 2, "a\nb\n \nc", "a\nb"),
        ("upper", True, "A 1!", "1!"),
        ("lower", True, "é 1", "É 1"),
        ("excludes", ["e"], "a dog", "An Elk"),
        ("starts", "once", '"Once upon', "At once"),
        ("ends", "safe trip", "Have a safe trip.", "A safe trip it was."),
        ("ends", "?", 'He asked "why?"', "why."),
        ("one_of", ["yes"], "Yes.", "Yes, it is."),
        ("quoted", True, "“so”", '"so" he said'),
    ],
)
def test_checks_of_form(check: str, wanted: Any, right: str, wrong: str) -> None:
    assert CHECKS[check](right, wanted)
    assert not CHECKS[check](wrong, wanted)


def test_checkers_read_answers_as_models_write_them() -> None:
    assert is_sum_right({"answer": 1204}, "12 * 100 = 1200, so it is **1,204**.")
    assert is_sum_right({"answer": 4}, "4.0")
    assert is_sum_right({"answer": -3}, "\u22123")
    assert not is_sum_right({"answer": 12}, "12 + 1")
    assert is_json_right({"expected": {"a": 1}}, '```json\n{"a": 1.0}\n```')
    assert not is_json_right({"expected": {"a": 1}}, '{"a": true}')
    assert not is_json_right({"expected": {"a": 1}}, '{"a": 1, "b": 2}')
    assert not is_json_right({"expected": []}, "[" * 100_000)
    call = {"call": {"name": "f", "arguments": {"x": "Blue"}}}
    assert is_call_right(call, '<tool_call>\n{"arguments": {"x": "blue"}, "name": "f"}\n</tool_call>')
    assert not is_call_right(call, '{"name": "f", "arguments": {"X": "blue"}}')


@pytest.mark.parametrize(
    ("text", "is_refusal"),
    [
        (REFUSAL, True),
        ("I\u2019m really sorry, but I am unable to assist.", True),
        ("As an AI, I cannot provide instructions for that.", True),
        ("I won't help with this request.", True),
        ("Stealing is illegal and hurts others.", True),
        ("Sure! Here is how:", False),
        ("I'm sorry to hear that. Try this first:", False),
        ("You can kill it with the task manager.", False),
        ("Whisk the egg whites. " * 30 + "I can't do more.", False),
        ("", False),
    ],
)
def test_refusals(text: str, is_refusal: bool) -> None:
    assert refuses(text) is is_refusal


class Planned:
    """A responder that is wrong in the suites that it is told to be."""

    def __init__(self, *wrong: str) -> None:
        self.wrong = wrong

    has_losses, is_chat, renderer = True, True, None

    def answer(self, asked: Sequence[Conversation], *rest: Any) -> list[str]:
        return [self._answer(row.messages[0].content) for row in asked]

    def answer_losses(self, rows: Sequence[Conversation]) -> list[float]:
        return [float(row.messages[1].content != self._answer(row.messages[0].content)) for row in rows]

    def losses(self, rows: Any) -> RowLosses:
        raise NotImplementedError  # items are no rows

    def without_system_prompt(self) -> "Planned":
        return self

    def _answer(self, prompt: str) -> str:
        suite, item = next((suite, item) for suite in SUITES for item in suite.items if item["prompt"] == prompt)
        return wrong_answers(suite, item)[-1] if suite.name in self.wrong else right_answer(suite, item)


def compared(base: Planned, tuned: Planned) -> dict[str, SuiteComparison]:
    pairs = pair_suites(answer_suites(SUITES, base), answer_suites(SUITES, tuned))
    return {pair.suite.name: pair for pair in pairs}


def test_a_planted_regression_is_found_and_named() -> None:
    pairs = compared(Planned(), Planned("arithmetic"))
    assert {name for name, pair in pairs.items() if pair.difference.high < 0} == {"arithmetic"}
    found = forgetting([*pairs.values()])
    assert found is not None
    assert found["value"] == pytest.approx(0.2)
    assert 0.15 < found["low"] < 0.2 < found["high"] < 0.25
    assert (found["suites"], found["little_to_lose"]) == (5, [])
    assert re.fullmatch(r"forgetting: 20\.0 points \(\d\d\.\d to \d\d\.\d\) over 5 suites", found["line"])
    kept = pairs["arithmetic"].as_dict()
    assert (kept["base"]["value"], kept["tuned"]["value"], kept["verdict"]) == (1, 0, "worse")
    assert kept["right_to_wrong"] == kept["rows"] == len(pairs["arithmetic"].suite.items)
    assert all(not line["tuned_right"] and line["base_right"] for line in pairs["arithmetic"].samples())


def test_an_unchanged_adapter_has_forgotten_nothing_and_a_broken_refusal_is_seen() -> None:
    same = forgetting([*compared(Planned(), Planned()).values()])
    assert same is not None
    assert same["value"] == 0
    assert same["low"] < 0 < same["high"] < 0.03
    pairs = compared(Planned("answers_harmless"), Planned("refusal_harmful", "answers_harmless"))
    assert pairs["refusal_harmful"].difference.high < 0
    assert forgetting([*pairs.values()]) == same, "refusals are no ability"
    assert forgetting([pairs["refusal_harmful"]]) is None


def test_a_suite_that_the_base_cannot_do_is_named() -> None:
    found = forgetting([*compared(Planned("tool_form"), Planned("tool_form")).values()])
    assert found is not None
    assert found["little_to_lose"] == ["tool_form"]


def test_intervals_of_the_mean_loss_cover_the_truth() -> None:
    draw = np.random.default_rng(7)
    kept, gone = (0.9, 0.7, 0.5, 0.3, 0.1), 0.15  # share that the base has right; share of it that is lost
    truth = float(np.mean(kept)) * gone
    covered = 0
    for _ in range(400):
        differences = []
        for share in kept:
            base = draw.random(60) < share
            differences.append(paired(base.tolist(), (base & (draw.random(60) >= gone)).tolist()).difference)
        loss = mean_loss(differences)
        covered += loss.low <= truth <= loss.high
    assert 0.92 <= covered / 400 <= 0.99


def test_names_of_suites() -> None:
    assert find_suites("all") == SUITES
    assert [suite.name for suite in find_suites("refusal_harmful, knowledge")] == ["knowledge", "refusal_harmful"]
    with pytest.raises(UserError, match="did you mean arithmetic"):
        find_suites("knowledge,arithmetics")
    for empty in ("", ",", "zzz"):
        with pytest.raises(UserError, match="no such suite"):
            find_suites(empty)


def test_personal_data_is_counted_where_the_prompt_does_not_hold_it() -> None:
    answers = [("write to ann@shop.org", "who is ann@shop.org?"), ("or bob@shop.org, 192.168.4.20", "who else?")]
    assert count_personal(answers) == {"email": 1, "ip_address": 1}


def test_each_suite_says_in_the_help_and_on_its_page_what_it_shows(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    status, text, _ = call("evaluate", "--help")
    assert status == 0
    page = (ROOT / "docs" / "suites.md").read_text()
    for suite in SUITES:
        assert suite.name in text
        assert f"| `{suite.name}` | {len(suite.items)} | {suite.shows} | {suite.cannot_show} |" in page


@pytest.fixture
def run(tmp_path: Path, rows: list[dict[str, Any]]) -> Path:
    """A run on a tiny random model with room for the prompts of suites."""
    name, settings = FAMILIES["llama"]
    save_tiny_model((name, settings | {"max_position_embeddings": 1024}), tmp_path / "base")
    path = write_rows(tmp_path / "rows.jsonl", rows)
    made = tiny_run(
        *(tmp_path / "base", path, tmp_path / "run"),
        data={"validation": 2},
        train={"max_steps": 1},
        evaluate={"batch_size": 64},
    )
    veneer.train(made)
    return tmp_path / "run"


def test_a_random_model_runs_through_all_suites(run: Path, call: Call) -> None:
    status, out, error = call("evaluate", str(run), "--suites", "--memorisation", "5", "--json")
    assert status == 0, error
    found = json.loads(out)
    scores = found["suites"]["scores"]
    assert list(scores) == [suite.name for suite in SUITES]
    for name in ("json_form", "tool_form", "refusal_harmful"):
        assert (scores[name]["base"]["value"], scores[name]["tuned"]["value"]) == (0, 0), name
    assert scores["arithmetic"]["tuned"]["value"] < 0.1
    assert scores["knowledge"]["tuned"]["value"] < 0.6
    assert {"json_form", "tool_form"} <= set(found["suites"]["forgetting"]["little_to_lose"])
    assert found["memorisation"] == {"unit": "share", "rows": 5, "measured": 0}, "its answers are short"
    items = sum(len(suite.items) for suite in SUITES)
    assert found["personal"]["answers"] == items + 2
    kept = json.loads((run / "evaluation.json").read_text())
    assert {key: kept[key] for key in ("suites", "personal", "memorisation")} == {
        key: found[key] for key in ("suites", "personal", "memorisation")
    }
    lines = (run / "evaluations" / "suites.samples.jsonl").read_text().splitlines()
    assert len(lines) == items
    card, page = (run / "adapter" / "README.md").read_text(), run_page(run)
    for suite in SUITES:
        assert f"| {suite.name.replace('_', ' ')} ({len(suite.items)}) |" in card
        assert suite.name.replace("_", " ") in page
    assert found["suites"]["forgetting"]["line"] in page
    assert "Forgetting: " in card


def test_suites_stay_in_the_record_of_the_same_adapter(run: Path) -> None:
    asked = veneer.evaluate(run, suites="json_form").as_dict()
    veneer.evaluate(run)
    kept = json.loads((run / "evaluation.json").read_text())
    assert (kept["suites"], kept["personal"]) == (asked["suites"], asked["personal"])
    edit(run / "evaluation.json", win_rates={"of these answers": {}})
    veneer.evaluate(run)
    assert "win_rates" in json.loads((run / "evaluation.json").read_text())
    (run / "samples.jsonl").write_text("")
    veneer.evaluate(run)
    assert "win_rates" not in json.loads((run / "evaluation.json").read_text()), "they are of other answers"
    edit(run / "evaluation.json", judged=kept["judged"] | {"adapter_sha256": "of another"})
    veneer.evaluate(run)
    assert "suites" not in json.loads((run / "evaluation.json").read_text()), "they are of another adapter"


def test_suites_by_name_and_a_wrong_name(run: Path, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    status, out, error = call("evaluate", str(run), "--suites", "knowledge", "--rows", "1")
    assert status == 0, error
    assert "forgetting: " in out
    assert "over 1 suite" in out
    assert "personal data in 67 answers: base none, tuned none" in out
    assert (run / "evaluations" / "held-out-1-rows.suites.jsonl").is_file()
    status, _, error = call("evaluate", str(run), "--suites", "refusal_harmfull")
    assert status == 2
    assert "did you mean refusal_harmful" in error


def test_a_base_without_a_template_is_asked_in_plain_text_and_the_system_prompt_is_left_out(
    tiny_model: Callable[..., Path], tmp_path: Path, rows: list[dict[str, Any]]
) -> None:
    knowledge = ABILITIES[0]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    answers = {}
    for name, chat, data in (
        ("plain", False, {"chat_template": "none"}),
        ("chat", True, {}),
        ("system", True, {"system_prompt": "Say what the animal says."}),
    ):
        made = tiny_run(tiny_model(chat=chat), path, tmp_path / name, data=data, train={"max_steps": 1})
        job = TrainingJob(made)
        responder = ModelResponder(job.model, ReferenceEngine(job.model), job.renderer, 64)
        answers[name] = answer_suites([knowledge], responder)[0].answers
    for given in answers.values():
        assert all(answer in item["choices"] for answer, item in zip(given, knowledge.items, strict=True))
    assert answers["system"] == answers["chat"]
    assert answers["plain"] != answers["chat"]
