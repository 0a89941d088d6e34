"""Chooses a run's objective by `train.objective` and its rows, and refuses settings that it cannot go with.

Pairs are learnt by dpo, single answers by sft. Nothing else is guessed: rows of several kinds are refused.
"""

import numpy as np

from veneer.config import Run, UserError
from veneer.data.pipeline import Prepared
from veneer.engine.objective import Objective
from veneer.training.objectives import OBJECTIVES

RATED_FIX = (
    "set data.format=prompt-completion and data.bad_rows=drop to learn the good rows alone, or "
    "data.ignore_columns=[label] if the label says something else"
)


def choose_objective(run: Run, data: Prepared) -> Objective:
    """Return the objective of a run.

    Raises:
        UserError: The rows do not suit it, or a setting does not.
    """
    formats = {name: known["format"] for name, known in data.ledger.formats.items()}
    for name, known in formats.items():
        if known == "rated":
            raise UserError(
                f"{name}: rows of the format rated say whether an answer is good, but training needs single answers or "
                "pairs of them",
                RATED_FIX,
            )
    if "preference" in formats.values() and not data.has_pairs:
        single = next(name for name, known in formats.items() if known != "preference")
        pairs = next(name for name, known in formats.items() if known == "preference")
        raise UserError(
            f"{pairs}: holds pairs of answers (chosen, rejected), and {single} single answers: a run learns from one "
            "kind of rows",
            "name files of one kind, or set data.format=chosen to learn the chosen answers of pairs",
        )
    found = name_objective(run, data)
    if found == "sft" and data.has_pairs:
        raise UserError(
            f"train.objective = sft: {next(iter(formats))}: rows of the format preference compare answers, but "
            "supervised training needs single ones",
            "set train.objective=dpo, or data.format=chosen to learn the chosen answers",
        )
    if found == "dpo":
        _require_pairs(run, data, formats)
    elif run.train.dpo is not None:
        raise UserError(
            "train.dpo: the run learns single answers (train.objective = sft), so it has no effect",
            "leave train.dpo out, or name rows with chosen and rejected answers",
        )
    objective = OBJECTIVES[found](run.train)
    _require_reference(run, found, objective)
    return objective


def name_objective(run: Run, data: Prepared) -> str:
    """Return the name of a run's objective: the one it asks for, or that of its rows."""
    asked = run.train.objective
    return ("dpo" if data.has_pairs else "sft") if asked == "auto" else asked


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
    if reference == "none" and not objective.may_lack_reference:
        raise UserError(
            f"train.reference = none: the loss of {name}, as the run sets it, is one of log-ratios to a reference",
            "set train.reference to cached or live; dpo with loss_type sigmoid or hinge goes without",
        )


def _require_pairs(run: Run, data: Prepared, formats: dict[str, str]) -> None:
    """Raise UserError for rows or settings that dpo cannot go with."""
    if not data.has_pairs:
        name, known = next(iter(formats.items()))
        raise UserError(
            f"train.objective = dpo: {name}: rows of the format {known} hold single answers, and no pairs",
            "name rows with chosen and rejected answers in data.train, or set train.objective=sft",
        )
    dpo = run.train.dpo
    if dpo is not None and dpo.label_smoothing and dpo.loss_type != "sigmoid":
        raise UserError(
            f"train.dpo.label_smoothing = {dpo.label_smoothing:g}: has no effect with loss_type {dpo.loss_type}",
            "leave it out, or set loss_type: sigmoid",
        )
    if run.data.packing:
        raise UserError(
            "data.packing = true: pairs are not packed; a micro-batch of them is one sequence without padding in the "
            "fused engine as it is",
            "leave data.packing out, and set train.per_device_train_batch_size to the pairs of a micro-batch",
        )
    if run.data.loss_on == "all":
        raise UserError(
            "data.loss_on = all: pairs are compared by their answers, and have the prompt in common",
            "leave data.loss_on out",
        )
    for part in (data.train, data.validation):
        split = np.flatnonzero(part.corpus.rows["examples"][part.rows] != 2)
        if len(split):
            raise UserError(
                f"{part.corpus.place(int(part.rows[split[0]]))}: a pair becomes more than two examples "
                f"(data.rewritten_history = {run.data.rewritten_history})",
                "set data.rewritten_history=last",
            )
