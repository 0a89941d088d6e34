"""Chooses a run's objective by `train.objective` and its rows, and refuses settings that it cannot go with.

Single answers are learnt by sft, pairs by dpo, rated rows by kto; orpo, simpo and cpo are for pairs, and named. Rows of
several kinds are refused.
"""

import numpy as np

from veneer.config import Run, UserError
from veneer.data.pipeline import Prepared
from veneer.engine.objective import LIKELIHOOD, Objective
from veneer.training.objectives import OBJECTIVES
from veneer.training.objectives.bradley_terry import BradleyTerry
from veneer.training.objectives.in_batch import InBatchNegatives

# What rows each learns from, the usual objective of such rows first.
LEARNS = {"sft": "single", "dpo": "pairs", "kto": "rated", "orpo": "pairs", "simpo": "pairs", "cpo": "pairs"}
# By the rows: what they are, and what names them.
ARE = {
    "single": ("hold single answers", "rows with single answers"),
    "pairs": ("hold pairs of answers (chosen, rejected)", "rows with chosen and rejected answers"),
    "rated": ("say whether an answer is good (label)", "rows with prompt, completion and label"),
}
# How rows of a kind are learnt as single answers.
AS_SINGLE = {
    "pairs": "data.format=chosen to learn the chosen answers",
    "rated": "data.format=prompt-completion and data.bad_rows=drop to learn the good rows alone",
}


def choose_objective(run: Run, data: Prepared) -> Objective:
    """Return the objective of a run.

    Raises:
        UserError: The rows do not suit it, or a setting does not.
    """
    if run.model.task == "embedding":
        return InBatchNegatives()
    if run.model.task == "reward":
        if data.kind != "pairs":
            raise UserError(
                f"model.task = reward: {run.data.train}: the rows {ARE.get(data.kind, ARE['single'])[0]}, and rewards "
                "are learnt from pairs",
                "name rows with chosen and rejected answers in data.train",
            )
        _require_whole(run, data)
        return BradleyTerry()
    if run.model.task != "causal-lm":
        return LIKELIHOOD
    name = name_objective(run, data)
    for other in LEARNS:
        if other not in ("sft", name) and getattr(run.train, other) is not None:
            raise UserError(
                f"train.{other}: the run's objective is {name} (train.objective), so it has no effect",
                f"leave train.{other} out" + _instead(other, data.kind),
            )
    if data.kind != "single":
        _require_settings(run, data, name)
    objective = OBJECTIVES[name](run.train)
    _require_reference(run, name, objective)
    return objective


def _require_reference(run: Run, name: str, objective: Objective) -> None:
    """Raise UserError for a `train.reference` that the objective cannot go with."""
    reference = run.train.reference
    if reference == "cached":
        return
    if not objective.needs_reference:
        raise UserError(
            f"train.reference = {reference}: has no effect, since the objective {name} compares with no reference",
            "leave train.reference out",
        )
    if objective.needs_kl:
        raise UserError(
            f"train.reference = {reference}: {name} estimates KL from a reference that is computed first",
            "leave train.reference out, or set it to cached",
        )
    if reference == "none" and not objective.may_lack_reference:
        raise UserError(
            f"train.reference = none: the loss of {name}, as the run sets it, is one of log-ratios to a reference",
            "set train.reference to cached or live; dpo with loss_type sigmoid or hinge goes without",
        )


def name_objective(run: Run, data: Prepared) -> str:
    """Return the name of a run's objective.

    Raises:
        UserError: The rows are of several kinds, or of another kind than it learns from.
    """
    formats = {file: known["format"] for file, known in data.ledger.formats.items()}
    if data.kind == "mixed":
        file, kind = next((file, known) for file, known in formats.items() if known in ("preference", "rated"))
        others = next(file for file, known in formats.items() if known != kind)
        raise UserError(
            f"{file}: its rows {ARE['rated' if kind == 'rated' else 'pairs'][0]}, and those of {others} are of the "
            f"format {formats[others]}: a run learns from one kind of rows",
            f"name files of one kind, or set {AS_SINGLE['rated' if kind == 'rated' else 'pairs']}",
        )
    if run.train.objective == "auto":
        return next(name for name, kind in LEARNS.items() if kind == data.kind)
    name = run.train.objective
    if LEARNS[name] != data.kind:
        file, known = next(iter(formats.items()))
        usual = next(name for name, kind in LEARNS.items() if kind == data.kind)
        as_single = f", or {AS_SINGLE[data.kind]}" if name == "sft" else ""
        raise UserError(
            f"train.objective = {name}: {file}: rows of the format {known} {ARE[data.kind][0]}, and {name} learns from "
            f"{ARE[LEARNS[name]][1]}",
            f"name such rows in data.train, or set train.objective={usual}{as_single}",
        )
    return name


def _instead(name: str, kind: str) -> str:
    """Return how a section of an objective gets an effect."""
    if LEARNS[name] == kind:
        return f", or set train.objective={name}"
    return f", or name {ARE[LEARNS[name]][1]} in data.train"


def _require_settings(run: Run, data: Prepared, name: str) -> None:
    """Raise UserError for settings or rows that comparing answers cannot go with."""
    section = getattr(run.train, name)
    if getattr(section, "label_smoothing", 0) and section.loss_type != "sigmoid":
        raise UserError(
            f"train.{name}.label_smoothing = {section.label_smoothing:g}: has no effect with loss_type "
            f"{section.loss_type}",
            "leave it out, or set loss_type: sigmoid",
        )
    if run.data.packing and data.kind == "pairs":
        raise UserError(
            "data.packing = true: pairs are not packed; a micro-batch of them is one sequence without padding in the "
            "fused engine as it is",
            "leave data.packing out, and set train.per_device_train_batch_size to the pairs of a micro-batch",
        )
    if run.data.loss_on == "all":
        raise UserError(
            "data.loss_on = all: rows are compared by their answers, and prompts are not learnt",
            "leave data.loss_on out",
        )
    if data.kind == "rated" and run.train.learning_rate == "auto":
        raise UserError(
            "train.learning_rate = auto: rates are compared by losses of single answers or of pairs, and the rows are "
            "rated",
            "name a rate, such as 1e-5",
        )
    if data.kind == "rated" and len(data.train) < 2:
        raise UserError(
            "train.objective = kto: one row alone: prompts are compared with the answers of other rows",
            "name at least two rows in data.train",
        )
    _require_whole(run, data)


def _require_whole(run: Run, data: Prepared) -> None:
    """Raise UserError where an answer that is compared became several examples."""
    examples = 2 if data.kind == "pairs" else 1
    for part in (data.train, data.validation):
        split = np.flatnonzero(part.corpus.rows["examples"][part.rows] != examples)
        if len(split):
            raise UserError(
                f"{part.corpus.place(int(part.rows[split[0]]))}: a row becomes more than {examples} example"
                f"{'s' if examples > 1 else ''} (data.rewritten_history = {run.data.rewritten_history})",
                "set data.rewritten_history=last",
            )
