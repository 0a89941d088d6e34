"""Memory that really runs out in the middle of a run on a CUDA GPU."""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.notices import notified
from tests.support.runs import losses, tiny_run, write_rows
from tests.support.tiny import FAMILIES, save_tiny_model
from veneer.config import JobError, Train
from veneer.training.job import TrainingJob
from veneer.training.optimizer import allocate_states, build_optimizer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
OPTIMIZERS = ["adamw_torch", "adamw_8bit", "adamw_32bit", "paged_adamw_8bit", "paged_adamw_32bit"]
WIDE = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 4}


@pytest.fixture(autouse=True)
def _whole_card() -> Iterator[None]:
    """The process may use the whole card again after a test."""
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)


def make_job(folder: Path, engine: str) -> TrainingJob:
    """A job of 16 rows of about 100 tokens a step, whose passes need some hundred MiB."""
    name, settings = FAMILIES["llama"]
    folder.mkdir()
    save_tiny_model((name, settings | WIDE), folder / "base")
    rows = [
        {"prompt": f"what does the cat say {n} " + "please " * (40 + n % 9), "completion": f"the cat says {n}"}
        for n in range(32)
    ]
    train: dict[str, Any] = {"engine": engine, "per_device_train_batch_size": 16, "logging_steps": 1, "max_steps": 4}
    train["gradient_checkpointing"] = True  # recorded passes would hold their memory, and never run out of it
    path = write_rows(folder / "rows.jsonl", rows)
    return TrainingJob(tiny_run(folder / "base", path, folder / "run", data={"max_length": 1024}, train=train))


CHUNK = 2**21  # bytes: more than what the allocator takes from its pool of small blocks


class Neighbour:
    """A listener that leaves a share of a step's memory, once two steps are done, as another process may."""

    def __init__(self, share: float) -> None:
        self._share = share
        self._held: list[torch.Tensor] = []

    def __call__(self, record: dict[str, Any]) -> None:
        if record["step"] == 1:
            torch.cuda.reset_peak_memory_stats()
        if record["step"] == 2:
            torch.cuda.empty_cache()
            needed = torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()
            total = torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + self._share * needed) / total)
            with suppress(torch.OutOfMemoryError):  # what is reserved and free is the neighbour's too
                while True:
                    self._held.append(torch.empty(CHUNK, dtype=torch.uint8, device="cuda"))
            del self._held[-max(1, round(self._share * needed / CHUNK)) :]


@pytest.mark.parametrize("engine", ["reference", "fused"])
def test_a_run_goes_on_with_what_memory_is_left(engine: str, tmp_path: Path) -> None:
    make_job(tmp_path / "whole", engine).fit()
    with notified("out of memory in step 3 "):
        make_job(tmp_path / "short", engine).fit((Neighbour(0.5),))
    assert losses(tmp_path / "short" / "run") == pytest.approx(losses(tmp_path / "whole" / "run"), rel=1e-3)


@pytest.mark.parametrize("engine", ["reference", "fused"])
def test_a_row_that_does_not_fit_ends_the_run_with_what_it_needs(engine: str, tmp_path: Path) -> None:
    with (
        notified("cut in two"),
        pytest.raises(JobError, match=r"step 3 .*tried to allocate .*predicted to need.*\n  fix"),
    ):
        make_job(tmp_path / "run", engine).fit((Neighbour(0.01),))


@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_an_update_allocates_nothing_once_the_states_are_there(optim: str) -> None:
    parameters = [torch.nn.Parameter(torch.randn(512, size, device="cuda")) for size in (4, 512)]
    optimizer = build_optimizer(parameters, Train.model_validate({"optim": optim}), "cuda")
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    allocate_states(optimizer)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    optimizer.step()
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() == before
