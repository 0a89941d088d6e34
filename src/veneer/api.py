"""The commands as functions: what `veneer train`, `evaluate` and `generate` do, callable from Python."""

import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from veneer.config import Data, Evaluate, Model, Run, RunFolder, UserError, load_run
from veneer.config.files import read_json
from veneer.config.folder import write_json, write_text
from veneer.config.names import find_adapter, require_run
from veneer.config.prompts import Question
from veneer.config.sampling import Sampling
from veneer.data import Message, Renderer
from veneer.data.conversation import BadRowError
from veneer.data.prepare import HeldOut, prepare, read_held_out
from veneer.data.turns import read_turns
from veneer.engine import ReferenceEngine
from veneer.engine.ladder import Rung, compare, rungs, smaller_bases
from veneer.evaluate import Evaluation
from veneer.evaluate import compare as compare_models
from veneer.evaluate import generate as generate_answers
from veneer.evaluate.compare import count_rows
from veneer.evaluate.memory import Batching, rows_at_a_time
from veneer.model import compute_dtype, load_adapter, load_model, load_tokenizer, locate
from veneer.model.known import LADDER
from veneer.model.lineage import builtin_origins
from veneer.plan import find_machine
from veneer.plan.doctor import Found, Problem, diagnose, look, usable
from veneer.plan.fit import Fitted, fit
from veneer.plan.forecast import Padded, place_here, place_of
from veneer.plan.time import Ceilings, keep_ceilings
from veneer.release import (
    IMPORTANCE_ROWS,
    Certificate,
    Exported,
    Importance,
    Merged,
    Origin,
    Prompt,
    certify_artifact,
    choose_base,
    export_to,
    find_artifact,
    find_origin,
    judged_by,
    judged_model,
    measure_importance,
    merge_into,
    prompts_of,
    recorded_answers,
    renew_card,
    require_model,
    takes_importance,
    unmerge_from,
    very_long,
    write_card,
    write_certificate,
    write_passport,
)
from veneer.report import certificate_page, plot_loss
from veneer.train import Listener, Resume, Trained, TrainingJob, finished
from veneer.train.foresight import Foreseen, foresee, read_if_at_hand
from veneer.train.metrics import read_metrics
from veneer.train.verify import verify as verify


def train(
    run: Run,
    resume: Resume = False,
    listeners: Sequence[Listener] = (),
    force: bool = False,
    overwrite: bool = False,
) -> Trained:
    """Carry out a run: load, train, write the adapter with its card and the picture of its loss.

    Args:
        run: The settings.
        resume: Go on from the run's last checkpoint. "auto": begin where there is no run yet, go on where there is
            one, and give the report of one that is finished.
        listeners: Hear of each step.
        force: Start even if it is foreseen not to fit.
        overwrite: Replace the run that is in its folder.

    Raises:
        UserError: The run cannot be carried out as it is written; nothing was written.
        JobError: Training failed.
    """
    if resume == "auto" and (trained := finished(run)) is not None:
        return trained
    job = TrainingJob(run, resume, force, overwrite)
    if job.choice.warning:
        warnings.warn(job.choice.warning, RuntimeWarning, stacklevel=2)
    return finish(job, listeners)


def finish(job: TrainingJob, listeners: Sequence[Listener] = ()) -> Trained:
    """Train a job that is loaded, and write all that belongs to its folder; the adapter comes last of it."""
    title = f"{job.folder.path.name}: {job.run.model.base}"

    def dress(folder: Path, steps: int, loss: float | None) -> None:
        write_passport(job, folder, {"steps": steps, "final_loss": loss, "parameters": job.parameters})
        _or_warn("the card", lambda: write_card(job, folder))
        _or_warn("loss.png", lambda: plot_loss(read_metrics(job.folder.metrics), job.folder.loss_plot, title))

    return job.fit(tuple(listeners), dress)


def _or_warn(what: str, write: Callable[[], None]) -> None:
    """Write what a result is good without; where that fails, say so and keep the result."""
    try:
        write()
    except Exception as error:  # noqa: BLE001 - whatever it is, it must not cost the adapter
        warnings.warn(
            f"{what} could not be written ({type(error).__name__}: {error}); all else is there",
            RuntimeWarning,
            stacklevel=2,
        )


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
    """A model ready to answer: a base with an adapter, or a base alone (`origin` is None then).

    Attributes:
        run: Of an adapter that stands in its run's folder.
        origin: Where adapter and base came from.
    """

    model: Any
    renderer: Renderer
    run: Run | None
    origin: Origin | None = None


def load(name: str, force: bool = False, base: str | None = None) -> Loaded:
    """Load a run, one of its checkpoints or an adapter by its folder, or a base model by any name `model.base` takes.

    Args:
        name: Of the run, the checkpoint, the adapter or the model.
        force: Put the adapter on its base even where its passport says that it does not belong there.
        base: Another base than the adapter names.

    Raises:
        UserError: There is nothing of that name, the run has no adapter yet, or it does not belong to the base.
    """
    machine = find_machine()
    if find_adapter(name) is None:
        if base is not None:
            raise UserError(f"--base {base}: {name} is no adapter, which a base could be put under", "leave it out")
        settings = Model(base=name)
        source = locate(settings)
        renderer = Renderer(load_tokenizer(source))
        return Loaded(load_model(source, settings, None, machine), renderer, None)
    origin = find_origin(name, base, force)
    # Tokenizer and template as they were in training, whatever has become of the base's or of a template's file.
    renderer = origin.renderer()
    model = load_model(origin.source, origin.model, origin.quantization, machine)
    run = origin.run and origin.run.model_copy(update={"model": origin.model})  # with the base that was named instead
    return Loaded(load_adapter(model, origin.adapter), renderer, run, origin)


@dataclass(frozen=True)
class Evaluated:
    """An evaluation and where it was written.

    Attributes:
        evaluation: Base against tuned.
        file: Its file in the run's folder; the answers lie beside it.
        is_record: Whether it is the run's record, evaluation.json: the held-out rows, with the run's own settings.
    """

    evaluation: Evaluation
    file: Path
    is_record: bool

    @property
    def samples(self) -> Path:
        """The answers, a line a row."""
        return self.file.with_name("samples.jsonl") if self.is_record else self.file.with_suffix(".samples.jsonl")

    def as_dict(self) -> dict[str, Any]:
        return self.evaluation.as_dict() | {"file": str(self.file), "is_record": self.is_record}


def evaluate(
    run_dir: str | Path,
    data: str | None = None,
    rows: int | None = None,
    on_done: Callable[[int], None] = lambda done: None,
    force: bool = False,
    base: str | None = None,
) -> Evaluated:
    """Base against tuned on a run's held-out rows, or on the rows of a file; written into the run's folder.

    The run's record (evaluation.json, samples.jsonl, the scores of its card) is of its held-out rows with its own
    settings. Other data or fewer rows go to a file of their own in evaluations/ and leave the record alone.

    Args:
        run_dir: Folder of a finished run.
        data: A file of rows to use instead of the run's held-out rows.
        rows: At most so many rows; None: as `evaluate.rows` in the run. Pieces of a long text are one row.
        on_done: Called with the number of rows just answered; each row is answered twice.
        force, base: As for `load`.

    Raises:
        UserError: No such run, no adapter, or no held-out rows.
    """
    folder = require_run(str(run_dir))
    place = place_here()
    loaded = load(str(run_dir), force, base)
    assert loaded.run is not None
    usual = loaded.run.evaluate.rows
    held_out = _held_out(folder, loaded.run, loaded.renderer, data, rows or usual)
    count = count_rows(held_out)
    is_record = data is None and (rows is None or rows == usual or count < rows)
    most = (max(len(row.example.ids) for row in held_out), max(row.example.trained for row in held_out))
    at_a_time = rows_at_a_time(loaded.run, Padded(len(held_out), *most), place)
    settings = loaded.run.evaluate.model_copy(update={"batch_size": at_a_time})
    engine = ReferenceEngine(loaded.model)  # judges by other code than the adapter was trained by
    result = compare_models(loaded.model, engine, loaded.renderer, held_out, settings, on_done)
    if is_record and not force:
        assert loaded.origin is not None
        return Evaluated(result, save_evaluation(folder, result, loaded.origin.model), True)
    name = f"{Path(data).name.split('.')[0] if data else 'held-out'}-{count}-rows"
    return Evaluated(result, _save_beside(folder, name, result, data), False)


def save_evaluation(folder: RunFolder, evaluation: Evaluation, model: Model | None = None) -> Path:
    """Write the run's record: evaluation.json and samples.jsonl, and the scores into the adapter's card.

    Args:
        folder: Of the run.
        evaluation: What was measured.
        model: The base, where it is not where the run says.
    """
    run = load_run(folder.run)
    dtype = compute_dtype(run.model, find_machine())
    facts = {"judged": judged_by(run, folder.adapter, dtype)}
    write_text(folder.samples, _sample_lines(evaluation))
    write_json(folder.evaluation, evaluation.as_dict() | facts)
    _or_warn("the card", lambda: renew_card(folder, model))
    return folder.evaluation


def _save_beside(folder: RunFolder, name: str, evaluation: Evaluation, data: str | None) -> Path:
    """Write an evaluation that is not the record under the first free name."""
    number, file = 1, folder.other_evaluations / f"{name}.json"
    while file.exists():
        number += 1
        file = folder.other_evaluations / f"{name}-{number}.json"
    write_text(file.with_suffix(".samples.jsonl"), _sample_lines(evaluation))
    write_json(file, evaluation.as_dict() | {"data": data})
    return file


def _sample_lines(evaluation: Evaluation) -> str:
    return "".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in evaluation.samples())


def generate(
    name: str,
    prompts: Sequence[Question],
    system: str | None = None,
    compare_with_base: bool = False,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    seed: int = 42,
    force: bool = False,
    *,
    top_p: float = 1.0,
    top_k: int = 0,
    repetition_penalty: float = 1.0,
    stop: Sequence[str] = (),
    base: str | None = None,
    on_text: Callable[[str], None] | None = None,
) -> list[dict[str, Any]]:
    """Answers to prompts: `prompt`, `answer`, and `base` where it is compared.

    Args:
        name: As for `load`.
        prompts: Questions, or conversations as lists of turns (`{"role": ..., "content": ...}`).
        system: System prompt instead of the run's own, before prompts that have none.
        compare_with_base: Let the base answer too.
        max_new_tokens: Longest answer.
        temperature, top_p, top_k, repetition_penalty, stop, seed: See `veneer.config.sampling.Sampling`.
        force, base: As for `load`.
        on_text: Called with each piece of the answer as it is made; for a single prompt.

    Raises:
        UserError: Nothing of that name, a value out of range, or `compare_with_base` without an adapter.
    """
    import torch

    sampling = Sampling(temperature, top_p, top_k, repetition_penalty, tuple(stop), seed)
    if on_text is not None and len(prompts) != 1:
        raise UserError(f"on_text with {len(prompts)} prompts: pieces of which answer?", "give a single prompt")
    place = place_here()
    loaded = load(name, force, base)
    if compare_with_base and loaded.origin is None:
        raise UserError(f"{name}: a base model alone, there is nothing to compare", "name a run's folder")
    ids = [loaded.renderer.prompt_ids(_turns(prompt, system)) for prompt in prompts]
    of_model = loaded.origin.model if loaded.origin is not None else Model(base=name)
    run = loaded.run or Run(model=of_model, data=Data(train="-"))
    run = run.model_copy(update={"evaluate": Evaluate(max_new_tokens=max_new_tokens)})
    batching = Batching(rows_at_a_time(run, Padded(len(ids), max(map(len, ids)), 1), place) if ids else 1)

    def answers(on_text: Callable[[str], None] | None = None) -> list[str]:
        torch.manual_seed(seed)
        parts = (loaded.model, loaded.renderer, ids, max_new_tokens, batching)
        return generate_answers(*parts, sampling=sampling, on_text=on_text)

    results: list[dict[str, Any]] = [
        {"prompt": prompt, "answer": answer} for prompt, answer in zip(prompts, answers(on_text), strict=True)
    ]
    if compare_with_base:
        with loaded.model.disable_adapter():
            for result, answer in zip(results, answers(), strict=True):
                result["base"] = answer
    return results


def _turns(prompt: Question, system: str | None) -> list[Message]:
    """A prompt as turns, with a system prompt before it where it has none."""
    try:
        turns = [Message("user", prompt)] if isinstance(prompt, str) else list(read_turns(prompt))
    except BadRowError as error:
        raise UserError(f"prompt: {error}", "write turns with role and content") from None
    if system is None or (turns and turns[0].role == "system"):
        return turns
    return [Message("system", system), *turns]


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
    began = read_json(folder.ledger, "sha256")
    if began["sha256"] != prepared.ledger.sha256:
        raise UserError(
            f"{run.data.train}: not the rows this run was trained on: what is held out now may have been trained on",
            "restore the data, or name a file of other rows with --data",
        )
    held_out = prepared.held_out(limit)
    if not held_out:
        share = run.data.validation
        why = f"data.validation = {share}" + (", which is less than one of its rows" if share else "")
        raise UserError(f"the run holds no rows out ({why})", "name a file with --data")
    return held_out


def merge(
    run: str,
    out: str | Path,
    dtype: str = "bfloat16",
    on: str = "trained",
    base: str | None = None,
    force: bool = False,
    on_done: Callable[[int], None] = lambda done: None,
) -> Merged:
    """Write base and adapter as one model: see `veneer.release.merge`.

    Args:
        run: Folder of a finished run, or of an adapter.
        out: A new folder.
        dtype: bfloat16, float16 or float32.
        on: trained: what the run trained on and was judged by; nf4: the base in 4 bits, dequantized; base: the base as
            it is; best: `nf4` or `base`, whichever answers more of the held-out rows right.
        base: Another base than the adapter names.
        force: Go on although the adapter does not belong to the base.
        on_done: Called with the number of bytes just written.

    Raises:
        UserError: They do not fit together, or the folder is not to be had; nothing was written.
    """
    origin = find_origin(run, base, force)
    on, choice = _chosen(origin, on)
    return merge_into(origin, Path(out), dtype, on, on_done=on_done, choice=choice)


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
    on: str = "trained",
    adapter_only: bool = False,
    base: str | None = None,
    force: bool = False,
    on_done: Callable[[int], None] = lambda done: None,
    imatrix: bool = True,
) -> Exported:
    """Write a GGUF file with its Modelfile: see `veneer.release.export`.

    Args:
        run: Folder of a finished run, or of an adapter.
        out: A new folder.
        file_format: gguf.
        quant: Type of the weights.
        on: As for `merge`.
        adapter_only: Write the adapter alone.
        base: Another base than the adapter names.
        force: Go on although the adapter does not belong to the base.
        on_done: Called with the number of bytes just written.
        imatrix: For types of 2 to 6 bits: measure on the run's own training rows which weights matter.

    Raises:
        UserError: The architecture, the tokenizer or the type cannot be exported, or as `merge`; nothing was written.
    """
    origin = find_origin(run, base, force)
    on, choice = _chosen(origin, on)
    use = imatrix and not adapter_only and takes_importance(quant)
    importance = _importance(origin) if use else None
    return export_to(origin, Path(out), file_format, quant, on, adapter_only, on_done, choice, importance)


def _importance(origin: Origin) -> Importance | None:
    """The importance matrix of a run's own training rows; None where there is no run, or its data is gone."""
    if origin.run is None:
        return None
    try:
        rows = prepare(origin.run.data, origin.renderer(), origin.run.train.seed).train
    except UserError as error:
        warnings.warn(f"no importance matrix: {str(error).splitlines()[0]}", RuntimeWarning, stacklevel=3)
        return None
    count = min(IMPORTANCE_ROWS, len(rows))
    return measure_importance(judged_model(origin), [rows[n * len(rows) // count] for n in range(count)])


def certify(
    artifact: str,
    run: str,
    rows: int | None = None,
    base: str | None = None,
    force: bool = False,
    notify: Callable[[str], None] = lambda what: None,
    model: str | None = None,
) -> tuple[Certificate, Path]:
    """Put what ships beside the adapter it came from, and write certificate.json and its page.

    Args:
        artifact: A merged folder, a GGUF file, or the address of a server.
        run: Folder of the run, or of the adapter.
        rows: At most so many held-out rows; None: as many as the run evaluates (`evaluate.rows`).
        base: Another base than the adapter names.
        force: Go on although the adapter does not belong to the base.
        notify: Called with what is being done.
        model: Which model of a server that has several, as a server of adapters does.

    Returns:
        The certificate, and the folder it was written into: the artifact's, or the run's for a server.

    Raises:
        UserError: There is no such artifact or run, or the artifact does not load.
    """
    origin = find_origin(run, base, force)
    found = find_artifact(artifact, origin, model)
    folder = origin.folder or RunFolder(Path(run).expanduser())
    is_of_run = origin.run is not None and not origin.is_checkpoint  # a checkpoint's proof is none of its run's adapter
    prompts, longest, skipped = _questions(origin, rows)
    certificate = certify_artifact(found, origin, prompts, longest, skipped, recorded_answers(origin), notify)
    page = certificate_page(certificate.as_dict())
    targets = [] if found.path is None else [found.path if found.path.is_dir() else found.path.parent]
    targets += [folder.path] if is_of_run else []
    for target in targets or [Path()]:
        write_certificate(certificate, target, page)
    if is_of_run:
        _or_warn("the card", lambda: renew_card(folder, origin.model))
    return certificate, (targets or [Path()])[0]


def _questions(origin: Origin, rows: int | None) -> tuple[list[Prompt], int, dict[str, str]]:
    """What a certificate asks, the longest answer, and the checks that cannot be made, with the reason."""
    renderer = origin.renderer()
    held_out: list[HeldOut] = []
    skipped = {}
    if origin.run is None:
        skipped["answers and score on held-out rows"] = "the adapter has no run beside it"
    elif rows == 0:
        skipped["answers and score on held-out rows"] = "none were asked for (--rows 0)"
    else:
        try:
            folder = origin.folder or RunFolder(Path(origin.name).expanduser())
            held_out = _held_out(folder, origin.run, renderer, None, rows or origin.run.evaluate.rows)
        except UserError as error:
            skipped["answers and score on held-out rows"] = str(error).splitlines()[0]
    longest = origin.run.evaluate.max_new_tokens if origin.run is not None else 64
    return prompts_of(renderer, held_out, very_long(origin, longest)), longest, skipped


def _chosen(origin: Origin, on: str) -> tuple[str, dict[str, Any] | None]:
    """What the adapter is merged into, and what `--on best` measured."""
    if on != "best":
        return on, None
    prompts, longest, _ = _questions(origin, None)
    choice = choose_base(origin, prompts, longest, recorded_answers(origin))
    return choice.on, choice.as_dict()
