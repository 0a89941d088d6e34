"""A training job brings a run's parts together, the cheapest to fail first.

Settings, then the output folder, the run's parts (`parts`), the engine, the space on disk; only then is the run's
folder begun. The adapter appears whole at the end.
"""

import platform
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch

from veneer.config import Run, RunFolder, UserError
from veneer.config.folder import remove, whole_folder, write_json, write_text
from veneer.config.load import to_yaml
from veneer.config.names import anchored
from veneer.config.notify import kept_in, notify
from veneer.data.batch import Batch, Batches, Example
from veneer.data.pipeline import Prepared
from veneer.data.render import Renderer
from veneer.engine.choose import EngineChoice, choose
from veneer.engine.head_engine import head_engine
from veneer.engine.interface import BatchShapes, Engine
from veneer.engine.placement import MemoryPlacement
from veneer.engine.reference import ReferenceEngine
from veneer.machine.device import find_machine, peak_bytes, resolve_optim
from veneer.machine.environment import environment
from veneer.machine.ranks import Ranks, join_ranks
from veneer.model.attach import count_parameters, save_adapter, write_as_changes
from veneer.model.full import save_full
from veneer.model.load import compute_dtype
from veneer.model.start import base_sha256, start_sha256
from veneer.planning.memory import optimizer_bytes
from veneer.training import checkpoint
from veneer.training.alarms import Alarms
from veneer.training.alarms.facts import facts_of
from veneer.training.best import BETTER, LOSS, OF_TASKS, require_evaluations
from veneer.training.choose_objective import choose_objective
from veneer.training.divergence import require_possible
from veneer.training.finished import Trained, last_loss, with_train
from veneer.training.held_out import HeldOutRows
from veneer.training.held_out_loss import held_out_batching
from veneer.training.loop import Loop
from veneer.training.memory import need_and_fix, place
from veneer.training.metrics import Listener, MetricsFile
from veneer.training.optimizer import parameters_to_update
from veneer.training.pair_values import metric_names
from veneer.training.paired_losses import RowLosses
from veneer.training.parallel import begin_alike, dealt_as_begun, require_parallel, rows_of_step
from veneer.training.parts import RunParts, load_parts
from veneer.training.plain_peft import require_same_scores
from veneer.training.preference_watch import PreferenceWatch
from veneer.training.rate_search import RateSearch, find_rate, with_rate
from veneer.training.reference import Reference
from veneer.training.resuming import (
    as_begun,
    copy_checkpoint,
    dated,
    find_fork,
    fork_of,
    named_checkpoint,
    note_extension,
    reopen,
    require_longer,
    require_resumable,
    require_same_numbers,
    require_steps_left,
    tell_changes,
)
from veneer.training.row_losses import MeasuredRows
from veneer.training.run_batches import batches_of, largest_rows, vary
from veneer.training.saving import disk_errors_told

RELEASED = (
    "each weight is updated as soon as it has its gradient, and that is dropped (train.max_grad_norm is 0, and a step "
    "is one micro-batch): gradients are never held together, and a step that runs out of memory ends the run"
)
MASTERS = {
    "float32": "train.master_weights = auto: float32: updates add up in a float32 copy of the weights, which fits",
    "none": "train.master_weights = auto: none: there is no memory for a float32 copy of the weights, so they are "
    "rounded up or down by chance",
}
NOT_RELEASED = "gradients are held together: rows of this model on either side of a length need passes of their own"
MEASURABLE = ("cuda",)  # devices where too little memory is an error to catch; elsewhere it may end the process
WriteExtras = Callable[[Path, "Trained"], None]
Resume = bool | str  # the last whole checkpoint; "auto": that, where there is a run; or the name of a checkpoint


class DuringMetrics(Protocol):
    """What `evaluate.during` measures.

    Attributes:
        better: the better values of the metric by which the best step is found: lower or higher.
    """

    better: str

    def measure(self, model: Any, engine: Engine, stopped: Callable[[], bool]) -> dict[str, float] | None:
        """Return values by name, with nothing of the training changed; None where it was stopped."""
        ...


# Makes it of a run, its data and their renderer, and refuses metrics that these rows cannot carry. It generates and
# judges answers, which is above this package, so a job is handed it.
MakeDuring = Callable[[Run, Prepared, Renderer], DuringMetrics]


class TrainingJob:
    """A run, checked and loaded, ready to train.

    Args:
        run: The settings.
        resume: Go on from the run's last checkpoint, or that of the name (step-N); "auto": or begin, where there is no
            run yet.
        force: whether to load a run that is predicted not to fit.
        overwrite: Replace the run that is in the folder, once this one is ready to begin.
        make_during: Function that makes what measures `evaluate.during`; None: for runs without that setting.
        parts: Parts of the run, loaded already; None: they are loaded.
        extend: Go on as a run of more steps.
        fork: Run, or checkpoint of one, that this run begins with, where it does not go on.

    Attributes:
        machine, source, tokenizer, renderer, data, prediction, start, model: the parts, for others to show or evaluate.
        engine, choice: the engine that computes losses and gradients, and why it was taken.
        placement: memory placement of the engine.
        held_out: the held-out rows.
        rate_search: search for `train.learning_rate: auto`; None: the rate was named, or found when the run began.

    Raises:
        UserError: Anything the user can mend; nothing has been written then.
        JobError: The fused engine was asked for and is wrong on this machine.
    """

    def __init__(
        self,
        run: Run,
        resume: Resume = False,
        force: bool = False,
        overwrite: bool = False,
        make_during: MakeDuring | None = None,
        parts: RunParts | None = None,
        extend: bool = False,
        fork: Path | None = None,
    ) -> None:
        assert make_during is not None or not run.evaluate.during, "api/train.py hands it what measures"
        require_possible(run)
        self.run = run
        self.ranks = join_ranks()
        require_parallel(run, self.ranks)
        self._make_during = make_during
        self._during: DuringMetrics | None = None
        self.folder = RunFolder(run.train.output_dir.expanduser())
        self._overwrite, self._extend = overwrite, extend
        self._resume = self.folder.run.exists() if resume == "auto" else bool(resume) or extend
        self._named = resume if isinstance(resume, str) and resume != "auto" else None
        self._fork = None if fork is None or self._resume else find_fork(fork, self.folder)
        self.run = run = self._find_beginning(run)
        parts = parts or load_parts(run, force, self._examine, self._from)
        self.run = run = _settled(run, parts)
        self.machine, self.source, self.tokenizer = parts.machine, parts.source, parts.tokenizer
        self.renderer, self.data, self.model = parts.renderer, parts.data, parts.model
        self.prediction, self.start = parts.prediction, parts.start
        self.choice = _choose_engine(run, parts, self.ranks)
        self.engine = self.choice.engine
        begin_alike(self.ranks, self.engine, self.model)
        self.parameters = count_parameters(self.model)
        train = run.train
        self.objective = choose_objective(run, self.data)
        if releases := run.releases_gradients and self.ranks.size == 1:
            assert isinstance(self.engine, ReferenceEngine)
            releases = self.engine.run_in_one_pass()
            notify(RELEASED if releases else NOT_RELEASED, "info", "train.max_grad_norm")
        per_row, ranks = self.objective.documents_per_row, self.ranks
        batches = batches_of(run, self.data.train, per_row, self.engine.shares_prompts, ranks.size)
        self._batches = batches
        forecast = self.prediction.forecast
        self.held_out = held_out = HeldOutRows(self.data.validation, self.objective.documents_per_row)
        self._rows_at_a_time = at_a_time = forecast.rows_at_a_time.get("evaluation", run.evaluate.batch_size)
        batching = held_out_batching(at_a_time, self.objective)
        self._reference = Reference(run, parts, self.objective, self.engine, batches, held_out, batching, ranks)
        self._row_losses = MeasuredRows(self.engine, self.objective, held_out, batching, self._reference.complete)
        explain = partial(need_and_fix, self.prediction, self.machine.device)
        self.placement, most_tokens = self._place(batches, self._computed(held_out[:at_a_time]), explain)
        make_loop = self._loop_maker(parts, most_tokens, releases, explain)
        self.rate_search: RateSearch | None = None
        if train.learning_rate == "auto":
            self._reference.give()
            self.rate_search = find_rate(train, batches, held_out, self._row_losses.of, self.model, make_loop)
            found = self.rate_search.rate
            self.run = run = with_rate(run, ranks.first(lambda: found))
        facts = facts_of(
            *(run, self.data, self.engine, self.objective, self.model, batches, held_out, self.machine),
            planned_speed=forecast.tokens_per_second,
            steps=lambda: self.steps,
        )
        self._loop = make_loop(train=run.train, alarms=Alarms(facts))
        self._require_sense()

    def _find_beginning(self, run: Run) -> Run:
        """Find the checkpoint that the run goes on from, if any; returns the run as what it goes on from began.

        Raises:
            UserError: It cannot go on from there, or the folder is not free.
        """
        if self._resume:
            run = self._require_resumable(run)
            with self._locked():
                pass  # held by another process, it is refused before anything is loaded
        elif self.ranks.is_first:
            self._require_folder()
        if self._fork is not None:
            run, self._fork = fork_of(run, self._fork)
        self._from = self._find_checkpoint()
        self._has_separate_states = self._from is not None and not checkpoint.is_flat(self._from)
        self._as_asked = run  # what `auto` means here is no change of the settings
        # The folder whose plan says how the state that is loaded came about.
        self._began = self.folder if self._resume else None if self._fork is None else self._fork.source
        if self._began is not None:
            run = as_begun(run, self._began, find_machine())
            if self._resume:
                run = dealt_as_begun(run, self._began, self.ranks)
        return run

    def _loop_maker(
        self, parts: RunParts, most_tokens: int | None, releases: bool, explain: Callable[[], str]
    ) -> "partial[Loop]":
        """Return what makes a loop of the run with some settings of the section `train`."""
        forecast = self.prediction.forecast
        return partial(
            Loop,
            model=self.model,
            engine=self.engine,
            objective=self.objective,
            batches=self._batches,
            held_out=self.held_out,
            rows_at_a_time=self._rows_at_a_time,
            checkpoints=self.folder.checkpoints,
            began_with={
                "training rows (or their tokenizer or template)": self.data.ledger.sha256["train"],
                "held-out rows": self.data.ledger.sha256["validation"],
                **base_sha256(self.source),
                **start_sha256(parts.start),
            },
            device=self.machine.device,
            predicted_peak_bytes=forecast.run_peak_bytes,
            explain=explain,
            most_tokens=most_tokens,
            scale_loss=compute_dtype(self.run.model, self.machine) == torch.float16,
            during=self._measure_during,
            better=self._better,
            with_reference=self._reference.complete,
            estimate_kl=self._reference.estimate_kl,
            releases=releases,
            ranks=self.ranks,
            has_separate_states=self._has_separate_states,
        )

    def _require_sense(self) -> None:
        """Check what is known once the loop is made: space on the disk, and that it fits what it goes on from."""
        train = self.run.train
        follows = "train.keep" if train.keep == "best" else "train.early_stopping" if train.early_stopping else None
        if follows and train.eval_steps is not None and train.eval_steps >= self.steps:
            notify(
                f"{follows} has no effect: held-out rows are evaluated every {train.eval_steps} steps "
                f"(train.eval_steps), and the run has {self.steps}",
                where=follows,
            )
        if self.ranks.is_first:
            self.folder.require_writable(self._bytes_on_disk())
        if self._began is not None:
            require_same_numbers(self._began, self.plan())
            tell_changes(self._began, self.plan(), self.run.train)
        if self._fork is not None:
            require_steps_left(self._fork, self.steps)
        if self._extend:
            self._loop.recall(self._records(self.done))
            require_longer(self.folder, self.steps, self.done, self._loop.best.is_over, self.run.train)

    def _examine(self, data: Prepared, renderer: Renderer) -> None:
        """Refuse settings that follow what is not measured, before the model is loaded."""
        run, objective = self.run, choose_objective(self.run, data)
        recorded = (LOSS, *objective.held_out_metrics(0.0), *metric_names(objective))
        during = OF_TASKS.get(run.model.task, run.evaluate.during)
        measured = dict.fromkeys((*filter(BETTER.__contains__, recorded), *during))
        require_evaluations(run, len(data.validation), measured)
        if self._make_during is not None and during and len(data.validation):
            self._during = self._make_during(run, data, renderer)

    @property
    def _better(self) -> str:
        """The better values of the metric by which the best step is found: lower or higher."""
        followed = self.run.train.early_stopping.metric if self.run.train.early_stopping is not None else LOSS
        return BETTER[followed] if self._during is None else self._during.better

    def _measure_during(self, stopped: Callable[[], bool]) -> dict[str, float] | None:
        return {} if self._during is None else self._during.measure(self.model, self.engine, stopped)

    def _place(
        self, batches: Batches, held_out: tuple[int, ...], explain: Callable[[], str]
    ) -> tuple[MemoryPlacement, int | None]:
        """Have the engine place its tensors; see `memory.place`."""
        train, device, part = self.run.train, self.machine.device, self.data.train
        updated = parameters_to_update(self.model, self.engine, train, device, self._has_separate_states).values()
        sizes = [parameter.numel() for parameter in updated] if self.run.adapter is not None else []
        states = optimizer_bytes(sizes, resolve_optim(train.optim, device))  # the reference engine reserves nothing
        largest, shared = largest_rows(batches, train.per_device_train_batch_size, self.objective.documents_per_row)
        shapes = BatchShapes(
            largest=largest,
            varies=vary(part, batches.sizes, train.per_device_train_batch_size),
            held_out=held_out,
            documents=batches.most_documents() if self.run.data.packing else (),
            shared=shared,
        )

        target = self.prediction.forecast.target
        budget = None if train.memory_budget == "auto" else target.budget_bytes

        def plan(parts: Sequence[Batch] | None) -> MemoryPlacement:
            asked = shapes
            if parts is not None:
                largest = max(parts, key=lambda part: part.tokens)
                documents = max((part.lengths for part in parts), key=len) if shapes.documents else ()
                asked = BatchShapes(largest.lengths, True, held_out, documents, largest.shared)
            return self.engine.plan_memory(asked, train.gradient_checkpointing, states, budget, target.rates)

        return place(plan, batches.largest(), explain)

    def _computed(self, rows: Sequence[Example]) -> tuple[int, ...]:
        """Return the tokens of each document of held-out rows that go through the model."""
        return Batch.of(rows, self.objective.documents_per_row, self.engine.shares_prompts).computed if rows else ()

    def measure_held_out(self, rows: Sequence[Example] | None = None) -> list[float]:
        """Measure the summed loss of each held-out example as the adapter is now; None: of all, in their order."""
        return self._row_losses.of_examples(self.held_out if rows is None else rows)

    def row_losses(self) -> RowLosses:
        """Measure the loss of each held-out row as the adapter is now; pieces of one text are one row."""
        return self._row_losses.of_all()

    @property
    def was_stopped(self) -> bool:
        """Whether the user asked to stop while the last step was made."""
        return self._loop.was_stopped

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self._loop.steps

    @property
    def done(self) -> int:
        """Optimizer steps of the checkpoint that the run goes on from; 0 where it begins."""
        return 0 if self._from is None else checkpoint.step_of(self._from)

    def fit(
        self, listeners: tuple[Listener, ...] = (), write_extras: WriteExtras = lambda folder, trained: None
    ) -> Trained:
        """Train and write the adapter.

        Args:
            listeners: Callbacks that get each record of metrics.jsonl.
            write_extras: Callback that adds files to the adapter folder before it appears; gets folder and report.

        Raises:
            UserError: Another process trains this run, or has begun it since.
            JobError: Training failed. Interrupted: the user stopped it; it can be resumed.
        """
        with self._locked():
            self._begin()
            with kept_in(self.folder.events):
                trained = self._train(listeners, write_extras)
            self.ranks.gather(None)  # a rank that leaves takes its part of a sharded base along
            return trained

    def fit_until(self, step: int) -> None:
        """Train to a step and leave a checkpoint there, from which a job that resumes the run goes on.

        Raises:
            UserError, JobError, Interrupted: See `fit`.
        """
        with self._locked():
            self._begin()
            with kept_in(self.folder.events):
                self._run_loop((), until=step)

    def _locked(self) -> AbstractContextManager[Any]:
        """Hold the folder's lock, which the first rank has for all of them."""
        return self.folder.locked() if self.ranks.is_first else nullcontext()

    def _begin(self) -> None:
        # All is looked at again: another process may have had the folder since.
        if self._resume:
            self._require_resumable(self._as_asked)
        else:
            if self.ranks.is_first:
                self._require_folder()
        found = self._find_checkpoint()
        self._reference.give()  # it may fail, so nothing is removed before
        if self.ranks.is_first:
            if self._overwrite and not self._resume:
                self.folder.remove()
            self.folder.clear_unfinished()
        if found is None:  # a run that was killed before its first checkpoint begins anew
            torch.manual_seed(self.run.train.seed)
        else:
            self._loop.resume(found)
            notify(f"{'resuming' if self._resume else 'forked'} from {found}", "info", str(found))
        if self._resume and found is not None:
            self._loop.recall(self.ranks.first(lambda: self._records(self._loop.done)))
        if self.ranks.is_first:
            self._begin_files(found)
        self._named = None  # once is enough

    def _begin_files(self, found: Path | None) -> None:
        """Write what stands in the run's folder while it trains."""
        if not self._resume or found is None:
            self._begin_folder()
            return
        reopen(self.folder, found, self._named is not None)
        if self._extend:
            note_extension(self.folder, self._loop.done, self.steps)
            write_json(self.folder.plan, self.plan())
            write_text(self.folder.run, to_yaml(anchored(self._as_asked)))

    def _find_checkpoint(self) -> Path | None:
        """Return the checkpoint to go on from; None: the run begins."""
        if not self._resume:
            return None if self._fork is None else self._fork.checkpoint
        if self._named is not None:
            return named_checkpoint(self.folder, self._named)
        return checkpoint.latest_whole(self.folder.checkpoints)

    def _records(self, done: int) -> list[dict[str, Any]]:
        """Return the records of the steps that are done, with which the training goes on."""
        return MetricsFile(self.folder.metrics).before(done, self._loop.evaluates_at(done))

    def _run_loop(self, listeners: tuple[Listener, ...], until: int | None = None) -> float:
        """Train, and write metrics.jsonl; returns tokens per second."""
        metrics = MetricsFile(self.folder.metrics)
        if not self.ranks.is_first:
            return self._loop.run((), try_largest=self._is_untried, until=until, rewind=self._rewind(metrics))
        before = metrics.restart(self._records(self._loop.done))
        if self.objective.documents_per_row == 2:
            watch = PreferenceWatch(self._reference.beta, len(self.data.validation.rows))
            watch.recall(before)
            listeners = (watch, *listeners)
        rewind = self._rewind(metrics)
        return self._loop.run((metrics.append, *listeners), try_largest=self._is_untried, until=until, rewind=rewind)

    def _rewind(self, metrics: MetricsFile) -> Callable[[int], Sequence[dict[str, Any]]]:
        """Return the function that drops the records after a step, for all ranks to call together."""
        return lambda step: self.ranks.first(lambda: metrics.restart(self._records(step)))

    @property
    def _is_untried(self) -> bool:
        """Whether nothing has tried the largest micro-batch, as a placement does that was chosen by its size."""
        return self.machine.device in MEASURABLE and not self.placement.least_bytes

    def _train(self, listeners: tuple[Listener, ...], write_extras: WriteExtras) -> Trained:
        speed = self._run_loop(listeners)
        trained = Trained(
            run_dir=str(self.folder.path),
            steps=self._loop.done,
            final_loss=self._loop.loss if self._loop.loss is not None else last_loss(self.folder),
            tokens_per_second=speed,
            peak_bytes=peak_bytes(self.machine.device),
            **self._loop.best.as_dict(),
            kept_step=self._loop.kept_step,
        )
        if not self.ranks.is_first:
            return trained
        is_whole = self.run.adapter is None
        delivered = self.folder.model if is_whole else self.folder.adapter
        size = sum(parameter.nbytes for parameter in self.model.parameters() if parameter.requires_grad)
        what = f"{delivered}: the {'model' if is_whole else 'adapter'}"
        with disk_errors_told(what, size, self.folder.checkpoints), whole_folder(delivered) as unfinished:
            if is_whole:
                template, stop_ids = self.renderer.template, self.renderer.stop_ids
                save_full(self.model, self.tokenizer, template, stop_ids, unfinished)
            else:
                save_adapter(self.model, self.tokenizer, self.renderer.template, self.source, unfinished)
                write_as_changes(self.model, unfinished)
            if self.run.model.task != "causal-lm":
                require_same_scores(self.run, self.source, self.renderer, self.engine, self.data.train, unfinished)
            write_json(unfinished / "ledger.json", self.data.ledger.as_dict())
            write_extras(unfinished, trained)
        remove(self.folder.reopened)
        self.model.eval()
        return trained

    def plan(self) -> dict[str, Any]:
        """Return how the run is placed on this machine, and the prediction of its memory and time."""
        train = self.run.train
        found = {} if self.rate_search is None else {"learning_rate": self.rate_search.as_dict()}
        return self.prediction.as_dict() | {
            "machine": self.machine.as_dict(),
            "engine": self.engine.name,
            "engine_reason": self.choice.reason,
            "placement": self.placement.as_dict(),
            **self.engine.describe(),
            "dtype": str(compute_dtype(self.run.model, self.machine)).removeprefix("torch."),
            "optim": resolve_optim(train.optim, self.machine.device),
            "parameters": self.parameters,
            "steps": self.steps,
            "gpus": self.ranks.size,
            "rows_per_step": rows_of_step(train, self.ranks.size),
            **found,
        }

    def _require_folder(self) -> None:
        if self._overwrite:
            self.folder.require_replaceable()
        else:
            self.folder.require_free()

    def _begin_folder(self) -> None:
        write_json(
            self.folder.environment, environment() | {"kernel": platform.release(), "machine": self.machine.as_dict()}
        )
        write_json(self.folder.plan, self.plan())
        write_json(self.folder.ledger, self.data.ledger.as_dict())
        remove(self.folder.events)  # of a process that ended before its first checkpoint
        remove(self.folder.personal)
        if self.data.ledger.personal:
            write_text(self.folder.personal, self.data.personal())
        if self._fork is not None:
            copy_checkpoint(self._fork, self.folder)
        write_text(self.folder.run, to_yaml(anchored(self.run)))

    def _require_resumable(self, run: Run) -> Run:
        self.folder.require_begun()
        if self.folder.is_finished and self._named is None and not self._extend:
            raise UserError(
                f"train.output_dir = {self.folder.path}: this run is finished",
                "--extend trains it for more steps; or start another in a new train.output_dir",
            )
        return require_resumable(run, self.folder, self._extend)

    def _bytes_on_disk(self) -> int:
        saved = sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad)
        return self.prediction.planner.disk_bytes(self.run, saved, self.steps)


def _settled(run: Run, parts: RunParts) -> Run:
    """Return the run with what a resumed one must find again: its kind of master weights, and its template's date."""
    if (masters := parts.prediction.forecast.master_weights) is not None:
        if run.train.master_weights == "auto" and compute_dtype(run.model, parts.machine) != torch.float32:
            notify(MASTERS[masters], "info", "train.master_weights")
        run = with_train(run, master_weights=masters)
    if parts.renderer.is_dated:
        run = dated(run, parts.renderer.settings.template_date)
    return run


def _choose_engine(run: Run, parts: RunParts, ranks: Ranks) -> EngineChoice:
    if run.model.task == "causal-lm":
        device, data = parts.machine.device, parts.data
        return choose(parts.model, run.train, device, data.train, data.has_pairs, ranks)
    engine = head_engine(run.model, parts.model, parts.tokenizer, run.train.temperature)
    return EngineChoice(engine, "classifiers run on Transformers")
