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

With DoRA the outputs are m / |W + s B A| times these, column by column. The product is stored without that factor, and
without the bias, 1.618 times too large in either way; `scale` says what whoever reads it next has to apply, and
backward gets the gradient of the product itself (`column_scale`). The norms are refreshed where the adapters may have
changed, in a pass that has the matrix at hand anyway; each pass after it reads them from where they are.

With dropout, u comes from a masked copy of x that exists only within a kernel, and v A is masked likewise.

Shapes: T tokens, D inputs, N outputs, R stacked ranks, padded to a multiple of 16; E a width with padding after it:
columns for the adapters, as many as align rows to what products read fastest.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from veneer.kernels import low_rank, nf4
from veneer.kernels.cast import Cast
from veneer.kernels.column_scale import ColumnScale, row_norms, scale_backward
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
        magnitude: norms that DoRA trains, an (N,) parameter; None: it is plain LoRA.
    """

    name: str
    module: Any
    a: Any = None
    b: Any = None
    scale: float = 1.0
    dropout: float = 0.0
    magnitude: Any = None


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
        scale: scale of the outputs' columns (DoRA); None: there is none.
        is_off: whether the next refresh makes it the scale of the frozen layers.
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
        self.scale: ColumnScale | None = None
        self.is_off = False
        self._norm_N: torch.Tensor | None = None  # norms of the frozen matrices' rows, once they have been read
        self._inverse_N: Any = None  # 1 / norm of the adapted ones, divided by OFF_GRID
        if any(linear.magnitude is not None for linear in adapted):
            factor_N, shift_N, self._inverse_N = torch.zeros((3, self.outputs), device=device)
            self.scale = ColumnScale(factor_N.fill_(1 / OFF_GRID), shift_N)
            _collect_biases(linears, members, shift_N)
        elif any(linear.module.bias is not None for linear in linears):
            self._bias = torch.zeros(self.outputs + self.stacked, dtype=dtype, device=device)
            _collect_biases(linears, members, self._bias)
        self._device = device
        # Set by the engine: views of the adapters' gradients, stacked A (R, D), all B one after the other, each m.
        self.grad_a: Any = None
        self.grad_b: Any = None
        self.grad_m: list[Any] = []

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
                    stored = 1.0 if self.scale is None else OFF_GRID
                    pairs.append(Cast(self._b_RN[ranks, columns].T, linear.b.data, member.scale * stored))
        return pairs

    def refresh(self, matrix: torch.Tensor) -> None:
        """Compute the scale of the outputs anew, from the result of `matrix`."""
        if self.scale is None:
            return
        N, D, R = self.outputs, self.inputs, self.stacked
        if self._norm_N is None:
            self._norm_N = torch.linalg.vector_norm(matrix[:N, :D], dim=1, dtype=torch.float32)
        if self.is_off:
            self.scale.factor_N.fill_(1 / OFF_GRID)
            return
        products_RE = torch.mm(self.a_RD, matrix[: N + R, :D].T)  # A W^T, and A A^T
        for linear, member in zip(self.linears, self.members, strict=True):
            if linear.magnitude is not None:
                columns, ranks = slice(member.start, member.end), member.ranks
                row_norms(
                    self._norm_N[columns], products_RE[ranks, columns], products_RE[ranks, N:][:, ranks],
                    self.b_NR[columns, ranks], linear.magnitude.data, self.scale.factor_N[columns],
                    self._inverse_N[columns],
                )  # fmt: skip

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
            factor = 1.0 if self.scale is None else OFF_GRID
            self._product(x_TE[:, : D + R], matrix[:N, : D + R].T, out_TE[:, :N], factor)
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
        """Return the update of a product whose adapters are added "after"; before a scale, it is stored likewise."""
        return Update(u_TR, self._b_RN, 1 / OFF_GRID if self.scale is None else 1.0)

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

    def scale_backward(
        self, dy_TN: torch.Tensor, z_TN: torch.Tensor, dz_TN: torch.Tensor, u_TR: torch.Tensor | None = None
    ) -> None:
        """Turn the gradient of the scaled output into that of the product, and accumulate the magnitudes' gradients.

        Args:
            dy_TN: gradient of the scaled output.
            z_TN: the product as `forward` left it.
            dz_TN: gradient of the product; it may be `dy_TN`.
            u_TR: result of `forward`, where an update is still to be added to the product.
        """
        assert self.scale is not None
        update = self.update(u_TR) if self._after and u_TR is not None else None
        self.add_m(scale_backward(dy_TN, z_TN, self.scale, dz_TN, update))

    def add_m(self, sums_PN: torch.Tensor) -> None:
        """Accumulate the magnitudes' gradients, the sum over tokens of dy z / norm."""
        found_N = sums_PN.sum(0) * self._inverse_N
        for member, grad_N in zip(self.members, self.grad_m, strict=True):
            if grad_N is not None:
                grad_N += found_N[member.start : member.end]


def _collect_biases(linears: Sequence[Linear], members: Sequence[Member], into_N: torch.Tensor) -> None:
    for linear, member in zip(linears, members):
        if linear.module.bias is not None:
            into_N[member.start : member.end] = linear.module.bias.data
