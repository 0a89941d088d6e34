"""Known GPUs, and sizes as a person writes them.

Memory is what the driver reports, in MiB. Speeds are the data sheets': dense bf16 (fp16 where there is no bf16)
products summed in float32, float32 products outside the tensor cores, and memory bandwidth. What is reached in
practice is in `veneer.planning.time`.
"""

import difflib
import re
from dataclasses import dataclass

from veneer.config import UserError


@dataclass(frozen=True)
class Card:
    """A GPU as its maker describes it.

    Attributes:
        name: its common name.
        memory_mib: MiB the driver reports.
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


CARDS = {
    card.name: card
    for card in (
        Card("rtx 2080 ti", 11264, 53.8, 13.4, 616, 75),
        Card("rtx 3060", 12288, 25.6, 12.7, 360, 86),
        Card("rtx 3070", 8192, 40.6, 20.3, 448, 86),
        Card("rtx 3080", 10240, 59.5, 29.8, 760, 86),
        Card("rtx 3090", 24576, 71.0, 35.6, 936, 86),
        Card("rtx 4060", 8188, 30.2, 15.1, 272, 89),
        Card("rtx 4060 ti 16gb", 16380, 44.1, 22.1, 288, 89),
        Card("rtx 4070", 12282, 58.3, 29.1, 504, 89),
        Card("rtx 4080", 16376, 97.5, 48.7, 717, 89),
        Card("rtx 4090", 24564, 165.2, 82.6, 1008, 89),
        Card("rtx 5070 ti", 16303, 87.9, 43.9, 896, 120),
        Card("rtx 5080", 16303, 112.6, 56.3, 960, 120),
        Card("rtx 5090", 32607, 209.5, 104.8, 1792, 120),
        Card("t4", 15360, 65.0, 8.1, 320, 75),
        Card("v100 16gb", 16384, 125.0, 15.7, 900, 70),
        Card("v100 32gb", 32768, 125.0, 15.7, 900, 70),
        Card("a10", 23028, 125.0, 31.2, 600, 86),
        Card("a10g", 23028, 70.0, 31.5, 600, 86),
        Card("l4", 23034, 121.0, 30.3, 300, 89),
        Card("a30", 24576, 165.0, 10.3, 933, 80),
        Card("rtx a5000", 24564, 111.1, 27.8, 768, 86),
        Card("a100 40gb", 40960, 312.0, 19.5, 1555, 80),
        Card("a40", 46068, 149.7, 37.4, 696, 86),
        Card("rtx a6000", 49140, 154.8, 38.7, 768, 86),
        Card("l40s", 46068, 362.0, 91.6, 864, 89),
        Card("rtx 6000 ada", 49140, 364.2, 91.1, 960, 89),
        Card("a100 80gb", 81920, 312.0, 19.5, 2039, 80),
        Card("h100 pcie", 81559, 756.0, 51.0, 2000, 90),
        Card("h100", 81559, 989.0, 67.0, 3350, 90),
        Card("h200", 143771, 989.0, 67.0, 4800, 90),
        Card("b200", 183359, 2250.0, 75.0, 8000, 100),
    )
}
UNITS = {"gib": 2**30, "mib": 2**20, "gb": 10**9, "mb": 10**6}
_SIZE = re.compile(r"^([-+]?[0-9]*\.?[0-9]+)\s*([a-z]*)$")


def find_card(name: str) -> Card | None:
    """A card by the name a person or a driver gives it: "RTX 4090", "NVIDIA H100 80GB HBM3"; None: not known."""
    wanted = _plain(name)
    if wanted in _BY_PLAIN_NAME:
        return _BY_PLAIN_NAME[wanted]
    # The longest known name within the driver's: "NVIDIA A100-SXM4-80GB" holds both a100 and 80gb.
    inside = [card for card in CARDS.values() if all(_has(wanted, word) for word in card.name.split())]
    return max(inside, key=lambda card: len(card.name), default=None)


def parse_budget(text: str) -> tuple[int, Card | None]:
    """`--gpu`: a known card, or an amount of memory with its unit.

    Returns:
        Bytes, and the card where one was named.

    Raises:
        UserError: An unknown card, a number without a unit, nothing or less.
    """
    size = _SIZE.match(text.strip().lower())
    if size is not None:
        number, unit = float(size[1]), size[2]
        if unit not in UNITS:
            what = f"an unknown unit `{unit}`" if unit else "a number without a unit"
            raise UserError(f"--gpu {text}: {what}", f"write {size[1]}GiB, or the name of a card such as rtx 4090")
        if number <= 0:
            raise UserError(f"--gpu {text}: memory must be more than nothing", "write for example 24GiB")
        return int(number * UNITS[unit]), None
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
