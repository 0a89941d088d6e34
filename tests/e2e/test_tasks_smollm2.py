"""lm-eval's own GSM8K with the real SmolLM2, on rows of the real test set, as a user calls it and by lm-eval alone."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.support.adapters import save_adapter_of
from veneer.api.tasks import load_tasks, measure_tasks
from veneer.evaluation.tasks.quiet_harness import quiet_harness
from veneer.model.builtin import builtin_folder
from veneer.model.tuned import find_tuned

pytestmark = pytest.mark.e2e
ROWS = Path(__file__).with_name("gsm8k.jsonl")  # the first 8 and the last 8 rows of GSM8K's test set (OpenAI, MIT)
LIMIT, BATCH = 4, 2


def test_gsm8k_has_the_score_of_lm_evals_own_runner_on_each_row(tmp_path: Path) -> None:
    import lm_eval.tasks
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    rows = ROWS.read_text(encoding="utf-8").splitlines(keepends=True)
    files = {"test": str(tmp_path / "test.jsonl"), "train": str(tmp_path / "train.jsonl")}
    Path(files["test"]).write_text("".join(rows[: 2 * LIMIT]), encoding="utf-8")
    Path(files["train"]).write_text("".join(rows[-8:]), encoding="utf-8")
    task = {  # lm-eval's own, with documents of this machine, and short answers to save time
        "include": str(Path(lm_eval.tasks.__file__).parent / "gsm8k" / "gsm8k.yaml"),
        "task": "gsm8k_here",
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": files},
        "generation_kwargs": {"until": ["Question:", "<|im_end|>"], "do_sample": False, "max_gen_toks": 40},
        "num_fewshot": 1,
    }
    (tmp_path / "gsm8k_here.yaml").write_text(yaml.safe_dump(task))
    folder = builtin_folder("smollm2-135m-instruct")
    tuned = find_tuned(str(save_adapter_of("lora", folder, tmp_path / "adapter")))
    model = tuned.load(torch.float32)
    found = measure_tasks(
        load_tasks(f"{tmp_path}/gsm8k_here.yaml"),
        model,
        tuned.renderer.tokenizer,
        model.disable_adapter,
        limit=LIMIT,
        batch_size=BATCH,
    )
    with quiet_harness():
        theirs: dict[str, Any] = simple_evaluate(
            "hf",
            model_args={"pretrained": str(folder), "dtype": "float32"},
            tasks=["gsm8k_here"],
            task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
            limit=LIMIT,
            batch_size=BATCH,
            device="cpu",
            apply_chat_template=True,
        )
    ours = found.compared[0].base
    assert ours is not None
    samples, expected = ours.samples["gsm8k_here"], theirs["samples"]["gsm8k_here"]
    assert len(samples) == len(expected) == 2 * LIMIT, "a line for each filter"
    for mine, other in zip(samples, expected, strict=True):
        for key in ("doc_id", "filter", "prompt_hash", "resps", "filtered_resps", "exact_match"):
            assert mine[key] == other[key]
    results = theirs["results"]["gsm8k_here"]
    facts = found.as_dict()["metrics"]
    for filter_ in ("strict-match", "flexible-extract"):
        name = f"gsm8k_here.exact_match.{filter_}"
        assert facts[name]["base"]["value"] == results[f"exact_match,{filter_}"]
        assert facts[name]["documents"] == LIMIT
