"""Low-rank deltas of many adapters in one batch: the base computes each linear layer once, and each row adds its own.

The matrices of all adapters are stacked a layer, in the base's compute dtype, with LoRA's scale within B; number 0 is
the base, whose matrices are zeros. Each adapted layer's forward adds scale * B A x to its output, in one of five ways,
of which all but `whole` leave W x to the base's own layer, in whatever bits its weights are:

    one       all rows have one adapter: two products with its matrices as they lie
    whole     layers without bias where Triton compiles for the GPU, and more than a few rows of layers in 4 bits where
              these are dequantized: kernels/own_linear.py computes W x as well, for up to three layers that read the
              very same tensor (q, k and v; gate and up), in a launch; for more than 64 rows, own_adapter.py computes
              their deltas, and W x is added to these. Widths are multiples of 64, and ranks at most 64
    kernels   other layers there: own_adapter.py adds to the output in place, with one product with A for the layers
              that read one tensor. Here as above, programs find out which adapters their rows have, so that the
              launches are the same for any mix and a CUDA graph can hold them, and read the matrices of those alone
    masked    a token a row: two products with the matrices of all adapters at once, and between them the ranks that
              are not a row's own are set to zero. The matrices are read once, whatever the number of rows, nothing is
              copied, and the launches are the same for any mix
    gathered  each row's matrices are gathered for a batched product: for prompts, and for few rows of many adapters

PEFT's own mixed batches (`adapter_names`) go through the adapters one by one, with an index and an addition for each.

N adapters, B rows, T tokens of a row, I inputs, O outputs, R ranks, K = N * R, M layers that share an input.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property, partial
from typing import Any, NamedTuple, TypeVar

import torch

from veneer.kernels.launch import compiles
from veneer.kernels.own_adapter import MOST_LAYERS, add_own, own_deltas, project_own
from veneer.kernels.own_linear import MOST_ROWS, fits, new_counts, own_linear

T = TypeVar("T")

RANK_STEP = 8  # ranks are padded to a multiple of it


class Matrices(NamedTuple):
    """An adapter's matrices on one layer, with its scale within B."""

    a_RI: torch.Tensor
    b_OR: torch.Tensor


class _Group:
    """Stacked matrices of the layers that read one tensor; P outputs of all of them.

    Attributes:
        a_NMRI: A matrices.
        b_NRP: B matrices, those of the layers beside each other.
    """

    def __init__(self, a_NMRI: torch.Tensor, b_NRP: torch.Tensor, module: Any) -> None:
        self.a_NMRI, self.b_NRP, self._modules = a_NMRI, b_NRP, [module]
        self._is_plain, self._is_packed = is_plain_linear(module), is_packed_linear(module, a_NMRI.dtype)
        self._counts = new_counts(b_NRP.shape[2], b_NRP.device)

    def __len__(self) -> int:
        return len(self._modules)

    def add(self, a_N1RI: torch.Tensor, b_NRO: torch.Tensor, module: Any) -> None:
        """Take another layer with its matrices."""
        a_NMRI, b_NRP = torch.cat([self.a_NMRI, a_N1RI], 1), torch.cat([self.b_NRP, b_NRO], 2)
        self._counts = new_counts(b_NRP.shape[2], b_NRP.device)  # before anything is replaced: memory may be short
        self.replace(a_NMRI, b_NRP)
        self._modules.append(module)
        self._is_plain = self._is_plain and is_plain_linear(module)
        self._is_packed = self._is_packed and is_packed_linear(module, a_N1RI.dtype)

    def widened(self, ranks: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the matrices with room for so many ranks."""
        missing = (0, 0, 0, ranks - self.a_NMRI.shape[2])
        return torch.nn.functional.pad(self.a_NMRI, missing), torch.nn.functional.pad(self.b_NRP, missing)

    def replace(self, a_NMRI: torch.Tensor, b_NRP: torch.Tensor) -> None:
        """Take other matrices."""
        self.a_NMRI, self.b_NRP = a_NMRI, b_NRP
        self.__dict__.pop("_fits", None)

    def is_whole(self, rows: int) -> bool:
        """Return whether kernels compute the layers' products with their weights as well, for so many rows."""
        return self._fits and rows > (max(map(few_rows, self._shapes)) if self._is_packed else 0)

    def start(self, x_TI: torch.Tensor, number_B: torch.Tensor) -> list[torch.Tensor]:
        """Return the outputs of the layers; for more than MOST_ROWS rows only their deltas, which `finish` adds to."""
        if len(x_TI) <= MOST_ROWS:
            weights = [self._weight(member) for member in range(len(self))]
            return own_linear(x_TI, weights, self.a_NMRI, self.b_NRP, number_B, self._counts)
        h_PTK = project_own(x_TI, self.a_NMRI, number_B)
        return own_deltas(h_PTK, self.b_NRP, [outputs for outputs, _ in self._shapes], number_B)

    def finish(self, member: int, output_TO: torch.Tensor, x_TI: torch.Tensor) -> torch.Tensor:
        """Return a layer's output."""
        return output_TO if len(x_TI) <= MOST_ROWS else output_TO.addmm_(x_TI, self._weight(member).T)

    def _weight(self, member: int) -> torch.Tensor:
        """Return a layer's weight in the compute dtype, [O, I]."""
        weight: torch.Tensor = self._modules[member].weight
        if self._is_packed:
            from bitsandbytes.functional import dequantize_4bit

            weight = dequantize_4bit(weight, weight.quant_state)  # type: ignore[attr-defined]
        return weight

    @property
    def _shapes(self) -> list[tuple[int, int]]:
        """Outputs and inputs of each layer."""
        return [(module.out_features, module.in_features) for module in self._modules]

    @cached_property
    def _fits(self) -> bool:
        dtype, ranks = self.a_NMRI.dtype, self.a_NMRI.shape[2]
        if self._is_packed:
            like = [torch.empty(shape, dtype=dtype, device="meta") for shape in self._shapes]
            return dequantizes(self.a_NMRI.device) and fits(like, ranks)
        return self._is_plain and fits([module.weight for module in self._modules], ranks, dtype)


def is_plain_linear(module: Any) -> bool:
    """Return whether a layer is x W^T with a tensor of numbers, and nothing wraps its forward."""
    is_linear = type(module) is torch.nn.Linear and getattr(module, "bias", None) is None
    return is_linear and "forward" not in module.__dict__ and type(module.weight.data) is torch.Tensor


def is_packed_linear(module: Any, dtype: torch.dtype) -> bool:
    """Return whether a layer is x W^T with W in bitsandbytes' 4 bits for that dtype, and nothing wraps its forward."""
    if type(module).__name__ != "Linear4bit" or module.bias is not None or "forward" in module.__dict__:
        return False
    state = module.weight.quant_state
    return state is not None and state.dtype == dtype and module.compute_dtype in (None, dtype)


def dequantizes(device: torch.device) -> bool:
    """Return whether many rows are multiplied faster by dequantized weights than by those in 4 bits: see `few_rows`."""
    return torch.cuda.get_device_capability(device)[0] in (9, 10)


def few_rows(shape: tuple[int, int]) -> int:
    """Return the rows up to which 4-bit weights [outputs, inputs] are faster as they are.

    About as bitsandbytes 0.50 has it on Hopper (`_gemm_4bit_use_custom_cuda`), which decides for the layers' own
    forward.
    """
    outputs, inputs = shape
    if outputs * inputs < 2**22:
        return 512
    return 64 if outputs > 2**14 else 32


def rows_of(x: torch.Tensor) -> torch.Tensor:
    """Return the rows of a layer's input, each of them in one piece, [T, I]."""
    x_TI = x.reshape(-1, x.shape[-1])
    return x_TI if x_TI.stride(-1) == 1 else x_TI.contiguous()


class _Layer:
    """Stacked matrices of one layer: where they lie among those of its group."""

    def __init__(self, group: _Group, member: int, outputs: slice) -> None:
        self.group, self.member, self._outputs = group, member, outputs

    @property
    def a(self) -> torch.Tensor:
        """A matrices of all adapters, [N, R, I]."""
        return self.group.a_NMRI[:, self.member]

    @property
    def b(self) -> torch.Tensor:
        """B matrices of all adapters, [N, R, O]."""
        return self.group.b_NRP[:, :, self._outputs]

    def one(self, x: torch.Tensor, number: int) -> torch.Tensor:
        return (x @ self.a[number].T) @ self.b[number]

    def masked(self, x_BTI: torch.Tensor, mask_BK: torch.Tensor) -> torch.Tensor:
        h_BTK = (x_BTI @ self.a.flatten(0, 1).T) * mask_BK[:, None]
        return h_BTK @ self.b.flatten(0, 1)

    def gathered(self, x_BTI: torch.Tensor, number_B: torch.Tensor) -> torch.Tensor:
        h_BTR = torch.bmm(x_BTI, self.a[number_B].mT)
        return torch.bmm(h_BTR, self.b[number_B])


class _Shared(NamedTuple):
    """What was computed last for layers of a group, from an input as it was then."""

    group: _Group
    x: torch.Tensor
    version: int  # grows as the input is changed in place
    computed: Any


class AdapterBank:
    """The matrices of all adapters that are served, on the layers of one base.

    Args:
        model: The base, a Transformers model in evaluation mode; the forwards of its layers are replaced.
        adapters: Most adapters at a time.
        dtype: Compute dtype of the base.

    Attributes:
        version: Grows when buffers are replaced, so that what was recorded with the old ones is void.
    """

    def __init__(self, model: Any, adapters: int, dtype: torch.dtype) -> None:
        self._model, self._count, self._dtype = model, adapters + 1, dtype
        self._rank = 0
        self._layers: dict[str, _Layer] = {}
        self._groups: dict[str, _Group] = {}
        self._leaders: dict[str, str] | None = None
        self._by_kernels = compiles(self._device)
        self._shared: _Shared | None = None
        self._number: int | None = None
        self._number_B: torch.Tensor | None = None
        self._mask_BK: torch.Tensor | None = None
        self.version = 0

    @property
    def bytes(self) -> int:
        """Bytes of all matrices."""
        parts = (part for layer in self._layers.values() for part in (layer.a, layer.b))
        return sum(part.numel() * part.element_size() for part in parts)

    @property
    def numbers(self) -> range:
        """The numbers that adapters can have."""
        return range(1, self._count)

    def put(self, number: int, matrices: Mapping[str, Matrices]) -> None:
        """Give a number the matrices of an adapter, by the paths of its layers; in place of what it had."""
        assert 0 < number < self._count
        needed = max((len(one.a_RI) for one in matrices.values()), default=0)
        if needed > self._rank:
            self._widen(-(-needed // RANK_STEP) * RANK_STEP)
        self.clear(number)
        for path, one in matrices.items():
            if path not in self._layers:
                self._add_layer(path, one)
            layer, rank = self._layers[path], len(one.a_RI)
            layer.a[number, :rank] = one.a_RI.to(layer.a)
            layer.b[number, :rank] = one.b_OR.T.to(layer.b)

    def clear(self, number: int) -> None:
        """Make a number as the base is."""
        for layer in self._layers.values():
            layer.a[number] = 0
            layer.b[number] = 0

    @contextmanager
    def rows(self, numbers: list[int], tokens: int) -> Iterator[None]:
        """Within the context, the rows of a batch have these adapters; for batches that are not recorded.

        Args:
            numbers: Number of each row's adapter.
            tokens: Tokens a row.
        """
        if len(set(numbers)) == 1:
            self._number = numbers[0]
        elif self._by_kernels:
            self._number_B = torch.tensor(numbers).to(self._device, non_blocking=True)
        elif tokens == 1 and self._count <= 3 * len(numbers):  # gathering writes and reads what it copies
            self._mask_BK = self.mask(torch.tensor(numbers, device=self._device))
        else:
            self._number_B = torch.tensor(numbers).to(self._device, non_blocking=True)
        try:
            yield
        finally:
            self._number = self._number_B = self._mask_BK = self._shared = None

    @contextmanager
    def device_rows(self, number_B: torch.Tensor | None) -> Iterator[None]:
        """Within the context, the rows of a batch have these adapters; for passes that are recorded.

        Args:
            number_B: Number of each row's adapter, int64, which a recorded pass reads anew; None: all are the base's.
        """
        if number_B is None:
            self._number = 0
        elif self._by_kernels:
            self._number_B = number_B
        else:
            self._mask_BK = self.mask(number_B)
        try:
            yield
        finally:
            self._number = self._number_B = self._mask_BK = self._shared = None

    def mask(self, number_B: torch.Tensor) -> torch.Tensor:
        """Return which of all adapters' ranks belong to each row's own, [B, K], in the compute dtype."""
        owner_K = torch.arange(self._count, device=number_B.device).repeat_interleave(max(self._rank, 1))
        return (owner_K == number_B[:, None]).to(self._dtype)

    @property
    def is_empty(self) -> bool:
        """Whether no layer has matrices."""
        return not self._layers

    @property
    def _device(self) -> torch.device:
        device: torch.device = self._model.get_input_embeddings().weight.device
        return device

    def _add_layer(self, path: str, like: Matrices) -> None:
        device = next(self._model.get_submodule(path).parameters()).device
        a_N1RI = torch.zeros((self._count, 1, self._rank, like.a_RI.shape[1]), dtype=self._dtype, device=device)
        b_NRO = torch.zeros((self._count, self._rank, like.b_OR.shape[0]), dtype=self._dtype, device=device)
        module, leader = self._model.get_submodule(path), self._leader(path)
        if leader in self._groups:
            group = self._groups[leader]
            group.add(a_N1RI, b_NRO, module)
        else:
            group = self._groups[leader] = _Group(a_N1RI, b_NRO, module)
        outputs = slice(group.b_NRP.shape[2] - len(like.b_OR), group.b_NRP.shape[2])
        self._layers[path] = layer = _Layer(group, len(group) - 1, outputs)
        module.forward = partial(self._forward, layer, module.forward)
        self.version += 1

    def _leader(self, path: str) -> str:
        """Return the first of the layers that read the tensor which a layer reads; itself where they share nothing."""
        if not self._by_kernels:
            return path
        if self._leaders is None:
            self._leaders = first_readers(self._model)
        return self._leaders.get(path, path)

    def _widen(self, rank: int) -> None:
        # All of them before one is replaced: memory may be short.
        wider = [group.widened(rank) for group in self._groups.values()]
        for group, both in zip(self._groups.values(), wider, strict=True):
            group.replace(*both)
        self._rank = rank
        self.version += 1

    def _forward(self, layer: _Layer, own: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        """Return what a layer puts out, whose own forward is `own`."""
        group, number_B = layer.group, self._number_B
        if not self._by_kernels or number_B is None or x.dtype != self._dtype:
            return self._added(layer, x, own(x))
        if not group.is_whole(x.numel() // x.shape[-1]):
            return self._added(layer, x, own(x))
        shared = self._shared_by(group, x)
        if shared is None or shared[1][layer.member] is None:
            x_TI = rows_of(x)
            shared = self._share(group, x, (x_TI, [*group.start(x_TI, number_B)]))
        x_TI, outputs = shared
        output: torch.Tensor = group.finish(layer.member, outputs[layer.member], x_TI)
        outputs[layer.member] = None  # which the model may change now
        return output.view(*x.shape[:-1], output.shape[-1])

    def _added(self, layer: _Layer, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        if self._number == 0:
            return output
        if self._by_kernels:
            return self._added_in_place(layer, x, output)
        own = x.to(self._dtype)
        if self._number is not None:
            return output + layer.one(own, self._number).to(output.dtype)
        if self._mask_BK is not None:
            return output + layer.masked(own, self._mask_BK).to(output.dtype)
        if self._number_B is not None:
            return output + layer.gathered(own, self._number_B).to(output.dtype)
        return output

    def _added_in_place(self, layer: _Layer, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        output = output.contiguous()
        out_TO = output.view(-1, output.shape[-1])
        if self._number is not None:
            h_TK, first = self._projected(layer.group, x), layer.member * self._rank
            out_TO.addmm_(h_TK[:, first : first + self._rank].to(out_TO.dtype), layer.b[self._number].to(out_TO.dtype))
        elif self._number_B is not None:
            add_own(out_TO, self._projected(layer.group, x), layer.member, layer.b, self._number_B)
        return output

    def _projected(self, group: _Group, x: torch.Tensor) -> torch.Tensor:
        """Return the product of a tensor with a group's A matrices, which is computed once for all its layers."""
        product: torch.Tensor | None = self._shared_by(group, x)
        if product is None:
            own_TI = rows_of(x.to(self._dtype))
            if self._number_B is not None:
                product = project_own(own_TI, group.a_NMRI, self._number_B)
            else:
                product = own_TI @ group.a_NMRI[self._number].flatten(0, 1).T
            self._share(group, x, product)
        return product

    def _share(self, group: _Group, x: torch.Tensor, computed: T) -> T:
        self._shared = _Shared(group, x, x._version, computed)
        return computed

    def _shared_by(self, group: _Group, x: torch.Tensor) -> Any:
        """Return what was computed last, if it was for this group and this very tensor, unchanged since."""
        last = self._shared
        is_it = last is not None and last.group is group and last.x is x and last.version == x._version
        return last.computed if last is not None and is_it else None


@torch.no_grad()
def first_readers(model: Any) -> dict[str, str]:
    """Return for each layer the first of those that read the very same tensor in a pass over a token.

    Of more than MOST_LAYERS that read it, those beyond have a first one of their own.
    """
    read: list[tuple[str, torch.Tensor]] = []

    def note(path: str) -> Any:
        return lambda module, inputs: read.append((path, inputs[0])) if inputs else None

    parts = [(path, part) for path, part in model.named_modules() if getattr(part, "weight", None) is not None]
    hooks = [part.register_forward_pre_hook(note(path)) for path, part in parts]
    try:
        model(input_ids=torch.tensor([[0]], device=model.get_input_embeddings().weight.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    found, latest = dict[str, str](), dict[int, list[str]]()
    for path, tensor in read:
        readers = latest.setdefault(id(tensor), [])
        if len(readers) == MOST_LAYERS:
            readers = latest[id(tensor)] = []
        readers.append(path)
        found[path] = readers[0]
    return found
