"""A metric of the user's own: `module:function`, a function from a `Sample` to a number, or to whether it is right.

    def keeps_the_name(sample):  # mine:keeps_the_name
        return sample.prompt.split()[0] in sample.answer

The module is importable, or a file of that name in the working directory.
"""

import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

from veneer.config import JobError, UserError
from veneer.config.files import reason
from veneer.evaluation.metrics.metric import Metric, MetricResult, Sample, ScoredRows, ShareRight
from veneer.evaluation.metrics.resampled import RowMean


def own_metric(name: str) -> Metric:
    """Make the metric of a function, of the function's name.

    Raises:
        UserError: There is no such module or function in it, or the module does not import.
    """
    module, _, function = name.partition(":")
    found = getattr(_module(name, module), function, None)
    if not callable(found):
        raise UserError(
            f"evaluate.metrics: {name}: {module} has no function {function!r}", "name one as module:function"
        )

    def measure(rows: ScoredRows) -> dict[str, MetricResult]:
        values = [_value(name, found, sample) for sample in rows.samples]
        if not values:
            return {}
        if all(isinstance(value, bool) for value in values):
            return {name: ShareRight([bool(value) for value in values])}
        return {name: RowMean(values)}

    return Metric(name, measure)


def _module(name: str, module: str) -> Any:
    file = Path(*module.split(".")).with_suffix(".py")
    try:
        if not file.is_file():
            return importlib.import_module(module)
        spec = importlib.util.spec_from_file_location(module, file)
        assert spec is not None
        assert spec.loader is not None
        loaded = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(loaded)
        return loaded
    except Exception as error:
        raise UserError(
            f"evaluate.metrics: {name}: the module {module} does not import ({reason(error)})",
            f"name one that Python finds, or write {file} in this folder",
        ) from error


def _value(name: str, function: Callable[[Sample], Any], sample: Sample) -> float | bool:
    try:
        value = function(sample)
        return bool(value) if isinstance(value, bool) else float(value)
    except Exception as error:
        raise JobError(f"evaluate.metrics: {name} fails on {sample.place}: {reason(error)}") from error
