"""Linears that share an input, as one matrix with their adapters in its margins.

For q, k and v (or gate and up, or a single linear) with stacked weights W (N x D), stacked A (R x D) and B in blocks on
a diagonal (N x R), one matrix holds all:

            D       R
        +-------+------+
      N |   W   |  s B |      forward:   y  = [x | x A^T]   [W | s B]^T
        +-------+------+
      R |   A   |      |      backward:  dx = [dy | dy s B] [W ; A]
        +-------+------+

So the adapter rides in the large product: its sum is made in float32 inside it, and no output is read again to add
to. A bias is one column more, whose input is 1. Where W is in 4 bits, the matrix is made in a scratch buffer just
before it is used; where there is room, it stays.

Shapes: T tokens, D inputs, N outputs, R stacked ranks and the bias, padded to a multiple of 64.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from veneer.kernels import low_rank, nf4
from veneer.kernels.low_rank import Dropout, Member
from veneer.kernels.place import Place


class Linear(NamedTuple):
    """One linear layer and its adapter, if it has one.

    Attributes:
        name: Of the module.
        module: nn.Linear or bitsandbytes' Linear4bit.
        a, b: The adapter's matrices, (r, D) and (N, r) parameters; None without adapter.
        scale: lora_alpha / r or the like.
        dropout: Probability on the adapter's input.
    """

    name: str
    module: Any
    a: Any = None
    b: Any = None
    scale: float = 1.0
    dropout: float = 0.0


class Group:
    """See the module.

    Args:
        linears: One to three that read the same input.
        dtype: Of compute.
        key: Tells its dropout masks apart from other groups'.
    """

    def __init__(self, linears: Sequence[Linear], dtype: torch.dtype, key: int) -> None:
        self.linears = tuple(linears)
        adapted = [linear for linear in linears if linear.a is not None]
        first = linears[0].module
        self.inputs = int(first.in_features)
        self.outputs = sum(int(linear.module.out_features) for linear in linears)
        self.rank = len(adapted[0].a) if adapted else 0
        self.scale = adapted[0].scale if adapted else 1.0
        self.dropout_p = adapted[0].dropout if adapted else 0.0
        self.key = key
        has_bias = any(linear.module.bias is not None for linear in linears)
        used = self.rank * len(adapted)
        self.bias_column = used if has_bias else -1
        # Rows that begin at multiples of 128 bytes: a product whose rows do not is 3% slower on an H100.
        unit = 16 if first.weight.device.type == "cpu" else 64
        self.margin = -(-(used + has_bias) // unit) * unit
        self.used = used
        members, at, slot = [], 0, 0
        for linear in linears:
            size = linear.module.out_features
            members.append(Member(at, at + size, slot if linear.a is not None else -1))
            at, slot = at + size, slot + (linear.a is not None)
        self.members = tuple(members)
        device = first.weight.device
        self.is_quantized = getattr(first.weight, "quant_state", None) is not None
        self.table: Any = None
        self._resident: torch.Tensor | None = None
        width = self.inputs + self.margin
        if self.is_quantized:
            self.table = nf4.table_of([nf4.Packed.of(linear.module.weight) for linear in linears])
            self.a_RD = torch.zeros((self.margin, self.inputs), dtype=dtype, device=device)
            self.b_NR = torch.zeros((self.outputs, self.margin), dtype=dtype, device=device)
        else:
            matrix = torch.zeros((self.outputs + self.margin, width), dtype=dtype, device=device)
            for linear, member in zip(linears, members):
                place = matrix[member.start : member.end, : self.inputs]
                place.copy_(linear.module.weight.data)
                linear.module.weight.data = place  # the module reads the same memory, so nothing is there twice
            self._make_resident(matrix)
        if has_bias:
            for linear, member in zip(linears, members):
                if linear.module.bias is not None:
                    self.b_NR[member.start : member.end, self.bias_column] = linear.module.bias.data
        # Set by the engine: where the adapters' gradients lie, stacked A (R, D) and the B one behind the other.
        self.grad_a: Any = None
        self.grad_b: Any = None

    def _make_resident(self, matrix: torch.Tensor) -> None:
        self._resident = matrix
        self.a_RD = matrix[self.outputs :, : self.inputs]
        self.b_NR = matrix[: self.outputs, self.inputs :]

    @property
    def size(self) -> int:
        """Elements of its matrix."""
        return (self.outputs + self.margin) * (self.inputs + self.margin)

    def keep_dequantized(self) -> None:
        """Hold the 16-bit matrix for good: no time for dequantization any more."""
        if self._resident is None:
            b_NR = self.b_NR
            matrix = self.a_RD.new_zeros((self.outputs + self.margin, self.inputs + self.margin))
            nf4.dequantize(self.table, matrix[: self.outputs, : self.inputs])
            self._make_resident(matrix)
            self.b_NR.copy_(b_NR)

    def shadows(self) -> list[Place]:
        """Where each adapter matrix stands in compute precision."""
        pairs = []
        for linear, (start, end, slot) in zip(self.linears, self.members):
            if slot >= 0:
                ranks = slice(slot * self.rank, (slot + 1) * self.rank)
                pairs.append(Place(self.a_RD[ranks], linear.a.data, 1.0))
                pairs.append(Place(self.b_NR[start:end, ranks], linear.b.data, self.scale))
        return pairs

    def matrix(self, scratch: torch.Tensor) -> torch.Tensor:
        """The whole matrix, (N + R, D + R); valid until the scratch buffer is used again."""
        if self._resident is not None:
            return self._resident
        matrix = scratch[: self.size].view(self.outputs + self.margin, self.inputs + self.margin)
        nf4.dequantize(self.table, matrix[: self.outputs, : self.inputs])
        if self.margin:
            matrix[: self.outputs, self.inputs :] = self.b_NR
            matrix[self.outputs :, : self.inputs] = self.a_RD
        return matrix

    def room(self, tokens: int) -> torch.Tensor:
        """An empty input with the adapters' columns behind it, (T, D + R)."""
        return self.a_RD.new_empty((tokens, self.inputs + self.margin))

    def _dropout(self, seed: torch.Tensor | None) -> Dropout | None:
        return Dropout(self.dropout_p, seed, self.key) if self.dropout_p and seed is not None else None

    def forward(
        self, x_TK: torch.Tensor, matrix: torch.Tensor, out_TN: torch.Tensor, seed: torch.Tensor | None
    ) -> torch.Tensor | None:
        """Fill `out_TN`.

        Args:
            x_TK: From `room`, its first D columns filled; the others are filled here.
            matrix: From `matrix`.
            seed: Of dropout; None: none (evaluation).

        Returns:
            A copy of the adapters' columns x A^T, which backward needs; None without adapters.
        """
        kept = None
        if self.margin:
            xa_TR = x_TK[:, self.inputs :]
            self._project(x_TK[:, : self.inputs], xa_TR, seed)
            kept = xa_TR.contiguous()
        torch.mm(x_TK, matrix[: self.outputs].T, out=out_TN)
        return kept

    def _project(self, x_TD: torch.Tensor, xa_TR: torch.Tensor, seed: torch.Tensor | None) -> None:
        dropout = self._dropout(seed)
        if dropout is None:
            low_rank.project(x_TD, self.a_RD, xa_TR, self.margin, self.bias_column)
            return
        xa_TR[:, self.used :] = 0
        if self.bias_column >= 0:
            xa_TR[:, self.bias_column] = 1
        low_rank.project(x_TD, self.a_RD[: self.used], xa_TR[:, : self.used], self.rank, -1, dropout)

    def backward_input(
        self, dy_TK: torch.Tensor, matrix: torch.Tensor, dx_TD: torch.Tensor, seed: torch.Tensor | None
    ) -> None:
        """Fill `dx_TD`, the gradient of the input, after `backward_margin`."""
        if self.used and not self.dropout_p:
            torch.mm(dy_TK, matrix[:, : self.inputs], out=dx_TD)
            return
        torch.mm(dy_TK[:, : self.outputs], matrix[: self.outputs, : self.inputs], out=dx_TD)
        if self.used and (dropout := self._dropout(seed)) is not None:
            db_TR = dy_TK[:, self.outputs : self.outputs + self.used]
            low_rank.add_projected(dx_TD, db_TR, self.a_RD[: self.used], self.rank, dropout)

    def backward_margin(self, dy_TK: torch.Tensor) -> None:
        """Fill the columns behind the output's gradient: dy B, which both other parts of backward read."""
        if self.margin:
            # The bias's column meets a row of zeros in the matrix, so it need not be taken out.
            low_rank.project(dy_TK[:, : self.outputs], self.b_NR.T, dy_TK[:, self.outputs :], self.margin)

    def backward_adapters(
        self,
        dy_TK: torch.Tensor,
        x_TD: torch.Tensor,
        xa_TR: torch.Tensor | None,
        seed: torch.Tensor | None,
        norm: Any = None,
        parts_a: torch.Tensor | None = None,
        parts_b: torch.Tensor | None = None,
    ) -> None:
        """Add the adapters' gradients to theirs, after `backward_margin`.

        Args:
            dy_TK: (T, N + R), gradient of the output, and what `backward_margin` put behind it.
            x_TD: The forward's input, or what `norm` makes it from.
            xa_TR: As `forward` returned it.
            norm: See `low_rank.outer`.
            parts_a, parts_b: The A and B gradients where another kernel has made them, as parts to be added up.
        """
        if not self.used:
            return
        assert xa_TR is not None
        N, used = self.outputs, self.used
        if parts_a is None:
            parts_a = low_rank.outer(dy_TK[:, N : N + used], x_TD, self.rank, self._dropout(seed), norm)
        low_rank.add_a(parts_a, self.grad_a)
        if parts_b is None:
            parts_b = low_rank.outer(xa_TR[:, :used], dy_TK[:, :N], used)
        low_rank.add_b(parts_b, self.grad_b, self.members, self.rank, self.scale)
