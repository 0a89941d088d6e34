"""Answers depend on neither batch nor order, greedy or sampled; what was answered is kept and not answered again."""

import random
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import veneer
from tests.support.runs import some_rows
from veneer.api.load import LoadedModel
from veneer.config.sampling import Sampling
from veneer.data.conversation import Message
from veneer.evaluation.decoding import generation_config, row_seeds, stop_ids_of
from veneer.evaluation.generation import GREEDY, Continuation, continue_prompts, generate
from veneer.evaluation.partial import KeptAnswers, PartialAnswers

ROUNDING = 1e-4  # between two shapes of a batch, in the log-probability of a token in float32
HOT = Sampling(temperature=5.0, top_k=4, seed=3)  # few bounds for a drawn number to be within rounding of


@pytest.fixture(scope="module")
def model(run: Path) -> LoadedModel:
    """A tiny model in float32 that learnt its rows."""
    return veneer.load(str(run))


@pytest.fixture(scope="module")
def prompts(model: LoadedModel) -> list[list[int]]:
    """Prompts of unlike lengths, most of which it has not seen, and some twice."""
    texts = [row["prompt"] for row in some_rows()]
    return [model.renderer.prompt_ids([Message("user", text)]) for text in [*texts, *texts[:3]]]


@pytest.fixture(scope="module")
def continued(model: LoadedModel, prompts: list[list[int]]) -> Callable[..., list[Continuation]]:
    def answer(order: list[int], size: int, sampling: Sampling = GREEDY, likeliest: int = 0) -> list[Continuation]:
        tokenizer = model.renderer.tokenizer
        config = generation_config(stop_ids_of(model.model, model.renderer), tokenizer.pad_token_id, 12, sampling)
        chosen = [prompts[n] for n in order]
        found = continue_prompts(model.model, tokenizer, chosen, config, size, sampling=sampling, likeliest=likeliest)
        return [found[order.index(n)] for n in range(len(order))]

    return answer


def ids_of(found: list[Continuation], pad: int) -> list[list[int]]:
    """The tokens of each answer, without the padding behind it."""
    answers = []
    for continuation in found:
        ids = list(continuation.ids)
        while len(ids) > 1 and ids[-1] == ids[-2] == pad:
            ids.pop()
        answers.append(ids)
    return answers


@pytest.mark.parametrize("sampling", [GREEDY, HOT], ids=["greedy", "sampled"])
def test_tokens_depend_on_neither_batch_nor_order(
    sampling: Sampling, model: LoadedModel, prompts: list[list[int]], continued: Callable[..., list[Continuation]]
) -> None:
    pad = model.renderer.tokenizer.pad_token_id
    usual = list(range(len(prompts)))
    shuffled = random.Random(1).sample(usual, len(usual))
    # Equal prompts draw one after another, so among themselves they keep their order.
    twice = {n: n + 16 for n in range(3)}
    for first, second in twice.items():
        one, two = shuffled.index(first), shuffled.index(second)
        if one > two:
            shuffled[one], shuffled[two] = second, first
    whole = ids_of(continued(usual, 16, sampling), pad)
    for order, size in ((usual, 1), (usual, 19), (shuffled, 5)):
        assert ids_of(continued(order, size, sampling), pad) == whole
    if sampling is not GREEDY:
        assert any(whole[first] != whole[second] for first, second in twice.items()), "they draw other numbers"


def test_the_margin_of_greedy_answers_is_far_above_rounding(continued: Callable[..., list[Continuation]]) -> None:
    """Why the tokens are equal: the runner-up is further away than another shape of the batch moves a probability."""
    order = list(range(19))
    whole, single = (continued(order, size, likeliest=2) for size in (16, 1))
    margins, moved = [], []
    for one, other in zip(whole, single, strict=True):
        for step, same in zip(one.steps, other.steps, strict=False):
            best, second = sorted(step.values(), reverse=True)
            margins.append(best - second)
            moved += [abs(step[token] - same[token]) for token in step.keys() & same.keys()]
    assert max(moved) < ROUNDING
    assert min(margins) > 2 * ROUNDING


def test_sampling_leaves_the_random_numbers_of_others_alone(model: LoadedModel, prompts: list[list[int]]) -> None:
    before = torch.get_rng_state()
    answers = generate(model.model, model.renderer, prompts, 12, sampling=HOT)
    assert torch.equal(torch.get_rng_state(), before)
    assert answers != generate(model.model, model.renderer, prompts, 12)
    torch.manual_seed(1234)
    assert answers == generate(model.model, model.renderer, prompts, 12, sampling=HOT)


def test_draws_follow_the_probabilities() -> None:
    from veneer.evaluation.decoding import SampledTokens

    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05])
    seeds = row_seeds([[n] for n in range(4000)], 0)
    scores = probabilities.log().repeat(len(seeds), 1)
    chosen = SampledTokens(Sampling(temperature=1.0), seeds)(torch.zeros(len(seeds), 1), scores).argmax(-1)
    shares = torch.bincount(chosen, minlength=4) / len(seeds)
    assert (shares - probabilities).abs().max() < 4 * (0.25 / len(seeds)) ** 0.5
    few: Any = SampledTokens(Sampling(temperature=1.0, top_k=2), seeds)(torch.zeros(len(seeds), 1), scores).argmax(-1)
    assert set(few.tolist()) == {0, 1}


def test_a_rows_seed_is_its_own() -> None:
    one = row_seeds([[1, 2], [3], [1, 2]], 5)
    assert len(set(one)) == 3
    assert row_seeds([[3], [1, 2], [1, 2]], 5) == [one[1], one[0], one[2]]
    assert row_seeds([[1, 2]], 6) != one[:1]
    assert all(0 <= seed < 2**63 for seed in one)


def test_an_interrupted_evaluation_goes_on_with_the_rows_that_are_left(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(run, tmp_path / "run")
    rows = str(run.parent / "rows")
    whole = veneer.evaluate(folder, rows, 12)
    assert not list((folder / "evaluations").glob("partial-*"))
    settings = (folder / "run.yaml").read_text()
    (folder / "run.yaml").write_text(re.sub(r"batch_size: 16", "batch_size: 3", settings))
    total = 2 * whole.evaluation.base.rows
    assert total == 24
    done = 0

    def stop_at(count: int) -> None:
        nonlocal done
        done += count
        if done >= total * 3 // 4:  # within the tuned model's answers
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        veneer.evaluate(folder, rows, 12, on_done=stop_at)
    (file,) = (folder / "evaluations").glob("partial-*")
    with file.open("a") as lines:
        lines.write('{"model": "tuned", "row": 1')  # what a kill leaves of a line
    generated: list[int] = []
    keep = KeptAnswers.keep

    def counted(self: KeptAnswers, answers: Mapping[int, list[int]]) -> None:
        generated.append(len(answers))
        keep(self, answers)

    monkeypatch.setattr(KeptAnswers, "keep", counted)
    told: list[int] = []
    again = veneer.evaluate(folder, rows, 12, on_begin=told.append, on_done=told.append)
    assert sum(generated) == total - done
    assert told[0] == sum(told[1:]) == total
    assert again.evaluation.samples() == whole.evaluation.samples()
    assert not file.exists()
    # Another evaluation has nothing of it.
    with pytest.raises(KeyboardInterrupt):
        veneer.evaluate(folder, rows, 12, on_done=stop_at)
    generated.clear()
    assert veneer.evaluate(folder, rows, 6).as_dict()["rows"] == 6
    assert sum(generated) == 12
    assert file.exists()


def test_a_damaged_file_of_answers_is_not_used(tmp_path: Path) -> None:
    facts = {"rows": "x"}
    first = PartialAnswers(tmp_path, facts)
    first.of("base").keep({0: [1, 2], 1: [3]})
    assert PartialAnswers(tmp_path, facts).of("base").known == {0: [1, 2], 1: [3]}
    assert PartialAnswers(tmp_path, facts).of("tuned").known == {}
    assert PartialAnswers(tmp_path, {"rows": "y"}).of("base").known == {}
    first.path.write_text("no line of ours\n" + first.path.read_text())
    assert PartialAnswers(tmp_path, facts).of("base").known == {}
