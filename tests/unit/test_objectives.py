"""An objective of log-probabilities gives the gradient of its loss, on either engine: a preference one, here."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import veneer
from tests.support.engines import COVERED, model_of, worst
from tests.support.preference import Preference, gradients_of, pairs, step
from tests.support.runs import tiny_run, write_rows
from veneer.data.batch import Batch
from veneer.engine.fused.engine import FusedEngine
from veneer.engine.fused.graphs import Graphs
from veneer.engine.interface import Engine, document_losses
from veneer.engine.objective import LIKELIHOOD, Objective, StepOutput, TrainedTokens
from veneer.engine.reference import ReferenceEngine
from veneer.model.quiet import quiet
from veneer.training.objectives import OBJECTIVES
from veneer.training.objectives.supervised import Supervised


def one_by_one(batch: Batch) -> list[Batch]:
    """The pairs of a batch, each in one of its own."""
    found, start = [], 0
    for pair in range(0, len(batch.lengths), 2):
        lengths = batch.lengths[pair : pair + 2]
        part = slice(start, start + sum(lengths))
        ids, targets, weights = batch.ids_T[part], batch.targets_T[part], batch.weights_T[part]
        values = {name: value[part] for name, value in batch.values.items()}
        found.append(Batch(ids, targets, weights, lengths, 0, 0.0, batch.scale, values))
        start = part.stop
    return found


def plain(model: Any, batch: Batch, beta: float) -> tuple[float, dict[str, torch.Tensor]]:
    """The same loss of the plain model's logits, and what autograd makes of it."""
    model.zero_grad()
    scores, start = [], 0
    for length in batch.lengths:
        part = slice(start, start + length)
        logits = model(input_ids=batch.ids_T[part][None], use_cache=False).logits[0].float()
        logprobs = torch.log_softmax(logits, -1).gather(1, batch.targets_T[part].clamp(min=0)[:, None])[:, 0]
        scores.append(((logprobs - batch.values["reference"][part]) * batch.weights_T[part]).sum())
        start += length
    margins = beta * (torch.stack(scores[::2]) - torch.stack(scores[1::2]))
    loss = -F.logsigmoid(margins).sum()
    (loss * batch.scale).backward()  # type: ignore[no-untyped-call]
    return loss.item(), gradients_of(model)


def padded(model: Any) -> FusedEngine:
    """The fused engine, with batches padded as on a GPU."""
    engine = FusedEngine(model)
    engine._pads = True
    return engine


ENGINES: dict[str, Callable[[Any], Engine]] = {
    "reference": ReferenceEngine,
    "reference for the CPU": lambda model: ReferenceEngine(model, for_cpu=True),
    "fused": FusedEngine,
    "fused, padded": padded,
    "fused, recomputing": lambda model: FusedEngine(model, gradient_checkpointing=True),
}
CASES = [(family, engine) for family in COVERED for engine in ENGINES] + [
    (family, engine) for family in ("gpt2", "opt") for engine in ENGINES if "fused" not in engine
]


@pytest.mark.parametrize(("family", "engine"), CASES)
def test_coefficients_that_depend_on_log_probabilities_give_the_losss_gradient(family: str, engine: str) -> None:
    model, batch = model_of(family), pairs().scaled(1 / 3)
    wanted_loss, wanted = plain(model, batch, beta=0.05)
    assert 0.1 < wanted_loss / 3 < 10, "pairs that are neither all learnt nor all lost"
    for batches in ([batch], one_by_one(batch)):
        output, found = step(ENGINES[engine](model), model, batches, Preference())
        assert output.loss.item() == pytest.approx(wanted_loss, rel=1e-4)
        assert output.weight == 3
        assert worst(found, wanted)[0] < 1e-3, worst(found, wanted)


def test_pairs_that_share_a_prompt_compute_it_once_and_train_as_if_each_were_whole() -> None:
    model, batch = model_of("llama"), pairs((40, 37, 40, 38), prompt=30)
    wanted_loss, wanted = plain(model, batch, beta=0.05)
    seen: list[int] = []
    model.get_input_embeddings().register_forward_hook(lambda module, given, out: seen.append(given[0].numel()))
    output, found = step(ReferenceEngine(model, for_cpu=True), model, [batch], Preference())
    assert sum(seen[-2:]) < batch.tokens
    assert output.loss.item() == pytest.approx(wanted_loss, rel=1e-4)
    assert worst(found, wanted)[0] < 1e-3, worst(found, wanted)


def test_rows_that_wait_for_their_coefficients_are_recomputed_as_they_were() -> None:
    """Rows of several lengths, each group with an attention of its own, under gradient checkpointing."""
    model, batch = model_of("llama"), pairs()
    _, wanted = plain(model, batch, beta=0.05)
    model.enable_input_require_grads()
    with quiet():
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    _, found = step(ReferenceEngine(model, for_cpu=True), model, [batch], Preference())
    assert worst(found, wanted)[0] < 1e-3, worst(found, wanted)


@pytest.mark.parametrize("engine", ["reference", "fused", "fused, padded"])
def test_coefficients_known_before_and_after_are_the_same(engine: str) -> None:
    @dataclass(frozen=True)
    class Told(Objective):
        """The likelihood, as an objective that says its coefficients."""

        def weight(self, batch: Batch) -> float:
            return batch.weight

        def __call__(self, tokens: TrainedTokens) -> tuple[StepOutput, torch.Tensor]:
            return LIKELIHOOD(tokens)[0], -tokens.weights_N

    model, batch = model_of("qwen3"), pairs().scaled(0.01)
    known, wanted = step(ENGINES[engine](model), model, [batch], Supervised())
    told, found = step(ENGINES[engine](model), model, [batch], Told())
    assert (told.loss, told.weight) == (known.loss, known.weight)
    assert known.weight.item() == pytest.approx(batch.weight, rel=1e-6)
    assert worst(found, wanted)[0] < 1e-5, worst(found, wanted)


@pytest.mark.parametrize("engine_type", [ReferenceEngine, FusedEngine])
def test_a_log_probability_for_each_trained_token_in_the_batchs_order(engine_type: Any) -> None:
    model, batch = model_of("llama", lora_dropout=0.3), pairs()
    engine = engine_type(model)
    with torch.no_grad():
        model.eval()
        alone = [model(input_ids=ids[None]).logits[0] for ids in torch.split(batch.ids_T, list(batch.lengths))]
    logprobs = torch.log_softmax(torch.cat(alone).double(), -1)
    is_trained = batch.targets_T >= 0
    wanted = logprobs[is_trained].gather(1, batch.targets_T[is_trained][:, None])[:, 0]
    found = engine.token_logprobs(batch)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert not found.requires_grad
    losses_T = torch.zeros(batch.tokens, dtype=wanted.dtype).masked_scatter(is_trained, -wanted) * batch.weights_T
    losses = [part.sum().item() for part in torch.split(losses_T, list(batch.lengths))]
    assert document_losses(engine, batch) == pytest.approx(losses, rel=1e-4)


def test_documents_sums_leave_out_padding_and_empty_documents() -> None:
    tokens = TrainedTokens(
        torch.tensor([1.0, 2.0, 4.0, 0.0, 0.0], dtype=torch.float64),
        torch.tensor([1.0, 0.5, 1.0, 0.0, 0.0]),
        torch.tensor([0, 2, 6, 3, 3]),  # of padding: a token that is not trained
        torch.tensor([0, 3, 5, 8, 8, 8], dtype=torch.int32),
        {},
    )
    assert tokens.sum_documents(tokens.logprobs_N).tolist() == [3, 0, 4, 0, 0]
    assert tokens.to_tokens(torch.tensor([5.0, 6.0, 7.0, 8.0, 9.0])).tolist() == [5, 5, 7, 9, 9]


def test_a_pass_for_another_objective_is_not_the_recorded_one(monkeypatch: pytest.MonkeyPatch) -> None:
    class Recording:
        def replay(self) -> None: ...

    recorded: list[Any] = []

    def record(self: Graphs, inputs: Any, objective: Any) -> Any:
        recorded.append((inputs, objective))
        output = StepOutput(torch.tensor(-1.0), torch.tensor(1.0), {"accuracy": torch.tensor(0.5)})
        return SimpleNamespace(graph=Recording(), inputs=inputs.cloned(), output=output)

    monkeypatch.setattr(Graphs, "_record", record)
    engine = FusedEngine(model_of("llama"))
    engine._graphs = Graphs(engine._pass)
    losses = [engine.forward_backward(pairs(), Preference(0.5)).loss.item() for _ in range(3)]
    assert losses[1:] == [-1, -1], "an equal one is the same"
    assert engine.forward_backward(pairs(), Preference(0.1)).loss.item() > 0
    assert engine.forward_backward(pairs(), Supervised()).loss.item() > 0
    assert [objective for _, objective in recorded] == [Preference(0.5)]


def test_what_the_data_carries_is_read_anew_by_a_replayed_pass() -> None:
    engine = padded(model_of("llama"))
    static = engine._to_device(pairs(), True, by_weight=False).cloned()
    new = pairs(seed=2)
    for tensor, other in zip(static.tensors, engine._to_device(new, True, by_weight=False).tensors, strict=True):
        tensor.copy_(other)
    engine._gradients()
    with torch.no_grad():
        replayed = engine._pass(static, Preference()).loss
    assert replayed == engine.forward_backward(new, Preference()).loss


def test_a_run_logs_its_objectives_metrics(
    tiny_model: Callable[..., Path], tmp_path: Path, rows: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Counting(Supervised):
        """Supervised training that counts each trained token twice."""

        def __call__(self, tokens: TrainedTokens) -> tuple[StepOutput, None]:
            output, _ = super().__call__(tokens)
            return output._replace(metrics={"twice": 2 * tokens.weights_N.sum()}), None

    path = write_rows(tmp_path / "rows.jsonl", rows)
    train = {"max_steps": 2, "logging_steps": 1, "gradient_accumulation_steps": 2}
    run = tiny_run(tiny_model(), path, tmp_path / "run", data={"validation": 4, "duplicates": "keep"}, train=train)
    monkeypatch.setitem(OBJECTIVES, "sft", lambda train: Counting())
    veneer.train(run)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {line["kind"] for line in lines} == {"train", "eval"}
    assert [line["twice"] for line in lines] == pytest.approx([2.0] * len(lines))
    assert all("perplexity" in line for line in lines if line["kind"] == "eval")
    assert all(set(line) & {"weight", "perplexity"} == set() for line in lines if line["kind"] == "train")
