"""Declares the settings of each objective that learns from preferences; names and defaults are TRL's.

`veneer.training.objectives` has the formulas.
"""

from typing import Any, Literal, get_args

from pydantic import Field
from pydantic.fields import FieldInfo

from veneer.config.section import Section

OF_PAIRS = ("dpo", "orpo", "simpo", "cpo")  # objectives whose rows are two documents


class Dpo(Section):
    """Settings of dpo (direct preference optimization)"""

    beta: float = Field(0.1, gt=0, description="weight of the log-ratios, larger stays nearer to the reference")
    loss_type: Literal["sigmoid", "hinge", "ipo"] = Field("sigmoid", description="loss of a pair")
    label_smoothing: float = Field(
        0.0, ge=0, lt=0.5, description="share of the pairs that may be the wrong way round, for sigmoid"
    )
    rpo_alpha: float = Field(0.0, ge=0, description="weight of the chosen answers' negative log-likelihood a token")


class Kto(Section):
    """Settings of kto (Kahneman-Tversky optimization)"""

    beta: float = Field(0.1, gt=0, description="weight of the log-ratios, larger stays nearer to the reference")
    desirable_weight: float = Field(1.0, gt=0, description="weight of the loss of good answers")
    undesirable_weight: float = Field(1.0, gt=0, description="weight of the loss of bad answers")


class Orpo(Section):
    """Settings of orpo (odds ratio preference optimization)"""

    beta: float = Field(0.1, gt=0, description="weight of the odds ratio beside the chosen answers' likelihood")


class Simpo(Section):
    """Settings of simpo (simple preference optimization)"""

    beta: float = Field(2.0, gt=0, description="weight of the mean log-probabilities")
    gamma: float = Field(0.5, ge=0, description="margin by which the chosen answer is to be ahead, after beta")


class Cpo(Section):
    """Settings of cpo (contrastive preference optimization)"""

    beta: float = Field(0.1, gt=0, description="weight of the log-probabilities")
    loss_type: Literal["sigmoid", "hinge", "ipo"] = Field("sigmoid", description="loss of a pair")
    label_smoothing: float = Field(
        0.0, ge=0, lt=0.5, description="share of the pairs that may be the wrong way round, for sigmoid"
    )
    cpo_alpha: float = Field(1.0, ge=0, description="weight of the chosen answers' negative log-likelihood a token")


def settings_of(kind: type[Section]) -> Any:
    """Return the field of a run for the settings of an objective, described by their own descriptions and limits."""
    fields = kind.model_fields
    defaults = ", ".join(f"{name}: {_text(field.default)}" for name, field in fields.items())
    about = "; ".join(f"{name}: {field.description}" for name, field in fields.items())
    limits = ", ".join(f"{name} {_limits(field)}" for name, field in fields.items())
    return Field(
        None,
        description=f"{kind.__doc__}, by default {{{defaults}}}. {about}.",
        json_schema_extra={"fix": f"write {{{defaults}}} or a part of it: {limits}"},
    )


def _text(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _limits(field: FieldInfo) -> str:
    """Return the values that a field may have, in words."""
    if choices := get_args(field.annotation):
        return f"{', '.join(choices[:-1])} or {choices[-1]}"
    words = {"gt": "above {:g}", "ge": "of {:g} or more", "lt": "below {:g}"}
    found = [said.format(getattr(m, name)) for m in field.metadata for name, said in words.items() if hasattr(m, name)]
    return " and ".join(found)
