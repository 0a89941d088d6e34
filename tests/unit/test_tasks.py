"""Tasks of lm-eval: base against tuned document by document, with the numbers of lm-eval's own runner."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import veneer
from tests.support.adapters import save_adapter_of
from tests.support.runs import tiny_run, write_rows
from tests.support.tasks import ANSWERS, CHOICES, GROUP, TEXTS, write_task
from veneer.api.load import load
from veneer.api.pairs import _require_tasks
from veneer.api.tasks import MeasuredTasks, load_tasks, measure_tasks
from veneer.config import UserError, hub
from veneer.config.notify import Notices
from veneer.evaluation.gate import check_gate, parse_gate
from veneer.evaluation.tasks.options import TaskOptions, read_options, task_names
from veneer.evaluation.tasks.quiet_harness import quiet_harness
from veneer.model.tuned import find_tuned
from veneer.report.run_page import run_page

Call = Callable[..., tuple[int, str, str]]
BATCH = 4
KINDS = ("animal_choice", "animal_other", "animal_answer", "animal_text")


@pytest.fixture(scope="module")
def animals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tasks of every kind, two of them in a group."""
    folder = tmp_path_factory.mktemp("animals")
    for task in (CHOICES, ANSWERS, TEXTS):
        write_task(folder, task)
    write_task(folder, CHOICES, 7, task="animal_other")
    write_task(folder, GROUP)
    return folder


@dataclass(frozen=True)
class Loaded:
    """A tiny model in float32 with its tokenizer."""

    model: Any
    tokenizer: Any

    def ask(self, folder: Path, **settings: Any) -> MeasuredTasks:
        tasks = load_tasks(str(folder), settings.get("options", TaskOptions()))
        given: dict[str, Any] = {"batch_size": BATCH, "adapter_off": getattr(self.model, "disable_adapter", None)}
        return measure_tasks(tasks, self.model, self.tokenizer, **(given | settings))


@pytest.fixture(scope="module")
def loaded(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    """A tiny model with an adapter that changes many of its answers."""
    tuned = find_tuned(str(save_adapter_of("lora", tiny_model(), tmp_path_factory.mktemp("adapter"))))
    model = tuned.load(torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter *= 6
    return Loaded(model, tuned.renderer.tokenizer)


@pytest.fixture(scope="module")
def measured(loaded: Loaded, animals: Path) -> MeasuredTasks:
    return loaded.ask(animals)


def lm_eval_alone(model: Any, folder: Path, **settings: Any) -> dict[str, Any]:
    """What lm-eval's own runner finds."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    with quiet_harness():
        manager = TaskManager(include_path=str(folder), include_defaults=False)
        shared = {"task_manager": manager, "batch_size": BATCH, "apply_chat_template": True, "bootstrap_iters": 0}
        found: dict[str, Any] = simple_evaluate(model, tasks=[*KINDS[2:], "animals"], **(shared | settings))
    return found


def by_document(samples: Sequence[Mapping[str, Any]]) -> dict[tuple[int, str], tuple[Any, ...]]:
    """Answer and values of each document, by its number and filter."""
    return {
        (one["doc_id"], one["filter"]): (one["filtered_resps"], [one[name] for name in one["metrics"]])
        for one in samples
    }


def test_each_document_has_the_score_that_lm_evals_own_runner_gives(
    measured: MeasuredTasks, loaded: Loaded, animals: Path, tiny_model: Callable[..., Path]
) -> None:
    from lm_eval.models.huggingface import HFLM

    settings = {"pretrained": str(tiny_model()), "dtype": "float32"}
    base = lm_eval_alone("hf", animals, model_args=settings, device="cpu")
    with quiet_harness():
        model = HFLM(loaded.model, tokenizer=loaded.tokenizer, batch_size=BATCH)
    tuned = lm_eval_alone(model, animals)
    ours = {task: found for one in measured.compared for task, found in one.tuned.samples.items()}
    before = {task: found for one in measured.compared if one.base for task, found in one.base.samples.items()}
    assert set(ours) == set(KINDS)
    for task in KINDS:
        assert by_document(before[task]) == by_document(base["samples"][task])
        assert by_document(ours[task]) == by_document(tuned["samples"][task])
        assert [one["prompt_hash"] for one in before[task]] == [one["prompt_hash"] for one in ours[task]]
    facts = measured.as_dict()["metrics"]
    for name, one in facts.items():
        key = f"{one['metric']},{one['filter']}"
        for model_name, theirs in (("base", base), ("tuned", tuned)):
            results = theirs["groups" if one["task"] == "animals" else "results"][one["task"]]
            assert one[model_name]["value"] == pytest.approx(results[key], abs=1e-12), name


def test_documents_are_compared_in_pairs(measured: MeasuredTasks) -> None:
    facts = measured.as_dict()
    samples = [json.loads(line) for line in measured.sample_lines().splitlines()]
    turned = 0
    for task in ("animal_choice", "animal_other"):
        pairs = [[one[model]["values"]["acc"] for model in ("base", "tuned")] for one in samples if one["task"] == task]
        counted = facts["comparison"][f"{task}.acc"]["rows"]
        assert counted["compared"] == len(pairs) == {"animal_choice": 12, "animal_other": 7}[task]
        assert counted["better"] == sum(before < after for before, after in pairs)
        assert counted["worse"] == sum(before > after for before, after in pairs)
        turned += counted["better"] + counted["worse"]
    assert turned, "the adapter has to change some"
    group = facts["comparison"]["animals.acc"]["rows"]
    assert group["compared"] == 19
    assert group["better"] + group["worse"] == turned, "a group holds the documents of its tasks"
    assert facts["metrics"]["animal_choice.acc"]["group"] == "animals"
    assert facts["metrics"]["animal_choice.acc_norm"]["group"] is None, "the group has no such value"
    assert facts["metrics"]["animals.acc"]["unit"] == "share"


def test_a_perplexity_is_compared_by_what_each_document_gives_to_it(measured: MeasuredTasks) -> None:
    metric = next(one for task in measured.compared for one in task.metrics if one.metric == "byte_perplexity")
    assert metric.base is not None
    assert metric.comparison is not None
    assert metric.better == "lower"
    assert metric.unit == ""
    assert metric.comparison.rows == 12
    shift = metric.tuned.value - metric.base.value
    assert metric.comparison.difference.value == pytest.approx(shift)
    assert metric.comparison.difference.low < shift < metric.comparison.difference.high
    assert sum(metric.tuned.rows.values()) / 12 == pytest.approx(metric.tuned.value)


def test_a_group_that_counts_each_task_once_is_their_plain_mean(loaded: Loaded, tmp_path: Path) -> None:
    write_task(tmp_path, CHOICES)
    write_task(tmp_path, CHOICES, 7, task="animal_other")
    write_task(tmp_path, GROUP, aggregate_metric_list=[{"metric": "acc", "weight_by_size": False}])
    facts = loaded.ask(tmp_path).as_dict()["metrics"]
    differences = [facts[f"{task}.acc"]["difference"]["value"] for task in ("animal_choice", "animal_other")]
    assert facts["animals.acc"]["difference"]["value"] == pytest.approx(sum(differences) / 2)


def test_gates_name_metrics_with_and_without_their_filter(measured: MeasuredTasks) -> None:
    found = measured.measured()
    first = found["animal_answer.exact_match.first-letter"]
    assert found["animal_answer.exact_match"] == first, "the first filter is the task's own choice"
    assert "difference(animal_answer.exact_match.whole)" in found
    assert found["animals.acc"].rows == 19


def test_a_value_that_no_document_explains_holds_no_gate(
    measured: MeasuredTasks, monkeypatch: pytest.MonkeyPatch
) -> None:
    from veneer.evaluation.tasks import compare

    monkeypatch.setattr(compare, "MOST_LEFT_OUT", 2)
    (found,) = (task for task in measured.compared if "animal_text" in task.tuned.samples)
    again = compare.compare_task(found.base, found.tuned).measured()
    name = "animal_text.byte_perplexity"
    assert measured.measured()[name].interval.value == again[name].interval.value
    for gate in (f"{name} <= 1e9", f"difference({name}) <= 1e9"):
        assert not check_gate(parse_gate(gate), again)[0].passed
    assert check_gate(parse_gate(f"{name} <= 1e9"), measured.measured())[0].passed


@pytest.mark.parametrize("value", ["N/A", float("nan")])
def test_a_group_without_a_value_is_left_out(measured: MeasuredTasks, value: Any) -> None:
    from veneer.evaluation.tasks.compare import compare_task

    (found,) = (task for task in measured.compared if "animals" in task.tuned.results.get("groups", {}))
    groups = {"animals": found.tuned.results["groups"]["animals"] | {"acc,none": value}}
    tuned = replace(found.tuned, results={**found.tuned.results, "groups": groups})
    groups_of = {one.name: one.group for one in compare_task(found.base, tuned).metrics}
    assert "animals.acc" not in groups_of
    assert groups_of["animal_choice.acc"] is None, "nothing stands for it, so it is shown"


def test_two_models_asked_alone_are_compared_as_one_model_with_its_adapter_off(
    measured: MeasuredTasks, loaded: Loaded, animals: Path
) -> None:
    tuned = loaded.ask(animals, adapter_off=None)
    with loaded.model.disable_adapter():
        base = loaded.ask(animals, adapter_off=None)
    assert tuned.as_dict()["comparison"] == {}
    compared = tuned.against(base)
    assert compared.as_dict()["comparison"] == measured.as_dict()["comparison"]
    assert compared.sample_lines() == measured.sample_lines()


def test_the_same_bits_twice_and_as_many_documents_as_asked(loaded: Loaded, animals: Path) -> None:
    state = torch.get_rng_state()
    first, second = (loaded.ask(animals / "animal_answer.yaml", limit=5) for _ in range(2))
    assert first.sample_lines() == second.sample_lines()
    assert first.as_dict() == second.as_dict()
    assert first.as_dict()["metrics"]["animal_answer.exact_match.whole"]["documents"] == 5
    assert torch.equal(torch.get_rng_state(), state), "random numbers go on as they were"


def test_options_change_the_prompt_as_lm_eval_says(loaded: Loaded, animals: Path) -> None:
    def prompt(*words: str) -> str:
        options = read_options(words)
        measured = loaded.ask(animals / "animal_choice.yaml", options=options, limit=1, adapter_off=None)
        return str(json.loads(measured.sample_lines().splitlines()[0])["prompt"])

    asked = "what does the cat 0 say"
    assert prompt("apply_chat_template=false", "num_fewshot=0") == asked
    assert prompt("num_fewshot=0") == f"<|im_start|>user\n{asked}<|im_end|>\n<|im_start|>assistant\n"
    assert prompt().count("<|im_start|>user") == 2, "its one example is a turn"
    assert prompt("fewshot_as_multiturn=false").count("<|im_start|>user") == 1
    assert prompt("num_fewshot=0", "system_instruction=speak, please").startswith(
        "<|im_start|>system\nspeak, please<|im_end|>"
    )


def test_a_model_without_a_chat_template_is_asked_in_plain_text(tiny_model: Callable[..., Path], animals: Path) -> None:
    base = load(str(tiny_model(chat=False)))
    measured = Loaded(base.model, base.renderer.tokenizer).ask(animals / "animal_choice.yaml", limit=2)
    facts = measured.as_dict()
    assert facts["settings"]["apply_chat_template"] is False
    assert "base" not in facts["metrics"]["animal_choice.acc"], "it is asked alone"
    assert facts["comparison"] == {}


def test_less_memory_means_fewer_requests_at_a_time(
    loaded: Loaded, animals: Path, notices: Notices, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = type(loaded.model).forward

    def short(model: Any, *given: Any, **named: Any) -> Any:
        ids = given[0] if given else named["input_ids"]
        if len(ids) > 2:
            raise torch.OutOfMemoryError("out of memory")
        return forward(model, *given, **named)

    usual = loaded.ask(animals / "animal_choice.yaml", batch_size=2)
    monkeypatch.setattr(type(loaded.model), "forward", short)
    measured = loaded.ask(animals / "animal_choice.yaml")
    assert measured.as_dict() == usual.as_dict()
    assert "out of memory with 4 rows at a time" in notices.events[0]["message"]
    notices.events.clear()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"doc_to_text": "{{ animal"}, "lm-eval cannot build it"),
        ({"output_type": "riddles"}, "output_type 'riddles'"),
        ({"dataset_kwargs": {"data_files": {"test": "gone.jsonl"}}}, "the documents (json) cannot be had"),
        ({"unsafe_code": True}, "runs code that the model writes"),
        ({"doc_to_image": "picture"}, "pictures or sound"),
        ({"metric_list": [{"metric": "rouge_of_the_hub"}]}, "fetched from a hub"),
        ({"include": "gone.yaml"}, "gone.yaml"),
    ],
)
def test_a_task_that_cannot_be_asked_is_refused_before_a_model_is_loaded(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    path = write_task(tmp_path, CHOICES, **change)
    for name in (path, tmp_path):
        with pytest.raises(UserError, match=r"(?s)--tasks .*fix: ") as caught:
            load_tasks(f"{name}/" if name == tmp_path else str(name))
        assert message in str(caught.value)


def test_code_runs_once_it_is_allowed(tmp_path: Path) -> None:
    path = write_task(tmp_path, CHOICES, unsafe_code=True)
    found = load_tasks(str(path), read_options(["confirm_run_unsafe_code=true"]))
    assert [one.name for one in found] == ["animal_choice"]


def test_broken_files_and_folders_without_tasks_are_refused(tmp_path: Path) -> None:
    (tmp_path / "broken.yaml").write_text("task: [unclosed\n")
    with pytest.raises(UserError, match=r"broken\.yaml: not a YAML file"):
        load_tasks(f"{tmp_path}/")
    (tmp_path / "broken.yaml").write_text("doc_to_text: a part that tasks include\n")
    with pytest.raises(UserError, match="holds no task"):
        load_tasks(f"{tmp_path}/")
    with pytest.raises(UserError, match="no such folder or file"):
        load_tasks("./nowhere/")
    with pytest.raises(UserError, match=r"reads \.yaml files alone"):
        load_tasks(str(write_task(tmp_path, CHOICES).rename(tmp_path / "animals.yml")))


def test_unknown_tasks_and_those_of_an_unreachable_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    import lm_eval.tasks

    from veneer.evaluation.tasks import find

    folder = Path(lm_eval.tasks.__file__).parent / "gsm8k"
    manager = lm_eval.tasks.TaskManager(include_path=str(folder), include_defaults=False)
    monkeypatch.setattr(find, "TaskManager", lambda **given: manager)  # all of lm-eval's take ten seconds to read
    with pytest.raises(UserError, match=r"--tasks gsm8: no task of lm-eval; the nearest are gsm8k"):
        load_tasks("gsm8")
    monkeypatch.setattr(hub, "unreachable", lambda: "no network")
    monkeypatch.setattr(find, "unreachable", lambda: "no network")
    with pytest.raises(UserError, match=r"--tasks gsm8k: the dataset openai/gsm8k: not on this machine, and the hub"):
        load_tasks("gsm8k")


def test_without_lm_eval_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"lm-eval is not installed\n  fix: pip install 'veneer\[lm-eval\]'"):
        task_names("gsm8k")


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("num_fewshots=3", "nearest is num_fewshot"),
        ("num_fewshot=-1", "greater than or equal to 0"),
        ("num_fewshot", "no value"),
        ("apply_chat_template=perhaps", "valid boolean"),
    ],
)
def test_wrong_options_are_refused(word: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_options([word])


@pytest.fixture
def run(tiny_model: Callable[..., Path], tmp_path: Path, rows: list[dict[str, Any]]) -> Path:
    """A finished tiny run with two held-out rows."""
    train = write_rows(tmp_path / "rows.jsonl", rows)
    settings = tiny_run(tiny_model(), train, tmp_path / "run", data={"validation": 2})
    veneer.train(settings)
    return Path(settings.train.output_dir)


def test_the_command_shows_tasks_writes_them_and_checks_a_gate(run: Path, animals: Path, call: Call) -> None:
    gate = "animals.acc >= 0 and difference(animal_answer.exact_match.whole) <= 1"
    status, out, err = call("evaluate", str(run), "--tasks", f"{animals}/", "--gate", gate, "--json")
    assert status == 0, err
    result = json.loads(out)
    assert set(result["tasks"]) == {"metrics", "comparison", "settings"}
    assert [check["passed"] for check in result["gate"]] == [True, True]
    assert json.loads((run / "evaluation.json").read_text())["tasks"] == result["tasks"]
    shown = "+".join((run_page(run), (run / "adapter" / "README.md").read_text()))
    assert shown.count("animals.acc") == 2, "the run's page and the card show it"
    assert "animal_choice.acc<" not in shown
    lines = (run / "evaluations" / "tasks.samples.jsonl").read_text().splitlines()
    assert len(lines) == 12 + 7 + 2 * 12 + 12
    status, out, err = call("evaluate", str(run), "--tasks", f"{animals}/", "--rows", "2")
    assert status == 0, err
    assert "animals.acc" in out
    assert "tasks of lm-eval, as turns of a chat" in out
    assert "2 more, of the groups' single tasks" in out
    assert "animal_choice.acc_norm" in out
    assert "animal_choice.acc " not in out, "its group stands for it"


def test_two_models_are_asked_one_after_the_other(
    run: Path, tiny_model: Callable[..., Path], animals: Path, call: Call
) -> None:
    asked = ("evaluate", str(run), "--tasks", f"{animals}/", "--json")
    own, other = (json.loads(call(*asked, *more)[1])["tasks"] for more in ((), ("--against", str(tiny_model()))))
    assert set(other["metrics"]) == set(own["metrics"])
    assert "tasks of lm-eval" in (shown := call(*asked[:-1], "--against", str(tiny_model()))[1])
    assert "target against other" in shown.partition("tasks of lm-eval")[2]
    for name, found in other["metrics"].items():
        for model in ("base", "tuned"):  # a base alone is loaded in its stored precision, bfloat16: some 0.4% a number
            assert found[model]["value"] == pytest.approx(own["metrics"][name][model]["value"], rel=1e-2)


def test_a_server_is_asked_no_tasks() -> None:
    sides: Any = [SimpleNamespace(name="runs/a", has_losses=True), SimpleNamespace(name="a.gguf", has_losses=False)]
    request: Any = SimpleNamespace(tasks=("animals",))
    with pytest.raises(UserError, match=r"--tasks: a\.gguf is on a server"):
        _require_tasks(sides, request)


def test_a_task_that_fails_keeps_those_before_it(run: Path, tmp_path: Path, call: Call) -> None:
    write_task(tmp_path / "a", ANSWERS)
    code = tmp_path / "b" / "utils.py"
    path = write_task(tmp_path / "b", CHOICES)
    code.write_text("def score(doc, results):\n    raise RuntimeError('a mistake in the task')\n")
    path.write_text(path.read_text() + "process_results: !function utils.score\n")
    tasks = f"{tmp_path / 'a'}/,{tmp_path / 'b'}/"
    status, _, err = call("evaluate", str(run), "--tasks", tasks)
    assert status == 1
    assert "animal_choice: lm-eval ended with RuntimeError: a mistake in the task" in err
    kept = json.loads((run / "evaluations" / "tasks-so-far.json").read_text())
    assert "animal_answer.exact_match.whole" in kept["tasks"]["metrics"]
    assert not (run / "evaluation.json").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--tasks", "./nowhere/"), "no such folder or file"),
        (("--task-option", "num_fewshot=1"), "acts on tasks alone"),
        (("--tasks", "{animals}/", "--gate", "animals.f1 >= 1"), "`animals.f1` is not measured"),
    ],
)
def test_wrong_calls_have_status_2(run: Path, animals: Path, call: Call, words: tuple[str, ...], message: str) -> None:
    status, _, err = call("evaluate", str(run), *(word.format(animals=animals) for word in words))
    assert status == 2
    assert message in err
