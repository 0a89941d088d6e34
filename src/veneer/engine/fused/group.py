"""Computes linear layers that share an input as one matrix, with their adapters in its padding.

For q, k and v (or gate and up, or a single linear) with stacked weights W (N x D), stacked A (R x D) and B in blocks on
a diagonal (N x R), one matrix holds all:

            D       R
        +-------+------+
      N |   W   |  s B |      y = x W^T + u (s B)^T,  u = x A^T
        +-------+------+
      R |   A   |      |      dx = dy W + v A,        v = dy s B
        +-------+------+

An adapter's products are skinny: their cost is reading activations. So they are computed within the large products, in
one of two ways. Where u is computed first, y = [x | u] [W | s B]^T is one product ("before"). Where the product comes
first, [y | u] = x [W ; A]^T gives u as further columns of y, and the norm that reads y next adds u (s B)^T, an `Update`
("after"). Backward has the same two ways: dx = [dy | v] [W ; A], or [dx | v] = dy [W | s B]. "After" saves a reading of
the input but needs a norm next, and few ranks. Where W is in 4 bits, the matrix is dequantized into a scratch buffer
just before it is used; where memory allows, it is kept.

A product whose adapters are added after it is stored 1.618 times too large (see `update`).

With dropout, u comes from a masked copy of x that exists only within a kernel, and v A is masked likewise.

Shapes: T tokens, D inputs, N outputs, R stacked ranks, padded to a multiple of 16; E a width with padding after it:
columns for the adapters, as many as align rows to what products read fastest.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from veneer.kernels import low_rank, nf4
from veneer.kernels.cast import Cast
from veneer.kernels.low_rank import Dropout, Member
from veneer.kernels.update import OFF_GRID, Update

MAX_ADDED = 32  # ranks that a norm adds; with more, a separate product is faster


class Linear(NamedTuple):
    """One linear layer and its adapter, if it has one.

    Attributes:
        name: name of the module.
        module: nn.Linear or bitsandbytes' Linear4bit.
        a, b: matrices of the adapter, (r, D) and (N, r) parameters; None without adapter.
        scale: factor of the adapter's output, as lora_alpha / r.
        dropout: probability of dropout on the adapter's input.
    """

    name: str
    module: Any
    a: Any = None
    b: Any = None
    scale: float = 1.0
    dropout: float = 0.0


class Group:
    """A group of linear layers that share an input; see the module.

    Args:
        linears: one to three layers that read the same input.
        dtype: compute dtype.
        key: number that makes its dropout masks differ from those of other groups.
        device: device that computes; 4-bit weights may be on the host.
        norm_follows: whether a norm reads the outputs next, and can add to them.
        norm_precedes: whether the inputs come from a norm, whose backward can add to their gradient.

    Attributes:
        packed: the 4-bit matrices, as bitsandbytes' modules hold them; none: it is not quantized.
    """

    def __init__(
        self,
        linears: Sequence[Linear],
        dtype: torch.dtype,
        key: int,
        device: torch.device,
        norm_follows: bool = False,
        norm_precedes: bool = False,
    ) -> None:
        self.linears = tuple(linears)
        adapted = [linear for linear in linears if linear.a is not None]
        first = linears[0].module
        self.inputs = int(first.in_features)
        self.outputs = sum(int(linear.module.out_features) for linear in linears)
        self.rank = max((len(linear.a) for linear in adapted), default=0)
        self.dropout_p = adapted[0].dropout if adapted else 0.0
        self.key = key
        members, at, ranks = [], 0, 0
        for linear in linears:
            size, rank = linear.module.out_features, 0 if linear.a is None else len(linear.a)
            members.append(Member(at, at + size, ranks, rank, linear.scale))
            # Each adapter's dropout has a mask for as many ranks, so that a lower rank is padded there.
            at, ranks = at + size, ranks + (self.rank if rank and self.dropout_p else rank)
        self.members = tuple(members)
        self.used = ranks
        self.stacked = -(-self.used // 16) * 16
        # Rows are aligned to 128 bytes: a product of unaligned rows is 3% slower on an H100.
        unit = 16 if device.type == "cpu" else 64
        self.padding = -(-self.stacked // unit) * unit
        self._after = norm_follows and 0 < self.used <= MAX_ADDED
        self._after_back = norm_precedes and 0 < self.used <= MAX_ADDED
        self.is_quantized = getattr(first.weight, "quant_state", None) is not None
        self.packed: list[nf4.PackedNF4] = []
        self.table: Any = None
        self._resident: torch.Tensor | None = None
        if self.is_quantized:
            self.packed = [nf4.PackedNF4.of(linear.module.weight) for linear in linears]
            if self.packed[0].weights.device == device:
                self.use(self.packed)
            self._hold_adapters(dtype, device)
        else:
            matrix = torch.zeros(self.shape, dtype=dtype, device=device)
            for linear, member in zip(linears, members):
                view = matrix[member.start : member.end, : self.inputs]
                view.copy_(linear.module.weight.data)
                linear.module.weight.data = view  # the module shares this memory
            self._make_resident(matrix)
        # B transposed, which an update reads rank by rank.
        self._b_RN = torch.zeros((self.used if self._after else 0, self.outputs), dtype=dtype, device=device)
        self._bias: torch.Tensor | None = None
        if any(linear.module.bias is not None for linear in linears):
            self._bias = torch.zeros(self.outputs + self.stacked, dtype=dtype, device=device)
            for linear, member in zip(linears, members):
                if linear.module.bias is not None:
                    self._bias[member.start : member.end] = linear.module.bias.data
        self._device = device
        # Set by the engine: views of the adapters' gradients, stacked A (R, D), and all B one after the other.
        self.grad_a: Any = None
        self.grad_b: Any = None

    def _hold_adapters(self, dtype: torch.dtype, device: torch.device) -> None:
        """Allocate the adapters' matrices, which are copied beside the others each time these are dequantized."""
        self.a_RD = torch.zeros((self.stacked, self.inputs), dtype=dtype, device=device)
        self.b_NR = torch.zeros((self.outputs, self.stacked), dtype=dtype, device=device)

    def _make_resident(self, matrix: torch.Tensor) -> None:
        self._resident = matrix
        self.a_RD = matrix[self.outputs : self.outputs + self.stacked, : self.inputs]
        self.b_NR = matrix[: self.outputs, self.inputs : self.inputs + self.stacked]

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of its matrix."""
        return self.outputs + self.padding, self.inputs + self.padding

    @property
    def size(self) -> int:
        """The number of elements of its matrix."""
        return self.shape[0] * self.shape[1]

    @property
    def input_padding(self) -> int:
        """The columns that `forward` needs after its input."""
        return 0 if self._after else self.padding

    @property
    def needs_scratch(self) -> bool:
        """Whether its matrix is dequantized for each use."""
        return self._resident is None

    def use(self, packed: Sequence[nf4.PackedNF4]) -> None:
        """Read the 4-bit matrices from these tensors, on the device; the small ones are moved there."""
        self.table = nf4.table_of([matrix.to(matrix.weights.device) for matrix in packed])

    def store(self, packed: Sequence[nf4.PackedNF4]) -> None:
        """Let the modules hold their 4-bit weights in these tensors."""
        self.packed = list(packed)
        for linear, matrix in zip(self.linears, packed, strict=True):
            matrix.store_in(linear.module.weight)

    def to_device(self) -> None:
        """Move 4-bit weights to the device, if they are not there, and read them from there."""
        if self.packed and self.packed[0].weights.device != self._device:
            self.store([matrix.to(self._device) for matrix in self.packed])
        if self.packed and (self.table is None or self.table.keep[0].weights is not self.packed[0].weights):
            self.use(self.packed)

    def keep_dequantized(self) -> None:
        """Dequantize once, and keep the 16-bit matrix."""
        if self._resident is None:
            self.to_device()
            matrix = self.a_RD.new_zeros(self.shape)
            nf4.dequantize(self.table, matrix)
            self._make_resident(matrix)

    def drop_dequantized(self) -> None:
        """Free the 16-bit matrix of 4-bit weights, which are dequantized for each use again."""
        if self.is_quantized and self._resident is not None:
            dtype, self._resident = self._resident.dtype, None
            self._hold_adapters(dtype, self._device)

    def casts(self) -> list[Cast]:
        """Return the casts that copy each adapter matrix into the group's matrices, in the compute dtype."""
        pairs = []
        for linear, member in zip(self.linears, self.members):
            if member.rank:
                ranks, columns = member.ranks, slice(member.start, member.end)
                pairs.append(Cast(self.a_RD[ranks], linear.a.data, 1.0))
                pairs.append(Cast(self.b_NR[columns, ranks], linear.b.data, member.scale))
                if self._after:
                    pairs.append(Cast(self._b_RN[ranks, columns].T, linear.b.data, member.scale))
        return pairs

    def matrix(self, scratch: torch.Tensor) -> torch.Tensor:
        """Return the whole matrix, of `shape`; it is valid until the scratch buffer is used again."""
        if self._resident is not None:
            return self._resident
        matrix = scratch[: self.size].view(self.shape)
        nf4.dequantize(self.table, matrix, *((self.a_RD, self.b_NR) if self.used else ()))
        return matrix

    def _dropout(self, seed: torch.Tensor | None, skipped: int) -> Dropout | None:
        return Dropout(self.dropout_p, seed, self.key, skipped) if self.dropout_p and seed is not None else None

    def forward(
        self, x_TE: torch.Tensor, matrix: torch.Tensor, out_TE: torch.Tensor, seed: Any, skipped: int = 0
    ) -> tuple[torch.Tensor, Update | None]:
        """Fill the first N columns of `out_TE`.

        Args:
            x_TE: input, (T, D + `input_padding`).
            matrix: result of `matrix`.
            out_TE: output, (T, N + padding).
            seed: seed of dropout; None: none (evaluation).
            skipped: tokens of the batch before the first of these, which are a piece of it.

        Returns:
            u = x A^T, shape (T, used), which backward needs, and the update still to be added to the output.
        """
        N, D, R = self.outputs, self.inputs, self.stacked
        dropout = self._dropout(seed, skipped)
        x_TD = x_TE[:, :D]
        if not self.used:
            self._product(x_TD, matrix[:N, :D].T, out_TE[:, :N])
            return x_TE.new_empty((len(x_TE), 0)), None
        if not self._after:
            u_TR = x_TE.new_empty((len(x_TE), self.used))
            self._project(x_TD, x_TE[:, D : D + R], dropout, u_TR)
            self._product(x_TE[:, : D + R], matrix[:N, : D + R].T, out_TE[:, :N])
            return u_TR, None
        columns = N + R if dropout is None else N
        self._product(x_TD, matrix[:columns, :D].T, out_TE[:, :columns], OFF_GRID)
        u_TR = out_TE[:, N : N + self.used]
        if dropout is None:
            u_TR = u_TR / OFF_GRID
        else:
            self._project(x_TD, out_TE[:, N : N + R], dropout, None)
            u_TR = u_TR.contiguous()
        return u_TR, self.update(u_TR)

    def update(self, u_TR: torch.Tensor) -> Update:
        """Return the update of a product whose adapters are added "after"."""
        return Update(u_TR, self._b_RN, 1 / OFF_GRID)

    def _product(self, x_TD: torch.Tensor, weight_DN: torch.Tensor, out_TN: torch.Tensor, factor: float = 1.0) -> None:
        if self._bias is not None:
            torch.addmm(self._bias[: out_TN.shape[1]], x_TD, weight_DN, beta=factor, alpha=factor, out=out_TN)
        elif factor == 1.0:
            torch.mm(x_TD, weight_DN, out=out_TN)
        else:
            torch.addmm(out_TN, x_TD, weight_DN, beta=0, alpha=factor, out=out_TN)

    def _project(
        self, x_TD: torch.Tensor, u_TR: torch.Tensor, dropout: Dropout | None, copy_TR: torch.Tensor | None
    ) -> None:
        if dropout is None:
            low_rank.project(x_TD, self.a_RD, u_TR, self.stacked, None, copy_TR)
            return
        u_TR[:, self.used :] = 0
        low_rank.project(x_TD, self.a_RD[: self.used], u_TR[:, : self.used], self.rank, dropout, copy_TR)

    def backward(
        self, dy_TE: torch.Tensor, matrix: torch.Tensor, dx_TE: torch.Tensor, seed: Any, skipped: int = 0
    ) -> tuple[torch.Tensor, Update | None]:
        """Fill the first D columns of `dx_TE`.

        Args:
            dy_TE: gradient of the output, with padding.
            dx_TE: gradient of the input, (T, D + padding).

        Returns:
            v = dy s B, shape (T, used), which `add_a` needs, and the update still to be added to the gradient.
        """
        N, D, R = self.outputs, self.inputs, self.stacked
        dropout = self._dropout(seed, skipped)
        if self._after_back:
            torch.mm(dy_TE[:, :N], matrix[:N, : D + R], out=dx_TE[:, : D + R])
            v_TR = dx_TE[:, D : D + self.used]
            if dropout is None:
                return v_TR, Update(v_TR, self.a_RD[: self.used])
        else:
            v_TR = self.project_gradient(dy_TE)
            rows = N if dropout is not None else N + R
            torch.mm(dy_TE[:, :rows], matrix[:rows, :D], out=dx_TE[:, :D])
        if dropout is not None and self.used:
            low_rank.add_projected(dx_TE[:, :D], v_TR, self.a_RD[: self.used], self.rank, dropout)
        return v_TR, None

    def project_gradient(self, dy_TE: torch.Tensor) -> torch.Tensor:
        """Compute v = dy s B by a kernel of its own, into the padding of dy."""
        N, R = self.outputs, self.stacked
        if self.used:
            low_rank.project(dy_TE[:, :N], self.b_NR.T, dy_TE[:, N : N + R], R)
        return dy_TE[:, N : N + self.used]

    def backward_adapters(
        self, dy_TN: torch.Tensor, x_TD: torch.Tensor, u_TR: Any, v_TR: Any, seed: torch.Tensor | None, norm: Any = None
    ) -> None:
        """Accumulate the adapters' gradients.

        Args:
            dy_TN: gradient of the output.
            x_TD: the forward's input, or the norm's input where `norm` is given (see `low_rank.outer`).
            u_TR, v_TR: results of `forward` and `backward`.
        """
        self.add_a(v_TR, x_TD, seed, norm)
        self.add_b(u_TR, dy_TN)

    def add_a(
        self, v_TR: torch.Tensor, x_TD: torch.Tensor, seed: torch.Tensor | None, norm: Any = None, skipped: int = 0
    ) -> None:
        """Accumulate A's gradients, v^T x."""
        if not self.used:
            return
        parts = low_rank.outer(v_TR, x_TD, self.rank, self._dropout(seed, skipped), norm)
        if self.used == len(self.grad_a):
            low_rank.add_a(parts, self.grad_a)
            return
        at = 0
        for member in self.members:  # the ranks between theirs are padding
            if member.rank:
                low_rank.add_a(parts[:, member.ranks], self.grad_a[at : at + member.rank])
                at += member.rank

    def add_b(self, u_TR: torch.Tensor, dy_TN: torch.Tensor) -> None:
        """Accumulate B's gradients, s dy^T u."""
        if self.used:
            parts = low_rank.outer(u_TR, dy_TN, self.used)
            low_rank.add_b(parts, self.grad_b, self.members)
