"""Predicts a run before its base is loaded: its forecast, and advice on its settings.

`veneer plan` calls it, and so does every training before it loads anything. Data is used where it has been read.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from veneer.config import Run, UserError
from veneer.data.pipeline import Part, Prepared, prepare
from veneer.data.render import Renderer
from veneer.data.template import own_template
from veneer.model.classifier import labels_of, make_renderer
from veneer.model.lineage import gguf_origin
from veneer.model.load import load_tokenizer
from veneer.model.locate import locate
from veneer.model.shapes import is_local
from veneer.planning.advice import Advice, DataFacts, Situation, TokenizerFacts, advise
from veneer.planning.base import PlannedModel
from veneer.planning.batch_shapes import Lengths
from veneer.planning.classifier import ClassifierPlanner, PlannedClassifier
from veneer.planning.forecast import Forecast
from veneer.planning.gpus import OnGpus, by_gpus
from veneer.planning.planner import Planner
from veneer.planning.target import TargetDevice

CERTAIN = 0.92  # share of a predicted peak; a run whose share exceeds the budget cannot fit


@dataclass(frozen=True)
class Prediction:
    """The prediction of a run.

    Attributes:
        run: the settings.
        planner: planner that forecasts other settings on the same data.
        forecast, advice: memory and time of the run, and findings on its settings.
        pairs: pairs of answers to train on; None: rows are single answers, or were not read.
        by_gpus: the run by the number of GPUs, where there are several.
    """

    run: Run
    planner: Planner
    forecast: Forecast
    advice: list[Advice]
    pairs: int | None = None
    by_gpus: Sequence[OnGpus] = ()

    @property
    def cannot_fit(self) -> bool:
        """Whether training cannot fit, even if the prediction is too high, which no budget that the user set allows."""
        share = CERTAIN if self.run.train.memory_budget == "auto" else 1.0
        return share * self.forecast.least_bytes > self.forecast.target.budget_bytes

    def as_dict(self) -> dict[str, Any]:
        advice = [asdict(advice) for advice in self.advice]
        found = self.forecast.as_dict() | {"pairs": self.pairs, "advice": advice}
        if self.by_gpus and (link := self.forecast.target.gpu_link) is not None:
            found |= {"by_gpus": [one.as_dict() for one in self.by_gpus], "gpu_link": asdict(link)}
        return found


@dataclass(frozen=True)
class PreparedData:
    """A run's data with the renderer that prepared it."""

    prepared: Prepared
    renderer: Renderer

    def lengths(self) -> tuple[Lengths, Lengths, int]:
        """Return the lengths of the training and of the held-out examples, and how many of them a row is."""
        has_pairs = self.prepared.has_pairs
        train, held_out = (
            Lengths(part.lengths, part.corpus.trained[part.examples], part.shared if has_pairs else None)
            for part in self._parts()
        )
        return train, held_out, 2 if has_pairs else 1

    def _parts(self) -> tuple[Part, Part]:
        return self.prepared.train, self.prepared.validation

    def facts(self) -> tuple[DataFacts, TokenizerFacts]:
        """Return the facts that rules of advice check."""
        ledger, tokenizer = self.prepared.ledger.as_dict(), self.renderer.tokenizer
        data = DataFacts(
            rows=ledger["rows"]["training"],
            held_out=ledger["rows"]["validation"],
            p95=ledger["lengths"]["percentiles"]["p95"],
            longest=int(max(part.lengths.max() for part in self._parts() if len(part))),
            end_of_turn=ledger["tokens"]["end_of_turn"],
            raw="text" in ledger["format"].split(", "),
            has_pairs=self.prepared.kind in ("pairs", "rated"),
            longer=self._share_of_longer(),
        )
        own = own_template(tokenizer)
        return data, TokenizerFacts(
            has_template=bool(own),
            uses_own=bool(own) and (self.renderer.template or "").endswith(own or ""),
        )

    def _share_of_longer(self) -> float | None:
        """Return the share of pairs whose chosen answer is the longer one, of those that differ in length."""
        if not self.prepared.has_pairs:
            return None
        part = self.prepared.train
        trained = part.corpus.trained[part.examples].astype(np.int64)
        if len(trained) != 2 * len(part.rows):  # refused before training
            return None
        differences = trained[::2] - trained[1::2]
        unequal = np.count_nonzero(differences)
        return float(np.count_nonzero(differences > 0) / unequal) if unequal else None


def predict_run(run: Run, target: TargetDevice, data: PreparedData | str) -> Prediction:
    """Predict a run, and advise on its settings.

    Args:
        run: the settings.
        target: device that it is to run on.
        data: data of the run, or the reason why that was not read.

    Raises:
        UserError: there is no such base, an adapter target matches nothing, or the base cannot be quantized.
    """
    if run.model.task != "causal-lm":
        return _predict_classifier(run, target, data)
    base = PlannedModel(run.model, data if isinstance(data, str) else data.lengths())
    planner = Planner(base, target)
    forecast = planner.forecast(run)
    facts = data.facts() if isinstance(data, PreparedData) else (None, None)
    many = by_gpus(run, planner, forecast)
    origin = gguf_origin(run.model)
    situation = Situation(
        run=run,
        shapes=base.shapes,
        stored=base.stored,
        forecast=forecast,
        data=facts[0],
        tokenizer=facts[1],
        file_type=origin.type if origin is not None and origin.is_quantized else None,
        by_gpus=many,
    )
    pairs = facts[0].rows if facts[0] is not None and base.has_pairs else None
    return Prediction(run, planner, forecast, advise(situation), pairs, many)


def _predict_classifier(run: Run, target: TargetDevice, data: PreparedData | str) -> Prediction:
    """Predict a run that classifies; rules of advice are for written answers."""
    if isinstance(data, PreparedData):
        base = PlannedClassifier(run.model, len(labels_of(data.renderer)), data.lengths())
    else:
        labels = {"embedding": 0, "reward": 1}.get(run.model.task, len(run.data.labels or ("", "")))
        base = PlannedClassifier(run.model, labels, data)
    planner = ClassifierPlanner(base, target)
    forecast = planner.forecast(run)
    return Prediction(run, planner, forecast, [], by_gpus=by_gpus(run, planner, forecast))


def prepare_if_local(run: Run) -> PreparedData | str:
    """Prepare a run's data, or return the reason why that needs a download."""
    if not is_local(run.model, ("tokenizer.json",)):
        return f"the tokenizer of {run.model.base} is not on this machine yet"
    try:
        renderer = make_renderer(run, load_tokenizer(locate(run.model), run.data))
        return PreparedData(prepare(run.data, renderer, run.train.seed), renderer)
    except UserError as error:
        return str(error).splitlines()[0]
