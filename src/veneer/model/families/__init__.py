"""Model families, each a frozen description (family.py), in a file per lineage. A new one is registered here."""

from veneer.model.families.family import DecoderNames, Family, GgufNames
from veneer.model.families.gemma import GEMMA2
from veneer.model.families.gpt import GPT2, OPT
from veneer.model.families.llama import LLAMA, MISTRAL
from veneer.model.families.phi import PHI3
from veneer.model.families.qwen import QWEN2, QWEN3

__all__ = ["FAMILIES", "DecoderNames", "Family", "GgufNames"]

FAMILIES = {family.model_type: family for family in (LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA2, PHI3, GPT2, OPT)}
