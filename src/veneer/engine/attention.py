"""Computes attention of short rows on the CPU by plain matrix products instead of torch's flash kernel.

The kernel's backward reaches 27 GFLOP/s there, products 400. For rows of up to `SHORT` tokens the square of scores
that plain products keep is small: 8 rows of 120 tokens, 9 heads: 2 MB a layer. Only training passes switch: generation
with a cache would repeat keys and values for each head. A user's own choice (`model.attn_implementation`) stays.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

SHORT = 256  # tokens of the longest row


@contextmanager
def short_row_attention(base: Any, longest: int | None) -> Iterator[None]:
    """Within the context, a model with torch's attention computes it by plain products if its rows are short.

    Args:
        base: Transformers' model.
        longest: tokens of the longest row; None: leave the model as it is.
    """
    if longest is None or longest > SHORT or base.config._attn_implementation != "sdpa":
        yield
        return
    base.set_attn_implementation("eager")
    try:
        yield
    finally:
        base.set_attn_implementation("sdpa")
