"""The value of each tensor of a merged model, and its rounding to the precision that is written.

Merge, export and certificate all take it from here: what is written and what is proved cannot drift apart.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch

from veneer.config import UserError
from veneer.config.options import require_known
from veneer.model.tuned import TunedModel
from veneer.release.merge.adapter_delta import AdapterDelta, four_bit_modules, through_four_bits
from veneer.release.weights import Stored, bytes_of

PIECE = 8 * 2**20  # elements that are cast at a time
ROWS_ELEMENTS = 2**20  # of a weight that are merged at a time: 4 MiB of float32


def trained_on(tuned: TunedModel) -> str:
    """Return the base that training and evaluation computed with: nf4 (the base in 4 bits) or base (as it is)."""
    return "base" if tuned.quantization is None else "nf4"


def resolved_base(tuned: TunedModel, on: str) -> str:
    """Return base or nf4, where `on` may also be trained.

    Raises:
        UserError: Another value, or the adapter does not belong to that base.
    """
    require_known("--on", on)
    assert on != "best", "that is chosen by now (certify/best_base.py)"
    on = trained_on(tuned) if on == "trained" else on
    if on == "base":
        require_any_bits(tuned, "--on base")
    return on


def require_any_bits(tuned: TunedModel, asked: str) -> None:
    """Raise UserError for an adapter that belongs to its base in 4 bits alone; `asked` is what the user asked for."""
    if tuned.corrects_rounding:
        raise UserError(
            f"{tuned.name}: {asked}, but the adapter began with the error of its base's 4 bits (adapter."
            "init_lora_weights = loftq): the base in 16 bits has no such error, and would get one",
            f"merge it into the base in 4 bits: leave {asked.split()[0]} out",
        )


class MergePlan:
    """The value of each tensor of a merged model, before it is rounded.

    Args:
        tuned: The adapter and its base.
        delta: The adapter's changes.
        on: base, or nf4: what the adapter is merged into.

    Raises:
        UserError: `on` is nf4, and training did not quantize.
    """

    def __init__(self, tuned: TunedModel, delta: AdapterDelta, on: str) -> None:
        self._tuned, self._delta = tuned, delta
        self._quantized: set[str] = set()
        if on == "nf4":
            if tuned.quantization is None and delta.packed:
                raise UserError(
                    f"{tuned.name}: --on nf4, but the base's files are already in 4 bits and always merged dequantized",
                    "leave --on out",
                )
            if tuned.quantization is None:
                raise UserError(
                    f"{tuned.name}: --on nf4, but the adapter was trained on a base that was not quantized",
                    "merge it into the base itself: --on base",
                )
            paths = four_bit_modules(delta.config, tuned.quantization)
            self._quantized = {delta.name_on_disk(f"{path}.weight") for path in paths}

    def changes(self, name: str) -> bool:
        """Return whether a tensor differs from the base's as it lies in its file."""
        return name in self._delta.changed or name in self._quantized or name in self._delta.packed

    def value(self, name: str, stored: Stored) -> torch.Tensor:
        """Return a tensor of the merged model: float32 where the adapter changes it, else in its own precision."""
        weight = self.base_value(name, stored)
        return self._delta.merged(name, weight) if name in self._delta.changed else weight

    def rounded(self, name: str, stored: Stored, dtype: torch.dtype) -> torch.Tensor:
        """Return a tensor of the merged model in the precision that is written.

        Where the change is a product of two thin matrices it is made a few rows at a time, in the processor's cache:
        the same sums in the same order as PEFT's, in a third of the time.
        """
        thin = self._delta.low_rank(name)
        if thin is None or thin[0].dtype != torch.float32:
            return rounded(self.value(name, stored), dtype, name)
        weight = self.base_value(name, stored)
        b_OR, a_RI, scale = thin
        out = torch.empty_like(weight, dtype=dtype)
        step = max(1, ROWS_ELEMENTS // weight.shape[1])

        # A block is one thread's, since threads that share each small operation wait for each other most of the time;
        # and it is made in one buffer, since memory asked for anew costs more than the arithmetic.
        threads = torch.get_num_threads()

        def fill(first: int) -> None:
            buffer = torch.empty(step, weight.shape[1])
            for at in range(first * step, len(weight), threads * step):
                rows = weight[at : at + step]
                sums = torch.mm(b_OR[at : at + step], a_RI, out=buffer[: len(rows)]).mul_(scale).add_(rows)
                if dtype == torch.float16:
                    rounded(sums, dtype, name)
                out[at : at + step] = sums

        try:
            with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
                list(pool.map(fill, range(threads)))
        finally:
            torch.set_num_threads(threads)
        return out

    def base_value(self, name: str, stored: Stored) -> torch.Tensor:
        """Return the base's tensor that the adapter is merged into."""
        weight = stored.read()
        if name not in self._quantized:
            return weight
        assert self._tuned.quantization is not None
        transposed = self._delta.is_transposed(name)
        return through_four_bits(weight, self._tuned.quantization, self._tuned.dtype, transposed)


def rounded(tensor: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
    """Return the tensor in another precision, rounded once to nearest.

    Raises:
        UserError: A finite value has become infinite: it is beyond float16.
    """
    result = tensor.to(dtype)
    if dtype == torch.float16 and tensor.dtype != torch.float16 and not result.isfinite().all():
        largest = float(tensor.float().abs().nan_to_num(posinf=0.0).max())
        if largest > torch.finfo(torch.float16).max:
            raise UserError(
                f"{name}: holds {largest:,.0f}, the largest number of float16 is 65,504: it would become infinite",
                "write bfloat16 or float32 with --dtype",
            )
    return result


def cast_pieces(stored: Stored, dtype: torch.dtype) -> Iterator[memoryview]:
    """Return a tensor's bytes in another precision, a piece at a time, so that the largest need never be held whole."""
    size = stored.dtype.itemsize
    for at in range(0, stored.size, PIECE * size):
        length = min(PIECE * size, stored.size - at)
        part = Stored(stored.name, stored.file, stored.dtype, (length // size,), stored.start + at, length)
        yield bytes_of(rounded(part.read(), dtype, stored.name))
