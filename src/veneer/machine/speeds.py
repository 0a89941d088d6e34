"""The speed of a machine: ceilings measured on it (`veneer doctor --measure`) or from its card's data sheet.

So is the link between its GPUs, which `veneer doctor` measures wherever there are several.
"""

import platform
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from veneer.config.cache import cache_folder
from veneer.config.files import read_json, reading
from veneer.config.folder import write_json
from veneer.machine.cards import Card
from veneer.machine.device import Machine


@dataclass(frozen=True)
class Ceilings:
    """Speeds that a machine sustains at most.

    Attributes:
        half_flops: operations a second of a large bf16 (or fp16) product.
        single_flops: operations a second of a float32 one.
        attention_flops: operations a second of attention.
        bandwidth: bytes read and written a second.
        start_seconds: time of the shortest operation on the device.
        host_seconds: time of one operation in Python and torch on the host, autograd included.
        overlaps: whether the host goes on while the device works; a CPU is both.
        spread: factors of the predicted time within which the true one is.
        source: origin of the numbers.
        link: bytes a second between the host's pinned memory and the device, each way.
    """

    half_flops: float
    single_flops: float
    attention_flops: float
    bandwidth: float
    start_seconds: float
    host_seconds: float
    overlaps: bool
    spread: tuple[float, float]
    source: str
    link: float = 22e9


@dataclass(frozen=True)
class GpuLink:
    """The link over which the GPUs of a machine exchange gradients.

    Attributes:
        bandwidth: bus bandwidth, bytes a second: an all-reduce of B bytes over n GPUs takes 2 (n - 1) / n * B / it.
        has_peers: whether each GPU reaches the memory of all others; None: not known.
        source: origin of the numbers.
    """

    bandwidth: float
    has_peers: bool | None
    source: str

    def exchange_seconds(self, size: int, gpus: int) -> float:
        """Return the time of an all-reduce of so many bytes."""
        return 2 * (gpus - 1) / gpus * size / self.bandwidth


NVLINK = 187e9  # what one all-reduce of 168 MB reaches over NVLink between two H100, in 0.9 ms
OVER_HOST = 0.3  # share of a card's link to the host that is left where gradients go through the host's memory


def link_of(card: Card | None) -> GpuLink:
    """Return the link to assume between GPUs of a kind until it is measured; None: it is not known."""
    if card is not None and card.has_nvlink:
        return GpuLink(NVLINK, True, "NVLink between two H100")
    pci = 22.0 if card is None else card.link_gbs
    return GpuLink(OVER_HOST * pci * 1e9, None, "PCI Express without peer access, assumed")


def ceilings_of(card: Card) -> Ceilings:
    """Estimate the ceilings of a card from its data sheet, by the shares of it that an H100 reaches."""
    return Ceilings(
        half_flops=0.66e12 * card.half_tflops,
        single_flops=0.67e12 * card.single_tflops,
        attention_flops=0.25e12 * card.half_tflops * (1.6 if card.capability < 90 else 1),  # tuned kernels
        bandwidth=0.78e9 * card.bandwidth_gbs,
        start_seconds=3e-6,
        host_seconds=40e-6,
        overlaps=True,
        spread=(0.6, 1.6),
        source=f"data sheet of the {card.name}",
        link=card.link_gbs * 1e9,
    )


def ceilings_file(machine: Machine, what: str = "") -> Path:
    """Return the file of this machine's measured ceilings, or of something else that was measured."""
    name = f"{machine.name} {machine.cores} {platform.machine()} torch {torch.__version__}{what}"
    return cache_folder() / "ceilings" / ("".join(c if c.isalnum() else "-" for c in name) + ".json")


def load_ceilings(machine: Machine) -> Ceilings | None:
    """Load the measured ceilings of this machine; None: never measured."""
    file = ceilings_file(machine)
    if not file.exists():
        return None
    fix = f"delete {file}, and measure again with `veneer doctor --measure`"
    values = read_json(file, "spread", fix=fix)
    with reading(file, fix):
        return Ceilings(**values | {"spread": tuple(values["spread"])})


def save_ceilings(machine: Machine, ceilings: Ceilings) -> None:
    """Save measured ceilings for later plans."""
    file = ceilings_file(machine)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, asdict(ceilings))


def _link_file(machine: Machine, gpus: int) -> Path:
    return ceilings_file(machine, f" link of {gpus}")


def load_link(machine: Machine, gpus: int) -> GpuLink | None:
    """Load the measured link between this machine's GPUs; None: never measured with so many."""
    file = _link_file(machine, gpus)
    if not file.exists():
        return None
    fix = f"delete {file}, and measure again with `veneer doctor`"
    values = read_json(file, "bandwidth", fix=fix)
    with reading(file, fix):
        return GpuLink(**values)


def save_link(machine: Machine, gpus: int, link: GpuLink) -> None:
    """Save a measured link for later plans."""
    file = _link_file(machine, gpus)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, asdict(link))
