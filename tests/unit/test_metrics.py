"""Metrics: each on examples computed by hand or by its own library, and all of them through the command line."""

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu import corpus_bleu, sentence_chrf
from torch.nn.functional import cross_entropy

import veneer
from tests.support.runs import tiny_run, write_rows
from veneer.config import Evaluate, JobError, UserError
from veneer.data.conversation import Conversation, Message
from veneer.evaluation import metrics
from veneer.evaluation.compare import Evaluation, Score
from veneer.evaluation.metrics import METRICS, choose, measure, require_metrics
from veneer.evaluation.metrics.bits_per_byte import BitsPerByte
from veneer.evaluation.metrics.metric import Metric, MetricResult, Sample, ScoredRows
from veneer.evaluation.metrics.resampled import RowMean
from veneer.release.redact import public_settings
from veneer.report.run_page import run_page
from veneer.training.intervals import Interval

Call = Callable[..., tuple[int, str, str]]
ROOT = Path(__file__).parents[2]
PROSE = [
    ("the cat sat on the mat today", "the cat sat on a mat this morning"),
    ("dogs bark", "the dogs are barking at the moon"),
    ("nothing of the kind was said", "nothing of the kind was said"),
    ("", "an answer of several words is here"),
]


def rows(pairs: list[tuple[str, str]], **settings: Any) -> ScoredRows:
    """Rows of (answer, reference) with settings of the section `evaluate`."""
    samples = [Sample(f"rows:{n}", "q", right, answer) for n, (answer, right) in enumerate(pairs, 1)]
    return ScoredRows(samples, settings=Evaluate(**settings))


def measured(name: str, pairs: list[tuple[str, str]], **settings: Any) -> dict[str, MetricResult]:
    return measure(rows(pairs, metrics=(name,), **settings))


def judged(name: str, answer: str, reference: str, **settings: Any) -> float:
    """The value of one row by a metric."""
    return next(iter(measured(name, [(answer, reference)], **settings).values())).interval.value


@dataclass(frozen=True)
class MeanLetters:
    """Letters of a row's reference, as a mean over rows."""

    letters: list[int]
    unit: ClassVar[str] = ""
    better: ClassVar[str] = "higher"

    @property
    def interval(self) -> Interval:
        mean = sum(self.letters) / len(self.letters)
        return Interval(mean, min(self.letters), max(self.letters))

    def difference(self, base: "MeanLetters") -> Interval:
        apart = [own - other for own, other in zip(self.letters, base.letters, strict=True)]
        return Interval(sum(apart) / len(apart), min(apart), max(apart))


def letters(rows: ScoredRows) -> dict[str, MeanLetters]:
    return {"letters": MeanLetters([20 + len(sample.reference) for sample in rows.samples])}


@pytest.fixture
def trained(tiny_model: Callable[..., Path], tmp_path: Path) -> Path:
    """The folder of a run whose held-out rows are two labels, five of each."""
    words = ("cat", "dog", "owl", "hen", "please", "say", "what", "does", "the", "it", "is", "a", "b", "c")
    labels = [{"prompt": f"what is {word} {word}", "completion": ("cat", "dog")[n % 2]} for n, word in enumerate(words)]
    made = tiny_run(
        tiny_model(), write_rows(tmp_path / "labels.jsonl", labels), tmp_path / "run", data={"validation": 10}
    )
    veneer.train(made)
    return tmp_path / "run"


def rename_metrics(run: Path, value: str) -> None:
    """Write evaluate.metrics into a finished run's settings."""
    text = (run / "run.yaml").read_text()
    (run / "run.yaml").write_text(re.sub(r"(?m)^  metrics: auto$", f"  metrics: {value}", text))


def likeliest_right(run: Path) -> float:
    """The share of held-out rows whose right label is the likeliest, by a plain pass over each row alone."""
    loaded = veneer.load(str(run))
    (file,) = (run / "evaluations").glob("*.samples.jsonl")
    samples = [json.loads(line) for line in file.read_text().splitlines()]
    right = []
    for sample in samples:
        prompt = loaded.renderer.prompt_ids([Message("user", sample["prompt"])])
        losses = {}
        for label in ("cat", "dog"):
            turns = (Message("user", sample["prompt"]), Message("assistant", label))
            ids = torch.as_tensor(loaded.renderer.example(Conversation(turns)).ids).long()
            ended = len(prompt) + len(loaded.renderer.answer_ids(Conversation(turns))) + 1  # the end of the turn too
            with torch.no_grad():
                logits = loaded.model(ids[None, :ended]).logits[0, :-1].float()
            losses[label] = cross_entropy(logits[len(prompt) - 1 :], ids[len(prompt) : ended], reduction="sum").item()
        right.append(bool(sample["reference"] == min(losses, key=lambda label: losses[label])))
    return sum(right) / len(right)


def test_a_new_metric_is_in_the_file_the_table_the_page_and_the_card(
    trained: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "METRICS", {**METRICS, "letters": Metric("letters", letters)})
    monkeypatch.setenv("COLUMNS", "160")
    rename_metrics(trained, "[letters, perplexity]")
    status, table, error = call("evaluate", str(trained))
    assert status == 0, error
    evaluation = json.loads((trained / "evaluation.json").read_text())
    found = evaluation["metrics"]
    assert list(found) == ["letters", "perplexity"]
    assert {"base", "tuned", "difference"} <= set(found["letters"])
    assert evaluation["chosen"] == {
        "metrics": ["letters", "perplexity"], "first": "letters", "why": "evaluate.metrics names them"
    }  # fmt: skip
    value, spread = found["letters"]["tuned"]["value"], found["letters"]["difference"]
    assert value == 23
    assert spread == {"value": 0, "low": 0, "high": 0}
    row = next(line for line in table.splitlines() if line.split()[:1] == ["letters"]).split()
    assert row[1] == "23", "a number as it is, not in percent"
    card = (trained / "adapter" / "README.md").read_text()
    assert "| letters | 23 (" in card
    assert "type: letters" in card
    assert "<b>23</b> by letters" in run_page(trained)


def test_three_metrics_by_name_through_the_command_line(
    trained: Path, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text("def brief(sample):\n    return len(sample.answer) < 999 and sample.prompt[0] == 'w'\n")
    status, printed, error = call(
        "evaluate", str(trained), "--json", "--metrics", "choice_accuracy, mine:brief,bits_per_byte"
    )
    assert status == 0, error
    result = json.loads(printed)
    assert list(result["metrics"]) == ["choice_accuracy", "mine:brief", "bits_per_byte"]
    assert result["is_record"] is False, "the run's record has the run's own metrics"
    found = {name: values["tuned"]["value"] for name, values in result["metrics"].items()}
    assert found["mine:brief"] == 1
    assert found["choice_accuracy"] == likeliest_right(trained)
    assert found["bits_per_byte"] > 0
    assert result["metrics"]["bits_per_byte"]["better"] == "lower"

    # By default two labels that repeat are choices; the record says so.
    status, printed, error = call("evaluate", str(trained), "--json")
    assert status == 0, error
    chosen = json.loads(printed)["chosen"]
    assert chosen["metrics"] == ["exact_match", "choice_accuracy", "perplexity"]
    assert chosen["why"] == "the 10 right answers are 2 choices"
    assert json.loads(printed)["metrics"]["choice_accuracy"]["tuned"]["value"] == found["choice_accuracy"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("rouge", "evaluate.metrics: 'rouge' is not a metric; the nearest is rouge_"),
        ("json_fields", "json_fields: the right answers are not all JSON objects of the same keys"),
        ("final_number", "final_number: the right answer of labels.jsonl:"),
        ("mine:brief", "evaluate.metrics: mine:brief: the module mine does not import"),
        ("json_schema", "json_schema: no schema is named"),
        ("tool_calls", "tool_calls: no right answer calls a tool"),
    ],
)
def test_a_wrong_metric_is_refused_before_the_model_is_loaded(
    names: str, message: str, trained: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("veneer.model.tuned.load_model", lambda *parts: pytest.fail("the model was loaded"))
    status, _, error = call("evaluate", str(trained), "--metrics", names)
    assert status == 2, error
    assert message in " ".join(error.split())
    assert not (trained / "evaluations").exists()


def test_training_refuses_a_metric_that_is_not_known(
    tiny_model: Callable[..., Path], tmp_path: Path, call: Call
) -> None:
    file = write_rows(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": "b"}] * 2)
    (tmp_path / "run.yaml").write_text(
        f"model: {{base: {tiny_model()}}}\ndata: {{train: {file}}}\nevaluate: {{metrics: [exact_mach]}}\n"
        f"train: {{output_dir: {tmp_path / 'out'}}}\n"
    )
    status, _, error = call("train", str(tmp_path / "run.yaml"))
    assert status == 2
    assert "'exact_mach' is not a metric; the nearest is exact_match" in " ".join(error.split())
    assert not (tmp_path / "out").exists()


def test_a_missing_library_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"rouge_l needs rouge-score.*\n.*veneer\[metrics\]"):
        measured("rouge_l", PROSE)
    assert measured("token_f1", PROSE)


@pytest.mark.parametrize(
    ("references", "names", "why"),
    [
        (['{"a": 1}', '{"a": 2}'], ["json_fields", "exact_match", "perplexity"], "JSON objects of the same keys"),
        (['{"a": 1}', '[{"b": 2}]'], ["exact_match", "valid_json", "perplexity"], "JSON of several forms"),
        (["so 2 + 2 is\n#### 4", "1,000"], ["final_number", "exact_match", "perplexity"], "numbers, or end in one"),
        (["yes", "no"] * 5, ["exact_match", "choice_accuracy", "perplexity"], "10 right answers are 2 choices"),
        (["yes", "no"], ["exact_match", "perplexity"], "short (of 1 words"),
        ([right for _, right in PROSE[:1]] * 3 + ["w " * 20], ["exact_match", "perplexity"], "short (of 8 words"),
        (["w " * 20, "v " * 30], ["token_f1", "exact_match", "perplexity"], "prose (of 25 words"),
        (
            ['<tool_call>{"name": "a", "arguments": {}}</tool_call>', "no"],
            ["tool_calls", "exact_match", "perplexity"],
            "1 of 2",
        ),
        ([], ["perplexity"], "ask nothing"),
    ],
)
def test_the_default_is_chosen_from_the_right_answers(references: list[str], names: list[str], why: str) -> None:
    chosen = choose(rows([("", reference) for reference in references]))
    assert chosen.names == names
    assert why in chosen.why


def test_what_was_not_measured_has_no_result() -> None:
    assert measure(ScoredRows([])) == {}
    assert list(measure(ScoredRows([], [2.0, 3.0], [1.0, 1.0]))) == ["perplexity"]
    assert list(measure(rows([("a", "a")]))) == ["exact_match"]


@pytest.mark.parametrize("name", [name for name, metric in METRICS.items() if metric.reads != "losses"])
def test_texts_that_ask_nothing_carry_no_metric_of_answers(name: str, tmp_path: Path) -> None:
    (tmp_path / "schema.json").write_text("{}")
    schema = {"json_schema": str(tmp_path / "schema.json")} if name == "json_schema" else {}
    with pytest.raises(UserError, match=f"{name}: the rows are texts that ask nothing"):
        choose(rows([], metrics=(name,), **schema))


@pytest.mark.parametrize(
    ("name", "answer", "reference", "value"),
    [
        ("exact_match", "The cat.", "The cat.", 1),
        ("exact_match", "the cat", "The cat.", 0),
        ("accuracy", "  the CAT ", "A cat!", 1),
        ("accuracy", "the cats", "the cat", 0),
        ("accuracy", "?", "!", 0),
        ("final_number", "so 3 * $1,000.50 = 3,001.5", "#### 3001.50", 1),
        ("final_number", "it is -4, not 4", "-4", 0),
        ("final_number", "it is -4.", "#### -4", 1),
        ("final_number", "9-4", "4", 1),
        ("final_number", "<think>4</think>five", "4", 0),
        # 3 of 4 words of the answer and of 6 of the reference, articles left out: 2 * 3 / (4 + 6).
        ("token_f1", "a small cat sat down", "The small cat, black, sat there quietly", 0.6),
        ("token_f1", "cat cat", "cat", 2 / 3),
        ("token_f1", "", "cat", 0),
        ("valid_json", '{"a": [1]}', "x", 1),
        ("valid_json", "[1]", "x", 0),
        ("valid_json", "[1]", "[]", 1),
        ("valid_json", 'Sure: {"a": 1}', "x", 0),
        ("length", "abcd", "x", 4),
        ("length", "<think>long thoughts</think> ab", "x", 2),
        ("refusal_rate", "I\u2019m sorry, but I can\u2019t help with that.", "x", 1),
        ("refusal_rate", "As an AI language model, I do not", "x", 1),
        ("refusal_rate", "I cannot provide that.", "x", 1),
        ("refusal_rate", "The sorry state of the roads can not be denied.", "x", 0),
        ("refusal_rate", "Mix flour and water. " * 10 + "I can't say how long.", "x", 0),
    ],
)
def test_a_row_has_the_value_computed_by_hand(name: str, answer: str, reference: str, value: float) -> None:
    assert judged(name, answer, reference) == pytest.approx(value)


def test_a_pattern_extracts_what_is_compared() -> None:
    gsm8k = {"extract": r"#### (-?[\d,]+)"}
    right, wrong = "first #### 3, then\n#### 18", "#### 18\nno:\n#### 19"
    for name in ("exact_match", "accuracy"):
        pairs = [("so\n#### 18", right), (wrong, right), ("18", right)]
        assert measured(name, pairs, **gsm8k)[name].interval.value == pytest.approx(1 / 3)
    assert choose(rows([("", right)], **gsm8k)).names == ["exact_match", "perplexity"]
    with pytest.raises(UserError, match=r"finds nothing in the right answer of rows:2"):
        choose(rows([("", right), ("", "18")], metrics=("accuracy",), **gsm8k))
    with pytest.raises(UserError, match=r"evaluate.extract acts on exact_match and accuracy"):
        require_metrics(Evaluate(metrics=("final_number",), **gsm8k))


def test_rouge_bleu_and_chrf_have_their_libraries_values() -> None:
    answers, references = [answer for answer, _ in PROSE], [right for _, right in PROSE]
    for name, kind in (("rouge_1", "rouge1"), ("rouge_2", "rouge2"), ("rouge_l", "rougeL")):
        scores = [RougeScorer([kind]).score(right, answer)[kind].fmeasure for answer, right in PROSE]
        assert measured(name, PROSE)[name].interval.value == pytest.approx(sum(scores) / 4)
    assert judged("rouge_l", "the cat sat", "the cat") == pytest.approx(0.8), "2 of 3 and 2 of 2 words"
    assert measured("bleu", PROSE)["bleu"].interval.value == pytest.approx(corpus_bleu(answers, [references]).score)
    scores = [sentence_chrf(answer, [right]).score for answer, right in PROSE]
    assert measured("chrf", PROSE)["chrf"].interval.value == pytest.approx(sum(scores) / 4)
    with pytest.raises(UserError, match="rouge_l: the right answer of rows:1 has no word of a to z"):
        measured("rouge_l", [("你好", "你好")])


def test_json_schema_accepts_or_refuses_answers(tmp_path: Path) -> None:
    file = tmp_path / "schema.json"
    file.write_text(json.dumps({"type": "object", "required": ["n"], "properties": {"n": {"type": "integer"}}}))
    settings = {"json_schema": str(file)}
    pairs = [(answer, '{"n": 1}') for answer in ('{"n": 2}', '{"n": "2"}', "{}", 'n: {"n": 1}')]
    assert measured("json_schema", pairs, **settings)["json_schema"].interval.value == 0.25
    assert choose(rows(pairs, **settings)).names == ["json_fields", "exact_match", "perplexity", "json_schema"]
    with pytest.raises(UserError, match="refuses the right answer of rows:1"):
        measured("json_schema", [("{}", "{}")], **settings)
    file.write_text('{"type": "objekt"}')
    with pytest.raises(UserError, match="no JSON schema"):
        measured("json_schema", pairs, **settings)
    file.write_text('{"$ref": "https://example.org/schema.json"}')
    with pytest.raises(UserError, match=r"refers to https://example.org/schema.json, which is not in the file"):
        measured("json_schema", pairs, **settings)
    with pytest.raises(UserError, match=r"evaluate.json_schema acts on json_schema, which evaluate.metrics does not"):
        require_metrics(Evaluate(metrics=("valid_json",), **settings))
    shared = public_settings(json.loads(tiny_settings(settings).model_dump_json()))
    assert shared["evaluate"]["json_schema"] == "schema.json", "what ships names no folder"


def tiny_settings(evaluate: dict[str, Any]) -> veneer.Run:
    return veneer.Run.model_validate({"model": {"base": "a/b"}, "data": {"train": "x.jsonl"}, "evaluate": evaluate})


def test_tool_calls_are_compared_by_name_and_arguments() -> None:
    right = '<tool_call>\n{"name": "lamp", "arguments": {"on": true, "room": 2}}\n</tool_call>'
    cases = {
        right: (1, 1),
        'I do it. <tool_call>{"arguments": {"room": 2, "on": true}, "name": "lamp"}</tool_call>': (1, 1),
        '{"name": "lamp", "parameters": {"on": true, "room": 2}}': (1, 1),
        '[TOOL_CALLS][{"name": "lamp", "arguments": "{\\"on\\": true, \\"room\\": 2}"}]': (1, 1),
        right.replace("2", "3"): (0, 1),
        right.replace("lamp", "fan"): (0, 0),
        right + right: (0, 0),
        right.replace("}}", "}"): (0, 0),
        "The lamp is on.": (0, 0),
    }
    for answer, (whole, names) in cases.items():
        found = measured("tool_calls", [(answer, right), ("No.", "Why?")])
        values = {name: round(2 * result.interval.value) - 1 for name, result in found.items()}
        assert values == {"tool_calls": whole, "tool_names": names}, answer
    assert measured("tool_calls", [(right, right), (right, "Why?")])["tool_names"].interval.value == 0.5


def test_the_likeliest_choice_is_the_answer() -> None:
    given = rows([("", "yes"), ("", "no"), ("", "no")], metrics=("choice_accuracy",))
    losses = [{"no": 2.0, "yes": 1.0}, {"no": 3.0, "yes": 1.0}, {"no": 0.5, "yes": 1.0}]
    scored = ScoredRows(given.samples, choices=losses, settings=given.settings)
    assert measure(scored)["choice_accuracy"].interval.value == pytest.approx(2 / 3)
    with pytest.raises(UserError, match="the 2 rows have 2 different right answers"):
        choose(rows([("", "yes"), ("", "no")], metrics=("choice_accuracy",)))


def test_rows_may_name_choices_of_their_own(tiny_model: Callable[..., Path], tmp_path: Path, any_notice: None) -> None:
    named: list[dict[str, Any]] = [
        {"question": "the cat", "choices": ["please", "team"], "answer": 1},
        {"question": "the dog", "choices": ["owl", "hen", "cat"], "answer": "hen"},
        {"question": "A: owl, B: hen", "choices": ["owl", "hen"], "answer": "A"},
        {"question": "1: owl, 2: hen", "choices": {"text": ["owl", "hen"], "label": ["1", "2"]}, "answer": "2"},
        {"question": "the fox", "choices": {"text": ["owl", "hen"], "label": ["1", "2"]}, "answer": "hen"},
        {"question": "A: fox, B: cat", "choices": {"text": ["fox", "cat"]}, "answer": "B"},
    ]
    path = write_rows(tmp_path / "choices.jsonl", named)
    base = str(tiny_model())
    found = veneer.evaluate(base, path, against=base, metrics=["auto"])
    result = found.as_dict()
    assert result["chosen"]["metrics"] == ["choice_accuracy", "exact_match", "perplexity"]
    assert result["chosen"]["why"] == "the 6 rows name their choices"
    samples = found.evaluation.tuned.samples
    assert [sample.choices for sample in samples] == [
        *(("please", "team"), ("owl", "hen", "cat"), ("A", "B")),
        *(("1", "2"), ("owl", "hen"), ("A", "B")),
    ]
    assert [sample.reference for sample in samples] == ["team", "hen", "A", "2", "hen", "B"]
    assert [line["tuned_right"] for line in found.evaluation.samples()] == [
        line["tuned"] == line["reference"] for line in found.evaluation.samples()
    ], "a row's answer is judged by what it says"
    write_rows(tmp_path / "wrong.jsonl", [named[0] | {"answer": 2}])
    with pytest.raises(UserError, match="`choices` has places 0 to 1"):
        veneer.evaluate(base, str(tmp_path / "wrong.jsonl"), against=base)


def test_bits_per_byte_are_the_loss_over_the_text() -> None:
    # 8 bits of loss over 4 bytes.
    assert BitsPerByte([math.log(2) * 3, math.log(2) * 5], [1, 3]).interval.value == pytest.approx(2)


def test_a_function_of_the_users_judges_or_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("own_rules.py").write_text(
        "def same(sample):\n    return sample.answer == sample.reference\n"
        "def words(sample):\n    return len(sample.answer.split())\n"
        "def bad(sample):\n    return sample.missing\n"
        "many = 3\n"
    )
    pairs = [("a b", "a b"), ("c", "d")]
    same, words = (measured(f"own_rules:{name}", pairs)[f"own_rules:{name}"] for name in ("same", "words"))
    assert (same.unit, same.interval.value) == ("share", 0.5)
    assert (words.unit, words.interval.value) == ("", 1.5)
    with pytest.raises(JobError, match="own_rules:bad fails on rows:1"):
        measured("own_rules:bad", pairs)
    for name in ("other", "many"):
        with pytest.raises(UserError, match=f"own_rules has no function '{name}'"):
            measured(f"own_rules:{name}", pairs)


def test_intervals_of_means_and_of_pooled_values_pair_the_rows() -> None:
    base, tuned = [0.1, 0.9, 0.5, 0.3] * 10, [0.2, 1.0, 0.6, 0.4] * 10
    found = RowMean(tuned).difference(RowMean(base))
    assert (found.value, found.low, found.high) == pytest.approx((0.1, 0.1, 0.1))
    alone = RowMean(base).interval
    # The bootstrap's standard error is that of the mean.
    error = (sum((value - 0.45) ** 2 for value in base) / 40) ** 0.5 / 40**0.5
    assert (alone.high - alone.low) / 2 == pytest.approx(1.96 * error, rel=0.1)
    same = measured("bleu", PROSE * 5)["bleu"]
    assert same.difference(same).as_dict() == {"value": 0, "low": 0, "high": 0}
    assert same.interval.low < same.interval.value < same.interval.high


def test_the_first_metric_decides_which_model_is_better() -> None:
    def score(answers: list[str], losses: list[float], names: tuple[str, ...]) -> Score:
        given = rows([(answer, "yes") for answer in answers], metrics=names)
        scored = ScoredRows(given.samples, losses, [1.0] * 20, settings=given.settings)
        return Score(measure(scored), list(given.samples), 20)

    good, bad = ["yes"] * 20, ["no"] * 20
    for names, better in ((("exact_match", "perplexity"), True), (("perplexity", "exact_match"), False),
                          (("length", "exact_match"), False)):  # fmt: skip
        found = Evaluation(score(bad, [1.0] * 20, names), score(good, [2.0] * 20, names))
        assert found.is_better == better, names
        assert next(iter(found.as_dict()["metrics"])) == names[0]
    lower = Evaluation(score(bad, [2.0] * 20, ("perplexity",)), score(bad, [1.0] * 20, ("perplexity",)))
    assert lower.is_better
    assert list(lower.tuned.right) == [False] * 20, "exact match says which rows are right where no metric does"


def test_the_page_of_metrics_names_all_of_them() -> None:
    page = (ROOT / "docs" / "evaluation.md").read_text()
    table = set(re.findall(r"^\| `(\w+)`", page, re.MULTILINE))
    assert table == set(METRICS)
