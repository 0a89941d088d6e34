"""Plans a run before anything is loaded: memory, time, advice, and what would make it fit."""

from dataclasses import asdict, dataclass
from typing import Any

from veneer.config import Run
from veneer.config.task import require_answers
from veneer.planning.fit import Fitted, fit
from veneer.planning.model_sizes import compare, smaller_bases
from veneer.planning.predict import Prediction, predict_run, prepare_if_local
from veneer.planning.target import device_named, this_device
from veneer.training.choose_objective import choose_objective


@dataclass(frozen=True)
class RunPlan:
    """The forecast of a run, and the changes that would make it fit.

    Attributes:
        prediction: forecast and advice.
        fitted: The cheapest changes that make it fit; none in it: it fits as it is; None: nothing makes it fit.
    """

    prediction: Prediction
    fitted: Fitted | None

    def as_dict(self) -> dict[str, Any]:
        changes = None
        if self.fitted is not None:
            changes = [asdict(change) for change in self.fitted.changes]
        return self.prediction.as_dict() | {"changes": changes}

    def compare(self) -> dict[str, Any]:
        """Methods side by side on common sizes of GPU: see `veneer.planning.model_sizes.compare`.

        Raises:
            UserError: The run classifies.
        """
        require_answers(self.prediction.run.model, "veneer plan --compare")
        return compare(self.prediction.run, self.prediction.planner)


def plan(run: Run, gpu: str | None = None, read_data: bool = True, gpus: int | None = None) -> RunPlan:
    """Predict a run: memory by phase and component, time, advice, and what to change if it does not fit.

    Example:
        planned = veneer.plan(run, gpu="24GiB").as_dict()
        print(planned["fits"], planned["peak_bytes"])

    Args:
        run: settings of the run.
        gpu: card by name, or its memory as "24GiB"; None: this machine.
        read_data: whether to read the data, where that takes nothing from a network.
        gpus: number of GPUs, up to which memory, speed and time are compared; None: those of this machine, or one
            that is named.

    Raises:
        UserError: Rows that the objective does not learn from, an unknown card or base, a memory budget that the card
            cannot keep, a target that matches nothing, a quantization the base cannot take.
    """
    budget = run.train.memory_budget
    target = this_device(None, budget, gpus) if gpu is None else device_named(gpu, budget, gpus)
    data = prepare_if_local(run) if read_data else "it was not asked for"
    if not isinstance(data, str):
        choose_objective(run, data.prepared)  # refuses rows that the run could not learn from
    prediction = predict_run(run, target, data)
    if run.model.task != "causal-lm":
        return RunPlan(prediction, None if prediction.cannot_fit else Fitted(run, [], prediction.forecast))
    fitted = fit(run, prediction.planner, smaller_bases)
    return RunPlan(prediction, fitted)
