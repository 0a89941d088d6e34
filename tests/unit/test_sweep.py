"""`veneer sweep` on a tiny model: combinations, resuming, losers that are stopped, the sweet spot, and bad input."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import veneer
from tests.support.runs import some_rows, tiny_run, write_rows
from veneer.api.sweep import _devices
from veneer.config import Interrupted, JobError, UserError
from veneer.config.load import to_yaml
from veneer.config.sweep import load_sweep
from veneer.evaluation.sweep import trials_of
from veneer.evaluation.trial_processes import TrialProcesses
from veneer.training.metrics import read_metrics

Write = Callable[..., Path]


@pytest.fixture
def write(tiny_model: Callable[..., Path], tmp_path: Path) -> Write:
    """Writes a sweep of a tiny run with eight held-out rows."""
    rows = [row | {"prompt": f"{n} {row['prompt']}"} for n, row in enumerate(some_rows() * 2)]
    train = write_rows(tmp_path / "rows.jsonl", rows)
    run = tiny_run(tiny_model(), train, tmp_path / "run", data={"validation": 8}, train={"max_steps": 8})
    (tmp_path / "run.yaml").write_text(to_yaml(run))

    def made(body: str, name: str = "tiny", **settings: Any) -> Path:
        path = tmp_path / f"{name}.yaml"
        path.write_text(f"run: run.yaml\noutput_dir: {tmp_path / name}\n{body}")
        return path

    return made


def table(swept: Any) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = swept.as_dict()["combinations"]
    for row in rows:
        seconds = row.pop("seconds")
        assert (seconds or 0) > 0 or row["status"] == "failed"
    return rows


def adapter(folder: Path) -> bytes:
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


def test_two_ranks_and_two_seeds_make_a_table_and_the_runs_to_take(write: Write, tmp_path: Path) -> None:
    swept = veneer.sweep(write("grid: {adapter.r: [2, 4]}\nseeds: 2\n"))
    found = table(swept)
    assert [one["settings"] for one in found] == [{"adapter.r": 2}, {"adapter.r": 4}]
    assert [one["status"] for one in found] == ["finished"] * 2
    assert found[1]["trainable"] == 2 * found[0]["trainable"]
    assert all(one["loss"]["low"] < one["loss"]["value"] < one["loss"]["high"] for one in found)
    best = min(found, key=lambda one: one["loss"]["value"])
    assert swept.as_dict()["best"] == best["number"]
    assert best["difference"] == {"value": 0, "low": 0, "high": 0}
    folder = tmp_path / "tiny"
    lines = [json.loads(line) for line in (folder / "trials.jsonl").read_text().splitlines()]
    assert [(line["trial"], line["steps"]) for line in lines] == [
        ("01-seed-42", 8), ("01-seed-43", 8), ("02-seed-42", 8), ("02-seed-43", 8),
    ]  # fmt: skip
    assert len({line["loss"] for line in lines}) == 4, "seeds and ranks differ"
    kept = {f"{one.combination.number:02d}-seed-42" for one in (swept.result.best, swept.result.sweet_spot)}
    assert {path.name for path in (folder / "trials").iterdir()} == kept
    assert (folder / "sweep.png").read_bytes()[:4] == b"\x89PNG"
    assert load_sweep(folder / "sweep.yaml").sweep.seeds == 2


def test_a_winning_run_trains_to_what_its_trial_came_to(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So a fresh adapter on a base that had another is as on a base that was just loaded."""
    swept = veneer.sweep(write("grid: {adapter.r: [8, 2], adapter.lora_dropout: [0.1]}\n"))
    monkeypatch.chdir(tmp_path)
    for result, name in ((swept.result.best, "best"), (swept.result.sweet_spot, "sweet-spot")):
        trained = veneer.train(veneer.load_run(tmp_path / "tiny" / f"{name}.yaml"))
        trial = tmp_path / "tiny" / "trials" / f"{result.combination.number:02d}-seed-42"
        assert adapter(Path(trained.run_dir)) == adapter(trial)
        assert result.loss is not None
        assert read_metrics(Path(trained.run_dir) / "metrics.jsonl")[-1]["loss"] == pytest.approx(result.loss.value)


def test_a_resumed_sweep_runs_what_is_missing_and_gives_the_same_numbers(write: Write, tmp_path: Path) -> None:
    body = "grid: {adapter.r: [2, 4], train.learning_rate: [1e-2, 1e-3]}\nrungs: [2, 4]\n"
    whole = veneer.sweep(write(body, "whole"))
    assert {one["status"] for one in table(whole)} == {"finished", "stopped"}

    for stop in (3, 6):  # within a rung, and at the end
        path, seen = write(body, f"stopped-{stop}"), list[dict[str, Any]]()

        def interrupt(record: dict[str, Any], seen: list[dict[str, Any]] = seen, stop: int = stop) -> None:
            seen.append(record)
            if len(seen) == stop:
                raise Interrupted(tmp_path)

        with pytest.raises(Interrupted):
            veneer.sweep(path, on_record=interrupt)
        assert len((tmp_path / f"stopped-{stop}" / "trials.jsonl").read_text().splitlines()) == stop
        again: list[dict[str, Any]] = []
        resumed = veneer.sweep(path, resume=True, on_record=again.append)
        names = [(record["trial"], record["rung"]) for record in seen + again]
        assert len(names) == len(set(names)), "none was run twice"
        assert table(resumed) == table(whole)
    nothing: list[dict[str, Any]] = []
    assert table(veneer.sweep(path, resume=True, on_record=nothing.append)) == table(whole)
    assert nothing == []


def test_trials_side_by_side_come_to_the_same_and_are_resumed_by_one_process(write: Write, tmp_path: Path) -> None:
    body = "grid: {adapter.r: [2, 4]}\n"
    whole = veneer.sweep(write(body, "whole"))
    path, seen = write(body, "many"), list[dict[str, Any]]()

    def interrupt(record: dict[str, Any]) -> None:
        seen.append(record)
        raise Interrupted(tmp_path)

    with pytest.raises(Interrupted):
        veneer.sweep(path, on_record=interrupt, gpus=2)
    again: list[dict[str, Any]] = []
    resumed = veneer.sweep(path, resume=True, on_record=again.append)
    assert sorted(record["trial"] for record in (*seen, *again)) == ["01-seed-42", "02-seed-42"]
    assert table(resumed) == table(whole)


PROCESS = """
import json, os, signal, sys, time
if os.environ.get("BREAKS") == os.environ["GPU"]:
    raise RuntimeError("its GPU is lost")
print(json.dumps({"loaded": True}), flush=True)
for line in sys.stdin:
    trial = json.loads(line)["trial"]
    if trial == os.environ.get("DIES"):
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.05)
    print(json.dumps({"facts": {"trial": trial, "gpu": os.environ["GPU"]}, "was_stopped": False}), flush=True)
"""


def test_processes_share_the_trials_and_one_that_dies_is_named(write: Write, tmp_path: Path) -> None:
    trials = trials_of(load_sweep(write("grid: {adapter.r: [2, 4, 8]}\nseeds: 2\n")))
    names = {trial.name for trial in trials}

    def processes(**environment: str) -> TrialProcesses:
        command = [sys.executable, "-c", PROCESS]
        return TrialProcesses(command, [{"GPU": str(number)} | environment for number in range(2)], tmp_path)

    with processes() as sound:
        sound.load()
        for rung in (4, None):
            found = [facts for facts, _ in sound.measured(trials, rung)]
            assert {facts["trial"] for facts in found} == names
            assert {facts["gpu"] for facts in found} == {"0", "1"}
    with processes(DIES="02-seed-43") as dying, pytest.raises(JobError, match="trial 02-seed-43") as caught:
        dying.load()
        list(dying.measured(trials, None))
    assert "SIGKILL" in str(caught.value)
    assert "go on with --resume" in str(caught.value)
    with processes(BREAKS="1") as broken, pytest.raises(JobError, match=r"process 1 .*RuntimeError: its GPU is lost"):
        broken.load()


def test_more_gpus_than_there_are_and_what_is_no_number_of_them_is_refused(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write("grid: {adapter.r: [2, 4]}\n")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,3")
    for gpus, said in ((0, "gpus = 0: is no"), (-2, "gpus = -2: is no"), (1.5, "gpus = 1.5: is no"), (3, "lists 2")):
        with pytest.raises(UserError, match=said):
            veneer.sweep(path, gpus=gpus)  # type: ignore[arg-type]
    assert not (tmp_path / "tiny").exists()
    assert _devices(2) == ["5", "3"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert _devices(2) == ["", ""], "GPUs that are hidden stay so"


def test_a_trial_that_was_interrupted_goes_on_within(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = veneer.sweep(write("grid: {adapter.r: [2, 4]}\n", "whole"))
    from veneer.training.job import TrainingJob

    fit = TrainingJob.fit

    def interrupted(job: TrainingJob, *given: Any) -> Any:
        if job.run.adapter is not None and job.run.adapter.r == 4:
            job.fit_until(3)
            raise Interrupted(job.folder.checkpoints)
        return fit(job, *given)

    path = write("grid: {adapter.r: [2, 4]}\n", "stopped")
    with monkeypatch.context() as patch:
        patch.setattr(TrainingJob, "fit", interrupted)
        with pytest.raises(Interrupted, match="stopped is where --resume goes on"):
            veneer.sweep(path)
    again: list[dict[str, Any]] = []
    assert table(veneer.sweep(path, resume=True, on_record=again.append)) == table(whole)
    assert [record["trial"] for record in again] == ["02-seed-42"]


def test_a_bad_rate_is_stopped_and_the_best_never_is(write: Write, tmp_path: Path) -> None:
    """A rate of 1 with 25 times the scale moves the weights as a rate of 1e2 would at first; 1e-8 moves nothing."""
    good, bad = [1e-2, 5e-3], ({"train.learning_rate": 1.0, "adapter.lora_alpha": 200}, {"train.learning_rate": 1e-8})
    trials = [{"train.learning_rate": rate} for rate in good]
    body = f"trials: {json.dumps([*trials, *bad])}\nsettings: {{train.lr_scheduler_type: constant}}\n"
    whole = table(
        veneer.sweep(write(f"trials: {json.dumps(trials)}\nsettings: {{train.lr_scheduler_type: constant}}\n"))
    )
    halved = table(veneer.sweep(write(body + "rungs: [4]\nkeep_runs: true\n", "halved")))
    assert [one["status"] for one in halved] == ["finished", "finished", "stopped", "stopped"]
    assert all(one["steps"] == 4 and one["difference"]["low"] > 0 for one in halved[2:])
    assert halved[:2] == whole, "trials that went over a rung came to the same"
    assert len(list((tmp_path / "halved" / "trials").iterdir())) == 4, "keep_runs keeps all"


def test_the_sweet_spot_is_the_smallest_that_is_not_shown_to_be_worse(write: Write) -> None:
    body = "trials:\n- {adapter.r: 8}\n- {adapter.r: 1, train.learning_rate: 1e-8}\n- {adapter.r: 4}\n"
    found = veneer.sweep(write(body)).as_dict()
    by_number = {one["number"]: one for one in found["combinations"]}
    assert by_number[2]["difference"]["low"] > 0, "hardly trained, and shown to be worse"
    spot = by_number[found["sweet_spot"]]
    assert spot["difference"]["low"] <= 0
    others = [one for one in by_number.values() if one["trainable"] < spot["trainable"]]
    assert all(one["difference"]["low"] > 0 for one in others)


def test_a_trial_that_fails_is_reported_and_the_others_go_on(
    write: Write, call: Callable[..., tuple[int, str, str]]
) -> None:
    body = "trials:\n- {adapter.target_modules: [nowhere]}\n- {adapter.target_modules: [q_proj]}\n"
    status, out, _ = call("sweep", str(write(body)), "--json")
    found = json.loads(out)
    assert (status, found["failed"], found["best"]) == (1, 1, 2)
    assert [one["status"] for one in found["combinations"]] == ["failed", "finished"]
    assert "nowhere" in found["combinations"][0]["message"]
    with pytest.raises(JobError, match=r"no combination could be trained.*nowhere"):
        veneer.sweep(write("grid: {adapter.target_modules: [[nowhere]]}\n", "none"))


def test_the_command_prints_the_table(write: Write, call: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    path = write("grid: {adapter.r: [2, 4]}\n")
    status, out, _ = call("sweep", str(path))
    assert status == 0
    assert "adapter.r=2" in out
    assert "sweet spot" in out
    assert f"train {tmp_path / 'tiny' / 'sweet-spot.yaml'}" in out
    status, _, err = call("sweep", str(path))
    assert status == 2
    assert "already holds a sweep" in err
    path.write_text(path.read_text() + "seeds: 2\n")
    status, _, err = call("sweep", str(path), "--resume")
    assert status == 2
    assert "began with another seeds" in err


def test_draws_are_within_their_range_and_the_same_each_time(write: Write) -> None:
    body = (
        "random:\n  trials: 20\n  seed: 3\n  settings:\n"
        "    train.learning_rate: {low: 1e-5, high: 1e-3}\n    adapter.r: {low: 4, high: 64}\n"
        "    adapter.lora_dropout: [0.0, 0.1]\n"
    )
    planned = load_sweep(write(body))
    assert len(planned.combinations) == 20
    runs = [one.run for one in planned.combinations]
    assert all(1e-5 <= run.train.learning_rate <= 1e-3 for run in runs if run.train.learning_rate != "auto")
    adapters = [run.adapter for run in runs if run.adapter is not None]
    assert {type(adapter.r) for adapter in adapters} == {int}
    assert len({adapter.r for adapter in adapters}) > 5
    assert {adapter.lora_dropout for adapter in adapters} == {0.0, 0.1}
    again = load_sweep(write(body, "again"))
    assert [one.settings for one in again.combinations] == [one.settings for one in planned.combinations]
    both = load_sweep(
        write("grid: {adapter.r: [2, 4]}\ntrials: [{train.weight_decay: 0.1}, {adapter.lora_alpha: 4}]\n")
    )
    assert [one.name for one in both.combinations] == [
        "adapter.r=2, train.weight_decay=0.1", "adapter.r=2, adapter.lora_alpha=4",
        "adapter.r=4, train.weight_decay=0.1", "adapter.r=4, adapter.lora_alpha=4",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ("grid: {}\n", "the sweep is empty: it varies no setting"),
        ("grid:\n  adapter.r: []\n", "tiny.yaml:4: grid.adapter.r: is empty: name at least one value"),
        ("gird: {adapter.r: [2]}\n", "tiny.yaml:3: unknown key `gird`; did you mean `grid`?"),
        ("grid:\n  adapter.rank: [2]\n", "tiny.yaml:4: unknown key `adapter.rank`; it is called `adapter.r` here"),
        ("grid:\n  train.leanring_rate: [1]\n", "did you mean `learning_rate`?"),
        ("grid:\n  adapter.r: [2, 0]\n", "tiny.yaml:4: adapter.r = 0: should be greater than or equal to 1"),
        ("grid:\n  adapter.r: 2\n", "tiny.yaml:4: grid.adapter.r: "),
        ("grid:\n  r: [2]\n", "tiny.yaml:4: `r` is not of the form section.key"),
        ("grid: {adapter.r: [2]}\nsettings:\n  train.max_step: 4\n", "tiny.yaml:5: unknown key `train.max_step`"),
        ("grid:\n  data.max_length: [64]\n", "tiny.yaml:4: `data.max_length`: base and rows are loaded once"),
        ("grid:\n  train.seed: [1, 2]\n", "`seeds` says with how many seeds"),
        ("grid:\n  train.engine: [fused]\n", "it changes no number"),
        ("grid: {adapter.r: [2]}\ntrials: [{adapter.r: 4}]\n", "`adapter.r` is varied twice"),
        ("grid: {adapter.r: [2]}\nrungs: [4, 2]\n", "tiny.yaml:4: rungs = [4, 2]: should rise"),
        ("grid: {adapter.r: [2]}\nrungs: [8]\n", "rungs = [8]: a run with adapter.r=2 has 8 steps"),
        ("grid: {adapter.r: [2]}\nsettings: {data.validation: 0}\n", "held-out rows, of which the run has 0"),
        ("grid: {adapter.r: [2]}\nsettings: {train.learning_rate: auto}\n", "train.learning_rate = auto: each trial"),
        ("seeds: 100\nrandom: {trials: 20, settings: {train.weight_decay: [0]}}\n", "2,000 trials"),
        ("random: {trials: 2, settings: {adapter.r: {low: 8, high: 4}}}\n", "low = 8 should be less than high = 4"),
        ("random: {trials: 2, settings: {adapter.r: {low: 8, hihg: 9}}}\n", "tiny.yaml:3: "),
    ],
)  # fmt: skip
def test_bad_input_is_one_message(
    body: str, told: str, write: Write, call: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    status, _, err = call("sweep", str(write(body)))
    assert status == 2, err
    assert told in err
    assert not (tmp_path / "tiny").exists()


def test_resuming_nothing_is_refused(write: Write) -> None:
    with pytest.raises(UserError, match="holds no sweep to resume"):
        veneer.sweep(write("grid: {adapter.r: [2]}\n"), resume=True)
