"""The commands as functions: what `veneer train`, `evaluate` and `generate` do, callable from Python."""

import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from veneer.config import Data, Model, Run, RunFolder, UserError, load_run
from veneer.config.folder import write_json, write_text
from veneer.data import Message, Renderer
from veneer.data.prepare import HeldOut, prepare, read_held_out
from veneer.data.template import NAMED_TEMPLATES
from veneer.engine import ReferenceEngine
from veneer.engine.ladder import Rung, compare, rungs, smaller_bases
from veneer.evaluate import Evaluation
from veneer.evaluate import compare as compare_models
from veneer.evaluate import generate as generate_answers
from veneer.model import Source, load_adapter, load_model, load_tokenizer, locate
from veneer.model.known import LADDER
from veneer.model.lineage import builtin_origins
from veneer.plan import find_machine
from veneer.plan.doctor import Found, Problem, diagnose, look, usable
from veneer.plan.fit import Fitted, fit
from veneer.plan.forecast import place_here, place_of
from veneer.plan.time import Ceilings, keep_ceilings
from veneer.release import (
    Certificate,
    Exported,
    Merged,
    certify_artifact,
    export_to,
    find_artifact,
    find_origin,
    merge_into,
    prompts_of,
    renew_card,
    require_match,
    require_model,
    unmerge_from,
    very_long,
    write_card,
    write_certificate,
)
from veneer.report import certificate_page, plot_loss
from veneer.train import Listener, Trained, TrainingJob
from veneer.train.foresight import Foreseen, foresee, read_if_at_hand
from veneer.train.metrics import read_metrics
from veneer.train.verify import verify as verify


def train(run: Run, resume: bool = False, listeners: Sequence[Listener] = (), force: bool = False) -> Trained:
    """Carry out a run: load, train, write the adapter with its card and the picture of its loss.

    Args:
        run: The settings.
        resume: Go on from the run's last checkpoint.
        listeners: Hear of each step.
        force: Start even if it is foreseen not to fit.

    Raises:
        UserError: The run cannot be carried out as it is written; nothing was written.
        JobError: Training failed.
    """
    job = TrainingJob(run, resume, force)
    if job.choice.warning:
        warnings.warn(job.choice.warning, RuntimeWarning, stacklevel=2)
    return finish(job, listeners)


def finish(job: TrainingJob, listeners: Sequence[Listener] = ()) -> Trained:
    """Train a job that is loaded, and write all that belongs to its folder."""
    trained = job.fit(tuple(listeners), lambda folder, steps, loss: write_card(job, folder, steps, loss))
    plot_loss(
        read_metrics(job.folder.metrics),
        job.folder.loss_plot,
        f"{job.folder.path.name}: {job.run.model.base}",
    )
    return trained


@dataclass(frozen=True)
class Planned:
    """What is known of a run before anything is loaded, and what would make it fit.

    Attributes:
        foreseen: Forecast and advice.
        fitted: The cheapest changes that make it fit; none in it: it fits as it is; None: nothing makes it fit.
    """

    foreseen: Foreseen
    fitted: Fitted | None

    def as_dict(self) -> dict[str, Any]:
        changes = None
        if self.fitted is not None:
            changes = [change.as_dict() for change in self.fitted.changes]
        return self.foreseen.as_dict() | {"changes": changes}

    def compare(self) -> dict[str, Any]:
        """Methods side by side on common sizes of GPU: see `veneer.engine.ladder.compare`."""
        return compare(self.foreseen.run, self.foreseen.planner)


def plan(run: Run, gpu: str | None = None, read_data: bool = True) -> Planned:
    """Foresee a run: memory by phase and component, time, advice, and what to change if it does not fit.

    Args:
        run: The settings.
        gpu: A card by name, or its memory as "24GiB"; None: this machine.
        read_data: Whether to read the data, where that takes nothing from a network.

    Raises:
        UserError: An unknown card or base, a target that matches nothing, a quantization the base cannot take.
    """
    place = place_here() if gpu is None else place_of(gpu)
    foreseen = foresee(run, place, read_if_at_hand(run) if read_data else "it was not asked for")
    fitted = fit(run, foreseen.planner, smaller_bases)
    return Planned(foreseen, fitted)


@dataclass(frozen=True)
class Examined:
    """A machine, what is broken on it, and what it can train.

    Attributes:
        found: As it was found.
        problems: What is broken, with fixes.
        trains: Common bases from small to large, with the memory each method needs.
        budget_bytes: What a run may hold here.
    """

    found: Found
    problems: list[Problem]
    trains: list[Rung]
    budget_bytes: int
    ceilings: Ceilings | None

    def as_dict(self) -> dict[str, Any]:
        return self.found.as_dict() | {
            "usable": [asdict(part) for part in usable(self.found)],
            "problems": [asdict(problem) for problem in self.problems],
            "budget_bytes": self.budget_bytes,
            "trains": [asdict(rung) | {"best": rung.best(self.budget_bytes)} for rung in self.trains],
            "ceilings": self.ceilings and asdict(self.ceilings),
            "builtin": {
                name: f"dequantized to bfloat16 from {file.describe()}; {file.caution()}"
                for name, file in builtin_origins().items()
            },
        }


def doctor(measure: bool = False) -> Examined:
    """Examine this machine.

    Args:
        measure: Measure its speed too, for the times of later plans; takes about 20 seconds.
    """
    found = look()
    if measure:
        from veneer.engine.measure import measure_ceilings

        keep_ceilings(found.machine, measure_ceilings(found.machine))
    place = place_here(found.machine)
    usual = Run.model_validate({"model": {"base": LADDER[0]}, "data": {"train": "-"}})
    trains = rungs(usual, place, ("lora", "qlora"))
    return Examined(found, diagnose(found), trains, place.budget_bytes, place.ceilings)


@dataclass(frozen=True)
class Loaded:
    """A model ready to answer: a run's base with its adapter, or a base alone (`run` is None then)."""

    model: Any
    renderer: Renderer
    run: Run | None


def load(name: str, force: bool = False) -> Loaded:
    """Load a finished run by its folder, or a base model by any name `model.base` takes.

    Args:
        name: Of the run or the model.
        force: Put the adapter on its base even where its passport says that it does not belong there.

    Raises:
        UserError: There is nothing of that name, the run has no adapter yet, or it does not belong to the base.
    """
    folder = RunFolder(Path(name))
    machine = find_machine()
    if not folder.run.exists():
        settings = Model(base=name)
        source = locate(settings)
        renderer = Renderer(load_tokenizer(source))
        return Loaded(load_model(source, settings, None, machine), renderer, None)
    run = load_run(folder.run)
    if not folder.adapter.is_dir():
        raise UserError(f"{name}: the run has no adapter yet", "finish it with `veneer train ... --resume`")
    source = locate(run.model)
    require_match(folder.adapter, source, force)
    # Tokenizer and template as they were in training, whatever has become of the base's or of a template's file.
    kept = Source("folder", str(folder.adapter), name)
    named = run.data.chat_template in (*NAMED_TEMPLATES, "none")
    data = run.data if named else run.data.model_copy(update={"chat_template": "auto"})
    renderer = Renderer(load_tokenizer(kept), data)
    base = load_model(source, run.model, run.quantization, machine)
    return Loaded(load_adapter(base, folder.adapter), renderer, run)


def evaluate(
    run_dir: str | Path,
    data: str | None = None,
    rows: int | None = None,
    on_done: Callable[[int], None] = lambda done: None,
    force: bool = False,
) -> Evaluation:
    """Base against tuned on a run's held-out rows, or on the rows of a file; written into the run's folder.

    Args:
        run_dir: Folder of a finished run.
        data: A file of rows to use instead of the run's held-out rows.
        rows: At most so many rows; None: as `evaluate.rows` in the run.
        on_done: Called with the number of rows just answered; each row is answered twice.
        force: As for `load`.

    Raises:
        UserError: No such run, no adapter, or no held-out rows.
    """
    folder = RunFolder(Path(run_dir))
    if not folder.run.exists():
        raise UserError(f"{run_dir}: holds no run (no run.yaml)", "name the folder that `veneer train` wrote")
    loaded = load(str(run_dir), force)
    assert loaded.run is not None
    held_out = _held_out(folder, loaded.run, loaded.renderer, data, rows or loaded.run.evaluate.rows)
    engine = ReferenceEngine(loaded.model)  # judges by other code than the adapter was trained by
    result = compare_models(loaded.model, engine, loaded.renderer, held_out, loaded.run.evaluate, on_done)
    save_evaluation(folder, result)
    return result


def save_evaluation(folder: RunFolder, evaluation: Evaluation) -> None:
    """Write evaluation.json and samples.jsonl, and the scores into the adapter's card."""
    write_json(folder.evaluation, evaluation.as_dict())
    lines = (json.dumps(sample, ensure_ascii=False) + "\n" for sample in evaluation.samples())
    write_text(folder.samples, "".join(lines))
    renew_card(folder)


def generate(
    name: str,
    prompts: Sequence[str],
    system: str | None = None,
    compare_with_base: bool = False,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    seed: int = 42,
    force: bool = False,
) -> list[dict[str, str]]:
    """Answers of a run (or of a base model) to prompts: `prompt`, `answer`, and `base` where it is compared.

    Raises:
        UserError: Nothing of that name, or `compare_with_base` without a run.
    """
    import torch

    loaded = load(name, force)
    if compare_with_base and loaded.run is None:
        raise UserError(f"{name}: a base model alone, there is nothing to compare", "name a run's folder")
    before = [] if system is None else [Message("system", system)]
    ids = [loaded.renderer.prompt_ids([*before, Message("user", prompt)]) for prompt in prompts]

    def answers() -> list[str]:
        torch.manual_seed(seed)
        return generate_answers(loaded.model, loaded.renderer, ids, max_new_tokens, temperature=temperature)

    results = [{"prompt": prompt, "answer": answer} for prompt, answer in zip(prompts, answers(), strict=True)]
    if compare_with_base:
        with loaded.model.disable_adapter():
            for result, answer in zip(results, answers(), strict=True):
                result["base"] = answer
    return results


@dataclass(frozen=True)
class Inspected:
    """What data becomes for a model: the ledger, and some rows with their tokens."""

    ledger: dict[str, Any]
    rows: list[dict[str, Any]]

    def as_dict(self) -> dict[str, Any]:
        return self.ledger | {"samples": self.rows}


def inspect_data(model: Model, data: Data, seed: int = 42, rows: int = 3) -> Inspected:
    """Render data as a run would, without loading the model.

    Args:
        model: The base; only its tokenizer is loaded.
        data: The settings.
        seed: Of the split and the sample.
        rows: How many rows to show, spread over the training rows.

    Raises:
        UserError: The data is not usable.
    """
    renderer = Renderer(load_tokenizer(locate(model)), data)
    prepared = prepare(data, renderer, seed)
    train = prepared.train
    count = min(rows, len(train))
    shown = [train[n * len(train) // count] for n in range(count)]
    return Inspected(
        prepared.ledger.as_dict(),
        [
            {
                "place": example.place,
                "tokens": len(example.ids),
                "trained": example.trained,
                "pieces": renderer.pieces(example),
            }
            for example in shown
        ],
    )


def _held_out(folder: RunFolder, run: Run, renderer: Renderer, data: str | None, limit: int | None) -> list[HeldOut]:
    if data is not None:
        return read_held_out(data, "--data", run.data, renderer, limit)
    prepared = prepare(run.data, renderer, run.train.seed)
    began = json.loads(folder.ledger.read_text(encoding="utf-8"))
    if began["sha256"] != prepared.ledger.sha256:
        raise UserError(
            f"{run.data.train}: not the rows this run was trained on: what is held out now may have been trained on",
            "restore the data, or name a file of other rows with --data",
        )
    held_out = prepared.held_out(limit)
    if not held_out:
        raise UserError("the run holds no rows out (data.validation = 0)", "name a file with --data")
    return held_out


def merge(
    run: str,
    out: str | Path,
    dtype: str = "bfloat16",
    on: str = "base",
    base: str | None = None,
    force: bool = False,
    on_done: Callable[[int], None] = lambda done: None,
) -> Merged:
    """Write base and adapter as one model: see `veneer.release.merge`.

    Args:
        run: Folder of a finished run, or of an adapter.
        out: A new folder.
        dtype: bfloat16, float16 or float32.
        on: base, or nf4 for the 4-bit base of the training, dequantized.
        base: Another base than the adapter names.
        force: Go on although the adapter does not belong to the base.
        on_done: Called with the number of bytes just written.

    Raises:
        UserError: They do not fit together, or the folder is not to be had; nothing was written.
    """
    return merge_into(find_origin(run, base, force), Path(out), dtype, on, on_done=on_done)


def unmerge(
    merged: str | Path,
    adapter: str,
    out: str | Path,
    force: bool = False,
    on_done: Callable[[int], None] = lambda done: None,
) -> Merged:
    """Take an adapter out of a merged model: what is left is its base, within rounding.

    Raises:
        UserError: As `merge`, or the kind of adapter cannot be taken out.
    """
    require_model(Path(merged))
    # The merged model says all that is needed of its base, which may be gone.
    origin = find_origin(adapter, str(merged), force, is_merged=True)
    return unmerge_from(Path(merged), origin, Path(out), force, on_done)


def export(
    run: str,
    out: str | Path,
    file_format: str = "gguf",
    quant: str = "q8_0",
    on: str = "base",
    adapter_only: bool = False,
    base: str | None = None,
    force: bool = False,
    on_done: Callable[[int], None] = lambda done: None,
) -> Exported:
    """Write a GGUF file with its Modelfile: see `veneer.release.export`.

    Args:
        run: Folder of a finished run, or of an adapter.
        out: A new folder.
        file_format: gguf.
        quant: Type of the weights.
        on: base, or nf4 for the 4-bit base of the training, dequantized.
        adapter_only: Write the adapter alone.
        base: Another base than the adapter names.
        force: Go on although the adapter does not belong to the base.
        on_done: Called with the number of bytes just written.

    Raises:
        UserError: The architecture, the tokenizer or the type cannot be exported, or as `merge`; nothing was written.
    """
    return export_to(find_origin(run, base, force), Path(out), file_format, quant, on, adapter_only, on_done)


def certify(
    artifact: str,
    run: str,
    rows: int = 40,
    base: str | None = None,
    force: bool = False,
    tell: Callable[[str], None] = lambda what: None,
    model: str | None = None,
) -> tuple[Certificate, Path]:
    """Put what ships beside the adapter it came from, and write certificate.json and its page.

    Args:
        artifact: A merged folder, a GGUF file, or the address of a server.
        run: Folder of the run, or of the adapter.
        rows: Held-out rows that both answer.
        base: Another base than the adapter names.
        force: Go on although the adapter does not belong to the base.
        tell: Called with what is being done.
        model: Which model of a server that has several, as a server of adapters does.

    Returns:
        The certificate, and the folder it was written into: the artifact's, or the run's for a server.

    Raises:
        UserError: There is no such artifact or run, or the artifact does not load.
    """
    origin = find_origin(run, base, force)
    found = find_artifact(artifact, origin, model)
    renderer = origin.renderer()
    held_out: list[HeldOut] = []
    skipped = {}
    folder = RunFolder(Path(run).expanduser())
    if origin.run is None:
        skipped["answers and score on held-out rows"] = "the adapter has no run beside it"
    elif not rows:
        skipped["answers and score on held-out rows"] = "none were asked for (--rows 0)"
    else:
        try:
            held_out = _held_out(folder, origin.run, renderer, None, rows)
        except UserError as error:
            skipped["answers and score on held-out rows"] = str(error).splitlines()[0]
    longest = origin.run.evaluate.max_new_tokens if origin.run is not None else 64
    prompts = prompts_of(renderer, held_out, very_long(origin, longest))
    certificate = certify_artifact(found, origin, prompts, longest, skipped, tell)
    page = certificate_page(certificate.as_dict())
    targets = [] if found.path is None else [found.path if found.path.is_dir() else found.path.parent]
    targets += [folder.path] if origin.run is not None else []
    for target in targets or [Path()]:
        write_certificate(certificate, target, page)
    if origin.run is not None:
        renew_card(folder)
    return certificate, (targets or [Path()])[0]
