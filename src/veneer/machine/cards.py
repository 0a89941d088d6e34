"""Known GPUs (cards.yaml), and parsing of `--gpu`.

Memory is what the driver reports, in MiB. Speeds are the data sheets': dense bf16 (fp16 where there is no bf16)
products summed in float32, float32 products outside the tensor cores, and memory bandwidth. What is reached in
practice is in `veneer.planning.time`.
"""

import difflib
import re
from dataclasses import dataclass

from veneer.config import UserError
from veneer.config.files import packaged_table
from veneer.config.sizes import parse_size


@dataclass(frozen=True)
class Card:
    """A GPU with the numbers of its data sheet.

    Attributes:
        name: common name.
        memory_mib: memory that the driver reports, in MiB.
        half_tflops: 10^12 operations a second in bf16 or fp16.
        single_tflops: the same in float32.
        bandwidth_gbs: 10^9 bytes a second.
        capability: CUDA compute capability, times ten.
    """

    name: str
    memory_mib: int
    half_tflops: float
    single_tflops: float
    bandwidth_gbs: float
    capability: int

    @property
    def memory_bytes(self) -> int:
        return self.memory_mib * 2**20

    @property
    def has_bfloat16(self) -> bool:
        return self.capability >= 80

    @property
    def link_gbs(self) -> float:
        """10^9 bytes a second from or to pinned host memory: what is reached of 16 lanes of its PCI Express."""
        return 52.0 if self.capability >= 90 else 22.0 if self.capability >= 80 else 11.0

    @property
    def has_nvlink(self) -> bool:
        """Whether the GPUs of a machine with several are usually linked by NVLink: the SXM forms of servers."""
        return self.name.split()[0] in ("a100", "h100", "h200", "b200") and not self.name.endswith("pcie")


CARDS = {name: Card(name, *facts) for name, facts in packaged_table("veneer.machine", "cards.yaml").items()}


def find_card(name: str) -> Card | None:
    """Find a card by a common name or the driver's: "RTX 4090", "NVIDIA H100 80GB HBM3"; None: not known."""
    wanted = _plain(name)
    if wanted in _BY_PLAIN_NAME:
        return _BY_PLAIN_NAME[wanted]
    # The longest known name within the driver's: "NVIDIA A100-SXM4-80GB" holds both a100 and 80gb.
    inside = [card for card in CARDS.values() if all(_has(wanted, word) for word in card.name.split())]
    return max(inside, key=lambda card: len(card.name), default=None)


def parse_budget(text: str) -> tuple[int, Card | None]:
    """Parse `--gpu`: a known card, or an amount of memory with its unit.

    Returns:
        Bytes, and the card where one was named.

    Raises:
        UserError: the card is unknown, or the memory has no unit or is not positive.
    """
    try:
        size = parse_size(text)
    except ValueError as error:
        raise UserError(f"--gpu {text}: {error}", "write for example 24GiB, or the name of a card: rtx 4090") from None
    if size is not None:
        return size, None
    card = find_card(text)
    if card is None:
        near = difflib.get_close_matches(_plain(text), list(_BY_PLAIN_NAME), n=3, cutoff=0.3)
        names = [_BY_PLAIN_NAME[name].name for name in near] or list(CARDS)
        raise UserError(f"--gpu {text}: an unknown card; nearest: {', '.join(names)}", "or write its memory: 24GiB")
    return card.memory_bytes, card


def _plain(name: str) -> str:
    words = re.sub(r"[^a-z0-9]+", " ", name.lower()).split()
    return " ".join(word for word in words if word not in ("nvidia", "geforce", "tesla", "quadro"))


def _has(name: str, word: str) -> bool:
    return re.search(rf"(^| ){re.escape(word)}( |$)", name) is not None


_BY_PLAIN_NAME = {_plain(name): card for name, card in CARDS.items()}
