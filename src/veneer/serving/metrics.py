"""Figures of a server in the text format of Prometheus: counters, gauges and histograms."""

import threading
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Sequence

from veneer.serving.generation import Generation

FIRST_TOKEN = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
BETWEEN = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)
WHOLE = (0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


class Count:
    """A number that only grows."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.value = 0

    def add(self, number: int) -> None:
        """Add to it."""
        with self._lock:
            self.value += number


class Histogram:
    """How many values were at most so large.

    Args:
        bounds: Upper bounds, rising.
    """

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds, self._counts, self._sum = bounds, [0] * (len(bounds) + 1), 0.0

    def add(self, value: float) -> None:
        """Count a value."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    @property
    def mean(self) -> float:
        """The mean of all values; 0 where there are none."""
        count = sum(self._counts)
        return self._sum / count if count else 0.0

    def lines(self, name: str) -> list[str]:
        """Return its lines."""
        lines, total = [], 0
        for bound, count in zip((*self._bounds, "+Inf"), self._counts, strict=True):
            total += count
            lines.append(f'{name}_bucket{{le="{bound}"}} {total}')
        return [*lines, f"{name}_sum {self._sum:.6f}", f"{name}_count {total}"]


class Metrics:
    """The figures of one server."""

    def __init__(self) -> None:
        self.prompt_tokens, self.cached_tokens, self.tokens = Count(), Count(), Count()
        self.answers, self.refused, self.cancelled, self.late, self.failed = (Count() for _ in range(5))
        self.first_token, self.between, self.whole = Histogram(FIRST_TOKEN), Histogram(BETWEEN), Histogram(WHOLE)
        self.requests: Counter[tuple[str, int]] = Counter()
        self.gauges: dict[str, tuple[str, Callable[[], float]]] = {}

    def note_token(self, row: Generation) -> None:
        """Count a token of an answer, and the time before it."""
        now = time.monotonic()
        if row.first_at is None:
            row.first_at = now
            self.first_token.add(now - row.asked_at)
        else:
            self.between.add(now - row.last_at)
        row.last_at = now
        self.tokens.add(1)

    def note_end(self, row: Generation) -> None:
        """Count an answer that is finished."""
        self.answers.add(1)
        self.whole.add(time.monotonic() - row.asked_at)

    def expected_wait(self, waiting: int) -> int:
        """Return the seconds after which a refused request may be tried again: a mean answer, 60 at most."""
        return min(60, max(1, round(self.whole.mean)))

    def text(self) -> str:
        """Return all of them."""
        counts = {
            "prompt_tokens": ("Tokens of prompts that were read", self.prompt_tokens),
            "cached_prompt_tokens": ("Tokens of prompts that had been read before", self.cached_tokens),
            "generated_tokens": ("Tokens that were made", self.tokens),
            "answers": ("Answers that were finished", self.answers),
            "refused": ("Answers refused because the queue was full or slow", self.refused),
            "cancelled": ("Answers given up because the client left", self.cancelled),
            "late": ("Answers given up because they took too long", self.late),
            "failed_steps": ("Steps of the model that failed", self.failed),
        }
        lines = []
        for name, (what, count) in counts.items():
            lines += _head(f"veneer_{name}_total", what, "counter")
            lines.append(f"veneer_{name}_total {count.value}")
        lines += _head("veneer_http_requests_total", "Requests by path and status", "counter")
        for (path, status), number in sorted(self.requests.items()):
            lines.append(f'veneer_http_requests_total{{path="{path}",status="{status}"}} {number}')
        for name, (what, read) in self.gauges.items():
            lines += _head(f"veneer_{name}", what, "gauge")
            lines.append(f"veneer_{name} {read():g}")
        for name, what, histogram in (
            ("time_to_first_token_seconds", "From a request to the first token of an answer", self.first_token),
            ("time_between_tokens_seconds", "Between two tokens of an answer", self.between),
            ("answer_seconds", "From a request to the end of an answer", self.whole),
        ):
            lines += [*_head(f"veneer_{name}", what, "histogram"), *histogram.lines(f"veneer_{name}")]
        return "\n".join(lines) + "\n"


def _head(name: str, what: str, kind: str) -> list[str]:
    return [f"# HELP {name} {what}.", f"# TYPE {name} {kind}"]
