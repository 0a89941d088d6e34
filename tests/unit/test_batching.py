"""Rows at a time where memory is short, and answers within a model's positions."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import veneer
from tests.support.notices import notified
from tests.support.runs import losses as losses_of
from tests.support.runs import scorer, tiny_run, write_rows
from tests.support.tiny import FAMILIES, save_tiny_model, tiny_tokenizer
from veneer.config import Data, JobError, UserError
from veneer.data.conversation import Message
from veneer.data.render import Renderer
from veneer.evaluation.generation import generate
from veneer.evaluation.memory import LESS_MEMORY
from veneer.machine.batching import Batching, is_out_of_memory
from veneer.model.shapes import positions_of
from veneer.training.job import TrainingJob

SHORTAGES = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    MemoryError(),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"),
]


def doubled(most: int, error: Exception) -> tuple[Callable[[Sequence[int]], list[int]], list[int]]:
    """Work that has room for so many items, and the sizes it was tried with."""
    tried: list[int] = []

    def work(items: Sequence[int]) -> list[int]:
        tried.append(len(items))
        if len(items) > most:
            raise error
        return [2 * item for item in items]

    return work, tried


@pytest.mark.parametrize("error", SHORTAGES, ids=lambda error: type(error).__name__)
def test_rows_are_halved_once_memory_is_short_and_none_is_lost(error: Exception) -> None:
    work, tried = doubled(5, error)
    batching = Batching(16, LESS_MEMORY)
    with notified("out of memory with 16 rows at a time: continuing with 8") as said:
        results = [n for part in batching.over(range(20), work) for n in part]
    assert results == [2 * n for n in range(20)]
    assert tried == [16, 8, 4, 4, 4, 4, 4]
    assert len(said) == 1, "it is said once"
    assert batching.size == 4, "and remembered"
    assert sum(map(len, batching.over(range(9), work))) == 9


def test_one_row_that_does_not_fit_ends_with_advice() -> None:
    work, tried = doubled(0, SHORTAGES[0])
    with notified(""), pytest.raises(JobError, match=r"one row at a time \(answers\)\n  fix: .*max_new_tokens"):
        list(Batching(4, LESS_MEMORY).over(range(4), work))
    assert tried == [4, 2, 1]


def test_other_errors_go_out_as_they_are() -> None:
    work, tried = doubled(0, RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="mat1"):
        list(Batching(4, LESS_MEMORY).over(range(4), work))
    assert tried == [4]
    assert not is_out_of_memory(ValueError("out of memory"))


@pytest.fixture
def job(tiny_model: Callable[..., Path], tmp_path: Path, rows: list[dict[str, Any]]) -> TrainingJob:
    path = write_rows(tmp_path / "rows.jsonl", rows)
    data = {"validation": path, "duplicates": "keep"}
    evaluate = {"max_new_tokens": 6}
    return TrainingJob(tiny_run(tiny_model(), path, tmp_path / "run", data=data, evaluate=evaluate))


def test_scores_do_not_depend_on_memory_that_runs_out(job: TrainingJob, monkeypatch: pytest.MonkeyPatch) -> None:
    held_out = job.data.held_out()
    roomy = scorer(job, held_out).compare(job.engine.adapter_off)
    base, forward = job.model.get_base_model(), type(job.model.get_base_model()).forward
    sizes: list[int] = []

    def short_of_memory(self: Any, input_ids: torch.Tensor | None = None, **more: Any) -> Any:
        if input_ids is not None:
            if len(input_ids) > 3:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            sizes.append(len(input_ids))
        return forward(self, input_ids, **more)

    monkeypatch.setattr(type(base), "forward", short_of_memory)
    with notified("out of memory with 16") as said:
        short = scorer(job, held_out).compare(job.engine.adapter_off)
    assert len(said) == 1, "once for base and tuned model together"
    assert max(sizes) <= 3
    assert short.samples() == roomy.samples()
    for name, metric in roomy.tuned.metrics.items():
        assert short.tuned.metrics[name].value == pytest.approx(metric.value, rel=1e-4)


# Positions


def small_model(tmp_path: Path, family: str, positions: int = 40) -> tuple[Any, Renderer]:
    import transformers

    name, settings = FAMILIES[family]
    key = "n_positions" if family == "gpt2" else "max_position_embeddings"
    folder = tmp_path / family
    save_tiny_model((name, settings | {key: positions}), folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    model.generation_config.eos_token_id = None
    return model, Renderer(tiny_tokenizer(), Data(train="-"))


def prompt_of(renderer: Renderer, tokens: int) -> list[int]:
    ids = renderer.prompt_ids([Message("user", "what does the cat say")])
    return (ids * 9)[:tokens]


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama"])
def test_answers_end_where_the_models_positions_end(family: str, tmp_path: Path) -> None:
    model, renderer = small_model(tmp_path, family)
    assert positions_of(model.config) == 40
    prompts = [prompt_of(renderer, n) for n in (20, 36, 39, 12, 36, 8)]
    read: list[int] = []  # columns of each batch, the answer's among them

    def count(module: Any, args: Any, kwargs: Any) -> None:
        past = kwargs.get("past_key_values")
        read.append(kwargs["input_ids"].shape[1] + (0 if past is None else past.get_seq_length()))

    model.register_forward_pre_hook(count, with_kwargs=True)
    with notified(r"3 of 6 prompts leave room for answers of fewer than 20 .*positions for 40"):
        together = generate(model, renderer, prompts, 20)
    assert 36 < max(read) <= 40
    with notified(""):
        assert generate(model, renderer, prompts, 20, batch_size=1) == together, "none is cut because of another"


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_prompt_that_fills_the_positions_is_refused(family: str, tmp_path: Path) -> None:
    model, renderer = small_model(tmp_path, family)
    for tokens in (40, 41, 60):
        with pytest.raises(UserError, match=rf"a prompt has {tokens} tokens, and the model has positions for 40"):
            generate(model, renderer, [prompt_of(renderer, 9), prompt_of(renderer, tokens)], 4)


def test_rows_beyond_the_positions_are_refused_in_training_and_evaluation(
    tmp_path: Path, rows: list[dict[str, Any]]
) -> None:
    small_model(tmp_path, "gpt2", 64)
    long = {"prompt": "what does the owl say please " * 12, "completion": "owl"}
    path = write_rows(tmp_path / "rows.jsonl", rows)
    targets = {"target_modules": ["c_attn"]}
    run = tiny_run(tmp_path / "gpt2", path, tmp_path / "run", adapter=targets, train={"max_steps": 1})
    TrainingJob(run).fit()
    beyond = write_rows(tmp_path / "long.jsonl", [*rows, long])
    with pytest.raises(UserError, match=r"long.jsonl:17: the row has \d+ tokens, the model has positions for 64"):
        veneer.evaluate(tmp_path / "run", data=beyond)
    run = tiny_run(tmp_path / "gpt2", beyond, tmp_path / "other", adapter=targets)
    with pytest.raises(
        UserError, match=r"the longest row has \d+ tokens, the model has positions for 64\n.*max_length"
    ):
        TrainingJob(run)


def test_a_held_out_loss_goes_on_with_fewer_rows(
    tiny_model: Callable[..., Path], tmp_path: Path, rows: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_rows(tmp_path / "rows.jsonl", rows)

    def held_out_loss(name: str, most: int) -> float:
        data = {"validation": path, "duplicates": "keep"}
        job = TrainingJob(tiny_run(tiny_model(), path, tmp_path / name, data=data, train={"max_steps": 1}))
        token_logprobs = job.engine.token_logprobs

        def short_of_memory(batch: Any) -> torch.Tensor:
            if len(batch.lengths) > most:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return token_logprobs(batch)

        monkeypatch.setattr(job.engine, "token_logprobs", short_of_memory)
        job.fit()
        return losses_of(tmp_path / name, "eval")[-1]

    roomy = held_out_loss("roomy", 16)
    with notified("with 16 rows at a time: continuing with 8, or fewer if needed; the held-out losses") as said:
        assert held_out_loss("short", 5) == pytest.approx(roomy, rel=1e-5)
    assert len(said) == 1, "it is said once"
    with notified(""), pytest.raises(JobError, match=r"one row at a time \(held-out losses\)\n.*data\.max_length"):
        held_out_loss("shorter", 0)
