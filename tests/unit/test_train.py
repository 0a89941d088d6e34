"""The loop: repeatable, resumable, and the same however a step is cut."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

import veneer
from tests.support.notices import notified
from tests.support.runs import losses, some_rows, tiny_run, write_rows
from tests.support.tiny import CHATML
from veneer.config import Interrupted, JobError, RunFolder, Train, UserError
from veneer.model.tuned import find_tuned
from veneer.training import stop
from veneer.training.job import TrainingJob
from veneer.training.optimizer import build_optimizer, get_state, set_state
from veneer.training.schedule import learning_rate

Runner = Callable[..., Path]


@pytest.fixture
def train(tiny_model: Callable[..., Path], tmp_path: Path, rows: list[dict[str, Any]]) -> Runner:
    """Trains a tiny Llama with some settings changed; gives the run's folder."""
    path = write_rows(tmp_path / "rows.jsonl", rows)
    count = 0

    def run(family: str = "llama", chat: bool = True, listeners: Any = (), **sections: Any) -> Path:
        nonlocal count
        count += 1
        folder = tmp_path / f"run-{count}"
        TrainingJob(tiny_run(tiny_model(family, chat), path, folder, **sections)).fit(listeners)
        return folder

    return run


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


class StopAfter:
    """A listener that sends a signal, or several, once a step is done."""

    def __init__(self, step: int, times: int = 1) -> None:
        self.step, self.times = step, times

    def __call__(self, record: dict[str, Any]) -> None:
        if record["step"] == self.step:
            for _ in range(self.times):
                os.kill(os.getpid(), signal.SIGINT)


def test_two_runs_of_the_same_file_give_the_same_losses(train: Runner) -> None:
    settings: dict[str, Any] = {"quantization": {"bits": 4}, "adapter": {"lora_dropout": 0.2}}
    assert losses(train(**settings)) == losses(train(**settings))


@pytest.mark.parametrize(
    ("optim", "packing", "dtype"),  # every pair of two
    [
        *(("adamw_torch", False, "float32"), ("adamw_torch", True, "float16")),
        *(("adamw_8bit", False, "float16"), ("adamw_8bit", True, "float32")),
    ],
)
def test_a_resumed_run_gives_the_losses_of_one_that_was_not(
    optim: str, packing: bool, dtype: str, train: Runner, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {
        "model": {"dtype": dtype},
        "train": {"optim": optim, "save_steps": 2, "eval_steps": 2},
        "adapter": {"lora_dropout": 0.2, "r": 64},
        "data": {"packing": packing, "max_length": 64, "validation": 2},
    }
    whole = train(**settings)
    with pytest.raises(Interrupted):
        train(listeners=(StopAfter(3),), **settings)
    folder = tmp_path / "run-2"
    assert not (folder / "adapter").exists()
    run = veneer.load_run(folder / "run.yaml")
    TrainingJob(run, resume=True).fit()
    assert losses(folder) == losses(whole)
    assert losses(folder, "eval") == losses(whole, "eval")
    for name, tensor in adapter(whole).items():
        assert torch.equal(tensor, adapter(folder)[name])


def test_a_second_ctrl_c_ends_a_run_at_once_and_what_was_saved_goes_on(
    train: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"train": {"save_steps": 2}, "adapter": {"lora_dropout": 0.2}}
    whole = train(**settings)
    monkeypatch.setattr(stop, "IMPATIENT_SECONDS", -1.0)
    with pytest.raises(KeyboardInterrupt):
        train(listeners=(StopAfter(3, times=2),), **settings)
    folder = RunFolder(tmp_path / "run-2")
    assert [path.name for path in folder.checkpoints.iterdir()] == ["step-000002"], "the step under way is not saved"
    TrainingJob(veneer.load_run(folder.run), resume=True).fit()
    assert losses(folder.path) == losses(whole)


@pytest.mark.parametrize("cut", [(4, 2), (2, 4), (1, 8)])
def test_how_a_step_is_cut_changes_nothing(cut: tuple[int, int], train: Runner) -> None:
    def trained(batch_size: int, accumulation: int) -> dict[str, torch.Tensor]:
        settings = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": accumulation}
        return adapter(train(train=settings | {"max_steps": 5, "learning_rate": 1e-3}))

    whole, parts = trained(8, 1), trained(*cut)
    for name, tensor in whole.items():
        torch.testing.assert_close(parts[name], tensor, rtol=1e-3, atol=2e-5)


def test_attention_backend_and_float16_are_used(train: Runner, tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    run = tiny_run(tiny_model(), str(tmp_path / "rows.jsonl"), tmp_path / "x", model={"attn_implementation": "eager"})
    assert TrainingJob(run).model.config._attn_implementation == "eager"
    seen = losses(train(model={"dtype": "float16"}))
    assert seen[-1] < seen[0]


def test_the_folder_holds_what_the_contract_names(train: Runner) -> None:
    folder = RunFolder(train(train={"save_steps": 1, "save_total_limit": 2, "eval_steps": 3}, data={"validation": 2}))
    assert [path.name for path in sorted(folder.checkpoints.iterdir())] == ["step-000005", "step-000006"]
    assert len(losses(folder.path, "eval")) == 2
    for path in (folder.run, folder.environment, folder.plan, folder.ledger, folder.metrics):
        assert path.stat().st_size > 0
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "chat_template.jinja"} <= {
        path.name for path in folder.adapter.iterdir()
    }
    assert not [path for path in folder.path.rglob("*") if path.name.startswith(".")], "nothing half-written is left"
    plan = json.loads(folder.plan.read_text())
    assert plan["parameters"]["trainable"] == sum(t.numel() for t in adapter(folder.path).values())


@pytest.mark.usefixtures("drawn")
def test_the_public_function_writes_card_passport_and_plot(
    tiny_model: Callable[..., Path], tmp_path: Path, rows: list[dict[str, Any]]
) -> None:
    run = tiny_run(tiny_model(), write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "run")
    result = veneer.train(run)
    assert result.steps == 6
    assert result.final_loss == losses(tmp_path / "run")[-1]
    assert result.tokens_per_second > 0
    folder = tmp_path / "run"
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "loss.png").stat().st_size > 5000, "it is drawn"
    assert "rank, alpha | 4, 8" in (folder / "adapter" / "README.md").read_text()
    assert json.loads((folder / "adapter" / "passport.json").read_text())["base"]["name"] == tiny_model().name


def test_a_finished_or_foreign_folder_is_refused(train: Runner, tmp_path: Path) -> None:
    folder = train()
    run = veneer.load_run(folder / "run.yaml")
    with pytest.raises(UserError, match="already holds a run"):
        TrainingJob(run)
    with pytest.raises(UserError, match="this run is finished"):
        TrainingJob(run, resume=True)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").touch()
    moved = run.model_copy(update={"train": run.train.model_copy(update={"output_dir": tmp_path / "photos"})})
    with pytest.raises(UserError, match="is not empty"):
        TrainingJob(moved)
    with pytest.raises(UserError, match="holds no run to resume"):
        TrainingJob(moved, resume=True)


@pytest.fixture(scope="module")
def once_stopped(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Rows and a run that was interrupted after its third step, in one folder; and a copy of that to begin from."""
    folder = tmp_path_factory.mktemp("stopped")
    run = tiny_run(tiny_model(), write_rows(folder / "rows.jsonl", some_rows()), folder / "run")
    with pytest.raises(Interrupted, match="is where --resume goes on"):
        TrainingJob(run).fit((StopAfter(3),))
    copy = tmp_path_factory.mktemp("copy") / "stopped"
    shutil.copytree(folder, copy)
    return folder, copy


@pytest.fixture
def stopped(once_stopped: tuple[Path, Path]) -> Path:
    """The folder of a run that was interrupted after its third step, as it was then; its rows lie beside it."""
    folder, copy = once_stopped
    shutil.rmtree(folder)
    shutil.copytree(copy, folder)
    return folder / "run"


def test_a_run_goes_on_with_the_date_that_its_template_was_given(train: Runner, tmp_path: Path) -> None:
    """Tomorrow is a run file without a date on another day: as today's, it says nothing of the date."""
    template = tmp_path / "dated.jinja"
    template.write_text("{{ strftime_now('%d %b %Y') }}" + CHATML)
    asked = {"chat_template": str(template), "validation": 2}
    with pytest.raises(Interrupted):
        train(data=asked | {"template_date": "2024-02-29"}, listeners=(StopAfter(3),))
    folder = RunFolder(tmp_path / "run-1")
    job = TrainingJob(veneer.load_run(folder.run, ["data.template_date=null"]), resume=True)
    assert "29 Feb 2024" in str(job.renderer.template)
    job.fit()
    assert json.loads(folder.ledger.read_text())["sha256"] == job.data.ledger.sha256
    # What ships holds the date as well, whatever day it is read on.
    tuned = find_tuned(str(folder.path))
    assert tuned.renderer.template == job.renderer.template
    assert str(job.run.data.template_date) == "2024-02-29"


def test_resuming_with_other_settings_is_refused(stopped: Path) -> None:
    run = veneer.load_run(stopped / "run.yaml", ["train.learning_rate=0.5", "train.logging_steps=2"])
    with pytest.raises(UserError, match=r"train\.learning_rate: was 0\.01, is 0\.5") as caught:
        TrainingJob(run, resume=True)
    assert "logging_steps" not in str(caught.value)


def test_a_run_may_be_resumed_with_its_steps_cut_otherwise(stopped: Path) -> None:
    """The advice for too little memory is one that --resume takes."""
    cut = ["train.per_device_train_batch_size=2", "train.gradient_accumulation_steps=2"]
    TrainingJob(veneer.load_run(stopped / "run.yaml", [*cut, "train.gradient_checkpointing=true"]), resume=True).fit()
    assert len(losses(stopped)) == 6


def test_resuming_in_another_precision_is_refused(stopped: Path) -> None:
    run = (stopped / "run.yaml").read_text().replace("optim: auto", "optim: adamw_torch")
    (stopped / "run.yaml").write_text(run)
    plan = json.loads((stopped / "plan.json").read_text())
    (stopped / "plan.json").write_text(json.dumps(plan | {"optim": "adamw_8bit"}))
    with pytest.raises(UserError, match=r"train\.optim: the run began with adamw_8bit, on this machine .* adamw_torch"):
        TrainingJob(veneer.load_run(stopped / "run.yaml"), resume=True)


def test_a_run_that_fails_after_its_last_step_is_resumed_from_there(train: Runner, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"train": {"save_steps": None}, "data": {"validation": 2}}
    whole = train(**settings)

    class Fails(StopAfter):
        def __call__(self, record: dict[str, Any]) -> None:
            if record["kind"] == "eval":
                raise RuntimeError

    with pytest.raises(RuntimeError):
        train(listeners=(Fails(0),), **settings)
    folder = tmp_path / "run-2"
    TrainingJob(veneer.load_run(folder / "run.yaml"), resume=True).fit()
    assert losses(folder) == losses(whole)
    assert losses(folder, "eval") == losses(whole, "eval")
    for name, tensor in adapter(whole).items():
        assert torch.equal(tensor, adapter(folder)[name])


def test_rows_longer_than_the_model_has_positions_are_refused(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"prompt": "the cat " * 300, "completion": "the dog"}] * 4)
    run = tiny_run(tiny_model("gpt2"), path, tmp_path / "run", data={"max_length": 2048})
    with pytest.raises(UserError, match=r"tokens, the model has positions for 256\n.*data\.max_length to 256"):
        TrainingJob(run)


def test_tokens_beyond_the_embeddings_are_refused(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_model(), base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens([f"<{n}>" for n in range(1000)] + ["<odd>"])
    tokenizer.save_pretrained(base)
    rows = [{"prompt": "the cat", "completion": "the dog"}, {"prompt": "the <odd> cat", "completion": "the dog"}]
    run = tiny_run(base, write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "run")
    with pytest.raises(UserError, match=r"rows\.jsonl:2: holds token \d+ \(<odd>\), the model has embeddings for \d+"):
        TrainingJob(run)


def test_resuming_on_other_data_is_refused(stopped: Path) -> None:
    rows = stopped.with_name("rows.jsonl")
    rows.write_text("".join(reversed(rows.read_text().splitlines(keepends=True))))
    with pytest.raises(UserError, match="not what this run began with: training rows"):
        TrainingJob(veneer.load_run(stopped / "run.yaml"), resume=True).fit()


@pytest.mark.parametrize("changed", ["weights", "rope_theta", "rms_norm_eps", "held-out rows"])
def test_resuming_on_another_base_or_other_held_out_rows_is_refused(
    changed: str, train: Runner, tiny_model: Callable[..., Path], tmp_path: Path, rows: list[dict[str, Any]]
) -> None:
    """Under the same names: each would go on in silence and train another adapter, or be judged by other rows."""
    base, held_out = tmp_path / "base", tmp_path / "held.jsonl"
    shutil.copytree(tiny_model(), base)
    write_rows(held_out, rows[:2])
    with pytest.raises(Interrupted):
        train(listeners=(StopAfter(3),), model={"base": str(base)}, data={"validation": str(held_out)})
    if changed == "weights":
        weights = load_file(base / "model.safetensors")
        save_file(weights | {"model.norm.weight": weights["model.norm.weight"] * 1.01}, base / "model.safetensors")
    elif changed == "held-out rows":
        write_rows(held_out, rows[1:3])
    else:
        config = json.loads((base / "config.json").read_text())
        theta = {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
        config |= theta if changed == "rope_theta" else {"rms_norm_eps": 1e-5}
        (base / "config.json").write_text(json.dumps(config))
    told = {"weights": "the base's weights", "held-out rows": "held-out rows"}.get(changed, r"\(config\.json\)")
    with pytest.raises(UserError, match=f"not what this run began with: .*{told}"):
        TrainingJob(veneer.load_run(tmp_path / "run-1" / "run.yaml"), resume=True).fit()


def test_a_run_is_resumed_on_its_base_in_another_place(
    train: Runner, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    shutil.copytree(tiny_model(), tmp_path / "base")
    with pytest.raises(Interrupted):
        train(listeners=(StopAfter(3),), model={"base": str(tmp_path / "base")})
    (tmp_path / "base").rename(tmp_path / "moved")
    settings = [f"model.base={tmp_path / 'moved'}"]
    TrainingJob(veneer.load_run(tmp_path / "run-1" / "run.yaml", settings), resume=True).fit()
    assert len(losses(tmp_path / "run-1")) == 6


@pytest.mark.parametrize("damage", ["lists nothing", "leaves one out", "another step", "no step", "scale", "a file"])
def test_a_manifest_that_does_not_answer_for_its_checkpoint_is_refused(damage: str, stopped: Path) -> None:
    (path,) = (stopped / "checkpoints").glob("*/manifest.json")
    manifest = json.loads(path.read_text())
    if damage == "lists nothing":
        manifest["sha256"] = {}
    elif damage == "leaves one out":
        del manifest["sha256"]["optimizer.safetensors"]
    elif damage == "another step":
        manifest["step"] += 1
    elif damage == "no step":
        del manifest["step"]
    elif damage == "scale":
        manifest["loss_scale"] = {"scale": 3.0}
    else:
        (path.parent / "adapter_config.json").write_text("{}")
    path.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="damaged"):
        TrainingJob(veneer.load_run(stopped / "run.yaml"), resume=True).fit()
    with pytest.raises(UserError, match="damaged"):  # and by evaluate, merge and all others that take a checkpoint
        find_tuned(str(path.parent))


def test_a_plan_without_a_precision_is_damaged(train: Runner) -> None:
    run = train(train={"max_steps": 1})
    plan = json.loads((run / "plan.json").read_text())
    for found in (True, "bfloat15", None):
        (run / "plan.json").write_text(json.dumps(plan | {"dtype": found}))
        with pytest.raises(UserError, match=r"plan\.json: damaged: dtype"):
            find_tuned(str(run))


def test_a_run_does_not_go_on_from_a_plan_of_another_precision(stopped: Path) -> None:
    plan = json.loads((stopped / "plan.json").read_text())
    (stopped / "plan.json").write_text(json.dumps(plan | {"dtype": True}))
    with pytest.raises(UserError, match=r"model\.dtype: the run began with True"):
        TrainingJob(veneer.load_run(stopped / "run.yaml"), resume=True)


def test_a_damaged_token_cache_is_made_anew(train: Runner, empty_cache: Path) -> None:
    whole = train()
    (ids,) = empty_cache.glob("data/*/ids.bin")
    content = bytearray(ids.read_bytes())
    content[40] ^= 1
    ids.write_bytes(content)
    with notified("damaged; the rows are tokenized again"):
        again = train()
    assert losses(again) == losses(whole)


def test_a_damaged_checkpoint_is_refused(stopped: Path) -> None:
    (path,) = (stopped / "checkpoints").glob("*/optimizer.safetensors")
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match=r"optimizer\.safetensors: missing or damaged"):
        TrainingJob(veneer.load_run(stopped / "run.yaml"), resume=True).fit()


@pytest.mark.parametrize("damage", ["altered", "cut", "without its manifest"])
def test_a_run_goes_on_from_its_last_whole_checkpoint(damage: str, train: Runner, tmp_path: Path) -> None:
    whole = train(train={"save_steps": 1})
    with pytest.raises(Interrupted):
        train(listeners=(StopAfter(3),), train={"save_steps": 1})
    run = tmp_path / "run-2"
    newest = max((run / "checkpoints").iterdir())
    if damage == "without its manifest":
        (newest / "manifest.json").unlink()
    else:
        file = newest / "adapter_model.safetensors"
        content = file.read_bytes()
        file.write_bytes(
            content[:-1] + bytes([content[-1] ^ 1]) if damage == "altered" else content[: len(content) // 2]
        )
    with notified("training goes on from the checkpoint before it"):
        TrainingJob(veneer.load_run(run / "run.yaml"), resume=True).fit()
    assert losses(run) == losses(whole)
    assert (run / "adapter" / "adapter_model.safetensors").read_bytes() == (
        whole / "adapter" / "adapter_model.safetensors"
    ).read_bytes()


def test_a_loss_that_is_not_finite_ends_the_run(train: Runner, tmp_path: Path) -> None:
    with pytest.raises(JobError, match="step 3 diverged: the loss is nan"):
        train(train={"learning_rate": 1.0, "max_grad_norm": 0, "max_steps": 300}, adapter={"lora_alpha": 1e20})
    assert not (tmp_path / "run-1" / "adapter").exists()


def test_an_adapter_without_gradient_ends_the_run(
    tiny_model: Callable[..., Path], tmp_path: Path, rows: list[dict[str, Any]]
) -> None:
    job = TrainingJob(tiny_run(tiny_model(), write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "run"))
    layer = job.model.get_base_model().model.layers[1].mlp.down_proj
    layer.base_layer.register_forward_hook(lambda module, inputs, output: output.detach())
    layer.lora_B["default"].register_forward_hook(lambda module, inputs, output: output.detach())
    with pytest.raises(JobError, match=r"got no usable gradient.*layers\.1\.mlp\.gate_proj\.lora_B"):
        job.fit()


def test_schedules() -> None:
    def rates(kind: str, warmup: float = 0.2) -> list[float]:
        return [learning_rate(step, 10, 1.0, warmup, kind) for step in range(10)]

    assert rates("constant")[2:] == [1.0] * 8
    assert rates("linear")[2] == rates("cosine")[2] == 1.0
    assert rates("linear")[6] == pytest.approx(0.5)
    assert rates("cosine")[6] == pytest.approx(0.5)
    assert 0 < rates("linear")[0] < rates("linear")[1] < 1
    assert rates("cosine", 0.0)[0] == 1.0
    assert rates("cosine")[2:] == sorted(rates("cosine")[2:], reverse=True)


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_8bit", "adamw_32bit", "paged_adamw_8bit", "paged_adamw_32bit"])
def test_optimizers_by_name_step_and_restore(optim: str) -> None:
    torch.manual_seed(0)
    start = torch.randn(80, 64)
    gradients = [torch.randn(80, 64) for _ in range(4)]

    def fresh() -> tuple[torch.nn.Parameter, torch.optim.Optimizer]:
        parameter = torch.nn.Parameter(start.clone())
        return parameter, build_optimizer([parameter], Train.model_validate({"optim": optim}), "cpu")

    def advance(parameter: torch.nn.Parameter, optimizer: torch.optim.Optimizer, steps: list[torch.Tensor]) -> None:
        for gradient in steps:
            parameter.grad = gradient.clone()
            optimizer.step()

    parameter, optimizer = fresh()
    advance(parameter, optimizer, gradients[:2])
    state, middle = get_state(optimizer, {parameter: "w"}), parameter.detach().clone()
    advance(parameter, optimizer, gradients[2:])

    other, restored = fresh()
    other.data.copy_(middle)
    set_state(restored, {other: "w"}, state)
    advance(other, restored, gradients[2:])
    assert torch.equal(other, parameter)
    reference = torch.nn.Parameter(start.clone())
    advance(reference, torch.optim.AdamW([reference], lr=2e-4, weight_decay=0.0), gradients)
    torch.testing.assert_close(parameter.detach(), reference.detach(), atol=2e-4, rtol=0)
