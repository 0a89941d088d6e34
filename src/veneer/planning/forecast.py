"""The forecast of a run: its memory in each phase, whether that fits the device, and its time."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from veneer.engine.placement import MemoryPlacement
from veneer.engine.trace import Peak
from veneer.planning.batch_shapes import Padded, RowShapes
from veneer.planning.held_out import SPARE
from veneer.planning.target import TargetDevice, least_budget


@dataclass(frozen=True)
class Forecast:
    """The memory a run will hold and the time it will take.

    Attributes:
        total, trainable: parameters.
        phases: peak of each phase, in the order of a run; `generation` is `veneer evaluate` afterwards.
        rows_at_a_time: rows of the phases `evaluation` and `generation`, as `evaluate.batch_size` and memory allow.
        target: the device.
        engine, engine_reason: reference or fused, and the reason; the choice is checked again on the loaded model.
        placement: placement of a step's tensors.
        resident_bytes: peak of the run with nothing on the host.
        least_bytes: memory that training needs with the placement that takes least, one held-out row at a time.
        rows: batch shapes of the data.
        host_bytes: memory of the host; on a CPU, the peak itself.
        disk_bytes: bytes that the run writes.
        download_bytes: bytes to download first.
        step_seconds: time of an optimizer step, low, likely and high; None: the speed of the device is not known.
        run_seconds: time of the whole run likewise; None: the speed or the number of steps is not known.
        streamed_bytes: peak of training with its weights streamed and all else that can be on the host; None: this
            engine cannot, or not on this device.
        master_weights: float32 or none, as `train.master_weights` resolves; None: an adapter is trained.
    """

    total: int
    trainable: int
    phases: dict[str, Peak]
    rows_at_a_time: dict[str, int]
    target: TargetDevice
    engine: str
    engine_reason: str
    placement: MemoryPlacement
    least_bytes: int
    resident_bytes: int
    rows: RowShapes
    host_bytes: int
    disk_bytes: int
    download_bytes: int
    step_seconds: tuple[float, float, float] | None
    run_seconds: tuple[float, float, float] | None
    streamed_bytes: int | None = None
    master_weights: str | None = None

    @property
    def peak_phase(self) -> str:
        """The fullest phase."""
        return self._fullest(self.phases)

    @property
    def training_phase(self) -> str:
        """The fullest phase of training itself, held-out losses among it."""
        return self._fullest(name for name in self.phases if name != "generation")

    @property
    def step_margin_bytes(self) -> int:
        """The memory left of the budget beside training steps; the batch size of evaluation adapts to it."""
        steps = self._fullest(name for name in self.phases if name not in self.rows_at_a_time)
        return self.target.budget_bytes - self.phases[steps].bytes

    @property
    def run_peak_bytes(self) -> int:
        """The peak of training with all that the placement keeps; the phases count the least."""
        return self.placement.peak_bytes or self.phases[self.training_phase].bytes

    def _fullest(self, names: Iterable[str]) -> str:
        return max(names, key=lambda name: self.phases[name].bytes)

    @property
    def peak_bytes(self) -> int:
        return self.phases[self.peak_phase].bytes

    @property
    def margin_bytes(self) -> int:
        """The memory left of the budget at the peak; negative: it does not fit."""
        return self.target.budget_bytes - self.peak_bytes

    @property
    def verdict(self) -> str:
        """One of: fits; tight (it may fail, since the prediction is not exact); does not fit."""
        if self.margin_bytes < 0:
            return "does not fit"
        # Training moves to the host as little as makes it fit, and can move more.
        needed = self.least_bytes if self.peak_phase == self.training_phase else self.peak_bytes
        return "fits" if self.target.budget_bytes - needed >= SPARE * needed else "tight"

    def as_dict(self) -> dict[str, Any]:
        """Return the forecast as JSON; times in seconds as low, likely, high."""
        times = {"low": 0.0, "likely": 0.0, "high": 0.0}
        return {
            "parameters": {"total": self.total, "trainable": self.trainable},
            "peak_bytes": self.peak_bytes,
            "peak_phase": self.peak_phase,
            "fits": self.verdict != "does not fit",
            "verdict": self.verdict,
            "budget_bytes": self.target.budget_bytes,
            "margin_bytes": self.margin_bytes,
            "least_budget": least_budget(self.least_bytes) if self.target.device == "cuda" else None,
            "components": self.phases[self.peak_phase].components,
            "phases": {name: asdict(peak) for name, peak in self.phases.items()},
            "rows_at_a_time": self.rows_at_a_time,
            "engine": self.engine,
            "engine_reason": self.engine_reason,
            "placement": self.placement.as_dict(),
            "target": {"device": self.target.device, "name": self.target.name},
            "host_bytes": self.host_bytes,
            "disk_bytes": self.disk_bytes,
            "download_bytes": self.download_bytes,
            "rows": asdict(self.rows)
            | {name: value._asdict() for name, value in vars(self.rows).items() if isinstance(value, Padded)},
            "tokens_per_second": self.tokens_per_second and round(self.tokens_per_second, 1),
            "step_seconds": self.step_seconds and dict(zip(times, self.step_seconds)),
            "run_seconds": self.run_seconds and dict(zip(times, self.run_seconds)),
            "ceilings": self.target.ceilings and self.target.ceilings.source,
        }

    @property
    def tokens_per_second(self) -> float | None:
        return self.rows.tokens / self.step_seconds[1] if self.step_seconds else None
