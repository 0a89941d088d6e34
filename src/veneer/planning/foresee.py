"""The forecast of a run and the advice on it, before its base is loaded.

`veneer plan` asks for it, and so does every training before it loads anything. Data counts where it has been read.
"""

from dataclasses import asdict, dataclass
from typing import Any

from veneer.config import Run, UserError
from veneer.data.pipeline import Part, Prepared, prepare
from veneer.data.render import Renderer
from veneer.data.template import own_template
from veneer.model.lineage import gguf_origin
from veneer.model.load import load_tokenizer
from veneer.model.locate import locate
from veneer.model.shapes import is_at_hand
from veneer.planning.advice import Advice, DataFacts, Situation, TokenizerFacts, advise
from veneer.planning.base import PlannedModel
from veneer.planning.batch_shapes import Lengths
from veneer.planning.forecast import Forecast
from veneer.planning.planner import Planner
from veneer.planning.target import TargetDevice

CERTAIN = 0.92  # of a predicted peak; what is beyond the budget even so cannot fit


@dataclass(frozen=True)
class Foreseen:
    """A run before it runs.

    Attributes:
        run: the settings.
        planner: makes forecasts of other settings on the same data.
        forecast, advice: memory and time of the run, and what its settings should be.
    """

    run: Run
    planner: Planner
    forecast: Forecast
    advice: list[Advice]

    @property
    def is_hopeless(self) -> bool:
        """Whether training cannot fit even if the prediction is too high; answers come later, and may elsewhere."""
        peak = self.forecast.phases[self.forecast.training_phase].bytes
        return CERTAIN * peak > self.forecast.target.budget_bytes

    def as_dict(self) -> dict[str, Any]:
        return self.forecast.as_dict() | {"advice": [asdict(advice) for advice in self.advice]}


@dataclass(frozen=True)
class Read:
    """A run's data with the tokenizer it was read with."""

    prepared: Prepared
    renderer: Renderer

    def lengths(self) -> tuple[Lengths, Lengths]:
        """Of the training and of the held-out rows."""
        train, held_out = (Lengths(part.lengths, part.corpus.trained[part.examples]) for part in self._parts())
        return train, held_out

    def _parts(self) -> tuple[Part, Part]:
        return self.prepared.train, self.prepared.validation

    def facts(self) -> tuple[DataFacts, TokenizerFacts]:
        """The facts that rules of advice look at."""
        ledger, tokenizer = self.prepared.ledger.as_dict(), self.renderer.tokenizer
        data = DataFacts(
            rows=ledger["rows"]["training"],
            held_out=ledger["rows"]["validation"],
            p95=ledger["lengths"]["percentiles"]["p95"],
            longest=int(max(part.lengths.max() for part in self._parts() if len(part))),
            end_of_turn=ledger["tokens"]["end_of_turn"],
            raw="text" in ledger["format"].split(", "),
        )
        own = own_template(tokenizer)
        return data, TokenizerFacts(
            has_template=bool(own),
            uses_own=bool(own) and (self.renderer.template or "").endswith(own or ""),
        )


def foresee(run: Run, target: TargetDevice, data: Read | str) -> Foreseen:
    """The forecast of a run, and advice.

    Args:
        run: the settings.
        target: the device it is to run on.
        data: its data, or why that was not read.

    Raises:
        UserError: no such base, an adapter target that matches nothing, or a quantization the base cannot take.
    """
    base = PlannedModel(run.model, data if isinstance(data, str) else data.lengths())
    planner = Planner(base, target)
    forecast = planner.forecast(run)
    facts = data.facts() if isinstance(data, Read) else (None, None)
    origin = gguf_origin(run.model)
    situation = Situation(
        run=run,
        shapes=base.shapes,
        stored=base.stored,
        forecast=forecast,
        data=facts[0],
        tokenizer=facts[1],
        file_type=origin.type if origin is not None and origin.is_quantized else None,
    )
    return Foreseen(run, planner, forecast, advise(situation))


def read_if_at_hand(run: Run) -> Read | str:
    """A run's data, or why it cannot be read without fetching anything."""
    if not is_at_hand(run.model, ("tokenizer.json",)):
        return f"the tokenizer of {run.model.base} is not on this machine yet"
    try:
        renderer = Renderer(load_tokenizer(locate(run.model)), run.data)
        return Read(prepare(run.data, renderer, run.train.seed), renderer)
    except UserError as error:
        return str(error).splitlines()[0]
