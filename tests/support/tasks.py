"""Folders of tasks of lm-eval, of a few rows of their own, for the tests."""

from pathlib import Path
from typing import Any

import yaml

from tests.support.runs import write_rows

CHOICES: dict[str, Any] = {
    "task": "animal_choice",
    "dataset_path": "json",
    "test_split": "test",
    "fewshot_split": "train",
    "output_type": "multiple_choice",
    "doc_to_text": "what does the {{animal}} say",
    "doc_to_choice": ["a", "b", "c"],
    "doc_to_target": "label",
    "num_fewshot": 1,
    "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")],
}
FIRST = [{"function": "regex", "regex_pattern": "(\\w)"}, {"function": "take_first"}]
ANSWERS: dict[str, Any] = {
    "task": "animal_answer",
    "dataset_path": "json",
    "test_split": "test",
    "output_type": "generate_until",
    "doc_to_text": "{{animal}} please ",
    "doc_to_target": "{{answer}}",
    "generation_kwargs": {"until": ["hen"], "max_gen_toks": 5, "do_sample": False},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    "filter_list": [
        {
            "name": "first-letter",
            "filter": [{"function": "regex", "regex_pattern": "(\\w)"}, {"function": "take_first"}],
        },
        {"name": "whole", "filter": [{"function": "take_first"}]},
    ],
}
TEXTS: dict[str, Any] = {
    "task": "animal_text",
    "dataset_path": "json",
    "test_split": "test",
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "the {{animal}} and the {{answer}}",
    "metric_list": [{"metric": "byte_perplexity", "aggregation": "weighted_perplexity", "higher_is_better": False}],
}
GROUP: dict[str, Any] = {
    "group": "animals",
    "task": ["animal_choice", "animal_other"],
    "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}],
}


def animal_rows(count: int) -> list[dict[str, Any]]:
    animals = ["cat", "dog", "owl", "hen", "fox"]
    return [
        {"animal": f"{animals[n % 5]} {n}", "label": n % 3, "answer": "abcdefghijklmnopqrstuvwxyz"[n * 7 % 26]}
        for n in range(count)
    ]


def write_task(folder: Path, given: dict[str, Any], rows: int = 12, **changes: Any) -> Path:
    """Write a task with its documents; the file."""
    folder.mkdir(parents=True, exist_ok=True)
    task = given | changes
    name = task.get("task", "group") if isinstance(task.get("task"), str) else task["group"]
    if "group" not in task:
        file = write_rows(folder / f"{name}.jsonl", animal_rows(rows))
        task = {"dataset_kwargs": {"data_files": {"test": file, "train": file}}} | task
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(task))
    return path
