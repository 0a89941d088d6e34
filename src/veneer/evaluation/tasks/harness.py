"""A loaded model, asked by lm-eval: its own class for Transformers' models, given the model that is there already.

The base is the same model with its adapter switched off, so nothing is loaded twice. Seeds are the harness's own, set
anew for each task and model and put back afterwards. Rows at a time are halved where memory runs out.
"""

import contextlib
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from lm_eval.api.model import LM, CacheHook
from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM

from veneer.config import JobError
from veneer.evaluation.tasks.find import FoundTask
from veneer.evaluation.tasks.options import TaskOptions
from veneer.evaluation.tasks.quiet_harness import quiet_harness
from veneer.machine.batching import Batching, is_out_of_memory

Progress = Callable[[int], None]
Sample = Mapping[str, Any]


@dataclass(frozen=True)
class TaskResults:
    """What lm-eval found of one model on a task or a group of tasks.

    Attributes:
        found: the task.
        results: lm-eval's results: `results`, `groups`, `higher_is_better`, `versions`, `n-shot`.
        samples: each document as it was asked, answered and scored, by task; a line for each filter.
    """

    found: FoundTask
    results: Mapping[str, Any]
    samples: Mapping[str, Sequence[Sample]]


class HarnessModel(HFLM):  # type: ignore[misc, unused-ignore]
    """A loaded model as lm-eval asks it, which tells how far it is instead of drawing bars.

    Args:
        model: The Transformers or PEFT model, as it is at the moment.
        tokenizer: Its tokenizer, which is not changed.
        on_begin: Callback that gets the number of requests to come, of one kind of one task.
        on_done: Callback that gets the number of requests just answered.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        on_begin: Progress = lambda requests: None,
        on_done: Progress = lambda requests: None,
    ) -> None:
        self._on_begin, self._stderr = on_begin, sys.stderr
        with quiet_harness():
            super().__init__(pretrained=model, tokenizer=deepcopy(tokenizer), backend="causal")
        self.set_cache_hook(_AnswerCounter(on_done))

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        with self._telling(requests):
            return list(super().loglikelihood(requests, disable_tqdm=True))

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        with self._telling(requests):
            return list(super().loglikelihood_rolling(requests, disable_tqdm=True))

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        with self._telling(requests):
            return list(super().generate_until(requests, disable_tqdm=True))

    def _loglikelihood_tokens(
        self, requests: list[Any], disable_tqdm: bool = True, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        return list(super()._loglikelihood_tokens(requests, disable_tqdm=True, override_bs=override_bs))

    @contextlib.contextmanager
    def _telling(self, requests: Sequence[Any]) -> Iterator[None]:
        """Within the context, the terminal is there for progress, from which the rest of lm-eval is kept."""
        with contextlib.redirect_stderr(self._stderr):
            self._on_begin(len(requests))
            yield


class _AnswerCounter(CacheHook):  # type: ignore[misc, unused-ignore]
    """Counts answers as they come; it keeps none."""

    def __init__(self, on_done: Progress) -> None:
        super().__init__(None)
        self._on_done = on_done

    def add_partial(self, attr: str, req: Any, res: Any) -> None:
        self._on_done(1)


def ask_task(
    found: FoundTask, model: LM, options: TaskOptions, limit: int | None, batching: Batching, is_chat: bool
) -> TaskResults:
    """Ask a task or a group of tasks of one model.

    Args:
        found: The task.
        model: The model as lm-eval takes it, such as a `HarnessModel`.
        options: Choices that change scores.
        limit: Largest number of documents of each task; None: all.
        batching: Requests at a time; it is halved where memory runs out.
        is_chat: Whether documents are turns of a chat.

    Raises:
        JobError: The task ends in an error, or not one request fits in memory.
    """

    def ask(rows: Sequence[int]) -> TaskResults:
        model.batch_size_per_gpu = len(rows)
        return _ask(found, model, options, limit, is_chat)

    # One piece of work: what `batching` is given are the places of a batch, whose number it halves.
    return next(batching.over(range(batching.size), ask))


def _ask(found: FoundTask, model: LM, options: TaskOptions, limit: int | None, is_chat: bool) -> TaskResults:
    for task in found.tasks.values():  # as lm-eval's own runner does, which loads a model itself
        if options.num_fewshot is not None and task.get_config("num_fewshot") != 0:
            task.set_config(key="num_fewshot", value=options.num_fewshot)
        elif task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
    try:
        with quiet_harness(), _seeded():
            results = evaluate(
                model,
                {"tasks": dict(found.tasks), "groups": dict(found.groups)},
                limit=limit,
                bootstrap_iters=0,  # its unpaired intervals are not used
                system_instruction=options.system_instruction,
                apply_chat_template=is_chat,
                fewshot_as_multiturn=options.fewshot_as_multiturn,
                confirm_run_unsafe_code=options.confirm_run_unsafe_code,
            )
    except Exception as error:  # a task may bring code of anybody's
        if is_out_of_memory(error):
            raise
        said = " ".join(str(error).split()) or type(error).__name__
        raise JobError(f"{found.name}: lm-eval ended with {type(error).__name__}: {said}") from error
    assert results is not None
    return TaskResults(found, results, results["samples"])


@contextlib.contextmanager
def _seeded() -> Iterator[None]:
    """Within the context, random numbers are those of lm-eval's own runner; then they go on as they were."""
    plain, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        random.seed(DEFAULT_RANDOM_SEED)
        np.random.seed(DEFAULT_OTHER_SEED)
        torch.manual_seed(DEFAULT_OTHER_SEED)
        try:
            yield
        finally:
            random.setstate(plain)
            np.random.set_state(numpy)
